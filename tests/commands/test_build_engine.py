# SPDX-License-Identifier: Apache-2.0
"""Stage 2: real builds by TensorRT-RTX, and what TensorRT 8.6, 10 and 11 are asked, on a
stand-in.
"""

import dataclasses
import errno
import hashlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import standin_tensorrt_builder as standin
import toy_network as toy
from PIL import Image

from trtdet import about
from trtdet.commands import build_engine
from trtdet.conversion.convert import provenance
from trtdet.engine import flavor, sidecar
from trtdet.engine.options import BatchRange, BuildOptions
from trtdet.engine.sidecar import EngineInfo, read_sidecar, read_spec, sidecar_path, write_engine
from trtdet.errors import EngineError
from trtdet.nms import lowering
from trtdet.precision import floats, prepare
from trtdet.spec import ModelSpec

TensorRT = Callable[..., Any]


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    """Make the stand-in of one version the only TensorRT there is."""

    def install(version: str, **settings: Any) -> Any:
        module = standin.make_module(version, **settings)
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        return module

    return install


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The toy network with a dynamic batch, in a folder of its own."""
    folder = tmp_path / "onnx"
    folder.mkdir()
    return toy.save(folder / "toy.onnx")


def build(model: Path, output: Path, *options: object) -> int:
    """Run the script; `output` is the engine."""
    return build_engine.main(["--onnx", str(model), "--engine", str(output), *map(str, options)])


def plan_of(path: Path) -> dict[str, Any]:
    """What the stand-in's builder was asked for."""
    return json.loads(path.read_bytes())


def layer_types(plan: dict[str, Any]) -> dict[str, str]:
    """Layer -> type of its output, as the inspector spells it."""
    found = {}
    for layer in plan["layers"]:
        fields = layer["Outputs"][0]
        text = fields.get("Format/Datatype") or fields["DataType"]
        found[layer["Name"]] = text.replace("Row major linear ", "").replace(" format", "")
    return found


# --- real builds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("batch", ["1", "1,2,4"])
def test_rtx_builds_without_a_gpu(
    precision: str, batch: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs requirements-rtx.txt")
    path = tmp_path / "out" / "toy.engine"
    options = ["--precision", precision, "--batch_size", batch, "--flavor", "tensorrt_rtx"]
    assert build(model, path, *options, "--compute_capability", "8.9,12.0") == 0
    plan = path.read_bytes()
    assert plan[:4] == b"vtrt" and b"accelerators={sm89 sm120 }" in plan
    info = read_sidecar(path)
    assert info is not None
    assert info.spec == toy.SPEC and info.flavor == "tensorrt_rtx"
    assert info.compute_capabilities == ("8.9", "12.0")
    sizes = [int(n) for n in batch.split(",")]
    assert info.batch == BatchRange(sizes[0], sizes[-2] if len(sizes) > 1 else sizes[0], sizes[-1])
    assert info.onnx_file == "toy.onnx" and info.onnx_sha256 == sidecar.files.sha256(model)
    # Read back from the plan: the kernels of the body, and those of preprocessing and NMS.
    narrow = {"fp16": "FP16", "bf16": "BF16"}.get(precision)
    assert info.layers_source == "plan" and info.layers["FP32"] > 10
    assert set(info.layers) == {"FP32", narrow} - {None}
    assert narrow is None or info.layers[narrow] >= 6
    tf32 = b"tf32=1" if precision == "tf32" else b"tf32=0"
    assert tf32 in plan
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(path)
    assert "compute capability 8.9, 12.0, batch" in lines[0] and "(plan)" in lines[1]
    assert sorted(p.name for p in path.parent.iterdir()) == ["toy.engine", "toy.engine.json"]


def test_rtx_builds_for_every_gpu_from_ampere_on_unless_told(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    pytest.importorskip("tensorrt_rtx", reason="needs requirements-rtx.txt")
    path = tmp_path / "toy.engine"
    assert build(model, path, "--flavor", "tensorrt_rtx", "--workspace", 0.5, "--optimization_level", 1) == 0  # fmt: skip
    assert "compute capability 8.0 and later, batch 1" in capsys.readouterr().out
    info = read_sidecar(path)
    assert (
        info is not None and info.compute_capabilities == () and info.batch == BatchRange(1, 1, 1)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compute_capability", "9.0"], r"--compute_capability 9.0: TensorRT-RTX 1\.\S+ knows 7.5, 8.0, 8.6, 8.9, 12.0.*--flavor tensorrt"),
        (["--compute_capability", "7.5", "-p", "bf16"], r"compute capability 7.5 has no BF16"),
        (["--compute_capability", "7.5,8.9"], r"--compute_capability 7.5: TensorRT-RTX .*--flavor tensorrt"),
        (["--timing_cache", "t.cache"], r"--timing_cache: TensorRT-RTX 1\.\S+ does not support it; leave it out"),
        (["--version_compatible"], r"--version_compatible: TensorRT-RTX .*--flavor tensorrt"),
        (["--hardware_compatible"], r"--hardware_compatible: TensorRT-RTX .*from Ampere"),
        (["--dla_core", "0"], r"--dla_core: TensorRT-RTX .*leave it out to build for the GPU"),
    ],
)  # fmt: skip
def test_rtx_refuses(options: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    pytest.importorskip("tensorrt_rtx", reason="needs requirements-rtx.txt")
    assert build(model, tmp_path / "toy.engine", "--flavor", "tensorrt_rtx", *options) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error)
    assert [p.name for p in tmp_path.iterdir()] == ["onnx"]


# --- what each TensorRT is asked ------------------------------------------------------------------


def test_86_is_asked_for_fp16_by_flag_and_keeps_the_ends_in_float32(tensorrt: TensorRT, model: Path, tmp_path: Path) -> None:  # fmt: skip
    tensorrt("8.6.1")
    path = tmp_path / "toy.engine"
    assert build(model, path, "--batch_size", "1,4,8") == 0
    plan = plan_of(path)
    assert plan["flags"] == ["FP16", "OBEY_PRECISION_CONSTRAINTS"] and not plan["strong"]
    kinds = layer_types(plan)
    assert {name for name, kind in kinds.items() if kind == "FP16"} == set(toy.BODY)
    assert {name for name, kind in kinds.items() if kind == "FP32"} == set(toy.PREPROCESSING)
    assert kinds["nms/EfficientNMS"] == "INT32"  # its first output; scores and boxes follow
    scores = next(layer for layer in plan["layers"] if layer["Name"] == "nms/EfficientNMS")["Outputs"][2]  # fmt: skip
    assert scores["Format/Datatype"] == "Row major linear FP32 format"
    shapes = [[n, toy.SIZE, toy.SIZE, 3] for n in (1, 4, 8)]
    assert plan["shapes"] == [{"input": shapes}]
    info = read_sidecar(path)
    assert info is not None
    assert (info.flavor, info.version, info.precision) == ("tensorrt", "8.6.1", "fp16")
    assert info.layers == {"FP16": len(toy.BODY), "FP32": len(toy.PREPROCESSING) + 1}
    assert info.layers_source == "engine inspector"


@pytest.mark.parametrize("version", ["10.0.1", "10.13.3.9", "11.1.0"])
@pytest.mark.parametrize(("precision", "narrow"), [("fp16", {"FP16", "Half"}), ("bf16", {"BF16", "Bf16"})])  # fmt: skip
def test_10_and_11_get_the_precision_in_the_graph(version: str, precision: str, narrow: set[str], tensorrt: TensorRT, model: Path, tmp_path: Path) -> None:  # fmt: skip
    tensorrt(version)
    path = tmp_path / "toy.engine"
    assert build(model, path, "--precision", precision) == 0
    plan = plan_of(path)
    assert plan["flags"] == [] and plan["strong"]
    kinds = layer_types(plan)
    cast = f"normal/{precision}/cast"
    assert {name for name, kind in kinds.items() if kind in narrow} == {*toy.BODY, cast}
    assert next(layer for layer in plan["layers"] if layer["LayerType"] == "PLUGIN_V2")["Name"] == "nms/EfficientNMS"  # fmt: skip
    info = read_sidecar(path)
    assert info is not None and info.layers[precision.upper()] == len(toy.BODY)


@pytest.mark.parametrize("version", ["8.6.1", "10.13.3.9", "11.1.0"])
@pytest.mark.parametrize(("precision", "flags"), [("fp32", []), ("tf32", ["TF32"])])
def test_fp32_means_fp32_and_tf32_is_asked_for(version: str, precision: str, flags: list[str], tensorrt: TensorRT, model: Path, tmp_path: Path) -> None:  # fmt: skip
    tensorrt(version)
    path = tmp_path / "toy.engine"
    assert build(model, path, "--precision", precision) == 0
    plan = plan_of(path)
    assert plan["flags"] == flags
    assert not {"FP16", "Half"} & set(layer_types(plan).values())
    assert plan["strong"] == (version != "8.6.1")


def test_settings_reach_the_builder(tensorrt: TensorRT, model: Path, tmp_path: Path) -> None:
    tensorrt("10.13.3.9")
    path = tmp_path / "toy.engine"
    options = ["--workspace", 1.5, "--optimization_level", 5, "--version_compatible", "--hardware_compatible", "--strip"]  # fmt: skip
    assert build(model, path, *options, "-d", "2,3,4") == 0
    plan = plan_of(path)
    assert plan["flags"] == ["STRIP_PLAN", "VERSION_COMPATIBLE"]
    assert plan["pools"] == {"WORKSPACE": 1610612736}
    assert plan["settings"] == {
        "builder_optimization_level": 5,
        "hardware_compatibility_level": 1,
        "profiling_verbosity": 1,
    }
    info = read_sidecar(path)
    assert info is not None
    assert info.version_compatible and info.hardware_compatible and info.stripped
    assert info.batch == BatchRange(2, 3, 4)


def test_dla_is_weakly_typed_on_10(tensorrt: TensorRT, model: Path, tmp_path: Path) -> None:
    tensorrt("10.3.0", DLA_CORES=2)
    path = tmp_path / "toy.engine"
    assert build(model, path, "--dla_core", 1) == 0
    plan = plan_of(path)
    assert plan["flags"] == ["FP16", "GPU_FALLBACK", "OBEY_PRECISION_CONSTRAINTS"]
    assert not plan["strong"]
    assert (plan["settings"]["DLA_core"], plan["settings"]["default_device_type"]) == (1, 1)
    info = read_sidecar(path)
    assert info is not None and info.dla_core == 1


def test_dla_is_strongly_typed_on_11(tensorrt: TensorRT, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    module = tensorrt("11.4.1", DLA_CORES=2)
    asked = []
    monkeypatch.setattr(module.OnnxParser, "set_flag", lambda self, flag: asked.append(flag.name))
    path = tmp_path / "toy.engine"
    assert build(model, path, "--dla_core", 0) == 0
    plan = plan_of(path)
    assert plan["flags"] == ["GPU_FALLBACK"] and plan["strong"]
    assert asked == ["ADJUST_FOR_DLA"]


def test_weights_in_a_file_of_their_own_are_part_of_the_hash(
    tensorrt: TensorRT, model: Path, tmp_path: Path
) -> None:
    """Of an engine's sidecar, and of what create_onnx.py converted; anybody can compute it."""
    tensorrt("10.13.3")
    split, data = tmp_path / "split.onnx", tmp_path / "split.onnx.data"
    onnx.save(onnx.load(model), split, save_as_external_data=True, location=data.name, size_threshold=0)  # fmt: skip
    hashes = []
    for _ in range(2):
        assert build(split, tmp_path / "toy.engine") == 0
        info = read_sidecar(tmp_path / "toy.engine")
        assert info is not None
        assert info.onnx_sha256 == provenance(split)["sha256"]
        assert info.onnx_sha256 == hashlib.sha256(split.read_bytes() + data.read_bytes()).hexdigest()  # fmt: skip
        hashes.append(info.onnx_sha256)
        weights = np.frombuffer(data.read_bytes(), np.float32) * np.float32(0.5)
        data.write_bytes(weights.tobytes())
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize(
    ("version", "settings", "options", "message"),
    [
        ("8.6.1", {}, ["-p", "bf16"], "--precision bf16: TensorRT 8.6.1 does not support it; use fp16, or TensorRT 10 or later"),
        ("8.6.1", {}, ["--strip"], "--strip: TensorRT 8.6.1 does not support it; build without it, or with TensorRT 10"),
        ("10.3.0", {}, ["--compute_capability", "8.9"], "--compute_capability: TensorRT 10.3.0 does not support it; it builds for the GPU that is here; use --hardware_compatible"),
        ("10.3.0", {}, ["--dla_core", "0"], "--dla_core 0: TensorRT 10.3.0 finds 0 DLA cores here; leave it out"),
        ("10.3.0", {"DLA_CORES": 2}, ["--dla_core", "2"], "--dla_core 2: TensorRT 10.3.0 finds 2 DLA cores here"),
        ("10.3.0", {"DLA_CORES": 2}, ["--dla_core", "0", "-p", "fp32"], "--precision fp32: a DLA computes in FP16 or INT8 only (TensorRT 10.3.0); use --precision fp16"),
        ("11.1.0", {"DLA_CORES": 2}, ["--dla_core", "0"], "--dla_core: TensorRT 11.1.0 does not support it; leave it out to build for the GPU"),
        ("10.3.0", {"HAS_TF32": False}, ["-p", "tf32"], "--precision tf32: this GPU has no TF32 (TensorRT 10.3.0); it takes Ampere or later, use fp32"),
        ("8.6.1", {"HAS_FP16": False}, ["-p", "fp16"], "--precision fp16: this GPU has no fast FP16 (TensorRT 8.6.1); use fp32"),
        ("10.3.0", {"NO_GPU": True}, [], "TensorRT 10.3.0: the builder does not start; it needs an NVIDIA GPU and its driver (without them: --flavor tensorrt_rtx): CUDA initialization failure with error: 35"),
        ("10.3.0", {"FAILS": "out of memory"}, [], "TensorRT 10.3.0: the builder failed: IBuilder::buildSerializedNetwork: out of memory"),
        ("8.6.1", {"KEEPS_FLOAT": True}, [], "--precision fp16: no layer of the engine computes in FP16 (FP32 100% of 25 layers (engine inspector)); use --precision fp32"),
        ("10.3.0", {}, ["--plugins", "/nowhere/libx.so"], "plugin library /nowhere/libx.so: expected a shared library for TensorRT 10.3.0, but it does not load"),
    ],
)  # fmt: skip
def test_refusals_name_the_version_and_leave_nothing(version: str, settings: dict[str, Any], options: list[str], message: str, tensorrt: TensorRT, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    tensorrt(version, **settings)
    assert build(model, tmp_path / "toy.engine", "--timing_cache", tmp_path / "t.cache", *options) == 1  # fmt: skip
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {message}")
    left = {p.name for p in tmp_path.iterdir()}
    assert left <= {"onnx", "t.cache"} and ("t.cache" in left) == bool(settings.get("KEEPS_FLOAT"))


def test_failed_build_leaves_the_old_engine_alone(tensorrt: TensorRT, model: Path, tmp_path: Path) -> None:  # fmt: skip
    tensorrt("10.3.0")
    path = tmp_path / "toy.engine"
    assert build(model, path, "-p", "fp32") == 0
    before = path.read_bytes(), sidecar_path(path).read_bytes()
    tensorrt("10.3.0", FAILS="no")
    assert build(model, path) == 1
    assert (path.read_bytes(), sidecar_path(path).read_bytes()) == before
    assert len(list(tmp_path.iterdir())) == 3


# --- the model and its batch ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "asked", "want"),
    [("N", None, (1, 1, 1)), ("N", "3", (3, 3, 3)), (4, None, (4, 4, 4)), (4, "4", (4, 4, 4)), (4, "4,4,4", (4, 4, 4))],
)  # fmt: skip
def test_batch_sizes(own: int | str, asked: str | None, want: tuple[int, int, int], tensorrt: TensorRT, tmp_path: Path) -> None:  # fmt: skip
    tensorrt("10.3.0")
    model = toy.save(tmp_path / "toy.onnx", batch=own)
    path = tmp_path / "toy.engine"
    assert build(model, path, *(["--batch_size", asked] if asked else [])) == 0
    info = read_sidecar(path)
    assert info is not None and info.batch == BatchRange(*want)
    assert len(plan_of(path)["shapes"]) == (1 if own == "N" else 0)


def test_batch_that_the_model_does_not_have(tensorrt: TensorRT, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    tensorrt("10.3.0")
    model = toy.save(tmp_path / "toy.onnx", batch=4)
    assert build(model, tmp_path / "toy.engine", "-b", "1,2,8") == 1
    refused = "--batch_size 1,2,8: the ONNX file has a fixed batch of 4; use --batch_size 4"
    assert refused in capsys.readouterr().err
    no_images = tmp_path / "empty"  # calibration would complain of it
    no_images.mkdir()
    int8 = ["-p", "int8", "--calib_input", no_images, "--calib_cache", tmp_path / "c"]
    assert build(model, tmp_path / "toy.engine", "-b", "1:2:8", *int8) == 1
    assert refused in capsys.readouterr().err


@pytest.mark.parametrize("version", ["8.6.1", "10.3.0"])
def test_every_parser_error_is_shown_with_its_node(version: str, tensorrt: TensorRT, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    tensorrt(version)
    broken = onnx.load(model)
    for name in ("stem_sigmoid", "merge"):
        node = next(n for n in broken.graph.node if n.name == name)
        node.op_type, node.domain = f"My{name.title()}", "mine"
    broken.opset_import.append(onnx.helper.make_opsetid("mine", 1))
    onnx.save(broken, model)
    assert build(model, tmp_path / "toy.engine", "-p", "fp32") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        f"TensorRT {version}: the ONNX parser refused the model: MyStem_Sigmoid 'stem_sigmoid' (inputs stem_n; from the network of the "
        "source): Plugin not found: MyStem_Sigmoid; TensorRT knows no such operator: load its plugin with --plugins, or give it the name "
        "of a plugin with create_onnx.py --map_op; MyMerge 'merge' (inputs fine, raised; from"
        in error
    )


def test_real_parser_errors_are_shown(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    pytest.importorskip("tensorrt_rtx", reason="needs requirements-rtx.txt")
    broken = onnx.load(model)
    node = next(n for n in broken.graph.node if n.name == "merge")
    node.op_type, node.domain = "MyMerge", "mine"
    broken.opset_import.append(onnx.helper.make_opsetid("mine", 1))
    onnx.save(broken, model)
    assert build(model, tmp_path / "toy.engine", "-p", "fp32", "--flavor", "tensorrt_rtx") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the ONNX parser refused the model: MyMerge 'merge' (inputs fine, raised; from the network of the source): " in error  # fmt: skip


def test_a_custom_operator_is_not_run_by_onnx_runtime(model: Path, tensorrt: TensorRT, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """FP16 builds unchecked and says so; INT8 cannot be calibrated."""
    tensorrt("10.3.0")
    custom = onnx.load(model)
    node = next(n for n in custom.graph.node if n.name == "merge")
    node.op_type, node.domain = "MyMerge", "mine"
    custom.opset_import.append(onnx.helper.make_opsetid("mine", 1))
    onnx.save(custom, model)
    assert (
        build(model, tmp_path / "toy.engine", "-p", "fp16") == 1
    )  # the stand-in has no such plugin
    error = capsys.readouterr().err
    assert (
        "ONNX Runtime does not know mine::MyMerge: not checked whether FP16 holds the activations"
        in error
    )
    assert "the ONNX parser refused the model: MyMerge 'merge'" in error
    photos = str(Path(about.PHOTOGRAPH).parent)
    assert build(model, tmp_path / "toy.engine", "-p", "int8", "--calib_input", photos) == 1
    assert (
        "calibration runs the model in ONNX Runtime, which does not know mine::MyMerge"
        in capsys.readouterr().err
    )


def test_graph_that_onnx_itself_refuses(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    broken = onnx.load(model)
    next(n for n in broken.graph.node if n.name == "merge").domain = "undeclared"
    onnx.save(broken, model)
    assert build_engine.main(["--onnx", str(model), "--save_onnx", str(tmp_path / "x.onnx")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {model}: expected a valid ONNX graph, ONNX says: ")
    assert "undeclared" in error and [p.name for p in tmp_path.iterdir()] == ["onnx"]


def test_model_without_the_four_outputs(tensorrt: TensorRT, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    tensorrt("10.3.0")
    model = toy.save(tmp_path / "toy.onnx", with_nms=False)
    assert build(model, tmp_path / "toy.engine") == 1
    assert "expected the outputs num_detections, detection_boxes, detection_scores, detection_classes, found raw_boxes, class_logits; convert" in capsys.readouterr().err  # fmt: skip


def test_files_that_are_no_models(tensorrt: TensorRT, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    tensorrt("10.3.0")
    path = tmp_path / "x.onnx"
    assert build(path, tmp_path / "x.engine") == 1
    assert f"--model: expected an ONNX file, found nothing at {path}" in capsys.readouterr().err
    labels = tmp_path / "labels.txt"
    labels.write_text("person\ncar\n")
    assert build(labels, tmp_path / "x.engine") == 1
    assert f"--model: expected an ONNX file, {labels} is a text file" in capsys.readouterr().err  # fmt: skip
    path.write_text("no model")
    assert build(path, tmp_path / "x.engine") == 1
    assert "x.onnx: expected an ONNX file, found a text file" in capsys.readouterr().err
    foreign = toy.network()
    del foreign.metadata_props[:]
    onnx.save(foreign, path)
    assert build(path, tmp_path / "x.engine") == 1
    assert "expected an ONNX file written by create_onnx.py" in capsys.readouterr().err


# --- timing cache, interruption -------------------------------------------------------------------


def test_timing_cache_is_kept_and_a_stale_one_replaced(tensorrt: TensorRT, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    cache = tmp_path / "timing.cache"
    for version, warned in (("10.3.0", False), ("10.3.0", False), ("10.13.3", True)):
        tensorrt(version)
        assert build(model, tmp_path / "toy.engine", "--timing_cache", cache) == 0
        assert cache.read_text() == f"timings of {version}"
        text = f"{cache} was not made by TensorRT {version} on this GPU (ITimingCache: version tag does not match); it is begun anew"  # fmt: skip
        assert (text in capsys.readouterr().err) == warned


@pytest.mark.parametrize("version", ["8.6.1", "10.3.0"])
def test_interrupt_stops_the_builder(version: str, tensorrt: TensorRT, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """8.6 has no way to stop it: its engine is thrown away."""
    module = tensorrt(version, ON_BUILD=lambda: os.kill(os.getpid(), signal.SIGINT))
    handler = signal.getsignal(signal.SIGINT)
    assert build(model, tmp_path / "toy.engine") == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert module.builders[0].cancelled == (version != "8.6.1")
    assert [p.name for p in tmp_path.iterdir()] == ["onnx"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_errors_that_the_builder_copes_with_are_shown(tensorrt: TensorRT, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    def complain() -> None:
        flavor.find_flavor().logger.log(standin.Severity.ERROR, "tactic skipped")

    tensorrt("10.3.0", ON_BUILD=complain)
    assert build(model, tmp_path / "toy.engine") == 0
    assert "W tactic skipped" in capsys.readouterr().err.splitlines()


# --- FP16's range ---------------------------------------------------------------------------------


def test_activations_are_looked_at_and_what_stays_float32_is_said(tensorrt: TensorRT, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    tensorrt("10.3.0")
    network = toy.network()
    toy.set_weight(network, "down_w", toy.weight(network, "down_w") * 2e4)
    model = tmp_path / "toy.onnx"
    onnx.save(network, model)
    path = tmp_path / "toy.engine"
    assert build(model, path) == 0
    log = capsys.readouterr().err
    assert "W stays float32: Conv 'down': activation 'coarse': largest magnitude" in log
    assert "largest activation on 1 image(s)" in log
    kinds = layer_types(plan_of(path))
    assert kinds["down"] == kinds["merge"] == "FP32" and kinds["stem"] == "FP16"


def test_own_images_are_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(40):
        pixels = np.full((toy.SIZE, toy.SIZE, 3), 255 if index == 39 else 100, np.uint8)
        Image.fromarray(pixels).save(photos / f"{index:02}.png")
    model = toy.save(tmp_path / "toy.onnx", batch=2)
    ranges = prepare.measure_ranges(onnx.load(model), toy.SPEC, photos)
    assert ranges is not None
    white = engine_ranges(model, 255.0)
    assert {name: pytest.approx(value, rel=1e-5) for name, value in ranges.items()} == {
        name: max(value, engine_ranges(model, 100.0)[name]) for name, value in white.items()
    }


def engine_ranges(model: Path, value: float) -> dict[str, float]:
    image = np.full((2, toy.SIZE, toy.SIZE, 3), value, np.float32)
    return floats.activation_ranges(onnx.load(model), [{"input": image}])


def test_own_images_that_cannot_be_read_are_left_out(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"no image")
    options = ["--onnx", str(model), "--save_onnx", str(tmp_path / "o.onnx"), "--fp16_check_input", str(folder)]  # fmt: skip
    assert build_engine.main(options) == 1
    assert f"error: --fp16_check_input: expected images that can be read, found none in {folder}" in capsys.readouterr().err  # fmt: skip
    Image.new("RGB", (20, 10)).save(folder / "good.png")
    assert build_engine.main(options) == 0
    error = capsys.readouterr().err
    assert "W --fp16_check_input: " in error and "broken.png is left out: " in error
    assert "largest activation on 1 image(s)" in error
    (folder / "good.png").unlink()
    (folder / "broken.png").unlink()
    assert build_engine.main(options) == 1
    assert "error: --fp16_check_input: expected images (" in capsys.readouterr().err


@pytest.mark.parametrize(("precision", "narrow"), [("fp16", 10), ("bf16", 16)])
def test_nodes_by_name_stay_float32(precision: str, narrow: int, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    output = tmp_path / "o.onnx"
    options = ["--onnx", str(model), "--save_onnx", str(output), "--precision", precision]
    assert build_engine.main([*options, "--keep_fp32", "class_?", "--keep_fp32", "down"]) == 0
    weights = {t.name: t.data_type for t in onnx.load(output).graph.initializer}
    assert (weights["class_w"], weights["down_w"], weights["stem_w"], weights["box_w"]) == (1, 1, narrow, narrow)  # fmt: skip
    error = capsys.readouterr().err
    assert "I stays float32: 2 nodes, asked for ('class_?')\n" in error and "W " not in error
    assert build_engine.main([*options, "--keep_fp32", "klass"]) == 1
    assert "error: --keep_fp32 'klass': no node has such a name" in capsys.readouterr().err


def test_without_onnx_runtime_the_check_is_missed_aloud(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    arguments = ["--onnx", str(model), "--save_onnx", str(tmp_path / "half.onnx")]
    assert build_engine.main(arguments) == 0
    assert "ONNX Runtime is not installed: not checked whether FP16 holds" in capsys.readouterr().err  # fmt: skip
    assert build_engine.main([*arguments, "--fp16_check_input", str(tmp_path)]) == 1
    assert "--fp16_check_input runs the model in ONNX Runtime: pip install" in capsys.readouterr().err  # fmt: skip


# --- --save_onnx ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "weights"), [("fp32", 1), ("tf32", 1), ("fp16", 10), ("bf16", 16)])  # fmt: skip
def test_prepared_model_without_any_tensorrt(precision: str, weights: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    for name in flavor.FLAVORS:
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "prepared.onnx"
    arguments = ["--onnx", str(model), "--precision", precision, "--save_onnx", str(path)]
    assert build_engine.main(arguments) == 0
    assert capsys.readouterr().out == f"{path}\n"
    prepared = onnx.load(path)
    assert ModelSpec.from_onnx(prepared) == toy.SPEC
    assert lowering.has_plugin(prepared)
    assert next(t.data_type for t in prepared.graph.initializer if t.name == "stem_w") == weights
    assert build_engine.main([*arguments, "--engine", str(tmp_path / "x.engine")]) == 1
    assert "no usable TensorRT" in capsys.readouterr().err


def test_a_prepared_model_can_be_built_but_not_for_another_precision(tensorrt: TensorRT, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    tensorrt("10.13.3")
    half = tmp_path / "half.onnx"
    assert (
        build_engine.main(["--onnx", str(model), "--save_onnx", str(half), "--precision", "fp16"])
        == 0
    )
    assert build(half, tmp_path / "a.engine", "--precision", "fp16") == 0
    assert build(half, tmp_path / "b.engine", "--precision", "fp32") == 1
    assert "is in fp16 already; give the float32 file" in capsys.readouterr().err
    assert not (tmp_path / "b.engine").exists()


def test_the_source_is_not_overwritten(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = model.read_bytes()
    again = model.parent / ".." / model.parent.name / model.name
    assert build_engine.main(["--onnx", str(model), "--save_onnx", str(again)]) == 1
    assert "is an input" in capsys.readouterr().err
    assert model.read_bytes() == before


def test_prepared_model_is_what_is_built(tensorrt: TensorRT, model: Path, tmp_path: Path) -> None:
    tensorrt("10.3.0")
    prepared, path = tmp_path / "half.onnx", tmp_path / "toy.engine"
    assert build(model, path, "--save_onnx", prepared) == 0
    names = [node.name for node in onnx.load(prepared).graph.node]
    assert [layer["Name"] for layer in plan_of(path)["layers"]] == names


@pytest.mark.parametrize(
    ("version", "precision", "options", "settings", "flags"),
    [
        ("8.6.1", "fp16", [], {}, "--fp16 --precisionConstraints=obey"),
        ("10.3.0", "fp16", ["--weak_typing"], {}, "--fp16 --precisionConstraints=obey"),
        ("10.3.0", "fp16", ["--dla_core", 1], {"DLA_CORES": 2}, "--fp16 --precisionConstraints=obey --useDLACore=1 --allowGPUFallback"),
        ("8.6.1", "fp32", [], {}, ""),
        ("10.3.0", "fp16", [], {}, ""),
        ("11.1.0", "bf16", [], {}, ""),
    ],
)  # fmt: skip
def test_saved_file_is_what_tensorrt_is_given(version: str, precision: str, options: list[object], settings: dict[str, Any], flags: str, tensorrt: TensorRT, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """To the byte; the flags that it takes besides are said."""
    module = tensorrt(version, **settings)
    given: list[bytes] = []
    parse = module.OnnxParser.parse
    monkeypatch.setattr(module.OnnxParser, "parse", lambda self, text: given.append(text) or parse(self, text))  # fmt: skip
    saved, path = tmp_path / "saved.onnx", tmp_path / "toy.engine"
    assert build(model, path, "--precision", precision, "--save_onnx", saved, "-v", *options) == 0
    assert given == [saved.read_bytes()]
    log = capsys.readouterr().err
    warned = [line for line in log.splitlines() if "takes the precision as flags" in line]
    if not flags:
        assert warned == []
        return
    assert len(warned) == 1 and f"for trtexec: {flags}" in warned[0]
    assert "--layerPrecisions and --layerOutputTypes, which -v shows" in warned[0]
    layers, *outputs = re.findall(r"--layer(?:Precisions|OutputTypes)=(\S+)", log)
    assert outputs == [layers]
    pinned = {name for name, kind in plan_of(path)["pinned"].items() if kind == "FLOAT"}
    assert pinned <= {name.removesuffix(":fp32") for name in layers.split(",")}


# --- sidecar --------------------------------------------------------------------------------------

INFO = EngineInfo(
    spec=toy.SPEC,
    flavor="tensorrt",
    version="10.3.0",
    precision="fp16",
    batch=BatchRange(1, 2, 4),
    compute_capabilities=("8.9",),
    dla_core=0,
    version_compatible=True,
    plugins=("libx.so",),
    layers={"FP16": 3},
    layers_source="plan",
)


def test_sidecar_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "x.engine"
    written = write_engine(path, b"plan", INFO)
    assert path.read_bytes() == b"plan"
    assert read_sidecar(path) == written == dataclasses.replace(INFO, engine_sha256=written.engine_sha256)  # fmt: skip
    assert sidecar_path(path).name == "x.engine.json"
    assert read_spec(path) == read_spec(sidecar_path(path)) == toy.SPEC
    sidecar_path(path).unlink()
    assert read_sidecar(path) is None


def test_sidecar_of_another_engine_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.engine"
    write_engine(path, b"plan", INFO)
    path.write_bytes(b"built by trtexec since")
    with pytest.raises(EngineError, match=r"x.engine.json was written for another engine than x.engine is now; build"):  # fmt: skip
        read_sidecar(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "expected schema 1, found 2"),
        ({"batch": {"min": 4, "opt": 2, "max": 1}}, "batch: batch sizes: expected 1 <= MIN"),
        ({"batch": 3}, "batch: expected an object, found 3"),
        ({"model_spec": {}}, "model_spec: expected schema 1, found null"),
        ({"later_field": 1}, None),
    ],
)
def test_sidecars_that_are_not_readable(change: dict[str, Any], message: str | None, tmp_path: Path) -> None:  # fmt: skip
    path = tmp_path / "x.engine"
    path.write_bytes(b"plan")
    sidecar_path(path).write_text(json.dumps(INFO.to_dict() | change))
    if message is None:
        assert read_sidecar(path) == INFO
        return
    with pytest.raises(EngineError, match=rf"x.engine.json: .*{message}"):
        read_sidecar(path)


def test_new_engine_never_stands_beside_an_old_sidecar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    path = tmp_path / "x.engine"
    write_engine(path, b"old", INFO)

    def fail(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(sidecar.json, "dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        write_engine(path, b"new", INFO)
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and read_sidecar(path) is not None
    assert len(list(tmp_path.iterdir())) == 2


def test_engine_without_its_sidecar_rather_than_with_an_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    path = tmp_path / "x.engine"
    write_engine(path, b"old", INFO)
    replace = Path.replace

    def fail_on_sidecar(self: Path, target: Path) -> Path:
        if target.suffix == ".json":
            raise OSError(errno.ENOSPC, "disk full")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_on_sidecar)
    with pytest.raises(OSError, match="disk full"):
        write_engine(path, b"new", INFO)
    assert [p.name for p in tmp_path.iterdir()] == ["x.engine"] and path.read_bytes() == b"new"


# --- command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing --model FILE"),
        (["--onnx", "a.onnx"], "nothing to write: give --engine, --save_onnx or both"),
        (["--onnx", "a.onnx", "--engine", "b.onnx"], "--engine: an engine, not ONNX; did you mean --save_onnx b.onnx?"),
        (["--onnx", "a.onnx", "--save_onnx", "a.onnx"], "expected different files"),
        (["--onnx", "a", "--save_onnx", "b", "-b", "4"], "without --engine nothing is built: leave out all but"),
        (["--onnx", "a", "--save_onnx", "b", "--flavor", "tensorrt"], "without --engine nothing is built"),
        (["--onnx", "a", "-e", "b", "-p", "bf16", "--fp16_check_input", "c"], "--fp16_check_input goes with --precision fp16"),
        (["--onnx", "a", "-e", "b", "-b", "4,2,8"], "expected N or MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX <= 65536, got '4,2,8'"),
        (["--onnx", "a", "-e", "b", "-b", "0"], "got '0'"),
        (["--onnx", "a", "-e", "b", "-b", "1,2"], "got '1,2'"),
        (["--onnx", "a", "-e", "b", "-d", "4"], "expected MIN,OPT,MAX, got '4'"),
        (["--onnx", "a", "-e", "b", "-w", "-1"], "expected a size in GiB above 0, got '-1'"),
        (["--onnx", "a", "-e", "b", "-p", "mixed"], "invalid choice: 'mixed'"),
        (["--onnx", "a", "-e", "b", "--optimization_level", "6"], "invalid choice: 6"),
    ],
)  # fmt: skip
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        build_engine.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_options_of_the_old_sample_are_taken() -> None:
    args = build_engine.parse_args(["-o", "a.onnx", "-e", "a.engine", "-d", "1,4,8", "-p", "fp16", "-w", "8", "-v", "--timing_cache", "t"])  # fmt: skip
    options = build_engine.options_from(args)
    assert options == BuildOptions("fp16", BatchRange(1, 4, 8), 8.0, Path("t"))
    assert args.verbose
    assert BuildOptions() == build_engine.options_from(build_engine.parse_args(["-o", "a", "-e", "b"]))  # fmt: skip
