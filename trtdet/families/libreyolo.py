# SPDX-License-Identifier: Apache-2.0
"""Exports of LibreYOLO (MIT), whose metadata names the family of the network: `libreyolo_version`,
`model_family`, `size`, `names`, `imgsz`.

Normalisation, resize and the form of the outputs follow from `model_family` (of DEIMv2 from `size`
too); the facts are those of LibreYOLO 1.6.0, libreyolo/preprocess and libreyolo/backends/base.py.
Heads are found as everywhere, by shapes and values: LibreYOLO calls the boxes of its YOLO-NAS
"pred_logits".
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trtdet.errors import GraphError
from trtdet.families import any_number, detr, heads
from trtdet.families.base import NO_HINTS, Declaration, Hints, Note, Reading
from trtdet.families.heads import Framework
from trtdet.families.normalisation import Convention
from trtdet.families.outputs import Nodes
from trtdet.families.pixels import Normal
from trtdet.labels import COCO_80_IDS
from trtdet.sources.base import Source
from trtdet.sources.onnx_file import OnnxSource

NAME = "libreyolo"
#: Its metadata names the family: no structure says otherwise.
IS_NAMED = True

UNIT = Normal((0.0, 0.0, 0.0), (255.0, 255.0, 255.0))
RAW_BGR = Normal((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), bgr=True)
IMAGENET = detr.IMAGENET
#: RTMDet's, in the order of RGB.
MMDET_BGR = Normal(detr.IMAGENET_MEAN, detr.IMAGENET_STD, bgr=True)


#: The output before the NMS, of an export with nms=True.
RAW = "raw"
#: SSD300's: the mean alone.
SSD = Normal((0.48235 * 255, 0.45882 * 255, 0.40784 * 255), (1.0, 1.0, 1.0))
#: CenterNet's, in the order of RGB.
CENTERNET = Normal(
    (0.470 * 255, 0.447 * 255, 0.408 * 255), (0.278 * 255, 0.274 * 255, 0.289 * 255), bgr=True
)


@dataclass(frozen=True)
class SetFamily:
    """A set prediction: how images come in, with antialiasing (Pillow) or without (OpenCV, on
    pixels of 8 bits or on floats), and what is kept.
    """

    normal: Normal
    antialias: bool = True
    rounds: bool = False
    kept: int = 300


SETS: Mapping[str, SetFamily] = {
    "rtdetr": SetFamily(UNIT, antialias=False, rounds=True),
    "rtdetrv2": SetFamily(UNIT, antialias=False, rounds=True),
    "rtdetrv4": SetFamily(UNIT),
    "dfine": SetFamily(UNIT),
    "deim": SetFamily(UNIT),
    "deimv2": SetFamily(UNIT),  # IMAGENET for the sizes of `DINO_SIZES`
    "tinyformer": SetFamily(IMAGENET),
    "gtr": SetFamily(IMAGENET),
    "ec": SetFamily(IMAGENET),
    "rfdetr": SetFamily(IMAGENET, antialias=False),
    "lwdetr": SetFamily(IMAGENET),  # the best 100 of size "t"
    "deformable_detr": SetFamily(IMAGENET),
    "dinodetr": SetFamily(IMAGENET),
}
DINO_SIZES = ("s", "m", "l", "x")

#: The longer side of a picture whose shorter one has 800 pixels, in torchvision.
LONGEST = 1333

_PIXELS = Declaration(box_format="xyxy", box_units="pixels", activation="none", background="none")
_ROWS = ("x1", "y1", "x2", "y2", "scores")


def _dense(name: str, normal: Normal, **others: Any) -> Framework:
    return Framework(name, normal, iou_threshold=0.45, clipped=True, **others)


def _of_own_size(name: str, columns: tuple[str, ...], kept: int | None = None) -> Framework:
    """torchvision's: pictures come with a shorter side of `imgsz` and a longer one of at most
    1333 / 800 of it, padded to a multiple of 32; the detections end in the resized picture.
    """
    return _dense(
        name, IMAGENET, resize="letterbox", rounding="floor_axes", pad_rgb=IMAGENET.mean, rounds=False, cut_off=False, declared=_PIXELS, columns=columns,
        kept=kept, selected=False, size_multiple=32, shorter_side=(800, LONGEST),
    )  # fmt: skip


#: Families that select their detections themselves, and whose pictures come as they are.
TWO_STAGES = ("faster_rcnn", "mask_rcnn")


def _two_stages(name: str) -> Framework:
    """torchvision's: pictures come as they are, unless the export has one size alone."""
    return Framework(
        name, UNIT, resize="stretch", declared=Declaration(box_format="xyxy", box_units="pixels")
    )


def _darknet(name: str) -> Framework:
    return _dense(
        name, UNIT, agnostic=True, resize="letterbox", rounding="floor64", antialias=True, pad_rgb=(128.0, 128.0, 128.0), declared=_PIXELS, columns=_ROWS,
    )  # fmt: skip


DENSE: Mapping[str, Framework] = {
    "yolo9": _dense("YOLOv9", UNIT, resize="letterbox", rounding="floor64", declared=_PIXELS, columns=_ROWS),
    "yolo9_p2": _dense("YOLOv9-P2", UNIT, agnostic=True, resize="letterbox", rounding="floor64", declared=_PIXELS, columns=_ROWS),
    "yolo9_e2e": _dense("YOLOv9-E2E", UNIT, resize="letterbox", rounding="floor64", declared=_PIXELS, columns=_ROWS, selected=True, kept=300),
    "yolox": _dense("YOLOX", RAW_BGR, resize="letterbox", rounding="floor64", antialias=True, best_class=True, columns=("cx", "cy", "w", "h", "objectness", "scores")),
    "yolonas": _dense("YOLO-NAS", UNIT, resize="letterbox", placement="center", antialias=True, longest=636, declared=_PIXELS, best_class=True),
    "yolo1": _dense("YOLOv1", UNIT, agnostic=True, resize="stretch", antialias=True, linear=True, selected=False, declared=_PIXELS, columns=_ROWS),
    "yolo2": _darknet("YOLOv2"),
    "yolo3": _darknet("YOLOv3"),
    "yolo4": _darknet("YOLOv4"),
    "yolo7": _dense("YOLOv7", UNIT, agnostic=True, resize="letterbox", rounding="floor64", antialias=True, declared=_PIXELS, columns=_ROWS),
    "ssd": _dense("SSD", SSD, resize="stretch", rounds=False, selected=False, declared=_PIXELS, columns=_ROWS),
    "efficientdet": _dense("EfficientDet", IMAGENET, resize="letterbox", rounding="floor64", antialias=True, pad_rgb=(124.0, 116.0, 104.0), declared=_PIXELS, columns=("x1", "y1", "x2", "y2", "score", "label"), selected=False),
    "centernet": Framework("CenterNet", CENTERNET, resize="letterbox", placement="center", rounding="none", sampling="corner", pad_rgb=(0.0, 0.0, 0.0), declared=_PIXELS, columns=("x1", "y1", "x2", "y2", "score", "label"), selected=True, kept=100),
    "retinanet": _of_own_size("RetinaNet", _ROWS),
    "fcos": _of_own_size("FCOS", ("x1", "y1", "x2", "y2", "level", "scores"), kept=100),
    "faster_rcnn": _two_stages("Faster R-CNN"),
    "mask_rcnn": _two_stages("Mask R-CNN"),
    "picodet": _dense("PicoDet", IMAGENET, resize="stretch", declared=_PIXELS, columns=_ROWS),
    "ppyoloe": _dense("PP-YOLOE", IMAGENET, resize="stretch", declared=_PIXELS),
    "rtmdet": _dense("RTMDet", MMDET_BGR, resize="letterbox", rounding="floor64", antialias=True, declared=_PIXELS, columns=_ROWS),
}  # fmt: skip


def matches(source: Source) -> bool:
    """Whether the metadata is LibreYOLO's, of a detector."""
    return {"libreyolo_version", "model_family"} <= metadata_of(source).keys()


def metadata_of(source: Source) -> dict[str, str]:
    if not isinstance(source, OnnxSource) or source.spec:
        return {}
    return {prop.key: prop.value for prop in source.model.metadata_props}


def read(source: Source, hints: Hints = NO_HINTS) -> Reading:
    """See `trtdet.families.base.Family.read`."""
    found = metadata_of(source)
    family, task = found.get("model_family", ""), found.get("task", "detect")
    if task != "detect" and family != "mask_rcnn":
        raise GraphError(
            f"{source.path}: expected a detector, found a LibreYOLO model for the task '{task}'; export one for the task 'detect'"
        )
    labels = read_names(found)
    if says(found, "deepstream") and family in {*DENSE, *SETS} and isinstance(source, OnnxSource):
        framework = deepstream_of(found, labels, before_best_class(source))
        return heads.read(source, hints, framework)
    if family == "detr":
        return detr.read(
            source,
            hints,
            convention=Convention("LibreYOLO's detr", IMAGENET),
            how="read: metadata model_family",
            labels=labels,
        )
    if family in SETS:
        known = set_family_of(found)
        normal, kept = known.normal, known.kept
        return detr.read_sigmoid(
            source, hints, family=_like(family), convention=Convention(f"LibreYOLO's {family}", normal), kept=kept,
            how="read: metadata model_family", labels=labels, antialias=known.antialias, rounds=known.rounds, unused=unused_of(family, labels),
        )  # fmt: skip
    if family in DENSE:
        if says(found, "nms") and RAW not in source.graph.outputs:
            raise GraphError(
                f"{source.path}: expected a LibreYOLO export without NMS, or one with its output '{RAW}'; export it with nms=False"
            )
        framework = framework_of(found, labels)
        if family in TWO_STAGES and isinstance(source, OnnxSource):
            check_selects(source, framework)
        return heads.read(source, hints, framework)
    how = ""
    if isinstance(source, OnnxSource):
        how = f"to convert it all the same, add --family heads and declare its outputs: {heads.starting_line(source)}"
    raise GraphError(
        f"{source.path}: expected one of LibreYOLO's families {', '.join([*DENSE, 'detr', *SETS])}, found '{family}'; {how}"
    )


def check_selects(source: OnnxSource, framework: Framework) -> None:
    """Refuse an export of two stages that does not select its detections itself."""
    outputs = list(source.graph.outputs)
    if any_number.find_rows(source, framework.declaration(outputs)) is None:
        raise GraphError(
            f"{source.path}: expected boxes [n, 4], scores [n] and labels [n] of {framework.name}, found {', '.join(outputs)}; export the model again"
        )


def says(found: Mapping[str, str], key: str) -> bool:
    return found.get(key, "").lower() == "true"


def set_family_of(found: Mapping[str, str]) -> SetFamily:
    """The conventions of a set prediction."""
    family, size = found["model_family"], found.get("size")
    known = SETS[family]
    if family == "deimv2" and size in DINO_SIZES:
        return dataclasses.replace(known, normal=IMAGENET)
    if family == "lwdetr" and size == "t":
        return dataclasses.replace(known, kept=100)
    return known


def before_best_class(source: OnnxSource) -> tuple[str, str] | None:
    """The boxes [N, A, 4] and the scores [N, A, C] that rows of a box and its best class are put
    together from; None: they are not.
    """
    nodes = Nodes(source.model)
    concat = nodes.producer.get(source.model.graph.output[0].name)
    if concat is None or concat.op_type != "Concat" or len(concat.input) != 3:
        return None
    chosen = next((n for n in nodes.above(concat.input[1:]) if n.op_type == "ArgMax"), None)
    return (concat.input[0], chosen.input[0]) if chosen is not None else None


def deepstream_of(
    found: Mapping[str, str], labels: tuple[str, ...], inner: tuple[str, str] | None
) -> Framework:
    """The conventions of an export with deepstream=True: rows of a box in pixels and its best
    class, and the normalisation inside where nvinfer cannot do it.

    Args:
        inner: of `before_best_class`: LibreYOLO's own runs take all classes of a box.
    """
    family = found["model_family"]
    if family in DENSE:
        known = framework_of(found, labels)
    else:
        images = set_family_of(found)
        known = Framework(
            f"LibreYOLO's {family}", images.normal, resize="stretch", antialias=images.antialias, rounds=images.antialias or images.rounds,
            labels=labels, kept=images.kept, selected=True,
        )  # fmt: skip
    name = f"{known.name} for DeepStream"
    if inner:
        boxes, scores = inner
        declared = dataclasses.replace(_PIXELS, boxes=boxes, scores=scores, scores_layout="NAC")
        return known.with_changes(name=name, declared=declared, columns=(), rows="")
    note = Note("exported for DeepStream, a box counts for its best class alone; LibreYOLO's own runs of this family may find it for several", "nms_mode")  # fmt: skip
    return known.with_changes(
        name=name, declared=_PIXELS, best_class=False, columns=("x1", "y1", "x2", "y2", "score", "label"),
        notes=known.notes if known.best_class else (*known.notes, note),
    )  # fmt: skip


def framework_of(found: Mapping[str, str], labels: tuple[str, ...]) -> Framework:
    """The conventions of a dense head."""
    known = DENSE[found["model_family"]]
    size = tuple(int(found[key]) for key in ("imgsz_h", "imgsz_w") if found.get(key, "").isdigit())
    changes: dict[str, Any] = {"labels": labels, "name": f"LibreYOLO's {known.name}"}
    if known.agnostic:
        changes["notes"] = (Note(f"LibreYOLO runs exports of {known.name} with NMS over all classes, its PyTorch models with NMS per class; --nms_mode per_class takes the latter", "nms_mode"),)  # fmt: skip
    if len(size) == 2:
        changes["size_hw"] = size
    if says(found, "nms"):
        changes["rows"] = RAW
    if known.shorter_side and len(size) == 2:
        changes["shorter_side"] = (size[0], round(size[0] * LONGEST / 800))
        changes["notes"] = (Note(f"LibreYOLO takes every picture at a size of its own, the shorter side {size[0]} pixels; at one size for all, square pictures alone have its detections, and others are letterboxed", "dynamic"),)  # fmt: skip
    if found["model_family"] in TWO_STAGES and says(found, "dynamic"):
        changes["notes"] = (Note("LibreYOLO takes every picture as large as it is; at one size for all, they are stretched to it, as LibreYOLO does with an export of one size", "dynamic"),)  # fmt: skip
    if found.get("letterbox_pad"):
        changes["placement"] = "center" if found["letterbox_pad"] == "center" else "top_left"
    return known.with_changes(**changes)


def unused_of(family: str, labels: tuple[str, ...]) -> tuple[int, ...]:
    """Columns that LibreYOLO leaves out of a head with one for each of COCO's ids 0 to 90,
    before it takes the best.
    """
    if family not in ("lwdetr", "deformable_detr", "dinodetr") or len(labels) != len(COCO_80_IDS):
        return ()
    return tuple(i for i in range(91) if i not in COCO_80_IDS)


def _like(family: str) -> str:
    """The family of ours whose network it is."""
    if family in ("rfdetr", "lwdetr"):
        return "rfdetr"
    return "deformable_detr" if family in ("deformable_detr", "dinodetr") else "rtdetr"


def read_names(found: Mapping[str, str]) -> tuple[str, ...]:
    """Class names: JSON with numbers as text for keys.

    Raises:
        GraphError: something else.
    """
    if "names" not in found:
        return ()
    try:
        names = json.loads(found["names"])
        by_id = (
            {int(key): str(name) for key, name in names.items()}
            if isinstance(names, dict)
            else dict(enumerate(map(str, names)))
        )
        return tuple(by_id[i] for i in range(len(by_id)))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise GraphError(
            f"metadata 'names': expected class names by id from 0, found {found['names'][:60]!r}"
        ) from error
