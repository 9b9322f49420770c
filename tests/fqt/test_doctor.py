"""`python -m fqt doctor`: one screen, and an exit status that says whether something is broken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fqt import ops
from fqt.__main__ import main
from fqt.cpu import library, signs
from fqt.cuda_kernels import runtime

ROOT = Path(__file__).parents[2]
built = pytest.mark.skipif(not library.LIBRARY.exists(), reason="the C++ kernels are not built")


@pytest.fixture(autouse=True)
def _ask_anew(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FQT_BACKEND", raising=False)
    ops.broken.cache_clear()
    ops.load.cache_clear()
    yield
    ops.broken.cache_clear()
    ops.load.cache_clear()


def test_a_whole_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert len(lines) < 30 and max(map(len, lines)) < 200, "one screen"
    for word in ("fqt ", "torch ", "Python", "processor", "threads", "cpu kernels", "GPU", "triton", "apex", "C++ compiler"):
        assert word in text
    assert "broken" not in text
    if library.LIBRARY.exists():
        served = {"cpu"} if runtime.refuses() else {"cpu", "cuda"}
        assert text.count("equals the reference in") == sum(row.native and row.device in served for row in ops.KERNELS)
    else:
        assert "not built" in text and "setup.py build_ext --inplace" in text


@built
def test_a_wrong_kernel_is_an_exit_status_of_1(monkeypatch, capsys) -> None:
    right = signs.grad_weight
    monkeypatch.setattr(signs, "grad_weight", lambda *args: -right(*args))
    assert main(["doctor"]) == 1
    broken = [line for line in capsys.readouterr().out.splitlines() if line.startswith("broken")]
    assert len(broken) == 1 and "grad_weight differs from the reference" in broken[0] and "build it anew" in broken[0]


def test_an_unknown_backend_in_the_environment(monkeypatch, capsys) -> None:
    monkeypatch.setenv("FQT_BACKEND", "refrence")
    assert main(["doctor"]) == 1
    assert "unknown backend 'refrence' in FQT_BACKEND (did you mean 'reference'?)" in capsys.readouterr().out


def test_a_library_that_is_not_built_is_no_fault(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "none.so")
    assert main(["doctor"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["absent", "cpu", "kernels", "none.so", "is", "not", "built:", "the", "reference", "serves,", "slower"] in lines
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["doctor"]) == 0
    assert "install a C++ compiler (apt-get install g++), then" in capsys.readouterr().out


@built
def test_a_corrupted_copy_of_the_library_is_an_exit_status_of_1(tmp_path: Path) -> None:
    (tmp_path / "_cpu.so").write_bytes(library.LIBRARY.read_bytes()[:100_000])
    code = "import sys, pathlib, fqt.cpu.library, fqt.__main__; fqt.cpu.library.LIBRARY = pathlib.Path(sys.argv[1]); " \
        "sys.exit(fqt.__main__.main(['doctor']))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "_cpu.so"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("broken")]
    assert "_cpu.so does not load" in line and "cut short: 100,000 bytes of" in line
    assert "build it anew: python setup.py build_ext --inplace" in done.stdout


def test_only_known_commands(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["docter"])
    assert "invalid choice: 'docter'" in capsys.readouterr().err
