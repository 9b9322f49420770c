"""Whole runs: the same seed gives the same weights, whatever is measured, and however often it was interrupted."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.train.helpers import assert_same, trained, weights
from train import loop, measure
from train.loop import run
from train.wording import ConfigError, TrainingError


def second_conv(model):
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)][1]


SAVED = {"checkpoint": {"enabled": True}, "training": {"epochs": 3}}


@pytest.mark.parametrize("recipe", ["fp32", "fqt_1bit"])
def test_resumed_run_ends_like_one_that_never_stopped(make, monkeypatch, recipe):
    config = make(recipe=recipe, data={"augment": "crop_flip", "validation": 0.1}, **SAVED)
    whole = run(config)

    class Interrupted(loop.Trainer):
        def train_epoch(self, epoch, tracker):
            if epoch == 2:
                raise KeyboardInterrupt
            return super().train_epoch(epoch, tracker)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "Trainer", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(config.model_copy(update={"name": "stopped"}))
    assert weights(next(Path("runs/stopped").iterdir()))["epoch"] == 2

    resumed = run(config.model_copy(update={"name": "stopped"}), resume=Path("runs/stopped"))
    assert_same(trained(resumed), trained(whole))
    assert resumed.test_accuracy == whole.test_accuracy
    assert [row["loss"] for row in resumed.history] == [row["loss"] for row in whole.history]
    assert len(list(Path("runs/stopped").iterdir())) == 1, "a resumed run stays in its folder"


def test_finished_run_resumes_to_its_result(make):
    config = make(**SAVED)
    whole = run(config)
    again = run(config, resume=whole.folder)
    assert again.history == whole.history


def test_seed_decides_and_measuring_does_not(make):
    def train(**keys):
        return trained(run(make(recipe="fqt_1bit", checkpoint={"enabled": True}, **keys)))

    plain = train()
    measured = train(tracking={"enabled": True, "every": 1, "variance_every": 1, "baseline_steps": 1})
    assert_same(measured, plain)
    other = train(seed=1)
    assert not torch.equal(other["model"]["0.weight"], plain["model"]["0.weight"])


def test_validation_images_are_not_trained_on_and_reported_apart(make):
    without = run(make())
    with_some = run(make(data={"validation": 0.2}))
    assert without.valid_accuracy is None
    assert 0 <= with_some.valid_accuracy <= 1
    assert with_some.valid_accuracy == with_some.history[-1]["valid_accuracy"]
    assert with_some.valid_accuracy * 300 == pytest.approx(round(with_some.valid_accuracy * 300))


def test_result_of_a_run_that_learns(make):
    result = run(make(data={"limit": None}, training={"epochs": 3}, optimizer={"lr": 8e-3}))
    assert result.test_accuracy > 0.9
    assert result.test_accuracy * 297 == pytest.approx(round(result.test_accuracy * 297))
    assert result.history[0]["loss"] > result.history[-1]["loss"]
    assert result.seconds == sum(row["seconds"] for row in result.history) > 0
    assert (result.folder, result.comparison) == (None, None)
    assert result.modelled_speedup == 1.0
    assert not list(Path().iterdir()), "nothing is written without tracking and checkpoints"


def test_two_runs_have_two_folders(make):
    folders = {run(make(checkpoint={"enabled": True})).folder for _ in range(2)}
    assert len(folders) == 2
    assert all((folder / "last.pt").is_file() for folder in folders)


def test_quiet_prints_nothing(make, capfd):
    run(make())
    assert capfd.readouterr() == ("", "")
    run(make(quiet=False))
    out = capfd.readouterr().out
    assert out.splitlines()[0] == "vgg_small on digits, recipe fp32, cpu"
    assert "epoch 1/1  loss " in out
    assert out.splitlines()[-1].startswith("test accuracy ")


def test_accuracy_is_that_of_the_saved_model(make):
    config = make(checkpoint={"enabled": True})
    result = run(config)
    again = run(make(model={"weights": str(result.folder / "last.pt")}, optimizer={"lr": 1e-30}))
    assert again.history[0]["loss"] < result.history[0]["loss"]
    # BatchNorm's running means move on, the weights do not
    assert abs(again.test_accuracy - result.test_accuracy) < 0.5


@pytest.mark.parametrize("recipe", ["fp32", "xnor"])
def test_warm_start_has_the_weights_of_the_file(make, recipe):
    first = run(make(checkpoint={"enabled": True}))
    config = make(recipe=recipe, seed=5, model={"weights": str(first.folder / "last.pt")})
    with loop.ranks.join("cpu") as place:
        model = loop.Trainer(config, place).model
    for name, value in weights(first.folder)["model"].items():
        assert torch.equal(model.state_dict()[name], value), name


def test_warm_start_from_another_model(make):
    first = run(make(model={"name": "mlp_small"}, checkpoint={"enabled": True}))
    with pytest.raises(ConfigError, match="model.weights = .*last.pt: it does not fit the model.*Missing key") as error:
        run(make(model={"weights": str(first.folder / "last.pt")}))
    assert "\n" not in str(error.value)


def test_diverging_run_stops_with_step_and_remedy(make):
    diverging = {"optimizer": {"name": "sgd", "lr": 1e30}, "schedule": {"name": "constant"}}
    with pytest.raises(TrainingError, match="stopped in step [2-4]: the loss is nan.*weights were left.*lower optimizer.lr"):
        run(make(**diverging))


def test_divergence_keeps_the_checkpoint(make, monkeypatch):
    class Diverging(loop.Trainer):
        def train_epoch(self, epoch, tracker):
            if epoch == 1:
                self.model[0].weight.data.fill_(math.nan)
            return super().train_epoch(epoch, tracker)

    monkeypatch.setattr(loop, "Trainer", Diverging)
    with pytest.raises(TrainingError, match=r"step 5: .*last.pt holds the state after epoch 1"):
        run(make(**SAVED))
    (folder,) = Path("runs/run").iterdir()
    assert all(value.isfinite().all() for value in weights(folder)["model"].values())


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"data": {"batch_size": 512}}, "data.batch_size = 512: there are 256 images to train on; lower it"),
        ({"recipe": "dorefa_w99a1g1"}, "recipe = dorefa_w99a1g1: .*bits"),
        ({"recipe": "fqt_1bit", "skip": ["layr*"]}, "recipe = fqt_1bit: skip pattern 'layr[*]' matches no layer"),
        ({"device": "cuda"}, 'device = "cuda": torch finds no GPU'),
    ],
)
def test_mistakes_that_need_the_model(make, keys, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=wanted):
        run(make(**keys))


def test_recipe_file_with_a_mistake(make, tmp_path):
    (tmp_path / "own.yaml").write_text("output: flaot\n")
    with pytest.raises(ConfigError, match="recipe = own.yaml: .*flaot"):
        run(make(recipe="own.yaml"))


def test_more_processes_than_the_batch_divides_into(make):
    trainer = SimpleNamespace(config=make(), place=loop.ranks.Ranks(0, 3, torch.device("cpu")))
    with pytest.raises(ConfigError, match="data.batch_size = 64: 3 processes .*multiple of 3"):
        loop.Trainer.chunks(trainer, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("wanted", [True, False])
def test_memory_format(make, wanted):
    with loop.ranks.join("cpu") as place:
        trainer = loop.Trainer(make(training={"channels_last": wanted}), place)
    (x, _), *_ = next(trainer.batches(0))
    weight = trainer.model.get_submodule(second_conv(trainer.model)).weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == wanted
    assert x.shape[1] == 1 or x.is_contiguous(memory_format=torch.channels_last) == wanted


def test_accumulated_parts_cut_the_batch(make):
    with loop.ranks.join("cpu") as place:
        trainer = loop.Trainer(make(training={"accumulate": 4}), place)
    assert trainer.steps_per_epoch == 4
    assert [len(y) for _, y in next(trainer.batches(0))] == [16] * 4


def test_evaluation_counts_every_image_in_evaluation_mode(make):
    with loop.ranks.join("cpu") as place:
        trainer = loop.Trainer(make(recipe="fqt_1bit"), place)
    state, mode = torch.get_rng_state(), []
    trainer.model.register_forward_hook(lambda module, inputs, output: mode.append((module.training, len(output))))
    trainer.evaluate(trainer.data.test)
    assert mode == [(False, 256), (False, 41)]
    assert trainer.model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_comparison_is_part_of_the_result(make):
    result = run(make(recipe="xnor", tracking={"enabled": True, "baseline_steps": 1}))
    assert isinstance(result.comparison, measure.Comparison)
    assert result.modelled_speedup > 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", ["fp32", "fqt_1bit"])
def test_run_on_a_gpu(make, recipe):
    keys = {"device": "cuda", "tracking": {"enabled": True, "baseline_steps": 1}, "recipe": recipe, **SAVED}
    result = run(make(**keys))
    assert 0 <= result.test_accuracy <= 1
    assert run(make(**keys), resume=result.folder).history == result.history
