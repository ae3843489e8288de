# SPDX-License-Identifier: Apache-2.0
"""Model repositories for Triton: `<repository>/<name>/config.pbtxt` and
`<repository>/<name>/<version>/`.

Beside a plan stands its sidecar, as beside every engine: Triton does not look at it,
`trtdet.deploy.triton_check` does.
"""

import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import Any

from trtdet import files, reading
from trtdet.deploy import text_format
from trtdet.deploy.model import Deployable, check_servable, label_lines
from trtdet.deploy.server_code import python_model
from trtdet.deploy.triton_config import (
    LABELS_FILE,
    TritonOptions,
    capabilities,
    config_class,
    model_config,
    parse_config,
    plan_config,
    plan_name,
)
from trtdet.deploy.triton_ensemble import ensemble_configs
from trtdet.engine.sidecar import sidecar_path
from trtdet.nms import lowering
from trtdet.onnx_files import naming, read_onnx
from trtdet.sessions import TELEMETRY_SWITCH

logger = logging.getLogger(__name__)

#: Fields of a configuration that clients and model files depend on.
INTERFACE = ("name", "platform", "backend", "max_batch_size", "data_type", "dims")


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
