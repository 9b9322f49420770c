"""BatchNorm and max-pooling that hand on what they did not compute yet, see `fqt.fusion.deferred`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks

from fqt.fusion import deferred


class FusedBatchNorm1d(nn.BatchNorm1d):
    """nn.BatchNorm1d whose result is deferred where that is possible."""

    backend: str = ""

    def forward(self, input: Tensor) -> Tensor:
        normalized = deferred.batch_norm(input, self, self.backend)
        return super().forward(input) if normalized is None else _watched(normalized, self)


class FusedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose result is deferred where that is possible."""

    backend: str = ""

    def forward(self, input: Tensor) -> Tensor:
        normalized = deferred.batch_norm(input, self, self.backend)
        return super().forward(input) if normalized is None else _watched(normalized, self)


class FusedMaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d that stays deferred with its input."""

    def forward(self, input: Tensor) -> Tensor:
        pooled = deferred.max_pool(input, self)
        return super().forward(input) if pooled is None else pooled  # type: ignore[return-value]


def _watched(normalized: deferred.Deferred, module: nn.Module) -> deferred.Deferred:
    """Have it know whether a hook of its module, or of all modules, will see it."""
    normalized.watched = bool(module._forward_hooks or _global_forward_hooks)
    return normalized
