# SPDX-License-Identifier: Apache-2.0
"""The narrow floating-point types: what numbers they hold, and rounding to them."""

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper


@dataclass(frozen=True)
class FloatType:
    """A narrow floating-point type.

    Attributes:
        name: "FP16"; in tensor names, lower case.
        onnx_type: its `TensorProto.DataType`.
        largest: its largest finite number.
        tolerance: largest rounding error of a tensor, relative to its largest value; twice the
            error of a number in the type's normal range, so that only overflow and underflow exceed
            it.
        smallest_step: between numbers near zero, where the relative error grows.
    """

    name: str
    onnx_type: int
    largest: float
    tolerance: float
    smallest_step: float

    @property
    def smallest_amax(self) -> float:
        """A tensor whose largest magnitude is smaller is rounded worse than `tolerance`."""
        return self.smallest_step / 2 / self.tolerance


FP16 = FloatType("FP16", TensorProto.FLOAT16, 65504.0, 2.0**-10, 2.0**-24)
BF16 = FloatType("BF16", TensorProto.BFLOAT16, 3.3895313892515355e38, 2.0**-7, 2.0**-133)

#: Activations beyond this share of the type's largest number stay float32: other images will go
#: higher than the ones looked at.
ACTIVATION_HEADROOM = 0.25


def weight_problem(weight: NDArray[np.float32], target: FloatType) -> str:
    """Why a tensor of weights does not fit the type; empty where it does."""
    largest = float(np.abs(weight).max(initial=0.0))
    if largest == 0.0:
        return ""
    if not largest <= target.largest:
        return f"largest magnitude {largest:.4g}, {target.name} ends at {target.largest:.4g}"
    error = float(np.abs(round_to(weight, target) - weight).max()) / largest
    if error > target.tolerance:
        return f"largest magnitude {largest:.4g}, too small for {target.name} (rounding error {error:.1%} of it)"
    return ""


def activation_problem(amax: float, target: FloatType) -> str:
    """Why an activation does not fit the type; empty where it does, or is always zero."""
    limit = target.largest * ACTIVATION_HEADROOM
    if amax > limit:
        return f"largest magnitude {amax:.4g}, {target.name} is used up to {limit:.4g}"
    if 0 < amax < target.smallest_amax:
        return f"largest magnitude {amax:.4g}, too small for {target.name}"
    return ""


def round_to(values: NDArray[np.float32], target: FloatType) -> NDArray[np.float32]:
    """To the nearest number of the type, as float32."""
    if target is FP16:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    return (_bfloat16_bits(values).astype(np.uint32) << 16).view(np.float32)


def _bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper half of a float32, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def narrow_tensor(values: NDArray[np.float32], target: FloatType, name: str) -> onnx.TensorProto:
    if target is FP16:
        return numpy_helper.from_array(values.astype(np.float16), name)
    data = _bfloat16_bits(values).astype("<u2").tobytes()
    return helper.make_tensor(name, target.onnx_type, values.shape, data, raw=True)
