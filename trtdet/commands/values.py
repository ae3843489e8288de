# SPDX-License-Identifier: Apache-2.0
"""Types of values on the command line: argparse calls them, and prints what they raise."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from trtdet.runtimes import options
from trtdet.runtimes.options import TritonUrl

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
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


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
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def non_negative(text: str) -> float:
    """argparse type: a number of at least 0."""
    return _number(text, float, lambda value: value >= 0, "a number of at least 0")


def non_negative_int(text: str) -> int:
    """argparse type: an integer of at least 0."""
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


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
