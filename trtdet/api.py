# SPDX-License-Identifier: Apache-2.0
"""The Python API: `trtdet.load`, `trtdet.convert`, `trtdet.build`.

The command lines stand on the same code.

import trtdet

with trtdet.load("d0.onnx") as model:
    detections = model("photo.jpg")
    print(detections.labels, detections.scores)
    picture = detections.draw("photo.jpg")
"""

import dataclasses
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from trtdet import detections as results
from trtdet.closing import Closing
from trtdet.conversion.options import Options
from trtdet.conversion.stage import Conversion, convert_file
from trtdet.engine.options import BuildOptions
from trtdet.engine.stage import EngineBuild, build_file
from trtdet.families.base import Hints
from trtdet.images.batcher import Allocate
from trtdet.images.files import ImageArray, image_size, load_image
from trtdet.labels import label_of
from trtdet.machine import available_cores
from trtdet.precision.options import Int8Options
from trtdet.results.draw import draw
from trtdet.run.detect import (
    check_score_threshold,
    decodes_on_gpu,
    detect,
    open_batcher,
    open_model,
    pick_labels,
)
from trtdet.run.options import RunOptions
from trtdet.runtimes.options import is_url, parse_url
from trtdet.sources.saved_model_folder import GRAPH_FILE
from trtdet.spec import ModelSpec

if TYPE_CHECKING:
    import supervision

#: A file, or an array (h, w, 3) uint8 RGB.
Image: TypeAlias = str | Path | ImageArray


@dataclass(frozen=True)
class Detections(results.Detections):
    """What was found in one image, best first.

    Attributes:
        boxes_xyxy: (n, 4) float32, corners, pixels of the source image.
        scores: (n,) float32, 0 to 1.
        class_ids: (n,) int32, 0-based index into the model's classes.
        angles: (n,) float32, radians, positive clockwise on the screen, where boxes are rotated;
            else None.
        spec: of the model.
        class_names: [class_id] -> name.
    """

    spec: ModelSpec | None = None
    class_names: tuple[str, ...] = ()

    @property
    def labels(self) -> list[str]:
        """The name of each detection's class; "class 7" where the model has none."""
        return [label_of(self.class_names, int(class_id)) for class_id in self.class_ids]

    def above(self, score_threshold: float) -> "Detections":
        """Those with a score of at least `score_threshold`."""
        kept = super().above(score_threshold)
        return _with_model(kept, self.spec, self.class_names)

    def draw(self, image: Image, *, score_threshold: float = 0.0) -> ImageArray:
        """A copy of `image`, (h, w, 3) uint8 RGB, with boxes and names drawn in."""
        pixels = image if isinstance(image, np.ndarray) else load_image(Path(image))
        return draw(pixels, self, self.class_names, score_threshold=score_threshold)

    def to_tsv(self, *, header: bool = False) -> str:
        """The text of infer.py's TSV file: xmin ymin xmax ymax score class, and the angle of
        rotated boxes.

        Args:
            header: begin with the column names, and add a column of labels where the model has
                names.
        """
        return results.tsv_text(self, labels=self.class_names if header else (), header=header)

    def to_coco(self, image_id: int | str) -> list[dict[str, Any]]:
        """COCO's results format, one dict per detection: bbox is x, y, width, height in source
        pixels.

        Raises:
            ValueError: detections that no model made, whose category ids are not known.
        """
        if self.spec is None:
            raise ValueError("to_coco: expected detections of a model, these have no spec; take them from trtdet.load(...)(image)")  # fmt: skip
        return results.to_coco_results(
            self,
            image_id,
            self.spec.category_ids,
            inclusive_corners=self.spec.inclusive_corners,
        )

    def to_supervision(self) -> "supervision.Detections":
        """The same for the supervision library, which draws, tracks and counts: names are in
        `data["class_name"]`.

        Rotated boxes have their corners in `data["xyxyxyxy"]`, where supervision looks for them,
        and `xyxy` is the box around these.

        Raises:
            ImportError: supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError("to_supervision needs supervision: pip install supervision") from error  # fmt: skip
        data: dict[str, Any] = {"class_name": np.array(self.labels, dtype=str)}
        xyxy = self.boxes_xyxy
        if self.angles is not None:
            data["xyxyxyxy"] = self.corners
            low, high = self.corners.min(axis=1), self.corners.max(axis=1)
            xyxy = np.concatenate([low, high], axis=1).reshape(-1, 4)
        return supervision.Detections(
            xyxy=xyxy.astype(np.float32),
            confidence=self.scores,
            class_id=self.class_ids.astype(int),
            data=data,
        )


def _with_model(
    found: results.Detections, spec: ModelSpec | None, class_names: tuple[str, ...]
) -> Detections:
    return Detections(
        found.boxes_xyxy, found.scores, found.class_ids, found.angles, spec, class_names
    )


class _Buffers:
    """Memory for batches that is kept from one call to the next: the runtime's, which may be
    pinned, or shared with a server.
    """

    def __init__(self, allocate: Allocate) -> None:
        self._allocate = allocate
        self._free: dict[tuple[tuple[int, ...], str], list[NDArray[Any]]] = {}
        self._taken: list[tuple[tuple[tuple[int, ...], str], NDArray[Any]]] = []

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        key = (shape, np.dtype(dtype).str)
        free = self._free.get(key)
        buffer = free.pop() if free else self._allocate(shape, dtype)
        self._taken.append((key, buffer))
        return buffer

    def give_back(self) -> None:
        """All that was taken: nothing reads it any more."""
        while self._taken:
            key, buffer = self._taken.pop()
            self._free.setdefault(key, []).append(buffer)


class Model(Closing):
    """A detector that is loaded and ready. Made by `load`; use it in a `with` block, or close it.

    Several threads may call it; their calls run one after the other. For several GPUs load it with
    `devices`.

    Attributes:
        spec: what the model is: input, classes, NMS.
        class_names: [class_id] -> name; empty where the model has none.
    """

    def __init__(self, source: str | Path, options: RunOptions, labels: str | None = None) -> None:
        """Open a model; see `load`."""
        model = parse_url(str(source)) if is_url(source) else Path(source)
        self._options = options
        self._runtime = open_model(model, options)
        self._lock = threading.Lock()
        self._buffers = _Buffers(self._runtime.allocate)
        self.spec = self._runtime.spec
        try:
            self.class_names = tuple(pick_labels(labels, self.spec))
            self._threshold = check_score_threshold(options.score_threshold, self.spec)
        except BaseException:
            self.close()
            raise

    @property
    def description(self) -> str:
        """What runs it: backend, version, device."""
        return self._runtime.description

    @overload  # a str is an iterable of str, but as one image it comes first
    def __call__(  # type: ignore[overload-overlap]
        self, images: Image, *, score_threshold: float | None = None
    ) -> Detections: ...

    @overload
    def __call__(
        self, images: Iterable[Image], *, score_threshold: float | None = None
    ) -> list[Detections]: ...

    def __call__(
        self, images: Image | Iterable[Image], *, score_threshold: float | None = None
    ) -> Detections | list[Detections]:
        """Find objects in one image, or in each of several, which are decoded, resized and run in
        batches.

        Args:
            images: a file, an array (h, w, 3) uint8 RGB, or a sequence of these. An array (n, h, w,
                3) is n images.
            score_threshold: leave out detections below; None: that of `load`, else the model's own.

        Raises:
            ValueError: an image that cannot be decoded, or is no image; names it. Nothing is
                returned then.
            EngineError: the model failed.
        """
        one = isinstance(images, (str, Path)) or (isinstance(images, np.ndarray) and images.ndim == 3)  # fmt: skip
        listed: list[Any] = [images] if one else list(images)  # type: ignore[arg-type]
        sources = dict(_named(index, image) for index, image in enumerate(listed))
        threshold = self._threshold if score_threshold is None else score_threshold
        with self._lock:
            found = self._detect(sources, threshold)
        return found[0] if one else found

    def _detect(self, sources: Mapping[Path, Image], threshold: float) -> list[Detections]:
        def load(name: Path) -> ImageArray:
            source = sources[name]
            return load_image(Path(source)) if isinstance(source, (str, Path)) else source

        def size(name: Path) -> tuple[int, int] | None:
            source = sources[name]
            if isinstance(source, (str, Path)):
                return image_size(Path(source))
            return source.shape[0], source.shape[1]

        if not sources:
            return []
        workers = min(self._options.workers or available_cores(), len(sources))
        options = dataclasses.replace(self._options, workers=workers)
        paths = list(sources)
        how: dict[str, Any] = {"allocate": self._buffers.take, "load": load, "size": size}
        if not any(isinstance(source, np.ndarray) for source in sources.values()):
            files = [Path(str(source)) for source in sources.values()]
            if decodes_on_gpu(self._runtime, files, options.decode):
                paths, how = files, {}
                options = dataclasses.replace(self._options, decode="gpu")
        try:
            with (
                open_batcher(self._runtime, paths, options, **how) as batcher,
                closing(detect(self._runtime, batcher, score_threshold=threshold)) as images,
            ):
                found = [_with_model(i.detections, self.spec, self.class_names) for i in images]
        finally:
            self._buffers.give_back()
        if batcher.failures:
            raise ValueError(batcher.failures[0][1])
        return found

    def close(self) -> None:
        """Free memory and GPU, once calls of other threads are done; a second call does no harm."""
        with self._lock:
            self._runtime.__exit__(None, None, None)


def _named(index: int, image: Any) -> tuple[Path, Image]:
    """A name for messages, different for each, and the image.

    Raises:
        ValueError: it is none.
    """
    if isinstance(image, (str, Path)):
        return Path(f"image {index}: {image}"), image
    array: NDArray[Any] = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError(f"image {index}: expected a file, or an array (h, w, 3) uint8 RGB, got {array.shape} {array.dtype}")  # fmt: skip
    return Path(f"image {index}"), array


def load(
    model: str | Path,
    *,
    score_threshold: float | None = None,
    labels: str | Path | None = None,
    **options: Any,
) -> Model:
    """Open a model to run.

    Args:
        model: an engine with its .json, an ONNX file of create_onnx.py, or a model on a Triton
            server, grpc://HOST:8001/NAME.
        score_threshold: leave out detections below.
        labels: a file of class names, one a line, or "coco"; None: those in the model.
        options: of `trtdet.run.options.RunOptions`: batch_size, size, resize, resample, decode,
            workers, provider, threads, devices, ...

    Raises:
        FileNotFoundError, GraphError, EngineError: the file is not what it should be; the message
            names the next step.
        TypeError: no such option.
    """
    _refuse(options, ("recursive", "num_images"), "load takes no images: name them in the call")
    chosen = RunOptions(score_threshold=score_threshold, **options)
    return Model(model, chosen, None if labels is None else str(labels))


def convert(source: str | Path, output: str | Path, **options: Any) -> Conversion:
    """Make an ONNX file that ends in NMS of a trained model, and compare it with the source before
    it is written, as create_onnx.py does.

    Args:
        source: a SavedModel folder or an ONNX file.
        output: the ONNX file to write.
        options: of `trtdet.conversion.options.Options`, and of `trtdet.families.base.Hints` for
            what a file cannot say.

    Raises:
        GraphError: the source is not what a family expects, or the result differs from it.
        TypeError: no such option.
    """
    source = Path(source)
    _refuse(options, ("hints", "given"), "its fields are options themselves")
    names = {field.name for field in dataclasses.fields(Hints)}
    hints = Hints(**{name: value for name, value in options.items() if name in names})
    known = {field.name for field in dataclasses.fields(Options)}
    own = {name: value for name, value in options.items() if name in known or name not in names}
    given = frozenset("resize_mode" if name == "resize" else name for name in options)
    chosen = Options(hints=hints, given=given, **own)
    return convert_file(
        source, Path(output), chosen, is_onnx=not source.is_dir() and source.name != GRAPH_FILE
    )


def _refuse(options: Mapping[str, Any], names: Sequence[str], reason: str) -> None:
    """Options that would have no effect are errors.

    Raises:
        TypeError: names the first.
    """
    for name in names:
        if name in options:
            raise TypeError(f"unexpected option '{name}': {reason}")


def build(
    onnx: str | Path,
    engine: str | Path,
    *,
    calibration: Int8Options = Int8Options(),
    flavor: str | None = None,
    **options: Any,
) -> EngineBuild:
    """Build a TensorRT engine of an ONNX file of create_onnx.py, as build_engine.py does.

    Args:
        engine: the engine to write; ENGINE.json beside it says what it is.
        calibration: for precision="int8" and "fp8": images, cache and what stays out.
        flavor: "tensorrt" or "tensorrt_rtx"; None: the first that is installed.
        options: of `trtdet.engine.options.BuildOptions`: precision, batch, size,
            compute_capabilities, ...

    Raises:
        GraphError, EngineError, ValueError, OSError: the message names the next step.
        TypeError: no such option.
    """
    return build_file(
        Path(onnx), Path(engine), BuildOptions(**options), calibration, flavor_name=flavor
    )
