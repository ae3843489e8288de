# SPDX-License-Identifier: Apache-2.0
"""Shape arithmetic replaced by what it comes to: half of the nodes of a transformer that torch
exported with a dynamic batch.

The shapes are not derived but measured: the model runs at three batch sizes, and what follows from
shapes alone and comes out the same each time is a constant. What depends on the batch:

| what | becomes |
|---|---|
| Reshape whose result has one dynamic dimension | Reshape to constants and -1 |
| a table with equal rows for every image (position embeddings, initial queries), where it meets data element by element or in a MatMul | one row, which ONNX broadcasts |
| such a table anywhere else | Tile of one row |
| a size that grows with the batch, `a + b * N` | Mul, Add |
| ScatterND that overwrites the first k of the last axis, `x[..., :k] = y` | Concat(y, x[..., k:]) |
| GatherND of every element in order | Reshape |
| Resize of masks [1, N, H, W] to their nearest neighbour | Gather of rows and columns |
| an operand of Concat that has no elements | left out |
| anything else | stays |

So the network keeps its dynamic batch, and TensorRT, precision and INT8 see constants.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from trtdet.errors import GraphError
from trtdet.graph.builder import tensor_types
from trtdet.sources.base import Shape, constants_of, cut_onnx, run_onnx

#: Batch sizes at which a dynamic batch is measured; two to draw a line through, one to see that it
#: is a line.
MEASURED_BATCHES = (1, 2, 3)

#: Shape inference stops where sizes come by ways that it does not follow; computed, they let it go
#: on.
INFERENCE_ROUNDS = 5

#: Operators that broadcast a leading 1 against the batch of their other operand.
BROADCASTING = frozenset(
    ["Add", "And", "Div", "Equal", "MatMul", "Max", "Min", "Mul", "Or", "Sub", "Where"]
)

#: Operators whose result has a size that data decides,
DATA_SIZED = frozenset(["Compress", "NonMaxSuppression", "NonZero", "Unique"])
#: and those where it does if the inputs from this one on are data.
SIZE_INPUTS: Mapping[str, int] = {
    **dict.fromkeys(["ConstantOfShape", "Range"], 0),
    **dict.fromkeys(["Expand", "OneHot", "Pad", "Reshape", "Resize", "Slice", "Tile", "TopK"], 1),
}


def knows_sizes(model: onnx.ModelProto) -> bool:
    """Whether shape inference knows the size of what every convolution returns."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    shapes = {
        info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim[2:]]
        for info in (*graph.value_info, *graph.output)
    }
    convolved = [node.output[0] for node in model.graph.node if node.op_type == "Conv"]
    return all(all(shapes.get(name, [0])) for name in convolved)


def fix_shapes(
    model: onnx.ModelProto, inputs: Mapping[str, Shape], *, batch: int | None
) -> onnx.ModelProto:
    """The model with its shape arithmetic replaced.

    Args:
        inputs: its inputs with their shapes; None: the batch.
        batch: batch size the model is fixed to; None: dynamic. A fixed one is made dynamic
            where all that fixes it is that the first dimension of a Reshape is written out.

    Raises:
        GraphError: the model does not run.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    measured = _Measured(fixed, inputs, [batch] if batch else MEASURED_BATCHES)
    batch_size = _BatchSize(next(iter(inputs)), measured.batches)
    for node in fixed.graph.node:
        if measured.follows_from_shapes(node):
            continue
        if node.op_type == "Reshape":
            _fix_reshape(fixed, node, measured, makes_dynamic=batch is not None)
        elif node.op_type == "ScatterND":
            _concat_from_scatter(fixed, node, measured)
        elif node.op_type == "Resize":
            _gather_from_resize(fixed, node, measured)
        elif node.op_type == "GatherND":
            _reshape_from_gather(fixed, node, measured, makes_dynamic=batch is not None)
        elif node.op_type == "Concat":
            _leave_out_empty(node, measured)
        for position, name in enumerate(node.input):
            value = measured.maybe_constant(name, node)
            if value is not None:
                suffix = "measured" if value.shape == measured.values(name)[0].shape else "row"
                node.input[position] = _constant(fixed, f"{name}/{suffix}", value)
            elif name in measured.frontier:
                node.input[position] = batch_size.maybe_replace(name, measured.values(name))
    batch_size.prepend_to(fixed)
    had_sequences = _split_sequences(fixed, measured)
    del fixed.graph.value_info[:]  # vaguer than what can be inferred now
    fixed = cut_onnx(fixed, list(inputs), [info.name for info in fixed.graph.output])
    # What was made of a sequence could not be followed before.
    return fix_shapes(fixed, inputs, batch=batch) if had_sequences else fixed


def _split_sequences(model: onnx.ModelProto, measured: "_Measured") -> bool:
    """SequenceAt(SplitToSequence(x, sizes), i)  ->  Split(x, sizes)[i]: TensorRT has no sequences.

    Returns whether there were any.

    Raises:
        GraphError: a sequence whose sizes or positions are not constant.
    """
    constants = constants_of(model)
    splits: dict[str, list[str]] = {}
    kept = []
    for node in model.graph.node:
        name = node.input[1] if len(node.input) > 1 else ""
        if node.op_type == "SplitToSequence":
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            lengths = {shape[axis] for shape in measured.shapes(node.input[0])}
            if name not in constants or len(lengths) > 1:
                raise GraphError(
                    f"SplitToSequence '{node.name}': expected constant sizes, found '{name}'; export the model without it"
                )
            sizes, (length,) = constants[name], lengths
            if not sizes.ndim:  # of every part but the last
                sizes = np.diff([*range(0, length, int(sizes)), length])
            splits[node.output[0]] = [f"{node.output[0]}/{i}" for i in range(len(sizes))]
            operands = [node.input[0], _constant(model, f"{node.output[0]}/sizes", sizes)]
            kept.append(
                helper.make_node("Split", operands, splits[node.output[0]], node.name, axis=axis)
            )
        elif node.op_type == "SequenceAt" and node.input[0] in splits:
            if name not in constants:
                raise GraphError(
                    f"SequenceAt '{node.name}': expected a constant position, found '{name}'; export the model without it"
                )
            part = splits[node.input[0]][int(constants[name])]
            kept.append(helper.make_node("Identity", [part], list(node.output), node.name))
        else:
            kept.append(node)
    if splits:
        del model.graph.node[:]
        model.graph.node.extend(kept)
    return bool(splits)


def _reshape_from_gather(
    model: onnx.ModelProto, node: onnx.NodeProto, measured: "_Measured", *, makes_dynamic: bool
) -> None:
    """torch's newer exporter looks masks up by image and position, with the images of its batch
    written out.
    """
    data, indices = node.input[:2]
    values = measured.values(indices)
    if node.attribute and any(a.i for a in node.attribute):  # batch_dims
        return
    for index, shape in zip(values, measured.shapes(data), strict=False):
        every = np.moveaxis(np.indices(shape), 0, -1).reshape(-1, len(shape))
        if not np.array_equal(index.reshape(-1, index.shape[-1]), every):
            return
    if values:
        node.CopyFrom(helper.make_node("Reshape", [data, ""], list(node.output), node.name))
        _fix_reshape(model, node, measured, makes_dynamic=makes_dynamic)


def _gather_from_resize(
    model: onnx.ModelProto, node: onnx.NodeProto, measured: "_Measured"
) -> None:
    """Rows and columns floor(i * H / h), as torch takes them, where the batch is in the place of
    the channels.
    """
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    before, after = measured.shapes(node.input[0]), measured.shapes(node.output[0])
    modes = ("mode", "coordinate_transformation_mode", "nearest_mode")
    if (
        [attributes.get(name) for name in modes] != [b"nearest", b"asymmetric", b"floor"]
        or any(shape[:2] != [1, n] for shape, n in zip(before, measured.batches, strict=True))
        or any(shape[:2] != [1, n] for shape, n in zip(after, measured.batches, strict=True))
    ):
        return
    tensor, output = node.input[0], node.output[0]
    gathers = []
    for axis, name in ((2, f"{output}/rows"), (3, output)):
        size, wanted = before[0][axis], after[0][axis]
        index = _constant(
            model, f"{name}/nearest", np.arange(wanted, dtype=np.int64) * size // wanted
        )
        gathers.append(helper.make_node("Gather", [tensor, index], [name], name, axis=axis))
        tensor = name
    position = list(model.graph.node).index(node)
    node.CopyFrom(gathers[0])
    model.graph.node.insert(position + 1, gathers[1])


class _Measured:
    """Values of what follows from shapes and constants alone, and the shapes of what is
    reshaped, at each batch size.
    """

    def __init__(
        self, model: onnx.ModelProto, inputs: Mapping[str, Shape], batches: Sequence[int]
    ) -> None:
        self.batches = list(batches)
        self.constants = constants_of(model)
        self._from_shapes = _following_from_shapes(model, self.constants)
        probe = onnx.ModelProto()
        probe.CopyFrom(model)
        self.frontier: set[str] = set()  # tensors that follow from shapes and are read by data
        self._shape_of: dict[str, str] = {}
        for node in model.graph.node:
            if self.follows_from_shapes(node):
                continue
            self.frontier |= {
                name
                for name in node.input
                if name in self._from_shapes and name not in self.constants
            }
            for name in _of_interest(node):
                if name not in self._shape_of and name not in self.constants:
                    self._shape_of[name] = f"{name}/measured_shape"
                    probe.graph.node.append(
                        helper.make_node("Shape", [name], [self._shape_of[name]])
                    )
        fetches = [*sorted(self.frontier), *self._shape_of.values()]
        self._values: dict[str, list[NDArray[Any]]] = {name: [] for name in fetches}
        types = {i.name: i.type.tensor_type.elem_type for i in model.graph.input}
        for batch in self.batches if fetches else ():
            feeds = {
                name: np.zeros(
                    [batch if size is None else size for size in shape],
                    helper.tensor_dtype_to_np_dtype(types[name]),
                )
                for name, shape in inputs.items()
            }
            cheap = _with_inferred_shapes(probe, feeds)
            for name, value in zip(fetches, run_onnx(cheap, fetches, feeds), strict=True):
                self._values[name].append(value)

    def follows_from_shapes(self, node: onnx.NodeProto) -> bool:
        return node.output[0] in self._from_shapes

    def values(self, name: str) -> list[NDArray[Any]]:
        """At each batch size; of a constant, the same."""
        if name in self.constants:
            return [self.constants[name]] * len(self.batches)
        return self._values.get(name, [])

    def shapes(self, name: str) -> list[list[int]]:
        if name in self.constants:
            return [list(self.constants[name].shape)] * len(self.batches)
        return [value.tolist() for value in self._values[self._shape_of[name]]]

    def maybe_constant(self, name: str, reader: onnx.NodeProto) -> NDArray[Any] | None:
        """What `reader` may take in place of the tensor.

        None where it is a constant already or depends on the batch.
        """
        values = self._values.get(name)
        if not values:
            return None
        first = values[0]
        if all(np.array_equal(first, value) for value in values[1:]):
            return first
        if (
            reader.op_type in BROADCASTING
            and any(other not in self._from_shapes for other in reader.input)
            and all(
                value.ndim > 2 and len(value) == n and (value == first[:1]).all()
                for value, n in zip(values, self.batches, strict=True)
            )
        ):
            return first[:1]
        return None


def _with_inferred_shapes(
    model: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]]
) -> onnx.ModelProto:
    """Shape(x) replaced by a constant where shape inference knows it for these inputs, so that x
    need not be computed.
    """
    known = onnx.ModelProto()
    known.CopyFrom(model)
    del known.graph.value_info[:]
    for info in known.graph.input:
        elem_type = info.type.tensor_type.elem_type
        info.CopyFrom(helper.make_tensor_value_info(info.name, elem_type, feeds[info.name].shape))
    for info in known.graph.output:
        info.type.tensor_type.ClearField("shape")
    for _ in range(INFERENCE_ROUNDS):
        types = tensor_types(onnx.shape_inference.infer_shapes(known, data_prop=True))
        for node in known.graph.node:
            if node.op_type != "Shape" or node.input[0] not in types:
                continue
            dims = types[node.input[0]][1]
            if all(isinstance(size, int) for size in dims):
                bounds = {a.name: a.i for a in node.attribute}
                sides = dims[bounds.get("start", 0) : bounds.get("end", len(dims))]
                _become_constant(node, np.array(sides, np.int64))
        if not _fold_sizes(known):
            break
    return known


def _fold_sizes(model: onnx.ModelProto) -> bool:
    """Compute the sizes that follow from constants by ways that shape inference does not see.

    Returns whether there were any.
    """
    constants = set(constants_of(model))
    follows = set(constants)
    producer = {node.output[0]: node for node in model.graph.node if len(node.output) == 1}
    for node in model.graph.node:
        inputs = [name for name in node.input if name]
        if inputs and follows.issuperset(inputs) and not node.op_type.startswith("Sequence"):
            follows.update(node.output)
    wanted = {
        name
        for node in model.graph.node
        for name in node.input[SIZE_INPUTS.get(node.op_type, len(node.input)) :]
        if name in follows - constants and name in producer
    }
    names = sorted(wanted)
    for name, value in zip(names, run_onnx(model, names, {}) if names else [], strict=True):
        _become_constant(producer[name], value)
    return bool(names)


def _become_constant(node: onnx.NodeProto, value: NDArray[Any]) -> None:
    tensor = numpy_helper.from_array(np.asarray(value))
    node.CopyFrom(helper.make_node("Constant", [], list(node.output), node.name, value=tensor))


class _BatchSize:
    """Replacements for what depends on the batch, computed from the first dimension of an input."""

    def __init__(self, input_name: str, batches: Sequence[int]) -> None:
        self.input_name, self.batches = input_name, list(batches)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._replaced: dict[str, str] = {}

    def maybe_replace(self, name: str, values: Sequence[NDArray[Any]]) -> str:
        """The tensor to read instead of `name`, or `name` where it is neither repeated nor
        linear in the batch.
        """
        if len(values) > 1 and name not in self._replaced:
            first, second = values[:2]
            if first.ndim and len(first) % self.batches[0] == 0 and len(first) != len(second):
                self._maybe_repeat(name, values)
            elif first.shape == second.shape and first.dtype == np.int64 and first.ndim <= 1:
                self._maybe_line(name, values)
        return self._replaced.get(name, name)

    def prepend_to(self, model: onnx.ModelProto) -> None:
        nodes = [*self._nodes, *model.graph.node]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        model.graph.initializer.extend(self._constants)

    def _maybe_repeat(self, name: str, values: Sequence[NDArray[Any]]) -> None:
        block = values[0][: len(values[0]) // self.batches[0]]
        ones = [1] * (block.ndim - 1)
        if all(
            np.array_equal(value, np.tile(block, [n, *ones]))
            for value, n in zip(values, self.batches, strict=True)
        ):
            repeats = self._batch()
            if ones:
                rest = self._constant(f"{name}/repeats_rest", np.array(ones, np.int64))
                repeats = self._node("Concat", f"{name}/repeats", repeats, rest, axis=0)
            row = self._constant(f"{name}/row_of_tile", block)
            tiled = self._node("Tile", f"{name}/tiled", row, repeats)
            # Shape inference does not look through Tile.
            shape = self._constant(
                f"{name}/tiled_shape", np.array([-1, *block.shape[1:]], np.int64)
            )
            self._replaced[name] = self._node("Reshape", f"{name}/repeated", tiled, shape)

    def _maybe_line(self, name: str, values: Sequence[NDArray[Any]]) -> None:
        slope = (values[1] - values[0]) // (self.batches[1] - self.batches[0])
        start = values[0] - slope * self.batches[0]
        if all(
            np.array_equal(value, start + slope * n)
            for value, n in zip(values, self.batches, strict=True)
        ):
            slopes = self._constant(f"{name}/slope", np.atleast_1d(slope))
            line = self._node("Mul", f"{name}/growing", self._batch(), slopes)
            line = self._node("Add", f"{name}/line", line, self._constant(f"{name}/start", start))
            if not start.ndim:
                shape = self._constant(f"{name}/scalar", np.array([], np.int64))
                line = self._node("Reshape", f"{name}/of_batch", line, shape)
            self._replaced[name] = line

    def _batch(self) -> str:
        """The batch size, int64 [1]."""
        name = "measured/batch"
        if not any(name in node.output for node in self._nodes):
            shape = self._node("Shape", "measured/input_shape", self.input_name)
            first = self._constant("measured/first", np.array([0], np.int64))
            self._node("Gather", name, shape, first, axis=0)
        return name

    def _node(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def _constant(self, name: str, value: NDArray[Any]) -> str:
        self._constants.append(
            numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name)
        )
        return name


def _of_interest(node: onnx.NodeProto) -> list[str]:
    """Tensors whose shapes decide how the node is rewritten."""
    if node.op_type == "Reshape":
        return list(node.output)
    if node.op_type == "ScatterND":
        return [node.input[0], node.input[2]]
    if node.op_type in ("GatherND", "Resize"):
        return [node.input[0], node.output[0]]
    return [node.input[0]] if node.op_type == "SplitToSequence" else []


def _following_from_shapes(
    model: onnx.ModelProto, constants: Mapping[str, NDArray[Any]]
) -> set[str]:
    """Tensors that depend on shapes and constants only."""
    known = set(constants)
    sized_by_data: set[str] = set()  # what they measure on an image of zeros says nothing
    for node in model.graph.node:
        inputs = [name for name in node.input if name]
        first_size = SIZE_INPUTS.get(node.op_type, len(node.input))
        sizes = [name for name in node.input[first_size:] if name]
        if (
            node.op_type in DATA_SIZED
            or not sized_by_data.isdisjoint(inputs)
            or not known.issuperset(sizes)
        ):
            sized_by_data.update(node.output)
        if node.op_type == "SplitToSequence" or any(
            a.type == onnx.AttributeProto.GRAPH for a in node.attribute
        ):
            continue
        if node.op_type in ("Shape", "Size"):
            follows = sized_by_data.isdisjoint(inputs)
        elif node.op_type == "CastLike":  # of the second, only the type counts
            follows = inputs[0] in known
        else:
            follows = known.issuperset(inputs) and (bool(inputs) or node.op_type == "Constant")
        if follows:
            known.update(node.output)
    return known


def _fix_reshape(
    model: onnx.ModelProto, node: onnx.NodeProto, measured: _Measured, *, makes_dynamic: bool
) -> None:
    """Constants where the result has the same size at each batch, -1 where it has not, if that
    is one dimension.
    """
    shapes = measured.shapes(node.output[0])
    if any(len(shape) != len(shapes[0]) for shape in shapes) or not shapes[0]:
        return
    free = [i for i, sizes in enumerate(zip(*shapes, strict=True)) if len({*sizes}) > 1]
    if makes_dynamic and not free:
        free = [0]
    if len(free) > 1 or 0 in shapes[0]:
        return
    target = [-1 if i in free else size for i, size in enumerate(shapes[0])]
    node.input[1] = _constant(model, f"{node.output[0]}/shape", np.array(target, np.int64))


def _concat_from_scatter(model: onnx.ModelProto, node: onnx.NodeProto, measured: _Measured) -> None:
    """x[..., :k] = y  ->  Concat(y, x[..., k:]); any other ScatterND is left as it is."""
    data, indices, updates = node.input[:3]
    reduces = any(a.name == "reduction" and a.s != b"none" for a in node.attribute)
    for index, shape, part in zip(
        measured.values(indices), measured.shapes(data), measured.shapes(updates), strict=False
    ):
        if (
            reduces
            or part[:-1] != shape[:-1]
            or not np.array_equal(index, np.moveaxis(np.indices(part), 0, -1))
        ):
            return
    if not measured.values(indices):
        return
    k = measured.shapes(updates)[0][-1]
    bounds = [
        _constant(model, f"{node.output[0]}/{what}", np.array([value], np.int64))
        for what, value in (("start", k), ("end", np.iinfo(np.int64).max), ("axis", -1))
    ]
    rest = f"{node.output[0]}/rest"
    concat = helper.make_node("Concat", [updates, rest], list(node.output), node.name, axis=-1)
    node.CopyFrom(helper.make_node("Slice", [data, *bounds], [rest], rest))
    position = list(model.graph.node).index(node)
    model.graph.node.insert(position + 1, concat)


def _leave_out_empty(node: onnx.NodeProto, measured: _Measured) -> None:
    """Concat of tensors some of which have no elements, whatever the batch: of the others alone."""
    kept = [n for n in node.input if not (v := measured.values(n)) or any(x.size for x in v)]
    if kept and len(kept) < len(node.input):
        node.input[:] = kept


def _constant(model: onnx.ModelProto, name: str, value: NDArray[Any]) -> str:
    """An initializer of that name, made once."""
    if all(t.name != name for t in model.graph.initializer):
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    return name
