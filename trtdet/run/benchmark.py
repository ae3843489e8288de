# SPDX-License-Identifier: Apache-2.0
"""How long a batch takes: the figures of trtexec's performance summary, under its names.

Source of names and of the percentile rule: NVIDIA/TensorRT samples/common/sampleReporting.cpp.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import cycle, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trtdet import files
from trtdet.images.files import Sources, check_no_image, check_read, find_images
from trtdet.images.options import Decode
from trtdet.images.preprocess import choose_input
from trtdet.machine import describe_machine
from trtdet.results.found import ImageResult
from trtdet.run.detect import (
    detect,
    open_batcher,
    open_model,
    pick_batch_size,
)
from trtdet.run.options import RunOptions
from trtdet.runtimes.base import BatchTimes, ImageBatch, Runtime, as_array
from trtdet.runtimes.options import TritonUrl
from trtdet.spec import ModelSpec

if TYPE_CHECKING:
    from trtdet.run.detect import AnyBatcher

#: As `trtexec --percentile=90,95,99` prints by default.
PERCENTILES = (90, 95, 99)


@dataclass(frozen=True)
class Summary:
    """A sample of times, milliseconds, as trtexec sums it up."""

    min: float
    max: float
    mean: float
    median: float
    percentiles: dict[int, float]  # percent -> ms

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Summary:
        """Sum up at least one time."""
        if not times_ms:
            raise ValueError("benchmark: expected at least one time, got none")
        ordered = sorted(times_ms)
        return cls(
            min=ordered[0],
            max=ordered[-1],
            mean=float(np.mean(ordered)),
            median=float(np.median(ordered)),
            percentiles={p: _percentile(p, ordered) for p in PERCENTILES},
        )

    def to_dict(self) -> dict[str, float]:
        """Keys as trtexec prints them: "min", ..., "percentile(99%)"."""
        fixed = {name: getattr(self, name) for name in ("min", "max", "mean", "median")}
        return fixed | {f"percentile({p}%)": value for p, value in self.percentiles.items()}

    def __str__(self) -> str:
        return ", ".join(f"{name} = {value:.5g} ms" for name, value in self.to_dict().items())


def _percentile(percent: float, ordered: Sequence[float]) -> float:
    """trtexec's percentile: a measured time, not interpolated, counted in float32 as it does."""
    share = np.float32(1) - np.float32(percent) / np.float32(100)
    exclude = int(share * np.float32(len(ordered)))
    return ordered[max(len(ordered) - 1 - exclude, 0)]


@dataclass(frozen=True)
class Measurement:
    """A runtime, measured.

    Attributes:
        summaries: trtexec's line -> its summary. "Latency" always; the others where the runtime can
            tell.
        walltime_s: of `iterations` batches one after the other through the runtime's `map`, warm.
        timed_on: of several devices, the one that `summaries` are of; throughput is that of all.
    """

    batch_size: int
    iterations: int
    warmup: int
    walltime_s: float
    summaries: dict[str, Summary]
    timed_on: str = ""

    @property
    def throughput_qps(self) -> float:
        """Batches per second: trtexec's "Throughput"."""
        return self.iterations / self.walltime_s

    @property
    def images_per_second(self) -> float:
        return self.throughput_qps * self.batch_size

    def lines(self) -> list[str]:
        """trtexec's performance summary."""
        lines = [
            "=== Performance summary ===",
            f"Throughput: {self.throughput_qps:.6g} qps ({self.images_per_second:.6g} images/s)",
            *(f"{name}: {summary}" for name, summary in self.summaries.items()),
            f"Total Host Walltime: {self.walltime_s:.6g} s",
        ]
        if compute := self.summaries.get("GPU Compute Time"):
            total_s = compute.mean * self.iterations / 1000
            lines.append(f"Total GPU Compute Time: {total_s:.6g} s")
        if self.timed_on:
            lines.append(
                f"Throughput is that of all GPUs; latencies and times are those of {self.timed_on}"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; times in milliseconds unless the key says s."""
        return {
            "batch_size": self.batch_size,
            "iterations": self.iterations,
            "warmup": self.warmup,
            "Throughput (qps)": self.throughput_qps,
            "images_per_second": self.images_per_second,
            **{name: summary.to_dict() for name, summary in self.summaries.items()},
            "Total Host Walltime (s)": self.walltime_s,
            **({"timed_on": self.timed_on} if self.timed_on else {}),
        }


class Sample(NamedTuple):
    """A batch to measure with."""

    images: NDArray[Any]
    paths: tuple[Path, ...] = ()


def noise(
    spec: ModelSpec, batch_size: int, allocate: Callable[..., NDArray[Any]] = np.empty
) -> Sample:
    """A batch of evenly distributed noise, the same every time.

    Args:
        allocate: makes the array, of a shape and a type; pinned, where the runtime has it, as
            trtexec's is.
    """
    images = allocate((batch_size, *spec.preprocessing.image_shape), spec.preprocessing.dtype)
    images[:] = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    return Sample(images)


def measure(runtime: Runtime, batch: ImageBatch, *, iterations: int, warmup: int) -> Measurement:
    """Run `batch` again and again: first alone, for latencies, then back to back, for throughput.

    Args:
        batch: in host memory; real images, as the time of NMS depends on what is found.
        iterations: batches measured in each of the two passes.
        warmup: batches run before, not measured (clocks, caches, CUDA graph capture); back to back,
            as many behind.
    """
    for _ in repeat(None, warmup):
        runtime.infer(batch.images)
    tried = [runtime.infer_timed(batch.images) for _ in repeat(None, iterations)]
    times = [one for one in tried if one is not None]
    if times:
        summaries = _summaries(times)
    else:  # the host's clock is all there is
        latencies = [_seconds(runtime, batch) * 1000 for _ in repeat(None, iterations)]
        summaries = {"Latency": Summary.of(latencies)}
    # Those in the middle count: before and after them as many are in flight.
    _, walltime_s = _middle(runtime.map(repeat(batch, iterations + 2 * warmup)), skip=warmup)
    return Measurement(
        len(batch.images), iterations, warmup, walltime_s, summaries, runtime.timed_on
    )


def _seconds(runtime: Runtime, batch: ImageBatch) -> float:
    start = time.perf_counter()
    runtime.infer(batch.images)
    return time.perf_counter() - start


def _summaries(times: Sequence[BatchTimes]) -> dict[str, Summary]:
    return {
        "Latency": Summary.of([t.latency_ms for t in times]),
        "Enqueue Time": Summary.of([t.enqueue_ms for t in times]),
        "H2D Latency": Summary.of([t.h2d_ms for t in times]),
        "GPU Compute Time": Summary.of([t.compute_ms for t in times]),
        "D2H Latency": Summary.of([t.d2h_ms for t in times]),
    }


#: Of the JSON file of a benchmark.
SCHEMA = 1
#: Batches before a benchmark starts to count.
WARMUP = 20


def run_benchmark(
    engine: Path | TritonUrl,
    source: Sources | None,
    options: RunOptions,
    *,
    iterations: int,
    json_path: Path | None = None,
) -> None:
    """Measure the runtime alone and, with images, the whole way from their files to detections."""
    if json_path:
        files.check_outputs([json_path], [engine if isinstance(engine, Path) else None])
        check_no_image([json_path], source)
    with open_model(engine, options) as runtime:
        batch_size = pick_batch_size(runtime, options)
        report: dict[str, Any] = {
            "schema": SCHEMA,
            "machine": describe_machine(),
            "model": engine.name,
            "runtime": runtime.description,
            "input": "images" if source else "noise",
            "options": {
                field.name: _plain(value)
                for field in fields(options)
                if (value := getattr(options, field.name)) not in (None, False)
            },
        }

        def batches_of(count: int, decode: Decode) -> AnyBatcher:
            """`count` batches of the images, over and over."""
            again = list(islice(cycle(paths), count * batch_size))
            return open_batcher(runtime, again, replace(options, decode=decode))

        if source is None:
            preprocessing, _ = choose_input(runtime.spec.preprocessing, size=options.size)
            spec = runtime.spec.replace(preprocessing=preprocessing)
            sample = noise(spec, batch_size, runtime.allocate)
        else:
            paths = find_images(source, recursive=options.recursive, num_images=options.num_images)
            with batches_of(1, "cpu") as batcher:
                one: Iterator[ImageBatch] = iter(batcher)
                sample = Sample(next((as_array(batch.images) for batch in one), np.empty(0)))
                check_read(batcher.failures, len(sample.images))
        measured = measure(runtime, sample, iterations=iterations, warmup=WARMUP)
        lines = [f"Batch size: {batch_size}", *measured.lines()]
        report |= measured.to_dict()
        if source is not None:
            with batches_of(iterations + 2 * WARMUP, options.decode) as batcher:
                rate = images_per_second(detect(runtime, batcher), skip=WARMUP * batch_size)
            share = rate / measured.images_per_second
            lines.append(f"End to end from files: {rate:.6g} images/s, {share:.1%} of the above")
            report["end_to_end"] = {"images_per_second": rate, "share_of_throughput": share}
    print("\n".join(map(files.printable, lines)))
    if json_path:
        files.write_text(json_path, json.dumps(report, indent=2) + "\n")


def _plain(value: Any) -> Any:
    """An option as JSON has it: paths as text."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def images_per_second(results: Iterator[ImageResult], *, skip: int) -> float:
    """How fast results come, not counting the first `skip` and the last (all count where there
    are no more than these).
    """
    count, seconds = _middle(results, skip=skip)
    return count / seconds


def _middle(results: Iterator[Any], *, skip: int) -> tuple[int, float]:
    """How many results count, see `images_per_second`, and the seconds in which they came."""
    stamps = [time.perf_counter()]
    stamps += [time.perf_counter() for _ in results]
    if len(stamps) - 1 <= 2 * skip:
        skip = 0
    return len(stamps) - 1 - 2 * skip, stamps[-1 - skip] - stamps[skip]
