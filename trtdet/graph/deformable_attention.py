# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention (arXiv:2010.04159): how torch exports it, as TensorRT's plugin,
and in ordinary operators.

For N images, M heads of D channels, L levels of H_l x W_l cells (S in all), Q queries with P points
on each level:

    out[n, q, m] = sum over l, p of weights[n, q, m, l, p] * bilinear(value[n, level l, m],
    locations[n, q, m, l, p])

torch writes it as one GridSample for each level, whose results are joined, multiplied by the
weights and summed. Levels of D-FINE have numbers of points of their own, P_l: a level with 6 points
where another has 3 is written as two levels over the same cells. Some TensorRT versions compile
that GridSample wrongly (NVIDIA/TensorRT#4813: 10.14 and 11.1 in FP32; 10.13 and ONNX Runtime
agree). `rewrite` recognises the pattern, and writes

| mode | as | runs on |
|---|---|---|
| keep | as it was | wherever GridSample is right |
| plugin | one MultiscaleDeformableAttnPlugin_TRT | TensorRT 8.5 and later; not TensorRT-RTX |
| gather | GatherND of the four neighbours and their weights | everywhere |

and `lower` turns the plugin into the operators of "gather", for a runtime or builder that lacks it,
as `trtdet.nms.lowering.lower` does for NMS.

The plugin (NVIDIA/TensorRT, plugin/multiscaleDeformableAttnPlugin) has no attributes; its inputs
are `value` [N,S,M,D], `spatial_shapes` int32 [L,2], `level_start_index` int32 [L],
`sampling_locations` [N,Q,M,L,P,2], x before y, 0 to 1, and `attention_weights` [N,Q,M,L,P]; its
output is [N,Q,M,D]. It samples as GridSample does with align_corners=0 and zeros outside.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from trtdet.errors import GraphError
from trtdet.graph.builder import (
    COMPUTE_OPS,
    PLUGIN_DOMAIN,
    POSITIONS_PREFIX,
    Builder,
    Dims,
    Types,
    forget_domain,
    import_domain,
    known_types,
    value_info,
)
from trtdet.graph.deformable_pattern import Attention, Graph, maybe_attention
from trtdet.sources.base import cut_onnx
from trtdet.sources.subgraphs import captured

logger = logging.getLogger(__name__)


Mode = Literal["keep", "plugin", "gather"]

PLUGIN_OP = "MultiscaleDeformableAttnPlugin_TRT"
#: Version 1 is in every TensorRT that has the plugin; 2 (TensorRT 10.11) differs in the interface
#: only.
PLUGIN_VERSION = "1"

#: Where positions begin: what a layer makes is not one yet.
_LAYERS = COMPUTE_OPS | {"LayerNormalization", "ReduceMean", "Softmax", "TopK"}


def rewrite(model: onnx.ModelProto, mode: Mode) -> onnx.ModelProto:
    """The model with every deformable attention written in another way; its outputs and metadata
    stay.

    Shapes but for the batch must be inferable: `trtdet.graph.static_shapes` sees to it. A
    GridSample outside the pattern is kept, with a warning.
    """
    if mode == "keep":
        return model
    rewritten = onnx.ModelProto()
    rewritten.CopyFrom(model)
    graph = Graph(rewritten)
    build = Builder(rewritten, "")
    taken: set[str] = set()
    replaced: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type != "GridSample" or node.output[0] in taken:
            continue
        attention = maybe_attention(graph, node)
        if isinstance(attention, str):
            logger.warning(
                "GridSample '%s' stays: %s; NVIDIA/TensorRT#4813 says which TensorRT versions to avoid", node.name, attention
            )  # fmt: skip
            continue
        taken.update(sample.output[0] for sample in attention.samples)
        start = len(build.nodes)
        _insert_plugin(build, graph, attention)
        replaced[attention.output] = build.nodes[start:]
    if not replaced:
        return model
    nodes: list[onnx.NodeProto] = []
    for node in rewritten.graph.node:
        nodes.extend(replaced.get(node.output[0], [node]))
    del rewritten.graph.node[:]
    rewritten.graph.node.extend(nodes)
    rewritten.graph.initializer.extend(build.constants)
    _declare(rewritten, graph.learned)
    import_domain(rewritten, PLUGIN_DOMAIN)
    plugins = [n for made in replaced.values() for n in made if n.op_type == PLUGIN_OP]
    name_positions(rewritten, [node.input[3] for node in plugins])
    pruned = _pruned(rewritten)
    return lower(pruned) if mode == "gather" else pruned


def name_positions(
    model: onnx.ModelProto, tensors: Sequence[str], layers: Collection[str] = _LAYERS
) -> None:
    """Put `POSITIONS_PREFIX` before the names of what leads from the network's layers to the
    tensors, in place.

    Precision leaves nodes of that name in float32: FP16 resolves a position within 1333 pixels to
    half a pixel.

    Args:
        layers: operators at which the way back ends.
    """
    producer = {name: node for node in model.graph.node for name in node.output}
    public = {info.name for info in model.graph.output}
    public.update(*(captured(node) for node in model.graph.node))  # bodies of loops keep the names
    pending, renamed = list(tensors), dict[str, str]()
    while pending:
        node = producer.get(pending.pop())
        if node is None or node.output[0] in renamed:
            continue
        if node.op_type in layers and not node.name.startswith(POSITIONS_PREFIX):
            continue
        for old in node.output:
            renamed[old] = old if old in public else _position_name(old)
        node.name = _position_name(node.name)
        pending.extend(node.input)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    for info in model.graph.value_info:
        info.name = renamed.get(info.name, info.name)


def _position_name(name: str) -> str:
    return POSITIONS_PREFIX + name.removeprefix(POSITIONS_PREFIX)


def has_plugin(model: onnx.ModelProto) -> bool:
    return any(node.op_type == PLUGIN_OP for node in model.graph.node)


def lower(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with ordinary operators in place of every MultiscaleDeformableAttnPlugin_TRT.

    Raises:
        GraphError: spatial shapes that are not constant, or inputs of unknown shape.
    """
    if not has_plugin(model):
        return model
    lowered = onnx.ModelProto()
    lowered.CopyFrom(model)
    build = Builder(lowered, "")
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    wanted = [i for n in model.graph.node if n.op_type == PLUGIN_OP for i in n.input]
    types = known_types(model, wanted)
    for node in model.graph.node:
        if node.op_type == PLUGIN_OP:
            _lower_node(build, node, types, constants)
        else:
            build.nodes.append(node)
    del lowered.graph.node[:]
    build.append_to(lowered)
    forget_domain(lowered, PLUGIN_DOMAIN)
    return _pruned(lowered)


# ---- as the plugin -------------------------------------------------------------------------------


def _insert_plugin(build: Builder, graph: Graph, attention: Attention) -> None:
    """The plugin and what brings its inputs and its output into shape; ends in the tensor
    `attention.output`.
    """
    m, d, q, p = attention.heads, attention.channels, attention.queries, attention.points
    sizes = np.array(attention.sizes_hw, np.int32)
    starts = np.concatenate([[0], np.cumsum(sizes.prod(1))[:-1]]).astype(np.int32)
    parts = list(attention.parts)
    value = _value(build, graph, attention)
    locations, weights = _locations(build, graph, attention), _weights(build, graph, attention)
    if graph.constants.keys() >= {sample.input[1] for sample in attention.samples}:
        locations = _for_every_image(build, locations, value, 6)
    if attention.weights in graph.constants:
        weights = _for_every_image(build, weights, value, 5)
    inputs: dict[str, Dims] = {
        value: [None, int(sizes.prod(1).sum()), m, d],
        build.constant("attention/spatial_shapes", sizes[parts]): [len(parts), 2],
        build.constant("attention/level_start_index", starts[parts]): [len(parts)],
        locations: [None, q, m, len(parts), p, 2],
        weights: [None, q, m, len(parts), p],
    }
    graph.learned.update(inputs)
    result = build.node(
        PLUGIN_OP, "attention/plugin", *inputs, domain=PLUGIN_DOMAIN, plugin_version=PLUGIN_VERSION
    )
    # As torch has it, [N*M, D, Q]; two transposes in a row are left to the builder, which merges
    # them.
    by_head = build.node("Transpose", "attention/by_head", result, perm=[0, 2, 3, 1])
    build.output(
        build.reshape("attention/sum", by_head, [-1, d, q]),
        attention.output,
    )


def _value(build: Builder, graph: Graph, attention: Attention) -> str:
    """[N, S, M, D]: the tensor that all levels were cut from, or the levels put together again."""
    m, d = attention.heads, attention.channels
    dims = [sum(h * w for h, w in attention.sizes_hw), m, d]
    if origin := _common_origin(graph, [s.input[0] for s in attention.samples], dims):
        return origin
    levels = []
    for sample, (h, w) in zip(attention.samples, attention.sizes_hw, strict=True):
        flat = build.reshape("attention/value/level", sample.input[0], [-1, m, d, h * w])
        levels.append(
            build.node("Transpose", "attention/value/level_cells", flat, perm=[0, 3, 1, 2])
        )
    return (
        levels[0] if len(levels) == 1 else build.node("Concat", "attention/value", *levels, axis=1)
    )


def _locations(build: Builder, graph: Graph, attention: Attention) -> str:
    """[N, Q, M, L, P, 2], 0 to 1; GridSample's grids are 2 x - 1."""
    m, q, p = attention.heads, attention.queries, attention.points
    grids = [s.input[1] for s in attention.samples]
    joined = _common_origin(graph, grids, [q, m, len(attention.parts), p, 2])
    if joined is None:
        levels = []
        for grid, points in zip(grids, attention.points_of, strict=True):
            heads = build.reshape("positions/level", grid, [-1, m, q, points // p, p, 2])
            levels.append(
                build.node("Transpose", "positions/level_queries", heads, perm=[0, 2, 1, 3, 4, 5])
            )
        joined = build.node("Concat", "positions/grid", *levels, axis=3)
    elif before := _maybe_unscaled(graph, joined):
        return before
    half = build.node("Mul", "positions/half", joined, np.float32(0.5))
    return build.node("Add", "positions/locations", half, np.float32(0.5))


def _weights(build: Builder, graph: Graph, attention: Attention) -> str:
    """[N, Q, M, L, P]"""
    m, q, p = attention.heads, attention.queries, attention.points
    levels = len(attention.parts)
    if origin := graph.maybe_origin(attention.weights, [q, m, levels, p]):
        return origin
    if origin := graph.maybe_origin(attention.weights, [q, m, levels * p]):
        return build.reshape("attention/weights", origin, [-1, q, m, levels, p])
    heads = build.reshape("attention/weights/by_head", attention.weights, [-1, m, q, levels, p])
    return build.node("Transpose", "attention/weights", heads, perm=[0, 2, 1, 3, 4])


def _for_every_image(build: Builder, table: str, value: str, rank: int) -> str:
    """[1, ...] repeated: in an export with batch 1 what learned queries give in the first layer
    is a constant.
    """
    shape = build.node("Shape", "attention/value_shape", value)
    batch = build.node("Gather", "attention/batch", shape, np.array([0], np.int64), axis=0)
    ones = np.ones(rank - 1, np.int64)
    target = build.node("Concat", "attention/table_shape", batch, ones, axis=0)
    return build.node("Expand", "attention/table", table, target)


def _common_origin(graph: Graph, names: Sequence[str], dims: Sequence[int]) -> str | None:
    origins = {graph.maybe_origin(name, dims) for name in names}
    return origins.pop() if len(origins) == 1 else None


def _maybe_unscaled(graph: Graph, grid: str) -> str | None:
    """x of grid = 2 * x - 1."""
    shift = graph.producer.get(grid)
    scale = graph.producer.get(shift.input[0]) if shift is not None else None
    if (
        shift is None
        or scale is None
        or shift.op_type not in ("Sub", "Add")
        or scale.op_type != "Mul"
    ):
        return None
    offset = _scalar(graph, shift.input[1])
    factors = [(x, _scalar(graph, c)) for x, c in (scale.input[:2], scale.input[1::-1])]
    if offset != (1 if shift.op_type == "Sub" else -1):
        return None
    return next((x for x, factor in factors if factor == 2), None)


def _scalar(graph: Graph, name: str) -> float | None:
    node = graph.producer.get(name)
    if node is not None and node.op_type == "Cast":
        name = node.input[0]
    value = graph.constants.get(name)
    return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None


# ---- in ordinary operators -----------------------------------------------------------------------


def _lower_node(
    build: Builder,
    node: onnx.NodeProto,
    types: Types,
    constants: Mapping[str, NDArray[Any]],
) -> None:
    """One GatherND for each of the four neighbours of every point, weighted and summed."""
    value, shapes, level_starts, locations, weights = node.input
    if not {shapes, level_starts} <= constants.keys():
        raise GraphError(
            f"{PLUGIN_OP} '{node.name}': expected constant spatial_shapes and level_start_index, found '{shapes}' and '{level_starts}'; use the plugin, or --deformable_attention keep"
        )
    sizes = constants[shapes].astype(np.int64)  # h, w of each level
    dims = types[locations][1] if locations in types else []
    if len(dims) != 6 or not all(isinstance(x, int) for x in dims[1:]):
        raise GraphError(
            f"{PLUGIN_OP} '{node.name}': expected sampling_locations [N, queries, heads, levels, points, 2], found {dims}"
        )
    q, m, levels, p = (int(x or 0) for x in dims[1:5])
    s, d = (int(x or 0) for x in types[value][1][1:4:2])
    cells = build.node("Transpose", "attention/cells_by_head", value, perm=[0, 2, 1, 3])
    cells = build.reshape("attention/cells", cells, [-1, s, d])
    by_head = build.node("Transpose", "positions/by_head", locations, perm=[0, 2, 1, 3, 4, 5])
    position = build.reshape("positions/by_point", by_head, [-1, q, levels, p, 2])
    by_head = build.node("Transpose", "attention/weights_by_head", weights, perm=[0, 2, 1, 3, 4])
    share = build.reshape("attention/weights_of_points", by_head, [-1, q, levels, p])

    size_wh = sizes[:, None, ::-1].astype(np.float32)
    scaled = build.node("Mul", "positions/scaled", position, size_wh)
    centred = build.node("Sub", "positions/in_cells", scaled, np.float32(0.5))
    low = build.node("Floor", "positions/floor", centred)
    far = build.node("Sub", "positions/fraction", centred, low)
    near = build.node("Sub", "positions/rest", np.float32(1), far)
    starts = constants[level_starts].astype(np.int64)
    parts = []
    for dy in (0, 1):
        for dx in (0, 1):
            offset = np.array([dx, dy], np.float32)
            index, inside = _neighbour(build, low, offset, sizes, starts, [q, levels, p])
            x, y = (
                build.slice_last(f"positions/share_{axis}", far if step else near, i, i + 1)
                for i, (axis, step) in enumerate((("x", dx), ("y", dy)))
            )
            area = build.node("Mul", "positions/area", x, y)
            area = build.node("Mul", "positions/area_inside", area, inside)
            area = build.reshape("positions/area_of_points", area, [-1, q, levels, p])
            weight = build.node("Mul", "attention/neighbour_weights", share, area)
            column = build.reshape(
                "attention/neighbour_weights_column", weight, [-1, q, levels * p, 1]
            )
            found = build.node("GatherND", "attention/neighbours", cells, index, batch_dims=1)
            found = build.reshape("attention/neighbours_of_queries", found, [-1, q, levels * p, d])
            parts.append(build.node("Mul", "attention/neighbours_weighted", found, column))
    total = parts[0]
    for part in parts[1:]:
        total = build.node("Add", "attention/neighbours_sum", total, part)
    summed = build.reduce("ReduceSum", "attention/sum_of_points", total, 2, keepdims=False)
    by_image = build.reshape("attention/sum_by_head", summed, [-1, m, q, d])
    output = build.node("Transpose", "attention/sum_by_query", by_image, perm=[0, 2, 1, 3])
    build.output(output, node.output[0])


def _neighbour(
    build: Builder,
    low: str,
    offset: NDArray[np.float32],
    sizes: NDArray[np.int64],
    starts: NDArray[np.int64],
    dims: Sequence[int],
) -> tuple[str, str]:
    """Index of a neighbour cell, int64 [N*M, Q*L*P, 1], and float32 [N*M, Q, L, P, 1]: 1 where
    it is inside its level.
    """
    at = build.node("Add", "positions/neighbour", low, offset) if offset.any() else low
    last = (sizes[:, None, ::-1] - 1).astype(np.float32)
    clipped = build.node(
        "Min", "positions/clipped", build.node("Relu", "positions/not_negative", at), last
    )
    is_inside = build.node("Equal", "positions/are_inside", at, clipped)
    inside = build.cast("positions/inside_xy", is_inside, TensorProto.FLOAT)
    inside = build.reduce("ReduceMin", "positions/inside", inside, 4, keepdims=True)
    x = build.slice_last("positions/column", clipped, 0, 1)
    y = build.slice_last("positions/row", clipped, 1, 2)
    row = build.node("Mul", "positions/row_start", y, sizes[:, None, 1:].astype(np.float32))
    cell = build.node(
        "Add", "positions/cell", row, x
    )  # a whole number; float32 holds it up to 2**24
    cell = build.node(
        "Add", "positions/cell_of_all", cell, starts[:, None, None].astype(np.float32)
    )
    index = build.cast("positions/index", cell, TensorProto.INT64)
    return build.reshape("positions/index_column", index, [-1, int(np.prod(dims)), 1]), inside


def _declare(model: onnx.ModelProto, dims: Mapping[str, Dims]) -> None:
    """Say the shapes of inner float32 tensors in `value_info`, in place of what may stand there."""
    made = {name for node in model.graph.node for name in node.output}
    kept = [info for info in model.graph.value_info if info.name not in dims]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    model.graph.value_info.extend(
        value_info(name, TensorProto.FLOAT, sizes) for name, sizes in dims.items() if name in made
    )


def _pruned(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without nodes that no output needs."""
    graph = model.graph
    return cut_onnx(model, [i.name for i in graph.input], [o.name for o in graph.output])
