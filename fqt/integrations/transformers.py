"""transformers' Trainer:

trainer = Trainer(model=fqt.convert(model, recipe), ...)
fqt.integrations.transformers.control(trainer, policy=fqt.AdaPT(model))
trainer.train()
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fqt.integrations.control import Control
from fqt.precision import Policy

FILE = "fqt_policy.pt"
"""In each of the Trainer's checkpoints: the policy's state."""


def control(trainer: Trainer, policy: Policy | None = None, *, measure_every: int = 0) -> FQTCallback:
    """Gives a Trainer the callback, before those that log. See `Control` for what is raised."""
    assert trainer.model is not None
    made = FQTCallback(Control(trainer.model, policy, measure_every=measure_every, own_loss=True))  # type: ignore[arg-type]
    trainer.callback_handler.callbacks.insert(0, made)
    return made


class FQTCallback(TrainerCallback):
    """A policy's step after each optimizer step, its state in each checkpoint, the scalars in each log.

    The policy's penalty is added to the loss that the model itself returns, so it is not for a Trainer that computes another
    (`label_smoothing_factor`, `compute_loss_func`).
    """

    def __init__(self, control: Control) -> None:
        self.control = control

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        path = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / FILE
        if state.global_step and self.control.policy is not None:
            if not path.is_file():
                raise ValueError(f"{path} is not there: this training cannot go on with the policy's decisions; begin anew")
            self.control.policy.load_state_dict(torch.load(path, weights_only=True))

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.control.step(epoch=state.epoch or 0.0)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            logs |= self.control.scalars()
            state.log_history[-1] |= self.control.scalars()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.control.policy is not None and state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            torch.save(self.control.policy.state_dict(), folder / FILE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.control.close()
