"""Compiling and launching: CUDA C++ by `cuda.core` (NVRTC), its cubins kept on disk.

Nothing here is needed to import fqt: cuda.core is imported when a kernel is first launched, and where it is missing the rows of
the table of kernels refuse with the remedy.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fqt.cuda_kernels import plan

_SOURCES = Path(__file__).parent
_NEEDED = {
    "cuda.core": "the package cuda-core is not installed: pip install 'fqt[cuda]'",
    "cuda.bindings": "the package cuda-bindings is not installed: torch's CUDA wheels bring it, those for CPUs do not",
}
CACHE = "FQT_CUDA_CACHE"
_OPTIONS = {"fma": False, "std": "c++20"}  # floats must round as the reference's: no fused multiply-add

Argument = Tensor | int | None


@dataclass(frozen=True)
class Kernel:
    """A kernel of a source file.

    Attributes:
        file: its name without ".cu".
        name: of the function; of a GEMM, where `instance` says which: "gemm".
        threads: of a block.
        shared: bytes of dynamic shared memory.
        instance: the template's arguments: rows, columns, stages, bytes of a copy; () for a function that is no template.
    """

    file: str
    name: str
    threads: int = 256
    shared: int = 0
    instance: tuple[int, ...] = ()

    @property
    def source(self) -> str:
        """CUDA C++, the instance's entry point included."""
        text = (_SOURCES / f"{self.file}.cu").read_text()
        if not self.instance:
            return text
        arguments = ", ".join(map(str, self.instance))
        return f"{text}\nKERNEL({self.threads}) {self.name}(PRODUCT_ARGUMENTS) {{ ::gemm<{arguments}>(PRODUCT); }}\n"


def gemm(tile: plan.Tile, unit: int) -> Kernel:
    """The kernel of a tile whose operands are copied in units of 4, 8 or 16 bytes."""
    return Kernel(tile.family, "gemm_entry", tile.threads, tile.shared, (tile.rows, tile.columns, tile.stages, unit))


def refuses() -> str | None:
    """Why this machine cannot serve, or None. Asked with every call: cheap."""
    if reason := missing():
        return reason
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return plan.refuses(device(torch.cuda.current_device()).capability)


@functools.cache
def _module(name: str) -> Any:
    """A module of NVIDIA's, which no type checker knows: it may be missing, and has no stubs."""
    return importlib.import_module(name)


@functools.cache
def missing() -> str | None:
    """Which package that compiles and launches is not installed, or None."""
    for name, reason in _NEEDED.items():
        # of the first part alone it can be asked whether it is there at all
        if importlib.util.find_spec("cuda") is None or importlib.util.find_spec(name) is None:
            return reason
    return None


@functools.cache
def device(index: int) -> plan.Device:
    """What plans need to know of a GPU."""
    found = torch.cuda.get_device_properties(index)
    return plan.Device((found.major, found.minor), found.multi_processor_count, found.shared_memory_per_block_optin)


def of(tensor: Tensor) -> plan.Device:
    """The GPU that holds a tensor."""
    return device(torch.cuda.current_device() if tensor.device.index is None else tensor.device.index)


def cubin(kernel: Kernel, architecture: str) -> bytes:
    """The machine code of a kernel, from the disk if it was compiled before.

    The cache is $FQT_CUDA_CACHE, else fqt/cuda in $XDG_CACHE_HOME or ~/.cache; a file's name is a digest of all that its
    contents depend on: sources, architecture, compiler and its options.

    Raises:
        ImportError: cuda.core is not installed. What NVRTC refuses is an error of cuda.core's, with the compiler's log.
    """
    headers = [(_SOURCES / name).read_text() for name in ("primitives.h", "tiles.h")]
    version = _module("cuda.bindings.nvrtc").nvrtcVersion()[1:]
    digest = hashlib.sha256(repr((kernel.source, headers, architecture, version, _OPTIONS)).encode()).hexdigest()[:32]
    path = cache() / f"{kernel.file}-{architecture}-{digest}.cubin"
    if path.exists():
        return path.read_bytes()
    core = _module("cuda.core")
    options = core.ProgramOptions(name=f"{kernel.file}.cu", arch=architecture, include_path=[str(_SOURCES)], **_OPTIONS)
    code = bytes(core.Program(kernel.source, "c++", options).compile("cubin").code)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:  # another process may be at it too
            file.write(code)
        os.replace(file.name, path)
    except OSError as error:  # a home that is read-only, as in containers, is no reason not to use what was compiled
        logging.getLogger("fqt").warning("compiled kernels are not kept (%s): name a folder in %s", error, CACHE)
    return code


def cache() -> Path:
    """Where cubins are kept."""
    named = os.environ.get(CACHE)
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fqt" / "cuda"


@functools.cache
def _loaded(kernel: Kernel, index: int):
    """The kernel on a GPU, allowed its shared memory."""
    core, driver = _module("cuda.core"), _module("cuda.bindings.driver")
    core.Device(index).set_current()
    function = core.ObjectCode.from_cubin(cubin(kernel, device(index).architecture)).get_kernel(kernel.name)
    if kernel.shared > 48 << 10:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (error,) = driver.cuKernelSetAttribute(attribute, kernel.shared, function.handle, driver.CUdevice(index))
        if error != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{kernel.file}: {kernel.shared} bytes of shared memory a block are refused ({error.name})")
    return function


def launch(kernel: Kernel, blocks: int, slices: int, arguments: Sequence[Argument]) -> None:
    """Run a kernel on the current stream of the tensors' device: `blocks` x 1 x `slices`. Nothing is waited for.

    Args:
        arguments: in the order of the kernel's: tensors, None for a null pointer, integers (passed as 64 bits).
    """
    if blocks * slices == 0:
        return
    core = _module("cuda.core")
    tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
    with torch.cuda.device(tensor.device):
        core.Device(tensor.get_device()).set_current()  # cuda.core has a notion of it of its own
        function = _loaded(kernel, tensor.get_device())
        # torch's default stream is the handle 0, which CUDA also knows as 1 (CU_STREAM_LEGACY)
        stream = core.Stream.from_handle(torch.cuda.current_stream().cuda_stream or 1)
        config = core.LaunchConfig(grid=(blocks, 1, slices), block=kernel.threads, shmem_size=kernel.shared)
        core.launch(stream, config, function, *(ctypes.c_int64(passed(argument)) for argument in arguments))


def passed(argument: Argument) -> int:
    """The 64 bits that a kernel gets of an argument: an address or a number."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return 0 if argument is None else argument
