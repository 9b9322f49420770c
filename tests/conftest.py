"""One seed for every randomized test, which is told, and one thread for each test."""

import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.fqt.helpers import EFFORT, SEED

# Inductor's cache does not know of ATEN_CPU_CAPABILITY: one for all would hand this run kernels that a wider processor made.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}_{torch.backends.cpu.get_cpu_capability()}"),
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test marked `every(n)`, one case in n, others with another FQT_TEST_SEED; tests of one `of` count as cases of one.
    All of them where FQT_TEST_EFFORT is more than 1, or where a test is named, so that any case can be run alone."""
    if EFFORT > 1 or any("::" in name for name in config.args) or config.option.keyword:
        return
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        if marker := item.get_closest_marker("every"):
            groups.setdefault(marker.kwargs.get("of", item.nodeid.partition("[")[0]), []).append(item)
    left: set[pytest.Item] = set()
    for cases in groups.values():
        (share,) = cases[0].get_closest_marker("every").args  # type: ignore[union-attr]
        cases.sort(key=lambda item: zlib.crc32(f"{SEED} {item.nodeid}".encode()))
        left.update(cases[-(-len(cases) // share) :])
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=list(left))


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(f"FQT_TEST_SEED={SEED} FQT_TEST_EFFORT={EFFORT:g}: more than 1 runs what `every` leaves out")


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
