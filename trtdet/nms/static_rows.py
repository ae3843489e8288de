# SPDX-License-Identifier: Apache-2.0
"""A model that selects as many boxes as a picture has, with shapes that do not follow the picture.

TensorRT-RTX has neither NonZero nor NonMaxSuppression, and no RoiAlign. Here no row is ever left
out: a tensor keeps all rows that it may have, and a mask beside it says which of them count.

| operator | becomes |
|---|---|
| NonZero(x) | every index, and x for the mask |
| Gather, GatherND by such indices | all rows, with the mask |
| TopK | TopK with the lowest number where the mask is false, or the highest if it takes the smallest |
| NonMaxSuppression | rounds of suppression, as in `trtdet.nms.lowering`; survivors first |
| ScatterElements, ScatterND of such rows | Where(mask, updates, data) |
| If, on how many there are | the branch for at least one |
| Shape and what follows from it | constants |

A rule that is not known is an error, never a guess; and stage 1 compares what comes out with the
source.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from trtdet.errors import GraphError
from trtdet.graph.builder import POSITIONS_PREFIX, Builder
from trtdet.graph.roi_align import lower_node as lower_roi_align
from trtdet.graph.static_shapes import DATA_SIZED
from trtdet.nms.candidates import TENSORRT_TOPK, Candidates
from trtdet.nms.lowering import GRAPH_CANDIDATES, GRAPH_ROUNDS
from trtdet.nms.row_rules import BROADCASTING, RULES, Array, Known, Rows
from trtdet.nms.suppression import pairwise_iou, suppress_by_rounds
from trtdet.sources.base import constants_of, run_onnx
from trtdet.sources.subgraphs import subgraphs
from trtdet.spec import Nms

#: Larger constants of one value stay one value, where that is broadcast.
MANY = 4096


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
    return Lowering(model).run()


class Lowering:
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
                raise self.unknown(node)
            rule(node)
        elif any(known.rows for known in inputs):
            self._on_rows(node)
        elif (
            inputs and all(known.value is not None for known in inputs)
        ) or node.op_type == "Constant":
            self._fold(node)
        elif node.op_type == "RoiAlign":
            self.roialign(node)
        else:
            self.keep(node)

    # ---- constants and shapes

    def constant(self, name: str, value: Array, rows: Rows | None = None) -> None:
        elem_type = helper.np_dtype_to_tensor_dtype(value.dtype)
        self.known[name] = Known(value.shape, elem_type, value, rows)

    def _shape(self, node: onnx.NodeProto) -> None:
        shape = np.array(self.known[node.input[0]].shape, np.int64)
        if node.op_type == "Size":
            self.constant(node.output[0], np.array(shape.prod(), np.int64))
            return
        bounds = {a.name: a.i for a in node.attribute}
        self.constant(node.output[0], shape[bounds.get("start", 0) : bounds.get("end", len(shape))])

    def _filled(self, node: onnx.NodeProto, shape: Array) -> None:
        tensors = [numpy_helper.to_array(a.t) for a in node.attribute if a.name == "value"]
        value = tensors[0].reshape(-1)[0] if tensors else np.float32(0)
        self.constant(node.output[0], np.broadcast_to(value, tuple(shape.tolist())))

    def _fold(self, node: onnx.NodeProto) -> None:
        for name, value in zip(node.output, self._values(node), strict=True):
            if name:
                self.constant(name, value)

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

    def keep(self, node: onnx.NodeProto, rows: Rows | None = None) -> None:
        """Write a node; its results have the shapes that ONNX infers."""
        kept = onnx.NodeProto()
        kept.CopyFrom(node)
        broadcast = node.op_type in BROADCASTING
        kept.input[:] = [self._written(name, broadcast=broadcast) for name in node.input]
        self.build.nodes.append(kept)
        for name, (elem_type, shape) in self.inferred(node).items():
            self.known[name] = Known(shape, elem_type, None, rows)

    def inferred(self, node: onnx.NodeProto) -> dict[str, tuple[int, tuple[int, ...]]]:
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

    def made(self, op: str, name: str, *operands: Any, **attributes: Any) -> str:
        """A node of our own; its result is known by ONNX's inference."""
        names = [o if isinstance(o, str) else self.own(name, o) for o in operands]
        self.number += 1
        output = f"{self.build.prefix}{name}_{self.number}"
        node = helper.make_node(op, names, [output], output, **attributes)
        self.keep(node)
        return output

    def own(self, name: str, value: Any) -> str:
        array = np.asarray(value)
        self.number += 1
        full = f"{self.build.prefix}{name}_constant_{self.number}"
        self.constant(full, array)
        return full

    def renamed(self, tensor: str, name: str, rows: Rows | None) -> None:
        """Give a result its name in the graph."""
        self.build.nodes.append(helper.make_node("Identity", [tensor], [name], name))
        self.known[name] = replace(self.known[tensor], value=None, rows=rows)

    def unknown(self, node: onnx.NodeProto, why: str = "") -> GraphError:
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
                self.renamed(inner.name, outer, known.rows)

    # ---- where rows come from

    def _nonzero(self, node: onnx.NodeProto) -> None:
        known = self.known[node.input[0]]
        if known.value is not None and known.rows is None:
            self.constant(node.output[0], np.stack(np.nonzero(known.value)).astype(np.int64))
            return
        counts = self.made("Cast", "counts", node.input[0], to=TensorProto.BOOL)
        if known.rows:
            sides = [1] * len(known.shape)
            sides[known.rows.axis] = -1
            mask = self.made("Reshape", "mask", known.rows.mask, np.array(sides, np.int64))
            counts = self.made("And", "counts_of_rows", counts, mask)
        mask = self.made("Reshape", "mask", counts, np.array([-1], np.int64))
        index = np.indices(known.shape).reshape(len(known.shape), -1).astype(np.int64)
        self.constant(node.output[0], index, Rows(1, mask))

    def _nonmaxsuppression(self, node: onnx.NodeProto) -> None:
        boxes, scores = (self.known[name] for name in node.input[:2])
        limits = [self._limit(node, name) for name in node.input[2:]]
        most, overlap, least = [*limits, None, None, None][:3]
        if boxes.shape[0] != 1 or any(a.name == "center_point_box" and a.i for a in node.attribute):
            raise self.unknown(node, "of several pictures, or of centres")
        _, classes, n = scores.shape
        pairs = classes * n
        count = min(pairs, self._candidates(node))
        limit = int(most.reshape(-1)[0]) if most is not None else 0
        value, lowest = node.input[1], np.float32(np.finfo(np.float32).min)
        rows = scores.rows or boxes.rows
        if rows:
            mask = self.made("Reshape", "mask", rows.mask, np.array([1, 1, -1], np.int64))
            value = self.made("Where", "scores", mask, value, lowest)
        flat = self.made("Reshape", "scores_flat", value, np.array([1, -1], np.int64))
        score, index = self._top_k(flat, count)
        above = (
            np.nextafter(lowest, np.float32(0))
            if least is None
            else np.float32(least.reshape(-1)[0])
        )
        valid = self.made("Greater", "valid", score, above)
        rank = self.made("Where", "ranks", valid, np.arange(count, 0, -1, dtype=np.float32)[None], np.float32(0))  # fmt: skip
        class_id = self.made("Div", "classes", index, np.int64(n))
        start = self.made("Mul", "class_starts", class_id, np.int64(n))
        anchor = self.made("Sub", "anchors", index, start)
        survives = self._survivors(node, anchor, class_id, rank, score, count, overlap, classes)
        if classes > 1 and limit < n:
            survives = self._most_of_each(survives, class_id, rank, limit)
        ranked = self.made("Mul", "survivor_ranks", survives, rank)
        best, order = self._top_k(ranked, count)
        positive = self.made("Greater", "survivors", best, np.float32(0))
        mask = self.made("Reshape", "mask", positive, np.array([-1], np.int64))
        columns = [self.made("Mul", "pictures", order, np.int64(0))]
        for tensor in (class_id, anchor):
            columns.append(self.made("GatherElements", "chosen", tensor, order, axis=1))
        columns = [self.made("Reshape", "column", c, np.array([-1, 1], np.int64)) for c in columns]
        chosen = self.made("Concat", "selected", *columns, axis=1)
        if classes == 1 and 0 < limit < count:
            bounds = [np.array([x], np.int64) for x in (0, limit, 0)]
            chosen = self.made("Slice", "selected_first", chosen, *bounds)
            mask = self.made("Slice", "mask_first", mask, *bounds)
        # Of several classes, ONNX lists one class after the other.
        self.renamed(chosen, node.output[0], Rows(0, mask, first=classes == 1))

    def _limit(self, node: onnx.NodeProto, name: str) -> Array | None:
        """A limit or threshold of an NMS; None where it has none.

        Raises:
            GraphError: it is computed from the picture.
        """
        value = self.maybe_value(name)
        if name and value is None:
            raise GraphError(
                f"{node.op_type} '{node.name}': its limit '{name}' is computed from the picture: there is no form of it with fixed shapes"
            )
        return value

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
        boxes = self.made("Reshape", "boxes", node.input[0], np.array([-1, 4], np.int64))
        flat = self.made("Reshape", "anchors_flat", anchor, np.array([-1], np.int64))
        taken = self.made("Gather", "candidate_boxes", boxes, flat, axis=0)
        corners = self.made("Reshape", "corners", taken, np.array([1, count, 4], np.int64))
        iou = pairwise_iou(self.build, corners)
        threshold = 0.0 if overlap is None else float(np.asarray(overlap).reshape(-1)[0])
        # What overlaps by exactly the threshold stays in ONNX's operator.
        above = float(np.nextafter(np.float32(threshold), np.float32(np.inf)))
        nms = Nms(iou_threshold=min(above, 1.0), class_agnostic=classes == 1)
        found = Candidates(count, classes, score, anchor, class_id, rank)
        survives = suppress_by_rounds(self.build, iou, found, nms, GRAPH_ROUNDS)
        self.known[survives] = Known((1, count), TensorProto.FLOAT)
        return survives

    def _most_of_each(self, survives: str, class_id: str, rank: str, limit: int) -> str:
        """Survivors before which there are fewer than `limit` of the same class."""
        ones = [np.array(x, np.int64) for x in ([1, -1, 1], [1, 1, -1])]
        ranks = [self.made("Reshape", "ranks_of_pairs", rank, shape) for shape in ones]
        classes = [self.made("Reshape", "classes_of_pairs", class_id, shape) for shape in ones]
        better = self.made("Greater", "better_of_pairs", *ranks)
        same = self.made("Equal", "same_of_pairs", *classes)
        before = self.made("And", "before_of_pairs", better, same)
        matrix = self.made("Cast", "before_matrix", before, to=TensorProto.FLOAT)
        row = self.made("Reshape", "survivors_row", survives, np.array([1, 1, -1], np.int64))
        number = self.made("MatMul", "number_before", row, matrix)
        flat = self.made("Reshape", "number_flat", number, np.array([1, -1], np.int64))
        few = self.made("Less", "is_among_first", flat, np.float32(limit - 0.5))
        return self.made("Where", "first_survivors", few, survives, np.float32(0))

    def _top_k(self, tensor: str, k: int) -> tuple[str, str]:
        self.number += 1
        outputs = [
            f"{self.build.prefix}best_{self.number}/{part}" for part in ("values", "indices")
        ]
        sizes = self.own("k", np.array([k], np.int64))
        node = helper.make_node(
            "TopK", [tensor, sizes], outputs, f"{self.build.prefix}best_{self.number}"
        )
        self.keep(node)
        return outputs[0], outputs[1]

    def maybe_value(self, name: str) -> Array | None:
        return self.known[name].value if name else None

    # ---- what is done with rows

    def _on_rows(self, node: onnx.NodeProto) -> None:
        rule = RULES.get(node.op_type)
        if rule is None:
            raise self.unknown(node)
        rule(self, node)

    def keep_rows(self, node: onnx.NodeProto, rows: Rows) -> None:
        """Write or fold a node whose result has these rows."""
        inputs = [self.known[name] for name in node.input if name]
        if all(known.value is not None for known in inputs):
            for name, value in zip(node.output, self._values(node), strict=True):
                self.constant(name, value, rows)
        else:
            self.keep(node, rows)

    def roialign(self, node: onnx.NodeProto) -> None:
        inputs = [self._written(name) for name in node.input]
        rois = self.known[node.input[1]]
        shapes = self.known[node.input[0]].shape, rois.shape
        made = lower_roi_align(self.build, node, inputs, *shapes)
        found = self.inferred(node)[node.output[0]]
        self.known[made] = Known(found[1], found[0])
        self.renamed(made, node.output[0], rois.rows and replace(rois.rows, axis=0))

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
                mask = self.made("And", "mask", found.mask, rows.mask)
                found = Rows(axis, mask)
            else:
                raise self.unknown(node, "rows along two axes")
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
