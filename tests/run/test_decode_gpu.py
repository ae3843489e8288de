# SPDX-License-Identifier: Apache-2.0
"""--decode through infer.py, eval_coco.py and the API, on stand-ins for CUDA and nvImageCodec."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import toy_network
from conftest import EXAMPLES
from PIL import Image
from standin_gpu_decoder import StandinDecoder
from standin_network import write_network_engine
from trt_rig import Rig

import trtdet
from trtdet.commands import create_onnx, eval_coco, infer
from trtdet.errors import EngineError
from trtdet.images.files import load_image
from trtdet.results import writer
from trtdet.run import detect
from trtdet.runtimes import gpu_images
from trtdet.spec import ModelSpec

COUNT = len(list(EXAMPLES.glob("images/*")))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, path in enumerate(sorted(EXAMPLES.glob("images/*"))):
        Image.open(path).convert("RGB").save(folder / f"{number:02}.jpg", quality=95)
    return folder


def run(model: Path, photos: Path, output: Path, *options: str) -> dict[str, bytes]:
    arguments = ["--model", str(model), "--input", str(photos), "--output", str(output)]
    assert infer.main([*arguments, "--batch_size", "4", *options]) == 0
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


@pytest.fixture(scope="module")
def uint8_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose input the kernel makes to the last bit."""
    pytest.importorskip("tensorflow", reason="needs requirements-tensorflow.txt")
    path = tmp_path_factory.mktemp("uint8") / "uint8.onnx"
    arguments = ["--saved_model", str(EXAMPLES / "tiny_shapes"), "--onnx", str(path)]
    assert create_onnx.main([*arguments, "--input_dtype", "uint8"]) == 0
    return path


@pytest.mark.parametrize("decoder", [{"devices": 2}], indirect=True)
@pytest.mark.parametrize("devices", ["0", "1", "all"])
def test_files_are_those_of_the_cpu(
    decoder: tuple[Rig, StandinDecoder],
    uint8_onnx: Path,
    photos: Path,
    tmp_path: Path,
    devices: str,
) -> None:
    engine = write_network_engine(tmp_path / "network.engine", uint8_onnx)
    wanted = run(engine, photos, tmp_path / "by cpu", "--devices", devices, "--decode", "cpu")
    assert decoder[1].decoded == []
    found = run(engine, photos, tmp_path / "by gpu", "--devices", devices, "--decode", "gpu")
    assert sum(decoder[1].decoded) == COUNT
    assert sum(name.endswith(".png") for name in found) == COUNT  # pictures too
    assert found == wanted


def test_the_python_api(
    decoder: tuple[Rig, StandinDecoder], uint8_onnx: Path, photos: Path, tmp_path: Path
) -> None:
    engine = write_network_engine(tmp_path / "network.engine", uint8_onnx)
    files = sorted(photos.iterdir())
    with trtdet.load(engine) as model:
        wanted = model(files)
    assert decoder[1].decoded == []
    with trtdet.load(engine, decode="auto") as model:  # few images: the CPU
        model(files)
        assert model._buffers._free  # used again by the next call
    assert decoder[1].decoded == []
    with trtdet.load(engine, decode="gpu") as model:
        found = model(files)
        one = model(files[0])
        array = model(load_image(files[0]))  # not a file: nothing to decode
    assert sum(decoder[1].decoded) == COUNT + 1
    for a, b in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(a.boxes_xyxy, b.boxes_xyxy)
    np.testing.assert_array_equal(one.boxes_xyxy, array.boxes_xyxy)


def test_a_model_of_dynamic_size(
    decoder: tuple[Rig, StandinDecoder], photos: Path, tmp_path: Path
) -> None:
    import onnx

    model = tmp_path / "dynamic size.onnx"
    onnx.save(toy_network.free_network(), model)
    engine = write_network_engine(tmp_path / "network.engine", model)
    options = ("--no_images", "--resize", "32", "--max_size", "64", "--decode")
    found = []
    for decode in ("cpu", "gpu"):
        written = run(engine, photos, tmp_path / decode, *options, decode)
        found.append(json.loads(written["detections.json"]))
    assert len(found[0]) == len(found[1]) == 10 * COUNT
    for one, other in zip(*found, strict=True):  # float32: the last digits may differ
        assert one["image_id"] == other["image_id"]
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.01)
    assert sum(decoder[1].decoded) == COUNT


def test_ap_is_that_of_the_cpu(
    decoder: tuple[Rig, StandinDecoder], tiny_onnx: Path, tmp_path: Path
) -> None:
    engine = write_network_engine(tmp_path / "network.engine", tiny_onnx)
    ap = {}
    for decode in ("cpu", "gpu"):
        arguments = ["--model", str(engine), "--input", str(EXAMPLES / "images")]
        arguments += ["--annotations", str(EXAMPLES / "annotations.json"), "--decode", decode]
        assert eval_coco.main([*arguments, "--json", str(tmp_path / "m.json")]) == 0
        ap[decode] = json.loads((tmp_path / "m.json").read_text())["AP"]
    assert ap["gpu"] == ap["cpu"]


def test_auto_takes_the_gpu_for_many_jpegs(
    decoder: tuple[Rig, StandinDecoder],
    tiny_onnx: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = write_network_engine(tmp_path / "network.engine", tiny_onnx)
    run(engine, photos, tmp_path / "few", "--no_images")
    assert decoder[1].decoded == []
    monkeypatch.setattr("trtdet.run.detect.MANY_IMAGES", COUNT)
    run(engine, photos, tmp_path / "many", "--no_images")
    assert sum(decoder[1].decoded) == COUNT
    for path in sorted(photos.iterdir())[:8]:
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    run(engine, photos, tmp_path / "pngs", "--no_images")
    assert sum(decoder[1].decoded) == COUNT


def test_without_nvimagecodec(
    rig: Callable[..., Rig],
    tiny_onnx: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`auto` says so once and goes on; `gpu` is refused."""
    rig()
    gpu_images.missing.cache_clear()

    def absent(device: int) -> Any:
        raise EngineError("nvImageCodec does not load (No module named 'nvidia')")

    monkeypatch.setattr(gpu_images, "decoder_of", absent)
    monkeypatch.setattr("trtdet.run.detect.MANY_IMAGES", 1)
    engine = write_network_engine(tmp_path / "network.engine", tiny_onnx)
    run(engine, photos, tmp_path / "auto", "--no_images")
    said = "images are decoded on the CPU: nvImageCodec does not load (No module named 'nvidia'); pip install -r requirements-gpu.txt"
    assert capsys.readouterr().err.count(said) == 1
    arguments = ["--model", str(engine), "--input", str(photos), "--output", str(tmp_path / "gpu")]
    assert infer.main([*arguments, "--decode", "gpu"]) == 1
    assert "--decode gpu: nvImageCodec does not load" in capsys.readouterr().err
    assert not (tmp_path / "gpu").exists()
    gpu_images.missing.cache_clear()


def test_a_model_on_the_cpu_is_refused(
    tiny_onnx: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(tiny_onnx), "--input", str(photos), "--output", str(tmp_path / "o")]
    assert infer.main([*arguments, "--decode", "gpu", "--provider", "cpu"]) == 1
    assert "--decode gpu: expected a model on a GPU, found ONNX Runtime" in capsys.readouterr().err


def test_the_rest_of_a_run_is_decoded_as_its_beginning(
    decoder: tuple[Rig, StandinDecoder],
    uint8_onnx: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the number of all images, though few are left."""
    monkeypatch.setattr(detect, "MANY_IMAGES", COUNT)
    engine = write_network_engine(tmp_path / "network.engine", uint8_onnx)
    wanted = run(engine, photos, tmp_path / "whole")
    assert sum(decoder[1].decoded) == COUNT
    finish = writer.ResultWriter.finish

    def broken_off(self: writer.ResultWriter) -> None:
        finish(self)
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(writer.ResultWriter, "finish", broken_off)
        arguments = ["--model", str(engine), "--input", str(photos), "--output", str(out)]
        assert infer.main([*arguments, "--batch_size", "4"]) == 130
    lines = (out / "detections.partial.jsonl").read_text().splitlines(keepends=True)
    (out / "detections.partial.jsonl").write_text("".join(lines[:-2]))
    decoder[1].decoded.clear()
    assert run(engine, photos, out, "--resume") == wanted
    assert sum(decoder[1].decoded) == 2


@pytest.mark.parametrize("decoder", [{"devices": 1}], indirect=True)
@pytest.mark.parametrize(
    ("change", "how"),
    [
        ({"rounding": "none", "placement": "center"}, "warped"),
        ({"sampling": "cubic"}, "interpolated cubically"),
    ],
)
def test_what_the_kernel_does_not_do_is_left_to_the_cpu(
    change: dict[str, Any],
    how: str,
    decoder: tuple[Rig, StandinDecoder],
    uint8_onnx: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(detect, "MANY_IMAGES", 1)
    model = onnx.load(uint8_onnx)
    spec = ModelSpec.from_onnx(model)
    warped = dataclasses.replace(spec.preprocessing, **change)
    spec.replace(preprocessing=warped).attach(model)
    onnx.save(model, tmp_path / "warped.onnx")
    engine = write_network_engine(tmp_path / "network.engine", tmp_path / "warped.onnx")
    run(engine, photos, tmp_path / "out")
    assert not decoder[1].decoded
    said = f"this model's are {how}, which the GPU's kernel does not do"
    assert f"images are decoded on the CPU: {said}" in capsys.readouterr().err
    arguments = ["--model", str(engine), "--input", str(photos), "--output", str(tmp_path / "o")]
    assert infer.main([*arguments, "--decode", "gpu"]) == 1
    assert f"--decode gpu: {said}" in capsys.readouterr().err
