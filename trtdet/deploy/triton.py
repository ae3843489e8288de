# SPDX-License-Identifier: Apache-2.0
"""Model repositories for Triton: `<repository>/<name>/config.pbtxt` and
`<repository>/<name>/<version>/`.

Beside a plan stands its sidecar, as beside every engine: Triton does not look at it,
`trtdet.deploy.triton_check` does.

Source of the rules: triton-inference-server core/src/model_config_utils.cc,
tensorrt_backend/src/{model_state,instance_state}.cc
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import Any

from google.protobuf import text_format as google_text_format

from trtdet import files, reading
from trtdet.deploy import parameter, text_format
from trtdet.deploy.model import Deployable, Tensor, check_servable, label_lines
from trtdet.deploy.options import DEFAULT_MAX_BATCH
from trtdet.deploy.parameter import PostprocessParameter, PreprocessParameter
from trtdet.deploy.server_code import python_model
from trtdet.deploy.text_format import Word
from trtdet.engine.sidecar import sidecar_path
from trtdet.errors import EngineError
from trtdet.nms import lowering
from trtdet.onnx_files import naming, read_onnx
from trtdet.sessions import TELEMETRY_SWITCH
from trtdet.spec import METADATA_KEY

logger = logging.getLogger(__name__)


TRITON_TYPES = {"float32": "TYPE_FP32", "uint8": "TYPE_UINT8", "int32": "TYPE_INT32"}
LABELS_FILE = "labels.txt"
#: What the preprocessing of an ensemble passes by the detector: scale x, scale y, offset x, offset
#: y, source width, source height.
TRANSFORM = Tensor("transform", "float32", (6,))
#: The result of an ensemble, in source pixels.
RESULT_NAMES = ("num_detections", "boxes_xyxy", "scores", "class_ids", "category_ids")
#: Fields of a configuration that clients and model files depend on.
INTERFACE = ("name", "platform", "backend", "max_batch_size", "data_type", "dims")


@dataclass(frozen=True)
class TritonOptions:
    """What the sidecar cannot know.

    Attributes:
        max_batch: at most so many images at a time; None: what the model takes.
        instances: execution contexts, per GPU.
        gpus: their numbers; empty: every one that the server sees.
        queue_delay_us: how long a request may wait for others to share its batch.
    """

    max_batch: int | None = None
    instances: int = 1
    gpus: tuple[int, ...] = ()
    queue_delay_us: int = 1000
    cuda_graphs: bool = True


def max_batch_size(model: Deployable, wanted: int | None) -> int:
    """Triton's `max_batch_size`; 0, "the dims are all there is", where Triton must not choose the
    batch.

    A model with `max_batch_size` N is sent any batch from 1 to N. One that takes 8 and only 8, or 4
    to 16, would refuse most of them, and Triton does not load an ONNX file whose batch is fixed, be
    it 1, with an N above 0.

    Raises:
        ValueError: more is wanted than the model takes.
    """
    if model.largest is not None and wanted is not None and wanted > model.largest:
        raise ValueError(
            f"--batch_size {wanted}: {model.path.name} takes batches of {model.batches}; ask for less, or build it for more"
        )
    if not model.takes_any_batch:
        return 0
    return wanted or model.largest or DEFAULT_MAX_BATCH


def leading_dims(model: Deployable, max_batch: int) -> list[int]:
    """The batch as part of the dims: none where Triton batches."""
    if max_batch:
        return []
    return [model.smallest if model.is_static else -1]


def _tensor(tensor: Tensor, batch: Sequence[int], **fields: Any) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "data_type": Word(TRITON_TYPES[tensor.dtype]),
        "dims": [*batch, *tensor.dims],
        **fields,
    }


def model_config(
    name: str, platform: str, model: Deployable, options: TritonOptions
) -> dict[str, Any]:
    """The part of the configuration that an engine and an ONNX file share."""
    largest = max_batch_size(model, options.max_batch)
    batch = leading_dims(model, largest)
    outputs = [_tensor(tensor, batch) for tensor in model.outputs]
    outputs[-1]["label_filename"] = LABELS_FILE
    config: dict[str, Any] = {
        "name": name,
        "platform": platform,
        "max_batch_size": largest,
        "input": [_tensor(model.input, batch)],
        "output": outputs,
    }
    if largest > 1:
        # CUDA graphs are captured for 1, these and the largest only.
        preferred = sorted({min(model.preferred, largest), largest} - {1})
        config["dynamic_batching"] = {
            "preferred_batch_size": preferred,
            "max_queue_delay_microseconds": options.queue_delay_us,
        }
    group: dict[str, Any] = {"count": options.instances}
    if options.gpus:
        group |= {"kind": Word("KIND_GPU"), "gpus": list(options.gpus)}
    config["instance_group"] = [group]
    config["parameters"] = [{"key": METADATA_KEY, "value": {"string_value": _served_spec(model)}}]
    return config


def _served_spec(model: Deployable) -> str:
    """The ModelSpec as JSON, for clients (`infer.py --model URL`); without what only the
    building of an engine needs.
    """
    spec = model.spec.replace(source={}, sensitive_nodes=())
    return json.dumps(spec.to_dict(), separators=(",", ":"))


def plan_config(name: str, engines: Sequence[Deployable], options: TritonOptions) -> dict[str, Any]:
    """The configuration of an engine, or of engines of the same model for several kinds of GPU.

    Raises:
        EngineError: engines that do not belong together.
    """
    model = engines[0]
    config = model_config(name, "tensorrt_plan", model, options)
    group = config["instance_group"][0] | {"kind": Word("KIND_GPU"), "profile": ["0"]}
    if model.engine and model.engine.dla_core is not None:
        group["secondary_devices"] = [
            {"kind": Word("KIND_NVDLA"), "device_id": model.engine.dla_core}
        ]
    config["instance_group"] = [group]
    if len(engines) > 1:
        config["cc_model_filenames"] = [
            {"key": capability, "value": plan_name(capability)}
            for capability in capabilities(engines)
        ]
    if options.cuda_graphs:
        cuda = {"graphs": True, "busy_wait_events": True, "output_copy_stream": True}
        config["optimization"] = {"cuda": cuda}
    return config


def plan_name(capability: str | None) -> str:
    """ "8.9" -> "model_89.plan"; without one Triton's default."""
    return f"model_{capability.replace('.', '')}.plan" if capability else "model.plan"


def capabilities(engines: Sequence[Deployable]) -> list[str]:
    """The compute capability of each engine.

    Raises:
        EngineError: one is for none or several, two are for the same, or they differ in more than
            the GPU.
    """
    found: list[str] = []
    for model in engines:
        named = model.engine.compute_capabilities if model.engine else ()
        if len(named) != 1:
            raise EngineError(
                f"{model.path}: expected one compute capability in its .json, to tell engines for several GPUs apart, found "
                f"{', '.join(named) or 'none'}; build it again with build_engine.py"
            )
        if (model.spec, model.smallest, model.largest) != (
            engines[0].spec,
            engines[0].smallest,
            engines[0].largest,
        ):
            raise EngineError(
                f"{model.path} differs from {engines[0].path.name} in more than the GPU; build both from one ONNX file with the same "
                "batch sizes"
            )
        found += named
    if len(set(found)) < len(found):
        raise EngineError(f"expected one engine per kind of GPU, found two for {found}")
    return found


# ---- ensemble


def python_config(
    name: str,
    max_batch: int,
    inputs: Sequence[dict[str, Any]],
    outputs: Sequence[dict[str, Any]],
    told: PreprocessParameter | PostprocessParameter,
    instances: int,
) -> dict[str, Any]:
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": max_batch,
        "input": list(inputs),
        "output": list(outputs),
        "instance_group": [{"count": instances, "kind": Word("KIND_CPU")}],
        "parameters": [
            {"key": parameter.PARAMETER, "value": {"string_value": parameter.dumps(told)}}
        ],
    }


def result_tensors(model: Deployable) -> list[Tensor]:
    """What an ensemble answers with."""
    slots = model.spec.nms.max_output_boxes
    dims = ((1,), (slots, 4), (slots,), (slots,), (slots,))
    dtypes = ("int32", "float32", "float32", "int32", "int32")
    tensors = [Tensor(*fields) for fields in zip(RESULT_NAMES, dtypes, dims, strict=True)]
    if model.spec.selection == "rotated_nms":
        tensors.append(Tensor("angles", "float32", (slots,)))
    return tensors


def ensemble_configs(
    name: str, detector: dict[str, Any], model: Deployable, options: TritonOptions
) -> list[dict[str, Any]]:
    """Preprocessing, postprocessing and the ensemble around a detector's configuration: encoded
    images in, boxes in source pixels out.
    """
    largest: int = detector["max_batch_size"]
    batch = leading_dims(model, largest)
    # With max_batch_size 0 the images are the one dimension there is.
    image = {
        "name": "image",
        "data_type": Word("TYPE_STRING"),
        "dims": batch or [1],
    }
    transform = _tensor(TRANSFORM, batch)
    results = [_tensor(tensor, batch) for tensor in result_tensors(model)]
    raw = [_tensor(tensor, batch) for tensor in model.outputs]
    spec = model.spec
    model.check_one_size("the ensemble")
    before = PreprocessParameter(spec.preprocessing)
    after = PostprocessParameter(
        spec.preprocessing.size_hw,
        spec.box_order,
        spec.boxes_normalized,
        spec.inclusive_corners,
        spec.category_ids,
    )
    workers = max(2, options.instances)
    network_input = _tensor(model.input, batch)
    names = [f"{name}_preprocess", name, f"{name}_postprocess"]
    steps = [
        (names[0], ["image"], [model.input_name, TRANSFORM.name]),
        (detector["name"], [model.input_name], [tensor["name"] for tensor in raw]),
        (
            names[2],
            [*(tensor["name"] for tensor in raw), TRANSFORM.name],
            [tensor["name"] for tensor in results],
        ),
    ]
    ensemble = {
        "name": f"{name}_ensemble",
        "platform": "ensemble",
        "max_batch_size": largest,
        "input": [image],
        "output": results,
        "ensemble_scheduling": {"step": [_step(*step, results) for step in steps]},
    }
    return [
        python_config(names[0], largest, [image], [network_input, transform], before, workers),
        python_config(names[2], largest, [*raw, transform], results, after, 1),
        ensemble,
    ]


def _step(
    model_name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    results: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """One step; tensors inside are called "raw_X" where a result of the ensemble has their name."""
    final = {tensor["name"] for tensor in results}
    last = set(outputs) == final

    def inside(name: str) -> str:
        return f"raw_{name}" if name in final else name

    return {
        "model_name": model_name,
        "model_version": -1,
        "input_map": [{"key": key, "value": inside(key)} for key in inputs],
        "output_map": [{"key": key, "value": key if last else inside(key)} for key in outputs],
    }


# ---- files


def write_repository(
    repository: Path,
    name: str,
    engines: Sequence[Deployable],
    onnx_model: Deployable | None,
    options: TritonOptions,
    *,
    ensemble: bool = False,
) -> list[Path]:
    """Add a model to a repository, as a new version where it is there already.

    The engine is called `name`. An ONNX file beside it is called `name`_onnx, one alone `name`; it
    is lowered to ordinary operators. An ensemble is around the model called `name`.

    Returns:
        The version folders written.

    Raises:
        ValueError: the configuration that is there is another one, or Triton would not read the new
            one.
        EngineError: an engine that cannot be served.
    """
    planned: list[_Planned] = []
    if engines:
        planned.append(_planned_engines(name, engines, options))
    if onnx_model is not None:
        onnx_name = f"{name}_onnx" if engines else name
        config = model_config(onnx_name, "onnxruntime_onnx", onnx_model, options)
        with naming(onnx_model.path):
            # An ONNX file alone may be for a server without a GPU.
            form = lowering.fast_form(onnx_model.spec, cuda=bool(options.gpus or engines))
            lowered = lowering.lower(read_onnx(onnx_model.path), form).SerializeToString()
        planned.append(_Planned(config, onnx_model, {"model.onnx": lowered}))
    if not planned:
        raise ValueError("expected an engine or an ONNX file, got neither")
    if ensemble:
        planned += _planned_ensemble(name, planned[0], options)
    for model in planned:  # all before any is written
        if config_class() is not None:
            parse_config(model.text)
        _check_config_there(repository / model.config["name"] / "config.pbtxt", model.text)
    return [_add_version(repository / model.config["name"], model) for model in planned]


@dataclass(frozen=True)
class _Planned:
    """A model of the repository before it is written: the files of its version folder are paths
    to copy, or bytes.
    """

    config: dict[str, Any]
    source: Deployable
    contents: Mapping[str, Path | bytes]

    @property
    def text(self) -> str:
        return _comment(self.source) + text_format.dumps(self.config)


def _planned_engines(name: str, engines: Sequence[Deployable], options: TritonOptions) -> _Planned:
    for model in engines:
        check_servable(model, "Triton")
    tags = capabilities(engines) if len(engines) > 1 else [None]
    contents: dict[str, Path | bytes] = {}
    for model, tag in zip(engines, tags, strict=True):
        contents[plan_name(tag)] = model.path
        contents[plan_name(tag) + ".json"] = sidecar_path(model.path)
    return _Planned(plan_config(name, engines, options), engines[0], contents)


def _planned_ensemble(name: str, detector: _Planned, options: TritonOptions) -> list[_Planned]:
    before, after, ensemble = ensemble_configs(name, detector.config, detector.source, options)
    return [
        _Planned(before, detector.source, python_model("triton_preprocess.py")),
        _Planned(after, detector.source, python_model("triton_postprocess.py")),
        _Planned(ensemble, detector.source, {}),  # its version folder stays empty
    ]


def asset(name: str) -> bytes:
    """A file that is deployed as it is."""
    return (resources.files("trtdet.deploy") / "assets" / name).read_bytes()


def _comment(model: Deployable) -> str:
    lines = [f"# {model.path.name}: {model.spec.family}, batches of {model.batches}"]
    if model.engine is not None:
        info = model.engine
        where = ", ".join(info.compute_capabilities) or "the GPU it was built on"
        lines.append(f"# {info.precision}, TensorRT {info.version}, compute capability {where}")
    return "".join(f"{files.printable(line)}\n" for line in lines)


def config_class() -> Any:
    """Triton's own message class of a configuration; None without tritonclient."""
    try:
        from tritonclient.grpc.model_config_pb2 import ModelConfig
    except ImportError:
        return None
    return ModelConfig


def parse_config(text: str) -> Any:
    """A configuration as Triton reads it.

    Raises:
        ValueError: Triton would refuse it.
    """
    try:
        return google_text_format.Parse(text, config_class()())
    except google_text_format.ParseError as error:
        raise ValueError(f"not a model configuration: {error}") from error


def _lines(text: str) -> list[str]:
    """Without comments, and with single spaces."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _check_config_there(path: Path, text: str) -> None:
    """A configuration that is there, perhaps edited, is kept; a new version must fit it.

    Raises:
        ValueError: it is for a model with other tensors or batch sizes.
    """
    if not path.is_file():
        return
    there, new = (_interface(lines) for lines in (files.read_text(path), text))
    for expected, found in zip_longest(new, there):
        if expected != found:
            raise ValueError(
                f"{path} is for another model: expected {_short(expected)}, found {_short(found)}; choose another --name, or remove that folder"
            )


def _interface(text: str) -> list[str]:
    """What a client, and the model file, must agree with: lines, and the fields of the JSON in
    parameters.
    """
    found: list[str] = []
    for line in _lines(text):
        name, _, value = line.partition(": ")
        if name == "string_value":
            found += _parameter_fields(value)
        elif name in INTERFACE:
            found.append(line)
    return found


def _parameter_fields(value: str) -> list[str]:
    """Of a parameter in JSON, a line per field, in a fixed order; class names, which may be
    edited, left out.
    """
    try:
        text = reading.parse(value, str, name="string_value", remedy="")
        fields: dict[str, Any] = reading.parse(text, dict[str, Any], name="JSON", remedy="")
    except ValueError:  # somebody's own parameter
        return [value]
    fields.pop("labels", None)
    flat: dict[str, Any] = {}
    for name, field in fields.items():
        inner = field if isinstance(field, dict) else {"": field}
        flat |= {f"{name}.{key}".rstrip("."): inside for key, inside in inner.items()}
    return [f"{name}: {flat[name]}" for name in sorted(flat)]


def _short(line: str | None) -> str:
    if line is None:
        return "nothing"
    return f"'{line if len(line) <= 80 else line[:77] + '...'}'"


def _say_what_is_kept(folder: Path, model: _Planned) -> None:
    """Warn of what this run would have written otherwise into the configuration and the labels
    that are there.
    """
    names = (*INTERFACE, "string_value")
    there = _lines(files.read_text(folder / "config.pbtxt"))
    new = (line for line in _lines(model.text) if line.split(":")[0] not in names)
    kept = [line for line in new if line not in there and ":" in line]
    if kept:
        path = folder / "config.pbtxt"
        logger.warning("%s is kept as it is; not applied: %s", path, ", ".join(kept))
    labels = folder / LABELS_FILE
    if LABELS_FILE in model.text and labels.is_file():
        lines = files.read_text(labels).splitlines()
        if lines != list(label_lines(model.source.spec)):
            logger.warning("%s is kept as it is; other class names not applied", labels)


def next_version(folder: Path) -> int:
    """One above the highest version there, so that nothing is overwritten."""
    found = [int(path.name) for path in folder.glob("[1-9]*") if path.name.isdecimal()]
    return max(found, default=0) + 1


def _add_version(folder: Path, model: _Planned) -> Path:
    """Configuration and labels, where they are not there, then the folder of the next version,
    whole.
    """
    files.check_folder(folder)
    for name in (LABELS_FILE, "config.pbtxt"):
        files.check_writable(folder / name)
    with files.new_folder(folder):
        return _write_version(folder, model)


def _write_version(folder: Path, model: _Planned) -> Path:
    """The folder of the next version, in a folder that is there."""
    version = folder / str(next_version(folder))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new.") as temporary:
        unfinished = Path(temporary, "version")
        unfinished.mkdir()
        for name, content in model.contents.items():
            with files.naming_output(version / name):
                (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, Path):
                    shutil.copyfile(content, unfinished / name)
                else:
                    (unfinished / name).write_bytes(content)
        if (folder / "config.pbtxt").is_file():
            _say_what_is_kept(folder, model)
        else:
            if LABELS_FILE in model.text:
                lines = "".join(f"{label}\n" for label in label_lines(model.source.spec))
                files.write_text(folder / LABELS_FILE, lines)
            files.write_text(folder / "config.pbtxt", model.text)
        unfinished.rename(version)  # fails where somebody else made that version meanwhile
    return version


def serve_command(
    repository: Path, engines: Sequence[Deployable], onnx_model: Deployable | None = None
) -> str:
    """The command that serves a repository, with the plugins and settings that these models need.

    EfficientNMS and TensorRT's other plugins need none: Triton's backend registers them.
    """
    command = ["tritonserver", f"--model-repository={repository}"]
    infos = [model.engine for model in engines if model.engine]
    plugins = sorted({plugin for info in infos for plugin in info.plugins})
    if plugins:  # all in one option: a second one would replace the first
        command.append(f"--backend-config=tensorrt,plugins={';'.join(plugins)}")
    if any(info.version_compatible for info in infos):
        command.append("--backend-config=tensorrt,version-compatible=true")
    telemetry_off = f"{TELEMETRY_SWITCH}=1 " if onnx_model else ""  # of the server's ONNX Runtime
    return telemetry_off + files.shell_line(command)
