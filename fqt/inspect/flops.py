"""What the low-bit products count in torch's FlopCounterMode: two for each multiply-add, as torch's own products."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch


def _output(a, a_format, a_shape, b, b_format, b_shape, *rest: object, out_shape: Sequence[int], **named: object) -> int:
    """Y (N, P', O) of weights (O, K, I), for `output` and `accumulate`."""
    _, taps, inputs = b_shape
    return 2 * math.prod(out_shape) * taps * inputs


def _grad_input(a, a_format, a_shape, b, b_format, b_shape, *rest: object, **named: object) -> int:
    """From a gradient (N, P', O) and weights (O, K, I)."""
    _, taps, inputs = b_shape
    return 2 * math.prod(a_shape) * taps * inputs


def _grad_weight(a, a_format, a_shape, *rest: object, out_shape: Sequence[int], **named: object) -> int:
    """(O, K, I) from a gradient (N, P', O)."""
    samples, positions, _ = a_shape
    return 2 * samples * positions * math.prod(out_shape)


@cache
def register_flops() -> None:
    """Have FlopCounterMode know the operators, and attention on a CPU, which it counts on a GPU alone."""
    from torch.utils.flop_counter import (  # not at import: it loads Triton
        flop_registry,
        register_flop_formula,
        sdpa_backward_flop_count,
        sdpa_flop_count,
    )

    def attention(q, k, v, *rest: object, **named: object) -> int:
        return sdpa_flop_count(q, k, v)

    def attention_backward(g, q, k, v, *rest: object, **named: object) -> int:
        return sdpa_backward_flop_count(g, q, k, v)

    aten = torch.ops.aten
    if aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry:
        register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)(attention)
        register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)(attention_backward)
    for name, formula in (
        ("output", _output),
        ("accumulate", _output),
        ("grad_input", _grad_input),
        ("grad_weight", _grad_weight),
    ):
        register_flop_formula(getattr(torch.ops.fqt, name))(formula)


def low_bit(flops: Mapping[Any, int]) -> int:
    """Of FlopCounterMode's count by operator, those of low-bit products."""
    return sum(count for operator, count in flops.items() if str(operator).startswith("fqt."))
