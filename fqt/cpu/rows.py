"""The kernels of the CPU, from fast to slow."""

from fqt.cpu import library
from fqt.reference.rows import NORM, PRODUCTS
from fqt.rows import INTEGERS, SIGN, UNSIGNED, Codes, Kernel, Serves, at_most, by_product

_CODES = Serves(
    (Codes(INTEGERS, ("", "N", "O", "NP", "C", "NC")),),
    "is for integers of at most 32 bits",
    available=lambda: library.refuses(),
)
_MOST_TOGETHER = {"grad_weight": 30}
"""Of operands with more bits the other products take columns apart (kFewTerms in integers.h); grad_weight does not."""


def _signs(operator: str) -> Serves:
    left = SIGN if operator in ("output", "accumulate") else UNSIGNED
    what = "signs" if left is SIGN else "unsigned codes of 1 to 8 bits"
    operands = by_product(operator, left, SIGN)
    return Serves(operands, f"multiplies {what} by signs", available=lambda: library.refuses())


def _integers(operator: str, bits: int) -> Serves:
    grids = at_most(bits, uint=8)
    return Serves(
        by_product(operator, grids, grids),
        f"multiplies integers of at most {bits} bits" + (", those of more than 8 in two's complement" if bits > 8 else ""),
        beyond=8 if bits > 8 else 0,
        together=_MOST_TOGETHER.get(operator, 64),
        available=lambda: library.refuses(),
    )


ROWS = [
    *(
        Kernel(operator, "cpu", "cpu", f"fqt.cpu.codes:{operator}", _CODES, native=True)
        for operator in ("quantize", "calibrate", "encode", "decode")
    ),
    *(
        Kernel(operator, "cpu", "cpu", f"fqt.cpu.signs:{operator}", _signs(operator), native=True)
        for operator in (*PRODUCTS, "accumulate")
    ),
    *(
        Kernel(operator, "cpu", "cpu", f"fqt.cpu.norm:{operator}", Serves(available=lambda: library.refuses()), native=True)
        for operator in NORM
    ),
    *(
        Kernel(operator, "cpu", "cpu", f"fqt.cpu.integers:{operator}", _integers(operator, bits), f"int{bits}", native=True)
        for operator in PRODUCTS
        for bits in (8, 16)
    ),
]
