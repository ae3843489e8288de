# SPDX-License-Identifier: Apache-2.0
"""How much of the wall time of infer.py ONNX Runtime is busy: the rest is what the pipeline around
it fails to hide.

    python benchmarks/onnx_runtime_busy.py --onnx d0.onnx --input photos

The run is infer.py's with --no_images, from the second batch on: files are decoded and resized,
detections decoded and written as TSV. --check asks for 95 %.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trtdet.detections import write_tsv
from trtdet.images.files import find_images
from trtdet.run.detect import detect, open_batcher, open_model
from trtdet.run.options import RunOptions

#: What --check asks for.
WANTED = 0.95


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--onnx", type=Path, required=True)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument(
        "--check", action="store_true", help="exit with status 1 where the criterion is not met"
    )
    args = parser.parse_args(argv)
    options = RunOptions()
    images = find_images(args.input)
    busy, start, count = 0.0, 0.0, 0
    with (
        tempfile.TemporaryDirectory() as folder,
        open_model(args.onnx, options) as runtime,
        open_batcher(runtime, images, options) as batcher,
    ):
        honest = runtime.infer

        def timed(batch: Any) -> Any:
            nonlocal busy
            begin = time.perf_counter()
            outputs = honest(batch)
            busy += time.perf_counter() - begin
            return outputs

        runtime.infer = timed  # type: ignore[method-assign]
        for number, result in enumerate(detect(runtime, batcher)):
            if number == 0:
                busy, start = 0.0, time.perf_counter()
            else:
                count += 1
            write_tsv(Path(folder) / f"{result.path.stem}.tsv", result.detections)
        wall = time.perf_counter() - start
    print(f"{count / wall:.2f} images/s, ONNX Runtime busy {busy / wall:.1%} of {wall:.1f} s")
    return 1 if args.check and busy / wall < WANTED else 0


if __name__ == "__main__":
    raise SystemExit(main())
