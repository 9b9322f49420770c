"""gpu_check's logic, run on the CPU's kernels with a clock that always says one millisecond."""

import sys
import time

import pytest
import torch

from benchmarks import gpu_check, gpu_models, gpu_parts, gpu_tiles
from fqt import ops, reference
from fqt.cpu import library
from fqt.cuda_kernels import plan as cuda_plan
from fqt.ops import Kernel
from fqt.triton_kernels import plan as triton_plan

SMALL = (64,)


def bench(function) -> float:
    function()
    return 1.0


@pytest.fixture(autouse=True)
def _built() -> None:
    if library.refuses() is not None:
        pytest.skip("the C++ kernels are not built")


def test_every_row_that_serves_is_compared_and_timed():
    rows = [*gpu_parts.quantizers("cpu", bench, (4, 16, 16)), *gpu_parts.matmuls("cpu", bench, SMALL)]
    rows += gpu_parts.layers("cpu", bench, 2, (("VGG-16", 8, 16, 8, 3, 1), ("ResNet-50", 8, 8, 8, 1, 2)))
    assert not [row for row in rows if "wrong" in row]
    assert {row["backend"] for row in rows if row.get("formats") == "sign x sign:O"} == {"cpu", "cpu int8"}
    assert sum(row["part"] == "layers" for row in rows) == 2 * (3 * 2 + 3), "the 1-bit products have two rows, int8's one"
    text = gpu_check.show(rows, SMALL)
    for words in ("agp uint4+:C", "bf16 x bf16", "torch._int_mm", "uint4+:N x sign kept 0.25", "ResNet-50 1x1 8->8 @8 /2"):
        assert words in text
    assert "int8 output 8192^3 over bf16: open; must 1.4, aim 1.8" in text


def test_a_wrong_kernel_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch):
    module = type(sys)("a_wrong_kernel")
    module.output = lambda *args: 2 * reference.output(*args)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    wrong = Kernel("output", "wrong", "cpu", f"{module.__name__}:output", lambda request: None)
    monkeypatch.setattr(ops, "KERNELS", [wrong, *ops.KERNELS])
    rows = [row for row in gpu_parts.matmuls("cpu", bench, SMALL) if row["backend"] == "wrong"]
    assert rows and all("differ" in str(row["wrong"]) and "ms" not in row for row in rows)
    assert "wrong: values:" in gpu_check.show(rows, SMALL)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_pick_is_set_against_every_tile_that_fits(backend: str, monkeypatch: pytest.MonkeyPatch):
    """A kernel that asks for a tile, is slow with all but one, wrong with another, and does not run with a third."""
    h200, taken, module = cuda_plan.Device((9, 0), 132, 232_448), [], type(sys)(f"a_tiled_kernel_{backend[:4]}")

    def output(*args, rules=None):
        size = args[0].shape[0]
        tile = rules.tile(size, size, size, (9, 0)) if backend == "triton" else rules.tile(h200, size, size)
        taken.append(tile)
        if tile == failing:
            raise RuntimeError("out of resource")
        return reference.output(*args) * (2.0 if tile == spoilt else 1.0)

    def clock(function) -> float:
        function()
        return 1.0 if taken[-1] == fastest else 4.0

    space = triton_plan.TILES if backend == "triton" else cuda_plan.WGMMA + cuda_plan.MMA
    failing, spoilt, fastest, picked = space[0], space[1], space[2], space[-1]
    module.output = output  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    tiled = Kernel("output", backend, "cpu", f"{module.__name__}:output", lambda request: None)
    monkeypatch.setattr(ops, "KERNELS", [tiled])
    rows = list(gpu_tiles.tiles("cpu", clock, (("output", "int8:N", "int8:O", 16),)))
    assert len(rows) == len(space) and sum(bool(row["picked"]) for row in rows) == 1
    assert rows[0]["failed"] == "RuntimeError: out of resource"
    assert ["wrong" in row and "differ" in str(row["wrong"]) for row in rows] == [tile == spoilt for tile in space]
    (line,) = gpu_tiles.verdicts(rows)
    names = ["x".join(str(v) for v in vars(tile).values()) for tile in (picked, fastest)]
    assert f"picked {names[0]} 4 ms, 4.00 times the best, {names[1]} 1 ms; failed: RuntimeError: out of resource" in line
    assert f"tiles: {line}" in gpu_check.show(rows)


def test_a_part_that_fails_or_runs_out_of_time_keeps_its_rows():
    def failing():
        yield {"part": "layers", "name": "one"}
        raise RuntimeError("no such thing")

    def slow():
        yield {"part": "layers", "name": "one"}
        time.sleep(5)

    assert gpu_check.collect("layers", failing(), 10)[-1]["failed"] == "RuntimeError: no such thing"
    start = time.monotonic()
    rows = gpu_check.collect("layers", slow(), 0.2)
    assert [row["name"] for row in rows] == ["one", "layers"] and rows[-1]["failed"] == "TimeoutError: no time left"
    assert time.monotonic() - start < 4


def test_steps_of_models_that_are_there_and_of_one_that_is_absent(monkeypatch: pytest.MonkeyPatch):
    def absent():
        raise ImportError("No module named 'torchvision'")

    monkeypatch.setitem(gpu_models.MODELS, "small", lambda: gpu_models.gpt2_stack(32, 2, 1, 2, 8))
    monkeypatch.setitem(gpu_models.MODELS, "absent", absent)
    rows = list(gpu_parts.steps("cpu", bench, ("small", "absent"), ("int8",)))
    assert [row.get("recipe") for row in rows] == ["bf16 autocast", "int8", None]
    assert rows[1]["backend"] == "cpu int8" and rows[2]["failed"] == "absent: No module named 'torchvision'"
    assert "small" in gpu_check.show(rows)


def test_the_table_has_at_most_60_lines():
    rows: list[dict] = [{"part": "tests", "name": "t", "failed": str(i)} for i in range(20)]
    rows += [
        {"part": part, "name": str(i), "ms": 1.0, "recipe": "r"} for part in ("quantize", "layers", "steps") for i in range(40)
    ]
    rows += [{"part": "tiles", "name": str(i), "tile": "1x1", "picked": True, "ms": 1.0} for i in range(40)]
    rows += [{"part": "products", "formats": str(i), "size": 1024, "ms": 1.0, "ratio": 1.0} for i in range(60)]
    lines = gpu_check.show(rows).splitlines()
    assert len(lines) <= 60 and lines[-1].startswith("step fqt_1bit over bf16"), "no part takes the last lines' place"


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main()
    assert stopped.value.code == 2
    assert "no CUDA device: nothing to time" in capsys.readouterr().out
