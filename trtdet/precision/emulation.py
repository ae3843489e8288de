# SPDX-License-Identifier: Apache-2.0
"""FP16 and BF16 models on a CPU, with the rounding and the overflow that a GPU has.

    y = Op(x) in FP16   ->   y' = Op(x) in float32, y = float32(FP16(y'))

ONNX Runtime's CPU kernels compute such a model in float32 and leave out the casts between them: a
tensor beyond 65504 then does no harm (1.31: nothing between two convolutions is rounded), and BF16
does not run at all. Tensor cores accumulate in float32 and round what they write, as this does.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from trtdet.precision.graph_types import element_types, replace_nodes

NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def emulate(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which everything is float32, and every tensor that was narrow is rounded to its
    type where it arises.

    Tensors keep their names. A model without narrow tensors is returned as it is.
    """
    types = element_types(model)
    narrow = {name: kind for name, kind in types.items() if kind in NARROW}
    if not narrow:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    for tensor in graph.initializer:
        if tensor.data_type in NARROW:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    del graph.value_info[:]
    for info in graph.output:
        if info.type.tensor_type.elem_type in NARROW:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for attribute in copy.attribute:
            if attribute.name == "to" and attribute.i in NARROW:
                attribute.i = TensorProto.FLOAT
            elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in NARROW:
                values = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(values))
        nodes.append(copy)
        for i, name in enumerate(node.output):
            if name in narrow:
                copy.output[i] = f"{name}/exact"
                nodes += _rounding(name, narrow[name])
    replace_nodes(graph, nodes)
    return result


def _rounding(name: str, kind: int) -> list[onnx.NodeProto]:
    """name/exact -> name"""
    return [
        helper.make_node("Cast", [f"{name}/exact"], [f"{name}/narrow"], f"{name}/round", to=kind),
        helper.make_node("Cast", [f"{name}/narrow"], [name], f"{name}/widen", to=TensorProto.FLOAT),
    ]
