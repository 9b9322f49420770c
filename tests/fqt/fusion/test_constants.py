"""Signs by comparing accumulators with integers are those of the floats, and constants follow what they were found from."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fqt
from fqt.cpu import library
from fqt.fusion import constants
from fqt.fusion.constants import Constants, Thresholds
from fqt.reference import norm
from fqt.reference.norm import Source, Windows
from fqt.testing import assert_same_values
from tests.fqt.helpers import case_seeds, random_case

pytestmark = pytest.mark.skipif(library.refuses() is not None, reason="the C++ kernels are not built")
CODES = torch.arange(-32767, 32768, dtype=torch.int16)


def signs(codes_NPC: Tensor, scale: Tensor, offset: Tensor | None, affine: Tensor, windows: Windows) -> Tensor | None:
    q = Constants((), 1e-5, affine).signs(Source(codes_NPC, scale, offset), windows, "")
    return None if q is None else q.codes


@pytest.mark.parametrize("shifted", [False, True])
def test_every_accumulator_has_the_sign_of_its_float(shifted: bool) -> None:
    """All 65,535 of them, of 64 channels that rise, fall, stay, or change their sign at the last one."""
    generator = torch.Generator().manual_seed(3)
    c = 64
    scale = torch.rand(c, generator=generator) * 10.0 ** torch.randint(-6, 1, (c,), generator=generator)
    a = torch.randn(c, generator=generator) * 10.0 ** torch.randint(-3, 3, (c,), generator=generator)
    a[:3] = torch.tensor([0.0, -0.0, 1e-30])
    at = torch.randint(-33_000, 33_000, (c,), generator=generator)  # near which z changes its sign
    at[3:7] = torch.tensor([32767, -32767, 0, 32766])
    offset = torch.randn(c, generator=generator) * scale * 1000 if shifted else None
    b = -(at.float() * scale + (0 if offset is None else offset)) * a
    b[:3] = torch.tensor([0.0, -0.0, -1e-35])
    affine = torch.stack([a, b, torch.zeros(c), torch.ones(c)])
    codes = CODES.view(1, -1, 1).expand(1, -1, c).contiguous()
    expected, _, one = norm.norm_sign(Source(codes, scale, offset), affine, Windows(65_535, 1), -1.0, 1.0)
    found = signs(codes, scale, offset, affine, Windows(65_535, 1))
    assert one.item() == 1.0 and found is not None
    assert_same_values(found, expected)
    of = Thresholds.of(Source(codes, scale, offset), affine)
    assert of.above is not None and of.flipped is not None and of.flipped.any()
    assert of.above.unique().numel() > 40, "the channels differ"


@pytest.mark.usefixtures("poisoned_memory")
def test_pooled_signs_on_every_instruction_set(rng: np.random.Generator) -> None:
    """300 random cases: channels, images, windows, threads."""
    best = library.operators().limit_isa(2)
    try:
        for seed in case_seeds(rng, 300):
            with random_case(seed) as (draw, generator):
                windows = Windows(
                    draw.choice((1, 2, 3, 5, 8)), draw.choice((1, 2, 4, 7)), (draw.choice((1, 2, 3)), draw.choice((1, 2, 3)))
                )
                n, c = draw.choice((0, 1, 2, 5)), draw.choice((1, 7, 8, 9, 16, 31, 32, 33, 64, 100, 257))
                shape = (n, windows.height * windows.width, c)
                codes = torch.randint(-300, 300, shape, generator=generator, dtype=torch.int16)
                scale, affine = torch.rand(c, generator=generator), torch.randn(4, c, generator=generator)
                offset = draw.choice((None, torch.randn(c, generator=generator)))
                library.operators().limit_isa(draw.randint(0, best))
                torch.set_num_threads(draw.choice((1, 2, 3)))
                found = signs(codes, scale, offset, affine, windows)
                torch.set_num_threads(1)
                assert found is not None
                expected, _, _ = norm.norm_sign(Source(codes, scale, offset), affine, windows, -1.0, 1.0)
                assert_same_values(found, expected)
    finally:
        library.operators().limit_isa(best)


@pytest.mark.parametrize("bad", ["scale", "offset", "a", "b"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_what_is_not_finite_is_left_to_floats(bad: str, value: float) -> None:
    numbers = {name: torch.ones(5) for name in ("scale", "offset", "a", "b")}
    numbers[bad][2] = value
    affine = torch.stack([numbers["a"], numbers["b"], torch.zeros(5), torch.ones(5)])
    codes = torch.zeros(1, 1, 5, dtype=torch.int16)
    found = signs(codes, numbers["scale"], numbers["offset"], affine, Windows(1, 1))
    assert (found is None) == (value != 3e38 or bad in ("scale", "a")), "3e38 alone overflows where it is multiplied"


def network(**options: str) -> nn.Module:
    """Of five layers by fqt_1bit, with statistics of some batches; two of its activations are between layers of signs."""
    torch.manual_seed(2)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.MaxPool2d(2), nn.ReLU()]
    layers += [nn.Conv2d(16, 24, 3, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 8, 1), nn.BatchNorm2d(8)]
    layers += [nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5)]
    model = fqt.convert(nn.Sequential(*layers), "fqt_1bit", **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.weight.data.normal_()
            module.bias.data.normal_(0, 0.3)
    with torch.no_grad():
        for _ in range(30):
            model(torch.randn(16, 3, 8, 8))
    return model.eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each time that signs were asked for, whether integers gave them."""
    seen, whole = [], Constants.signs

    def counted(self, *args):
        found = whole(self, *args)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(Constants, "signs", counted)
    return seen


def test_an_evaluation_compares_integers_and_gives_the_bits_of_floats(calls: list[bool]) -> None:
    """Of a model that trains and of a frozen one, in both memory formats; with gradients, as before, by floats."""
    model = network()
    frozen, x = fqt.freeze(model), torch.randn(4, 3, 8, 8)
    expected = model(x)  # with gradients
    assert not calls
    for without in (torch.no_grad, torch.inference_mode):
        for each in (model, frozen, copy.deepcopy(frozen)):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                with without():
                    assert torch.equal(each(x.contiguous(memory_format=memory_format)), expected)
                assert calls == [False, True, True], "the first one normalizes floats, the last is read as floats"
                calls.clear()
    leaf = x.clone().requires_grad_()
    model(leaf).sum().backward()  # nothing that an inference kept is in its graph
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    with torch.no_grad():
        nan = x.clone()
        nan[0, 0, 0, 0] = torch.nan
        assert frozen(nan).isnan().all()
        assert torch.equal(frozen(x), expected), "and the next batch is well again"


@pytest.mark.parametrize("change", ["running_mean", "running_var", "weight", "bias", "data", "load", "eps", "convolution"])
def test_constants_follow_what_they_were_found_from(change: str, calls: list[bool]) -> None:
    model, x = network(), torch.randn(4, 3, 8, 8)
    norm_of, convolution = model[4], model[3]
    with torch.no_grad():
        before = model(x)
        if change == "data":
            norm_of.weight.data = -norm_of.weight.data
        elif change == "load":
            norm_of.load_state_dict({**norm_of.state_dict(), "bias": norm_of.bias + 0.7})
        elif change == "eps":
            norm_of.eps = 300.0
        elif change == "convolution":
            convolution.bias.add_(0.9)
        else:
            getattr(norm_of, change).add_(0.9)
        after, seen = model(x), list(calls)
    fresh = copy.deepcopy(model)
    assert torch.equal(after, fresh(x).detach()) and not torch.equal(after, before) and seen == [False, True, True] * 2


def test_one_sample_is_evaluated_like_many(calls: list[bool]) -> None:
    """In an MLP, where it is one row, which a BatchNorm refuses in training."""
    layers = [each for _ in range(3) for each in (nn.Linear(20, 20), nn.BatchNorm1d(20), nn.ReLU())]
    model, x = fqt.convert(nn.Sequential(nn.Linear(8, 20), *layers, nn.Linear(20, 4)), "fqt_1bit"), torch.randn(6, 8)
    model(x)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x[:1]), model(x)[:1])  # the last layer is torch's
    assert calls == [True, True] * 2
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model.train()(x[:1])


def test_another_kernel_is_asked_for_floats(calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 3, 8, 8)
    model = network(backend="reference")
    with torch.no_grad():
        expected = model(x)
        assert calls and not any(calls)
        assert torch.equal(network()(x), expected) and calls.count(True) == 2


def test_a_module_that_is_gone_keeps_no_constants() -> None:
    model = network()
    with torch.no_grad():
        model(torch.randn(4, 3, 8, 8))
    norms = len(constants._kept)
    assert norms >= 4
    del model
    import gc

    gc.collect()
    assert len(constants._kept) <= norms - 4
