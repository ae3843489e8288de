# SPDX-License-Identifier: Apache-2.0
"""Ranges of values that come from files: checked where a dataclass is made, so once, whoever
makes it.
"""

import unicodedata
from typing import Any

#: Unicode's categories of characters that end lines, steer terminals or cannot be encoded: none of
#: them stands in a name.
_CONTROL = frozenset(("Cc", "Cs", "Zl", "Zp"))

#: Longest text of each kind, in characters.
NAME, LABEL, LONG_TEXT = 100, 256, 4096


def whole(name: str, value: int, low: int, high: int) -> None:
    """
    Raises:
        ValueError: `value` is not from `low` to `high`.
    """
    if not low <= value <= high:
        raise ValueError(f"{name}: expected a whole number from {low} to {high}, found {shown(value)}")  # fmt: skip


def finite(name: str, value: float, low: float = -1e6, high: float = 1e6) -> None:
    """
    Raises:
        ValueError: `value` is not from `low` to `high`; NaN is not.
    """
    if not low <= value <= high:
        raise ValueError(f"{name}: expected a number from {low:g} to {high:g}, found {shown(value)}")  # fmt: skip


def text(name: str, value: str, longest: int = NAME) -> None:
    """
    Raises:
        ValueError: `value` is longer, or has characters that end a line or steer a terminal: it may
            be written into other files.
    """
    if len(value) > longest:
        raise ValueError(f"{name}: expected at most {longest} characters, found {len(value)}")
    if not value.isprintable() and any(unicodedata.category(c) in _CONTROL for c in value):
        raise ValueError(f"{name}: expected text without control characters, found {shown(value)}")


def whole_number(name: str, value: float) -> int:
    """A whole number that a file may have written as 1.0.

    Raises:
        ValueError: it is none, or has more than 53 bits.
    """
    # An integer is compared as it is: one of 400 digits is no float.
    fits = -(2**53) < value < 2**53 and (isinstance(value, int) or value.is_integer())
    if not fits:
        raise ValueError(f"{name}: expected a whole number of at most 53 bits, found {shown(value)}")  # fmt: skip
    return int(value)


def shown(value: Any) -> str:
    """A value from a file for the reader of a message: on one line, short, whatever it is."""
    if isinstance(value, str):
        return ascii(value) if len(value) <= 60 else ascii(value[:57]) + "..."
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    return repr(value)[:60]
