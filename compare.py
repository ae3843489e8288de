#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compare two forms of a detector: what is right, and what was made of it. Anyone can check a conversion or a precision with it.

  compare.py --reference efficientdet-d0 --candidate d0.onnx --input photos --report report.html
  compare.py --reference d0.onnx --candidate d0_int8.onnx --input val2017 --annotations instances_val2017.json
  compare.py --reference d0.onnx --candidate d0.engine --input photos --output summary.json

Each is a SavedModel, an ONNX file as it was trained, an ONNX file of create_onnx.py or `build_engine.py --save_onnx`, or an engine.

  tensors     of the same name, where both are graphs: largest and mean difference, cosine, SQNR; on a CPU FP16 and BF16
              files are computed as a GPU does, every result rounded
  detections  paired by overlap and category: missing, extra, other class, differences of score and box
  AP          of both, with --annotations

A model as it was trained does its own preprocessing here. Its boxes go through the hard NMS that create_onnx.py reads from it, so that
soft NMS, which TensorRT lacks, is no difference; with --own_nms they are what the model itself puts out. What its file cannot say is taken
from the other model: --resize_mode, --rotated_nms, --input_size and --preprocessor of create_onnx.py.

Exit status: 0 within all limits; 1 a limit is broken (one line each on stderr), or an error; 2 wrong usage; 3 within the limits, but
some images could not be read.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import create_onnx
import trtdet
from eval_coco import check_categories
from image_batcher import ImageArray, find_images, load_image, preprocess
from infer import ENGINE_OPTIONS, ONNX_OPTIONS, RunOptions, open_batcher, open_model, pick_labels
from trtdet import cli, coco, files, nms, parity, report
from trtdet.closing import Closing
from trtdet.detections import Detections, decode, to_coco_results
from trtdet.emulation import emulate
from trtdet.errors import EngineError, GraphError
from trtdet.families.detr import BOXES
from trtdet.family import CLASS_LOGITS, RAW_BOXES, Hints, Reading
from trtdet.geometry import ResizeTransform, in_layout, yxyx_to_xyxy
from trtdet.parity import Comparison, ImageComparison, Limits, SideInfo, TensorStatistics
from trtdet.runtimes import Runtime, open_runtime, run_batches
from trtdet.sidecar import sidecar_path
from trtdet.source import Source, cut_onnx, load_onnx
from trtdet.spec import OUTPUT_NAMES, ModelSpec, Preprocessing

logger = logging.getLogger("compare")

#: Tensors that are held at a time: of a D0 some 50 MB, of a D7 some GB.
TENSORS_AT_ONCE = 32
#: Protobuf ends at 2 GiB; beyond this, weights go into a file beside the model.
EXTERNAL_DATA_BYTES = 1 << 30
#: Images that tensors are compared on: all inner tensors of both models, unoptimised.
TENSOR_IMAGES = 2
WORST_IMAGES = 8

#: First bytes of files that are mistaken for models.
OTHER_FILES = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"PK\x03\x04": "a ZIP archive, as PyTorch's .pt and Keras' .keras are",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive",
}
#: What text consists of: printable ASCII, tabs and ends of lines.
TEXT_BYTES = frozenset((*range(0x20, 0x7F), *b"\t\n\r"))

#: One image's detections (class_ids are category ids), and the way from its pixels to the network's.
Found = tuple[Detections, ResizeTransform]
#: Names of tensors, an image -> their values, without the batch dimension.
TensorReader = Callable[[Sequence[str], ImageArray], list[NDArray[Any]]]


class Side(Protocol):
    """One of the two models. Use as a context manager.

    Attributes:
        tensors: that can be read, in the order of the graph; none where it is an engine.
        heads: those of them that the network ends in.
    """

    info: SideInfo
    tensors: tuple[str, ...]
    heads: frozenset[str]

    def detect(self, paths: Sequence[Path]) -> Iterator[tuple[Path, Found]]:
        """What is found in each image; images that cannot be read are logged and left out."""
        ...

    def tensor_reader(self, names: Sequence[str]) -> TensorReader:
        """What reads some of `tensors`, or a part of them at a time."""
        ...

    def __enter__(self) -> "Side": ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class GraphPart:
    """The part of an ONNX model between two sets of tensors, in ONNX Runtime on the CPU, every operator computed as it is written."""

    def __init__(
        self, model: onnx.ModelProto, inputs: Mapping[str, int], outputs: Sequence[str]
    ) -> None:
        """
        Args:
            inputs: tensor -> its ONNX element type.

        Raises:
            EngineError: ONNX Runtime is not installed, or cannot load it.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise EngineError("comparing tensors takes ONNX Runtime: pip install onnxruntime") from error  # fmt: skip
        part = cut_onnx(model, list(inputs), outputs)
        part.ir_version = min(part.ir_version, 10)  # the newest that ONNX Runtime 1.22 reads
        for info in part.graph.input:
            known = info.type.tensor_type.HasField("shape")
            if not known:  # an inner tensor
                info.CopyFrom(
                    onnx.helper.make_tensor_value_info(info.name, inputs[info.name], None)
                )
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4  # what it has to say is in the exception
        try:
            self._session = onnxruntime.InferenceSession(
                part.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base
            raise EngineError(f"ONNX Runtime cannot load the graph up to {list(outputs)[:3]}: {error}") from error  # fmt: skip

    def run(self, names: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        try:
            values: list[NDArray[Any]] = self._session.run(list(names), dict(feeds))
        except Exception as error:  # as above
            raise EngineError(f"ONNX Runtime failed on the graph up to {list(names)[:3]}: {error}") from error  # fmt: skip
        return values


class ConvertedSide(Closing):
    """An ONNX file of stage 1 or 2, or an engine: preprocessing and NMS are this project's."""

    def __init__(self, path: Path, options: RunOptions) -> None:
        self._options = options
        model = load_onnx(path) if path.suffix.lower() == ".onnx" else None
        self._model = emulate(model) if model and on_cpu(options) else model
        if self._model is None or self._model is model:
            self._runtime = open_model(path, options)
            kind = self._runtime.description
        else:
            self._runtime = open_in_memory(self._model, path.name, options)
            kind = f"{self._runtime.description}, rounding as a GPU does"
        self.info = SideInfo(path.name, kind, self._runtime.spec)
        self.heads = frozenset((RAW_BOXES, CLASS_LOGITS))
        self.tensors = tensors_before(self._model, self.heads) if self._model else ()

    def detect(self, paths: Sequence[Path]) -> Iterator[tuple[Path, Found]]:
        spec = self.info.spec
        with open_batcher(self._runtime, paths, self._options) as batcher:
            for batch, outputs in run_batches(self._runtime, batcher):
                found = decode(outputs, spec, batch.transforms)
                for path, one, transform in zip(batch.paths, found, batch.transforms, strict=True):
                    yield path, (by_category(one, spec), transform)
                batch.release()

    def tensor_reader(self, names: Sequence[str]) -> TensorReader:
        if self._model is None:
            raise ValueError(f"{self.info.name}: is an engine, whose tensors cannot be read")
        network_input = self._model.graph.input[0]
        tensor_type = network_input.type.tensor_type
        part = GraphPart(self._model, {network_input.name: tensor_type.elem_type}, names)
        batch = tensor_type.shape.dim[0].dim_value or 1

        def read(some: Sequence[str], image: ImageArray) -> list[NDArray[Any]]:
            pixels, _ = preprocess(image, self.info.spec.preprocessing)
            values = part.run(some, {network_input.name: np.repeat(pixels[None], batch, axis=0)})
            return [_first(value, batch) for value in values]

        return read

    def close(self) -> None:
        self._runtime.__exit__(None, None, None)


class TrainedSide(Closing):
    """A model as it was trained, a SavedModel or an ONNX file: it resizes and normalises by itself, where it has that.

    Args:
        own_nms: take its own detections, the last of its outputs; else the hard NMS that stage 1 reads from it.
        like: the converted model beside it, for what was chosen when it was converted.
    """

    def __init__(self, path: Path, *, own_nms: bool = False, like: ModelSpec | None = None) -> None:
        self._source = create_onnx.open_source(path, is_onnx=path.is_file())
        model, self._reading = create_onnx.convert(self._source, conversion_options(like))
        spec = with_normalisation(ModelSpec.from_onnx(model), self._reading, like)
        package = "onnxruntime" if path.is_file() else "tensorflow"
        kind = "ONNX as trained, ONNX Runtime" if path.is_file() else "SavedModel, TensorFlow"
        kind += f" {importlib.metadata.version(package)}, its own preprocessing"
        self.info = SideInfo(path.name, kind, spec)
        self.tensors = tuple(self._reading.heads)
        self.heads = frozenset(self.tensors)
        heads = {name: onnx.TensorProto.FLOAT for name in self.tensors}
        self._nms = GraphPart(nms.lower(model, form="onnx"), heads, OUTPUT_NAMES)
        self._own = ""
        if own_nms:
            feeds, _ = self._feed(load_image(trtdet.PHOTOGRAPH))
            self._own = find_detections(self._source, feeds)

    def detect(self, paths: Sequence[Path]) -> Iterator[tuple[Path, Found]]:
        for path in paths:
            try:
                image = load_image(path)
            except (OSError, ValueError) as error:
                logger.warning("skipped: %s", error)
                continue
            yield path, self._own_detections(image) if self._own else self._detections(image)

    def _detections(self, image: ImageArray) -> Found:
        """Its heads, decoded and suppressed as in the converted file."""
        values, transform = self._run_heads(self.tensors, image)
        first = {name: v[:1] for name, v in zip(self.tensors, values, strict=True)}
        outputs = dict(zip(OUTPUT_NAMES, self._nms.run(OUTPUT_NAMES, first), strict=True))
        (found,) = decode(outputs, self.info.spec, [transform])
        return by_category(found, self.info.spec), transform

    def _own_detections(self, image: ImageArray) -> Found:
        """AutoML's output [n, k, 7]: image, ymin, xmin, ymax, xmax, score, category; pixels of what it was fed."""
        feeds, transform = self._feed(image)
        (rows,) = self._source.run([self._own], feeds)
        rows = rows[0][rows[0][:, 5] > 0]
        boxes = yxyx_to_xyxy(rows[:, 1:5].astype(np.float32))
        limit = np.array([*transform.source_wh] * 2, np.float32)
        boxes = transform.to_source(boxes) if self._fixed_size else np.clip(boxes, 0, limit)
        return Detections(boxes, rows[:, 5].astype(np.float32), rows[:, 6].astype(np.int32)), transform  # fmt: skip

    def tensor_reader(self, names: Sequence[str]) -> TensorReader:
        def read(some: Sequence[str], image: ImageArray) -> list[NDArray[Any]]:
            return [value[0] for value in self._run_heads(some, image)[0]]

        return read

    def _run_heads(
        self, names: Sequence[str], image: ImageArray
    ) -> tuple[list[NDArray[Any]], ResizeTransform]:
        """Values of heads as the converted file has them: boxes of a model with a mask relative to the network input."""
        feeds, transform = self._feed(image)
        tensors = [self._reading.heads[name] for name in names]
        values = self._source.run(tensors, feeds)
        if self._reading.feeds:
            share = picture_share(transform, self.info.spec.preprocessing)
            values = [v * share if t == BOXES else v for t, v in zip(tensors, values, strict=True)]
        return values, transform

    @property
    def _fixed_size(self) -> bool:
        """Whether the model takes images of one size, so that it does no resizing of its own."""
        shape = self._source.graph.image_shape
        sizes = shape[1:3] if self._reading.image_layout == "NHWC" else shape[2:4]
        return bool(sizes) and None not in sizes

    def _feed(self, image: ImageArray) -> tuple[dict[str, NDArray[Any]], ResizeTransform]:
        """What the model is fed for an image, and how the image lies in its network input."""
        reading, preprocessing = self._reading, self.info.spec.preprocessing
        placed, transform = preprocess(image, dataclasses.replace(preprocessing, layout="NHWC"))
        fed: NDArray[Any]
        if reading.image_input == reading.network_input:  # an export without preprocessing
            mean, std = (np.array(x, np.float32) for x in (preprocessing.mean, preprocessing.std))
            fed = (placed - mean) / std
            fed = fed[..., ::-1] if preprocessing.bgr else fed
        else:
            fed = np.rint(placed).astype(np.uint8) if self._fixed_size else image
        batch = in_layout(np.repeat(fed[None], reading.batch or 1, axis=0), reading.image_layout)
        share = picture_share(transform, preprocessing)
        masks = {name: cut_mask(ones, share) for name, ones in reading.feeds.items()}
        others = {k: np.repeat(v, len(batch), axis=0) for k, v in masks.items()}
        return {reading.image_input: batch, **others}, transform

    def close(self) -> None:
        self._source.__exit__(None, None, None)


def conversion_options(like: ModelSpec | None) -> create_onnx.Options:
    """With what the user of create_onnx.py chose for `like`; what the file says itself comes first."""
    if like is None:
        return create_onnx.Options()
    hints = Hints(
        size_hw=like.preprocessing.size_hw,
        resize=like.preprocessing.resize,
        rotated_nms=like.rotated_mode if like.selection == "rotated_nms" else None,
    )
    settled = frozenset(("resize_mode", "preprocessor"))
    return create_onnx.Options(hints=hints, settled=settled)


def with_normalisation(spec: ModelSpec, reading: Reading, like: ModelSpec | None) -> ModelSpec:
    """The spec of a model as it was trained; where its file does not say how it normalises, as `like` does."""
    unknown = any(note.option == "preprocessor" for note in reading.notes)
    if like is None or not unknown or reading.image_input != reading.network_input:
        return spec
    chosen = {name: getattr(like.preprocessing, name) for name in ("mean", "std", "pad_rgb")}
    return spec.replace(preprocessing=dataclasses.replace(spec.preprocessing, **chosen))


def picture_share(transform: ResizeTransform, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """x, y, x, y: the part of the network input, from its top left corner, that the picture takes."""
    placed = np.rint(np.multiply(transform.source_wh, transform.scale_xy))
    share = placed / np.array(preprocessing.size_hw[::-1])
    return np.array([*share, *share], np.float32)


def cut_mask(ones: NDArray[Any], share: NDArray[np.float32]) -> NDArray[Any]:
    """A mask [1, h, w] of ones, 0 beside the picture. A smaller mask has the nearest of the picture's rows, as the network takes them.

    Raises:
        GraphError: it is no mask.
    """
    if ones.ndim != 3:
        raise GraphError(f"expected a mask [N, height, width] beside the image, found an input of shape {list(ones.shape)}; compare converted files")  # fmt: skip
    mask = ones.copy()
    height, width = (int(np.ceil(s * n - 1e-3)) for s, n in zip(share[1::-1], ones.shape[1:], strict=True))  # fmt: skip
    mask[:, height:] = 0
    mask[:, :, width:] = 0
    return mask


def on_cpu(options: RunOptions) -> bool:
    """Whether ONNX Runtime is left to run on a CPU: only there are narrow types emulated."""
    return options.provider in (None, "auto", "cpu")


def open_in_memory(model: onnx.ModelProto, name: str, options: RunOptions) -> Runtime:
    """ONNX Runtime on the CPU with a model that is in no file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        onnx.save(model, path, save_as_external_data=model.ByteSize() > EXTERNAL_DATA_BYTES)
        chosen = dataclasses.replace(options, provider="cpu").for_runtime(path)
        return open_runtime(path, **chosen)


def open_sides(
    paths: tuple[Path, Path], options: RunOptions, stack: ExitStack, *, own_nms: bool = False
) -> tuple[Side, Side]:
    """Reference and candidate, entered into `stack`. One that was converted is opened first: the other follows its choices.

    Raises:
        FileNotFoundError, GraphError, EngineError: one is no model, or cannot be run here.
    """
    sides: dict[int, Side] = {}
    like = None
    for as_trained, i in sorted((is_as_trained(path), i) for i, path in enumerate(paths)):
        if as_trained:
            sides[i] = TrainedSide(paths[i], own_nms=own_nms, like=like)
        else:
            sides[i] = open_converted(paths[i], options)
            like = sides[i].info.spec
        stack.enter_context(sides[i])
    return sides[0], sides[1]


def is_as_trained(path: Path) -> bool:
    """Whether this is a SavedModel or an ONNX file that create_onnx.py has not made.

    Raises:
        FileNotFoundError, GraphError: it is none of these, and no engine.
    """
    if not path.exists():
        raise FileNotFoundError(f"expected a SavedModel, an ONNX file or an engine, found nothing at {path}")  # fmt: skip
    as_trained = path.is_dir()
    if path.suffix.lower() == ".onnx" and not as_trained:
        as_trained = ModelSpec.maybe_from_onnx(load_onnx(path)) is None
    elif path.is_file():
        check_engine(path)
    return as_trained


def open_converted(path: Path, options: RunOptions) -> Side:
    """An ONNX file of create_onnx.py or an engine, with those of the options that it takes."""
    other = ENGINE_OPTIONS if path.suffix.lower() == ".onnx" else ONNX_OPTIONS
    unset: dict[str, Any] = dict.fromkeys(other)
    return ConvertedSide(path, dataclasses.replace(options, **unset))


def check_engine(path: Path) -> None:
    """Tell an engine from other files by how they begin, before a GPU is looked for; one with its .json is taken for what that says.

    Raises:
        GraphError: it is a picture, text, an archive, or empty.
    """
    if sidecar_path(path).is_file():
        return
    with open(path, "rb") as file:
        start = file.read(512)
    what = "an empty file" if not start else ""
    for magic, kind in OTHER_FILES.items():
        if start.startswith(magic):
            what = kind
    if start and not what and all(byte in TEXT_BYTES for byte in start):
        what = "a text file"
    if what:
        raise GraphError(
            f"{path}: expected a SavedModel (a directory), an ONNX file (.onnx) or an engine of build_engine.py, found {what}"
        )


def find_detections(source: Source, feeds: Mapping[str, NDArray[Any]]) -> str:
    """The tensor [n, k, 7] that an AutoML model ends in.

    Args:
        feeds: what the model is fed for some image.

    Raises:
        GraphError: nothing of this form at the end of the graph.
    """
    nodes = source.graph.nodes.values()
    read = {tensor.split(":")[0] for node in nodes for tensor in node.inputs}
    ends = {t for node in nodes for t in node.outputs if t.split(":")[0] not in read}
    for tensor in sorted(ends):
        (value,) = source.run([tensor], feeds)
        if value.ndim == 3 and value.shape[-1] == 7:
            return tensor
    raise GraphError(
        f"--own_nms: expected a model that ends in detections [n, k, 7], as AutoML exports it, {source.path} ends in "
        f"{sorted(ends)[:4]}; leave the option out"
    )


def tensors_before(model: onnx.ModelProto, heads: frozenset[str]) -> tuple[str, ...]:
    """The tensors that the network computes on its way to `heads`, these included, in its order."""
    needed = set(heads)
    names: list[str] = []
    for node in reversed(model.graph.node):  # sorted, as ONNX demands
        if needed.isdisjoint(node.output):
            continue
        needed.update(node.input)
        if node.op_type != "Constant":
            names += [name for name in node.output if name in needed]
    return tuple(reversed(names))


def by_category(detections: Detections, spec: ModelSpec) -> Detections:
    """The same with category ids for class ids; -1 for a class that the model should not have."""
    ids = np.array([*spec.category_ids, -1], np.int32)
    known = (detections.class_ids >= 0) & (detections.class_ids < spec.num_classes)
    classes = np.where(known, detections.class_ids, spec.num_classes)
    return dataclasses.replace(detections, class_ids=ids[classes])


def _first(value: NDArray[Any], batch: int) -> NDArray[Any]:
    """The first image's part of a tensor; a tensor without a batch dimension as it is."""
    return value[0] if value.ndim and len(value) == batch else value


# ---- the comparison


@dataclass(frozen=True)
class CompareOptions:
    """What the command line asks for."""

    limits: Limits = field(default_factory=Limits)
    score_threshold: float = 0.1
    iou: float = 0.5
    num_images: int | None = None
    tensor_images: int = TENSOR_IMAGES
    recursive: bool = False
    own_nms: bool = False
    run: RunOptions = field(default_factory=RunOptions)


def compare(
    reference: Side,
    candidate: Side,
    source: Path,
    options: CompareOptions,
    annotations: coco.Annotations | None = None,
) -> Comparison:
    """Run both models over the images of `source`.

    Raises:
        ValueError: no image could be read, nothing was found in any, or annotations that do not fit: there is nothing to compare.
    """
    paths = spread(find_images(source, recursive=options.recursive), options.num_images)
    ids = annotated_ids(paths, source, annotations, reference, candidate) if annotations else {}
    threshold = score_threshold(options.score_threshold, reference.info.spec, candidate.info.spec)
    found = [detect_all(side, paths) for side in (reference, candidate)]
    images = [
        compare_image(path, found[0][path], found[1][path], options.iou, threshold)
        for path in paths
        if path in found[0] and path in found[1]
    ]
    if not images:
        raise ValueError(f"--input: none of {len(paths)} images could be read")
    readable = [image.path for image in images]
    tensors = compare_tensors(reference, candidate, spread(readable, options.tensor_images))
    ids = {path: ids[path] for path in readable if path in ids}
    result = Comparison(
        reference.info,
        candidate.info,
        tuple(images),
        options.limits,
        threshold,
        options.iou,
        tensors=tuple(tensors),
        tensor_images=min(options.tensor_images, len(readable)) if tensors else 0,
        ap=average_precision(images, annotations, ids, (reference, candidate))
        if annotations
        else None,
        ap_images=len(ids),
        skipped=tuple(path.name for path in paths if path not in set(readable)),
    )
    if not result.detections.reference:
        raise ValueError(
            f"--score_threshold {threshold:g}: the reference finds nothing of this score in {len(images)} images, so nothing "
            "can be compared; give other images, or a lower threshold"
        )
    return result


def spread(paths: Sequence[Path], count: int | None) -> list[Path]:
    """At most `count` of the paths, evenly spread."""
    if count is None or len(paths) <= count:
        return list(paths)
    return [paths[i] for i in np.linspace(0, len(paths) - 1, count).astype(int)]


def score_threshold(wanted: float, *specs: ModelSpec) -> float:
    """From which score on detections are compared: no less than what both models keep."""
    kept = max(spec.nms.score_threshold for spec in specs)
    if kept > wanted:
        logger.warning(
            "--score_threshold %g: one of the models keeps nothing below %g, so that is compared",
            wanted,
            kept,
        )
    return max(wanted, kept)


def detect_all(side: Side, paths: Sequence[Path]) -> dict[Path, Found]:
    """Detections of every image that can be read."""
    found = {}
    with (
        logging_redirect_tqdm(),
        tqdm(total=len(paths), desc=side.info.name, unit="image", disable=None) as bar,
    ):
        for path, one in side.detect(paths):
            found[path] = one
            bar.update()
    return found


def compare_image(
    path: Path, reference: Found, candidate: Found, iou: float, threshold: float
) -> ImageComparison:
    (left, transform), (right, _) = reference, candidate
    matching = parity.match(left, right, min_iou=iou, score_threshold=threshold)
    return ImageComparison(path, left, right, matching, transform.scale_xy)


def compare_tensors(
    reference: Side, candidate: Side, paths: Sequence[Path]
) -> list[parity.TensorDifference]:
    """Every floating-point tensor that both have under the same name; of a model as it was trained that is the heads."""
    there = set(reference.tensors)
    names = [name for name in candidate.tensors if name in there]
    if not names or not paths:
        logger.info("no tensors to compare: one of the two is an engine, or they share no names")
        return []
    heads = reference.heads | candidate.heads
    statistics = {name: TensorStatistics(name, head=name in heads) for name in names}
    read = [side.tensor_reader(names) for side in (reference, candidate)]
    for path in paths:
        image = load_image(path)
        for start in range(0, len(names), TENSORS_AT_ONCE):
            some = names[start : start + TENSORS_AT_ONCE]
            for name, left, right in zip(some, *(r(some, image) for r in read), strict=True):
                if left.dtype.kind == right.dtype.kind == "f":
                    statistics[name].add(left, right)
                else:
                    statistics.pop(name, None)
    return [one.result() for one in statistics.values()]


def annotated_ids(
    paths: Sequence[Path],
    source: Path,
    annotations: coco.Annotations,
    reference: Side,
    candidate: Side,
) -> dict[Path, int]:
    """The ids of the images that are annotated; found before anything is run. Says loudly what the AP will leave out.

    Raises:
        ValueError: there is none, nothing is annotated in them, or the reference can find none of their categories.
    """
    ids = coco.match_images(annotations, paths, source)
    if not ids:
        raise ValueError(
            f"--annotations: {annotations.path} names none of the {len(paths)} images in {source}; give the images it was made for"
        )
    coco.check_objects(annotations, ids.values())
    check_categories(reference.info.spec, annotations)
    if set(candidate.info.spec.category_ids) != set(reference.info.spec.category_ids):
        try:
            check_categories(candidate.info.spec, annotations)
        except ValueError as error:  # a fault of the candidate's, which its AP is to show
            logger.warning("the candidate: %s", error)
    if len(ids) < len(paths):
        logger.warning("%d of %d images have no annotations: AP is of the other %d alone", len(paths) - len(ids), len(paths), len(ids))  # fmt: skip
    return ids


def average_precision(
    images: Sequence[ImageComparison],
    annotations: coco.Annotations,
    ids: Mapping[Path, int],
    sides: tuple[Side, Side],
) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """COCO's metrics of reference and candidate over the images in `ids`, all their detections counted.

    Raises:
        ValueError: nothing is annotated in them: those with objects could not be read.
    """
    coco.check_objects(annotations, ids.values())
    results: tuple[list[coco.Result], list[coco.Result]] = ([], [])
    for image in images:
        if image.path not in ids:
            continue
        for found, side, rows in zip(
            (image.reference, image.candidate), sides, results, strict=True
        ):
            same = [*range(int(found.class_ids.max(initial=0)) + 1), -1]  # [category id], -1 too
            corners = side.info.spec.inclusive_corners
            rows += to_coco_results(found, ids[image.path], same, inclusive_corners=corners)
    left, right = (coco.evaluate(annotations, rows, ids.values()).metrics for rows in results)
    return left, right


# ---- the command


def run(
    reference_path: Path,
    candidate_path: Path,
    source: Path,
    options: CompareOptions,
    *,
    annotations_path: Path | None = None,
    output: Path | None = None,
    report_path: Path | None = None,
    worst: int = WORST_IMAGES,
) -> int:
    """Compare, print, write; see the module's docstring. Returns the exit status."""
    inputs = [p for p in (reference_path, candidate_path, annotations_path) if p and p.is_file()]
    files.check_outputs([output, report_path], inputs)
    annotations = coco.read_annotations(annotations_path) if annotations_path else None
    with ExitStack() as stack:
        paths = (reference_path, candidate_path)
        reference, candidate = open_sides(paths, options.run, stack, own_nms=options.own_nms)
        comparison = compare(reference, candidate, source, options, annotations)
    print("\n".join(lines(comparison)))
    if output:
        files.write_text(output, json.dumps(comparison.to_dict(), indent=2) + "\n")
        print(output)
    if report_path:
        labels = category_labels(comparison, annotations)
        page = report.render(comparison, labels=labels, load=load_image, worst=worst)
        files.write_text(report_path, page)
        print(report_path)
    for check in comparison.broken:
        logger.error("%s", check.line())
    if comparison.broken:
        return 1
    return cli.SOME_SKIPPED if comparison.skipped else 0


def category_labels(
    comparison: Comparison, annotations: coco.Annotations | None
) -> Mapping[int, str]:
    """Category id -> name: of the annotations, else of a model that has names."""
    if annotations:
        return annotations.categories
    for side in (comparison.candidate, comparison.reference):
        if texts := pick_labels(None, side.spec):
            return dict(zip(side.spec.category_ids, texts, strict=True))
    return {}


def lines(comparison: Comparison) -> list[str]:
    """The result for the reader: what was compared, every limit, the worst tensors, the verdict."""
    d = comparison.detections
    text = [
        f"reference  {comparison.reference.name} ({comparison.reference.kind})",
        f"candidate  {comparison.candidate.name} ({comparison.candidate.kind})",
        f"{len(comparison.images)} images; from a score of {comparison.score_threshold:g} on {d.reference} and {d.candidate} detections, "
        f"{d.matched} matched, {d.missing} missing, {d.extra} extra, {d.class_flips} of another class",
    ]
    if comparison.ap:
        left, right = comparison.ap
        figures = "   ".join(f"{n} {left[n]:.4f} -> {right[n]:.4f}" for n in ("AP", "AP50", "AP75"))
        text.append(f"AP on {comparison.ap_images} of {len(comparison.images)} images: {figures}")
    text += [
        f"{name}: {left} in the reference, {right} in the candidate"
        for name, left, right in parity.spec_differences(
            comparison.reference.spec, comparison.candidate.spec
        )
    ]
    worst = [t for t in parity.worst_first(comparison.tensors) if not t.equal][:5]
    if comparison.tensors:
        text += ["", f"{'worst of ' + str(len(comparison.tensors)) + ' tensors':<48}{'max':>11}{'cosine':>11}{'SQNR':>9}"]  # fmt: skip
        text += ["all equal"] * (not worst)
        text += [f"{t.name[-47:]:<48}{t.maximum:>11.4g}{t.cosine:>11.6f}{t.sqnr_db:>9.1f}" for t in worst]  # fmt: skip
    text += ["", f"{'':<48}{'value':>11}{'limit':>11}"]
    for check in comparison.checks:
        mark = "" if check.passed else "  BROKEN"
        text.append(f"{check.name[:47]:<48}{check.text(check.value):>11}{check.text(check.limit):>11}{mark}")  # fmt: skip
    count = len(comparison.broken)
    verdict = f"{count} of {len(comparison.checks)} limits broken" if count else "within all limits"
    return [*text, "", verdict]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    limits = Limits()
    # fmt: off
    parser.add_argument("-r", "--reference", type=Path, required=True, metavar="MODEL", help="what is right: a SavedModel directory, an ONNX file or an engine")
    parser.add_argument("-c", "--candidate", type=Path, required=True, metavar="MODEL", help="what is compared with it, of the same kinds")
    parser.add_argument("-i", "--input", type=Path, required=True, metavar="PATH", help="a directory of images, or one image")
    parser.add_argument("-a", "--annotations", type=Path, metavar="FILE", help="COCO annotations of these images: compare the AP too")
    parser.add_argument("-o", "--output", "--json", type=Path, metavar="FILE", help="write everything that was measured to this file, as JSON")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a page to look at: one file, pictures included")
    what = parser.add_argument_group("what is compared")
    what.add_argument("-t", "--score_threshold", type=cli.unit_interval, default=0.1, metavar="SCORE", help="detections from this score on need a partner in the other model (default: %(default)s)")
    what.add_argument("--min_iou", type=cli.positive_unit_interval, default=0.5, metavar="IOU", help="overlap from which two boxes are the same object (default: %(default)s)")
    what.add_argument("-n", "--num_images", type=cli.positive_int, metavar="N", help="so many of the images, evenly spread (default: all)")
    what.add_argument("--tensor_images", type=non_negative_int, default=TENSOR_IMAGES, metavar="N", help="so many of them to compare tensors on (default: %(default)s; 0: none)")
    what.add_argument("--own_nms", action="store_true", help="of an AutoML model as it was trained: the detections it puts out itself, by its own, often soft, NMS")
    what.add_argument("--recursive", action="store_true", help="look into the folders below --input too")
    what.add_argument("--worst", type=cli.positive_int, default=WORST_IMAGES, metavar="N", help="images that the report shows, those that differ most (default: %(default)s)")
    limit = parser.add_argument_group("limits (exit status 1 beyond); shares are of the reference's detections, differences hold for 95 %% of the pairs")
    limit.add_argument("--max_missing", type=cli.unit_interval, default=limits.max_missing, metavar="SHARE", help="detections that the candidate does not have (default: %(default)s)")
    limit.add_argument("--max_extra", type=non_negative, default=limits.max_extra, metavar="SHARE", help="detections that only the candidate has (default: %(default)s)")
    limit.add_argument("--max_flips", type=cli.unit_interval, default=limits.max_flips, metavar="SHARE", help="detections of another class (default: %(default)s)")
    limit.add_argument("--max_score_diff", type=non_negative, default=limits.max_score_diff, metavar="X", help="difference of scores (default: %(default)s)")
    limit.add_argument("--max_box_diff", type=non_negative, default=limits.max_box_diff, metavar="PIXELS", help="difference of a coordinate, in pixels of the network input (default: %(default)s)")
    limit.add_argument("--max_angle_diff", type=non_negative, default=limits.max_angle_diff, metavar="RADIANS", help="difference of the angles of turned boxes (default: %(default)s)")
    limit.add_argument("--min_cosine", type=cli.unit_interval, default=limits.min_cosine, metavar="X", help="cosine of the head tensors (default: %(default)s)")
    limit.add_argument("--max_ap_drop", type=non_negative, default=limits.max_ap_drop, metavar="X", help="by which AP may fall, 0 to 1 (default: %(default)s)")
    how = parser.add_argument_group("how it is run")
    how.add_argument("--batch_size", type=cli.positive_int, metavar="N", help="images per batch; default: what suits the model and the device")
    how.add_argument("--plugins", type=Path, nargs="+", metavar="LIB.so", help="of an engine: libraries of plugins that it needs")
    how.add_argument("--allow_host_code", action="store_const", const=True, help="of an engine: let it run code of its own on the CPU; only for files you trust")
    how.add_argument("--provider", choices=("auto", "tensorrt", "cuda", "cpu"), help="of an ONNX file: what detections run on (default: auto; tensors always run on the CPU)")
    how.add_argument("--threads", type=cli.positive_int, metavar="N", help="of an ONNX file: CPU threads")
    how.add_argument("-v", "--verbose", action="store_true", help="log details")
    # fmt: on
    args = parser.parse_args(argv)
    if args.report and args.report.suffix.lower() not in (".html", ".htm"):
        parser.error(f"--report: expected a name that ends in .html, got {args.report}")
    return args


def non_negative(text: str) -> float:
    """argparse type: a number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def non_negative_int(text: str) -> int:
    """argparse type: a whole number of at least 0."""
    return 0 if text.strip() == "0" else cli.positive_int(text)


def options_from(args: argparse.Namespace) -> CompareOptions:
    """The options of a parsed command line."""
    return CompareOptions(
        limits=Limits(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Limits)}),
        score_threshold=args.score_threshold,
        iou=args.min_iou,
        num_images=args.num_images,
        tensor_images=args.tensor_images,
        recursive=args.recursive,
        own_nms=args.own_nms,
        run=RunOptions(
            batch_size=args.batch_size,
            plugins=args.plugins,
            allow_host_code=args.allow_host_code,
            provider=args.provider,
            threads=args.threads,
        ),
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    cli.setup_logging(args.verbose)
    return cli.run_main(
        lambda: run(
            args.reference,
            args.candidate,
            args.input,
            options_from(args),
            annotations_path=args.annotations,
            output=args.output,
            report_path=args.report,
            worst=args.worst,
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
