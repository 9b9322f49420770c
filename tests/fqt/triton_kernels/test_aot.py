"""Kernels compiled ahead of time, without a GPU; `python -m benchmarks.aot` compiles them all, for every chip and tile."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[3]
# Triton decides when it is imported whether it interprets, and keeps the driver that it is given: a process of its own
_PROGRAM = """
from benchmarks import aot
for name, function in aot.calls(True):
    if name in {wanted!r}:
        for launch in aot.recorded(name, function):
            row = aot.examined(launch, {wanted!r}[name])
            print(name, row["kernel"], *row["tensor_cores"], sep="\t")
"""

_LOOP = """.L_x_0:
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0020*/                   IGMMA.64x128x32.S8.S8 R24, gdesc[UR4], R24, gsb0 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/                   MEMBAR.ALL.CTA ;
        /*0050*/              @!P5 BRA `(.L_x_1) ;
        /*0060*/                   NOP ;
        /*0070*/               @P1 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
"""


HOPPER, AMPERE, ONE = "grad_input uint4+:N sign 3x3", "output int8:N int8:O linear", "quantize one"


@pytest.fixture(scope="module")
def instructions() -> dict[str, dict[str, list[str]]]:
    """Name of a call -> name of a kernel of it -> its tensor-core instructions."""
    pytest.importorskip("triton", reason="Triton is not installed")
    program = _PROGRAM.format(wanted={HOPPER: 90, AMPERE: 80, ONE: 90})
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, list[str]]] = {}
    for name, kernel, *names in (line.split("\t") for line in done.stdout.splitlines()):
        found.setdefault(name, {})[kernel.split()[0]] = names
    return found


@pytest.fixture(autouse=True)
def _triton() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")


def test_products_become_tensor_core_instructions_without_spills(instructions):
    kernels = instructions[HOPPER]
    assert all(name.startswith("IGMMA") for name in kernels["_gather"]) and kernels["_gather"]
    assert {"_expand", "_inside_sums"} <= kernels.keys()
    assert all(name.startswith("IMMA") for name in instructions[AMPERE]["_gather"]) and instructions[AMPERE]["_gather"]


def test_a_tensor_of_one_element_compiles(instructions):
    """Triton makes arguments that are 1 constants, which have no dtype; its interpreter does not."""
    assert {"_tree", "_calibrate", "_encode"} <= instructions[ONE].keys()


def test_a_kernel_that_is_not_as_it_should_be_is_refused(monkeypatch: pytest.MonkeyPatch):
    from benchmarks import aot

    compiled = SimpleNamespace(asm={"cubin": b""}, metadata=SimpleNamespace(shared=300_000))
    kernel = SimpleNamespace(fn=SimpleNamespace(__name__="kernel"), warmup=lambda *args, **options: compiled)
    constants = {"M": 64, "N": 64, "K": 64, "num_warps": 4, "num_stages": 2}
    launch = aot.Launch("a call", kernel, (1,), (), constants)  # type: ignore[arg-type]
    code = {"text": "STL R1; IMMA.16832.S8.S8 R4"}
    monkeypatch.setattr(aot.driver, "set_active", lambda driver: None)
    monkeypatch.setattr(aot, "_told", lambda tool, *_: "REG:64 " if tool == "cuobjdump" else code["text"])
    with pytest.raises(RuntimeError, match="kernel 64x64x64 of a call for sm_90 spills registers: 1 accesses"):
        aot.examined(launch, 90)
    code["text"] = "IMMA.16832.S8.S8 R4"
    with pytest.raises(RuntimeError, match="needs 300,000 bytes of shared memory, the chip has 232,448"):
        aot.examined(launch, 90)
    compiled.metadata.shared = 1000
    assert aot.examined(launch, 90)["tensor_cores"] == ["IMMA.16832.S8.S8"]
    code["text"] = "FFMA R1"
    with pytest.raises(RuntimeError, match="holds no tensor-core instruction"):
        aot.examined(launch, 90)
    code["text"] = "IMMA.16832.S8.S8 R4; MEMBAR.ALL.GPU ; ATOMG.E.ADD"
    with pytest.raises(RuntimeError, match=r"waits 1 times for the device to see what it wrote \(MEMBAR.GPU\)"):
        aot.examined(launch, 90)
    code["text"] = _LOOP.replace("gsb0, 0x0", "gsb0, 0x1")
    row = aot.examined(launch, 90)
    assert (row["loop"], row["mmas"], row["pending"], row["blocks"]) == (5, 1, 1, 8)


def test_the_roofline_of_a_loop():
    """The inner loop alone is counted; blocks that share a multiprocessor hide a wait, one alone does not."""
    from benchmarks import sass

    loop = sass.inner_loop(_LOOP)
    assert loop == sass.Loop(instructions=5, products=1, pending=0)
    assert sass.inner_loop("        /*0000*/                   FFMA R1, R2, R3, R4 ;") is None
    assert sass.blocks(9.0, 236, 196_608, 8) == 1 and sass.blocks(9.0, 128, 98_304, 8) == 2
    assert sass.blocks(8.9, 40, 4096, 4) == 12
    alone, shared = (sass.roofline(loop, (128, 256, 128), "int8", 9.0, 8, together) for together in (1, 2))
    assert alone == {"issue": 10, "tensor": 1024, "share": 1024 / 1034, "bytes": 48} and shared["share"] == 1
    assert sass.roofline(loop, (32, 32, 32), "int8", 9.0, 8, 2)["share"] == 0.8, "bound by issue"
