# SPDX-License-Identifier: Apache-2.0
"""Every stage as a command of an installed package: trtdet STAGE ..., with the options of the scripts.

trtdet create_onnx --saved_model efficientdet-d0 --onnx d0.onnx
trtdet build_engine --onnx d0.onnx --engine d0.engine
trtdet infer --engine d0.engine --input photos --output found
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from trtdet.about import __version__

#: Stage -> what it does. Each is a module of this package, imported when it is called.
STAGES = {
    "create_onnx": "a trained model to an ONNX file that ends in NMS",
    "build_engine": "that ONNX file to a TensorRT engine",
    "infer": "an engine or ONNX file and images to pictures and TSV files",
    "eval_coco": "an engine or ONNX file and COCO annotations to mAP",
    "compare": "two forms of a model to a report of what differs",
    "tune_precision": "the convolutions that INT8 must leave out",
    "deploy": "an engine to Triton, DeepStream or trtexec",
    "image_batcher": "what the network sees of an image",
    "visualize": "pictures of existing TSV files",
}


def parser() -> argparse.ArgumentParser:
    stages = "\n".join(f"  {name:<16}{text}" for name, text in STAGES.items())
    made = argparse.ArgumentParser(
        prog="trtdet",
        description=f"{__doc__}\nstages:\n{stages}\n\ntrtdet STAGE --help shows the options of a stage.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="trtdet [-h] [--version] STAGE ...",
        allow_abbrev=False,
    )
    made.add_argument("--version", action="version", version=f"trtdet {__version__}")
    made.add_argument("stage", choices=STAGES, metavar="STAGE", help=argparse.SUPPRESS)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    stage = parser().parse_args(words[:1]).stage
    sys.argv = [f"trtdet {stage}", *words[1:]]  # argparse takes the name for usage from here
    status: int = import_module(f"trtdet.commands.{stage}").main(words[1:])
    return status
