"""recommend: which recipe for this model, on this machine: measured step time, measured gradient error, bytes kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves

from fqt.convert import convert
from fqt.inspect.observe import count_saved_bytes
from fqt.inspect.table import aligned
from fqt.inspect.timing import in_turns
from fqt.inspect.trial import Loss, MakeOptimizer, feed, floats_of, undisturbed
from fqt.layers import QuantizedLayer, quantized_layers
from fqt.recipe import Recipe
from fqt.recipe_yaml import load_recipe

CANDIDATES = ("int8", "int8_token", "int6", "int4", "bitnet", "fqt_w1a1g6", "fqt_1bit")
"""The recipes that are tried unless others are named."""
_ROUNDS = 3


@dataclass(frozen=True)
class Row:
    """A recipe on this model.

    Attributes:
        recipe: its name; "fp32" is the model as it is.
        ms: median time of a training step: forward, loss, backward and optimizer.
        speedup: float32's median over this one's.
        error: ||g - g_fp32|| / ||g_fp32|| of all parameters' gradients together, on `input`; 1 is as wrong as no gradient.
        saved_bytes: what a forward keeps for the backward, parameters not counted.
    """

    recipe: str
    ms: float
    speedup: float
    error: float
    saved_bytes: int


@dataclass(frozen=True)
class Recommendation:
    """`rows` is data, fastest first; `str()` is a table. left_out: recipe -> why it could not be tried."""

    rows: tuple[Row, ...]
    at_least: float
    left_out: dict[str, str]

    @property
    def best(self) -> str:
        """The recipe with the smallest gradient error among those that are `at_least` so many times as fast as float32."""
        fast = [row for row in self.rows if row.speedup >= self.at_least and row.recipe != "fp32"]
        return min(fast, key=lambda row: row.error).recipe if fast else "fp32"

    def __str__(self) -> str:
        lines = [("recipe", "ms a step", "speed-up", "gradient error", "MiB kept for backward")]
        lines += [
            (row.recipe, f"{row.ms:.1f}", f"{row.speedup:.2f}", f"{row.error:.3f}", f"{row.saved_bytes / 2**20:.1f}")
            for row in self.rows
        ]
        text = "\n".join(aligned(lines, right=range(1, 5)))
        text += "\n" + (
            f"smallest error at {self.at_least:g} times float32's speed or more: {self.best}"
            if self.best != "fp32"
            else f"no recipe is {self.at_least:g} times as fast as float32 here: stay with fp32"
        )
        return text + "".join(f"\nnot tried: {name}: {reason}" for name, reason in self.left_out.items())


def recommend(
    model: nn.Module,
    example: object,
    *,
    at_least: float = 1.0,
    recipes: Sequence[str | Path | Recipe] = CANDIDATES,
    optimizer: MakeOptimizer = torch.optim.Adam,
    loss: Loss | None = None,
    seconds: float = 20.0,
) -> Recommendation:
    """Take real training steps by each recipe and in float32, in turns, on copies of the model, here and now.

        print(fqt.recommend(model, images, at_least=1.5))

    A gradient error says how far one step is from float32's, not what accuracy comes of it: 1-bit recipes train with errors
    near 1. Measure accuracy before you choose by it.

    Args:
        model: not converted; it is not touched.
        example: as large as in training, since times depend on it: a tensor, a tuple of arguments or a mapping of keyword
            arguments.
        at_least: the speed-up that `Recommendation.best` asks for.
        recipes: what to try: names, paths or recipes.
        optimizer: makes one of the parameters.
        loss: of the model's output; None: the mean square of its float tensors.
        seconds: spent on timing, all recipes together, at least three rounds; warm-up and errors come on top.

    Raises:
        ValueError: the model is converted, or none of the recipes can be followed.
    """
    from tqdm.auto import tqdm  # not at import: it looks for a notebook

    if any(quantized_layers(model)):
        raise ValueError(
            f"this {type(model).__name__} is converted: recommend compares recipes on a float model, revert it first"
        )
    loss = loss or _mean_square
    sides, left_out = {"fp32": _copied(model)}, {}
    for recipe in map(load_recipe, recipes):
        try:
            sides[recipe.name] = convert(_copied(model), recipe)
        except ValueError as error:
            left_out[recipe.name] = str(error)
    if len(sides) == 1:
        raise ValueError(f"none of the recipes can be followed: {'; '.join(f'{n}: {why}' for n, why in left_out.items())}")
    with undisturbed(model):
        seed = int(torch.randint(2**62, ()))
        shown = tqdm(sides.items(), "gradients", len(sides), leave=False)
        gradients = {name: _gradient(side, example, loss, seed) for name, side in shown}
        kept = {name: _kept(side, example) for name, side in sides.items()}
        with tqdm(desc="steps", total=len(sides) * (_ROUNDS + 1), leave=False) as bar:
            steps = [_step(side, example, loss, optimizer, bar.update) for side in sides.values()]
            ms = dict(zip(sides, in_turns(steps, _device(example), seconds, _ROUNDS), strict=True))
    exact = gradients["fp32"]
    rows = [
        Row(name, ms[name], ms["fp32"] / ms[name], float((gradients[name] - exact).norm() / exact.norm()), kept[name])
        for name in sides
    ]
    return Recommendation(tuple(sorted(rows, key=lambda row: row.ms)), at_least, left_out)


def _copied(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model).train()
    for parameter in copied.parameters():
        parameter.grad = None
    return copied


def _mean_square(output: object) -> Tensor:
    return torch.stack([tensor.float().square().mean() for tensor in floats_of(output)]).sum()


def _gradient(model: nn.Module, example: object, loss: Loss, seed: int) -> Tensor:
    """All gradients in a row, float32; zero where a parameter has none.

    Without dropout, which each side would draw otherwise: only layers with running statistics, and low-bit ones, train.
    """
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        module.training = isinstance(module, (QuantizedLayer, _NormBase))
    torch.manual_seed(seed)
    loss(feed(model, example)).backward()
    for module, training in modes.items():
        module.training = training
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    gradient = torch.cat([part.detach().float().flatten() for part in parts])
    model.zero_grad()
    return gradient


def _kept(model: nn.Module, example: object) -> int:
    with count_saved_bytes() as saved:
        output = feed(model, example)
    del output
    return saved.bytes


def _step(model: nn.Module, example: object, loss: Loss, make: MakeOptimizer, done: Callable[[], object]) -> Callable[[], None]:
    made = make(model.parameters())
    for group in made.param_groups:
        group["lr"] = 0.0  # costs the same, and the weights stay what they are

    def step() -> None:
        loss(feed(model, example)).backward()
        made.step()
        made.zero_grad()
        done()

    return step


def _device(example: object) -> torch.device:
    return next((leaf.device for leaf in tree_leaves(example) if isinstance(leaf, Tensor)), torch.device("cpu"))
