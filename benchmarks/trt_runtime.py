# SPDX-License-Identifier: Apache-2.0
"""How much of an engine's speed the TensorRT runtime passes on: overlap, CUDA graphs, memory,
several GPUs.

    python benchmarks/trt_runtime.py --engine model.engine --json runtime.json --timeline
    runtime.png python benchmarks/trt_runtime.py --standin cuda --ms 2 --size 512 --check

Every figure stands beside its baseline of the same run. "engine only" launches the network back to
back on buffers that are on the GPU already. "in memory" adds all that a real run has but files:
host batches in, outputs out, in order. With --standin the engine is the tests' stand-in, a kernel
that takes --ms whatever the GPU ("cpu": without a GPU, to try this script; its times mean nothing).
"""

import argparse
import gc
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "standins"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trtdet import cuda
from trtdet.commands.cli import run_main, setup_logging
from trtdet.commands.values import parse_devices, positive_int
from trtdet.detections import decode
from trtdet.files import atomic_path, write_text
from trtdet.geometry import ResizeTransform
from trtdet.machine import describe_machine
from trtdet.runtimes.base import Outputs
from trtdet.runtimes.multi import open_devices
from trtdet.runtimes.trt import TensorRTRuntime

#: What --check asks for.
WANTED_OVERLAP = 0.95
WANTED_SCALING = 0.95  # of a GPU's speed, for each further GPU
#: Host memory may move by as much: Python's allocator hands pages back when it likes.
RSS_SLACK = 4 << 20
#: Different batches in host memory: more than the caches hold.
BATCHES = 16
WARMUP = 50


@dataclass
class Batch:
    images: NDArray[Any]
    paths: tuple[Path, ...] = ()


def make_batches(runtime: TensorRTRuntime, size: int, *, pinned: bool) -> list[Batch]:
    """`BATCHES` batches of noise."""
    shape = (size, *runtime.spec.preprocessing.image_shape)
    dtype = runtime.spec.preprocessing.dtype
    rng = np.random.default_rng(0)
    made = []
    for _ in range(BATCHES):
        images = runtime.allocate(shape, dtype) if pinned else np.empty(shape, dtype)
        images[:] = rng.integers(0, 256, shape, np.uint8)
        made.append(Batch(images))
    return made


def some(batches: Sequence[Batch], count: int) -> Iterator[Batch]:
    return islice(cycle(batches), count)


def engine_only(runtime: TensorRTRuntime, batch: Batch, count: int) -> float:
    """Batches per second of the network alone: one launch after the other on the same buffers."""
    for _ in range(2 * runtime.depth + 1):  # each slot has its CUDA graph now
        runtime.infer(batch.images)
    slot = runtime._free[0]  # the runtime offers no such loop: nobody else wants one
    stream = slot.lane.stream
    with cuda.Event(timed=True) as start, cuda.Event(timed=True) as end:
        start.record(stream)
        for _ in range(count):
            slot.lane.run(slot)
        end.record(stream)
        end.synchronize()
        return count / start.elapsed_ms(end) * 1000


def through_map(runtime: Any, batches: Iterable[Batch], count: int) -> float:
    """Batches per second from host memory to decoded detections."""
    height, width = runtime.spec.preprocessing.size_hw
    transform = ResizeTransform((width, height), (1.0, 1.0))
    start = time.perf_counter()
    for batch, outputs in runtime.map(batches):
        decode(outputs, runtime.spec, [transform] * len(batch.images))
    return count / (time.perf_counter() - start)


def one_by_one(runtime: TensorRTRuntime, batches: Iterable[Batch], count: int) -> float:
    """The same without overlap."""
    start = time.perf_counter()
    for batch in batches:
        runtime.infer(batch.images)
    return count / (time.perf_counter() - start)


def measure_overlap(engine: Path, size: int, count: int) -> dict[str, Any]:
    """Throughput of the engine alone, and of the runtime around it."""
    with TensorRTRuntime(engine) as runtime:
        pageable = make_batches(runtime, size, pinned=False)
        pinned = make_batches(runtime, size, pinned=True)
        for _ in runtime.map(some(pinned, WARMUP)):
            pass
        alone = engine_only(runtime, pinned[0], count)
        result: dict[str, Any] = {"engine_only_qps": alone, "batch_bytes": pinned[0].images.nbytes}
        for name, qps in {
            "in_memory_pinned": through_map(runtime, some(pinned, count), count),
            "in_memory_pageable": through_map(runtime, some(pageable, count), count),
            "one_by_one_pageable": one_by_one(runtime, some(pageable, count), count),
        }.items():
            result[name] = {"qps": qps, "images_per_second": qps * size, "ratio": qps / alone}
        result["engine_only_again_qps"] = engine_only(runtime, pinned[0], count)
        times = [runtime.infer_timed(pinned[0].images) for _ in range(100)]
        for field in ("enqueue_ms", "h2d_ms", "compute_ms", "d2h_ms"):
            result[f"median_{field}"] = median(getattr(t, field) for t in times)
    return result


def measure_enqueue(engine: Path, size: int, count: int) -> dict[str, float]:
    """Host time of one launch, microseconds, in the running pipeline: CUDA graph against plain
    enqueue.
    """
    found = {}
    for name, graph in (("graph", True), ("plain", False)):
        with TensorRTRuntime(engine, cuda_graph=graph) as runtime:
            batches = make_batches(runtime, size, pinned=True)
            times = []
            for _ in runtime.map(some(batches, WARMUP + count)):
                times.append(runtime.last_times().enqueue_ms * 1000)
            times = times[WARMUP:]
            found[f"{name}_median_us"] = median(times)
            found[f"{name}_p99_us"] = sorted(times)[int(0.99 * (len(times) - 1))]
    found["graph_over_plain"] = found["graph_median_us"] / found["plain_median_us"]
    return found


def resident_bytes() -> int:
    """Memory of this process that is in RAM (Linux)."""
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * 4096


def measure_memory(engine: Path, size: int, count: int) -> dict[str, Any]:
    """Device and host memory after 100 batches and after `count`."""
    with TensorRTRuntime(engine) as runtime:
        batches = make_batches(runtime, size, pinned=False)
        levels = []
        for batches_run in (100, count - 100):
            for _ in runtime.map(some(batches, batches_run)):
                pass
            gc.collect()
            levels.append((cuda.free_memory(), resident_bytes()))
    (free_before, rss_before), (free_after, rss_after) = levels
    return {
        "batches": count,
        "device_bytes_grown": free_before - free_after,
        "host_bytes_grown": rss_after - rss_before,
    }


def fingerprint(results: Iterable[tuple[Batch, Outputs]]) -> int:
    """A number that changes with any byte of any output, and with the order."""
    value = 0
    for _, outputs in results:
        value = hash((value, *(array.tobytes() for array in outputs.values())))
    return value


def measure_devices(
    engine: Path, devices: Any, size: int, count: int
) -> dict[str, Any]:  # fmt: skip
    """Throughput of several GPUs against the first of them alone; and whether the results are
    the same.
    """
    numbers = tuple(range(cuda.device_count())) if devices == "all" else devices
    qps: dict[int, float] = {}
    fingerprints = set()
    for chosen in (
        numbers[:1],
        numbers,
        numbers[:1],
    ):  # the first warms up; one GPU counts with its better run
        with open_devices(engine, chosen) as runtime:
            batches = make_batches(runtime, size, pinned=True)  # type: ignore[arg-type]
            fingerprints.add(fingerprint(runtime.map(some(batches, 200))))  # type: ignore[attr-defined]
            total = count * len(chosen)
            measured = through_map(runtime, some(batches, total), total)
            qps[len(chosen)] = max(measured, qps.get(len(chosen), 0.0))
    return {
        "gpus": len(numbers),
        "one_qps": qps[1],
        "all_qps": qps[len(numbers)],
        "ratio": qps[len(numbers)] / qps[1],
        "same_results": len(fingerprints) == 1,
    }


Spans = list[dict[str, tuple[float, float]]]


def record_timeline(engine: Path, size: int, count: int) -> Spans:
    """When each part of some batches of a running pipeline began and ended, milliseconds."""
    with TensorRTRuntime(engine) as runtime:
        batches = make_batches(runtime, size, pinned=False)
        spans = []
        for _ in runtime.map(some(batches, WARMUP + count)):
            spans.append(runtime.last_spans())
    return spans[WARMUP // 2 :][:count]


def busy_share(spans: Spans) -> float:
    """Share of the time from the first launch to the last in which the network ran."""
    first, last = spans[0]["compute"][0], spans[-1]["compute"][1]
    return sum(end - start for start, end in (s["compute"] for s in spans)) / (last - first)


def draw_timeline(path: Path, spans: Spans, title: str) -> None:
    """One row each for copies in, network and copies out; a colour per batch."""
    import cv2

    width, left, row, top = 1600, 130, 60, 60
    image = np.full((top + 3 * row + 50, width, 3), 255, np.uint8)
    start = min(s["h2d"][0] for s in spans)
    end = max(s["d2h"][1] for s in spans)
    scale = (width - left - 20) / (end - start)
    colours = [(181, 119, 31), (14, 127, 255), (44, 160, 44), (40, 39, 214), (189, 103, 148)]
    font = cv2.FONT_HERSHEY_SIMPLEX
    cv2.putText(image, title, (left, 34), font, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
    for number, (name, label) in enumerate((("h2d", "copy in"), ("compute", "network"), ("d2h", "copy out"))):  # fmt: skip
        y = top + number * row
        cv2.putText(image, label, (10, y + 32), font, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
        for index, span in enumerate(spans):
            x0, x1 = (left + int((t - start) * scale) for t in span[name])
            colour = colours[index % len(colours)]
            cv2.rectangle(image, (x0, y + 8), (max(x1, x0 + 1), y + row - 12), colour, -1)
            if x1 - x0 > 30:
                cv2.putText(image, str(index), (x0 + 6, y + 34), font, 0.5, (255, 255, 255), 1, cv2.LINE_AA)  # fmt: skip
    y = top + 3 * row
    for tick in range(int(end - start) + 1):
        x = left + int(tick * scale)
        cv2.line(image, (x, y), (x, y + 6), (0, 0, 0), 1)
        if tick % max(1, int((end - start) / 15)) == 0:
            cv2.putText(image, f"{tick} ms", (x - 14, y + 26), font, 0.45, (0, 0, 0), 1, cv2.LINE_AA)  # fmt: skip
    with atomic_path(path) as temporary:
        cv2.imwrite(str(temporary), image)


def make_standin(kind: str, folder: Path, *, ms: float, size: int, batch: int, kernels: int) -> Path:  # fmt: skip
    """An engine of the tests' stand-in, and the stand-in in the place of TensorRT (and, for
    "cpu", of CUDA).
    """
    import standin_tensorrt_runtime as standin

    logging.getLogger("trtdet.runtimes.trt_load").setLevel(logging.ERROR)  # it has no sidecar
    if kind == "cpu":
        from standin_cudart import StandinCudart
        from standin_detector import CpuBackend

        cudart = StandinCudart(schedule="early", memory_bytes=8 << 30)
        cuda.cudart = lambda: cudart  # type: ignore[assignment]
        sys.modules["tensorrt"] = standin.make_module(CpuBackend(cudart))
    else:
        import gpu_engines

        gpu_engines.install_standin()
    return standin.write_engine(
        folder / f"standin_{kernels}.engine",
        image_shape=(size, size, 3),
        profiles=[(1, batch, batch)],
        slots=100,
        spin_ms=ms,
        kernels=kernels,
    )


def criteria(report: dict[str, Any]) -> dict[str, bool]:
    """What was asked for, and whether it is so."""
    memory, overlap = report["memory"], report["overlap"]
    checks = {
        f"in memory, pageable: at least {WANTED_OVERLAP} of engine only": overlap["in_memory_pageable"]["ratio"] >= WANTED_OVERLAP,
        f"in memory, pinned: at least {WANTED_OVERLAP} of engine only": overlap["in_memory_pinned"]["ratio"] >= WANTED_OVERLAP,
        "device memory does not grow": memory["device_bytes_grown"] <= 0,
        "host memory does not grow": memory["host_bytes_grown"] <= RSS_SLACK,
    }  # fmt: skip
    if "devices" in report:
        several = report["devices"]
        wanted = WANTED_SCALING * several["gpus"]
        checks[f"{several['gpus']} GPUs: at least {wanted:.2f} of one"] = several["ratio"] >= wanted
        checks["several GPUs: the same results"] = several["same_results"]
    return checks


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; see the module's docstring. Returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        engine, many = args.engine, None
        if args.standin:
            options = {"ms": args.ms, "size": args.size, "batch": args.batch_size}
            many = make_standin(args.standin, Path(folder), kernels=args.kernels, **options)
            engine = make_standin(args.standin, Path(folder), kernels=1, **options)
        with TensorRTRuntime(engine) as runtime:
            description = runtime.description
        report: dict[str, Any] = {
            "engine": f"stand-in ({args.standin}), {args.ms} ms" if args.standin else engine.name,
            "runtime": f"stand-in for {description}" if args.standin else description,
            "machine": describe_machine(),
            "batch_size": args.batch_size,
            "overlap": measure_overlap(engine, args.batch_size, args.batches),
            "enqueue": measure_enqueue(engine, args.batch_size, args.batches // 4),
        }
        if many is not None:
            report[f"enqueue_{args.kernels}_kernels"] = measure_enqueue(
                many, args.batch_size, args.batches // 4
            )
        report["memory"] = measure_memory(engine, args.batch_size, args.memory_batches)
        if args.devices:
            report["devices"] = measure_devices(engine, args.devices, args.batch_size, args.batches)
        spans = record_timeline(engine, args.batch_size, 8)
        report["network_busy_in_timeline"] = busy_share(spans)
    if args.timeline:
        draw_timeline(args.timeline, spans, f"{report['engine']}, batch {args.batch_size}: the network runs {report['network_busy_in_timeline']:.1%} of the time")  # fmt: skip
    report["criteria"] = criteria(report)
    text = json.dumps(report, indent=2)
    if args.json:
        write_text(args.json, text + "\n")
    print(text)
    return 1 if args.check and not all(report["criteria"].values()) else 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--engine", type=Path, metavar="FILE", help="a TensorRT engine")
    source.add_argument("--standin", choices=("cuda", "cpu"), help="the tests' stand-in instead")
    parser.add_argument("--ms", type=float, default=2.0, metavar="MS", help="stand-in: device time of a batch (default: 2)")
    parser.add_argument("--size", type=positive_int, default=512, metavar="PIXELS", help="stand-in: height and width of the images (default: 512)")
    parser.add_argument("--kernels", type=positive_int, default=300, metavar="N", help="stand-in: launches of the second engine whose enqueue time is measured (default: 300, about EfficientDet-D0's)")
    parser.add_argument("--batch_size", type=positive_int, default=8, metavar="N", help="images per batch (default: 8)")
    parser.add_argument("--batches", type=positive_int, default=1000, metavar="N", help="batches per figure (default: 1000)")
    parser.add_argument("--memory_batches", type=positive_int, default=10000, metavar="N", help="batches after which memory is compared with what it was after 100 (default: 10000)")
    parser.add_argument("--devices", type=parse_devices, metavar="all|0,1,...", help="also measure these GPUs against the first of them alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here too")
    parser.add_argument("--timeline", type=Path, metavar="FILE.png", help="draw eight batches of the running pipeline")
    parser.add_argument("--check", action="store_true", help="exit with status 1 where a criterion is not met")
    # fmt: on
    args = parser.parse_args(argv)
    if args.memory_batches <= 100:
        parser.error("--memory_batches: expected more than 100")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    setup_logging()
    return run_main(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
