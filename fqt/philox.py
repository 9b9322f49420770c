"""Philox 4x32-10, the counter-based generator from which all of fqt's noise is drawn.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); the numbers equal Random123's `philox4x32_R(10)`
and Triton's `tl.philox`. A draw depends on (key, counter) alone: not on the device, the thread count or the layout.

The counter of an element is (element // 4, group, stream, 0), its word is element % 4: `group` and `element` as counted by
`fqt.formats`, `stream` one number for each use within a layer's call. Groups start at a counter of their own, so a pruned
group costs no random numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)  # for words 0 and 2
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_CHUNK = 1 << 14  # counters at a time: the int64 temporaries stay in the cache


def philox_4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds on each counter.

    Args:
        counter: (4, n) int64, each in [0, 2^32).
        key: () int64, the 64-bit key; its low word is the first key word.

    Returns:
        (4, n) int64 words in [0, 2^32).
    """
    even, odd = counter[0::2], counter[1::2]  # words (0, 2) are multiplied, words (1, 3) are mixed in
    multiplier = torch.tensor(_MULTIPLIER, device=counter.device).unsqueeze(1)
    weyl = torch.tensor(_WEYL, device=counter.device).unsqueeze(1)
    round_key = torch.stack([key, key >> 32]).reshape(2, 1).bitwise_and_(_MASK)
    for _ in range(10):
        product = (even * multiplier).flip(0)  # 64-bit products; wrapping int64 keeps all their bits
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_(round_key).bitwise_and_(_MASK)
        odd = product  # only its low word is ever used: the masks drop the rest
        round_key = (round_key + weyl).bitwise_and_(_MASK)
    odd = odd & _MASK
    return torch.stack([even[0], odd[0], even[1], odd[1]])


def uniform_u24(groups: Tensor, elements: int, key: Tensor, stream: int) -> Tensor:
    """24 random bits for each element of the given groups.

    Args:
        groups: (G,) int64, the numbers of the groups.
        elements: E, elements of a group, below 2^34.
        key: () int64.
        stream: below 2^32; draws of different streams are independent.

    Returns:
        (G, E) float32, integers in [0, 2^24), exact.
    """
    blocks = -(-elements // 4)
    if groups.numel() * blocks == 0:
        return torch.empty(groups.numel(), elements, device=groups.device)
    counts = torch.arange(groups.numel() * blocks, device=groups.device)
    out = torch.empty(groups.numel() * blocks, 4, device=groups.device)
    for first in range(0, counts.numel(), _CHUNK):
        count = counts[first : first + _CHUNK]
        block = count % blocks
        group = groups[count // blocks]
        counter = torch.stack([block, group, torch.full_like(block, stream), torch.zeros_like(block)])
        out[first : first + _CHUNK] = (philox_4x32(counter, key) >> 8).T
    return out.view(groups.numel(), blocks * 4)[:, :elements]
