# SPDX-License-Identifier: Apache-2.0
"""What the kernel `place_images` is told: a row per image, and what all images have in common.

Nothing here needs a GPU.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL

from trtdet.images.options import Resample
from trtdet.machine import parse_version
from trtdet.spec import Preprocessing

SOURCE = Path(__file__).with_name("place_images.cu")
NAME = "place_images"
_PILLOW = parse_version(PIL.__version__)
#: Threads of a block, width and height.
BLOCK = (32, 8)
#: Bits of `how`, as the kernel has them.
FLOAT32, PLANES, CORNER, ANTIALIAS = 1, 2, 4, 8
#: `struct Image` of the kernel.
ROW = np.dtype(
    [
        ("source", np.uint64),
        ("target", np.uint64),
        *((name, np.int32) for name in ("height", "width", "pitch", "top", "left", "rows", "columns", "height_first")),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """What the images of a launch have in common.

    Attributes:
        size_hw: of the network input.
        how: bits: type, layout, and how pixels are found.
        pad_rgb: the padding colour.
    """

    size_hw: tuple[int, int]
    how: int
    pad_rgb: tuple[float, float, float]

    @classmethod
    def of(cls, preprocessing: Preprocessing, resample: Resample | None = None) -> "Launch":
        """For a preprocessing, and how images are scaled if not as the model was trained."""
        antialias = resample == "antialias" if resample else preprocessing.antialias
        how = FLOAT32 * (preprocessing.dtype == "float32") | PLANES * (preprocessing.layout == "NCHW")  # fmt: skip
        if antialias:
            how |= ANTIALIAS
        elif preprocessing.sampling == "corner":
            how |= CORNER
        color = np.asarray(preprocessing.pad_rgb, np.float32)
        red, green, blue = np.rint(color) if preprocessing.dtype == "uint8" else color
        return cls(preprocessing.size_hw, how, (float(red), float(green), float(blue)))

    def grid(self, images: int) -> tuple[int, int, int]:
        """Blocks of the launch."""
        height, width = self.size_hw
        return -(-width // BLOCK[0]), -(-height // BLOCK[1]), images


def height_first(source_hw: tuple[int, int], placed_hw: tuple[int, int]) -> bool:
    """Whether Pillow's antialiased resize begins with the height: from 13 on, where that loses more
    than twice the pixels of the width (measured; python-pillow/Pillow#9549). Before, never.
    """
    height, width = source_hw
    rows, columns = placed_hw
    return _PILLOW >= (13,) and height > rows and height - rows > 2 * (width - columns)
