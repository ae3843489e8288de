# SPDX-License-Identifier: Apache-2.0
"""An image input without a batch axis, [3, H, W], becomes one of a batch of 1."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from trtdet.sources.subgraphs import subgraphs


def add_batch_axis(model: onnx.ModelProto) -> bool:
    """Give the only image input its batch axis, as torchvision's detectors lack it, which take
    a list of pictures. Returns whether there was one.

    image [3, H, W]  ->  image [1, 3, H, W], then Squeeze
    """
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [info for info in graph.input if info.name not in constants]
    images = [info for info in inputs if _is_image(info)]
    if len(images) != 1 or any(_rank(info) == 4 for info in inputs):
        return False
    (image,) = images
    name, inner = image.name, _free(model, f"{image.name}/without_batch")
    for node in graph.node:
        rename_inputs(node, {name: inner})
    dims = image.type.tensor_type.shape.dim
    kept = [d.dim_value or d.dim_param for d in dims]
    elem_type = image.type.tensor_type.elem_type
    image.CopyFrom(helper.make_tensor_value_info(name, elem_type, [1, *kept]))
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if opset >= 13:
        axes = numpy_helper.from_array(np.array([0], np.int64), f"{inner}/axes")
        graph.initializer.append(axes)
        node = helper.make_node("Squeeze", [name, axes.name], [inner], inner)
    else:
        node = helper.make_node("Squeeze", [name], [inner], inner, axes=[0])
    graph.node.insert(0, node)
    return True


def rename_inputs(node: onnx.NodeProto, names: dict[str, str]) -> None:
    """Read other tensors in place of some, in the bodies of a node too."""
    node.input[:] = [names.get(name, name) for name in node.input]
    for body in subgraphs(node):
        for inner in body.node:
            rename_inputs(inner, names)
        for output in body.output:
            output.name = names.get(output.name, output.name)


def _is_image(info: onnx.ValueInfoProto) -> bool:
    dims = info.type.tensor_type.shape.dim
    is_pixels = info.type.tensor_type.elem_type in (
        TensorProto.FLOAT,
        TensorProto.FLOAT16,
        TensorProto.UINT8,
    )
    return is_pixels and len(dims) == 3 and 3 in (dims[0].dim_value, dims[2].dim_value)


def _rank(info: onnx.ValueInfoProto) -> int:
    return len(info.type.tensor_type.shape.dim)


def _free(model: onnx.ModelProto, name: str) -> str:
    taken = {output for node in model.graph.node for output in node.output}
    while name in taken:
        name += "_"
    return name
