# SPDX-License-Identifier: Apache-2.0
"""DETR of torch's newer exporter, through stage 1, against transformers' own outputs and
post-processing.
"""

import dataclasses

import numpy as np
import onnx
import pytest
from detr_data import HEIGHT, WIDTH, assert_detections, detect, load
from onnx import helper, numpy_helper

from trtdet.conversion.convert import convert as convert_source
from trtdet.conversion.options import Options
from trtdet.conversion.verification import verify
from trtdet.errors import GraphError
from trtdet.families import deformable_detr, detr
from trtdet.families.base import Hints
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import ModelSpec


@pytest.fixture(scope="module")
def tiny():
    return load("detr_tiny")


def source_of(model, tmp_path):
    path = tmp_path / "source.onnx"
    onnx.save(model, path)
    return OnnxSource(path)


def convert(model, tmp_path, **options):
    source = source_of(model, tmp_path)
    hints = Hints(
        **{k: options.pop(k) for k in ("resize", "preprocessor", "size_hw") if k in options}
    )
    chosen = Options(family="detr", hints=hints, preprocessor=hints.preprocessor, **options)
    done = convert_source(source, chosen)
    return done, source


@pytest.mark.parametrize("resize", ["letterbox", "stretch"])
@pytest.mark.parametrize("input_dtype", ["float32", "uint8"])
def test_equals_transformers(tiny, tmp_path, resize, input_dtype):
    model, pictures = tiny
    done, source = convert(model, tmp_path, resize=resize, input_dtype=input_dtype)
    converted = done.model
    assert [i.name for i in converted.graph.input] == ["input"]
    assert max(d.maximum for d in verify(source, done)) < 1e-4
    assert_detections(detect(converted, pictures), getattr(pictures, resize), pictures)


def test_the_mask_input_decides_how_images_come(tiny, tmp_path):
    model, _ = tiny
    done, _ = convert(model, tmp_path)
    converted, reading = done.model, done.reading
    spec = ModelSpec.from_onnx(converted)
    assert spec.preprocessing.resize == "letterbox" and spec.preprocessing.antialias
    assert spec.preprocessing.pad_rgb == spec.preprocessing.mean == (123.675, 116.28, 103.53)
    assert (spec.family, spec.selection, spec.num_classes) == ("detr", "topk", 4)
    assert spec.nms.max_output_boxes == 10  # its queries
    assert [note.option for note in reading.notes] == ["resize_mode"]
    facts = {f.name: f for f in reading.facts}
    assert facts["normalisation"].origin == "convention: DETR; the file has none inside"
    assert facts["category ids"].value == "0..3" and spec.category_ids == (0, 1, 2, 3)


def test_batch_equals_single_images(tiny, tmp_path):
    model, pictures = tiny
    converted = convert(model, tmp_path)[0].model
    batch = detect(converted, pictures)
    for i, expected in enumerate(batch):
        (single,) = detect(converted, pictures, slice(i, i + 1))
        np.testing.assert_array_equal(single.class_ids, expected.class_ids)
        np.testing.assert_allclose(single.boxes_xyxy, expected.boxes_xyxy, atol=1e-3)
        np.testing.assert_allclose(single.scores, expected.scores, atol=1e-5)


def test_fixed_batch(tiny, tmp_path):
    model, pictures = tiny
    converted = convert(model, tmp_path, batch=1)[0].model
    assert converted.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    assert_detections(
        detect(converted, pictures, slice(0, 1)),
        pictures.letterbox[:1],
        dataclasses.replace(pictures, source_wh=pictures.source_wh[:1]),
    )


def test_a_picture_of_nothing_but_padding_gives_numbers(tiny, tmp_path):
    model, pictures = tiny
    converted = convert(model, tmp_path)[0].model
    mean = np.array(ModelSpec.from_onnx(converted).preprocessing.mean, np.float32)
    empty = dataclasses.replace(pictures, images=np.zeros_like(pictures.images) + mean)
    for one in detect(converted, empty):
        assert np.isfinite(one.scores).all() and np.isfinite(one.boxes_xyxy).all()


def test_shape_arithmetic_is_gone_where_no_mask_is(tiny, tmp_path):
    model, _ = tiny
    converted = convert(model, tmp_path, resize="stretch")[0].model
    ops = {node.op_type for node in converted.graph.node}
    assert not ops & {"Shape", "Range", "CumSum", "Sin", "Tile", "Constant"}
    assert len(converted.graph.node) < len(model.graph.node)


def test_converted_again(tiny, tmp_path):
    model, pictures = tiny
    converted = convert(model, tmp_path)[0].model
    again = convert(converted, tmp_path, max_detections=3, input_dtype="uint8")[0].model
    for few, all_ in zip(detect(again, pictures), detect(converted, pictures), strict=True):
        np.testing.assert_allclose(few.scores, all_.scores[:3], atol=1e-5)


def test_normalisation_inside_the_export_is_measured(tiny, tmp_path):
    """An export for images of 0 to 1 that normalises by itself."""
    model, pictures = tiny
    inside = onnx.ModelProto()
    inside.CopyFrom(model)
    mean, std = (
        np.array(x, np.float32).reshape(1, 3, 1, 1) / 255
        for x in (detr.IMAGENET_MEAN, detr.IMAGENET_STD)
    )
    for node in inside.graph.node:
        node.input[:] = [
            "normalised" if name == "pixel_values" and node.op_type == "Conv" else name
            for name in node.input
        ]
    nodes = [
        helper.make_node("Sub", ["pixel_values", "mean"], ["shifted"]),
        helper.make_node("Div", ["shifted", "std"], ["normalised"]),
        *inside.graph.node,
    ]
    del inside.graph.node[:]
    inside.graph.node.extend(nodes)
    inside.graph.initializer.extend(
        [numpy_helper.from_array(mean, "mean"), numpy_helper.from_array(std, "std")]
    )
    if any("pixel_values" in node.input for node in inside.graph.node[2:]):
        pytest.skip("the export reads its input's shape elsewhere")
    done, _ = convert(inside, tmp_path, resize="stretch")
    converted, reading = done.model, done.reading
    spec = ModelSpec.from_onnx(converted)
    np.testing.assert_allclose(spec.preprocessing.mean, detr.IMAGENET_MEAN, rtol=1e-4)
    np.testing.assert_allclose(spec.preprocessing.std, detr.IMAGENET_STD, rtol=1e-4)
    assert reading.notes == ()
    assert_detections(detect(converted, pictures), pictures.stretch, pictures)


def test_preprocessor_option(tiny, tmp_path):
    model, _ = tiny
    done, source = convert(model, tmp_path, preprocessor="scale_range")
    assert done.spec.preprocessing.mean == (127.5,) * 3
    assert max(d.maximum for d in verify(source, done)) < 1e-4


@pytest.mark.parametrize(("resize", "said"), [("letterbox", True), ("stretch", False)])
def test_black_padding_is_said_where_the_mask_follows_from_it(tiny, tmp_path, resize, said):
    model, _ = tiny
    reading = detr.read(source_of(model, tmp_path), Hints(preprocessor="unit", resize=resize))
    assert reading.spec.preprocessing.std == (255.0,) * 3
    assert any("black rows and columns" in note.text for note in reading.notes) == said


def test_recognised(tiny, tmp_path):
    source = source_of(tiny[0], tmp_path)
    assert detr.matches(source) and not deformable_detr.matches(source)


def renamed(model, old, new):
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]
    for info in [*copy.graph.input, *copy.graph.output]:
        info.name = new if info.name == old else info.name
    return copy


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("pixel_mask", "other", r"expected an image \[N, 3, H, W\] and at most a mask .* found pixel_values \[None, 3, 64, 96\], other"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said(tiny, tmp_path, old, new, message):
    with pytest.raises(GraphError, match=message):
        detr.read(source_of(renamed(tiny[0], old, new), tmp_path))


def test_a_dropped_output_is_said(tiny, tmp_path):
    for position in range(2):
        dropped = onnx.ModelProto()
        dropped.CopyFrom(tiny[0])
        del dropped.graph.output[position]
        source = source_of(dropped, tmp_path)
        assert not detr.matches(source)
        with pytest.raises(GraphError, match=r"expected logits .* and boxes"):
            detr.read(source)


def test_renamed_and_reordered_outputs(tiny, tmp_path):
    """Outputs are told by shapes and values."""
    model = renamed(renamed(tiny[0], "pred_boxes", "a"), "logits", "b")
    first, second = model.graph.output
    outputs = [onnx.ValueInfoProto.FromString(x.SerializeToString()) for x in (second, first)]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    converted = convert(model, tmp_path)[0].model
    assert_detections(detect(converted, tiny[1]), tiny[1].letterbox, tiny[1])


def with_logits_behind(model, *nodes, **weights):
    """The model with nodes from "raw" to "logits" behind its logits."""
    changed = renamed(model, "logits", "raw")
    changed.graph.node.extend(nodes)
    changed.graph.initializer.extend(
        numpy_helper.from_array(np.array([value], np.int64), name)
        for name, value in weights.items()
    )
    for output in changed.graph.output:
        if output.name == "raw":
            output.name = "logits"
            output.type.tensor_type.ClearField("shape")
    return changed


@pytest.mark.parametrize("op", ["Identity", "Cast"])
def test_probabilities_behind_an_operator_that_keeps_them(tiny, tmp_path, op):
    attributes = {"to": onnx.TensorProto.FLOAT} if op == "Cast" else {}
    model = with_logits_behind(
        tiny[0],
        helper.make_node("Softmax", ["raw"], ["shares"], axis=2),
        helper.make_node(op, ["shares"], ["logits"], **attributes),
    )
    converted = convert(model, tmp_path)[0].model
    assert_detections(detect(converted, tiny[1]), tiny[1].letterbox, tiny[1])


def test_probabilities_without_the_background_are_no_logits(tiny, tmp_path):
    """As DETR's own demonstration makes them: softmax(-1)[..., :-1]."""
    model = with_logits_behind(
        tiny[0],
        helper.make_node("Softmax", ["raw"], ["shares"], axis=2),
        helper.make_node("Slice", ["shares", "begin", "end", "axis"], ["logits"]),
        begin=0,
        end=-1,
        axis=2,
    )
    assert not detr.matches(source_of(model, tmp_path))


def test_a_sigmoid_in_the_file_is_no_softmax(tiny, tmp_path):
    model = with_logits_behind(tiny[0], helper.make_node("Sigmoid", ["raw"], ["logits"]))
    source = source_of(model, tmp_path)
    assert not detr.matches(source) and deformable_detr.matches(source)
    done = convert_source(source, Options(hints=Hints(resize="stretch")))
    assert (done.spec.family, done.spec.num_classes) == ("deformable_detr", 5)
    _, pictures = tiny
    fed, _ = pictures.fed(done.spec)
    found = detect(done.model, pictures)
    mask = np.ones((1, HEIGHT, WIDTH), np.int64)
    for one, image in zip(found, fed, strict=True):
        mean, std = np.array(detr.IMAGENET_MEAN), np.array(detr.IMAGENET_STD)
        pixels = ((image - mean) / std).astype(np.float32).transpose(2, 0, 1)[None]
        (scores,) = source.run(["logits"], {"pixel_values": pixels, "pixel_mask": mask})
        best = np.sort(scores.ravel())[::-1][: len(one.scores)]
        np.testing.assert_allclose(one.scores, best, atol=1e-5)


def test_one_logit_is_no_softmax(tiny, tmp_path):
    model = with_logits_behind(
        tiny[0],
        helper.make_node("Slice", ["raw", "begin", "end", "axis"], ["logits"]),
        begin=0,
        end=1,
        axis=2,
    )
    source = source_of(model, tmp_path)
    assert deformable_detr.matches(source)
    assert convert_source(source, Options()).spec.num_classes == 1
    with pytest.raises(GraphError, match="found one logit; --family deformable_detr takes"):
        convert(model, tmp_path)


def test_a_free_size_must_be_named(tiny, tmp_path):
    free = onnx.ModelProto()
    free.CopyFrom(tiny[0])
    for info in free.graph.input:
        for dim in info.type.tensor_type.shape.dim[-2:]:
            dim.dim_param = "side"
    source = source_of(free, tmp_path)
    with pytest.raises(GraphError, match="name the one that it shall have"):
        detr.read(source)
    assert detr.read(source, Hints(size_hw=(HEIGHT, WIDTH))).spec.preprocessing.size_hw == (
        HEIGHT,
        WIDTH,
    )


def test_facebook_names(tiny, tmp_path):
    converted = convert(renamed(tiny[0], "logits", "pred_logits"), tmp_path)[0].model
    assert_detections(detect(converted, tiny[1]), tiny[1].letterbox, tiny[1])
