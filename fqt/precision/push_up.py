"""Push up (AdaPT, section 3.3): bits that a layer needs to go on learning, from the diversity of its recent gradients.

    diversity = sum ||g_k|| / ||sum g_k||                     of the last `lookback` gradients; 1 where all point one way
    x = log(diversity) - 1
    x > 0:  s1 = max(ceil(1 / x^2), 1)    s2 = max(min(ceil(32 x^2), 32) - FL, 0)
            s  = min(s1, s2), ceil((s1 + s2) / 2) or max(s1, s2)      by strategy min, mean, max
    else    s  = 1

What is not a number says nothing about the gradients, so it counts as x <= 0.
"""

from __future__ import annotations

import math

from fqt.precision.formats import MAX_WORD_LENGTH, Precision

STRATEGIES = ("min", "mean", "max")


def gradient_diversity(sum_of_norms: float, norm_of_sum: float) -> float:
    """At least 1 by the triangle inequality; infinite where the gradients cancel; NaN of no gradients or of zeros alone."""
    if not (math.isfinite(sum_of_norms) and math.isfinite(norm_of_sum)) or sum_of_norms <= 0:
        return math.nan
    return max(sum_of_norms / norm_of_sum, 1.0) if norm_of_sum > 0 else math.inf


def raise_by(diversity: float, fraction_length: int, strategy: str) -> int:
    """s, the bits to add. What the longest word cannot hold is for `push_up` to cut.

    Raises:
        ValueError: an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is not one of {', '.join(STRATEGIES)}")
    if not math.isfinite(diversity) or math.log(diversity) <= 1:
        return 1
    square = (math.log(diversity) - 1) ** 2
    s1 = max(math.ceil(1 / square), 1)
    s2 = max(min(math.ceil(32 * square), 32) - fraction_length, 0)
    return {"min": min(s1, s2), "mean": math.ceil((s1 + s2) / 2), "max": max(s1, s2)}[strategy]


def push_up(precision: Precision, bits: int, buffer: int | None, max_word_length: int = MAX_WORD_LENGTH) -> Precision:
    """The format with `bits` more of fraction.

    Args:
        buffer: bits of headroom that stay between FL and WL, because activations share the layer's format: then FL += s,
            WL = max(WL, FL) + 1, as in the paper. None: activations have a scale of their own, so the weights keep
            their range: FL += s and WL += s.
        max_word_length: the longest word; what exceeds it is taken from the fraction.
    """
    word, fraction = precision.word_length, precision.fraction_length + bits
    if buffer is None:
        word += bits
        excess = max(word - max_word_length, 0)
        return Precision(word - excess, fraction - excess)
    word = max(word, fraction) + 1
    fraction = min(fraction, max_word_length - buffer)
    return Precision(min(max(word, fraction + buffer), max_word_length), fraction)
