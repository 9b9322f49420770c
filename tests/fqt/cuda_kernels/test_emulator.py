"""The emulator finds what would be wrong on a device, in whatever order the threads run."""

import ctypes
import re

import numpy as np
import pytest

from tests.fqt.cuda_kernels import machine


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory):
    library = machine.build(machine.ROOT / "tests/cuda/faults.cpp", tmp_path_factory.mktemp("faults") / "faults.so")
    library.run.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sound", ""),
        ("read_without_barrier", "a barrier in between|which nobody has written"),
        ("write_without_barrier", "writes byte .* without a barrier in between|reads byte .* without a barrier in between"),
        ("nobody_wrote", "of shared memory, which nobody has written"),
        ("beyond_the_end", "writes 4 bytes at 1048576 of 32768 of shared memory: misaligned or beyond its end"),
        ("barrier_of_some", "waits for threads that have ended or stand elsewhere"),
        ("divergent", "is at (ballot|warp_sum), others at (ballot|warp_sum)"),
        ("copy_not_waited_for", "reads byte .* before its copy has landed"),
        ("copy_without_barrier", "before its copy has landed|which nobody has written|without a barrier in between"),
        ("copy_never_landed", "ends before its copies land"),
        ("copy_over_what_is_read", "without a barrier in between|before its copy has landed"),
        ("copy_misaligned", "copies from a misaligned address"),
        ("product", ""),
        ("product_without_fence", "wgmma without a fence since its registers were written"),
        ("product_unseen", "not shown to the async proxy by a fence"),
        ("product_not_committed", "wgmma is waited for before it is committed"),
        ("product_overwritten", "which wgmma still reads|others touch without a barrier in between"),
    ],
)
@pytest.mark.every(4)
def test_a_fault_is_found_in_any_order(name: str, said: str, faults: ctypes.CDLL, rng: np.random.Generator):
    for seed in rng.integers(2**32, size=20):
        found = faults.run(name.encode(), 128 if name.startswith("product") else 64, ctypes.c_uint(int(seed))).decode()
        assert re.search(said, found) if said else found == "", found
