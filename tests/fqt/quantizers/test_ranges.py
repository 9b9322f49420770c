"""A percentile and a moving average as calibrations, on every backend's encode."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import fqt
from fqt.cpu import library
from fqt.quantizers import build, quantize
from fqt.testing import assert_same_codes


@pytest.mark.parametrize("percent", [50, 99, 99.9, 100])
@pytest.mark.parametrize("granularity", ["tensor", "sample", "channel", "sample_channel", "token"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_span_is_numpys_percentile_and_every_backend_encodes_with_it(percent, granularity, bits):
    quantizer = build("uniform", "g", bits=bits, granularity=granularity, calibrate={"percentile": {"percent": percent}})
    x = torch.randn(5, 7, 12).pow(3)
    q, _ = quantize(x, quantizer, "g")
    axes = {"tensor": (0, 1, 2), "sample": (1, 2), "channel": (0, 1), "sample_channel": (1,), "token": (2,)}[granularity]
    span = np.percentile(np.abs(x.numpy()), percent, axis=axes, keepdims=True)
    high = 2 ** (bits - 1) - 1
    scale = span / np.float32(high)
    values = np.clip(np.rint(x.numpy() / scale), -high, high) * scale
    different = np.abs(q.decode().numpy() - values) > 1e-5 * np.abs(values).max()
    assert different.mean() < 0.01, "but for values halfway between two codes"
    for backend in ("reference", *(["cpu"] if library.refuses() is None else [])):
        assert_same_codes(quantize(x, quantizer, "g", backend=backend)[0], q)


def test_a_percentile_of_all_is_absmax_bit_for_bit():
    x = torch.randn(5, 7, 12)
    one = build("uniform", "g", granularity="sample", calibrate={"percentile": {"percent": 100}})
    assert_same_codes(quantize(x, one, "g")[0], quantize(x, build("uniform", "g", granularity="sample"), "g")[0])


def test_rounding_is_stochastic_where_the_quantizer_says_so():
    quantizer = build("uniform", "g", bits=3, stochastic=True, calibrate="percentile")
    x = torch.full((1, 1, 4000), 0.3)
    x[0, 0, 0] = 1.0
    q, _ = quantize(x, quantizer, "g", key=torch.tensor(3))
    assert abs(float(q.decode()[0, 0, 1:].mean()) - 0.3) < 4 * 0.17 / 4000**0.5


def averaged(momentum: float = 0.75) -> fqt.Recipe:
    x = build("uniform", "x", bits=8, calibrate={"moving_average": {"momentum": momentum}})
    saved = fqt.Product("float", "saved")
    return fqt.Recipe("averaged", fqt.Product(x, build("uniform", "w")), saved, saved)


def test_the_average_moves_in_training_and_stands_still_in_evaluation():
    layer = fqt.convert(nn.Linear(6, 3), averaged())
    batches = [torch.randn(4, 6) * size for size in (1.0, 3.0, 0.5)]
    expected = 0.0
    for batch in batches:
        layer(batch)
        widest = float(batch.abs().max())
        expected = 0.75 * expected + 0.25 * widest if expected else widest
        average = layer.quantizers.output_x.moving_average.average
        assert float(average) == pytest.approx(expected, rel=1e-6)
    layer.eval()
    before = average.clone()
    one, other = layer(batches[1]), layer(100 * batches[1])
    assert torch.equal(layer.quantizers.output_x.moving_average.average, before)
    assert float(other.detach().abs().max()) < 50 * float(one.detach().abs().max()), (
        "a range of evaluation's own would be wider"
    )
    again = fqt.convert(nn.Linear(6, 3), averaged()).eval()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(batches[2]), layer(batches[2]))


def test_a_checkpoint_does_not_count_a_batch_twice_and_a_graph_is_whole():
    layer = fqt.convert(nn.Linear(6, 3), averaged())
    twin = copy.deepcopy(layer)
    for size in (1.0, 2.0):
        x = size * torch.randn(4, 6)
        layer(x).sum().backward()
        torch.utils.checkpoint.checkpoint(twin, x.requires_grad_(), use_reentrant=False).sum().backward()
    average = layer.quantizers.output_x.moving_average.average
    assert torch.equal(average, twin.quantizers.output_x.moving_average.average)
    x = torch.randn(4, 6)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    assert torch.equal(average, twin.quantizers.output_x.moving_average.average)


def test_what_is_not_finite_shows_and_does_not_stay():
    layer = fqt.convert(nn.Linear(6, 3), averaged())
    layer(torch.ones(2, 6))
    assert layer(torch.full((2, 6), float("inf"))).isnan().all()
    assert float(layer.quantizers.output_x.moving_average.average) == 1.0
    for option, words in (({"momentum": 1.0}, "momentum 1.0 is not"), ({"momentun": 0.5}, "did you mean 'momentum'")):
        with pytest.raises(ValueError, match=words):
            build("uniform", "x", calibrate={"moving_average": option})
    with pytest.raises(ValueError, match="percent 0 is not above 0"):
        build("uniform", "x", calibrate={"percentile": {"percent": 0}})
    by_sample = build("uniform", "x", granularity="sample", calibrate="moving_average")
    with pytest.raises(ValueError, match=r"output.x: moving_average keeps one range for a tensor: use granularity tensor"):
        fqt.Recipe("bad", fqt.Product(by_sample, build("uniform", "w")), *[fqt.Product("float", "saved")] * 2)


# --- what the library makes sure of, whatever a registered calibration says ------------------------------------------------


@dataclass(frozen=True)
class Careless(fqt.Calibration):
    """Looks at no NaN, and hands out what it was made with."""

    scale: object = None
    inverse: object = None
    offset: object = None
    word = "careless"

    def scales(self, rows_GE, format, state, update):
        given = (self.scale, self.inverse, self.offset)
        return fqt.Scales(*(value(rows_GE.shape[0]) if callable(value) else value for value in given))


def strided(groups: int) -> torch.Tensor:
    return torch.full((groups, 3), 0.25)[:, 1]


@pytest.mark.parametrize("backend", ["reference", *(["cpu"] if library.refuses() is None else [])])
def test_a_group_with_a_nan_decodes_to_nan_and_strides_are_no_matter(backend):
    careless = Careless(strided, lambda groups: torch.full((1,), 4.0).expand(groups))
    quantizer = fqt.Quantizer("int", 8, "sample", careless)
    x = torch.randn(4, 3, 5)
    x[2, 1, 3], x[1, 0, 0] = float("nan"), float("inf")
    q, _ = quantize(x, quantizer, "x", backend=backend)
    assert q.decode()[2].isnan().all() and q.decode()[[0, 1, 3]].isfinite().all()
    assert q.decode()[1, 0, 0] == 127 * 0.25, "what is given beforehand saturates"
    assert_same_codes(q, quantize(x, quantizer, "x", backend="reference")[0])
    w = build("uniform", "w")
    recipe = fqt.Recipe("careless", fqt.Product(quantizer, w), *[fqt.Product("float", "saved")] * 2)
    layer = fqt.convert(nn.Linear(5, 2), recipe, backend=backend)
    assert layer(x).isnan().any(-1).any(-1).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        ((torch.ones(3), torch.ones(4)), r"scale is torch.float32 of shape \(3,\), expected float32 of shape \(4,\), one for"),
        ((torch.ones(4), torch.ones(4).double()), r"inverse is torch.float64 of shape \(4,\), expected float32"),
        ((torch.ones(4), torch.ones(4), torch.zeros(4)), r"the format int8:N has no offset: its Scales must say the same"),
    ],
)
def test_scales_that_do_not_fit_are_named(scales, words):
    with pytest.raises(ValueError, match=words):
        quantize(torch.randn(4, 3, 5), fqt.Quantizer("int", 8, "sample", Careless(*scales)), "x")


def test_a_word_names_one_class_of_stages():
    with pytest.raises(ValueError, match="'percentile' names Percentile already, whose state a layer keeps under it"):
        fqt.register_estimator("percentile")(dataclass(frozen=True)(type("Another", (fqt.Estimator,), {})))
