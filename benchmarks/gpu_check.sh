#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All that wants a GPU, in one go: the GPU tests, the run-time benchmark, infer.py on one GPU and on all, compute-sanitizer.
# About two minutes.
#
#     benchmarks/gpu_check.sh [OUTPUT_DIRECTORY]
#
# Uses whatever TensorRT is installed for the tests; the rest takes the stand-in engine, a kernel of 2 ms.
# The last line is "ok" or names the steps that failed; the exit status says the same.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-${OUT:-build/gpu_check}}
mkdir -p "$out"
export python=${PYTHON:-python3}
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
sys.path.insert(0, "tests/standins")
from trtdet import cuda
for index in range(cuda.device_count()):
    print(cuda.device_info(index))
import standin_detector
info = cuda.device_info(0)
print(len(standin_detector.compile_kernels("sm_{}{}".format(*info.compute_capability))), "bytes of kernels compiled")
PYTHON

step tests 240 "$python" -m pytest -m gpu -q -rA -p no:cacheprovider tests/runtimes/test_gpu.py

gpus=$("$python" -c 'import sys; sys.path.insert(0, "."); from trtdet import cuda; print(cuda.device_count())')
devices=()
((${gpus:-1} > 1)) && devices=(--devices all)
step benchmark 240 "$python" benchmarks/trt_runtime.py --standin cuda --ms 2 --size 512 --batch_size 8 "${devices[@]}" \
  --check --json "$out/trt_runtime.json" --timeline "$out/trt_runtime.png"

infer_on_gpus() { # infer.py writes the same files on one GPU and on all; SIGTERM in the middle leaves nothing half written
  set -euo pipefail
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  "$python" - "$work" <<'PYTHON'
import os, sys
from pathlib import Path

sys.path[:0] = ["benchmarks", "tests/standins", "."]
import host_pipeline, standin_tensorrt_runtime

folder = Path(sys.argv[1])
(folder / "photos").mkdir()
host_pipeline.make_photographs(folder / "photos", 32)
for number in range(32, 320):
    os.link(folder / "photos" / f"{number % 32:03d}.jpg", folder / "photos" / f"{number:03d}.jpg")
standin_tensorrt_runtime.write_engine(folder / "standin.engine", image_shape=(512, 512, 3), profiles=[(1, 8, 8)], slots=100, spin_ms=2.0)
PYTHON
  infer=("$python" tests/standins/standin_infer.py cuda infer --model "$work/standin.engine" --input "$work/photos")
  "${infer[@]}" --output "$work/one" --devices 0
  "${infer[@]}" --output "$work/all" --devices all
  diff -r "$work/one" "$work/all"
  echo "$(find "$work/one" -type f | wc -l) files, the same from one GPU and from all"
  "${infer[@]}" --benchmark 300 --devices all

  "${infer[@]}" --output "$work/cut" --devices all &
  until compgen -G "$work/cut/*.png" >/dev/null; do sleep 0.05; done
  kill -TERM $!
  status=0
  wait $! || status=$?
  left=$(find "$work/cut" -name '.*' -o -name detections.json)
  echo "SIGTERM: exit $status after $(find "$work/cut" -name '*.tsv' | wc -l) images; half written: ${left:-nothing}"
  [[ $status == 143 && -z $left ]]
}
export -f infer_on_gpus
step infer 180 bash -c infer_on_gpus

sanitizer=$(command -v compute-sanitizer || compgen -G "/usr/local/cuda*/bin/compute-sanitizer" | head -n 1)
if [[ -n $sanitizer ]]; then
  # No --leak-check: it records the Python frames of an allocation and so keeps alive the arrays in them, which are then "leaked".
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
