"""How the library words a mistake."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: object, known: Iterable[object]) -> str:
    """' (did you mean ...?)' for an error message, or ''."""
    match = difflib.get_close_matches(str(word), list(known), n=1)  # type: ignore[type-var]
    return f" (did you mean {match[0]!r}?)" if match else ""
