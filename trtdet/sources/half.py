# SPDX-License-Identifier: Apache-2.0
"""Exports in half precision (`model.half()`, converters of weights): computed in float32, so that
stage 1 can measure them, and stage 2 chooses the types.

Every float16 or bfloat16 number is a float32 number too, so nothing is lost; what float16 would
have rounded between two operators is not rounded any more.
"""

from collections.abc import Iterable

import onnx
from onnx import AttributeProto, TensorProto, numpy_helper

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
#: Attributes that name a type.
TYPE_NAMES = ("to", "dtype")


def widen(model: onnx.ModelProto) -> bool:
    """Put float32 in place of every half float, in place.

    Returns:
        Whether there were any.
    """
    changed = _widen_graph(model.graph)
    for function in model.functions:
        changed += _widen_nodes(function.node)
    return changed > 0


def _widen_graph(graph: onnx.GraphProto) -> int:
    changed = sum(map(_widen_tensor, graph.initializer))
    for info in (*graph.input, *graph.output, *graph.value_info):
        if info.type.tensor_type.elem_type in HALVES:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
            changed += 1
    return changed + _widen_nodes(graph.node)


def _widen_nodes(nodes: Iterable[onnx.NodeProto]) -> int:
    changed = 0
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                changed += _widen_tensor(attribute.t)
            elif attribute.type == AttributeProto.GRAPH:
                changed += _widen_graph(attribute.g)
            elif attribute.name in TYPE_NAMES and attribute.i in HALVES:
                attribute.i = TensorProto.FLOAT
                changed += 1
    return changed


def _widen_tensor(tensor: onnx.TensorProto) -> int:
    if tensor.data_type not in HALVES:
        return 0
    values = numpy_helper.to_array(tensor).astype("float32")
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return 1
