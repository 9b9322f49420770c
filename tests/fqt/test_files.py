"""A file is replaced as a whole, whatever ends the writing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fqt import files

ROOT = Path(__file__).parents[2]


def test_a_part_that_a_killed_run_left_is_overwritten(tmp_path: Path) -> None:
    program = (
        "import os, pathlib; from fqt import files; os.fsync = lambda _: os._exit(9);"
        f"files.write_atomically(pathlib.Path({str(tmp_path / 'x')!r}), lambda file: file.write(b'long and new'))"
    )
    (tmp_path / "x").write_text("old")
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 9
    assert ((tmp_path / "x").read_text(), (tmp_path / "x.part").exists()) == ("old", True)
    files.write_atomically(tmp_path / "x", lambda file: file.write(b"new"))
    assert ((tmp_path / "x").read_text(), os.listdir(tmp_path)) == ("new", ["x"])
