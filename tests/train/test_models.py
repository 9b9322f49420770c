"""Every model learns from images of every size that the data sets have, and is fit for 1-bit recipes."""

import pytest
import torch
from torch import fx, nn

import fqt
from train import catalogue, models
from train.catalogue import DECODERS, MODELS
from train.wording import ConfigError

SHAPES = [(1, 28, 28), (3, 32, 32), (1, 8, 8)]
SMALL = [name for name in models.BUILDERS if name != "mlp"]  # mlp is mlp_small, with 67 million weights


def backward(model, shape, classes=10):
    logits = model(torch.randn(2, *shape))
    assert logits.shape == (2, classes)
    nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.every(3)
def test_forward_and_backward(name, shape):
    backward(models.build(name, shape, 10), shape)


@pytest.mark.parametrize("name", ["vgg_small", "resnet20", "mlp_small"])
def test_converts_to_one_bit(name):
    model = fqt.convert(models.build(name, (1, 8, 8), 10), "fqt_1bit")
    kept = [isinstance(module, nn.ReLU) for module in model.modules() if type(module) in (nn.ReLU, nn.Identity)]
    assert sum(kept) <= 1, "that before the head, which is float"
    backward(model, (1, 8, 8))


def test_the_registry_is_what_the_configuration_lists():
    assert set(models.BUILDERS) == {name for name in MODELS if ":" not in name and name not in DECODERS}


@pytest.mark.parametrize("name", SMALL)
def test_activations_are_modules_behind_a_batchnorm(name):
    traced = fx.symbolic_trace(models.build(name, (3, 32, 32), 10))
    modules = dict(traced.named_modules())
    activations = [node for node in traced.graph.nodes if isinstance(modules.get(str(node.target)), nn.ReLU)]
    assert activations
    assert not any("relu" in str(node.target) for node in traced.graph.nodes if node.op != "call_module")
    for node in activations:
        (source,) = node.args
        if source.op == "call_function":  # the sum of a residual block
            source = source.args[0]
        assert isinstance(modules[str(source.target)], nn.BatchNorm2d | nn.BatchNorm1d), (node, source)


@pytest.mark.parametrize(
    ("name", "parameters"),
    # conv weights + BatchNorms + classifier, by hand; the ResNets' are the counts of their public checkpoints
    [("resnet20", 269_722), ("resnet56", 853_018), ("vgg16", 14_710_464 + 2 * 4224 + 5130)],
)
def test_parameter_counts(name, parameters):
    assert sum(p.numel() for p in models.build(name, (3, 32, 32), 10).parameters()) == parameters


def test_mlp_has_four_hidden_layers_of_4096():
    with torch.device("meta"):
        model = models.mlp((3, 32, 32), 10)
    assert [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)] == [
        (3072, 4096), (4096, 4096), (4096, 4096), (4096, 4096), (4096, 10),
    ]  # fmt: skip
    assert sum(isinstance(m, nn.BatchNorm1d) for m in model.modules()) == 4


def test_resnet20_has_the_public_checkpoints_names():
    names = models.build("resnet20", (3, 32, 32), 10).state_dict().keys()
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer3.2.bn2.weight", "linear.bias"} <= names
    assert not any("shortcut" in name for name in names)


def test_option_a_shortcut_takes_every_second_pixel_and_pads_channels():
    block = models.BasicBlock(2, 4, 2).eval()
    nn.init.zeros_(block.bn2.weight)  # the branch adds nothing
    x = torch.rand(1, 2, 4, 4)
    y = block(x)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert torch.equal(y[:, [0, 3]], torch.zeros(1, 2, 2, 2))


def test_torchvision_model_takes_grey_images():
    model = models.build("torchvision:resnet18", (1, 32, 32), 7)
    assert model.conv1.weight.shape == (64, 1, 7, 7)
    backward(model, (1, 32, 32), classes=7)


def test_timm_model_takes_grey_images():
    backward(models.build("timm:resnet10t", (1, 32, 32), 7), (1, 32, 32), classes=7)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("vgg_smal", 'model.name = "vgg_smal": did you mean vgg_small?'),
        ("torchvision:resnet19", 'model.name = "torchvision:resnet19": torchvision has no such model; did you mean resnet1'),
        ("torchvision:fcn_resnet50", "torchvision has no such model"),
        ("torchvision:alexnet", r"does not take images of 1x8x8 \(.*\); choose another"),
        ("timm:resnet10", "timm has no such model; did you mean resnet10t?"),
    ],
)
def test_unknown_or_unfit_model(name, wanted):
    with pytest.raises(ConfigError, match=wanted):
        models.build(name, (1, 8, 8), 10)


def test_model_that_returns_no_logits(monkeypatch):
    monkeypatch.setitem(models.BUILDERS, "mlp_small", lambda shape, classes: nn.Flatten())
    with pytest.raises(ConfigError, match=r"it returns \(2, 64\) instead of logits of shape \(2, 10\)"):
        models.build("mlp_small", (1, 8, 8), 10)


def test_building_leaves_batchnorm_and_random_numbers_alone():
    torch.manual_seed(0)
    model = models.build("vgg_small", (1, 8, 8), 10)
    after = torch.rand(1)
    torch.manual_seed(0)
    models.vgg_small((1, 8, 8), 10)
    assert torch.equal(torch.rand(1), after)
    assert model[1].num_batches_tracked == 0
    assert model.training


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_the_names_that_are_read_from_the_source_are_those_of_the_library(package):
    library = pytest.importorskip(package)
    names = timm_names() if package == "timm" else library.models.list_models(module=library.models)
    assert catalogue.library_models(package) == set(names)


def timm_names():
    import timm

    return timm.list_models()


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(catalogue.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="nowhere is not installed here; pip install nowhere"):
        catalogue.library_models("nowhere")
