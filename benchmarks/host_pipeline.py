# SPDX-License-Identifier: Apache-2.0
"""Files to batches, and on to detections and pictures: images per second, each beside its baseline,
in one run.

    python benchmarks/host_pipeline.py --input photos [--onnx d0.onnx] [--against OTHER_CHECKOUT] \\
        [--nvidia_batcher TensorRT/samples/python/efficientdet/image_batcher.py]

Without --input, photographs are made up (smooth noise, JPEG quality 90). The parts:

1. ImageBatcher, against OpenCV alone: bytes in memory to pixels (and resized), in a pool of as many
   threads, the pixels thrown away. Its workers are threads or, as for fast engines and thousands of
   images on 8 cores or more, processes, which have started before. Every figure is the best of
   --rounds, the candidates taken in turn within a round, so that a busy machine slows them all.
   --check asks for 0.75 of decoding and, with --nvidia_batcher, for twice NVIDIA's, from uint8
   NHWC.
2. With --against, ImageBatcher of another checkout and of this one in turn: the median ratio.
3. Where the time of a worker goes.
4. infer.py without and with pictures, around a stand-in for the engine that takes no time, and
   around --onnx, if given, on ONNX Runtime.
"""

import argparse
import importlib.util
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import host_profile
import host_writing
from criteria import add_ending, conclude
from host_child import Child, run_all

from trtdet.commands.cli import run_main, setup_logging
from trtdet.commands.values import positive_int
from trtdet.images.batcher import ImageBatcher
from trtdet.images.files import find_images
from trtdet.images.options import parse_size
from trtdet.images.preprocess import IMAGENET_MEAN, preprocess
from trtdet.machine import available_cores, describe_machine
from trtdet.run.options import RunOptions
from trtdet.spec import InputDtype, Layout, Preprocessing

ROOT = Path(__file__).resolve().parents[1]
DECODE, RESIZED = "decode alone", "decode and resize"
NVIDIA = "NVIDIA float32"
#: What goes to an engine: the one that --check is about.
CHECKED = "uint8 NHWC"
WANTED_OF_DECODE = 0.75
WANTED_OF_NVIDIA = 2.0


def make_photographs(folder: Path, count: int, size_hw: tuple[int, int]) -> None:
    """JPEGs with about the bytes of a photograph: noise at several scales."""
    rng = np.random.default_rng(0)
    height, width = size_hw
    for number in range(count):
        image = np.full((height, width, 3), 128, np.float32)
        for size, strength in ((8, 60), (40, 30), (200, 18), (640, 10)):
            noise = rng.standard_normal((size * 3 // 4, size, 3)).astype(np.float32)
            image += strength * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        pixels = np.clip(image, 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{number:03d}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])


def decode_all(data: Sequence[bytes], workers: int, size: Preprocessing | None = None) -> None:
    """The baselines: decode in a pool, and resize where there is a size, nothing else."""

    def decode(image: bytes) -> None:
        pixels = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR_RGB)
        if size is not None:
            preprocess(np.asarray(pixels, np.uint8), size)

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    with ThreadPoolExecutor(workers) as executor:
        for _ in executor.map(decode, data):
            pass
    cv2.setNumThreads(threads)


def batch_all(batcher: ImageBatcher) -> None:
    """Files to batches; each buffer is given back, as a runtime does."""
    for batch in batcher:
        batch.release()
    if batcher.failures:
        raise ValueError(f"benchmark: could not read {batcher.failures[0][0]}")


def nvidia_batches(
    script: Path, folder: Path, batch_size: int, size_hw: tuple[int, int]
) -> Callable[[], None]:
    """NVIDIA's sample as it is, on the same folder; it decodes in the calling thread."""
    module_spec = importlib.util.spec_from_file_location("nvidia_image_batcher", script)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"--nvidia_batcher: expected a Python file, found {script}")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    batcher = module.ImageBatcher(str(folder), (batch_size, *size_hw, 3), np.float32)

    def run() -> None:
        for _ in batcher.get_batch():
            pass

    return run


def best_times(candidates: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest of `rounds` runs of each candidate, after one warm-up."""
    best = dict.fromkeys(candidates, float("inf"))
    for number in range(rounds + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if number:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def preprocessing_of(args: argparse.Namespace, dtype: InputDtype, layout: Layout) -> Preprocessing:
    return Preprocessing(args.size, layout, dtype, pad_rgb=IMAGENET_MEAN)


def run_of(args: argparse.Namespace, workers: int) -> dict[str, Any]:
    """What `host_child` is told."""
    return {
        "size_hw": args.size,
        "layout": "NHWC",
        "dtype": "uint8",
        "batch_size": args.batch_size,
        "workers": workers,
    }


def as_it_is(memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Memory that no GPU reads."""
    return memory


def measure(folder: Path, args: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    """Images per second by candidate, and the ratios; what else is to be printed.

    Args:
        stack: closes the processes.
    """
    files = find_images(folder)
    # The same files several times over, so that starting the pool does not count.
    paths = (files * -(-args.images // len(files)))[: args.images]
    data = [path.read_bytes() for path in paths]
    checked = preprocessing_of(args, "uint8", "NHWC")
    candidates: dict[str, Callable[[], None]] = {
        DECODE: lambda: decode_all(data, args.workers),
        RESIZED: lambda: decode_all(data, args.workers, checked),
    }
    dtypes: tuple[InputDtype, ...] = ("uint8", "float32")
    layouts: tuple[Layout, ...] = ("NHWC", "NCHW")
    for dtype, layout in itertools.product(dtypes, layouts):
        preprocessing = preprocessing_of(args, dtype, layout)
        batcher = ImageBatcher(paths, preprocessing, args.batch_size, workers=args.workers)
        candidates[f"{dtype} {layout}"] = partial(batch_all, batcher)
        if args.processes:
            batcher = ImageBatcher(paths, preprocessing, args.batch_size, workers=args.workers, pin=as_it_is)  # fmt: skip
            stack.enter_context(batcher)
            candidates[f"{dtype} {layout}, processes"] = partial(batch_all, batcher)
    counts = dict.fromkeys(candidates, len(paths))
    if args.nvidia_batcher:
        candidates[NVIDIA] = nvidia_batches(args.nvidia_batcher, folder, args.batch_size, args.size)
        counts[NVIDIA] = len(files)
    seconds = best_times(candidates, args.rounds)
    rates = {name: counts[name] / seconds[name] for name in candidates}
    return {
        "images_per_second": rates,
        "of_decode": {name: rate / rates[DECODE] for name, rate in rates.items()},
        "of_nvidia": {
            name: rate / rates[NVIDIA] for name, rate in rates.items() if NVIDIA in rates
        },
        "workers": args.workers,
        "batch_size": args.batch_size,
        "network_size_hw": args.size,
        "source_sizes_wh": sorted({Image.open(path).size for path in files}),
        "machine": describe_machine(),
        "more": [
            *(against(args, paths) if args.against else ()),
            *where_the_time_goes(args, paths),
            *writing(args, files),
        ],
    }


def against(args: argparse.Namespace, paths: Sequence[Path]) -> list[str]:
    """This checkout and another in turn: the median of the ratios."""
    ratios = []
    run = run_of(args, args.workers)
    with closing(Child(ROOT)) as ours, closing(Child(args.against)) as theirs:
        for number in range(2 * args.rounds + 1):
            seconds = {}
            for child in (ours, theirs) if number % 2 else (theirs, ours):
                start = time.perf_counter()
                run_all([child], run, paths)
                seconds[child] = time.perf_counter() - start
            if number:
                ratios.append(seconds[theirs] / seconds[ours])
    low, high = min(ratios), max(ratios)
    return [f"rate of this checkout / {args.against.name}: {median(ratios):.2f} ({low:.2f} to {high:.2f} in {len(ratios)} rounds)"]  # fmt: skip


def where_the_time_goes(args: argparse.Namespace, paths: Sequence[Path]) -> list[str]:
    preprocessing = preprocessing_of(args, "uint8", "NHWC")
    alone = host_profile.profile(paths[: len(paths) // args.workers + 1], preprocessing, args.batch_size, 1)  # fmt: skip
    together = host_profile.profile(paths, preprocessing, args.batch_size, args.workers)
    return ["", *host_profile.lines(alone, together, args.workers)]


def writing(args: argparse.Namespace, files: Sequence[Path]) -> list[str]:
    """infer.py without and with pictures."""
    lines = ["", f"{'infer.py':<44}{'images/s':>9}{'/ none':>10}"]
    checked = preprocessing_of(args, "uint8", "NHWC")
    with tempfile.TemporaryDirectory() as folder:
        links = host_writing.unlike_names(files, Path(folder), args.written)
        options = RunOptions(batch_size=args.batch_size, workers=args.workers)
        for boxes in (10, 50):
            with host_writing.StandInEngine(checked, boxes) as runtime:
                rates = host_writing.measure(runtime, links, options, 1)
            lines += host_writing.lines(f"stand-in engine, {boxes} boxes", rates)
        if args.onnx:
            few = links[: args.written // 4]
            with host_writing.open_or_stand_in(args.onnx, checked, 0) as runtime:
                rates = host_writing.measure(runtime, few, RunOptions(), 1)
                lines += [runtime.description, *host_writing.lines(args.onnx.name, rates)]
    return lines


def criteria(report: dict[str, Any]) -> dict[str, bool]:
    """What was asked for, and whether it is so."""
    best = max(report["of_decode"].get(f"{CHECKED}{workers}", 0.0) for workers in ("", ", processes"))  # fmt: skip
    checks = {f"{CHECKED}: at least {WANTED_OF_DECODE} of decoding alone": best >= WANTED_OF_DECODE}
    if report["of_nvidia"]:
        wanted = f"{CHECKED}: at least {WANTED_OF_NVIDIA} times NVIDIA's"
        checks[wanted] = report["of_nvidia"][CHECKED] >= WANTED_OF_NVIDIA
    return checks


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--input", type=Path, help="directory of JPEGs (default: made-up photographs)")
    parser.add_argument("--nvidia_batcher", type=Path, metavar="FILE", help="image_batcher.py of NVIDIA's EfficientDet sample, to measure beside")
    parser.add_argument("--size", type=parse_size, default=(512, 512), metavar="H,W", help="network input (default: 512,512)")
    parser.add_argument("--batch_size", type=positive_int, default=8, help="(default: %(default)s)")
    parser.add_argument("--workers", type=positive_int, default=available_cores(), help="threads (default: one per available core, %(default)s here)")
    parser.add_argument("--images", type=positive_int, default=160, help="images per run (default: %(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=5, help="(default: %(default)s)")
    parser.add_argument("--source_size", type=parse_size, default=(960, 1280), metavar="H,W", help="of made-up photographs (default: 960,1280)")
    parser.add_argument("--processes", action="store_true", default=available_cores() >= 8, help="measure processes as workers too (default: from 8 cores on)")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout, to compare with in turn")
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="a model for part 4")
    parser.add_argument("--written", type=positive_int, default=200, help="images per run of part 4 (default: %(default)s)")
    # fmt: on
    add_ending(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    setup_logging()

    def run() -> int:
        with tempfile.TemporaryDirectory() as made:
            if args.input is None:
                make_photographs(Path(made), 16, args.source_size)
            with ExitStack() as stack:
                report = measure(args.input or Path(made), args, stack)
        print(f"{'':<24}{'images/s':>9}{'/ decode':>10}{'/ NVIDIA':>10}")
        for name, rate in report["images_per_second"].items():
            nvidia = report["of_nvidia"].get(name)
            last = f"{nvidia:>10.2f}" if nvidia else ""
            print(f"{name:<24}{rate:>9.1f}{report['of_decode'][name]:>10.3f}{last}")
        print("\n".join(report.get("more", ())))
        return conclude(report, criteria(report), args)

    return run_main(run)


if __name__ == "__main__":
    raise SystemExit(main())
