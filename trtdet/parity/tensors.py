# SPDX-License-Identifier: Apache-2.0
"""How far the tensors of two models are apart."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Values compared at a time: float64 copies stay in a core's cache, and BLAS starts no threads for
#: them.
BLOCK = 2**13


@dataclass(frozen=True)
class TensorDifference:
    """One tensor of both models, over all images that were run.

    Attributes:
        head: whether the network ends in it.
        maximum, mean: of the absolute difference.
        cosine: of the angle between both, 1 where they are parallel; NaN where one of them is zero.
        sqnr_db: signal power of the reference to power of the difference, in decibels; infinite
            where they are equal.
        non_finite: values that are infinite or NaN in the candidate alone; they count in none of
            the above.
        shapes: of one image, where the models disagree on it; then nothing else is known.
    """

    name: str
    head: bool = False
    maximum: float = math.nan
    mean: float = math.nan
    cosine: float = math.nan
    sqnr_db: float = math.nan
    non_finite: int = 0
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def equal(self) -> bool:
        return self.maximum == 0 and not self.non_finite

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "head": self.head,
            "max": json_number(self.maximum),
            "mean": json_number(self.mean),
            "cosine": json_number(self.cosine),
            "sqnr_db": json_number(self.sqnr_db),
            "equal": self.equal,
            "non_finite": self.non_finite,
            "shapes": self.shapes,
        }


class TensorStatistics:
    """Sums over images, from which a `TensorDifference` follows. Holds no tensor."""

    def __init__(self, name: str, *, head: bool = False) -> None:
        self.name, self.head = name, head
        self._count = self._non_finite = 0
        self._maximum = self._absolute = 0.0
        self._reference2 = self._candidate2 = self._product = self._difference2 = 0.0
        self._shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def add(self, reference: NDArray[Any], candidate: NDArray[Any]) -> None:
        """Count one image in; both arrays floating point, of any shape, which should be the
        same.
        """
        if reference.shape != candidate.shape:
            self._shapes = (reference.shape, candidate.shape)
            return
        left, right = np.ravel(reference), np.ravel(candidate)
        for start in range(0, left.size, BLOCK):
            block = slice(start, start + BLOCK)
            self._add(left[block].astype(np.float64), right[block].astype(np.float64))

    def _add(self, r: NDArray[np.float64], c: NDArray[np.float64]) -> None:
        with np.errstate(invalid="ignore"):  # of two infinities
            gap = r - c
            difference2 = float(gap @ gap)
        if not math.isfinite(difference2):
            usable = np.isfinite(r) & np.isfinite(c)
            self._non_finite += int((np.isfinite(r) & ~np.isfinite(c)).sum())
            r, c, gap = r[usable], c[usable], gap[usable]
            difference2 = float(gap @ gap)
        np.abs(gap, out=gap)
        self._count += len(r)
        self._maximum = max(self._maximum, float(gap.max(initial=0.0)))
        self._absolute += float(gap.sum())
        self._reference2 += float(r @ r)
        self._candidate2 += float(c @ c)
        self._product += float(r @ c)
        self._difference2 += difference2

    def result(self) -> TensorDifference:
        if self._shapes or not self._count:
            return TensorDifference(
                self.name, self.head, non_finite=self._non_finite, shapes=self._shapes
            )
        norms = math.sqrt(self._reference2) * math.sqrt(self._candidate2)
        return TensorDifference(
            self.name,
            self.head,
            self._maximum,
            self._absolute / self._count,
            self._cosine(norms),
            _decibels(self._reference2, self._difference2),
            self._non_finite,
        )

    def _cosine(self, norms: float) -> float:
        if self._difference2 == 0:
            return 1.0  # equal, both zero included
        return min(1.0, self._product / norms) if norms else math.nan


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def worst_first(tensors: Iterable[TensorDifference]) -> list[TensorDifference]:
    """By what is wrong with them: other shapes, values that are not finite, then low SQNR."""
    return sorted(
        tensors,
        key=lambda t: (t.shapes is None, -t.non_finite, math.inf if math.isnan(t.sqnr_db) else t.sqnr_db),
    )  # fmt: skip


def json_number(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None
