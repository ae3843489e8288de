# SPDX-License-Identifier: Apache-2.0
"""Models of dynamic input size, from the build to the metric: profiles, engines that take
several sizes, --size and --resize.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import standin_tensorrt_builder
import standin_tensorrt_runtime as standin
import toy_detector
import toy_network
from PIL import Image
from standin_detector import detect
from toy_detector import image
from trt_rig import SPEC, Rig, assert_same, write_engine

from trtdet.commands import build_engine, eval_coco, image_batcher, infer
from trtdet.detections import decode
from trtdet.engine.build import choose_size
from trtdet.engine.options import SizeRange
from trtdet.engine.sidecar import read_sidecar
from trtdet.errors import EngineError
from trtdet.geometry import ResizeTransform
from trtdet.graph.builder import fix_size
from trtdet.nms import lowering
from trtdet.run import benchmark
from trtdet.runtimes.multi import MultiRuntime
from trtdet.runtimes.trt import TensorRTRuntime
from trtdet.spec import Preprocessing

RANDOM = np.random.default_rng(0)
FREE_HELP = "create_onnx.py --input_shape N,-1,-1,3"


# ---- building


@pytest.fixture
def network(tmp_path: Path) -> Path:
    path = tmp_path / "onnx" / "free.onnx"
    path.parent.mkdir()
    onnx.save(toy_network.free_network(), path)
    return path


def build(network: Path, output: Path, *options: object) -> int:
    arguments = ["--onnx", network, "--engine", output, *options]
    return build_engine.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("sizes", ["8x12,16,64x48", None])
def test_rtx_builds_a_range_of_sizes(
    precision: str, sizes: str | None, network: Path, tmp_path: Path
) -> None:
    """With NMS in ordinary operators, and as many anchors as an image has pixels."""
    pytest.importorskip("tensorrt_rtx", reason="needs requirements-rtx.txt")
    path = tmp_path / "free.engine"
    options = ["-p", precision, "-b", "1,2,4", "--flavor", "tensorrt_rtx"]
    options += ["--compute_capability", "8.9", *(["--size", sizes] if sizes else [])]
    if precision == "int8":
        Image.fromarray(RANDOM.integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / "a.png")
        options += ["--calib_input", str(tmp_path / "a.png"), "--int8_share", "1"]
    assert build(network, path, *options) == 0
    info = read_sidecar(path)
    assert info is not None
    expected = Preprocessing(
        (16, 16),
        mean=toy_network.SPEC.preprocessing.mean,
        std=toy_network.SPEC.preprocessing.std,
        size_range=((8, 12), (64, 48)) if sizes else None,
        size_multiple=4,
    )
    assert info.spec.preprocessing == expected
    assert info.layers.get(precision.upper(), 0) >= 5


@pytest.mark.parametrize(
    ("batch", "options", "shapes"),
    [
        ("N", ["--size", "8x12,16,64x48", "-b", "1,2,4"], [(1, 8, 12, 3), (2, 16, 16, 3), (4, 64, 48, 3)]),
        ("N", ["--size", "24x32"], [(1, 24, 32, 3)] * 3),  # one size, and no dimension but the batch to choose
        ("N", [], [(1, 16, 16, 3)] * 3),
        (2, ["--size", "8,16,64"], [(2, 8, 8, 3), (2, 16, 16, 3), (2, 64, 64, 3)]),
        (2, [], None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("version", ["8.6.1", "10.13.3.9"])
def test_profile_of_batch_and_size(
    batch: int | str,
    options: list[str],
    shapes: list[tuple[int, ...]] | None,
    version: str,
    network: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", standin_tensorrt_builder.make_module(version))
    onnx.save(toy_network.free_network(batch=batch), network)
    path, saved = tmp_path / "free.engine", tmp_path / "saved.onnx"
    assert build(network, path, *options, "--save_onnx", saved) == 0
    profiles = json.loads(path.read_bytes())["shapes"]
    assert profiles == ([{"input": [list(shape) for shape in shapes]}] if shapes else [])
    info = read_sidecar(path)
    assert info is not None
    found = info.spec.preprocessing
    if shapes:
        smallest, best, largest = (shape[1:3] for shape in shapes)
        assert found.size_hw == best
        assert found.size_range == ((smallest, largest) if smallest != largest else None)
    dims = onnx.load(saved).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param for dim in dims[1:3]] == ["H", "W"]  # stays free


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("8,16,128", "--size: input size 128x128 (height x width): the model takes 8x8 to 64x64 in steps of 4"),
        ("8,18,64", "--size: input size 18x18 (height x width): the model takes 8x8 to 64x64 in steps of 4"),
    ],
)  # fmt: skip
def test_sizes_that_the_model_does_not_take(
    sizes: str,
    message: str,
    network: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", standin_tensorrt_builder.make_module("10.3.0"))
    assert build(network, tmp_path / "free.engine", "--size", sizes) == 1
    assert message in capsys.readouterr().err


def test_a_fixed_model_takes_its_size_alone() -> None:
    fixed = Preprocessing((16, 32))
    assert choose_size(fixed, SizeRange((16, 32), (16, 32), (16, 32))) == fixed
    with pytest.raises(ValueError, match=rf"--size: .* takes 16x32; convert it .*{FREE_HELP}"):
        choose_size(fixed, SizeRange((16, 32), (32, 32), (32, 32)))


@pytest.mark.parametrize("text", ["640,320,1280", "640:640", "0", "1x2x3", "a", "640x"])
def test_sizes_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        build_engine.parse_args(["--onnx", "a.onnx", "--engine", "a.engine", "--size", text])
    assert left.value.code == 2
    assert f"or one number for a square, got '{text}'" in capsys.readouterr().err


def test_calibration_by_batches(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--onnx", "a.onnx", "--engine", "a.engine"]
    int8 = [*common, "-p", "int8", "--calib_input", "photos", "--calib_batches", "3"]
    found = build_engine.int8_from(build_engine.parse_args([*int8, "--calib_batch_size", "8"]))
    assert (found.num_images, found.batch_size) == (24, 8)
    assert build_engine.int8_from(build_engine.parse_args(int8)).num_images == 3
    for wrong in ([*int8, "--calib_num_images", "9"], [*common, "--calib_batches", "512"]):
        with pytest.raises(SystemExit) as left:
            build_engine.parse_args(wrong)
        assert left.value.code == 2
    assert "--calib_... goes with --precision int8 and fp8" in capsys.readouterr().err


def test_lowered_nms_is_the_same_for_a_free_and_a_fixed_size() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    free = toy_network.free_network()
    images = RANDOM.integers(0, 256, (2, 24, 40, 3)).astype(np.float32)
    answers = []
    for model in (free, fix_size(free, (24, 40, 3))):
        lowered = lowering.lower(model, "graph")
        session = onnxruntime.InferenceSession(
            lowered.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        answers.append(session.run(None, {"input": images}))
    for ours, theirs in zip(*answers, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert answers[0][0].min() > 0


# ---- engines


FREE_SPEC = SPEC.replace(
    preprocessing=Preprocessing(
        (16, 16), dtype="uint8", size_range=((8, 8), (32, 48)), size_multiple=8
    )
)
RANGE = [((8, 8, 3), (16, 16, 3), (32, 48, 3))]
SIZES = [(16, 16), (16, 16), (16, 16), (32, 48), (8, 8), (32, 48), (32, 48), (32, 48), (8, 16)]


def free_engine(path: Path, **options: Any) -> Path:
    info = {"spec": FREE_SPEC, **options.pop("info", {})}
    return write_engine(path, info=info, **{"image_shapes": RANGE, **options})


def noise(count: int, size_hw: tuple[int, int]) -> np.ndarray:
    return RANDOM.integers(0, 256, (count, *size_hw, 3), np.uint8)


@dataclasses.dataclass
class Batch:
    images: np.ndarray
    paths: tuple[Path, ...] = ()


@pytest.mark.parametrize("schedule", ["late", "early", "random"])
@pytest.mark.parametrize("static_batch", [None, 4])
def test_every_batch_may_have_another_size(
    rig: Callable[..., Rig],
    tmp_path: Path,
    schedule: str,
    static_batch: int | None,
) -> None:
    machine = rig(schedule=schedule)
    path = free_engine(tmp_path / "free.engine", static_batch=static_batch)
    batches = [Batch(noise(1 + i % 4, size)) for i, size in enumerate(SIZES * 2)]
    with TensorRTRuntime(path) as runtime:
        assert runtime.batch_range == (1, static_batch or 8)
        for batch, outputs in runtime.map(batches):
            assert_same(outputs, batch.images)
        for batch in batches[:3]:
            assert_same(runtime.infer(batch.images), batch.images)
        with pytest.raises(ValueError, match=r"input: expected .* got \(32, 52, 3\)"):
            runtime.infer(noise(1, (32, 52)))
    if static_batch:  # filled up, so shapes come again: 3 of 16 x 16, 2 of 32 x 48 after the first
        assert machine.cudart.calls["cudaGraphLaunch"] > 4


def test_a_graph_replays_while_the_shape_stays(
    rig: Callable[..., Rig],
    tmp_path: Path,
) -> None:
    machine = rig()
    with TensorRTRuntime(free_engine(tmp_path / "free.engine"), depth=1) as runtime:
        for size, graphs in [((16, 16), 0), ((16, 16), 1), ((32, 48), 1), ((16, 16), 1), ((16, 16), 2)]:  # fmt: skip
            images = noise(2, size)
            assert_same(runtime.infer(images), images)
            assert machine.cudart.calls.get("cudaGraphLaunch", 0) == graphs


def test_pinned_batches_of_several_sizes(
    rig: Callable[..., Rig],
    tmp_path: Path,
) -> None:
    """As ImageBatcher makes them: each in a part of memory that holds the largest."""
    rig()
    with TensorRTRuntime(free_engine(tmp_path / "free.engine")) as runtime:
        memory = runtime.allocate((2, 32, 48, 3), "uint8")
        for size in SIZES:
            images = memory.reshape(-1)[: 2 * size[0] * size[1] * 3].reshape(2, *size, 3)
            images[:] = noise(2, size)
            assert_same(runtime.infer(images), images.copy())


def test_several_gpus_take_several_sizes(
    rig: Callable[..., Rig],
    tmp_path: Path,
) -> None:
    rig(devices=2)
    path = free_engine(tmp_path / "free.engine")
    batches = [Batch(noise(3, size)) for size in SIZES * 3]
    with MultiRuntime([TensorRTRuntime(path, device=number) for number in (0, 1)]) as runtime:
        found = list(runtime.map(batches))
    for batch, (own, outputs) in zip(batches, found, strict=True):
        assert own is batch
        np.testing.assert_array_equal(
            outputs["detection_boxes"], detect(batch.images, 5)["detection_boxes"]
        )


def test_profiles_of_different_sizes(
    rig: Callable[..., Rig],
    tmp_path: Path,
) -> None:
    machine = rig()
    shapes = [((8, 8, 3), (16, 16, 3), (16, 16, 3)), ((8, 8, 3), (32, 48, 3), (32, 48, 3))]
    path = free_engine(tmp_path / "two.engine", image_shapes=shapes, profiles=[(1, 4, 8), (1, 2, 2)])  # fmt: skip
    with TensorRTRuntime(path) as runtime:
        for count, size, profile in [(8, (16, 16), 0), (2, (32, 48), 1), (1, (32, 16), 1), (3, (8, 8), 0)]:  # fmt: skip
            images = noise(count, size)
            assert_same(runtime.infer(images), images)
            assert machine.contexts[0].active_optimization_profile == profile
        with pytest.raises(ValueError, match=r"one of the engine's profiles .* got \(3, 32, 48, 3\)"):  # fmt: skip
            runtime.infer(noise(3, (32, 48)))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([((8, 8, 3), (16, 16, 3), (32, 32, 3))], r"input of \(8, 8, 3\) to \(32, 48, 3\) uint8, found \(8, 8, 3\) to \(32, 32, 3\) uint8"),
        ([((16, 16, 3),) * 3], r"input of \(8, 8, 3\) to \(32, 48, 3\) uint8, found \(16, 16, 3\) uint8"),
    ],
)  # fmt: skip
def test_a_sidecar_that_promises_more_than_the_engine(
    shapes: Any,
    message: str,
    rig: Callable[..., Rig],
    tmp_path: Path,
) -> None:
    rig()
    with pytest.raises(EngineError, match=message + "; build it again"):
        TensorRTRuntime(free_engine(tmp_path / "free.engine", image_shapes=shapes))


def test_a_free_engine_without_sidecar_is_refused(
    rig: Callable[..., Rig],
    tmp_path: Path,
) -> None:
    rig()
    path = standin.write_engine(tmp_path / "free.engine", image_shapes=RANGE)
    with pytest.raises(EngineError, match=r"no free\.engine\.json beside it, which says what sizes"):  # fmt: skip
        TensorRTRuntime(path)


# ---- running


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    """`toy_detector` for 16 x 16 to 96 x 96; its boxes stay, in pixels of the network input, so
    what is found tells the scale.
    """
    model = toy_detector.model()
    for dim, name in zip(model.graph.input[0].type.tensor_type.shape.dim[1:3], "HW", strict=True):
        dim.dim_param = name
    spec = toy_detector.ModelSpec.from_onnx(model)
    preprocessing = dataclasses.replace(
        spec.preprocessing, size_range=((16, 16), (96, 96)), size_multiple=16
    )
    spec.replace(preprocessing=preprocessing).attach(model)
    path = tmp_path / "free.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("options", "box"),  # x1 y1 x2 y2 in the source of 96 x 64, width first
    [
        ([], (8, 4, 40, 20)),  # 32 x 48: half size
        (["--size", "64,96"], (4, 2, 20, 10)),
        (["--size", "64,48"], (8, 4, 40, 20)),
        (["--resize", "32"], (8, 4, 40, 20)),
        (["--resize", "16", "--max_size", "96"], (16, 8, 80, 40)),
        (["--resize", "64", "--max_size", "48"], None),
        (["--resize", "48", "--max_size", "48"], (8, 4, 40, 20)),  # the longer side limits
    ],
)
def test_infer_at_a_size(
    options: list[str], box: tuple[float, ...] | None, detector: Path, tmp_path: Path
) -> None:
    image(tmp_path / "in" / "7.png", red=204, green=1, blue=1, size_wh=(96, 64))
    if "--resize" in options and "--max_size" not in options:
        options = [*options, "--max_size", "80"]
    out = tmp_path / "out"
    arguments = ["--engine", str(detector), "--input", str(tmp_path / "in"), "--output", str(out)]
    if box is None:
        with pytest.raises(SystemExit):
            infer.main([*arguments, *options])
        return
    assert infer.main([*arguments, *options]) == 0
    found = [float(x) for x in (out / "7.tsv").read_text().split("\t")]
    assert found[:4] == list(box)


def test_metric_at_a_size(detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    image(tmp_path / "in" / "7.png", red=204, green=1, blue=1, size_wh=(96, 64))
    annotations = {
        "images": [{"id": 7, "file_name": "7.png", "width": 96, "height": 64}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 20, "bbox": [4, 2, 16, 8], "area": 128, "iscrowd": 0}],
        "categories": [{"id": 20, "name": "pear"}],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(annotations))
    for options, ap in [([], 0.0), (["--size", "64,96"], 1.0), (["--resize", "64", "--max_size", "96"], 1.0)]:  # fmt: skip
        arguments = ["--engine", detector, "--input", tmp_path / "in", "--annotations", tmp_path / "a.json", "--json", tmp_path / "m.json"]  # fmt: skip
        assert eval_coco.main([*map(str, arguments), *options]) == 0
        assert json.loads((tmp_path / "m.json").read_text())["AP"] == pytest.approx(ap)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "64,96", "--resize", "32"], "--size gives every image the same input, --resize does not"),
        (["--max_size", "96"], "--max_size goes with --resize"),
        (["--resize", "1334"], "--resize 1334: expected no more than --max_size, 1333"),
        (["--size", "64x96x3"], "or one number for a square, got '64x96x3'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("script", [infer, eval_coco, image_batcher])
def test_wrong_usage(
    script: Any, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = "--model" if script is image_batcher else "--engine"
    last = "--annotations" if script is eval_coco else "--output"
    with pytest.raises(SystemExit) as left:
        script.parse_args([model, "a.onnx", "--input", "in", last, "out", *options])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fixed", "options", "message"),
    [
        (True, ["--size", "64,96"], f"--size 64,96: the model takes 32x48 (height x width) alone; leave it out, or give a model of dynamic size ({FREE_HELP}, build_engine.py"),
        (True, ["--resize", "32"], "--resize 32: the model takes 32x48"),
        (False, ["--size", "64,112"], "--size 64,112: input size 64x112 (height x width): the model takes 16x16 to 96x96 in steps of 16"),
        (False, ["--resize", "64"], "--resize 64 --max_size 1333: input size 1344x1344 (height x width): the model takes 16x16 to 96x96"),
    ],
)  # fmt: skip
def test_sizes_that_a_model_does_not_run_at(
    fixed: bool,
    options: list[str],
    message: str,
    detector: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if fixed:
        toy_detector.save(detector)
    image(tmp_path / "in" / "7.png", red=204, green=1, blue=1)
    arguments = ["--engine", str(detector), "--input", str(tmp_path / "in")]
    assert infer.main([*arguments, "--output", str(tmp_path / "out"), *options]) == 1
    assert f"error: {message}" in capsys.readouterr().err


def test_what_the_network_sees_at_a_size(
    detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image(tmp_path / "in" / "7.png", red=204, green=1, blue=1, size_wh=(96, 64))
    for options, shape in [([], (32, 48)), (["--size", "64,48"], (64, 48)), (["--resize", "40", "--max_size", "96"], (48, 64))]:  # fmt: skip
        arguments = ["--model", detector, "--input", tmp_path / "in", "--output", tmp_path / "out"]
        assert image_batcher.main([*map(str, arguments), *options]) == 0
        assert cv2.imread(str(tmp_path / "out" / "7.png")).shape[:2] == shape
    out = capsys.readouterr().out
    assert "network input of 40 to 96 NHWC float32, letterbox" in out
    assert "  96 x 64   0.62500   0.62500       60 x 40  7.png" in out


def test_benchmark_at_a_size(
    detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    measure = benchmark.measure

    def watched(runtime: Any, sample: Any, **options: Any) -> Any:
        shapes.append(sample.images.shape)
        return measure(runtime, sample, **options)

    monkeypatch.setattr(benchmark, "measure", watched)
    report = tmp_path / "report.json"
    arguments = ["--engine", str(detector), "--benchmark", "2", "--batch_size", "2"]
    assert infer.main([*arguments, "--size", "64,96", "--json", str(report)]) == 0
    assert shapes == [(2, 64, 96, 3)]
    assert json.loads(report.read_text())["options"]["size"] == [64, 96]
    with pytest.raises(SystemExit) as left:
        infer.main([*arguments, "--resize", "32"])
    assert left.value.code == 2


def test_normalized_boxes_are_of_the_batch_at_hand() -> None:
    spec = SPEC.replace(boxes_normalized=True)
    outputs = {
        "num_detections": np.array([[1]], np.int32),
        "detection_boxes": np.array([[[0.25, 0.5, 0.75, 1.0]]], np.float32),
        "detection_scores": np.array([[0.5]], np.float32),
        "detection_classes": np.array([[0]], np.int32),
    }
    transform = ResizeTransform((40, 20), (1.0, 1.0))
    (found,) = decode(outputs, spec, [transform], size_hw=(20, 40))
    assert found.boxes_xyxy.tolist() == [[20, 5, 40, 15]]
