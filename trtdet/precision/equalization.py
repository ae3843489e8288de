# SPDX-License-Identifier: Apache-2.0
"""Channels of one range: a factor and a shift per channel of a convolution's input, which its
weights and bias undo.

    conv(x, W) + b  =  conv(x', W / factors) + (b + W shift)        x' = (x - shift) * factors

Nothing changes in floating point; INT8, with one scale for all channels, loses less. Where a
convolution makes x for nobody else, the factors go into its weights and cost nothing; elsewhere
they take nodes of their own, and must be worth them.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from trtdet import reading
from trtdet.precision.body import ConvLayer
from trtdet.precision.calibration_cache import CalibrationCache
from trtdet.precision.histograms import ChannelStatistics
from trtdet.precision.scales import INT8
from trtdet.sources.subgraphs import captured

#: Where to equalize.
Equalize = Literal["none", "depthwise", "all"]

#: Factors stay within this ratio of each other: channels that are all but dead need no resolution,
#: and FP16 holds the products.
LARGEST_FACTOR_RATIO = 2.0**10
#: Exponents of SmoothQuant that are tried: 0 spreads the error by the weights alone, 1 by the
#: activations alone.
EXPONENTS = tuple(i / 10 for i in range(11))
#: Ranges per channel are taken so much wider than calibration saw them: of many channels, one or
#: the other reaches further in the next image.
HEADROOM = 1.15
#: A Mul of its own before a pointwise convolution must cut the predicted error power to this share.
WORTH_A_NODE = 0.5


@dataclass(frozen=True, eq=False)
class Equalization:
    """x' = (x - shift) * factors, per input channel; what the convolution's weights and bias
    undo.
    """

    factors: NDArray[np.float64]
    shift: NDArray[np.float64]

    def undo(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """x of x', (channels, ...)."""
        column = (-1, *[1] * (values.ndim - 1))
        found = values / self.factors.reshape(column) + self.shift.reshape(column)
        return found.astype(np.float32)


@dataclass(frozen=True, eq=False)
class Placed:
    """An equalization and where it goes.

    Attributes:
        producer: the convolution whose weights take it; "": it takes nodes of its own.
        note: for the report.
    """

    equalization: Equalization
    producer: str
    note: str


@dataclass(frozen=True, eq=False)
class Weights:
    """Of one convolution: (outputs, inputs of a group, ...) and (outputs,); not to be changed."""

    values: NDArray[np.float64]
    bias: NDArray[np.float64]


# ---- what a file says of it

#: Metadata of an ONNX file: JSON, tensor -> [factors, shift], of the tensors that a convolution
#: makes rescaled.
RESCALED_KEY = "trtdet.rescaled"


def attach_rescaled(model: onnx.ModelProto, rescaled: Mapping[str, Equalization]) -> None:
    """Write down which tensors are not those of the float model, so that they can be compared
    with these.
    """
    if rescaled:
        lists = {name: [e.factors.tolist(), e.shift.tolist()] for name, e in rescaled.items()}
        text = json.dumps(lists, separators=(",", ":"))
        model.metadata_props.append(onnx.StringStringEntryProto(key=RESCALED_KEY, value=text))


def read_rescaled(model: onnx.ModelProto) -> dict[str, Equalization]:
    """What `attach_rescaled` wrote.

    Raises:
        ValueError: it is no longer that.
    """
    for prop in model.metadata_props:
        if prop.key == RESCALED_KEY:
            kind = dict[str, tuple[list[float], list[float]]]
            found = reading.parse(
                prop.value,
                kind,
                name=RESCALED_KEY,
                remedy="write the file again with build_engine.py --save_onnx",
            )
            return {
                name: Equalization(np.array(factors), np.array(shift))
                for name, (factors, shift) in found.items()
            }
    return {}


# ---- which


def choose_equalizations(
    layers: Iterable[ConvLayer],
    weights: Mapping[str, Weights],
    producers: Mapping[str, str],
    cache: CalibrationCache,
    where: Equalize,
    *,
    shift: bool,
    correct_bias: bool = True,
) -> dict[str, Placed]:
    """Convolution -> what is best for its input, depthwise ones first.

    None depends on another: any of them may be left out.

    Args:
        producers: of `only_producers`.
        shift: allow one, too.
        correct_bias: the mean error of rounded weights will be taken off the bias.
    """
    found: dict[str, Placed] = {}
    if where == "none":
        return found
    layers = list(layers)
    for layer in layers:
        statistics = statistics_of(layer, weights[layer.name], cache)
        if layer.depthwise and statistics is not None:
            best = depthwise_equalization(statistics, cache.amax(layer.input))
            found[layer.name] = Placed(best, "", "depthwise")
    for layer in layers if where == "all" else ():
        statistics = statistics_of(layer, weights[layer.name], cache)
        if layer.depthwise or statistics is None:
            continue
        values, scale = weights[layer.name].values, cache.scales[layer.input]
        # A shift turns padding with zeros into padding with something else.
        pointwise = values.shape[2:] == (1, 1) and not layer.padded
        before = predicted_noise(values, statistics, None, scale, correct_bias=correct_bias)
        best, after = best_equalization(
            values, statistics, scale, shift=pointwise and shift, correct_bias=correct_bias
        )
        producer = producers.get(layer.name, "")
        if after < before * (1 if producer else WORTH_A_NODE):
            place = f"in '{producer}'" if producer else "own nodes"
            found[layer.name] = Placed(best, producer, f"{place}, error x{after / before:.2f}")
    return found


def statistics_of(
    layer: ConvLayer, weights: Weights, cache: CalibrationCache
) -> ChannelStatistics | None:
    """Of a convolution's input, where they are known and a factor per channel is possible: not
    for groups of several channels, nor where all was 0.
    """
    statistics = cache.channels.get(layer.input)
    channels = weights.values.shape[0 if layer.depthwise else 1]
    if statistics is None or len(statistics.mean) != channels or not statistics.largest.any():
        return None
    return statistics


def only_producers(network: onnx.ModelProto, layers: Iterable[ConvLayer]) -> dict[str, str]:
    """Convolution -> the one that makes its input for nobody else, where there is such a one and
    its weights are known.
    """
    readers: dict[str, int] = {output.name: 1 for output in network.graph.output}
    for node in network.graph.node:
        for name in (*node.input, *captured(node)):
            readers[name] = readers.get(name, 0) + 1
    layers = list(layers)
    made_by = {layer.output: layer.name for layer in layers if layer.constant}
    return {
        layer.name: made_by[layer.input]
        for layer in layers
        if layer.input in made_by and readers[layer.input] == 1
    }


def depthwise_equalization(statistics: ChannelStatistics, amax: float) -> Equalization:
    """Every channel gets the full range, less `HEADROOM`.

    No shift: padding with zeros would no longer be padding with zeros.

    Args:
        amax: of the whole tensor.
    """
    factors = amax / _floored(statistics.largest * HEADROOM)
    return Equalization(factors, np.zeros_like(factors))


def best_equalization(
    weights: NDArray[np.float64],
    statistics: ChannelStatistics,
    scale: float,
    *,
    shift: bool,
    correct_bias: bool = True,
) -> tuple[Equalization, float]:
    """Of SmoothQuant's exponents, with and without a shift to the middle of the range, what
    predicts the least noise; and that noise.
    """
    reach = _floored(np.abs(weights).max((0, *range(2, weights.ndim))))
    lowest = statistics.lowest.astype(np.float64) * HEADROOM
    highest = statistics.highest.astype(np.float64) * HEADROOM
    middle = (lowest + highest) / 2
    candidates = []
    for offset in (np.zeros_like(middle), middle)[: 1 + shift]:
        clip = _floored(np.maximum(highest - offset, offset - lowest))
        # Images of one colour have channels without any range.
        clip = np.maximum(clip, HEADROOM * statistics.largest.max() / LARGEST_FACTOR_RATIO)
        for exponent in EXPONENTS:
            factors = reach ** (1 - exponent) / clip**exponent
            factors = factors * (INT8.amax(scale) / (factors * clip).max())
            candidate = Equalization(factors, offset)
            noise = predicted_noise(
                weights, statistics, candidate, scale, correct_bias=correct_bias
            )
            candidates.append((candidate, noise))
    return min(candidates, key=lambda found: found[1])


def predicted_noise(
    weights: NDArray[np.float64],
    statistics: ChannelStatistics,
    equalization: Equalization | None,
    scale: float,
    *,
    correct_bias: bool = True,
) -> float:
    """Error power that INT8 puts on the outputs of a pointwise convolution, errors taken as
    independent.

    Activations: step^2 / 12 for every channel, weighted with the squared weights it meets; what the
    calibration measured where nothing is equalized. Weights: their step^2 / 12, weighted with the
    variance of the activation; with its mean square if the bias is not corrected for the mean.
    """
    rows = np.abs(weights).reshape(len(weights), weights.shape[1], -1)
    mean, power = (v.astype(np.float64) for v in (statistics.mean, statistics.power))
    if equalization is None:
        factors = np.ones(weights.shape[1])
        activation = np.full(len(factors), statistics.noise)
    else:
        factors, shift = equalization.factors, equalization.shift
        activation = scale**2 / 12 / factors**2
        mean, power = mean - shift, power - 2 * shift * mean + shift**2
    if correct_bias:
        power = np.maximum(power - mean**2, 0)
    steps = INT8.scale((rows / factors[None, :, None]).max((1, 2)))
    from_activations = float((activation * (rows**2).sum((0, 2))).sum())
    from_weights = float((steps**2).sum() / 12 * (power * factors**2).sum() * rows.shape[2])
    return from_activations + from_weights


def _floored(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """At least 1 / LARGEST_FACTOR_RATIO of the largest."""
    wide = values.astype(np.float64)
    return np.maximum(wide, max(float(wide.max()), 1e-20) / LARGEST_FACTOR_RATIO)


# ---- what it does to weights


def undo_in(weights: Weights, equalization: Equalization, *, depthwise: bool) -> Weights:
    """Of the convolution that reads x' in place of x."""
    factors, shift = equalization.factors, equalization.shift
    values, bias = weights.values, weights.bias
    if shift.any():
        bias = bias + values.reshape(len(values), -1) @ shift
    per_input = (-1, 1) if depthwise else (1, -1)
    return Weights(values / factors.reshape(*per_input, *[1] * (values.ndim - 2)), bias)


def apply_in(weights: Weights, equalization: Equalization) -> Weights:
    """Of the convolution that makes x' in place of x."""
    factors, values = equalization.factors, weights.values
    bias = (weights.bias - equalization.shift) * factors
    return Weights(values * factors.reshape(-1, *[1] * (values.ndim - 1)), bias)
