# SPDX-License-Identifier: Apache-2.0
"""CenterNet exported with its three maps, against its decoding in NumPy.

The network is a stand-in of the same form: one convolution, cells of 4 pixels, 3 classes.
"""

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
from trtdet.families.centernet import OWN
from trtdet.run.detect import detect, open_batcher, open_model
from trtdet.run.options import RunOptions
from trtdet.sources.base import run_onnx
from trtdet.spec import ModelSpec

SIZE, CELL, CLASSES, KEPT = 128, 4, 3, 100
CELLS = SIZE // CELL
MEAN = np.array([0.408, 0.447, 0.470]) * 255  # BGR, as CenterNet has it
STD = np.array([0.289, 0.274, 0.278]) * 255
NAMES = ("hm", "wh", "reg")


def network(
    path: Path, *, names: tuple[str, ...] = NAMES, activated: bool = False, declared: bool = True
) -> onnx.ModelProto:
    """images [N, 3, 128, 128] -> a heatmap of logits or probabilities, sizes, offsets."""
    rng = np.random.default_rng(5)
    bias = np.array([-3, -2.5, -2, 6, 5, 0.5, 0.4], np.float32)
    weight = rng.normal(0, 0.1, (len(bias), 3, CELL, CELL)).astype(np.float32)
    weight[CLASSES + 2 :] *= 0.02
    sizes = [CLASSES, 2, 2]
    heat = "logits" if activated else names[0]
    nodes = [
        helper.make_node("Conv", ["images", "weight", "bias"], ["maps"], strides=[CELL, CELL]),
        helper.make_node("Split", ["maps", "parts"], [heat, *names[1:]], axis=1),
    ]
    if activated:
        nodes.append(helper.make_node("Sigmoid", ["logits"], [names[0]]))
    dims = [["N", n if declared else None, *([CELLS] * 2 if declared else [None] * 2)] for n in sizes]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "centernet",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, d) for n, d in zip(names, dims, strict=True)],
        [numpy_helper.from_array(v, n) for n, v in (("weight", weight), ("bias", bias), ("parts", np.array(sizes)))],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return model


def decoded(model: onnx.ModelProto, image: NDArray[np.uint8], activated: bool) -> list[Any]:
    """(score, class, x1 y1 x2 y2 in pixels of the image) of CenterNet's own code, its best 100."""
    height, width = image.shape[:2]
    scale = SIZE / max(height, width)
    shift = np.array([SIZE - width * scale, SIZE - height * scale]) / 2
    matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
    warped = cv2.warpAffine(image[..., ::-1].copy(), matrix, (SIZE, SIZE))
    fed = ((warped - MEAN) / STD).astype(np.float32).transpose(2, 0, 1)[None]
    maps = run_onnx(model, [info.name for info in model.graph.output], {"images": fed})
    heat, sizes, offsets = (m[0] for m in maps)
    heat = heat if activated else 1 / (1 + np.exp(-heat))
    found = []
    padded = np.pad(heat, ((0, 0), (1, 1), (1, 1)))
    for c, y, x in np.ndindex(*heat.shape):
        if heat[c, y, x] < padded[c, y : y + 3, x : x + 3].max():
            continue
        centre = (np.array([x, y]) + offsets[:, y, x]) * CELL
        half = sizes[:, y, x] * CELL / 2
        box = (np.concatenate([centre - half, centre + half]) - np.tile(shift, 2)) / scale
        found.append((float(heat[c, y, x]), c, np.clip(box, 0, [width, height] * 2)))
    return sorted(found, key=lambda f: -f[0])[:KEPT]


@pytest.mark.parametrize("names", [NAMES, ("a", "b", "c"), ("heatmap", "box_size", "offset")])
@pytest.mark.parametrize("activated", [False, True])
def test_detections_are_those_of_its_own_decoding(
    names: tuple[str, ...], activated: bool, tmp_path: Path
) -> None:
    source, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    model = network(source, names=names, activated=activated, declared=names[0] != "heatmap")
    assert create_onnx.main(["--source_onnx", str(source), "--onnx", str(out), *OWN.split()]) == 0
    spec = ModelSpec.from_onnx(onnx.load(out))
    assert (spec.family, spec.num_classes, spec.nms.max_output_boxes) == ("centernet", 3, KEPT)
    assert spec.preprocessing.is_warped and spec.preprocessing.bgr
    paths = list(about.PHOTOGRAPHS)
    compared = 0
    with open_model(out, RunOptions()) as runtime, open_batcher(runtime, paths, RunOptions()) as b:
        for image in detect(runtime, b, score_threshold=0.0):
            pixels = np.asarray(Image.open(image.path).convert("RGB"))
            wanted = decoded(model, pixels, activated)
            ours = image.detections
            assert len(ours.scores) == len(wanted) == KEPT
            np.testing.assert_allclose(ours.scores, [w[0] for w in wanted], atol=1e-4)
            for score, class_id, box in wanted:
                near = np.abs(ours.boxes_xyxy - box).max(axis=1) <= 0.05
                same = (ours.class_ids == class_id) & (np.abs(ours.scores - score) <= 1e-4)
                compared += bool((near & same).any())
    assert compared >= len(paths) * (KEPT - 1)  # equal scores at the end


def test_images_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    network(source)
    assert create_onnx.main(["--source_onnx", str(source), "--onnx", str(out)]) == 1
    error = capsys.readouterr().err
    assert "nothing in the file says normalisation and resize" in error and not out.exists()
    assert f"CenterNet's own code takes {OWN}" in error


def test_maps_that_do_not_tell_which_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    model = network(source, names=("a", "b", "c"))
    bias = next(t for t in model.graph.initializer if t.name == "bias")
    values = numpy_helper.to_array(bias).copy()
    values[-2:] = 7
    bias.CopyFrom(numpy_helper.from_array(values, "bias"))
    onnx.save(model, source)
    assert create_onnx.main(["--source_onnx", str(source), "--onnx", str(out), *OWN.split()]) == 1
    assert "which do not tell which they are; call them hm, wh and reg" in capsys.readouterr().err
    assert not out.exists()


def test_three_levels_of_a_yolo_are_no_maps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    model = network(source, names=("p3", "p4", "p5"))
    for info, channels in zip(model.graph.output, (3, 2, 2), strict=True):
        info.type.tensor_type.shape.dim[1].dim_value = channels
    model.graph.output[2].type.tensor_type.shape.dim[2].dim_param = "h"
    onnx.save(model, source)
    assert create_onnx.main(["--source_onnx", str(source), "--onnx", str(out), *OWN.split()]) == 1
    assert "centernet" not in capsys.readouterr().out and not out.exists()
