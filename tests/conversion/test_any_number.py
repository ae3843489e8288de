# SPDX-License-Identifier: Apache-2.0
"""Models that select their detections themselves, as many as a picture has: what the converted file
finds is what the source finds, none included.

The networks are stand-ins of the forms that the tools write, with ONNX's NMS behind a small head.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from test_foreign_exports import FLOAT, INT64, constants, info, make, mmdeploy, rows, with_outputs
from test_mutations import IMAGES, pair

from trtdet import about
from trtdet.commands import build_engine, create_onnx
from trtdet.errors import GraphError
from trtdet.families.any_number import mend_reshapes
from trtdet.families.outputs import photographs
from trtdet.nms.static_rows import maybe_data_sized
from trtdet.run.detect import detect, open_batcher, open_model
from trtdet.run.options import RunOptions
from trtdet.sources.base import run_onnx
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import OUTPUT_NAMES, ModelSpec

#: (boxes x1 y1 x2 y2, scores, labels) of one picture.
Found = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


def triple() -> onnx.ModelProto:
    """boxes [n, 4], scores [n], labels [n] int64, in the order of the NMS: class by class."""
    model = rows(6)
    constants(model, at_label=np.int64(0), at_score=np.int64(1))
    constants(model, two_to=[2], six=[6])
    model.graph.node.extend(
        [
            make("Slice", ["found", "two_to", "six", "one"], ["their_boxes"]),
            make("Gather", ["found", "at_score"], ["their_scores"], axis=1),
            make("Gather", ["found", "at_label"], ["label_column"], axis=1),
            make("Cast", ["label_column"], ["their_labels"], to=INT64),
        ]
    )
    return with_outputs(
        model,
        info("their_boxes", FLOAT, ["n", 4]),
        info("their_labels", INT64, ["n"]),
        info("their_scores", FLOAT, ["n"]),
    )


def nothing_found() -> onnx.ModelProto:
    model = triple()
    (least,) = [t for t in model.graph.initializer if t.name == "least"]
    least.CopyFrom(numpy_helper.from_array(np.float32(2), "least"))
    return model


def without_names() -> onnx.ModelProto:
    model = triple()
    names = {"their_boxes": "o7", "their_scores": "o8", "their_labels": "o9"}
    for node in model.graph.node:
        node.output[:] = [names.get(name, name) for name in node.output]
    for output in model.graph.output:
        output.name = names[output.name]
    return model


def without_shapes() -> onnx.ModelProto:
    """Outputs whose shapes the file leaves out."""
    model = triple()
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    return model


def paddle_rows() -> onnx.ModelProto:
    """label score x1 y1 x2 y2, boxes over the scale of the picture, beside their number."""
    model = rows(6)
    model.graph.input.insert(0, info("im_shape", FLOAT, [1, 2]))
    model.graph.input.append(info("scale_factor", FLOAT, [1, 2]))
    constants(model, wide=np.array([[1, 1, 0, 0, 0, 0]], np.float32))
    constants(model, pads=np.array([0, 2, 0, 0]), swap=np.array([1, 0, 1, 0]))
    model.graph.node.extend(
        [
            make("Gather", ["scale_factor", "swap"], ["scales"], axis=1),
            make("Pad", ["scales", "pads"], ["padded_scales"]),
            make("Add", ["padded_scales", "wide"], ["divisors"]),
            make("Div", ["found", "divisors"], ["rows_out"]),
            make("Shape", ["rows_out"], ["shape_out"]),
            make("Slice", ["shape_out", "zero", "one"], ["number"]),
        ]
    )
    return with_outputs(model, info("rows_out", FLOAT, ["n", 6]), info("number", INT64, [1]))


def read_triple(boxes: Any, labels: Any, scores: Any) -> Found:
    return boxes, scores, labels


def read_dets(dets: Any, labels: Any) -> Found:
    return dets[0, :, :4], dets[0, :, 4], labels[0]


def read_6(found: Any, *_: Any) -> Found:
    return found[:, 2:], found[:, 1], found[:, 0]


def read_7(found: Any) -> Found:
    return found[:, 1:5], found[:, 6], found[:, 5]


XYXY = ("--box_format", "xyxy")
WITHOUT_SHAPES = "without shapes"
FORMS: dict[str, tuple[Callable[[], onnx.ModelProto], Callable[..., Found], tuple[str, ...]]] = {
    "boxes, labels, scores": (triple, read_triple, XYXY),
    "other names": (without_names, read_triple, XYXY),
    WITHOUT_SHAPES: (without_shapes, read_triple, XYXY),
    "declared": (triple, read_triple, ("--boxes_output", "their_boxes", "--scores_output", "their_scores", "--labels_output", "their_labels", "--selected", *XYXY)),
    "dets, labels": (mmdeploy, read_dets, ()),
    "rows of 6": (lambda: rows(6), read_6, ("--rows_output", "found", "--columns", "label,score,x1,y1,x2,y2")),
    "rows of 7": (lambda: rows(7), read_7, ("--rows_output", "found", "--columns", "unused,x1,y1,x2,y2,label,score")),
    "Paddle": (paddle_rows, read_6, ()),
}  # fmt: skip


def convert(model: onnx.ModelProto, folder: Path, *options: str) -> tuple[int, Path]:
    source, out = folder / "model.onnx", folder / "out.onnx"
    onnx.save(model, source)
    return create_onnx.main(["--source_onnx", str(source), "--onnx", str(out), *options]), out


def feeds(model: onnx.ModelProto, image: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    fed = {"images": image.transpose(2, 0, 1)[None].astype(np.float32) / 255}
    if len(model.graph.input) > 1:
        fed["scale_factor"] = np.ones((1, 2), np.float32)
    return fed


def pictures(spec: ModelSpec) -> list[NDArray[np.uint8]]:
    """Photographs, and a black picture, in which nothing is found."""
    size_hw = spec.preprocessing.size_hw
    return [*photographs(size_hw), np.zeros((*size_hw, 3), np.uint8)]


@pytest.mark.parametrize("name", FORMS)
def test_what_the_source_finds(name: str, tmp_path: Path) -> None:
    form, read, options = FORMS[name]
    model = form()
    if name != WITHOUT_SHAPES:  # ONNX Runtime takes it all the same
        onnx.checker.check_model(model)
    status, out = convert(model, tmp_path, *IMAGES, "--max_detections", "60", *options)
    assert status == 0
    made = onnx.load(out)
    assert maybe_data_sized(made) is None and maybe_data_sized(model) is not None
    spec = ModelSpec.from_onnx(made)
    assert spec.selection == "topk" and spec.nms.max_output_boxes == 60 and spec.num_classes == 3
    assert made.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    facts = {fact.name: fact.origin for fact in spec.evidence}
    assert facts["detections kept"] == "given: --max_detections"
    counts = []
    names = [output.name for output in model.graph.output]
    for image in pictures(spec):
        boxes, scores, labels = read(*run_onnx(model, names, feeds(model, image)))
        fed = image[None].astype(spec.preprocessing.dtype)
        n, our_boxes, our_scores, our_labels = run_onnx(made, OUTPUT_NAMES, {"input": fed})
        count = int(n[0, 0])
        counts.append(count)
        assert count == len(scores)
        assert our_boxes.shape == (1, 60, 4) and not our_scores[0, count:].any()
        order = np.argsort(-scores, kind="stable")
        np.testing.assert_allclose(our_scores[0, :count], scores[order], atol=1e-5)
        np.testing.assert_allclose(our_boxes[0, :count], boxes[order], atol=1e-3)
        assert (our_labels[0, :count] == labels[order]).all()
    assert counts[-1] == 0 and len({*counts}) >= 3 and sum(counts) > 30


def above_a_threshold() -> onnx.ModelProto:
    """boxes [n, 4] and scores [n] of class 1 above 0.3, in the order of the cells; no NMS."""
    model = pair()
    constants(model, least=np.float32(0.3), at=np.int64(1), zero=[0], flat=[-1])
    model.graph.node.extend(
        [
            make("Gather", ["scores_out", "at"], ["of_class"], axis=2),
            make("Reshape", ["of_class", "flat"], ["of_cells"]),
            make("Greater", ["of_cells", "least"], ["is_above"]),
            make("NonZero", ["is_above"], ["index"]),
            make("Squeeze", ["index", "zero"], ["kept"]),
            make("Gather", ["of_cells", "kept"], ["their_scores"]),
            make("Squeeze", ["boxes_out", "zero"], ["every_box"]),
            make("Gather", ["every_box", "kept"], ["their_boxes"]),
        ]
    )
    outputs = info("their_boxes", FLOAT, ["n", 4]), info("their_scores", FLOAT, ["n"])
    return with_outputs(model, *outputs)


def test_without_an_nms_inside_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is sorted here says nothing of whether a box is found twice."""
    model = above_a_threshold()
    declared = ("--boxes_output", "their_boxes", "--scores_output", "their_scores", *XYXY, *IMAGES)
    assert convert(model, tmp_path, *declared)[0] == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "nothing in the file says detections kept and selection; give" in message
    status, out = convert(model, tmp_path, *declared, "--max_detections", "50", "--selected", "no")
    assert status == 0
    made = onnx.load(out)
    spec = ModelSpec.from_onnx(made)
    assert spec.selection == "nms" and spec.num_classes == 1
    image = photographs(spec.preprocessing.size_hw)[0]
    boxes, scores = run_onnx(model, ["their_boxes", "their_scores"], feeds(model, image))
    fed = image[None].astype(spec.preprocessing.dtype)
    ours = run_onnx(made, ["raw_boxes", "class_logits"], {"input": fed})
    order = np.argsort(-scores, kind="stable")
    assert 3 < len(scores) < 50
    np.testing.assert_allclose(ours[1][0, : len(scores), 0], scores[order], atol=1e-5)
    np.testing.assert_allclose(ours[0][0, : len(scores)], boxes[order], atol=1e-3)
    assert not ours[1][0, len(scores) :].any()


def test_the_best_of_them(tmp_path: Path) -> None:
    status, out = convert(triple(), tmp_path, *IMAGES, *XYXY, "--max_detections", "3")
    assert status == 0
    made, model = onnx.load(out), triple()
    image = photographs(ModelSpec.from_onnx(made).preprocessing.size_hw)[0]
    (scores,) = run_onnx(model, ["their_scores"], feeds(model, image))
    dtype = ModelSpec.from_onnx(made).preprocessing.dtype
    n, ours = run_onnx(
        made, [OUTPUT_NAMES[0], OUTPUT_NAMES[2]], {"input": image[None].astype(dtype)}
    )
    assert n[0, 0] == 3 and len(scores) > 3
    np.testing.assert_allclose(ours[0], np.sort(scores)[::-1][:3], atol=1e-5)


def behind(output: str, *nodes: onnx.NodeProto, **values: Any) -> onnx.ModelProto:
    """`triple` with nodes between what an output was, "raw", and what it is."""
    model = triple()
    for node in model.graph.node:
        node.output[:] = ["raw" if name == output else name for name in node.output]
    constants(model, **values)
    model.graph.node.extend(nodes)
    return model


def negative_scores() -> onnx.ModelProto:
    """Padding would rank before them."""
    return behind("their_scores", make("Sub", ["raw", "much"], ["their_scores"]), much=np.float32(0.6))  # fmt: skip


def equal_scores() -> onnx.ModelProto:
    return behind(
        "their_scores",
        make("Mul", ["raw", "nought"], ["nothing"]),
        make("Add", ["nothing", "half_"], ["their_scores"]),
        nought=np.float32(0),
        half_=np.float32(0.5),
    )


def mixed_units() -> onnx.ModelProto:
    """x from 0 to 1, y in pixels."""
    scale = np.array([1 / 64, 1, 1 / 64, 1], np.float32)
    return behind("their_boxes", make("Mul", ["raw", "scale_"], ["their_boxes"]), scale_=scale)


def with_a_batch_axis() -> onnx.ModelProto:
    """rows [1, n, 6] of an NMS, as no exporter known here names them."""
    model = rows(6)
    constants(model, front=[0])
    model.graph.node.append(make("Unsqueeze", ["found", "front"], ["rows_out"]))
    return with_outputs(model, info("rows_out", FLOAT, [1, "n", 6]))


def labels_from_1() -> onnx.ModelProto:
    return behind("their_labels", make("Add", ["raw", "one_"], ["their_labels"]), one_=np.int64(1))


OUTPUTS = ("--boxes_output", "their_boxes", "--scores_output", "their_scores")
WITH_LABELS = (*OUTPUTS, "--labels_output", "their_labels")
SIXTY = (*IMAGES, "--max_detections", "60")


@pytest.mark.parametrize(
    ("form", "options", "said"),
    [
        (mmdeploy, IMAGES, "nothing in the file says detections kept; give --max_detections N, the most of one picture"),
        (triple, (*IMAGES, *XYXY, "--max_detections", "60", "--input_shape", "2,64,64,3"), "so it takes one picture at a time: give 1, or leave it out"),
        (nothing_found, (*IMAGES, "--max_detections", "60"), "it finds nothing at all on four photographs, so nothing can be measured"),
        (triple, (*IMAGES, "--max_detections", "5000"), "--max_detections: expected at most 3840"),
        (lambda: rows(6), IMAGES, "--rows_output found --columns label,score,x1,y1,x2,y2"),
        (negative_scores, (*SIXTY, *WITH_LABELS, *XYXY), "expected probabilities in 'their_scores', as an NMS inside selects by them, found -0."),
        (equal_scores, (*SIXTY, *WITH_LABELS, *XYXY), "all scores in 'their_scores' are 0.5 on four photographs"),
        (mixed_units, (*SIXTY, *WITH_LABELS, *XYXY), "found the first and third number in unit, the second and fourth in pixels"),
        (with_a_batch_axis, SIXTY, "and nothing says what they are; its inputs: images [1, 3, 32, 64]; its outputs: rows_out [1, "),
        (labels_from_1, (*SIXTY, *WITH_LABELS, *XYXY, "--num_classes", "3"), "expected labels of 0 to 2, found 3 in 'their_labels'; --label_base 1 where the first class is 1"),
        (triple, (*SIXTY, *WITH_LABELS, *XYXY, "--num_classes", "3", "--label_base", "1"), "--label_base 1: there is a detection of class 0 in 'their_labels'"),
        (triple, (*SIXTY, *OUTPUTS, "--labels_output", "labls", *XYXY), "--labels_output labls: nothing in the file has that name; its outputs are their_boxes, their_labels, their_scores"),
        (triple, (*SIXTY, *WITH_LABELS, *XYXY, "--background", "last"), "--background last: there is one score a box, and none is for no object; leave it out"),
        (triple, (*SIXTY, *WITH_LABELS, *XYXY, "--scores_layout", "NCA"), "--scores_layout NCA: there is one score a box"),
        (triple, (*SIXTY, *WITH_LABELS, *XYXY, "--clip_boxes"), "--clip_boxes: the model selects its detections itself, so no NMS follows"),
        (triple, (*SIXTY, *WITH_LABELS, *XYXY, "--nms_mode", "class_agnostic"), "--nms_mode class_agnostic: this heads model needs no suppression"),
        (triple, (*SIXTY, *OUTPUTS, *XYXY), "output 'their_labels' has a whole number for each box, as labels are: add --labels_output their_labels"),
    ],
)  # fmt: skip
def test_refused(
    form: Callable[[], onnx.ModelProto],
    options: tuple[str, ...],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out = convert(form(), tmp_path, *options)
    assert status == 1 and not out.exists()
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_labels_from_1(tmp_path: Path) -> None:
    """Said by an option: the same classes as those of the model with labels from 0."""
    options = (*SIXTY, *WITH_LABELS, *XYXY, "--num_classes", "3")
    classes = []
    for number, form in enumerate((triple, labels_from_1)):
        (folder := tmp_path / str(number)).mkdir()
        status, out = convert(form(), folder, *options, *(("--label_base", "1") * number))
        assert status == 0
        model = onnx.load(out)
        (image,) = pictures(ModelSpec.from_onnx(model))[:1]
        fed = {"input": image[None].astype(ModelSpec.from_onnx(model).preprocessing.dtype)}
        n, found = run_onnx(model, ["num_detections", "detection_classes"], fed)
        classes.append(found[0, : n[0, 0]].tolist())
    assert classes[0] == classes[1] and {*classes[0]} == {0, 1, 2}


def test_more_classes_than_labels_are_chosen_from(tmp_path: Path) -> None:
    """Where they are chosen cannot be told for certain, so an option counts; the table says it."""
    options = (*SIXTY, *WITH_LABELS, *XYXY, "--num_classes", "5")
    status, out = convert(triple(), tmp_path, *options)
    spec = ModelSpec.from_onnx(onnx.load(out))
    facts = {fact.name: (fact.value, fact.origin) for fact in spec.evidence}
    assert (status, spec.num_classes) == (0, 5)
    assert facts["classes"] == ("5", "given: --num_classes; its labels seem to be chosen from 3")


def test_one_class_needs_no_labels(tmp_path: Path) -> None:
    """Said by its number; and rows without a label column."""
    options = (*IMAGES, "--max_detections", "60")
    status, out = convert(triple(), tmp_path, *options, *OUTPUTS, *XYXY, "--num_classes", "1")
    assert status == 0 and ModelSpec.from_onnx(onnx.load(out)).num_classes == 1
    columns = "unused,score,x1,y1,x2,y2"
    status, out = convert(rows(6), tmp_path, *options, "--rows_output", "found", "--columns", columns)  # fmt: skip
    assert status == 0 and ModelSpec.from_onnx(onnx.load(out)).num_classes == 1


# ---- networks that resize their pictures


CELL, CLASSES, MOST = 16, 5, 40


def whole(*, fixed: tuple[int, int] | None = None) -> onnx.ModelProto:
    """image [3, H, W], 0 to 1, normalised and resized to 96 x 128 inside; boxes in its own pixels,
    at most 40, labels from 1 on: as torchvision exports its detectors.
    """
    rng = np.random.default_rng(4)
    values: dict[str, Any] = {
        "mean": np.array([0.485, 0.456, 0.406], np.float32).reshape(3, 1, 1),
        "std": np.array([0.229, 0.224, 0.225], np.float32).reshape(3, 1, 1),
        "inner": np.array([1, 3, 96, 128]), "zero": np.array([0]), "one": np.array([1]),
        "four": np.array([4]), "all": np.array([2**40]), "most": np.array([MOST]),
        "weight": rng.normal(0, 0.25, (4 + CLASSES + 1, 3, CELL, CELL)).astype(np.float32) / 4,
        "bias": np.array([-8, -8, 12, 12, 2] + [0] * CLASSES, np.float32),
        "rows": np.array([10, -1]), "cells": cells(), "last": np.int64(2**40), "overlap": np.float32(0.5),
        "least": np.float32(0.2), "none": np.array([], np.float32), "minus": np.array([-1]),
        "at_box": np.int64(2), "inner_wh": np.array([128, 96, 128, 96], np.float32),
        "wh": np.array([2, 1, 2, 1]), "flat": np.array([-1]), "low": np.array([0, 0, 0, 0], np.float32),
        "classes": np.arange(1, CLASSES + 1, dtype=np.int64)[:, None], "tall": np.array([CLASSES, 1]),
    }  # fmt: skip
    nodes = [
        make("Sub", ["image", "mean"], ["shifted"]),
        make("Div", ["shifted", "std"], ["normal"]),
        make("Unsqueeze", ["normal", "zero"], ["one_normal"]),
        make("Resize", ["one_normal", "none", "none", "inner"], ["resized"], mode="linear"),
        make("Conv", ["resized", "weight", "bias"], ["maps"], strides=[CELL, CELL]),
        make("Reshape", ["maps", "rows"], ["columns"]),
        make("Slice", ["columns", "zero", "four", "zero"], ["deltas"]),
        make("Slice", ["columns", "four", "all", "zero"], ["logits"]),
        make("Transpose", ["deltas"], ["of_cells"], perm=[1, 0]),
        make("Add", ["of_cells", "cells"], ["beyond"]),
        make("Max", ["beyond", "low"], ["above"]),
        make("Min", ["above", "inner_wh"], ["corners"]),
        make("Softmax", ["logits"], ["with_background"], axis=0),
        make("Slice", ["with_background", "one", "all", "zero"], ["by_class"]),
        make("Unsqueeze", ["corners", "zero"], ["nms_boxes"]),
        make("Unsqueeze", ["by_class", "zero"], ["nms_scores"]),
        make(
            "NonMaxSuppression", ["nms_boxes", "nms_scores", "last", "overlap", "least"], ["chosen"]
        ),
        make("Slice", ["chosen", "one", "all", "one"], ["pairs"]),
        make("GatherND", ["by_class", "pairs"], ["chosen_scores"]),
        make("Shape", ["chosen_scores"], ["number"]),
        make("Min", ["number", "most"], ["k"]),
        make("TopK", ["chosen_scores", "k"], ["some_scores", "best"]),
        make("Gather", ["pairs", "best"], ["kept"], axis=0),
        make("Slice", ["kept", "zero", "most", "zero"], ["at_most"]),
        make("GatherND", ["by_class", "at_most"], ["scores"]),
        make("Slice", ["at_most", "zero", "one", "one"], ["class_column"]),
        make("GatherND", ["classes", "class_column"], ["label_column"]),
        make("Reshape", ["label_column", "flat"], ["labels"]),
        make("Slice", ["at_most", "one", "all", "one"], ["box_column"]),
        make("GatherND", ["corners", "box_column"], ["picked"]),
        make("Shape", ["labels"], ["picked_number"]),
        make("Concat", ["picked_number", "minus"], ["picked_shape"], axis=0),
        make("Reshape", ["picked", "picked_shape"], ["inner_boxes"]),  # as torch does it
        make("Shape", ["image"], ["shape"]),
        make("Gather", ["shape", "wh"], ["sides"]),
        make("Cast", ["sides"], ["outer_wh"], to=TensorProto.FLOAT),
        make("Div", ["outer_wh", "inner_wh"], ["ratio"]),
        make("Mul", ["inner_boxes", "ratio"], ["boxes"]),
    ]
    dims: list[Any] = [1, 3, *fixed] if fixed else [3, "height", "width"]
    if fixed:
        nodes[0] = make("Sub", ["picture", "mean"], ["shifted"])
        nodes.insert(0, make("Squeeze", ["image", "zero"], ["picture"]))
        nodes = [
            make("Shape", ["picture"], ["shape"]) if "shape" in node.output else node
            for node in nodes
        ]
    graph = helper.make_graph(
        nodes, "stand-in", [info("image", FLOAT, dims)],
        [info("boxes", FLOAT, ["n", 4]), info("labels", INT64, ["n"]), info("scores", FLOAT, ["n"])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in values.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def cells() -> NDArray[np.float32]:
    y, x = np.mgrid[: 96 // CELL, : 128 // CELL].reshape(2, -1) * CELL
    return np.stack([x, y, x + 8, y + 8], axis=1).astype(np.float32)


def test_each_picture_at_its_own_size(tmp_path: Path) -> None:
    model = whole()
    status, out = convert(model, tmp_path)
    assert status == 0
    spec = ModelSpec.from_onnx(onnx.load(out))
    assert spec.preprocessing.own_size and spec.preprocessing.dtype == "uint8"
    assert spec.num_classes == CLASSES + 1 and spec.category_ids == tuple(range(CLASSES + 1))
    assert spec.nms.max_output_boxes == MOST
    facts = {fact.name: fact for fact in spec.evidence}
    assert facts["family"].value == "torchvision" and facts["detections kept"].origin.startswith(
        "read: its"
    )
    assert not {f.origin.split(":")[0] for f in spec.evidence} & {"given", "ASSUMED"}
    upright = tmp_path / "upright.png"
    Image.open(about.PHOTOGRAPHS[1]).rotate(90, expand=True).save(upright)
    total = 0
    with (
        open_model(out, RunOptions()) as runtime,
        open_batcher(runtime, [*about.PHOTOGRAPHS, upright], RunOptions()) as batcher,
    ):
        for image in detect(runtime, batcher, score_threshold=0.0):
            pixels = np.asarray(Image.open(image.path).convert("RGB")).astype(np.float32) / 255
            fed = {"image": pixels.transpose(2, 0, 1)}
            boxes, labels, scores = run_onnx(model, ["boxes", "labels", "scores"], fed)
            d = image.detections
            total += len(scores)
            order = np.argsort(-scores, kind="stable")
            np.testing.assert_allclose(d.scores, scores[order], atol=1e-4)
            np.testing.assert_allclose(d.boxes_xyxy, boxes[order], atol=0.02)
            assert [spec.category_ids[i] for i in d.class_ids] == labels[order].tolist()
    assert total >= 50


def check_whole(
    model: onnx.ModelProto, made: onnx.ModelProto, images: list[NDArray[np.uint8]]
) -> None:
    """What a file of one size finds is what the source finds."""
    batch = (None,) if len(model.graph.input[0].type.tensor_type.shape.dim) == 4 else ()
    total = 0
    dtype = ModelSpec.from_onnx(made).preprocessing.dtype
    for image in images:
        pixels = image.transpose(2, 0, 1).astype(np.float32) / 255
        fed = {"image": pixels[(*batch,)] if batch else pixels}
        boxes, labels, scores = run_onnx(model, ["boxes", "labels", "scores"], fed)
        n, *ours = run_onnx(made, OUTPUT_NAMES, {"input": image[None].astype(dtype)})
        assert n[0, 0] == len(scores)
        order = np.argsort(-scores, kind="stable")
        for found, expected in zip(ours, (boxes, scores, labels), strict=True):
            np.testing.assert_allclose(found[0, : len(scores)], expected[order], atol=0.01)
        total += len(scores)
    assert total >= 50


def test_one_size_for_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An export of one size, or one of any size that is asked for another: how pictures come into
    it is asked for.
    """
    for model, asked in ((whole(fixed=(120, 160)), ()), (whole(), ("--input_size", "120,160"))):
        assert convert(model, tmp_path, *asked)[0] == 1
        assert "nothing in the file says resize; give --resize_mode" in capsys.readouterr().err
        status, out = convert(model, tmp_path, *asked, "--resize_mode", "stretch")
        assert status == 0
        made = onnx.load(out)
        preprocessing = ModelSpec.from_onnx(made).preprocessing
        assert preprocessing.size_hw == (120, 160) and not preprocessing.own_size
        assert maybe_data_sized(made) is None
        check_whole(model, made, [*photographs((120, 160)), np.zeros((120, 160, 3), np.uint8)])
    assert convert(whole(), tmp_path, "--resize_mode", "stretch")[0] == 1
    assert "go with one size for all pictures, --size H,W" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_tensorrt_rtx_builds_it(precision: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs requirements-rtx.txt")
    status, out = convert(whole(fixed=(120, 160)), tmp_path, "--resize_mode", "stretch")
    assert status == 0
    asked = ["--model", str(out), "--engine", str(tmp_path / "a.engine"), "--precision", precision]
    asked += ["--flavor", "tensorrt_rtx", "--compute_capability", "8.9", "--optimization_level", "0"]  # fmt: skip
    if precision == "int8":
        photographs_folder = str(about.PHOTOGRAPH.parent)
        asked += ["--calib_input", photographs_folder, "--int8_share", "1"]
    assert build_engine.main(asked) == 0
    assert (tmp_path / "a.engine").stat().st_size > 50_000


def test_no_engine_of_shapes_that_follow_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out = convert(whole(), tmp_path)
    assert status == 0
    engine = tmp_path / "a.engine"
    for more in ([], ["--dry_run"]):
        asked = ["--model", str(out), "--engine", str(engine), "--precision", "fp32", *more]
        assert build_engine.main(asked) == 1
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert (
            "makes as many rows as a picture has boxes, and no engine is built of that" in message
        )
        assert "create_onnx.py --size H,W" in message and not engine.exists()


def test_positions_stay_float32(tmp_path: Path) -> None:
    """Boxes of up to 160 pixels lose a tenth of a pixel in FP16; the network itself is narrowed."""
    status, out = convert(whole(fixed=(120, 160)), tmp_path, "--resize_mode", "stretch")
    half = tmp_path / "half.onnx"
    asked = ["--model", str(out), "--save_onnx", str(half), "--precision", "fp16"]
    assert status == 0 and build_engine.main(asked) == 0
    made, narrow = onnx.load(out), onnx.load(half)
    types = [t.data_type for t in narrow.graph.initializer]
    assert TensorProto.FLOAT16 in types
    gaps = []
    for image in photographs((120, 160)):
        fed = {"input": image[None].astype(ModelSpec.from_onnx(made).preprocessing.dtype)}
        (n, boxes, scores), (_, theirs, others) = (
            run_onnx(m, OUTPUT_NAMES[:3], fed) for m in (made, narrow)
        )
        count = int(n[0, 0])
        same = np.abs(scores - others)[0, :count] < 5e-3
        gaps.append(np.abs(boxes - theirs)[0, :count][same].max(axis=1))
    assert np.median(np.concatenate(gaps)) < 0.03


def test_boxes_of_the_resized_picture_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They stay where they are in a picture twice as large."""
    model = whole()
    for node in model.graph.node:
        if "inner_boxes" in node.output:
            node.output[0] = "boxes"
        elif "boxes" in node.output:
            node.output[0], node.input[0] = "unread", "boxes"
    assert convert(model, tmp_path)[0] == 1
    assert "its boxes are of the resized ones" in capsys.readouterr().err


def test_a_picture_without_any_rows(tmp_path: Path) -> None:
    """torch reshapes rows to [n, -1], which is an error where n is 0."""
    nodes = [
        make("Greater", ["values", "least"], ["is_above"]),
        make("NonZero", ["is_above"], ["index"]),
        make("Squeeze", ["index", "zero"], ["kept"]),
        make("Gather", ["table", "kept"], ["some"]),
        make("Shape", ["kept"], ["n"]),
        make("Concat", ["n", "rest"], ["shape"], axis=0),
        make("Reshape", ["some", "shape"], ["found"]),
    ]
    values = {
        "least": np.float32(0.5), "zero": np.array([0]), "rest": np.array([-1, 2]),
        "table": np.arange(48, dtype=np.float32).reshape(8, 6),
    }  # fmt: skip
    graph = helper.make_graph(
        nodes, "rows", [info("values", FLOAT, [8])], [info("found", FLOAT, ["n", 3, 2])],
        [numpy_helper.from_array(v, k) for k, v in values.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "rows.onnx"
    onnx.save(model, path)
    source = OnnxSource(path)
    some, none = np.linspace(0, 1, 8, dtype=np.float32), np.zeros(8, np.float32)
    with pytest.raises(GraphError, match="Reshape"):
        source.run(["found"], {"values": none})
    (before,) = source.run(["found"], {"values": some})
    assert mend_reshapes(source, [{"values": some}, {"values": some[::-1]}]) == 1
    (after,) = source.run(["found"], {"values": some})
    assert (after == before).all() and after.shape == (4, 3, 2)
    assert source.run(["found"], {"values": none})[0].shape == (0, 3, 2)
