"""Compiling CUDA C++ without a GPU: the machine code holds the instruction that a kernel is for; cubins are kept; messages."""

import contextlib
import ctypes
import importlib.util
import re
import subprocess
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fqt import ops
from fqt.cuda_kernels import plan, products, runtime
from fqt.formats import Format
from fqt.geometry import Geometry
from fqt.ops import Request

SIGN = Format("sign", 1)
HOPPER, AMPERE = plan.WGMMA, plan.MMA


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """NVRTC behind cuda.core, and an empty cache."""
    if reason := runtime.missing():
        pytest.skip(reason)
    from cuda.bindings import nvrtc

    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:  # bindings without the library, as beside a torch for CPUs
        pytest.skip(f"no NVRTC here: {error}")
    monkeypatch.setenv(runtime.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def disassembled(code: bytes, tmp_path: Path, *options: str) -> str:
    """What the cuobjdump of Triton's wheel says of a cubin."""
    found = importlib.util.find_spec("triton")
    tool = found and found.origin and Path(found.origin).parent / "backends/nvidia/bin/cuobjdump"
    if not tool or not tool.exists():
        pytest.skip("no cuobjdump here: it comes with triton")
    (tmp_path / "kernel.cubin").write_bytes(code)
    command = [str(tool), *options, str(tmp_path / "kernel.cubin")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("tile", "unit", "architecture", "instruction"),
    [
        (AMPERE[0], 16, "sm_80", r"BMMA\.168256\.AND\.POPC"),
        (AMPERE[1], 8, "sm_86", r"BMMA\.168256\.AND\.POPC"),
        (AMPERE[1], 4, "sm_90", r"BMMA\.168256\.AND\.POPC"),
        (AMPERE[1], 16, "sm_90a", r"BMMA\.168256\.AND\.POPC"),
        (HOPPER[0], 16, "sm_90a", r"BGMMA\.64x256x256\.AND\.POPC"),
        (HOPPER[1], 4, "sm_90a", r"BGMMA\.64x128x256\.AND\.POPC"),
    ],
    ids=lambda v: getattr(v, "family", v),
)
@pytest.mark.usefixtures("compiler")
@pytest.mark.every(2)
def test_products_are_tensor_core_instructions_on_bits(
    tile: plan.Tile, unit: int, architecture: str, instruction: str, tmp_path: Path
):
    code = runtime.cubin(runtime.gemm(tile, unit), architecture)
    text = disassembled(code, tmp_path, "-sass")
    assert re.search(instruction, text), sorted(set(re.findall(r"\b[A-Z]*MMA[.\w]*", text)))
    assert not re.search(r"\bIMMA\b", text), "emulated"
    assert "LDGSTS" in text, "no asynchronous copies"
    assert not re.search(r"\b(STL|LDL)\b", text), "registers spill to local memory"
    assert not re.search(r"\bFFMA\b", text), "floats are contracted"
    used = disassembled(code, tmp_path, "-res-usage")
    registers = int(re.findall(r"REG:(\d+)", used)[0])
    assert registers * tile.threads <= 65536


@pytest.mark.parametrize("kernel", [products._ROWS, products._COLUMNS, products._SUMS, products._WEIGHT], ids=lambda k: k.name)
@pytest.mark.usefixtures("compiler")
def test_the_other_kernels_compile(kernel: runtime.Kernel, tmp_path: Path):
    text = disassembled(runtime.cubin(kernel, "sm_80"), tmp_path, "-sass")
    assert f"Function : {kernel.name}" in text
    assert not re.search(r"\b(FFMA|STL|LDL)\b", text)


def test_an_emulated_instruction_would_be_found(compiler: Path, tmp_path: Path):
    """On sm_100 the same source multiplies bits by 8-bit instructions: that is why such GPUs are refused."""
    from cuda.bindings import nvrtc

    if 100 not in nvrtc.nvrtcGetSupportedArchs()[1]:
        pytest.skip("this NVRTC does not know sm_100")
    text = disassembled(runtime.cubin(runtime.gemm(AMPERE[1], 16), "sm_100"), tmp_path, "-sass")
    assert not re.search(r"\bBMMA\b", text) and re.search(r"\bIMMA\b", text)


def test_a_cubin_is_compiled_once_and_again_when_its_source_changes(compiler: Path, monkeypatch: pytest.MonkeyPatch):
    from cuda import core

    kernel = products._WEIGHT
    code = runtime.cubin(kernel, "sm_80")
    (kept,) = compiler.iterdir()
    assert kept.read_bytes() == code and kept.name.startswith("weight-sm_80-")
    with monkeypatch.context() as patch:
        patch.delattr(core, "Program")
        assert runtime.cubin(kernel, "sm_80") == code
    sources = compiler.parent / "sources"
    sources.mkdir()
    for path in runtime._SOURCES.iterdir():
        if path.is_file():
            (sources / path.name).write_bytes(path.read_bytes())
    (sources / "primitives.h").write_text((sources / "primitives.h").read_text() + "// changed\n")
    monkeypatch.setattr(runtime, "_SOURCES", sources)
    runtime.cubin(kernel, "sm_80")
    assert len(list(compiler.iterdir())) == 2
    monkeypatch.setitem(runtime._OPTIONS, "fma", True)
    runtime.cubin(kernel, "sm_80")
    assert len(list(compiler.iterdir())) == 3


def test_a_cubin_that_cannot_be_kept_serves_and_says_so(compiler: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    compiler.parent.joinpath("file").touch()
    monkeypatch.setenv(runtime.CACHE, str(compiler.parent / "file" / "folder"))
    assert runtime.cubin(products._WEIGHT, "sm_80")
    assert "compiled kernels are not kept" in caplog.text and "name a folder in FQT_CUDA_CACHE" in caplog.text


def test_where_cubins_are_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(runtime.CACHE, "/somewhere")
    assert runtime.cache() == Path("/somewhere")
    monkeypatch.delenv(runtime.CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert runtime.cache() == Path("/elsewhere/fqt/cuda")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert runtime.cache() == Path.home() / ".cache/fqt/cuda"


@pytest.mark.parametrize(
    ("operator", "formats", "groups", "reason"),
    [
        (
            "output",
            ("int8", "sign"),
            1,
            "the kernel multiplies signs or unsigned codes of 1 to 8 bits by signs, not int8 by sign",
        ),
        ("accumulate", ("uint2", "sign"), 1, "the kernel multiplies signs by signs, not uint2 by sign"),
        ("grad_input", ("uint9:N", "sign"), 1, "unsigned codes of 1 to 8 bits by signs, not uint9:N by sign"),
        ("grad_input", ("uint4:N", "sign:O"), 1, "scales 'N' of g and 'O' of w vary along the summed axes"),
        ("grad_weight", ("uint4:NP", "sign"), 1, "scales 'NP' of g and '' of x vary along the summed axes"),
        ("output", ("sign:NP", "sign"), 1, "scales 'NP' of x and '' of w vary along the summed axes"),
        ("output", ("sign", "sign"), 4, "a convolution of 4 groups has too few bits a group to fill an instruction"),
    ],
)
def test_products_refuse_with_a_reason(operator: str, formats: tuple[str, str], groups: int, reason: str):
    geometry = Geometry(3, 3, (3, 3), (1, 1), (0, 0, 0, 0), (1, 1), groups)
    request = Request("cuda", (Format.parse(formats[0]), Format.parse(formats[1])), geometry)
    kernel, reasons = ops.select(operator, request)
    assert kernel.backend != "cuda"
    assert any(text.startswith("cuda b1: ") and reason in text for text in map(str, reasons)), reasons


@pytest.fixture
def _asked_anew() -> Iterator[None]:
    yield
    runtime.missing.cache_clear()


@pytest.mark.usefixtures("_asked_anew")
def test_the_rows_refuse_what_this_machine_lacks(monkeypatch: pytest.MonkeyPatch):
    request = Request("cuda", (SIGN, SIGN))
    found = {"cuda"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in found else None)
    for package, reason in (
        ("cuda.core", "the package cuda-core is not installed: pip install 'fqt[cuda]'"),
        ("cuda.bindings", "the package cuda-bindings is not installed: torch's CUDA wheels bring it, those for CPUs do not"),
    ):
        runtime.missing.cache_clear()
        _, reasons = ops.select("output", request)
        assert f"cuda b1: {reason}" in map(str, reasons)
        found.add(package)
    runtime.missing.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _, reasons = ops.select("output", request)
    assert "cuda b1: torch sees no GPU" in map(str, reasons)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(runtime, "device", lambda index: plan.Device((10, 0), 148, 232_448))
    _, reasons = ops.select("output", request)
    assert any("cuda b1: compute capability 10.0 emulates 1-bit products" in text for text in map(str, reasons))


def test_a_gpu_of_the_right_generation_is_served(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime, "refuses", lambda: None)
    monkeypatch.setattr(ops, "broken", lambda kernel: None)
    for operator, left in (
        ("output", "sign:N"),
        ("grad_input", "uint4+:N"),
        ("grad_weight", "uint4+:C"),
        ("accumulate", "sign"),
    ):
        kernel, reasons = ops.select(operator, Request("cuda", (Format.parse(left), SIGN)))
        assert (kernel.label, reasons) == ("cuda b1", [])
        assert ops.select(operator, Request("cuda", (Format.parse(left), SIGN), backend="cuda"))[0] is kernel
        assert ops.select(operator, Request("cpu", (Format.parse(left), SIGN)))[0].device != "cuda"


class Recorder:
    """cuda.core and the driver as far as `launch` asks: what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple] = []

    def __getattr__(self, name: str):
        if name in ("CUfunction_attribute", "CUresult", "Stream", "ObjectCode"):
            return self
        if name.startswith("CU_FUNC") or name == "CUDA_SUCCESS":
            return name

        def call(*args, **kwargs):
            self.asked.append((name, *args, *kwargs.values()))
            return ("CUDA_SUCCESS",) if name == "cuKernelSetAttribute" else self

        return call


def test_a_launch_names_stream_grid_shared_memory_and_arguments_of_64_bits(monkeypatch: pytest.MonkeyPatch):
    recorder = Recorder()
    monkeypatch.setattr(runtime, "_module", lambda name: recorder)
    monkeypatch.setattr(runtime, "device", lambda index: plan.Device((9, 0), 132, 232_448))
    monkeypatch.setattr(runtime, "cubin", lambda kernel, architecture: f"{kernel.file} for {architecture}".encode())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    runtime._loaded.cache_clear()
    numbers = torch.arange(4)
    kernel = runtime.gemm(plan.WGMMA[0], 16)
    runtime.launch(kernel, 6, 2, [None, numbers, -3, 1 << 40])
    runtime.launch(kernel, 0, 2, [numbers])
    runtime._loaded.cache_clear()
    asked = {name: args for name, *args in recorder.asked}
    assert asked["from_cubin"] == [b"gemm_wgmma for sm_90a"] and asked["get_kernel"] == ["gemm_entry"]
    assert asked["cuKernelSetAttribute"][:2] == ["CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES", plan.WGMMA[0].shared]
    assert asked["from_handle"] == [1], "torch's default stream, by the number that CUDA has for it"
    assert asked["LaunchConfig"] == [(6, 1, 2), 256, plan.WGMMA[0].shared]
    passed = asked["launch"][3:]
    assert all(type(argument) is ctypes.c_int64 for argument in passed)
    assert [argument.value for argument in passed] == [0, numbers.data_ptr(), -3, 1 << 40]
    assert sum(name == "launch" for name, *_ in recorder.asked) == 1, "an empty grid is no launch"
