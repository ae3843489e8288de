# SPDX-License-Identifier: Apache-2.0
"""INT8 and FP8 as QuantizeLinear/DequantizeLinear pairs: an FP32 model and a calibration in, a
model for any TensorRT out.

    x -> [Mul, Sub] -> QuantizeLinear -> DequantizeLinear -> Conv <- DequantizeLinear <- int8
    weights

Symmetric (zero point 0), weights per channel, activations per tensor, as TensorRT wants them. Every
input of a convolution is quantized where it arises, once for all convolutions that read it; the
weighted sums, swishes, poolings and resizes between stay in floating point, so that TensorRT fuses
them behind the convolution that feeds them and writes INT8 only where the next one reads it.
Squeeze-and-excite, box decoding and NMS are never quantized.

What makes it accurate (figures in docs/int8.md):

* EfficientNet's depthwise convolutions read activations whose channels differ in range by orders of
  magnitude, and one scale for all of them is what costs most of the AP. A depthwise convolution
  works channel by channel, so a factor per channel on its input and the inverse on its weights
  changes nothing in floating point and gives every channel the full INT8 range.
* A pointwise convolution mixes channels, so the factors move error from activations to weights
  (SmoothQuant). The exponent that predicts the least error is taken, and none where little is
  gained. Behind a convolution the factors cost nothing: they go into its weights.
* A swish reaches up to any height but down to -0.28 only, and symmetric INT8 spends half of its
  numbers below zero. In front of a pointwise convolution, which pads nothing, the range is shifted
  to its middle; the bias undoes it exactly.
* Weights of pointwise convolutions are rounded together, by what their inputs are like, where the
  cache says how (`trtdet.precision.rounding`).
* The mean error that rounded weights make is taken off the bias.

FP8 (E4M3) has an exponent of its own, so a small channel loses nothing beside a large one: no
channel is rescaled, none shifted.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from trtdet.errors import GraphError
from trtdet.precision import equalization, rounding
from trtdet.precision.body import Body, ConvLayer
from trtdet.precision.calibration_cache import CalibrationCache
from trtdet.precision.equalization import Equalization, Equalize, Placed, Weights
from trtdet.precision.graph_types import narrow_types
from trtdet.precision.histograms import ChannelStatistics
from trtdet.precision.pairs import NewConv, RoundedWeights, round_weights, write_convs
from trtdet.precision.scales import FP8, INT8, QuantizedType, activation_scale


@dataclass(frozen=True)
class QuantizationOptions:
    """What to quantize and how.

    Attributes:
        keep: patterns (`*`, `?`) of node names that stay in floating point, beside
            `ModelSpec.sensitive_nodes`.
        to: the type of 8 bits.
        equalize: where to scale channels; takes a cache with statistics per channel.
        shift, correct_bias: as above.
        together: round weights as the cache says; else each to its nearest, as a TensorRT does that
            rounds by itself.
        fp16_scales: choose scales that float16 holds, so that `trtdet.precision.floats.to_fp16`
            changes no number of the pairs.
    """

    keep: Sequence[str] = ()
    to: QuantizedType = INT8
    equalize: Equalize = "all"
    shift: bool = True
    correct_bias: bool = True
    together: bool = True
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
        lines += [
            f"not in {self.type_name}: {n} x {reason}"
            for reason, n in Counter(self.kept.values()).items()
        ]
        return lines


# ---- the whole


def insert_qdq(
    body: Body,
    cache: CalibrationCache,
    options: QuantizationOptions = QuantizationOptions(),
    but: Collection[str] = (),
) -> tuple[onnx.ModelProto, QuantizationReport]:
    """A copy of an FP32 model with its convolutions in INT8; the rest stays FP32, for
    `trtdet.precision.floats` to narrow.

    A model that already has QuantizeLinear nodes (trained with them) is returned as it is.

    Args:
        but: names of convolutions that stay FP32 besides.

    Raises:
        GraphError: no convolution can be quantized: the cache names none of the tensors.
    """
    if own_type(body.model) is not None:
        return body.model, report_of(body)
    plan = plan_quantization(body, cache, options)
    return plan.quantize(but), plan.report(but)


def prepare_implicit(
    body: Body,
    cache: CalibrationCache,
    options: QuantizationOptions = QuantizationOptions(),
    but: Collection[str] = (),
) -> tuple[onnx.ModelProto, CalibrationCache, QuantizationReport]:
    """For a weakly typed TensorRT, which rounds by itself: the model with its channels rescaled and
    biases corrected, without Q/DQ.

    Returns:
        The FP32 model, a cache with the scales of its tensors, and what may become INT8; the
        convolutions in `kept` must not.

    Raises:
        GraphError: no convolution can be quantized, or the model has Q/DQ, which is explicit.
    """
    if own_type(body.model) is not None:
        raise GraphError(
            "INT8 with weak typing: the model brings its own Q/DQ, which needs no calibrator; leave out --weak_typing, or --dla_core"
        )
    plan = plan_quantization(body, cache, options)
    rescaled, amax = write_convs(
        body.model, plan.convolutions(but), options.to, pairs=False, fp16_scales=options.fp16_scales
    )
    scales = {tensor: float(activation_scale(value, INT8)) for tensor, value in amax.items()}
    return rescaled, CalibrationCache(cache.scales | scales), plan.report(but)


@dataclass(frozen=True, eq=False)
class QuantizationPlan:
    """What is known of a body's convolutions before it is settled which of them are quantized: many
    choices are tried from one plan.

    Attributes:
        kept: convolution -> why it stays in floating point, whatever is chosen.
        weights: of all convolutions whose weights are known, as they are in the model.
        equalized: convolution that may be quantized -> what becomes of its input's channels if it
            is. None depends on another.
    """

    body: Body
    cache: CalibrationCache
    options: QuantizationOptions
    kept: Mapping[str, str]
    weights: Mapping[str, Weights]
    equalized: Mapping[str, Placed]

    @property
    def layers(self) -> list[ConvLayer]:
        """Those that may be quantized, in the order of the graph."""
        return [layer for layer in self.body.layers if layer.name not in self.kept]

    @property
    def total_macs(self) -> int:
        """Multiply-accumulates of all convolutions."""
        return sum(layer.macs for layer in self.body.layers)

    @property
    def kept_macs(self) -> int:
        """Of those that stay in floating point, whatever is chosen."""
        return self.total_macs - sum(layer.macs for layer in self.layers)

    def quantize(self, but: Collection[str] = (), *, network: bool = False) -> onnx.ModelProto:
        """A copy with all of `layers` in 8 bits, less those of these names.

        Args:
            network: of the body's network alone, up to the heads, in place of the whole model.
        """
        model = self.body.network if network else self.body.model
        fp16 = self.options.fp16_scales
        convs = self.convolutions(but)
        quantized = write_convs(model, convs, self.options.to, pairs=True, fp16_scales=fp16)[0]
        equalization.attach_rescaled(quantized, self._rescaled(but))
        return quantized

    def _rescaled(self, but: Collection[str]) -> dict[str, Equalization]:
        """Tensor that a convolution makes with other factors per channel than before -> these."""
        made = {layer.name: layer.output for layer in self.body.layers}
        quantized = {layer.name for layer in self.layers}.difference(but)
        return {
            made[placed.producer]: placed.equalization
            for name, placed in self.equalized.items()
            if placed.producer and name in quantized
        }

    def convolutions(self, but: Collection[str] = ()) -> dict[str, NewConv]:
        """What becomes of each convolution whose weights are known."""
        quantized = {layer.name for layer in self.layers}.difference(but)
        taken = {
            placed.producer: placed.equalization
            for name, placed in self.equalized.items()
            if placed.producer and name in quantized
        }
        return {
            layer.name: self._convolution(layer, layer.name in quantized, taken.get(layer.name))
            for layer in self.body.layers
            if layer.name in self.weights
        }

    def alone(self, layer: ConvLayer) -> NewConv:
        """One of `layers` in 8 bits, the others as they are: what it asks of its input's
        channels takes nodes of its own.
        """
        placed = self.equalized.get(layer.name)
        own_nodes = placed.equalization if placed else None
        return replace(self._convolution(layer, True, None), equalization=own_nodes)

    def in_steps(self, layer: ConvLayer) -> NDArray[np.float64] | None:
        """The weights of a convolution that can be rounded together, (outputs, inputs), in steps
        of INT8; None of any other: not pointwise, or little is known of its input.
        """
        weights = self.weights[layer.name]
        if self.options.to is not INT8 or layer.depthwise or weights.values.shape[2:] != (1, 1):
            return None
        if equalization.statistics_of(layer, weights, self.cache) is None:
            return None
        if placed := self.equalized.get(layer.name):
            weights = equalization.undo_in(weights, placed.equalization, depthwise=False)
        return rounding.in_steps(weights.values)

    def _rounded(self, layer: ConvLayer, weights: Weights) -> RoundedWeights:
        """
        Args:
            weights: with the factors of all equalizations. Those of its outputs scale whole rows,
                which does not change how a row is rounded.
        """
        nearest = round_weights(weights.values, self.options.to, fp16=self.options.fp16_scales)
        kept = self.cache.rounding.get(layer.name) if self.options.together else None
        steps = self.in_steps(layer) if kept else None
        if kept is None or steps is None or not kept.fits(steps):
            return nearest
        return replace(nearest, rounded=kept.apply(steps).reshape(weights.values.shape))

    def report(self, but: Collection[str] = ()) -> QuantizationReport:
        """On `quantize(but)`."""
        quantized = {layer.name for layer in self.layers}.difference(but)
        notes = {name: p.note for name, p in self.equalized.items() if name in quantized}
        kept = {**self.kept, **{name: "left out" for name in but if name not in self.kept}}
        return QuantizationReport(
            _shares(self.body.layers, quantized), kept, notes, type_name=self.options.to.name
        )

    def _convolution(
        self, layer: ConvLayer, quantized: bool, taken: Equalization | None
    ) -> NewConv:
        """
        Args:
            taken: what its weights take of the convolution that reads its output.
        """
        weights = self.weights[layer.name]
        placed = self.equalized.get(layer.name) if quantized else None
        if placed:
            weights = equalization.undo_in(weights, placed.equalization, depthwise=layer.depthwise)
        if taken:
            weights = equalization.apply_in(weights, taken)
        if not quantized:
            return NewConv(layer, weights)
        rounded = self._rounded(layer, weights)
        if self.options.correct_bias:
            error = mean_output(
                weights.values - rounded.values,
                self.cache.channels.get(layer.input),
                placed.equalization if placed else None,
            )
            weights = Weights(weights.values, weights.bias + error)
        own_nodes = placed.equalization if placed and not placed.producer else None
        return NewConv(layer, weights, rounded, self.cache.amax(layer.input), own_nodes)


# ---- its steps


def plan_quantization(
    body: Body,
    cache: CalibrationCache,
    options: QuantizationOptions = QuantizationOptions(),
) -> QuantizationPlan:
    """Choose the convolutions, and what becomes of the channels of each.

    Raises:
        GraphError: no convolution can be quantized, or two have one name.
    """
    names = [node.name for node in body.model.graph.node if node.op_type == "Conv"]
    if len(set(names)) != len(names):
        raise GraphError(
            "INT8: expected convolutions with names of their own, found two of one name"
        )
    kept = reasons_to_keep(body, cache, options.keep)
    chosen = [layer for layer in body.layers if layer.name not in kept]
    if not chosen:
        reasons = "; ".join(sorted(set(kept.values()))) or "it has none"
        raise GraphError(
            f"{options.to.name}: no convolution can be quantized ({reasons}); calibrate this model with --calib_input"
        )
    weights = read_weights(body)
    equalized = equalization.choose_equalizations(
        chosen,
        weights,
        equalization.only_producers(body.network, body.layers),
        cache,
        options.equalize if options.to is INT8 else "none",
        shift=options.shift,
        correct_bias=options.correct_bias,
    )
    return QuantizationPlan(body, cache, options, kept, weights, equalized)


def reasons_to_keep(body: Body, cache: CalibrationCache, keep: Sequence[str]) -> dict[str, str]:
    """Convolution -> why it stays in floating point; what is not in it is to be quantized.

    Args:
        keep: patterns of names, beside `ModelSpec.sensitive_nodes`.
    """
    sensitive = body.spec.sensitive_nodes
    kept: dict[str, str] = {}
    for layer in body.layers:
        pattern = next((p for p in (*keep, *sensitive) if fnmatchcase(layer.name, p)), None)
        if pattern is not None:
            why = "sensitive" if pattern in sensitive else "asked for"
            kept[layer.name] = f"{why} ('{pattern}')"
        elif layer.pooled:
            kept[layer.name] = "squeeze-and-excite"
        elif not layer.constant:
            kept[layer.name] = "weights are not constant"
        elif cache.amax(layer.input) <= 0.0:
            kept[layer.name] = "no scale in the calibration cache"
    return kept


def read_weights(body: Body) -> dict[str, Weights]:
    """Of the convolutions whose weights are constant; zeros for a bias that is not there."""
    initializers = {w.name: w for w in body.network.graph.initializer}
    found = {}
    for layer in body.layers:
        if layer.constant:
            values = numpy_helper.to_array(initializers[layer.weight]).astype(np.float64)
            bias = np.zeros(len(values))
            if layer.bias:
                bias = numpy_helper.to_array(initializers[layer.bias]).astype(np.float64)
            found[layer.name] = Weights(values, bias)
    return found


def mean_output(
    weights: NDArray[np.float64],
    statistics: ChannelStatistics | None,
    equalized: Equalization | None,
) -> NDArray[np.float64] | float:
    """What weights, of an error of rounding, make of the average input, per output channel; padding
    left aside. 0 where it is not known.

    Args:
        statistics: of the input before `equalized`.
    """
    if statistics is None:
        return 0.0
    mean = statistics.mean.astype(np.float64)
    if equalized is not None:
        mean = (mean - equalized.shift) * equalized.factors
    per_input = weights.reshape(len(weights), weights.shape[1], -1).sum(2)
    groups = len(mean) // per_input.shape[1]
    if groups == 1:
        return per_input @ mean
    rows = np.repeat(mean.reshape(groups, -1), len(weights) // groups, axis=0)
    return (per_input * rows).sum(1)


# ---- what is quantized


def own_type(model: onnx.ModelProto) -> QuantizedType | None:
    """The 8-bit type of a model that brings its own Q/DQ; None where it brings none."""
    if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return None
    constants = [a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute]
    kinds = {tensor.data_type for tensor in (*model.graph.initializer, *constants)}
    return FP8 if FP8.onnx_type in kinds else INT8


def precision_of(model: onnx.ModelProto) -> str:
    """What an ONNX file is in, as its nodes and weights say it: a name of
    `trtdet.precision.options.PRECISIONS`.
    """
    own = own_type(model)
    return own.name.lower() if own else min(narrow_types(model), default="fp32")


def report_of(body: Body) -> QuantizationReport:
    """What of a model with its own Q/DQ is in 8 bits."""
    quantized = quantized_convs(body.model)
    kept = {
        layer.name: "no Q/DQ in the model"
        for layer in body.layers
        if layer.name not in quantized and not layer.pooled
    }
    return QuantizationReport(
        _shares(body.layers, quantized),
        kept,
        already=True,
        type_name=(own_type(body.model) or INT8).name,
    )


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
