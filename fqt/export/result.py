"""Exported: what an export says of the file that it wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Exported:
    """A written file, or folder. `print` it.

    Attributes:
        path: of it.
        measured: what was counted and compared, by name.
        notes: in which the file differs from the model, a sentence each.
        nbytes: its bytes, those of a folder's files together.
    """

    path: Path
    measured: Mapping[str, object]
    notes: tuple[str, ...]
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        files = [self.path] if self.path.is_file() else [file for file in self.path.rglob("*") if file.is_file()]
        object.__setattr__(self, "nbytes", sum(file.stat().st_size for file in files))

    def __str__(self) -> str:
        measured = ", ".join(f"{name} {_short(value)}" for name, value in self.measured.items())
        return "\n".join([f"{self.path}: {self.nbytes:,} bytes; {measured}", *(f"- {note}" for note in self.notes)])


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{name} {_short(part)}" for name, part in value.items()) + ")"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
