# SPDX-License-Identifier: Apache-2.0
"""Detections whose number differs from picture to picture, as the model itself selects them:
sorted by score and padded to a fixed number of rows, of which those behind the detections have
score 0.

| outputs | as exported by |
|---|---|
| boxes [n, 4], scores [n], labels [n] | torchvision with the whole model inside, LibreYOLO's Faster R-CNN |
| rows [n, 6] | PaddleDetection: label score x1 y1 x2 y2 |
| dets [1, n, 5], labels [1, n] | MMDeploy |

Such a model takes one picture at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from trtdet.families.base import Declaration
from trtdet.families.outputs import OF_NO_USE, Nodes, attribute
from trtdet.families.pixels import first_convolution, maybe_image, resizes
from trtdet.graph.builder import with_shapes
from trtdet.graph.static_shapes import DATA_SIZED
from trtdet.sources.batch_axis import rename_inputs
from trtdet.sources.onnx_file import OnnxSource
from trtdet.sources.subgraphs import reads, subgraphs

#: The columns of PaddleDetection's rows.
PADDLE_COLUMNS = ("label", "score", "x1", "y1", "x2", "y2")
#: Operators whose result has the rows of their first input.
BY_FIRST_INPUT = frozenset(
    ("Identity", "Cast", "Pad", "Transpose", "Unsqueeze", "Squeeze", "Split", "NonZero", "Not", "Clip", "Sqrt",
     "Exp", "Sigmoid", "Softmax", "Compress", "Add", "Sub", "Mul", "Div", "Mod", "Equal", "Greater",
     "GreaterOrEqual", "Less", "And", "Or")
)  # fmt: skip
#: So many rows mean "all of them".
ALL = 1 << 31


#: Score of padding rows: below every real score, above the value that `trtdet.nms.static_rows`
#: gives to rows it leaves out; in float16 as well.
BEHIND = -1e4


@dataclass(frozen=True)
class Rows:
    """Outputs whose number of rows follows the picture.

    Attributes:
        scores: the output with the scores; boxes, labels: the others; one of rows has all three.
        width: of `boxes`.
        columns: of rows.
        most: how many rows the model gives at most, and the node that says it; None: nothing does.
        is_selected: an NMS inside selects them.
        is_torchvision: the outputs are those of torchvision's detectors.
        resizes: the network resizes its pictures itself.
    """

    boxes: str
    scores: str
    labels: str = ""
    width: int = 4
    columns: tuple[str, ...] = ()
    most: int | None = None
    how: str = ""
    is_selected: bool = False
    is_torchvision: bool = False
    resizes: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(t for t in (self.boxes, self.scores, self.labels) if t))


def find_rows(source: OnnxSource, declared: Declaration) -> Rows | None:
    """The outputs of that kind: declared, or told by their shapes.

    None where the outputs have a batch axis and rows that do not follow the picture, or where
    nothing says which is which.
    """
    infos = _outputs(source.model)
    found = _declared(declared, infos) or _pair(infos) or _lone(source, infos)
    if found is None or not {*found.tensors} <= infos.keys():
        return None
    batches = {_first(i) for i in source.model.graph.input if i.name in source.graph.inputs} - {""}
    if any(_first(infos[name]) in batches for name in found.tensors):
        return None
    ops = set(_ops_above(source.model, found.tensors))
    has_batch = len(_dims(infos[found.boxes])) == 3
    if has_batch and not (ops & DATA_SIZED):
        return None
    most, how = most_rows(source.model, found.scores)
    if has_batch and how.startswith("TopK"):  # as many of every picture
        return None
    labels = infos.get(found.labels)
    is_torchvision = (
        not found.columns
        and not has_batch
        and labels is not None
        and labels.type.tensor_type.elem_type == TensorProto.INT64
        and {"NonMaxSuppression", "Resize"} <= ops
        and not source.model.metadata_props
    )
    return Rows(
        found.boxes, found.scores, found.labels, found.width, found.columns, most, how,
        "NonMaxSuppression" in ops, is_torchvision, _resizes_images(source),
    )  # fmt: skip


def _outputs(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """The outputs by name; shapes that the file leaves out are inferred from its operators."""
    infos = {info.name: info for info in model.graph.output}
    if all(info.type.tensor_type.HasField("shape") for info in infos.values()):
        return infos
    return {info.name: info for info in with_shapes(model).graph.output}


def _resizes_images(source: OnnxSource) -> bool:
    """Whether a Resize comes before the first convolution."""
    image = maybe_image(source)
    first = first_convolution(source, image[0]) if image else None
    return first is not None and resizes(source, first)


def is_open(source: OnnxSource) -> bool:
    """Whether outputs without a batch axis, or rows of an NMS, are declared with an open number."""
    rows = find_rows(source, Declaration())
    return rows is not None and rows.width <= 7


def undeclared_labels(source: OnnxSource, rows: Rows) -> str:
    """An output that may be the labels of rows without; "" where there is none."""
    if rows.labels or "label" in rows.columns:
        return ""
    others = [i for i in source.model.graph.output if i.name not in rows.tensors]
    whole = (TensorProto.INT64, TensorProto.INT32)
    return next((i.name for i in others if _is_flat(i) and _elem_type(i) in whole), "")


def pad_rows(source: OnnxSource, rows: Rows, kept: int) -> None:
    """Give the outputs of a source a batch axis of 1 and `kept` rows, the best first; zeros behind
    the detections.

    scores [n], boxes [n, 4]  ->  scores [1, kept], boxes [1, kept, 4]
    """
    model = source.model
    inner = {name: f"{name}/as_many_as_found" for name in rows.tensors}
    for node in model.graph.node:
        rename_inputs(node, inner)
        node.output[:] = [inner.get(name, name) for name in node.output]
    types = {i.name: i.type.tensor_type.elem_type for i in model.graph.output}
    make = _Nodes(model)
    score_column = rows.columns.index("score") if rows.columns else None
    scores = inner[rows.scores]
    if score_column is not None:
        column = make.constant("score_column", np.array(score_column, np.int64))
        flat = make.node("Reshape", scores, make.shape(-1, rows.width))
        scores = make.node("Gather", flat, column, axis=1)
    padded = _padded(make, scores, (), kept, types[rows.scores], value=BEHIND)
    in_float = make.node("Cast", padded, to=TensorProto.FLOAT)
    best = make.best(in_float, kept)
    for name in rows.tensors:
        width = (rows.width,) if name == rows.boxes else ()
        whole = _padded(make, inner[name], width, kept, types[name])
        taken = make.node("Gather", whole, best, axis=0)
        make.node("Reshape", taken, make.shape(1, kept, *width), output=name)
    for info in model.graph.output:
        if info.name in rows.tensors:
            dims = [1, kept, *([rows.width] if info.name == rows.boxes else [])]
            info.CopyFrom(helper.make_tensor_value_info(info.name, types[info.name], dims))
    others = [i for i in model.graph.output if i.name in rows.tensors or not _is_of_no_use(i)]
    del model.graph.output[:]
    model.graph.output.extend(others)
    source.read_again()


def mend_reshapes(source: OnnxSource, pictures: Sequence[Mapping[str, NDArray[Any]]]) -> int:
    """Reshapes of rows to a number of rows that is computed beside -1, as torch writes them, get
    the numbers behind it: [n, -1] is an error where n is 0, [-1, 364] is none.

    Args:
        pictures: what is fed, for pictures of several sizes with detections.

    Returns:
        How many there were.
    """
    nodes = source.model.graph.node
    nodes_by_name = Nodes(source.model)
    follows = _following(source.model)
    computed = [
        node
        for node in nodes
        if node.op_type == "Reshape"
        and node.output[0] in follows
        and _counts_rows(nodes_by_name, node.input[1])
    ]
    names = [node.output[0] for node in computed]
    if not names:
        return 0
    shapes = [[value.shape for value in source.run(names, fed)] for fed in pictures]
    make, mended = _Nodes(source.model), 0
    for node, seen in zip(computed, zip(*shapes, strict=True), strict=True):
        behind = {shape[1:] for shape in seen}
        if len(behind) == 1 and 0 not in (rest := behind.pop()) and rest:
            node.input[1] = make.shape(-1, *rest)
            mended += 1
    if mended:
        source.read_again()
    return mended


def _counts_rows(nodes: Nodes, shape: str) -> bool:
    """Whether a shape is put together of a number that is computed, and constants behind it."""
    node = nodes.producer.get(shape)
    if node is None or node.op_type != "Concat" or len(node.input) < 2:
        return False
    known = [nodes.value(name) is not None for name in node.input]
    return not known[0] and all(known[1:])


def _following(model: onnx.ModelProto) -> set[str]:
    """Tensors that follow from how much a picture has of something."""
    reached: set[str] = set()
    for node in model.graph.node:  # in topological order
        bodies = [inner.op_type for body in subgraphs(node) for inner in body.node]
        if DATA_SIZED.intersection((node.op_type, *bodies)) or reached & reads(node):
            reached.update(node.output)
    return reached


def _padded(
    make: "_Nodes",
    tensor: str,
    width: Sequence[int],
    kept: int,
    elem_type: int,
    *,
    value: float = 0,
) -> str:
    """`kept` more rows of a value."""
    flat = make.node("Reshape", tensor, make.shape(-1, *width))
    dtype = helper.tensor_dtype_to_np_dtype(elem_type)
    filling = make.constant("filling", np.full((kept, *width), value, dtype))
    return make.node("Concat", flat, filling, axis=0)


class _Nodes:
    """Appends nodes to a model."""

    PREFIX = "any_number"

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        # Others may have been here before.
        self.number = len(model.graph.node) + len(model.graph.initializer)

    def node(self, op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        self.number += 1
        name = f"{self.PREFIX}/{op}_{self.number}"
        output = output or name
        self.graph.node.append(helper.make_node(op, list(inputs), [output], name, **attributes))
        return output

    def constant(self, name: str, value: Any) -> str:
        self.number += 1
        tensor = numpy_helper.from_array(np.asarray(value), f"{self.PREFIX}/{name}_{self.number}")
        self.graph.initializer.append(tensor)
        return tensor.name

    def shape(self, *sizes: int) -> str:
        return self.constant("shape", np.array(sizes, np.int64))

    def best(self, scores: str, kept: int) -> str:
        """Positions of the best, equal scores in their order."""
        self.number += 1
        name = f"{self.PREFIX}/best_{self.number}"
        outputs = [f"{name}/scores", f"{name}/positions"]
        k = self.constant("kept", np.array([kept], np.int64))
        self.graph.node.append(helper.make_node("TopK", [scores, k], outputs, name, axis=0))
        return outputs[1]


# ---- which outputs


@dataclass(frozen=True)
class _Named:
    boxes: str
    scores: str
    labels: str = ""
    width: int = 4
    columns: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(t for t in (self.boxes, self.scores, self.labels) if t)


def _declared(declared: Declaration, infos: dict[str, onnx.ValueInfoProto]) -> _Named | None:
    d = declared
    if d.boxes in infos and d.scores in infos and _is_open(infos[d.boxes], 4):
        return _Named(d.boxes, d.scores, d.labels)
    if d.rows in infos and "score" in d.columns and _is_open(infos[d.rows], len(d.columns)):
        return _Named(d.rows, d.rows, "", len(d.columns), d.columns)
    return None


def _pair(infos: dict[str, onnx.ValueInfoProto]) -> _Named | None:
    """Boxes, scores and labels; MMDeploy's dets and labels."""
    used = {name: info for name, info in infos.items() if not _is_of_no_use(info)}
    boxes = [n for n, i in used.items() if _is_open(i, 4)]
    dets = [n for n, i in used.items() if _is_open(i, 5) and len(_dims(i)) == 3]
    flat = [n for n, i in used.items() if _is_flat(i)]
    if len(boxes) == 1 and {*flat} == {"scores", "labels"}:  # labels of whichever type
        return _Named(boxes[0], "scores", "labels")
    whole = [n for n in flat if _elem_type(used[n]) in (TensorProto.INT64, TensorProto.INT32)]
    numbers = [n for n in flat if n not in whole]
    if len(boxes) == 1 and len(whole) == len(numbers) == 1 and not dets:
        return _Named(boxes[0], numbers[0], whole[0])
    if len(dets) == 1 and len(whole) == 1 and not boxes and not numbers:
        return _Named(dets[0], dets[0], whole[0], 5, ("x1", "y1", "x2", "y2", "score"))
    return None


def _lone(source: OnnxSource, infos: dict[str, onnx.ValueInfoProto]) -> _Named | None:
    """PaddleDetection's rows, beside their number."""
    rows = [n for n, i in infos.items() if _is_open(i, 6) and len(_dims(i)) == 2]
    if len(rows) == 1 and {"scale_factor"} <= {*source.graph.inputs}:
        return _Named(rows[0], rows[0], "", 6, PADDLE_COLUMNS)
    return None


def _is_open(info: onnx.ValueInfoProto, width: int) -> bool:
    """[n, width] or [1, n, width], n unknown."""
    dims = _dims(info)
    if len(dims) == 3 and dims[0] not in (0, 1):
        return False
    return len(dims) in (2, 3) and dims[-1] in (0, width) and not dims[-2] and bool(dims[-1])


def _is_flat(info: onnx.ValueInfoProto) -> bool:
    """[n], [1, n] or [n, 1], n unknown."""
    dims = _dims(info)
    return (len(dims) == 1 and not dims[0]) or (len(dims) == 2 and 1 in dims)


def _is_of_no_use(info: onnx.ValueInfoProto) -> bool:
    """Masks and keypoints."""
    named = any(word in info.name.lower() for word in OF_NO_USE)
    return named or len(_dims(info)) == 4 or (len(_dims(info)) == 3 and _dims(info)[2] == 3)


def _dims(info: onnx.ValueInfoProto) -> list[int]:
    """Dimensions as declared, 0 for one that is open."""
    return [d.dim_value for d in info.type.tensor_type.shape.dim]


def _first(info: onnx.ValueInfoProto) -> str:
    """The name of the first dimension; "": it has none."""
    return next((d.dim_param for d in info.type.tensor_type.shape.dim), "")


def _elem_type(info: onnx.ValueInfoProto) -> int:
    return int(info.type.tensor_type.elem_type)


def _ops_above(model: onnx.ModelProto, tensors: Sequence[str]) -> Iterator[str]:
    """Operators upstream, those in bodies of If and Loop among them."""
    nodes = Nodes(model)
    pending = [*nodes.above(tensors)]
    seen: set[int] = set()
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node.op_type
        for body in subgraphs(node):
            pending.extend(body.node)
            outer = [name for inner in body.node for name in inner.input]
            pending.extend(nodes.above(outer))


# ---- how many


def most_rows(model: onnx.ModelProto, tensor: str) -> tuple[int | None, str]:
    """How many rows a tensor has at most, by the operators that decide it: a Slice from the first
    row on, or a TopK.
    """
    nodes = Nodes(model)
    for _ in range(64):
        node = nodes.producer.get(tensor)
        if node is None:
            return None, ""
        if node.op_type == "TopK" and (k := nodes.value(node.input[1])) is not None:
            return int(k.reshape(-1)[0]), f"TopK '{node.name}'"
        if node.op_type == "Slice":
            if (most := _cut_at(nodes, node)) is not None:
                return most, f"Slice '{node.name}'"
            tensor = node.input[0]
        elif node.op_type in ("Gather", "GatherND"):
            is_picked = node.op_type == "GatherND" or _picks_rows(nodes, node)
            tensor = node.input[1] if is_picked else node.input[0]
        elif node.op_type in BY_FIRST_INPUT:
            tensor = _moving_input(nodes, node)
        else:
            return None, ""
    return None, ""


def _moving_input(nodes: Nodes, node: onnx.NodeProto) -> str:
    """The input of an operator that is no constant."""
    moving = [name for name in node.input if name and nodes.value(name) is None]
    return moving[0] if moving else node.input[0]


def _picks_rows(nodes: Nodes, node: onnx.NodeProto) -> bool:
    index = nodes.value(node.input[1])
    return index is None and attribute(node, "axis", 0) == 0


def _cut_at(nodes: Nodes, node: onnx.NodeProto) -> int | None:
    """Where a Slice of the first rows ends; None: it takes all, or other rows."""
    values = [nodes.value(name) for name in node.input[1:]]
    if len(values) < 3 or any(v is None or v.size != 1 for v in values):
        return None
    start, end, axis, *step = (int(v.reshape(-1)[0]) for v in values if v is not None)
    if start != 0 or axis != 0 or (step and step[0] != 1) or not 0 < end < ALL:
        return None
    return end
