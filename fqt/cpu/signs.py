"""The products of signs, and of unsigned codes by signs, behind the signatures of the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from fqt.cpu.library import empty, operators
from fqt.formats import Shape3
from fqt.geometry import Geometry
from fqt.qtensor import QTensor
from fqt.reference import spread


def output(x: QTensor, w: QTensor, bias: Tensor | None, geometry: Geometry | None) -> Tensor:
    """As `fqt.reference.output`, of signs: xor and popcount."""
    n, positions, _ = x.shape
    geometry = geometry or column(positions)
    height, width = geometry.output_size
    y = empty(n, height * width, w.shape[0])
    operators().sign_output(
        x.codes.contiguous(),
        spread(x.scale, x)[:, :, 0],
        w.codes.contiguous(),
        spread(w.scale, w)[:, :, 0],
        None if bias is None else bias.float().contiguous(),
        [n, x.shape[2], w.shape[0], *geometry.flat()],
        y,
    )
    return y


def accumulate(x: QTensor, w: QTensor, geometry: Geometry | None) -> Tensor:
    """As `fqt.reference.accumulate`, of signs."""
    n, positions, _ = x.shape
    geometry = geometry or column(positions)
    height, width = geometry.output_size
    sums = empty(n, height * width, w.shape[0], dtype=torch.int16)
    sizes = [n, x.shape[2], w.shape[0], *geometry.flat()]
    operators().sign_accumulate(x.codes.contiguous(), w.codes.contiguous(), sizes, sums)
    return sums


def grad_input(g: QTensor, w: QTensor, mask: Tensor | None, geometry: Geometry | None, x_shape: Shape3) -> Tensor:
    """As `fqt.reference.grad_input`, of unsigned codes and signs: subset sums looked up by four weights."""
    n, _, channels = x_shape
    samples = torch.arange(n, dtype=torch.int32)
    grad = empty(*x_shape)
    if g.index is not None and g.format.axes == "N":
        samples = g.index[g.index >= 0]
        grad.zero_()
    operators().sign_grad_input(
        g.codes.contiguous(),
        g.format.bits,
        spread(g.scale, g)[:, :, 0],
        None if g.offset is None else spread(g.offset, g)[:, :, 0],
        samples,
        w.codes.contiguous(),
        w.scale,
        None if mask is None else mask.contiguous(),
        [n, channels, w.shape[0], *(geometry or column(x_shape[1])).flat()],
        grad,
    )
    return grad


def grad_weight(g: QTensor, x: QTensor, geometry: Geometry | None) -> Tensor:
    """As `fqt.reference.grad_weight`, of unsigned codes and signs: subset sums looked up by the signs of four positions."""
    n, positions, out = g.shape
    groups = geometry.groups if geometry else 1
    taps = geometry.kernel[0] * geometry.kernel[1] if geometry else 1
    grad = empty(out, taps, x.shape[2] // groups).zero_()
    samples, channels = torch.arange(n, dtype=torch.int32), torch.arange(out, dtype=torch.int32)
    scale, offset = (None if v is None else spread(v, g)[:, 0] for v in (g.scale, g.offset))
    assert scale is not None
    if g.index is not None and g.format.axes in ("N", "C"):
        kept = g.index[g.index >= 0]
        if g.format.axes == "N":
            samples = kept
        else:
            channels = kept
            if groups > 1:  # as the reference, which multiplies these by scale 0: NaN where x's scale is
                grad += 0.0 * x.scale
    operators().sign_grad_weight(
        g.codes.contiguous(), g.format.bits, g.format.axes, scale, offset, samples, channels, x.codes.contiguous(), x.scale,
        [n, x.shape[2], out, *(geometry or column(positions)).flat()], grad,
    )  # fmt: skip
    return grad


def column(positions: int) -> Geometry:
    """A linear layer as a convolution: a 1x1 window over a column of positions."""
    return Geometry(positions, 1, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
