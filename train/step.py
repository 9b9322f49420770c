"""One optimizer step, and where its time goes. The training loop and the speed measurement run this same code."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fqt
from fqt.precision import Decision, Policy
from train import parallel
from train.sections import Training
from train.tasks import Score, Task

Parts = Sequence[tuple[Tensor, Tensor]]
"""A batch cut into equal parts: what the model reads, and labels, on the device."""


@dataclass(frozen=True)
class Outcome:
    """What one step did.

    loss: mean over the batch. correct: how many of its items (images, tokens, texts) were guessed right.
    ms: wall time of forward, backward, optimizer, and of all of them (step).
    gradient_error: relative quantization error by layer and product, if it was asked for.
    decisions: of the precision policy.
    skipped: why the weights were left as they were; empty for a step that was made.
    gradient_norm: of all gradients together, before clipping.
    """

    loss: float
    correct: int
    items: int
    ms: dict[str, float]
    gradient_error: dict[str, dict[str, float]]
    decisions: Sequence[Decision] = ()
    skipped: str = ""
    gradient_norm: float = 0.0


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

    module: what is called in place of the model: itself, which FSDP2 may have sharded, or wrapped for DDP.
    task: what a batch's loss is.
    policy: what may give the model's layers other recipes after the update; its penalty is added to the loss.
    agree: whether a statement holds on every rank, so that all of them update or none.
    """

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        optimizer: Optimizer,
        config: Training,
        task: Task,
        policy: Policy | None = None,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self.model, self.module, self.optimizer, self.config, self.policy = model, module, optimizer, config, policy
        self.task = task
        self._called: nn.Module = torch.compile(module) if config.compile else module  # type: ignore[assignment]
        self._no_sync = parallel.without_sync(module)  # gradients are averaged with the last part only
        self._agree = agree

    def __call__(self, parts: Parts, *, observe: bool = False, epoch: float = 0.0) -> Outcome:
        """Trains on one batch.

        observe: measure the gradients' quantization error, in the last part. epoch: epochs done, for the policy.

        Where the loss or a gradient is not finite, weights, optimizer and buffers stay as they were, and the outcome says so.
        """
        watch = Stopwatch(parts[0][0].device)
        buffers = [buffer for buffer in self.model.buffers() if buffer.numel()]
        before = [buffer.clone() for buffer in buffers]  # a forward writes BatchNorm's running means
        results: list[Score] = []
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

        loss = torch.stack([score.loss for score in results]).mean().item()
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = parallel.whole(nn.utils.get_total_norm(gradients))  # one pass, which shows whatever is not finite
        if skipped := self._objection(loss, norm.item()):
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        else:
            if self.config.clip_norm is not None:
                nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip_norm, norm)
            self.optimizer.step()
        watch.mark("optimizer")
        decisions: list[Decision] = []
        if self.policy is not None and penalty is not None and not skipped:
            decisions = self.policy.step(loss + penalty.item(), epoch=epoch)
            watch.mark("policy")
        self.optimizer.zero_grad()

        items = sum(score.items for score in results)
        ms = {**watch.ms, "step": sum(watch.ms.values())}
        correct = int(torch.stack([score.correct for score in results]).sum())
        return Outcome(loss, correct, items, ms, gradient_error, decisions, skipped, norm.item())

    def _objection(self, loss: float, norm: float) -> str:
        """Why no rank may update its weights; empty where nothing speaks against it."""
        if not math.isfinite(loss):
            mine = f"the loss is {loss}"
        else:
            mine = "" if math.isfinite(norm) else f"the norm of the gradients is {norm}"
        return "" if self._agree(not mine) else mine or "another process's loss is not finite"

    def _backward(
        self, module: nn.Module, part: tuple[Tensor, Tensor], parts: int, penalty: Tensor | None, watch: Stopwatch
    ) -> Score:
        """Adds one part's share to the gradients; returns its score, without the graph."""
        config = self.config
        score = self.task.forward(module, *part, autocast=config.autocast, label_smoothing=config.label_smoothing)
        watch.mark("forward")
        (score.loss / parts if penalty is None else score.loss / parts + penalty).backward()
        watch.mark("backward")
        return replace(score, loss=score.loss.detach())
