# SPDX-License-Identifier: Apache-2.0
"""The part of a detector that INT8 is about: from the input to the heads, its convolutions, and
which block each belongs to.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
from onnx.helper import make_tensor_value_info

from trtdet.errors import GraphError
from trtdet.graph import deformable_attention
from trtdet.graph.builder import fix_size
from trtdet.precision.floats import begins_nms
from trtdet.sources.base import cut_onnx
from trtdet.sources.subgraphs import captured, reads
from trtdet.spec import ModelSpec

#: Names of blocks in google/automl's graphs, in the order of the network; the first group is the
#: block's name.
_BLOCK_PATTERNS = (
    r"(?:^|/)(stem)(?:/|$)",
    r"(?:^|/)(blocks_\d+)(?:/|$)",
    r"(?:^|/)(resample_p\d+)(?:/|$)",
    r"^(fpn_cells/cell_\d+)(?:/|$)",
    r"^(class_net|box_net)(?:/|$)",
)


@dataclass(frozen=True)
class ConvLayer:
    """One convolution.

    Attributes:
        name: of the node.
        input, weight, output: tensors; `bias` is "" where there is none.
        block: the part of the network it stands in, "blocks_3".
        macs: multiply-accumulates for one image.
        depthwise: one filter per channel.
        pooled: it works on 1x1 averages, as squeeze-and-excite does.
        padded: with zeros.
        constant: its weights, and its bias where it has one, are initializers.
    """

    name: str
    input: str
    weight: str
    bias: str
    output: str
    block: str
    macs: int
    depthwise: bool
    pooled: bool
    padded: bool
    constant: bool

    @property
    def quantizable(self) -> bool:
        """Worth INT8, and possible: the averages' few MACs are not, and steer whole channels."""
        return self.constant and not self.pooled


@dataclass(frozen=True, eq=False)
class Body:
    """A detector and the part of it that INT8 is about, which is worked out once, when it is first
    asked for, and handed on.

    Attributes:
        model: the whole; not to be changed from here on.
        spec: what stage 1 says of it, with the size that is meant where the model takes several.
    """

    model: onnx.ModelProto
    spec: ModelSpec

    @cached_property
    def network(self) -> onnx.ModelProto:
        """What leads to the heads, which are its outputs.

        Raises:
            GraphError: nothing stands before the NMS.
        """
        return cut_to_body(self.model)

    @cached_property
    def layers(self) -> tuple[ConvLayer, ...]:
        """All convolutions, in the order of the graph.

        Of a model of any size, as they are at the size of `spec`.

        Raises:
            GraphError: the size of a feature map is not known.
        """
        image_shape = self.spec.preprocessing.image_shape
        return tuple(_conv_layers(fix_size(self.network, image_shape, batch=1)))

    @cached_property
    def sha256(self) -> str:
        """Over the nodes and weights that lead to the heads: the same for any batch size, NMS
        and score threshold.
        """
        digest = hashlib.sha256()
        for node in self.network.graph.node:
            kept = onnx.NodeProto()
            kept.CopyFrom(node)
            kept.doc_string = ""
            digest.update(kept.SerializeToString(deterministic=True))
        for weight in sorted(self.network.graph.initializer, key=lambda w: w.name):
            values = onnx.numpy_helper.to_array(weight)
            digest.update(f"{weight.name} {values.dtype} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    @property
    def heads(self) -> list[str]:
        return [output.name for output in self.network.graph.output]

    @property
    def quantizable_inputs(self) -> set[str]:
        """Activations that 8 bits are about: the inputs of convolutions that can have them."""
        return {layer.input for layer in self.layers if layer.quantizable}


def block_of(name: str) -> str:
    """The block that a node's name says it stands in; its first part where the name is of
    another kind.
    """
    for pattern in _BLOCK_PATTERNS:
        match = re.search(pattern, name)
        if match:
            return match[1]
    return name.lstrip("/").split("/")[0] or "unnamed"


def cut_to_body(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that ends at the heads: what NMS and box decoding take from the network are its
    outputs, float32 where the file does not say.

    Raises:
        GraphError: nothing stands before the NMS.
    """
    nodes = model.graph.node
    behind: set[str] = set()  # tensors of NMS and what follows
    heads: dict[str, None] = {}
    body = []
    for node in nodes:
        if begins_nms(node) or behind & reads(node):
            behind.update(node.output)
        else:
            body.append(node)
    made = {output for node in body for output in node.output}
    for node in nodes:
        if behind.intersection(node.output):
            heads.update((name, None) for name in _in_order(node) if name in made)
    heads.update((output.name, None) for output in model.graph.output if output.name in made)
    if not heads:
        raise GraphError(
            "model: expected a network before the NMS, found none; write it again with create_onnx.py"
        )
    weights = {weight.name for weight in model.graph.initializer}
    inputs = [value.name for value in model.graph.input if value.name not in weights]
    network = cut_onnx(model, inputs, heads)
    for output in network.graph.output:
        if not output.HasField("type"):
            output.CopyFrom(make_tensor_value_info(output.name, onnx.TensorProto.FLOAT, None))
    return network


def _in_order(node: onnx.NodeProto) -> list[str]:
    """What a node reads: its inputs, then what its subgraphs capture."""
    return [*node.input, *sorted(captured(node))]


def _conv_layers(body: onnx.ModelProto) -> list[ConvLayer]:
    inferred = onnx.shape_inference.infer_shapes(body).graph
    shapes = {
        info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        for info in [*inferred.value_info, *inferred.output, *inferred.input]
    }
    weights = {w.name: tuple(w.dims) for w in body.graph.initializer}
    dequantized = _constants_behind_dequantize(body, weights)
    pooled = _pooled_tensors(body, weights.keys())
    layers = []
    for node in body.graph.node:
        if node.op_type != "Conv":
            continue
        weight_shape = weights.get(node.input[1]) or dequantized.get(node.input[1])
        size = shapes.get(node.output[0], [])[2:]
        if weight_shape is None or not size or not all(size):
            raise GraphError(
                f"Conv '{node.name}': expected constant weights and a feature map of known size, found "
                f"weights {weight_shape}, size {size}; convert the model with a fixed size (create_onnx.py --input_shape)"
            )
        attributes = {a.name: a for a in node.attribute}
        group = attributes["group"].i if "group" in attributes else 1
        bias = node.input[2] if len(node.input) > 2 else ""
        layers.append(
            ConvLayer(
                node.name,
                node.input[0],
                node.input[1],
                bias,
                node.output[0],
                block_of(node.name),
                int(np.prod(weight_shape, dtype=np.int64) * np.prod(size, dtype=np.int64)),
                depthwise=group > 1 and weight_shape[1] == 1 and group == weight_shape[0],
                pooled=node.input[0] in pooled,
                padded="pads" in attributes and any(attributes["pads"].ints),
                constant=node.input[1] in weights and (not bias or bias in weights),
            )
        )
    return layers


def _constants_behind_dequantize(
    body: onnx.ModelProto, weights: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Shapes of weights that a model with Q/DQ keeps behind DequantizeLinear, or a pair."""
    found: dict[str, tuple[int, ...]] = {}
    for node in body.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            shape = weights.get(node.input[0]) or found.get(node.input[0])
            if shape is not None:
                found[node.output[0]] = shape
    return found


def _pooled_tensors(body: onnx.ModelProto, weights: Iterable[str]) -> set[str]:
    """What follows from global averages alone: the gates of squeeze-and-excite."""
    constants = set(weights)
    pooled: set[str] = set()
    for node in body.graph.node:
        data = reads(node) - constants
        if node.op_type == "GlobalAveragePool" or (data and data <= pooled):
            pooled.update(node.output)
    return pooled


def watched(network: onnx.ModelProto, tensors: Iterable[str]) -> onnx.ModelProto:
    """A copy whose outputs are these tensors of float32, for ONNX Runtime to run."""
    model = onnx.ModelProto()
    model.CopyFrom(deformable_attention.lower(network))
    del model.graph.output[:]
    float32 = onnx.TensorProto.FLOAT
    model.graph.output.extend(make_tensor_value_info(name, float32, None) for name in tensors)
    return model
