# SPDX-License-Identifier: Apache-2.0
"""The types of 8 bits, and how numbers become theirs: the one place where a largest magnitude
(amax) becomes a scale, and back.

    scale = amax / largest        stored = round(x / scale)        x ~ stored * scale

Calibration measures magnitudes. Its cache keeps them as TensorRT does, as scales of INT8 in
float32, whatever type they are used for.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

Number = TypeVar("Number", float, NDArray[np.float32], NDArray[np.float64])

LEVELS = 127  # magnitudes of symmetric INT8, zero aside


@dataclass(frozen=True)
class QuantizedType:
    """A type of 8 bits.

    Attributes:
        name: "INT8".
        onnx_type: its `TensorProto.DataType`.
        largest: the number that the largest magnitude becomes.
    """

    name: str
    onnx_type: int
    largest: float

    def scale(self, amax: Number) -> Number:
        """With which a magnitude becomes the type's largest number."""
        return amax / self.largest

    def amax(self, scale: Number) -> Number:
        """The largest magnitude that a scale represents."""
        return scale * self.largest


INT8 = QuantizedType("INT8", TensorProto.INT8, LEVELS)
FP8 = QuantizedType("FP8", TensorProto.FLOAT8E4M3FN, 448.0)


def activation_scale(amax: float, to: QuantizedType, *, fp16: bool = False) -> NDArray[np.float32]:
    """Of a whole tensor, without dimensions.

    Args:
        fp16: choose one that float16 holds.
    """
    scale = np.array(to.scale(amax), np.float32)
    return fp16_at_least(scale) if fp16 else scale


def weight_scales(
    weights: NDArray[np.float32], to: QuantizedType = INT8, *, fp16: bool = False
) -> NDArray[np.float32]:
    """Of each output channel, what its largest magnitude takes; 1 for a channel of zeros, which
    any scale represents.
    """
    amax = np.abs(weights.reshape(len(weights), -1)).max(1)
    scales = np.where(amax > 0, to.scale(amax), 1.0).astype(np.float32)
    return fp16_at_least(scales) if fp16 else scales


def fp16_at_least(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """The next number that float16 holds: upwards, so that nothing is cut off.

    Left as it is where there is none.
    """
    with np.errstate(over="ignore"):
        rounded = scales.astype(np.float16)
        rounded = np.where(rounded < scales, np.nextafter(rounded, np.float16(np.inf)), rounded)
    return np.where(np.isfinite(rounded), rounded, scales).astype(np.float32)


def round_to(values: NDArray[np.float64], to: QuantizedType) -> NDArray[np.float64]:
    """The nearest numbers of the type, ties to even, what is beyond cut off."""
    if to is INT8:
        return np.clip(np.rint(values), -to.largest, to.largest)
    exponents = np.floor(np.log2(np.maximum(np.abs(values), 2.0**-6)))  # 2^-6: the least normal
    steps = 2.0 ** (exponents - 3)  # three bits of mantissa
    return np.clip(np.rint(values / steps) * steps, -to.largest, to.largest)


def stored(values: NDArray[np.float64], to: QuantizedType) -> NDArray[np.int8] | NDArray[np.uint8]:
    """The bytes of numbers that the type holds: of `round_to`.

    FP8: a sign, four bits of exponent (bias 7), three of mantissa.
    """
    if to is INT8:
        return values.astype(np.int8)
    magnitudes = np.abs(values)
    exponents = np.floor(np.log2(np.maximum(magnitudes, 2.0**-6)))
    mantissas = magnitudes / 2.0 ** (exponents - 3)  # 8 to 15; below 8 for subnormals
    codes = np.where(mantissas < 8, mantissas, (exponents + 7) * 8 + mantissas - 8)
    return (codes + 128 * (values < 0)).astype(np.uint8)
