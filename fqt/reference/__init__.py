"""The reference: how tensors are quantized and multiplied, in plain PyTorch. It is the specification; it serves everything."""

from fqt.reference.codes import MIN_RANGE, absmean, calibrate, calibrate_groups, encode, group_range, group_rows, quantize
from fqt.reference.packing import apply_mask, decode, pack, pass_mask, spread, unpack
from fqt.reference.products import accumulate, grad_input, grad_weight, output
from fqt.reference.pruning import KERNEL_MODES, check_kernel_mode, keep_groups

__all__ = [
    "KERNEL_MODES",
    "MIN_RANGE",
    "absmean",
    "accumulate",
    "apply_mask",
    "calibrate",
    "calibrate_groups",
    "check_kernel_mode",
    "decode",
    "encode",
    "grad_input",
    "grad_weight",
    "group_range",
    "group_rows",
    "keep_groups",
    "output",
    "pack",
    "pass_mask",
    "quantize",
    "spread",
    "unpack",
]
