# SPDX-License-Identifier: Apache-2.0
"""A page to look at: every image with its detections, and beside the truth where there are
annotations. One HTML file, no network.
"""

import base64
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from trtdet import files
from trtdet.detections import Detections
from trtdet.geometry import box_iou
from trtdet.images.files import ImageArray, load_image
from trtdet.labels import label_of
from trtdet.machine import available_cores

TEMPLATE = Path(__file__).parents[1] / "data" / "gallery.html"
#: Longest side of a thumbnail, and of a picture that is embedded; and their JPEG quality.
THUMBNAIL, FULL = 320, 1600
QUALITY = 78
#: Score from which the page shows detections at first.
FIRST_SCORE = 0.3
#: Overlap from which a detection matches an object.
MATCH_IOU = 0.5
#: Kinds of a box, as the page has them.
PLAIN, MATCHED, FALSE, OBJECT = range(4)


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        truth: what is annotated in it, crowds left aside; None: there are no annotations.
    """

    path: Path
    name: str
    detections: Detections
    truth: Detections | None = None


@dataclass(frozen=True)
class Page:
    """What the page says besides its images.

    Attributes:
        about: what made it.
        labels: [class_id] -> name.
        metrics: COCO's, of an evaluation.
        by_class: class_id -> AP, AP50.
        curve: precision at recall 0, 0.01, ..., 1, at an IoU of 0.5.
    """

    title: str
    about: str
    labels: Sequence[str] | Mapping[int, str] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    by_class: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    curve: Sequence[float] = ()


def write_gallery(report: Path, items: Sequence[Item], page: Page, *, embed: bool = False) -> None:
    """Write the page.

    Args:
        embed: put the pictures in at up to `FULL` pixels; else they are links to the files,
            relative to the page.

    Raises:
        OSError: it cannot be written.
    """
    files.write_text(report, render(report, items, page, embed=embed))


def render(report: Path, items: Sequence[Item], page: Page, *, embed: bool = False) -> str:
    """The page as text."""
    with ThreadPoolExecutor(available_cores()) as pool:
        pictures = list(pool.map(lambda item: _pictures(item.path, embed), items))
    cards, embedded, records = [], [], []
    used: set[int] = set()
    for number, (item, (thumb, full, size)) in enumerate(zip(items, pictures, strict=True)):
        boxes = list(_boxes(item))
        used.update(box[5] for box in boxes)
        link = _link(item.path, report)
        records.append({"name": item.name, "size": size, "link": link, "boxes": boxes})
        name = escape(item.name)
        cards.append(
            f'<button class="card" data-i="{number}" title="{name}"><span class="pic"><span class="frame"><img alt="{name}" width="{size[0]}" height="{size[1]}" '
            f'loading="lazy" decoding="async" src="{thumb}"><svg preserveAspectRatio="none"></svg></span></span><p><span class="name">{name}</span><span class="count"></span></p></button>'
        )
        if full:
            embedded.append(f'<script type="text/plain" id="full-{number}">{full}</script>')
    evaluated = any(item.truth is not None for item in items)
    data = {
        "evaluated": evaluated,
        "classes": [label_of(page.labels, i) for i in range(max(used, default=-1) + 1)],
        "used": sorted(used),
        "images": records,
    }
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(page.title),
        about=escape(page.about),
        head=_head(page) if evaluated else "",
        sorts=_sorts(evaluated),
        threshold=FIRST_SCORE,
        cards="".join(cards),
        embedded="".join(embedded),
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),  # no </script> within
    )


def _sorts(evaluated: bool) -> str:
    names = {"worst": "worst first"} if evaluated else {}
    names |= {"name": "name", "most": "most detections", "fewest": "fewest detections"}
    return "".join(f'<option value="{key}">{text}</option>' for key, text in names.items())


def _pictures(path: Path, embed: bool) -> tuple[str, str, tuple[int, int]]:
    """Data URLs of a thumbnail and, with `embed`, of the picture; and its width and height."""
    pixels = load_image(path)
    size = (pixels.shape[1], pixels.shape[0])
    return _jpeg(pixels, THUMBNAIL), _jpeg(pixels, FULL) if embed else "", size


def _jpeg(pixels: ImageArray, side: int) -> str:
    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _link(path: Path, report: Path) -> str:
    """The picture as seen from the page; by its whole path where the two have no folder in
    common (drives of Windows).
    """
    try:
        return quote(
            Path(
                os.path.relpath(os.path.realpath(path), Path(os.path.realpath(report)).parent)
            ).as_posix()
        )
    except ValueError:
        return Path(os.path.realpath(path)).as_uri()


# ---- boxes


def _boxes(item: Item) -> Iterator[list[Any]]:
    """[x1, y1, x2, y2, score, class, kind, degrees] of detections and objects, the best last:
    they lie on top.
    """
    found = item.detections
    if item.truth is None:
        kinds, of_objects = np.full(len(found), PLAIN), np.zeros(0)
    else:
        kinds, of_objects = match_objects(found, item.truth)
    for i in np.argsort(found.scores, kind="stable"):
        yield _box(found, int(i), float(found.scores[i]), int(kinds[i]))
    for i, score in enumerate(of_objects):
        assert item.truth is not None
        yield _box(item.truth, i, float(score), OBJECT)


def _box(detections: Detections, i: int, score: float, kind: int) -> list[Any]:
    corners = [round(float(x), 1) for x in detections.boxes_xyxy[i]]
    angle = 0.0 if detections.angles is None else math.degrees(float(detections.angles[i]))
    tail = [round(angle, 1)] if angle else []
    return [*corners, round(score, 3), int(detections.class_ids[i]), kind, *tail]


def match_objects(
    found: Detections, truth: Detections, min_iou: float = MATCH_IOU
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Which detections are right, as COCO's metric sees it at one IoU: the best first, each takes
    the object of its class that it overlaps most.

    Returns:
        Per detection `MATCHED` or `FALSE`; per object the score of the detection that it has, -1
        without one. A higher threshold only takes detections away from the end, so both hold for
        every threshold. Rotated boxes are matched by the upright boxes that they have before they
        are rotated.
    """
    kinds = np.full(len(found), FALSE)
    scores = np.full(len(truth), -1.0)
    iou = box_iou(found.boxes_xyxy, truth.boxes_xyxy)
    same = found.class_ids[:, None] == truth.class_ids[None]
    for i in np.argsort(-found.scores, kind="stable"):
        free = np.where(same[i] & (scores < 0), iou[i], 0.0)
        if len(free) and free.max() >= min_iou:
            kinds[i] = MATCHED
            scores[int(free.argmax())] = found.scores[i]
    return kinds, scores


# ---- figures of an evaluation


def _head(page: Page) -> str:
    legend = '<ul class="legend"><li style="--swatch:var(--matched)">matched</li><li style="--swatch:var(--false)">false</li><li style="--swatch:var(--missed)">missed</li></ul>'
    shown = [(name, value) for name, value in page.metrics.items() if value >= 0]
    metrics = _table(("", ""), ((name, f"{value:.4f}") for name, value in shown))
    classes = sorted(page.by_class.items(), key=lambda item: item[1][0])
    rows = ((label_of(page.labels, i), f"{ap:.4f}", f"{ap50:.4f}") for i, (ap, ap50) in classes)
    by_class = _table(("class, worst first", "AP", "AP50"), rows)
    return f'{legend}<details open><summary>AP</summary><div class="figures"><div>{metrics}</div><div class="wide">{by_class}</div>{_curve(page.curve)}</div></details>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def cells(tag: str, texts: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=number' if i else ''}>{escape(text)}</{tag}>" for i, text in enumerate(texts))  # fmt: skip

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', head)}</tr>{body}</table>"


def _curve(precision: Sequence[float]) -> str:
    """Precision over recall, as an SVG of 420 x 300."""
    if not len(precision):
        return ""
    left, top, width, height = 46, 12, 360, 240
    points = " ".join(f"{left + width * i / (len(precision) - 1):.1f},{top + height * (1 - p):.1f}" for i, p in enumerate(precision))  # fmt: skip
    ticks = "".join(
        f'<text x="{left + width * t:.0f}" y="{top + height + 18}" text-anchor="middle">{t:g}</text>'
        f'<text x="{left - 8}" y="{top + height * (1 - t) + 4:.0f}" text-anchor="end">{t:g}</text>'
        for t in (0, 0.25, 0.5, 0.75, 1)
    )
    return (
        f'<svg class="curve" viewBox="0 0 420 300" role="img" aria-label="precision over recall at an IoU of 0.5"><rect class="axis" x="{left}" y="{top}" width="{width}" height="{height}"/>'
        f'<polyline class="line" points="{points}"/>{ticks}<text x="{left + width / 2}" y="{top + height + 40}" text-anchor="middle">recall, precision upwards, IoU 0.5</text></svg>'
    )
