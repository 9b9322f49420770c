"""One seed for every randomized test, which is told, and one thread for each test."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.fqt.helpers import SEED

# Inductor's cache does not know of ATEN_CPU_CAPABILITY: one for all would hand this run kernels that a wider processor made.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}_{torch.backends.cpu.get_cpu_capability()}"),
)


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(f"FQT_TEST_SEED={SEED}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        report.sections.append(("seed", f"repeat with FQT_TEST_SEED={SEED}"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads on a busy machine wait for each other, which costs several times as much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
