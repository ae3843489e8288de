# SPDX-License-Identifier: Apache-2.0
"""TensorFlow Object Detection API EfficientDets: on an ONNX graph in text with the names that
the exporter gives, and on real exports.
"""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image

from trtdet.commands import create_onnx
from trtdet.detections import decode
from trtdet.errors import GraphError
from trtdet.families import load_families, tfod
from trtdet.families.base import pick_family
from trtdet.families.tf_selection import TfSelection
from trtdet.images.preprocess import preprocess
from trtdet.nms.reference import reference
from trtdet.runtimes.ort import OnnxRuntime
from trtdet.sources.onnx_file import OnnxSource, _read_onnx_graph
from trtdet.spec import Nms

HEIGHT, WIDTH, CLASSES = 32, 48, 3
CELLS = ((4, 6), (2, 3))
ANCHORS = sum(h * w for h, w in CELLS)
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
HEAD = "StatefulPartitionedCall/WeightSharedConvolutionalBoxPredictor/WeightSharedConvolutional"
NMS = "StatefulPartitionedCall/Postprocessor/BatchMultiClassNonMaxSuppression/MultiClassNonMaxSuppression/non_max_suppression_with_scores"
#: Logits -> raw_detection_scores, with as many columns more in the logits as there are background
#: classes.
CONVERTERS = {
    "sigmoid": ("Sigmoid(logits)", 0),
    "sigmoid and background": ("Slice(sigmoid, one, four, two)", 1),
    "softmax and background": ("Slice(softmax, one, four, two)", 1),
}
#: SSDs, whose raw_detection_scores have the background too; its NMS has not.
BACKGROUND_KEPT = {
    "sigmoid, background kept": ("Identity(sigmoid)", 1),
    "softmax, background kept": ("Identity(softmax)", 1),
}


def toy(converter: str = "sigmoid", factors: tuple[float, ...] = (1, 1, 1, 1)) -> onnx.ModelProto:
    """Two levels, one anchor a cell; images of any size are stretched as TensorFlow 1 does it."""
    scores, background = (CONVERTERS | BACKGROUND_KEPT)[converter]
    foreground = (
        "Slice(scores, one, four, two)" if converter in BACKGROUND_KEPT else "Identity(scores)"
    )
    kept = CLASSES + (converter in BACKGROUND_KEPT)
    columns = CLASSES + background
    per_class = "\n".join(
        f'["{NMS}_{c}/NonMaxSuppressionV5"] kept_{c} = NonMaxSuppression(decoded, scores_nca, hundred, iou, threshold)'
        for c in range(CLASSES)
    )
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 17]>
        tfod (uint8[1, h, w, 3] input_tensor)
          => (float[1, 10, 4] detection_boxes, float[1, {ANCHORS}, 4] raw_detection_boxes,
              float[1, {ANCHORS}, {kept}] raw_detection_scores, float[1, 1] detection_classes)
          <int64[4] size = {{1, 3, {HEIGHT}, {WIDTH}}}, int64[3] boxes_3 = {{1, -1, 4}}, int64[3] scores_3 = {{1, -1, {columns}}},
           int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] four = {{4}}, int64[1] ten = {{10}},
           int64 hundred = {{100}}, int64 first = {{1}}, float iou = {{0.5}}, float threshold = {{0.00000001}}, float half = {{0.5}}>
        {{
          pixels = Cast<to = 1>(input_tensor)
          nchw = Transpose<perm = [0, 3, 1, 2]>(pixels)
          ["map/while/Preprocessor/sub"] centred = Sub(nchw, mean)
          ["map/while/Preprocessor/truediv_1"] normal = Div(centred, std)
          ["map/while/Preprocessor/ResizeImage/resize/ResizeBilinear"] placed =
              Resize<mode = "linear", coordinate_transformation_mode = "asymmetric">(normal, , , size)
          ["StatefulPartitionedCall/EfficientDet-D0/model/stem_conv2d/Conv2D"] fine = Conv<strides = [8, 8]>(placed, stem)
          ["StatefulPartitionedCall/EfficientDet-D0/model/stack_0/Conv2D"] coarse = Conv<strides = [2, 2]>(fine, down)
          b0 = Conv(fine, box_w)  b1 = Conv(coarse, box_w)
          c0 = Conv(fine, class_w, class_b)  c1 = Conv(coarse, class_w, class_b)
          b0t = Transpose<perm = [0, 2, 3, 1]>(b0)  b1t = Transpose<perm = [0, 2, 3, 1]>(b1)
          c0t = Transpose<perm = [0, 2, 3, 1]>(c0)  c1t = Transpose<perm = [0, 2, 3, 1]>(c1)
          ["{HEAD}BoxHead/Reshape"] b0r = Reshape(b0t, boxes_3)
          ["{HEAD}BoxHead/Reshape_1"] b1r = Reshape(b1t, boxes_3)
          ["{HEAD}ClassHead/Reshape"] c0r = Reshape(c0t, scores_3)
          ["{HEAD}ClassHead/Reshape_1"] c1r = Reshape(c1t, scores_3)
          ["StatefulPartitionedCall/concat"] encodings = Concat<axis = 1>(b0r, b1r)
          ["StatefulPartitionedCall/concat_1"] logits = Concat<axis = 1>(c0r, c1r)
          coded = Div(encodings, factors)
          t_yx = Slice(coded, zero, two, two)  t_hw = Slice(coded, two, four, two)
          moved = Mul(t_yx, anchor_hw)  centre = Add(moved, anchor_yx)
          grown = Exp(t_hw)  size_hw = Mul(grown, anchor_hw)  half_hw = Mul(size_hw, half)
          low = Sub(centre, half_hw)  high = Add(centre, half_hw)
          decoded = Concat<axis = 2>(low, high)
          sigmoid = Sigmoid(logits)  softmax = Softmax<axis = 2>(logits)
          scores = {scores}
          foreground = {foreground}
          scores_nca = Transpose<perm = [0, 2, 1]>(foreground)
          best_of_class = ReduceMax<axes = [1], keepdims = 0>(foreground)
          best_class = ArgMax<axis = 1>(best_of_class)
          counted_class = Add(best_class, first)
          detection_classes = Cast<to = 1>(counted_class)
          {per_class}
          raw_detection_boxes = Identity(decoded)
          raw_detection_scores = Identity(scores)
          detection_boxes = Slice(decoded, zero, ten, one)
        }}
    """)
    rng = np.random.default_rng(0)
    anchors = rng.uniform(0.2, 0.8, (1, ANCHORS, 4)).astype(np.float32)
    weights = {
        "mean": np.reshape(MEAN, (1, 3, 1, 1)), "std": np.reshape(STD, (1, 3, 1, 1)),
        "stem": rng.normal(size=(6, 3, 8, 8)) / 14, "down": rng.normal(size=(6, 6, 2, 2)) / 5,
        "box_w": rng.normal(size=(4, 6, 1, 1)) / 4, "class_w": rng.normal(size=(columns, 6, 1, 1)),
        "class_b": np.linspace(-1, 0, columns), "factors": np.array(factors),
        "anchor_yx": anchors[..., :2], "anchor_hw": anchors[..., 2:] / 2,
    }  # fmt: skip
    model.graph.initializer.extend(
        numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()
    )
    return model


def toy_that_drops_boxes_outside() -> onnx.ModelProto:
    """A stand-in for the exporter's selection: behind the NMS boxes are clipped to the picture,
    those of which nothing is left are dropped, then the best ten are taken. A third of the anchors
    lie outside.
    """
    model = toy()
    added = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        selection (float[1, a, 4] decoded, float[1, c, a] scores_nca, int64[k, 3] kept_0)
          => (float[1, 10, 4] detection_boxes, float[1, 10] detection_scores, float[1, 10] detection_classes, float[1] num_detections)
          <int64 class_column = {1}, int64 box_column = {2}, int64[1] row = {0}, int64[1] second = {1}, int64[1] third = {2}, int64[1] fifth = {4},
           int64[1] best_ten = {10}, int64[2] ten_more = {0, 10}, int64[4] ten_rows_more = {0, 0, 10, 0}, int64 class_of_none = {0},
           float lowest = {0.0}, float highest = {1.0}, float dropped = {-1.0}, float counted_from = {1.0}>
        {
          kept_boxes = Gather<axis = 1>(kept_0, box_column)
          kept_classes = Gather<axis = 1>(kept_0, class_column)
          kept_scores = GatherND(scores_nca, kept_0)
          decoded_rows = Squeeze(decoded, row)
          whole = Gather<axis = 0>(decoded_rows, kept_boxes)
          clipped = Clip(whole, lowest, highest)
          clipped_low = Slice(clipped, row, third, second)  clipped_high = Slice(clipped, third, fifth, second)
          sides = Sub(clipped_high, clipped_low)
          area = ReduceProd<axes = [1], keepdims = 0>(sides)
          is_left = Greater(area, lowest)
          valid_scores = Where(is_left, kept_scores, dropped)
          padded_scores = Pad(valid_scores, ten_more, dropped)
          padded_boxes = Pad(clipped, ten_rows_more, lowest)
          padded_classes = Pad(kept_classes, ten_more, class_of_none)
          best, order = TopK(padded_scores, best_ten)
          is_valid = Greater(best, lowest)  valid = Cast<to = 1>(is_valid)
          num_detections = ReduceSum<keepdims = 1>(valid, row)
          detection_scores = Unsqueeze(best, row)
          best_boxes = Gather<axis = 0>(padded_boxes, order)  detection_boxes = Unsqueeze(best_boxes, row)
          best_classes = Gather<axis = 0>(padded_classes, order)  as_numbers = Cast<to = 1>(best_classes)
          from_one = Add(as_numbers, counted_from)  detection_classes = Unsqueeze(from_one, row)
        }
    """)
    outputs = {output.name for output in added.graph.output}
    kept = [node for node in model.graph.node if not outputs.intersection(node.output)]
    others = [output for output in model.graph.output if output.name not in outputs]
    for field, values in (
        (model.graph.node, [*kept, *added.graph.node]),
        (model.graph.output, [*others, *added.graph.output]),
    ):
        del field[:]  # type: ignore[attr-defined]
        field.extend(values)  # type: ignore[attr-defined]
    model.graph.initializer.extend(added.graph.initializer)
    centres = next(value for value in model.graph.initializer if value.name == "anchor_yx")
    moved = numpy_helper.to_array(centres).copy()
    moved[:, ::3] = -1
    centres.CopyFrom(numpy_helper.from_array(moved, "anchor_yx"))
    return model


def save(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "tfod.onnx"
    onnx.save(model, path)
    return path


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_what_is_read(tmp_path: Path) -> None:
    source = OnnxSource(save(tmp_path, toy()))
    assert pick_family(source, load_families()) is tfod
    reading = tfod.read(source)
    preprocessing = reading.spec.preprocessing
    assert preprocessing.size_hw == (HEIGHT, WIDTH)
    assert (preprocessing.mean, preprocessing.std) == (MEAN, STD)
    assert (preprocessing.resize, preprocessing.sampling) == ("stretch", "corner")
    assert reading.spec.nms == Nms(1e-8, 0.5, 10)
    assert reading.spec.category_ids == (1, 2, 3)
    assert reading.anchors is not None and reading.anchors.shape == (ANCHORS, 4)
    # 0.2 to 0.8 of the height and width, as the graph has them
    assert (
        0.2 * HEIGHT <= reading.anchors[:, 0].min() <= reading.anchors[:, 0].max() <= 0.8 * HEIGHT
    )
    assert 0.1 * WIDTH <= reading.anchors[:, 3].min() <= reading.anchors[:, 3].max() <= 0.4 * WIDTH


def test_a_head_for_each_level(tmp_path: Path) -> None:
    """SSDs without a pyramid: heads are numbered, and no weights are shared."""
    model = toy("sigmoid, background kept")
    shared = tfod.read(OnnxSource(save(tmp_path, model)))
    for node in model.graph.node:
        for kind in ("Class", "Box"):
            for level, end in enumerate(("", "_1")):
                if node.name == f"{HEAD}{kind}Head/Reshape{end}":
                    node.name = f"StatefulPartitionedCall/BoxPredictor/Convolutional{kind}Head_{level}/Reshape"
    source = OnnxSource(save(tmp_path, model))
    assert pick_family(source, load_families()) is tfod
    reading = tfod.read(source)
    assert (reading.spec, reading.heads) == (shared.spec, shared.heads)
    assert shared.anchors is not None and reading.anchors is not None
    np.testing.assert_array_equal(reading.anchors, shared.anchors)
    facts = {fact.name: fact.origin for fact in reading.facts}
    assert "BoxPredictor/ConvolutionalClassHead_ and" in facts["family"]


def test_a_background_that_the_scores_keep(tmp_path: Path) -> None:
    """Told by the class of a detection, or by the number of NMS operators, one for each class."""
    for converter in (*CONVERTERS, *BACKGROUND_KEPT):
        for classes_said in (True, False):
            model = toy(converter)
            if not classes_said:
                del model.graph.output[3]
            reading = tfod.read(OnnxSource(save(tmp_path, model)))
            facts = {fact.name: fact.value for fact in reading.facts}
            assert facts["background class"] == ("first" if "background" in converter else "none")
            assert facts["classes"] == "3" and facts["selection"] == "NMS per class"
            assert reading.spec.category_ids == (1, 2, 3)


def test_the_most_of_a_class_is_computed() -> None:
    """The least of a constant and the number of boxes, as in exports without static shapes."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        most (float[1, n, 4] boxes, float[1, 2, n] scores, int64 count) => (int64[m, 3] kept)
          <int64 hundred = {100}, float iou = {0.5}, float threshold = {0.1}>
        { least = Min(count, hundred)  kept = NonMaxSuppression(boxes, scores, least, iou, threshold) }
    """)
    graph = _read_onnx_graph(model)
    node = next(n for n in graph.all_nodes() if n.op == "NonMaxSuppression")
    assert tfod.most_of_a_class(graph, node) == 100
    model.graph.node[0].op_type = "Max"  # no upper limit
    graph = _read_onnx_graph(model)
    node = next(n for n in graph.all_nodes() if n.op == "NonMaxSuppression")
    assert tfod.most_of_a_class(graph, node) is None


@pytest.mark.parametrize("converter", [*CONVERTERS, *BACKGROUND_KEPT])
@pytest.mark.parametrize("factors", [(1, 1, 1, 1), (10, 10, 5, 5)])
def test_detections_are_the_sources(
    converter: str, factors: tuple[float, ...], tmp_path: Path
) -> None:
    """From a photograph of another shape to boxes on it; a batch gives what single images do."""
    source = OnnxSource(save(tmp_path, toy(converter, factors)))
    path = tmp_path / "converted.onnx"
    arguments = ["--source_onnx", str(source.path), "--onnx", str(path), "--score_threshold", "0.3"]
    assert create_onnx.main(arguments) == 0
    images = [noise(45, 90), noise(64, 64, 1)]
    with OnnxRuntime(path) as runtime:
        spec = runtime.spec
        assert spec.num_classes == CLASSES
        prepared = [preprocess(image, spec.preprocessing) for image in images]
        outputs = runtime.infer(np.stack([x for x, _ in prepared]))
        found = decode(outputs, spec, [transform for _, transform in prepared])
        for row, (seen, _) in enumerate(prepared):
            single = runtime.infer(seen[None])
            for name, value in single.items():
                np.testing.assert_allclose(value[0], outputs[name][row], atol=1e-4)
    for image, ours in zip(images, found, strict=True):
        boxes, scores = source.run(
            ["raw_detection_boxes", "raw_detection_scores"], {"input_tensor": image[None]}
        )
        scores = scores[..., 1:] if converter in BACKGROUND_KEPT else scores
        nms = Nms(0.3, 0.5, 10, score_activation=False, box_coding=0)
        theirs = reference(boxes, scores, nms)
        count = int(theirs["num_detections"][0, 0])
        assert count == len(ours) > 2
        height, width = image.shape[:2]
        in_pixels = theirs["detection_boxes"][0, :count] * ([height, width] * 2)
        limits = [height, width] * 2
        np.testing.assert_allclose(
            ours.boxes_xyxy[:, [1, 0, 3, 2]], np.clip(in_pixels, 0, limits), atol=0.02
        )
        np.testing.assert_allclose(ours.scores, theirs["detection_scores"][0, :count], atol=1e-4)
        np.testing.assert_array_equal(ours.class_ids, theirs["detection_classes"][0, :count])


def test_boxes_outside_are_dropped_before_the_best_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the comparison too, or what fills their places in the source is missing in ours."""
    source = OnnxSource(save(tmp_path, toy_that_drops_boxes_outside()))
    arguments = ["--source_onnx", str(source.path), "--onnx", str(tmp_path / "converted.onnx")]
    assert create_onnx.main(arguments) == 0
    said = capsys.readouterr().out
    found = re.search(r"(\d+) of (\d+) compared come out of our heads \((\d+) in all", said)
    assert found and found.group(1) == found.group(2) and found.group(3) == "40"
    assert "\nboxes outside the picture stay, and take places among the best: " in said
    final = tfod.read(source).final
    assert final is not None and isinstance(final.select, TfSelection)
    boxes = np.array([[-9, 0, -1, 8], [40, 28, 60, 40], [2, 2, 9, 9], [1, 9, 30, 30]], np.float32)
    scores = np.array([[0.9], [0.8], [0.7], [0.6]], np.float32)
    best = dataclasses.replace(final.select, most=2)(boxes, scores)
    np.testing.assert_array_equal(best.boxes, [[40, 28, 48, 32], [2, 2, 9, 9]])
    np.testing.assert_array_equal(best.scores, scores[1:3, 0])


def test_nothing_above_the_threshold(tmp_path: Path) -> None:
    path = tmp_path / "converted.onnx"
    arguments = ["--source_onnx", str(save(tmp_path, toy())), "--onnx", str(path)]
    assert create_onnx.main([*arguments, "--score_threshold", "0.999"]) == 0
    with OnnxRuntime(path) as runtime:
        outputs = runtime.infer(np.full((1, HEIGHT, WIDTH, 3), 120, np.float32))
    assert outputs["num_detections"].item() == 0
    assert not outputs["detection_scores"].any()


def without_outputs(model: onnx.ModelProto) -> str:
    del model.graph.output[1:3]
    return r"expected the outputs of exporter_main_v2.py.*without \['raw_detection_boxes', 'raw_det"


def with_other_scores(model: onnx.ModelProto) -> str:
    node = next(n for n in model.graph.node if n.output[0] == "scores")
    node.op_type = "Tanh"
    return "expected raw_detection_scores to be the sigmoid or softmax"


def with_other_coder(model: onnx.ModelProto) -> str:
    node = next(n for n in model.graph.node if n.output[0] == "grown")
    node.op_type = "Softplus"
    return "expected boxes coded as centre and size relative to anchors"


@pytest.mark.parametrize("plant", [without_outputs, with_other_scores, with_other_coder])
def test_what_is_not_understood_is_refused(plant: Any, tmp_path: Path) -> None:
    model = toy()
    message = plant(model)
    with pytest.raises(GraphError, match=message):
        tfod.read(OnnxSource(save(tmp_path, model)))


def test_header_of_a_photograph_is_not_needed(tmp_path: Path) -> None:
    """The network's own resize (asymmetric) equals the host's for an image file, to rounding."""
    source = OnnxSource(save(tmp_path, toy()))
    reading = tfod.read(source)
    image = noise(50, 70)
    Image.fromarray(image).save(tmp_path / "noise.png")
    (theirs,) = source.run(["placed"], {"input_tensor": image[None]})
    ours, _ = preprocess(image, reading.spec.preprocessing)
    normalised = (ours - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    np.testing.assert_allclose(theirs[0].transpose(1, 2, 0), normalised, atol=1e-4)


@pytest.mark.parametrize(("score", "label"), [(0.0, 1), (0.95, 3)])
def test_a_detection_that_is_none_says_nothing_of_the_background(score: float, label: int) -> None:
    """Padding is of class 0 + 1: not taken for an answer."""
    logits = np.zeros((1, 10, 3), np.float32)
    outputs = {"detection_classes": "classes", "detection_scores": "scores"}

    class StandInSource:
        graph = SimpleNamespace(outputs=outputs)

        def run(self, fetches: Any, feeds: Any) -> list[Any]:
            assert fetches == ["classes", "scores"]
            assert (feeds["head:0"][..., 1] == 10).all() and (feeds["head:0"][..., 0] == -20).all()
            return [np.full((1, 100), label, np.float32), np.full((1, 100), score, np.float32)]

    head = SimpleNamespace(name="head", outputs=("head:0",))
    with pytest.raises(GraphError, match=f"found {label} with a score of {score:.3g}"):
        tfod.counts_background(StandInSource(), {}, head, logits)  # type: ignore[arg-type]
