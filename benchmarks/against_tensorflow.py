# SPDX-License-Identifier: Apache-2.0
"""infer.py on ONNX Runtime against TensorFlow running the SavedModel, on the same cores, in turn.

    python benchmarks/against_tensorflow.py --saved_model efficientdet-d0 --onnx d0.onnx \\
        --input photos

Both read the same files, decode, preprocess, detect and write the detections; neither draws. A
third candidate is ONNX Runtime alone, on images that are ready: what infer.py takes longer is the
part of everything else. Each candidate is a process of its own, loaded and warm before the first
round. In each round they work on the same images one after the other, so that a busy machine slows
them all; the figures are medians over the rounds, and those of ratios are of the ratios within each
round. "CPU" is the time of the processor on all cores; on a machine that others use it says more.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TENSORFLOW, TRTDET, ALONE = "TensorFlow", "infer.py", "ONNX Runtime alone"
#: Does the work of a candidate on some images.
Work = Callable[[list[Path]], None]
Seconds = tuple[float, float]  # on the clock, of the processor


def tensorflow_work(saved_model: Path, output: Path) -> Work:
    """The SavedModel, which resizes, normalises and suppresses by itself."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    import tensorflow as tf

    from trtdet.images.files import load_image

    model = tf.saved_model.load(str(saved_model))
    detect = model.signatures["serving_default"]
    (argument,) = detect.structured_input_signature[1]

    def work(images: list[Path]) -> None:
        results = []
        for path in images:
            outputs = detect(**{argument: tf.constant(load_image(path)[None])})
            found = next(iter(outputs.values())).numpy().tolist()
            results.append({"file": path.name, "detections": found})
        (output / "detections.json").write_text(json.dumps(results))

    return work


def trtdet_work(model: Path, output: Path) -> Work:
    """What infer.py does with --no_images, once the model is open."""
    from trtdet.results import coco, naming
    from trtdet.results.writer import result_writer
    from trtdet.run.detect import find, open_batcher, open_model
    from trtdet.run.options import RunOptions

    options = RunOptions()
    runtime = open_model(model, options)

    def work(images: list[Path]) -> None:
        root = images[0].parent
        names = dict(zip(images, naming.output_names(images, root), strict=True))
        ids = coco.name_images(images, root)
        with (
            open_batcher(runtime, images, options) as batcher,
            result_writer(
                output, runtime.spec, names=names, image_ids=ids, pictures=False
            ) as writer,
        ):
            for found in find(runtime, batcher):
                writer.write(found)

    return work


def alone_work(model: Path) -> Work:
    """The model on images that are in memory, in the same way as infer.py runs it."""
    from trtdet.images.files import load_image
    from trtdet.images.preprocess import preprocess
    from trtdet.run.benchmark import Sample
    from trtdet.run.detect import open_model
    from trtdet.run.options import RunOptions

    runtime = open_model(model, RunOptions())
    ready = {}

    def work(images: list[Path]) -> None:
        for path in images:
            if path not in ready:
                image = preprocess(load_image(path), runtime.spec.preprocessing)[0]
                ready[path] = Sample(image[None], (path,))
        for _ in runtime.map([ready[path] for path in images]):
            pass

    return work


def serve(work: Work) -> None:
    """Of the child: a list of images per line of stdin; on stdout the seconds they took, and
    those of the processor.
    """
    for line in sys.stdin:
        images = [Path(name) for name in json.loads(line)]
        start, start_cpu = time.perf_counter(), time.process_time()
        work(images)
        print(time.perf_counter() - start, time.process_time() - start_cpu, flush=True)


class Candidate:
    """A child process that does one of the works."""

    def __init__(self, name: str, argv: Sequence[str]) -> None:
        self._child = subprocess.Popen(
            [sys.executable, *argv, "--only", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, images: Sequence[Path]) -> Seconds:
        """How long the candidate takes for these images."""
        assert self._child.stdin is not None and self._child.stdout is not None
        print(json.dumps([str(path) for path in images]), file=self._child.stdin, flush=True)
        wall, cpu = self._child.stdout.readline().split()
        return float(wall), float(cpu)

    def close(self) -> None:
        self._child.communicate()


def in_turn(
    candidates: dict[str, Callable[[Sequence[Path]], Seconds]],
    images: Sequence[Path],
    rounds: int,
) -> dict[str, list[Seconds]]:
    """Milliseconds per image of each candidate, one figure per round; in every second round they
    take turns backwards.
    """
    found: dict[str, list[Seconds]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        order = list(candidates) if number % 2 else list(candidates)[::-1]
        for name in order:
            wall, cpu = (second / len(images) * 1000 for second in candidates[name](images))
            if number:  # the first one warms up
                found[name].append((wall, cpu))
    return found


def report(found: dict[str, list[Seconds]]) -> list[str]:
    """The lines to print: medians, and medians of what is compared within a round."""
    lines = []
    for name, times in found.items():
        wall, cpu = (median(column) for column in zip(*times, strict=True))
        lines.append(f"{name:20}{wall:8.2f} ms {1000 / wall:8.2f} images/s {cpu:8.2f} ms CPU")
    pairs = list(zip(found[TRTDET], found[ALONE], strict=True))
    beside, beside_cpu = (median(ours[i] - alone[i] for ours, alone in pairs) for i in (0, 1))
    lines.append(f"infer.py beside ONNX Runtime: {beside:.2f} ms an image, {beside_cpu:.2f} ms CPU")
    if TENSORFLOW in found:
        both = zip(found[TENSORFLOW], found[TRTDET], strict=True)
        ratios = [theirs[0] / ours[0] for theirs, ours in both]
        low, high = min(ratios), max(ratios)
        lines.append(f"rate of infer.py / TensorFlow: {median(ratios):.2f} ({low:.2f} to {high:.2f} in {len(ratios)} rounds)")  # fmt: skip
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--saved_model", type=Path, help="left out: without TensorFlow")
    parser.add_argument("--onnx", type=Path, required=True)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--images", type=int, default=50, help="images per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument("--only", choices=[TENSORFLOW, TRTDET, ALONE], help=argparse.SUPPRESS)  # the child
    # fmt: on
    args = parser.parse_args(argv)
    if args.only:
        with tempfile.TemporaryDirectory() as folder:
            if args.only == TENSORFLOW:
                work = tensorflow_work(args.saved_model, Path(folder))
            else:
                work = trtdet_work(args.onnx, Path(folder)) if args.only == TRTDET else alone_work(args.onnx)  # fmt: skip
            serve(work)
        return 0
    from trtdet.images.files import find_images

    images = find_images(args.input, num_images=args.images)
    names = [TENSORFLOW, TRTDET, ALONE] if args.saved_model else [TRTDET, ALONE]
    command = [__file__, *(argv if argv is not None else sys.argv[1:])]
    children = {name: Candidate(name, command) for name in names}
    try:
        found = in_turn({name: child.seconds for name, child in children.items()}, images, args.rounds)  # fmt: skip
    finally:
        for child in children.values():
            child.close()
    print("\n".join(report(found)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
