"""The operators, and the rows of the reference, which serves everything."""

from fqt.rows import Kernel

PRODUCTS = ("output", "grad_input", "grad_weight")
NORM = ("norm_sums", "norm_value", "norm_sign", "norm_grad_sums", "norm_grad")
OPERATORS = ("quantize", "calibrate", "encode", "decode", *PRODUCTS, "accumulate", *NORM)

ROWS = [
    Kernel(
        operator,
        "reference",
        "",
        f"fqt.reference{'.norm' if operator in NORM else ''}:{operator}",
        lambda request: None,
    )
    for operator in OPERATORS
]
