"""Where in a model the numbers stop being finite: the first layer of the forward, or else of the backward."""

from typing import Any

import torch
from torch import Tensor, nn

import fqt
from train.measure import undisturbed
from train.step import Parts
from train.tasks import Task


def first_not_finite(probe: nn.Module, task: Task, parts: Parts, *, autocast: bool) -> str:
    """One sentence with the layer, the ranges around it and its recipe, from a forward and backward of a copy of the model."""
    probe.train()
    names = {module: name for name, module in probe.named_modules() if not any(module.children())}
    seen: list[str] = []

    def after_forward(module: nn.Module, inputs: Any, output: Any) -> None:
        if not seen and any(not x.isfinite().all() for x in _tensors(output)):
            seen.append(f"the output of {_described(module, names[module])}; {_ranges(module, inputs, 'input')}")

        for x in _tensors(output):
            if x.requires_grad:
                x.register_hook(lambda g: in_backward(module, g))

    def in_backward(module: nn.Module, g: Tensor) -> None:
        if not seen and not g.isfinite().all():
            seen.append(f"the gradient that arrives at {_described(module, names[module])}: {_range(g)}")

    for module in names:
        module.register_forward_hook(after_forward)
    with undisturbed():
        for part in parts:
            loss = task.forward(probe, *part, autocast=autocast).loss
            if not seen and not loss.isfinite():
                seen.append(f"the loss of finite logits, of {task.samples} with {_range(part[0])}")
            loss.backward()
    for name, parameter in probe.named_parameters():
        if not seen and parameter.grad is not None and not parameter.grad.isfinite().all():
            seen.append(f"the gradient of the parameter {name}, with {_range(parameter.detach())}")
    return f"First not finite is {seen[0]}." if seen else "A repetition of the last such batch gave finite numbers."


def _described(module: nn.Module, name: str) -> str:
    recipe = f", recipe {module.recipe.name}" if isinstance(module, fqt.QuantizedLayer) else ""
    return f"layer {name} ({type(module).__name__}{recipe})"


def _ranges(module: nn.Module, values: Any, word: str) -> str:
    shown = [f"{word} {_range(value)}" for value in _tensors(values)]
    return ", ".join([*shown, *(f"{name} {_range(value.detach())}" for name, value in module.named_parameters(recurse=False))])


def _range(value: Tensor) -> str:
    """`-1.5 to 2 (3 not finite)`."""
    finite = value[value.isfinite()].float()
    span = f"{finite.min().item():.3g} to {finite.max().item():.3g}" if finite.numel() else "no finite value"
    broken = value.numel() - finite.numel()
    return f"{span} ({broken} not finite)" if broken else span


def _tensors(values: Any) -> list[Tensor]:
    """The float tensors among a hook's values."""
    values = values if isinstance(values, tuple) else (values,)
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
