"""Samples, already split: which are trained on, which are held out, which only tell the result; and the images, by name.

Small sets live in memory as normalized float32 tensors and batches are indexed directly: on two cores a worker process
costs more than it brings. Only `imagefolder:<path>` decodes in worker processes (images.py). torchvision takes two seconds to
import, so only what needs it does.

Which image stands in which batch depends on (seed, epoch) alone, and how it is augmented on (seed, epoch, image) alone:
not on the recipe, the batch size or the number of ranks. So two recipes see the same pictures, and a resumed run needs
no state of its data.
"""

import gzip
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from train.regularize import on_pixels
from train.sections import Data as DataConfig
from train.sections import home
from train.wording import ConfigError

MeanStd = tuple[Sequence[float], Sequence[float]]
SPLIT_SEED = 20160620
"""Shuffles the training images before the held-out ones are set aside. Not the run's seed: all runs share one split."""
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
RGB = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of colour images: ImageNet's, which published checkpoints expect, CIFAR's too."""

Batch = tuple[Tensor, Tensor]
"""images x_NCHW (float32), or tokens x_NT (int64), and labels y_N or y_NT (int64), on the CPU"""
Transform = Callable[[Tensor], Tensor]
"""a random change of an image x_CHW"""


@dataclass(frozen=True)
class Augment:
    """Random changes of training images, drawn from generators of their own."""

    transform: Transform
    seed: int
    epoch: int

    def __call__(self, image_CHW: Tensor, index: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((self.seed, self.epoch, index)))
            return self.transform(image_CHW)


class Split(Protocol):
    """A set of labelled samples: images or texts."""

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int]) -> "Split":
        """The samples at these indices, in this order."""
        ...

    def batches(self, chunks: Sequence[list[int]], augment: Augment | None = None, *, whole: bool = False) -> Iterator[Batch]:
        """One batch a chunk of indices, without the images that cannot be read, if the configuration tolerates those.

        whole: other images of the chunk take their places, so that every batch has its full size.
        """
        ...


@dataclass(frozen=True)
class Memory:
    """Images as one tensor."""

    x_NCHW: Tensor
    y_N: Tensor

    def __len__(self) -> int:
        return len(self.y_N)

    def take(self, indices: Sequence[int]) -> "Memory":
        return Memory(self.x_NCHW[torch.as_tensor(indices)], self.y_N[torch.as_tensor(indices)])

    def batches(self, chunks: Sequence[list[int]], augment: Augment | None = None, *, whole: bool = False) -> Iterator[Batch]:
        for chunk in chunks:
            x = self.x_NCHW[torch.as_tensor(chunk)]
            if augment is not None:
                x = torch.stack([augment(image, index) for image, index in zip(x, chunk, strict=True)])
            yield x, self.y_N[torch.as_tensor(chunk)]


@dataclass(frozen=True)
class Data:
    """A data set, split.

    classes: of images or texts; the tokens that there are, for a language model. unreadable: images left out so far, the reason
    by path. vocabulary: what the numbers of the tokens mean, which a checkpoint keeps; "" of images.
    """

    train: Split
    valid: Split | None
    test: Split
    classes: int
    unreadable: dict[str, str] = field(default_factory=dict, kw_only=True)
    vocabulary: str = field(default="", kw_only=True)

    def augmentation(self, seed: int, epoch: int) -> "Augment | None":
        """What changes the training samples in this epoch."""
        return None


@dataclass(frozen=True)
class Images(Data):
    """Images. shape: channels, height, width."""

    shape: tuple[int, int, int]
    transform: Transform | None

    def augmentation(self, seed: int, epoch: int) -> Augment | None:
        """What changes the training images in this epoch."""
        return Augment(self.transform, seed, epoch) if self.transform else None


def load(config: DataConfig, *, quiet: bool = True) -> Images:
    """Finds, reads and splits a set of images. Raises ConfigError with what to do where it is not there or not usable.

    quiet: show no progress bar while image files are checked.
    """
    name, _, argument = config.name.partition(":")
    unreadable: dict[str, str] = {}
    mean_std = None
    if name == "imagefolder":
        train, test, shape, classes = _imagefolder(Path(argument), config, unreadable, quiet)
    else:
        mean_std, (x_train, y_train), (x_test, y_test) = {
            "fashion_mnist": fashion_mnist,
            "cifar10": cifar10,
            "digits": digits,
            "synthetic": synthetic,
        }[name](config)
        train = Memory(_normalized(x_train, *mean_std), y_train.long())
        test = Memory(_normalized(x_test, *mean_std), y_test.long())
        _, *shape = x_train.shape
        classes = 10
        for y_N in (y_train, y_test):
            if not 0 <= int(y_N.min()) <= int(y_N.max()) < classes:
                raise ConfigError(
                    f"data.name = {config.name}: it has labels from {int(y_N.min())} to {int(y_N.max())}, and its "
                    f"{classes} classes are 0 to {classes - 1}; the label file is damaged or of another set: fetch it again."
                )
    held_out, kept = split(len(train), config, "images")
    return Images(
        train.take(kept),
        train.take(held_out) if held_out else None,
        test,
        classes,
        (shape[0], shape[1], shape[2]),
        _transform(config, shape[1], shape[2], mean_std),
        unreadable=unreadable,
    )


def chunks(count: int, size: int, *, seed: int, epoch: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """This rank's share of an epoch's shuffled indices, in whole chunks of `size`."""
    # not the sampler's own seed + epoch: runs with neighbouring seeds would see each other's orders
    mixed = hash((seed, epoch)) % 2**63
    sampler = DistributedSampler(range(count), world, rank, shuffle=True, seed=mixed, drop_last=True)  # type: ignore[arg-type]
    order = list(sampler)
    return [order[start : start + size] for start in range(0, len(order) - size + 1, size)]


def split(count: int, config: DataConfig, what: str) -> tuple[list[int], list[int]]:
    """Indices held out for validation, and indices trained on. what: the samples' name, for messages."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    held_out = round(config.validation * count)
    if config.validation and not 0 < held_out < count:
        raise ConfigError(f"data.validation = {config.validation}: of {count} {what} that is {held_out}; choose another.")
    kept = order[held_out:]
    if config.limit and config.limit > len(kept):
        raise ConfigError(f"data.limit = {config.limit}: there are {len(kept)} {what} to train on; lower it or leave it out.")
    return order[:held_out], kept[: config.limit]


def _transform(config: DataConfig, height: int, width: int, mean_std: MeanStd | None) -> Transform | None:
    """mean_std: of images that are normalized already; None: they are uint8."""
    if config.augment == "none":
        return None
    from torchvision.transforms import v2

    if config.augment == "flip":
        return v2.RandomHorizontalFlip()
    crop = v2.RandomCrop((height, width), padding=height // 8)
    if config.name.startswith("imagefolder:"):
        crop = v2.RandomResizedCrop((height, width), antialias=True)
    if config.augment == "crop_flip":
        return v2.Compose([crop, v2.RandomHorizontalFlip()])
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.RandAugment()])
    return transform if mean_std is None else on_pixels(transform, *mean_std)


def _normalized(x_NCHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 images as float32, each channel with mean 0 and deviation 1 over the training set."""
    x = x_NCHW.float().div_(255)
    return x.sub_(torch.tensor(mean).view(1, -1, 1, 1)).div_(torch.tensor(std).view(1, -1, 1, 1))


Raw = tuple[MeanStd, Batch, Batch]
"""mean and deviation of each channel; training and test images in uint8, with their labels"""


def fashion_mnist(config: DataConfig) -> Raw:
    """Fashion-MNIST from wherever it lies, or from torchvision's download."""
    folder = find_fashion_mnist(config.path)
    if folder is None:
        import torchvision

        try:
            torchvision.datasets.FashionMNIST("data", download=True)
        except (OSError, RuntimeError) as error:
            places = ", ".join(map(str, _places()))
            raise ConfigError(
                f"data.name = fashion_mnist: it is not in {places}, and torchvision cannot download it "
                f"({' '.join(str(error).split())}). Do one of these: apt-get install dataset-fashion-mnist; or put "
                f"{', '.join(FASHION_MNIST)} (.gz or not) in a folder and set FQT_DATA, or data.path, to it; or start "
                "once with internet access, and torchvision keeps a copy in ./data."
            ) from None
        folder = Path("data/FashionMNIST/raw")
    x_train, y_train, x_test, y_test = (read_idx(folder, name) for name in FASHION_MNIST)
    return ((0.2860,), (0.3530,)), (x_train.unsqueeze(1), y_train), (x_test.unsqueeze(1), y_test)


def find_fashion_mnist(path: str | None = None) -> Path | None:
    """The folder with the four files: `path` if given, else the first of $FQT_DATA, ./data and Debian's that has them.

    Raises ConfigError where a path is given and does not have them.
    """
    for folder in [Path(path)] if path else _places():
        for inside in ("", "fashion-mnist", "fashion_mnist", "FashionMNIST/raw"):
            place = folder / inside
            if all((place / name).is_file() or (place / f"{name}.gz").is_file() for name in FASHION_MNIST):
                return place
    if path:
        raise ConfigError(f'data.path = "{path}": it should hold {", ".join(FASHION_MNIST)} (.gz or not).')
    return None


def _places() -> list[Path]:
    given = os.environ.get("FQT_DATA")
    return [*([Path(home("FQT_DATA", given))] if given else []), Path("data"), DEBIAN]


def read_idx(folder: Path, name: str) -> Tensor:
    """A file in MNIST's idx format, packed or not, as a uint8 tensor. Raises ConfigError where it is damaged."""
    path = folder / name if (folder / name).is_file() else folder / f"{name}.gz"
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, kind, axes = struct.unpack(">HBB", raw[:4])
        shape = struct.unpack(f">{axes}I", raw[4 : 4 + 4 * axes])
        values = np.frombuffer(raw, np.uint8, offset=4 + 4 * axes)
        if zeros or kind != 8 or values.size != np.prod(shape):
            raise ValueError("its header and its length disagree")
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise ConfigError(f"{path} is not an idx file of bytes ({error}): delete it and fetch it again.") from None
    return torch.from_numpy(values.copy()).view(shape)


def cifar10(config: DataConfig) -> Raw:
    """CIFAR-10 from torchvision's files or an image folder; else from torchvision's download."""
    roots = [Path(config.path)] if config.path else [place for place in _places() if place != DEBIAN]
    for place in [root / inside for root in roots for inside in ("", "cifar10")]:
        if (place / "cifar-10-batches-py").is_dir():
            try:
                return _cifar10_batches(place, download=False)
            except RuntimeError as error:
                raise ConfigError(f"{place}/cifar-10-batches-py is damaged ({error}): fetch it again.") from None
        if (place / "train").is_dir() and (place / "test").is_dir():
            train, test = (_decode_all(place / part) for part in ("train", "test"))
            return RGB, train, test
    if config.path:
        raise ConfigError(f'data.path = "{config.path}": it should hold cifar-10-batches-py/, or train/ and test/.')
    try:
        return _cifar10_batches(Path("data"), download=True)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"data.name = cifar10: it is not in {', '.join(map(str, roots))}, and torchvision cannot download it "
            f"({error}). Put cifar-10-batches-py/, or an image folder cifar10/ with train/<class>/ and test/<class>/, "
            "in a folder and set FQT_DATA, or data.path, to it; or start once with internet access."
        ) from None


def _cifar10_batches(root: Path, *, download: bool) -> Raw:
    import torchvision

    train, test = (torchvision.datasets.CIFAR10(str(root), train=part, download=download) for part in (True, False))
    return RGB, _from_nhwc(train.data, train.targets), _from_nhwc(test.data, test.targets)


def _from_nhwc(x_NHWC: np.ndarray, labels: list[int]) -> Batch:
    return torch.from_numpy(x_NHWC).permute(0, 3, 1, 2), torch.tensor(labels)


def _decode_all(folder: Path) -> Batch:
    import torchvision

    from train import images

    files = torchvision.datasets.ImageFolder(str(folder))
    if len(files.classes) != 10:
        raise ConfigError(f"{folder} has {len(files.classes)} folders: cifar10 needs one a class, ten.")
    x_NHWC = np.empty((len(files), 32, 32, 3), np.uint8)
    for index, (path, _) in enumerate(files.samples):
        try:
            image = images.decode(path)
            if image.size != (32, 32):
                raise ValueError(f"it has {image.width}x{image.height}")
            x_NHWC[index] = np.asarray(image)
        except images.DAMAGE as error:
            raise ConfigError(f"{path} is no image of 32x32 pixels ({error}): fetch it again, or remove it.") from None
    return _from_nhwc(x_NHWC, files.targets)


def digits(config: DataConfig) -> Raw:
    """The 8x8 digits of scikit-learn, 1,500 to train on and 297 to test."""
    from sklearn.datasets import load_digits  # a second of imports that only this set should cost

    pixels, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(np.asarray(pixels) * (255 / 16)).to(torch.uint8).view(-1, 1, 8, 8)
    y = torch.as_tensor(np.asarray(labels))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, test = order[:1500], order[1500:]
    return ((0.3053,), (0.3761,)), (x[train], y[train]), (x[test], y[test])


def synthetic(config: DataConfig) -> Raw:
    """Ten fixed patterns under noise: needs nothing, and a network that works learns it within an epoch."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    patterns = torch.randn(10, 3, 32, 32, generator=generator)
    y = torch.arange(2048 + 512) % 10
    noise = torch.randn(len(y), 3, 32, 32, generator=generator)
    x = (128 + 24 * patterns[y] + 36 * noise).clamp_(0, 255).to(torch.uint8)
    return RGB, (x[:2048], y[:2048]), (x[2048:], y[2048:])


def _imagefolder(
    root: Path, config: DataConfig, unreadable: dict[str, str], quiet: bool
) -> tuple[Split, Split, list[int], int]:
    """<root>/train and <root>/val, or test."""
    held = next((root / part for part in ("val", "test") if (root / part).is_dir()), None)
    if held is None or not (root / "train").is_dir():
        raise ConfigError(f'data.name = "{config.name}": {root} should have folders train/ and val/ (or test/).')
    import torchvision

    from train.images import Folder

    try:
        files = [torchvision.datasets.ImageFolder(str(folder)) for folder in (root / "train", held)]
    except FileNotFoundError as error:
        raise ConfigError(f'data.name = "{config.name}": {error}') from None
    if files[0].classes != files[1].classes:
        raise ConfigError(f'data.name = "{config.name}": {root}/train and {held} have different classes.')
    options = {"size": config.image_size, "workers": config.workers, "on_error": config.on_error, "unreadable": unreadable}
    train, test = (Folder(part, range(len(part)), **options) for part in files)
    if config.check:
        train, test = train.check(quiet=quiet), test.check(quiet=quiet)
    return train, test, [3, config.image_size, config.image_size], len(files[0].classes)
