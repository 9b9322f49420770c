"""Linear and convolutional layers as functions, and what torch computes for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fqt import functional
from fqt.quantizers import Quantizer, build
from fqt.recipe import Product, Recipe


@dataclass(frozen=True)
class Layer:
    """A linear layer (conv=None) or a convolution, with small odd sizes."""

    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    conv: dict | None = None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(self.x_shape), 0.3 * torch.randn(self.w_shape), torch.randn(self.w_shape[0])

    def run(self, x: Tensor, w: Tensor, b: Tensor | None, recipe: Recipe, **kwargs: bool) -> Tensor:
        if self.conv is None:
            return functional.linear(x, w, b, recipe, **kwargs)
        vertical, horizontal = self.conv["padding"]
        conv = self.conv | {"padding": (vertical, vertical, horizontal, horizontal)}
        return functional.conv2d(x, w, b, recipe, **conv, **kwargs)

    def float_run(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return F.linear(x, w, b) if self.conv is None else F.conv2d(x, w, b, **self.conv)

    def canonical(self, t: Tensor) -> Tensor:
        """x or g as (N, P, C), w as (O, K, I)."""
        if self.conv is not None:
            return t.flatten(2).transpose(1, 2)
        return t.unsqueeze(1) if t.dim() == 2 else t

    def plain(self, t_NPC: Tensor, like: Tensor) -> Tensor:
        """The inverse of `canonical`."""
        return t_NPC.transpose(1, 2).reshape(like.shape) if self.conv is not None else t_NPC.reshape(like.shape)

    def grad_input(self, g: Tensor, w: Tensor) -> Tensor:
        x = torch.zeros(self.x_shape, dtype=g.dtype, requires_grad=True)
        return torch.autograd.grad(self.float_run(x, w), x, g)[0]

    def grad_weight(self, g: Tensor, x: Tensor) -> Tensor:
        w = torch.zeros(self.w_shape, dtype=g.dtype, requires_grad=True)
        return torch.autograd.grad(self.float_run(x, w), w, g)[0]


LAYERS = {
    "linear": Layer((5, 13), (7, 13)),
    "linear_tokens": Layer((3, 4, 9), (6, 9)),
    "conv": Layer((3, 5, 6, 7), (4, 5, 3, 3), {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}),
    "conv_strided_grouped": Layer(
        (2, 6, 9, 8), (4, 3, 3, 2), {"stride": (2, 3), "padding": (2, 1), "dilation": (2, 1), "groups": 2}
    ),
    "depthwise": Layer((2, 4, 5, 5), (8, 1, 3, 3), {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 4}),
}
layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def quantizer(letter: str, name: str, **options: object) -> Quantizer:
    built = build(name, letter, **options)
    assert built is not None
    return built


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 3e-6) -> None:
    """Equal to float32's accuracy, relative to the largest value: sums of a few hundred terms."""
    assert actual.shape == expected.shape
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * max(largest, 1e-30))


# --- the papers' estimators as graphs of torch ---


def passing(values: Tensor, q: Tensor) -> Tensor:
    return values + (q - values).detach()


def sign(t: Tensor) -> Tensor:
    return torch.where(t >= 0, 1.0, -1.0).to(t.dtype)


def quantize_k(r: Tensor, bits: int) -> Tensor:
    steps = 2**bits - 1
    return (r * steps).round() / steps


def xnor_x(x: Tensor) -> Tensor:
    return passing(x * (x.abs() <= 1), sign(x))


def xnor_w(w: Tensor) -> Tensor:
    alpha = w.abs().flatten(1).mean(1).view(-1, *[1] * (w.dim() - 1))
    return passing(w, alpha * sign(w))


def dorefa_x(bits: int) -> Callable[[Tensor], Tensor]:
    def formula(x: Tensor) -> Tensor:
        clipped = x.clip(0, 1)
        return passing(clipped, quantize_k(clipped, bits))

    return formula


def dorefa_w(bits: int) -> Callable[[Tensor], Tensor]:
    def formula(w: Tensor) -> Tensor:
        if bits == 1:
            return passing(w, w.abs().mean() * sign(w))
        squashed = torch.tanh(w) / torch.tanh(w).abs().max()  # the gradient goes through the maximum as well
        return passing(squashed, 2 * quantize_k(squashed / 2 + 0.5, bits) - 1)

    return formula


def symmetric(bits: int, group: int | None = None) -> Callable[[Tensor], Tensor]:
    """`group`: how many leading axes have a scale of their own."""

    def formula(t: Tensor) -> Tensor:
        axes = tuple(range(group or 0, t.dim()))
        scale = t.detach().abs().amax(axes, keepdim=True) / (2 ** (bits - 1) - 1)
        return passing(t, (t / scale).round() * scale)

    return formula


def affine(bits: int) -> Callable[[Tensor], Tensor]:
    def formula(t: Tensor) -> Tensor:
        low, high = t.detach().aminmax()
        scale = (high - low) / (2**bits - 1)
        return passing(t, ((t - low) / scale).round() * scale + low)

    return formula


def ternary(w: Tensor) -> Tensor:
    scale = w.detach().abs().mean()
    return passing(w, (w / scale).clip(-1, 1).round() * scale)


def fixed_point(word: int, fraction: int) -> Callable[[Tensor], Tensor]:
    def formula(t: Tensor) -> Tensor:
        code = (t * 2**fraction).round().clip(-(2 ** (word - 1)), 2 ** (word - 1) - 1)
        return passing(t, code / 2**fraction)

    return formula


def float8(t: Tensor) -> Tensor:
    scale = (t.detach().abs().max() / 448).float()
    return passing(t, (t.detach().float() / scale).to(torch.float8_e4m3fn).to(t.dtype) * scale)


def float_gradient_recipe(x: Quantizer | None, w: Quantizer | None) -> Recipe:
    return Recipe(
        "test",
        Product(x or "float", w or "float"),
        Product("float", "saved" if w else "float"),
        Product("float", "saved" if x else "float"),
    )


def gradients_of(y: Tensor, g: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, inputs, g.to(y.dtype))]
