# SPDX-License-Identifier: Apache-2.0
"""build_engine.py --precision int8: calibration, its cache, the model it prepares, and an engine by TensorRT-RTX."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import standin_tensorrt_builder as standin
from conftest import EXAMPLES
from PIL import Image

import build_engine
import eval_coco
from trtdet import calibration, engine
from trtdet.body import conv_layers
from trtdet.errors import EngineError
from trtdet.layers import LayerShares
from trtdet.sidecar import read_sidecar

IMAGES = EXAMPLES / "images"
#: AP of the FP32 model on the example's 12 images (test_chain.py).
FP32_AP = 0.7987


def build(model: Path, *options: object) -> int:
    return build_engine.main(["--onnx", str(model), "--precision", "int8", *map(str, options)])


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


# --- what is prepared -------------------------------------------------------------------------------------------------------


def test_prepared_model_detects_as_well_as_float32(calibrated: Path, tmp_path: Path) -> None:
    output = tmp_path / "metrics.json"
    arguments = ["--engine", calibrated / "int8.onnx", "--input", IMAGES]
    arguments += ["--annotations", EXAMPLES / "annotations.json", "--output", output]
    assert eval_coco.main([str(a) for a in arguments]) == 0
    ap = json.loads(output.read_text())["AP"]
    print(f"AP in INT8 {ap:.4f}, in FP32 {FP32_AP}")
    assert ap == pytest.approx(FP32_AP, abs=0.010)  # measured 2026-11-21: 0.8056


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


def test_patterns_keep_convolutions_in_float32(tiny_onnx: Path, calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    path = tmp_path / "m.onnx"
    options = ["--save_onnx", path, "--calib_cache", calibrated / "tiny.cache", "--keep_fp32"]
    assert build(tiny_onnx, *options, "*/stem/*", "*/blocks_0/*") == 0
    model = onnx.load(path)
    dequantized = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    float32 = {layer.block for layer in conv_layers(model) if layer.weight not in dequantized and not layer.pooled}  # fmt: skip
    assert float32 == {"stem", "blocks_0"}
    assert "I stays: 1 x asked for ('*/stem/*')\n" in capsys.readouterr().err
    assert build(tiny_onnx, *options, "*/steam/*") == 1
    assert error_of(capsys).startswith("error: --keep_fp32 '*/steam/*': no convolution has such a name; theirs are ")  # fmt: skip


def test_a_model_with_its_own_pairs_needs_no_calibration(calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    path = tmp_path / "again.onnx"
    assert build(calibrated / "int8.onnx", "--save_onnx", path) == 0
    assert path.read_bytes() == (calibrated / "int8.onnx").read_bytes()
    assert "(as the model came, with its own Q/DQ)" in capsys.readouterr().err


# --- the cache --------------------------------------------------------------------------------------------------------------


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


def test_image_that_cannot_be_read_is_named(tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (64, 48)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no image")
    assert build(tiny_onnx, "--save_onnx", tmp_path / "m.onnx", "--calib_input", folder, "--calib_cache", tmp_path / "c") == 1  # fmt: skip
    assert re.search(
        r"--calib_input: expected images that can be read, found .*b\.png", error_of(capsys)
    )
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


# --- engines ----------------------------------------------------------------------------------------------------------------


def test_rtx_builds_int8_layers(tiny_onnx: Path, calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    pytest.importorskip("tensorrt_rtx", reason="needs requirements-rtx.txt")
    path = tmp_path / "tiny.engine"
    options = ["--flavor", "tensorrt_rtx", "--compute_capability", "8.9", "--batch_size", "1,2,4"]
    assert build(tiny_onnx, "--engine", path, "--calib_cache", calibrated / "tiny.cache", *options) == 0  # fmt: skip
    captured = capsys.readouterr()
    assert not [line for line in captured.err.splitlines() if line.startswith(("W ", "E "))]
    info = read_sidecar(path)
    assert info is not None and info.precision == "int8" and info.layers_source == "plan"
    assert info.layers["INT8"] > info.layers["FP32"] > 0
    assert info.int8["mac_share"] == pytest.approx(0.99885, abs=1e-4)
    assert info.int8["blocks"]["stem"] == [1, 1] and info.int8["blocks"]["blocks_1"] == [3, 5]
    assert "precision INT8 " in captured.out


def test_engine_without_int8_is_an_error() -> None:
    with pytest.raises(EngineError, match=r"--precision int8: no layer of the engine computes in INT8 \(FP32 100% of 5 layers \(plan\)\)"):  # fmt: skip
        engine._check_built(LayerShares("plan", {"FP32": 5}), "int8")
    engine._check_built(LayerShares("plan", {"FP32": 5, "INT8": 1}), "int8")


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


@pytest.mark.parametrize(
    ("version", "settings", "options", "message"),
    [
        ("8.6.1", {}, [], "--precision int8: not implemented yet for TensorRT 8.6.1, whose networks are weakly typed; use --precision fp16, or TensorRT 10 or later"),
        ("10.3.0", {"DLA_CORES": 2}, ["--dla_core", 0], "--precision int8: not implemented yet for a DLA (TensorRT 10.3.0); use --precision fp16, or leave out --dla_core"),
    ],
)  # fmt: skip
def test_refused_where_it_is_not_implemented(version: str, settings: dict[str, Any], options: list[object], message: str, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "tensorrt", standin.make_module(version, **settings))
    assert build(tiny_onnx, "--engine", tmp_path / "x.engine", "--calib_input", IMAGES, "--calib_cache", tmp_path / "c", *options) == 1  # fmt: skip
    assert error_of(capsys).startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


# --- command line -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "int8"], "--precision int8 takes images to calibrate on, --calib_input DIR, or an existing --calib_cache FILE\n"),
        (["-p", "int8", "--calib_cache", "no.cache"], "or an existing --calib_cache FILE (nothing at no.cache)"),
        (["-p", "fp16", "--calib_input", "photos"], "--calib_... and --keep_fp32 go with --precision int8"),
        (["--keep_fp32", "*"], "--calib_... and --keep_fp32 go with --precision int8"),
        (["-p", "int8", "--calib_input", "photos", "--calib_cache", "b"], "expected different files"),
        (["-p", "int8", "--calib_input", "photos", "--calib_method", "max"], "invalid choice: 'max'"),
        (["-p", "int8", "--calib_input", "photos", "--calib_fraction", "0"], "expected a number above 0, up to 1, got '0'"),
        (["-p", "int8", "--calib_input", "photos", "--calib_num_images", "0"], "expected a whole number of at least 1, got '0'"),
    ],
)  # fmt: skip
def test_wrong_usage(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        build_engine.main(["--onnx", "a", "--save_onnx", "b", *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
