"""The curves that a run leaves: which there are, and that both copies agree."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train import config, messages
from train.loop import run
from train.ranks import Ranks
from train.step import Outcome
from train.tasks import TASKS
from train.tracking import Tracker


def read(folder):
    """{(tag, step): value} of TensorBoard's scalars and of metrics.jsonl, and the texts by tag."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    curves = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    tags = [tag for tag in events.Tags()["tensors"] if tag.endswith("text_summary")]
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags}
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    copies = {(tag, line["step"]): value for line in lines for tag, value in line.items() if tag not in ("step", "time")}
    return curves, copies, texts


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """One run on vgg_small whose last layers are known by name: 4 steps an epoch, 2 epochs."""
    folder = tmp_path_factory.mktemp("tracked")
    tree = {
        "model": {"name": "vgg_small"},
        "data": {"name": "digits", "batch_size": 64, "limit": 256, "validation": 0.1},
        "recipe": "fqt_1bit",
        "training": {"epochs": 2},
        "tracking": {"every": 2, "variance_every": 4, "baseline_steps": 1, "baseline_every": 3},
        "checkpoint": {"enabled": False},
        "device": "cpu",
        "output": str(folder),
        "quiet": True,
    }
    wanted = config.parse(tree)
    return wanted, run(wanted)


def test_every_curve_is_there_at_its_steps(tracked):
    _, result = tracked
    curves, _, _ = read(result.folder)
    steps = {tag: sorted(step for name, step in curves if name == tag) for tag, _ in curves}
    step_curves = ["loss/train", "learning_rate", "images_per_second", "gradient_norm", "skipped_steps", "memory/used_mib"]
    step_curves += [f"time/{phase}_ms" for phase in ("step", "forward", "backward", "optimizer")]
    epoch_curves = ["loss/epoch", "accuracy/train", "accuracy/test", "accuracy/valid", "memory/peak_mib"]
    speed_curves = ["speedup/measured", "speedup/step_ms", "speedup/step_ms_fp32"]
    once = ["speedup/modelled"]
    once += ["memory/saved_for_backward_mib", "memory/saved_for_backward_mib_fp32"]
    assert steps["speedup/time_saved_s"] == steps["speedup/measuring_s"] == [2, 4, 6, 8]
    assert not any(tag.startswith("bits/") for tag in steps), "no policy: bits that never change are a picture"
    for tags, wanted in ((step_curves, [2, 4, 6, 8]), (speed_curves, [0, 2, 4, 6, 8]), (epoch_curves, [4, 8]), (once, [0])):
        for tag in tags:
            assert steps[tag] == wanted, tag
    layers = {tag.split("/")[1] for tag in steps if tag.startswith("zero_fraction/")}
    assert len(layers) == 4, "five convolutions, of which the first stays float"
    for layer in layers:
        assert steps[f"zero_fraction/{layer}"] == [4, 8]
        for product in ("grad_input", "grad_weight"):
            assert steps[f"gradient_error/{product}/{layer}"] == [1, 5]


def test_speed_is_a_curve_and_says_what_it_costs(tracked):
    _, result = tracked
    curves, _, _ = read(result.folder)
    baselines = {step: curves["speedup/step_ms_fp32", step] for step in (0, 2, 4, 6, 8)}
    assert baselines[0] == baselines[2] != baselines[4] == baselines[6] != baselines[8], (
        "timed again before the 4th and 7th step"
    )
    for step in (2, 4, 6, 8):
        assert curves["speedup/measured", step] == pytest.approx(baselines[step] / curves["speedup/step_ms", step])
    spent = [curves["speedup/measuring_s", step] for step in (2, 4, 6, 8)]
    assert 0 < spent[0] < spent[1] == spent[2] < spent[3]


def test_pictures_and_the_layout(tracked):
    _, result = tracked
    events = EventAccumulator(str(result.folder), size_guidance={"images": 0})
    events.Reload()
    assert {tag: events.Images(tag)[0].step for tag in events.Tags()["images"]} == {"images/train": 0, "bits": 0}
    assert events.Images("images/train")[0].width == 8 * 16
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert layout.index(b"speedup/measured") < layout.index(b"accuracy/test") < layout.index(b"loss/train")


def test_curves_say_what_the_result_says(tracked):
    _, result = tracked
    curves, _, _ = read(result.folder)
    assert curves["accuracy/test", 8] == pytest.approx(result.test)
    assert curves["accuracy/valid", 8] == pytest.approx(result.valid)
    assert curves["loss/epoch", 4] == pytest.approx(result.history[0]["loss"])
    assert curves["speedup/measured", 0] == pytest.approx(result.comparison.speedup)
    assert curves["speedup/modelled", 0] == pytest.approx(result.modelled_speedup)
    assert curves["memory/saved_for_backward_mib", 0] == pytest.approx(result.comparison.saved_bytes / 2**20)


def test_json_lines_are_a_copy(tracked):
    _, result = tracked
    curves, copies, _ = read(result.folder)
    assert copies.keys() == {key for key in curves if not key[0].startswith("hparam/")}
    for key, value in copies.items():
        assert curves[key] == pytest.approx(value, rel=1e-6), key


def test_configuration_and_summary_are_texts(tracked):
    wanted, result = tracked
    _, _, texts = read(result.folder)
    assert all(f"    {line}" in texts["config/text_summary"] for line in config.dump(wanted).splitlines())
    assert "QuantConv2d" in texts["summary/text_summary"]


def test_hyperparameters_are_in_the_table_of_runs(tracked):
    _, result = tracked
    events = EventAccumulator(str(result.folder))
    events.Reload()
    plugin = events.PluginTagToContent("hparams")
    assert b"optimizer.lr" in plugin["_hparams_/session_start_info"]
    assert events.Scalars("hparam/test_accuracy")[0].value == pytest.approx(result.test)
    assert [path.name for path in Path(result.folder).iterdir() if path.is_dir()] == [], "no folder of its own"


def test_resumed_tracker_drops_what_was_written_beyond_its_step(tmp_path):
    first = Tracker(tmp_path)
    for step in range(1, 5):
        first.scalars(step, {"loss": float(step)})
    first.close()
    second = Tracker(tmp_path, resumed_at=2)
    second.scalars(3, {"loss": 30.0})
    second.close()
    curves, copies, _ = read(tmp_path)
    assert copies == {("loss", 1): 1.0, ("loss", 2): 2.0, ("loss", 3): 30.0}
    assert curves == copies


@pytest.mark.parametrize(
    "torn", ['{"step": 3, "lo', '{"step": 3, "loss": 3.0}', "\x00\x00\x00", '"step"\n', "{}\n", "[1]\n", "\n"]
)
def test_a_line_that_a_crash_left_half_written_is_dropped(tmp_path, torn):
    """Each is what stands behind the last whole line; one without its end of line may be cut, whatever it looks like."""
    lines, skipped = tmp_path / "metrics.jsonl", tmp_path / "skipped.jsonl"
    for file in (lines, skipped):
        file.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n' + torn)
    tracker = Tracker(tmp_path, resumed_at=3)
    tracker.scalars(4, {"loss": 4.0})
    tracker.close()
    assert [json.loads(line)["step"] for line in lines.read_text().splitlines()] == [1, 2, 4]
    assert [json.loads(line)["step"] for line in skipped.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("torn", ["3,b,", "3", "step,lay", "\x00\n"])
def test_a_decision_that_a_crash_left_half_written_is_dropped(tmp_path, torn):
    decisions = tmp_path / "precision.csv"
    decisions.write_text("step,layer\n1,a\n2,a\n" + torn)
    tracker = Tracker(tmp_path, resumed_at=3)
    tracker.decisions([{"step": 4, "layer": "a"}])
    tracker.close()
    assert decisions.read_text() == "step,layer\n1,a\n2,a\n4,a\n"


def test_a_head_that_a_crash_left_half_written_is_written_again(tmp_path):
    (tmp_path / "precision.csv").write_text("step,la")
    tracker = Tracker(tmp_path, resumed_at=0)
    tracker.decisions([{"step": 1, "layer": "a"}])
    tracker.close()
    assert (tmp_path / "precision.csv").read_text() == "step,layer\n1,a\n"


def test_a_failure_is_kept_and_nothing_is_written_after_it(tmp_path, monkeypatch):
    tracker = Tracker(tmp_path)
    tracker.scalars(1, {"loss": 1.0})
    monkeypatch.setattr(
        tracker._writer, "add_scalar", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    tracker.scalars(2, {"loss": 2.0})
    assert tracker.failure.strerror == "No space left on device"
    tracker.scalars(3, {"loss": 3.0})
    tracker.flush()
    tracker.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_the_printed_command_can_be_pasted(make):
    line = messages.opening(
        make(output="my runs/a'b", tracking={"enabled": True}), Ranks(0, 1, torch.device("cpu")), Path("x"), 0, 0
    )
    command = line.rpartition("open it with: ")[2]
    assert shlex.split(command) == ["tensorboard", "--logdir", "my runs/a'b"]


def test_tracker_without_a_folder_writes_nothing(tmp_path):
    tracker = Tracker(None)
    tracker.scalars(1, {"loss": 1.0})
    tracker.text("config", "text")
    tracker.hparams({"lr": 1}, {"loss": 1.0})
    tracker.close()
    assert not list(tmp_path.iterdir())


def test_step_scalars_are_means():
    sums: dict[str, float] = {}
    for outcome in (Outcome(1.0, 3, 10, {"step": 20.0}, {}), Outcome(4.0, 5, 20, {"step": 40.0}, {})):
        sums = {name: sums.get(name, 0) + value for name, value in messages.sums(outcome).items()}
    assert messages.step_scalars(sums, 0.1, 3 << 20, TASKS["classify"]) == {
        "loss/train": 3.0,
        "learning_rate": 0.1,
        "images_per_second": 500.0,
        "gradient_norm": 0.0,
        "skipped_steps": 0,
        "memory/used_mib": 3.0,
        "time/step_ms": 30.0,
    }
