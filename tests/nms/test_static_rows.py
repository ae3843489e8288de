# SPDX-License-Identifier: Apache-2.0
"""Selection with fixed shapes against the same graph with shapes that follow the picture."""

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from trtdet.errors import GraphError
from trtdet.nms.static_rows import make_static, maybe_data_sized
from trtdet.sources.base import run_onnx

make, info = helper.make_node, helper.make_tensor_value_info
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
#: Proposals, classes, channels, and how many proposals and detections are kept.
COUNT, CLASSES, CHANNELS, PROPOSALS, MOST = 40, 3, 4, 12, 7


def two_stages() -> onnx.ModelProto:
    """A stand-in of torchvision's Faster R-CNN, from its feature maps on: proposals by NMS, each
    looked at on one of two levels by RoiAlign, then classes, a threshold, NMS per class by shifted
    boxes, the best 7; with its If on whether there is any.
    """
    rng = np.random.default_rng(1)
    values: dict[str, Any] = {
        "zero": np.array([0]), "one": np.array([1]), "two": np.array([2]), "three": np.array([3]), "four": np.array([4]),
        "kept": np.array([PROPOSALS]), "most": np.array([MOST]), "all": np.array([2**62]), "nothing": np.int64(0),
        "overlap": np.array([0.6], np.float32), "apart": np.array([0.4], np.float32), "large": np.float32(300),
        "least": np.float32(0.6), "floor": np.float32(0.45), "rows": np.array([-1, 4]), "flat": np.array([-1]), "columns": np.array([-1, CHANNELS * 4]),
        "cubes": np.array([-1, 1, 1, 1]), "size": np.array([CHANNELS, 2, 2]), "weight": rng.normal(0, 2, (CHANNELS * 4, CLASSES)).astype(np.float32),
        "classes": np.arange(CLASSES), "each": np.array([1, CLASSES, 1]), "wide": np.array([CLASSES, 4]), "plus": np.float32(1), "at_1": np.int64(1),
        "at_2": np.int64(2), "by_class": np.array([1, 1, 4]), "ones": np.array([1, -1]),
    }  # fmt: skip
    keep_none = helper.make_graph(
        [make("Constant", [], ["empty"], value=numpy_helper.from_array(np.zeros(0, np.int64)))],
        "then", [], [info("empty", INT64, [0])],
    )  # fmt: skip
    keep_some = helper.make_graph(
        [
            make("ReduceMax", ["boxes_2"], ["largest"], keepdims=0),
            make("Add", ["largest", "plus"], ["step"]),
            make("Cast", ["labels_2"], ["labels_float"], to=FLOAT),
            make("Mul", ["labels_float", "step"], ["shifts"]),
            make("Unsqueeze", ["shifts", "one"], ["shift_column"]),
            make("Add", ["boxes_2", "shift_column"], ["shifted"]),
            make("Unsqueeze", ["shifted", "zero"], ["nms_boxes"]),
            make("Unsqueeze", ["scores_2", "zero"], ["score_row"]),
            make("Unsqueeze", ["score_row", "zero"], ["nms_scores"]),
            make("NonMaxSuppression", ["nms_boxes", "nms_scores", "all", "apart"], ["chosen"]),
            make("Gather", ["chosen", "two"], ["chosen_column"], axis=1),
            make("Squeeze", ["chosen_column", "one"], ["survivors"]),
        ],
        "else", [], [info("survivors", INT64, ["k"])],
    )  # fmt: skip
    nodes = [
        # proposals, of which those below a floor are left out
        make("GreaterOrEqual", ["objectness", "floor"], ["is_sound"]),
        make("NonZero", ["is_sound"], ["sound_row"]),
        make("Squeeze", ["sound_row", "zero"], ["sound"]),
        make("Gather", ["corners", "sound"], ["boxes_0"], axis=0),
        make("Gather", ["objectness", "sound"], ["scores_0"], axis=0),
        make("Unsqueeze", ["boxes_0", "zero"], ["rpn_boxes"]),
        make("Unsqueeze", ["scores_0", "zero"], ["rpn_row"]),
        make("Unsqueeze", ["rpn_row", "zero"], ["rpn_scores"]),
        make("NonMaxSuppression", ["rpn_boxes", "rpn_scores", "all", "overlap"], ["proposed"]),
        make("Gather", ["proposed", "two"], ["proposed_column"], axis=1),
        make("Squeeze", ["proposed_column", "one"], ["proposed_all"]),
        make("Slice", ["proposed_all", "zero", "kept", "zero"], ["first"]),
        make("Gather", ["boxes_0", "first"], ["rois"], axis=0),
        # one of two levels, by the area
        make("Split", ["rois"], ["x1", "y1", "x2", "y2"], axis=1),
        make("Sub", ["x2", "x1"], ["widths"]),
        make("Sub", ["y2", "y1"], ["heights"]),
        make("Mul", ["widths", "heights"], ["areas_column"]),
        make("Squeeze", ["areas_column", "one"], ["areas"]),
        make("Greater", ["areas", "large"], ["is_large"]),
        make("Not", ["is_large"], ["is_small"]),
        make("Shape", ["first"], ["number"]),
        make("Concat", ["number", "size"], ["pooled_shape"], axis=0),
        make("ConstantOfShape", ["pooled_shape"], ["pooled_0"], value=numpy_helper.from_array(np.zeros(1, np.float32))),
    ]  # fmt: skip
    for level, mask, maps in ((1, "is_small", "fine"), (2, "is_large", "coarse")):
        p = f"level_{level}/"
        nodes += [
            make("NonZero", [mask], [f"{p}row"]),
            make("Squeeze", [f"{p}row", "zero"], [f"{p}index"]),
            make("Gather", ["rois", f"{p}index"], [f"{p}rois"], axis=0),
            make("Shape", [f"{p}index"], [f"{p}number"]),
            make("ConstantOfShape", [f"{p}number"], [f"{p}pictures"], value=numpy_helper.from_array(np.zeros(1, np.int64))),
            make("RoiAlign", [maps, f"{p}rois", f"{p}pictures"], [f"{p}pooled"], output_height=2, output_width=2, sampling_ratio=2, spatial_scale=1 / 2**level),
            make("Reshape", [f"{p}index", "cubes"], [f"{p}cubes"]),
            make("Concat", [f"{p}number", "size"], [f"{p}shape"], axis=0),
            make("Expand", [f"{p}cubes", f"{p}shape"], [f"{p}positions"]),
            make("ScatterElements", [f"pooled_{level - 1}", f"{p}positions", f"{p}pooled"], [f"pooled_{level}"], axis=0),
        ]  # fmt: skip
    nodes += [
        make("Reshape", ["pooled_2", "columns"], ["features"]),
        make("Gemm", ["features", "weight"], ["logits"]),
        make("Softmax", ["logits"], ["probabilities"], axis=-1),
        make("Reshape", ["probabilities", "flat"], ["every_score"]),
        make("Unsqueeze", ["rois", "one"], ["roi_columns"]),
        make("Expand", ["roi_columns", "each"], ["every_roi"]),
        make("Reshape", ["every_roi", "rows"], ["every_box"]),
        make("Shape", ["probabilities"], ["probability_shape"]),
        make("Expand", ["classes", "probability_shape"], ["label_rows"]),
        make("Reshape", ["label_rows", "flat"], ["every_label"]),
        make("Greater", ["every_score", "least"], ["is_enough"]),
        make("NonZero", ["is_enough"], ["enough_row"]),
        make("Squeeze", ["enough_row", "zero"], ["enough"]),
        make("Gather", ["every_box", "enough"], ["boxes_2"], axis=0),
        make("Gather", ["every_score", "enough"], ["scores_2"], axis=0),
        make("Gather", ["every_label", "enough"], ["labels_2"], axis=0),
        make("Size", ["scores_2"], ["how_many"]),
        make("Equal", ["how_many", "nothing"], ["is_none"]),
        make("If", ["is_none"], ["keep"], then_branch=keep_none, else_branch=keep_some),
        make("Slice", ["keep", "zero", "most", "zero"], ["best"]),
        make("Gather", ["boxes_2", "best"], ["boxes"], axis=0),
        make("Gather", ["scores_2", "best"], ["scores"], axis=0),
        make("Gather", ["labels_2", "best"], ["labels"], axis=0),
    ]
    inputs = [
        info("corners", FLOAT, [COUNT, 4]), info("objectness", FLOAT, [COUNT]),
        info("fine", FLOAT, [1, CHANNELS, 24, 32]), info("coarse", FLOAT, [1, CHANNELS, 12, 16]),
    ]  # fmt: skip
    outputs = [
        info("boxes", FLOAT, ["n", 4]), info("scores", FLOAT, ["n"]), info("labels", INT64, ["n"]),
    ]  # fmt: skip
    constants = [numpy_helper.from_array(np.asarray(v), k) for k, v in values.items()]
    graph = helper.make_graph(nodes, "stand-in", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def picture(seed: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    low = rng.uniform(-4, 50, (COUNT, 2))
    return {
        "corners": np.concatenate([low, low + rng.uniform(4, 30, (COUNT, 2))], 1).astype(np.float32),
        "objectness": rng.uniform(0, 0.7 if seed else 0.4, COUNT).astype(np.float32),
        "fine": rng.normal(0, 0.4, (1, CHANNELS, 24, 32)).astype(np.float32),
        "coarse": rng.normal(0, 0.4, (1, CHANNELS, 12, 16)).astype(np.float32),
    }  # fmt: skip


def padded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Detections behind which there are zeros, as `trtdet.families.any_number` pads them."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    zeros = {"boxes": np.zeros((MOST, 4), np.float32), "scores": np.zeros(MOST, np.float32), "labels": np.zeros(MOST, np.int64)}  # fmt: skip
    for name, value in zeros.items():
        made.graph.initializer.append(numpy_helper.from_array(value, f"{name}_zeros"))
        made.graph.node.append(make("Concat", [name, f"{name}_zeros"], [f"{name}_more"], axis=0))
    made.graph.node.append(make("TopK", ["scores_more", "most"], ["out_scores", "order"]))
    for name in ("boxes", "labels"):
        made.graph.node.append(make("Gather", [f"{name}_more", "order"], [f"out_{name}"], axis=0))
    del made.graph.output[:]
    made.graph.output.extend(
        [info("out_boxes", FLOAT, [MOST, 4]), info("out_scores", FLOAT, [MOST]), info("out_labels", INT64, [MOST])]
    )  # fmt: skip
    onnx.checker.check_model(made)
    return made


def test_two_stages() -> None:
    """As many detections, with the same numbers; the first picture has no proposal at all, which
    the graph with shapes that follow the picture takes too.
    """
    model = padded(two_stages())
    static = make_static(model)
    onnx.checker.check_model(static, full_check=True)
    ops = {node.op_type for node in static.graph.node}
    assert maybe_data_sized(static) is None and not ops & {"If", "RoiAlign", "Shape", "ScatterElements"}  # fmt: skip
    names, counts = ["out_boxes", "out_scores", "out_labels"], []
    for seed in range(12):
        expected = run_onnx(model, names, picture(seed))
        found = run_onnx(static, names, picture(seed))
        counts.append(int((expected[1] > 0).sum()))
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.shape == theirs.shape
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert counts[0] == 0 and max(counts) == MOST and len({*counts}) >= 4


@pytest.mark.parametrize("elem_type", [FLOAT, INT64])
def test_the_smallest_of_rows(elem_type: int) -> None:
    """As paddle2onnx sorts by class behind the NMS; what does not count comes last."""
    filling = np.full(4, 50, np.float32 if elem_type == FLOAT else np.int64)
    constants = {"zero": np.array([0]), "four": np.array([4]), "filling": filling}
    nodes = [
        make("NonZero", ["values"], ["index"]),
        make("Squeeze", ["index", "zero"], ["row"]),
        make("Gather", ["values", "row"], ["some"]),
        make("Cast", ["some"], ["typed"], to=elem_type),
        make("Shape", ["typed"], ["number"]),
        make("Min", ["number", "four"], ["k"]),
        make("TopK", ["typed", "k"], ["sorted", "order"], largest=0),
        make("Concat", ["sorted", "filling"], ["filled"], axis=0),
        make("TopK", ["filled", "four"], ["found", "positions"], largest=0),
    ]
    graph = helper.make_graph(
        nodes, "rows", [info("values", FLOAT, [9])], [info("found", elem_type, [4])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    static = make_static(model)
    assert maybe_data_sized(static) is None
    for values, wanted in (
        ([0, 9, 0, 2, 7, 0, 0, 4, 3], [2, 3, 4, 7]),
        ([0, 9, 0, 0, 0, 0, 0, 0, 3], [3, 9, 50, 50]),
        ([0] * 9, [50] * 4),
    ):
        fed = {"values": np.array(values, np.float32)}
        for one in (model, static):
            np.testing.assert_array_equal(run_onnx(one, ["found"], fed)[0], wanted)


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (make("CumSum", ["some", "nothing"], ["found"]), "CumSum '' on rows whose number follows the picture: there is no form"),
        (make("Slice", ["some", "zero", "two", "zero"], ["found"]), "the first of rows in no order"),
        (make("Gather", ["some", "zero"], ["found"]), "by fixed positions"),
        (make("ReduceMean", ["some"], ["found"], axes=[0]), "ReduceMean '' on rows whose number follows the picture: over the rows"),
    ],
)  # fmt: skip
def test_refused(node: onnx.NodeProto, said: str) -> None:
    """What depends on how many rows there are."""
    nodes = [
        make("NonZero", ["values"], ["index"]),
        make("Squeeze", ["index", "zero"], ["row"]),
        make("Gather", ["values", "row"], ["some"]),
        node,
    ]
    constants = {"zero": np.array([0]), "two": np.array([2]), "nothing": np.int64(0)}
    graph = helper.make_graph(
        nodes, "rows", [info("values", FLOAT, [9])], [info("found", FLOAT, None)],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(GraphError, match=said):
        make_static(model)


def test_tensorrt_rtx_builds_it() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs requirements-rtx.txt")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(make_static(padded(two_stages())).SerializeToString())
    config = builder.create_builder_config()
    config.builder_optimization_level = 0
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None and plan.nbytes > 50_000
    assert tuple(network.get_output(0).shape) == (MOST, 4)


@pytest.mark.parametrize("position", [2, 3, 4])
def test_limits_of_an_nms_that_are_computed(position: int) -> None:
    """They are not taken for missing ones."""
    names = ["boxes", "scores", "most", "overlap", "least"]
    computed = names[position]
    constants = {"most": np.array([3]), "overlap": np.array([0.5], np.float32), "least": np.array([0.1], np.float32), "zero": np.array([0])}  # fmt: skip
    constants[f"{computed}_constant"] = constants.pop(computed)
    nodes = [
        make("ReduceMax", ["scores"], ["best"], keepdims=0),
        make("Mul", ["best", "overlap_constant" if position == 3 else "least_constant"], [computed])
        if position > 2
        else make("Cast", ["best"], ["most"], to=INT64),
        make("NonMaxSuppression", names, ["chosen"]),
    ]
    graph = helper.make_graph(
        nodes, "nms", [info("boxes", FLOAT, [1, 9, 4]), info("scores", FLOAT, [1, 2, 9])], [info("chosen", INT64, [None, 3])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(GraphError, match=f"its limit '{computed}' is computed from the picture"):
        make_static(model)
