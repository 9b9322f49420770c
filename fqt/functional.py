"""`linear` and `conv2d`: what torch's functions of these names compute, by a recipe. They only bring the geometry.

The weight is a float tensor, or a `PackedWeight`, whose codes were made before; the recipe's quantizer of it is then not asked.

Shapes: x (N, ..., I) or (N, I, H, W); canonical x_NPC, w_OKI, g_NPO as in `fqt.formats`.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fqt.autograd import refuse_transforms
from fqt.geometry import Geometry
from fqt.operand import States
from fqt.packed import Weight, canonical
from fqt.products import Accumulated, Taken, layer
from fqt.recipe import Recipe


class Fusion(Protocol):
    """What may hand a layer the codes of its input, and take its accumulators instead of its output: `fqt.fusion`."""

    def take(self, x: Tensor, recipe: Recipe) -> Taken | None:
        """Of an input that is not computed yet: its signs, where the recipe reads no more than these."""
        ...

    def gives(self, x: Tensor, recipe: Recipe) -> bool:
        """Whether a layer with this input and recipe may leave its accumulators in place of its output."""
        ...

    def give(self, accumulated: Accumulated, size: tuple[int, int] | None, channels_last: bool) -> Tensor:
        """What stands for the output: (N, O), or (N, O, H', W') where `size` is that of its images."""
        ...


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    recipe: Recipe,
    *,
    training: bool = True,
    states: States | None = None,
    fusion: Fusion | None = None,
    backend: str = "",
) -> Tensor:
    """`torch.nn.functional.linear` by a recipe.

    Args:
        x: (..., I) of any float dtype; sample = the first axis, token = the axes between.
        weight: (O, I).
        bias: (O,) or None; added in float32.
        training: whether a random key may be drawn when gradients are disabled, see the module's text.
        states: parameters and buffers of the operands' stages, `layer.quantizers`.
        fusion: what may take codes from the layer before, and leave the output to the layer behind.
        backend: the one that must serve every low-bit operator of the call, "" for the fastest that does.

    Returns:
        (..., O) in x's dtype, or autocast's when that is on.
    """
    refuse_transforms(x, weight)
    shape = x.shape  # read once, because a deferred activation answers in Python
    if weight.dim() != 2 or not shape or shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: input of shape {tuple(shape)} does not fit weight {tuple(weight.shape)}: "
            f"the input's last axis must be {weight.shape[-1]}"
        )
    n = shape[0] if len(shape) > 1 else 1
    positions = 1
    for size in shape[1:-1]:
        positions *= size
    fusion = fusion if len(shape) == 2 else None
    taken = None if fusion is None else fusion.take(x, recipe)
    given = x.reshape(n, positions, shape[-1]) if taken is None else taken
    gives = fusion is not None and fusion.gives(x, recipe)
    y_NPO = layer(given, canonical(weight), bias, recipe, None, training, states, gives, backend)
    if isinstance(y_NPO, Accumulated):
        assert fusion is not None
        return fusion.give(y_NPO, None, False)
    return y_NPO.reshape(*shape[:-1], weight.shape[0])


def conv2d(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    recipe: Recipe,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    training: bool = True,
    states: States | None = None,
    fusion: Fusion | None = None,
    backend: str = "",
) -> Tensor:
    """`torch.nn.functional.conv2d` by a recipe.

    Args:
        x: (N, I, H, W) or (I, H, W), any float dtype and memory format.
        weight: (O, I/groups, kh, kw).
        padding: zeros at the top, bottom, left and right.
        states, fusion: as in `linear`.

    Returns:
        (N, O, H', W') in x's dtype (or autocast's) and memory format.
    """
    refuse_transforms(x, weight)
    if weight.dim() != 4 or weight.shape[0] % groups:
        raise ValueError(
            f"conv2d: weight of shape {tuple(weight.shape)} with groups={groups}: expected (O, I/groups, kh, kw), O a multiple "
            f"of groups"
        )
    shape = x.shape
    if len(shape) not in (3, 4) or shape[-3] != weight.shape[1] * groups:
        raise ValueError(
            f"conv2d: input of shape {tuple(shape)} does not fit weight {tuple(weight.shape)} with groups={groups}: "
            f"expected (N, {weight.shape[1] * groups}, H, W)"
        )
    fusion = fusion if len(shape) == 4 else None
    taken = None if fusion is None else fusion.take(x, recipe)
    x_NCHW, height, width = x if len(shape) == 4 else x.unsqueeze(0), shape[-2], shape[-1]
    kernel = (weight.shape[2], weight.shape[3])
    geometry = Geometry(height, width, kernel, stride, padding, dilation, groups)
    out_height, out_width = geometry.output_size
    if out_height < 1 or out_width < 1:
        raise ValueError(
            f"conv2d: a {kernel[0]}x{kernel[1]} window (dilation {dilation}) does not fit the padded "
            f"{height}x{width} input: enlarge the input or the padding"
        )
    given = x_NCHW.flatten(2).transpose(1, 2) if taken is None else taken
    last = channels_last(x_NCHW) if taken is None else taken.channels_last
    gives = fusion is not None and fusion.gives(x, recipe)
    y_NPO = layer(given, canonical(weight), bias, recipe, geometry, training, states, gives, backend)
    if isinstance(y_NPO, Accumulated):
        assert fusion is not None
        return fusion.give(y_NPO, (out_height, out_width), last)
    if last:
        y_NCHW = y_NPO.flatten().view(y_NPO.shape[0], out_height, out_width, weight.shape[0]).permute(0, 3, 1, 2)
    else:
        y_NCHW = y_NPO.transpose(1, 2).flatten().view(y_NPO.shape[0], weight.shape[0], out_height, out_width)
    return y_NCHW if len(shape) == 4 else y_NCHW.squeeze(0)


def channels_last(x_NCHW: Tensor) -> bool:
    """Whether the strides are those of channels_last, by torch's own rule: it also decides where an axis of size 1 leaves
    `is_contiguous` true for both formats, and for slices, where it is true for neither."""
    least = 0
    for axis in (1, 3, 2, 0):
        stride, size = x_NCHW.stride(axis), x_NCHW.shape[axis]
        if size == 0 or stride < least or (axis == 0 and least == x_NCHW.stride(1)):
            return False
        least = stride * max(size, 1)
    return x_NCHW.stride(1) > 0
