"""A native kernel that does not load, or is not the reference's equal, never serves; and `import fqt` does not mind."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fqt
from benchmarks import warm
from fqt import ops, reference, selfcheck
from fqt.cpu import integers, library, signs
from fqt.formats import Format
from fqt.native import refuse_truncated
from fqt.ops import KERNELS, Kernel, Request

NATIVE = [row for row in KERNELS if row.native and row.device == "cpu"]
built = pytest.mark.skipif(not library.LIBRARY.exists(), reason="the C++ kernels are not built")
compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(autouse=True)
def _ask_anew():
    ops.broken.cache_clear()
    ops.load.cache_clear()
    yield
    ops.broken.cache_clear()
    ops.load.cache_clear()


@built
@pytest.mark.parametrize("row", NATIVE, ids=lambda row: f"{row.operator}-{row.label}")
def test_every_native_row_passes_and_is_asked_something(row: Kernel) -> None:
    assert ops.broken(row) is None
    assert selfcheck.compare(row, ops.load(row.function)) >= 2


def test_every_row_compiled_beforehand_is_checked() -> None:
    """Triton compiles a kernel for each format on the machine itself; the reference is what the others are checked against."""
    assert {row.backend for row in KERNELS if not row.native} == {"triton", "reference"}


@pytest.mark.parametrize("operator", ["quantize", *ops.PRODUCTS])
def test_a_wrong_kernel_is_found_out(operator: str) -> None:
    def wrong(*args, **kwargs):
        result = getattr(reference, operator)(*args, **kwargs)
        (result if isinstance(result, torch.Tensor) else result[0].scale).view(-1)[-1] += 1e-3
        return result

    row = next(row for row in NATIVE if row.operator == operator)
    assert selfcheck.compare(row, getattr(reference, operator)) >= 8
    with pytest.raises(AssertionError, match="expected"):
        selfcheck.compare(row, wrong)


def test_a_row_of_which_nothing_can_be_compared_refuses(monkeypatch) -> None:
    nothing = Kernel("output", "mine", "cpu", "fqt.reference:output", lambda request: None, native=True)
    monkeypatch.setattr(ops, "KERNELS", [nothing, *ops.KERNELS])
    signs = Request("cpu", (Format("sign", 1), Format("sign", 1)))
    served, refusals = ops.select("output", signs)
    assert served.backend != "mine"
    assert refusals[0].broken and "the self-check has no case for it: nothing was compared" in str(refusals[0])


def test_a_full_device_says_nothing_about_a_kernel(monkeypatch) -> None:
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    module = type(sys)("a_kernel_on_a_full_device")
    module.output = full  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    serves = next(row.refuses for row in NATIVE if row.operator == "output")
    row = Kernel("output", "mine", "cpu", f"{module.__name__}:output", serves, native=True)
    with pytest.raises(torch.OutOfMemoryError):
        ops.broken(row)
    ops.load.cache_clear()
    module.output = reference.output  # type: ignore[attr-defined]
    assert ops.broken(row) is None, "asked again once there is memory"


@built
def test_a_wrong_kernel_refuses_and_the_reference_serves(monkeypatch, caplog) -> None:
    for module in (signs, integers):
        right = module.output
        monkeypatch.setattr(module, "output", lambda *args, right=right: right(*args) + 1)
    with caplog.at_level(logging.INFO, "fqt"):
        layer = fqt.convert(torch.nn.Linear(16, 3), fqt.load_recipe("fqt_1bit").everywhere())
    row = fqt.summary(layer).rows[0]
    assert row.served == {"output": "reference", "grad_input": "cpu", "grad_weight": "cpu"}
    assert "cpu: the native output differs from the reference (sign by sign: values:" in row.note
    assert [record.name for record in caplog.records].count("fqt") == 3, "each broken kernel once, the conversion once"
    with pytest.raises(ValueError, match="layer '', output: backend 'cpu' does not serve .* differs from the reference"):
        fqt.convert(torch.nn.Linear(16, 3), fqt.load_recipe("fqt_1bit").everywhere(), backend="cpu")


@built
def test_the_check_disturbs_nothing_and_no_mode_disturbs_it() -> None:
    state = torch.get_rng_state()
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        assert [ops.broken(row) for row in NATIVE] == [None] * len(NATIVE)
    assert torch.equal(torch.get_rng_state(), state)


# --- files that are no library: each in a process of its own ------------------------------------------------------------

TRAIN = """
import sys, pathlib, torch, fqt, fqt.cpu.library
fqt.cpu.library.LIBRARY = pathlib.Path(sys.argv[1])
model = fqt.convert(torch.nn.Linear(16, 3), fqt.load_recipe("fqt_1bit").everywhere())
model(torch.randn(4, 16)).sum().backward()
print(fqt.summary(model))
"""


def trained_with(library: Path) -> str:
    """The summary of a model that trained a step with this file in the library's place."""
    program = library.with_name("program.py")
    program.write_text(TRAIN)
    done = warm.run(program, str(library), folder=library.parent)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "QuantLinear" in line)
    assert "  reference  " in line, line
    return line


def test_a_library_that_is_missing(tmp_path: Path) -> None:
    assert "the C++ kernels are not built: python setup.py build_ext --inplace" in trained_with(tmp_path / "none.so")


@built
@pytest.mark.parametrize("part", [0.5, 0.99])
def test_a_library_that_is_cut_short(tmp_path: Path, part: float) -> None:
    whole, short = library.LIBRARY.read_bytes(), tmp_path / "short.so"
    short.write_bytes(whole[: int(len(whole) * part)])
    assert "cut short" in trained_with(short)
    with pytest.raises(OSError, match=f"short.so is cut short: {int(len(whole) * part):,} bytes of {len(whole):,}"):
        refuse_truncated(short)
    refuse_truncated(library.LIBRARY)


def test_a_library_that_is_text(tmp_path: Path) -> None:
    library = tmp_path / "text.so"
    library.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "the native output cannot be used" in trained_with(library)


@compiler
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("void of_another_torch(); void f() { of_another_torch(); }", "undefined symbol"),
        ("int f() { return 1; }", "no attribute"),
    ],
    ids=["undefined_symbol", "no_operators"],
)
def test_a_library_of_another_abi(tmp_path: Path, source: str, reason: str) -> None:
    (tmp_path / "a.cpp").write_text(source)
    subprocess.run(["g++", "-shared", "-fPIC", "-Wl,-z,now", "-o", "a.so", "a.cpp"], check=True, cwd=tmp_path)
    assert reason in trained_with(tmp_path / "a.so")
