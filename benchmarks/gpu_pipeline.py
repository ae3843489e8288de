# SPDX-License-Identifier: Apache-2.0
"""Files to batches on a GPU, and on to detections: images per second, each beside its baseline, in
one run.

    python benchmarks/gpu_pipeline.py --input photos [--onnx d0.onnx] [--devices all] [--check]

Needs an NVIDIA GPU, nvImageCodec and NVRTC (requirements-gpu.txt). The parts:

1. GpuImageBatcher, from files in the page cache, against the decoder alone: bytes in memory, parsed
   and decoded in one thread, and no more; and against ImageBatcher on the CPU, with a copy to the
   GPU. The best of --rounds; within a round, the candidates take turns.
2. infer.py without pictures, with a TSV per image and detections.json, around the tests' stand-in
   for an engine: a kernel that takes --ms for a batch of 8. The baseline is that engine alone,
   which runs batch after batch on memory that is on the GPU already.
3. With --onnx, a model on ONNX Runtime's CUDA provider: 200 photographs through infer.py, once it
   is loaded, against the model alone.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "standins"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import host_writing
import trt_runtime
from criteria import add_ending, conclude
from host_pipeline import best_times

from trtdet import cuda
from trtdet.commands.cli import run_main, setup_logging
from trtdet.commands.values import parse_devices, positive_int
from trtdet.images.batcher import ImageBatcher
from trtdet.images.files import find_images
from trtdet.images.options import Decode, parse_size
from trtdet.images.preprocess import IMAGENET_MEAN
from trtdet.machine import available_cores, describe_machine
from trtdet.run.benchmark import measure
from trtdet.run.detect import open_batcher, open_model
from trtdet.run.options import RunOptions
from trtdet.runtimes import gpu_images
from trtdet.runtimes.base import Runtime
from trtdet.runtimes.gpu_decoder import decoder_of
from trtdet.runtimes.gpu_images import GpuImageBatcher
from trtdet.runtimes.multi import open_devices
from trtdet.runtimes.trt import TensorRTRuntime
from trtdet.spec import Preprocessing

#: What --check asks for.
WANTED_OF_DECODER, WANTED_RATE = 0.7, 15_000
WANTED_OF_ENGINE = 0.95
WANTED_OF_MODEL = 0.8
BATCH = 8  # of the stand-in engine
PHOTOGRAPHS = 200  # of part 3


def decode_alone(data: Sequence[bytes], at_a_time: int) -> None:
    """The baseline: one thread, `at_a_time` images at a time, nothing else."""
    decoder = decoder_of(0)
    with cuda.Stream() as stream:
        for start in range(0, len(data), at_a_time):
            some = [decoder.stream_of(one) for one in data[start : start + at_a_time]]
            images = decoder.decode(some, stream)
            stream.synchronize()
            if None in images:
                raise ValueError("benchmark: an image that nvImageCodec does not decode")
            del images
        stream.synchronize()


def run_batches(batcher: GpuImageBatcher) -> None:
    """Files to batches on the GPU; each buffer is given back, as a runtime does."""
    for batch in batcher:
        batch.release()
    if batcher.failures:
        raise ValueError(f"benchmark: could not read {batcher.failures[0][0]}")


def run_on_host(paths: Sequence[Path], preprocessing: Preprocessing, batch_size: int) -> None:
    """The same on the CPU's threads, and a copy to the GPU."""
    nbytes = batch_size * gpu_images.image_bytes(preprocessing)
    with (
        cuda.Stream() as stream,
        cuda.DeviceBuffer(nbytes) as target,
        ImageBatcher(paths, preprocessing, batch_size, allocate=cuda.pinned_empty) as batcher,
    ):
        for batch in batcher:
            stream.copy_in(target.handle, batch.images)
            stream.synchronize()
            batch.release()


def measure_batches(args: argparse.Namespace) -> dict[str, Any]:
    """Part 1."""
    files = find_images(args.input)
    paths = (files * -(-args.images // len(files)))[: args.images]
    data = [path.read_bytes() for path in paths]
    preprocessing = Preprocessing(args.size, "NHWC", "uint8", pad_rgb=IMAGENET_MEAN)
    candidates: dict[str, Callable[[], None]] = {}
    for size in args.batch_sizes:
        candidates[f"decoder alone, {size}"] = partial(decode_alone, data, size)
    batchers = []
    for size in args.batch_sizes:
        batchers.append(GpuImageBatcher(paths, preprocessing, size, workers=args.workers))
        candidates[f"GpuImageBatcher, {size}"] = partial(run_batches, batchers[-1])
    candidates["ImageBatcher, 8"] = partial(run_on_host, paths, preprocessing, 8)
    seconds = best_times(candidates, args.rounds)
    for batcher in batchers:
        batcher.close()
    rates = {name: len(paths) / seconds[name] for name in candidates}
    best = {
        kind: max(rate for name, rate in rates.items() if name.startswith(kind))
        for kind in ("decoder alone", "GpuImageBatcher")
    }
    return {
        "images_per_second": rates,
        "of_decoder": {name: rate / best["decoder alone"] for name, rate in rates.items()},
        "best": best,
    }


def alternate(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median rate of each, in turn, after a warm-up."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            rate = run()
            if number:
                rates[name].append(rate)
    return {name: median(found) for name, found in rates.items()}


def to_results(
    runtime: Runtime, paths: Sequence[Path], decode: Decode, workers: int | None
) -> float:
    """Images per second from files to TSVs and detections.json."""
    options = RunOptions(batch_size=BATCH, decode=decode, workers=workers)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        host_writing.detect_files(runtime, paths, Path(folder), None, options)
        return len(paths) / (time.perf_counter() - start)


def engine_alone(engine: Path, batches: int) -> float:
    """Images per second of the stand-in on one GPU, on memory that is there already."""
    with TensorRTRuntime(engine) as runtime:
        batch = trt_runtime.make_batches(runtime, BATCH, pinned=True)[0]
        return BATCH * trt_runtime.engine_only(runtime, batch, batches)


def measure_engine(args: argparse.Namespace) -> dict[str, Any]:
    """Part 2."""
    with tempfile.TemporaryDirectory() as folder:
        links = host_writing.unlike_names(find_images(args.input), Path(folder), args.written)
        engine = trt_runtime.make_standin("cuda", Path(folder), ms=args.ms, size=args.size[0], batch=BATCH, kernels=1)  # fmt: skip
        runs: dict[str, Callable[[], float]] = {
            "engine alone": partial(engine_alone, engine, args.written // BATCH)
        }
        decodes: tuple[Decode, ...] = ("gpu", "cpu")
        opened = []
        for devices in dict.fromkeys(((0,), args.devices)):
            runtime = open_devices(engine, devices)
            opened.append(runtime)
            count = cuda.device_count() if devices == "all" else len(devices)
            for decode in decodes:
                name = f"{count} GPU{'s' * (count > 1)}, decoded on the {decode.upper()}"
                runs[name] = partial(to_results, runtime, links, decode, args.workers)
        rates = alternate(runs, args.rounds)
        for runtime in opened:
            runtime.close()
    alone = rates["engine alone"]
    share = {name: rate / alone / int(name[0]) for name, rate in rates.items() if name[0].isdigit()}
    return {"images_per_second": rates, "of_engine": share}


def measure_model(args: argparse.Namespace) -> dict[str, Any]:
    """Part 3."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open_model(args.onnx, RunOptions(provider="cuda")) as runtime,
    ):
        links = host_writing.unlike_names(find_images(args.input), Path(folder), PHOTOGRAPHS)
        with open_batcher(runtime, links[:BATCH], RunOptions(batch_size=BATCH)) as batcher:
            batch = next(iter(batcher))
        rates: dict[str, list[float]] = {}
        for number in range(args.rounds + 1):
            found = {
                "model alone": measure(runtime, batch, iterations=40, warmup=5).images_per_second,
                "decoded on the CPU": to_results(runtime, links, "cpu", None),
                "decoded on the GPU": to_results(runtime, links, "gpu", None),
            }
            if number:
                for name, rate in found.items():
                    rates.setdefault(name, []).append(rate)
    medians = {name: median(found) for name, found in rates.items()}
    alone = medians["model alone"]
    return {
        "images_per_second": medians,
        "of_model": {name: rate / alone for name, rate in medians.items()},
    }


def criteria(report: dict[str, Any]) -> dict[str, bool]:
    """What was asked for, and whether it is so."""
    best = report["batches"]["best"]
    rate = best["GpuImageBatcher"]
    checks = {
        f"files to batches: at least {WANTED_OF_DECODER} of the decoder alone": rate >= WANTED_OF_DECODER * best["decoder alone"],
        f"files to batches: at least {WANTED_RATE} images/s": rate >= WANTED_RATE,
    }  # fmt: skip
    for name, share in report["engine"]["of_engine"].items():
        if "GPU," in name or "GPUs," in name:
            wanted = WANTED_OF_ENGINE if name.startswith("1") else 0.9
            checks[f"files to results, {name}: at least {wanted} of the engine alone"] = share >= wanted  # fmt: skip
    for name, share in report.get("model", {}).get("of_model", {}).items():
        checks[f"{PHOTOGRAPHS} photographs, {name}: at least {WANTED_OF_MODEL}"] = share >= WANTED_OF_MODEL  # fmt: skip
    return checks


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--input", type=Path, required=True, help="directory of JPEGs")
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="a model for part 3")
    parser.add_argument("--size", type=parse_size, default=(512, 512), metavar="H,W", help="network input (default: 512,512)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 32, 64, 128], metavar="N", help="of part 1 (default: 8 32 64 128)")
    parser.add_argument("--images", type=positive_int, default=6400, help="images per run of part 1 (default: %(default)s)")
    parser.add_argument("--written", type=positive_int, default=16000, help="images per run of part 2 (default: %(default)s)")
    parser.add_argument("--ms", type=float, default=2.0, metavar="MS", help="device time of a batch of the stand-in engine (default: 2)")
    parser.add_argument("--devices", type=parse_devices, default=(0,), metavar="all|0,1,...", help="GPUs of part 2 (default: 0)")
    parser.add_argument("--workers", type=positive_int, help="threads that decode on the CPU (default: one per core)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="(default: %(default)s)")
    # fmt: on
    add_ending(parser)
    return parser.parse_args(argv)


def show(title: str, rates: dict[str, float], shares: dict[str, float], of: str) -> None:
    print(f"\n{title:<44}{'images/s':>10}{of:>16}")
    for name, rate in rates.items():
        share = f"{shares[name]:>16.3f}" if name in shares else ""
        print(f"{name:<44}{rate:>10.0f}{share}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    setup_logging()

    def run() -> int:
        if why := gpu_images.missing(0):
            raise ValueError(f"benchmark: {why}")
        report: dict[str, Any] = {"machine": describe_machine(), "cores": available_cores()}
        report["batches"] = found = measure_batches(args)
        show("files to batches", found["images_per_second"], found["of_decoder"], "/ decoder alone")
        report["engine"] = found = measure_engine(args)
        show("files to results", found["images_per_second"], found["of_engine"], "/ engine alone")
        if args.onnx:
            report["model"] = found = measure_model(args)
            show(args.onnx.name, found["images_per_second"], found["of_model"], "/ model alone")
        print()
        return conclude(report, criteria(report), args)

    return run_main(run)


if __name__ == "__main__":
    raise SystemExit(main())
