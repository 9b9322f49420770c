"""gpu_check's logic: on the CPU's kernels with a clock that always says one millisecond, and parts that hang and die."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_models, gpu_part, gpu_parts, gpu_steps, gpu_tiles
from benchmarks.gpu_machine import Machine
from benchmarks.gpu_show import show
from fqt import measured, ops, reference
from fqt.cpu import library
from fqt.cuda_kernels import plan as cuda_plan
from fqt.ops import Kernel
from fqt.triton_kernels import plan as triton_plan

ROOT = Path(__file__).parents[2]


def bench(function) -> float:
    function()
    return 1.0


HERE = Machine("cpu", bench, True, "a CPU")


def done(part: str, tasks) -> list[dict]:
    """The rows of a part's tasks, as its process writes them."""
    return [{"part": part, "task": name} | row for name, task in tasks for row in task()]


@pytest.fixture
def _built() -> None:
    if library.refuses() is not None:
        pytest.skip("the C++ kernels are not built")


@pytest.mark.usefixtures("_built")
def test_every_row_that_serves_is_compared_and_timed():
    rows = done("quantize", gpu_parts.quantizers(HERE)) + done("products", gpu_parts.products(HERE))
    rows += done("layers", gpu_parts.layers(HERE))
    assert not [row for row in rows if "wrong" in row]
    assert {row["backend"] for row in rows if row.get("formats") == "sign x sign:O"} == {"cpu", "cpu int8"}
    assert sum(row["part"] == "layers" for row in rows) == 3 * 2 + 3, "the 1-bit products have two rows, int8's one"
    text = show(rows, (32,))
    for words in ("agp uint4+:C", "bf16 x bf16", "torch._int_mm", "uint4+:N x sign kept 0.25", "small 3x3 8->16 @8 /2"):
        assert words in text
    assert "1 (1.00)" in text and "int8 output 8192^3 over bf16: open; must 1.5, aim 1.8" in text


def test_a_wrong_kernel_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch):
    module = type(sys)("a_wrong_kernel")
    module.output = lambda *args: 2 * reference.output(*args)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    wrong = Kernel("output", "wrong", "cpu", f"{module.__name__}:output", lambda request: None)
    monkeypatch.setattr(ops, "KERNELS", [wrong])
    rows = done("products", gpu_parts.products(HERE, (("output", "sign", "sign:O", 1.0),)))
    (row,) = (row for row in rows if row["backend"] == "wrong")
    assert "differ" in str(row["wrong"]) and "ms" not in row
    assert "wrong: values:" in show(rows, (32,))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_pick_is_set_against_every_tile_that_fits(backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A kernel that asks for a tile, is slow with all but one, wrong with another, and does not run with a third."""
    h200, taken, module = cuda_plan.Device((9, 0), 132, 232_448), [], type(sys)(f"a_tiled_kernel_{backend[:4]}")
    plan = triton_plan if backend == "triton" else cuda_plan
    path = tmp_path / "tiles.json"
    path.write_text("{}")
    monkeypatch.setattr(measured, "PATH", path)
    measured.tiles.cache_clear()

    def picked_by(rules, size: int):
        return rules.tile(size, size, size, (9, 0)) if backend == "triton" else rules.tile(h200, size, size)

    def output(*args, rules=None):
        tile = picked_by(rules, args[0].shape[0])
        taken.append(tile)
        if tile == failing:
            raise RuntimeError("out of resource")
        return reference.output(*args) * (2.0 if tile == spoilt else 1.0)

    def clock(function) -> float:
        function()
        return 1.0 if taken[-1] == fastest else 4.0

    space = triton_plan.TILES if backend == "triton" else cuda_plan.WGMMA + cuda_plan.MMA
    failing, spoilt, fastest, picked = space[0], space[1], space[2], picked_by(plan.RULES, 64)
    module.output = output  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    tiled = Kernel("output", backend, "cpu", f"{module.__name__}:output", lambda request: None)
    monkeypatch.setattr(ops, "KERNELS", [tiled])
    machine = Machine("cpu", clock, True, "a CPU")
    rows = done("tiles", gpu_tiles.tiles(machine, (("output", "int8:N", "int8:O", 16),)))
    assert len(rows) == len(space) and [row["picked"] for row in rows] == [True] + [False] * (len(space) - 1)
    by_tile = {tuple(row["tile"]): row for row in rows}
    assert by_tile[gpu_tiles.astuple(failing)]["failed"] == "RuntimeError: out of resource"
    assert [key for key, row in by_tile.items() if "wrong" in row] == [gpu_tiles.astuple(spoilt)]
    (line,) = gpu_tiles.verdicts(rows)
    names = ["x".join(str(v) for v in vars(tile).values()) for tile in (picked, fastest)]
    assert f"picked {names[0]} 4 ms, 4.00 times the best, {names[1]} 1 ms" in line
    measured.keep(gpu_tiles.fastest(rows))
    measured.tiles.cache_clear()
    assert picked_by(plan.RULES, 64) == fastest, "what was timed is what serves"
    assert picked_by(plan.Rules(tiles=(picked,)), 64) == picked, "of the tiles that may be chosen"
    measured.tiles.cache_clear()


def test_products_of_one_key_are_not_compared_with_each_other():
    """A product of signs takes a tenth of the time of one of bytes: by milliseconds its own fastest tile would win."""
    times = {"bytes": {(1,): 20.0, (2,): 10.0, (3,): 11.0}, "signs": {(1,): 1.0, (2,): 1.2}}
    rows = [
        {"part": "tiles", "name": name, "backend": "b", "table": "triton", "key": "k", "tile": list(tile), "ms": ms}
        for name, by_tile in times.items()
        for tile, ms in by_tile.items()
    ]
    assert gpu_tiles.fastest(rows) == {"triton": {"k": [2]}}


def test_a_dry_run_reaches_no_goal_and_a_part_that_was_stopped_is_told():
    rows = [
        {"part": "quantize", "name": "copy", "ms": 1.0, "bytes": 10},
        {"part": "quantize", "name": "a", "ms": 1.0, "bytes": 9},
    ]
    assert "copy bandwidth: 0.90" in show([dict(row) for row in rows])
    text = show([{"part": "quantize", "name": "dry", "dry": True}, *rows, {"part": "smoke", "stopped": "60 s are over"}])
    assert "copy bandwidth: open" in text and "smoke: stopped: 60 s are over" in " ".join(text.split())


def test_the_tiles_that_ship_are_tiles():
    for plan, backend in ((triton_plan, "triton"), (cuda_plan, "cuda")):
        space = triton_plan.TILES if plan is triton_plan else cuda_plan.WGMMA + cuda_plan.MMA
        assert all(plan.Tile(*tile) in space for tile in measured.tiles(backend).values())


def test_a_task_that_fails_keeps_the_others_and_a_lost_device_ends_the_process(tmp_path: Path):
    path = tmp_path / "F.jsonl"

    def good():
        yield {"ms": 1.0}

    def bad():
        yield {"ms": 2.0}
        raise RuntimeError("no such thing")

    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    assert gpu_part.work("steps", iter([("a", good), ("b", bad), ("c", good)]), path, lambda: None) == 0
    rows = gpu_part.rows_of(path)
    assert [row["ms"] for row in rows if "ms" in row] == [1.0, 2.0, 1.0]
    assert [row["failed"] for row in rows if "failed" in row] == ["RuntimeError: no such thing"]
    again = iter([("a", lost), ("d", bad), ("e", good)])
    assert gpu_part.work("steps", again, path, lost) == gpu_part.LOST, "what has ended is not done again"
    assert gpu_check.running(gpu_part.rows_of(path), "steps") is None


_PART = """
import json, os, sys, time
path = sys.argv[1]
def say(**row):
    with open(path, "a") as file:
        file.write(json.dumps({"part": "smoke", **row}) + chr(10))
ended = [json.loads(line)["task"] for line in open(path) if '"ended"' in line]
for task in "abcd":
    if task in ended:
        continue
    say(task=task, begun=True)
    if task == "b":
        time.sleep(60)
    if task == "c":
        os.abort()
    say(task=task, ms=1.0)
    say(task=task, ended=True)
"""


def test_a_hang_and_a_crash_cost_their_own_task_alone(tmp_path: Path):
    path = tmp_path / "F.jsonl"
    path.touch()
    gpu_check.finish("smoke", [sys.executable, "-c", _PART, str(path)], path, gpu_check.Limit(60, 2))
    rows = gpu_part.rows_of(path)
    assert [row["task"] for row in rows if "ms" in row] == ["a", "d"] and rows[-1] == {"part": "smoke", "done": True}
    failed = {row["task"]: row["failed"] for row in rows if "failed" in row}
    assert failed == {"b": "hung: killed after 2 s", "c": "exit status -6"}


def test_a_part_whose_time_is_over_goes_on_where_it_was(tmp_path: Path):
    path = tmp_path / "F.jsonl"
    path.touch()
    gpu_check.finish("smoke", [sys.executable, "-c", _PART, str(path)], path, gpu_check.Limit(2, 30))
    rows = gpu_part.rows_of(path)
    assert "stopped" in rows[-1] and gpu_check.running(rows, "smoke") == "b", "no task is to blame"
    path.write_text(path.read_text() + '{"part": "smoke", "ta')
    assert gpu_part.rows_of(path) == rows, "a line that was not written whole is none"


def test_a_process_that_does_not_come_to_its_tasks_is_not_started_again(tmp_path: Path):
    path = tmp_path / "F.jsonl"
    gpu_check.finish("smoke", [sys.executable, "-c", "raise ImportError"], path, gpu_check.Limit(30, 30))
    assert gpu_part.rows_of(path) == [{"part": "smoke", "name": "smoke", "failed": "exit status 1"}]


@pytest.mark.usefixtures("_built")
def test_steps_of_models_that_are_there_and_of_one_that_is_absent(monkeypatch: pytest.MonkeyPatch):
    rows = done("steps", gpu_steps.steps(HERE))
    assert [row["recipe"] for row in rows][:3] == ["none, bf16", "int8, bf16", "fqt_1bit, float32"]
    assert rows[1]["backend"] == "cpu int8"
    assert all("torchao" in row["absent"] for row in rows[-2:]) or all("ms" in row for row in rows[-2:])

    def absent():
        raise ImportError("No module named 'torchvision'")

    monkeypatch.setitem(gpu_models.MODELS, "resnet50", absent)
    (row,) = gpu_steps._timed(HERE, "resnet50", absent, "int8", "bf16")
    assert row["absent"] == "No module named 'torchvision'"
    text = show([*rows, {"part": "steps", **row}])
    assert "small" in text and "steps: absent: No module named 'torchvision'" in text


def test_the_table_has_at_most_60_lines():
    rows: list[dict] = [{"part": "fuzz", "name": "t", "failed": str(i)} for i in range(20)]
    rows += [
        {"part": part, "name": str(i), "ms": 1.0, "bytes": 1, "recipe": "r"}
        for part in ("quantize", "layers", "steps")
        for i in range(40)
    ]
    rows += [{"part": "tiles", "name": str(i), "tile": [1, 1], "picked": True, "ms": 1.0} for i in range(40)]
    rows += [{"part": "products", "formats": str(i), "backend": "b", "size": 1024, "ms": 1.0} for i in range(60)]
    lines = show(rows).splitlines()
    assert len(lines) <= 60 and lines[-1].startswith("step fqt_1bit over bf16"), "no part takes the last lines' place"


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main()
    assert stopped.value.code == 2
    assert "no CUDA device: nothing to time" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--parts", "smoke,smok"])
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert "unknown part 'smok'; known: smoke, products" in capsys.readouterr().err


def test_a_dry_run_walks_a_part_by_the_interpreter(tmp_path: Path):
    pytest.importorskip("triton", reason="Triton is not installed")
    path = tmp_path / "F.jsonl"
    path.write_text("".join(
        json.dumps({"part": "quantize", "task": name, "ended": True}) + chr(10)
        for name, _ in list(gpu_parts.quantizers(HERE))[2:]
    ))  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_part", "quantize", str(path), "--dry-run"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    rows = gpu_part.rows_of(path)
    assert [(row["name"], row["backend"]) for row in rows if "bytes" in row and "backend" in row] == [
        ("xnor_activation sign", "triton")
    ]
