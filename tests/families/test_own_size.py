# SPDX-License-Identifier: Apache-2.0
"""Networks that take each picture at a size of its own, as torchvision's RetinaNet and FCOS in
LibreYOLO do: the shorter side as long as `imgsz`, padded to a multiple of 32.

The network here is a stand-in of the same form: one convolution, cells of 32 pixels, boxes that
reach beyond the picture. What LibreYOLO does with its outputs is written again in NumPy.
"""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from trtdet import about
from trtdet.commands import create_onnx
from trtdet.deploy.deepstream import check_pictures
from trtdet.deploy.model import open_onnx
from trtdet.engine.build import choose_size
from trtdet.images.preprocess import ShorterSide, choose_input
from trtdet.run.detect import detect, open_batcher, open_model
from trtdet.run.options import RunOptions
from trtdet.sources.base import run_onnx
from trtdet.spec import ModelSpec

CELL, CLASSES, SHORTER, LONGER = 8, 80, 96, 160  # 96 * 1333 / 800, rounded
CONFIDENCE, OVERLAP = 0.3, 0.45
MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)


def network(path: Path, family: str, *, size: tuple[int, int] | None = None) -> onnx.ModelProto:
    """images [1, 3, H, W] -> rows of x1 y1 x2 y2, with FCOS a level, and 80 scores."""
    columns = 4 + (family == "fcos") + CLASSES
    rng = np.random.default_rng(8)
    weight = rng.normal(0, 0.1, (columns, 3, CELL, CELL)).astype(np.float32)
    bias = np.zeros(columns, np.float32)
    bias[:4], bias[-CLASSES:] = (-12, -8, 25, 20), -3
    constants = {
        "weight": weight, "bias": bias, "cell": np.float32(CELL),
        "axis_y": np.int64(2), "axis_x": np.int64(3), "first": np.array([0], np.int64),
        "four": np.array([4], np.int64), "all": np.array([2**62], np.int64),
        "one": np.array([1], np.int64), "shape": np.array([0, columns, -1], np.int64),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["images", "weight", "bias"], ["maps"], strides=[CELL, CELL]),
        helper.make_node("Slice", ["maps", "first", "one", "one"], ["some"]),
        helper.make_node("Mul", ["some", "zero"], ["zeros"]),
        helper.make_node("Add", ["zeros", "cell"], ["steps"]),
        helper.make_node("CumSum", ["steps", "axis_x"], ["x"], exclusive=1),
        helper.make_node("CumSum", ["steps", "axis_y"], ["y"], exclusive=1),
        helper.make_node("Concat", ["x", "y", "x", "y"], ["cells"], axis=1),
        helper.make_node("Slice", ["maps", "first", "four", "one"], ["deltas"]),
        helper.make_node("Add", ["cells", "deltas"], ["boxes"]),
        helper.make_node("Slice", ["maps", "four", "all", "one"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["scores"]),
        helper.make_node("Concat", ["boxes", "scores"], ["found"], axis=1),
        helper.make_node("Reshape", ["found", "shape"], ["columns"]),
        helper.make_node("Transpose", ["columns"], ["output"], perm=[0, 2, 1]),
    ]
    constants["zero"] = np.float32(0)
    dims = [1, 3, *(size or ("height", "width"))]
    graph = helper.make_graph(
        nodes, "stand-in", [helper.make_tensor_value_info("images", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, "anchors", columns])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    found = {
        "libreyolo_version": "1.6.0", "model_family": family, "size": "r50", "task": "detect",
        "nc": "80", "imgsz": str(SHORTER), "imgsz_h": str(SHORTER), "imgsz_w": str(SHORTER),
        "names": json.dumps({str(i): f"class {i}" for i in range(CLASSES)}),
    }  # fmt: skip
    helper.set_model_props(model, found)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return model


def overlap(box: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    both = np.prod(np.maximum(sides, 0), axis=1)
    areas = np.prod(others[:, 2:] - others[:, :2], axis=1)
    return both / (np.prod(box[2:] - box[:2]) + areas - both)


def libreyolo(model: onnx.ModelProto, path: Path, family: str) -> list[tuple[Any, ...]]:
    """What LibreYOLO does: resize to a size of its own, pad to 32, clip to the resized picture,
    NMS per class. (score, class, box in pixels of the picture), the best first.
    """
    picture = np.asarray(Image.open(path).convert("RGB")).astype(np.float32)
    h, w = picture.shape[:2]
    scale = min(SHORTER / min(h, w), LONGER / max(h, w))
    rh, rw = int(h * scale), int(w * scale)
    canvas = np.zeros((-(-rh // 32) * 32, -(-rw // 32) * 32, 3), np.float32)
    canvas[:rh, :rw] = (cv2.resize(picture, (rw, rh)) - MEAN) / STD
    (rows,) = run_onnx(model, ["output"], {"images": canvas.transpose(2, 0, 1)[None]})
    boxes, scores = rows[0, :, :4].copy(), rows[0, :, -CLASSES:]
    boxes[:, [0, 2]] = boxes[:, [0, 2]].clip(0, rw)
    boxes[:, [1, 3]] = boxes[:, [1, 3]].clip(0, rh)
    is_left = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    kept: list[tuple[Any, ...]] = []
    for label in range(CLASSES):
        index = np.flatnonzero(is_left & (scores[:, label] > CONFIDENCE))
        for i in index[np.argsort(-scores[index, label])]:
            same = np.array([k[2] for k in kept if k[1] == label]).reshape(-1, 4)
            if not len(same) or overlap(boxes[i], same).max() <= OVERLAP:
                kept.append((scores[i, label], label, boxes[i]))
    kept.sort(key=lambda k: -k[0])
    most = 100 if family == "fcos" else 300
    back = np.array([w / rw, h / rh] * 2, np.float32)
    return [(score, label, box * back) for score, label, box in kept[:most]]


def pictures(folder: Path) -> list[Path]:
    """A square one, three lying ones, and one of these upright."""
    upright = folder / "upright.png"
    Image.open(about.PHOTOGRAPHS[1]).rotate(90, expand=True).save(upright)
    return [*about.PHOTOGRAPHS, upright]


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_each_picture_at_a_size_of_its_own(family: str, tmp_path: Path) -> None:
    source, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    model = network(source, family)
    limits = ["--score_threshold", str(CONFIDENCE)]
    assert create_onnx.main(["--source_onnx", str(source), "--onnx", str(out), *limits]) == 0
    spec = ModelSpec.from_onnx(onnx.load(out))
    assert spec.preprocessing.shorter_side == (SHORTER, LONGER)
    assert spec.preprocessing.size_multiple == 32 and spec.num_classes == CLASSES
    assert not {f.origin.split(":")[0] for f in spec.evidence} & {"given", "ASSUMED"}
    paths, shapes, total = pictures(tmp_path), set(), 0
    with open_model(out, RunOptions()) as runtime:
        for path in paths:  # one at a time, as there
            with open_batcher(runtime, [path], RunOptions()) as batcher:
                (found,) = detect(runtime, batcher, score_threshold=0.0)
            expected = libreyolo(model, path, family)
            total += len(expected)
            shapes.add(
                ShorterSide(SHORTER, LONGER).canvas(
                    [Image.open(path).size[::-1]], spec.preprocessing
                )
            )
            d = found.detections
            ours = [*zip(d.scores, d.class_ids, d.boxes_xyxy, strict=True)]
            assert len(ours) == len(expected)
            for score, label, box in expected:  # two may have the same score, to a rounding
                near = [
                    i
                    for i, (s, c, b) in enumerate(ours)
                    if c == label and abs(s - score) < 1e-4 and np.abs(b - box).max() < 0.02
                ]
                assert near
                del ours[near[0]]
    assert shapes == {(96, 96), (96, 160), (160, 96)} and total >= 200


def test_one_size_where_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Or where the export has that one alone."""
    for size, asked in ((None, ["--input_size", "96,160"]), ((96, 160), [])):
        source, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
        network(source, "retinanet", size=size)
        assert create_onnx.main(["--source_onnx", str(source), "--onnx", str(out), *asked]) == 0
        preprocessing = ModelSpec.from_onnx(onnx.load(out)).preprocessing
        assert preprocessing.size_hw == (96, 160)
        assert preprocessing.shorter_side is None and preprocessing.size_range is None
        assert "at a size of its own, the shorter side 96 pixels" in capsys.readouterr().err


def test_an_engine_takes_every_size_that_a_picture_may_get(tmp_path: Path) -> None:
    source, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    network(source, "retinanet")
    assert create_onnx.main(["--source_onnx", str(source), "--onnx", str(out)]) == 0
    spec = ModelSpec.from_onnx(onnx.load(out))
    built = choose_size(spec.preprocessing, None)
    assert built.size_range == ((32, 32), (160, 160)) and built.shorter_side == (96, 160)
    assert choose_input(built) == (built, ShorterSide(96, 160))
    assert choose_input(built, size=(96, 128))[1] is None
    assert choose_input(built, resize=64, max_size=128)[1] == ShorterSide(64, 128)
    with pytest.raises(ValueError, match="at a size of its own, the shorter side 96 pixels"):
        check_pictures(open_onnx(out))
