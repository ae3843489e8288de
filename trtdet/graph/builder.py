# SPDX-License-Identifier: Apache-2.0
"""Small helpers to extend an `onnx.ModelProto` by hand: nodes with readable names, shapes and
types, outputs, domains.

For `trtdet.nms`, which works on the finished model: onnx-graphsurgeon, with which the network
itself is rewritten, drops `metadata_props`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import helper, numpy_helper

from trtdet.errors import GraphError

PLUGIN_DOMAIN = "trt.plugins"

#: A dimension is a number, a name, or None where nothing is known.
Dims = list[int | str | None]
#: Tensor name -> (element type, dimensions).
Types = dict[str, tuple[int, Dims]]

#: Slice, TopK and Pad took their present form here; older models would need other nodes.
OLDEST_OPSET = 11


class Builder:
    """Collects nodes and constants for one model; a node, its output and its constants share a
    readable, free name.

    An operand is the name of a tensor or an array, which becomes a constant.
    """

    def __init__(self, model: onnx.ModelProto, prefix: str) -> None:
        self.prefix = prefix
        self.opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        if self.opset < OLDEST_OPSET:
            raise GraphError(
                f"model: expected opset {OLDEST_OPSET} or later, found {self.opset}; convert it with a later --opset"
            )
        #: Take rows by GatherND, which copies each in one step in ONNX Runtime (from opset 12 on).
        self.takes_whole_rows = False
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._taken = _names(model)

    def node(
        self,
        op: str,
        name: str,
        *operands: str | ArrayLike,
        outputs: Sequence[str] = (),
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Append one node.

        Args:
            name: of the node and, unless `outputs` names them, of its only output; the prefix is
                put before it.
            outputs: full names.

        Returns:
            The name of the first output.
        """
        full_name = self._free(self.prefix + name)
        inputs = [
            operand if isinstance(operand, str) else self.constant(f"{name}/input_{i}", operand)
            for i, operand in enumerate(operands)
        ]
        made = helper.make_node(
            op, inputs, list(outputs) or [full_name], full_name, domain=domain, **attributes
        )
        self.nodes.append(made)
        return made.output[0]

    def name(self, name: str) -> str:
        """A name that no tensor has yet, for an input of an inner graph."""
        return self._free(self.prefix + name)

    def constant(self, name: str, value: ArrayLike) -> str:
        full_name = self._free(self.prefix + name)
        self.constants.append(numpy_helper.from_array(np.asarray(value), full_name))
        return full_name

    def reshape(self, name: str, tensor: str, shape: Sequence[int]) -> str:
        """0 in `shape` copies a dimension, -1 takes what is left."""
        return self.node("Reshape", name, tensor, np.array(shape, np.int64))

    def cast(self, name: str, tensor: str, to: int) -> str:
        return self.node("Cast", name, tensor, to=to)

    def slice_last(self, name: str, tensor: str, start: int, stop: int) -> str:
        """tensor[..., start:stop]"""
        bounds = [np.array([value], np.int64) for value in (start, stop, -1)]
        return self.node("Slice", name, tensor, *bounds)

    def reduce(self, op: str, name: str, tensor: str, axis: int, *, keepdims: bool) -> str:
        """ReduceSum, ReduceMax or ReduceMin over one axis, which became an input at opset 13 and
        18.
        """
        if self.opset >= (13 if op == "ReduceSum" else 18):
            return self.node(op, name, tensor, np.array([axis], np.int64), keepdims=int(keepdims))
        return self.node(op, name, tensor, axes=[axis], keepdims=int(keepdims))

    def top_k(
        self, name: str, tensor: str, k: int | str, *, largest: bool = True
    ) -> tuple[str, str]:
        """Values and int64 indices along the last axis, sorted; equal values in the order of
        their index.

        Args:
            k: a number, or a tensor [1] int64.
        """
        outputs = [self._free(f"{self.prefix}{name}/{part}") for part in ("values", "indices")]
        count = k if isinstance(k, str) else np.array([k], np.int64)
        self.node("TopK", name, tensor, count, outputs=outputs, largest=int(largest))
        return outputs[0], outputs[1]

    def take_rows(self, name: str, tensor: str, index: str, width: int) -> str:
        """tensor [N, A, width] at index [N, M]  ->  [N, M, width]"""
        column = self.reshape(f"{name}/index", index, [0, -1, 1])
        if self.takes_whole_rows:
            return self.node("GatherND", name, tensor, column, batch_dims=1)
        wide = self.node("Expand", f"{name}/index_wide", column, np.array([1, 1, width], np.int64))
        return self.node("GatherElements", name, tensor, wide, axis=1)

    def output(self, tensor: str, name: str) -> None:
        """Give the tensor, made by a node of this builder, its final name."""
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [name if old == tensor else old for old in names]

    @contextmanager
    def inner_graph(
        self, name: str, inputs: Sequence[onnx.ValueInfoProto] = ()
    ) -> Iterator[onnx.GraphProto]:
        """A graph for Loop and If, of the nodes that the block appends; the block adds its outputs.
        What is outside it can be seen in it.
        """
        outer, self.nodes = self.nodes, []
        graph = helper.make_graph([], self._free(self.prefix + name), list(inputs), [])
        try:
            yield graph
            graph.node.extend(self.nodes)
        finally:
            self.nodes = outer

    def append_to(self, model: onnx.ModelProto) -> None:
        model.graph.node.extend(self.nodes)
        model.graph.initializer.extend(self.constants)

    def _free(self, name: str) -> str:
        candidate, number = name, 1
        while candidate in self._taken:
            candidate, number = f"{name}_{number}", number + 1
        self._taken.add(candidate)
        return candidate


def value_info(name: str, elem_type: int, dims: Sequence[int | str | None]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, elem_type, list(dims))


def tensor_types(model: onnx.ModelProto) -> Types:
    """Element type and dimensions of every tensor that the model, as it stands, says them of."""
    graph = model.graph
    types: Types = {}
    for info in [*graph.value_info, *graph.output, *graph.input]:
        tensor = info.type.tensor_type
        if tensor.HasField("shape"):
            dims: Dims = [
                d.dim_value if d.HasField("dim_value") else d.dim_param or None
                for d in tensor.shape.dim
            ]
            types[info.name] = (tensor.elem_type, dims)
    for initializer in graph.initializer:
        types[initializer.name] = (initializer.data_type, list(initializer.dims))
    return types


def with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the shapes that ONNX infers; itself where it can infer none: it finds the
    graph invalid, or larger than 2 GB.
    """
    try:
        return onnx.shape_inference.infer_shapes(model)
    except (onnx.shape_inference.InferenceError, ValueError):  # ValueError: more than 2 GB
        return model


def known_types(model: onnx.ModelProto, names: Sequence[str]) -> Types:
    """`tensor_types`, with ONNX's shape inference where one of `names` is not among them."""
    types = tensor_types(model)
    if not types.keys() >= set(names):
        types = tensor_types(onnx.shape_inference.infer_shapes(model))
    return types


def fix_size(
    model: onnx.ModelProto, image_shape: Sequence[int], *, batch: int | None = None
) -> onnx.ModelProto:
    """The model with an input of one size, and the shapes that this makes known; itself where it
    has one already.

    Args:
        image_shape: of one image, in the model's layout.
        batch: fixed too, for a graph that reshapes to a batch it computes, which shape inference
            does not follow.
    """
    if all(dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]):
        return model
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    dims = fixed.graph.input[0].type.tensor_type.shape.dim
    for dim, value in zip(dims, (dims[0].dim_value or batch, *image_shape), strict=True):
        if value:
            dim.dim_value = value
    return onnx.shape_inference.infer_shapes(fixed, data_prop=True)


def dims_text(dims: Dims) -> str:
    return "[" + ", ".join("?" if d is None else str(d) for d in dims) + "]" if dims else "no shape"


def set_outputs(model: onnx.ModelProto, outputs: Sequence[onnx.ValueInfoProto]) -> None:
    """Make `outputs` the only outputs; what is known of the former ones stays as `value_info`.

    Raises:
        GraphError: an output that no node of the graph makes, or that two make.
    """
    graph = model.graph
    made = [name for node in graph.node for name in node.output]
    for output in outputs:
        if made.count(output.name) != 1:
            raise GraphError(
                f"output '{output.name}': expected one node that makes it, found {made.count(output.name)}; "
                "rename the inner tensor of that name"
            )
    known = {info.name for info in graph.value_info} | {info.name for info in graph.input}
    graph.value_info.extend(info for info in graph.output if info.name not in known)
    del graph.output[:]
    graph.output.extend(outputs)


def import_domain(model: onnx.ModelProto, domain: str) -> None:
    """Declare an operator domain, version 1."""
    if all(opset.domain != domain for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(domain, 1))


def forget_domain(model: onnx.ModelProto, domain: str) -> None:
    """Take back the declaration of a domain that no node uses."""
    if any(node.domain == domain for node in model.graph.node):
        return
    kept = [opset for opset in model.opset_import if opset.domain != domain]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _names(model: onnx.ModelProto) -> set[str]:
    graph = model.graph
    names = {info.name for info in [*graph.input, *graph.output, *graph.initializer]}
    for node in graph.node:
        names.update([node.name, *node.output])
    return names


#: Nodes whose arithmetic is worth a narrow type; the body reaches from the first to the last of
#: them.
COMPUTE_OPS = frozenset(
    ["BatchNormalization", "Conv", "ConvTranspose", "Gemm", "InstanceNormalization", "MatMul"]
)
#: Nodes inside the network that compute positions to sample at, and boxes that the next layer
#: refines: FP16 resolves 1333 pixels to 1/2.
POSITIONS_PREFIX = "positions/"
