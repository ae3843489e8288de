# SPDX-License-Identifier: Apache-2.0
"""What stands beside an engine: `<engine>.json`, an `EngineInfo`.

A header inside the engine would break trtexec and Triton.
"""

import dataclasses
import hashlib
import json
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from trtdet import about, checks, files, reading
from trtdet.engine.options import BatchRange
from trtdet.errors import EngineError
from trtdet.onnx_files import read_onnx
from trtdet.spec import ModelSpec

#: What to do with a sidecar that cannot be read.
REMEDY = "build the engine again with build_engine.py"


@dataclass(frozen=True)
class EngineInfo:
    """What an engine is: the contents of `<engine>.json`.

    Attributes:
        flavor: module name, a key of `trtdet.engine.flavor.FLAVORS`.
        version: of TensorRT, "10.13.3.9".
        compute_capabilities: of the GPUs it was built for, "8.9"; empty: unknown, or, for
            TensorRT-RTX, every one from 8.0 on.
        batch: smallest, best, largest batch size.
        plugins: file names of the plugin libraries it needs.
        layers: layers per precision, and `layers_source`, where that was read.
        int8: of a build in INT8, "mac_share" and per block [convolutions in INT8, convolutions].
        onnx_file, onnx_sha256: the file it was built from; the hash is `onnx_files.sha256`, weights
            in files of their own included.
        engine_sha256: of the engine file; empty: not known.
        platform: operating system and processor, "linux-x86_64"; engines do not move between them.
        tool: what wrote it, "trtdet 0.1.0".
    """

    SCHEMA: ClassVar[int] = 1
    JSON_NAMES: ClassVar[dict[str, str]] = {"model_spec": "spec"}

    spec: ModelSpec
    flavor: str
    version: str
    precision: str
    batch: BatchRange
    compute_capabilities: tuple[str, ...] = ()
    dla_core: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    stripped: bool = False
    plugins: tuple[str, ...] = ()
    layers: dict[str, int] = dataclasses.field(default_factory=dict)
    layers_source: str = ""
    int8: dict[str, Any] = dataclasses.field(default_factory=dict)
    onnx_file: str = ""
    onnx_sha256: str = ""
    engine_sha256: str = ""
    platform: str = dataclasses.field(
        default_factory=lambda: f"{platform.system()}-{platform.machine()}".lower()
    )
    tool: str = f"trtdet {about.__version__}"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d{1,4}(\.\d{1,6}){1,4}[\w.+-]{0,40}", self.version, re.ASCII):
            raise ValueError(f"version: expected one such as 10.13.3.9, found {checks.shown(self.version)}")  # fmt: skip
        for capability in self.compute_capabilities:
            if not re.fullmatch(r"\d{1,3}\.\d{1,3}", capability, re.ASCII):
                raise ValueError(f"compute_capabilities: expected such as 8.9, found {checks.shown(capability)}")  # fmt: skip
        if self.dla_core is not None:
            checks.whole("dla_core", self.dla_core, 0, 15)
        for layers in self.layers.values():
            checks.whole("layers", layers, 0, 2**31)
        names = {"flavor": self.flavor, "precision": self.precision, "platform": self.platform, "tool": self.tool, "layers_source": self.layers_source}  # fmt: skip
        for name, text in names.items():
            checks.text(name, text)
        for name, text in [("onnx_file", self.onnx_file), *(("plugins", p) for p in self.plugins)]:
            checks.text(name, text, checks.LABEL)
        for name, text in (("onnx_sha256", self.onnx_sha256), ("engine_sha256", self.engine_sha256)):  # fmt: skip
            if not re.fullmatch("([0-9a-f]{64})?", text):
                raise ValueError(f"{name}: expected 64 hex digits or nothing, found {checks.shown(text)}")  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, which `read_info` reads."""
        data = dataclasses.asdict(self)
        del data["spec"]
        return {"schema": self.SCHEMA, **data, "model_spec": self.spec.to_dict()}


def read_info(path: Path) -> EngineInfo:
    """Read an engine's `.json`.

    Raises:
        OSError, EngineError: it is none; says the place in it, and what to do.
    """
    info: EngineInfo = reading.read(path, EngineInfo, remedy=REMEDY, error=EngineError)
    return info


def sidecar_path(engine_path: Path) -> Path:
    """`d0.engine` -> `d0.engine.json`"""
    return engine_path.with_name(engine_path.name + ".json")


def write_engine(path: Path, plan: bytes, info: EngineInfo) -> EngineInfo:
    """Write engine and sidecar, each whole or not at all; an older sidecar never stands beside the
    new engine.

    Returns:
        `info` with the engine's hash.
    """
    sidecar = sidecar_path(path)
    # Left from the inside out: the engine is in place before its sidecar.
    with files.atomic_path(sidecar) as new_sidecar, files.atomic_path(path) as new_engine:
        new_engine.write_bytes(plan)
        info = dataclasses.replace(info, engine_sha256=hashlib.sha256(plan).hexdigest())
        text = json.dumps(info.to_dict(), indent=2) + "\n"
        new_sidecar.write_text(text, encoding="utf-8")
        sidecar.unlink(missing_ok=True)
    return info


def read_sidecar(engine_path: Path, plan: bytes | None = None) -> EngineInfo | None:
    """What stands beside an engine; None where nothing does.

    Args:
        plan: the engine's bytes, of who has read them; else the file is read to be compared with
            the hash in the sidecar.

    Raises:
        EngineError: not readable, or of another engine than the one it stands beside.
    """
    path = sidecar_path(engine_path)
    try:
        if not files.is_beside(path):
            return None
    except ValueError as error:
        raise EngineError(str(error)) from error
    info = read_info(path)
    if not info.engine_sha256:
        return info
    found = files.sha256(engine_path) if plan is None else hashlib.sha256(plan).hexdigest()
    if info.engine_sha256 != found:
        raise EngineError(
            f"{path} was written for another engine than {engine_path.name} is now; "
            "build the engine again with build_engine.py, or delete the .json"
        )
    return info


def read_spec(path: Path) -> ModelSpec:
    """The ModelSpec of a model without opening it: of an ONNX file, of an engine, or of an engine's
    `.json`.

    Raises:
        FileNotFoundError: no such file, or an engine without its `.json`.
        GraphError, EngineError: nothing in it that says so.
    """
    if path.suffix.lower() == ".onnx":
        return ModelSpec.from_onnx(read_onnx(path, weights=False), path)
    if path.suffix.lower() == ".json":
        return read_info(path).spec
    info = read_sidecar(path)
    if info is None:
        raise FileNotFoundError(
            f"{path}: expected {sidecar_path(path).name} beside it, found none; build the engine with build_engine.py"
        )
    return info.spec
