# SPDX-License-Identifier: Apache-2.0
"""Quantized convolutions put into a graph: Q/DQ pairs, the nodes of an equalization, new weights
and biases.

x -> [Mul, Sub] -> QuantizeLinear -> DequantizeLinear -> Conv <- DequantizeLinear <- int8 weights
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from trtdet.precision.body import ConvLayer
from trtdet.precision.equalization import Equalization, Weights
from trtdet.precision.graph_types import raise_opset, replace_nodes
from trtdet.precision.scales import (
    FP8,
    QuantizedType,
    activation_scale,
    round_to,
    stored,
    weight_scales,
)
from trtdet.sources.subgraphs import reads, subgraphs


@dataclass(frozen=True, eq=False)
class RoundedWeights:
    """weights ~ rounded * scales, a scale per output channel; `rounded` are numbers of the type."""

    rounded: NDArray[np.float64]
    scales: NDArray[np.float32]

    @property
    def values(self) -> NDArray[np.float64]:
        """What they stand for."""
        return self.rounded * self.scales.reshape(-1, *[1] * (self.rounded.ndim - 1))


def round_weights(
    weights: NDArray[np.float64], to: QuantizedType, *, fp16: bool = False
) -> RoundedWeights:
    """To the nearest numbers of the type, the largest of each output channel to its largest.

    Args:
        fp16: choose scales that float16 holds.
    """
    scales = weight_scales(weights.astype(np.float32), to, fp16=fp16)
    columns = scales.reshape(-1, *[1] * (weights.ndim - 1))
    return RoundedWeights(round_to(weights / columns, to), scales)


@dataclass(frozen=True, eq=False)
class NewConv:
    """What becomes of a convolution.

    Attributes:
        weights: rescaled where channels are, the bias corrected where the weights are rounded.
        rounded: the weights in 8 bits; None: it stays in floating point.
        input_amax: largest magnitude of what it reads, after the equalization; where it is
            quantized.
        equalization: of its input, in nodes of their own.
    """

    layer: ConvLayer
    weights: Weights
    rounded: RoundedWeights | None = None
    input_amax: float = 0.0
    equalization: Equalization | None = None


def write_convs(
    model: onnx.ModelProto,
    convs: Mapping[str, NewConv],
    to: QuantizedType,
    *,
    pairs: bool,
    fp16_scales: bool,
) -> tuple[onnx.ModelProto, dict[str, float]]:
    """A copy of a model with convolutions replaced, by name.

    Args:
        pairs: put Q/DQ in; else inputs and weights stay as they are but for the equalization.
        fp16_scales: choose scales that float16 holds.

    Returns:
        The copy, and what quantized convolutions read -> its largest magnitude.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if pairs and (fp16_scales or to is FP8):
        raise_opset(copy)
    writer = _Writer(copy.graph, to, pairs=pairs, fp16_scales=fp16_scales)
    writer.write(convs)
    return copy, writer.amax


class _Writer:
    """Appends nodes and constants to one graph."""

    def __init__(
        self, graph: onnx.GraphProto, to: QuantizedType, *, pairs: bool, fp16_scales: bool
    ) -> None:
        self.graph, self.to = graph, to
        self.pairs, self.fp16_scales = pairs, fp16_scales
        self.nodes: list[onnx.NodeProto] = []
        self.amax: dict[str, float] = {}  # of what quantized convolutions read
        self._taken = tensor_names(graph)
        self._equalized: dict[tuple[str, bytes, bytes], str] = {}
        self._dequantized: dict[str, str] = {}  # tensor -> what its DequantizeLinear makes

    def write(self, convs: Mapping[str, NewConv]) -> None:
        for node in list(self.graph.node):
            conv = convs.get(node.name) if node.op_type == "Conv" else None
            if conv is None:
                self.nodes.append(node)
            else:
                self._conv(node, conv)
        replace_nodes(self.graph, self.nodes)
        drop_unread_weights(self.graph)

    def _conv(self, node: onnx.NodeProto, conv: NewConv) -> None:
        """The node with new inputs, behind what makes these."""
        name, source = conv.layer.name, conv.layer.input
        if conv.equalization is not None:
            source = self._equalize(source, conv.equalization)
        if conv.rounded is not None:
            self.amax[source] = conv.input_amax
        if conv.rounded is not None and self.pairs:
            source = self._pair(source)
            weights = self._dequantize(name, conv.rounded)
        else:
            weights = self._constant(f"{name}/weight", conv.weights.values.astype(np.float32))
        inputs = [source, weights]
        bias = conv.weights.bias
        if conv.layer.bias or bias.any():
            inputs.append(self._constant(f"{name}/bias", bias.astype(np.float32)))
        new = onnx.NodeProto()
        new.CopyFrom(node)
        new.input[:] = inputs
        self.nodes.append(new)

    def _equalize(self, tensor: str, equalization: Equalization) -> str:
        """Once for all depthwise convolutions that read the tensor: theirs are the same."""
        factors = equalization.factors.astype(np.float32).reshape(1, -1, 1, 1)
        offset = (equalization.factors * equalization.shift).astype(np.float32).reshape(1, -1, 1, 1)
        key = (tensor, factors.tobytes(), offset.tobytes())
        if key in self._equalized:
            return self._equalized[key]
        steps = [("Mul", "scaled", factors)]
        if offset.any():
            steps.append(("Sub", "shifted", offset))
        result = tensor
        for op, suffix, values in steps:
            name = self._unused(f"{tensor}/{suffix}")
            constant = self._constant(f"{name}/constant", values)
            self.nodes.append(helper.make_node(op, [result, constant], [name], name=name))
            result = name
        self._equalized[key] = result
        return result

    def _pair(self, tensor: str) -> str:
        """Quantize and dequantize a tensor, once for all that read it."""
        if tensor not in self._dequantized:
            quantized = self._unused(f"{tensor}/quantized")
            result = self._unused(f"{tensor}/dequantized")
            scale = activation_scale(self.amax[tensor], self.to, fp16=self.fp16_scales)
            operands = [
                self._constant(f"{tensor}/scale", scale),
                self._stored(f"{tensor}/zero_point", np.zeros(())),
            ]
            self.nodes += [
                helper.make_node(
                    "QuantizeLinear", [tensor, *operands], [quantized], name=quantized
                ),
                helper.make_node("DequantizeLinear", [quantized, *operands], [result], name=result),
            ]
            self._dequantized[tensor] = result
        return self._dequantized[tensor]

    def _dequantize(self, conv: str, weights: RoundedWeights) -> str:
        name = self._unused(f"{conv}/weight/dequantized")
        operands = [
            self._stored(f"{conv}/weight/{self.to.name.lower()}", weights.rounded),
            self._constant(f"{conv}/weight/scale", weights.scales),
            self._stored(f"{conv}/weight/zero_point", np.zeros(len(weights.rounded))),
        ]
        node = helper.make_node("DequantizeLinear", operands, [name], name=name, axis=0)
        self.nodes.append(node)
        return name

    def _constant(self, name: str, values: NDArray[np.float32]) -> str:
        name = self._unused(name)
        self.graph.initializer.append(numpy_helper.from_array(values, name))
        return name

    def _stored(self, name: str, values: NDArray[np.float64]) -> str:
        """Of numbers that the type of 8 bits holds."""
        name = self._unused(name)
        data = stored(values, self.to)
        weight = helper.make_tensor(name, self.to.onnx_type, data.shape, data.tobytes(), raw=True)
        self.graph.initializer.append(weight)
        return name

    def _unused(self, name: str) -> str:
        return unused_name(name, self._taken)


def unused_name(name: str, taken: set[str]) -> str:
    """The name, or one like it that is in use for nothing; `taken` has it from then on."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def tensor_names(graph: onnx.GraphProto) -> set[str]:
    """Of all tensors, those within subgraphs among them."""
    names = {info.name for info in (*graph.input, *graph.initializer)}
    for node in graph.node:
        names.update(node.output)
        for inner in subgraphs(node):
            names |= tensor_names(inner)
    return names


def drop_unread_weights(graph: onnx.GraphProto) -> None:
    """Remove the initializers that neither a node nor an output of the graph needs."""
    read = {name for node in graph.node for name in reads(node)}
    read |= {output.name for output in graph.output}
    kept = [w for w in graph.initializer if w.name in read]
    copies_of_weights = [onnx.TensorProto.FromString(w.SerializeToString()) for w in kept]
    del graph.initializer[:]
    graph.initializer.extend(copies_of_weights)
