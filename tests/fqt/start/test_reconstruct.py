"""reconstruct: the error of each layer's output falls, rounding gives the learned codes, and what cannot be moved is named."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fqt
from fqt.quantizers import build
from tests.fqt.helpers import small
from tests.fqt.start.test_calibrate import everywhere

METHODS = ["adaround", "adaquant"]


def batches(count: int = 5, size: int = 200) -> list[torch.Tensor]:
    """Correlated inputs, of which rounding each weight alone knows nothing."""
    generator = torch.Generator().manual_seed(7)
    mix = torch.randn(12, 12, generator=generator) / 3 + 0.5
    return [torch.randn(size, 12, generator=generator) @ mix for _ in range(count)]


def coarse() -> fqt.Recipe:
    """Weights of 3 bits, whose rounding is most of the error."""
    saved = fqt.Product("float", "saved")
    w = build("uniform", "w", bits=3, granularity="channel")
    return fqt.Recipe("coarse", fqt.Product(build("uniform", "x", bits=8), w), saved, saved)


def network(recipe: str | fqt.Recipe | None = None) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    return fqt.convert(model, everywhere(recipe) if isinstance(recipe, str) else recipe or coarse())


def output_error(model: nn.Module, plain: nn.Module) -> float:
    x = torch.cat(batches(9)[5:])
    with torch.no_grad():
        return float((model(x) - plain(x)).norm() / plain(x).norm())


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.every(2)
def test_outputs_come_nearer_to_the_float_networks(method, calibrated):
    model = network()
    plain = fqt.revert(copy.deepcopy(model))
    if calibrated:
        fqt.calibrate(model, batches())
    before, scales = output_error(model, plain), [layer.quantized_weight().scale for _, layer in fqt.quantized_layers(model)]
    report = fqt.reconstruct(model, batches(), method=method, steps=100)
    assert [row.layer for row in report.rows] == ["0", "2"] and report.method == method
    assert all(row.kept and row.after < 0.95 * row.before and 0 < row.changed < 0.5 for row in report.rows)
    assert output_error(model, plain) < 0.95 * before
    if method == "adaround" or calibrated:
        for (_, layer), scale in zip(fqt.quantized_layers(model), scales, strict=True):
            assert torch.equal(layer.quantized_weight().scale, scale), "rounding is learned, not the scale"
    assert type(model[0].weight) is nn.Parameter and model[0].weight.grad is None


def test_learned_rounding_moves_a_weight_by_one_code_at_most_and_the_rest_not_at_all():
    model = network()
    fqt.calibrate(model, batches())
    plain = copy.deepcopy(model)
    fqt.reconstruct(model, batches(), steps=100)
    for (_, layer), (_, former) in zip(fqt.quantized_layers(model), fqt.quantized_layers(plain), strict=True):
        scale = former.quantized_weight().scale.unsqueeze(1)
        codes, before = (each.quantized_weight().decode().squeeze(1) / scale for each in (layer, former))
        moved = (codes - before).round().abs()
        assert set(moved.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(layer.weight[moved == 0], former.weight[moved == 0])
        up = former.weight / scale
        assert bool(((codes - up).abs()[moved == 1] <= 1 + 1e-4).all()), "up or down, nowhere else"


def test_the_other_weights_of_the_model_its_modes_and_generators_stay():
    model = fqt.convert(small(), fqt.load_recipe("int4"))
    model.train()
    model[1].eval()
    fqt.calibrate(model, images())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, generator = [m.training for m in model.modules()], torch.get_rng_state()
    report = fqt.reconstruct(model, images(), steps=5)
    assert modes == [m.training for m in model.modules()] and torch.equal(generator, torch.get_rng_state())
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"{row.layer}.weight" for row in report.rows if row.kept and row.changed}


def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(3)]


def test_what_makes_it_worse_is_taken_back():
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = fqt.reconstruct(model, batches(), method="adaquant", steps=3, lr=50.0)
    assert not any(row.kept for row in report.rows) and all(row.after >= row.before for row in report.rows)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "taken back" in str(report)


def test_a_reconstructed_model_freezes_saves_and_trains(tmp_path):
    model = network()
    fqt.calibrate(model, batches())
    fqt.reconstruct(model, batches(), steps=20)
    x = batches()[0]
    expected = model(x).detach()
    assert torch.equal(fqt.freeze(model)(x), expected)
    fqt.save(model, tmp_path / "m.safetensors")
    plain = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))
    assert torch.equal(fqt.load(tmp_path / "m.safetensors", plain)(x), expected)
    model.train()(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.01).step()
    assert not torch.equal(model.eval()(x), expected)


def test_learned_steps_are_moved_with_the_weights():
    saved = fqt.Product("float", "saved")
    recipe = fqt.Recipe("lsq", fqt.Product(build("lsq", "x", bits=4), build("lsq", "w", bits=4)), saved, saved)
    model = network(recipe)
    fqt.calibrate(model, batches())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = fqt.reconstruct(model, batches(), method="adaquant", steps=100)
    assert all(row.kept for row in report.rows)
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_convolutions_of_several_products_and_attentions_are_moved_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 4, stride=2), nn.Flatten(2), nn.TransformerEncoderLayer(324, 2, 16)).eval()
    fqt.convert(model, everywhere("int4"))
    x = [torch.randn(2, 3, 8, 8) for _ in range(3)]
    fqt.calibrate(model, x)
    for method in METHODS:
        report = fqt.reconstruct(model, x, method=method, steps=4)
        assert {"0", "2.self_attn", "2.self_attn.out_proj", "2.linear1"} <= {row.layer for row in report.rows}


# --- what is left as it was -----------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers of one weight; and one that no forward reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.idle, self.last = (nn.Linear(12, 12) for _ in range(4))
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.last(self.other(self.one(x)))


def test_what_cannot_be_moved_is_named_with_the_reason():
    report = fqt.reconstruct(fqt.convert(Tied(), everywhere("int4")), batches(), steps=2)
    shares = "it shares its weight with another module"
    assert report.skipped == {"one": shares, "other": shares, "idle": "not reached by the first batch"}
    assert "left as it was: idle: not reached" in str(report)
    assert [row.layer for row in report.rows] == ["last"]


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("xnor", "no rounding of sign is learned"),
        ("bitnet", "its scale is the mean of |values|, which rounding moves"),
        ("dorefa_w8a8g8", "its weight is transformed before it is rounded"),
    ],
)
def test_rounding_that_cannot_be_learned_is_named(recipe, reason):
    model = network(recipe)
    assert set(fqt.reconstruct(model, batches(), steps=2).skipped.values()) == {reason}
    moved = fqt.reconstruct(model, batches(), steps=2, method="adaquant")
    assert len(moved.rows) == 2, "through its own estimator any can be moved"


def test_a_weight_that_is_computed_is_named():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(12, 4)))
    report = fqt.reconstruct(fqt.convert(model, everywhere("int4")), batches(), steps=2)
    assert report.skipped == {"0": "its weight is computed before every forward"}


@pytest.mark.parametrize(
    ("make", "loader", "options", "words"),
    [
        (lambda: nn.Linear(12, 4), batches(), {}, "nothing in this Linear is converted"),
        (lambda: fqt.freeze(network()), batches(), {}, "fqt.reconstruct takes a model with float weights"),
        (network, batches()[:1], {}, "needs at least two batches, one of which judges: the loader has one"),
        (network, [], {}, "the loader is empty: fqt.reconstruct needs at least one batch"),
        (network, batches(), {"method": "adaroud"}, "method 'adaroud' is not one of 'adaround', 'adaquant'"),
        (network, batches(), {"steps": 0}, "steps is 0, not a positive integer"),
        (network, batches(), {"skip": "x"}, "skip='x' matches none of the converted layers"),
        (network, [*batches(2), batches(1)[0] / 0], {}, "layer '0' puts out a value that is not finite, in float"),
    ],
)
def test_an_error_names_what_is_wrong(make, loader, options, words):
    with pytest.raises(ValueError, match=words):
        fqt.reconstruct(make(), loader, **options)
