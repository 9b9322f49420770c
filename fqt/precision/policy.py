"""Policy: what chooses each layer's recipe while a model trains. The protocol of all of them, and their names.

    controller = fqt.AdaPT(model)                        # or any other policy, of a converted model
    for images, labels in batches:
        loss = criterion(model(images), labels) + controller.penalty()
        loss.backward()
        optimizer.step()
        controller.step(loss)                            # before optimizer.zero_grad(): policies read the gradients
        optimizer.zero_grad()

A policy assigns a layer a new recipe and never changes one; the next forward follows it. Nothing is converted or compiled again
(`fqt.layers.base.let_recipe_change`), and the weights that the optimizer sees, the float32 master copy, stay untouched.

Every rank of a distributed run must decide alike, so a policy decides from what all ranks have in common: the weights, their
averaged gradients, and what `Policy.agreed` makes common. It draws no random numbers.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fqt.layers import QuantizedLayer, let_recipe_change, quantized_layers, refuse_frozen
from fqt.ops import PRODUCTS
from fqt.precision.formats import from_plain, to_plain
from fqt.recipe import Recipe
from fqt.wording import nearest

Input = float | int | str


@dataclass(frozen=True)
class Decision:
    """What a policy decided for a layer, with what it decided from.

    Attributes:
        step: optimizer steps done.
        layer: the layer's name.
        before, after: the recipes; equal where the decision was to change nothing.
        inputs: what the decision was made from, name -> value; a policy names the same inputs in all its decisions.
    """

    step: int
    layer: str
    before: Recipe
    after: Recipe
    inputs: Mapping[str, Input]

    def row(self) -> dict[str, Input]:
        """As one row of a log: step, layer, bits of each product before and after, then the inputs."""
        bits = {f"{product}_bits": f"{self.before.bits(product)} -> {self.after.bits(product)}" for product in PRODUCTS}
        recipes = {"before": self.before.name, "after": self.after.name}
        return {"step": self.step, "layer": self.layer, **recipes, **bits, **self.inputs}


class Policy:
    """Base class. A policy of your own overrides `decide`, and `own_state` and `load_own_state` if it remembers anything.

    Attributes:
        model, layers: the model, and name -> converted layer of it.
        steps: optimizer steps done.
        milliseconds: that the last step's deciding and switching took.

    Args:
        model: a converted model (not its DDP wrapper).

    Raises:
        ValueError: nothing in the model is converted.
    """

    name = ""
    """What a configuration calls the policy; given by `register_policy`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: dict[str, QuantizedLayer] = dict(quantized_layers(model))
        if not self.layers:
            raise ValueError(
                f"nothing in this {type(model).__name__} is converted, so {type(self).__name__} has no layer to decide for"
            )
        refuse_frozen(model, "a precision policy")
        self.steps, self.milliseconds = 0, 0.0
        for layer in self.layers.values():
            let_recipe_change(layer)

    def decide(self, loss: float, epoch: float) -> Iterable[Decision]:
        """The decisions of this step, `self.steps`; made by `decision`. The gradients are still there (`layer.weight.grad`).

        Args:
            loss: the step's mean over all ranks.
            epoch: epochs done, with their fraction.
        """
        raise NotImplementedError

    def step(self, loss: float | Tensor, *, epoch: float = 0.0) -> list[Decision]:
        """Once an optimizer step, between backward and zero_grad: decide, and assign. Returns what was decided.

        Args:
            loss: the training loss of this rank, with its penalty.
            epoch: epochs done, with their fraction; only policies that go by epochs read it.
        """
        self.steps += 1
        (mean,) = self.agreed([float(loss.detach() if isinstance(loss, Tensor) else loss)])
        started = time.perf_counter()
        decisions = list(self.decide(mean, epoch))
        for decision in decisions:
            self.layers[decision.layer].recipe = decision.after
        self.milliseconds = 1e3 * (time.perf_counter() - started)
        return decisions

    def decision(self, layer: str, after: Recipe, inputs: Mapping[str, Input]) -> Decision:
        """A decision of this step."""
        return Decision(self.steps, layer, self.layers[layer].recipe, after, dict(inputs))

    def agreed(self, values: Sequence[float]) -> list[float]:
        """Their means over all ranks: the same numbers on every rank. As they are, without torch.distributed."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return list(values)
        device = next(iter(self.layers.values())).weight.device
        # MPS knows no float64, and has no process groups either
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return (total / dist.get_world_size()).tolist()

    def penalty(self) -> Tensor:
        """What the policy adds to the loss, ()."""
        return torch.zeros(())

    def switching_cost(self) -> float:
        """What deciding costs, modelled: multiply-adds times bits a step, see `fqt.precision.cost`."""
        return 0.0

    def sparsity(self) -> dict[str, float]:
        """Layer -> share of its quantized weights that are zero, where the policy counts them."""
        return {}

    def scalars(self) -> dict[str, float]:
        """What the policy would show beside each layer's bits, name -> value."""
        return {}

    def own_state(self) -> dict[str, Any]:
        """What the policy remembers between steps, in tensors and plain values."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """The inverse of `own_state`."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, from which `load_state_dict` goes on deciding as if nothing had happened."""
        recipes = {name: to_plain(layer.recipe) for name, layer in self.layers.items()}
        return {"policy": type(self).__name__, "steps": self.steps, "recipes": recipes, "own": self.own_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave, the layers' recipes included.

        Raises:
            ValueError: it is another policy's, or of a model with other layers.
        """
        if state["policy"] != type(self).__name__:
            raise ValueError(
                f"this is the state of the policy {state['policy']}, not of {type(self).__name__}: use that policy"
            )
        if state["recipes"].keys() != self.layers.keys():
            odd = sorted(state["recipes"].keys() ^ self.layers.keys())
            raise ValueError(
                f"the state's layers are not the model's, {', '.join(odd[:4])} for one: convert the same model alike"
            )
        for name, layer in self.layers.items():
            layer.recipe = from_plain(state["recipes"][name])
        self.steps = state["steps"]
        self.load_own_state(state["own"])


POLICIES: dict[str, type[Policy]] = {}
"""Name -> policy."""

AnyPolicy = TypeVar("AnyPolicy", bound=type[Policy])


def register_policy(name: str) -> Callable[[AnyPolicy], AnyPolicy]:
    """Register the decorated `Policy` under the name that a configuration's `precision: {policy: name}` uses.

    Raises:
        ValueError: the name is taken.
        TypeError: the class is no `Policy`.
    """
    if name in POLICIES:
        raise ValueError(f"a precision policy named {name!r} exists already: choose another name")

    def add(policy: AnyPolicy) -> AnyPolicy:
        if not (isinstance(policy, type) and issubclass(policy, Policy)):
            raise TypeError(f"register_policy({name!r}) is for a subclass of fqt.Policy, not {policy!r}")
        policy.name = name
        POLICIES[name] = policy
        return policy

    return add


def build_policy(name: str, model: nn.Module, /, **options: object) -> Policy:
    """The policy `name` of a converted model, with its options.

    Raises:
        ValueError: unknown name or option, or a value that the policy refuses: which, and the nearest.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown precision policy {name!r}{nearest(name, POLICIES)}; known: {', '.join(sorted(POLICIES))}")
    known = [option for option in inspect.signature(POLICIES[name]).parameters if option != "model"]
    for option in options:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"precision policy {name!r} has no option {option!r}{nearest(option, known)}; {takes}")
    try:
        return POLICIES[name](model, **options)
    except TypeError as error:
        raise ValueError(f"precision policy {name!r}: {error}") from error


def check_number(name: str, value: object, low: float, high: float, *, integer: bool = False) -> None:
    """ValueError unless the option is a number (an integer) in [low, high]."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or (integer and not isinstance(value, int)):
        kind = "an integer" if integer else "a number"
        raise ValueError(f"{name} is {value!r}, not {kind} from {low:g} to {high:g}")


def check_bounds(name: str, value: object, low: int, high: int) -> tuple[int, int]:
    """The option as (min, max). ValueError unless it is two integers in [low, high], the first not above the second."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"{name} is {value!r}, not two integers [min, max]")
    for end, bound in zip(("minimum", "maximum"), value, strict=True):
        check_number(f"{name}'s {end}", bound, low, high, integer=True)
    if value[0] > value[1]:
        raise ValueError(f"{name} is {list(value)}: its minimum {value[0]} is above its maximum {value[1]}; exchange them")
    return value[0], value[1]
