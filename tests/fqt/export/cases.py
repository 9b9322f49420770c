"""A recipe that tests of exports share."""

from __future__ import annotations

import fqt
from fqt.recipe import Recipe


def recipe(name: str) -> Recipe:
    return fqt.load_recipe(name).everywhere()
