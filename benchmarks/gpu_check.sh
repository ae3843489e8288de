#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All that wants a GPU, in one go: the GPU tests, the run-time benchmark, compute-sanitizer. About three minutes.
#
#     benchmarks/gpu_check.sh [OUTPUT_DIRECTORY]
#
# Uses whatever TensorRT is installed for the tests; the benchmark takes the stand-in engine, a kernel of 2 ms.
# The last line is "ok" or names the steps that failed; the exit status says the same.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-${OUT:-build/gpu_check}}
mkdir -p "$out"
python=${PYTHON:-python3}
failed=()

step() { # NAME SECONDS COMMAND...: run it, keep its output, go on whatever comes of it
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  echo "--- $name"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log" | tail -n 25
  local status=${PIPESTATUS[0]}
  echo "--- $name: exit $status after $((SECONDS - start)) s"
  ((status == 0)) || failed+=("$name ($status)")
}

export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONHASHSEED=0
step environment 120 "$python" - <<'PYTHON'
import importlib, importlib.metadata, sys
print("python", sys.version.split()[0])
missing = []
for module, package in (("numpy", "numpy"), ("cv2", "opencv-python-headless"), ("onnx", "onnx"), ("tqdm", "tqdm"), ("pytest", "pytest"), ("cuda.bindings.runtime", "cuda-bindings")):
    try:
        importlib.import_module(module)
        print(package, importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        print(package, "(no version)")
    except ImportError as error:
        missing.append(package)
        print(package, "MISSING:", error)
if missing:
    raise SystemExit("missing: " + " ".join(missing))
sys.path.insert(0, ".")
sys.path.insert(0, "tests")
from trtdet import device
for index in range(device.device_count()):
    print(device.device_info(index))
import standin_detector
info = device.device_info(0)
print(len(standin_detector.compile_kernels("sm_{}{}".format(*info.compute_capability))), "bytes of kernels compiled")
PYTHON

step tests 240 "$python" -m pytest -m gpu -q -rA -p no:cacheprovider tests/test_gpu.py

gpus=$("$python" -c 'import sys; sys.path.insert(0, "."); from trtdet import device; print(device.device_count())')
devices=()
((${gpus:-1} > 1)) && devices=(--devices all)
step benchmark 240 "$python" benchmarks/trt_runtime.py --standin cuda --ms 2 --size 512 --batch_size 8 "${devices[@]}" \
  --check --json "$out/trt_runtime.json" --timeline "$out/trt_runtime.png"

sanitizer=$(command -v compute-sanitizer || compgen -G "/usr/local/cuda*/bin/compute-sanitizer" | head -n 1)
if [[ -n $sanitizer ]]; then
  # cuda-bindings asks the driver for every entry point it knows; each one an older driver lacks counts as an API error.
  step memcheck 240 "$sanitizer" --tool memcheck --report-api-errors no --error-exitcode 9 \
    "$python" benchmarks/trt_runtime.py --standin cuda --ms 2 --size 512 --batch_size 8 --batches 40 --memory_batches 120 --kernels 20
else
  failed+=("memcheck (no compute-sanitizer)")
fi

if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo ok
