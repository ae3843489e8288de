# SPDX-License-Identifier: Apache-2.0
"""What operators do with rows some of which do not count: rules of `trtdet.nms.static_rows`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from trtdet.nms.candidates import TENSORRT_TOPK

if TYPE_CHECKING:
    from trtdet.nms.static_rows import Lowering

#: Stands for the largest of no numbers; products with class numbers stay finite.
NONE_OF_THEM = 1e30

Array = NDArray[Any]


@dataclass(frozen=True)
class Rows:
    """Which rows of a tensor count.

    Attributes:
        axis: along which they lie.
        mask: a tensor [n], bool.
        first: those that count come first.
    """

    axis: int
    mask: str
    first: bool = False


@dataclass(frozen=True)
class Known:
    """What is known of a tensor.

    Attributes:
        value: of a constant.
    """

    shape: tuple[int, ...]
    elem_type: int
    value: Array | None = None
    rows: Rows | None = None


Rule = Callable[["Lowering", onnx.NodeProto], None]


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    for a in node.attribute:
        if a.name == name:
            return helper.get_attribute_value(a)
    return default


def _rows_of(low: "Lowering", name: str) -> Rows:
    rows = low.known[name].rows
    assert rows is not None
    return rows


def _elementwise(low: "Lowering", node: onnx.NodeProto) -> None:
    names = [name for name in node.input if name]
    rank = max(len(low.known[name].shape) for name in names)
    low.keep_rows(node, low.both(node, names, rank))


def _gather(low: "Lowering", node: onnx.NodeProto) -> None:
    data, index = (low.known[name] for name in node.input)
    axis = _attribute(node, "axis", 0) % len(data.shape)
    if index.rows:
        if _is_every(index.value, data.shape[axis]) and len(index.shape) == 1:
            _pass_on(low, node, replace(index.rows, axis=axis))
        else:
            low.keep_rows(node, replace(index.rows, axis=axis + index.rows.axis))
        return
    rows = _rows_of(low, node.input[0])
    if rows.axis == axis:
        raise low.unknown(node, "by fixed positions")
    moved = rows.axis if rows.axis < axis else rows.axis + len(index.shape) - 1
    low.keep_rows(node, replace(rows, axis=moved))


def _gather_nd(low: "Lowering", node: onnx.NodeProto) -> None:
    data, index = (low.known[name] for name in node.input)
    if index.rows is None or index.rows.axis != 0 or _attribute(node, "batch_dims", 0):
        raise low.unknown(node)
    is_every = index.shape[1:] == (1,) and _is_every(index.value, data.shape[0])
    if is_every:
        _pass_on(low, node, index.rows)
    else:
        low.keep_rows(node, index.rows)


def _is_every(index: Array | None, count: int) -> bool:
    """Whether an index takes all rows, in their order."""
    return index is not None and index.size == count and bool((index.ravel() == np.arange(count)).all())  # fmt: skip


def _pass_on(low: "Lowering", node: onnx.NodeProto, rows: Rows) -> None:
    """The first input as it is, with the rows of the index."""
    data = low.known[node.input[0]]
    if data.value is not None:
        low.constant(node.output[0], data.value, rows)
    else:
        low.renamed(node.input[0], node.output[0], rows)


def _top_k(low: "Lowering", node: onnx.NodeProto) -> None:
    known, k = low.known[node.input[0]], low.maybe_value(node.input[1])
    rows, rank = _rows_of(low, node.input[0]), len(known.shape)
    axis = _attribute(node, "axis", -1) % rank
    if k is None or axis != rows.axis or max(known.shape) != known.shape[axis]:
        raise low.unknown(node)
    sides = [1] * rank
    sides[axis] = -1
    mask = low.made("Reshape", "mask", rows.mask, np.array(sides, np.int64))
    dtype = helper.tensor_dtype_to_np_dtype(known.elem_type)
    limits = np.finfo(dtype) if np.issubdtype(dtype, np.floating) else np.iinfo(np.int32)
    last = limits.min if _attribute(node, "largest", 1) else limits.max
    masked = low.made("Where", "counted", mask, node.input[0], np.array(last, dtype))
    count = min(int(k.reshape(-1)[0]), known.shape[axis])
    if count > TENSORRT_TOPK:
        raise low.unknown(node, f"the best {count}, beyond TensorRT's {TENSORRT_TOPK}")
    sizes = low.own("k", np.array([count], np.int64))
    found = onnx.NodeProto()
    found.CopyFrom(node)
    found.input[:] = [masked, sizes]
    low.keep(found)
    flat = low.made("Reshape", "positions", node.output[1], np.array([-1], np.int64))
    chosen = low.made("Gather", "mask", rows.mask, flat, axis=0)
    kept = Rows(axis, chosen, first=True)
    for name in node.output:
        low.known[name] = replace(low.known[name], rows=kept)


def _slice(low: "Lowering", node: onnx.NodeProto) -> None:
    rows, shape = _rows_of(low, node.input[0]), low.known[node.input[0]].shape
    values = [low.maybe_value(name) for name in node.input[1:]]
    if any(v is None for v in values):
        raise low.unknown(node)
    starts, ends, *rest = ([int(x) for x in v.reshape(-1)] for v in values if v is not None)
    axes = rest[0] if rest else [*range(len(starts))]
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if axis % len(shape) != rows.axis:
            continue
        n = shape[rows.axis]
        if start != 0 or step != 1 or end < 0:
            raise low.unknown(node)
        if end < n:
            if not rows.first:
                raise low.unknown(node, "the first of rows in no order")
            bounds = [np.array([x], np.int64) for x in (0, end, 0)]
            rows = replace(rows, mask=low.made("Slice", "mask", rows.mask, *bounds))
    low.keep_rows(node, rows)


def _transpose(low: "Lowering", node: onnx.NodeProto) -> None:
    rows, rank = _rows_of(low, node.input[0]), len(low.known[node.input[0]].shape)
    perm = list(_attribute(node, "perm", range(rank)[::-1]))
    low.keep_rows(node, replace(rows, axis=perm.index(rows.axis)))


def _reshaped(low: "Lowering", node: onnx.NodeProto) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze: the axis before which there are as many numbers."""
    rows, shape = _rows_of(low, node.input[0]), low.known[node.input[0]].shape
    (_, out), n = low.inferred(node)[node.output[0]], shape[rows.axis]
    before = int(np.prod(shape[: rows.axis]))
    at = next((i for i, size in enumerate(out) if _begins(out, i, before, size, n)), None)
    if at is None:
        raise low.unknown(node, f"{list(shape)} to {list(out)}")
    times = out[at] // n
    if times > 1:
        column = low.made("Reshape", "mask_column", rows.mask, np.array([-1, 1], np.int64))
        wide = low.made("Expand", "mask_wide", column, np.array([n, times], np.int64))
        rows = Rows(at, low.made("Reshape", "mask", wide, np.array([-1], np.int64)))
    low.keep_rows(node, replace(rows, axis=at))


def _begins(out: tuple[int, ...], i: int, before: int, size: int, n: int) -> bool:
    """Whether axis i of a new shape holds `n` rows, each once or several times."""
    return int(np.prod(out[:i])) == before and size % n == 0 and (size > 1 or n == 1) and size >= n


def _concat(low: "Lowering", node: onnx.NodeProto) -> None:
    rank = len(low.known[node.input[0]].shape)
    axis = _attribute(node, "axis", 0) % rank
    axes = {known.rows.axis for name in node.input if (known := low.known[name]).rows}
    if axes != {axis}:
        low.keep_rows(node, low.both(node, [n for n in node.input if low.known[n].rows], rank))
        return
    masks = []
    for name in node.input:
        known = low.known[name]
        every = np.ones(known.shape[axis], bool)
        masks.append(known.rows.mask if known.rows else low.own("every", every))
    mask = low.made("Concat", "mask", *masks, axis=0)
    low.keep_rows(node, Rows(axis, mask))


def _split(low: "Lowering", node: onnx.NodeProto) -> None:
    rows, rank = _rows_of(low, node.input[0]), len(low.known[node.input[0]].shape)
    if _attribute(node, "axis", 0) % rank == rows.axis:
        raise low.unknown(node)
    low.keep_rows(node, rows)


def _expand(low: "Lowering", node: onnx.NodeProto) -> None:
    shape = low.maybe_value(node.input[1])
    known = low.known[node.input[0]]
    if shape is None or known.rows is None:
        raise low.unknown(node)
    rank = max(len(shape), len(known.shape))
    low.keep_rows(node, low.both(node, [node.input[0]], rank))


def _reduce(low: "Lowering", node: onnx.NodeProto) -> None:
    known, rows = low.known[node.input[0]], _rows_of(low, node.input[0])
    rank = len(known.shape)
    axes = _attribute(node, "axes", None)
    if axes is None and len(node.input) > 1 and node.input[1]:
        value = low.maybe_value(node.input[1])
        axes = None if value is None else value.tolist()
    axes = [a % rank for a in axes] if axes is not None else [*range(rank)]
    if rows.axis not in axes:
        keeps = _attribute(node, "keepdims", 1)
        moved = rows.axis - (0 if keeps else sum(a < rows.axis for a in axes))
        low.keep_rows(node, replace(rows, axis=moved))
        return
    neutral = {"ReduceMax": -NONE_OF_THEM, "ReduceMin": NONE_OF_THEM, "ReduceSum": 0.0}
    if node.op_type not in neutral or known.elem_type != TensorProto.FLOAT:
        raise low.unknown(node, "over the rows")
    sides = [1] * rank
    sides[rows.axis] = -1
    mask = low.made("Reshape", "mask", rows.mask, np.array(sides, np.int64))
    filled = low.made("Where", "counted", mask, node.input[0], np.float32(neutral[node.op_type]))
    reduced = onnx.NodeProto()
    reduced.CopyFrom(node)
    reduced.input[0] = filled
    low.keep(reduced)


def _scatter(low: "Lowering", node: onnx.NodeProto) -> None:
    """data, with some rows replaced."""
    data, index, updates = (low.known[name] for name in node.input)
    by_rows = node.op_type == "ScatterND" or _attribute(node, "axis", 0) == 0
    rows = index.rows
    positions = None if index.value is None else index.value.reshape(index.shape[0], -1)
    every = np.arange(data.shape[0])[:, None]
    is_every = positions is not None and len(positions) == data.shape[0] and bool((positions == every).all())  # fmt: skip
    if rows is None or rows.axis != 0 or not by_rows or not is_every or updates.shape != data.shape:
        raise low.unknown(node)
    sides = np.array([-1, *[1] * (len(data.shape) - 1)], np.int64)
    mask = low.made("Reshape", "mask", rows.mask, sides)
    made = low.made("Where", "replaced", mask, node.input[2], node.input[0])
    low.renamed(made, node.output[0], data.rows)


def _by_rows(low: "Lowering", node: onnx.NodeProto) -> None:
    """Layers on rows: convolutions, products with weights."""
    rows = _rows_of(low, node.input[0])
    if rows.axis != 0 or any(low.known[n].rows for n in node.input[1:] if n):
        raise low.unknown(node)
    low.keep_rows(node, rows)


def _softmax(low: "Lowering", node: onnx.NodeProto) -> None:
    rows, rank = _rows_of(low, node.input[0]), len(low.known[node.input[0]].shape)
    if _attribute(node, "axis", -1) % rank == rows.axis:
        raise low.unknown(node)
    low.keep_rows(node, rows)


ELEMENTWISE = (
    "Identity", "Cast", "Not", "Relu", "LeakyRelu", "Exp", "Log", "Sqrt", "Floor", "Ceil", "Round", "Abs", "Neg",
    "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Clip", "Reciprocal", "Add", "Sub", "Mul", "Div", "Mod", "Pow",
    "Min", "Max", "And", "Or", "Xor", "Sign", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Where",
)  # fmt: skip
BROADCASTING = frozenset(("Where", "Add", "Sub", "Mul", "Div", "Min", "Max", "Greater", "Equal"))
RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshaped),
    **dict.fromkeys(("ReduceMax", "ReduceMin", "ReduceSum", "ReduceProd", "ReduceMean", "ArgMax"), _reduce),
    **dict.fromkeys(("Gemm", "MatMul", "Conv", "ConvTranspose", "BatchNormalization", "GlobalAveragePool", "MaxPool", "AveragePool"), _by_rows),
    **dict.fromkeys(("ScatterElements", "ScatterND"), _scatter),
    "Gather": _gather, "GatherND": _gather_nd, "TopK": _top_k, "Slice": _slice, "Transpose": _transpose, "Concat": _concat, "Split": _split,
    "Expand": _expand, "Softmax": _softmax, "RoiAlign": lambda low, node: low.roialign(node),
}  # fmt: skip
