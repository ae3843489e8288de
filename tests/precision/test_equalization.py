# SPDX-License-Identifier: Apache-2.0
"""Factors and shifts per channel: which, where they go, and that weights undo them."""

import numpy as np
import onnx.parser
import pytest
from numpy.typing import NDArray

from trtdet.precision import equalization
from trtdet.precision.body import ConvLayer
from trtdet.precision.calibration_cache import CalibrationCache
from trtdet.precision.equalization import (
    HEADROOM,
    WORTH_A_NODE,
    Equalization,
    Weights,
    apply_in,
    best_equalization,
    choose_equalizations,
    depthwise_equalization,
    only_producers,
    predicted_noise,
    undo_in,
)
from trtdet.precision.histograms import ChannelStatistics
from trtdet.precision.scales import weight_scales


def layer(name: str, source: str, *, depthwise: bool = False, padded: bool = False) -> ConvLayer:
    return ConvLayer(name, source, "w", "", f"{name}_out", "block", 1, depthwise, pooled=False, padded=padded, constant=True)  # fmt: skip


def statistics(lowest: list[float], highest: list[float], *, noise: float = 0.0) -> ChannelStatistics:  # fmt: skip
    """Of channels that are uniform between these."""
    low, high = np.array(lowest), np.array(highest)
    mean, variance = (low + high) / 2, (high - low) ** 2 / 12
    return ChannelStatistics(*(v.astype(np.float32) for v in (low, high, mean, variance + mean**2)), noise=noise)  # fmt: skip


def weights(values: NDArray[np.float64]) -> Weights:
    return Weights(values, np.zeros(len(values)))


# ---- which


def test_depthwise_channels_get_the_full_range() -> None:
    found = depthwise_equalization(statistics([-1, -8, 0], [0.5, 2, 0]), amax=8.0)
    # A channel of zeros counts as 1/1024 of the largest. Each may reach 15 % further.
    assert (found.factors * 1.15).tolist() == pytest.approx([8, 1, 1024]) and not found.shift.any()


def test_predicted_noise_by_hand() -> None:
    one = np.full((1, 1, 1, 1), 2.0)
    range_ = statistics([-2], [10], noise=0.01)  # variance 12, mean 4
    from_weights = (2 / 127) ** 2 / 12
    # A factor of 5 makes the step of the activation a fifth, and that of the weight, whose input is
    # larger by as much.
    scaled = Equalization(np.array([5.0]), np.zeros(1))
    shifted = Equalization(np.array([5.0]), np.array([3.0]))
    # The bias takes up what rounded weights make of the mean: their share is that of the variance.
    for used, activation in ((None, 0.01), (scaled, 0.1**2 / 12 / 25), (shifted, 0.1**2 / 12 / 25)):
        found = predicted_noise(one, range_, used, 0.1)
        assert found == pytest.approx(activation * 4 + from_weights * 12)
    # Else it is that of the mean square: 12 + 4^2, and shifted 12 + 1^2.
    for used, activation, power in ((None, 0.01, 28), (scaled, 0.1**2 / 12 / 25, 28), (shifted, 0.1**2 / 12 / 25, 13)):  # fmt: skip
        found = predicted_noise(one, range_, used, 0.1, correct_bias=False)
        assert found == pytest.approx(activation * 4 + from_weights * power)


def test_predicted_noise_is_what_rounding_does() -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(size=(16, 32, 1, 1))
    x = rng.normal(size=(32, 20_000)) * rng.exponential(size=(32, 1)) * 3
    scale = np.abs(x).max() / 127
    noise = float(np.mean((np.rint(x / scale) * scale - x) ** 2))
    moments = (x.min(1), x.max(1), x.mean(1), (x**2).mean(1))
    found = ChannelStatistics(*(v.astype(np.float32) for v in moments), noise=noise)
    rows = values[:, :, 0, 0]
    for factors in (None, 1 / np.sqrt(np.abs(x).max(1))):
        f = np.ones(32) if factors is None else factors * scale * 127 / (factors * np.abs(x).max(1)).max()  # fmt: skip
        steps = weight_scales((rows / f).astype(np.float32))[:, None]
        got = (np.rint(rows / f / steps) * steps) @ (np.rint(x * f[:, None] / scale) * scale)
        measured = float(np.square(got - rows @ x).mean(1).sum())
        used = None if factors is None else Equalization(f, np.zeros(32))
        assert predicted_noise(values, found, used, scale) == pytest.approx(measured, rel=0.3)


def test_the_best_of_the_candidates() -> None:
    """One channel is 100 times the other, and its weight as much smaller: factors that make both
    alike.
    """
    values = np.array([[1.0, 0.01], [1.0, 0.01]]).reshape(2, 2, 1, 1)
    range_ = statistics([-1, -100], [1, 100], noise=(100 / 127) ** 2 / 12)
    best, noise = best_equalization(values, range_, 100 / 127, shift=False)
    assert best.factors[0] / best.factors[1] == pytest.approx(100)
    assert (best.factors * np.array([1, 100])).max() == pytest.approx(100 / HEADROOM)
    assert not best.shift.any()
    # As if every channel had 127 levels, less the headroom: 2 outputs x 2 channels x 1/127^2 / 12,
    # and the weights' share, a third of it without the headroom.
    assert noise == pytest.approx(4 / 127**2 / 12 * (HEADROOM**2 + 1 / 3), rel=1e-6)
    one_sided = statistics([0, 0], [2, 200], noise=(200 / 127) ** 2 / 12)
    shifted, less = best_equalization(values, one_sided, 200 / 127, shift=True)
    assert shifted.shift.tolist() == pytest.approx([HEADROOM, 100 * HEADROOM])
    assert less == pytest.approx(noise) and less < best_equalization(values, one_sided, 200 / 127, shift=False)[1] / 3  # fmt: skip


def test_a_shift_that_the_bias_makes_worth_it() -> None:
    """What a shift to the middle of the range adds to the input is all mean: rounded weights make
    an error of it that the bias takes up. Without that, it costs more than the finer step brings.
    """
    values = np.random.default_rng(3).normal(size=(64, 64, 1, 1))
    low, high, mean, variance = (np.full(64, v, np.float32) for v in (-0.28, 20, 0.5, 0.5))
    swish = ChannelStatistics(low, high, mean, variance + mean**2, noise=(20 / 127) ** 2 / 12)
    before = predicted_noise(values, swish, None, 20 / 127)
    corrected, after = best_equalization(values, swish, 20 / 127, shift=True)
    assert corrected.shift == pytest.approx(HEADROOM * (20 - 0.28) / 2)
    assert after == pytest.approx(before * (HEADROOM * 10.14 / 20) ** 2, rel=0.1)
    assert after < WORTH_A_NODE * before
    best, plain = best_equalization(values, swish, 20 / 127, shift=True, correct_bias=False)
    assert not best.shift.any() and plain > 2 * after


def test_where_equalizations_go() -> None:
    """In the convolution before where that costs nothing; in nodes of their own where they halve
    the error; else nowhere.
    """
    outlier = statistics([-1, -100], [1, 100], noise=(100 / 127) ** 2 / 12)
    even = statistics([-1, -1], [1, 1], noise=1 / 127**2 / 12)
    cache = CalibrationCache({"x": 100 / 127, "e": 1 / 127}, {"x": outlier, "e": even})
    point = weights(np.array([[1.0, 0.01], [1.0, 0.01]]).reshape(2, 2, 1, 1))
    deep = weights(np.ones((2, 1, 3, 3)))
    layers = [layer("a", "x"), layer("b", "x", depthwise=True), layer("c", "e"), layer("d", "x")]
    known = {"a": point, "b": deep, "c": weights(np.ones((2, 2, 1, 1))), "d": point}
    found = choose_equalizations(layers, known, {"d": "p"}, cache, "all", shift=True)
    assert [(name, placed.producer, placed.note) for name, placed in found.items()] == [
        ("b", "", "depthwise"),
        ("a", "", "own nodes, error x0.00"),
        ("d", "p", "in 'p', error x0.00"),
    ]
    assert (found["b"].equalization.factors * HEADROOM).tolist() == pytest.approx([100, 1])
    assert set(choose_equalizations(layers, known, {}, cache, "depthwise", shift=True)) == {"b"}
    assert choose_equalizations(layers, known, {}, cache, "none", shift=True) == {}
    grouped = {**known, "a": weights(np.ones((2, 1, 1, 1)))}  # a factor per channel does not fit
    assert "a" not in choose_equalizations(layers, grouped, {}, cache, "all", shift=True)


@pytest.mark.parametrize(("size", "padded", "shifted"), [(1, False, True), (1, True, False), (3, False, False)])  # fmt: skip
def test_what_is_padded_is_not_shifted(size: int, padded: bool, shifted: bool) -> None:
    one_sided = statistics([0, 0], [2, 200], noise=(200 / 127) ** 2 / 12)
    cache = CalibrationCache({"x": 200 / 127}, {"x": one_sided})
    values = np.ones((2, 2, size, size)) * np.array([1, 0.01]).reshape(1, 2, 1, 1)
    found = choose_equalizations([layer("a", "x", padded=padded)], {"a": weights(values)}, {}, cache, "all", shift=True)  # fmt: skip
    assert found["a"].equalization.shift.any() == shifted


def test_only_producers() -> None:
    network = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[1, 2, 4, 4] x, bool c) => (float[1, 2, 4, 4] y, float[1, 2, 4, 4] d_out, float[1, 2, 4, 4] t)
        {
          a_out = Conv(x, w)
          b_out = Conv(a_out, w)
          c_out = Conv(b_out, w)
          y = Add(b_out, c_out)
          d_out = Conv(c_out, w)
          e_out = Conv(d_out, w)
          f_out = Conv(e_out, w)
          t = If(c) <
            then_branch = p () => (float[1, 2, 4, 4] u) { u = Neg(e_out) },
            else_branch = q () => (float[1, 2, 4, 4] v) { v = Identity(f_out) }
          >
        }
    """)
    chain = ["x", "a_out", "b_out", "c_out", "d_out", "e_out"]
    layers = [layer(name, source) for name, source in zip("abcdef", chain, strict=True)]
    # b, c: read by an Add, too; d: an output; e: read by a branch, too.
    assert only_producers(network, layers) == {"b": "a"}


# ---- what it does to weights


def test_weights_undo_an_equalization() -> None:
    old = Weights(np.array([[2.0, 3.0], [4.0, 5.0]]).reshape(2, 2, 1, 1), np.array([1.0, -1.0]))
    change = Equalization(np.array([2.0, 10.0]), np.array([1.0, 0.5]))
    reader = undo_in(old, change, depthwise=False)
    assert reader.values[:, :, 0, 0].tolist() == [[1, 0.3], [2, 0.5]]
    assert reader.bias.tolist() == [1 + 2 + 1.5, -1 + 4 + 2.5]
    maker = apply_in(old, change)
    assert maker.values[:, :, 0, 0].tolist() == [[4, 6], [40, 50]]
    assert maker.bias.tolist() == [0, -15]
    assert old.values[0, 0, 0, 0] == 2 and old.bias.tolist() == [1, -1]  # not touched
    x = np.array([0.3, -7.0])
    changed = (x - change.shift) * change.factors
    np.testing.assert_allclose(reader.values[:, :, 0, 0] @ changed + reader.bias, old.values[:, :, 0, 0] @ x + old.bias)  # fmt: skip


def test_depthwise_weights_undo_an_equalization() -> None:
    old = weights(np.array([2.0, 3.0]).reshape(2, 1, 1, 1) * np.ones((2, 1, 3, 3)))
    found = undo_in(old, Equalization(np.array([2.0, 4.0]), np.zeros(2)), depthwise=True)
    assert found.values[:, 0, 1, 1].tolist() == [1, 0.75] and not found.bias.any()


def test_statistics_fit_the_weights() -> None:
    cache = CalibrationCache({"x": 1.0}, {"x": statistics([0, 0], [1, 1])})
    fits = [
        equalization.statistics_of(layer("a", "x", depthwise=depthwise), weights(np.ones(shape)), cache) is not None
        for depthwise, shape in ((False, (4, 2, 1, 1)), (False, (4, 1, 1, 1)), (True, (2, 1, 3, 3)))
    ]  # fmt: skip
    assert fits == [True, False, True]
