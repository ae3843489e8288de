# SPDX-License-Identifier: Apache-2.0
"""All stages under one command. Each has the options of the script of its name.

trtdet create_onnx --saved_model efficientdet-d0 --onnx d0.onnx
trtdet build_engine --model d0.onnx --engine d0.engine
trtdet infer --model d0.engine --input photos --output found
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from trtdet.commands import cli

#: Stage -> what it does. Each is a module of this package, imported when it is called.
STAGES = {
    "create_onnx": "convert a trained model to an ONNX file that ends in NMS",
    "build_engine": "build a TensorRT engine from that ONNX file",
    "infer": "find objects in images: pictures and TSV files",
    "eval_coco": "measure mAP on images with COCO annotations",
    "compare": "compare two forms of a model, such as FP32 and INT8",
    "tune_precision": "find the convolutions that must stay in FP16 with INT8",
    "deploy": "write files for Triton or DeepStream, or the trtexec command",
    "image_batcher": "show images as the network gets them",
    "visualize": "draw existing TSV files into pictures",
    "doctor": "check what works on this machine, and what is missing",
}


def parser() -> cli.ArgumentParser:
    stages = "\n".join(f"  {name:<16}{text}" for name, text in STAGES.items())
    made = cli.ArgumentParser(
        prog="trtdet",
        description=f"{__doc__}\nstages:\n{stages}\n\ntrtdet STAGE --help shows the options of a stage.",
    )
    made.add_argument("stage", metavar="STAGE", help="one of the above")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    entry = parser()
    stage = entry.parse_args(words[:1]).stage
    if stage not in STAGES:
        near = difflib.get_close_matches(stage, STAGES, 1)
        advice = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(STAGES)}"
        entry.error(f"unknown stage {stage}: {advice}")
    sys.argv = [f"trtdet {stage}", *words[1:]]  # argparse takes the name for usage from here
    status: int = import_module(f"trtdet.commands.{stage}").main(words[1:])
    return status
