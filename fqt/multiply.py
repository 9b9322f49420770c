"""The three products of plain tensors, as linear layers and convolutions of canonical operands."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fqt.geometry import Geometry


def multiply_output(x_NPC: Tensor, w_OKI: Tensor, geometry: Geometry | None) -> Tensor:
    """Sum over the window and the input channels of a group, (N, P', O)."""
    if geometry is None:
        return x_NPC @ w_OKI[:, 0].T
    y_NOHW = F.conv2d(
        geometry.operand(x_NPC), geometry.window(w_OKI), None, geometry.stride, geometry.own_padding, geometry.dilation,
        geometry.groups,
    )  # fmt: skip
    return y_NOHW.permute(0, 2, 3, 1).flatten(1, 2)


def multiply_grad_input(g_NPO: Tensor, w_OKI: Tensor, channels: int, geometry: Geometry | None) -> Tensor:
    """Sum over the output channels of a group and the window, (N, P, C) with C = `channels`."""
    if geometry is None:
        return g_NPO @ w_OKI[:, 0]
    samples, positions = g_NPO.shape[0], geometry.height * geometry.width
    like = geometry.operand(g_NPO.new_empty(1, 1, 1).expand(samples, positions, channels))
    padding = geometry.own_padding
    grad, _, _ = torch.ops.aten.convolution_backward(
        geometry.gradient(g_NPO), like, geometry.window(w_OKI), None, geometry.stride, padding, geometry.dilation, False,
        (0, 0), geometry.groups, (True, False, False),
    )  # fmt: skip
    return geometry.crop(grad)


def multiply_grad_weight(g_NPO: Tensor, x_NPC: Tensor, geometry: Geometry | None) -> Tensor:
    """Sum over samples and positions, (O, K, I)."""
    if geometry is None:
        return (g_NPO.flatten(0, 1).T @ x_NPC.flatten(0, 1)).unsqueeze(1)
    if geometry.kernel == (1, 1):
        image = geometry.image(x_NPC)
        # not by convolution_backward: oneDNN's, of 1x1 windows with unequal strides, writes beyond its memory
        groups, (sh, sw), (height, width) = geometry.groups, geometry.stride, geometry.output_size
        terms, channels = g_NPO.shape[0] * g_NPO.shape[1], g_NPO.shape[2]
        met = image[:, :, ::sh, ::sw][:, :, :height, :width].permute(1, 0, 2, 3)
        columns = met.reshape(groups, x_NPC.shape[2] // groups, terms).transpose(1, 2)
        return (g_NPO.permute(2, 0, 1).reshape(groups, channels // groups, terms) @ columns).view(channels, 1, -1)
    like = x_NPC.new_empty(1).expand(g_NPO.shape[2], x_NPC.shape[2] // geometry.groups, *geometry.kernel)
    padding = geometry.own_padding
    _, grad, _ = torch.ops.aten.convolution_backward(
        geometry.gradient(g_NPO), geometry.operand(x_NPC), like, None, geometry.stride, padding, geometry.dilation, False,
        (0, 0), geometry.groups, (False, True, False),
    )  # fmt: skip
    return grad.flatten(2).transpose(1, 2)


def multiply_grad_weight_of_samples(g_NPO: Tensor, x_NPC: Tensor, geometry: Geometry | None) -> Tensor:
    """Sum over positions alone, (N, O, K, I)."""
    if geometry is None:
        return (g_NPO.transpose(1, 2) @ x_NPC).unsqueeze(2)
    samples, positions, channels = g_NPO.shape
    groups, (kh, kw) = geometry.groups, geometry.kernel
    padded_NHWC = geometry.image(x_NPC).permute(0, 2, 3, 1).contiguous()
    sn, sh, sw, sc = padded_NHWC.stride()
    window = (kh, kw, padded_NHWC.shape[3])
    strides = (sh * geometry.dilation[0], sw * geometry.dilation[1], sc)
    windows = padded_NHWC.as_strided(
        (samples, *geometry.output_size, *window),
        (sn, sh * geometry.stride[0], sw * geometry.stride[1], *strides),
    )
    columns = windows.reshape(samples, positions, kh * kw, groups, -1).permute(0, 3, 1, 2, 4).flatten(3)
    rows = g_NPO.transpose(1, 2).reshape(samples, groups, channels // groups, positions)
    return (rows @ columns).view(samples, channels, kh * kw, -1)
