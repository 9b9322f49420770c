"""Launching a kernel: on its tensors' device, never fused into other roundings, and not at all where there is nothing to do."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor
from torch.cuda import device_of, get_device_capability, get_device_properties

from fqt.triton_kernels import plan


def launch(kernel, grid: tuple[int, ...], *args: object, warps: int = 4, stages: int = 2, **constants: object) -> None:
    """Run `kernel` on `grid` programs. `constants` are its compile-time constants.

    A product and a sum are two roundings, as the reference has it: no fused multiply-add.
    """
    if 0 in grid:
        return
    like = next(arg for arg in args if isinstance(arg, Tensor))
    with device_of(like):
        kernel[grid](*args, num_warps=warps, num_stages=stages, enable_fp_fusion=False, **constants)


def fitted(rules: plan.Rules, like: Tensor) -> plan.Rules:
    """The usual rules for the device that holds a tensor: as many processors as it has. Other rules as they are."""
    return _usual(like.device) if rules is plan.RULES and like.is_cuda else rules


@functools.cache
def _usual(device: torch.device) -> plan.Rules:
    return replace(plan.RULES, processors=get_device_properties(device).multi_processor_count)


def capability(like: Tensor) -> tuple[int, int]:
    """Compute capability of a tensor's device; Hopper's where it is on none."""
    return get_device_capability(like.device) if like.is_cuda else (9, 0)
