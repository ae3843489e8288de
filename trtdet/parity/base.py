# SPDX-License-Identifier: Apache-2.0
"""One of the two models of a comparison, behind one interface: `Side`."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from trtdet.detections import Detections
from trtdet.geometry import ResizeTransform
from trtdet.images.files import ImageArray
from trtdet.parity.summary import SideInfo
from trtdet.sessions import FATAL_ERRORS, open_session
from trtdet.sources.base import cut_onnx
from trtdet.spec import ModelSpec, Preprocessing

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


def at_own_size(preprocessing: Preprocessing, image: ImageArray) -> Preprocessing:
    """For one image, of a model that takes each as large as it is."""
    height, width = image.shape[:2]
    return preprocessing.at((height, width)) if preprocessing.own_size else preprocessing


def by_category(detections: Detections, spec: ModelSpec) -> Detections:
    """The same with category ids for class ids; -1 for a class that the model should not have."""
    ids = np.array([*spec.category_ids, -1], np.int32)
    known = (detections.class_ids >= 0) & (detections.class_ids < spec.num_classes)
    classes = np.where(known, detections.class_ids, spec.num_classes)
    return dataclasses.replace(detections, class_ids=ids[classes])
