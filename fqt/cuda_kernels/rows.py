"""The 1-bit products of NVIDIA GPUs."""

import torch

from fqt.cuda_kernels import plan, runtime
from fqt.rows import SIGN, UNSIGNED, Kernel, Serves, by_product

_LEFT = {
    "output": ({**SIGN, **UNSIGNED}, "signs or unsigned codes of 1 to 8 bits"),
    "accumulate": (SIGN, "signs"),
    "grad_input": (UNSIGNED, "unsigned codes of 1 to 8 bits"),
    "grad_weight": (UNSIGNED, "unsigned codes of 1 to 8 bits"),
}


def _tiles() -> list[dict[str, plan.Rules]]:
    """Every tile that the current device has; large operands take other ones than the small ones of a check."""
    held = plan.RULES.held(runtime.device(torch.cuda.current_device()))
    return [{"rules": plan.Rules(tiles=(tile,))} for tile in held]


ROWS = [
    Kernel(
        operator,
        "cuda",
        "cuda",
        f"fqt.cuda_kernels.products:{operator}",
        Serves(
            by_product(operator, left, SIGN),
            f"multiplies {what} by signs",
            conv_groups=False,
            available=lambda: runtime.refuses(),
        ),
        "b1",
        native=True,
        settings=_tiles,
    )
    for operator, (left, what) in _LEFT.items()
]
