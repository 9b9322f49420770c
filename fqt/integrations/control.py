"""What the loops of other libraries share: a policy's part of each step, and the scalars to log."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fqt.convert import revert
from fqt.inspect.flow import modelled_speedup
from fqt.inspect.timing import in_turns
from fqt.inspect.trial import floats_of, undisturbed
from fqt.layers import quantized_layers
from fqt.precision import Policy


class Control:
    """A converted model in a loop that somebody else wrote.

    Args:
        model: converted; not its DDP wrapper.
        policy: of the model, or None.
        measure_every: optimizer steps between two measurements of the speed-up; 0: never. Each takes about eight forwards and
            backwards on a batch of the run, and the memory of two more models.
        own_loss: the model returns its loss, in a mapping, to which the penalty is added.

    Raises:
        ValueError: nothing in the model is converted, or the policy is another model's.
    """

    def __init__(
        self, model: nn.Module, policy: Policy | None = None, *, measure_every: int = 0, own_loss: bool = False
    ) -> None:
        if not any(quantized_layers(model)):
            raise ValueError(f"nothing in this {type(model).__name__} is converted: call fqt.convert before training")
        if policy is not None and policy.model is not model:
            raise ValueError("the policy was made for another model than the one that is trained: make it of this one")
        self.model, self.policy, self.measure_every = model, policy, measure_every
        self.own_loss, self.steps, self.measured, self.modelled = own_loss, 0, math.nan, math.nan
        self._losses: list[Tensor] = []
        self._batch: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None
        self._hook()

    def add_penalty(self, loss: Tensor) -> None:
        """Adds the policy's penalty to a loss, in place, before its backward; and remembers the loss for the policy."""
        if self.policy is not None:
            loss += self.policy.penalty().to(loss)
            self._losses.append(loss.detach())

    def step(self, epoch: float = 0.0) -> None:
        """After an optimizer's step, while the gradients are still there. epoch: epochs done, with their fraction."""
        due = self._due()
        self.steps += 1
        if self.policy is not None:
            if not self._losses:
                raise ValueError("the policy saw no loss in this step: it has to be the model's own, in its output")
            self.policy.step(torch.stack(self._losses).mean(), epoch=epoch)
            self._losses.clear()
        if self._batch is not None:
            args, kwargs = self._batch
            self._batch = None
            if not (args and kwargs):  # an example is one of them
                self.modelled = self._without_hooks(lambda: modelled_speedup(self.model, kwargs or args))
            if due:
                self.measured = self._measure(args, kwargs)

    def scalars(self) -> dict[str, float]:
        """What a run would log now, name -> value."""
        found = {"speedup/measured": self.measured} if math.isfinite(self.measured) else {}
        if math.isfinite(self.modelled):
            found["speedup/modelled"] = self.modelled
        if self.policy is not None:
            found |= {f"precision/{name}": value for name, value in self.policy.scalars().items()}
            found["precision/ms"] = self.policy.milliseconds
        return found

    def close(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._hooks:
            handle.remove()

    def _hook(self) -> None:
        self._hooks = [self.model.register_forward_pre_hook(self._see, with_kwargs=True)]
        if self.own_loss:
            self._hooks.append(self.model.register_forward_hook(self._after))

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if module.training and torch.is_grad_enabled() and (self._due() or self.steps == 0):
            self._batch = (args, kwargs)

    def _due(self) -> bool:
        """Whether the speed-up is measured in this step."""
        return self.measure_every > 0 and self.steps % self.measure_every == 0

    def _without_hooks(self, run: Callable[[], Any]) -> Any:
        self.close()
        try:
            return run()
        finally:
            self._hook()

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if module.training and loss is not None:
            self.add_penalty(loss)

    def _measure(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        """Time of a forward and backward of the unconverted model over that of this one, on copies, in turns."""
        # or the copies would have the hooks
        copies = self._without_hooks(lambda: [copy.deepcopy(self.model), revert(copy.deepcopy(self.model))])

        def run(side: nn.Module) -> None:
            torch.stack([tensor.float().square().mean() for tensor in floats_of(side(*args, **kwargs))]).sum().backward()

        with undisturbed(self.model):
            device = next(self.model.parameters()).device
            low, plain = in_turns([lambda: run(copies[0]), lambda: run(copies[1])], device, 0.0, 3)
        return plain / low
