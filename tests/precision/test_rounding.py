# SPDX-License-Identifier: Apache-2.0
"""Weights rounded together: against the best that there is, from and to the cache, and in a
model.
"""

import dataclasses
import json
import logging
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import toy_network as toy
from conftest import EXAMPLES
from numpy.typing import NDArray
from onnx import numpy_helper

from trtdet.precision import automatic, calibration_cache, rounding
from trtdet.precision.body import Body
from trtdet.precision.calibration import calibrate
from trtdet.precision.calibration_cache import CalibrationCache
from trtdet.precision.feeds import image_feeds
from trtdet.precision.moments import SAMPLES, Moments, measure_moments
from trtdet.precision.options import Int8Options
from trtdet.precision.pairs import round_weights
from trtdet.precision.prepare import Target, load_model, prepare
from trtdet.precision.quantization import QuantizationOptions, plan_quantization
from trtdet.precision.rounding import Rounding, in_steps, round_together
from trtdet.precision.scales import INT8, round_to

IMAGES = EXAMPLES / "images"
POINTWISE = {"class_0", "box_0", "class_1", "box_1"}


def correlated(size: int, seed: int, shared: float = 1.0) -> NDArray[np.float64]:
    """The covariance of inputs that a few causes have in common."""
    rng = np.random.default_rng(seed)
    causes = rng.standard_normal((size, max(size // 4, 1))) * shared
    return causes @ causes.T + np.diag(rng.uniform(0.05, 0.2, size))


def powers(errors: NDArray[np.float64], covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each row of errors of weights, the variance of what it adds to the output."""
    return np.einsum("oi,ij,oj->o", errors, covariance, errors)


# ---- the rounding


def test_near_the_best_that_there_is() -> None:
    """Of all ways to round six weights up or down: five times less error than to the nearest,
    within a third of the best.
    """
    together, nearest, best = [], [], []
    for seed in range(40):
        covariance = correlated(6, seed, shared=2.0)
        steps = np.random.default_rng(seed).uniform(-100, 100, (1, 6))
        choices = np.floor(steps) + np.array([*product((-1, 0, 1, 2), repeat=6)])
        best.append(powers(steps - choices, covariance).min())
        together.append(powers(steps - round_together(steps, covariance, 0.0), covariance)[0])
        nearest.append(powers(steps - round_to(steps, INT8), covariance)[0])
    print(np.mean(together), np.mean(nearest), np.mean(best))
    assert np.all(np.array(together) >= np.array(best) - 1e-9)
    assert np.mean(together) < 1.33 * np.mean(best)
    assert np.mean(together) < 0.2 * np.mean(nearest)


def test_independent_inputs_are_rounded_to_the_nearest() -> None:
    steps = np.random.default_rng(0).uniform(-127, 127, (5, 9))
    variances = np.diag(np.arange(1.0, 10.0))
    assert round_together(steps, variances).tolist() == np.rint(steps).tolist()
    assert round_together(steps, np.zeros((9, 9))).tolist() == np.rint(steps).tolist()


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = np.random.default_rng(1).uniform(-127, 127, (7, 150))
    covariance = correlated(150, 1)
    found = round_together(steps, covariance)
    monkeypatch.setattr(rounding, "BLOCK", 1000)
    assert np.array_equal(found, round_together(steps, covariance))
    errors = [powers(steps - rounded, covariance).sum() for rounded in (found, np.rint(steps))]
    assert errors[0] < 0.25 * errors[1]


def test_variances_below_zero_are_none() -> None:
    """Of one picture, or of one colour, sums of float32 leave some."""
    causes = np.random.default_rng(6).standard_normal((30, 3))
    covariance = causes @ causes.T
    noisy = covariance - 0.05 * np.trace(covariance) / 30 * np.eye(30)
    assert np.linalg.eigvalsh(noisy)[0] < -0.01 * np.diag(noisy).mean()
    steps = np.random.default_rng(7).uniform(-127, 127, (5, 30))
    found = round_together(steps, noisy)
    errors = [powers(steps - rounded, covariance).sum() for rounded in (found, np.rint(steps))]
    assert errors[0] < 0.1 * errors[1]
    for useless in (np.full((30, 30), np.nan), -np.eye(30)):
        assert np.array_equal(round_together(steps, useless), np.rint(steps))


def test_stays_within_the_type() -> None:
    steps = np.full((3, 40), 127.0)
    steps[:, ::2] = 126.6
    found = round_together(steps, correlated(40, 2))
    assert np.abs(found).max() == 127 and np.array_equal(found, np.rint(found))


def test_steps_are_of_each_row_and_do_not_change_with_its_size() -> None:
    weights = np.random.default_rng(3).standard_normal((4, 6, 1, 1))
    steps = in_steps(weights)
    assert np.abs(steps).max(1) == pytest.approx([127] * 4, rel=2**-10)
    assert np.array_equal(np.rint(steps), round_weights(weights, INT8, fp16=True).rounded[..., 0, 0])  # fmt: skip
    assert np.array_equal(in_steps(weights * 2.0**-3), steps)


# ---- what is known of inputs


def test_covariance_is_that_of_all_samples() -> None:
    values = np.random.default_rng(4).standard_normal((60, 5)).astype(np.float32) + 3
    values[:, 1] += values[:, 0]
    moments = Moments(5)
    assert not moments.covariance.any()
    for part in np.split(values, 3):
        moments.add(part)
    assert moments.count == 60
    assert moments.covariance == pytest.approx(np.cov(values.T, bias=True), abs=1e-5)


def test_samples_are_the_same_each_time() -> None:
    body = Body(toy.network(), toy.SPEC)
    feeds = [{"input": image[None]} for image in toy.images(3)]
    first, again = (measure_moments(body, {"merged": 8, "coarse": 8}, feeds) for _ in range(2))
    assert [first[name].count for name in ("merged", "coarse")] == [3 * 64, 3 * 16]  # all of them
    for name, moments in first.items():
        assert np.array_equal(moments.second, again[name].second)
    planes = measure_moments(body, {"input": 16, "coarse": 8}, feeds)[
        "input"
    ]  # its rows as channels
    assert planes.count == 3 * 48
    assert planes.first == pytest.approx(sum(f["input"][0].reshape(16, -1).sum(1) for f in feeds), rel=1e-6)  # fmt: skip
    large = Body(toy.free_network(), toy.SPEC)
    image = np.random.default_rng(0).uniform(0, 255, (1, 64, 64, 3)).astype(np.float32)
    found = measure_moments(large, {"merged": 8}, [{"input": image}])
    assert found["merged"].count == SAMPLES == 512  # of 1024


# ---- what is kept


def test_decisions_come_back_from_the_cache(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    steps = in_steps(rng.standard_normal((16, 24)))
    rounded = round_together(steps, correlated(24, 5))
    assert np.count_nonzero(rounded != np.rint(steps)) > 0
    row = Rounding.of(steps, rounded)
    assert len(row.offsets) < steps.size  # a byte of base64 for three quarters of one
    path = tmp_path / "c.cache"
    body = Body(toy.network(), toy.SPEC)
    origin = calibration_cache.origin(body.sha256, toy.SPEC.preprocessing, None, "mse")
    CalibrationCache({"x": 1.0}, {}, origin, {}, {"conv": row}).write(path)
    found = calibration_cache.read_cache(path).rounding
    assert found == {"conv": row}
    assert found["conv"].fits(steps) and np.array_equal(found["conv"].apply(steps), rounded)
    assert found["conv"].fits(steps * (1 + 1e-13))  # another processor's last digits
    other = steps.copy()
    other[0, 0] += 0.01
    assert not row.fits(other) and not row.fits(steps[:, :-1]) and not row.fits(steps.T)


@pytest.mark.parametrize("offsets", ["*", "AAAA", Rounding.of(np.ones((1, 2)), np.ones((1, 2))).offsets[:-4]])  # fmt: skip
def test_a_damaged_row_is_refused(offsets: str, tmp_path: Path) -> None:
    path = tmp_path / "c.cache"
    prepare(toy.network(), toy.SPEC, "int8", Int8Options(images=IMAGES, cache=path, num_images=2))
    sidecar = calibration_cache.sidecar_path(path)
    data = json.loads(sidecar.read_text())
    data["rounding"]["box_0"]["offsets"] = offsets
    sidecar.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"c\.cache\.json.*rounding.*box_0.*(offsets|base64)"):  # fmt: skip
        calibration_cache.read_cache(path)


# ---- in a model


def weights_of(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Convolution -> its INT8 weights."""
    return {
        w.name.removesuffix("/weight/int8"): numpy_helper.to_array(w)
        for w in model.graph.initializer
        if w.name.endswith("/weight/int8")
    }


def options(cache: Path | None = None, **others: Any) -> Int8Options:
    return Int8Options(**{"images": IMAGES, "cache": cache, "num_images": 4, "share": 1.0, **others})  # fmt: skip


def test_the_kept_cache_makes_the_same_model_without_images(tmp_path: Path) -> None:
    cache = tmp_path / "c.cache"
    fresh = prepare(toy.network(), toy.SPEC, "int8", options(cache)).typed
    again = prepare(toy.network(), toy.SPEC, "int8", options(cache, images=None)).typed
    assert again.SerializeToString() == fresh.SerializeToString()
    kept = calibration_cache.read_cache(cache)
    assert kept.rounding.keys() == POINTWISE
    data = json.loads(calibration_cache.sidecar_path(cache).read_text())
    data["rounding"] = {}
    calibration_cache.sidecar_path(cache).write_text(json.dumps(data))
    nearest = prepare(toy.network(), toy.SPEC, "int8", options(cache, images=None)).typed
    offsets = {name: values - weights_of(nearest)[name] for name, values in weights_of(fresh).items()}  # fmt: skip
    assert {name for name, values in offsets.items() if values.any()} <= POINTWISE
    assert sum(np.count_nonzero(values) for values in offsets.values()) > 10
    assert max(np.abs(values).max() for values in offsets.values()) <= 3
    # The type of the rest, and what is left out, do not change how weights are rounded.
    others = {"rest": options(cache), "left out": options(cache, keep_fp16=("box_0",), share=None)}
    for what, chosen in others.items():
        rest = "fp32" if what == "rest" else "fp16"
        found = weights_of(prepare(toy.network(), toy.SPEC, "int8", chosen, rest=rest).typed)
        both = found.keys() & POINTWISE
        assert len(both) == (4 if what == "rest" else 3)
        assert all(np.array_equal(found[name], weights_of(fresh)[name]) for name in both)


def test_a_factor_on_the_outputs_changes_no_decision(tiny_onnx: Path, tmp_path: Path) -> None:
    """Where the convolution behind is in INT8, its factors go into the weights: row by row."""
    body = Body(*load_model(tiny_onnx))
    cache = tmp_path / "c.cache"
    prepare(body.model, body.spec, "int8", options(cache))
    kept = calibration_cache.read_cache(cache)
    plan = plan_quantization(body, kept, QuantizationOptions(fp16_scales=True))
    makers = {p.producer: name for name, p in plan.equalized.items() if p.producer in kept.rounding}
    assert len(makers) == 1
    for maker, reader in makers.items():
        both, alone = (plan.convolutions(but)[maker].rounded for but in ((), (reader,)))
        assert both is not None and alone is not None
        assert np.array_equal(both.rounded, alone.rounded)
        assert not np.array_equal(both.scales, alone.scales)


def test_less_error_on_images_that_decided_nothing(tiny_onnx: Path) -> None:
    body = Body(*load_model(tiny_onnx))
    paths = sorted(IMAGES.glob("*.png"))
    halves = [[*image_feeds(body.model, body.spec, paths[i::2], option="images")] for i in (0, 1)]
    plan = plan_quantization(body, calibrate(body, halves[0], "mse"), QuantizationOptions())
    steps = {layer: plan.in_steps(layer) for layer in plan.layers}
    tensors = {layer.input: v.shape[1] for layer, v in steps.items() if v is not None}
    known, unseen = (measure_moments(body, tensors, feeds) for feeds in halves)
    ratios = []
    for layer, values in steps.items():
        if values is None:
            continue
        placed = plan.equalized.get(layer.name)
        factors = placed.equalization.factors if placed else np.ones(values.shape[1])
        seen, other = (m[layer.input].covariance * np.outer(factors, factors) for m in (known, unseen))  # fmt: skip
        errors = [powers(values - r, other).sum() for r in (round_together(values, seen), np.rint(values))]  # fmt: skip
        ratios.append(errors[0] / errors[1])
    print(len(ratios), np.exp(np.mean(np.log(ratios))), max(ratios))
    assert len(ratios) > 40 and np.exp(np.mean(np.log(ratios))) < 0.6


def test_the_bias_takes_the_mean_of_what_is_left(tmp_path: Path) -> None:
    cache = tmp_path / "c.cache"
    prepare(toy.network(), toy.SPEC, "int8", options(cache))
    body = Body(toy.network(), toy.SPEC)
    kept = calibration_cache.read_cache(cache)
    plan = plan_quantization(body, kept, QuantizationOptions())
    plain = dataclasses.replace(plan, options=QuantizationOptions(together=False, correct_bias=False))  # fmt: skip
    layer = next(layer for layer in plan.layers if layer.name == "box_1")
    new, old = plan.alone(layer), plain.alone(layer)
    assert new.rounded is not None and not np.array_equal(new.rounded.rounded, old.rounded.rounded)  # type: ignore[union-attr]
    statistics = kept.channels["coarse"]
    placed = plan.equalized.get("box_1")
    mean = statistics.mean.astype(np.float64)
    if placed:
        mean = (mean - placed.equalization.shift) * placed.equalization.factors
    left = (new.weights.values - new.rounded.values)[:, :, 0, 0] @ mean
    assert new.weights.bias - old.weights.bias == pytest.approx(left, abs=1e-9)


# ---- measured once


def test_only_what_is_not_known_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    cache = tmp_path / "c.cache"
    body = Body(toy.network(), toy.SPEC)
    fresh = prepare(body.model, body.spec, "int8", options(cache)).typed
    asked: list[set[str]] = []

    def counted(body: Body, tensors: Any, feeds: Any) -> dict[str, Moments]:
        asked.append({*tensors})
        return measure_moments(body, tensors, feeds)

    monkeypatch.setattr(automatic.moments, "measure_moments", counted)
    prepare(body.model, body.spec, "int8", options(cache))
    assert asked == []
    sidecar = calibration_cache.sidecar_path(cache)
    whole = sidecar.read_text()
    data = json.loads(whole)
    del data["rounding"]["box_1"]
    sidecar.write_text(json.dumps(data))
    with caplog.at_level(logging.WARNING):
        prepare(body.model, body.spec, "int8", options(cache, images=None))
    assert "how the weights of 1 convolutions are rounded" in caplog.text
    again = prepare(body.model, body.spec, "int8", options(cache)).typed
    assert asked == [{"coarse"}] and again.SerializeToString() == fresh.SerializeToString()
    assert json.loads(sidecar.read_text()) == json.loads(whole)


def test_little_memory_takes_more_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = prepare(toy.network(), toy.SPEC, "int8", options()).typed
    monkeypatch.setattr(automatic, "MOMENTS_AT_A_TIME", 64)
    asked: list[set[str]] = []

    def counted(body: Body, tensors: Any, feeds: Any) -> dict[str, Moments]:
        asked.append({*tensors})
        return measure_moments(body, tensors, feeds)

    monkeypatch.setattr(automatic.moments, "measure_moments", counted)
    again = prepare(toy.network(), toy.SPEC, "int8", options()).typed
    assert asked == [{"merged"}, {"coarse"}]
    assert again.SerializeToString() == fresh.SerializeToString()


@pytest.mark.parametrize(("to", "target"), [("fp8", Target()), ("int8", Target(weak=True, calibrator=True))])  # fmt: skip
def test_not_where_something_else_rounds(to: Any, target: Target, tmp_path: Path) -> None:
    cache = tmp_path / "c.cache"
    prepare(toy.network(), toy.SPEC, to, options(cache), target=target)
    assert calibration_cache.read_cache(cache).rounding == {}
