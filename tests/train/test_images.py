"""Image files: all kinds load as a person expects, and one that cannot be read is named, or left out and listed."""

import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from train import data, images
from train.config import Data, parse
from train.loop import run
from train.wording import ConfigError, RankError, TrainingError

RAMP = np.linspace(0, 65535, 256).round().astype(np.uint16)


def write_set(root, *, count=8, classes=("cat", "dog"), parts=("train", "val")):
    generator = np.random.default_rng(0)
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (20, 24, 3), np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{index}.jpg")


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>not found</html>"),
    "vanished": lambda path: path.unlink(),
}


def folder(root, **keys):
    return data.load(Data(name=f"imagefolder:{root}", image_size=16, **{"workers": 0, **keys}))


def test_grey_of_16_bits_is_scaled(tmp_path):
    for name, values in (("ramp.png", RAMP), ("ramp.tif", RAMP), ("wide.tif", RAMP.astype(np.int32))):
        Image.fromarray(np.tile(values, (4, 1))).save(tmp_path / name)
        loaded = np.asarray(images.decode(str(tmp_path / name)))
        assert loaded.shape == (4, 256, 3)
        assert np.array_equal(loaded[0, :, 1], np.arange(256)), name


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr"])
def test_every_mode_gives_the_colours_that_a_viewer_shows(tmp_path, mode):
    shown = (255, 255, 255) if mode in ("L", "1", "LA") else (200, 30, 90)
    name = tmp_path / f"image.{'tif' if mode in ('CMYK', 'YCbCr') else 'png'}"
    image = Image.new("RGB", (4, 4), shown)
    (image.quantize(4) if mode == "P" else image.convert(mode)).save(name)
    assert np.abs(np.asarray(images.decode(str(name))).astype(int) - shown).max() <= 3


def test_transparent_palettes_and_animations(tmp_path):
    frames = [Image.new("P", (4, 4), index) for index in (1, 2)]
    for frame in frames:
        frame.putpalette([0, 0, 0, 250, 10, 20, 10, 250, 20])
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(images.decode(str(tmp_path / "a.gif")))[0, 0].tolist() == [250, 10, 20]
    frames[0].save(tmp_path / "a.png", transparency=b"\x00\x80")
    assert np.asarray(images.decode(str(tmp_path / "a.png")))[0, 0].tolist() == [250, 10, 20]


@pytest.mark.parametrize(("values", "wanted"), [(np.float32([[0.5]]), "floats"), (np.int32([[70000]]), "more than 16 bits")])
def test_pixels_without_a_known_white_are_refused(tmp_path, values, wanted):
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=wanted):
        images.decode(str(tmp_path / "x.tif"))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", DAMAGE)
def test_an_image_that_cannot_be_read_is_named(tmp_path, how, workers):
    write_set(tmp_path)
    loaded = folder(tmp_path, workers=workers)
    bad = tmp_path / "train" / "dog" / "3.jpg"
    DAMAGE[how](bad)
    with pytest.raises(
        RankError, match=rf"1 image cannot be read: {bad} \(.+\)\. .*data.on_error=skip.*data.check=true"
    ) as error:
        list(loaded.train.batches([list(range(16))]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_in_training_and_left_out_in_evaluation(tmp_path, workers):
    write_set(tmp_path)
    for part, name in (("train", "cat/0.jpg"), ("train", "dog/5.jpg"), ("val", "cat/2.jpg")):
        DAMAGE["cut"](tmp_path / part / name)
    loaded = folder(tmp_path, workers=workers, on_error="skip")
    batches = [y.tolist() for _, y in loaded.train.batches([list(range(8)), list(range(8, 16))], whole=True)]
    assert [len(y) for y in batches] == [8, 8]
    assert [len(y) for _, y in loaded.test.batches([list(range(8)), list(range(8, 16))])] == [7, 8]
    assert sorted(path.split(os.sep)[-3:] for path in loaded.unreadable) == [
        ["train", "cat", "0.jpg"],
        ["train", "dog", "5.jpg"],
        ["val", "cat", "2.jpg"],
    ]
    assert all("truncated" in why for why in loaded.unreadable.values())


def test_a_batch_without_one_readable_image(tmp_path):
    write_set(tmp_path, count=2)
    for path in (tmp_path / "train").glob("*/*.jpg"):
        path.write_bytes(b"")
    loaded = folder(tmp_path, on_error="skip")
    with pytest.raises(TrainingError, match="none of the 2 images of a batch can be read; the last is .*train"):
        list(loaded.train.batches([[0, 1]], whole=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_check_finds_all_before_the_training(tmp_path, workers):
    write_set(tmp_path)
    bad = [tmp_path / "train" / "cat" / f"{index}.jpg" for index in range(6)]
    for path in bad:
        DAMAGE["empty"](path)
    with pytest.raises(TrainingError, match=r"6 images cannot be read: .*0.jpg .*4.jpg \(.*\) and 1 more"):
        folder(tmp_path, check=True, workers=workers)
    loaded = folder(tmp_path, check=True, workers=workers, on_error="skip")
    assert (len(loaded.train), len(loaded.test)) == (10, 16)
    assert loaded.unreadable.keys() == set(map(str, bad))


def tree(root, **keys):
    return {
        "model": {"name": "mlp_small"},
        "data": {"name": f"imagefolder:{root}", "image_size": 16, "batch_size": 8, "workers": 1, **keys},
        "tracking": {"baseline_steps": 0},
        "checkpoint": {"enabled": False},
        "device": "cpu",
    }


def test_a_run_counts_and_lists_what_it_left_out(tmp_path, capsys):
    write_set(tmp_path / "set")
    DAMAGE["cut"](tmp_path / "set" / "train" / "cat" / "1.jpg")
    DAMAGE["text"](tmp_path / "set" / "val" / "dog" / "1.jpg")
    result = run(parse(tree(tmp_path / "set", on_error="skip")))
    listed = [line.split("\t") for line in (result.folder / "unreadable.txt").read_text().splitlines()]
    assert [path for path, _ in listed] == [str(tmp_path / "set" / name) for name in ("train/cat/1.jpg", "val/dog/1.jpg")]
    assert "2 images could not be read and were left out" in capsys.readouterr().out
    assert result.test * 15 == pytest.approx(round(result.test * 15))


def test_a_worker_that_dies_is_told(tmp_path, monkeypatch):
    write_set(tmp_path / "set")
    main = os.getpid()

    def die(path):
        if os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(images, "decode", die)
    with pytest.raises(TrainingError, match="A process that decodes images died .*lower data.workers or data.image_size"):
        run(parse(tree(tmp_path / "set")))


def test_a_cifar10_picture_of_another_size_is_named(tmp_path):
    write_set(tmp_path / "cifar10", count=1, classes=[f"class{i}" for i in range(10)], parts=("train", "test"))
    with pytest.raises(ConfigError, match="class0/0.jpg is no image of 32x32 pixels .it has 24x20."):
        data.load(Data(name="cifar10", path=str(tmp_path)))


def test_labels_out_of_range_are_told_before_the_training(monkeypatch):
    def broken(config):
        x, y = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2, 12])
        return ((0.5,), (0.5,)), (x, y), (x, y)

    monkeypatch.setattr(data, "digits", broken)
    with pytest.raises(ConfigError, match="data.name = digits: it has labels from 0 to 12, and its 10 classes are 0 to 9"):
        data.load(Data(name="digits"))
