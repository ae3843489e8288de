# SPDX-License-Identifier: Apache-2.0
"""create_onnx.py against NVIDIA's sample (TensorRT 10.13, deleted in 11.0) on the same SavedModel,
in the same run.

    python benchmarks/conversion.py --saved_model efficientdet-d0 --sample
    TensorRT/samples/python/efficientdet/create_onnx.py

Each is run as a process of its own, in turn; the best of --rounds counts. The last line is the
ratio. Verification on a photograph is part of our time; the sample has none.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def seconds(command: Sequence[str]) -> float:
    """Wall time of a command that must succeed."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--saved_model", type=Path, required=True)
    parser.add_argument(
        "--sample", type=Path, required=True, help="create_onnx.py of NVIDIA's sample"
    )
    parser.add_argument(
        "--input_size", default="512,512", help="what the sample has to be told (default: 512,512)"
    )
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    best = {"trtdet": float("inf"), "NVIDIA": float("inf")}
    with tempfile.TemporaryDirectory() as folder:
        model = ["--saved_model", str(args.saved_model), "--onnx", f"{folder}/model.onnx"]
        commands = {
            "trtdet": [sys.executable, str(ROOT / "create_onnx.py"), *model],
            "NVIDIA": [sys.executable, str(args.sample), *model, "--input_size", args.input_size],
        }
        for _ in range(args.rounds):
            for name, command in commands.items():
                best[name] = min(best[name], seconds(command))
    for name, value in best.items():
        print(f"{name}  {value:6.2f} s")
    print(f"ratio   {best['trtdet'] / best['NVIDIA']:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
