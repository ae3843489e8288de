# SPDX-License-Identifier: Apache-2.0
"""Types of values on the command line: argparse calls them, and prints what they raise."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from trtdet.engine.options import MOST_IMAGES
from trtdet.runtimes import options
from trtdet.runtimes.options import TritonUrl
from trtdet.spec import LARGEST_SIDE, MOST_BOXES

#: Bounds of options: beyond them nobody means it, and memory is gone before anything can be said.
#: Threads: some hundred cores are the most a machine has, and 32,000 threads take 17 GB.
MOST_THREADS = 1024
#: What counts anything else: 32 bits, as TensorRT and Triton have.
LARGEST_COUNT = 2**31 - 1
#: Seconds: more than a month, and what Python's clocks still take.
LONGEST_S = 1e7
#: Characters of a wrong value that are shown.
SHOWN = 60

T = TypeVar("T")
N = TypeVar("N", int, float)


def _argument(parse: Callable[[str], T], text: str) -> T:
    """What `parse` makes of a text; argparse prints what is wrong with it."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_devices(text: str) -> tuple[int, ...] | Literal["all"]:
    """argparse type: "all", or GPU numbers separated by commas."""
    return _argument(options.parse_devices, text)


def parse_url(text: str) -> TritonUrl:
    """argparse type: a model on a server."""
    return _argument(options.parse_url, text)


def _number(
    text: str, convert: Callable[[str], N], within: Callable[[N], bool], expected: str
) -> N:
    """A number of a text; NaN is within no range."""
    try:
        value = convert(text)
    except ValueError:
        value = None
    if value is None or not within(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text[:SHOWN]!r}")
    return value


def _whole(text: str, low: int, high: int, why: str = "") -> int:
    """A whole number of a text, in the digits that every program takes; `why` is the reason of
    the upper bound.
    """
    value = int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else None
    if value is not None and low <= value <= high:
        return value
    too_small = value is not None and value < low
    expected = f"of at least {low}" if too_small else f"from {low} to {high}{why}"
    raise argparse.ArgumentTypeError(f"expected a whole number {expected}, got {text[:SHOWN]!r}")


def unit_interval(text: str) -> float:
    """argparse type: a number from 0 to 1."""
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def positive_unit_interval(text: str) -> float:
    """argparse type: a number above 0, up to 1."""
    value = unit_interval(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, up to 1, got {text!r}")
    return value


def parse_classes(text: str) -> tuple[str, ...]:
    """argparse type: "person,traffic light" -> its names, without spaces around them."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"expected names such as person,car, got {text!r}")
    return names


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    return _whole(text, 1, LARGEST_COUNT)


def thread_count(text: str) -> int:
    """argparse type: a number of threads, or of what has a thread of its own."""
    return _whole(text, 1, MOST_THREADS, " (each is a thread with memory of its own)")


def batch_size(text: str) -> int:
    """argparse type: images in a batch."""
    return _whole(text, 1, MOST_IMAGES, " (a tensor has less than 2^31 elements)")


def side(text: str) -> int:
    """argparse type: pixels of a side of a picture."""
    return _whole(text, 1, LARGEST_SIDE, " pixels")


def box_count(text: str) -> int:
    """argparse type: detections per image."""
    return _whole(text, 1, MOST_BOXES, " (so many are kept for every image)")


def seed(text: str) -> int:
    """argparse type: the seed of a choice."""
    return _whole(text, 0, LARGEST_COUNT)


def dla_core(text: str) -> int:
    """argparse type: a DLA core of a Jetson."""
    return _whole(text, 0, 15)


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    return _number(
        text, float, lambda value: 0 < value <= LONGEST_S, f"a number above 0, up to {LONGEST_S:g}"
    )


def seconds(text: str) -> float:
    """argparse type: a time from the beginning of a video."""
    return _number(text, float, lambda value: 0 <= value <= LONGEST_S, f"a number from 0 to {LONGEST_S:g}")  # fmt: skip


def non_negative(text: str) -> float:
    """argparse type: a number of at least 0."""
    return _number(text, float, lambda value: 0 <= value < float("inf"), "a number of at least 0")


def non_negative_int(text: str) -> int:
    """argparse type: an integer of at least 0."""
    return _whole(text, 0, LARGEST_COUNT)


def parse_model(text: str) -> Path | TritonUrl:
    """argparse type: a file, or a URL with its scheme."""
    return parse_url(text) if "://" in text else Path(text)


def parse_page(text: str) -> Path:
    """argparse type: the name of an HTML file."""
    return _with_suffix(text, (".html", ".htm"))


def parse_plot(text: str) -> Path:
    """argparse type: the name of a picture that matplotlib can write."""
    return _with_suffix(text, (".png", ".svg", ".pdf"))


def _with_suffix(text: str, suffixes: tuple[str, ...]) -> Path:
    path = Path(text)
    if path.suffix.lower() not in suffixes:
        expected = " or ".join(suffixes)
        raise argparse.ArgumentTypeError(f"expected a name that ends in {expected}, got {text}")
    return path
