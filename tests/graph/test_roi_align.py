# SPDX-License-Identifier: Apache-2.0
"""RoiAlign in ordinary operators against ONNX Runtime's own."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from trtdet.errors import GraphError
from trtdet.graph.builder import Builder
from trtdet.graph.roi_align import lower_node
from trtdet.sources.base import run_onnx

SHAPE = (1, 5, 13, 21)


def model_of(boxes: np.ndarray, opset: int = 17, **attributes: Any) -> onnx.ModelProto:
    node = helper.make_node(
        "RoiAlign", ["maps", "boxes", "pictures"], ["aligned"], "roi", **attributes
    )
    graph = helper.make_graph(
        [node], "roi", [helper.make_tensor_value_info("maps", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("aligned", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(boxes, "boxes"), numpy_helper.from_array(np.zeros(len(boxes), np.int64), "pictures")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def lowered(model: onnx.ModelProto, count: int) -> tuple[onnx.ModelProto, str]:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    (node,) = made.graph.node
    build = Builder(made, "roi/")
    result = lower_node(build, node, list(node.input), SHAPE, (count, 4))
    del made.graph.node[:]
    build.append_to(made)
    return made, result


@pytest.mark.parametrize("aligned", ["half_pixel", "output_half_pixel"])
@pytest.mark.parametrize(("size", "ratio", "scale"), [((7, 7), 2, 0.25), ((3, 5), 1, 0.5), ((14, 14), 3, 1.0)])  # fmt: skip
def test_random_boxes(aligned: str, size: tuple[int, int], ratio: int, scale: float) -> None:
    """Boxes within the map, beyond each of its borders, of no size, and with crossed corners."""
    rng = np.random.default_rng(3)
    extent = np.array([21, 13, 21, 13]) / scale
    boxes = rng.uniform(-0.4, 1.4, (200, 4)) * extent
    boxes[:150] = np.concatenate(
        [np.minimum(boxes[:150, :2], boxes[:150, 2:]), np.maximum(boxes[:150, :2], boxes[:150, 2:])], axis=1
    )  # fmt: skip
    boxes[150:160, 2:] = boxes[150:160, :2]
    boxes[160:170] = extent * [0, 0, 1, 1]
    maps = rng.normal(size=SHAPE).astype(np.float32)
    model = model_of(
        boxes.astype(np.float32), output_height=size[0], output_width=size[1], sampling_ratio=ratio,
        spatial_scale=scale, coordinate_transformation_mode=aligned,
    )  # fmt: skip
    (expected,) = run_onnx(model, ["aligned"], {"maps": maps})
    made, result = lowered(model, len(boxes))
    assert "RoiAlign" not in {node.op_type for node in made.graph.node}
    (found,) = run_onnx(made, [result], {"maps": maps})
    assert found.shape == expected.shape == (200, 5, *size)
    assert np.abs(found - expected).max() <= 1e-5 and np.ptp(expected) > 2


@pytest.mark.parametrize(
    ("changes", "opset", "said"),
    [
        ({"mode": "max"}, 17, "found 1, max and 2"),
        ({"sampling_ratio": 0}, 17, "found 1, avg and 0"),
        ({}, 13, "expected opset 16 or later, which has GridSample, found 13"),
    ],
)
def test_refused(changes: dict[str, Any], opset: int, said: str) -> None:
    attributes = {"output_height": 2, "output_width": 2, "sampling_ratio": 2} | changes
    model = model_of(np.zeros((1, 4), np.float32), opset, **attributes)
    with pytest.raises(GraphError, match=said):
        lowered(model, 1)
