#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Find the convolutions that INT8 hurts: the fewest that, left in FP16, keep AP within a limit of float32's.

  tune_precision.py --onnx d0.onnx --calib_input photos --calib_cache d0.cache \\
      --input val --annotations val.json --max_drop 0.005 --output precision.json

writes precision.json for build_engine.py --precision_json, and prints what it costs. It runs on the CPU, in ONNX Runtime, without TensorRT.
Everything in INT8 is tried first: where that is good enough, nothing is left out. Else each convolution is quantized
alone and the noise on the heads is measured on a few images, the noisiest are left out until AP is within the limit, and what is not
needed goes back. --table and --plot write the noise of every convolution.

Every result goes to <output>.journal at once: the same command after an interruption goes on where it stopped.

The set is chosen by its AP on these images; measure it on others (build_engine.py --save_onnx, eval_coco.py) before you trust the last
digit. Exit status: 0 written; 1 an error, or no such set: nothing is written then; 2 wrong usage.
"""

import argparse
import logging
import math
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import trtdet
from build_engine import (
    Int8Options,
    add_calibration_options,
    calibration_from,
    check_calibration_usage,
    load_model,
    scales_of,
)
from eval_coco import annotated_images, check_categories
from image_batcher import ImageBatcher, load_image, preprocess
from infer import detect
from trtdet import calibration, cli, coco, files, sensitivity
from trtdet.body import ConvLayer
from trtdet.calibration import CalibrationCache
from trtdet.detections import to_coco_results
from trtdet.precision_file import PrecisionFile
from trtdet.runtimes import Outputs, default_batch_size
from trtdet.runtimes.ort import OnnxRuntime
from trtdet.sensitivity import Journal, LayerNoise, NoiseMeter
from trtdet.spec import ModelSpec, Preprocessing

logger = logging.getLogger("tune_precision")

METRICS = ("AP", "AP50", "AP75")
#: Images on which noise is measured: its ranking hardly changes with more.
NOISE_IMAGES = 8


#: Views of each image (`View`), where the images are few.
FEW_IMAGES, VIEWS_OF_FEW = 500, 4


@dataclass(frozen=True)
class TuneOptions:
    """What is asked for.

    Attributes:
        max_drop: of `metric`, below float32's.
        views: of each image; None: `VIEWS_OF_FEW`, 1 for `FEW_IMAGES` and more.
        noise_images: images on which each convolution is measured alone.
        threads: of ONNX Runtime; None: one per core.
    """

    max_drop: float = 0.005
    metric: str = "AP"
    views: int | None = None
    noise_images: int = NOISE_IMAGES
    threads: int | None = None


@dataclass(frozen=True)
class View:
    """One of several ways to show the network the same image.

    On few images AP is a poor judge of INT8: rounding moves every box a little, which carries some over an IoU threshold and others
    back. On 50 photographs D0's AP differs by up to 0.010 between two orders of the same arithmetic. Each view
    draws from that lottery anew, for float32 and INT8 alike, and the mean of the differences scatters less.
    """

    mirrored: bool = False
    gain: float = 1.0

    @classmethod
    def number(cls, index: int) -> "View":
        """0 is the image as it is; every other one is mirrored; every two are a little darker."""
        return cls(mirrored=index % 2 == 1, gain=1 - 0.03 * (index // 2))

    def show(self, images: NDArray[Any], preprocessing: Preprocessing) -> NDArray[Any]:
        """The batch as the network is to see it."""
        if self.mirrored:
            images = np.flip(images, 2 if preprocessing.layout == "NHWC" else 3)
        if self.gain != 1:
            images = (images * np.float32(self.gain)).astype(images.dtype)
        return np.ascontiguousarray(images)

    def undo(self, boxes: NDArray[np.float32], spec: ModelSpec) -> NDArray[np.float32]:
        """Boxes found in this view, in the image as it is."""
        if not self.mirrored:
            return boxes
        width = 1 if spec.boxes_normalized else spec.preprocessing.size_hw[1]
        left, right = (1, 3) if spec.box_order == "yxyx" else (0, 2)
        found = boxes.copy()
        found[..., left], found[..., right] = width - boxes[..., right], width - boxes[..., left]
        return found


class ViewingRuntime(OnnxRuntime):
    """ONNX Runtime behind a `View`."""

    view = View()

    def infer(self, images: NDArray[Any]) -> Outputs:
        found = super().infer(self.view.show(images, self.spec.preprocessing))
        boxes = self.view.undo(found["detection_boxes"], self.spec)
        return {**found, "detection_boxes": boxes}


def run(
    onnx_path: Path,
    int8: Int8Options,
    annotations_path: Path,
    source: Path,
    output: Path,
    options: TuneOptions = TuneOptions(),
    *,
    table: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Tune; see the module's docstring.

    Raises:
        OSError, GraphError: the ONNX file is missing, or not what stage 1 writes.
        ValueError: a cache, images or annotations that do not fit; or no set of convolutions is good enough.
    """
    journal_path = output.with_name(output.name + ".journal")
    files.check_outputs([output, journal_path, table, plot], [onnx_path, annotations_path, int8.cache])  # fmt: skip
    model, spec = load_model(onnx_path)
    annotations = coco.read_annotations(annotations_path)
    check_categories(spec, annotations)
    images = annotated_images(source, annotations, recursive=False)
    coco.check_objects(annotations, images.values())
    output.parent.mkdir(parents=True, exist_ok=True)  # for the journal
    cache = scales_of(model, spec, int8, None)
    layers = sensitivity.candidates(model, cache)
    context = context_of(model, spec, cache, annotations_path, list(images))
    journal = Journal(journal_path, context)
    if len(journal):
        logger.info("%s: %d measurements to go on from", journal_path, len(journal))

    tuner = Tuner(model, spec, cache, layers, annotations, images, journal, options)
    kept, found = tuner.tune(rank=bool(table or plot))
    if kept is None:
        raise ValueError(
            f"--max_drop {options.max_drop:g}: {options.metric} falls further below float32's {tuner.mean(None):.4f} even with all but the least "
            f"noisy of {len(layers)} convolutions in FP16; allow more, give more --input images, or build with build_engine.py --precision fp16"
        )
    tuner.precision(kept).write(output)
    if table:
        files.write_text(table, sensitivity.table(found, kept))
    if plot:
        title = f"{onnx_path.name}: each convolution alone in INT8"
        sensitivity.plot(plot, found, kept, title=title)
    print(tuner.summary(kept))
    print(output)


def context_of(
    model: onnx.ModelProto,
    spec: ModelSpec,
    cache: CalibrationCache,
    annotations: Path,
    images: Sequence[Path],
) -> dict[str, Any]:
    """Everything that a measurement depends on: what the journal's lines are valid for."""
    return {
        "model": calibration.model_hash(model),
        "spec": spec.to_dict(),
        "cache": sensitivity.cache_fingerprint(cache),
        "annotations": files.sha256(annotations),
        "images": calibration.image_hash(images),
        "versions": [trtdet.__version__, onnxruntime.__version__, onnx.__version__],
    }


class Tuner:
    """One search: measures, each configuration once, and decides."""

    def __init__(
        self,
        model: onnx.ModelProto,
        spec: ModelSpec,
        cache: CalibrationCache,
        layers: Sequence[ConvLayer],
        annotations: coco.Annotations,
        images: Mapping[Path, int],
        journal: Journal,
        options: TuneOptions,
    ) -> None:
        self.model, self.spec, self.cache, self.layers = model, spec, cache, layers
        self.annotations, self.images = annotations, images
        self.journal, self.options = journal, options
        self.views = options.views or (VIEWS_OF_FEW if len(images) < FEW_IMAGES else 1)
        self.seconds = 0.0  # of the latest evaluation

    def tune(self, *, rank: bool) -> tuple[list[str] | None, list[LayerNoise]]:
        """The convolutions to leave in FP16, None where no set is good enough; and the noise of each, if that was asked for or needed."""
        views = f", {self.views} views of each" if self.views > 1 else ""
        logger.info("float32: %s %.4f on %d images%s", self.options.metric, self.mean(None), len(self.images), views)  # fmt: skip
        good = self.fits(())
        error = self.drop(())[1]
        if error > self.options.max_drop / 2:
            logger.warning(
                "the drop is known to +- %.4f only, the limit is %g: what is found may not hold on other images; give more of them, or more --views",
                error,
                self.options.max_drop,
            )
        if good:
            return [], self.noises() if rank else []
        found = self.noises()
        ranked = [entry.layer for entry in sorted(found, key=lambda entry: -entry.total)]
        if self.seconds:
            most = 2 * math.ceil(math.log2(len(ranked) + 1))
            logger.info("search: up to %d evaluations of %.0f s, and two for each convolution that may go back", most, self.seconds)  # fmt: skip
        return sensitivity.smallest_set(ranked, self.fits), found

    def fits(self, kept: Collection[str]) -> bool:
        """Whether the metric is within the limit with these convolutions left out of INT8."""
        drop, error = self.drop(kept)
        fits = drop <= self.options.max_drop + 1e-9
        logger.info(
            "%s: %.4f (+- %.4f) below float32, %s",
            f"{len(kept)} in FP16" if kept else "all in INT8",
            drop,
            error,
            "good" if fits else "not enough",
        )
        return fits

    def drop(self, kept: Collection[str]) -> tuple[float, float]:
        """How far the metric falls below float32's, the mean over the views, and its standard error (nan for one view)."""
        drops = self.metric(None) - self.metric(kept)
        error = float(drops.std(ddof=1)) / math.sqrt(self.views) if self.views > 1 else math.nan
        return float(drops.mean()), error

    def mean(self, kept: Collection[str] | None, metric: str | None = None) -> float:
        return float(self.metric(kept, metric).mean())

    def metric(self, kept: Collection[str] | None, metric: str | None = None) -> NDArray[Any]:
        """One of COCO's metrics in each view, with these convolutions left out of INT8; None: in float32."""
        kind = f"{'float32' if kept is None else 'int8'}, {self.views} views"
        values = self.journal.measure(kind, kept or (), lambda: self._evaluate(kept))
        metric = metric or self.options.metric
        return np.array([values[f"{metric}/{view}"] for view in range(self.views)])

    def _evaluate(self, kept: Collection[str] | None) -> dict[str, float]:
        """Metric/view -> value."""
        start = time.monotonic()
        model = self.model
        if kept is not None:
            model, _ = sensitivity.quantize_but(model, self.cache, kept)
        values: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            onnx.save(model, path)
            with ViewingRuntime(
                path, provider="cpu", threads=self.options.threads, integer_kernels=False
            ) as runtime:
                for number in range(self.views):
                    runtime.view = View.number(number)
                    results = self._detect(runtime, f"view {number + 1} of {self.views}")
                    metrics = coco.evaluate(self.annotations, results, self.images.values()).metrics  # fmt: skip
                    values |= {f"{name}/{number}": metrics[name] for name in METRICS}
        self.seconds = time.monotonic() - start
        return values

    def _detect(self, runtime: ViewingRuntime, title: str) -> list[coco.Result]:
        results: list[coco.Result] = []
        with (
            logging_redirect_tqdm(),
            ImageBatcher(
                list(self.images),
                self.spec.preprocessing,
                default_batch_size(runtime),
                pad_to_batch=runtime.batch_range[0] > 1,
            ) as batcher,
            closing(detect(runtime, batcher)) as found,
            tqdm(total=len(self.images), desc=title, leave=False, unit="image", disable=None) as bar,
        ):  # fmt: skip
            for image in found:
                results += to_coco_results(
                    image.detections,
                    self.images[image.path],
                    self.spec.category_ids,
                    inclusive_corners=self.spec.inclusive_corners,
                )
                bar.update()
        if batcher.failures:
            path, message = batcher.failures[0]
            raise ValueError(f"--input: expected images that can be read, found {path}: {message}; take it out")  # fmt: skip
        return results

    def noises(self) -> list[LayerNoise]:
        """Every convolution alone in INT8."""
        paths = calibration.choose_images(list(self.images), self.options.noise_images)
        kind = f"noise on {calibration.image_hash(paths)}"
        names = {layer.name for layer in self.layers}
        meter: NoiseMeter | None = None
        found = []

        def measure(name: str) -> dict[str, float]:
            nonlocal meter
            if meter is None:
                feeds = [self._feed(path) for path in paths]
                meter = NoiseMeter(self.model, feeds, threads=self.options.threads)
            return meter.noise(sensitivity.quantize_but(self.model, self.cache, names - {name})[0])

        with logging_redirect_tqdm():
            for layer in tqdm(self.layers, "sensitivity", unit="layer", disable=None):
                noise = self.journal.measure(kind, [layer.name], partial(measure, layer.name))
                found.append(LayerNoise(layer, noise))
        return found

    def _feed(self, path: Path) -> dict[str, NDArray[Any]]:
        network_input = self.model.graph.input[0]
        batch = network_input.type.tensor_type.shape.dim[0].dim_value or 1
        image, _ = preprocess(load_image(path), self.spec.preprocessing)
        return {network_input.name: np.repeat(image[None], batch, axis=0)}

    def precision(self, kept: Sequence[str]) -> PrecisionFile:
        """What build_engine.py reads."""
        chosen = set(kept)
        order = [layer.name for layer in self.layers if layer.name in chosen]
        return PrecisionFile(
            calibration.model_hash(self.model),
            "int8",
            dict.fromkeys(sensitivity.patterns(order), "fp16"),
            f"trtdet {trtdet.__version__}, tune_precision.py: {self.loss(kept)}, calibration by {self.method}",
        )

    @property
    def method(self) -> str:
        return self.cache.origin.method if self.cache.origin else "another program"

    def loss(self, kept: Sequence[str]) -> str:
        """What INT8 costs, in words."""
        drop, error = self.drop(kept)
        margin = f" (+- {error:.4f})" if self.views > 1 else ""
        share = sensitivity.quantize_but(self.model, self.cache, kept)[1].mac_share
        return (
            f"{self.options.metric} {abs(drop):.4f}{margin} {'below' if drop >= 0 else 'above'} float32's {self.mean(None):.4f} "
            f"on {len(self.images)} images, {share:.1%} of the multiply-accumulates in INT8"
        )

    def summary(self, kept: Sequence[str]) -> str:
        """For the reader: the metrics, what is left out, what it costs."""
        rows: list[tuple[str, Sequence[str] | None]] = [("float32", None), ("all in INT8", ())]
        if kept:
            rows.append((f"{len(kept)} in FP16", kept))
        lines = ["".join([" " * 14, *(f"{name:>8}" for name in METRICS)])]
        for name, configuration in rows:
            values = (f"{self.mean(configuration, metric):>8.4f}" for metric in METRICS)
            lines.append("".join([f"{name:<14}", *values]))
        lines += [f"FP16: {layer.name}" for layer in self.layers if layer.name in set(kept)]
        return "\n".join([*lines, self.loss(kept)])


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("-o", "--onnx", required=True, type=Path, metavar="FILE", help="the ONNX file of create_onnx.py")
    parser.add_argument("-i", "--input", required=True, type=Path, metavar="DIR", help="annotated images, other than those of the calibration")
    parser.add_argument("-a", "--annotations", required=True, type=Path, metavar="FILE", help="their COCO annotations")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="write precision.json here, and FILE.journal beside it")
    parser.add_argument("--max_drop", type=cli.unit_interval, default=TuneOptions.max_drop, metavar="DROP", help="how far the metric may fall below float32's (default: %(default)s)")
    parser.add_argument("--metric", choices=METRICS, default="AP", help="AP75 where boxes have to be tight (default: %(default)s)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the noise of every convolution to this file, tab separated")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it to this picture file (.png, .svg, .pdf)")
    parser.add_argument("--views", type=cli.positive_int, metavar="N", help=f"show each image N times, as it is, mirrored, and a little darker: AP on few images scatters (default: {VIEWS_OF_FEW} for less than {FEW_IMAGES} images, else 1)")
    parser.add_argument("--noise_images", type=cli.positive_int, default=NOISE_IMAGES, metavar="N", help="annotated images on which the noise is measured (default: %(default)s)")
    parser.add_argument("--threads", type=cli.positive_int, metavar="N", help="CPU threads of ONNX Runtime (default: one per core)")
    parser.add_argument("-v", "--verbose", action="store_true", help="log details")
    # fmt: on
    add_calibration_options(parser.add_argument_group("calibration, as in build_engine.py"))
    args = parser.parse_args(argv)
    check_calibration_usage(parser, args)
    if not args.calib_input and not (args.calib_cache and args.calib_cache.is_file()):
        parser.error("give images to calibrate on, --calib_input DIR, or an existing --calib_cache FILE")  # fmt: skip
    if args.plot and args.plot.suffix.lower() not in sensitivity.PLOT_SUFFIXES:
        parser.error(f"--plot: expected a name that ends in {', '.join(sensitivity.PLOT_SUFFIXES)}, got {args.plot}")  # fmt: skip
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    cli.setup_logging(args.verbose)
    options = TuneOptions(args.max_drop, args.metric, args.views, args.noise_images, args.threads)
    return cli.run_main(
        lambda: run(
            args.onnx,
            calibration_from(args),
            args.annotations,
            args.input,
            args.output,
            options,
            table=args.table,
            plot=args.plot,
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
