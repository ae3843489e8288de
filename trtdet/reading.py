# SPDX-License-Identifier: Apache-2.0
"""JSON from outside as frozen dataclasses: the one place where types, lengths, depth and the schema
are checked.

Ranges are checked by the dataclasses themselves (`__post_init__`, with `trtdet.checks`). A class
with a `SCHEMA` is read only from an object whose "schema" is that number; `JSON_NAMES` are names in
the file that differ from those of the fields. Fields that a class does not have are passed over.
docs/design.md says why this is msgspec.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from trtdet import files
from trtdet.checks import shown

T = TypeVar("T")


class OtherSchemaError(ValueError):
    """A file of another schema number: it is not damaged, but of another version of this
    project.
    """


BOM = b"\xef\xbb\xbf"

#: msgspec's names of types, in words.
_WORDS = {
    "int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "array": "a list", "object": "an object",
    "null": "null",
}  # fmt: skip


def read(
    path: Path, kind: type[T] | Any, *, remedy: str, error: type[Exception] = ValueError
) -> T | Any:
    """Read a JSON file as a `kind`.

    Args:
        kind: a dataclass, or anything else that msgspec takes.
        remedy: what to do where it is none, for the end of the message.

    Raises:
        OSError: not readable.
        ValueError, or `error`: it is none; says the file, the place in it, what was expected and
            found.
    """
    return parse(files.read_bytes(path), kind, name=str(path), remedy=remedy, error=error)


def parse(
    data: bytes | str,
    kind: type[T] | Any,
    *,
    name: str,
    remedy: str,
    error: type[Exception] = ValueError,
) -> T | Any:
    """The same of JSON that is there; `name` says in messages where it is from."""
    import msgspec.json

    data = data.removeprefix("\ufeff") if isinstance(data, str) else data.removeprefix(BOM)
    if not _has_schema(kind):  # straight from bytes: half the time, which counts for annotations
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.DecodeError, RecursionError, ValueError):
            pass  # by way of Python's objects, where the place can be named, and NaN that nobody looks at is no fault
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        found = json.loads(text)
    except RecursionError:
        raise error(f"{name}: {_TOO_DEEP}; {remedy}") from None
    except ValueError as reason:  # JSONDecodeError, UnicodeDecodeError, a number of 5000 digits
        raise error(f"{name}: expected JSON in UTF-8, found something else ({reason}); {remedy}") from reason  # fmt: skip
    return convert(found, kind, name=name, remedy=remedy, error=error)


def convert(
    data: Any, kind: type[T] | Any, *, name: str, remedy: str, error: type[Exception] = ValueError
) -> T | Any:
    """The same of JSON that `json` has read."""
    import msgspec

    place = ""
    renamed = getattr(kind, "JSON_NAMES", {})
    try:
        if renamed and isinstance(data, dict):
            data = {renamed.get(key, key): value for key, value in data.items()}
        _check_schema(data, kind, "")
        return msgspec.convert(data, kind)
    except RecursionError:
        raise error(f"{name}: {_TOO_DEEP}; {remedy}") from None
    except msgspec.ValidationError as reason:
        message, _, path = str(reason).partition(" - at ")
        steps = re.findall(r"\.(\w+)|\[(\d+)\]|(\[\.\.\.\])", re.sub(r"^`key` in ", "", path))
        place, value, expected = _locate(data, kind, steps)
        text = _message(message, value, expected)
    except UnicodeEncodeError:  # half of a surrogate pair, which json takes
        text = "expected valid Unicode"
    except ValueError as reason:
        text = str(reason)
        if error is ValueError and isinstance(reason, OtherSchemaError):
            error = OtherSchemaError
    for there, here in renamed.items():
        place = re.sub(rf"^{here}\b", there, place)
        text = re.sub(rf"^{here}\b|(?<=^expected '){here}(?=')", there, text)
    raise error(": ".join(part for part in (name, place, f"{text}; {remedy}") if part))


_TOO_DEEP = "expected plain JSON, found lists or objects inside one another, too deep to read"


def _has_schema(kind: Any) -> bool:
    return hasattr(kind, "SCHEMA")


def _check_schema(data: Any, kind: Any, place: str) -> None:
    """Find out before anything else whether an object, or one within, is of another schema: its
    fields may be others.

    Raises:
        ValueError: names the place.
    """
    if not dataclasses.is_dataclass(kind):
        return
    if (schema := getattr(kind, "SCHEMA", None)) is not None:
        found = data.get("schema") if isinstance(data, dict) else data
        if isinstance(found, bool) or found != schema:
            other = OtherSchemaError if isinstance(data, dict) and isinstance(found, int) else ValueError  # fmt: skip
            raise other(f"{place}{': ' if place else ''}expected schema {schema}, found {shown(found)}")  # fmt: skip
    if isinstance(data, dict):
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if _has_schema(hints[field.name]) and field.name in data:
                _check_schema(data[field.name], hints[field.name], field.name)


def _locate(data: Any, kind: Any, steps: list[tuple[str, str, str]]) -> tuple[str, Any, Any]:
    """The place that msgspec names by steps, in words, the value there and the type it should
    have.
    """
    place = ""
    for name, index, _ in steps:
        if name:
            data = data.get(name)
            kind = get_type_hints(_of_kind(kind, dataclasses.is_dataclass)).get(name, Any)
            place += f".{name}"
        elif index:
            data = data[int(index)]
            items = get_args(_of_kind(kind, lambda k: get_origin(k) in (list, tuple)))
            kind = items[int(index)] if int(index) < len(items) and items[-1:] != (...,) else (*items, Any)[0]  # fmt: skip
            place += f"[{index}]"
        else:  # a value of a mapping, whose key msgspec leaves out
            kind = (*get_args(_of_kind(kind, lambda k: get_origin(k) is dict)), Any, Any)[1]
            key, data = next((k, v) for k, v in [*data.items(), ("", None)] if not _is(v, kind))
            place += f"[{shown(key)}]"
    return place.removeprefix("."), data, kind


def _is(value: Any, kind: Any) -> bool:
    import msgspec

    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


def _of_kind(kind: Any, fits: Any) -> Any:
    """The member of a union that fits; the type itself where it is none."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return next((member for member in members if fits(member)), kind)


def _message(message: str, value: Any, kind: Any) -> str:
    """msgspec's message in the words of this project."""
    if match := re.fullmatch(r"Expected (.+?)(?:, got .+)?", message):
        words = re.sub(r"[a-z]+", lambda m: _WORDS.get(m[0], m[0]), match[1].split("`")[1])
        rest = match[1].rpartition("`")[2]
        words = words.replace("a whole number | a number", "a number").replace(" | ", " or ")
        return f"expected {words}{rest}, found {shown(value)}"
    if match := re.fullmatch(r"Object missing required field `(\w+)`", message):
        return f"expected '{match[1]}', found no field of that name"
    if "enum value" in message:
        choice = _of_kind(kind, lambda k: get_origin(k) is Literal)
        words = " or ".join(map(str, (*get_args(choice),) if choice is not NoneType else ()))
        return f"expected {words}, found {shown(value)}"
    if "out of range" in message:
        return f"expected a smaller number, found {shown(value)}"
    return message
