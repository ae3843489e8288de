# SPDX-License-Identifier: Apache-2.0
"""Weights of pointwise convolutions rounded together instead of each to its nearest number: GPTQ
(Frantar and others, arXiv:2210.17323).

What rounding adds to an output, d x for an error d of a row of weights, has the variance d H d', H
the covariance of the inputs x; the bias takes up its mean. Inputs are correlated, so errors of
several weights can cancel. One column after another is rounded to the nearest, and what that leaves
is spread over the columns that are still to come, by the inverse of H. Rows do not depend on each
other.

What is decided is kept with the calibration cache: of each weight, how many steps it is from its
nearest number, compressed, and the hash of the weights that it is about.
"""

import base64
import hashlib
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trtdet.precision.scales import INT8, round_to, weight_scales

#: Of the mean of H's diagonal, added to it: few samples leave directions of which nothing is known.
DAMPING = 0.01
#: Columns that are rounded before what they leave is spread over all others.
BLOCK = 64
#: Parts of a step by which weights are told apart. Their last digits depend on the processor.
HASHED_PARTS = 1000
#: Of one convolution.
MOST_WEIGHTS = 2**28


def in_steps(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """(outputs, inputs), each row in steps of its own INT8 scale, -127 to 127."""
    rows = weights.reshape(len(weights), -1)
    return rows / weight_scales(rows.astype(np.float32), INT8, fp16=True).astype(np.float64)[:, None]  # fmt: skip


def round_together(
    steps: NDArray[np.float64], covariance: NDArray[np.float64], damping: float = DAMPING
) -> NDArray[np.float64]:
    """
    Args:
        steps: (outputs, inputs) in units of the rows' scales.
        covariance: H, (inputs, inputs).

    Returns:
        Whole numbers from -127 to 127.
    """
    diagonal = np.diag(covariance)
    if not (np.isfinite(covariance).all() and diagonal.mean() > 0):
        return round_to(steps, INT8)
    order = np.argsort(-diagonal, kind="stable")  # what weighs most has most left to make up for it
    spread = _inverse_root(covariance[np.ix_(order, order)], damping * float(diagonal.mean()))
    wanted, rounded = steps[:, order].copy(), np.empty(steps.shape)
    for start in range(0, len(order), BLOCK):
        stop = min(start + BLOCK, len(order))
        errors = np.empty((len(steps), stop - start))
        for i in range(start, stop):
            rounded[:, i] = round_to(wanted[:, i], INT8)
            error = (wanted[:, i] - rounded[:, i]) / spread[i, i]
            wanted[:, i:stop] -= np.outer(error, spread[i, i:stop])
            errors[:, i - start] = error
        wanted[:, stop:] -= errors @ spread[start:stop, stop:]
    found = np.empty(steps.shape)
    found[:, order] = rounded
    return found


def _inverse_root(covariance: NDArray[np.float64], damping: float) -> NDArray[np.float64]:
    """Upper triangular U with U' U = (H + damping)^-1."""
    try:
        inverse = np.linalg.inv(covariance + np.eye(len(covariance)) * damping)
        return np.linalg.cholesky(inverse).T
    except np.linalg.LinAlgError:  # of inputs that hardly vary, rounding leaves negative variances
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        inverse = (vectors / (np.maximum(values, 0) + damping)) @ vectors.T
        return np.linalg.cholesky((inverse + inverse.T) / 2).T


# ---- what is kept


@dataclass(frozen=True)
class Rounding:
    """What was decided for one convolution, as JSON has it.

    Attributes:
        weights: hash of the weights it is about.
        offsets: whole numbers to be added to the nearest ones, one byte each, row by row; zlib,
            then base64.
    """

    weights: str
    offsets: str

    def __post_init__(self) -> None:
        self._values()

    @classmethod
    def of(cls, steps: NDArray[np.float64], rounded: NDArray[np.float64]) -> "Rounding":
        offsets = np.clip(rounded - round_to(steps, INT8), -127, 127).astype(np.int8)
        packed = base64.b64encode(zlib.compress(offsets.tobytes(), 9)).decode("ascii")
        return cls(_hash(steps), packed)

    def fits(self, steps: NDArray[np.float64]) -> bool:
        """Whether these are the weights it is about."""
        return self.weights == _hash(steps) and self._values().size == steps.size

    def apply(self, steps: NDArray[np.float64]) -> NDArray[np.float64]:
        """The whole numbers that were decided on, for weights that it fits."""
        offsets = self._values().astype(np.float64).reshape(steps.shape)
        return np.clip(round_to(steps, INT8) + offsets, -INT8.largest, INT8.largest)

    def _values(self) -> NDArray[np.int8]:
        unpacker = zlib.decompressobj()
        try:
            data = unpacker.decompress(base64.b64decode(self.offsets, validate=True), MOST_WEIGHTS)
        except zlib.error as error:
            raise ValueError(f"offsets: expected zlib's format, found {error}") from error
        if not unpacker.eof:
            raise ValueError("offsets: expected zlib's format, whole, found its beginning")
        return np.frombuffer(data, np.int8)


def _hash(steps: NDArray[np.float64]) -> str:
    parts = np.rint(steps * HASHED_PARTS).astype("<i4")
    return hashlib.sha256(f"{steps.shape}".encode() + parts.tobytes()).hexdigest()[:32]
