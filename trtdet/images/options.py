# SPDX-License-Identifier: Apache-2.0
"""What can be asked of the preprocessing. Standard library only: the command lines read it."""

import argparse
from typing import Literal

from trtdet.spec import LARGEST_SIDE

#: Pixels of the longer side with --resize, as ODTK has it.
DEFAULT_MAX_SIZE = 1333
Resample = Literal["bilinear", "antialias"]
#: What decodes images.
Decode = Literal["auto", "cpu", "gpu"]

SIZE_FORM = "H,W or HxW, height first, or one number for a square"


def parse_size(text: str) -> tuple[int, int]:
    """argparse type: "512,640" and "512x640" -> (512, 640), height first; "512" -> (512, 512)."""
    try:
        sides = [int(side) for side in text.replace("x", ",").split(",")]
        height, width = sides * 2 if len(sides) == 1 else sides
    except ValueError:
        height = width = 0
    if height < 1 or width < 1:
        raise argparse.ArgumentTypeError(f"expected {SIZE_FORM}, got {text[:60]!r}")
    if max(height, width) > LARGEST_SIDE:
        raise argparse.ArgumentTypeError(
            f"expected sides of at most {LARGEST_SIDE} pixels, got {text[:60]!r}"
        )
    return height, width
