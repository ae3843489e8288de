# SPDX-License-Identifier: Apache-2.0


import json
import platform
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trtdet.machine import available_cores, describe_machine
from trtdet.run import benchmark
from trtdet.run.benchmark import Sample, Summary, measure, noise
from trtdet.runtimes.base import BatchTimes, Outputs, Runtime
from trtdet.spec import ModelSpec, Nms, Preprocessing


def test_summary_is_trtexecs() -> None:
    # 1..200 ms in any order. trtexec leaves out int((1 - p / 100) * 200) times in float32 and takes
    # the largest left: 20, 10 and, as 1 - 0.99 is 0.0099999905 there, 1.
    times = [float(x) for x in np.random.default_rng(1).permutation(np.arange(1, 201))]
    summary = Summary.of(times)
    assert (summary.min, summary.max, summary.mean, summary.median) == (1, 200, 100.5, 100.5)
    assert summary.percentiles == {90: 180, 95: 190, 99: 199}


@pytest.mark.parametrize(
    ("times", "median", "percentiles"),
    [
        ([5.0], 5.0, {90: 5.0, 95: 5.0, 99: 5.0}),
        ([3.0, 1.0, 2.0], 2.0, {90: 3.0, 95: 3.0, 99: 3.0}),  # too few to leave one out
        ([float(x) for x in range(10)], 4.5, {90: 8.0, 95: 9.0, 99: 9.0}),
    ],
)
def test_small_samples(times: list[float], median: float, percentiles: dict[int, float]) -> None:
    summary = Summary.of(times)
    assert summary.median == median
    assert summary.percentiles == percentiles


def test_no_times_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one time"):
        Summary.of([])


def test_names_are_trtexecs() -> None:
    assert str(Summary.of([1.25, 1.75])) == (
        "min = 1.25 ms, max = 1.75 ms, mean = 1.5 ms, median = 1.5 ms, "
        "percentile(90%) = 1.75 ms, percentile(95%) = 1.75 ms, percentile(99%) = 1.75 ms"
    )


class StandInRuntime(Runtime):
    """Counts its batches and lets each take 10 ms of the stand-in clock."""

    spec = ModelSpec("toy", Preprocessing((2, 3), dtype="uint8"), Nms(), (1,))
    batch_range: tuple[int, int | None] = (1, None)
    description = "stand-in"

    def __init__(self) -> None:
        self.calls = 0

    def infer(self, images: NDArray[Any]) -> Outputs:
        self.calls += 1
        return {}

    def clock(self) -> float:
        return self.calls * 0.010

    def close(self) -> None: ...


def test_measure_on_the_hosts_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = StandInRuntime()
    monkeypatch.setattr(benchmark.time, "perf_counter", runtime.clock)
    measured = measure(runtime, noise(runtime.spec, 4), iterations=50, warmup=7)
    assert runtime.calls == 7 + 50 + 7 + 50 + 7  # alone, and one after the other
    assert measured.throughput_qps == pytest.approx(100)
    assert measured.images_per_second == pytest.approx(400)
    assert list(measured.summaries) == ["Latency"]
    assert measured.summaries["Latency"].median == pytest.approx(10)
    assert measured.lines()[:2] == [
        "=== Performance summary ===",
        "Throughput: 100 qps (400 images/s)",
    ]
    assert measured.lines()[-1] == "Total Host Walltime: 0.5 s"


class StandInDevice(StandInRuntime):
    """Tells its transfers from its compute; `map` overlaps them: 6 ms a batch instead of 10."""

    frees_cpu = True

    def infer_timed(self, images: NDArray[Any]) -> BatchTimes:
        return BatchTimes(enqueue_ms=0.5, h2d_ms=2, compute_ms=6, d2h_ms=1)

    def map(self, batches: Any) -> Any:
        for batch in batches:
            self.calls += 1
            yield batch, {}

    def clock(self) -> float:
        return self.calls * 0.006


def test_measure_with_and_without_transfers(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = StandInDevice()
    monkeypatch.setattr(benchmark.time, "perf_counter", runtime.clock)
    measured = measure(runtime, Sample(np.zeros((8, 2, 3, 3), np.uint8)), iterations=30, warmup=3)
    means = {name: summary.mean for name, summary in measured.summaries.items()}
    assert means == {
        "Latency": 9,
        "Enqueue Time": 0.5,
        "H2D Latency": 2,
        "GPU Compute Time": 6,
        "D2H Latency": 1,
    }
    assert measured.walltime_s == pytest.approx(0.18)
    assert runtime.calls == 3 + 3 + 30 + 3  # `infer` is warmed up, and `map`
    assert measured.lines()[-1] == "Total GPU Compute Time: 0.18 s"
    report = measured.to_dict()
    assert report["batch_size"] == 8
    assert report["H2D Latency"]["percentile(99%)"] == 2
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_noise_is_the_same_every_time(dtype: Any) -> None:
    spec = StandInRuntime.spec.replace(preprocessing=Preprocessing((20, 30), dtype=dtype))
    images = noise(spec, 2).images
    assert images.shape == (2, 20, 30, 3)
    assert images.dtype == dtype
    assert 110 < images.mean() < 145  # 127.5 were it endless
    np.testing.assert_array_equal(images, noise(spec, 2).images)


def test_the_machine_is_described_but_not_identified() -> None:
    machine = describe_machine()
    assert machine["cpu_cores"] == available_cores() >= 1
    assert machine["cpu"]
    assert machine["packages"]["numpy"] == np.__version__
    if len(platform.node()) > 3:
        assert platform.node() not in json.dumps(machine)
