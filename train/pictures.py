"""Pictures for TensorBoard: the bits of every layer over time as one heat map, and some images as the model gets them."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

COLOURS = ((8, (0, 104, 55), (166, 217, 106)), (16, (255, 237, 111), (244, 109, 67)), (32, (215, 48, 39), (103, 0, 31)))
"""(most bits, colour of the fewest, of the most): green is multiplied as bytes, yellow as 16-bit integers, red in float32."""
CELL, WIDTH, LABEL, HEAD = 14, 600, 190, 34


def heat_map(
    names: Sequence[str], steps: Sequence[int], panels: Mapping[str, Sequence[Sequence[int]]], *, last: int
) -> np.ndarray:
    """Layers x time, a panel a kind of bits; (H, W, 3) uint8.

    steps: when the bits became others. panels: by title, at each of these steps, every layer's bits. last: where time ends.
    """
    height = len(panels) * (HEAD + CELL * len(names)) + CELL
    picture = Image.new("RGB", (LABEL + WIDTH + 60, height), "white")
    draw = ImageDraw.Draw(picture)
    for number, (title, bits_at) in enumerate(panels.items()):
        top = number * (HEAD + CELL * len(names))
        draw.text((LABEL, top + 4), f"{title}, steps 0 to {last}", fill="black")
        _legend(draw, LABEL + 330, top + 2)
        for row, name in enumerate(names):
            y = top + HEAD + CELL * row
            draw.text((4, y + 1), name[-30:], fill="black")
            for start, end, bits in zip(steps, [*steps[1:], last], [bits[row] for bits in bits_at], strict=True):
                left, right = LABEL + WIDTH * start // last, LABEL + max(WIDTH * end // last, WIDTH * start // last + 1)
                draw.rectangle((left, y, right, y + CELL - 2), fill=colour(bits))
            draw.text((LABEL + WIDTH + 8, y + 1), str(bits_at[-1][row]), fill="black")
    return np.asarray(picture)


def _legend(draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
    for bits in range(1, 33):
        draw.rectangle((left + 8 * bits, top, left + 8 * bits + 7, top + 10), fill=colour(bits))
    for bits in (1, 8, 16, 32):
        draw.text((left + 8 * bits, top + 12), str(bits), fill="black")


def colour(bits: int) -> tuple[int, int, int]:
    """A colour for 1 to 32 bits, see `COLOURS`."""
    low = 0
    for high, fewest, most in COLOURS:
        if bits <= high:
            share = (bits - low - 1) / max(high - low - 1, 1)
            return tuple(round(a + share * (b - a)) for a, b in zip(fewest, most, strict=True))  # type: ignore[return-value]
        low = high
    raise ValueError(f"{bits} bits are more than 32")


def grid(images_NCHW: Tensor, most: int = 16) -> np.ndarray:
    """The first images side by side, each stretched from its darkest to its brightest value; (H, W, 3) uint8."""
    x_NCHW = images_NCHW[:most].float().cpu()
    low, high = x_NCHW.amin((1, 2, 3), keepdim=True), x_NCHW.amax((1, 2, 3), keepdim=True)
    x_NCHW = 255 * (x_NCHW - low) / (high - low).clamp(min=1e-12)
    rows = x_NCHW.expand(-1, 3, -1, -1) if x_NCHW.shape[1] == 1 else x_NCHW[:, :3]
    return np.concatenate([image.permute(1, 2, 0).byte().numpy() for image in rows], axis=1)
