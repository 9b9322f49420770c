"""The C++ kernels by themselves: tests/csrc compares those of every instruction set of this machine with straight loops."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.fqt.helpers import effort

ROOT = Path(__file__).parents[3]
OBJECTS = ROOT / "build/extension"
KERNELS = 21  # lines of the program's report


def test_every_instruction_set_equals_straight_loops(rng: np.random.Generator):
    """20 cases a kernel, and the bounds, of the extension's own objects; `make test-native` and `make test-arm` run more."""
    if not OBJECTS.exists():
        pytest.skip("no build/extension: the kernels were not built in this folder")
    for tool in ("make", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here")
    built = subprocess.run(["make", "-s", "build/check-extension/check"], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    program = ROOT / "build/check-extension/check"
    done = subprocess.run([program, str(rng.integers(2**32)), str(effort(20))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok\n") == KERNELS, done.stdout
