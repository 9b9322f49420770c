"""Activation gradient pruning, AGP, of 1-Bit FQT (arXiv 2408.14267, section 4.2).

Keep one group in b, widest first, and spend b bits on each: as many 1-bit products as one bit for all would cost. The
paper's SCQ (section 4.3) is two of these in a recipe: by sample in grad_input, by channel in grad_weight, because only such
scales leave the sums over channels and over samples.
"""

from fqt.quantizers.base import Quantizer, register


@register("g")
def agp(bits: int = 4, granularity: str = "sample", mode: str = "bernoulli") -> Quantizer:
    """PSQ with b bits on one group in b.

    mode: "bernoulli", independent draws as in the paper; "systematic", the same probabilities by one draw, which always keeps
    one group in b, so that no small batch loses all of them; or "topk" as in the paper's code.
    """
    if mode not in ("bernoulli", "systematic", "topk"):
        raise ValueError(f"mode {mode!r} is not 'bernoulli', 'systematic' or 'topk'")
    prune = "" if bits == 1 else mode
    return Quantizer(
        "uint", bits, granularity, "minmax", offset=True, stochastic=True, prune=prune, keep_one_in=bits if prune else 1
    )
