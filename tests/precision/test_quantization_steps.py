# SPDX-License-Identifier: Apache-2.0
"""The steps of quantization, one by one, and many choices from one plan."""

import numpy as np
import onnx.parser
import pytest
from mobile_network import CHANNELS, SPEC, body, images, mobile_block, run
from onnx import numpy_helper

from trtdet.precision import quantization
from trtdet.precision.body import Body, cut_to_body
from trtdet.precision.calibration import calibrate
from trtdet.precision.calibration_cache import CalibrationCache
from trtdet.precision.equalization import Equalization, best_equalization
from trtdet.precision.histograms import ChannelStatistics
from trtdet.precision.pairs import write_convs
from trtdet.precision.quantization import (
    QuantizationOptions,
    insert_qdq,
    mean_output,
    plan_quantization,
    read_weights,
    reasons_to_keep,
)
from trtdet.precision.scales import FP8, INT8, QuantizedType


@pytest.fixture(scope="module")
def cache() -> CalibrationCache:
    return calibrate(body(), images(32), "minmax")


def test_reasons_to_keep(cache: CalibrationCache) -> None:
    named = Body(mobile_block(), SPEC.replace(sensitive_nodes=("*project",)))
    without = CalibrationCache({**cache.scales, "h": 0.0})
    assert reasons_to_keep(named, without, ("*stem*", "*project")) == {
        "net/stem/conv": "asked for ('*stem*')",
        "net/blocks_0/se/conv": "squeeze-and-excite",
        "net/blocks_0/project": "sensitive ('*project')",
        "box_net/pointwise": "no scale in the calibration cache",
    }
    assert reasons_to_keep(body(), cache, ()) == {"net/blocks_0/se/conv": "squeeze-and-excite"}


def test_weights_are_read_in_double_precision() -> None:
    found = read_weights(body())
    assert len(found) == 7
    assert {w.values.dtype for w in found.values()} == {w.bias.dtype for w in found.values()} == {np.dtype(np.float64)}  # fmt: skip
    stem = next(w for w in mobile_block().graph.initializer if w.name == "stem_w")
    np.testing.assert_array_equal(found["net/stem/conv"].values, numpy_helper.to_array(stem))
    assert found["net/blocks_0/expand"].bias.tolist() == [0] * CHANNELS


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 4, 1, 1), [0 * 1 + 1 * 2 + 2 * 3 + 3 * 4, 4 * 1 + 5 * 2 + 6 * 3 + 7 * 4]),
        ((4, 1, 1, 1), [0, 1 * 2, 2 * 3, 3 * 4]),  # depthwise
        ((4, 1, 1, 2), [0 + 1, (2 + 3) * 2, (4 + 5) * 3, (6 + 7) * 4]),
        ((8, 1, 1, 1), [0, 1, 2 * 2, 3 * 2, 4 * 3, 5 * 3, 6 * 4, 7 * 4]),  # two filters per channel
        ((4, 2, 1, 1), [0 + 2, 2 + 3 * 2, 4 * 3 + 5 * 4, 6 * 3 + 7 * 4]),  # two groups
    ],
)
def test_what_weights_make_of_the_mean(shape: tuple[int, ...], expected: list[float]) -> None:
    mean = np.array([1, 2, 3, 4], np.float32)
    statistics = ChannelStatistics(mean, mean, mean, mean**2, 0.0)
    weights = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    assert np.asarray(mean_output(weights, statistics, None)).tolist() == expected
    twice = Equalization(np.full(4, 2.0), np.full(4, 0.5))
    halved = ChannelStatistics(*[mean / 2 + 0.5] * 4, 0.0)
    assert np.asarray(mean_output(weights, halved, twice)).tolist() == expected
    assert mean_output(weights, None, twice) == 0


@pytest.mark.parametrize("to", [INT8, FP8])
def test_many_choices_from_one_plan(to: QuantizedType, cache: CalibrationCache) -> None:
    """In any order, each is what a plan of its own gives; and of the network alone the same as
    of the whole, cut.
    """
    model = mobile_block()
    plan = plan_quantization(body(model), cache, QuantizationOptions(to=to))
    names = [layer.name for layer in plan.layers]
    assert len(names) == 6
    everything = plan.quantize().SerializeToString()
    assert (
        everything == insert_qdq(body(), cache, QuantizationOptions(to=to))[0].SerializeToString()
    )
    choices = [[name] for name in names] + [names[:5], names[1:4], names[1:]]
    for but in choices:
        found = plan.quantize(but)
        alone, report = insert_qdq(body(), cache, QuantizationOptions(to=to, keep=but))
        assert found.SerializeToString() == alone.SerializeToString()
        assert quantization.quantized_convs(found) == set(names) - set(but)
        assert plan.report(but).blocks == report.blocks
        assert plan.report(but).equalized == report.equalized
        assert plan.report(but).kept == {**plan.kept, **dict.fromkeys(but, "left out")}
        network = plan.quantize(but, network=True)
        assert network.graph.node == cut_to_body(found).graph.node
    assert plan.quantize().SerializeToString() == everything
    assert model == mobile_block()


def test_one_alone_is_what_it_is_with_the_others_kept(cache: CalibrationCache) -> None:
    """But that the factors of its input take nodes of its own, where they else go into another
    convolution.
    """
    plan = plan_quantization(body(), cache)
    in_another = {name for name, placed in plan.equalized.items() if placed.producer}
    assert in_another
    feeds = images(4, seed=3)
    for layer in plan.layers:
        alone = plan.alone(layer)
        others = [other.name for other in plan.layers if other.name != layer.name]
        usual = plan.convolutions(others)[layer.name]
        assert alone.rounded is not None and usual.rounded is not None
        assert np.array_equal(alone.rounded.rounded, usual.rounded.rounded)
        assert (alone.equalization is None) == (layer.name not in plan.equalized)
        model, _ = write_convs(body().model, {layer.name: alone}, INT8, pairs=True, fp16_scales=False)  # fmt: skip
        (found,), (expected,) = run(model, feeds), run(plan.quantize(others), feeds)
        assert np.abs(found - expected).max() <= 0.02 * np.abs(expected).max(), layer.name


def test_inputs_that_were_always_zero_are_not_equalized(cache: CalibrationCache) -> None:
    statistics = cache.channels["e_swish"]
    zero = np.zeros_like(statistics.mean)
    dead = CalibrationCache(
        cache.scales, {**cache.channels, "e_swish": ChannelStatistics(zero, zero, zero, zero, 0.0)}
    )
    assert "net/blocks_0/depthwise" in plan_quantization(body(), cache).equalized
    assert "net/blocks_0/depthwise" not in plan_quantization(body(), dead).equalized


def test_channels_that_never_change_get_no_factor_to_speak_of() -> None:
    """A shift to the middle of their range would leave nothing of it."""
    weights = np.ones((2, 3, 1, 1))
    value = np.array([1.0, -2.0, 0.5], np.float32)
    constant = ChannelStatistics(value, value, value, value**2, 1e-6)
    best, noise = best_equalization(weights, constant, 2 / 127, shift=True)
    assert best.factors.max() <= 2**11 and np.isfinite(noise)


def test_grouped_convolutions() -> None:
    """Two groups of two channels: no factor per channel, but the bias takes up the mean error of
    each group.
    """
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[N, 4, 16, 16] images) => (float[N, 4, 16, 16] y)
        { ["grouped"] y = Conv<kernel_shape = [1, 1], group = 2>(images, w) }
    """)
    rng = np.random.default_rng(0)
    w = rng.normal(size=(4, 2, 1, 1)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(w, "w"))
    feeds = [{"images": feed["images"] + 3} for feed in images(8)]
    own = calibrate(body(model), feeds, "minmax")
    found, report = insert_qdq(body(model), own)
    assert report.mac_share == 1 and report.equalized == {}
    (expected,), (got,) = run(model, feeds), run(found, feeds)
    assert np.abs((got - expected).mean((0, 2, 3))).max() < 0.001
    # Half a step of what is read and of each weight, at most.
    steps = np.abs(w).max((1, 2, 3)) / 127
    largest = 127 * own.scales["images"]
    bound = own.scales["images"] / 2 * np.abs(w).sum((1, 2, 3)) + 2 * steps / 2 * largest
    assert (np.abs(got - expected).max((0, 2, 3)) < bound).all() and bound.max() < 0.2


def test_a_bias_that_is_computed_stays() -> None:
    """It cannot be corrected, nor rescaled: the convolution stays as it is."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[N, 4, 16, 16] images) => (float[N, 4, 16, 16] y)
          <float[4] b = {1, 2, 3, 4}>
        {
          twice = Add(b, b)
          ["first"] x = Conv<kernel_shape = [1, 1]>(images, w)
          ["second"] y = Conv<kernel_shape = [1, 1]>(x, w, twice)
        }
    """)
    w = np.eye(4, dtype=np.float32)[:, :, None, None]
    model.graph.initializer.append(numpy_helper.from_array(w, "w"))
    own = calibrate(body(model), images(4), "minmax")
    found, report = insert_qdq(body(model), own)
    assert report.kept == {"second": "weights are not constant"}
    (expected,), (got,) = run(model, images(4)), run(found, images(4))
    np.testing.assert_allclose(got, expected, atol=0.05)
    assert expected.mean((0, 2, 3)).round().tolist() == [2, 4, 6, 8]
