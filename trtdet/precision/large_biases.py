# SPDX-License-Identifier: Apache-2.0
"""Biases that overflow in ONNX Runtime, in nodes of their own.

Where QuantizeLinear reads a quantized convolution, ONNX Runtime's optimizer WeightBiasQuantization
(seen in 1.22, 1.27 and 1.31) rounds the bias to INT32, in steps of input scale * weight scale.
It divides in the type of the bias. FP16 ends at 65504 steps and INT32 at 2^31; what is beyond
becomes a wrong number. A shift of the input's channels makes biases so large, and so do weights
that are all but 0.

    Conv(x, W, b) -> QuantizeLinear    becomes    Conv(x, W) -> Add(b) -> QuantizeLinear

The optimizer leaves the Add alone, and TensorRT-RTX makes the same kernels of both. Only the
convolutions that overflow get one: few, if any.
"""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from trtdet.precision.graph_types import replace_nodes
from trtdet.precision.pairs import drop_unread_weights, tensor_names, unused_name

#: How many steps a bias may be large, by the type that divides: float32 holds more than INT32.
MOST_STEPS_OF_FP16 = 65504.0
MOST_STEPS_OF_INT32 = 2.0**31
#: What may stand between the convolution and QuantizeLinear.
PASSED = frozenset(["Relu", "Clip", "Identity"])


def add_large_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which the biases that overflow are added behind their convolutions; the model
    itself where there is none.
    """
    large = dict(_overflowing(model.graph))
    if not large:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    taken = tensor_names(copy.graph)
    nodes: list[onnx.NodeProto] = []
    for index, node in enumerate(copy.graph.node):
        nodes.append(node)
        if index in large:
            nodes.append(_take_bias(copy.graph, node, large[index], taken))
    replace_nodes(copy.graph, nodes)
    drop_unread_weights(copy.graph)
    return copy


def _take_bias(
    graph: onnx.GraphProto, conv: onnx.NodeProto, rank: int, taken: set[str]
) -> onnx.NodeProto:
    """The Add that makes what the convolution made; this loses its bias.

    Args:
        rank: of what it makes.
    """
    result, bias = conv.output[0], conv.input[2]
    constant = TensorProto()
    constant.CopyFrom(next(w for w in graph.initializer if w.name == bias))
    constant.name = unused_name(f"{result}/bias/constant", taken)
    constant.dims[:] = [1, *constant.dims, *[1] * (rank - 2)]
    graph.initializer.append(constant)
    conv.output[0] = unused_name(f"{result}/without_bias", taken)
    del conv.input[2]
    name = unused_name(f"{result}/bias", taken)
    return helper.make_node("Add", [conv.output[0], constant.name], [result], name=name)


def _overflowing(graph: onnx.GraphProto) -> Iterator[tuple[int, int]]:
    """Convolutions whose biases the optimizer takes, and cannot hold: their indices and ranks."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in set(node.input):
            readers.setdefault(name, []).append(node)
    for index, node in enumerate(graph.node):
        if node.op_type != "Conv" or len(node.input) < 3 or not _is_quantized(node, readers):
            continue
        pairs = [p for name in node.input[:2] if (p := made_by.get(name)) is not None]
        if [p.op_type for p in pairs] != ["DequantizeLinear"] * 2:
            continue
        source = pairs[1].input[0]
        maker = made_by.get(source)
        if maker is not None and maker.op_type == "QuantizeLinear":  # weights kept in float
            source = maker.input[0]
        known = [source, node.input[2], *(p.input[1] for p in pairs)]
        if not weights.keys() >= set(known):
            continue
        values, bias, *scales = (weights[name] for name in known)
        if _overflows(bias, *scales):
            yield index, len(values.dims)


def _overflows(bias: TensorProto, input_scale: TensorProto, weight_scales: TensorProto) -> bool:
    magnitudes, first, second = (
        np.abs(numpy_helper.to_array(tensor).astype(np.float64))
        for tensor in (bias, input_scale, weight_scales)
    )
    steps = first * second  # what one step of the bias stands for
    if bias.data_type != TensorProto.FLOAT16:
        return bool((magnitudes >= MOST_STEPS_OF_INT32 * steps).any())
    with np.errstate(over="ignore"):
        steps = np.minimum(steps, steps.astype(np.float16))  # which may hold no more than 0
    return bool((magnitudes >= MOST_STEPS_OF_FP16 * steps).any())


def _is_quantized(node: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]]) -> bool:
    """Whether QuantizeLinear alone reads it."""
    found = readers.get(node.output[0], [])
    while len(found) == 1 and found[0].op_type in PASSED:
        found = readers.get(found[0].output[0], [])
    return len(found) == 1 and found[0].op_type == "QuantizeLinear"
