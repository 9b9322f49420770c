"""Quantizer: transform -> calibrate -> prune -> encode, and the gradient estimator. `Format` says what the codes then mean.

A paper's quantizer is a function that returns a `Quantizer`, registered under its own name with the operands it is meant for:

    @register("g")
    def my_gradient(bits: int = 4) -> Quantizer: ...

and is from then on a word of the recipes' YAML: `g: {quantizer: my_gradient, bits: 2}`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from fqt import calls
from fqt.formats import GRANULARITY_AXES, GRIDS, Format
from fqt.qtensor import QTensor, Scales
from fqt.quantizers.stages import RESERVED, Calibration, Estimator, ProductTransform, Stage, Transform, build_stage
from fqt.reference import KERNEL_MODES, group_rows, pass_mask
from fqt.wording import nearest

NO_STATE: Mapping[str, nn.Module] = MappingProxyType({})
"""Of an operand whose stages have neither parameters nor buffers."""
OPERANDS = {"x": "activation", "w": "weight", "g": "gradient"}


@dataclass(frozen=True)
class Quantizer:
    """How the codes of an operand are made.

    Attributes:
        grid, bits, offset: as in `Format`.
        granularity: "tensor", "sample", "token", "channel" (of w: output channel), "sample_channel", or "block": blocks of
            `block` elements along the axis that the product sums over.
        calibrate: "absmax", "minmax", "absmean", or "none" for the fixed range `limits`; or a registered `Calibration`.
        limits: the values of the smallest and the largest code, with calibrate="none".
        stochastic: stochastic rounding, unbiased within the range; else to nearest, ties to even.
        prune: "" or AGP's "bernoulli" or "systematic" (both unbiased), or "topk".
        keep_one_in: b: pruning keeps one group in b.
        pass_range: clipped straight-through estimator: the gradient passes where low <= x <= high. None: everywhere.
        transform: "" or "tanh" (DoReFa's weights: tanh(w) / max|tanh(w)|, differentiated by autograd), or a registered
            `Transform`.
        estimator: a registered `Estimator` in place of the straight-through one.
        block: elements of a block; 0 with any other granularity.

    Raises:
        ValueError: a combination that means nothing, by name and with the remedy.
    """

    grid: str
    bits: int
    granularity: str = "tensor"
    calibrate: str | Calibration = "absmax"
    limits: tuple[float, float] = (-1.0, 1.0)
    offset: bool = False
    stochastic: bool = False
    prune: str = ""
    keep_one_in: int = 1
    pass_range: tuple[float, float] | None = None
    transform: str | Transform = ""
    estimator: Estimator | None = None
    block: int = 0

    def __post_init__(self) -> None:
        Format(self.grid, self.bits, offset=self.offset, block=self.block)
        for field, kind in (("calibrate", "calibration"), ("transform", "transform"), ("estimator", "estimator")):
            value = getattr(self, field)
            if value not in ("", None, *RESERVED[kind]):
                object.__setattr__(self, field, build_stage(kind, value))
        choices = {"granularity": (*GRANULARITY_AXES["activation"], "block"), "prune": ("", "bernoulli", "systematic", "topk")}
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} {getattr(self, field)!r} is not one of {', '.join(map(repr, allowed))}")
        for field, kind in (("offset", bool), ("stochastic", bool), ("keep_one_in", int)):
            if type(getattr(self, field)) is not kind:
                wanted = "true or false" if kind is bool else "an integer"
                raise ValueError(f"{field} is {getattr(self, field)!r}, not {wanted}")
        if (self.granularity == "block") != (self.block > 0):
            raise ValueError(f"granularity {self.granularity!r} with block={self.block}: blocks need both, others neither")
        if isinstance(self.transform, ProductTransform):
            raise ValueError(f"transform {self.transform} is for both operands of a product: give it to the product")
        if self.estimator is not None and self.pass_range is not None:
            raise ValueError(f"pass_range and estimator {self.estimator} both say how the gradient passes: give one")
        if self.prune and not isinstance(self.calibrate, str):
            raise ValueError(f"prune goes by the range of a group: use calibrate 'minmax' or 'absmax', not {self.calibrate}")
        if self.calibrate == "minmax" and not self.offset:
            raise ValueError("calibrate 'minmax' needs an offset: use grid 'uint' with offset=True, or 'absmax'")
        if self.calibrate == "absmean" and self.grid not in ("sign", "ternary"):
            raise ValueError(f"calibrate 'absmean' is for the grids sign and ternary, not {self.grid!r}: use 'absmax'")
        if self.calibrate == "absmax" and self.grid == "uint" and not self.offset:
            raise ValueError("grid 'uint' without an offset has no negative codes: set offset=True or calibrate='none'")
        if self.calibrate in ("absmax", "minmax", "absmean") and self.grid == "fixed":
            raise ValueError("a fixed-point scale is 2^-fraction_length, not calibrated: use calibrate='none'")
        self._check_limits()
        if self.stochastic and self.grid == "sign":
            raise ValueError("the grid 'sign' has no stochastic rounding: use grid 'uint' with 1 bit and an offset")
        if self.keep_one_in < 1 or (self.prune == "" and self.keep_one_in != 1):
            raise ValueError(
                f"keep_one_in={self.keep_one_in} needs prune='bernoulli', 'systematic' or 'topk' and a value of at least 1"
            )

    def _check_limits(self) -> None:
        low, high = self.limits
        if self.pass_range is not None and not self.pass_range[0] < self.pass_range[1]:
            raise ValueError(f"pass_range {self.pass_range} is empty: the first must be below the second")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"limits {self.limits} are empty: the first must be below the second, and both finite")
        if self.calibrate != "none" and self.limits != (-1.0, 1.0):
            raise ValueError(f"limits {self.limits} have no effect with calibrate {self.calibrate!r}: use calibrate='none'")
        if self.calibrate == "none" and self.grid == "fixed" and low >= 0:
            raise ValueError(f"limits {self.limits}: the smallest code of grid 'fixed' is negative, so is the first limit")
        if self.calibrate == "none" and self.grid == "uint" and not self.offset and low != 0:
            raise ValueError(f"limits {self.limits}: the smallest code of grid 'uint' is 0: begin at 0, or set offset=True")
        if self.calibrate == "none" and self.grid not in ("uint", "fixed") and low != -high:
            raise ValueError(f"limits {self.limits}: grid {self.grid!r} is symmetric, so the first must be minus the second")

    def format(self, operand: str, product: str = "") -> Format:
        """The Format of the codes of operand "x", "w" or "g", in a product where blocks go by the axis that it sums over.

        Raises:
            ValueError: a granularity that the operand does not have.
        """
        _known_operand(operand)
        if self.block:
            axes = _BLOCKED[product or {"g": "grad_input"}.get(operand, "output")][operand]
            return Format(self.grid, self.bits, axes, self.offset, self.block)
        axes = GRANULARITY_AXES["weight" if operand == "w" else "activation"]
        if self.granularity not in axes:
            raise ValueError(f"a weight has no granularity {self.granularity!r}: choose one of {', '.join(axes)}")
        return Format(self.grid, self.bits, axes[self.granularity], self.offset)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The registered stages that this quantizer has, each once."""
        given = (self.calibrate, self.transform, self.estimator)
        return tuple(dict.fromkeys(stage for stage in given if isinstance(stage, Stage)))

    @property
    def random(self) -> bool:
        """Whether encoding draws random numbers."""
        return self.stochastic or self.prune in ("bernoulli", "systematic")

    @property
    def encodes_alone(self) -> bool:
        """Whether the scales are found in plain torch, and kernels only encode with them."""
        return isinstance(self.calibrate, Calibration) or self.prune not in KERNEL_MODES

    @property
    def fraction_length(self) -> int | None:
        """FL of a fixed-point grid: its step is 2^-FL. None for other grids, and for a step that is no power of two."""
        mantissa, exponent = math.frexp(-self.limits[0])
        return self.bits - exponent if self.grid == "fixed" and mantissa == 0.5 else None

    def __str__(self) -> str:
        bits = "" if GRIDS[self.grid].fewest == GRIDS[self.grid].most else str(self.bits)
        if self.fraction_length is not None:
            bits = f"<{self.bits},{self.fraction_length}>"
        name = f"{self.grid}{bits}/{self.granularity}" + (str(self.block) if self.block else "")
        name += "".join(f" {stage}" for stage in self.stages)
        return name + (f" keep 1/{self.keep_one_in} {self.prune}" if self.prune else "")


_BLOCKED = {
    "output": {"x": "NP", "w": "OK"},
    "grad_input": {"g": "NP", "w": "KI"},
    "grad_weight": {"g": "C", "x": "C"},
}
"""Product -> operand -> the axes that its blocks along the summed axis leave."""
_STAGES = ("calibrate", "estimator", "transform")
QUANTIZERS: dict[str, tuple[Callable[..., Quantizer], str]] = {}
"""Name -> (function that makes the Quantizer, operands it is for)."""


def register(operands: str) -> Callable:
    """Register the decorated function as a quantizer for the given operands, any of the letters x, w and g.

    Raises:
        ValueError: other letters than these, or a name that is taken.
    """
    if not operands or set(operands) - set(OPERANDS):
        raise ValueError(f"operands {operands!r} are not letters of {''.join(OPERANDS)!r}: x activation, w weight, g gradient")

    def add(make: Callable[..., Quantizer]) -> Callable[..., Quantizer]:
        name = make.__name__
        if name in QUANTIZERS:
            raise ValueError(f"a quantizer named {name!r} exists already: choose another name")
        QUANTIZERS[name] = (make, operands)
        return make

    return add


def _known_operand(operand: str) -> None:
    if operand not in OPERANDS:
        raise ValueError(f"operand {operand!r} is not one of x (activation), w (weight) and g (gradient)")


def build(name: str, operand: str, /, **options: object) -> Quantizer | None:
    """The quantizer `name` with its options, for operand "x", "w" or "g"; None if it says that the operand stays float.

    Beside its own options every quantizer takes `calibrate`, `estimator` and `transform`: stages in place of those that it has.

    Raises:
        ValueError: unknown name or option, or a quantizer that is not meant for this operand.
    """
    if name not in QUANTIZERS:
        raise ValueError(f"unknown quantizer {name!r}{nearest(name, QUANTIZERS)}; known: {', '.join(sorted(QUANTIZERS))}")
    _known_operand(operand)
    make, operands = QUANTIZERS[name]
    if operand not in operands:
        meant = " and ".join(f"{letter} ({OPERANDS[letter]})" for letter in operands)
        raise ValueError(f"quantizer {name!r} is for {meant}, not for {operand} ({OPERANDS[operand]})")
    known = inspect.signature(make).parameters
    stages = {option: value for option, value in options.items() if option in _STAGES and option not in known}
    options = {option: value for option, value in options.items() if option not in stages}
    for option in options:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"quantizer {name!r} has no option {option!r}{nearest(option, known)}; {takes}")
    try:
        quantizer = make(**options)
        if stages and isinstance(quantizer, Quantizer):
            without = {"pass_range": None} if "estimator" in stages else {}
            quantizer = replace(quantizer, **without, **stages)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(f"quantizer {name!r} with {options or 'no options'}: {error}") from error
    if quantizer is not None and not isinstance(quantizer, Quantizer):
        raise ValueError(f"quantizer {name!r} made a {type(quantizer).__name__}, not a Quantizer or None (float)")
    return quantizer


def transformed(x: Tensor, quantizer: Quantizer, state: Mapping[str, nn.Module] = NO_STATE) -> Tensor:
    """The quantizer's transform, differentiable."""
    if quantizer.transform == "":
        return x
    if isinstance(quantizer.transform, Transform):
        return quantizer.transform.apply(x, state.get(quantizer.transform.word))
    squashed = torch.tanh(x.float())
    widest = squashed.abs().amax()
    return squashed / torch.where(widest > 0, widest, 1.0)


def quantize(
    x_NPC: Tensor,
    quantizer: Quantizer,
    operand: str,
    *,
    key: Tensor | None = None,
    stream: int = 0,
    fold: Tensor | None = None,
    ranges: tuple[Tensor, Tensor] | None = None,
    state: Mapping[str, nn.Module] = NO_STATE,
    update: bool = False,
    product: str = "",
    backend: str = "",
) -> tuple[QTensor, Tensor]:
    """Quantize (N, P, C), or for a weight (O, K, I), after its transform.

    Args:
        key: () int64, `torch.ops.fqt.draw_key(x)`; needed if `quantizer.random`.
        stream: even number of the draw within one key.
        fold: broadcastable to x, multiplied into it first.
        ranges: smallest and largest value of each folded group, (G,) float32, where the caller knows them; NaN if it holds one.
        state: parameters and buffers of a registered calibration, by its word.
        update: whether running statistics among them move.
        product: that the codes are for, where blocks lie along its summed axis.
        backend: the one that must serve, "" for the fastest that does.

    Returns:
        The codes, and the estimator's packed mask, (N, P, ceil(C/8)) uint8 (empty without a `pass_range`).

    Raises:
        ValueError: x has not three axes, the operand not the quantizer's granularity, a random quantizer no key, or the named
            backend no kernel for this; or ranges are not one for each group.
    """
    format = quantizer.format(operand, product)
    if x_NPC.dim() != 3:
        raise ValueError(
            f"quantize takes three axes, (N, P, C) or (O, K, I), not shape {tuple(x_NPC.shape)}: reshape, with 1 for an "
            f"axis that the tensor lacks"
        )
    if quantizer.random and key is None:
        raise ValueError(f"{quantizer} draws random numbers: give it a key, such as torch.ops.fqt.draw_key(x)")
    low, high = ranges or (None, None)
    if low is not None and high is not None:
        groups = format.groups((x_NPC.shape[0], x_NPC.shape[1], x_NPC.shape[2]))
        for name, tensor in (("smallest", low), ("largest", high)):
            if tensor.shape != (groups,) or tensor.dtype != torch.float32:
                raise ValueError(
                    f"ranges: the {name} values are {tensor.dtype} of shape {tuple(tensor.shape)}, expected float32 of "
                    f"shape ({groups},), one for each group"
                )
    calibration = quantizer.calibrate
    of_calibration = state.get(calibration.word) if isinstance(calibration, Calibration) else None
    return codes_of(x_NPC, quantizer, format, key, stream, fold, ranges, of_calibration, update, backend)


def codes_of(
    x_NPC: Tensor,
    quantizer: Quantizer,
    format: Format,
    key: Tensor | None,
    stream: int,
    fold: Tensor | None,
    ranges: tuple[Tensor, Tensor] | None,
    state: nn.Module | None,
    update: bool,
    backend: str,
) -> tuple[QTensor, Tensor]:
    """`quantize`, of what was checked before. state: that of the registered calibration."""
    if not quantizer.encodes_alone:
        assert isinstance(quantizer.calibrate, str)
        return calls.quantize(
            x_NPC,
            format,
            calibrate=quantizer.calibrate,
            limits=quantizer.limits,
            stochastic=quantizer.stochastic,
            prune=quantizer.prune,
            keep_one_in=quantizer.keep_one_in,
            fold=fold,
            key=key,
            stream=stream,
            pass_range=quantizer.pass_range,
            ranges=ranges,
            backend=backend,
        )
    with torch.no_grad():
        if isinstance(quantizer.calibrate, Calibration):
            rows_GE = group_rows(x_NPC.float() if fold is None else x_NPC.float() * fold, format)
            scales = _checked(quantizer.calibrate.scales(rows_GE, format, state, update), rows_GE, format, quantizer.calibrate)
        else:
            options = {"prune": quantizer.prune, "keep_one_in": quantizer.keep_one_in, "limits": quantizer.limits}
            scales = calls.calibrate(
                x_NPC, format, calibrate=quantizer.calibrate, fold=fold, key=key, stream=stream, ranges=ranges, **options
            )
    draws = key if quantizer.stochastic else None
    q = calls.encode(x_NPC, scales, format, fold=fold, key=draws, stream=stream, backend=backend)
    inside = quantizer.pass_range
    mask = x_NPC.new_empty(0, dtype=torch.uint8) if inside is None else pass_mask(x_NPC, *inside)
    return q, mask


def _checked(scales: Scales, rows_GE: Tensor, format: Format, calibration: Calibration) -> Scales:
    """A registered calibration's scales, as kernels take them; NaN for a group that holds one, whatever the calibration says.

    Raises:
        ValueError: they are not one float32 for each group, or have an offset where the format has none or the other way round.
    """
    if (scales.offset is not None) != format.offset:
        wants = "has an offset" if format.offset else "has no offset"
        raise ValueError(f"calibration {calibration}: the format {format.name} {wants}: its Scales must say the same")
    for name in ("scale", "inverse", "offset"):
        found = getattr(scales, name)
        if found is not None and (found.shape != (rows_GE.shape[0],) or found.dtype != torch.float32):
            raise ValueError(
                f"calibration {calibration}: {name} is {found.dtype} of shape {tuple(found.shape)}, expected float32 of shape "
                f"({rows_GE.shape[0]},), one for each group"
            )
    bad = rows_GE.isnan().any(1)
    scale = torch.where(bad, torch.nan, scales.scale)
    offset = None if scales.offset is None else torch.where(bad, 0.0, scales.offset)
    return Scales(scale, torch.where(bad, 0.0, scales.inverse), offset)
