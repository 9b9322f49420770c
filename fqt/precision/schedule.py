"""schedule: another recipe from a given epoch on, for instance float32 at first, low bits later, more bits at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fqt.precision.policy import Decision, Policy, check_number, register_policy
from fqt.recipe import Recipe
from fqt.recipe_yaml import load_recipe


@register_policy("schedule")
class Schedule(Policy):
    """Gives every converted layer the recipe of the phase that its training has reached.

        fqt.convert(model, "int8")
        controller = Schedule(model, phases=[{"epoch": 2, "recipe": "dorefa_w4a4g4"}, {"epoch": 4.5, "recipe": "int8"}])
        ...
        controller.step(loss, epoch=steps / steps_per_epoch)

    Args:
        model: converted by the recipe that it starts with.
        phases: mappings of `epoch`, from which on the phase lasts, rising, and `recipe`: a name, a path or a `Recipe`. Its
            rules are not read: a layer that conversion left float stays so, and all others follow the recipe.

    Raises:
        ValueError: phases that are malformed or do not rise; a recipe that exchanges activations, or that a layer cannot
            follow.
    """

    def __init__(self, model: nn.Module, *, phases: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(model)
        self._phases: list[tuple[float, Recipe]] = []
        if not isinstance(phases, Sequence) or isinstance(phases, str) or not phases:
            raise ValueError(f"phases is {phases!r}, not a list such as [{{epoch: 2, recipe: int8}}]")
        for phase in phases:
            if not isinstance(phase, Mapping) or set(phase) != {"epoch", "recipe"}:
                raise ValueError(f"phases: a phase is {{epoch: number, recipe: name}}, not {phase!r}")
            check_number("phases: epoch", phase["epoch"], 0, 1e9)
            self._phases.append((phase["epoch"], self._usable(phase["recipe"])))
        epochs = [epoch for epoch, _ in self._phases]
        if epochs != sorted(set(epochs)):
            raise ValueError(f"phases begin at the epochs {epochs}, which do not rise: order them")
        self._reached = 0

    def _usable(self, source: str | Path | Recipe) -> Recipe:
        recipe = load_recipe(source)
        if recipe.replace:
            raise ValueError(
                f"phases: recipe {recipe.name!r} exchanges activations, which only a conversion can: convert the model by it, "
                f"and let the phases be recipes that exchange none"
            )
        for layer in self.layers.values():
            recipe.check(layer.kind)
        return recipe.everywhere()

    def decide(self, loss: float, epoch: float) -> Iterator[Decision]:
        reached = sum(begin <= epoch for begin, _ in self._phases)
        if reached <= self._reached:
            return
        self._reached = reached
        for name in self.layers:
            yield self.decision(name, self._phases[reached - 1][1], {"epoch": epoch, "phase": reached})

    def own_state(self) -> dict[str, Any]:
        return {"reached": self._reached}

    def load_own_state(self, state: dict[str, Any]) -> None:
        self._reached = state["reached"]
