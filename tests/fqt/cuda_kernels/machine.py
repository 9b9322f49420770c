"""The emulator as the machine that kernels are launched on: CPU tensors take the place of a GPU's."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor

from fqt.cuda_kernels import plan, runtime

ROOT = Path(__file__).parents[3]
# floats must round as on the device: no fused multiply-add
FLAGS = ("-O2", "-std=c++20", "-ffp-contract=off", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC")


def build(source: Path, library: Path) -> ctypes.CDLL:
    """A library of host code, from a source that includes the kernels and the emulator."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    include = ("-I", str(ROOT / "fqt/cuda_kernels"), "-I", str(ROOT / "tests/cuda"))
    done = subprocess.run(["g++", *FLAGS, *include, str(source), "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


class Emulator:
    """`launch` and the GPU's properties, as products.py asks for them.

    Attributes:
        launched: (kernel, blocks, slices, instructions of the tensor cores) of each launch.
    """

    def __init__(self, library: ctypes.CDLL, seed: int):
        self.run = library.run
        self.run.restype = ctypes.c_char_p
        self.instructions = library.instructions
        self.instructions.restype = ctypes.c_int64
        self.seed = seed
        self.device = plan.Device((9, 0), 1, 232_448)  # has every tile
        self.launched: list[tuple[runtime.Kernel, int, int, int]] = []

    def launch(self, kernel: runtime.Kernel, blocks: int, slices: int, arguments: Sequence[runtime.Argument]) -> None:
        if blocks * slices == 0:
            return
        name = f"{kernel.file} {' '.join(map(str, kernel.instance))}" if kernel.instance else kernel.name
        numbers = ctypes.c_int64 * len(arguments)
        passed = numbers(*(runtime.passed(argument) for argument in arguments))
        sizes = numbers(*(a.numel() * a.element_size() if isinstance(a, Tensor) else -1 for a in arguments))
        self.seed += 1
        error = self.run(
            name.encode(), ctypes.c_int64(blocks), slices, kernel.threads, kernel.shared, passed, sizes, len(arguments),
            ctypes.c_uint(self.seed % 2**32),
        )  # fmt: skip
        if error:
            raise AssertionError(f"{name}: {error.decode()}")
        self.launched.append((kernel, blocks, slices, self.instructions()))
