# SPDX-License-Identifier: Apache-2.0
"""Inputs and outputs of an ONNX export of a set prediction: image, mask, heads, sizes."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper

from trtdet.errors import GraphError
from trtdet.families import evidence as ev
from trtdet.families.base import Hints
from trtdet.families.evidence import Evidence
from trtdet.families.outputs import Nodes, batch_of
from trtdet.families.pixels import Pixels, declared_shapes, find_pixels, maybe_image
from trtdet.families.set_outputs import SetOutputs, maybe_outputs, other_feeds
from trtdet.geometry import in_layout
from trtdet.graph.map_op import check_runs
from trtdet.sources.base import Source
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import Layout

NAME = "detr"


@dataclass(frozen=True)
class Export:
    """What an ONNX file of a DETR says of itself.

    Attributes:
        image: input tensor. pixels: how it enters the first convolution.
        mask: input tensor [N,h,w], 1 where the picture is; empty: none. mask_hw: its size.
            mask_type: its `TensorProto.DataType`.
        outputs: the heads.
        size_hw: of the image. batch: None where it is dynamic.
        num_queries: Q. num_logits: of each.
    """

    outputs: SetOutputs
    entry: Pixels
    mask: str
    mask_hw: tuple[int, int]
    mask_type: int
    size_hw: tuple[int, int]
    batch: int | None
    num_queries: int = 0
    num_logits: int = 0

    @property
    def pixels(self) -> str:
        """The tensor that enters the first convolution."""
        return self.entry.tensor

    @property
    def logits(self) -> str:
        return self.outputs.logits

    @property
    def boxes(self) -> str:
        return self.outputs.boxes


def read_export(
    source: Source, hints: Hints, evidence: Evidence, *, trusted: bool = False
) -> Export:
    """Inputs and outputs.

    Args:
        trusted: the file says that it is a set prediction, so boxes need not look like some.

    Raises:
        GraphError: they are not those of a set prediction, or the size is dynamic and not given.
    """
    if not isinstance(source, OnnxSource):
        raise GraphError(
            f"{source.path}: expected an ONNX file, found a SavedModel; export it to ONNX"
        )
    name, layout, mask, sizes = _inputs(source)
    shapes = declared_shapes(source)
    dims = shapes[name][2:] if layout == "NCHW" else shapes[name][1:3]
    size_hw = (dims[0], dims[1]) if dims[0] and dims[1] else hints.size_hw
    if size_hw is None:
        raise GraphError(
            f"{source.path}: its input takes any size; name the one that it shall have: --size H,W"
        )
    graph = source.model.graph
    check_runs(source, NAME, [info.name for info in graph.output])
    outputs = maybe_outputs(source, hints, trusted=trusted)
    if outputs is None:
        _run_as_it_is(source, shapes[name][0] or 1, name, layout, size_hw)
        raise GraphError(
            f"{source.path}: expected logits [N, queries, classes] and boxes [N, queries, 4], centre and size from 0 to 1, and no other output, "
            f"found {', '.join(i.name for i in graph.output)}; export the model with these outputs, or declare them with --boxes_output and "
            "--scores_output"
        )
    _check_prompts(source, outputs, sizes)
    sides = shapes[mask][1:] if mask else size_hw
    entry = find_pixels(source, hints, feeds=other_feeds(source, size_hw))
    if entry.layout != "NCHW":
        raise GraphError(
            f"{source.path}: expected channels before height and width at the first convolution; export the model from PyTorch"
        )
    export = Export(
        outputs=outputs,
        entry=entry,
        mask=mask,
        mask_hw=(sides[0] or size_hw[0], sides[1] or size_hw[1]),
        mask_type=next(
            (i.type.tensor_type.elem_type for i in graph.input if i.name == mask), TensorProto.INT64
        ),
        size_hw=size_hw,
        batch=shapes[name][0],
    )
    evidence.add(ev.INPUT, f"'{name}' {layout} {size_hw[0]}x{size_hw[1]}", "read: its shape")
    num_queries, num_logits = _head_sizes(source, export)
    export = dataclasses.replace(export, num_queries=num_queries, num_logits=num_logits)
    masks_fed = {mask: ones_mask(export, 1)} if mask else {}
    batch, said = batch_of(source, entry, [export.logits, export.boxes], size_hw, masks_fed)
    evidence.add(ev.BATCH, "dynamic" if batch is None else batch, said)
    return dataclasses.replace(export, batch=batch)


def _inputs(source: OnnxSource) -> tuple[str, Layout, str, list[str]]:
    """The image and its layout, the mask ("": there is none), and sizes of pictures."""
    shapes = declared_shapes(source)
    image = maybe_image(source)
    masks = [name for name, shape in shapes.items() if len(shape) == 3 and "mask" in name.lower()]
    sizes = [name for name, shape in shapes.items() if len(shape) == 2 and shape[1] in (2, None)]
    known = 1 + len(masks) + len(sizes) == len(shapes)
    if image is None or not known or len(masks) > 1 or len(sizes) > 1:
        found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise GraphError(
            f"{source.path}: expected an image [N, 3, H, W] and at most a mask [N, H, W] called so, found {found}; export the model "
            "with these inputs"
        )
    return *image, "".join(masks), sizes


def _check_prompts(source: OnnxSource, outputs: SetOutputs, others: Sequence[str]) -> None:
    """Refuse detections that follow from a further input.

    Raises:
        GraphError: they do.
    """
    above = Nodes(source.model).tensors_above([outputs.logits, outputs.boxes])
    if prompts := [name for name in others if name in above]:
        raise GraphError(
            f"{source.path}: expected detections that follow from the image alone, but they follow from '{prompts[0]}' too; a detector that "
            "takes a text is not converted"
        )


def _run_as_it_is(
    source: OnnxSource, batch: int, image: str, layout: Layout, size_hw: tuple[int, int]
) -> None:
    """Let ONNX Runtime say why the model does not run, if that is so.

    Raises:
        GraphError: what it says.
    """
    feeds = {name: np.repeat(v, batch, axis=0) for name, v in other_feeds(source, size_hw).items()}
    if {image, *feeds} != set(source.graph.inputs):
        return
    fed = in_layout(np.zeros((batch, *size_hw, 3), np.float32), layout)
    try:
        source.run([info.name for info in source.model.graph.output], {image: fed, **feeds})
    except GraphError as error:
        raise _explained(source, error) from error


def _explained(source: Source, error: GraphError) -> GraphError:
    if "GridSample" not in str(error):
        return error
    return GraphError(
        f"{source.path}: ONNX Runtime cannot run its GridSample: torch's older exporter computes positions in float64 where the "
        f"batch is fixed; export it with a dynamic batch (dynamic_axes) or with dynamo=True ({error})"
    )


def _feeds(export: Export, batch: int) -> dict[str, np.ndarray]:
    n, (height, width) = batch, export.size_hw
    feeds: dict[str, np.ndarray] = {export.pixels: np.zeros((n, 3, height, width), np.float32)}
    if export.mask:
        feeds[export.mask] = ones_mask(export, n)
    return feeds


def _head_sizes(source: Source, export: Export) -> tuple[int, int]:
    """Numbers of queries and of logits each.

    Raises:
        GraphError: the model does not run, or its outputs do not fit each other.
    """
    feeds = _feeds(export, export.batch or 1)
    try:
        logits, boxes = source.run([export.logits, export.boxes], feeds)
    except GraphError as error:
        raise _explained(source, error) from error
    if logits.ndim != 3 or boxes.shape != (*logits.shape[:2], 4):
        raise GraphError(
            f"{source.path}: expected {export.logits} [N, queries, classes] and {export.boxes} [N, queries, 4], found {list(logits.shape)} and "
            f"{list(boxes.shape)}"
        )
    return logits.shape[1], logits.shape[2]


def ones_mask(export: Export, batch: int) -> np.ndarray:
    return np.ones((batch, *export.mask_hw), helper.tensor_dtype_to_np_dtype(export.mask_type))
