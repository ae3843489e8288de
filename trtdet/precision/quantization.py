# SPDX-License-Identifier: Apache-2.0
"""INT8 and FP8 as QuantizeLinear/DequantizeLinear pairs: an FP32 model and a calibration in, a model for any TensorRT out.

    x -> [Mul, Sub] -> QuantizeLinear -> DequantizeLinear -> Conv <- DequantizeLinear <- int8 weights

Symmetric (zero point 0), weights per channel, activations per tensor, as TensorRT wants them. Every input of a convolution is
quantized where it arises, once for all convolutions that read it; the weighted sums, swishes, poolings and resizes between stay in
floating point, so that TensorRT fuses them behind the convolution that feeds them and writes INT8 only where the next one reads it.
Squeeze-and-excite, box decoding and NMS are never quantized.

What makes it accurate (figures in docs/int8.md):

* EfficientNet's depthwise convolutions read activations whose channels differ in range by orders of magnitude, and one scale for all
  of them is what costs most of the AP. A depthwise convolution works channel by channel, so a factor per channel on its input
  and the inverse on its weights changes nothing in floating point and gives every channel the full INT8 range.
* A pointwise convolution mixes channels, so the factors move error from activations to weights (SmoothQuant). The exponent that
  predicts the least error is taken, and none where little is gained. Behind a convolution the factors cost nothing:
  they go into its weights.
* A swish reaches up to any height but down to -0.28 only, and symmetric INT8 spends half of its numbers below zero. In front of a
  pointwise convolution, which pads nothing, the range is shifted to its middle; the bias undoes it exactly.
* The mean error that rounded weights make is taken off the bias.

FP8 (E4M3) has an exponent of its own, so a small channel loses nothing beside a large one: no channel is rescaled, none shifted.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from trtdet.errors import GraphError
from trtdet.precision.body import Body, ConvLayer
from trtdet.precision.calibration_cache import CalibrationCache
from trtdet.precision.floats import raise_opset, replace_nodes
from trtdet.precision.histograms import ChannelStatistics
from trtdet.precision.scales import (
    FP8,
    INT8,
    QuantizedType,
    activation_scale,
    round_to,
    stored,
    weight_scales,
)
from trtdet.sources.subgraphs import captured, reads

Equalize = Literal["none", "depthwise", "all"]


#: Factors stay within this ratio of each other: channels that are all but dead need no resolution, and FP16 holds the products.
LARGEST_FACTOR_RATIO = 2.0**10
#: Exponents of SmoothQuant that are tried: 0 spreads the error by the weights alone, 1 by the activations alone.
EXPONENTS = tuple(i / 10 for i in range(11))
#: A Mul of its own before a pointwise convolution must cut the predicted error power to this share.
WORTH_A_NODE = 0.5


@dataclass(frozen=True)
class QuantizationOptions:
    """What to quantize and how.

    Attributes:
        keep: patterns (`*`, `?`) of node names that stay in floating point, beside `ModelSpec.sensitive_nodes`.
        to: the type of 8 bits.
        equalize: where to scale channels; takes a cache with statistics per channel.
        shift, correct_bias: as above.
        fp16_scales: choose scales that float16 holds, so that `trtdet.precision.floats.to_fp16` changes no number of the pairs.
    """

    keep: Sequence[str] = ()
    to: QuantizedType = INT8
    equalize: Equalize = "all"
    shift: bool = True
    correct_bias: bool = True
    fp16_scales: bool = False


@dataclass(frozen=True)
class BlockShare:
    """Of one block: its multiply-accumulates and those in INT8, and its convolutions likewise."""

    name: str
    macs: int
    int8_macs: int
    convs: int
    int8_convs: int


@dataclass(frozen=True)
class QuantizationReport:
    """What was quantized.

    Attributes:
        blocks: in the order of the network.
        kept: convolution -> why it stays in floating point.
        equalized: convolution -> how: "depthwise", or the exponent and where the factors went.
        already: the model came with Q/DQ and is returned as it was.
        type_name: "INT8".
    """

    blocks: tuple[BlockShare, ...]
    kept: dict[str, str] = field(default_factory=dict)
    equalized: dict[str, str] = field(default_factory=dict)
    already: bool = False
    type_name: str = INT8.name

    @property
    def mac_share(self) -> float:
        """Of all multiply-accumulates of convolutions, those in INT8."""
        total = sum(block.macs for block in self.blocks)
        return sum(block.int8_macs for block in self.blocks) / total if total else 0.0

    def lines(self) -> list[str]:
        """For the log: one line per block, then the reasons for what was kept."""
        total = sum(block.macs for block in self.blocks) or 1
        lines = [
            f"{self.type_name}: {self.mac_share:.1%} of the multiply-accumulates"
            + (" (as the model came, with its own Q/DQ)" if self.already else ""),
            f"{'block':<20}{'MACs':>7}{self.type_name:>8}  convolutions",
        ]
        lines += [
            f"{b.name:<20}{b.macs / total:>7.1%}{b.int8_macs / max(b.macs, 1):>8.1%}  {b.int8_convs} of {b.convs}"
            for b in self.blocks
        ]
        lines += [f"stays: {n} x {reason}" for reason, n in Counter(self.kept.values()).items()]
        return lines


def insert_qdq(
    body: Body,
    cache: CalibrationCache,
    options: QuantizationOptions = QuantizationOptions(),
) -> tuple[onnx.ModelProto, QuantizationReport]:
    """A copy of an FP32 model with its convolutions in INT8; the rest stays FP32, for `trtdet.precision.floats` to narrow.

    A model that already has QuantizeLinear nodes (trained with them) is returned as it is.

    Raises:
        GraphError: no convolution can be quantized: the cache names none of the tensors.
    """
    if own_type(body.model) is not None:
        return body.model, report_of(body)
    return _Quantization(body, cache, options, pairs=True).run()


def prepare_implicit(
    body: Body,
    cache: CalibrationCache,
    options: QuantizationOptions = QuantizationOptions(),
) -> tuple[onnx.ModelProto, CalibrationCache, QuantizationReport]:
    """For a weakly typed TensorRT, which rounds by itself: the model with its channels rescaled and biases corrected, without Q/DQ.

    Returns:
        The FP32 model, a cache with the scales of its tensors, and what may become INT8; the convolutions in `kept` must not.

    Raises:
        GraphError: no convolution can be quantized, or the model has Q/DQ, which is explicit.
    """
    if own_type(body.model) is not None:
        raise GraphError(
            "INT8 with weak typing: the model brings its own Q/DQ, which needs no calibrator; leave out --weak_typing, or --dla_core"
        )
    quantization = _Quantization(body, cache, options, pairs=False)
    rescaled, report = quantization.run()
    return rescaled, CalibrationCache(cache.scales | quantization.new_scales), report


def own_type(model: onnx.ModelProto) -> QuantizedType | None:
    """The 8-bit type of a model that brings its own Q/DQ; None where it brings none."""
    if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return None
    constants = [a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute]
    kinds = {tensor.data_type for tensor in (*model.graph.initializer, *constants)}
    return FP8 if FP8.onnx_type in kinds else INT8


def report_of(body: Body) -> QuantizationReport:
    """What of a model with its own Q/DQ is in 8 bits."""
    shares = _shares(body.layers, quantized_convs(body.model))
    return QuantizationReport(shares, already=True, type_name=(own_type(body.model) or INT8).name)


def quantized_convs(model: onnx.ModelProto) -> frozenset[str]:
    """Names of the convolutions whose input and weights both come from a DequantizeLinear."""
    dequantized = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    return frozenset(
        n.name for n in model.graph.node if n.op_type == "Conv" and {*n.input[:2]} <= dequantized
    )


def _shares(layers: Iterable[ConvLayer], quantized: Collection[str]) -> tuple[BlockShare, ...]:
    blocks: dict[str, list[ConvLayer]] = {}
    for layer in layers:
        blocks.setdefault(layer.block, []).append(layer)
    shares = []
    for name, members in blocks.items():
        int8 = [layer for layer in members if layer.name in quantized]
        macs, int8_macs = (sum(layer.macs for layer in chosen) for chosen in (members, int8))
        shares.append(BlockShare(name, macs, int8_macs, len(members), len(int8)))
    return tuple(shares)


@dataclass(frozen=True)
class Equalization:
    """x' = (x - shift) * factors, per input channel; what the convolution's weights and bias undo."""

    factors: NDArray[np.float64]
    shift: NDArray[np.float64]


def predicted_noise(
    weights: NDArray[np.float64],
    statistics: ChannelStatistics,
    equalization: Equalization | None,
    scale: float,
) -> float:
    """Error power that INT8 puts on the outputs of a pointwise convolution, errors taken as independent.

    Activations: step^2 / 12 for every channel, weighted with the squared weights it meets; what the calibration measured where
    nothing is equalized. Weights: their step^2 / 12, weighted with the mean square of the activation.
    """
    rows = np.abs(weights).reshape(len(weights), weights.shape[1], -1)
    power = statistics.power.astype(np.float64)
    if equalization is None:
        factors = np.ones(weights.shape[1])
        activation = np.full(len(factors), statistics.noise)
    else:
        factors, shift = equalization.factors, equalization.shift
        activation = scale**2 / 12 / factors**2
        power = power - 2 * shift * statistics.mean + shift**2
    steps = INT8.scale((rows / factors[None, :, None]).max((1, 2)))
    from_activations = float((activation * (rows**2).sum((0, 2))).sum())
    from_weights = float((steps**2).sum() / 12 * (power * factors**2).sum() * rows.shape[2])
    return from_activations + from_weights


def best_equalization(
    weights: NDArray[np.float64], statistics: ChannelStatistics, scale: float, *, shift: bool
) -> tuple[Equalization, float]:
    """Of SmoothQuant's exponents, with and without a shift to the middle of the range, what predicts the least noise; and that noise."""
    reach = _floored(np.abs(weights).max((0, *range(2, weights.ndim))))
    lowest, highest = statistics.lowest.astype(np.float64), statistics.highest.astype(np.float64)
    middle = (lowest + highest) / 2
    candidates = []
    for offset in (np.zeros_like(middle), middle)[: 1 + shift]:
        clip = _floored(np.maximum(highest - offset, offset - lowest))
        for exponent in EXPONENTS:
            factors = reach ** (1 - exponent) / clip**exponent
            factors = factors * (INT8.amax(scale) / (factors * clip).max())
            candidate = Equalization(factors, offset)
            candidates.append((candidate, predicted_noise(weights, statistics, candidate, scale)))
    return min(candidates, key=lambda found: found[1])


class _Quantization:
    """One run: decides per convolution, rescales channels, rounds weights, puts the pairs in."""

    def __init__(
        self,
        body: Body,
        cache: CalibrationCache,
        options: QuantizationOptions,
        *,
        pairs: bool,
    ) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(body.model)
        self.cache, self.options, self.explicit = cache, options, pairs
        self.to = options.to
        self.sensitive = body.spec.sensitive_nodes
        self.keep = (*options.keep, *self.sensitive)
        self.graph = self.model.graph
        self.layers = {layer.name: layer for layer in body.layers}
        self.nodes = {node.name: node for node in self.graph.node if node.op_type == "Conv"}
        if len(self.nodes) != sum(node.op_type == "Conv" for node in self.graph.node):
            raise GraphError(
                "INT8: expected convolutions with names of their own, found two of one name"
            )
        self.initializers = {w.name: w for w in self.graph.initializer}
        self.taken = set(self.initializers) | {o for n in self.graph.node for o in n.output}
        self.weights: dict[str, NDArray[np.float64]] = {}  # by convolution
        self.biases: dict[str, NDArray[np.float64]] = {}
        self.equalizations: dict[str, Equalization] = {}  # by convolution: of its input
        self.own_nodes: set[str] = set()  # convolutions whose equalization takes nodes of its own
        self.equalized_tensors: dict[tuple[str, bytes, bytes], str] = {}
        self.pairs: dict[str, str] = {}  # tensor -> what its DequantizeLinear makes
        self.new_scales: dict[str, float] = {}  # of tensors that the model did not have
        self.new_nodes: list[onnx.NodeProto] = []
        self.kept: dict[str, str] = {}
        self.equalized: dict[str, str] = {}

    def run(self) -> tuple[onnx.ModelProto, QuantizationReport]:
        chosen = [layer for layer in self.layers.values() if self._choose(layer)]
        if not chosen:
            reasons = "; ".join(sorted(set(self.kept.values()))) or "it has none"
            raise GraphError(
                f"{self.to.name}: no convolution can be quantized ({reasons}); calibrate this model with --calib_input"
            )
        for layer in self.layers.values():
            if layer.constant:
                self._load(layer)
        if self.explicit and (self.options.fp16_scales or self.to is FP8):
            raise_opset(self.model)
        if self.options.equalize != "none" and self.cache.channels and self.to is INT8:
            for layer in chosen:
                if layer.depthwise:
                    self._equalize_depthwise(layer)
            if self.options.equalize == "all":
                for layer in chosen:
                    if not layer.depthwise:
                        self._equalize_pointwise(layer)
        self._rewrite(chosen)
        shares = _shares(self.layers.values(), {layer.name for layer in chosen})
        report = QuantizationReport(shares, self.kept, self.equalized, type_name=self.to.name)
        return self.model, report

    # --- which convolutions -------------------------------------------------------------------------------------------------

    def _choose(self, layer: ConvLayer) -> bool:
        reason = ""
        pattern = next((p for p in self.keep if fnmatchcase(layer.name, p)), None)
        if pattern is not None:
            reason = (
                f"sensitive ('{pattern}')"
                if pattern in self.sensitive
                else f"asked for ('{pattern}')"
            )
        elif layer.pooled:
            reason = "squeeze-and-excite"
        elif not layer.constant:
            reason = "weights are not constant"
        elif self.cache.scales.get(layer.input, 0.0) <= 0.0:
            reason = "no scale in the calibration cache"
        if reason:
            self.kept[layer.name] = reason
        return not reason

    def _load(self, layer: ConvLayer) -> None:
        weights = numpy_helper.to_array(self.initializers[layer.weight]).astype(np.float64)
        self.weights[layer.name] = weights
        if layer.bias:
            bias = self.initializers.get(layer.bias)
            self.biases[layer.name] = (
                numpy_helper.to_array(bias).astype(np.float64)
                if bias is not None
                else np.zeros(len(weights))
            )
        else:
            self.biases[layer.name] = np.zeros(len(weights))

    # --- channels -----------------------------------------------------------------------------------------------------------

    def _equalize_depthwise(self, layer: ConvLayer) -> None:
        """Every channel gets the full range. No shift: padding with zeros would no longer be padding with zeros."""
        statistics = self._statistics(layer)
        if statistics is None:
            return
        factors = self.cache.amax(layer.input) / _floored(statistics.largest)
        self._equalize(layer, Equalization(factors, np.zeros_like(factors)), None)
        self.equalized[layer.name] = "depthwise"

    def _equalize_pointwise(self, layer: ConvLayer) -> None:
        """What predicts the least error; put into the convolution before, or into nodes of its own where they pay for it."""
        statistics = self._statistics(layer)
        if statistics is None:
            return
        weights, scale = self.weights[layer.name], self.cache.scales[layer.input]
        before = predicted_noise(weights, statistics, None, scale)
        pointwise = weights.shape[2:] == (1, 1) and not self._padded(layer)
        best, after = best_equalization(
            weights, statistics, scale, shift=pointwise and self.options.shift
        )
        producer = self._only_producer(layer)
        if after >= before * (1 if producer else WORTH_A_NODE):
            return
        self._equalize(layer, best, producer)
        where = f"in '{producer.name}'" if producer else "own nodes"
        self.equalized[layer.name] = f"{where}, error x{after / before:.2f}"

    def _statistics(self, layer: ConvLayer) -> ChannelStatistics | None:
        statistics = self.cache.channels.get(layer.input)
        channels = self.weights[layer.name].shape[0 if layer.depthwise else 1]
        return statistics if statistics and len(statistics.mean) == channels else None

    def _padded(self, layer: ConvLayer) -> bool:
        attributes = {a.name: a for a in self.nodes[layer.name].attribute}
        padding = list(attributes["pads"].ints) if "pads" in attributes else []
        return any(padding)

    def _equalize(
        self, layer: ConvLayer, equalization: Equalization, producer: ConvLayer | None
    ) -> None:
        """Change the input's channels, in the convolution that makes it or in nodes of their own, and the weights to fit."""
        factors, shift = equalization.factors, equalization.shift
        weights = self.weights[layer.name]
        if shift.any():
            self.biases[layer.name] += weights.reshape(len(weights), -1) @ shift
        per_input = (-1, 1) if layer.depthwise else (1, -1)
        weights /= factors.reshape(*per_input, *[1] * (weights.ndim - 2))
        self.equalizations[layer.name] = equalization
        if producer is None:
            self.own_nodes.add(layer.name)
        else:
            rows = self.weights[producer.name]
            rows *= factors.reshape(-1, *[1] * (rows.ndim - 1))
            self.biases[producer.name] -= shift
            self.biases[producer.name] *= factors

    def _only_producer(self, layer: ConvLayer) -> ConvLayer | None:
        """The convolution that makes this one's input for nobody else."""
        readers = sum([*node.input, *captured(node)].count(layer.input) for node in self.graph.node)
        if readers != 1 or any(output.name == layer.input for output in self.graph.output):
            return None
        return next(
            (p for p in self.layers.values() if p.output == layer.input and p.constant), None
        )

    # --- the new graph ------------------------------------------------------------------------------------------------------

    def _rewrite(self, chosen: Sequence[ConvLayer]) -> None:
        quantized = {layer.name for layer in chosen}
        for node in list(self.graph.node):
            layer = self.layers.get(node.name) if node.op_type == "Conv" else None
            if layer is not None and layer.constant:
                self._rewrite_conv(node, layer, layer.name in quantized)
            else:
                self.new_nodes.append(node)
        replace_nodes(self.graph, self.new_nodes)
        _drop_unread_weights(self.graph)

    def _rewrite_conv(self, node: onnx.NodeProto, layer: ConvLayer, quantized: bool) -> None:
        weights, bias = self.weights[layer.name], self.biases[layer.name]
        inputs = [layer.input, layer.weight]
        if quantized:
            source, scale = layer.input, self.cache.scales[layer.input]
            if layer.name in self.own_nodes:
                source = self._insert_equalization(source, self.equalizations[layer.name])
            fp16 = self.options.fp16_scales
            scales = weight_scales(weights.astype(np.float32), self.to, fp16=fp16)
            columns = scales.reshape(-1, *[1] * (weights.ndim - 1))
            rounded = round_to(weights / columns, self.to)
            if self.options.correct_bias:
                bias = bias + self._mean_output(layer, weights - rounded * columns)
            if self.explicit:
                inputs = [
                    self._pair(source, scale),
                    self._dequantized_weights(layer, rounded, scales),
                ]
            else:
                self.new_scales[source] = scale
                inputs[0] = source
        if not (quantized and self.explicit):
            inputs[1] = self._constant(f"{layer.name}/weight", weights.astype(np.float32))
        if layer.bias or bias.any():
            inputs.append(self._constant(f"{layer.name}/bias", bias.astype(np.float32)))
        new = onnx.NodeProto()
        new.CopyFrom(node)
        del new.input[:]
        new.input.extend(inputs)
        self.new_nodes.append(new)

    def _mean_output(
        self, layer: ConvLayer, weights: NDArray[np.float64]
    ) -> NDArray[np.float64] | float:
        """What these weights make of the average input; padding left aside."""
        statistics = self.cache.channels.get(layer.input)
        if statistics is None:
            return 0.0
        mean = statistics.mean.astype(np.float64)
        equalization = self.equalizations.get(layer.name)
        if equalization is not None:
            mean = (mean - equalization.shift) * equalization.factors
        per_input = weights.reshape(len(weights), weights.shape[1], -1).sum(2)
        return per_input[:, 0] * mean if layer.depthwise else per_input @ mean

    def _insert_equalization(self, tensor: str, equalization: Equalization) -> str:
        """Once for all depthwise convolutions that read the tensor: theirs are the same."""
        factors = equalization.factors.astype(np.float32).reshape(1, -1, 1, 1)
        offset = (equalization.factors * equalization.shift).astype(np.float32).reshape(1, -1, 1, 1)
        key = (tensor, factors.tobytes(), offset.tobytes())
        if key in self.equalized_tensors:
            return self.equalized_tensors[key]
        steps = [("Mul", "scaled", factors)]
        if offset.any():
            steps.append(("Sub", "shifted", offset))
        result = tensor
        for op, suffix, values in steps:
            name = self._unused(f"{tensor}/{suffix}")
            constant = self._constant(f"{name}/constant", values)
            self.new_nodes.append(helper.make_node(op, [result, constant], [name], name=name))
            result = name
        self.equalized_tensors[key] = result
        return result

    def _pair(self, tensor: str, scale: float) -> str:
        if tensor not in self.pairs:
            quantized = self._unused(f"{tensor}/quantized")
            self.pairs[tensor] = self._unused(f"{tensor}/dequantized")
            values = activation_scale(INT8.amax(scale), self.to, fp16=self.options.fp16_scales)
            operands = [
                self._constant(f"{tensor}/scale", values),
                self._narrow_constant(f"{tensor}/zero_point", np.zeros(())),
            ]
            self.new_nodes += [
                helper.make_node(
                    "QuantizeLinear", [tensor, *operands], [quantized], name=quantized
                ),
                helper.make_node(
                    "DequantizeLinear",
                    [quantized, *operands],
                    [self.pairs[tensor]],
                    name=self.pairs[tensor],
                ),
            ]
        return self.pairs[tensor]

    def _dequantized_weights(
        self, layer: ConvLayer, rounded: NDArray[np.float64], scales: NDArray[np.float32]
    ) -> str:
        name = self._unused(f"{layer.name}/weight/dequantized")
        operands = [
            self._narrow_constant(f"{layer.name}/weight/{self.to.name.lower()}", rounded),
            self._constant(f"{layer.name}/weight/scale", scales),
            self._narrow_constant(f"{layer.name}/weight/zero_point", np.zeros(len(rounded))),
        ]
        self.new_nodes.append(
            helper.make_node("DequantizeLinear", operands, [name], name=name, axis=0)
        )
        return name

    def _constant(self, name: str, values: NDArray[np.generic] | np.generic) -> str:
        name = self._unused(name)
        weight = numpy_helper.from_array(np.asarray(values), name)
        self.graph.initializer.append(weight)
        self.initializers[name] = weight
        return name

    def _narrow_constant(self, name: str, values: NDArray[np.float64]) -> str:
        """Of numbers that the type of 8 bits holds."""
        name = self._unused(name)
        data = stored(values, self.to)
        weight = helper.make_tensor(name, self.to.onnx_type, data.shape, data.tobytes(), raw=True)
        self.graph.initializer.append(weight)
        self.initializers[name] = weight
        return name

    def _unused(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name


def _floored(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """At least 1 / LARGEST_FACTOR_RATIO of the largest."""
    wide = values.astype(np.float64)
    return np.maximum(wide, max(float(wide.max()), 1e-20) / LARGEST_FACTOR_RATIO)


def _drop_unread_weights(graph: onnx.GraphProto) -> None:
    read = {name for node in graph.node for name in reads(node)}
    read |= {output.name for output in graph.output}
    kept = [w for w in graph.initializer if w.name in read]
    copies_of_weights = [onnx.TensorProto.FromString(w.SerializeToString()) for w in kept]
    del graph.initializer[:]
    graph.initializer.extend(copies_of_weights)
