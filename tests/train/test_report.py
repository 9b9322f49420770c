"""The page and the table that show runs side by side."""

import html.parser
import re
import subprocess
import sys
from pathlib import Path

import pytest

from train import config, report
from train.loop import run
from train.wording import ConfigError

ROOT = Path(config.__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two small runs of different recipes, in one folder of runs."""
    folder = tmp_path_factory.mktemp("runs")
    for name, keys in (("float", {}), ("one bit", {"recipe": "fqt_1bit", "optimizer": {"lr": 0.01}})):
        tree = {
            "model": {"name": "vgg_small"},
            "data": {"name": "digits", "batch_size": 64, "limit": 256},
            "tracking": {"every": 2, "baseline_steps": 1},
            "checkpoint": {"enabled": False},
            "device": "cpu",
            "output": str(folder),
            "name": name.replace(" ", "_"),
            "quiet": True,
        }
        run(config.parse({**tree, **keys}))
    return folder


class Page(html.parser.HTMLParser):
    """Tags in order, what they refer to, and whether all are closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_one_page_shows_all_and_refers_to_nothing_outside(runs, tmp_path, capsys):
    assert report.main([str(runs), "--output", "page.html"]) == 0
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.tags.count("svg") == len(report.CURVES) - 1, "all but the perplexity"
    assert "script" not in page.tags
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in page.references)
    for wanted in ("Speed-up, measured", "Accuracy", "Bits of the layers", "recipe", "optimizer.lr", "0.01"):
        assert wanted in text, wanted
    printed = capsys.readouterr().out
    assert "The page is page.html" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_the_table_says_what_the_runs_ended_with(runs):
    first, second = (one.row() for one in report.find([str(runs)]))
    assert (first["recipe"], second["recipe"]) == ("fp32", "fqt_1bit")
    assert first["steps"] == second["steps"] == "4"
    assert re.fullmatch(r"\d+\.\d\d %", second["test"])
    assert re.fullmatch(r"\d+\.\d\dx", second["speed-up"])
    assert (first["speed-up"], first["valid"]) == ("", "")


def test_only_keys_that_differ_are_listed(runs):
    keys = [row[0] for row in report.differing(report.find([str(runs)]))]
    assert keys == ["recipe", "optimizer.lr", "name"]
    assert report.differing(report.find([str(runs / "float")])) == []


def test_a_folder_given_twice_is_shown_once(runs):
    assert len(report.find([str(runs), str(runs / "float")])) == 2


def test_half_written_lines_and_odd_values_do_no_harm(tmp_path):
    folder = tmp_path / "a<b" / "1"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "loss/train": NaN}\n{"step": 2, "loss/train": 1.5, "x": "<i>"}\n{"step": 3, "lo'
    )
    (shown,) = report.find([str(folder)])
    assert shown.curves["loss/train"][0] == [1, 2]
    assert "a&lt;b/1" in report.page([shown])


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["nowhere"], "RUN nowhere: there is no metrics.jsonl below it"),
        (["RUNS", "--output", "no/such/folder/page.html"], "--output no/such/folder/page.html: it cannot be written"),
    ],
)
def test_mistakes_are_told(runs, arguments, wanted, capsys):
    assert report.main([str(runs) if word == "RUNS" else word for word in arguments]) == 2
    assert wanted in capsys.readouterr().err


def test_a_broken_configuration_is_told(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read as a run"):
        report.find([str(tmp_path)])


def test_without_matplotlib_the_remedy_is_told(runs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main([str(runs)]) == 2
    assert "pip install 'fqt[report]'" in capsys.readouterr().err


def test_the_report_needs_no_torch():
    done = subprocess.run(
        [sys.executable, "-c", "import sys; import train.report; print('torch' in sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "False\n"
