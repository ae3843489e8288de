# SPDX-License-Identifier: Apache-2.0
"""Search for the fewest convolutions that must stay in FP16 for an AP."""

import logging
import math
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from trtdet import about, files, sessions
from trtdet.detections import to_coco_results
from trtdet.images.batcher import ImageBatcher
from trtdet.images.files import load_image
from trtdet.images.preprocess import preprocess
from trtdet.onnx_files import feed_of
from trtdet.precision import calibration, calibration_cache, sensitivity
from trtdet.precision.choice import choose
from trtdet.precision.choice import rank as rank_layers
from trtdet.precision.costs import Judge, measure_costs
from trtdet.precision.file import PrecisionFile
from trtdet.precision.objective import Damage
from trtdet.precision.quantization import QuantizationPlan
from trtdet.precision.sensitivity import Journal, LayerNoise
from trtdet.results import coco
from trtdet.run.detect import detect
from trtdet.run.options import FEW_IMAGES, METRICS, VIEWS_OF_FEW, TuneOptions
from trtdet.runtimes.base import Images, Outputs, as_array, default_batch_size
from trtdet.runtimes.ort import OnnxRuntime
from trtdet.spec import ModelSpec, Preprocessing
from trtdet.terminal import no_bar

logger = logging.getLogger(__name__)

#: What a line of the journal has of one convolution.
DAMAGE = tuple(field.name for field in fields(Damage))


@dataclass(frozen=True)
class View:
    """One of several ways to show the network the same image.

    On few images AP is a poor judge of INT8: rounding moves every box a little, which carries some
    over an IoU threshold and others back. On 50 photographs D0's AP differs by up to 0.010 between
    two orders of the same arithmetic. Each view draws from that lottery anew, for float32 and INT8
    alike, and the mean of the differences scatters less.
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

    def undo(
        self, boxes: NDArray[np.float32], spec: ModelSpec, width: int | None = None
    ) -> NDArray[np.float32]:
        """Boxes found in this view, in the image as it is.

        Args:
            boxes: (..., 4), or (..., 5) with the angle last.
            width: of the network input, pixels; None: that of the spec.
        """
        if not self.mirrored:
            return boxes
        is_rotated = boxes.shape[-1] > 4
        if width is None:
            width = spec.preprocessing.size_hw[1]
        # ODTK's rotated boxes end at their last pixel, so the first one's mirror image is the
        # last; all others end where it does.
        last = width - (is_rotated and spec.inclusive_corners)
        edge = last / width if spec.boxes_normalized else last
        left, right = (1, 3) if spec.box_order == "yxyx" else (0, 2)
        found = boxes.copy()
        found[..., left], found[..., right] = edge - boxes[..., right], edge - boxes[..., left]
        if is_rotated:  # clockwise becomes counterclockwise
            found[..., 4] = -boxes[..., 4]
        return found


class ViewingRuntime(OnnxRuntime):
    """ONNX Runtime behind a `View`."""

    view = View()

    def _infer(self, images: Images, session: sessions.Session) -> Outputs:
        preprocessing = self.spec.preprocessing
        shown = self.view.show(as_array(images), preprocessing)
        found = super()._infer(shown, session)
        width = preprocessing.size_of(shown.shape[1:])[1]
        boxes = self.view.undo(found["detection_boxes"], self.spec, width)
        return {**found, "detection_boxes": boxes}


def context_of(
    plan: QuantizationPlan,
    annotations: Path,
    images: Sequence[Path],
) -> dict[str, Any]:
    """Everything that a measurement depends on: what the journal's lines are valid for."""
    return {
        "model": plan.body.sha256,
        "spec": plan.body.spec.to_dict(),
        "cache": sensitivity.cache_fingerprint(plan.cache),
        "annotations": files.sha256(annotations),
        "images": calibration_cache.image_hash(images),
        "versions": [about.__version__, sessions.version(), onnx.__version__],
    }


class Tuner:
    """One search: measures, each configuration once, and decides."""

    def __init__(
        self,
        plan: QuantizationPlan,
        annotations: coco.Annotations,
        category_ids: Sequence[int],
        images: Mapping[Path, int],
        journal: Journal,
        options: TuneOptions,
    ) -> None:
        """
        Args:
            category_ids: [class_id] -> the annotation file's, as `match_categories` gives them.
        """
        self.plan, self.body, self.spec, self.layers = plan, plan.body, plan.body.spec, plan.layers
        self.annotations, self.images = annotations, images
        self.category_ids = category_ids
        self.journal, self.options = journal, options
        self.views = options.views or (VIEWS_OF_FEW if len(images) < FEW_IMAGES else 1)
        self.seconds = 0.0  # of the latest evaluation

    def tune(self, *, rank: bool) -> tuple[list[str] | None, list[LayerNoise]]:
        """The convolutions to leave in FP16, None where no set is good enough; and the noise of
        each, if that was asked for or needed.
        """
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
        costs = {entry.layer.name: entry.damage for entry in found}
        start = self._start(costs)
        taken = set(start)
        by_name = {layer.name: layer for layer in self.layers}
        others = [layer for layer in rank_layers(self.layers, costs) if layer.name not in taken]
        ranked = [*(by_name[name] for name in start), *others]
        if self.seconds:
            most = 2 * math.ceil(math.log2(len(ranked) + 1))
            logger.info("search: up to %d evaluations of %.0f s, and two for each convolution that may go back", most, self.seconds)  # fmt: skip
        return sensitivity.smallest_set(ranked, self.fits, first=len(start)), found

    def fits(self, kept: Collection[str]) -> bool:
        """Whether the metric is within the limit with these convolutions left out of INT8."""
        drop, error = self.drop(kept)
        fits = drop <= self.options.max_drop + 1e-9
        logger.info(
            "%s: %s %+.4f%s against float32, %s the limit",
            f"{len(kept)} in FP16" if kept else "all in INT8",
            self.options.metric,
            -drop,
            f" (+- {error:.4f})" if self.views > 1 else "",
            "within" if fits else "beyond",
        )
        return fits

    def drop(self, kept: Collection[str]) -> tuple[float, float]:
        """How far the metric falls below float32's, the mean over the views, and its standard
        error (nan for one view).
        """
        drops = self.metric(None) - self.metric(kept)
        error = float(drops.std(ddof=1)) / math.sqrt(self.views) if self.views > 1 else math.nan
        return float(drops.mean()), error

    def mean(self, kept: Collection[str] | None, metric: str | None = None) -> float:
        return float(self.metric(kept, metric).mean())

    def metric(self, kept: Collection[str] | None, metric: str | None = None) -> NDArray[Any]:
        """One of COCO's metrics in each view, with these convolutions left out of INT8; None: in
        float32.
        """
        kind = f"{'float32' if kept is None else 'int8'}, {self.views} views"
        names = [f"{name}/{view}" for name in METRICS for view in range(self.views)]
        values = self.journal.measure(kind, kept or (), names, lambda: self._evaluate(kept))
        metric = metric or self.options.metric
        return np.array([values[f"{metric}/{view}"] for view in range(self.views)])

    def _evaluate(self, kept: Collection[str] | None) -> dict[str, float]:
        """Metric/view -> value."""
        start = time.monotonic()
        model = self.body.model
        if kept is not None:
            model = self.plan.quantize(kept)
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
            tqdm(total=len(self.images), desc=title, leave=False, unit="image", disable=no_bar()) as bar,
        ):  # fmt: skip
            for image in found:
                results += to_coco_results(
                    image.detections,
                    self.images[image.path],
                    self.category_ids,
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
        kind = f"alone on {calibration_cache.image_hash(paths)}"
        known = {}
        for layer in self.layers:
            values = self.journal.known(kind, [layer.name], DAMAGE)
            if values is not None:
                known[layer.name] = Damage(**values)

        def keep(costs: Mapping[str, Damage]) -> None:
            for name, damage in costs.items():
                self.journal.measure(kind, [name], DAMAGE, partial(asdict, damage))

        if len(known) < len(self.layers):
            feeds = [self._feed(path) for path in paths]
            judge = Judge(self.body, feeds, threads=self.options.threads)
            known = measure_costs(self.plan, judge, known=known, keep=keep)
        return sensitivity.layer_noises(self.layers, known)

    def _start(self, costs: Mapping[str, Damage]) -> tuple[str, ...]:
        """What build_engine.py leaves out by itself: the search begins with it."""
        plan, share = self.plan, self.options.share
        macs = {"total_macs": plan.total_macs, "kept_macs": plan.kept_macs}
        return choose(self.layers, costs, share, **macs).kept

    def _feed(self, path: Path) -> dict[str, NDArray[Any]]:
        image, _ = preprocess(load_image(path), self.spec.preprocessing)
        return feed_of(self.body.model, image)

    def precision(self, kept: Sequence[str]) -> PrecisionFile:
        """What build_engine.py reads."""
        chosen = set(kept)
        order = [layer.name for layer in self.layers if layer.name in chosen]
        return PrecisionFile(
            self.body.sha256,
            "int8",
            dict.fromkeys(sensitivity.patterns(order), "fp16"),
            f"trtdet {about.__version__}, tune_precision.py: {self.loss(kept)}, calibration by {self.method}",
        )

    @property
    def method(self) -> str:
        origin = self.plan.cache.origin
        return origin.method if origin else "another program"

    def loss(self, kept: Sequence[str]) -> str:
        """What INT8 costs, in words."""
        drop, error = self.drop(kept)
        margin = f" (+- {error:.4f})" if self.views > 1 else ""
        share = self.plan.report(kept).mac_share
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
        lines += [f"FP16: {layer.name}" for layer in self.layers if layer.name in kept]
        return "\n".join([*lines, self.loss(kept)])
