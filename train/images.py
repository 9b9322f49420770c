"""Images as files: found by class, decoded by worker processes, and named where they cannot be read.

A set of a million pictures from the web holds some that are cut, empty or no pictures at all. `data.on_error` says what a run
does with them: stop with the path, or go on without them, counted and listed.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from train.data import RGB, Augment, Batch
from train.wording import RankError

DAMAGE = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    OverflowError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for files that it cannot decode."""

Sample = tuple[Tensor | None, int, str]
"""An image x_CHW with its label, and an empty text; or no image, and the path with what is wrong with it."""


def decode(path: str) -> Image.Image:
    """An image file as 8-bit RGB: grey is repeated, 16-bit grey scaled, CMYK and palettes converted, transparency dropped,
    and of an animation the first picture taken. Raises one of DAMAGE where the file is no whole image.
    """
    with Image.open(path) as image:
        image.load()
        if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow's own conversion cuts at 255
            grey = np.asarray(image).astype(np.int64)
            if grey.min() < 0 or grey.max() > 0xFFFF:
                raise ValueError("its grey values need more than 16 bits")
            return Image.fromarray(((grey * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8)).convert("RGB")
        if image.mode == "F":
            raise ValueError("its pixels are floats, and nothing says which of them is white")
        return image.convert("RGBA" if "transparency" in image.info else "RGB").convert("RGB")


@dataclass(frozen=True)
class Folder(Dataset[Sample]):
    """Images as files, decoded by worker processes.

    on_error: "stop" or "skip". unreadable: what was left out so far, the reason by path; all splits of a set share it.
    """

    files: ImageFolder
    indices: Sequence[int]
    size: int
    workers: int
    on_error: str = "stop"
    augment: Augment | None = None
    unreadable: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        path, label = self.files.samples[self.indices[index]]
        try:
            x = functional.pil_to_tensor(decode(path))
        except DAMAGE as error:
            return None, label, f"{path}\t{' '.join(str(error).split()) or type(error).__name__}"
        if self.augment is not None:
            x = self.augment(x, self.indices[index])
        x = functional.center_crop(functional.resize(x, [self.size], antialias=True), [self.size, self.size])
        return functional.normalize(functional.to_dtype(x, torch.float32, scale=True), list(RGB[0]), list(RGB[1])), label, ""

    def take(self, indices: Sequence[int]) -> "Folder":
        return replace(self, indices=[self.indices[index] for index in indices])

    def batches(self, chunks: Sequence[list[int]], augment: Augment | None = None, *, whole: bool = False) -> Iterator[Batch]:
        for samples in self._load(replace(self, augment=augment), chunks):
            good = [(x, label) for x, label, _ in samples if x is not None]
            self._note([fault for *_, fault in samples if fault])
            if whole and not good:
                raise RankError(f"none of the {len(samples)} images of a batch can be read; the last is {samples[-1][2]}.")
            missing = len(samples) - len(good) if whole else 0
            good += [good[index % len(good)] for index in range(missing)]
            if good:
                images, labels = zip(*good, strict=True)
                yield torch.stack(images), torch.tensor(labels)

    def check(self, *, quiet: bool) -> "Folder":
        """Decodes every file once, with a progress bar, and returns the set without those that cannot be read.

        Raises RankError at the end, with all of them, where `on_error` is "stop".
        """
        chunks = [[index] for index in range(len(self))]
        faults: dict[int, str] = {}
        bar = tqdm(self._load(Probe(self), chunks), "checking images", len(self), leave=False, disable=quiet or None)
        for index, ((_, _, fault),) in enumerate(bar):
            if fault:
                faults[index] = fault
        self._note(list(faults.values()))
        return self.take([index for index in range(len(self)) if index not in faults])

    def _load(self, dataset: Dataset[Sample], chunks: Sequence[list[int]]) -> Iterator[list[Sample]]:
        """The samples of each chunk."""
        # a generator of its own, or the loader would draw its workers' seed from the one that governs quantization
        own = torch.Generator()
        yield from DataLoader(dataset, batch_sampler=chunks, num_workers=self.workers, generator=own, collate_fn=list)

    def _note(self, faults: Sequence[str]) -> None:
        """Remembers images that cannot be read, or stops because of them."""
        self.unreadable.update({path: why for path, _, why in (fault.partition("\t") for fault in faults)})
        if faults and self.on_error == "stop":
            named = "; ".join(fault.replace("\t", " (") + ")" for fault in faults[:5])
            more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise RankError(
                f"{len(faults)} image{'s' * (len(faults) > 1)} cannot be read: {named}{more}. Mend or remove the file, or set "
                "data.on_error=skip, which goes on without such images and lists them; data.check=true finds all of them "
                "before the training."
            )


@dataclass(frozen=True)
class Probe(Dataset[Sample]):
    """A folder's files, decoded for what is wrong with them alone."""

    folder: Folder

    def __getitem__(self, index: int) -> Sample:
        _, label, fault = self.folder[index]
        return None, label, fault
