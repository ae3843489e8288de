#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The whole chain on a small model, on any machine: SavedModel -> ONNX -> TensorRT-RTX engine -> detections -> mAP.
# An engine runs only on a GPU, so detections and mAP come from the ONNX file, with ONNX Runtime.
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/setup.sh" requirements.txt requirements-tensorflow.txt requirements-rtx.txt

out=examples/out
step() { printf '\n$ %s\n' "$*"; "$@"; }

step python create_onnx.py --saved_model examples/tiny_shapes --labels examples/labels.txt --onnx $out/tiny.onnx
step python build_engine.py --model $out/tiny.onnx --engine $out/tiny.engine --precision fp16 --flavor tensorrt_rtx --compute_capability 8.9
step python infer.py --model $out/tiny.onnx --input examples/images --output $out/detections --score_threshold 0.4
step python eval_coco.py --model $out/tiny.onnx --input examples/images --annotations examples/annotations.json --json $out/metrics.json
printf '\nLook at the pictures in %s/detections.\n' $out
