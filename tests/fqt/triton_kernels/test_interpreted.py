"""Every Triton kernel under Triton's interpreter, against the reference, in a process of its own (see `cases`)."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.fqt.helpers import effort

ROOT = Path(__file__).parents[3]
COUNTS = {"quantize": 5, "scales": 2, "prune": 1, "products": 3, "float8": 1, "norm": 2, "steps": 1}


def test_every_kernel_equals_the_reference_under_the_interpreter(rng: np.random.Generator):
    pytest.importorskip("triton", reason="Triton is not installed")
    asked = [f"{family}={effort(count)}" for family, count in COUNTS.items()]
    command = [sys.executable, "-W", "ignore", "-m", "tests.fqt.triton_kernels.cases", str(rng.integers(2**31)), *asked]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    assert done.stdout.count("cases equal the reference") == len(COUNTS), done.stdout
