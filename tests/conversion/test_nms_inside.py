# SPDX-License-Identifier: Apache-2.0
"""Exports that end in ONNX's NMS over several classes, as super-gradients and DAMO-YOLO write
them: the converted file finds what the network finds, in every form of the outputs.

The networks are stand-ins with the nodes that the tools write behind one small head.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from test_foreign_exports import (
    FLOAT,
    INT32,
    INT64,
    constants,
    convert,
    efficient,
    info,
    make,
    row_columns,
    selected,
    with_outputs,
)
from test_mutations import IMAGES, before, found_by, pair

from trtdet.families.box_formats import measure_format
from trtdet.spec import ModelSpec

COLUMNS = {"score": "score_column", "label": "classes_float"}
SPARE = ("images_float", "boxes_2")


def flat(
    last: tuple[str, str], most: int | None = None, model: onnx.ModelProto | None = None
) -> onnx.ModelProto:
    """Rows [n, 7] of the number of the image, a box, and score and label in either order.

    Args:
        model: with boxes_out and scores_out; None: `pair`.
    """
    model = model or pair()
    selected(model)
    model.graph.node.extend(
        [
            *row_columns(),
            make("Concat", [*SPARE, *(COLUMNS[name] for name in last)], ["every"], axis=1),
        ]
    )
    constants(model, most_rows=[most or 1000])
    model.graph.node.append(make("Slice", ["every", "zero", "most_rows", "zero"], ["found"]))
    return with_outputs(model, info("found", FLOAT, ["n", 7]))


def filled(filling: float = -1) -> onnx.ModelProto:
    """count [1, 1], boxes [1, 40, 4], scores [1, 40] and labels [1, 40], filled up behind."""
    model = pair()
    selected(model)
    constants(model, forty=[40], start=[0, 0, 0], column=[-1], filling=np.float32(filling), filling_whole=np.int64(filling), square=[1, 1])  # fmt: skip
    constants(model, none=[0], row=[1, -1], none_2=[0, 0], none_3=[0, 0, 0])
    model.graph.node.extend(
        [
            make("Reshape", ["kept_scores", "row"], ["scores_row"]),
            make("Reshape", ["kept_classes", "row"], ["labels_row"]),
            make("Shape", ["kept_scores"], ["number"]),
            make("Sub", ["forty", "number"], ["rest"]),
            make("Concat", ["start", "none", "rest", "none"], ["pads_3"], axis=0),
            make("Concat", ["none_2", "none", "rest"], ["pads_2"], axis=0),
            make("Pad", ["kept_boxes", "pads_3", "filling"], ["their_boxes"]),
            make("Pad", ["scores_row", "pads_2", "filling"], ["their_scores"]),
            make("Pad", ["labels_row", "pads_2", "filling_whole"], ["their_classes"]),
            make("Reshape", ["number", "square"], ["their_count"]),
        ]
    )
    return with_outputs(
        model,
        info("their_count", INT64, [1, 1]),
        info("their_boxes", FLOAT, [1, "k", "width"]),
        info("their_scores", FLOAT, [1, "k"]),
        info("their_classes", INT64, [1, "k"]),
    )


def flat_plugin() -> onnx.ModelProto:
    """EfficientNMS_TRT, and its results put together to rows [n, 7]."""
    model = efficient("TRT", background_class=[-1], box_coding=[0])
    constants(model, two=[2], column=[-1, 1])
    constants(model, first_image=np.zeros((1, 20, 1), np.float32))
    constants(model, places=np.arange(20, dtype=np.int32)[None])
    model.graph.node.extend(
        [
            make("Unsqueeze", ["det_scores", "two"], ["score_3"]),
            make("Unsqueeze", ["det_classes", "two"], ["class_3"]),
            make("Cast", ["class_3"], ["class_float"], to=FLOAT),
            make(
                "Concat", ["first_image", "det_boxes", "score_3", "class_float"], ["every"], axis=2
            ),
            make("Less", ["places", "num_dets"], ["is_row"]),
            make("NonZero", ["is_row"], ["positions"]),
            make("Transpose", ["positions"], ["positions_t"]),
            make("GatherND", ["every", "positions_t"], ["found"]),
        ]
    )
    return with_outputs(model, info("found", FLOAT, ["n", 7]))


FORMS = {
    "score last": lambda: flat(("label", "score")),
    "label last": lambda: flat(("score", "label")),
    "first 30 rows": lambda: flat(("score", "label"), 30),
    "filled with -1": filled,
    "filled with 0": lambda: filled(0),
    "rows of the plugin": flat_plugin,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_heads_are_the_inputs_of_the_nms(form: str, tmp_path: Path) -> None:
    _, plain = convert(pair(), tmp_path, *IMAGES)
    expected = found_by(plain)
    status, out = convert(FORMS[form](), tmp_path, *IMAGES)
    assert status == 0
    for ours, theirs in zip(found_by(out), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    nms = ModelSpec.from_onnx(onnx.load(out)).nms
    limits = (0.12, 0.55) if "plugin" in form else (0.4, 0.5)
    assert (nms.score_threshold, nms.iou_threshold) == pytest.approx(limits)
    if form in ("first 30 rows", "rows of the plugin"):
        assert nms.max_output_boxes == {"first 30 rows": 30, "rows of the plugin": 20}[form]


def test_rows_of_the_first_classes_alone_are_no_contradiction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX's NMS goes class by class, so the first 3 rows are of class 0; ours are the best 3."""
    status, out = convert(flat(("score", "label"), 3), tmp_path, *IMAGES)
    assert status == 0 and "4 of 8 are the same in box, class and score" in capsys.readouterr().out
    assert ModelSpec.from_onnx(onnx.load(out)).nms.max_output_boxes == 3


@pytest.mark.parametrize("changed", ["boxes_2", "classes_float"])
def test_what_changes_behind_the_nms_is_refused(
    changed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Boxes twice as large, or labels one higher, than the heads say."""
    model = flat(("score", "label"))
    constants(model, change=np.float32(2 if changed == "boxes_2" else 1))
    op = "Mul" if changed == "boxes_2" else "Add"
    at = next(i for i, node in enumerate(model.graph.node) if node.output[0] == "every")
    join = model.graph.node[at]
    join.input[:] = [f"{name}/changed" if name == changed else name for name in join.input]
    model.graph.node.insert(at, make(op, [changed, "change"], [f"{changed}/changed"]))
    status, out = convert(model, tmp_path, *IMAGES)
    assert status == 1 and not out.exists()
    assert "end-to-end comparison failed" in capsys.readouterr().err


def test_a_node_without_outputs_is_left_out(tmp_path: Path) -> None:
    """Graph editors leave such nodes behind; onnx's shape inference fails at them."""
    model = efficient("")
    idle = make("Constant", [], ["gone"], "idle", value=numpy_helper.from_array(np.float32(1)))
    del idle.output[:]
    model.graph.node.insert(0, idle)
    status, out = convert(model, tmp_path, *IMAGES)
    assert status == 0 and len(found_by(out)[0]) == 2


def batch_of_two() -> onnx.ModelProto:
    """The boxes of both images in one list, of which indices of both are taken."""
    model = pair()
    for infos in (model.graph.input, model.graph.output):
        for value in infos:
            value.type.tensor_type.shape.dim[0].dim_value = 2
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type == TensorProto.INT64 and values.ndim == 1 and values.size > 2 and values[0] == 1:  # fmt: skip
            tensor.CopyFrom(numpy_helper.from_array(np.array([2, *values[1:]]), tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            values = numpy_helper.to_array(attribute.t) if attribute.HasField("t") else np.zeros(0)
            if node.op_type == "Constant" and values.dtype == np.int64 and values.ndim == 1 and values.size > 2 and values[0] == 1:  # fmt: skip
                attribute.t.CopyFrom(numpy_helper.from_array(np.array([2, *values[1:]])))
    constants(model, list_of=[-1, 4], both=np.arange(84), back=[2, 42, 4])
    model.graph.node.extend(
        [
            make("Reshape", ["boxes_out", "list_of"], ["boxes_flat"]),
            make("Gather", ["boxes_flat", "both"], ["boxes_taken"], axis=0),
            make("Reshape", ["boxes_taken", "back"], ["boxes_of_two"]),
        ]
    )
    return with_outputs(
        model, info("boxes_of_two", FLOAT, [2, 42, 4]), info("scores_out", FLOAT, [2, 42, 3])
    )


def test_a_batch_of_two_that_holds_two_alone(tmp_path: Path) -> None:
    _, plain = convert(pair(), tmp_path, *IMAGES)
    expected = found_by(plain)
    status, out = convert(batch_of_two(), tmp_path, *IMAGES)
    assert status == 0
    (images,) = onnx.load(out).graph.input
    assert images.type.tensor_type.shape.dim[0].dim_value == 2
    for ours, theirs in zip(found_by(out), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_swap_of_channels_and_a_mean_inside_say_no_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """super-gradients swaps RGB to BGR, and then takes the mean of RGB, for PP-YOLOE."""
    model = pair()
    before("imagenet")(model)
    constants(model, swap=np.array([2, 1, 0]))
    name = model.graph.input[0].name
    first = next(i for i, n in enumerate(model.graph.node) if name in n.input)
    reader = model.graph.node[first]
    reader.input[:] = ["swapped" if n == name else n for n in reader.input]
    model.graph.node.insert(first, make("Gather", [name, "swap"], ["swapped"], axis=1))
    stretch = ("--resize_mode", "stretch")
    status, out = convert(model, tmp_path, *stretch)
    assert status == 1 and not out.exists()
    assert "give --channel_order rgb|bgr" in capsys.readouterr().err
    status, out = convert(model, tmp_path, *stretch, "--channel_order", "rgb")
    preprocessing = ModelSpec.from_onnx(onnx.load(out)).preprocessing
    assert status == 0 and preprocessing.bgr
    assert preprocessing.mean == pytest.approx((103.53, 116.28, 123.675), abs=1e-2)


def small_boxes(kind: str) -> list[np.ndarray]:
    """Boxes of cells of a 64 x 64 picture, about a stride wide, as YOLOX with random weights."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(4):
        rows = []
        for stride in (8, 16, 32):
            n = 64 // stride
            y, x = (v.ravel() for v in np.mgrid[:n, :n])
            centre = (np.stack([x, y], 1) + rng.normal(0, 0.2, (n * n, 2))) * stride
            size = np.exp(rng.normal(0, 0.4, (n * n, 2))) * stride
            rows.append(np.concatenate([centre - (size / 2 if kind == "xywh" else 0), size], 1))
        found.append(np.concatenate(rows))
    return found


@pytest.mark.parametrize("kind", ["cxcywh", "xywh"])
def test_small_boxes_are_read_by_how_they_follow_their_size(kind: str) -> None:
    assert measure_format(small_boxes(kind), (64, 64))[0] == kind


def test_small_boxes_of_one_size_may_be_either() -> None:
    """As wide as a stride, each: a corner follows the size no more than a centre does."""
    strides = np.concatenate([np.full((64 // n) ** 2, n) for n in (8, 16, 32)])[:, None]
    boxes = [np.concatenate([b[:, :2], strides, strides], 1) for b in small_boxes("cxcywh")]
    assert measure_format(boxes, (64, 64))[0] is None


def test_maps_of_levels_are_refused_without_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DAMO-YOLO's --benchmark: no option makes boxes of such maps."""
    model = pair()
    convolutions = [n.output[0] for n in model.graph.node if n.op_type == "Conv"][-4:]
    with_outputs(model, *(info(name, FLOAT, [1, 8, 4, 4]) for name in convolutions))
    status, out = convert(model, tmp_path)
    said = capsys.readouterr().err
    assert status == 1 and not out.exists()
    assert "maps of the feature levels" in said and "--rows_output" not in said


def test_boxes_far_from_their_cells_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DAMO-YOLO for ONNX Runtime takes corners for centres and sizes, and converts them again."""
    model = pair()
    matrix = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [-0.5, 0, 0.5, 0], [0, -0.5, 0, 0.5]], np.float32)  # fmt: skip
    constants(model, matrix=matrix * 8)
    model.graph.node.append(make("MatMul", ["boxes_out", "matrix"], ["boxes_again"]))
    with_outputs(
        model, info("boxes_again", FLOAT, [1, 42, 4]), info("scores_out", FLOAT, [1, 42, 3])
    )
    convert(model, tmp_path, *IMAGES, "--box_format", "xyxy")
    assert "strides from the cells of the grid" in capsys.readouterr().err


def test_int32_labels(tmp_path: Path) -> None:
    model = filled()
    model.graph.node.append(make("Cast", ["their_classes"], ["classes_32"], to=INT32))
    outputs = [*model.graph.output][:3]
    with_outputs(model, *(onnx.ValueInfoProto.FromString(o.SerializeToString()) for o in outputs), info("classes_32", INT32, [1, "k"]))  # fmt: skip
    status, _ = convert(model, tmp_path, *IMAGES)
    assert status == 0


def with_value(model: onnx.ModelProto, name: str, value: Any) -> onnx.ModelProto:
    """The model with another value of a constant of `selected`."""
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    tensor.CopyFrom(numpy_helper.from_array(np.array(value), name))
    return model


@pytest.mark.parametrize("form", ["label last", "filled with -1"])
def test_an_nms_that_finds_nothing_shows_nothing(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is done behind it, to labels for example, would be believed unseen."""
    model = with_value(FORMS[form](), "least", np.float32(0.99))
    status, out = convert(model, tmp_path, *IMAGES)
    assert status == 1 and not out.exists()
    assert "cannot be checked; declare what enters its NMS, --boxes_output boxes_out --scores_output scores_out" in capsys.readouterr().err  # fmt: skip
    options = ("--boxes_output", "boxes_out", "--scores_output", "scores_out")
    assert convert(model, tmp_path, *IMAGES, *options)[0] == 0


def test_a_limit_of_each_class_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TensorRT's NMS has none."""
    said = "its NMS keeps at most 1 boxes of a class, where a photograph has more"
    for most, times in ((1, 1), (20, 0)):
        model = with_value(flat(("score", "label")), "most", np.int64(most))
        assert convert(model, tmp_path, *IMAGES)[0] == 0
        assert capsys.readouterr().err.count(said) == times


@pytest.mark.parametrize("background", ["first", "last"])
def test_a_background_inside_the_nms_is_asked_for(
    background: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The NMS of softmax scores suppresses among its background, too."""
    model = pair()
    for node in model.graph.node:
        node.output[:] = ["plain_scores" if name == "scores_out" else name for name in node.output]
    constants(
        model, pads_of_four=[0, 0, int(background == "first"), 0, 0, int(background == "last")]
    )
    constants(model, background_logit=np.float32(-0.3))
    model.graph.node.extend(
        [
            make("Log", ["plain_scores"], ["three_logits"]),
            make("Pad", ["three_logits", "pads_of_four", "background_logit"], ["four"]),
            make("Softmax", ["four"], ["scores_out"], axis=2),
        ]
    )
    rows = with_value(flat(("score", "label"), model=model), "least", np.float32(0.15))
    status, out = convert(rows, tmp_path, *IMAGES)
    assert status == 1 and not out.exists()
    assert "give --background first|last|none" in capsys.readouterr().err
    status, out = convert(rows, tmp_path, *IMAGES, "--background", background)
    assert status == 0 and ModelSpec.from_onnx(onnx.load(out)).num_classes == 3
    expected = found_by(out)
    inputs = ("--boxes_output", "boxes_out", "--scores_output", "scores_out")
    status, out = convert(rows, tmp_path, *IMAGES, *inputs, "--background", background)
    assert status == 0
    for ours, theirs in zip(found_by(out), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_the_best_behind_the_nms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A TopK takes the best of all classes, where a Slice takes the first classes."""
    model = flat(("score", "label"))
    assert model.graph.node[-1].output[0] == "found"
    del model.graph.node[-1]
    constants(model, best=[2])
    model.graph.node.extend(
        [
            make("TopK", ["kept_scores", "best"], ["best_scores", "best_rows"], axis=0),
            make("Gather", ["every", "best_rows"], ["found"], axis=0),
        ]
    )
    status, out = convert(model, tmp_path, *IMAGES)
    assert status == 0 and ModelSpec.from_onnx(onnx.load(out)).nms.max_output_boxes == 2
    said = capsys.readouterr().out
    assert "4 of 4 compared come out of our heads (8 in all)" in said
    assert "4 of 4 are the same in box, class and score" in said


@pytest.mark.parametrize("share", [-1.2, -0.25, 0.4, 1.3])
def test_boxes_that_follow_their_size_otherwise_are_asked_for(share: float) -> None:
    """A centre moves by nothing, a corner by half of the size."""
    boxes = [
        np.concatenate([b[:, :2] + share * (b[:, 2:] - b[:, 2:].mean(axis=0)), b[:, 2:]], 1)
        for b in small_boxes("cxcywh")
    ]
    assert measure_format(boxes, (64, 64))[0] not in ("cxcywh", "xywh")
