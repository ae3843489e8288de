# SPDX-License-Identifier: Apache-2.0
"""CenterNet (arXiv:1904.07850), exported as its network ends: a heatmap of centres [N, C, h, w],
one map for each class; widths and heights [N, 2, h, w]; and where in its cell a centre lies
[N, 2, h, w], both in cells.

A detection is a cell that is the largest of its 3 x 3 neighbours in the heatmap of its class. That
takes the place of an NMS; the best 100 are kept. How images come in is not in such a file, and is
asked for. LibreYOLO's exports end in rows of detections: `trtdet.families.libreyolo`.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from trtdet.errors import GraphError
from trtdet.families import evidence as ev
from trtdet.families import heads, heads_images
from trtdet.families.base import IMAGE_HINTS, NO_HINTS, Heads, Hints, Reading
from trtdet.families.evidence import Evidence
from trtdet.families.heads_plan import Framework
from trtdet.families.normalisation import decide_normalisation
from trtdet.families.outputs import Nodes, batch_of, look
from trtdet.families.pixels import find_pixels, maybe_image
from trtdet.graph.builder import Builder
from trtdet.labels import COCO_80_IDS, COCO_80_LABELS, fit_labels, may_be_coco_80
from trtdet.sources.base import Source
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import ModelSpec, Nms, Preprocessing

NAME = "centernet"
KEPT = 100  # by CenterNet's own code
HEATMAP, SIZES, OFFSETS = "heatmap", "sizes", "offsets"
#: What the maps are called, in this order.
WORDS = (("hm", "heat"), ("wh", "size"), ("reg", "off"))
#: A logit whose probability is 0.
LOWEST = np.float32(-80)
#: Of an offset within its cell, with what a network is beside it; in cells.
WITHIN = (-1.0, 2.0)
#: What CenterNet's own code does with images.
OWN = (
    "--preprocessor 119.85,113.985,104.04/70.89,69.87,73.695 --channel_order bgr --resize_mode warp"
)


@dataclass(frozen=True)
class Maps:
    """The three outputs; `are_logits`: of the heatmap."""

    heatmap: str
    sizes: str
    offsets: str
    num_classes: int
    size_hw: tuple[int, int]
    are_logits: bool

    @property
    def tensors(self) -> dict[str, str]:
        """Name in the converted file -> tensor of the source."""
        return {HEATMAP: self.heatmap, SIZES: self.sizes, OFFSETS: self.offsets}


def matches(source: Source) -> bool:
    """Whether there are three maps of one size, two of them of two channels; unknown dimensions
    may be anything where the names say what they are.
    """
    if not isinstance(source, OnnxSource) or source.spec or maybe_image(source) is None:
        return False
    outputs = source.model.graph.output
    dims = [[d.dim_value for d in info.type.tensor_type.shape.dim] for info in outputs]
    if len(dims) != 3 or any(len(d) != 4 for d in dims):
        return False
    if _named([info.name for info in outputs]):
        return True
    return [d[1] for d in dims].count(2) >= 2 and len({tuple(d[2:]) for d in dims}) == 1


def _named(names: list[str]) -> tuple[str, ...]:
    """The maps in the order of `WORDS`, by their names; empty: these do not tell."""
    found = [[n for n in names if any(w in n.lower() for w in words)] for words in WORDS]
    firsts = tuple(hits[0] for hits in found if len(hits) == 1)
    return firsts if len(set(firsts)) == len(WORDS) else ()


def read(source: Source, hints: Hints = NO_HINTS) -> Reading:
    """See `trtdet.families.base.Family.read`."""
    if not isinstance(source, OnnxSource):
        raise GraphError(f"{source.path}: {NAME}: expected an ONNX file, found a SavedModel")
    known = heads_images.as_said(Framework(""), hints)
    evidence = Evidence(str(source.path), hints.assume)
    pixels = find_pixels(source, hints)
    size_hw = pixels.size_hw or (0, 0)
    evidence.add(ev.FAMILY, "CenterNet", "read: three maps, of centres, sizes and offsets")
    heads_images.note_input(evidence, pixels, size_hw)
    normal = decide_normalisation(evidence, pixels, hints, None)
    preprocessing = heads_images.preprocessing_of(evidence, hints, known, normal, size_hw)
    outputs = [info.name for info in source.model.graph.output]
    maps = maps_of(source, look(source, pixels, normal, outputs, {}, size_hw), evidence)
    stride = [a / b for a, b in zip(size_hw, maps.size_hw, strict=True)]
    if stride[0] != stride[1] or stride[0] % 1:
        raise GraphError(
            f"{source.path}: expected maps that are a whole number of times smaller than the input, found {list(maps.size_hw)} for {list(size_hw)}"
        )
    evidence.add(ev.BOXES, f"centre and size, in cells of {stride[0]:g} pixels", f"{ev.CONVENTION}CenterNet")  # fmt: skip
    batch, said = batch_of(source, pixels, outputs, size_hw)
    evidence.add(ev.BATCH, "dynamic" if batch is None else batch, said)
    spec = _spec(maps, preprocessing, hints, evidence)
    try:
        facts = evidence.settle()
    except GraphError as error:
        raise GraphError(f"{error}; CenterNet's own code takes {OWN}") from error
    return Reading(
        spec=spec,
        image_input=pixels.tensor,
        network_input=pixels.tensor,
        network_layout=pixels.layout,
        image_layout=pixels.layout,
        heads=maps.tensors,
        assemble=partial(assemble, maps=maps, stride=stride[0]),
        batch=batch,
        rewrite=partial(
            heads.fix_sizes,
            images=pixels.shape if heads_images.has_size(source) else None,
            batch=batch,
        ),
        facts=facts,
        takes=IMAGE_HINTS,
    )


def maps_of(
    source: OnnxSource, seen: dict[str, list[NDArray[np.float32]]], evidence: Evidence
) -> Maps:
    """Which output is which: by names, else by values.

    Raises:
        GraphError: neither tells, or they are no such maps.
    """
    shapes = {name: values[0].shape for name, values in seen.items()}
    found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    named = _named(list(seen))
    if named:
        heatmap, sizes, offsets = named
    else:
        pairs = [n for n, shape in shapes.items() if shape[1] == 2]
        small = [n for n in pairs if all(_share_within(v) > 0.99 for v in seen[n])]
        if len(pairs) != 2 or len(small) != 1:
            raise GraphError(
                f"{source.path}: expected maps of centres, sizes and offsets, found {found}, which do not tell which they are; call them hm, wh and reg"
            )
        (offsets,) = small
        (sizes,) = (n for n in pairs if n != offsets)
        (heatmap,) = (n for n in seen if n not in pairs)
    pair_shapes = [shapes[sizes][1:], shapes[offsets][1:]]
    if pair_shapes != [(2, *shapes[heatmap][2:])] * 2:
        raise GraphError(
            f"{source.path}: expected a heatmap [N, C, h, w], and sizes and offsets [N, 2, h, w], found {found}; export CenterNet's heads hm, wh and reg"
        )
    low = min(float(v.min()) for v in seen[heatmap])
    high = max(float(v.max()) for v in seen[heatmap])
    are_logits = low < 0 or high > 1
    node = Nodes(source.model).producer.get(heatmap)
    evidence.add(
        ev.SCORES,
        f"peaks of '{heatmap}', {'sigmoid of logits' if are_logits else 'probabilities'}",
        f"{ev.MEASURED}{low:.3g} to {high:.3g}" + (f", of a {node.op_type}" if node else ""),
    )
    return Maps(
        heatmap, sizes, offsets, shapes[heatmap][1], tuple(shapes[heatmap][2:4]), are_logits
    )


def _share_within(values: NDArray[np.float32]) -> float:
    return float(((values >= WITHIN[0]) & (values <= WITHIN[1])).mean())


def _spec(maps: Maps, preprocessing: Preprocessing, hints: Hints, evidence: Evidence) -> ModelSpec:
    count = maps.num_classes
    labels = fit_labels(hints.labels, count)
    coco = may_be_coco_80(labels, count)
    evidence.add(ev.BACKGROUND, "none", f"{ev.CONVENTION}CenterNet")
    evidence.add(ev.CLASSES, count, "read: the number of heatmaps")
    evidence.add(
        ev.CATEGORY_IDS,
        "COCO's 80" if coco else f"1..{count}",
        "convention: COCO's ids of its 80 classes" if coco else "convention: class index + 1",
    )
    evidence.add(ev.SELECTION, "peaks of 3 x 3 cells, no NMS", f"{ev.CONVENTION}CenterNet")
    kept = min(KEPT, count * maps.size_hw[0] * maps.size_hw[1])
    evidence.add(ev.KEPT, kept, f"{ev.CONVENTION}CenterNet")
    return ModelSpec(
        family=NAME,
        preprocessing=preprocessing,
        nms=Nms(
            score_threshold=0.0,
            iou_threshold=1.0,
            max_output_boxes=kept,
            score_activation=maps.are_logits,
        ),
        category_ids=COCO_80_IDS if coco else tuple(range(1, count + 1)),
        labels=labels if len(labels) == count else COCO_80_LABELS if coco else (),
        box_order="xyxy",
        selection="topk",
        anchored=False,
    )


def assemble(build: Builder, spec: ModelSpec, *, maps: Maps, stride: float) -> Heads:
    """boxes [N, h * w, 4], centre and size in pixels, and scores [N, h * w, C], those of cells
    that are no peak out of the way.
    """
    largest = build.node(
        "MaxPool", "largest", HEATMAP, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1]
    )
    is_peak = build.node("Equal", "is_peak", HEATMAP, largest)
    peaks = build.node("Where", "peaks", is_peak, HEATMAP, LOWEST if maps.are_logits else np.float32(0))  # fmt: skip
    height, width = maps.size_hw
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    cells = np.stack([columns, rows], axis=-1).reshape(1, height * width, 2)
    centres = build.node("Add", "centres", _as_rows(build, "offset_rows", OFFSETS, 2), cells)
    parts = build.node("Concat", "boxes_in_cells", centres, _as_rows(build, "size_rows", SIZES, 2), axis=-1)  # fmt: skip
    boxes = build.node("Mul", "boxes", parts, np.float32(stride))
    return Heads(boxes, _as_rows(build, "score_rows", peaks, spec.num_classes))


def _as_rows(build: Builder, name: str, tensor: str, channels: int) -> str:
    """[N, channels, h, w] -> [N, h * w, channels]."""
    flat = build.reshape(f"{name}_flat", tensor, [0, channels, -1])
    return build.node("Transpose", name, flat, perm=[0, 2, 1])
