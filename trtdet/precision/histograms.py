# SPDX-License-Identifier: Apache-2.0
"""What calibration keeps of an activation: a histogram of its magnitudes, and per channel the range
and two moments.

Ranges are powers of two and grow by merging bins, which is exact: the result does not depend on the
order or grouping of the data.
"""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtdet import checks
from trtdet.precision.options import Method
from trtdet.precision.scales import INT8, LEVELS

PERCENTILE = 99.99

TENSOR_BINS = 4096  # more than half of them are in use


class TensorHistogram:
    """Magnitudes of one tensor, over everything added so far."""

    def __init__(self, bins: int = TENSOR_BINS) -> None:
        self.counts = np.zeros(bins, np.int64)
        self.limit = 2.0**-100  # a power of two: merging bins in pairs is exact
        self.largest = 0.0

    @property
    def width(self) -> float:
        """Of one bin."""
        return self.limit / len(self.counts)

    def add(self, values: NDArray[np.float32]) -> None:
        magnitudes = np.abs(values).reshape(-1)
        largest = float(magnitudes.max(initial=0.0))
        bins = len(self.counts)
        self.largest = max(self.largest, largest)
        if largest >= self.limit:
            limit = 2.0 ** (np.floor(np.log2(largest)) + 1)
            places = (np.arange(bins) * (self.limit / limit)).astype(np.intp)
            self.counts = np.bincount(places, self.counts, minlength=bins).astype(np.int64)
            self.limit = limit
        magnitudes *= np.float32(bins / self.limit)
        self.counts += np.bincount(magnitudes.astype(np.intp), minlength=bins)

    def clip(self, method: Method) -> float:
        """Largest magnitude to represent; 1 for a tensor of zeros, which any represents."""
        if not self.largest:
            return 1.0
        return min(_CHOOSERS[method](self.counts, self.width), self.largest)

    def noise(self, scale: float) -> float:
        """Mean squared error of rounding with `scale`."""
        centers = (np.arange(len(self.counts)) + 0.5) * self.width
        total = max(int(self.counts.sum()), 1)
        return float((self.counts * squared_error(centers, scale)).sum() / total)


@dataclass(frozen=True)
class ChannelStatistics:
    """One activation, per channel; float32 (C,) each.

    Attributes:
        lowest, highest: value.
        mean, power: of x and of x squared.
        noise: mean squared error when the whole tensor is rounded with its scale in the cache.
    """

    lowest: NDArray[np.float32]
    highest: NDArray[np.float32]
    mean: NDArray[np.float32]
    power: NDArray[np.float32]
    noise: float

    @property
    def largest(self) -> NDArray[np.float32]:
        """Magnitude."""
        return np.maximum(np.abs(self.lowest), np.abs(self.highest))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the arrays as base64 of little-endian float32, one after the other."""
        rows = np.stack([self.lowest, self.highest, self.mean, self.power]).astype("<f4")
        return {"noise": self.noise, "values": base64.b64encode(rows.tobytes()).decode("ascii")}


@dataclass(frozen=True)
class ChannelRow:
    """`ChannelStatistics` as JSON has them."""

    noise: float
    values: str

    def __post_init__(self) -> None:
        checks.finite("noise", self.noise, 0, 1e300)
        if not self._rows.size:
            raise ValueError("values: expected four numbers for each channel, found none")
        if not np.isfinite(self._rows).all():
            raise ValueError("values: expected numbers, found infinity or NaN")

    @property
    def _rows(self) -> NDArray[np.float32]:
        """(4, C)

        Raises:
            ValueError: not base64, or not four rows.
        """
        rows = np.frombuffer(base64.b64decode(self.values, validate=True), "<f4")
        return rows.reshape(4, -1).astype(np.float32)

    @property
    def statistics(self) -> ChannelStatistics:
        lowest, highest, mean, power = self._rows
        return ChannelStatistics(lowest, highest, mean, power, self.noise)


class ChannelMoments:
    """Range and the first two moments of one tensor, channel by channel."""

    def __init__(self) -> None:
        self.count = 0
        self.lowest: NDArray[np.float32] = np.full(1, np.inf, np.float32)
        self.highest: NDArray[np.float32] = np.full(1, -np.inf, np.float32)
        self.sum: NDArray[np.float64] = np.zeros(1)
        self.sum_squares: NDArray[np.float64] = np.zeros(1)

    def add(self, values: NDArray[np.float32]) -> None:
        """`values`: [N, C, ...]"""
        rows = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)
        self.count += rows.shape[1]
        self.lowest = np.minimum(self.lowest, rows.min(1))
        self.highest = np.maximum(self.highest, rows.max(1))
        self.sum = self.sum + rows.sum(1, dtype=np.float64)
        self.sum_squares = self.sum_squares + np.einsum("ij,ij->i", rows, rows)

    def statistics(self, noise: float) -> ChannelStatistics:
        return ChannelStatistics(
            self.lowest,
            self.highest,
            (self.sum / self.count).astype(np.float32),
            (self.sum_squares / self.count).astype(np.float32),
            noise,
        )


def squared_error(magnitudes: NDArray[Any], scale: float) -> NDArray[Any]:
    """Expected squared error of symmetric INT8: nothing below half a step, s^2 / 12 between,
    what is cut off beyond 127 steps.
    """
    step = max(scale, 1e-30)
    inner = np.where(magnitudes < step / 2, magnitudes**2, step**2 / 12)
    amax = INT8.amax(step)
    return np.where(magnitudes > amax, (magnitudes - amax) ** 2, inner)


# ---- choosing where to clip


def _minmax(counts: NDArray[np.int64], width: float) -> float:
    """The upper edge of the last bin in use."""
    return float((np.flatnonzero(counts)[-1] + 1) * width)


def _percentile(counts: NDArray[np.int64], width: float) -> float:
    place = np.searchsorted(np.cumsum(counts), PERCENTILE / 100 * counts.sum())
    return float((place + 1) * width)


def _mse(counts: NDArray[np.int64], width: float) -> float:
    """The clip with the least mean squared error, among 100 from 1 % to all of the range."""
    largest = _minmax(counts, width)
    used = round(largest / width)
    centers = (np.arange(used) + 0.5) * width
    weights: NDArray[np.float64] = counts[:used].astype(np.float64)
    clips = largest * np.arange(1, 101) / 100
    errors = [(weights * squared_error(centers, INT8.scale(float(clip)))).sum() for clip in clips]
    return float(clips[int(np.argmin(errors))])


def _entropy(counts: NDArray[np.int64], width: float) -> float:
    """The clip whose 128 levels lose least information: Migacz, 8-bit inference with TensorRT,
    GTC 2017.
    """
    used = round(_minmax(counts, width) / width)
    levels = LEVELS + 1
    best, best_divergence = used, np.inf
    cumulative = np.concatenate([[0], np.cumsum(counts[:used])]).astype(np.float64)
    for size in range(min(levels, used), used + 1, max(1, used // 512)):
        reference = counts[:size].astype(np.float64)
        inside = reference > 0
        reference[-1] += cumulative[-1] - cumulative[size]
        edges = np.linspace(0, size, levels + 1).astype(np.intp)
        level_of = np.searchsorted(edges, np.arange(size), side="right") - 1
        mass = np.bincount(level_of, counts[:size], minlength=levels)
        filled = np.bincount(level_of, inside, minlength=levels)
        rounded = np.where(inside, (mass / np.maximum(filled, 1))[level_of], 0.0)
        divergence = _divergence(reference, rounded)
        if divergence < best_divergence:
            best, best_divergence = size, divergence
    return float(best * width)


def _divergence(reference: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    total, other_total = reference.sum(), other.sum()
    if not total or not other_total:
        return float("inf")
    p, q = reference / total, other / other_total
    there = p > 0
    return float((p[there] * np.log(p[there] / np.maximum(q[there], 1e-12))).sum())


_CHOOSERS: dict[Method, Callable[[NDArray[np.int64], float], float]] = {
    "entropy": _entropy,
    "minmax": _minmax,
    "percentile": _percentile,
    "mse": _mse,
}
