"""static: the recipe as it is. What other policies are compared with."""

from __future__ import annotations

from collections.abc import Iterable

from fqt.precision.policy import Decision, Policy, register_policy


@register_policy("static")
class Static(Policy):
    """Changes nothing."""

    def decide(self, loss: float, epoch: float) -> Iterable[Decision]:
        return ()
