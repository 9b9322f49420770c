"""The 1-bit products of NVIDIA GPUs."""

from fqt.cuda_kernels import runtime
from fqt.rows import SIGN, UNSIGNED, Kernel, Serves, by_product

_LEFT = {
    "output": ({**SIGN, **UNSIGNED}, "signs or unsigned codes of 1 to 8 bits"),
    "accumulate": (SIGN, "signs"),
    "grad_input": (UNSIGNED, "unsigned codes of 1 to 8 bits"),
    "grad_weight": (UNSIGNED, "unsigned codes of 1 to 8 bits"),
}

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
    )
    for operator, (left, what) in _LEFT.items()
]
