"""PSQ: SR((g - min) L / R) R / L + min, written out in exact fractions with the same random bits."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from fqt.quantizers import Quantizer, build, quantize
from tests.fqt import oracle

KEY = -987654321987654321
GROUPS = {
    "sample": lambda n, p, c: (n, p * 5 + c),
    "channel": lambda n, p, c: (c, n * 4 + p),
    "token": lambda n, p, c: (n * 4 + p, c),
    "sample_channel": lambda n, p, c: (c * 3 + n, p),
    "tensor": lambda n, p, c: (0, (n * 4 + p) * 5 + c),
}


@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_psq_is_its_formula(bits, granularity, rng):
    levels, shape, place_of = 2**bits - 1, (3, 4, 5), GROUPS[granularity]
    g = (rng.normal(size=shape) * np.exp(rng.normal(size=(3, 1, 5)))).astype(np.float32)
    psq = build("psq", "g", bits=bits, granularity=granularity)
    values = quantize(torch.from_numpy(g), psq, "g", key=torch.tensor(KEY), stream=10)[0].decode().numpy()
    members: dict[int, list[Fraction]] = {}
    for index in np.ndindex(shape):
        members.setdefault(place_of(*index)[0], []).append(Fraction(float(g[index])))
    compared = 0
    for index in np.ndindex(shape):
        group, element = place_of(*index)
        low, span = min(members[group]), max(members[group]) - min(members[group])
        y = (Fraction(float(g[index])) - low) * levels / span
        part, u = y - math.floor(y), Fraction(oracle.u24(element, group, 10, KEY), 2**24)
        extreme = Fraction(float(g[index])) in (low, low + span)
        if abs(part - u) < Fraction(levels, 2**20) and not extreme:
            continue  # float32 may take the other side there
        code = round(y) if extreme else math.floor(y) + (u < part)
        formula = float(code * span / levels + low)
        assert values[index] == pytest.approx(formula, abs=float(span) * 1e-6 + abs(float(low)) * 1e-6), index
        compared += 1
    assert compared > 50


def test_the_extremes_of_a_sample_are_exact_codes(rng):
    g = torch.from_numpy(rng.normal(size=(5, 2, 7)).astype(np.float32))
    for key in range(20):
        values = quantize(g, build("psq", "g", bits=1), "g", key=torch.tensor(key))[0].decode()
        torch.testing.assert_close(values.amin((1, 2)), g.amin((1, 2)), rtol=0, atol=0)
        torch.testing.assert_close(values.amax((1, 2)), g.amax((1, 2)), rtol=1e-6, atol=0)


def test_what_psq_is():
    assert build("psq", "g", bits=4) == Quantizer("uint", 4, "sample", "minmax", offset=True, stochastic=True)
