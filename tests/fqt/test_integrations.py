"""A converted model with a precision policy in the training loops of other libraries, each the real one."""

import logging
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fqt
from fqt.integrations.control import Control

IMAGES = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(64) % 4
OPTIONS = {"lookback": (2, 4), "resolution": (20, 60), "l1": 1e-3}


class Net(nn.Module):
    """Returns its own loss where it is given labels, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor] | Tensor:
        logits = self.layers(x)
        return logits if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


def made(**options: object) -> tuple[Net, fqt.Policy]:
    torch.manual_seed(1)
    net = Net()
    fqt.convert(net, "adapt_calibrated")
    return net, fqt.precision.build_policy("adapt", net, **OPTIONS, **options)


@pytest.fixture(scope="module")
def by_hand() -> tuple[list[Tensor], dict[str, str]]:
    """Weights and recipes after eight steps of a loop written out."""
    net, policy = made()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.manual_seed(2)
    for step in range(8):
        part = slice(16 * (step % 4), 16 * (step % 4) + 16)
        loss = cross_entropy(net(IMAGES[part]), LABELS[part]) + policy.penalty()
        loss.backward()
        optimizer.step()
        policy.step(loss)
        optimizer.zero_grad()
    return outcome(net)


def outcome(net: nn.Module) -> tuple[list[Tensor], dict[str, str]]:
    recipes = {name: layer.recipe.describe("output") for name, layer in fqt.quantized_layers(net)}
    return [parameter.detach().clone() for parameter in net.parameters()], recipes


def assert_alike(net: nn.Module, expected: tuple[list[Tensor], dict[str, str]]) -> None:
    weights, recipes = outcome(net)
    assert recipes == expected[1]
    assert all(torch.equal(a, b) for a, b in zip(weights, expected[0], strict=True))


def test_accelerate(by_hand, tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate")
    from fqt.integrations.accelerate import Accelerated

    net, policy = made()
    before = outcome(net)[1]
    accelerator = accelerate.Accelerator(cpu=True)
    control = Accelerated(accelerator, net, policy, measure_every=4)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    torch.manual_seed(2)
    for step in range(8):
        part = slice(16 * (step % 4), 16 * (step % 4) + 16)
        control.backward(cross_entropy(model(IMAGES[part]), LABELS[part]))
        optimizer.step()
        control.step()
        optimizer.zero_grad()
    assert_alike(net, by_hand)
    assert by_hand[1] != before, "the policy decided something"
    found = control.control.scalars()
    assert found["speedup/measured"] > 0 and found["speedup/modelled"] > 1
    accelerator.save_state(str(tmp_path / "state"))
    fresh, other = made()
    again = accelerate.Accelerator(cpu=True)
    Accelerated(again, fresh, other)
    again.prepare(fresh)
    again.load_state(str(tmp_path / "state"))
    assert other.steps == 8
    assert_alike(fresh, by_hand)


def test_transformers_trainer(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    from fqt.integrations.transformers import control

    data = [{"x": x, "labels": y} for x, y in zip(IMAGES, LABELS, strict=True)]

    def trainer(net: nn.Module, epochs: int):
        arguments = transformers.TrainingArguments(
            str(tmp_path), num_train_epochs=epochs, per_device_train_batch_size=16, learning_rate=0.05, logging_steps=1,
            save_steps=4, report_to=[], use_cpu=True, seed=3, disable_tqdm=True, optim="sgd", gradient_accumulation_steps=2,
        )  # fmt: skip
        return transformers.Trainer(net, arguments, train_dataset=data)

    logging.getLogger("transformers").setLevel(logging.ERROR)
    net, policy = made()
    first = trainer(net, 4)
    control(first, policy, measure_every=4)
    first.train()
    assert policy.steps == 8, "4 epochs of 4 batches, two of which are one step"
    logged = [line for line in first.state.log_history if "loss" in line]
    assert len(logged) == 8 and all(line["speedup/modelled"] > 1 and line["speedup/measured"] > 0 for line in logged)
    assert not net._forward_hooks and not net._forward_pre_hooks, "nothing of it stays"
    fresh, other = made()
    second = trainer(fresh, 4)
    control(second, other)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert other.steps == 8
    assert_alike(fresh, outcome(net))


def test_lightning(by_hand) -> None:
    lightning = pytest.importorskip("lightning")
    from fqt.integrations.lightning import FQTCallback

    class Module(lightning.LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    net, policy = made()
    callback = FQTCallback(net, policy, measure_every=4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, LABELS), batch_size=16)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings(action="ignore"):
        torch.manual_seed(2)
        trainer.fit(Module(net), loader)
    assert policy.steps == 8
    assert outcome(net)[1] == by_hand[1], "decided as in a loop written out, though Lightning's loader draws numbers too"
    assert {"speedup/modelled", "speedup/measured", "precision/ms"} <= trainer.callback_metrics.keys()
    fresh, other = made()
    again = FQTCallback(fresh, other)
    again.load_state_dict(callback.state_dict())
    assert other.steps == again.control.steps == 8
    assert outcome(fresh)[1] == outcome(net)[1]


def test_what_cannot_be_is_refused() -> None:
    net, policy = made()
    with pytest.raises(ValueError, match="nothing in this Net is converted: call fqt.convert"):
        Control(Net())
    with pytest.raises(ValueError, match="made for another model"):
        Control(made()[0], policy)
    with pytest.raises(ValueError, match="the policy saw no loss in this step"):
        Control(net, policy).step()
