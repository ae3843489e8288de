# SPDX-License-Identifier: Apache-2.0
"""Calibration: the cache's format, what it refuses, and the scales themselves."""

import dataclasses
import json
import logging
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
from numpy.typing import NDArray

from trtdet import files
from trtdet.errors import GraphError
from trtdet.precision import calibration_cache
from trtdet.precision.body import Body
from trtdet.precision.calibration import calibrate, choose_images
from trtdet.precision.calibration_cache import CalibrationCache, read_cache
from trtdet.precision.histograms import ChannelMoments, ChannelRow, TensorHistogram
from trtdet.precision.options import METHODS
from trtdet.spec import ModelSpec, Nms, Preprocessing

PREPROCESSING = Preprocessing((8, 8), layout="NCHW", mean=(127.0,) * 3, std=(128.0,) * 3)
SPEC = ModelSpec("toy", PREPROCESSING, Nms(), (1,))


def small_model(
    *, weight: float = 0.5, batch: int | str = "N", iou: float = 0.5
) -> onnx.ModelProto:
    """3x3 convolution, swish, pooling, head, and an NMS that is none of calibration's business."""
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 17, "trt.plugins": 1]>
        g (float[{batch}, 3, 8, 8] images) => (float[{batch}, 64, 4] boxes)
          <float[2, 3, 1, 1] w = {{{weight}, 0, 0, 0, -2, 0}}, float[2] b = {{0, 1}},
           float[4, 2, 1, 1] head_w = {{1, 0, 0, 1, 1, 1, 2, 0}}, int64[3] shape = {{0, 4, -1}}>
        {{
          [stem] features = Conv<kernel_shape = [1, 1]>(images, w, b)
          gate = Sigmoid(features)
          swish = Mul(features, gate)
          pooled = MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(swish)
          [head] predicted = Conv<kernel_shape = [1, 1]>(pooled, head_w)
          flat = Reshape(predicted, shape)
          raw_boxes = Transpose<perm = [0, 2, 1]>(flat)
          boxes = trt.plugins.EfficientNMS_TRT<iou_threshold = {iou}>(raw_boxes)
        }}
    """)
    return model


def small_body(model: onnx.ModelProto | None = None, **changes: Any) -> Body:
    return Body(model or small_model(**changes), SPEC)


def feeds(count: int, *, batch: int = 1, seed: int = 0) -> Iterator[dict[str, NDArray[np.float32]]]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {"images": rng.normal(size=(batch, 3, 8, 8)).astype(np.float32)}


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02}.jpg").write_bytes(bytes([i] * 10))
    return sorted(folder.iterdir())


def write_example(
    folder: Path, images: list[Path], **changes: Any
) -> tuple[Path, CalibrationCache]:
    model = small_model()
    of = calibration_cache.origin(small_body(model).sha256, PREPROCESSING, images, "mse", **changes)
    cache = calibrate(small_body(model), feeds(3), "mse", origin=of)
    path = folder / "small.cache"
    cache.write(path)
    return path, cache


# ---- TensorRT's format


def test_text_is_tensorrts() -> None:
    text = CalibrationCache({"images": 1 / 127, "a/b:0": 0.5, "(Unnamed Layer* 3) [Scale]": 2.0}).to_text((8, 6, 1))  # fmt: skip
    assert text == (
        "TRT-8601-EntropyCalibration2\n"
        "images: 3c010204\n"
        "a/b:0: 3f000000\n"
        "(Unnamed Layer* 3) [Scale]: 40000000\n"
    )


@pytest.mark.parametrize(
    ("version", "number"),
    [((8, 6, 1), 8601), ((8, 6, 1, 6), 8601), ((10, 3, 0), 100300), ((10, 13, 3, 9), 101303), ((11, 1), 110100)],
)  # fmt: skip
def test_header_follows_the_version(version: tuple[int, ...], number: int) -> None:
    assert CalibrationCache({"x": 1.0}).to_text(version).startswith(f"TRT-{number}-EntropyCalibration2\n")  # fmt: skip


def test_text_survives_the_way_through_the_file_exactly() -> None:
    rng = np.random.default_rng(0)
    scales = {f"t{i}": float(np.float32(x)) for i, x in enumerate(rng.exponential(size=200))}
    assert CalibrationCache.from_text(CalibrationCache(scales).to_text()).scales == scales


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line"),
        ("hello\nx: 3f800000\n", "first line like TRT-8601-EntropyCalibration2, found 'hello'"),
        ("TRT-8601-EntropyCalibration2\n", "one line per tensor, found none"),
        ("TRT-8601-EntropyCalibration2\nx: 3f8\n", "line 2: expected 'tensor: 8 hex digits', found 'x: 3f8'"),
        ("TRT-8601-EntropyCalibration2\nx: 3f800000\ny: 7fc00000\n", "line 3: expected a scale of at least 0, found nan"),
    ],
)  # fmt: skip
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.cache"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x\.cache: not a TensorRT calibration cache") as caught:
        read_cache(path)
    assert message in str(caught.value)


# ---- histograms


def test_histogram_does_not_depend_on_order_or_grouping() -> None:
    values = np.random.default_rng(1).standard_cauchy(20_000).astype(np.float32)
    whole, parts, sorted_parts = TensorHistogram(), TensorHistogram(), TensorHistogram()
    whole.add(values)
    for part in np.array_split(values, 37):
        parts.add(part)
    for part in np.array_split(np.sort(np.abs(values)), 11):  # grows at every step
        sorted_parts.add(part)
    for other in (parts, sorted_parts):
        assert np.array_equal(whole.counts, other.counts)
        assert whole.limit == other.limit
    assert whole.counts.sum() == 20_000


def test_clips_of_a_normal_distribution_with_one_outlier() -> None:
    values = np.random.default_rng(2).normal(size=100_000).astype(np.float32)
    values[0] = 100.0
    histogram = TensorHistogram()
    histogram.add(values)
    clips = {method: histogram.clip(method) for method in METHODS}
    assert clips["minmax"] == 100.0
    assert clips["percentile"] == pytest.approx(np.quantile(np.abs(values), 0.9999), abs=0.05)
    # One value cut off by 96 costs 0.09; a step of 100 / 127 costs 0.05 on every value: cutting
    # everything off at 4 is worse here.
    errors = {clip: _rounding_error(values, clip) for clip in np.arange(2.0, 101.0)}
    assert clips["mse"] == pytest.approx(min(errors, key=errors.__getitem__), abs=2.0)
    assert 2.0 < clips["entropy"] < 20.0


def _rounding_error(values: NDArray[np.float32], clip: float) -> float:
    scale = clip / 127
    return float(np.mean((np.clip(np.rint(values / scale), -127, 127) * scale - values) ** 2))


def test_noise_is_what_rounding_does() -> None:
    values = np.random.default_rng(3).laplace(size=100_000).astype(np.float32)
    histogram = TensorHistogram()
    histogram.add(values)
    for clip in (2.0, 6.0, 12.0):
        assert histogram.noise(clip / 127) == pytest.approx(_rounding_error(values, clip), rel=0.05)


def test_a_tensor_of_zeros_has_a_usable_scale() -> None:
    histogram = TensorHistogram()
    histogram.add(np.zeros((1, 4), np.float32))
    assert {histogram.clip(method) for method in METHODS} == {1.0}


def test_channel_moments() -> None:
    values = np.random.default_rng(4).normal(size=(5, 3, 4, 4)).astype(np.float32)
    values[:, 1] *= 100
    moments = ChannelMoments()
    moments.add(values[:2])
    moments.add(values[2:])
    found = moments.statistics(0.25)
    np.testing.assert_array_equal(found.largest, np.abs(values).max((0, 2, 3)))
    np.testing.assert_allclose(found.mean, values.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.power, (values**2).mean((0, 2, 3)), rtol=1e-4)
    again = ChannelRow(**json.loads(json.dumps(found.to_dict()))).statistics
    np.testing.assert_array_equal(again.lowest, values.min((0, 2, 3)))
    np.testing.assert_array_equal(again.largest, found.largest)
    assert again.noise == 0.25


# ---- measuring


def test_minmax_scales_are_the_largest_magnitudes() -> None:
    model = small_model()
    cache = calibrate(small_body(model), feeds(4), "minmax")
    x = np.concatenate([feed["images"] for feed in feeds(4)])
    features = np.einsum("oc,nchw->nohw", np.array([[0.5, 0, 0], [0, -2, 0]]), x) + np.array([0, 1]).reshape(2, 1, 1)  # fmt: skip
    swish = features / (1 + np.exp(-features))
    assert cache.scales["images"] == np.float32(np.abs(x).max() / 127)
    assert cache.scales["features"] == pytest.approx(np.abs(features).max() / 127, rel=1e-6)
    assert cache.scales["swish"] == pytest.approx(np.abs(swish).max() / 127, rel=1e-6)
    assert cache.scales["gate"] == np.float32(1 / 127)
    assert cache.scales["pooled"] == cache.scales["swish"]  # one scale: no requantization
    # In the order of the graph, without what comes behind the heads.
    assert list(cache.scales) == ["images", "features", "gate", "swish", "pooled", "predicted", "flat", "raw_boxes"]  # fmt: skip
    np.testing.assert_allclose(cache.channels["images"].mean, x.mean((0, 2, 3)), atol=1e-6)
    assert set(cache.channels) == {"images"}  # "pooled" is a pooling's output: see the next test


def test_channel_statistics_are_kept_for_inputs_of_convolutions() -> None:
    model = small_model()
    swish = next(
        node for node in model.graph.node if node.op_type == "Conv" and node.name == "head"
    )
    swish.input[0] = "swish"
    assert set(calibrate(small_body(model), feeds(2)).channels) == {"images", "swish"}


def test_batch_size_and_a_last_partial_batch_change_nothing() -> None:
    x = np.random.default_rng(5).normal(size=(7, 3, 8, 8)).astype(np.float32)
    single = calibrate(small_body(), ({"images": x[i : i + 1]} for i in range(7)))
    batches = calibrate(small_body(), ({"images": x[i : i + 4]} for i in range(0, 7, 4)))
    assert single.to_text() == batches.to_text()
    without_last = calibrate(small_body(), [{"images": x[:4]}])
    assert without_last.to_text() != single.to_text()


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    def peak(count: int) -> int:
        tracemalloc.start()
        calibrate(small_body(), feeds(count, batch=64))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(2)  # what is imported on the way
    assert peak(40) < 1.2 * peak(4)


def test_nothing_to_measure_and_broken_activations_are_errors() -> None:
    with pytest.raises(ValueError, match="expected images, got none"):
        calibrate(small_body(), [])
    with pytest.raises(ValueError, match="expected one of entropy, minmax"):
        calibrate(small_body(), feeds(1), "max")  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="'images' is not finite"):
        calibrate(small_body(), [{"images": np.full((1, 3, 8, 8), np.nan, np.float32)}])


# ---- whose it is


def test_two_runs_write_the_same_bytes(tmp_path: Path, images: list[Path]) -> None:
    written = []
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        path, _ = write_example(tmp_path / run, images)
        written.append((path.read_bytes(), calibration_cache.sidecar_path(path).read_bytes()))
    assert written[0] == written[1]


def test_sidecar_brings_everything_back(tmp_path: Path, images: list[Path]) -> None:
    path, cache = write_example(tmp_path, images)
    again = read_cache(path, cache.origin)
    assert again.scales == cache.scales
    assert again.origin == cache.origin
    np.testing.assert_array_equal(again.channels["images"].power, cache.channels["images"].power)
    data = json.loads(calibration_cache.sidecar_path(path).read_text())
    assert data["num_images"] == 20
    assert data["method"] == "mse"


def test_a_cache_is_made_over_for_another_version(tmp_path: Path, images: list[Path]) -> None:
    path, cache = write_example(tmp_path, images)
    lines = path.read_text().splitlines()
    assert calibration_cache.write_header(path, (10, 13, 3))
    assert path.read_text().splitlines() == ["TRT-101303-EntropyCalibration2", *lines[1:]]
    assert not calibration_cache.write_header(
        path, (10, 13, 3, 9)
    )  # the fourth number is none of it
    assert read_cache(path, cache.origin).origin == cache.origin


@pytest.mark.parametrize("known", [True, False])
def test_an_end_between_two_writes_leaves_no_cache_that_counts_as_foreign(
    known: bool,
    tmp_path: Path,
    images: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over an older cache, and where there is none."""
    path, cache = write_example(tmp_path, images)
    if not known:
        path.unlink()
        calibration_cache.sidecar_path(path).unlink()
    written = []

    def once(target: Path, text: str) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(target)
        files.write_bytes(target, text.encode())

    monkeypatch.setattr(files, "write_text", once)
    new = dataclasses.replace(cache, scales={name: s * 2 for name, s in cache.scales.items()})
    with pytest.raises(KeyboardInterrupt):
        new.write(path)
    assert written == [calibration_cache.sidecar_path(path)]
    assert path.is_file() is known
    if known:
        with pytest.raises(ValueError, match="scales_sha256"):
            read_cache(path)
    written.clear()
    monkeypatch.undo()
    new.write(path)
    assert read_cache(path, cache.origin).scales == new.scales
    dataclasses.replace(cache, origin=None).write(path)  # of another program: no sidecar of the old
    assert sorted(file.name for file in tmp_path.glob("small*")) == ["small.cache"]


def test_another_header_keeps_the_sidecar(tmp_path: Path, images: list[Path]) -> None:
    path, cache = write_example(tmp_path, images)
    path.write_text(cache.to_text((10, 13, 3)))
    assert read_cache(path, cache.origin).origin == cache.origin


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"model": small_model(weight=0.25)}, "model_sha256"),
        ({"preprocessing": Preprocessing((8, 16), layout="NCHW", mean=(127.0,) * 3, std=(128.0,) * 3)}, "size_hw [8, 8] instead of [8, 16]"),
        ({"preprocessing": Preprocessing((8, 8), layout="NCHW")}, "preprocessing_sha256"),
        ({"preprocessing": Preprocessing((8, 8), layout="NCHW")}, "mean [127.0, 127.0, 127.0] instead of [0.0, 0.0, 0.0]"),
        ({"method": "entropy"}, "method is mse, not entropy"),
        ({"images": 19}, "images_sha256"),
    ],
)  # fmt: skip
def test_a_cache_of_something_else_is_refused(
    wanted: dict[str, Any], reason: str, tmp_path: Path, images: list[Path]
) -> None:
    path, _ = write_example(tmp_path, images)
    of = calibration_cache.origin(
        small_body(wanted.get("model")).sha256,
        wanted.get("preprocessing", PREPROCESSING),
        images[: wanted.get("images", 20)],
        wanted.get("method", "mse"),
    )
    with pytest.raises(ValueError, match="does not fit") as caught:
        read_cache(path, of)
    message = str(caught.value)
    assert reason in message
    assert "calibrate again with --calib_input" in message
    others = {"model_sha256", "preprocessing_sha256", "method is", "images_sha256"}
    assert sum(other in message for other in others) == 1  # only what differs is named


def test_a_cache_of_any_method_fits_where_none_is_asked_for(
    tmp_path: Path, images: list[Path]
) -> None:
    path, cache = write_example(tmp_path, images)
    of = calibration_cache.origin(small_body().sha256, PREPROCESSING, None, "entropy")
    assert read_cache(path, of, any_method=True).scales == cache.scales
    with pytest.raises(ValueError, match="method is mse, not entropy"):
        read_cache(path, of)


def test_a_bare_cache_is_of_a_model_that_has_its_tensors() -> None:
    path, inputs = Path("some.cache"), small_body().quantizable_inputs
    assert inputs == {"images", "pooled"}
    calibration_cache.check_tensors(path, CalibrationCache({"images": 1.0, "pooled": 0.5}), inputs)
    with pytest.raises(ValueError, match=r"1 of 2 inputs of convolutions are not in it \(pooled\); it belongs to another model"):  # fmt: skip
        calibration_cache.check_tensors(
            path, CalibrationCache({"images": 1.0, "swish": 0.5}), inputs
        )
    with pytest.raises(ValueError, match="2 of 2 inputs of convolutions are not in it"):
        calibration_cache.check_tensors(path, CalibrationCache({"x": 1.0}), inputs)


def test_a_cache_fits_without_the_images(tmp_path: Path, images: list[Path]) -> None:
    path, cache = write_example(tmp_path, images)
    of = calibration_cache.origin(small_body().sha256, PREPROCESSING, None, "mse")
    assert read_cache(path, of).scales == cache.scales


def test_a_cache_older_than_a_field_of_the_preprocessing_fits_its_default(
    tmp_path: Path, images: list[Path]
) -> None:
    path, cache = write_example(tmp_path, images)
    sidecar = calibration_cache.sidecar_path(path)
    data = json.loads(sidecar.read_text())
    del data["preprocessing"]["pad_rgb"]
    sidecar.write_text(json.dumps(data))
    assert read_cache(path, cache.origin).scales == cache.scales
    grey = dataclasses.replace(PREPROCESSING, pad_rgb=(114.0,) * 3)
    of = calibration_cache.origin(small_body().sha256, grey, images, "mse")
    with pytest.raises(ValueError, match=r"\(pad_rgb \[0.0, 0.0, 0.0\] instead of \[114.0, 114.0, 114.0\]\)"):  # fmt: skip
        read_cache(path, of)


def test_scales_edited_under_the_sidecar_are_noticed(tmp_path: Path, images: list[Path]) -> None:
    path, cache = write_example(tmp_path, images)
    first = next(iter(cache.scales))
    path.write_text(
        path.read_text().replace(struct.pack("!f", cache.scales[first]).hex(), "3f800000")
    )
    with pytest.raises(ValueError, match="scales_sha256"):
        read_cache(path)


def test_a_cache_of_tensorrt_itself_is_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "nvidia.cache"
    path.write_text("TRT-8510-EntropyCalibration2\nx: 4000890a\n(Unnamed Layer* 8) [Constant]_output: 3f6fc9d8\n")  # fmt: skip
    with caplog.at_level(logging.WARNING):
        cache = read_cache(
            path, calibration_cache.origin(small_body().sha256, PREPROCESSING, None, "mse")
        )
    assert cache.scales["x"] == pytest.approx(2.008364, abs=1e-6)
    assert cache.origin is None
    assert "nvidia.cache.json" in caplog.text


def test_the_hash_of_a_body_is_about_the_network_alone() -> None:
    own = small_body().sha256
    assert own == small_body(batch=4).sha256
    assert own == small_body(iou=0.7).sha256
    assert own != small_body(weight=0.25).sha256


def test_images_are_chosen_from_all_with_a_fixed_seed(images: list[Path]) -> None:
    chosen = choose_images(images, 5)
    assert chosen == choose_images(list(reversed(images)), 5)
    assert len(chosen) == 5
    assert chosen == sorted(chosen)
    assert chosen != images[:5]
    assert chosen != choose_images(images, 5, seed=1)
    assert choose_images(images) == images
    assert len(choose_images(images, fraction=0.25)) == 5
    assert len(choose_images(images, 3, fraction=0.25)) == 3


def test_image_hash_is_of_contents(tmp_path: Path, images: list[Path]) -> None:
    own = calibration_cache.image_hash(images)
    assert own == calibration_cache.image_hash(reversed(images))
    images[3].write_bytes(b"another photograph")
    assert own != calibration_cache.image_hash(images)
