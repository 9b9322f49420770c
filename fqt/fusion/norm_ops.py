"""The torch.library operators of batch normalization, as `fqt.reference.norm` specifies them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fqt.ops import Request, call, operator
from fqt.reference.norm import Source, Windows

_SOURCE = "Tensor y, Tensor? scale, Tensor? offset"


def _norm(name: str, backend: str, y: Tensor, *args: object):
    return call(name, Request(y.device.type, (), backend=backend), *args)


def _windows(windows: Sequence[int]) -> Windows:
    height, width, *kernel = windows
    return Windows(height, width, (kernel[0], kernel[1]))


def _pooled(windows: Sequence[int]) -> int:
    height, width = _windows(windows).pooled_size
    return height * width


@operator(f'norm_sums({_SOURCE}, str backend="") -> Tensor')
def _norm_sums(y, scale, offset, backend="") -> Tensor:
    return _norm("norm_sums", backend, y, Source(y, scale, offset))


@torch.library.register_fake("fqt::norm_sums")
def _(y, scale, offset, backend=""):
    return y.new_empty(2, y.shape[2], dtype=torch.float64)


@operator(f'norm_value({_SOURCE}, Tensor affine, SymInt[] windows, str backend="") -> Tensor')
def _norm_value(y, scale, offset, affine, windows, backend="") -> Tensor:
    return _norm("norm_value", backend, y, Source(y, scale, offset), affine, _windows(windows))


@torch.library.register_fake("fqt::norm_value")
def _(y, scale, offset, affine, windows, backend=""):
    return affine.new_empty(y.shape[0], _pooled(windows), y.shape[2])


@operator(
    f'norm_sign({_SOURCE}, Tensor affine, SymInt[] windows, float low, float high, str backend="") -> (Tensor, Tensor, Tensor)'
)
def _norm_sign(y, scale, offset, affine, windows, low, high, backend="") -> tuple[Tensor, Tensor, Tensor]:
    return _norm("norm_sign", backend, y, Source(y, scale, offset), affine, _windows(windows), low, high)


@torch.library.register_fake("fqt::norm_sign")
def _(y, scale, offset, affine, windows, low, high, backend=""):
    codes = y.new_empty(y.shape[0], _pooled(windows), -(-y.shape[2] // 8), dtype=torch.uint8)
    return codes, torch.empty_like(codes), affine.new_empty(1)


@operator(f'norm_grad_sums(Tensor g, Tensor? kept, {_SOURCE}, Tensor affine, SymInt[] windows, str backend="") -> Tensor')
def _norm_grad_sums(g, kept, y, scale, offset, affine, windows, backend="") -> Tensor:
    return _norm("norm_grad_sums", backend, y, g, kept, Source(y, scale, offset), affine, _windows(windows))


@torch.library.register_fake("fqt::norm_grad_sums")
def _(g, kept, y, scale, offset, affine, windows, backend=""):
    return y.new_empty(2, y.shape[2], dtype=torch.float64)


@operator(
    f"norm_grad(Tensor g, Tensor? kept, {_SOURCE}, Tensor affine, SymInt[] windows, Tensor means,"
    ' str backend="") -> (Tensor, Tensor, Tensor)'
)
def _norm_grad(g, kept, y, scale, offset, affine, windows, means, backend="") -> tuple[Tensor, Tensor, Tensor]:
    return _norm("norm_grad", backend, y, g, kept, Source(y, scale, offset), affine, _windows(windows), means)


@torch.library.register_fake("fqt::norm_grad")
def _(g, kept, y, scale, offset, affine, windows, means, backend=""):
    low = affine.new_empty(y.shape[0], y.shape[2])
    return affine.new_empty(y.shape), low, torch.empty_like(low)
