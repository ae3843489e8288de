# SPDX-License-Identifier: Apache-2.0
"""Deformable attention in its three forms against a NumPy reference."""

import logging

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from trtdet.errors import GraphError
from trtdet.graph.deformable_attention import PLUGIN_OP, has_plugin, lower, rewrite
from trtdet.sources.base import run_onnx

SIZES = ((5, 7), (3, 4))  # height, width of the levels
S, M, D, Q, P = 5 * 7 + 3 * 4, 2, 4, 6, 3

# As transformers' exports have it after trtdet.graph.static_shapes: names of torch's exporter,
# sizes written out.
TORCH = """
<ir_version: 8, opset_import: ["" : 16]>
attention (float[N, 47, 2, 4] value, float[N, 6, 2, 2, 3, 2] locations, float[N, 6, 2, 2, 3] weights) => (float[N, 6, 8] output)
<int64[1] zero = {0}, int64[1] first = {35}, int64[1] end = {47}, int64[1] axis_1 = {1}, int64 level_0 = {0}, int64 level_1 = {1},
 int64[3] flat = {-1, 35, 8}, int64[3] flat_1 = {-1, 12, 8}, int64[4] map = {-1, 4, 5, 7}, int64[4] map_1 = {-1, 4, 3, 4},
 int64[4] grid = {-1, 6, 3, 2}, int64[4] weight = {-1, 1, 6, 6}, int64[4] points = {-1, 4, 6, 6}, int64[3] all_heads = {-1, 8, 6},
 int64[1] last = {-1}, int64[1] before_last = {-2}, float two = {2.0}, float one = {1.0}>
{
  ["attn/Slice"] value_0 = Slice (value, zero, first, axis_1)
  ["attn/Slice_1"] value_1 = Slice (value, first, end, axis_1)
  ["attn/Mul"] doubled = Mul (two, locations)
  ["attn/Sub"] grids = Sub (doubled, one)
  ["attn/Reshape"] flat_value = Reshape (value_0, flat)
  ["attn/Transpose"] value_t = Transpose <perm = [0, 2, 1]> (flat_value)
  ["attn/Reshape_1"] value_map = Reshape (value_t, map)
  ["attn/Gather"] grid_0 = Gather <axis = 3> (grids, level_0)
  ["attn/Transpose_1"] grid_t = Transpose <perm = [0, 2, 1, 3, 4]> (grid_0)
  ["attn/Reshape_2"] grid_h = Reshape (grid_t, grid)
  ["attn/GridSample"] sampled_0 = GridSample <align_corners = 0, mode = "bilinear", padding_mode = "zeros"> (value_map, grid_h)
  ["attn/Reshape_3"] flat_value_1 = Reshape (value_1, flat_1)
  ["attn/Transpose_2"] value_t_1 = Transpose <perm = [0, 2, 1]> (flat_value_1)
  ["attn/Reshape_4"] value_map_1 = Reshape (value_t_1, map_1)
  ["attn/Gather_1"] grid_1 = Gather <axis = 3> (grids, level_1)
  ["attn/Transpose_3"] grid_t_1 = Transpose <perm = [0, 2, 1, 3, 4]> (grid_1)
  ["attn/Reshape_5"] grid_h_1 = Reshape (grid_t_1, grid)
  ["attn/GridSample_1"] sampled_1 = GridSample <align_corners = 0, mode = "bilinear", padding_mode = "zeros"> (value_map_1, grid_h_1)
  ["attn/Transpose_4"] weights_t = Transpose <perm = [0, 2, 1, 3, 4]> (weights)
  ["attn/Reshape_6"] weights_h = Reshape (weights_t, weight)
  ["attn/Unsqueeze"] level_of_0 = Unsqueeze (sampled_0, before_last)
  ["attn/Unsqueeze_1"] level_of_1 = Unsqueeze (sampled_1, before_last)
  ["attn/Concat"] stacked = Concat <axis = -2> (level_of_0, level_of_1)
  ["attn/Reshape_7"] points_of_all = Reshape (stacked, points)
  ["attn/Mul_1"] weighted = Mul (points_of_all, weights_h)
  ["attn/ReduceSum"] summed = ReduceSum <keepdims = 0> (weighted, last)
  ["attn/Reshape_8"] heads = Reshape (summed, all_heads)
  ["attn/Transpose_5"] output = Transpose <perm = [0, 2, 1]> (heads)
}
"""


# As D-FINE has it: 3 points on the first level and 6 on the second, joined along the points.
DFINE = """
<ir_version: 8, opset_import: ["" : 16]>
attention (float[N, 47, 2, 4] value, float[N, 6, 2, 9, 2] locations, float[N, 6, 2, 9] weights) => (float[N, 6, 8] output)
<int64[2] levels = {35, 12}, int64[2] counts = {3, 6}, int64[4] map = {-1, 4, 5, 7}, int64[4] map_1 = {-1, 4, 3, 4},
 int64[4] grid = {-1, 6, 9, 2}, int64[4] weight = {-1, 1, 6, 9}, int64[3] all_heads = {-1, 8, 6}, int64[1] last = {-1},
 float two = {2.0}, float one = {1.0}>
{
  ["attn/Transpose"] value_t = Transpose <perm = [0, 2, 3, 1]> (value)
  ["attn/Split"] value_0, value_1 = Split <axis = 3> (value_t, levels)
  ["attn/Reshape"] value_map = Reshape (value_0, map)
  ["attn/Reshape_1"] value_map_1 = Reshape (value_1, map_1)
  ["attn/Mul"] doubled = Mul (locations, two)
  ["attn/Sub"] grids = Sub (doubled, one)
  ["attn/Transpose_1"] grids_t = Transpose <perm = [0, 2, 1, 3, 4]> (grids)
  ["attn/Reshape_2"] grids_h = Reshape (grids_t, grid)
  ["attn/Split_1"] grid_0, grid_1 = Split <axis = 2> (grids_h, counts)
  ["attn/GridSample"] sampled_0 = GridSample <align_corners = 0, mode = "bilinear", padding_mode = "zeros"> (value_map, grid_0)
  ["attn/GridSample_1"] sampled_1 = GridSample <align_corners = 0, mode = "bilinear", padding_mode = "zeros"> (value_map_1, grid_1)
  ["attn/Transpose_2"] weights_t = Transpose <perm = [0, 2, 1, 3]> (weights)
  ["attn/Reshape_3"] weights_h = Reshape (weights_t, weight)
  ["attn/Concat"] stacked = Concat <axis = -1> (sampled_0, sampled_1)
  ["attn/Mul_1"] weighted = Mul (stacked, weights_h)
  ["attn/ReduceSum"] summed = ReduceSum <keepdims = 0> (weighted, last)
  ["attn/Reshape_4"] heads = Reshape (summed, all_heads)
  ["attn/Transpose_3"] output = Transpose <perm = [0, 2, 1]> (heads)
}
"""


def reference(value, locations, weights, levels=(0, 1)):
    """out[n, q, m * D + d], one sample after the other; `levels`: of the fourth axis of
    locations.
    """
    n = len(value)
    out = np.zeros((n, Q, M, D))
    starts = np.cumsum([0, *(h * w for h, w in SIZES)])
    for index in np.ndindex(n, Q, M, len(levels), P):
        image, query, head, part, _ = index
        level = levels[part]
        h, w = SIZES[level]
        cells = value[image, starts[level] : starts[level + 1], head].reshape(h, w, D)
        x, y = locations[index] * (w, h) - 0.5
        for row in (int(np.floor(y)), int(np.floor(y)) + 1):
            for column in (int(np.floor(x)), int(np.floor(x)) + 1):
                if 0 <= row < h and 0 <= column < w:
                    share = (1 - abs(y - row)) * (1 - abs(x - column))
                    out[image, query, head] += weights[index] * share * cells[row, column]
    return out.reshape(n, Q, M * D)


def inputs(n, seed=0, spread=(-0.2, 1.2)):
    """Locations reach beyond the edges."""
    rng = np.random.default_rng(seed)
    return {
        "value": rng.normal(size=(n, S, M, D)).astype(np.float32),
        "locations": rng.uniform(*spread, size=(n, Q, M, 2, P, 2)).astype(np.float32),
        "weights": rng.dirichlet(np.ones(2 * P), (n, Q, M))
        .reshape(n, Q, M, 2, P)
        .astype(np.float32),
    }


@pytest.fixture(scope="module")
def torch_model():
    model = parser.parse_model(TORCH)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("mode", ["keep", "plugin", "gather"])
@pytest.mark.parametrize("n", [1, 3])
def test_every_form_equals_the_reference(torch_model, mode, n):
    fed = inputs(n)
    model = lower(rewrite(torch_model, mode))
    (found,) = run_onnx(model, ["output"], fed)
    np.testing.assert_allclose(found, reference(**fed), atol=2e-6)


@pytest.mark.parametrize("mode", ["keep", "plugin", "gather"])
@pytest.mark.parametrize("n", [1, 3])
def test_levels_with_numbers_of_points_of_their_own(mode, n, caplog):
    """The second level of D-FINE's stands twice, with 3 of its 6 points each."""
    caplog.set_level(logging.WARNING)
    model = parser.parse_model(DFINE)
    onnx.checker.check_model(model, full_check=True)
    rng = np.random.default_rng(n)
    fed = {
        "value": rng.normal(size=(n, S, M, D)).astype(np.float32),
        "locations": rng.uniform(-0.2, 1.2, (n, Q, M, 9, 2)).astype(np.float32),
        "weights": rng.dirichlet(np.ones(9), (n, Q, M)).astype(np.float32),
    }
    rewritten = rewrite(model, mode)
    assert not caplog.records
    if mode == "plugin":
        (plugin,) = [node for node in rewritten.graph.node if node.op_type == PLUGIN_OP]
        constants = {t.name: numpy_helper.to_array(t) for t in rewritten.graph.initializer}
        assert constants[plugin.input[1]].tolist() == [[5, 7], [3, 4], [3, 4]]
        assert constants[plugin.input[2]].tolist() == [0, 35, 35]
        assert plugin.input[0] == "value"
    (found,) = run_onnx(lower(rewritten), ["output"], fed)
    parts = fed["locations"].reshape(n, Q, M, 3, P, 2), fed["weights"].reshape(n, Q, M, 3, P)
    np.testing.assert_allclose(found, reference(fed["value"], *parts, (0, 1, 1)), atol=2e-6)


def test_corners_and_centres_of_cells(torch_model):
    """Positions on the borders, where a rounding error would take another cell, and far outside."""
    fed = inputs(1)
    marks = np.array([0, 0.5, 1, 1 / 7, 3 / 14, 6.5 / 7, -3, 5], np.float32)
    fed["locations"] = np.random.default_rng(1).choice(marks, fed["locations"].shape)
    (found,) = run_onnx(rewrite(torch_model, "gather"), ["output"], fed)
    np.testing.assert_allclose(found, reference(**fed), atol=2e-6)


def test_the_plugin_reads_the_tensors_that_the_levels_were_cut_from(torch_model):
    model = rewrite(torch_model, "plugin")
    (plugin,) = [node for node in model.graph.node if node.op_type == PLUGIN_OP]
    assert (plugin.domain, len(plugin.input), len(plugin.output)) == ("trt.plugins", 5, 1)
    assert [plugin.input[i] for i in (0, 3, 4)] == ["value", "locations", "weights"]
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    np.testing.assert_array_equal(constants[plugin.input[1]], SIZES)
    np.testing.assert_array_equal(constants[plugin.input[2]], [0, 35])
    assert constants[plugin.input[1]].dtype == constants[plugin.input[2]].dtype == np.int32
    attributes = {a.name: helper.get_attribute_value(a) for a in plugin.attribute}
    assert attributes == {"plugin_version": b"1"}  # it has no others
    assert not {node.op_type for node in model.graph.node} & {"GridSample", "Gather", "Slice"}


def test_levels_that_come_from_elsewhere_are_put_together(torch_model):
    """Nothing but GridSample and what follows is as torch has it."""
    model = onnx.ModelProto()
    model.CopyFrom(torch_model)
    for node in model.graph.node:  # an operator that only the numbers pass
        if node.name in ("attn/Slice", "attn/Gather", "attn/Transpose_4"):
            made = node.output[0]
            node.output[0] = f"{made}/same"
            model.graph.node.append(helper.make_node("Abs", [f"{made}/same"], [made]))
    order = {"value_0": 0, "grid_0": 0, "weights_t": 0}
    nodes = sorted(model.graph.node, key=lambda node: 0 if node.op_type in ("Slice", "Mul", "Sub", "Gather") and node.name != "attn/Mul_1" else 1 if order.get(node.output[0]) == 0 or node.name == "attn/Transpose_4" else 2)  # fmt: skip
    absolutes = [node for node in nodes if node.op_type == "Abs"]
    others = [node for node in nodes if node.op_type != "Abs"]
    place = 1 + max(
        i
        for i, node in enumerate(others)
        if node.name in ("attn/Slice", "attn/Gather", "attn/Transpose_4")
    )
    del model.graph.node[:]
    model.graph.node.extend([*others[:place], *absolutes, *others[place:]])
    fed = inputs(2)
    (expected,) = run_onnx(model, ["output"], fed)
    rewritten = rewrite(model, "plugin")
    assert has_plugin(rewritten)
    (found,) = run_onnx(lower(rewritten), ["output"], fed)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("align_corners = 0", "align_corners = 1", "expected align_corners=0"),
        ('"zeros"', '"border"', "expected bilinear sampling with zeros outside"),
        ("Concat <axis = -2>", "Max", "expected a Concat of all levels"),
    ],
)
def test_another_use_of_gridsample_is_kept(old, new, reason, caplog):
    text = TORCH.replace(old, new)
    if new == "Max":
        text = text.replace(
            "int64[4] points = {-1, 4, 6, 6}", "int64[4] points = {-1, 4, 6, 3}"
        ).replace("(weights_t, weight)", "(weights_t, weight)")
    with caplog.at_level(logging.WARNING):
        model = rewrite(parser.parse_model(text), "gather")
    assert sum(node.op_type == "GridSample" for node in model.graph.node) == 2
    assert reason in caplog.text and "attn/GridSample" in caplog.text


def test_metadata_stays(torch_model):
    model = onnx.ModelProto()
    model.CopyFrom(torch_model)
    model.metadata_props.add(key="k", value="v")
    assert [p.key for p in rewrite(model, "gather").metadata_props] == ["k"]


def test_lowering_needs_constant_shapes():
    info = {
        "value": [1, S, M, D],
        "shapes": [2, 2],
        "starts": [2],
        "locations": [1, Q, M, 2, P, 2],
        "weights": [1, Q, M, 2, P],
    }
    node = helper.make_node(PLUGIN_OP, list(info), ["out"], "attention", domain="trt.plugins")
    types = {"shapes": TensorProto.INT32, "starts": TensorProto.INT32}
    graph = helper.make_graph(
        [node],
        "plugin",
        [
            helper.make_tensor_value_info(k, types.get(k, TensorProto.FLOAT), v)
            for k, v in info.items()
        ],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, Q, M, D])],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("trt.plugins", 1)]
    )
    with pytest.raises(GraphError, match="expected constant spatial_shapes and level_start_index"):
        lower(model)
