"""The models, by name: those of the low-bit literature for small images, and whatever torchvision and timm have.

Every model takes images `x_NCHW` of 8x8 or more and returns logits (N, classes). In the models written here each
activation is an nn.ReLU *module* behind a BatchNorm: a 1-bit recipe takes the sign there, so it needs inputs centred on
zero, and an activation that it can find and take out.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from train.catalogue import known_model
from train.wording import ConfigError

Shape = tuple[int, int, int]
"""channels, height, width of an image"""


def build(name: str, shape: Shape, classes: int) -> nn.Module:
    """A freshly initialized model for images of this shape. Raises ConfigError for an unknown or unfit one."""
    try:
        family, _, rest = known_model(name).partition(":")
    except ValueError as error:
        raise ConfigError(f'model.name = "{name}": {error}') from None
    if family == "torchvision":
        model = _torchvision(rest, shape, classes)
    elif family == "timm":
        model = _timm(rest, shape, classes)
    else:
        model = BUILDERS[name](shape, classes)
    _try(model, name, shape, classes)
    return model


def vgg_small(shape: Shape, classes: int) -> nn.Module:
    """The main job's network: wide enough for 1-bit products to learn, small enough for two cores."""
    return _vgg([16, "M", 32, 32, "M", 64, 64, "M"], shape, classes, pool_to=4)


def vgg16(shape: Shape, classes: int) -> nn.Module:
    """VGG-16 as the low-bit papers use it on CIFAR: one linear layer behind the thirteen convolutions."""
    plan = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
    return _vgg(plan, shape, classes, pool_to=1)


def _vgg(plan: Sequence[int | str], shape: Shape, classes: int, *, pool_to: int) -> nn.Module:
    """plan: channels of a 3x3 convolution, or "M" for a max-pool. pool_to: height and width the classifier sees."""
    layers: list[nn.Module] = []
    channels = shape[0]
    for item in plan:
        if isinstance(item, int):
            layers += [_conv3x3(channels, item), nn.BatchNorm2d(item), nn.ReLU(inplace=True)]
            channels = item
        else:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))  # a 1x1 image stays one, so that small images go through
    layers += [nn.AdaptiveAvgPool2d(pool_to), nn.Flatten()]
    return _initialize(nn.Sequential(*layers, nn.Linear(channels * pool_to**2, classes)))


def alexnet(shape: Shape, classes: int) -> nn.Module:
    """AlexNet for small images: kernels of 3x3, and BatchNorm before every activation in place of dropout."""
    channels, layers = shape[0], list[nn.Module]()
    for out, pool in ((64, True), (192, True), (384, False), (256, False), (256, True)):
        layers += [_conv3x3(channels, out), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2, ceil_mode=True)] * pool
        channels = out
    features = 256 * 2 * 2
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    for out in (1024, 1024):
        layers += [nn.Linear(features, out, bias=False), nn.BatchNorm1d(out), nn.ReLU(inplace=True)]
        features = out
    return _initialize(nn.Sequential(*layers, nn.Linear(features, classes)))


def lenet5(shape: Shape, classes: int) -> nn.Module:
    """LeNet-5, with BatchNorm, ReLU and max-pools; its second convolution is padded, so that images of 8x8 go through."""
    layers: list[nn.Module] = []
    channels = shape[0]
    for out in (6, 16):
        layers += [nn.Conv2d(channels, out, 5, padding=2, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        layers.append(nn.MaxPool2d(2))
        channels = out
    layers += [nn.AdaptiveAvgPool2d(5), nn.Flatten()]
    features = channels * 5 * 5
    for out in (120, 84):
        layers += [nn.Linear(features, out, bias=False), nn.BatchNorm1d(out), nn.ReLU(inplace=True)]
        features = out
    return _initialize(nn.Sequential(*layers, nn.Linear(features, classes)))


def mlp(shape: Shape, classes: int) -> nn.Module:
    """Four hidden layers of 4096 units: nearly all of it is matrix products."""
    return _mlp([4096] * 4, shape, classes)


def mlp_small(shape: Shape, classes: int) -> nn.Module:
    """Two hidden layers of 256 units."""
    return _mlp([256] * 2, shape, classes)


def _mlp(widths: Sequence[int], shape: Shape, classes: int) -> nn.Module:
    features, layers = shape[0] * shape[1] * shape[2], list[nn.Module]([nn.Flatten()])
    for out in widths:
        layers += [nn.Linear(features, out, bias=False), nn.BatchNorm1d(out), nn.ReLU(inplace=True)]
        features = out
    return nn.Sequential(*layers, nn.Linear(features, classes))


def resnet18(shape: Shape, classes: int) -> nn.Module:
    """torchvision's ResNet-18 with the stem that the literature uses on CIFAR."""
    import torchvision  # see `_torchvision`

    model = torchvision.models.resnet18(weights=None, num_classes=classes)
    model.conv1 = _conv3x3(shape[0], 64)
    model.maxpool = nn.Identity()  # type: ignore[assignment]
    return _initialize(model)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around an option-A shortcut: every second pixel, and zeros for the new channels."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels, out, stride)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(out, out)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu2 = nn.ReLU(inplace=True)
        self.stride, self.new_channels = stride, out - channels

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x_NCHW)))
        y = self.bn2(self.conv2(y))
        before, after = self.new_channels // 2, self.new_channels - self.new_channels // 2
        shortcut = nn.functional.pad(x_NCHW[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, after))
        return self.relu2(y + shortcut)


class CifarResNet(nn.Module):
    """ResNet-(6n + 2) of He et al., section 4.2; parameter names as in the public checkpoints of this family."""

    def __init__(self, n: int, shape: Shape, classes: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(shape[0], 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(BasicBlock(channels if i == 0 else out, out, stride if i == 0 else 1) for i in range(n)))
            for channels, out, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.linear = nn.Linear(64, classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x_NCHW)))
        return self.linear(self.pool(self.layer3(self.layer2(self.layer1(y)))))


def resnet20(shape: Shape, classes: int) -> nn.Module:
    """ResNet-20 of the CIFAR family."""
    return _initialize(CifarResNet(3, shape, classes))


def resnet56(shape: Shape, classes: int) -> nn.Module:
    """ResNet-56 of the CIFAR family."""
    return _initialize(CifarResNet(9, shape, classes))


BUILDERS: dict[str, Callable[[Shape, int], nn.Module]] = {
    build.__name__: build for build in (vgg_small, vgg16, resnet18, resnet20, resnet56, alexnet, lenet5, mlp, mlp_small)
}


def _conv3x3(channels: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)  # a BatchNorm follows: no bias


def _initialize(model: nn.Module) -> nn.Module:
    """He's initialization of the convolutions; everything else as torch does."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _torchvision(name: str, shape: Shape, classes: int) -> nn.Module:
    import torchvision  # two seconds of imports that only its own models should cost

    model = torchvision.models.get_model(name, weights=None, num_classes=classes)
    path, first = next((path, module) for path, module in model.named_modules() if isinstance(module, nn.Conv2d))
    if shape[0] != first.in_channels:  # torchvision has no option for it
        parent, _, child = path.rpartition(".")
        bias = first.bias is not None
        conv = nn.Conv2d(shape[0], first.out_channels, first.kernel_size, first.stride, first.padding, bias=bias)  # type: ignore[arg-type]
        setattr(model.get_submodule(parent), child, conv)
    return model


def _timm(name: str, shape: Shape, classes: int) -> nn.Module:
    import timm  # seconds of imports that only its own models should cost

    return timm.create_model(name, num_classes=classes, in_chans=shape[0])


def _try(model: nn.Module, name: str, shape: Shape, classes: int) -> None:
    """A forward of two blank images through a copy: a model that is unfit for them says so before the training."""
    size = "x".join(map(str, shape))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = copy.deepcopy(model).train()(torch.zeros(2, *shape))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f'model.name = "{name}": it does not take images of {size} ({reason}); choose another.') from error
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        returned = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(
            f'model.name = "{name}": for two images of {size} it returns {returned} instead of logits of shape '
            f"(2, {classes}); choose another."
        )
