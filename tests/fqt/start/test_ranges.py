"""Histograms and the search for a clip, against numpy on the values themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fqt.formats import Format
from fqt.start.ranges import BINS, Histogram, bounds, least_error, squared_error

INT4 = Format("int", 4)
UINT4, AFFINE4 = Format("uint", 4), Format("uint", 4, offset=True)


def counted(*batches: torch.Tensor) -> Histogram:
    made = Histogram()
    for batch in batches:
        made.add(batch)
    return made


def test_bins_widen_and_lose_nothing():
    batches = [torch.zeros(7), torch.randn(1000), 30 * torch.randn(1000), torch.randn(500)]
    values = torch.cat(batches)
    made = counted(*batches)
    means, counts = made.values()
    assert (made.low, made.high) == (float(values.min()), float(values.max()))
    assert counts.sum() == len(values) and float((means[0] * counts).sum()) == pytest.approx(float(values.sum()), abs=1e-3)
    width = made.limit / BINS
    assert width <= 2 * max(-made.low, made.high) / BINS
    assert made.power() == pytest.approx(float(values.square().sum()), rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="not finite"):
        counted(torch.tensor([1.0, bad]))


def test_max_is_the_smallest_range_of_the_format_that_holds_all():
    made = counted(torch.tensor([-1.0, 0.5, 3.0]))
    for format, low, high in ((INT4, -3.0, 3.0), (UINT4, 0.0, 3.0), (AFFINE4, -1.0, 3.0)):
        assert [float(end) for end in made.range("max", 0, format)] == [low, high]


@pytest.mark.parametrize("percent", [50.0, 99.0, 99.9])
def test_a_percentile_is_numpys_to_the_width_of_a_bin(percent):
    values = torch.randn(20000).pow(3)
    made = counted(*values.split(3000))
    width = made.limit / BINS
    low, high = made.range("percentile", percent, INT4)
    assert float(high) == pytest.approx(np.percentile(values.abs().numpy(), percent), abs=2 * width) and low == -high
    low, high = made.range("percentile", percent, AFFINE4)
    assert float(high) == pytest.approx(np.percentile(values.numpy(), percent), abs=2 * width)
    assert float(low) == pytest.approx(np.percentile(values.numpy(), 100 - percent), abs=2 * width)


def brute(values: np.ndarray, format: Format) -> tuple[float, float]:
    """The clip with the least squared error among a thousand, and that error."""
    largest, steps = np.abs(values).max(), format.code_range[1]
    clips = np.linspace(largest / 1000, largest, 1000)
    errors = []
    for clip in clips:
        scale = clip / steps
        errors.append(((np.clip(np.rint(values / scale), format.code_range[0], steps) * scale - values) ** 2).sum())
    return clips[np.argmin(errors)], min(errors)


@pytest.mark.parametrize(("draw", "format"), [("normal", INT4), ("cubed", INT4), ("relu", UINT4)])
def test_the_clip_has_nearly_the_least_error_that_any_has(draw, format):
    values = torch.randn(20000)
    values = {"normal": values, "cubed": values.pow(3), "relu": values.relu()}[draw]
    _, least = brute(values.double().numpy(), format)
    made = counted(*values.split(6000))
    low, high = made.range("mse", 0, format)
    rows = values.unsqueeze(0)
    assert least * (1 - 1e-3) <= float(squared_error(rows, low, high, format)) <= 1.03 * least
    whole = made.range("max", 0, format)
    assert float(squared_error(rows, *whole, format)) > 1.2 * least, "so that the search has something to find"


def test_each_group_of_a_weight_finds_its_own():
    rows = torch.randn(3, 400) * torch.tensor([[0.1], [1.0], [5.0]])
    rows[1, 0] = 40.0
    low, high = least_error(rows, *bounds(*torch.aminmax(rows, dim=1), INT4), INT4)
    errors = squared_error(rows, low, high, INT4)
    for group in range(3):
        assert float(errors[group]) <= 1.03 * brute(rows[group].double().numpy(), INT4)[1]


def test_nothing_but_zeros_has_an_empty_range():
    for method in ("max", "percentile", "mse"):
        assert [float(end) for end in counted(torch.zeros(9)).range(method, 99, INT4)] == [0.0, 0.0]
