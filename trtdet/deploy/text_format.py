# SPDX-License-Identifier: Apache-2.0
"""Protobuf's text format, as Triton and nvinferserver read it: written from dicts; read with a
table of fields.

A message is a dict. A list of dicts is a repeated message, a list of anything else a bracketed
list. `Word` is an enum value.
"""

import json
from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format


class Word(str):
    """A bare word: the name of an enum value."""


def dumps(message: Mapping[str, Any], *, indent: str = "") -> str:
    """A message as text, one field a line."""
    lines = []
    for key, value in message.items():
        if isinstance(value, Mapping):
            lines.append(_block(key, value, indent))
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines += [_block(key, item, indent) for item in value]
        elif isinstance(value, list):
            lines.append(f"{indent}{key}: [ {', '.join(map(_scalar, value))} ]\n")
        else:
            lines.append(f"{indent}{key}: {_scalar(value)}\n")
    return "".join(lines)


def _block(key: str, message: Mapping[str, Any], indent: str) -> str:
    return f"{indent}{key} {{\n{dumps(message, indent=indent + '  ')}{indent}}}\n"


def _scalar(value: object) -> str:
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # its escapes are those of the text format
    return repr(value)


#: Message -> field -> type: a protobuf scalar, a message or an enum of the table; "repeated X",
#: "map int32 X".
Table = Mapping[str, Mapping[str, str]]


def parse(text: str, message: str, messages: Table, enums: Mapping[str, list[str]]) -> Any:
    """Parse `text` as `message` of a schema given as tables; field numbers, which text does not
    show, are made up.

    Raises:
        google.protobuf.text_format.ParseError: with line and column, what the schema does not know
            or wants otherwise.
    """
    package = "trtdet.schema"
    file = descriptor_pb2.FileDescriptorProto(name="schema.proto", package=package, syntax="proto3")
    for name, values in enums.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in messages.items():
        made = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields.items(), 1):
            _add_field(made, field, number, kind, f".{package}.", messages, enums)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    made_class = message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{message}"))
    return text_format.Parse(text, made_class())


def _add_field(
    message: Any,
    name: str,
    number: int,
    kind: str,
    prefix: str,
    messages: Table,
    enums: Mapping[str, list[str]],
) -> None:
    kinds = descriptor_pb2.FieldDescriptorProto
    *shape, kind = kind.split(" ")
    field = message.field.add(name=name, number=number, label=kinds.LABEL_OPTIONAL)
    if shape:
        field.label = kinds.LABEL_REPEATED
    if shape[:1] == ["map"]:  # protobuf's own form of a map: repeated entries of key and value
        entry_name = "".join(part.capitalize() for part in name.split("_")) + "Entry"
        entry = message.nested_type.add(name=entry_name)
        entry.options.map_entry = True
        _add_field(entry, "key", 1, shape[1], prefix, messages, enums)
        _add_field(entry, "value", 2, kind, prefix, messages, enums)
        field.type, field.type_name = kinds.TYPE_MESSAGE, f"{prefix}{message.name}.{entry_name}"
    elif kind in messages or kind in enums:
        field.type = kinds.TYPE_MESSAGE if kind in messages else kinds.TYPE_ENUM
        field.type_name = prefix + kind
    else:
        field.type = getattr(kinds, f"TYPE_{kind.upper()}")
