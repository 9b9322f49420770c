"""accelerate, whose loop is the user's own:

control = fqt.integrations.accelerate.Accelerated(accelerator, model, policy=fqt.AdaPT(model))
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for images, labels in loader:
    with accelerator.accumulate(model):
        control.backward(criterion(model(images), labels))
        optimizer.step()
        control.step()               # before zero_grad: policies read the gradients
        optimizer.zero_grad()
"""

from __future__ import annotations

from accelerate import Accelerator
from torch import Tensor, nn

from fqt.integrations.control import Control
from fqt.precision import Policy


class Accelerated:
    """A policy's step after each optimizer step; its state is saved and loaded by `accelerator.save_state` and `load_state`.

    Args:
        model: converted, as it is before `accelerator.prepare`.
        policy, measure_every: see `Control`, also for what is raised.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, policy: Policy | None = None, *, measure_every: int = 0
    ) -> None:
        self.accelerator, self.control = accelerator, Control(model, policy, measure_every=measure_every)
        if policy is not None:
            accelerator.register_for_checkpointing(policy)

    def backward(self, loss: Tensor) -> None:
        """`accelerator.backward` of the loss with the policy's penalty."""
        self.control.add_penalty(loss)
        self.accelerator.backward(loss)

    def step(self, epoch: float = 0.0) -> None:
        """After `optimizer.step`, before `zero_grad`. Does nothing where the gradients of a batch are not all there yet.

        The scalars go to accelerate's trackers. epoch: epochs done, with their fraction.
        """
        if self.accelerator.sync_gradients and not self.accelerator.optimizer_step_was_skipped:
            self.control.step(epoch)
            self.accelerator.log(self.control.scalars(), step=self.control.steps)
