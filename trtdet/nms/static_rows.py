# SPDX-License-Identifier: Apache-2.0
"""A model that selects as many boxes as a picture has, with shapes that do not follow the picture.

TensorRT-RTX has neither NonZero nor NonMaxSuppression, and no RoiAlign. Here no row is ever left
out: a tensor keeps all rows that it may have, and a mask beside it says which of them count.

| operator | becomes |
|---|---|
| NonZero(x) | every index, and x for the mask |
| Gather, GatherND by such indices | all rows, with the mask |
| TopK | TopK of the scores with the lowest number where the mask is false |
| NonMaxSuppression | rounds of suppression, as in `trtdet.nms.lowering`; survivors first |
| ScatterElements, ScatterND of such rows | Where(mask, updates, data) |
| If, on how many there are | the branch for at least one |
| Shape and what follows from it | constants |

A rule that is not known is an error, never a guess; and stage 1 compares what comes out with the
source.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from trtdet.errors import GraphError
from trtdet.graph.builder import POSITIONS_PREFIX, Builder
from trtdet.graph.roi_align import lower_node as lower_roi_align
from trtdet.nms.lowering import (
    GRAPH_CANDIDATES,
    TENSORRT_TOPK,
    Candidates,
    pairwise_iou,
    suppress_by_rounds,
)
from trtdet.sources.base import constants_of, run_onnx
from trtdet.sources.subgraphs import subgraphs
from trtdet.spec import Nms

#: Operators whose result has as many rows as the picture has of something.
DATA_SIZED = frozenset(("NonMaxSuppression", "NonZero", "Compress", "Unique"))
#: Suppression rounds; see `trtdet.nms.lowering.lower`.
ROUNDS = 32
#: Stands for the largest of no numbers; products with class numbers stay finite.
NONE_OF_THEM = 1e30
#: Larger constants of one value stay one value, where that is broadcast.
MANY = 4096

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


def maybe_data_sized(model: onnx.ModelProto) -> onnx.NodeProto | None:
    """An operator whose result has as many rows as the picture has of something, in bodies of If
    and Loop too; not the NMS behind the heads.
    """
    pending = [node for node in model.graph.node if not node.name.startswith("nms/")]
    while pending:
        node = pending.pop()
        if node.op_type in DATA_SIZED:
            return node
        for body in subgraphs(node):
            pending.extend(body.node)
    return None


def make_static(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with shapes that do not follow the picture, for inputs of the size that it
    declares.

    Args:
        model: not touched; opset 16 or later.

    Raises:
        GraphError: an operator on rows that there is no rule for.
    """
    return _Lowering(model).run()


class _Lowering:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.build = Builder(self.model, f"{POSITIONS_PREFIX}rows/")
        self.opset = self.build.opset
        self.known: dict[str, Known] = {}
        self.written: set[str] = set()
        self.number = 0
        self.kept_of = _kept_of(self.model)

    def run(self) -> onnx.ModelProto:
        graph = self.model.graph
        for tensor in graph.initializer:
            value = numpy_helper.to_array(tensor)
            self.known[tensor.name] = Known(value.shape, tensor.data_type, value)
            self.written.add(tensor.name)
        for info in graph.input:
            if info.name not in self.known:
                dims = tuple(d.dim_value for d in info.type.tensor_type.shape.dim)
                if 0 in dims:
                    raise GraphError(
                        f"'{info.name}': expected an input of one size, found {list(dims)}"
                    )
                self.known[info.name] = Known(dims, info.type.tensor_type.elem_type)
        self._nodes(graph.node)
        outputs = [o.name for o in graph.output]
        for name in outputs:
            if self.known[name].value is not None and name not in self.written:
                raise GraphError(f"'{name}' is a constant: it does not follow from the picture")
        del graph.node[:]
        del graph.value_info[:]
        self.build.append_to(self.model)
        for info in graph.output:
            known = self.known[info.name]
            shape = list(known.shape)
            info.CopyFrom(helper.make_tensor_value_info(info.name, known.elem_type, shape))
        used = {name for node in graph.node for name in node.input} | {*outputs}
        kept = [t for t in graph.initializer if t.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        return self.model

    def _nodes(self, nodes: Sequence[onnx.NodeProto]) -> None:
        for node in nodes:
            self._node(node)

    def _node(self, node: onnx.NodeProto) -> None:
        if node.op_type == "If":
            self._inline(node)
            return
        if any(True for _ in subgraphs(node)):
            raise GraphError(f"{node.op_type} '{node.name}': a body is not taken apart")
        inputs = [self.known[name] for name in node.input if name]
        if node.op_type in ("Shape", "Size"):
            self._shape(node)
        elif node.op_type == "ConstantOfShape" and inputs[0].value is not None:
            self._filled(node, inputs[0].value)
        elif node.op_type in DATA_SIZED:
            rule = getattr(self, f"_{node.op_type.lower()}", None)
            if rule is None:
                raise self._unknown(node)
            rule(node)
        elif any(known.rows for known in inputs):
            self._on_rows(node)
        elif (
            inputs and all(known.value is not None for known in inputs)
        ) or node.op_type == "Constant":
            self._fold(node)
        elif node.op_type == "RoiAlign":
            self._roialign(node)
        else:
            self._keep(node)

    # ---- constants and shapes

    def _constant(self, name: str, value: Array, rows: Rows | None = None) -> None:
        elem_type = helper.np_dtype_to_tensor_dtype(value.dtype)
        self.known[name] = Known(value.shape, elem_type, value, rows)

    def _shape(self, node: onnx.NodeProto) -> None:
        shape = np.array(self.known[node.input[0]].shape, np.int64)
        if node.op_type == "Size":
            self._constant(node.output[0], np.array(shape.prod(), np.int64))
            return
        bounds = {a.name: a.i for a in node.attribute}
        self._constant(
            node.output[0], shape[bounds.get("start", 0) : bounds.get("end", len(shape))]
        )

    def _filled(self, node: onnx.NodeProto, shape: Array) -> None:
        tensors = [numpy_helper.to_array(a.t) for a in node.attribute if a.name == "value"]
        value = tensors[0].reshape(-1)[0] if tensors else np.float32(0)
        self._constant(node.output[0], np.broadcast_to(value, tuple(shape.tolist())))

    def _fold(self, node: onnx.NodeProto) -> None:
        for name, value in zip(node.output, self._values(node), strict=True):
            if name:
                self._constant(name, value)

    def _values(self, node: onnx.NodeProto) -> list[Array]:
        """The results of a node of constants; what only moves them costs no memory."""
        values = [self.known[name].value if name else None for name in node.input]
        op, first = node.op_type, values[0] if values else None
        if op == "Identity" and first is not None:
            return [first]
        if op == "Expand" and first is not None and values[1] is not None:
            shape = np.broadcast_shapes(first.shape, tuple(values[1].tolist()))
            return [np.broadcast_to(first, shape)]
        alone = helper.make_graph(
            [node], "constant", [], [onnx.ValueInfoProto(name=n) for n in node.output if n],
            [numpy_helper.from_array(np.ascontiguousarray(v).reshape(v.shape), n)
             for n, v in dict(zip(node.input, values, strict=True)).items() if n and v is not None],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(alone, opset_imports=opsets, ir_version=8)
        wanted = [name for name in node.output if name]
        found = dict(zip(wanted, run_onnx(model, wanted, {}), strict=True))
        return [found.get(name, np.zeros(0)) for name in node.output]

    def _written(self, name: str, *, broadcast: bool = False) -> str:
        """A tensor that a node may read: constants become initializers."""
        if not name:
            return name
        known = self.known[name]
        if known.value is None or name in self.written:
            return name
        value = known.value
        if broadcast and value.size > MANY and (value == value.flat[0]).all():
            return self.build.constant(f"{name}/all", value.flat[0].reshape([1] * value.ndim))
        self.build.constants.append(
            numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name)
        )
        self.written.add(name)
        return name

    # ---- nodes as they are

    def _keep(self, node: onnx.NodeProto, rows: Rows | None = None) -> None:
        """Write a node; its results have the shapes that ONNX infers."""
        kept = onnx.NodeProto()
        kept.CopyFrom(node)
        broadcast = node.op_type in BROADCASTING
        kept.input[:] = [self._written(name, broadcast=broadcast) for name in node.input]
        self.build.nodes.append(kept)
        for name, (elem_type, shape) in self._inferred(node).items():
            self.known[name] = Known(shape, elem_type, None, rows)

    def _inferred(self, node: onnx.NodeProto) -> dict[str, tuple[int, tuple[int, ...]]]:
        infos, constants = [], []
        for name in dict.fromkeys(n for n in node.input if n):
            known = self.known[name]
            if known.value is not None and known.value.size <= MANY:
                value = np.ascontiguousarray(known.value).reshape(known.shape)
                constants.append(numpy_helper.from_array(value, name))
            else:
                infos.append(helper.make_tensor_value_info(name, known.elem_type, known.shape))
        wanted = [name for name in node.output if name]
        outputs = [onnx.ValueInfoProto(name=name) for name in wanted]
        graph = helper.make_graph([node], "one", infos, outputs, constants)
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        found = {}
        for info in inferred.graph.output:
            tensor = info.type.tensor_type
            dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
            if not tensor.HasField("shape") or None in dims:
                raise GraphError(
                    f"{node.op_type} '{node.name}': the shape of '{info.name}' follows the picture"
                )
            found[info.name] = (tensor.elem_type, tuple(d for d in dims if d is not None))
        return found

    def _made(self, op: str, name: str, *operands: Any, **attributes: Any) -> str:
        """A node of our own; its result is known by ONNX's inference."""
        names = [o if isinstance(o, str) else self._own(name, o) for o in operands]
        self.number += 1
        output = f"{self.build.prefix}{name}_{self.number}"
        node = helper.make_node(op, names, [output], output, **attributes)
        self._keep(node)
        return output

    def _own(self, name: str, value: Any) -> str:
        array = np.asarray(value)
        self.number += 1
        full = f"{self.build.prefix}{name}_constant_{self.number}"
        self._constant(full, array)
        return full

    def _renamed(self, tensor: str, name: str, rows: Rows | None) -> None:
        """Give a result its name in the graph."""
        self.build.nodes.append(helper.make_node("Identity", [tensor], [name], name))
        self.known[name] = replace(self.known[tensor], value=None, rows=rows)

    def _unknown(self, node: onnx.NodeProto, why: str = "") -> GraphError:
        return GraphError(
            f"{node.op_type} '{node.name}' on rows whose number follows the picture{': ' if why else ''}{why}: "
            "there is no form of it with fixed shapes"
        )

    # ---- control flow

    def _inline(self, node: onnx.NodeProto) -> None:
        """The branch that a constant condition takes."""
        condition = self.known[node.input[0]].value
        if condition is None:
            raise GraphError(f"If '{node.name}': its condition follows the picture")
        taken = "then_branch" if bool(condition.reshape(-1)[0]) else "else_branch"
        (body,) = [a.g for a in node.attribute if a.name == taken]
        for tensor in body.initializer:
            value = numpy_helper.to_array(tensor)
            self.known[tensor.name] = Known(value.shape, tensor.data_type, value)
        self._nodes(body.node)
        for inner, outer in zip(body.output, node.output, strict=True):
            known = self.known[inner.name]
            if known.value is not None:
                self.known[outer] = known
            else:
                self._renamed(inner.name, outer, known.rows)

    # ---- where rows come from

    def _nonzero(self, node: onnx.NodeProto) -> None:
        known = self.known[node.input[0]]
        if known.value is not None and known.rows is None:
            self._constant(node.output[0], np.stack(np.nonzero(known.value)).astype(np.int64))
            return
        counts = self._made("Cast", "counts", node.input[0], to=TensorProto.BOOL)
        if known.rows:
            sides = [1] * len(known.shape)
            sides[known.rows.axis] = -1
            mask = self._made("Reshape", "mask", known.rows.mask, np.array(sides, np.int64))
            counts = self._made("And", "counts_of_rows", counts, mask)
        mask = self._made("Reshape", "mask", counts, np.array([-1], np.int64))
        index = np.indices(known.shape).reshape(len(known.shape), -1).astype(np.int64)
        self._constant(node.output[0], index, Rows(1, mask))

    def _nonmaxsuppression(self, node: onnx.NodeProto) -> None:
        boxes, scores = (self.known[name] for name in node.input[:2])
        most, overlap, least = [*(self._maybe_value(name) for name in node.input[2:]), *[None] * 3][
            :3
        ]
        if boxes.shape[0] != 1 or any(a.name == "center_point_box" and a.i for a in node.attribute):
            raise self._unknown(node, "of several pictures, or of centres")
        _, classes, n = scores.shape
        pairs = classes * n
        count = min(pairs, self._candidates(node))
        limit = int(most.reshape(-1)[0]) if most is not None else 0
        value, lowest = node.input[1], np.float32(np.finfo(np.float32).min)
        rows = scores.rows or boxes.rows
        if rows:
            mask = self._made("Reshape", "mask", rows.mask, np.array([1, 1, -1], np.int64))
            value = self._made("Where", "scores", mask, value, lowest)
        flat = self._made("Reshape", "scores_flat", value, np.array([1, -1], np.int64))
        score, index = self._top_k(flat, count)
        above = (
            np.nextafter(lowest, np.float32(0))
            if least is None
            else np.float32(least.reshape(-1)[0])
        )
        valid = self._made("Greater", "valid", score, above)
        rank = self._made("Where", "ranks", valid, np.arange(count, 0, -1, dtype=np.float32)[None], np.float32(0))  # fmt: skip
        class_id = self._made("Div", "classes", index, np.int64(n))
        start = self._made("Mul", "class_starts", class_id, np.int64(n))
        anchor = self._made("Sub", "anchors", index, start)
        survives = self._survivors(node, anchor, class_id, rank, score, count, overlap, classes)
        if classes > 1 and limit < n:
            survives = self._most_of_each(survives, class_id, rank, limit)
        ranked = self._made("Mul", "survivor_ranks", survives, rank)
        best, order = self._top_k(ranked, count)
        positive = self._made("Greater", "survivors", best, np.float32(0))
        mask = self._made("Reshape", "mask", positive, np.array([-1], np.int64))
        columns = [self._made("Mul", "pictures", order, np.int64(0))]
        for tensor in (class_id, anchor):
            columns.append(self._made("GatherElements", "chosen", tensor, order, axis=1))
        columns = [self._made("Reshape", "column", c, np.array([-1, 1], np.int64)) for c in columns]
        chosen = self._made("Concat", "selected", *columns, axis=1)
        if classes == 1 and 0 < limit < count:
            bounds = [np.array([x], np.int64) for x in (0, limit, 0)]
            chosen = self._made("Slice", "selected_first", chosen, *bounds)
            mask = self._made("Slice", "mask_first", mask, *bounds)
        # Of several classes, ONNX lists one class after the other.
        self._renamed(chosen, node.output[0], Rows(0, mask, first=classes == 1))

    def _candidates(self, node: onnx.NodeProto) -> int:
        """How many boxes are looked at: as many as TensorRT's TopK takes, or fewer where the
        model keeps few of the survivors.
        """
        kept = self.kept_of.get(node.output[0])
        return (
            TENSORRT_TOPK if kept is None else min(TENSORRT_TOPK, max(GRAPH_CANDIDATES, 4 * kept))
        )

    def _survivors(
        self, node: onnx.NodeProto, anchor: str, class_id: str, rank: str, score: str,
        count: int, overlap: Array | None, classes: int,
    ) -> str:  # fmt: skip
        """[1, count] float32: 1 where a candidate survives."""
        boxes = self._made("Reshape", "boxes", node.input[0], np.array([-1, 4], np.int64))
        flat = self._made("Reshape", "anchors_flat", anchor, np.array([-1], np.int64))
        taken = self._made("Gather", "candidate_boxes", boxes, flat, axis=0)
        corners = self._made("Reshape", "corners", taken, np.array([1, count, 4], np.int64))
        iou = pairwise_iou(self.build, corners)
        threshold = 0.0 if overlap is None else float(np.asarray(overlap).reshape(-1)[0])
        # What overlaps by exactly the threshold stays in ONNX's operator.
        above = float(np.nextafter(np.float32(threshold), np.float32(np.inf)))
        nms = Nms(iou_threshold=min(above, 1.0), class_agnostic=classes == 1)
        found = Candidates(count, classes, score, anchor, class_id, rank)
        survives = suppress_by_rounds(self.build, iou, found, nms, ROUNDS)
        self.known[survives] = Known((1, count), TensorProto.FLOAT)
        return survives

    def _most_of_each(self, survives: str, class_id: str, rank: str, limit: int) -> str:
        """Survivors before which there are fewer than `limit` of the same class."""
        ones = [np.array(x, np.int64) for x in ([1, -1, 1], [1, 1, -1])]
        ranks = [self._made("Reshape", "ranks_of_pairs", rank, shape) for shape in ones]
        classes = [self._made("Reshape", "classes_of_pairs", class_id, shape) for shape in ones]
        better = self._made("Greater", "better_of_pairs", *ranks)
        same = self._made("Equal", "same_of_pairs", *classes)
        before = self._made("And", "before_of_pairs", better, same)
        matrix = self._made("Cast", "before_matrix", before, to=TensorProto.FLOAT)
        row = self._made("Reshape", "survivors_row", survives, np.array([1, 1, -1], np.int64))
        number = self._made("MatMul", "number_before", row, matrix)
        flat = self._made("Reshape", "number_flat", number, np.array([1, -1], np.int64))
        few = self._made("Less", "is_among_first", flat, np.float32(limit - 0.5))
        return self._made("Where", "first_survivors", few, survives, np.float32(0))

    def _top_k(self, tensor: str, k: int) -> tuple[str, str]:
        self.number += 1
        outputs = [
            f"{self.build.prefix}best_{self.number}/{part}" for part in ("values", "indices")
        ]
        sizes = self._own("k", np.array([k], np.int64))
        node = helper.make_node(
            "TopK", [tensor, sizes], outputs, f"{self.build.prefix}best_{self.number}"
        )
        self._keep(node)
        return outputs[0], outputs[1]

    def _maybe_value(self, name: str) -> Array | None:
        return self.known[name].value if name else None

    # ---- what is done with rows

    def _on_rows(self, node: onnx.NodeProto) -> None:
        rule = RULES.get(node.op_type)
        if rule is None:
            raise self._unknown(node)
        rule(self, node)

    def _keep_rows(self, node: onnx.NodeProto, rows: Rows) -> None:
        """Write or fold a node whose result has these rows."""
        inputs = [self.known[name] for name in node.input if name]
        if all(known.value is not None for known in inputs):
            for name, value in zip(node.output, self._values(node), strict=True):
                self._constant(name, value, rows)
        else:
            self._keep(node, rows)

    def _roialign(self, node: onnx.NodeProto) -> None:
        inputs = [self._written(name) for name in node.input]
        rois = self.known[node.input[1]]
        shapes = self.known[node.input[0]].shape, rois.shape
        made = lower_roi_align(self.build, node, inputs, *shapes)
        found = self._inferred(node)[node.output[0]]
        self.known[made] = Known(found[1], found[0])
        self._renamed(made, node.output[0], rois.rows and replace(rois.rows, axis=0))

    def both(self, node: onnx.NodeProto, names: Sequence[str], out_rank: int) -> Rows:
        """The rows of what is broadcast together."""
        found: Rows | None = None
        for name in names:
            known = self.known[name]
            if known.rows is None:
                continue
            axis = out_rank - (len(known.shape) - known.rows.axis)
            rows = replace(known.rows, axis=axis)
            if found is None or found == rows:
                found = rows
            elif found.axis == axis:
                mask = self._made("And", "mask", found.mask, rows.mask)
                found = Rows(axis, mask)
            else:
                raise self._unknown(node, "rows along two axes")
        assert found is not None
        return found


def _kept_of(model: onnx.ModelProto) -> dict[str, int]:
    """Result of an NMS -> how many of the survivors a Slice behind it keeps; where there is one."""
    constants = constants_of(model)
    kept: dict[str, int] = {}
    for node in model.graph.node:
        bounds = (
            [constants.get(name) for name in node.input[1:4]] if node.op_type == "Slice" else []
        )
        if len(bounds) < 3 or any(v is None or v.size != 1 for v in bounds):
            continue
        start, end, axis = (int(v.reshape(-1)[0]) for v in bounds if v is not None)
        if start == 0 and axis == 0 and 0 < end < TENSORRT_TOPK:
            for name in _suppressed_above(model.graph, node.input[0]):
                kept[name] = end
    return kept


def _suppressed_above(graph: onnx.GraphProto, tensor: str) -> Iterator[str]:
    """The results of NMS that a tensor is a column of, in bodies of an If too."""
    producer = {name: node for node in graph.node for name in node.output}
    node = producer.get(tensor)
    while node is not None and node.op_type in ("Gather", "Squeeze", "Reshape", "Cast", "Identity"):
        node = producer.get(node.input[0])
    if node is not None and node.op_type == "NonMaxSuppression":
        yield node.output[0]
    elif node is not None and node.op_type == "If":
        for body in subgraphs(node):
            yield from _suppressed_above(body, body.output[0].name)


Rule = Callable[[_Lowering, onnx.NodeProto], None]


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    for a in node.attribute:
        if a.name == name:
            return helper.get_attribute_value(a)
    return default


def _rows_of(low: _Lowering, name: str) -> Rows:
    rows = low.known[name].rows
    assert rows is not None
    return rows


def _elementwise(low: _Lowering, node: onnx.NodeProto) -> None:
    names = [name for name in node.input if name]
    rank = max(len(low.known[name].shape) for name in names)
    low._keep_rows(node, low.both(node, names, rank))


def _gather(low: _Lowering, node: onnx.NodeProto) -> None:
    data, index = (low.known[name] for name in node.input)
    axis = _attribute(node, "axis", 0) % len(data.shape)
    if index.rows:
        if _is_every(index.value, data.shape[axis]) and len(index.shape) == 1:
            _pass_on(low, node, replace(index.rows, axis=axis))
        else:
            low._keep_rows(node, replace(index.rows, axis=axis + index.rows.axis))
        return
    rows = _rows_of(low, node.input[0])
    if rows.axis == axis:
        raise low._unknown(node, "by fixed positions")
    moved = rows.axis if rows.axis < axis else rows.axis + len(index.shape) - 1
    low._keep_rows(node, replace(rows, axis=moved))


def _gather_nd(low: _Lowering, node: onnx.NodeProto) -> None:
    data, index = (low.known[name] for name in node.input)
    if index.rows is None or index.rows.axis != 0 or _attribute(node, "batch_dims", 0):
        raise low._unknown(node)
    is_every = index.shape[1:] == (1,) and _is_every(index.value, data.shape[0])
    if is_every:
        _pass_on(low, node, index.rows)
    else:
        low._keep_rows(node, index.rows)


def _is_every(index: Array | None, count: int) -> bool:
    """Whether an index takes all rows, in their order."""
    return index is not None and index.size == count and bool((index.ravel() == np.arange(count)).all())  # fmt: skip


def _pass_on(low: _Lowering, node: onnx.NodeProto, rows: Rows) -> None:
    """The first input as it is, with the rows of the index."""
    data = low.known[node.input[0]]
    if data.value is not None:
        low._constant(node.output[0], data.value, rows)
    else:
        low._renamed(node.input[0], node.output[0], rows)


def _top_k(low: _Lowering, node: onnx.NodeProto) -> None:
    known, k = low.known[node.input[0]], low._maybe_value(node.input[1])
    rows, rank = _rows_of(low, node.input[0]), len(known.shape)
    axis = _attribute(node, "axis", -1) % rank
    if k is None or axis != rows.axis or not _attribute(node, "largest", 1) or max(known.shape) != known.shape[axis]:  # fmt: skip
        raise low._unknown(node)
    sides = [1] * rank
    sides[axis] = -1
    mask = low._made("Reshape", "mask", rows.mask, np.array(sides, np.int64))
    dtype = helper.tensor_dtype_to_np_dtype(known.elem_type)
    lowest = np.finfo(dtype).min if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).min
    masked = low._made("Where", "counted", mask, node.input[0], np.array(lowest, dtype))
    count = min(int(k.reshape(-1)[0]), known.shape[axis])
    if count > TENSORRT_TOPK:
        raise low._unknown(node, f"the best {count}, beyond TensorRT's {TENSORRT_TOPK}")
    sizes = low._own("k", np.array([count], np.int64))
    found = onnx.NodeProto()
    found.CopyFrom(node)
    found.input[:] = [masked, sizes]
    low._keep(found)
    flat = low._made("Reshape", "positions", node.output[1], np.array([-1], np.int64))
    chosen = low._made("Gather", "mask", rows.mask, flat, axis=0)
    kept = Rows(axis, chosen, first=True)
    for name in node.output:
        low.known[name] = replace(low.known[name], rows=kept)


def _slice(low: _Lowering, node: onnx.NodeProto) -> None:
    rows, shape = _rows_of(low, node.input[0]), low.known[node.input[0]].shape
    values = [low._maybe_value(name) for name in node.input[1:]]
    if any(v is None for v in values):
        raise low._unknown(node)
    starts, ends, *rest = ([int(x) for x in v.reshape(-1)] for v in values if v is not None)
    axes = rest[0] if rest else [*range(len(starts))]
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if axis % len(shape) != rows.axis:
            continue
        n = shape[rows.axis]
        if start != 0 or step != 1 or end < 0:
            raise low._unknown(node)
        if end < n:
            if not rows.first:
                raise low._unknown(node, "the first of rows in no order")
            bounds = [np.array([x], np.int64) for x in (0, end, 0)]
            rows = replace(rows, mask=low._made("Slice", "mask", rows.mask, *bounds))
    low._keep_rows(node, rows)


def _transpose(low: _Lowering, node: onnx.NodeProto) -> None:
    rows, rank = _rows_of(low, node.input[0]), len(low.known[node.input[0]].shape)
    perm = list(_attribute(node, "perm", range(rank)[::-1]))
    low._keep_rows(node, replace(rows, axis=perm.index(rows.axis)))


def _reshaped(low: _Lowering, node: onnx.NodeProto) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze: the axis before which there are as many numbers."""
    rows, shape = _rows_of(low, node.input[0]), low.known[node.input[0]].shape
    (_, out), n = low._inferred(node)[node.output[0]], shape[rows.axis]
    before = int(np.prod(shape[: rows.axis]))
    at = next((i for i, size in enumerate(out) if _begins(out, i, before, size, n)), None)
    if at is None:
        raise low._unknown(node, f"{list(shape)} to {list(out)}")
    times = out[at] // n
    if times > 1:
        column = low._made("Reshape", "mask_column", rows.mask, np.array([-1, 1], np.int64))
        wide = low._made("Expand", "mask_wide", column, np.array([n, times], np.int64))
        rows = Rows(at, low._made("Reshape", "mask", wide, np.array([-1], np.int64)))
    low._keep_rows(node, replace(rows, axis=at))


def _begins(out: tuple[int, ...], i: int, before: int, size: int, n: int) -> bool:
    """Whether axis i of a new shape holds `n` rows, each once or several times."""
    return int(np.prod(out[:i])) == before and size % n == 0 and (size > 1 or n == 1) and size >= n


def _concat(low: _Lowering, node: onnx.NodeProto) -> None:
    rank = len(low.known[node.input[0]].shape)
    axis = _attribute(node, "axis", 0) % rank
    axes = {known.rows.axis for name in node.input if (known := low.known[name]).rows}
    if axes != {axis}:
        low._keep_rows(node, low.both(node, [n for n in node.input if low.known[n].rows], rank))
        return
    masks = []
    for name in node.input:
        known = low.known[name]
        every = np.ones(known.shape[axis], bool)
        masks.append(known.rows.mask if known.rows else low._own("every", every))
    mask = low._made("Concat", "mask", *masks, axis=0)
    low._keep_rows(node, Rows(axis, mask))


def _split(low: _Lowering, node: onnx.NodeProto) -> None:
    rows, rank = _rows_of(low, node.input[0]), len(low.known[node.input[0]].shape)
    if _attribute(node, "axis", 0) % rank == rows.axis:
        raise low._unknown(node)
    low._keep_rows(node, rows)


def _expand(low: _Lowering, node: onnx.NodeProto) -> None:
    shape = low._maybe_value(node.input[1])
    known = low.known[node.input[0]]
    if shape is None or known.rows is None:
        raise low._unknown(node)
    rank = max(len(shape), len(known.shape))
    low._keep_rows(node, low.both(node, [node.input[0]], rank))


def _reduce(low: _Lowering, node: onnx.NodeProto) -> None:
    known, rows = low.known[node.input[0]], _rows_of(low, node.input[0])
    rank = len(known.shape)
    axes = _attribute(node, "axes", None)
    if axes is None and len(node.input) > 1 and node.input[1]:
        value = low._maybe_value(node.input[1])
        axes = None if value is None else value.tolist()
    axes = [a % rank for a in axes] if axes is not None else [*range(rank)]
    if rows.axis not in axes:
        keeps = _attribute(node, "keepdims", 1)
        moved = rows.axis - (0 if keeps else sum(a < rows.axis for a in axes))
        low._keep_rows(node, replace(rows, axis=moved))
        return
    neutral = {"ReduceMax": -NONE_OF_THEM, "ReduceMin": NONE_OF_THEM, "ReduceSum": 0.0}
    if node.op_type not in neutral or known.elem_type != TensorProto.FLOAT:
        raise low._unknown(node, "over the rows")
    sides = [1] * rank
    sides[rows.axis] = -1
    mask = low._made("Reshape", "mask", rows.mask, np.array(sides, np.int64))
    filled = low._made("Where", "counted", mask, node.input[0], np.float32(neutral[node.op_type]))
    reduced = onnx.NodeProto()
    reduced.CopyFrom(node)
    reduced.input[0] = filled
    low._keep(reduced)


def _scatter(low: _Lowering, node: onnx.NodeProto) -> None:
    """data, with some rows replaced."""
    data, index, updates = (low.known[name] for name in node.input)
    by_rows = node.op_type == "ScatterND" or _attribute(node, "axis", 0) == 0
    rows = index.rows
    positions = None if index.value is None else index.value.reshape(index.shape[0], -1)
    every = np.arange(data.shape[0])[:, None]
    is_every = positions is not None and len(positions) == data.shape[0] and bool((positions == every).all())  # fmt: skip
    if rows is None or rows.axis != 0 or not by_rows or not is_every or updates.shape != data.shape:
        raise low._unknown(node)
    sides = np.array([-1, *[1] * (len(data.shape) - 1)], np.int64)
    mask = low._made("Reshape", "mask", rows.mask, sides)
    made = low._made("Where", "replaced", mask, node.input[2], node.input[0])
    low._renamed(made, node.output[0], data.rows)


def _by_rows(low: _Lowering, node: onnx.NodeProto) -> None:
    """Layers on rows: convolutions, products with weights."""
    rows = _rows_of(low, node.input[0])
    if rows.axis != 0 or any(low.known[n].rows for n in node.input[1:] if n):
        raise low._unknown(node)
    low._keep_rows(node, rows)


def _softmax(low: _Lowering, node: onnx.NodeProto) -> None:
    rows, rank = _rows_of(low, node.input[0]), len(low.known[node.input[0]].shape)
    if _attribute(node, "axis", -1) % rank == rows.axis:
        raise low._unknown(node)
    low._keep_rows(node, rows)


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
    "Expand": _expand, "Softmax": _softmax, "RoiAlign": lambda low, node: low._roialign(node),
}  # fmt: skip
