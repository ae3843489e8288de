# SPDX-License-Identifier: Apache-2.0
"""What a model has, and what options ask for -> the spec of the result; options that the model has
no use for are refused.
"""

import dataclasses
import logging
from typing import Any

from trtdet.conversion.options import Options
from trtdet.errors import GraphError
from trtdet.families.base import Hints, Reading
from trtdet.families.evidence import (
    BATCH,
    CATEGORY_IDS,
    GIVEN,
    KEPT,
    NORMALISATION,
    SELECTION,
    ids_text,
    with_options,
)
from trtdet.labels import COCO_80_IDS, are_coco_80, fit_labels
from trtdet.spec import Fact, ModelSpec, parse_preprocessor

logger = logging.getLogger(__name__)

#: Pixels: where the range of an input of dynamic size ends.
MAX_SIDE = 8192
#: Hint -> its option, and what is said where a model has no use for it.
WITHOUT_EFFECT = {
    "rotated_nms": ("--rotated_nms", "this {} model has no rotated boxes; leave it out"),
    "deformable_attention": ("--deformable_attention", "this {} model has none that could be rewritten; leave it out, or convert from the source"),
    "channel_order": ("--channel_order", "how images come into this {} model is known; leave it out"),
    "placement": ("--placement", "how images come into this {} model is known; leave it out"),
    "pad_rgb": ("--pad_color", "how images come into this {} model is known; leave it out"),
    "rounding": ("--rounding", "how images come into this {} model is known; leave it out"),
    "antialias": ("--antialias", "how images come into this {} model is known; leave it out"),
    "interpolation": ("--interpolation", "how images come into this {} model is known; leave it out"),
    "longest": ("--longest_side", "how images come into this {} model is known; leave it out"),
    "clipped": ("--clip_boxes", "what this {} model does with boxes is known; leave it out"),
    "num_classes": ("--num_classes", "how many classes this {} model has is known; leave it out"),
    "declared": ("--boxes_output, --rows_output and the like", "the outputs of this {} model are known; leave them out, or add --family heads"),
}  # fmt: skip


def specify(reading: Reading, options: Options) -> ModelSpec:
    """The spec of the result: the source's, with the options in place of what they override.

    Raises:
        GraphError: an option contradicts the model.
    """
    found = reading.spec
    refuse_without_effect(reading, options)
    size_hw = found.preprocessing.size_hw
    if options.size_hw and options.size_hw != size_hw:
        raise GraphError(
            f"--size or --input_shape asks for {size_text(options.size_hw)} (height x width), the model was exported for {size_text(size_hw)}; leave the "
            "option out, or export the model again at the other size"
        )
    preprocessing = dataclasses.replace(
        found.preprocessing,
        layout=options.layout,
        dtype=options.input_dtype or found.preprocessing.dtype,
    )
    if options.dynamic_size:
        multiple = reading.size_multiple
        if found.selection != "nms" and not reading.one_by_one:
            raise GraphError(
                f"--input_shape asks for a dynamic size, which goes with EfficientNMS alone; this model ends in {found.selection}: name a size"
            )
        if multiple is None:
            raise GraphError(
                f"--input_shape asks for a dynamic size, the model takes {size_text(size_hw)} (height x width) alone; name that size, or export "
                "the model with dynamic height and width"
            )
        largest = MAX_SIDE // multiple * multiple
        preprocessing = dataclasses.replace(
            preprocessing,
            size_range=((multiple, multiple), (largest, largest)),
            size_multiple=multiple,
            shorter_side=reading.shorter_side,
            own_size=reading.own_size,
        )
    if options.preprocessor:
        mean, std = parse_preprocessor(options.preprocessor)
        pad_rgb = preprocessing.pad_rgb
        if pad_rgb == preprocessing.mean:  # zeros behind the normalisation
            pad_rgb = mean
        preprocessing = dataclasses.replace(preprocessing, mean=mean, std=std, pad_rgb=pad_rgb)
    settings: dict[str, Any] = {
        "score_threshold": options.score_threshold,
        "iou_threshold": options.iou_threshold,
        "max_output_boxes": options.max_detections,
        "class_agnostic": _is_agnostic(found, options) and not _loses_agnostic(found, options),
    }
    given = {name: value for name, value in settings.items() if value is not None}
    labels = fit_labels(options.labels, found.num_classes)
    if labels and len(labels) != found.num_classes:
        raise ValueError(
            f"--labels: expected {found.num_classes} lines, one per class of the model, found {len(labels)}"
        )
    category_ids = COCO_80_IDS if are_coco_80(labels) else found.category_ids
    return found.replace(
        preprocessing=preprocessing,
        evidence=evidence_of(reading, options, category_ids),
        nms=dataclasses.replace(found.nms, **given),
        labels=labels or found.labels,
        category_ids=category_ids,
        rotated_mode=options.hints.rotated_nms or found.rotated_mode,
        choices=choices_of(options) or found.choices,
    )


def choices_of(options: Options) -> dict[str, Any]:
    """What options said of the source, for whoever reads it again; class names stand in the spec
    already.
    """
    said = options.hints.to_dict()
    if options.labels:
        said["labels"] = ()
    return said | ({"family": options.family} if options.family != "auto" else {})


def as_chosen(spec: ModelSpec) -> Options:
    """Options to read the source of a converted model with again: what was said then.

    Raises:
        GraphError: the spec holds something else.
    """
    said = dict(spec.choices)
    family = str(said.pop("family", "auto"))
    labels = spec.labels if "labels" in said else ()
    hints = Hints.from_dict({**said, "labels": labels}, "model spec: choices")
    return Options(family=family, hints=hints, labels=labels, preprocessor=hints.preprocessor)


def evidence_of(
    reading: Reading, options: Options, category_ids: tuple[int, ...]
) -> tuple[Fact, ...]:
    """The facts of a reading, with those that options replaced."""
    given: dict[str, tuple[str, str]] = {}
    if options.max_detections is not None:
        given[KEPT] = (str(options.max_detections), "--max_detections")
    if category_ids != reading.spec.category_ids:
        given[CATEGORY_IDS] = (ids_text(category_ids), "--labels, COCO's names")
    if options.nms_mode != "model":
        former = next((f.value for f in reading.facts if f.name == SELECTION), "")
        _, comma, more = former.partition(", ")  # that boxes are clipped
        given[SELECTION] = (
            f"NMS, {options.nms_mode.replace('_', ' ')}{comma}{more}",
            f"--nms_mode {options.nms_mode}",
        )
    if _loses_agnostic(reading.spec, options):
        given[SELECTION] = ("NMS per class", "--legacy_plugins")
    if options.preprocessor and not any(
        f.name == NORMALISATION and f.origin.startswith(GIVEN) for f in reading.facts
    ):
        given[NORMALISATION] = (options.preprocessor, f"--preprocessor {options.preprocessor}")
    if options.batch is not None and options.batch != reading.batch:
        given[BATCH] = (str(options.batch), "--input_shape")
    return with_options(reading.facts, given)


def refuse_without_effect(reading: Reading, options: Options) -> None:
    """Options that the model has no use for are errors, so that nobody believes they did something.

    Raises:
        GraphError: names the option, and what the model has instead.
    """
    hints, found = options.hints, reading.spec
    for name, (option, why) in WITHOUT_EFFECT.items():
        if getattr(hints, name) is not None and name not in reading.takes:
            raise GraphError(f"{option}: {why.format(found.family)}")
    if hints.resize and hints.resize != found.preprocessing.resize:
        raise GraphError(
            f"--resize_mode {hints.resize}: this {found.family} model was trained with {found.preprocessing.resize}, and its boxes go "
            "with that; leave it out"
        )
    mode = options.nms_mode
    suppressing = {
        "--iou_threshold": "iou_threshold" in options.given,
        f"--nms_mode {mode}": mode in ("per_class", "class_agnostic"),
    }
    for option, asked in suppressing.items():
        if asked and found.selection == "topk":
            raise GraphError(
                f"{option}: this {found.family} model needs no suppression and gets none; leave it out"
            )


def warn_of_nms(found: ModelSpec, options: Options) -> None:
    """Say where the form of NMS that was asked for has no effect, or another one than the model's
    own.
    """
    option = "--legacy_plugins" if options.nms_form == "legacy" else f"--nms {options.nms_form}"
    if found.selection != "nms" and options.nms_form in ("onnx", "graph", "legacy"):
        has = "no NMS"
        if found.selection == "rotated_nms":
            has = "an NMS of rotated boxes, which is of ordinary operators already"
        logger.warning("%s changes nothing: this %s model has %s", option, found.family, has)
    elif _loses_agnostic(found, options):
        logger.warning(
            "BatchedNMS_TRT knows no class-agnostic NMS: boxes of different classes will not suppress each other; "
            "for TensorRT 8 and later leave out --legacy_plugins"
        )


def _is_agnostic(found: ModelSpec, options: Options) -> bool:
    if options.nms_mode == "model":
        return found.nms.class_agnostic
    return options.nms_mode == "class_agnostic"


def _loses_agnostic(found: ModelSpec, options: Options) -> bool:
    """Whether BatchedNMS, which has no such mode, takes the place of a class-agnostic NMS."""
    takes_legacy = options.nms_form == "legacy" and found.selection == "nms"
    return takes_legacy and _is_agnostic(found, options)


def size_text(size_hw: tuple[int, int]) -> str:
    return f"{size_hw[0]}x{size_hw[1]}"
