# SPDX-License-Identifier: Apache-2.0
"""infer.py on ONNX Runtime against TensorFlow running the SavedModel, images per second on the same cores, side by side.

    python benchmarks/against_tensorflow.py --saved_model efficientdet-d0 --onnx d0.onnx --input photos

Both read the same files, decode, preprocess, detect and write the detections; neither draws. Each is timed from the second image on, so
that loading and the first run do not count, in turn, best of --rounds. The last line is the ratio.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def tensorflow_rate(saved_model: Path, images: list[Path], output: Path) -> float:
    """Images per second of the SavedModel, which resizes, normalises and suppresses by itself."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    import tensorflow as tf

    from trtdet.images.files import load_image

    model = tf.saved_model.load(str(saved_model))
    detect = model.signatures["serving_default"]
    (argument,) = detect.structured_input_signature[1]
    results = []
    for number, path in enumerate(images):
        if number == 1:
            start = time.perf_counter()
        outputs = detect(**{argument: tf.constant(load_image(path)[None])})
        results.append(
            {"file": path.name, "detections": next(iter(outputs.values())).numpy().tolist()}
        )
    output.write_text(json.dumps(results))
    return (len(images) - 1) / (time.perf_counter() - start)


def trtdet_rate(engine: Path, images: list[Path], output: Path) -> float:
    """Images per second of what infer.py does with --no_images."""
    from trtdet.detections import write_tsv
    from trtdet.run.detect import detect, open_batcher, open_model
    from trtdet.run.options import RunOptions

    options = RunOptions()
    with (
        open_model(engine, options) as runtime,
        open_batcher(runtime, images, options) as batcher,
    ):
        for number, result in enumerate(detect(runtime, batcher)):
            if number == 0:
                start = time.perf_counter()
            write_tsv(output / f"{result.path.stem}.tsv", result.detections)
    return (len(images) - 1) / (time.perf_counter() - start)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--saved_model", type=Path, required=True)
    parser.add_argument("--onnx", type=Path, required=True)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", choices=["TensorFlow", "trtdet"], help=argparse.SUPPRESS
    )  # the child process
    args = parser.parse_args()
    from trtdet.images.files import find_images

    images = find_images(args.input)
    if args.only:
        with tempfile.TemporaryDirectory() as folder:
            if args.only == "TensorFlow":
                rate = tensorflow_rate(args.saved_model, images, Path(folder) / "detections.json")
            else:
                rate = trtdet_rate(args.onnx, images, Path(folder))
        print(rate)
        return 0
    best = {"TensorFlow": 0.0, "trtdet": 0.0}
    for _ in range(args.rounds):
        for name in best:
            child = subprocess.run(
                [sys.executable, *sys.argv, "--only", name],
                check=True,
                capture_output=True,
                text=True,
            )
            best[name] = max(best[name], float(child.stdout.split()[-1]))
    for name, value in best.items():
        print(f"{name:10}  {value:6.2f} images/s")
    print(f"ratio       {best['trtdet'] / best['TensorFlow']:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
