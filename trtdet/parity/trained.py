# SPDX-License-Identifier: Apache-2.0
"""A model as it was trained, as one of the two of a comparison."""

import dataclasses
import importlib.metadata
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trtdet import about
from trtdet.closing import Closing
from trtdet.conversion.convert import convert, open_source
from trtdet.conversion.options import Options
from trtdet.conversion.specify import as_chosen
from trtdet.detections import Detections, decode
from trtdet.errors import EngineError, GraphError
from trtdet.families.base import RAW_BOXES, Reading
from trtdet.families.evidence import MEASURED, NORMALISATION, READ
from trtdet.files import message_of
from trtdet.geometry import ResizeTransform, in_layout, yxyx_to_xyxy
from trtdet.graph import deformable_attention
from trtdet.images.files import ImageArray, load_image
from trtdet.images.preprocess import preprocess
from trtdet.nms import lowering
from trtdet.onnx_files import EXPORT_AGAIN, with_weights
from trtdet.parity.base import Found, GraphPart, TensorReader, at_own_size, by_category
from trtdet.parity.rows import are_sorted_inside
from trtdet.parity.summary import SideInfo
from trtdet.sources.base import Source
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import OUTPUT_NAMES, ModelSpec, Preprocessing

logger = logging.getLogger(__name__)


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
