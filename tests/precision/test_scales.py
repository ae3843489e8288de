# SPDX-License-Identifier: Apache-2.0
"""Magnitudes to scales and back, and rounding to the types of 8 bits."""

import numpy as np
import onnx.parser
import onnxruntime
import pytest
from onnx import numpy_helper

from trtdet.precision.scales import (
    FP8,
    INT8,
    QuantizedType,
    activation_scale,
    fp16_at_least,
    round_to,
    stored,
    weight_scales,
)


def test_amax_and_scale() -> None:
    assert INT8.scale(254.0) == 2.0 and INT8.amax(2.0) == 254.0
    assert FP8.scale(896.0) == 2.0 and FP8.amax(2.0) == 896.0
    np.testing.assert_array_equal(INT8.scale(np.array([127.0, 63.5])), [1.0, 0.5])


def test_a_scale_of_the_cache_is_the_scale_of_its_pair() -> None:
    """INT8's goes to the magnitude and back without losing a bit."""
    scales = np.random.default_rng(0).lognormal(sigma=8, size=20_000).astype(np.float32)
    found = [activation_scale(INT8.amax(float(scale)), INT8) for scale in scales]
    np.testing.assert_array_equal(found, scales)


@pytest.mark.parametrize(
    ("to", "plain", "narrow"),
    [(INT8, 10 / 127, 0.07879638671875), (FP8, 10 / 448, 0.0223236083984375)],
)
def test_scale_of_an_activation(to: QuantizedType, plain: float, narrow: float) -> None:
    found = activation_scale(10.0, to)
    assert found.shape == () and found.dtype == np.float32 and found == np.float32(plain)
    assert activation_scale(10.0, to, fp16=True) == narrow  # the next above that float16 holds


@pytest.mark.parametrize("to", [INT8, FP8])
def test_scales_of_weights(to: QuantizedType) -> None:
    weights = np.zeros((3, 2, 1, 1), np.float32)
    weights[0, :, 0, 0], weights[1, :, 0, 0] = (1, -4), (0.5, 0.25)
    np.testing.assert_array_equal(
        weight_scales(weights, to), np.array([4 / to.largest, 0.5 / to.largest, 1], np.float32)
    )
    narrow = weight_scales(weights, to, fp16=True)
    assert (narrow == narrow.astype(np.float16)).all() and (
        narrow >= weight_scales(weights, to)
    ).all()


def test_rounding_to_int8() -> None:
    rounded = round_to(np.array([0.5, 1.5, -2.5, 126.6, 127.5, -400.0]), INT8)
    assert rounded.tolist() == [0, 2, -2, 127, 127, -127]
    assert (
        stored(rounded, INT8).dtype == np.int8
        and stored(rounded, INT8).tolist() == rounded.tolist()
    )


def test_fp8_rounds_as_onnx_does() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=4000) * 10.0 ** rng.uniform(-4, 2.6, 4000), [0, 2**-10, 3 * 2**-10, 2**-9, 447, 449, 1e4, -17, -0.0173]])  # fmt: skip
    rounded = round_to(values, FP8)
    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["": 19]>
        g (float[N] x, float[M] narrow) => (float[N] y, float8e4m3fn[M] bits)
          <float one = {1}>
        { q = QuantizeLinear<saturate = 1>(x, one, zero) y = DequantizeLinear(q, one) bits = QuantizeLinear<saturate = 1>(narrow, one, zero) }
    """)  # fmt: skip
    zero = onnx.helper.make_tensor("zero", onnx.TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    model.graph.initializer.append(zero)
    exact, bits = rounded[np.abs(rounded) > 0], stored(rounded[np.abs(rounded) > 0], FP8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])  # fmt: skip
    feed = {"x": values.astype(np.float32), "narrow": exact.astype(np.float32)}
    expected = session.run(["y"], feed)[0]
    np.testing.assert_array_equal(rounded, expected)
    assert rounded.max() == 448 and len(np.unique(np.abs(rounded))) > 100
    # The bits say the same: ONNX reads them back.
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT8E4M3FN, bits.shape, bits.tobytes(), raw=True)  # fmt: skip
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.float64), exact)


def test_scales_of_fp16_cut_nothing_off() -> None:
    scales = np.array([1e-9, 3e-8, 1e-6, 0.1, 0.5, 1000.1, 65504, 1e6], np.float32)
    got = fp16_at_least(scales)
    assert (got[:-1] == got[:-1].astype(np.float16)).all() and (got >= scales).all()
    assert got[0] == 2**-24 and got[4] == 0.5 and got[-1] == 1e6  # nothing there: as it was
    np.testing.assert_allclose(got[3:-1], scales[3:-1], rtol=2**-10)
