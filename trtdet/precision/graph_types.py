# SPDX-License-Identifier: Apache-2.0
"""The element types of an ONNX graph, and what has to change for those of another opset."""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from trtdet.errors import GraphError

#: Nodes between a floating-point type and INT8 or FP8: they take the type of their neighbour.
PAIR_OPS = frozenset(["DequantizeLinear", "QuantizeLinear"])
#: The first opset whose QuantizeLinear takes float16, and float8.
PAIR_OPSET = 19


def narrow_types(model: onnx.ModelProto) -> set[str]:
    """Which of "fp16" and "bf16" the model's weights and casts are in; empty for a float32
    model.
    """
    names = {TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
    types = {tensor.data_type for tensor in model.graph.initializer}
    types |= {
        a.i for n in model.graph.node if n.op_type == "Cast" for a in n.attribute if a.name == "to"
    }
    return {names[t] for t in types & names.keys()}


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Tensor -> element type, as far as ONNX's inference knows it.

    Raises:
        GraphError: ONNX finds the graph invalid.
    """
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except onnx.shape_inference.InferenceError as error:
        raise GraphError(
            f"model: expected a valid ONNX graph, ONNX says: {error}; write it again with create_onnx.py"
        ) from error
    types = {
        info.name: info.type.tensor_type.elem_type
        for info in [*graph.value_info, *graph.input, *graph.output]
        if info.type.HasField("tensor_type") and info.type.tensor_type.elem_type
    }
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def constants_to_initializers(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Make Constant nodes of tensors initializers, so that there is one kind of weight.

    Returns all initializers by name.
    """
    kept = []
    for node in graph.node:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            tensor = graph.initializer.add()
            tensor.CopyFrom(value)
            tensor.name = node.output[0]
        else:
            kept.append(node)
    replace_nodes(graph, kept)
    return {tensor.name: tensor for tensor in graph.initializer}


def replace_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Put nodes, old ones among them, in place of all that a graph has."""
    copies = onnx.GraphProto()  # emptying the old list would clear the nodes in it
    copies.node.extend(nodes)
    graph.ClearField("node")
    graph.node.extend(copies.node)


def raise_opset(model: onnx.ModelProto, opset: int = PAIR_OPSET) -> None:
    """Make a model of opset 13 or later one of at least `opset`, at most 19, in place.

    On the way reductions get their axes as an input and a Split in equal parts counts them. What
    else changed takes more types or has new attributes with the old meaning as their default; only
    RoiAlign has a new default.

    Raises:
        GraphError: an older model, or a RoiAlign.
    """
    own = next(o for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if own.version >= opset:
        return
    if own.version < 13:
        raise GraphError(
            f"model: expected opset 13 or later for Q/DQ, found {own.version}; convert it with create_onnx.py --opset 17"
        )
    graph = model.graph
    for node in graph.node if own.version < 18 <= opset else ():
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type == "RoiAlign" and own.version < 16:
            raise GraphError(
                f"RoiAlign '{node.name}': expected opset 16 or later, found {own.version}, whose RoiAlign has another default; "
                "convert the model with create_onnx.py --opset 17"
            )
        if node.op_type == "Split" and len(node.input) < 2:
            node.attribute.append(helper.make_attribute("num_outputs", len(node.output)))
        axes = next((a for a in node.attribute if a.name == "axes"), None)
        if node.op_type.startswith("Reduce") and axes is not None:
            name = f"{node.output[0]}/axes"
            values = np.array(axes.ints, np.int64)
            graph.initializer.append(numpy_helper.from_array(values, name))
            node.input.append(name)
            node.attribute.remove(axes)
    own.version = opset
    model.ir_version = max(model.ir_version, 9)  # of ONNX 1.14, which brought opset 19
