# SPDX-License-Identifier: Apache-2.0
"""Where every fact about a model comes from: read, measured, given by an option, or the convention
of a recognised family.

A family collects its facts in an `Evidence`. A fact that nothing says is asked for: all that are
missing are named in one error, each with its choices and its option. `--assume` takes the usual
choice instead, and says so.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from trtdet.errors import GraphError
from trtdet.labels import COCO_80_IDS
from trtdet.spec import Fact

logger = logging.getLogger(__name__)

#: Names of the facts, in the order of the table.
FAMILY, INPUT, NORMALISATION, RESIZE = "family", "input", "normalisation", "resize"
CHANNELS, INTERPOLATION = "channel order", "interpolation"
BATCH, BOXES, SCORES, BACKGROUND = "batch", "boxes", "scores", "background class"
CLASSES, CATEGORY_IDS, SELECTION, KEPT = "classes", "category ids", "selection", "detections kept"
#: Every reading has one of each.
FACTS = (FAMILY, INPUT, NORMALISATION, RESIZE, BATCH, BOXES, SCORES, BACKGROUND, CLASSES, CATEGORY_IDS, SELECTION, KEPT)  # fmt: skip

#: Words that an origin starts with.
READ, MEASURED, GIVEN, CONVENTION, ASSUMED, CHOSEN = (
    "read: ",
    "measured: ",
    "given: ",
    "convention: ",
    "ASSUMED: ",
    "default: ",
)
#: What says how pictures are placed; and whether boxes are clipped to them.
CLIP_OPTION = "--clip_boxes where boxes are clipped to the picture before the NMS"
RESIZE_OPTION = (
    "--resize_mode stretch, or warp, or letterbox with --placement top_left|center and --pad_color R,G,B (where its framework does so, also "
    "--rounding floor, --longest_side, --antialias, --interpolation cubic)"
)


@dataclass
class Evidence:
    """The facts of one model, as they are found.

    Attributes:
        subject: what errors start with: the file, or the family.
        assume: take the usual choice for what nothing says.
    """

    subject: str
    assume: bool = False
    facts: list[Fact] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def add(self, name: str, value: object, origin: str) -> None:
        """Note a fact; a later one of the same name replaces it."""
        self.facts = [fact for fact in self.facts if fact.name != name]
        self.facts.append(Fact(name, str(value), origin))
        logger.debug("%s: %s (%s)", name, value, origin)

    def ask(self, name: str, option: str, usual: object) -> None:
        """Nothing says this fact.

        Args:
            option: what to give, with its choices.
            usual: what `assume` takes.
        """
        if self.assume:
            self.add(name, usual, f"{ASSUMED}--assume; nothing in the file says it")
            logger.warning(
                "%s: nothing in the file says it; %s is ASSUMED (--assume). %s says it", name, usual, option
            )  # fmt: skip
        else:
            self.missing.append(f"{name}: {option}")

    def settle(self) -> tuple[Fact, ...]:
        """All facts, in the order of the table.

        Raises:
            GraphError: some are missing; names the options that say them.
        """
        if self.missing:
            raise GraphError(
                f"{self.subject}: nothing in the file says {_listed(text.split(':')[0] for text in self.missing)}; give "
                + ", and ".join(text.partition(": ")[2] for text in self.missing)
                + " (--assume takes the usual choice unseen)"
            )
        rank = {name: position for position, name in enumerate(FACTS)}
        return tuple(sorted(self.facts, key=lambda fact: rank.get(fact.name, len(rank))))


def table(facts: Iterable[Fact]) -> str:
    """One line per fact: name, value, origin."""
    rows = [("fact", "value", "origin"), *((f.name, f.value, f.origin) for f in facts)]
    widths = [min(60, max(len(row[i]) for row in rows)) for i in range(2)]
    return "\n".join(
        f"{name:<{widths[0]}}  {value:<{widths[1]}}  {origin}" for name, value, origin in rows
    )


def ids_text(ids: Sequence[int]) -> str:
    """Category ids, as the table of facts shows them."""
    if tuple(ids) == COCO_80_IDS:
        return "COCO's 80"
    return f"{ids[0]}..{ids[-1]}" if ids else "none"


def with_options(facts: Iterable[Fact], given: dict[str, tuple[str, str]]) -> tuple[Fact, ...]:
    """The facts, with what options replaced: name -> (value, option)."""
    return tuple(
        Fact(f.name, given[f.name][0], GIVEN + given[f.name][1]) if f.name in given else f
        for f in facts
    )


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
