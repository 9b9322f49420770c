"""The Triton kernels. None is `native`: Triton compiles where it runs, and to compare every format first would take minutes."""

from fqt.reference.rows import NORM, PRODUCTS
from fqt.rows import SIGN, Codes, Kernel, Serves, at_most, by_product
from fqt.triton_kernels import plan

FLOAT8 = {"e4m3": (8, 8), "e5m2": (8, 8)}
_CODES = Serves(
    (Codes({**at_most(16), **FLOAT8}, ("", "N", "O", "NP", "C", "NC")),),
    "is for codes of at most 16 bits: more need float64 arithmetic",
    available=lambda: plan.refuses(),
)


def _product(operator: str, float8: bool) -> Serves:
    left = right = FLOAT8 if float8 else at_most(8)
    what = "multiplies two 8-bit floats" if float8 else "multiplies integers of at most 8 bits"
    if operator == "accumulate":
        left = right = SIGN
        what = "adds up, in 16 bits, products of signs"
    return Serves(
        by_product(operator, left, right),
        what,
        available=(lambda: plan.refuses_float8()) if float8 else (lambda: plan.refuses()),
    )


ROWS = [
    Kernel("decode", "triton", "cuda", "fqt.triton_kernels.decode:decode", _CODES),
    *(
        Kernel(operator, "triton", "cuda", f"fqt.triton_kernels.quantize:{operator}", _CODES)
        for operator in ("quantize", "calibrate", "encode")
    ),
    *(
        Kernel(
            operator,
            "triton",
            "cuda",
            f"fqt.triton_kernels.{'weight' if operator == 'grad_weight' else 'gather'}:{operator}",
            _product(operator, float8),
            "float8" if float8 else "",
            exact=not float8,
        )
        for operator in (*PRODUCTS, "accumulate")
        for float8 in (False, True)
        if not (operator == "accumulate" and float8)
    ),
    *(
        Kernel(operator, "triton", "cuda", f"fqt.triton_kernels.norm:{operator}", Serves(available=lambda: plan.refuses()))
        for operator in NORM
    ),
]
