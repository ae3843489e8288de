# SPDX-License-Identifier: Apache-2.0
"""What can be asked of a build. Standard library only: the command lines read it."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from trtdet import checks
from trtdet.images.options import SIZE_FORM, parse_size
from trtdet.precision.options import Precision, Rest

#: More than the memory of any GPU: who asks for so much counts in MiB, as trtexec does.
MANY_GIB = 512
#: Images of a batch: with TensorRT's limit of 2^31 elements in a tensor, those of so many would be
#: 104 x 104 pixels.
MOST_IMAGES = 65_536

# --- options --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SizeRange:
    """Sizes of an engine's input, (height, width) each: smallest, the one it is tuned for,
    largest.
    """

    min: tuple[int, int]
    opt: tuple[int, int]
    max: tuple[int, int]

    def __post_init__(self) -> None:
        for low, best, high in zip(self.min, self.opt, self.max, strict=True):
            if not 1 <= low <= best <= high:
                raise ValueError(f"input sizes: expected 1 <= MIN <= OPT <= MAX, got {self}")


@dataclass(frozen=True)
class BatchRange:
    """Batch sizes of an engine: smallest, the one it is tuned for, largest."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(f"batch sizes: expected 1 <= MIN <= OPT <= MAX, got {self}")
        checks.whole("batch sizes", self.max, 1, MOST_IMAGES)

    def __str__(self) -> str:
        return str(self.opt) if self.min == self.max else f"{self.min},{self.opt},{self.max}"


@dataclass(frozen=True)
class BuildOptions:
    """What is asked of a build. None leaves the choice to the model or to TensorRT.

    Attributes:
        batch: None: the ONNX file's own batch size, 1 where it is dynamic.
        workspace_gib: scratch memory a layer may use.
        timing_cache: file to read and update.
        compute_capabilities: GPUs to build for, "8.9"; empty: the one that is here, or, for
            TensorRT-RTX, every one from 8.0 on.
        dla_core: run on this DLA core, with the GPU for what it cannot do.
        plugins: libraries with plugins that the model uses.
        version_compatible: runs on later TensorRT releases too.
        hardware_compatible: runs on every GPU from Ampere on.
        strip: without weights, to be refitted from the ONNX file.
        optimization_level: 0 (fast build) to 5 (fast engine).
        rest: with int8 and fp8, the precision of what is not in 8 bits.
        weak_typing: ask for precision by builder flags and, for int8, through a calibrator, where
            TensorRT still can.
        size: of the input, for a model that has no fixed one; None: the size that the ONNX file
            names.
    """

    precision: Precision = "fp16"
    batch: BatchRange | None = None
    workspace_gib: float | None = None
    timing_cache: Path | None = None
    compute_capabilities: tuple[str, ...] = ()
    dla_core: int | None = None
    plugins: tuple[Path, ...] = ()
    version_compatible: bool = False
    hardware_compatible: bool = False
    strip: bool = False
    optimization_level: int | None = None
    rest: Rest = "fp16"
    weak_typing: bool = False
    size: SizeRange | None = None


def parse_batch(text: str) -> BatchRange:
    """argparse type: "8", "1:4:8" or "1,4,8"."""
    try:
        sizes = [int(part) for part in three_parts(text)]
        return BatchRange(*(sizes * 3 if len(sizes) == 1 else sizes))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"expected N or MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX <= {MOST_IMAGES}, got {text[:60]!r}"
        ) from error


def parse_batch_range(text: str) -> BatchRange:
    """argparse type: "1,4,8" or "1:4:8"."""
    if len(three_parts(text)) != 3:
        raise argparse.ArgumentTypeError(f"expected MIN,OPT,MAX, got {text!r}")
    return parse_batch(text)


def three_parts(text: str) -> list[str]:
    """MIN, OPT and MAX of "MIN:OPT:MAX" or, where there are exactly three, "MIN,OPT,MAX"; else
    the one value that it is.
    """
    if ":" in text:
        return text.split(":")
    return text.split(",") if text.count(",") == 2 else [text]


def parse_sizes(text: str) -> SizeRange:
    """argparse type: a size, "320:640:1280" or "320x416:640:1280,1280"; of exactly three parts
    "320,640,1280" too.
    """
    try:
        sizes = [parse_size(part) for part in three_parts(text)]
        return SizeRange(*(sizes * 3 if len(sizes) == 1 else sizes))
    except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(
            f"expected SIZE or MIN:OPT:MAX with MIN <= OPT <= MAX, a size being {SIZE_FORM}, got {text[:60]!r}"
        ) from error


def parse_version(text: str) -> tuple[int, ...]:
    """argparse type: "10.13.3"."""
    if not re.fullmatch(r"\d{1,4}\.\d{1,4}\.\d{1,4}(\.\d{1,4})?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"expected X.Y.Z, such as 8.6.1, got {text!r}")
    return tuple(map(int, text.split(".")))


def parse_gib(text: str) -> float:
    """argparse type: a positive number."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a size in GiB above 0, got {text!r}")
    if value >= MANY_GIB:
        raise argparse.ArgumentTypeError(
            f"{text} GiB is more than any GPU has; did you mean MiB? {text} MiB is --workspace {value / 1024:g}"
        )
    return value
