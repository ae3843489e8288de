# SPDX-License-Identifier: Apache-2.0
"""DETR (arXiv:2005.12872) as transformers and facebookresearch/detr export it to ONNX, with torch's
old or new exporter.

logits [N, Q, C+1], the last class for no object; pred_boxes [N, Q, 4], cx cy w h, 0 to 1. Its own
post-processing is softmax, the best class of each query and a score threshold; nothing is
suppressed. So is ours: `trtdet.nms.topk`.

Images come in one of two ways, `--resize_mode`:

* stretch to the network's size: what an export without a mask input can take. A mask input is fed
  with ones, and disappears.
* letterbox, as the model was trained: aspect kept, picture in the top left corner, zeros (after
  normalisation) beside it, and a mask that says which is which. The mask is computed in the graph
  from the padding colour, the ImageNet mean, so the host knows nothing of it. Boxes of the source
  are relative to the picture without padding; those of the result are relative to the network
  input, like any other model's.

A row or column counts as padding if it and all behind it are within half a level of the mean
everywhere. In an image file no pixel has that colour, which is no whole number; only after
resizing, or as uint8, can a picture end in a row that has.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from trtdet.errors import GraphError
from trtdet.families import evidence as ev
from trtdet.families.base import (
    CLASS_LOGITS,
    NO_HINTS,
    RAW_BOXES,
    SAMPLINGS,
    Final,
    Heads,
    Hints,
    Note,
    Reading,
)
from trtdet.families.detr_export import Export, ones_mask, read_export
from trtdet.families.detr_graph import rewrite_network
from trtdet.families.evidence import Evidence
from trtdet.families.normalisation import Convention, decide_normalisation
from trtdet.families.pixels import Normal, is_paddle
from trtdet.families.set_outputs import (
    Kind,
    is_deformable,
    kind_of,
    maybe_outputs,
    read_detections,
)
from trtdet.graph.builder import Builder
from trtdet.graph.deformable_attention import Mode
from trtdet.graph.map_op import check_runs, unknown_ops
from trtdet.labels import COCO_80_IDS, are_coco_80
from trtdet.sources.base import Source
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import PREPROCESSORS, ModelSpec, Nms, Preprocessing, ResizeMode, Sampling

NAME = "detr"

IMAGENET_MEAN, IMAGENET_STD = PREPROCESSORS["imagenet"]
#: facebookresearch/detr and transformers give every query a box; Deformable DETR's evaluation takes
#: the best 100.
MAX_DETECTIONS = 100


def matches(source: Source) -> bool:
    """Whether the outputs are a set prediction whose boxes have no reference points."""
    return kind_is(source, "softmax")


def why_not(source: Source) -> str:
    """What is wrong with outputs named like DETR's."""
    if not isinstance(source, OnnxSource) or source.spec:
        return ""
    names = [info.name for info in source.model.graph.output]
    if not _called_as_detr(names):
        return ""
    return f"expected logits [N, Q, C] and boxes [N, Q, 4] of 0 to 1 and nothing else, found {', '.join(names[:6])}"


def _called_as_detr(names: Sequence[str]) -> bool:
    return any("pred_boxes" in name or "logits" in name for name in names)


def kind_is(source: Source, kind: Kind) -> bool:
    """Whether the outputs are a set prediction of this kind, in a file that does not say its family
    itself.

    Raises:
        GraphError: outputs named like DETR's, behind operators that ONNX Runtime does
            not know.
    """
    if not isinstance(source, OnnxSource):
        return False
    if any(prop.key == "libreyolo_version" for prop in source.model.metadata_props):
        return False
    names = [info.name for info in source.model.graph.output]
    if unknown_ops(source, names):  # nothing can be measured
        if _called_as_detr(names):
            check_runs(source, NAME, names)
        return False
    outputs = maybe_outputs(source, NO_HINTS)
    return outputs is not None and kind_of(source, outputs) == kind


def read(
    source: Source,
    hints: Hints = NO_HINTS,
    *,
    convention: Convention | None = None,
    how: str = "read: boxes are the sigmoid of a linear layer, without reference points",
    labels: tuple[str, ...] = (),
) -> Reading:
    """See `trtdet.families.base.Family.read`."""
    known = convention or Convention("DETR", IMAGENET)
    evidence = Evidence(str(source.path), hints.assume)
    export = read_export(source, hints, evidence, trusted=how.startswith("read: metadata"))
    if export.num_logits < 2:
        raise GraphError(
            f"{source.path}: expected logits of classes and of no object in '{export.logits}', found one logit; --family deformable_detr takes a sigmoid"
        )
    evidence.add(ev.FAMILY, NAME, how)
    evidence.add(ev.SCORES, "softmax", f"{ev.CONVENTION}{known.of}")
    evidence.add(ev.BACKGROUND, "last", f"{ev.CONVENTION}{known.of}")
    evidence.add(ev.SELECTION, "the best class of each query, no NMS", f"{ev.CONVENTION}{known.of}")
    reading = describe(
        source, export, hints, evidence, family=NAME, num_classes=export.num_logits - 1,
        convention=known, kept=min(MAX_DETECTIONS, export.num_queries), labels=labels,
    )  # fmt: skip
    spec = reading.spec.replace(
        nms=Nms(
            score_threshold=0.0,
            max_output_boxes=min(MAX_DETECTIONS, export.num_queries),
            score_activation=False,
            class_agnostic=True,
            box_coding=1,
        ),
    )
    heads = {"logits": export.logits, "pred_boxes": export.boxes}
    made = partial(assemble, activated=export.outputs.activated)
    return dataclasses.replace(reading, spec=spec, heads=heads, assemble=made)


def assemble(build: Builder, spec: ModelSpec, *, activated: bool = False) -> Heads:
    """softmax(logits), the last class left out; the boxes as they are."""
    probabilities = "logits"
    if not activated:
        probabilities = build.node("Softmax", "probabilities", "logits", axis=-1)
    scores = build.slice_last("object_probabilities", probabilities, 0, spec.num_classes)
    return Heads("pred_boxes", scores)


def read_sigmoid(
    source: Source,
    hints: Hints,
    *,
    family: str,
    convention: Convention,
    kept: int,
    how: str,
    labels: tuple[str, ...] = (),
    antialias: bool = True,
    rounds: bool = False,
    unused: Sequence[int] = (),
) -> Reading:
    """A set prediction with a sigmoid over every class: the best of all query and class pairs, no
    NMS.

    Args:
        rounds: a picture resized without antialiasing has whole levels too, 0 to 255, as OpenCV's
            of 8 bits; with it (Pillow's) it always has.
        unused: classes that no image was trained for, and that are never chosen; those beyond the
            last are left aside.
    """
    evidence = Evidence(str(source.path), hints.assume)
    export = read_export(source, hints, evidence, trusted=how.startswith("read: metadata"))
    evidence.add(ev.FAMILY, family, how)
    scores = "probabilities" if export.outputs.activated else "sigmoid"
    evidence.add(ev.SCORES, scores, f"{ev.CONVENTION}{convention.of}")
    evidence.add(ev.BACKGROUND, "none", f"{ev.CONVENTION}{convention.of}")
    evidence.add(
        ev.SELECTION,
        "the best of all query and class pairs, no NMS",
        f"{ev.CONVENTION}{convention.of}",
    )
    kept = min(kept, export.num_queries * export.num_logits)
    if export.outputs.kept:
        kept = export.outputs.kept
    attention: Mode = "keep"
    if is_deformable(source):
        attention = hints.deformable_attention or DEFAULT_ATTENTION
    reading = describe(
        source, export, hints, evidence, family=family, num_classes=export.num_logits,
        convention=convention, kept=kept, deformable_attention=attention, labels=labels, antialias=antialias,
    )  # fmt: skip
    preprocessing = reading.spec.preprocessing
    spec = reading.spec.replace(
        preprocessing=dataclasses.replace(preprocessing, dtype="uint8")
        if rounds
        else preprocessing,
        nms=Nms(
            score_threshold=0.0,
            max_output_boxes=kept,
            score_activation=not export.outputs.activated,
            box_coding=1,
        ),
    )
    if len(unused) and export.num_logits > max(unused) and not export.outputs.activated:
        heads = {"pred_boxes": export.boxes, "logits": export.logits}
        made = partial(assemble_used, unused=tuple(unused))
        return dataclasses.replace(reading, spec=spec, heads=heads, assemble=made)
    return dataclasses.replace(
        reading, spec=spec, heads={RAW_BOXES: export.boxes, CLASS_LOGITS: export.logits}
    )


def assemble_used(build: Builder, spec: ModelSpec, *, unused: tuple[int, ...]) -> Heads:
    """The logits, those of unused classes so low that they are never chosen; the boxes as they
    are.
    """
    is_unused = np.isin(np.arange(spec.num_classes), unused)[None, None]
    return Heads(
        "pred_boxes", build.node("Where", "used_logits", is_unused, np.float32(-100), "logits")
    )


# ---- what all families of set predictions share --------------------------------------------------

IMAGENET = Normal(IMAGENET_MEAN, IMAGENET_STD)
DEFAULT_ATTENTION: Mode = "gather"


def describe(
    source: OnnxSource | Source,
    export: Export,
    hints: Hints,
    evidence: Evidence,
    *,
    family: str,
    num_classes: int,
    convention: Convention,
    kept: int,
    deformable_attention: Mode = "keep",
    labels: tuple[str, ...] = (),
    antialias: bool = True,
) -> Reading:
    """Everything but what is selected from the heads."""
    resize: ResizeMode = hints.resize or ("letterbox" if export.mask else "stretch")
    by_paddle = is_paddle(source)
    antialias = antialias and not by_paddle and not hints.interpolation
    antialias = antialias if hints.antialias is None else hints.antialias
    usual: Sampling = "cubic" if by_paddle and not antialias else "half_pixel"
    sampling = SAMPLINGS.get(hints.interpolation, usual)
    normal = decide_normalisation(evidence, export.entry, hints, convention)
    mean = normal.mean
    is_coco = are_coco_80(labels) and num_classes == len(COCO_80_IDS)
    ids = COCO_80_IDS if is_coco else tuple(range(num_classes))
    origin = "read: COCO's names" if is_coco else f"{ev.CONVENTION}{convention.of}: class index"
    evidence.add(ev.CATEGORY_IDS, ev.ids_text(ids), origin)
    note_facts(evidence, export, hints, resize, convention.of, kept)
    _note_resampling(evidence, hints, antialias=antialias, sampling=sampling, by_paddle=by_paddle)
    evidence.add(
        ev.CLASSES, num_classes,
        "read: the number of logits" + (", less the background class" if num_classes < export.num_logits else ""),
    )  # fmt: skip
    preprocessing = Preprocessing(
        export.size_hw,
        mean=mean,
        std=normal.std,
        bgr=normal.bgr,
        pad_rgb=mean,
        resize=resize,
        rounding="round",
        antialias=antialias,
        sampling=sampling,
        dtype="uint8" if by_paddle or sampling == "cubic" else "float32",  # OpenCV's 8 bits
    )
    spec = ModelSpec(
        family=family,
        preprocessing=preprocessing,
        nms=Nms(),
        category_ids=ids,
        labels=next((x for x in (labels, hints.labels) if len(x) == num_classes), ()),
        box_order="xyxy",
        boxes_normalized=True,
        selection="topk",
        anchored=False,
    )
    return Reading(
        spec=spec,
        image_input=export.pixels,
        network_input=export.pixels,
        network_layout="NCHW",
        heads={},
        batch=export.batch,
        notes=tuple(_mask_notes(export, hints, preprocessing)),
        image_layout="NCHW",
        rewrite=partial(
            rewrite_network,
            export=export,
            preprocessing=preprocessing,
            deformable_attention=deformable_attention,
        ),
        feeds={export.mask: ones_mask(export, 1)} if export.mask else {},
        facts=evidence.settle(),
        final=final_of(export),
        takes=frozenset(("channel_order", "antialias", "interpolation"))
        | ({"deformable_attention"} if is_deformable(source) else set()),
    )


def _mask_notes(export: Export, hints: Hints, preprocessing: Preprocessing) -> Iterator[Note]:
    """What users of a network with a mask input should know."""
    black = not any(preprocessing.mean) and preprocessing.resize == "letterbox"
    if export.mask and hints.preprocessor and black:
        yield Note(
            "padding is black with this normalisation: black rows and columns at the end of a picture count as padding",
            "resize_mode",
        )
    if export.mask and hints.resize is None:
        yield Note(
            "images keep their aspect, and the mask input is computed in the graph, as the model was trained; --resize_mode stretch "
            "takes whole images and a mask of ones",
            "resize_mode",
        )


def _note_resampling(
    evidence: Evidence, hints: Hints, *, antialias: bool, sampling: Sampling, by_paddle: bool
) -> None:
    """Beside how images are resized."""
    (former,) = [fact for fact in evidence.facts if fact.name == ev.RESIZE]
    value, origin = former.value, former.origin
    value += (", antialiased" if antialias else "") + (", cubic" if sampling == "cubic" else "")
    between = " " if origin.startswith(ev.GIVEN) else "; "
    if hints.antialias is not None:
        origin += f"{between}--antialias {'yes' if antialias else 'no'}"
    if hints.interpolation:
        origin += f"{between}--interpolation {hints.interpolation}"
    elif by_paddle:
        origin += "; PaddleDetection's interpolation"
    evidence.add(ev.RESIZE, value, origin)


def note_facts(
    evidence: Evidence, export: Export, hints: Hints, resize: ResizeMode, of: str, kept: int
) -> None:
    """The facts that all set predictions share."""
    if hints.resize:
        evidence.add(ev.RESIZE, resize, f"{ev.GIVEN}--resize_mode {resize}")
    elif export.mask:
        evidence.add(
            ev.RESIZE, "letterbox, top left on the mean, with a mask", "read: its mask input"
        )
    else:
        evidence.add(ev.RESIZE, resize, f"{ev.CONVENTION}{of}, without a mask input")
    evidence.add(ev.BOXES, "cxcywh, 0 to 1", f"{ev.MEASURED}their values; {ev.CONVENTION}{of}")
    evidence.add(
        ev.KEPT,
        kept,
        "read: the rows of its outputs" if export.outputs.kept else f"{ev.CONVENTION}{of}",
    )


def final_of(export: Export) -> Final | None:
    """The source's own detections, where post-processing is in the export."""
    outputs = export.outputs
    if outputs.detections is None:
        return None
    height, width = export.size_hw
    order = (height, width) if outputs.sizes_hw else (width, height)
    feeds = {outputs.sizes: np.array([order], np.int64)} if outputs.sizes else {}
    return Final(outputs.detections, partial(read_detections, outputs), feeds=feeds)
