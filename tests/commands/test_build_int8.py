# SPDX-License-Identifier: Apache-2.0
"""build_engine.py --precision int8: calibration, its cache, the model it prepares, and an engine
by TensorRT-RTX.
"""

import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import standin_tensorrt_builder as standin
from conftest import EXAMPLES
from onnx import TensorProto
from PIL import Image

from trtdet import sessions
from trtdet.commands import build_engine, create_onnx, eval_coco
from trtdet.engine import build as engine_build
from trtdet.engine import config, support
from trtdet.engine.layers import LayerShares
from trtdet.engine.sidecar import read_sidecar
from trtdet.errors import EngineError
from trtdet.nms import lowering
from trtdet.precision import body, calibration, calibration_cache, costs
from trtdet.precision.body import Body, block_of
from trtdet.precision.calibration_cache import read_cache
from trtdet.precision.file import PrecisionFile
from trtdet.precision.prepare import load_model

IMAGES = EXAMPLES / "images"
#: AP of the FP32 model on the example's 12 images (test_chain.py).
FP32_AP = 0.7987


def build(model: Path, *options: object) -> int:
    """All in INT8: what is left out by itself has its own tests."""
    return build_chosen(model, "--int8_share", 1, *options)


def build_chosen(model: Path, *options: object) -> int:
    return build_engine.main(["--onnx", str(model), "--precision", "int8", *map(str, options)])


def calibrate_with(model: Path, output: Path, *options: object) -> int:
    """Calibrate on two images, without a cache."""
    few = ["--calib_input", IMAGES, "--calib_num_images", 2, "--save_onnx", output]
    return build(model, *few, *options)


def error_of(captured: pytest.CaptureFixture[str]) -> str:
    return captured.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def calibrated(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with int8.onnx and its tiny.cache, calibrated on the example's images."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("int8")
    options = ["--calib_input", IMAGES, "--calib_cache", folder / "tiny.cache"]
    assert build(tiny_onnx, "--save_onnx", folder / "int8.onnx", *options) == 0
    return folder


@pytest.fixture
def cache(calibrated: Path, tmp_path: Path) -> Path:
    """A copy of the cache, to be spoiled."""
    for name in ("tiny.cache", "tiny.cache.json"):
        (tmp_path / name).write_bytes((calibrated / name).read_bytes())
    return tmp_path / "tiny.cache"


# --- what is prepared -----------------------------------------------------------------------------


def test_prepared_model_detects_as_well_as_float32(calibrated: Path, tmp_path: Path) -> None:
    output = tmp_path / "metrics.json"
    arguments = ["--engine", calibrated / "int8.onnx", "--input", IMAGES]
    arguments += ["--annotations", EXAMPLES / "annotations.json", "--json", output]
    assert eval_coco.main([str(a) for a in arguments]) == 0
    ap = json.loads(output.read_text())["AP"]
    print(f"AP in INT8 {ap:.4f}, in FP32 {FP32_AP}")
    assert FP32_AP - 0.010 < ap < FP32_AP + 0.020  # measured 2026-11-21: 0.8120


def test_report_names_the_blocks(tiny_onnx: Path, calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    path = tmp_path / "m.onnx"
    assert build(tiny_onnx, "--save_onnx", path, "--calib_cache", calibrated / "tiny.cache") == 0
    captured = capsys.readouterr()
    assert captured.out == f"{path}\n"
    assert "INT8: 99.9% of the multiply-accumulates" in captured.err
    assert re.search(r"I stem +7.3% +100.0%  1 of 1\n", captured.err)
    assert re.search(r"I box_net +5.7% +100.0%  30 of 30\n", captured.err)
    # The cache alone gives what the calibration gave.
    assert path.read_bytes() == (calibrated / "int8.onnx").read_bytes()


def input_types(model: onnx.ModelProto) -> dict[str, set[str]]:
    """Type of the weights that convolutions read -> names; "INT8" where a DequantizeLinear makes
    them.
    """
    graph = onnx.shape_inference.infer_shapes(model, check_type=True).graph
    stored = {w.name: w.data_type for w in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    found: dict[str, set[str]] = {}
    for node in graph.node:
        if node.op_type == "Conv":
            maker = made_by.get(node.input[1])
            kind = TensorProto.DataType.Name(stored[maker.input[0] if maker else node.input[1]])
            found.setdefault(kind, set()).add(node.name)
    return found


def test_patterns_keep_convolutions_in_the_type_they_name(tiny_onnx: Path, calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    path = tmp_path / "m.onnx"
    options = ["--save_onnx", path, "--calib_cache", calibrated / "tiny.cache", "--keep_fp32"]
    assert build(tiny_onnx, *options, "*/stem/*", "--keep_fp32", "*/blocks_0/*", "--keep_fp16", "*/blocks_1/*") == 0  # fmt: skip
    error = capsys.readouterr().err
    model = onnx.load(path)
    found = input_types(model)
    assert found.keys() == {"INT8", "FLOAT16", "FLOAT"}
    assert {block_of(name) for name in found["FLOAT"]} == {"stem", "blocks_0"}
    assert {block_of(name) for name in found["FLOAT16"] if "/se/" not in name} == {"blocks_1"}
    assert len(found["FLOAT"]) == 5 and len(found["INT8"]) == 121 - 1 - 2 - 3
    assert "I not in INT8: 1 x asked for ('*/stem/*')\n" in error
    # One Cast behind the float32 part, one at each head.
    assert sum(node.op_type == "Cast" for node in model.graph.node) == 3
    assert build(tiny_onnx, *options, "*/steam/*") == 1
    assert error_of(capsys).startswith("error: --keep_fp32 '*/steam/*': no convolution has such a name; theirs are ")  # fmt: skip


def test_rest_in_float32(tiny_onnx: Path, calibrated: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    options = ["--save_onnx", path, "--calib_cache", calibrated / "tiny.cache"]
    assert build(tiny_onnx, *options, "--rest_precision", "fp32") == 0
    model = onnx.load(path)
    assert {name: len(convs) for name, convs in input_types(model).items()} == {"INT8": 121, "FLOAT": 16}  # fmt: skip
    assert not [node.name for node in model.graph.node if node.op_type == "Cast"]


def test_rest_in_fp16_takes_two_casts(calibrated: Path) -> None:
    model = onnx.load(calibrated / "int8.onnx")
    onnx.checker.check_model(lowering.lower(model, "onnx"), full_check=True)
    assert {name: len(convs) for name, convs in input_types(model).items()} == {"INT8": 121, "FLOAT16": 16}  # fmt: skip
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    assert {node.output[0] for node in casts} == {"raw_boxes", "class_logits"}


def test_precision_json_is_obeyed_and_belongs_to_a_model(tiny_onnx: Path, calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    path, output = tmp_path / "precision.json", tmp_path / "m.onnx"
    own = Body(*load_model(tiny_onnx)).sha256
    stem = next(node.name for node in onnx.load(tiny_onnx).graph.node if node.op_type == "Conv")
    options = ["--save_onnx", output, "--calib_cache", calibrated / "tiny.cache", "--precision_json", path]  # fmt: skip
    PrecisionFile(own, "int8", {stem: "fp32", "*/blocks_1/*": "fp16"}).write(path)
    assert build(tiny_onnx, *options) == 0
    found = input_types(onnx.load(output))
    assert found["FLOAT"] == {stem} and len(found["INT8"]) == 121 - 1 - 3
    # The command line goes first.
    assert build(tiny_onnx, *options, "--keep_fp16", stem) == 0
    assert "FLOAT" not in input_types(onnx.load(output))
    output.unlink()
    for change, message in (
        ({"model_sha256": "0" * 64}, f"was made for another model: model_sha256 is '000000000000', of another graph or other weights than {own[:12]}; tune this model"),
        ({"precision": "fp8"}, "was made for --precision 'fp8', not int8"),
        ({"keep": {"*/steam/*": "fp16"}}, r": '\*/steam/\*': no convolution has such a name"),
        ({"keep": {stem: "bf16"}}, "expected fp16 or fp32, found 'bf16'"),
        ({"keep": [stem]}, "keep: expected an object, found a list of 1"),
        ({"schema": 2}, "expected schema 1, found 2; write it with tune_precision.py"),
    ):  # fmt: skip
        data = {"schema": 1, "model_sha256": own, "precision": "int8", "keep": {}, "note": ""} | change  # fmt: skip
        path.write_text(json.dumps(data))
        assert build(tiny_onnx, *options) == 1
        assert re.search(f"--precision_json {re.escape(str(path))}.*{message}", error_of(capsys))
    assert not output.exists()


def test_a_model_with_its_own_pairs_needs_no_calibration(calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    path = tmp_path / "again.onnx"
    assert build_chosen(calibrated / "int8.onnx", "--save_onnx", path) == 0
    assert path.read_bytes() == (calibrated / "int8.onnx").read_bytes()
    error = capsys.readouterr().err
    assert "(as the model came, with its own Q/DQ)" in error and "are not used" not in error
    assert (
        build_chosen(calibrated / "int8.onnx", "--save_onnx", path, "--keep_fp32", "*/stem/*") == 0
    )
    assert "W the ONNX file brings its own Q/DQ: --calib_..., --keep_..., --int8_share and --precision_json are not used" in capsys.readouterr().err  # fmt: skip


# --- the cache ------------------------------------------------------------------------------------


def test_cache_is_the_same_each_time_and_used_where_it_fits(tiny_onnx: Path, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    first, second = calibrated / "tiny.cache", tmp_path / "second.cache"
    options = ["--save_onnx", tmp_path / "m.onnx", "--calib_input", IMAGES]
    assert build(tiny_onnx, *options, "--calib_cache", second, "--calib_batch_size", 5) == 0
    assert second.read_bytes() == first.read_bytes()
    text = second.read_text()
    assert text.startswith("TRT-8601-EntropyCalibration2\n")

    def no_second_calibration(*_: object, **__: object) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr(calibration, "calibrate", no_second_calibration)
    assert build(tiny_onnx, *options, "--calib_cache", second) == 0
    assert second.read_text() == text


def test_model_of_a_fixed_batch_shares_the_cache(tiny_onnx: Path, calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    model = onnx.load(tiny_onnx)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    path, output = tmp_path / "fixed.onnx", tmp_path / "m.onnx"
    onnx.save(model, path)
    own = tmp_path / "own.cache"
    assert build(path, "--save_onnx", output, "--calib_input", IMAGES, "--calib_cache", own) == 0
    assert own.read_bytes() == (calibrated / "tiny.cache").read_bytes()
    assert build(path, "--save_onnx", output, "--calib_cache", calibrated / "tiny.cache") == 0
    assert build(path, "--save_onnx", output, "--calib_input", IMAGES, "--calib_batch_size", 8) == 1
    assert error_of(capsys) == "error: --calib_batch_size 8: the ONNX file has a fixed batch of 2; leave it out"  # fmt: skip


def test_number_share_method_and_seed_reach_the_cache(tiny_onnx: Path, tmp_path: Path) -> None:
    origins = []
    choices = [["--calib_num_images", 3], ["--calib_fraction", 0.25, "--calib_seed", 1, "--calib_method", "minmax"]]  # fmt: skip
    for i, choice in enumerate(choices):
        path = tmp_path / f"{i}.cache"
        assert build(tiny_onnx, "--save_onnx", tmp_path / "m.onnx", "--calib_input", IMAGES, "--calib_cache", path, *choice) == 0  # fmt: skip
        origins.append(json.loads((tmp_path / f"{i}.cache.json").read_text()))
    assert [(o["num_images"], o["method"], o["seed"]) for o in origins] == [(3, "mse", 47), (3, "minmax", 1)]  # fmt: skip
    assert origins[0]["images_sha256"] != origins[1]["images_sha256"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calib_method", "entropy"], "method is mse, not entropy"),
        (["--calib_input", IMAGES, "--calib_num_images", 6], r"images_sha256 is \w{12}, of 12 other images than \w{12}"),
    ],
)  # fmt: skip
def test_cache_of_another_calibration_is_refused(options: list[object], message: str, tiny_onnx: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    assert build(tiny_onnx, "--save_onnx", tmp_path / "m.onnx", "--calib_cache", cache, *options) == 1  # fmt: skip
    assert re.search(f"--calib_cache {re.escape(str(cache))} does not fit: {message}; calibrate again", error_of(capsys))  # fmt: skip
    assert not (tmp_path / "m.onnx").exists()


def test_cache_of_other_weights_is_refused(tiny_onnx: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    model = onnx.load(tiny_onnx)
    name = next(node.input[1] for node in model.graph.node if node.op_type == "Conv")
    weight = next(w for w in model.graph.initializer if w.name == name)
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(2), name))  # fmt: skip
    onnx.save(model, tmp_path / "other.onnx")
    assert build(tmp_path / "other.onnx", "--save_onnx", tmp_path / "m.onnx", "--calib_cache", cache) == 1  # fmt: skip
    assert re.search(r"does not fit: model_sha256 is \w{12}, of another graph or other weights", error_of(capsys))  # fmt: skip


def test_cache_without_sidecar_is_taken_with_a_warning(tiny_onnx: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    (tmp_path / "tiny.cache.json").unlink()
    assert build(tiny_onnx, "--save_onnx", tmp_path / "m.onnx", "--calib_cache", cache) == 0
    error = capsys.readouterr().err
    assert "W " in error and "has no tiny.cache.json beside it" in error
    assert "INT8: 99.9% of the multiply-accumulates" in error


def test_bare_cache_of_another_model_is_refused(tiny_onnx: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """One of whose tensors some have the same names: what is not in it would silently stay in
    FP16.
    """
    (tmp_path / "tiny.cache.json").unlink()
    header, *lines = cache.read_text().splitlines()
    cache.write_text("\n".join([header, *lines[: len(lines) // 2]]) + "\n")
    assert build(tiny_onnx, "--save_onnx", tmp_path / "m.onnx", "--calib_cache", cache) == 1
    found = re.search(r"tiny\.cache: (\d+) of (\d+) inputs of convolutions are not in it \(.*\); it belongs to another model, .* calibrate again", error_of(capsys))  # fmt: skip
    assert found and 20 < int(found[1]) < int(found[2])
    assert not (tmp_path / "m.onnx").exists()


def test_cache_version_is_the_first_line(tiny_onnx: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """Of a new cache and, made over, of an old one, its sidecar with it; with --save_onnx,
    without TensorRT.
    """
    scales = cache.read_text().splitlines()[1:]
    output = ["--save_onnx", tmp_path / "m.onnx"]
    assert build(tiny_onnx, *output, "--calib_cache", cache, "--calib_cache_version", "8.5.1") == 0
    assert cache.read_text().splitlines() == ["TRT-8501-EntropyCalibration2", *scales]
    assert "is now one for TRT-8501-EntropyCalibration2" in capsys.readouterr().err
    assert build(tiny_onnx, *output, "--calib_cache", cache) == 0  # it still belongs to the sidecar
    assert cache.read_text().startswith("TRT-8501-")
    new = tmp_path / "new.cache"
    photo = sorted(IMAGES.iterdir())[0]
    assert build(tiny_onnx, *output, "--calib_input", photo, "--calib_cache", new, "--calib_cache_version", "10.13.3") == 0  # fmt: skip
    assert new.read_text().splitlines()[0] == "TRT-101303-EntropyCalibration2"


def test_version_of_a_cache_that_does_not_fit_is_left_alone(tiny_onnx: Path, cache: Path, tmp_path: Path) -> None:  # fmt: skip
    before = cache.read_bytes()
    options = ["--calib_cache", cache, "--calib_cache_version", "10.3.0", "--calib_method", "entropy"]  # fmt: skip
    assert build(tiny_onnx, "--save_onnx", tmp_path / "m.onnx", *options) == 1
    assert cache.read_bytes() == before


def test_method_is_compared_where_it_is_asked_for(tiny_onnx: Path, tmp_path: Path) -> None:
    """A cache of another method than the default serves by itself."""
    path, photo = tmp_path / "tiny.cache", sorted(IMAGES.iterdir())[0]
    output = ["--save_onnx", tmp_path / "m.onnx", "--calib_cache", path]
    assert build(tiny_onnx, *output, "--calib_input", photo, "--calib_method", "minmax") == 0
    text = path.read_text()
    assert build(tiny_onnx, *output) == 0
    assert build(tiny_onnx, *output, "--calib_input", photo) == 0
    assert build(tiny_onnx, *output, "--calib_method", "mse") == 1
    assert path.read_text() == text


def test_images_that_cannot_be_read_are_left_out(tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    good, mixed, bad = (tmp_path / name for name in ("good", "mixed", "bad"))
    for folder in (good, mixed, bad):
        folder.mkdir()
    for name in ("a.png", "c.png"):
        Image.effect_noise((64, 48), 80).convert("RGB").save(good / name)
        (mixed / name).write_bytes((good / name).read_bytes())
    for folder in (mixed, bad):
        (folder / "b.png").write_bytes(b"no image")
    for folder in (good, mixed):
        assert build(tiny_onnx, "--save_onnx", tmp_path / "m.onnx", "--calib_input", folder, "--calib_cache", tmp_path / f"{folder.name}.cache") == 0  # fmt: skip
    error = capsys.readouterr().err
    assert "b.png" in error and "W calibrated on 2 of 3 images: the others cannot be read" in error
    assert (tmp_path / "mixed.cache").read_bytes() == (tmp_path / "good.cache").read_bytes()
    counts = [json.loads((tmp_path / f"{n}.cache.json").read_text())["num_images"] for n in ("good", "mixed")]  # fmt: skip
    assert counts == [2, 2]
    assert build(tiny_onnx, "--save_onnx", tmp_path / "m.onnx", "--calib_input", bad) == 1
    assert re.search(r"--calib_input: expected images that can be read, found 1 that cannot, the first of them .*b\.png", error_of(capsys))  # fmt: skip
    assert build(tiny_onnx, "--save_onnx", tmp_path / "m.onnx", "--calib_input", tmp_path / "none") == 1  # fmt: skip
    assert error_of(capsys).startswith("error: --calib_input: expected an image or a folder")


def test_provider_is_chosen(
    tiny_onnx: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """CUDA without TF32 where there is one; TensorRT is not asked to calibrate."""
    onnxruntime = pytest.importorskip("onnxruntime")
    tensorrt, cuda, cpu = (f"{name}ExecutionProvider" for name in ("Tensorrt", "CUDA", "CPU"))
    asked: list[Any] = []

    def watched(*_: Any, providers: Any, **__: Any) -> sessions.Session:
        asked.append(providers)
        raise sessions.SessionError("enough seen")

    monkeypatch.setattr(sessions, "open_session", watched)
    both = [tensorrt, cuda, cpu]
    for provider, available in (("auto", both), ("cpu", both), ("cuda", [cpu])):
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda a=available: a)
        assert calibrate_with(tiny_onnx, tmp_path / "m.onnx", "--provider", provider) == 1
    assert asked == [[(cuda, {"use_tf32": "0"}), cpu], [cpu]]
    assert "--provider cuda: this ONNX Runtime has CPUExecutionProvider only; install onnxruntime-gpu" in error_of(capsys)  # fmt: skip


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start_is_said(
    tiny_onnx: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """ONNX Runtime itself goes on with the CPU: an error where CUDA was asked for by name, else a
    warning.
    """
    onnxruntime = pytest.importorskip("onnxruntime")
    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    if cuda in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [cuda, cpu])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    model = tmp_path / "m.onnx"
    assert calibrate_with(tiny_onnx, model, "--provider", "cuda") == 1
    assert error_of(capsys).startswith(f"error: --provider cuda: {cuda} does not start here")
    assert not model.exists()
    assert calibrate_with(tiny_onnx, model) == 0
    assert f"W {cuda} does not start here (its own message is above); running on {cpu}" in capsys.readouterr().err  # fmt: skip
    assert model.exists()


# --- engines --------------------------------------------------------------------------------------


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[onnx.ModelProto]:
    """What TensorRT is given."""
    given: list[onnx.ModelProto] = []
    parse = engine_build._parse

    def keep(flavor: Any, network: Any, model: onnx.ModelProto, options: Any) -> Any:
        given.append(model)
        return parse(flavor, network, model, options)

    monkeypatch.setattr(engine_build, "_parse", keep)
    return given


def test_rtx_builds_int8_layers(tiny_onnx: Path, calibrated: Path, tmp_path: Path, parsed: list[onnx.ModelProto], capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    pytest.importorskip("tensorrt_rtx", reason="needs requirements-rtx.txt")
    path = tmp_path / "tiny.engine"
    options = ["--flavor", "tensorrt_rtx", "--compute_capability", "8.9", "--batch_size", "1,2,4"]
    assert build(tiny_onnx, "--engine", path, "--calib_cache", calibrated / "tiny.cache", *options) == 0  # fmt: skip
    captured = capsys.readouterr()
    assert not [line for line in captured.err.splitlines() if line.startswith(("W ", "E "))]
    info = read_sidecar(path)
    assert info is not None and info.precision == "int8" and info.layers_source == "plan"
    assert info.layers["INT8"] > 200 > info.layers["FP16"] > info.layers["FP32"] / 2 > 10
    assert info.int8["mac_share"] == pytest.approx(0.99885, abs=1e-4)
    assert info.int8["blocks"]["stem"] == [1, 1] and info.int8["blocks"]["blocks_1"] == [3, 5]
    assert "precision INT8 " in captured.out
    # Both inputs of every convolution but squeeze-and-excite's come from a DequantizeLinear.
    (model,) = parsed
    made_by = {output: node.op_type for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type == "Conv":
            both = [made_by.get(name) == "DequantizeLinear" for name in node.input[:2]]
            assert both == [("/se/" not in node.name)] * 2, node.name


def test_engine_without_int8_is_an_error() -> None:
    with pytest.raises(EngineError, match=r"--precision int8: no layer of the engine computes in INT8 \(FP32 100% of 5 layers \(plan\)\)"):  # fmt: skip
        engine_build._check_built(LayerShares("plan", {"FP32": 5}), "int8")
    engine_build._check_built(LayerShares("plan", {"FP32": 5, "INT8": 1}), "int8")


@pytest.mark.parametrize("version", ["10.13.3.9", "11.1.0"])
def test_10_and_11_get_the_pairs_in_the_graph(version: str, tiny_onnx: Path, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "tensorrt", standin.make_module(version))
    path = tmp_path / "tiny.engine"
    assert build(tiny_onnx, "--engine", path, "--calib_cache", calibrated / "tiny.cache") == 0
    plan = json.loads(path.read_bytes())
    assert plan["strong"] and plan["flags"] == []
    info = read_sidecar(path)
    assert info is not None
    assert info.layers["INT8"] == sum(int8 for int8, _ in info.int8["blocks"].values()) == 121


def weak_build(tiny_onnx: Path, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, *options: object, **settings: Any) -> dict[str, Any]:  # fmt: skip
    """What the stand-in was asked for."""
    monkeypatch.setitem(sys.modules, "tensorrt", standin.make_module(version, **settings))
    path = tmp_path / "tiny.engine"
    assert build(tiny_onnx, "--engine", path, "--calib_cache", calibrated / "tiny.cache", *options) == 0  # fmt: skip
    return json.loads(path.read_bytes())


def test_86_gets_the_pairs_and_flags(tiny_onnx: Path, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    plan = weak_build(tiny_onnx, calibrated, tmp_path, monkeypatch, "8.6.1", "--keep_fp32", "*/stem/*")  # fmt: skip
    assert plan["flags"] == ["FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"] and not plan["strong"]
    assert plan["scales"] == {}  # no calibrator
    read = [layer for layer in plan["layers"] if layer["Inputs"]]
    assert len(read) == 120
    pinned = plan["pinned"]
    assert set(pinned.values()) == {"FLOAT"} and not [n for n in pinned if n.endswith("quantized")]
    assert "efficientnet-b0/stem/tpu_batch_normalization/FusedBatchNormV3" in pinned
    plan = weak_build(tiny_onnx, calibrated, tmp_path, monkeypatch, "8.6.1", "--rest_precision", "fp32")  # fmt: skip
    assert plan["flags"] == ["INT8", "OBEY_PRECISION_CONSTRAINTS"] and plan["pinned"] == {}


@pytest.mark.parametrize(
    ("version", "options", "settings"),
    [
        ("8.6.1", ["--weak_typing"], {}),
        ("10.13.3.9", ["--weak_typing"], {}),
        ("10.3.0", ["--dla_core", 1], {"DLA_CORES": 2}),
    ],
)
def test_weak_typing_takes_the_cache_through_a_calibrator(version: str, options: list[object], settings: dict[str, Any], tiny_onnx: Path, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    plan = weak_build(tiny_onnx, calibrated, tmp_path, monkeypatch, version, "--keep_fp32", "*/stem/*", *options, **settings)  # fmt: skip
    assert {"FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"} <= set(plan["flags"]) and not plan["strong"]  # fmt: skip
    cache = calibration_cache.CalibrationCache.from_text((calibrated / "tiny.cache").read_text())
    measured = {name: struct.pack("!f", scale).hex() for name, scale in cache.scales.items()}
    assert measured.items() <= plan["scales"].items()
    assert any(name.endswith("/scaled") for name in plan["scales"].keys() - measured.keys())
    # No Q/DQ in the graph: convolutions read what has a scale, and those that are kept are pinned.
    kinds = {layer["LayerType"] for layer in plan["layers"]}
    assert not kinds & {"QUANTIZE", "DEQUANTIZE"}
    assert sum(bool(layer["Inputs"]) for layer in plan["layers"]) == 120
    halves = [name for name, kind in plan["pinned"].items() if kind == "HALF"]
    assert len(halves) == 16 and all("/se/" in name for name in halves)
    convs = {layer["Name"] for layer in plan["layers"] if layer["LayerType"] == "CONVOLUTION"}
    wide = {name for name, kind in plan["pinned"].items() if kind == "FLOAT"}
    assert [block_of(name) for name in wide & convs] == ["stem"]


def test_86_is_given_what_is_saved(tiny_onnx: Path, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """Q/DQ in float32: FP16 is a flag."""
    saved = tmp_path / "saved.onnx"
    plan = weak_build(tiny_onnx, calibrated, tmp_path, monkeypatch, "8.6.1", "--save_onnx", saved)
    assert "takes the precision as flags, not from the file; for trtexec: --int8 --fp16" in capsys.readouterr().err  # fmt: skip
    graph = onnx.load(saved).graph
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == sum(layer["LayerType"] == "QUANTIZE" for layer in plan["layers"]) > 100  # fmt: skip
    assert TensorProto.FLOAT16 not in {weight.data_type for weight in graph.initializer}


@pytest.mark.parametrize(
    ("version", "options", "settings"),
    [("8.6.1", ["--weak_typing"], {}), ("10.3.0", ["--dla_core", 1], {"DLA_CORES": 2})],
)
@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]])
def test_scales_of_a_calibrator_are_in_no_file(version: str, options: list[object], settings: dict[str, Any], dry_run: list[str], tiny_onnx: Path, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "tensorrt", standin.make_module(version, **settings))
    written = ["--engine", tmp_path / "x.engine", "--save_onnx", tmp_path / "x.onnx"]
    assert build(tiny_onnx, *written, "--calib_cache", calibrated / "tiny.cache", *options, *dry_run) == 1  # fmt: skip
    assert error_of(capsys).startswith(f"error: --save_onnx: with {options[0]}, TensorRT {version} takes the scales of INT8 through a calibrator")  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_calibrator_only_returns_the_cache() -> None:
    calibrator = config._cache_calibrator(standin.make_module("8.6.1"), b"TRT-8601-...")
    assert calibrator.initialised and calibrator.get_batch(["images"]) is None
    assert calibrator.read_calibration_cache() == b"TRT-8601-..."
    assert calibrator.write_calibration_cache(b"anything") is None
    with pytest.raises(AttributeError):  # it is gone
        config._cache_calibrator(standin.make_module("11.1.0"), b"")


@pytest.mark.parametrize(
    ("version", "settings", "options", "message"),
    [
        ("11.1.0", {}, ["--weak_typing"], "--weak_typing: TensorRT 11.1.0 does not support it; leave it out"),
        ("8.6.1", {"HAS_INT8": False}, [], "--precision int8: this GPU has no fast INT8 (TensorRT 8.6.1); use fp16"),
        ("10.3.0", {"DLA_CORES": 2}, ["--dla_core", 0, "--rest_precision", "fp32"], "--precision int8 --rest_precision fp32: a DLA computes in FP16 or INT8 only (TensorRT 10.3.0)"),
    ],
)  # fmt: skip
def test_refused_where_it_is_not_to_be_had(version: str, settings: dict[str, Any], options: list[object], message: str, tiny_onnx: Path, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "tensorrt", standin.make_module(version, **settings))
    assert build(tiny_onnx, "--engine", tmp_path / "x.engine", "--calib_cache", calibrated / "tiny.cache", *options) == 1  # fmt: skip
    assert error_of(capsys).startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


# --- FP8 ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fp8_onnx(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp8") / "fp8.onnx"
    options = ["--precision", "fp8", "--calib_input", IMAGES, "--calib_cache", path.with_name("c")]
    assert build(tiny_onnx, "--save_onnx", path, *options) == 0
    assert json.loads(path.with_name("c.json").read_text())["method"] == "minmax"
    return path


def test_fp8_detects(fp8_onnx: Path, tmp_path: Path) -> None:
    model = onnx.load(fp8_onnx)
    assert {name: len(convs) for name, convs in input_types(model).items()} == {"FLOAT8E4M3FN": 121, "FLOAT16": 16}  # fmt: skip
    assert sum(node.op_type == "Cast" for node in model.graph.node) == 2
    output = tmp_path / "metrics.json"
    arguments = ["--engine", fp8_onnx, "--input", IMAGES]
    arguments += ["--annotations", EXAMPLES / "annotations.json", "--json", output]
    assert eval_coco.main([str(a) for a in arguments]) == 0
    ap = json.loads(output.read_text())["AP"]
    print(f"AP in FP8 {ap:.4f}, in FP32 {FP32_AP}")
    assert (
        FP32_AP - 0.050 < ap < FP32_AP + 0.020
    )  # three bits of mantissa; measured 2026-11-21: 0.7817


def test_rtx_builds_fp8_layers(fp8_onnx: Path, tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    pytest.importorskip("tensorrt_rtx", reason="needs requirements-rtx.txt")
    path = tmp_path / "tiny.engine"
    options = ["--precision", "fp8", "--calib_cache", fp8_onnx.with_name("c"), "--flavor", "tensorrt_rtx"]  # fmt: skip
    assert build(tiny_onnx, "--engine", path, *options, "--compute_capability", "8.9") == 0
    captured = capsys.readouterr()
    assert not [line for line in captured.err.splitlines() if line.startswith(("W ", "E "))]
    info = read_sidecar(path)
    assert info is not None and info.precision == "fp8"
    assert info.layers["FP8"] > 200 > info.layers["FP16"] and "INT8" not in info.layers
    for capabilities, message in (
        (["--compute_capability", "8.6,8.9"], "--precision fp8: compute capability 8.6 has no FP8, which begins with Ada (8.9) (TensorRT-RTX"),
        ([], "--precision fp8: without --compute_capability TensorRT-RTX"),
    ):  # fmt: skip
        assert build(tiny_onnx, "--engine", path, *options, *capabilities) == 1
        assert error_of(capsys).startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("version", "capability", "options", "message"),
    [
        ("8.6.1", "8.9", [], "--precision fp8: TensorRT 8.6.1 does not support it; use int8, or TensorRT 10 or later"),
        ("10.13.3.9", "8.6", [], "--precision fp8: compute capability 8.6 has no FP8"),
        ("10.13.3.9", "8.9", ["--weak_typing"], "--precision fp8: takes strong typing (TensorRT 10.13.3.9); leave out --weak_typing"),
        ("10.13.3.9", "8.9", ["--hardware_compatible"], "--precision fp8: --hardware_compatible is for every GPU from Ampere (8.0) on"),
        ("11.4.1", "8.7", ["--dla_core", 0], "--precision fp8: a DLA has no FP8"),
        ("10.13.3.9", "8.9", [], None),
        ("11.1.0", "10.0", [], None),
    ],
)  # fmt: skip
def test_fp8_where_the_gpu_has_it(version: str, capability: str, options: list[object], message: str | None, fp8_onnx: Path, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "tensorrt", standin.make_module(version, DLA_CORES=2))
    for module in (support, engine_build):
        monkeypatch.setattr(module, "local_compute_capability", lambda: (capability,))
    path = tmp_path / "tiny.engine"
    status = build(tiny_onnx, "--precision", "fp8", "--engine", path, "--calib_cache", fp8_onnx.with_name("c"), *options)  # fmt: skip
    if message:
        assert status == 1 and error_of(capsys).startswith(f"error: {message}")
    else:
        assert status == 0 and json.loads(path.read_bytes())["strong"]
        info = read_sidecar(path)
        assert info is not None and info.layers["FP8"] == 121


def test_pairs_of_the_other_type_are_refused(calibrated: Path, fp8_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """And an FP8 file passes through --precision fp8 without a word of options that nobody gave."""
    path = tmp_path / "m.onnx"
    options = ["--save_onnx", path, "--calib_input", IMAGES, "--calib_cache", tmp_path / "c"]
    for model, asked, own in ((calibrated / "int8.onnx", "fp8", "int8"), (fp8_onnx, "int8", "fp8")):
        assert build(model, *options, "--precision", asked) == 1
        assert error_of(capsys) == f"error: {model}: --precision {asked}: the ONNX file brings its own Q/DQ, in {own.upper()}; give --precision {own}, or the float32 file of create_onnx.py"  # fmt: skip
        assert list(tmp_path.iterdir()) == []
    assert build_chosen(fp8_onnx, "--save_onnx", path, "--precision", "fp8") == 0
    assert path.read_bytes() == fp8_onnx.read_bytes()
    assert "are not used" not in capsys.readouterr().err


# --- what is left out by itself -------------------------------------------------------------------


@pytest.fixture(scope="module")
def chosen(tiny_onnx: Path, calibrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with int8.onnx, less what costs most, and its tiny.cache, which holds the costs."""
    folder = tmp_path_factory.mktemp("chosen")
    for name in ("tiny.cache", "tiny.cache.json"):
        (folder / name).write_bytes((calibrated / name).read_bytes())
    options = ["--calib_input", IMAGES, "--calib_cache", folder / "tiny.cache"]
    assert build_chosen(tiny_onnx, "--save_onnx", folder / "int8.onnx", *options) == 0
    return folder


def test_choice_keeps_the_share_and_takes_most_of_the_error_out(chosen: Path, tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    path = tmp_path / "m.onnx"
    options = ["--save_onnx", path, "--calib_cache", chosen / "tiny.cache"]
    assert build_chosen(tiny_onnx, *options) == 0  # no images: the cache says what each costs
    error = capsys.readouterr().err
    assert path.read_bytes() == (chosen / "int8.onnx").read_bytes()
    share = float(re.search(r"INT8: ([\d.]+)% of the multiply-accumulates", error)[1])  # type: ignore[index]
    assert 80 <= share < 81
    found = re.search(r"left out: (\d+) of 121 convolutions, which make (\d+) % of the error of boxes and (\d+) % of that of scores", error)  # fmt: skip
    assert found is not None
    count, boxes, scores = map(int, found.groups())
    types = input_types(onnx.load(path))
    assert len(types["INT8"]) == 121 - count and len(types["FLOAT16"]) == 16 + count
    assert boxes > 50 and scores > 50  # measured 2026-11-29: 65 and 76 of 25 images
    assert f"not in INT8: {count} x left out" in error


def test_fewer_pairs_than_with_all_in_int8(chosen: Path, calibrated: Path) -> None:
    pairs = [
        sum(node.op_type == "QuantizeLinear" for node in onnx.load(folder / "int8.onnx").graph.node)
        for folder in (chosen, calibrated)
    ]
    assert pairs[0] < pairs[1]


def test_fp8_chooses_for_itself(tiny_onnx: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """By what it costs in FP8: the costs in INT8 that stand in the same cache are not its own."""
    path = tmp_path / "m.onnx"
    options = ["--save_onnx", path, "--precision", "fp8", "--calib_cache", cache, "--calib_method", "mse"]  # fmt: skip
    assert build_chosen(tiny_onnx, *options, "--calib_input", IMAGES) == 0
    error = capsys.readouterr().err
    share = float(re.search(r"FP8: ([\d.]+)% of the multiply-accumulates", error)[1])  # type: ignore[index]
    assert 80 <= share < 81
    costs = read_cache(cache).costs
    assert costs.keys() == {"FP8"} and len(costs["FP8"]) == 121
    stored = {w.data_type for w in onnx.load(path).graph.initializer}
    assert {TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT16} <= stored


def test_share_is_asked_for(chosen: Path, tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    path = tmp_path / "m.onnx"
    options = ["--save_onnx", path, "--calib_cache", chosen / "tiny.cache", "--int8_share"]
    left = {}
    for share in (1, 0.9, 0.5):
        assert build_chosen(tiny_onnx, *options, share) == 0
        error = capsys.readouterr().err
        left[share] = float(re.search(r"INT8: ([\d.]+)%", error)[1])  # type: ignore[index]
    assert left[1] == 99.9 and 90 <= left[0.9] < 91 and 50 <= left[0.5] < 51
    assert build_chosen(tiny_onnx, *options, 0.9, "--keep_fp16", "*/stem/*", "*/blocks_*") == 1
    assert re.search(
        r"error: --int8_share 0.9: what is kept by name, and what cannot be quantized, leaves 1\d\.\d% of the multiply-accumulates; lower it, or keep less",
        error_of(capsys),
    )


def test_by_hand_goes_before_by_itself(chosen: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    options = ["--save_onnx", path, "--calib_cache", chosen / "tiny.cache", "--keep_fp16", "*/stem/*"]  # fmt: skip
    assert build_chosen(tiny_onnx, *options) == 0
    assert len(input_types(onnx.load(path))["INT8"]) == 120
    assert build_chosen(tiny_onnx, *options, "--int8_share", 0.8) == 0
    types = input_types(onnx.load(path))
    assert 60 < len(types["INT8"]) < 118
    assert {block_of(name) for name in types["INT8"]}.isdisjoint({"stem"})


def test_without_images_nothing_is_chosen(tiny_onnx: Path, calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    path = tmp_path / "m.onnx"
    options = ["--save_onnx", path, "--calib_cache", calibrated / "tiny.cache"]
    assert build_chosen(tiny_onnx, *options) == 0
    assert "W all convolutions are INT8, which costs accuracy: no --calib_input to measure on" in capsys.readouterr().err  # fmt: skip
    assert path.read_bytes() == (calibrated / "int8.onnx").read_bytes()
    assert build_chosen(tiny_onnx, *options, "--int8_share", 0.9) == 1
    assert "--int8_share 0.9: no --calib_input to measure on" in error_of(capsys)


def test_measuring_goes_on_where_it_stopped(tiny_onnx: Path, cache: Path, chosen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Interrupted after the first block: the second run measures the others alone, and chooses
    the same.
    """
    options = ["--save_onnx", tmp_path / "m.onnx", "--calib_input", IMAGES, "--calib_cache", cache]
    measured: list[str] = []
    alone = costs._alone

    def interrupted(plan: Any, layer: Any, *rest: Any) -> Any:
        measured.append(layer.name)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return alone(plan, layer, *rest)

    monkeypatch.setattr(costs, "_alone", interrupted)
    assert build_chosen(tiny_onnx, *options) == 130
    assert len(read_cache(cache).costs["INT8"]) == 3  # stem, blocks_0
    del measured[:-1]
    monkeypatch.setattr(costs, "_alone", lambda plan, layer, *rest: measured.append(layer.name) or alone(plan, layer, *rest))  # fmt: skip
    assert build_chosen(tiny_onnx, *options) == 0
    assert len(measured) == 1 + 121 - 3
    assert (tmp_path / "m.onnx").read_bytes() == (chosen / "int8.onnx").read_bytes()


def test_images_of_nothing_are_warned_of(tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(8):
        Image.new("RGB", (1, 1), (0, 0, 0)).save(photos / f"{i}.png")
    assert build_chosen(tiny_onnx, "--save_onnx", tmp_path / "m.onnx", "--calib_input", photos) == 0
    error = capsys.readouterr().err
    assert "W --calib_input: 8 of 8 images are of one colour; give images of what the detector is to see" in error  # fmt: skip
    assert "only 1 of 8 images differ from each other" in error
    assert "8 of 8 images are far smaller than the network input (1x1 instead of 128x128)" in error
    assert (
        "largest magnitude" not in error
    )  # none beyond FP16: constant channels made factors of 1e20
    factors = [
        float(np.abs(onnx.numpy_helper.to_array(w)).max())
        for w in onnx.load(tmp_path / "m.onnx").graph.initializer
        if "/scaled/constant" in w.name
    ]
    assert max(factors, default=0) < 1e5


# --- D0 -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rtx_builds_d0(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs requirements-rtx.txt")
    pytest.importorskip("tensorflow", reason="needs requirements-tensorflow.txt")
    model = tmp_path / "d0.onnx"
    assert create_onnx.main(["--saved_model", str(shared / "models" / "d0_person"), "--onnx", str(model)]) == 0  # fmt: skip
    capsys.readouterr()
    path, prepared = tmp_path / "d0.engine", tmp_path / "d0_int8.onnx"
    options = ["--calib_input", shared / "images" / "person_val100", "--calib_num_images", 8]
    options += ["--save_onnx", prepared, "--flavor", "tensorrt_rtx", "--compute_capability", "8.9"]
    assert build(model, "--engine", path, *options) == 0
    error = capsys.readouterr().err
    assert not [line for line in error.splitlines() if line.startswith(("W ", "E "))]
    info = read_sidecar(path)
    assert info is not None and info.int8["mac_share"] > 0.999
    assert re.search(r"I FP16: \d+ nodes, 2 casts;", error)
    types = input_types(onnx.load(prepared))
    assert {kind: len(convs) for kind, convs in types.items()} == {"INT8": 182, "FLOAT16": 32}
    assert info.layers["INT8"] > 300 and info.layers["FP16"] > 50


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("cache", ["", "no.cache"])
def test_scales_come_from_somewhere(precision: str, cache: str, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """Found before anything is worked out of the model, which is read once."""
    read: list[object] = []
    load = onnx.load
    monkeypatch.setattr(onnx, "load", lambda path, **options: read.append(path) or load(path, **options))  # fmt: skip
    monkeypatch.setattr(body, "cut_to_body", None)  # not called
    options = ["--precision", precision, "--save_onnx", tmp_path / "x.onnx"]
    options += ["--calib_cache", tmp_path / cache] if cache else []
    assert build_engine.main(["--model", str(tiny_onnx), *map(str, options)]) == 1
    found = f"no cache at {tmp_path / cache}" if cache else "neither"
    assert error_of(capsys) == f"error: calibration: expected images or an existing cache, found {found}; give --calib_input DIR, or --calib_cache FILE"  # fmt: skip
    assert read == [tiny_onnx] and not list(tmp_path.iterdir())


# --- command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "fp16", "--calib_input", "photos"], "--calib_... goes with --precision int8 and fp8"),
        (["-p", "fp16", "--calib_method", "mse"], "--calib_... goes with --precision int8 and fp8"),
        (["-p", "fp16", "--int8_share", "0.9"], "--int8_share goes with --precision int8 and fp8"),
        (["-p", "int8", "--calib_input", "photos", "--int8_share", "0"], "expected a number above 0, up to 1, got '0'"),
        (["-p", "fp32", "--keep_fp32", "*"], "--keep_fp32 and --precision_json do not go with --precision fp32"),
        (["-p", "fp16", "--keep_fp16", "*"], "--keep_fp16 goes with --precision int8 and fp8"),
        (["-p", "int8", "--calib_input", "photos", "--rest_precision", "fp32", "--keep_fp16", "*"], "with the rest in fp16"),
        (["-p", "fp16", "--rest_precision", "fp32"], "--rest_precision goes with --precision int8 and fp8"),
        (["-p", "int8", "--calib_input", "photos", "--weak_typing"], "without --engine nothing is built"),
        (["-p", "int8", "--calib_input", "photos", "--calib_cache", "b"], "expected different files"),
        (["-p", "int8", "--calib_input", "photos", "--calib_method", "max"], "invalid choice: 'max'"),
        (["-p", "int8", "--calib_input", "photos", "--calib_cache_version", "10.13.3"], "--calib_cache_version goes with --calib_cache FILE"),
        (["-p", "fp16", "--calib_cache_version", "10.13.3"], "--calib_... goes with --precision int8 and fp8"),
        (["-p", "int8", "--calib_input", "photos", "--calib_cache_version", "10"], "expected X.Y.Z, such as 8.6.1, got '10'"),
        (["-p", "int8", "--calib_input", "photos", "--calib_fraction", "0"], "expected a number above 0, up to 1, got '0'"),
        (["-p", "int8", "--calib_input", "photos", "--calib_num_images", "0"], "expected a whole number of at least 1, got '0'"),
    ],
)  # fmt: skip
def test_wrong_usage(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        build_engine.main(["--onnx", "a", "--save_onnx", "b", *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_refused_before_calibration(tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("trtdet.precision.calibration.choose_images", lambda *_: 1 / 0)
    arguments = ["--model", tiny_onnx, "--save_onnx", tmp_path / "x.onnx", "--precision", "int8", "--calib_input", EXAMPLES / "images"]  # fmt: skip
    assert build_engine.main([*map(str, arguments), "--calib_cache", str(tmp_path / "file" / "c")]) == 1  # fmt: skip
    assert "cannot be written" in capsys.readouterr().err
