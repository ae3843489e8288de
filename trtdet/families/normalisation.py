# SPDX-License-Identifier: Apache-2.0
"""The normalisation of an ONNX export's images: given, measured inside the file, or by convention.

What the file has inside is part of the file, and is never applied twice; where it has nothing, an
option or the convention of a recognised family says it, or it is asked for.
"""

from dataclasses import dataclass, field

from trtdet.errors import GraphError
from trtdet.families.base import Hints
from trtdet.families.evidence import (
    CHANNELS,
    CONVENTION,
    GIVEN,
    MEASURED,
    NORMALISATION,
    Evidence,
)
from trtdet.families.pixels import Normal, Pixels
from trtdet.spec import PREPROCESSORS, parse_preprocessor

PREPROCESSOR_OPTION = f"--preprocessor {'|'.join(sorted(PREPROCESSORS))} or R,G,B/R,G,B, mean and deviation (with --channel_order bgr for a network that takes BGR)"


@dataclass(frozen=True)
class Convention:
    """What a recognised family does with images, unless the file or an option says otherwise."""

    of: str  # the family, for the origin
    normal: Normal = field(default_factory=lambda: Normal((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)))
    is_known: bool = True  # its normalisation


def decide_normalisation(
    evidence: Evidence, pixels: Pixels, hints: Hints, convention: Convention | None
) -> Normal:
    """The normalisation, given, measured, or by convention; asked for where nothing says it.

    Returns:
        What is to be put before `pixels.tensor`: where the normalisation is kept inside, only the
            scale of the input.
    """
    bgr = hints.channel_order == "bgr"
    if hints.preprocessor and not pixels.kept:
        mean, std = parse_preprocessor(hints.preprocessor)
        order = bgr if hints.channel_order else bool(convention and convention.normal.bgr)
        normal = Normal(mean, std, order)
        option = f"--preprocessor {hints.preprocessor}" + (" --channel_order bgr" if bgr else "")
        evidence.add(NORMALISATION, normal, GIVEN + option)
        return normal
    if hints.preprocessor:
        raise GraphError(
            f"{evidence.subject}: --preprocessor: the network normalises by itself ({pixels.inside}) and reads its input elsewhere too, so that "
            "cannot be replaced; leave it out"
        )
    if pixels.inside:
        return _inside(evidence, pixels, hints, convention)
    if convention and convention.is_known:
        normal = convention.normal
        if hints.channel_order:
            normal = Normal(normal.mean, normal.std, bgr)
        evidence.add(
            NORMALISATION, normal, f"{CONVENTION}{convention.of}; the file has none inside"
        )
        return normal
    usual = Normal((0.0, 0.0, 0.0), (255.0, 255.0, 255.0), bgr)
    evidence.ask(NORMALISATION, PREPROCESSOR_OPTION, usual)
    return usual


def _inside(
    evidence: Evidence, pixels: Pixels, hints: Hints, convention: Convention | None
) -> Normal:
    """What the network does by itself.

    Its input takes RGB or BGR: an option, the order of the mean, or the family says which.
    """
    inside = pixels.inside or Normal((0.0,) * 3, (1.0,) * 3)
    how = "flat images at the first convolution"
    if hints.channel_order:
        takes_bgr = hints.channel_order == "bgr"
        how += f", --channel_order {hints.channel_order}"
    elif len(set(inside.mean)) > 1 and not (inside.bgr and convention is None):
        # With a swap of channels inside, either the mean is of the channels behind it, or it is
        # misplaced, as super-gradients does for PP-YOLOE; only a known framework tells. Red is the
        # brightest channel of photographs, in every data set.
        takes_bgr = inside.mean[0] < inside.mean[2]
        how += ", channel order by the mean"
    else:
        takes_bgr = False
        if convention is None:
            evidence.ask(CHANNELS, "--channel_order rgb|bgr", "rgb")
    mean, std = (x[::-1] if takes_bgr else x for x in (inside.mean, inside.std))
    normal = Normal(mean, std, inside.bgr != takes_bgr)
    evidence.add(NORMALISATION, f"{normal}, in the network", MEASURED + how)
    if pixels.kept:
        scale = 255.0 if pixels.unit == 255.0 else 1.0
        return Normal((0.0, 0.0, 0.0), (scale, scale, scale), takes_bgr)
    return normal
