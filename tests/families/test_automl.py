# SPDX-License-Identifier: Apache-2.0
"""Landmarks of AutoML graphs, on toy graphs with the real node names."""

from pathlib import Path

import cv2
import numpy as np
import onnx.parser
import pytest

from trtdet.errors import GraphError
from trtdet.families import automl, measure
from trtdet.families.measure import measure_preprocessing
from trtdet.sources.base import SourceGraph, SourceNode
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import Preprocessing

SCORES = {
    "max_output_size": np.int32(100),
    "iou_threshold": np.float32(0.5),
    "score_threshold": np.float32(0.4),
    "soft_nms_sigma": np.float32(0),
}


def const(name: str, value: object) -> SourceNode:
    return SourceNode(name, "Const", (), (f"{name}:0",), np.asarray(value))


def node(name: str, op: str, *inputs: str, function: str = "") -> SourceNode:
    return SourceNode(name, op, inputs, (f"{name}:0",), None, function)


def graph(*nodes: SourceNode, batch: int | None = 1) -> SourceGraph:
    return SourceGraph({n.name: n for n in nodes}, ("image_arrays:0",), batch)


def heads(levels: int, scope: str = "class_net/class-predict") -> list[SourceNode]:
    """A stem, a backbone convolution and `levels` predictions, reshaped and concatenated."""
    nodes = [
        node("stem/conv2d/Conv2D", "Conv", "image_arrays:0", "stem/kernel:0"),
        const("stem/kernel", np.zeros(1)),
        node("blocks_0/Conv2D", "Conv", "stem/conv2d/Conv2D:0"),
    ]
    for level in range(levels):
        name = f"{scope}_{level}/BiasAdd" if level else f"{scope}/BiasAdd"
        nodes.append(node(name, "BiasAdd", "blocks_0/Conv2D:0"))
        nodes.append(node(f"Reshape_{level}", "Reshape", f"{name}:0", "shape:0"))
    nodes.append(const("shape", [1, -1, 90]))
    nodes.append(const("axis", 1))
    reshapes = [f"Reshape_{level}:0" for level in range(levels)]
    nodes.append(node("concat", "Concat", *reshapes, "axis:0"))
    return nodes


@pytest.mark.parametrize("levels", [2, 5, 6])
def test_head_is_found_for_any_number_of_levels(levels: int) -> None:
    assert measure.find_head(graph(*heads(levels)), automl.CLASS_SCOPE, "automl").name == "concat"


def test_missing_head_names_scope_and_count() -> None:
    with pytest.raises(
        GraphError, match="expected one Concat of reshaped predictions below 'box_net/', found 0"
    ):
        measure.find_head(graph(*heads(5)), automl.BOX_SCOPE, "automl")


def test_stem_is_the_convolution_nothing_precedes() -> None:
    toy = graph(*heads(5))
    assert measure.find_stem(toy, toy.nodes["concat"], "automl").name == "stem/conv2d/Conv2D"


def nms_nodes(count: int = 1, **changes: object) -> list[SourceNode]:
    nodes = [const(name, value) for name, value in {**SCORES, **changes}.items()]
    nodes += [
        node(
            f"NonMaxSuppressionV5_{i}",
            "NonMaxSuppression",
            "boxes:0",
            "scores:0",
            *(f"{name}:0" for name in SCORES),
        )
        for i in range(count)
    ]
    return nodes


def test_hard_nms_is_read_exactly_and_a_high_threshold_is_said() -> None:
    nms, notes = automl.read_nms(graph(*nms_nodes()))
    assert (nms.score_threshold, nms.iou_threshold, nms.max_output_boxes) == (0.4, 0.5, 100)
    assert nms.class_agnostic
    assert [n.option for n in notes] == ["score_threshold"] and "--score_threshold 0.001" in notes[
        0
    ].text


def test_gaussian_nms_becomes_hard_at_half_iou_with_a_note() -> None:
    changes = {
        "soft_nms_sigma": np.float32(0.25),
        "iou_threshold": np.float32(1),
        "score_threshold": np.float32(0.001),
    }
    nms, notes = automl.read_nms(graph(*nms_nodes(**changes)))
    assert nms.iou_threshold == 0.5
    assert [n.option for n in notes] == [
        "iou_threshold"
    ] and "gaussian soft NMS (sigma 0.5)" in notes[0].text


def test_no_score_threshold_is_minus_infinity_in_the_graph_and_zero_here() -> None:
    nms, _ = automl.read_nms(graph(*nms_nodes(score_threshold=np.float32(-np.inf))))
    assert nms.score_threshold == 0


@pytest.mark.parametrize(
    ("count", "batch", "class_agnostic"),
    [
        (1, 1, True),  # one image, one NMS
        (4, 4, True),  # a batch of four unrolled
        (90, 1, False),  # one NMS per class
        (1, None, True),  # a loop over images
    ],
)
def test_per_class_means_more_nms_operations_than_images(
    count: int, batch: int | None, class_agnostic: bool
) -> None:
    nms, _ = automl.read_nms(graph(*nms_nodes(count), batch=batch))
    assert nms.class_agnostic is class_agnostic


def test_nms_in_a_loop_body_reads_the_constants_of_the_caller() -> None:
    """batch_size=0: the thresholds are arguments of the body of a while loop in the main graph."""
    main = graph(*[n for n in nms_nodes() if n.op == "Const"], batch=None)
    body = node(
        "nms", "NonMaxSuppression", "b", "s", *(f"arg_{name}" for name in SCORES), function="body"
    )
    main.functions["body"] = {"nms": body}
    main.calls = {("body", f"arg_{name}"): [("", f"{name}:0")] for name in SCORES}
    nms, _ = automl.read_nms(main)
    assert (nms.score_threshold, nms.iou_threshold, nms.max_output_boxes) == (0.4, 0.5, 100)


def test_anchors_are_found_by_count_and_become_centre_and_size() -> None:
    corners = np.array([[-16, 0, 16, 64], [0, 0, 8, 8]], np.float32)
    toy = graph(const("other", np.zeros((3, 4), np.float32)), const("Const_7", corners))
    found = automl.find_anchors(toy, 2)
    np.testing.assert_array_equal(measure.centre_size(found), [[0, 32, 32, 64], [4, 4, 8, 8]])
    with pytest.raises(
        GraphError,
        match=r"expected a constant of 5 anchors \[5, 4\], found shapes \[\(2, 4\), \(3, 4\)\]",
    ):
        automl.find_anchors(toy, 5)


def write_model(path: Path, body: str) -> None:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{body}')
    onnx.save(model, path)


class Letterbox:
    """A stand-in for a source: AutoML's preprocessing to 4x6 pixels, or another placement."""

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        placement: str = "top left",
        rounding: str = "floor",
        sampling: str = "half_pixel",
    ) -> None:
        self.graph = graph(batch=1)
        self.mean, self.std, self.placement = np.array(mean), np.array(std), placement
        self.round = {"floor": int, "round": round}[rounding]
        self.sampling = sampling

    def run(self, fetches: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        (image,) = feeds["image_arrays:0"].astype(np.float32)
        scale = min(4 / image.shape[0], 6 / image.shape[1])
        height, width = (self.round(n * scale) for n in image.shape[:2])
        if self.placement == "stretched":
            height, width = 4, 6
        if self.sampling == "corner":
            rows, columns = (
                np.arange(n) * size // n
                for n, size in zip((height, width), image.shape, strict=False)
            )
            resized = image[rows][:, columns]
        else:
            resized = cv2.resize(image, (width, height))
        canvas = np.zeros((1, 4, 6, 3), np.float32)
        top = 4 - height if self.placement == "bottom left" else 0
        left = (6 - width) // 2 if self.placement == "centred" else 0
        placed = (resized - self.mean) / self.std
        canvas[0, top : top + height, left : left + width] = placed
        return [canvas]


def measured(source: Letterbox) -> tuple[Preprocessing, str]:
    return measure_preprocessing(source, "image_arrays:0", "stem", "automl")  # type: ignore[arg-type]


@pytest.mark.parametrize("rounding", ["floor", "round"])
@pytest.mark.parametrize("sampling", ["half_pixel", "corner"])
def test_preprocessing_is_measured(rounding: str, sampling: str) -> None:
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    found, layout = measured(Letterbox(mean, std, rounding=rounding, sampling=sampling))
    assert layout == "NHWC"
    assert (found.size_hw, found.mean, found.std) == ((4, 6), mean, std)
    assert (found.resize, found.pad_rgb) == ("letterbox", mean)  # zero after normalisation
    assert (found.rounding, found.sampling) == (rounding, sampling)


def test_stretching_is_measured() -> None:
    found, _ = measured(Letterbox((100, 100, 100), (50, 50, 50), "stretched"))
    assert found.resize == "stretch"


@pytest.mark.parametrize("placement", ["centred", "bottom left"])
def test_another_placement_is_refused(placement: str) -> None:
    with pytest.raises(GraphError, match="expected the image at the top left"):
        measured(Letterbox((100, 100, 100), (50, 50, 50), placement))


def test_anchors_that_decode_elsewhere_are_refused() -> None:
    corners = np.array([[0, 0, 8, 16], [4, 0, 12, 16]], np.float32)
    toy = graph(const("Const_7", corners))
    with pytest.raises(GraphError, match="from where the model's own decoding puts them"):
        automl.find_anchors(toy, 2, measured=corners[:, [1, 0, 3, 2]])
    np.testing.assert_array_equal(
        automl.find_anchors(graph(), 2, measured=corners), corners
    )  # folded away


def test_matches_needs_both_heads_put_together(tmp_path: Path) -> None:
    """Heads that come out level by level, as PyTorch's EfficientDet exports them, are not
    AutoML's.
    """
    path = tmp_path / "toy.onnx"
    head = (
        '["{0}a"] {1}a = Relu(x) ["{0}r"] {1}r = Reshape({1}a, s) ["{0}b"] {1}b = Relu(x) '
        '["{0}t"] {1}t = Reshape({1}b, s) ["{1}"] {1} = {2}({1}r, {1}t)'
    )
    for second, join, whole in (
        ("box_net/", "Concat<axis=0>", True),
        ("head/", "Concat<axis=0>", False),
        ("box_net/", "Add", False),
    ):
        text = (
            "g (float[1] x) => (float[n] y, float[n] z) { s = Constant<value = int64[1] {1}>() "
            + head.format("class_net/", "y", join) + " " + head.format(second, "z", join) + " }"
        )  # fmt: skip
        write_model(path, text)
        assert automl.matches(OnnxSource(path)) == whole
        # torch numbers the modules of a list.
        write_model(path, text.replace("class_net/a", "class_net/conv_rep.0/a"))
        assert not automl.matches(OnnxSource(path))
        assert automl.why_not(OnnxSource(path)) == "its heads are of an EfficientDet in PyTorch"
