# SPDX-License-Identifier: Apache-2.0
"""How images come in to a network of `trtdet.families.heads`: given, else by the convention of its
framework, else asked for.
"""

from trtdet.errors import GraphError
from trtdet.families import evidence as ev
from trtdet.families import one_picture
from trtdet.families.base import SAMPLINGS, Hints
from trtdet.families.evidence import Evidence
from trtdet.families.heads_plan import Framework, image_hw
from trtdet.families.pixels import Normal, Pixels
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import Preprocessing

INTERPOLATION_OPTION = (
    "--interpolation linear|cubic; with PaddleDetection, Preprocess in its infer_cfg.yml has all of these: interp 1 is linear, 2 cubic, "
    "mean 0 and std 1 with norm_type none are --preprocessor unit"
)


def as_said(known: Framework, hints: Hints) -> Framework:
    """What is known, with what the command line says of how images and boxes are treated."""
    said = {name: getattr(hints, name) for name in ("rounding", "antialias", "longest", "clipped")}
    changes = {name: value for name, value in said.items() if value is not None}
    if hints.interpolation:
        changes["sampling"] = SAMPLINGS[hints.interpolation]
    if hints.rounding == "none":
        changes["sampling"] = "corner"
    return known.with_changes(**changes)


def has_size(source: OnnxSource) -> bool:
    return image_hw(source) is not None


def note_input(evidence: Evidence, pixels: Pixels, size_hw: tuple[int, int] | None) -> None:
    size = f"{size_hw[0]}x{size_hw[1]}" if size_hw else "of any size"
    evidence.add(ev.INPUT, f"'{pixels.image}' {pixels.image_layout} {size}", "read: its shape")


def note_shorter_side(evidence: Evidence, known: Framework, shorter_side: tuple[int, int]) -> None:
    shorter, longer = shorter_side
    evidence.add(
        ev.RESIZE,
        f"shorter side {shorter}, longer at most {longer}; padded below and right to a multiple of {known.size_multiple}",
        known.origin,
    )


def as_they_are(
    source: OnnxSource, evidence: Evidence, hints: Hints, normal: Normal, size_hw: tuple[int, int]
) -> Preprocessing:
    """Each picture at its own size, for a network that resizes it itself.

    Raises:
        GraphError: options that go with one size.
    """
    if hints.resize or hints.placement or hints.pad_rgb or hints.interpolation:
        raise GraphError(
            f"{source.path}: --resize_mode, --placement, --pad_color and --interpolation go with one size for all pictures, --size H,W; this network takes each at "
            "its own and resizes it itself: name a size, or leave them out"
        )
    evidence.add(ev.RESIZE, "none: each picture at its own size", f"{ev.READ}it resizes inside")
    return one_picture.as_they_are(normal, size_hw)


def preprocessing_of(
    evidence: Evidence,
    hints: Hints,
    known: Framework,
    normal: Normal,
    size_hw: tuple[int, int],
    *,
    clips: bool = False,
) -> Preprocessing:
    """How images come in: given, else by convention, else asked for.

    Args:
        clips: of a model whose boxes may be clipped.
    """
    option = ev.RESIZE_OPTION + (f", {ev.CLIP_OPTION}" if clips else "")
    resize, placement, pad = hints.resize, hints.placement, hints.pad_rgb
    if resize is None and (placement or pad):
        resize = "letterbox"
    mode = "warp" if hints.rounding == "none" else resize
    origin = f"{ev.GIVEN}--resize_mode {mode}"
    if resize is None and known.resize:
        resize, origin = known.resize, known.origin
    if resize is None:
        evidence.ask(ev.RESIZE, option, "stretch")
        resize = "stretch"
    elif resize == "letterbox":
        placement = placement or (known.placement if known.resize else None)
        pad = pad or (known.pad_rgb if known.resize else None)
        if placement is None or pad is None:
            options = [
                o
                for o, v in (("--placement top_left|center", placement), ("--pad_color R,G,B", pad))
                if v is None
            ]
            evidence.ask(ev.RESIZE, " ".join(options), "letterbox, centred on 114")
        else:
            colour = ",".join(f"{x:g}" for x in pad)
            kind = "affine warp" if known.rounding == "none" else "letterbox"
            text = f"{kind}, {placement.replace('_', ' ')} on {colour}"
            evidence.add(ev.RESIZE, text + _how_resized(known), origin)
        placement, pad = placement or "center", pad or (114.0, 114.0, 114.0)
    else:
        evidence.add(ev.RESIZE, "stretch" + _how_resized(known), origin)
    if known.asks_sampling and not hints.interpolation and not known.antialias:
        evidence.ask(ev.INTERPOLATION, INTERPOLATION_OPTION, "cubic")
        known = known.with_changes(sampling="cubic")
    return Preprocessing(
        size_hw,
        dtype="uint8" if known.rounds else "float32",
        mean=normal.mean,
        std=normal.std,
        bgr=normal.bgr,
        resize=resize,
        placement=placement or "top_left",
        pad_rgb=pad or (0.0, 0.0, 0.0),
        rounding=known.rounding,
        antialias=known.antialias,
        sampling=known.sampling,
        longest=known.longest if known.longest and known.longest < min(size_hw) else None,
    )


def _how_resized(known: Framework) -> str:
    """What the table of facts says beside the placement."""
    truncated = known.resize != "stretch" and known.rounding.startswith("floor")
    said = [", its size rounded down"] if truncated else []
    said += [f", its longer side {known.longest}"] if known.longest else []
    said += [", cubic"] if known.sampling == "cubic" else []
    return "".join([*said, ", antialiased" if known.antialias else ""])
