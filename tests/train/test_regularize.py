"""Mixed images, smoothed labels, averaged weights: torch's and torchvision's, exact in a resumed run."""

import pytest
import torch
from torch import nn

import fqt
from tests.train.helpers import assert_same
from train import checkpoint, loop
from train.regularize import Mix, averaged, follow, on_pixels
from train.tasks import TASKS


def batch(count: int = 32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 4


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_mixed_labels_are_those_of_the_mixed_images(mixup, cutmix):
    mix, (x, y) = Mix(mixup, cutmix, 4, seed=1, rank=0), batch()
    before = torch.get_rng_state()
    found = [mix(x, y, 0, step) for step in range(8)]
    assert torch.equal(torch.get_rng_state(), before), "the run's numbers stay as they are"
    for images, labels in found:
        assert images.shape == x.shape and labels.shape == (32, 4)
        assert torch.allclose(labels.sum(1), torch.ones(32))
    assert_same(list(found[3]), list(mix(x, y, 0, 3)))
    assert not torch.equal(found[3][0], Mix(mixup, cutmix, 4, seed=1, rank=1)(x, y, 0, 3)[0])
    pasted = [bool(((images == x) | (images == x.roll(1, 0))).all()) for images, _ in found]
    assert any(pasted) == (cutmix > 0) and all(pasted) == (mixup == 0), "cutmix takes pixels as they are, mixup blends them"


def test_smoothed_and_mixed_labels_in_the_loss():
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), batch(8)
    forward = TASKS["classify"].forward
    hard = forward(model, x, y, autocast=False)
    shares = nn.functional.one_hot(y, 4).float()
    soft = forward(model, x, shares, autocast=False)
    assert soft.loss.item() == pytest.approx(hard.loss.item()) and torch.equal(hard.correct, soft.correct)
    smoothed = forward(model, x, y, autocast=False, label_smoothing=0.2).loss
    by_hand = forward(model, x, 0.8 * shares + 0.05, autocast=False).loss
    assert smoothed.item() == pytest.approx(by_hand.item())


def test_averaged_weights_follow_weights_and_recipes():
    assert averaged(nn.Linear(2, 2), None) is None
    model = fqt.convert(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), fqt.load_recipe("int8").everywhere())
    average = averaged(model, 0.75)
    expected = model[0].weight.detach().clone()
    for step in range(3):
        with torch.no_grad():
            model[0].weight += 1
            model[1].running_mean += 1
        average.update_parameters(model)
        expected = model[0].weight.detach().clone() if step == 0 else 0.75 * expected + 0.25 * model[0].weight
    assert torch.allclose(average.module[0].weight, expected)
    assert torch.equal(average.module[1].running_mean, model[1].running_mean)
    model[0].recipe = fqt.load_recipe("int4").everywhere()
    assert follow(average, model)[0].recipe is model[0].recipe


def test_a_transform_of_pixels_sees_pixels():
    seen = []
    x = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 3)
    changed = on_pixels(lambda pixels: seen.append(pixels) or 255 - pixels, [0.5], [0.25])((x - 0.5) / 0.25)
    assert seen[0].dtype == torch.uint8 and seen[0].flatten().tolist() == [0, 128, 255]
    assert torch.allclose(changed, (1 - x - 0.5) / 0.25, atol=0.01)


def test_a_resumed_run_goes_on_with_all_of_them(make):
    config = make(
        model={"name": "mlp_small"},
        recipe="int8",
        data={"limit": 128, "mixup": 0.2, "cutmix": 1.0, "augment": "randaugment"},
        training={"epochs": 2, "ema": 0.9, "label_smoothing": 0.1, "clip_norm": 1.0},
        checkpoint={"enabled": True, "every_steps": 1, "keep": 9},
    )
    through = loop.run(config)
    ended = checkpoint.load(through.folder / "last.pt")
    again = loop.run(config, resume=through.folder / "step_000000003.pt")
    resumed = checkpoint.load(again.folder / "last.pt")
    assert ended["ema"].keys() == {"n_averaged", *(f"module.{name}" for name in ended["model"])}
    for part in ("model", "ema", "optimizer"):
        assert_same(ended[part], resumed[part])
    assert [row["test_accuracy"] for row in ended["history"]] == [row["test_accuracy"] for row in resumed["history"]]
