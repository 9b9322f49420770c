"""Where images are found, how they are split, and that their order and augmentation disturb nothing."""

import gzip
import struct

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from train import data
from train.config import Data
from train.wording import ConfigError


def write_fashion_mnist(folder, *, images=12, shade=0, packed=True):
    """A tiny set in the real format; `shade` tells one folder from another."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in data.FASHION_MNIST:
        shape = (images, 28, 28) if "images" in name else (images,)
        values = np.full(shape, shade, np.uint8) if "images" in name else np.arange(images, dtype=np.uint8) % 10
        raw = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + values.tobytes()
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(raw) if packed else raw)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """$FQT_DATA, ./data and Debian's folder, all still empty."""
    monkeypatch.setenv("FQT_DATA", str(tmp_path / "given"))
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "debian")

    def refuse(*_, **__):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", refuse)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", refuse)
    return [tmp_path / "given", tmp_path / "data", tmp_path / "debian"]


def config(name, **keys):
    return Data(name=name, **keys)


def test_fashion_mnist_search_order(places):
    for place in reversed(places):
        write_fashion_mnist(place)
        assert data.find_fashion_mnist().resolve() == place


@pytest.mark.parametrize("inside", ["fashion-mnist", "fashion_mnist", "FashionMNIST/raw"])
@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_in_subfolders_packed_or_not(places, inside, packed):
    write_fashion_mnist(places[0] / inside, shade=255, packed=packed)
    loaded = data.load(config("fashion_mnist"))
    assert (loaded.shape, loaded.classes, len(loaded.train), len(loaded.test)) == ((1, 28, 28), 10, 12, 12)
    (x, y) = next(loaded.train.batches([[0, 1]]))
    assert x.shape == (2, 1, 28, 28)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    torch.testing.assert_close(x, torch.full_like(x, (1 - 0.2860) / 0.3530))


def test_fashion_mnist_incomplete_folder_is_passed_over(places):
    write_fashion_mnist(places[0])
    (places[0] / "t10k-labels-idx1-ubyte.gz").unlink()
    write_fashion_mnist(places[2])
    assert data.find_fashion_mnist() == places[2]


def test_fashion_mnist_path_is_the_only_place(places):
    write_fashion_mnist(places[0])
    with pytest.raises(ConfigError, match=r'data.path = "elsewhere": it should hold train-images'):
        data.load(config("fashion_mnist", path="elsewhere"))


def test_fashion_mnist_nowhere_names_three_remedies(places):
    with pytest.raises(ConfigError) as error:
        data.load(config("fashion_mnist"))
    for part in (str(places[0]), "no route to host", "apt-get install dataset-fashion-mnist", "FQT_DATA", "internet"):
        assert part in str(error.value)


def test_fashion_mnist_is_downloaded_where_there_is_none(places, monkeypatch, tmp_path):
    def download(root, download):
        assert download
        write_fashion_mnist(tmp_path / root / "FashionMNIST" / "raw")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", download)
    assert len(data.load(config("fashion_mnist")).train) == 12


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"not gzip at all",
        lambda raw: gzip.compress(gzip.decompress(raw)[:-1]),
        lambda raw: gzip.compress(b"\0\0\x0d\3" + gzip.decompress(raw)[4:]),
        lambda raw: gzip.compress(b"\0"),
        lambda raw: b"",
    ],
    ids=["cut", "other", "short", "kind", "header", "empty"],
)
def test_damaged_idx_file_is_named(places, damage):
    write_fashion_mnist(places[0])
    path = places[0] / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=f"{path} is not an idx file.*delete it and fetch it again"):
        data.load(config("fashion_mnist"))


def write_folder(root, parts, classes, *, size=(32, 32), images=2):
    for part in parts:
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for index in range(images):
                Image.new("RGB", size, (20 * label, 0, 0)).save(root / part / name / f"{index}.png")


def test_cifar10_from_an_image_folder(places):
    write_folder(places[0] / "cifar10", ["train", "test"], [f"class{i}" for i in range(10)])
    loaded = data.load(config("cifar10"))
    assert (loaded.shape, loaded.classes, len(loaded.train), len(loaded.test)) == ((3, 32, 32), 10, 20, 20)
    (x, y) = next(loaded.test.batches([[6, 7]]))
    assert y.tolist() == [3, 3]
    torch.testing.assert_close(x[:, 0], torch.full((2, 32, 32), (60 / 255 - 0.485) / 0.229))


def test_cifar10_mistakes(places):
    with pytest.raises(ConfigError, match=r"cannot download it \(no route to host\).*FQT_DATA"):
        data.load(config("cifar10"))
    with pytest.raises(ConfigError, match=r'data.path = "elsewhere": it should hold cifar-10-batches-py/'):
        data.load(config("cifar10", path="elsewhere"))
    (places[0] / "cifar-10-batches-py").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"cifar-10-batches-py is damaged.*fetch it again"):
        data.load(config("cifar10"))
    write_folder(places[1], ["train", "test"], ["one", "two"])
    with pytest.raises(ConfigError, match="has 2 folders: cifar10 needs one a class, ten"):
        data.load(config("cifar10", path="data"))


def test_imagefolder_in_a_worker(tmp_path):
    write_folder(tmp_path / "set", ["train", "val"], ["cat", "dog", "owl"], size=(40, 50))
    loaded = data.load(config("imagefolder:set", image_size=24, workers=1, augment="crop_flip"))
    assert (loaded.shape, loaded.classes, len(loaded.train), len(loaded.test)) == ((3, 24, 24), 3, 6, 6)
    before = torch.get_rng_state()
    batches = list(loaded.train.batches([[0, 1], [2, 3]], loaded.augmentation(0, 0)))
    assert torch.equal(torch.get_rng_state(), before), "a worker's seed came from the training's generator"
    assert [x.shape for x, _ in batches] == [(2, 3, 24, 24)] * 2
    (_, y) = next(loaded.test.batches([[0, 2, 4]]))
    assert y.tolist() == [0, 1, 2]


def test_imagefolder_mistakes(tmp_path):
    with pytest.raises(ConfigError, match=r'"imagefolder:set": set should have folders train/ and val/'):
        data.load(config("imagefolder:set"))
    write_folder(tmp_path / "set", ["train"], ["cat", "dog"])
    write_folder(tmp_path / "set", ["test"], ["cat", "owl"])
    with pytest.raises(ConfigError, match="different classes"):
        data.load(config("imagefolder:set"))
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "empty" / "val").mkdir()
    with pytest.raises(ConfigError, match="imagefolder:empty"):
        data.load(config("imagefolder:empty"))


@pytest.mark.parametrize(("name", "counts"), [("digits", (1500, 297)), ("synthetic", (2048, 512))])
def test_sets_that_need_nothing(name, counts):
    loaded = data.load(config(name))
    assert (len(loaded.train), len(loaded.test)) == counts
    (x, y) = next(loaded.train.batches([range(len(loaded.train))]))
    assert set(y.tolist()) == set(range(10))
    if name == "digits":
        torch.testing.assert_close(torch.stack([x.mean(), x.std()]), torch.tensor([0.0, 1.0]), atol=0.01, rtol=0)


def fingerprints(split):
    (x, _) = next(split.batches([range(len(split))]))
    return {image.numpy().tobytes() for image in x}


def test_held_out_images_are_apart_and_always_the_same():
    whole = data.load(config("synthetic"))
    loaded = data.load(config("synthetic", validation=0.25, limit=1000))
    assert (len(loaded.valid), len(loaded.train), whole.valid) == (512, 1000, None)
    assert not fingerprints(loaded.valid) & fingerprints(loaded.train)
    assert fingerprints(loaded.valid) | fingerprints(loaded.train) <= fingerprints(whole.train)
    assert fingerprints(data.load(config("synthetic", validation=0.25)).valid) == fingerprints(loaded.valid)
    (_, y) = next(loaded.train.batches([range(1000)]))
    assert y.bincount().min() > 70, "the first images of the file would do too, were they not shuffled"


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"limit": 1501}, "data.limit = 1501: there are 1500 images to train on"),
        ({"limit": 1400, "validation": 0.1}, "data.limit = 1400: there are 1350"),
        ({"validation": 0.0001}, "data.validation = 0.0001: of 1500 images that is 0"),
        ({"validation": 0.9999}, "data.validation = 0.9999: of 1500 images that is 1500"),
    ],
)
def test_impossible_splits(keys, wanted):
    with pytest.raises(ConfigError, match=wanted):
        data.load(config("digits", **keys))


def test_chunks_cover_an_epoch_once_over_all_ranks():
    ranks = [data.chunks(103, 5, seed=1, epoch=2, rank=rank, world=2) for rank in range(2)]
    seen = [index for chunks in ranks for chunk in chunks for index in chunk]
    assert len(seen) == len(set(seen)) == 100
    assert all(len(chunk) == 5 for chunks in ranks for chunk in chunks)
    orders = {str(data.chunks(103, 5, seed=seed, epoch=epoch)) for seed in (1, 2) for epoch in (0, 1)}
    assert len(orders) == 4


def test_augmentation_depends_on_seed_epoch_and_image_alone():
    loaded = data.load(config("synthetic", augment="crop_flip"))

    def images(order, *key):
        return torch.cat([x for x, _ in loaded.train.batches(order, loaded.augmentation(*key) if key else None)])

    alone = [[index] for index in range(8)]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = images(alone, 0, 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(images([list(range(8))[::-1]], 0, 1).flip(0), first)
    for key in ((), (0, 2), (1, 1)):
        assert not torch.equal(images(alone, *key), first)


def test_flip_is_a_mirror_or_nothing():
    loaded = data.load(config("synthetic", augment="flip"))
    (plain, _) = next(loaded.train.batches([range(64)]))
    (changed, _) = next(loaded.train.batches([range(64)], loaded.augmentation(0, 0)))
    same = (changed == plain).flatten(1).all(1)
    mirrored = (changed == plain.flip(3)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert same.any()
    assert mirrored.any()
