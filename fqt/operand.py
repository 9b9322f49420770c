"""Operand: what a product does with one of its two tensors before it multiplies codes; Encoded: what comes of it.

product       formula        operands   summed over
output        Y = X W^T      x, w       input channels and the window
grad_input    dX = G W       g, w       output channels and the window
grad_weight   dW = G^T X     g, x       samples and positions
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fqt.formats import Format, Shape3
from fqt.geometry import Geometry
from fqt.qtensor import QTensor
from fqt.quantizers.base import NO_STATE, Quantizer, codes_of, transformed
from fqt.quantizers.stages import Calibration, Estimator, ProductTransform, estimated

LEFT_RIGHT = {"output": ("x", "w"), "grad_input": ("g", "w"), "grad_weight": ("g", "x")}
STREAM = {
    "output_x": 0, "output_w": 2, "grad_weight_x": 4, "grad_input_w": 6, "grad_input_g": 8, "grad_weight_g": 10,
    "output": 12, "grad_input": 14, "grad_weight": 16,
}  # fmt: skip
"""Streams of random numbers, each with the next one: an operand's, to round and to prune; a product's, for its transform."""

States = Mapping[str, Mapping[str, nn.Module]]
"""Name of an operand, then the word of a stage -> its parameters and buffers: `layer.quantizers`."""


@dataclass(frozen=True)
class Encoded:
    """An operand's codes.

    Attributes:
        q: codes and scales.
        mask: (N, P, ceil(C/8)) uint8, where the clipped estimator passes the gradient; empty if it passes everywhere.
    """

    q: QTensor
    mask: Tensor


@dataclass(frozen=True)
class Operand:
    """An operand that is quantized.

    Attributes:
        product, letter: of `LEFT_RIGHT`.
        quantizer: how its codes are made.
        format: what they mean.
        saved: whether they are those that the forward made for the product `output`.
        transform: what is applied to both operands of the product first.
        name: such as "grad_weight_x"; its parameters and buffers are in `layer.quantizers` under it.
        random: whether encoding draws random numbers.
        unscaled: the format without the groups of its scale, which is folded into the other operand.
    """

    product: str
    letter: str
    quantizer: Quantizer
    format: Format
    saved: bool = False
    transform: ProductTransform | None = None
    name: str = field(init=False, repr=False, compare=False)
    random: bool = field(init=False, repr=False, compare=False)
    unscaled: Format = field(init=False, repr=False, compare=False)
    _nearest: Quantizer = field(init=False, repr=False, compare=False)
    _unmasked: Quantizer = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        set_once = object.__setattr__
        set_once(self, "name", f"{self.product}_{self.letter}")
        set_once(self, "random", self.quantizer.random or (self.transform is not None and self.transform.random))
        set_once(self, "unscaled", replace(self.format, axes="", block=0))
        set_once(self, "_nearest", replace(self.quantizer, stochastic=False))
        set_once(self, "_unmasked", replace(self._nearest, pass_range=None))

    def encode(
        self,
        value: Tensor,
        *,
        key: Tensor | None,
        training: bool,
        fold: Tensor | None = None,
        ranges: tuple[Tensor, Tensor] | None = None,
        geometry: Geometry | None = None,
        states: States | None = None,
        backend: str = "",
        masked: bool = True,
    ) -> Encoded:
        """The codes of a tensor, without a graph.

        Args:
            value: (N, P, C) or (O, K, I), after `transformed`.
            key: () int64, of the layer's call; None where nothing is drawn.
            training: False rounds x and w to nearest, and leaves running statistics alone.
            fold: broadcastable to value, multiplied into it first.
            ranges: as in `quantize`.
            geometry: of the product, None in a linear layer.
            states: the layer's.
            backend: the one that must serve, "" for the fastest that does.
            masked: whether the estimator's mask is wanted.
        """
        quantizer = self.quantizer if training or self.letter == "g" else self._nearest if masked else self._unmasked
        if self.transform is not None:
            value, fold, ranges = self._rotated(value if fold is None else value * fold, geometry, key), None, None
        state, update = None, False
        if isinstance(quantizer.calibrate, Calibration):
            state = self.state(states).get(quantizer.calibrate.word)
            # a forward that an activation checkpoint computes again runs within a backward
            again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
            update = training and (self.letter == "g" or not again)
        made = codes_of(value, quantizer, self.format, key, STREAM[self.name], fold, ranges, state, update, backend)
        return Encoded(*made)

    def state(self, states: States | None) -> Mapping[str, nn.Module]:
        """The operand's own part of a layer's states."""
        return NO_STATE if states is None or self.name not in states else dict(states[self.name].items())

    def transformed(self, value: Tensor, states: States | None) -> Tensor:
        """The quantizer's transform of x or w, differentiable."""
        return transformed(value, self.quantizer, self.state(states)) if self.quantizer.transform else value

    def estimated(self, value: Tensor, q: QTensor, states: States | None) -> Tensor:
        """x or w with a gradient that its registered estimator decides; as it is, if it has none."""
        estimator = self.quantizer.estimator
        if not isinstance(estimator, Estimator):
            return value
        return estimated(value, estimator, q, self.state(states).get(estimator.word))

    def qtensor(self, parts: Sequence[Tensor | None], shape: Shape3) -> QTensor:
        """The codes from `QTensor.parts()`."""
        codes, scale, offset, index = parts
        assert codes is not None and scale is not None
        return QTensor(codes, scale, offset, index, self.format, shape)

    def _rotated(self, value: Tensor, geometry: Geometry | None, key: Tensor | None) -> Tensor:
        """The value with the product's transform applied along the axis that the product sums over: channels within a group
        of the convolution; samples and positions, of which a window moves the positions."""
        assert self.transform is not None
        side = LEFT_RIGHT[self.product].index(self.letter)
        if key is None and self.transform.random:  # an evaluation draws nothing: the same numbers every time
            key = torch.zeros((), dtype=torch.int64, device=value.device)
        groups = geometry.groups if geometry is not None and self.product != "grad_weight" else 1
        a, b, c = value.shape
        if self.product == "grad_weight":
            summed = value.float().reshape(a * b, c).T if geometry is None else value.float().permute(1, 2, 0)
        elif (self.product, self.letter) == ("grad_input", "w"):
            summed = value.float().permute(1, 2, 0).reshape(b, c, groups, a // groups)
        elif self.letter == "w":
            summed = value.float()
        else:
            summed = value.float().reshape(a, b, groups, c // groups)
        moved = self.transform.apply(summed, side, key, STREAM[self.product])
        if self.product == "grad_weight":
            return moved.T.reshape(a, b, c) if geometry is None else moved.permute(2, 0, 1)
        if (self.product, self.letter) == ("grad_input", "w"):
            return moved.reshape(b, c, a).permute(2, 0, 1)
        return moved.reshape(a, b, c)


@dataclass(frozen=True)
class Plan:
    """A product in a layer of one kind: its operands, None where one is float, and where their scales go.

    Attributes:
        low_bit: whether codes are multiplied.
        folded: whether the right operand's scale, which cannot leave the sum, is multiplied into the left before that is
            encoded.
    """

    product: str
    left: Operand | None
    right: Operand | None
    low_bit: bool
    folded: bool
