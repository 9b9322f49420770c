"""Lightning:

trainer = lightning.Trainer(callbacks=[fqt.integrations.lightning.FQTCallback(module.net, policy=fqt.AdaPT(module.net))])
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from fqt.integrations.control import Control
from fqt.precision import Policy


class FQTCallback(Callback):
    """A policy's step after each optimizer step, its penalty in the loss, its state in each checkpoint, the scalars in the log.

    Args:
        model: the converted model, or the part of the LightningModule that is.
        policy, measure_every: see `Control`, also for what is raised.
    """

    def __init__(self, model: nn.Module, policy: Policy | None = None, *, measure_every: int = 0) -> None:
        self.control = Control(model, policy, measure_every=measure_every)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Adds the penalty. With accumulation each part's loss is divided, and so is its penalty."""
        self.control.add_penalty(loss)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning sets the gradients to zero with the next batch only, so they are still there."""
        if trainer.global_step > self.control.steps:
            self.control.step(epoch=trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches)
            pl_module.log_dict(self.control.scalars())

    def state_dict(self) -> dict[str, Any]:
        policy = self.control.policy
        return {"steps": self.control.steps, "policy": None if policy is None else policy.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.control.steps = state_dict["steps"]
        if self.control.policy is not None:
            self.control.policy.load_state_dict(state_dict["policy"])
