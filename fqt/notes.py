"""Notes: what a backward knows of a gradient that it hands to the next one, so that this need not read it to find out.

They are kept beside the tensors, by identity: a tensor that was changed since, or that autograd added up from others, has none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class _Note:
    version: int
    low_NC: Tensor | None = None
    high_NC: Tensor | None = None
    kept: Tensor | None = None


_notes = WeakIdKeyDictionary()


def note_ranges(g: Tensor, low_NC: Tensor, high_NC: Tensor) -> None:
    """The smallest and largest value of each sample and channel of g, (N, C) float32; NaN where there is one."""
    _notes[g] = _Note(g._version, low_NC, high_NC)


def note_kept(g: Tensor, index: Tensor) -> None:
    """The samples that pruning has left, as `QTensor.index`; the others are zero."""
    kept = index.new_zeros(g.shape[0] + 1, dtype=torch.bool).index_fill_(0, index.long() % (g.shape[0] + 1), True)
    _notes[g] = _Note(g._version, kept=kept[:-1])


def carry_note(g: Tensor, view: Tensor) -> Tensor:
    """Have a view of g know what is known of g; returns the view."""
    note = _found(g)
    if note is not None:
        _notes[view] = note
    return view


def ranges_of(g: Tensor, axes: str, fold: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The range of each group of g times `fold`, (G,) and (G,), as `fqt.reference.group_range` finds it; None if not known.

    Rounding keeps order, so the extremes of the products are the products of the extremes, bit for bit.
    """
    note = _found(g)
    low, high = (None, None) if note is None else (note.low_NC, note.high_NC)
    if low is None or high is None:
        return None
    if fold is not None:
        if fold.shape[1] != 1:  # it differs from position to position
            return None
        ends = low * fold[:, 0], high * fold[:, 0]
        low, high = torch.minimum(*ends), torch.maximum(*ends)
    if axes == "NC":
        return low.T.flatten(), high.T.flatten()
    summed = {"": (0, 1), "N": 1, "C": 0}.get(axes)
    return None if summed is None else (low.amin(summed).view(-1), high.amax(summed).view(-1))


def kept_samples(g: Tensor) -> Tensor | None:
    """(N,) bool of `note_kept`, None if nothing is known."""
    note = _found(g)
    return None if note is None else note.kept


def _found(g: Tensor) -> _Note | None:
    note = _notes.get(g) if _notes else None
    return note if note is not None and note.version == g._version else None
