# SPDX-License-Identifier: Apache-2.0
"""Deformable DETR with box refinement of torch's older exporter, through stage 1, against
transformers' own outputs and post-processing.
"""

import numpy as np
import onnx
import pytest
from detr_data import assert_detections, detect, load

from trtdet.conversion.convert import convert as convert_source
from trtdet.conversion.options import Options
from trtdet.conversion.verification import verify
from trtdet.errors import GraphError
from trtdet.families import deformable_detr, detr
from trtdet.families.base import Hints, pick_family
from trtdet.graph.deformable_attention import PLUGIN_OP
from trtdet.nms import lowering
from trtdet.precision import floats
from trtdet.sources.base import run_onnx
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import ModelSpec

MODES = ("keep", "plugin", "gather")


@pytest.fixture(scope="module")
def tiny():
    return load("deformable_detr_tiny")


@pytest.fixture(scope="module")
def converted(tiny, tmp_path_factory):
    """(resize, mode) -> the verified model, each converted once."""
    path = tmp_path_factory.mktemp("deformable") / "source.onnx"
    onnx.save(tiny[0], path)
    source = OnnxSource(path)
    models = {}

    def of(resize, mode):
        if (resize, mode) not in models:
            hints = Hints(resize=resize, deformable_attention=mode)
            options = Options(family=deformable_detr.NAME, hints=hints)
            done = convert_source(source, options)
            assert max(d.maximum for d in verify(source, done)) < 1e-4
            models[resize, mode] = done.model
        return models[resize, mode]

    return of


@pytest.mark.parametrize(
    ("resize", "mode"), [("letterbox", "gather"), *(("stretch", mode) for mode in MODES)]
)
def test_equals_transformers(tiny, converted, resize, mode):
    _, pictures = tiny
    found = detect(converted(resize, mode), pictures)
    assert_detections(found, getattr(pictures, resize), pictures)


def test_the_attention_is_written_as_asked_for(converted):
    counts = {
        mode: [
            sum(node.op_type == op for node in converted("stretch", mode).graph.node)
            for op in ("GridSample", PLUGIN_OP, "GatherND")
        ]
        for mode in MODES
    }
    # One layer of the encoder, two of the decoder; two levels; four neighbours.
    assert counts == {"keep": [6, 0, 0], "plugin": [0, 3, 0], "gather": [0, 0, 12]}


def test_the_default_needs_no_plugin(tiny, tmp_path):
    path = tmp_path / "source.onnx"
    onnx.save(tiny[0], path)
    done = convert_source(OnnxSource(path), Options())  # recognised, too
    model, spec = done.model, done.spec
    assert (spec.family, spec.preprocessing.resize) == ("deformable_detr", "letterbox")
    assert (spec.nms.score_activation, spec.nms.class_agnostic) == (True, False)
    assert spec.nms.max_output_boxes == 48  # 12 queries, 4 classes: fewer than 100
    assert not lowering.has_plugin(model)


def test_batch_equals_single_images(tiny, converted):
    _, pictures = tiny
    model = converted("letterbox", "gather")
    for i, expected in enumerate(detect(model, pictures)):
        (single,) = detect(model, pictures, slice(i, i + 1))
        np.testing.assert_array_equal(single.class_ids, expected.class_ids)
        np.testing.assert_allclose(single.boxes_xyxy, expected.boxes_xyxy, atol=1e-3)


def test_a_picture_of_nothing_but_padding_gives_numbers(converted):
    model = converted("letterbox", "gather")
    preprocessing = ModelSpec.from_onnx(model).preprocessing
    empty = np.zeros((2, *preprocessing.image_shape), np.float32)
    if preprocessing.layout == "NHWC":
        empty += np.array(preprocessing.mean, np.float32)
    else:
        empty += np.array(preprocessing.mean, np.float32)[:, None, None]
    scores, boxes = run_onnx(model, ["detection_scores", "detection_boxes"], {"input": empty})
    assert np.isfinite(scores).all() and np.isfinite(boxes).all()
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-6)


def test_shape_arithmetic_is_gone(tiny, converted):
    model = converted("stretch", "plugin")
    assert len(tiny[0].graph.node) > 1700
    assert len(model.graph.node) < 400
    # One Shape of the input: the initial queries are repeated for every image.
    assert sum(node.op_type == "Shape" for node in model.graph.node) == 1
    assert not {node.op_type for node in model.graph.node} & {
        "Range",
        "ScatterND",
        "CumSum",
        "Loop",
    }


def test_positions_stay_float32(converted):
    _, report = floats.to_fp16(converted("stretch", "gather"))
    positions = [node for node in report.by_design if node.reason == "positions"]
    assert {"Sigmoid", "Floor", "Log"} <= {node.op_type for node in positions}
    names = {node.name for node in report.by_design}
    assert not any(
        name.startswith("positions/") and name not in names for name in report.float32_names
    )
    assert report.converted > 100


def test_recognised_by_its_operators(tiny, tmp_path):
    path = tmp_path / "source.onnx"
    onnx.save(tiny[0], path)
    assert pick_family(OnnxSource(path), [detr, deformable_detr]) is deformable_detr


def test_float64_of_the_older_exporter_is_explained(tiny, tmp_path):
    """With a fixed batch it computes positions in float64, which ONNX Runtime's GridSample does
    not take.
    """
    model = onnx.ModelProto()
    model.CopyFrom(tiny[0])
    nodes = []
    for node in model.graph.node:
        if node.op_type == "GridSample":
            wide = f"{node.name}/float64"
            nodes.append(
                onnx.helper.make_node(
                    "Cast", [node.input[1]], [wide], wide, to=onnx.TensorProto.DOUBLE
                )
            )
            node.input[1] = wide
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    path = tmp_path / "source.onnx"
    onnx.save(model, path)
    with pytest.raises(GraphError, match="export it with a dynamic batch"):
        deformable_detr.read(OnnxSource(path))


def test_tensorrt_rtx_builds_it(converted, tmp_path, capsys):
    pytest.importorskip("tensorrt_rtx", reason="needs requirements-rtx.txt")
    from trtdet.commands import build_engine

    path = tmp_path / "deformable.onnx"
    onnx.save(converted("stretch", "plugin"), path)  # lowered for it in memory
    options = [
        "--precision",
        "fp16",
        "--flavor",
        "tensorrt_rtx",
        "--compute_capability",
        "8.9",
        "--optimization_level",
        "0",
    ]
    assert (
        build_engine.main(["--onnx", str(path), "--engine", str(tmp_path / "d.engine"), *options])
        == 0
    )
    assert "FP16" in capsys.readouterr().out
