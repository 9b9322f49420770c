"""What quantizing does to a run's weights, looked at around one step in many; and torch's profiler around steps a to b."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fqt
from fqt.sharded import gathered
from train.config import Tracking


class Monitors:
    """Called before and after each step, on every rank.

    folder: where the profiler's trace goes; None: nowhere.
    """

    def __init__(self, config: Tracking, folder: Path | None) -> None:
        self.config, self.folder = config, folder
        self._signs: dict[str, Tensor] = {}
        self._profiler: Any = None

    def before(self, model: nn.Module, step: int) -> None:
        """step: how many have been done."""
        if self.folder is not None and self.config.profile and step + 1 == self.config.profile[0]:
            self._profiler = torch.profiler.profile(profile_memory=True)
            self._profiler.start()
        if self._due(step + 1):
            self._signs = {name: q.codes.clone() for name, q in _quantized(model).items() if q.format.grid == "sign"}

    def after(self, model: nn.Module, step: int) -> dict[str, float]:
        """The scalars of this step, by name; step: how many have been done, with it."""
        if self._profiler is not None and self.config.profile and step == self.config.profile[1]:
            self.stop()
        if not self._due(step):
            return {}
        found, self._signs = scalars(model, self._signs), {}
        return found

    def stop(self) -> None:
        """Ends the profiler, if it runs, and writes its trace, for chrome://tracing or ui.perfetto.dev."""
        profiler, self._profiler = self._profiler, None
        if profiler is not None and self.folder is not None and self.config.profile:
            profiler.stop()
            first, last = self.config.profile
            profiler.export_chrome_trace(str(self.folder / f"trace_{first}_{last}.json"))

    def _due(self, step: int) -> bool:
        return self.config.enabled and self.config.monitor_every > 0 and step % self.config.monitor_every == 0


def scalars(model: nn.Module, signs: Mapping[str, Tensor]) -> dict[str, float]:
    """Of each layer's quantized weights:

    flip_ratio: share of binary weights whose sign this step changed. saturation: share of weights beyond the last code by more
    than a step of the grid. underflow: share of weights that are not zero and whose code is. scale/min, scale/max: of the
    groups' scales.

    signs: the codes of binary weights before the step.
    """
    found: dict[str, float] = {}
    for name, layer in fqt.quantized_layers(model):
        with torch.no_grad(), gathered(layer):
            q, w_OKI = layer.quantized_weight(), layer.weight_OKI().float()
        if q is None:
            continue
        found[f"scale/{name}/min"], found[f"scale/{name}/max"] = q.scale.min().item(), q.scale.max().item()
        if q.format.grid == "sign":
            if name in signs:
                found[f"flip_ratio/{name}"] = _bits(q.codes ^ signs[name]) / w_OKI.numel()
            continue
        decoded = q.decode()
        found[f"underflow/{name}"] = ((decoded == 0) & (w_OKI != 0)).float().mean().item()
        if q.scale.numel() in (1, w_OKI.shape[0]):
            beyond = (w_OKI - decoded).abs() > q.scale.view(-1, 1, 1)
            found[f"saturation/{name}"] = beyond.float().mean().item()
    return found


def _quantized(model: nn.Module) -> dict[str, fqt.QTensor]:
    weights = ((name, layer.quantized_weight()) for name, layer in fqt.quantized_layers(model))
    return {name: q for name, q in weights if q is not None}


def _bits(codes: Tensor) -> int:
    """How many bits are set; those beyond the last value are equal in both codes."""
    return sum(int(((codes >> place) & 1).sum()) for place in range(8))
