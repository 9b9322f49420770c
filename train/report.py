"""Runs side by side, to be read without a server: `python -m train.report RUN [RUN ...] [--output report.html]`.

Prints a table, and writes one HTML page that holds all that it shows: the table, the curves, the bits of the layers over time,
and what differs between the configurations. RUN is a run's folder, or a folder of runs, of which all are shown. Needs
matplotlib (pip install 'fqt[report]').
"""

import argparse
import base64
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Column, Table

from train import files, log
from train.config import key_table
from train.sections import home
from train.wording import ConfigError, show

CURVES = {
    "Speed-up, measured": ["speedup/measured"],
    "Time saved, in seconds": ["speedup/time_saved_s"],
    "Accuracy": ["accuracy/train", "accuracy/valid", "accuracy/test"],
    "Perplexity": ["perplexity/train", "perplexity/valid", "perplexity/test"],
    "Loss": ["loss/train"],
    "Norm of the gradients": ["gradient_norm"],
    "Learning rate": ["learning_rate"],
}
"""Each figure's title, and the scalars in it."""
TERMINAL = ("run", "recipe", "loss", "test", "speed-up", "time saved")
"""The columns that 80 characters have room for; the page has all."""
STYLES = ("-", "--", ":")
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Training runs</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto; }
th, td { border: 1px solid #ccc; padding: .3em .6em; text-align: left; }
th { background: #f2f2f2; }
figure { display: inline-block; margin: .5em; vertical-align: top; }
figure svg, figure img { max-width: 560px; height: auto; }
</style>
<h1>Training runs</h1>
{% macro table(head, rows) %}
<table>
<tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</table>
{% endmacro %}
{{ table(head, rows) }}
<h2>Curves</h2>
{% for svg in curves %}<figure>{{ svg | safe }}</figure>{% endfor %}
{% if bits %}<h2>Bits of the layers</h2>
{% for name, data in bits %}<figure><figcaption>{{ name }}</figcaption><img alt="bits of the layers of {{ name }}"
src="data:image/png;base64,{{ data }}"></figure>{% endfor %}{% endif %}
{% if keys %}<h2>Where the configurations differ</h2>
{{ table(names, keys) }}{% endif %}
</html>
"""


@dataclass(frozen=True)
class Run:
    """What a run left. curves: by scalar, its steps and values. config: flat, of all keys."""

    name: str
    folder: Path
    curves: Mapping[str, tuple[list[int], list[float]]]
    config: Mapping[str, Any]

    def last(self, scalar: str) -> float | None:
        """The newest value of a scalar; None where the run has none."""
        return self.curves[scalar][1][-1] if scalar in self.curves else None

    def quality(self, part: str) -> str:
        """The accuracy or the perplexity on a part of the data."""
        perplexity = self.last(f"perplexity/{part}")
        return percent(self.last(f"accuracy/{part}")) if perplexity is None else f"perplexity {perplexity:.4g}"

    def row(self) -> dict[str, str]:
        """What the table says."""
        saved, measured = self.last("speedup/time_saved_s"), self.last("speedup/measured")
        _, seconds = self.curves.get("time", ([], [0.0]))
        return {
            "run": self.name,
            "recipe": str(self.config.get("recipe", "?")),
            "model": str(self.config.get("model.name", "?")),
            "data": str(self.config.get("data.name", "?")),
            "steps": str(max((steps[-1] for steps, _ in self.curves.values()), default=0)),
            "minutes": f"{(seconds[-1] - seconds[0]) / 60:.1f}",
            "loss": number(self.last("loss/epoch") or self.last("loss/train")),
            **{part: self.quality(part) for part in ("train", "valid", "test")},
            "speed-up": f"{measured:.2f}x" if measured else "",
            "time saved": f"{saved:.0f} s" if saved is not None else "",
        }


def read(folder: Path, name: str) -> Run:
    """The run of a folder. Raises ConfigError where its files are none of a run."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    try:
        for line in log.lines(folder):
            for tag, value in line.items():
                if tag != "step" and isinstance(value, int | float):
                    steps, values = curves.setdefault(tag, ([], []))
                    steps.append(line["step"])
                    values.append(value)
        written = folder / log.CONFIG
        tree = yaml.safe_load(written.read_text(encoding="utf-8")) if written.exists() else {}
    except (OSError, yaml.YAMLError) as error:
        why = files.reason(error) if isinstance(error, OSError) else " ".join(str(error).split())
        raise ConfigError(f"{folder} cannot be read as a run ({why}); give the folder of another.") from None
    return Run(name, folder, curves, flat(tree) if isinstance(tree, dict) else {})


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of keys as one dict with dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def find(paths: Sequence[str]) -> list[Run]:
    """The runs of folders of runs, or of one each. Raises ConfigError for a path without any."""
    folders: list[Path] = []
    for path in paths:
        given = Path(home("RUN", path))
        found = [given] if (given / log.LINES).is_file() else sorted(file.parent for file in given.glob(f"**/{log.LINES}"))
        if not found:
            raise ConfigError(f"RUN {path}: there is no {log.LINES} below it; give the folder of a run that had tracking on.")
        folders += [folder for folder in found if folder not in folders]
    return [read(folder, "/".join(folder.resolve().parts[-2:])) for folder in folders]


def differing(runs: Sequence[Run]) -> list[list[str]]:
    """A row for each key of the configuration that is not the same in all runs: the key, then each run's value."""
    order = [key for key, _, _ in key_table()]
    keys = sorted(
        {key for run in runs for key in run.config}, key=lambda key: (order.index(key) if key in order else len(order), key)
    )
    rows = [[key, *(show(run.config[key]) if key in run.config else "" for run in runs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def figures(runs: Sequence[Run]) -> list[str]:
    """Each figure of CURVES that some run has values for, as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "fqt"}
    drawn = []
    for title, scalars in CURVES.items():
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.subplots()
        for index, run in enumerate(runs):
            for style, scalar in zip(STYLES, scalars, strict=False):
                if scalar in run.curves:
                    label = run.name if len(scalars) == 1 else f"{run.name}, {scalar.rpartition('/')[2]}"
                    axes.plot(
                        *run.curves[scalar], style, color=f"C{index % 10}", label=label, linewidth=1.2, marker=".", markersize=3
                    )
        if axes.lines:
            axes.set(title=title, xlabel="step")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
            text = StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None})
            drawn.append(text.getvalue()[text.getvalue().index("<svg") :])
    return drawn


def page(runs: Sequence[Run]) -> str:
    """The whole page; it refers to nothing outside itself."""
    from jinja2 import Environment

    rows = [run.row() for run in runs]
    pictures = [(run.name, run.folder / log.BITS) for run in runs]
    return (
        Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            head=list(rows[0]),
            rows=[list(row.values()) for row in rows],
            curves=figures(runs),
            bits=[(name, base64.b64encode(path.read_bytes()).decode()) for name, path in pictures if path.exists()],
            names=["key", *(run.name for run in runs)],
            keys=differing(runs),
        )
    )


def number(value: float | None) -> str:
    """Four digits; nothing for no number."""
    return "" if value is None or math.isnan(value) else f"{value:.4g}"


def percent(value: float | None) -> str:
    """A fraction as `88.12 %`; nothing for no number."""
    return "" if value is None or math.isnan(value) else f"{100 * value:.2f} %"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 2 for a mistake in what was asked."""
    parser = argparse.ArgumentParser("train.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a folder of runs")
    parser.add_argument("--output", default="report.html", metavar="FILE", help="the page (default: report.html)")
    options = parser.parse_args(arguments)
    try:
        runs, output = find(options.runs), Path(home("--output", options.output))
        rows = [run.row() for run in runs]
        table = Table(*(Column(name, overflow="fold") for name in TERMINAL), box=box.SIMPLE)
        for row in rows:
            table.add_row(*(row[name] for name in TERMINAL))
        Console().print(table)
        text = page(runs)
        part = output.with_name(f"{output.name}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(output)  # whole or not there
    except ConfigError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        message = f"{error.name} draws the curves and is not installed: pip install 'fqt[report]'."
    except OSError as error:
        message = f"--output {options.output}: it cannot be written ({files.reason(error)}); give another file."
    else:
        print(f"The page is {output}")
        return 0
    print(f"train.report: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
