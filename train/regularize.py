"""What keeps a model from learning its images by heart: mixed images, and the mean of the weights over steps. torchvision's and
torch's own; here they are keyed and kept so that a resumed run goes on exactly."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fqt.layers import quantized_layers


@dataclass(frozen=True)
class Mix:
    """Mixup (arXiv 1710.09412) and cutmix (1905.04899) of a batch's images and labels, by torchvision. Where both are on, one
    of them is drawn for each batch.

    mixup, cutmix: the alpha of the Beta distribution that each draws its share from; 0: off.
    """

    mixup: float
    cutmix: float
    classes: int
    seed: int
    rank: int

    def __call__(self, x_NCHW: Tensor, y_N: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """The images, and each one's share of every class, (N, K). What is drawn depends on the place in the run alone."""
        from torchvision.transforms import v2  # not at import: it takes two seconds

        kinds = [(v2.MixUp, self.mixup), (v2.CutMix, self.cutmix)]
        made = [kind(alpha=alpha, num_classes=self.classes) for kind, alpha in kinds if alpha]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(zlib.crc32(f"{self.seed} {epoch} {step} {self.rank}".encode()))
            return made[int(torch.randint(len(made), ()))](x_NCHW, y_N)


def averaged(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """A copy whose weights follow the model's, w <- decay w + (1 - decay) w_model; None without a decay. Its buffers are the
    model's."""
    return None if decay is None else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


def follow(average: AveragedModel, model: nn.Module) -> nn.Module:
    """The averaged weights as a model that computes as the other does now: a precision policy may have changed its recipes."""
    for (_, layer), (_, of) in zip(quantized_layers(average.module), quantized_layers(model), strict=True):
        layer.recipe = of.recipe
    return average.module


def on_pixels(transform: Callable[[Tensor], Tensor], mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """A transform of uint8 images as one of images that are normalized already."""
    mean_C, std_C = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def changed(x_CHW: Tensor) -> Tensor:
        pixels = ((x_CHW * std_C + mean_C) * 255).round().clamp(0, 255).to(torch.uint8)
        return (transform(pixels).float() / 255 - mean_C) / std_C

    return changed
