#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Does it work on this GPU? Builds, runs, compares and measures the example in every precision that the card has, and writes one page and one
# JSON file for a report: build/gpu_report. About ten minutes. Options go to benchmarks/gpu_report.py: --help lists them.
#
#     bash examples/gpu.sh
#     PYTHON=/usr/bin/python3 bash examples/gpu.sh    # with this Python if it has TensorRT (a container, a Jetson)
#
# A Python that has TensorRT and the rest is used as it is; else .venv is made, with TensorRT from PyPI.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

tensorrt=requirements-tensorrt.txt
case " $* " in
*" --stand_in "*) tensorrt=requirements-rtx.txt ;; # builds without a GPU
*" --help "* | *" -h "*) ;;
*)
  # Before gigabytes are installed.
  command -v nvidia-smi >/dev/null || [ -e /usr/lib/wsl/lib/nvidia-smi ] || [ -e /etc/nv_tegra_release ] || {
    echo "error: no NVIDIA driver found (nvidia-smi); this report is about engines on a GPU. --stand_in tries it without one" >&2
    exit 1
  }
  ;;
esac

ready='
from importlib.util import find_spec
import sys
needed = ("msgspec", "numpy", "onnx", "onnxruntime", "onnx_graphsurgeon", "cv2", "PIL", "pycocotools", "tqdm", "pytest", "cuda")
sys.exit(any(find_spec(name) is None for name in needed) or not (find_spec("tensorrt") or find_spec("tensorrt_rtx")))
'
python=${PYTHON:-python3}
case $python in /*) ;; */*) python=$PWD/$python ;; esac
if ! "$python" -c "$ready" 2>/dev/null; then
  here=$PWD # options name files from here
  PYTHON=$python
  source "$root/scripts/setup.sh" requirements.txt requirements-tensorflow.txt $tensorrt requirements-dev.txt
  cd "$here"
  python=$root/.venv/bin/python
fi
exec "$python" "$root/benchmarks/gpu_report.py" "$@"
