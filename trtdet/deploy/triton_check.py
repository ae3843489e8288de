# SPDX-License-Identifier: Apache-2.0
"""What Triton would refuse in a repository, and what it would accept but should not, found without
a server.

`config.pbtxt` is parsed with Triton's own protobuf, which tritonclient brings; the rules across
fields are those of Triton's core and its TensorRT backend, and the model files themselves (sidecar,
ONNX metadata) say which tensors and batch sizes are right.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trtdet import files, reading
from trtdet.deploy.model import Deployable, Tensor, open_engine, open_onnx
from trtdet.deploy.parameter import PARAMETER, REMEDY, PostprocessParameter, PreprocessParameter
from trtdet.deploy.triton_config import (
    LABELS_FILE,
    TRITON_TYPES,
    config_class,
    leading_dims,
    parse_config,
)
from trtdet.deploy.triton_ensemble import TRANSFORM
from trtdet.errors import EngineError, GraphError

DEFAULT_FILES = {
    "tensorrt_plan": "model.plan",
    "tensorrt": "model.plan",
    "onnxruntime_onnx": "model.onnx",
    "onnxruntime": "model.onnx",
    "python": "model.py",
}


#: What a model of a repository is described by.
CONFIG = "config.pbtxt"


def check_repository(repository: Path) -> list[str]:
    """Every fault of a repository, one line each.

    Raises:
        FileNotFoundError: no model in it.
        EngineError: no tritonclient to check with.
    """
    return [fault for faults in check_models(repository).values() for fault in faults]


def check_models(repository: Path) -> dict[str, list[str]]:
    """The faults of each model of a repository; raises as `check_repository` does."""
    # A link that leads nowhere is a configuration too, of a model that the server will not load.
    folders = sorted(repository.iterdir()) if repository.is_dir() else []
    paths = [folder / CONFIG for folder in folders if os.path.lexists(folder / CONFIG)]
    if not paths:
        raise FileNotFoundError(
            f"{repository}: expected a model repository, <name>/config.pbtxt, found none"
        )
    if config_class() is None:
        raise EngineError(
            f"{repository}: not checked: expected Triton's protobuf, found no tritonclient; pip install -r requirements-triton.txt"
        )
    problems: dict[str, list[str]] = {path.parent.name: [] for path in paths}
    configs: dict[str, Any] = {}
    for path in paths:
        try:
            configs[path.parent.name] = parse_config(files.read_text(path))
        except (OSError, ValueError) as error:
            text = files.message_of(error)
            problems[path.parent.name].append(text if str(path) in text else f"{path}: {text}")
    for folder, config in configs.items():
        where = repository / folder
        found = [*_own_faults(config, where), *_file_faults(config, where)]
        if config.platform == "ensemble":
            found += _ensemble_faults(config, configs)
        problems[folder] += [f"{where / 'config.pbtxt'}: {fault}" for fault in found]
    return problems


def _own_faults(config: Any, folder: Path) -> Iterator[str]:
    """Rules between the fields of one configuration."""
    if config.name != folder.name:
        yield f"name: expected '{folder.name}', as the folder, found '{config.name}'"
    if not config.platform and not config.backend:
        yield "expected a platform or a backend, found neither"
    if config.max_batch_size < 0:
        yield f"max_batch_size: expected 0 or more, found {config.max_batch_size}"
    for size in config.dynamic_batching.preferred_batch_size:
        if not 0 < size <= config.max_batch_size:
            yield f"dynamic_batching: expected preferred sizes of 1 to max_batch_size {config.max_batch_size}, found {size}"
    if config.HasField("dynamic_batching") and config.max_batch_size == 0:
        yield "dynamic_batching: expected max_batch_size above 0, found 0"
    if not config.input or not config.output:
        yield "expected inputs and outputs, found none"
    for tensor in (*config.input, *config.output):
        if not tensor.name or not tensor.data_type or not tensor.dims:
            yield f"tensor '{tensor.name}': expected name, data_type and dims"
        if any(dim < 1 and dim != -1 for dim in tensor.dims):
            yield f"'{tensor.name}': expected dims of 1 or more, or -1, found {list(tensor.dims)}"
    yield from _parameter_faults(config)
    for group in config.instance_group:
        kind = group.Kind.Name(group.kind)
        if kind == "KIND_CPU" and (group.gpus or config.platform == "tensorrt_plan"):
            yield "instance_group: expected KIND_GPU, found KIND_CPU"
        if group.profile and config.platform != "tensorrt_plan":
            yield "instance_group: profile is for TensorRT only"
    if config.platform == "ensemble" and (
        config.instance_group or config.HasField("optimization") or config.backend
    ):
        yield "an ensemble has no backend, instance_group or optimization of its own"


def _parameter_faults(config: Any) -> Iterator[str]:
    """What a Python model of an ensemble is told."""
    if PARAMETER not in config.parameters:
        return
    text = config.parameters[PARAMETER].string_value
    is_before = any(tensor.name == TRANSFORM.name for tensor in config.output)
    kind = PreprocessParameter if is_before else PostprocessParameter
    try:
        reading.parse(text, kind, name=f"parameter '{PARAMETER}'", remedy=REMEDY)
    except ValueError as error:
        yield str(error)


def _file_faults(config: Any, folder: Path) -> Iterator[str]:
    """What the configuration names must be there and agree with the model files."""
    versions = [path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal()]
    if not versions:
        yield f"expected a version folder such as {folder.name}/1, found none"
    default = DEFAULT_FILES.get(config.platform) or DEFAULT_FILES.get(config.backend)
    names = [config.default_model_filename or default, *config.cc_model_filenames.values()]
    if config.cc_model_filenames and not config.default_model_filename:
        names = names[1:]
    for version in versions:
        for name in filter(None, names):
            path = version / name
            if not path.is_file():
                yield f"expected {version.name}/{name}, found none"
            elif path.suffix in (".plan", ".onnx"):
                yield from (
                    f"version {version.name}: {f}" for f in _faults_of_version(config, path)
                )
    for output in config.output:
        if output.label_filename and not (folder / output.label_filename).is_file():
            yield f"'{output.name}': expected the labels {output.label_filename}, found none; write one line per class"


def _faults_of_version(config: Any, path: Path) -> Iterator[str]:
    try:
        model = open_onnx(path) if path.suffix == ".onnx" else open_engine(path)
    except (GraphError, EngineError) as error:
        yield f"{path.name} cannot be compared: {error}"
        return
    yield from _model_faults(config, model)
    labels = path.parents[1] / LABELS_FILE
    if os.path.lexists(labels):
        try:
            found = len(files.read_text(labels).splitlines())
        except (OSError, ValueError) as error:
            yield files.message_of(error)
            return
        if found != model.spec.num_classes:
            yield f"{LABELS_FILE}: expected {model.spec.num_classes} lines, one per class, found {found}"


def _model_faults(config: Any, model: Deployable) -> Iterator[str]:
    """Batch rule, names, types and dims against what the model says of itself."""
    largest = config.max_batch_size
    if model.largest is not None and largest > model.largest:
        yield f"max_batch_size: the model takes batches of {model.batches}, found {largest}; Triton would not load it"
    elif largest and not model.takes_any_batch:
        yield (
            f"max_batch_size: expected 0, with the batch in the dims, as the model takes batches of {model.batches}, found {largest}; "
            f"Triton would {'send it smaller ones' if model.smallest > 1 else 'not load it'}"
        )
    batch = leading_dims(model, largest if model.takes_any_batch else 0)
    yield from _tensor_faults("input", [model.input], config.input, batch)
    yield from _tensor_faults("output", model.outputs, config.output, batch)
    if not any(output.label_filename for output in config.output):
        yield f"detection_classes: expected label_filename, such as {LABELS_FILE}, found none"


def _tensor_faults(kind: str, expected: Any, found: Any, batch: list[int]) -> Iterator[str]:
    there = {tensor.name: tensor for tensor in found}
    wanted: Mapping[str, Tensor] = {tensor.name: tensor for tensor in expected}
    for name in there.keys() - wanted.keys():
        yield f"{kind} '{name}': the model has none of that name, but {', '.join(wanted)}"
    for name, tensor in wanted.items():
        if name not in there:
            yield f"{kind} '{name}': expected, found none of that name"
            continue
        dims, data_type = list(there[name].dims), there[name].data_type
        want_dims, want_type = [*batch, *tensor.dims], TRITON_TYPES[tensor.dtype]
        type_name = there[name].DESCRIPTOR.fields_by_name["data_type"].enum_type
        if type_name.values_by_number[data_type].name != want_type:
            yield f"{kind} '{name}': expected {want_type}, found {type_name.values_by_number[data_type].name}"
        if dims != want_dims:
            yield f"{kind} '{name}': expected dims {want_dims}, found {dims}"


def _ensemble_faults(config: Any, configs: Mapping[str, Any]) -> Iterator[str]:
    """Every tensor is made once, before it is used, and by a model that agrees on its type and
    dims.
    """
    made = {tensor.name: tensor for tensor in config.input}
    used: set[str] = set()
    for step in config.ensemble_scheduling.step:
        model = configs.get(step.model_name)
        if model is None:
            yield f"step '{step.model_name}': expected that model in the repository, found none"
            continue
        if (model.max_batch_size == 0) != (config.max_batch_size == 0) or (
            model.max_batch_size < config.max_batch_size
        ):
            yield f"max_batch_size: '{step.model_name}' has {model.max_batch_size}, the ensemble {config.max_batch_size}"
        inputs, outputs = ({t.name: t for t in tensors} for tensors in (model.input, model.output))
        for name in inputs.keys() - step.input_map.keys():
            yield f"step '{step.model_name}': its input '{name}' is fed by nothing"
        for name, inside in step.input_map.items():
            used.add(inside)
            if name not in inputs or inside not in made:
                yield f"step '{step.model_name}': '{inside}' -> '{name}': expected a tensor made before, and an input of that name"
            elif not _alike(made[inside], inputs[name]):
                yield f"step '{step.model_name}': '{inside}' and its input '{name}' differ in type or dims"
        for name, inside in step.output_map.items():
            if name not in outputs or inside in made:
                yield f"step '{step.model_name}': '{name}' -> '{inside}': expected an output of that name, made once"
            else:
                made[inside] = outputs[name]
    for tensor in config.output:
        used.add(tensor.name)
        if tensor.name not in made or not _alike(made[tensor.name], tensor):
            yield f"output '{tensor.name}': no step makes it with that type and dims"
    for name in made.keys() - used:
        yield f"tensor '{name}' is made and not used"


def _alike(a: Any, b: Any) -> bool:
    return bool(a.data_type == b.data_type and list(a.dims) == list(b.dims))
