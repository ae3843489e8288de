# SPDX-License-Identifier: Apache-2.0
"""NMS of many classes by ordinary operators, on ONNX Runtime: the operator NonMaxSuppression
against rounds until nothing changes.

    python benchmarks/nms_time.py

Scores are made up: groups of ten anchors on each of 30 objects in an image, and noise. Input and
outputs stay on the device; times are medians of --rounds, in turn. --provider cpu tries the script
without a GPU.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from criteria import add_ending, run_benchmark
from graph_time import BATCHES, Timed

from trtdet.commands.values import positive_int
from trtdet.machine import describe_machine
from trtdet.nms import lowering
from trtdet.nms.plugin import insert_plugin
from trtdet.spec import Nms

FORMS: tuple[lowering.Form, ...] = ("onnx", "settled")
#: Of a model as it is exported, and as for mAP.
THRESHOLDS = (0.4, 0.001)


def made_up(batch: int, anchors: int, classes: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Boxes (batch, anchors, 4), corners 0 to 1, and logits (batch, anchors, classes)."""
    random = np.random.default_rng(0)
    low = random.uniform(0, 0.7, (batch, anchors, 2))
    boxes = np.concatenate([low, low + random.uniform(0.02, 0.3, low.shape)], axis=2)
    logits = random.normal(-9, 1, (batch, anchors, classes))
    for image in range(batch):
        for start in random.integers(0, anchors - 10, 30):
            group = slice(start, start + 10)
            boxes[image, group] = boxes[image, start]
            logits[image, group, random.integers(classes)] = random.uniform(-0.3, 3, 10)
    return boxes.astype(np.float32), logits.astype(np.float32)


def model_of(boxes: NDArray[Any], logits: NDArray[Any], threshold: float) -> onnx.ModelProto:
    """A model that has these boxes, takes the logits, of four dimensions as images have them, and
    ends in NMS.
    """
    nms = Nms(score_threshold=threshold, score_activation=True, box_coding=0)
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["input", "shape"], ["scores"])],
        "nms",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, (*logits.shape, 1))],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, logits.shape)],
        [
            onnx.numpy_helper.from_array(boxes, "boxes"),
            onnx.numpy_helper.from_array(np.array(logits.shape, np.int64), "shape"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    insert_plugin(model, boxes="boxes", scores="scores", anchors=None, nms=nms, batch=len(boxes))
    return model


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds by threshold, batch and form."""
    report: dict[str, Any] = {"machine": describe_machine(), "times": {}}
    for threshold in THRESHOLDS:
        for batch in BATCHES:
            boxes, logits = made_up(batch, args.anchors, args.classes)
            model = model_of(boxes, logits, threshold)
            timed = {form: Timed(lowering.lower(model, form), form, args.provider, batch, logits[..., None]) for form in FORMS}  # fmt: skip
            turns = [{form: one.run(args.runs) for form, one in timed.items()} for _ in range(args.rounds)]  # fmt: skip
            found = {form: median(turn[form] for turn in turns) for form in FORMS}
            report["times"][f"threshold {threshold}, batch {batch}"] = found
    return report


def show(report: dict[str, Any]) -> None:
    print(f"{'':<28}{'NonMaxSuppression, ms':>24}{'rounds, ms':>14}{'ratio':>8}")
    for name, found in report["times"].items():
        operator, rounds = (found[form] for form in FORMS)
        print(f"{name:<28}{operator:>24.3f}{rounds:>14.3f}{operator / rounds:>8.1f}")


def criteria(report: dict[str, Any]) -> dict[str, bool]:
    """What is taken on CUDA should be the faster one."""
    return {f"{name}: rounds are faster": found["settled"] < found["onnx"] for name, found in report["times"].items()}  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--classes", type=positive_int, default=90, help="(default: %(default)s)")
    parser.add_argument("--anchors", type=positive_int, default=49104, help="(default: %(default)s, as D0 has)")
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=5, help="(default: %(default)s)")
    parser.add_argument("--runs", type=positive_int, default=5, help="runs of a turn (default: %(default)s)")
    # fmt: on
    add_ending(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return run_benchmark(args, lambda: measure(args), show, criteria)


if __name__ == "__main__":
    raise SystemExit(main())
