# SPDX-License-Identifier: Apache-2.0
"""What nvinfer, nvinferserver and deepstream-app would refuse in a folder, or take and do wrong,
found without DeepStream.

Keys and their types are those that DeepStream 9.1 reads (`assets/nvinfer_keys.json`,
`assets/nvinferserver_fields.json`); what they must say follows from the sidecar of the engine they
name. nvinfer itself only prints a line for a key that it does not know.
"""

import configparser
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trtdet import files
from trtdet.deploy import text_format, triton
from trtdet.deploy.deepstream import (
    APP_FILE,
    NETWORK_MODES,
    PARSER_LIBRARY,
    SERVER_FILE,
    parser_function,
)
from trtdet.deploy.model import Deployable, open_engine, open_onnx
from trtdet.errors import EngineError, GraphError
from trtdet.spec import OUTPUT_NAMES

Groups = dict[str, dict[str, str]]

_READERS: dict[str, Callable[[str], object]] = {"int": int, "float": float, "string": str}
_READERS["bool"] = lambda text: {"0": False, "1": True, "false": False, "true": True}[text]


def check_folder(folder: Path) -> list[str]:
    """Every fault of a folder, one line each.

    Raises:
        FileNotFoundError: no configuration in it.
    """
    configs = sorted([*folder.glob("config_infer*.txt"), *folder.glob("config_infer*.yml")])
    if not configs:
        raise FileNotFoundError(f"{folder}: expected DeepStream's config_infer*.txt, found none")
    problems = []
    for path in configs:
        problems += _faults_of(
            path, _server_faults if path.name == SERVER_FILE else _nvinfer_faults
        )
    if os.path.lexists(folder / APP_FILE):
        problems += _faults_of(folder / APP_FILE, _app_faults)
    return problems


def _faults_of(path: Path, check: Callable[[Path], Iterator[str]]) -> list[str]:
    """What a check finds, or why the file cannot be read; each names the file."""
    try:
        return [f"{path}: {fault}" for fault in check(path)]
    except (OSError, ValueError) as error:
        text = files.message_of(error)
        return [text if str(path) in text else f"{path}: {text}"]


def _table(name: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(triton.asset(name))
    return table


def read_groups(path: Path) -> Groups:
    """An nvinfer or deepstream-app configuration, INI or YAML, as text by group and key.

    Raises:
        ValueError: not of that form.
    """
    text = files.read_text(path)
    if path.suffix in (".yml", ".yaml"):
        return _read_yaml(text)
    parser = configparser.RawConfigParser(delimiters=("=",), comment_prefixes=("#",), strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    try:
        parser.read_string(text)
    except configparser.Error as error:
        raise ValueError(f"not a key file: {error}") from error
    return {name: dict(parser[name]) for name in parser.sections()}


def _read_yaml(text: str) -> Groups:
    """The YAML that nvinfer's files are: groups of scalars."""
    groups: Groups = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split(" #")[0].rstrip()
        if not line or line.startswith("#"):
            continue
        if match := re.fullmatch(r"([\w-]+):", line):
            group = groups.setdefault(match[1], {})
        elif groups and (match := re.fullmatch(r"\s+([\w-]+):\s+(.*)", line)):
            group[match[1]] = match[2].strip("'\"")
        else:
            raise ValueError(f"line {number}: expected 'group:' or '  key: value', found {line!r}")
    return groups


def _nvinfer_faults(path: Path) -> Iterator[str]:
    table = _table("nvinfer_keys.json")
    try:
        groups = read_groups(path)
    except ValueError as error:
        yield str(error)
        return
    properties = groups.get("property")
    if properties is None:
        yield "expected a group 'property', found none"
        return
    left_out = table["not in YAML"] if path.suffix in (".yml", ".yaml") else ()
    for name, group in groups.items():
        kind = "class-attrs" if name.startswith("class-attrs-") else name
        if kind not in ("property", "class-attrs"):
            yield f"group '{name}' is unknown to nvinfer {table['nvinfer']}"
            continue
        for key, value in group.items():
            if key not in table[kind] or key in left_out:
                yield f"[{name}] {key}: unknown to nvinfer {table['nvinfer']}, which would go on without it"
            elif fault := _value_fault(value, table[kind][key], table["choices"].get(key)):
                yield f"[{name}] {key}: {fault}"
    yield from _class_faults(groups, properties)
    built_there = "onnx-file" in properties  # nvinfer writes the engine when it first starts
    for key in ("labelfile-path", "onnx-file" if built_there else "model-engine-file"):
        if key not in properties:
            yield f"[property] {key}: expected, found none"
        elif not (path.parent / properties[key]).is_file():
            yield f"[property] {key}: expected a file, found nothing at {properties[key]}"
    yield from _library_faults(path.parent, properties.get("custom-lib-path", ""))
    yield from _against_engine(path.parent, properties)


def _value_fault(value: str, kind: str, choices: list[int] | None) -> str | None:
    parts = value.rstrip(";").split(";") if kind.endswith("s") else [value]
    try:
        read = [_READERS[kind.rstrip("s")](part.strip()) for part in parts]
    except (ValueError, KeyError):
        return f"expected {kind}, found {value!r}"
    if choices and read[0] not in choices:
        return f"expected one of {choices}, found {value}"
    return None


def _class_faults(groups: Groups, properties: Mapping[str, str]) -> Iterator[str]:
    classes = _number(properties, "num-detected-classes")
    for name in groups:
        suffix = name.removeprefix("class-attrs-")
        if suffix not in (name, "all") and not (suffix.isdecimal() and int(suffix) < classes):
            yield f"group '{name}': expected 'all' or a class id below num-detected-classes {classes}; nvinfer would not start"


def _number(properties: Mapping[str, str], key: str) -> int:
    """A key's whole number, 0 where it is missing or something else, which is reported by its
    type.
    """
    value = properties.get(key, "")
    return int(value) if value.isdecimal() else 0


def _library_faults(folder: Path, library: str) -> Iterator[str]:
    path = folder / library
    if not library or not (path.is_file() or (path.parent / "Makefile").is_file()):
        yield f"the parser's library: expected {PARSER_LIBRARY}, or the Makefile for it, found '{library}'"


def _open(path: Path) -> Deployable | str:
    try:
        return open_onnx(path) if path.suffix.lower() == ".onnx" else open_engine(path)
    except (GraphError, EngineError, OSError) as error:
        return f"the model cannot be compared: {error}"


def _against_engine(folder: Path, properties: Mapping[str, str]) -> Iterator[str]:
    """What the keys must say for the engine they name, or the ONNX file that it is built of."""
    engine = folder / (properties.get("onnx-file") or properties.get("model-engine-file", ""))
    if not engine.is_file():
        return
    model = _open(engine)
    if isinstance(model, str):
        yield model
        return
    spec = model.spec
    preprocessing = spec.preprocessing
    if preprocessing.dtype != "float32":
        yield f"the engine takes {preprocessing.dtype}; nvinfer feeds float32 whatever it takes: convert with --input_dtype float32"
    height, width = preprocessing.size_hw
    letterbox = preprocessing.resize == "letterbox"
    expected: dict[str, object] = {
        "infer-dims": f"3;{height};{width}",
        "network-input-order": 0 if preprocessing.layout == "NCHW" else 1,
        "model-color-format": 0,
        "net-scale-factor": 1.0,
        "offsets": "0;0;0",
        "maintain-aspect-ratio": int(letterbox),
        "symmetric-padding": int(letterbox and preprocessing.placement == "center"),
        "num-detected-classes": spec.num_classes,
        "cluster-mode": 4,
        "output-blob-names": ";".join(OUTPUT_NAMES),
        "parse-bbox-func-name": parser_function(spec),
    }
    if model.engine is None:
        expected["network-mode"] = NETWORK_MODES.get(model.precision, 0)
        expected |= {"strongly-typed": 1} if model.precision != "fp32" else {}
    for key, value in expected.items():
        found = properties.get(key, "none").rstrip(";")
        if found != str(value) and not _same_number(found, value):
            yield f"[property] {key}: expected {value} for {engine.name}, found {found}"
    batch = _number(properties, "batch-size")
    if batch < model.smallest or (model.largest is not None and batch > model.largest):
        yield f"[property] batch-size: the engine takes batches of {model.batches}, found {batch}"
    yield from _label_faults(folder, properties.get("labelfile-path", ""), spec.num_classes)


def _same_number(text: str, value: object) -> bool:
    try:
        return isinstance(value, float) and float(text) == value
    except ValueError:
        return False


def _label_faults(folder: Path, name: str, classes: int) -> Iterator[str]:
    path = folder / name
    if not path.is_file():
        return
    lines = files.read_text(path).splitlines()
    if "" in lines:
        yield f"{name}: line {lines.index('') + 1} is empty; nvinfer skips it and later classes get the names of others"
    elif len(lines) != classes:
        yield f"{name}: expected {classes} lines, one per class, found {len(lines)}"


def _server_faults(path: Path) -> Iterator[str]:
    from google.protobuf.text_format import ParseError

    table = _table("nvinferserver_fields.json")
    text = files.read_text(path)
    try:
        config = text_format.parse(text, "PluginControl", table["messages"], table["enums"])
    except ParseError as error:
        yield f"not a configuration of nvinferserver {table['nvinferserver']}: {error}"
        return
    infer = config.infer_config
    detection, preprocess = infer.postprocess.detection, infer.preprocess
    yield from _library_faults(path.parent, infer.custom_lib.path)
    labels = infer.postprocess.labelfile_path
    if not (path.parent / labels).is_file():
        yield f"labelfile_path: expected a file, found nothing at {labels}"
    repo = infer.backend.triton
    roots = [path.parent / root / repo.model_name for root in repo.model_repo.root]
    engines = [plan for root in roots for plan in sorted(root.glob("*/model.plan"))]
    if roots and not engines:
        yield f"model_repo: expected {repo.model_name}/1/model.plan below {list(repo.model_repo.root)}, found none"
    for engine in engines[-1:]:
        model = _open(engine)
        if isinstance(model, str):
            yield model
            return
        spec = model.spec
        letterbox = spec.preprocessing.resize == "letterbox"
        order = 2 if spec.preprocessing.layout == "NHWC" else 1
        pairs = {
            "tensor_name": (preprocess.tensor_name, model.input_name),
            "tensor_order": (preprocess.tensor_order, order),
            "network_format": (preprocess.network_format, 1),
            "maintain_aspect_ratio": (preprocess.maintain_aspect_ratio, int(letterbox)),
            "symmetric_padding": (
                preprocess.symmetric_padding,
                int(letterbox and spec.preprocessing.placement == "center"),
            ),
            "scale_factor": (preprocess.normalize.scale_factor, 1.0),
            "channel_offsets": (any(preprocess.normalize.channel_offsets), False),
            "num_detected_classes": (detection.num_detected_classes, spec.num_classes),
            "custom_parse_bbox_func": (detection.custom_parse_bbox_func, parser_function(spec)),
        }
        for key, (found, wanted) in pairs.items():
            if found != wanted:
                yield f"{key}: expected {wanted} for the engine, found {found}"
        if not model.smallest <= infer.max_batch_size <= (model.largest or infer.max_batch_size):
            yield f"max_batch_size: the engine takes batches of {model.batches}, found {infer.max_batch_size}"
        yield from _label_faults(path.parent, labels, spec.num_classes)


def _app_faults(path: Path) -> Iterator[str]:
    known = _table("nvinfer_keys.json")["deepstream-app"]
    try:
        groups = read_groups(path)
    except ValueError as error:
        yield str(error)
        return
    for name, group in groups.items():
        kind = re.sub(r"\d+$", "", name)
        if kind not in known:
            yield f"group '{name}' is not checked: none of {', '.join(known)}"
            continue
        for key in group:
            if key not in known[kind] and not re.fullmatch(r"bbox-(border|bg)-color\d*", key):
                yield f"[{name}] {key}: unknown to deepstream-app"
    config = groups.get("primary-gie", {}).get("config-file", "")
    if not (path.parent / config).is_file():
        yield f"[primary-gie] config-file: expected a file, found nothing at '{config}'"
