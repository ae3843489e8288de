# SPDX-License-Identifier: Apache-2.0
"""Forms of exports that tools of other projects write, put behind one small head of YOLO:
TensorRT's NMS plugins, the further inputs of PaddleDetection, detections without a batch axis, and
a number of detections that differs from picture to picture.

The forms are those of the tools' documentation; the network is a stand-in.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_mutations import IMAGES, found_by, pair

from trtdet.commands import create_onnx
from trtdet.errors import GraphError
from trtdet.sources import onnx_file
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import ModelSpec

INT32, INT64, FLOAT = TensorProto.INT32, TensorProto.INT64, TensorProto.FLOAT
make, info = helper.make_node, helper.make_tensor_value_info


def with_outputs(model: onnx.ModelProto, *outputs: onnx.ValueInfoProto) -> onnx.ModelProto:
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    return model


def constants(model: onnx.ModelProto, **values: Any) -> None:
    for name, value in values.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))


def plugin(
    op: str, domain: str, *inputs: str, others: tuple[str, ...] = (), **attributes: Any
) -> onnx.ModelProto:
    model = pair()
    if domain:
        model.opset_import.append(helper.make_opsetid(domain, 1))
    outputs = ["num_dets", "det_boxes", "det_scores", "det_classes"]
    found = list(inputs or ("boxes_out", "scores_out"))
    model.graph.node.append(make(op, found, outputs, domain=domain, **attributes))
    types = ((INT32, [1, 1]), (FLOAT, [1, 20, 4]), (FLOAT, [1, 20]), (INT32, [1, 20]))
    values = [info(name, *kind) for name, kind in zip(outputs, types, strict=True)]
    return with_outputs(model, *values, *(info(name, FLOAT, None) for name in others))


def efficient(domain: str, **changes: Any) -> onnx.ModelProto:
    attributes = {
        "background_class": -1, "box_coding": 0, "iou_threshold": 0.55, "max_output_boxes": 20, "plugin_version": "1",
        "score_activation": 0, "score_threshold": 0.12,
    }  # fmt: skip
    return plugin("EfficientNMS_TRT", domain, **(attributes | changes))


def batched() -> onnx.ModelProto:
    """Boxes [N, A, 1, 4], which all classes share."""
    model = plugin(
        "BatchedNMS_TRT", "", "boxes_4", "scores_out", backgroundLabelId=-1, iouThreshold=0.55, isNormalized=0, keepTopK=20, numClasses=3,
        scoreThreshold=0.12, shareLocation=1, topK=42,
    )  # fmt: skip
    constants(model, at=np.array([2]))
    model.graph.node.insert(
        len(model.graph.node) - 1, make("Unsqueeze", ["boxes_out", "at"], ["boxes_4"])
    )
    return model


def paddle() -> onnx.ModelProto:
    """PaddleDetection without its NMS: boxes over the scale of the picture, scores [N, C, A]."""
    model = pair()
    model.graph.input.insert(0, info("im_shape", FLOAT, [1, 2]))
    model.graph.input.append(info("scale_factor", FLOAT, [1, 2]))
    constants(model, xyxy=np.array([1, 0, 1, 0]))
    model.graph.node.extend(
        [
            make("Gather", ["scale_factor", "xyxy"], ["scales"], axis=1),
            make("Div", ["boxes_out", "scales"], ["boxes_of_source"]),
            make("Transpose", ["scores_out"], ["scores_by_class"], perm=[0, 2, 1]),
        ]
    )
    return with_outputs(
        model,
        info("boxes_of_source", FLOAT, [1, 42, 4]),
        info("scores_by_class", FLOAT, [1, 3, 42]),
    )


def selected(model: onnx.ModelProto) -> None:
    """ONNX's NMS: `kept_boxes` [1, n, 4], `kept_scores` [n], `kept_classes` [n, 1]."""
    constants(
        model, most=np.int64(20), overlap=np.float32(0.5), least=np.float32(0.4), zero=[0], one=[1], two=[2], three=[3],
    )  # fmt: skip
    model.graph.node.extend(
        [
            make("Transpose", ["scores_out"], ["by_class"], perm=[0, 2, 1]),
            make("NonMaxSuppression", ["boxes_out", "by_class", "most", "overlap", "least"], ["chosen"]),
            make("Slice", ["chosen", "one", "two", "one"], ["kept_classes"]),
            make("Slice", ["chosen", "two", "three", "one"], ["box_column"]),
            make("Squeeze", ["box_column", "one"], ["box_index"]),
            make("Gather", ["boxes_out", "box_index"], ["kept_boxes"], axis=1),
            make("Concat", ["box_column", "kept_classes"], ["pairs"], axis=1),
            make("Squeeze", ["scores_out", "zero"], ["scores_2"]),
            make("GatherND", ["scores_2", "pairs"], ["kept_scores"]),
        ]
    )  # fmt: skip


def mmdeploy() -> onnx.ModelProto:
    """dets [1, n, 5] and labels [1, n] of ONNX's NMS: n differs from picture to picture."""
    model = pair()
    selected(model)
    constants(model, column=[1, -1, 1], row=[1, -1])
    model.graph.node.extend(
        [
            make("Reshape", ["kept_scores", "column"], ["kept_column"]),
            make("Concat", ["kept_boxes", "kept_column"], ["dets"], axis=2),
            make("Reshape", ["kept_classes", "row"], ["labels"]),
        ]
    )
    return with_outputs(model, info("dets", FLOAT, [1, "n", 5]), info("labels", INT64, [1, "n"]))


def row_columns() -> list[onnx.NodeProto]:
    """Behind `selected`: images_float, boxes_2, classes_float and score_column, which rows are put
    together from.
    """
    return [
        make("Slice", ["chosen", "zero", "one", "one"], ["image_column"]),
        make("Cast", ["image_column"], ["images_float"], to=FLOAT),
        make("Cast", ["kept_classes"], ["classes_float"], to=FLOAT),
        make("Unsqueeze", ["kept_scores", "one"], ["score_column"]),
        make("Squeeze", ["kept_boxes", "zero"], ["boxes_2"]),
    ]


def rows(width: int) -> onnx.ModelProto:
    """PaddleDetection with its NMS (label, score, box), and DAMO-YOLO for ONNX Runtime (image, box,
    label, score): rows without a batch axis.
    """
    model = pair()
    selected(model)
    make_rows = {
        6: ["classes_float", "score_column", "boxes_2"],
        7: ["images_float", "boxes_2", "classes_float", "score_column"],
    }[width]
    model.graph.node.extend([*row_columns(), make("Concat", make_rows, ["found"], axis=1)])
    return with_outputs(model, info("found", FLOAT, ["n", width]))


def convert(model: onnx.ModelProto, folder: Path, *options: str) -> tuple[int, Path]:
    source, out = folder / "model.onnx", folder / "out.onnx"
    onnx.save(model, source)
    return create_onnx.main(["--source_onnx", str(source), "--onnx", str(out), *options]), out


@pytest.mark.parametrize(
    "form",
    [lambda: efficient("TRT"), lambda: efficient("trt.plugins"), lambda: efficient(""), batched, paddle],
    ids=["TRT", "trt.plugins", "no domain", "BatchedNMS", "Paddle"],
)  # fmt: skip
def test_the_heads_are_found(form: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    _, plain = convert(pair(), tmp_path, *IMAGES)
    expected = found_by(plain)
    status, out = convert(form(), tmp_path, *IMAGES)
    assert status == 0
    for ours, theirs in zip(found_by(out), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    made = onnx.load(out)
    spec = ModelSpec.from_onnx(made)
    (value,) = made.graph.input
    assert value.name == "input" and spec.num_classes == 3
    if form is not paddle:
        nms = spec.nms
        assert (nms.score_threshold, nms.iou_threshold) == pytest.approx((0.12, 0.55))
        assert nms.max_output_boxes == 20 and not nms.class_agnostic


def by_paddle(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.name = "PaddlePaddle Graph in PIR mode"
    return model


@pytest.mark.parametrize(
    ("asked", "sampling", "resize"),
    [("cubic", "cubic", "stretch, cubic"), ("linear", "half_pixel", "stretch")],
)
def test_paddles_interpolation_is_asked_for(
    asked: str, sampling: str, resize: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its models differ in it, and their files do not say it."""
    status, out = convert(by_paddle(paddle()), tmp_path, *IMAGES)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 1 and not out.exists()
    assert "nothing in the file says interpolation; give --interpolation linear|cubic" in said
    assert "infer_cfg.yml" in said
    status, out = convert(by_paddle(paddle()), tmp_path, *IMAGES, "--interpolation", asked)
    spec = ModelSpec.from_onnx(onnx.load(out))
    facts = {fact.name: fact.value for fact in spec.evidence}
    assert status == 0 and facts["family"] == "PaddleDetection" and facts["resize"] == resize
    assert (spec.preprocessing.sampling, spec.preprocessing.dtype) == (sampling, "uint8")


def test_any_export_may_be_cubic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = convert(pair(), tmp_path, *IMAGES, "--interpolation", "cubic")
    assert status == 0
    assert ModelSpec.from_onnx(onnx.load(out)).preprocessing.sampling == "cubic"
    for other in (("--antialias",), ("--resize_mode", "warp")):
        with pytest.raises(SystemExit, match="2"):
            convert(pair(), tmp_path, "--interpolation", "cubic", *other)
        said = capsys.readouterr().err
        assert "--interpolation goes with resizing as OpenCV does it, not with" in said


def inside_out(model: onnx.ModelProto) -> onnx.ModelProto:
    """Corners without positive sides: two points near the centre of each box, the second above and
    to the left of the first.
    """
    mixing = np.kron([[0.48, 0.52], [0.52, 0.48]], np.eye(2)).astype(np.float32)
    constants(model, mixing=mixing)
    model.graph.node.append(make("MatMul", ["boxes_out", "mixing"], ["around_out"]))
    return with_outputs(
        model, info("around_out", FLOAT, [1, 42, 4]), info("scores_out", FLOAT, [1, 42, 3])
    )


def test_corners_without_sides_are_no_centres(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """cx cy w h of them would have positive sides, and lie about the cells."""
    status, out = convert(inside_out(pair()), tmp_path, *IMAGES)
    assert status == 1 and not out.exists()
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "nothing in the file says boxes; give --box_format xyxy|yxyx|xywh|cxcywh" in said


def levels() -> onnx.ModelProto:
    """Scores, and boxes as distributions, of each level apart."""
    model = pair()
    outputs = []
    for name, width in (("scores_out", 3), ("boxes_out", 32)):
        repeats = 1 if width == 3 else 8
        model.graph.node.append(make("Concat", [name] * repeats, [f"wide_{name}"], axis=2))
        for start, end in ((0, 32), (32, 40), (40, 42)):
            key = f"{name}_{start}"
            constants(model, **{f"{key}_a": [start], f"{key}_b": [end], f"{key}_c": [1]})
            model.graph.node.append(make("Slice", [f"wide_{name}", f"{key}_a", f"{key}_b", f"{key}_c"], [key]))  # fmt: skip
            outputs.append(info(key, FLOAT, [1, end - start, width]))
    return with_outputs(model, *outputs)


def test_levels_that_are_not_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No option reads them; the refusal says how to export."""
    status, out = convert(levels(), tmp_path, *IMAGES)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 1 and not out.exists()
    assert "found the maps of 3 levels apart (32, 8, 2 cells), whose boxes are not decoded" in said
    assert "export.post_process=True" in said and "Declare them" not in said


def test_wrong_shapes_of_inner_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As paddle2onnx writes them for PP-YOLO: they are left out where ONNX Runtime, which plans its
    memory by them, fails. Its failure is a stand-in here.
    """
    model = pair()
    model.graph.value_info.append(info("pixels", FLOAT, [1, 4, 1]))
    onnx.save(model, tmp_path / "model.onnx")
    source = OnnxSource(tmp_path / "model.onnx")
    said = ["some other failure", f"{onnx_file.WRONG_SHAPES}. {{1,3,1}} != {{1,3,80}}"]
    real = onnx_file.run_part

    def failing(*asked: Any) -> Any:
        if said:
            raise GraphError(said.pop())
        return real(*asked)

    monkeypatch.setattr(onnx_file, "run_part", failing)
    feed = {"images": np.zeros((1, 3, 32, 64), np.float32)}
    with pytest.raises(GraphError, match="some other failure"):  # of the second attempt
        source.run(["scores_out"], feed)
    assert not source.model.graph.value_info and not said
    (values,) = source.run(["scores_out"], feed)
    assert values.shape == (1, 42, 3)


def test_suppression_over_all_classes(tmp_path: Path) -> None:
    status, out = convert(efficient("TRT", class_agnostic=1), tmp_path, *IMAGES)
    assert status == 0 and ModelSpec.from_onnx(onnx.load(out)).nms.class_agnostic


@pytest.mark.parametrize(
    ("form", "options", "said"),
    [
        (lambda: efficient("TRT"), (), "nothing in the file says normalisation and resize; give --preprocessor"),
        (lambda: efficient("TRT", box_coding=1), IMAGES, "has cxcywh: the boxes are xyxy"),
        (lambda: efficient("TRT", score_activation=1), IMAGES, "have their activation already"),
        (lambda: plugin("EfficientNMS_TRT", "TRT", others=("scores_out",)), IMAGES, "export the model without it"),
    ],
)  # fmt: skip
def test_refused(
    form: Callable[[], onnx.ModelProto], options: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    status, out = convert(form(), tmp_path, *options)
    assert status == 1 and not out.exists()
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
