#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What INT8 costs at several shares of the multiply-accumulates, on images that chose nothing: the
table and the picture of docs/int8.md.

  int8_share.py --model d0.onnx --input person_val100 --annotations person_val100.json --work out

The images, in the order of their names, fall into an even and an odd half. Calibration and choice
see one half, without annotations; the other is judged in four views (as it is, mirrored, 3 %
darker, both), every pair computed as written. Then the other way round; all detections are pooled.
The intervals of 95 % are of a paired bootstrap over the images, all views of an image together.
What was measured is kept in --work: the same command goes on where it stopped.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trtdet.detections import to_coco_results
from trtdet.images.batcher import ImageBatcher
from trtdet.precision.emulation import emulate
from trtdet.precision.options import Int8Options
from trtdet.precision.prepare import load_model, prepare
from trtdet.results import coco
from trtdet.run.detect import detect
from trtdet.run.evaluate import annotated_images
from trtdet.run.tune import View, ViewingRuntime

SHARES = (1.0, 0.95, 0.9, 0.8, 0.7)
VIEWS = 4
METRICS = ("AP", "AP50", "AP75")
RECALLS = np.linspace(0, 1, 101)

Results = list[list[dict[str, Any]]]  # [view] -> COCO results


# ---- models and detections


def prepared(onnx_path: Path, photos: Path, cache: Path, share: float, rest: str) -> onnx.ModelProto:  # fmt: skip
    """The model as build_engine.py prepares it, FP16 rounded as a GPU does."""
    model, spec = load_model(onnx_path)
    options = Int8Options(images=photos, cache=cache, share=share)
    return emulate(prepare(model, spec, "int8", options, rest=rest).typed)  # type: ignore[arg-type]


def results_of(model: onnx.ModelProto, images: Mapping[Path, Any], work: Path) -> Results:
    """Of every view, COCO's results."""
    path = work / "model.onnx"
    onnx.save(model, path)
    found: Results = []
    with ViewingRuntime(path, provider="cpu", integer_kernels=False) as runtime:
        spec = runtime.spec
        for number in range(VIEWS):
            runtime.view = View.number(number)
            view: list[dict[str, Any]] = []
            with ImageBatcher(list(images), spec.preprocessing, 1) as batcher, closing(detect(runtime, batcher)) as results:  # fmt: skip
                for image in results:
                    view += to_coco_results(image.detections, images[image.path], spec.category_ids, inclusive_corners=spec.inclusive_corners)  # fmt: skip
            found.append(view)
    path.unlink()
    return found


# ---- AP of pooled views


@dataclass(frozen=True, eq=False)
class Matches:
    """Of one category: its detections, best first, and what they match.

    Attributes:
        image: (n,) index.
        hits, ignored: (thresholds, n).
        objects: [image] -> annotated objects, over all views.
    """

    image: NDArray[np.intp]
    hits: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    objects: NDArray[np.float64]


def match(annotations: Path, results: Results, image_ids: Sequence[int]) -> list[Matches]:
    """By COCO's own matching, the views of an image as images of their own."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rows: dict[int, list[Any]] = {}
    objects: dict[int, NDArray[np.float64]] = {}
    index = {image_id: i for i, image_id in enumerate(image_ids)}
    with redirect_stdout(StringIO()):
        truth = COCO(str(annotations))
        for view in results:
            evaluation = COCOeval(truth, truth.loadRes(view), "bbox")
            evaluation.params.imgIds = list(image_ids)
            evaluation.params.areaRng = evaluation.params.areaRng[:1]
            evaluation.params.areaRngLbl = ["all"]
            evaluation.evaluate()
            for found in filter(None, evaluation.evalImgs):
                category, image = found["category_id"], index[found["image_id"]]
                count = min(len(found["dtScores"]), 100)
                hits, ignored = found["dtMatches"][:, :count] > 0, found["dtIgnore"][:, :count] > 0
                rows.setdefault(category, []).append((found["dtScores"][:count], [image] * count, hits, ignored))  # fmt: skip
                total = objects.setdefault(category, np.zeros(len(image_ids)))
                total[image] += np.count_nonzero(np.logical_not(found["gtIgnore"]))
    matches = []
    for category, parts in rows.items():
        scores, images = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        hits, ignored = (np.concatenate([part[i] for part in parts], axis=1) for i in (2, 3))
        order = np.argsort(-scores, kind="stable")
        matches.append(Matches(images[order].astype(np.intp), hits[:, order], ignored[:, order], objects[category]))  # fmt: skip
    return matches


def average_precision(matches: Sequence[Matches], weights: NDArray[np.float64]) -> NDArray[Any]:
    """AP, AP50, AP75; `weights` says how often each image counts."""
    categories = []
    for found in matches:
        objects = float((found.objects * weights).sum())
        if not objects:
            continue
        row = []
        for hits, ignored in zip(found.hits, found.ignored, strict=True):
            weight = weights[found.image] * ~ignored
            counted = weight > 0
            true, seen = np.cumsum((weight * hits)[counted]), np.cumsum(weight[counted])
            precision = np.maximum.accumulate((true / seen)[::-1])[::-1]
            places = np.searchsorted(true / objects, RECALLS - 1e-12)
            row.append(np.append(precision, 0.0)[np.minimum(places, len(precision))].mean())
        categories.append(row)
    by_threshold = np.mean(categories, axis=0)
    return np.array([by_threshold.mean(), by_threshold[0], by_threshold[5]])


def interval(reference: Sequence[Matches], other: Sequence[Matches], images: int, rounds: int) -> NDArray[Any]:  # fmt: skip
    """(3, 3): the difference of AP, AP50 and AP75 to a reference, and the ends of its interval
    of 95 %.
    """
    rng = np.random.default_rng(0)
    once = np.ones(images)
    difference = average_precision(other, once) - average_precision(reference, once)
    drawn = []
    for _ in range(rounds):
        weights = np.bincount(rng.integers(0, images, images), minlength=images).astype(float)
        drawn.append(average_precision(other, weights) - average_precision(reference, weights))
    return np.stack([difference, *np.percentile(drawn, [2.5, 97.5], axis=0)])


# ---- the curve


def plot(path: Path, shares: Sequence[float], curve: NDArray[Any]) -> None:
    """`curve`: (shares, 3 of `interval`, metrics)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(METRICS):
        middle, low, high = (100 * curve[:, k, i] for k in range(3))
        places = 100 * np.array(shares) + (i - 1) * 0.5
        axes.errorbar(places, middle, [middle - low, high - middle], fmt="o-", capsize=3, label=name)  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="share of the multiply-accumulates in INT8, %", ylabel="difference to float32, points")  # fmt: skip
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    # fmt: off
    parser.add_argument("--model", required=True, type=Path, help="the float32 ONNX file of create_onnx.py")
    parser.add_argument("--input", required=True, type=Path, help="annotated images")
    parser.add_argument("--annotations", required=True, type=Path)
    parser.add_argument("--work", required=True, type=Path, help="folder for caches and detections")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--rest_precision", choices=("fp16", "fp32"), default="fp16")
    parser.add_argument("--rounds", type=int, default=1000, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="draw the curve to this picture file; needs matplotlib")
    # fmt: on
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    annotations = coco.read_annotations(args.annotations)
    images = annotated_images(args.input, annotations, recursive=False)
    halves = {}
    for start, name in enumerate(("even", "odd")):
        halves[name] = dict(list(images.items())[start::2])
        folder = args.work / name
        folder.mkdir(parents=True, exist_ok=True)
        for path in halves[name]:
            if not (folder / path.name).exists():
                (folder / path.name).symlink_to(path.resolve())

    def pooled(share: float | None) -> list[Matches]:
        views: Results = [[] for _ in range(VIEWS)]
        for seen, judged in (("even", "odd"), ("odd", "even")):
            name = "fp32" if share is None else f"{args.rest_precision}_{share:g}"
            path = args.work / f"{name}_{judged}.json"
            if not path.exists():
                model = (
                    load_model(args.model)[0]
                    if share is None
                    else prepared(args.model, args.work / seen, args.work / f"{seen}.cache", share, args.rest_precision)
                )  # fmt: skip
                path.write_text(json.dumps(results_of(model, halves[judged], args.work)))
            for view, found in zip(views, json.loads(path.read_text()), strict=True):
                view += found
        return match(args.annotations, views, list(images.values()))

    reference = pooled(None)
    once = np.ones(len(images))
    print("float32", *(f"{name} {value:.4f}" for name, value in zip(METRICS, average_precision(reference, once), strict=True)))  # fmt: skip
    curve = []
    for share in args.shares:
        found = interval(reference, pooled(share), len(images), args.rounds)
        curve.append(found)
        print(f"{share:.0%}", *(f"{name} {m:+.4f} [{lo:+.4f}, {hi:+.4f}]" for name, m, lo, hi in zip(METRICS, *found, strict=True)), flush=True)  # fmt: skip
    if args.plot:
        plot(args.plot, args.shares, np.stack(curve))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
