"""Where a part of `gpu_check` runs: on a GPU, or dry, on a CPU with Triton's interpreter and the emulator of the CUDA kernels.

A dry run computes the same with the same code, on operands so small that it takes seconds; its clock says one millisecond.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fqt import ops
from fqt.cuda_kernels import runtime

Bench = Callable[[Callable[[], object]], float]
"""Milliseconds of a call."""


@dataclass(frozen=True)
class Machine:
    """A device, its clock, and whether operands are to be small. capability: of a GPU, as "9.0"."""

    device: str
    bench: Bench
    small: bool
    name: str
    capability: str = ""


def gpu() -> Machine:
    """The current CUDA device.

    Raises:
        RuntimeError: torch sees none.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device: --dry-run walks the same code without one")
    major, minor = torch.cuda.get_device_capability()
    return Machine("cuda", graphed_ms, False, torch.cuda.get_device_name(), f"{major}.{minor}")


def dry() -> Machine:
    """A CPU that takes the GPU's place. TRITON_INTERPRET=1 has to be set before Triton is imported; lasts for this process."""
    from tests.fqt.cuda_kernels import machine as emulated

    torch.set_num_threads(1)
    rows = [replace(row, device="cpu", native=False) for row in ops.KERNELS if row.device == "cuda"]
    ops.KERNELS[:] = [*rows, *(row for row in ops.KERNELS if row.backend == "reference")]

    @functools.cache
    def emulator() -> emulated.Emulator:  # built when a kernel is first launched: it takes longer than most parts
        with tempfile.TemporaryDirectory() as folder:
            library = emulated.build(emulated.ROOT / "tests/cuda/kernels.cpp", Path(folder) / "kernels.so")
        return emulated.Emulator(library, 0)

    runtime.launch = lambda *args: emulator().launch(*args)
    runtime.of, runtime.refuses = lambda tensor: emulator().device, lambda: None
    return Machine("cpu", _once, True, "dry run: interpreter and emulator")


def _once(function: Callable[[], object]) -> float:
    function()
    return 1.0


def graphed_ms(function: Callable[[], object], together_ms: float = 2.0) -> float:
    """Milliseconds of a call, as many as take `together_ms` captured in one CUDA graph: the host's time is not in it."""
    from triton.testing import do_bench

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    calls = max(1, min(100, int(together_ms / max(start.elapsed_time(end), 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    ms = float(do_bench(graph.replay, warmup=5, rep=40, return_mode="median")) / calls
    graph.reset()
    torch.cuda.empty_cache()
    return ms
