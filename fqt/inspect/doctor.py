"""What of fqt works on this machine, what does not, why, and the remedy: `python -m fqt doctor`."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import fqt
from fqt import ops, selfcheck
from fqt.cpu import library
from fqt.cuda_kernels import runtime
from fqt.ops import KERNELS, Kernel


@dataclass(frozen=True)
class Finding:
    """A line of the screen. state: "ok", "absent" (not there, and nothing is wrong with that) or "broken"."""

    state: str
    name: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"\n{'':27}-> {self.remedy}" if self.remedy else ""
        return f"{self.state:8}{self.name:20}{self.text}{remedy}"


def examine() -> list[Finding]:
    """Everything, in the order in which it is shown. Loads the native libraries and compares them with the reference."""
    return [*_software(), *_backend(), *_libraries(), *_gpu(), *_cuda_kernels(), *_extras()]


def _software() -> Iterator[Finding]:
    yield Finding("ok", "fqt", f"{fqt.__version__}, {Path(fqt.__file__).parent}")
    yield Finding("ok", "torch", f"{torch.__version__}, Python {platform.python_version()}, {platform.platform()}")
    capability = torch.backends.cpu.get_cpu_capability()
    threads = f"torch uses {capability} and {torch.get_num_threads()} threads of {os.cpu_count()}"
    yield Finding("ok", "processor", f"{processor()}; {threads}")


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _backend() -> Iterator[Finding]:
    try:
        named = ops.named_backend()
    except ValueError as error:
        yield Finding("broken", "FQT_BACKEND", str(error), "unset it, or name a backend that is known")
        return
    yield Finding("ok", "FQT_BACKEND", f"{named}: it serves everything or refuses" if named else "not set: the fastest serves")


def _libraries() -> Iterator[Finding]:
    """A line for the library, and one for each native row of the table of kernels that this machine can run."""
    if not library.LIBRARY.exists():
        compiler = any(map(shutil.which, ("c++", "g++", "clang++")))
        remedy = library.BUILD if compiler else f"install a C++ compiler (apt-get install g++), then {library.BUILD}"
        yield Finding("absent", "cpu kernels", f"{library.LIBRARY.name} is not built: the reference serves, slower", remedy)
        return
    try:
        used = library.operators().instruction_set()
    except (OSError, AttributeError, RuntimeError) as error:
        text = " ".join(str(error.__cause__ or error).split())
        yield Finding(
            "broken", "cpu kernels", f"{library.LIBRARY.name} does not load: {text}", f"build it anew: {library.BUILD}"
        )
        return
    yield Finding("ok", "cpu kernels", f"{library.LIBRARY.name} loads, {used}")
    for row in KERNELS:
        if row.native and row.device == "cpu":
            yield _row(row)


def _row(row: Kernel) -> Finding:
    name, reason = f"  {row.operator} {row.variant}".rstrip(), ops.broken(row)
    if reason is not None:
        return Finding("broken", name, reason, "until then this row refuses, and the reference serves")
    cases = selfcheck.compare(row, ops.load(row.function))
    return Finding("ok", name, f"equals the reference in {cases} random cases")


def _gpu() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees none (nvidia-smi, driver)"
        yield Finding("absent", "GPU", why)
    else:
        yield Finding("ok", "GPU", f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}: Triton's kernels serve there")
    found = importlib.util.find_spec("triton") is not None
    yield Finding("ok" if found else "absent", "triton", "installed" if found else "not installed: GPUs use the reference")


def _cuda_kernels() -> Iterator[Finding]:
    """A line for the compiler, and one for each native row of the table of kernels, where there is a GPU that they serve."""
    reason = runtime.refuses()
    if reason is not None:
        yield Finding("absent", "cuda kernels", reason)
        return
    architecture = runtime.device(torch.cuda.current_device()).architecture
    yield Finding("ok", "cuda kernels", f"compiled for {architecture} when first used, kept in {runtime.cache()}")
    for row in KERNELS:
        if row.native and row.device == "cuda":
            yield _row(row)


def _extras() -> Iterator[Finding]:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        yield Finding("absent", "C++ compiler", "none: no torch.compile on the CPU", "apt-get install g++")
    else:
        yield Finding("ok", "C++ compiler", compiler)
    if importlib.util.find_spec("apex") is None:
        yield Finding("absent", "apex", "not installed; torch.optim's fused optimizers serve")
    elif importlib.util.find_spec("apex.optimizers") is None:
        remedy = "uninstall it, and build NVIDIA's from its source if you want apex_adam or apex_sgd"
        yield Finding("broken", "apex", "what is installed is PyPI's web toolkit of that name", remedy)
    else:
        yield Finding("ok", "apex", "installed")
