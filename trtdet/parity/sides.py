# SPDX-License-Identifier: Apache-2.0
"""The two models of a comparison, each behind one interface: `Side`."""

import dataclasses
import importlib.metadata
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from trtdet import about, files
from trtdet.closing import Closing
from trtdet.conversion.convert import convert, open_source
from trtdet.conversion.options import Options
from trtdet.conversion.specify import as_chosen
from trtdet.detections import Detections, decode
from trtdet.engine.sidecar import read_sidecar
from trtdet.errors import EngineError, GraphError
from trtdet.families.base import CLASS_LOGITS, RAW_BOXES, Reading
from trtdet.families.evidence import MEASURED, NORMALISATION, READ
from trtdet.files import message_of
from trtdet.geometry import ResizeTransform, in_layout, yxyx_to_xyxy
from trtdet.graph import deformable_attention
from trtdet.images.files import ImageArray, load_image
from trtdet.images.preprocess import preprocess
from trtdet.nms import lowering
from trtdet.onnx_files import (
    EXPORT_AGAIN,
    feed_of,
    fixed_batch,
    naming,
    read_onnx,
    with_weights,
)
from trtdet.parity.numbers import SideInfo
from trtdet.parity.rows import are_sorted_inside
from trtdet.precision import quantization
from trtdet.precision.emulation import emulate
from trtdet.precision.equalization import read_rescaled
from trtdet.run.detect import open_batcher, open_model, run_batches
from trtdet.run.options import ENGINE_OPTIONS, ONNX_OPTIONS, RunOptions
from trtdet.runtimes.base import Runtime
from trtdet.runtimes.kinds import check_engine
from trtdet.runtimes.open import open_runtime
from trtdet.sessions import FATAL_ERRORS, open_session
from trtdet.sources.base import Source, cut_onnx
from trtdet.sources.onnx_file import OnnxSource
from trtdet.sources.saved_model_folder import find_saved_model
from trtdet.sources.subgraphs import reads
from trtdet.spec import OUTPUT_NAMES, ModelSpec, Preprocessing

logger = logging.getLogger(__name__)

#: Protobuf ends at 2 GiB; beyond this, weights go into a file beside the model.
EXTERNAL_DATA_BYTES = 1 << 30

#: One image's detections (class_ids are category ids), and the way from its pixels to the
#: network's.
Found = tuple[Detections, ResizeTransform]
#: Names of tensors, an image -> their values, without the batch dimension.
TensorReader = Callable[[Sequence[str], ImageArray], list[NDArray[Any]]]


class Side(Protocol):
    """One of the two models. Use as a context manager.

    Attributes:
        tensors: that can be read, in the order of the graph; none where it is an engine.
        heads: those of them that the network ends in.
        sorts_rows: whether the model sorts the rows of its heads, so that they may swap.
    """

    info: SideInfo
    tensors: tuple[str, ...]
    heads: frozenset[str]
    sorts_rows: bool

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
    """The part of an ONNX model between two sets of tensors, in ONNX Runtime on the CPU, every
    operator computed as it is written.
    """

    def __init__(
        self, model: onnx.ModelProto, inputs: Mapping[str, int], outputs: Sequence[str]
    ) -> None:
        """
        Args:
            inputs: tensor -> its ONNX element type.

        Raises:
            EngineError: ONNX Runtime is not installed, or cannot load it.
        """
        part = cut_onnx(model, list(inputs), outputs)
        part.ir_version = min(part.ir_version, 10)  # the newest that ONNX Runtime 1.22 reads
        for info in part.graph.input:
            known = info.type.tensor_type.HasField("shape")
            if not known:  # an inner tensor
                info.CopyFrom(
                    onnx.helper.make_tensor_value_info(info.name, inputs[info.name], None)
                )
        name = f"the graph up to {list(outputs)[:3]}"
        # What ONNX Runtime has to say is in the exception.
        self._session = open_session(part, name, optimize=False, log_level=FATAL_ERRORS)

    def run(self, names: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        return self._session.run(names, feeds)


class ConvertedSide(Closing):
    """An ONNX file of stage 1 or 2, or an engine: preprocessing and NMS are this project's.

    Args:
        model: what `read_onnx(path, weights=False)` gave; None for an engine.
    """

    def __init__(
        self, path: Path, options: RunOptions, model: onnx.ModelProto | None = None
    ) -> None:
        self._options = options
        whole = with_weights(model, path) if model else None
        self._model = emulate(whole) if whole and on_cpu(options) else whole
        if self._model is None or self._model is whole:
            self._runtime = open_model(path, options, model=model)
            kind = self._runtime.description
        else:
            self._runtime = open_in_memory(self._model, path.name, options)
            kind = f"{self._runtime.description}, rounding as a GPU does"
        self.info = SideInfo(path.name, kind, self._runtime.spec, precision_of(path, whole))
        self._rescaled = read_rescaled(whole) if whole else {}
        self.heads = frozenset((RAW_BOXES, CLASS_LOGITS))
        graph = self._model
        self.tensors = tensors_before(graph, self.heads) if graph else ()
        self.sorts_rows = graph is not None and are_sorted_inside(graph, self.heads)

    def detect(self, paths: Sequence[Path]) -> Iterator[tuple[Path, Found]]:
        spec = self.info.spec
        with open_batcher(self._runtime, paths, self._options) as batcher:
            for batch, outputs in run_batches(self._runtime, batcher):
                found = outputs.decoded(spec)
                for path, one, transform in zip(batch.paths, found, batch.transforms, strict=True):
                    yield path, (by_category(one, spec), transform)

    def tensor_reader(self, names: Sequence[str]) -> TensorReader:
        if self._model is None:
            raise ValueError(f"{self.info.name}: is an engine, whose tensors cannot be read")
        network_input = self._model.graph.input[0]
        elem_type = network_input.type.tensor_type.elem_type
        model = self._model
        part = GraphPart(model, {network_input.name: elem_type}, names)
        batch = fixed_batch(model) or 1

        def read(some: Sequence[str], image: ImageArray) -> list[NDArray[Any]]:
            pixels, _ = preprocess(image, at_own_size(self.info.spec.preprocessing, image))
            values = part.run(some, feed_of(model, pixels))
            ones = [_first(value, batch) for value in values]
            return [self._scaled_back(n, v) for n, v in zip(some, ones, strict=True)]

        return read

    def _scaled_back(self, name: str, value: NDArray[Any]) -> NDArray[Any]:
        """A tensor as the float model has it, where INT8 rescales its channels."""
        if name not in self._rescaled:
            return value
        return self._rescaled[name].undo(value.astype(np.float32))

    def close(self) -> None:
        self._runtime.close()


class TrainedSide(Closing):
    """A model as it was trained, a SavedModel or an ONNX file: it resizes and normalises by itself,
    where it has that.

    Args:
        own_nms: take its own detections, the last of its outputs; else the hard NMS that stage 1
            reads from it.
        like: the converted model beside it, for what was chosen when it was converted.
        model: what `read_onnx(path, weights=False)` gave; None for a SavedModel.
    """

    def __init__(
        self,
        path: Path,
        *,
        own_nms: bool = False,
        like: ModelSpec | None = None,
        model: onnx.ModelProto | None = None,
    ) -> None:
        self._source = open_trained(path, model)
        done = convert(self._source, conversion_options(like))
        self._reading = done.reading
        spec = with_normalisation(done.spec, self._reading, like)
        package = "onnxruntime" if path.is_file() else "tensorflow"
        kind = "ONNX as trained, ONNX Runtime" if path.is_file() else "SavedModel, TensorFlow"
        kind += f" {importlib.metadata.version(package)}, its own preprocessing"
        self.info = SideInfo(path.name, kind, spec)
        self.tensors = tuple(self._reading.heads)
        self.heads = frozenset(self.tensors)
        self.sorts_rows = are_sorted_inside(done.model, self.heads)
        heads = {name: onnx.TensorProto.FLOAT for name in self.tensors}
        self._nms = GraphPart(lowering.lower(done.model, form="onnx"), heads, OUTPUT_NAMES)
        self._own = ""
        if own_nms:
            feeds, _ = self._feed(load_image(about.PHOTOGRAPH))
            self._own = find_detections(self._source, feeds)

    def detect(self, paths: Sequence[Path]) -> Iterator[tuple[Path, Found]]:
        for path in paths:
            try:
                image = load_image(path)
            except (OSError, ValueError) as error:
                logger.warning("skipped: %s", message_of(error))
                continue
            try:
                found = self._own_detections(image) if self._own else self._detections(image)
            except (ValueError, GraphError, EngineError) as error:  # a picture of 500 x 1 pixels
                logger.warning("skipped: %s: %s", path, message_of(error))
                continue
            yield path, found

    def _detections(self, image: ImageArray) -> Found:
        """Its heads, decoded and suppressed as in the converted file."""
        values, transform = self._run_heads(self.tensors, image)
        first = {name: v[:1] for name, v in zip(self.tensors, values, strict=True)}
        outputs = dict(zip(OUTPUT_NAMES, self._nms.run(OUTPUT_NAMES, first), strict=True))
        (found,) = decode(outputs, self.info.spec, [transform])
        return by_category(found, self.info.spec), transform

    def _own_detections(self, image: ImageArray) -> Found:
        """AutoML's output [n, k, 7]: image, ymin, xmin, ymax, xmax, score, category; pixels of
        what it was fed.
        """
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
        """Values of heads as the converted file has them: boxes of a model with a mask relative
        to the network input.
        """
        feeds, transform = self._feed(image)
        tensors = [self._reading.heads[name] for name in names]
        values = [value.astype(np.float32) for value in self._source.run(tensors, feeds)]
        if self._reading.feeds:
            share = picture_share(transform, self.info.spec.preprocessing)
            values = [
                v * share if n in ("pred_boxes", RAW_BOXES) else v
                for n, v in zip(names, values, strict=True)
            ]
        return values, transform

    @property
    def _fixed_size(self) -> bool:
        """Whether the model takes images of one size, so that it does no resizing of its own."""
        shape = self._source.graph.image_shape
        sizes = shape[1:3] if self._reading.image_layout == "NHWC" else shape[2:4]
        return bool(sizes) and None not in sizes

    def _feed(self, image: ImageArray) -> tuple[dict[str, NDArray[Any]], ResizeTransform]:
        """What the model is fed for an image, and how the image lies in its network input."""
        reading, preprocessing = self._reading, at_own_size(self.info.spec.preprocessing, image)
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


def at_own_size(preprocessing: Preprocessing, image: ImageArray) -> Preprocessing:
    """For one image, of a model that takes each as large as it is."""
    height, width = image.shape[:2]
    return preprocessing.at((height, width)) if preprocessing.own_size else preprocessing


def open_trained(path: Path, model: onnx.ModelProto | None) -> Source:
    """A SavedModel, or an ONNX file that was read already."""
    if model is None:
        return open_source(path, is_onnx=False)
    whole = with_weights(model, path, remedy=EXPORT_AGAIN)
    return OnnxSource(path, lower=deformable_attention.lower, model=whole)


def conversion_options(like: ModelSpec | None) -> Options:
    """With what the user of create_onnx.py chose for `like`; what the file says itself comes
    first.
    """
    if like is None:
        return Options()
    chosen = as_chosen(like)
    one_size = not like.preprocessing.own_size
    hints = dataclasses.replace(
        chosen.hints,
        size_hw=like.preprocessing.size_hw if one_size else None,
        resize=like.preprocessing.resize if one_size else None,
        rotated_nms=like.rotated_mode if like.selection == "rotated_nms" else None,
    )
    given = frozenset(("resize_mode", "preprocessor"))
    return dataclasses.replace(chosen, hints=hints, given=given)


def with_normalisation(spec: ModelSpec, reading: Reading, like: ModelSpec | None) -> ModelSpec:
    """The spec of a model as it was trained; where its file does not say how it normalises, as
    `like` does.
    """
    known = any(f.name == NORMALISATION and f.origin.startswith((READ, MEASURED)) for f in spec.evidence)  # fmt: skip
    if like is None or known or reading.image_input != reading.network_input:
        return spec
    chosen = {name: getattr(like.preprocessing, name) for name in ("mean", "std", "pad_rgb")}
    return spec.replace(preprocessing=dataclasses.replace(spec.preprocessing, **chosen))


def picture_share(transform: ResizeTransform, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """x, y, x, y: the part of the network input, from its top left corner, that the picture
    takes.
    """
    placed = np.rint(np.multiply(transform.source_wh, transform.scale_xy))
    share = placed / np.array(preprocessing.size_hw[::-1])
    return np.array([*share, *share], np.float32)


def cut_mask(ones: NDArray[Any], share: NDArray[np.float32]) -> NDArray[Any]:
    """A mask [1, h, w] of ones, 0 beside the picture.

    A smaller mask has the nearest of the picture's rows, as the network takes them.

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


#: The options that name the two models.
SIDES = ("--reference", "--candidate")


def open_sides(
    paths: tuple[Path, Path], options: RunOptions, stack: ExitStack, *, own_nms: bool = False
) -> tuple[Side, Side]:
    """Reference and candidate, entered into `stack`.

    One that was converted is opened first: the other follows its choices.

    Raises:
        FileNotFoundError, GraphError, EngineError: one is no model, or cannot be run here.
    """
    sides: dict[int, Side] = {}
    like = None
    models = [read_graph(*named) for named in zip(paths, SIDES, strict=True)]
    trained = [is_as_trained(*pair) for pair in zip(paths, models, strict=True)]
    for i in sorted(range(len(paths)), key=trained.__getitem__):
        model, models[i] = models[i], None  # not kept longer than its side needs it
        with naming(paths[i]):
            if trained[i]:
                sides[i] = TrainedSide(paths[i], own_nms=own_nms, like=like, model=model)
            else:
                sides[i] = open_converted(paths[i], options, model)
                like = sides[i].info.spec
        stack.enter_context(sides[i])
    return sides[0], sides[1]


#: What compare.py takes.
COMPARABLE = "a SavedModel, an ONNX file or an engine"


def read_graph(path: Path, option: str) -> onnx.ModelProto | None:
    """What stands in an ONNX file, external data left in its files.

    None for a SavedModel and an engine.

    Raises:
        FileNotFoundError, GraphError: it is none of these.
    """
    if path.is_dir():
        find_saved_model(path, option)
        return None
    files.check_input(path, option, COMPARABLE)
    if path.suffix.lower() == ".onnx":
        return read_onnx(path, remedy=EXPORT_AGAIN, weights=False)
    check_engine(path, option, COMPARABLE)
    return None


def is_as_trained(path: Path, model: onnx.ModelProto | None) -> bool:
    """Whether this is a SavedModel or an ONNX file that create_onnx.py has not made."""
    if model is None:
        return path.is_dir()
    return ModelSpec.maybe_from_onnx(model) is None


def open_converted(path: Path, options: RunOptions, model: onnx.ModelProto | None) -> Side:
    """An ONNX file of create_onnx.py or an engine, with those of the options that it takes."""
    other = ENGINE_OPTIONS if path.suffix.lower() == ".onnx" else ONNX_OPTIONS
    unset: dict[str, Any] = dict.fromkeys(other)
    return ConvertedSide(path, dataclasses.replace(options, **unset), model)


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


def precision_of(path: Path, model: onnx.ModelProto | None) -> str:
    """Of an engine as its .json says it, "fp32" without one; of an ONNX file as its nodes and
    weights say it.
    """
    if model is None:
        info = read_sidecar(path)
        return "fp32" if info is None else info.precision
    return quantization.precision_of(model)


def tensors_before(model: onnx.ModelProto, heads: frozenset[str]) -> tuple[str, ...]:
    """The tensors that the network computes on its way to `heads`, these included, in its order."""
    needed = set(heads)
    names: list[str] = []
    for node in reversed(model.graph.node):  # sorted, as ONNX demands
        if needed.isdisjoint(node.output):
            continue
        needed.update(reads(node))
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
