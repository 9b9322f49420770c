"""One optimizer step, and where its time goes. The training loop and the speed measurement run this same code."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import fqt
from fqt.precision import Decision, Policy
from train.config import Training
from train.wording import TrainingError

Parts = Sequence[tuple[Tensor, Tensor]]
"""A batch cut into equal parts: images x_NCHW and labels y_N, on the device."""


@dataclass(frozen=True)
class Outcome:
    """What one step did.

    loss: mean over the batch. correct: how many of its images were recognized.
    ms: wall time of forward, backward, optimizer, and of all of them (step).
    gradient_error: relative quantization error by layer and product, if it was asked for.
    decisions: of the precision policy.
    """

    loss: float
    correct: int
    images: int
    ms: dict[str, float]
    gradient_error: dict[str, dict[str, float]]
    decisions: Sequence[Decision] = ()


class Stopwatch:
    """Adds up wall time by phase, in ms. It waits for a GPU at each mark, or it would time the launches only."""

    def __init__(self, device: torch.device) -> None:
        self.ms: dict[str, float] = {}
        self._device, self._last = device, self._now(device)

    def mark(self, phase: str) -> None:
        """Records the time since the last mark."""
        now = self._now(self._device)
        self.ms[phase] = self.ms.get(phase, 0.0) + (now - self._last) * 1e3
        self._last = now

    @staticmethod
    def _now(device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()


class Step:
    """Forward and backward of each part, clipping, update.

    module: what is called in place of the model: itself, or wrapped for DDP.
    policy: what may give the model's layers other recipes after the update; its penalty is added to the loss.
    """

    def __init__(
        self, model: nn.Module, module: nn.Module, optimizer: Optimizer, config: Training, policy: Policy | None = None
    ) -> None:
        self.model, self.module, self.optimizer, self.config, self.policy = model, module, optimizer, config, policy
        self._called: nn.Module = torch.compile(module) if config.compile else module  # type: ignore[assignment]
        self._no_sync = getattr(module, "no_sync", nullcontext)  # DDP's: gradients are averaged with the last part only

    def __call__(self, parts: Parts, *, observe: bool = False, epoch: float = 0.0) -> Outcome:
        """Trains on one batch.

        observe: measure the gradients' quantization error, in the last part. epoch: epochs done, for the policy.

        Raises TrainingError, before the weights are touched, if the loss or the norm to clip is not finite.
        """
        watch = Stopwatch(parts[0][0].device)
        results = []
        penalty = self.policy.penalty() if self.policy else None
        for part in parts[:-1]:
            with self._no_sync():
                results.append(self._backward(self._called, part, len(parts), None, watch))
        if observe:  # through hooks, which a compiled model does not run
            with fqt.observe_gradients(self.model) as gradient_error:
                results.append(self._backward(self.module, parts[-1], len(parts), penalty, watch))
        else:
            gradient_error = {}
            results.append(self._backward(self._called, parts[-1], len(parts), penalty, watch))
        losses, hits = zip(*results, strict=True)

        loss = torch.stack(losses).mean().item()
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss}")
        if self.config.clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
            if not norm.isfinite():
                raise TrainingError(f"the norm of the gradients is {norm.item()}")
        self.optimizer.step()
        watch.mark("optimizer")
        decisions: list[Decision] = []
        if self.policy is not None and penalty is not None:
            decisions = self.policy.step(loss + penalty.item(), epoch=epoch)
            watch.mark("policy")
        self.optimizer.zero_grad()

        images = sum(len(y_N) for _, y_N in parts)
        ms = {**watch.ms, "step": sum(watch.ms.values())}
        return Outcome(loss, int(torch.stack(hits).sum()), images, ms, gradient_error, decisions)

    def _backward(
        self, module: nn.Module, part: tuple[Tensor, Tensor], parts: int, penalty: Tensor | None, watch: Stopwatch
    ) -> tuple[Tensor, Tensor]:
        """Adds one part's share to the gradients; returns its loss and how many images it recognized."""
        loss, correct = forward(module, *part, autocast=self.config.autocast)
        watch.mark("forward")
        (loss / parts if penalty is None else loss / parts + penalty).backward()
        watch.mark("backward")
        return loss.detach(), correct


def forward(module: nn.Module, x_NCHW: Tensor, y_N: Tensor, *, autocast: bool) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy, and how many images are recognized."""
    with torch.autocast(x_NCHW.device.type, torch.bfloat16, enabled=autocast):
        logits_NK = module(x_NCHW)
    return cross_entropy(logits_NK.float(), y_N), (logits_NK.argmax(1) == y_N).sum()
