# SPDX-License-Identifier: Apache-2.0
"""A `Comparison` as one HTML page: no request leaves it, it works from a disk, a mail or a CI
artifact.

`data/report.html` is the frame with its style sheet; here are the parts. Every figure of the
summary that the page shows stands in an element with `data-metric`, its key in the summary, and
`data-value`, the number.
"""

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trtdet.detections import Detections
from trtdet.parity import svg
from trtdet.parity.detections import ImageComparison
from trtdet.parity.summary import Check, Comparison, spec_differences
from trtdet.parity.tensors import TensorDifference, worst_first

TEMPLATE = Path(__file__).parents[1] / "data" / "report.html"

#: Longest side of a picture in the page, pixels; two for each of the worst images.
PICTURE_SIDE = 640
#: Points of the score plot: beyond, every so many is left out.
MAX_POINTS = 2000
#: Tensors in the table before "all".
TENSOR_ROWS = 15

AP_ROWS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")


def render(
    comparison: Comparison,
    *,
    labels: Mapping[int, str],
    load: Callable[[Path], NDArray[np.uint8]],
    worst: int,
) -> str:
    """The page.

    Args:
        labels: category id -> name.
        load: reads an image, (h, w, 3) uint8 RGB.
        worst: how many of the images that differ most are shown.
    """
    parts = [
        _head(comparison),
        _limits(comparison.checks),
        _ap(comparison),
        _spec(comparison),
        _plots(comparison, labels),
        _images(comparison.worst_images(worst), labels, load),
        _tensors(comparison),
    ]
    verdict = "within all limits" if comparison.passed else "limits broken"
    title = f"{comparison.candidate.name} against {comparison.reference.name}: {verdict}"
    summary = json.dumps(comparison.to_dict()).replace("<", "\\u003c")  # no </script> within
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title), body="\n".join(parts), summary=summary
    )


def number(value: float | None) -> str:
    """A figure for the reader: four digits."""
    if value is None or not math.isfinite(value):
        return "—"
    return f"{value:.4g}"


def _metric(name: str, value: float | None, text: str | None = None) -> str:
    raw = "" if value is None or not math.isfinite(value) else repr(value)
    return f'<span data-metric="{escape(name)}" data-value="{raw}">{escape(number(value) if text is None else text)}</span>'


def _mark(passed: bool) -> str:
    sign, word = ("✓", "within") if passed else ("✗", "broken")
    return f'<span class="mark {"passed" if passed else "broken"}">{sign}<span class="word"> {word}</span></span>'


def _table(columns: Sequence[str], rows: Sequence[str], numbers: Sequence[int] = ()) -> str:
    """A table that scrolls by itself where the screen is narrow; `numbers`: columns set flush
    right.
    """
    head = "".join(
        f"<th{' class=number' if i in numbers else ''}>{escape(name)}</th>"
        for i, name in enumerate(columns)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _head(comparison: Comparison) -> str:
    d, broken = comparison.detections, comparison.broken
    state = "broken" if broken else "passed"
    if broken:
        headline = f"✗ {len(broken)} of {len(comparison.checks)} limits broken"
        listed = "<ul>" + "".join(map(_broken_line, broken)) + "</ul>"
    else:
        headline, listed = f"✓ Within all {len(comparison.checks)} limits", ""
    counts = {
        "images": len(comparison.images),
        "reference": d.reference,
        "candidate": d.candidate,
        "matched": d.matched,
        "missing": d.missing,
        "extra": d.extra,
        "class_flips": d.class_flips,
    }
    names = {"reference": "in reference", "candidate": "in candidate", "class_flips": "other class"}
    cards = "".join(
        f"<div><b>{_metric(f'detections.{key}' if key != 'images' else key, value, str(value))}</b><span>{names.get(key, key)}</span></div>"
        for key, value in counts.items()
    )
    skipped = ""
    if comparison.skipped:
        skipped = f'<p class="mark broken">{len(comparison.skipped)} images could not be read: {escape(", ".join(comparison.skipped[:5]))}</p>'
    return f"""<header class="verdict {state}"><h1 class="mark" id="verdict">{headline}</h1>{listed}</header>
<dl class="sides">
<dt>Reference</dt><dd><strong>{escape(comparison.reference.name)}</strong> <span class="dim">{escape(comparison.reference.kind)}</span></dd>
<dt>Candidate</dt><dd><strong>{escape(comparison.candidate.name)}</strong> <span class="dim">{escape(comparison.candidate.kind)}</span></dd>
</dl>
<div class="counts">{cards}</div>
<p class="dim">Detections from a score of {comparison.score_threshold:g} on; a pair is of one category and overlaps by an IoU of {comparison.min_iou:g} or more.</p>
{skipped}"""


def _broken_line(check: Check) -> str:
    text, _, option = escape(check.line()).partition(" (--")
    return f"<li>{text} <code>--{option[:-1]}</code></li>" if option else f"<li>{text}</li>"


def _limits(checks: Sequence[Check]) -> str:
    rows = []
    for check in checks:
        bound = "≥" if check.at_least else "≤"
        value = _metric(f"limits.{check.metric}", check.value, check.text(check.value))
        rows.append(
            f'<tr{"" if check.passed else " class=broken"}><td class="name">{escape(check.name)}</td><td class="number">{value}</td>'
            f'<td class="number">{bound} {escape(check.text(check.limit))}</td><td>{_mark(check.passed)}</td><td class="dim"><code>{escape(check.option)}</code></td></tr>'
        )
    table = _table(("", "value", "limit", "", "option"), rows, (1, 2))
    return f'<h2>Limits</h2><div class="limits">{table}</div>'


def _ap(comparison: Comparison) -> str:
    if comparison.ap is None:
        return ""
    reference, candidate = comparison.ap
    rows = []
    for name in AP_ROWS:
        if reference[name] < 0:  # nothing of this size is annotated
            continue
        gap = candidate[name] - reference[name]
        cells = (
            _metric(f"ap.reference.{name}", reference[name], f"{reference[name]:.4f}"),
            _metric(f"ap.candidate.{name}", candidate[name], f"{candidate[name]:.4f}"),
            _metric(f"ap.difference.{name}", gap, f"{gap:+.4f}"),
        )
        rows.append(
            f"<tr><td>{name}</td>" + "".join(f'<td class="number">{c}</td>' for c in cells) + "</tr>"
        )  # fmt: skip
    coverage = (
        f'<p class="dim">AP on {comparison.ap_images} of {len(comparison.images)} images.</p>'
    )
    table = _table(("", "reference", "candidate", "difference"), rows, (1, 2, 3))
    return f"<h2>COCO's metric</h2>{coverage}{table}"


def _spec(comparison: Comparison) -> str:
    rows = [
        f'<tr><td class="name"><code>{escape(name)}</code></td><td>{escape(left)}</td><td>{escape(right)}</td></tr>'
        for name, left, right in spec_differences(
            comparison.reference.spec, comparison.candidate.spec
        )
    ]
    if not rows:
        return ""
    return "<h2>What the models say of themselves</h2>" + _table(
        ("differs", "reference", "candidate"), rows
    )


# ---- plots


def _plots(comparison: Comparison, labels: Mapping[int, str]) -> str:
    scores = np.concatenate([image.score_differences for image in comparison.images])
    boxes = np.concatenate([image.box_differences for image in comparison.images])
    scatter = svg.points(
        _score_points(comparison, labels),
        x_label="score in the reference", y_label="score in the candidate",
        x_range=(0.0, 1.0), y_range=(0.0, 1.0), diagonal=True,
    )  # fmt: skip
    figures = [
        ("Scores", scatter),
        ("Score differences", svg.histogram(scores, x_label="candidate minus reference", y_label="pairs")),
        ("Box differences", svg.histogram(boxes, x_label="largest of a box, pixels of the network input", y_label="pairs")),
    ]  # fmt: skip
    d = comparison.detections
    rows = [
        f'<tr><td>{name}</td><td class="number">{_metric(f"detections.{key}.mean", spread.mean)}</td><td class="number">{_metric(f"detections.{key}.percentile", spread.percentile)}</td>'
        f'<td class="number">{_metric(f"detections.{key}.maximum", spread.maximum)}</td><td class="number">{bias}</td></tr>'
        for name, key, spread, bias in (
            ("score", "score", d.score, _metric("detections.score.bias", d.score.bias, f"{d.score.bias:+.2g}")),
            ("box, pixels", "box", d.box, "—"),
            ("angle, radians", "angle", d.angle, "—"),
        )
        if spread
    ]  # fmt: skip
    table = _table(("pairs differ by", "mean", "95 %", "largest", "bias"), rows, (1, 2, 3, 4))
    drawn = "".join(f"<figure><figcaption>{n}</figcaption>{plot}</figure>" for n, plot in figures)
    return f'<h2>Detections</h2>{_LEGEND}<div class="plots">{drawn}</div>{table}'


_LEGEND = """<ul class="legend"><li style="--swatch:var(--blue)">matched</li><li style="--swatch:var(--missing)">missing in the candidate</li>
<li style="--swatch:var(--extra)">extra in the candidate</li><li style="--swatch:var(--flip)">another class</li></ul>"""


def _score_points(comparison: Comparison, labels: Mapping[int, str]) -> list[svg.Point]:
    """One per pair, and those without a partner on the axes.

    Matched ones are thinned where there are many.
    """
    matched: list[svg.Point] = []
    others: list[svg.Point] = []
    for image in comparison.images:
        r, c, m = image.reference, image.candidate, image.matching
        for kind, pairs in (("point", m.pairs), ("flip", m.flips)):
            for i, j in pairs:
                title = f"{image.path.name}: {_label(labels, r, i)} {r.scores[i]:.3f}, {_label(labels, c, j)} {c.scores[j]:.3f}"
                point = svg.Point(float(r.scores[i]), float(c.scores[j]), kind, title)
                (matched if kind == "point" else others).append(point)
        others += [svg.Point(float(r.scores[i]), 0.0, "missing", f"{image.path.name}: {_label(labels, r, i)} {r.scores[i]:.3f}") for i in m.missing]  # fmt: skip
        others += [svg.Point(0.0, float(c.scores[j]), "extra", f"{image.path.name}: {_label(labels, c, j)} {c.scores[j]:.3f}") for j in m.extra]  # fmt: skip
    step = -(-len(matched) // MAX_POINTS) or 1
    return [*matched[::step], *others[:MAX_POINTS]]


def _label(labels: Mapping[int, str], detections: Detections, index: int) -> str:
    category = int(detections.class_ids[index])
    return labels.get(category, f"category {category}")


# ---- images


def _images(
    images: Sequence[ImageComparison],
    labels: Mapping[int, str],
    load: Callable[[Path], NDArray[np.uint8]],
) -> str:
    shown = "".join(_image(i, image, labels, load) for i, image in enumerate(images))
    count = len(images)
    heading = f"The {count} images that differ most" if count > 1 else "The image"
    return f"""<h2>{heading}</h2>
<p class="dim">Worst first. Point at a box for its class and score.</p>
<label class="toggle"><input type="checkbox" id="only-differences"> hide boxes that match</label>{_LEGEND}
<div class="images">{shown}</div>"""


def _image(
    rank: int,
    image: ImageComparison,
    labels: Mapping[int, str],
    load: Callable[[Path], NDArray[np.uint8]],
) -> str:
    pixels = load(image.path)
    height, width = pixels.shape[:2]
    data = _jpeg(pixels)
    facts = image.to_dict()
    counts = ", ".join(f"{facts[key]} {key.replace('_', ' ')}" for key in ("missing", "extra", "class_flips") if facts[key])  # fmt: skip
    text = f"{counts or 'all matched'}; scores differ by up to {_metric(f'worst_images.{rank}.max_score_diff', facts['max_score_diff'])}, boxes by {_metric(f'worst_images.{rank}.max_box_diff', facts['max_box_diff'])} px"
    m = image.matching
    sides = (
        ("reference", image.reference, {"matched": m.pairs[:, 0], "flip": m.flips[:, 0], "missing": m.missing}),
        ("candidate", image.candidate, {"matched": m.pairs[:, 1], "flip": m.flips[:, 1], "extra": m.extra}),
    )  # fmt: skip
    figures = []
    for name, detections, kinds in sides:
        boxes = "".join(
            _box(detections, int(i), css, labels, max(width, height) / 24)
            for css, indices in kinds.items()
            for i in indices
        )
        figures.append(
            f'<figure><figcaption>{name}</figcaption><div class="picture"><img alt="{escape(image.path.name)}, {name}" src="{data}" width="{width}" height="{height}">'
            f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{boxes}</svg></div></figure>'
        )
    shape = "landscape" if width > height else "portrait"
    return f'<section class="image"><h3>{escape(image.path.name)}</h3><p class="dim">{text}</p><div class="sides2 {shape}">{"".join(figures)}</div></section>'


def _box(
    detections: Detections, index: int, css: str, labels: Mapping[int, str], font_size: float
) -> str:
    """A rectangle, rotated where boxes are; one without a partner says what it is, the others
    when pointed at.
    """
    x1, y1, x2, y2 = (float(x) for x in detections.boxes_xyxy[index])
    text = escape(f"{_label(labels, detections, index)} {detections.scores[index]:.2f}")
    turn = ""
    if detections.angles is not None:
        degrees = math.degrees(detections.angles[index])
        turn = f' transform="rotate({degrees:.2f} {(x1 + x2) / 2:.1f} {(y1 + y2) / 2:.1f})"'
    shape = f'<rect class="{css}"{turn} x="{x1:.1f}" y="{y1:.1f}" width="{max(0.0, x2 - x1):.1f}" height="{max(0.0, y2 - y1):.1f}"><title>{text}</title></rect>'
    if css == "matched":
        return shape
    baseline = y1 - font_size / 4 if y1 > 1.5 * font_size else y1 + font_size
    return f'{shape}<text class="{css}" x="{x1 + font_size / 5:.1f}" y="{baseline:.1f}" font-size="{font_size:.1f}">{text}</text>'


def _jpeg(pixels: NDArray[np.uint8]) -> str:
    """A data URL of an image, made smaller where it is large."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# ---- tensors


def _tensors(comparison: Comparison) -> str:
    tensors = comparison.tensors
    if not tensors:
        return '<h2>Tensors</h2><p class="dim">Not compared: one of the two is an engine, the graphs share no names, or --tensor_images is 0.</p>'
    columns = ("tensor", "max", "mean", "cosine", "SQNR, dB", "not finite")
    ranked = worst_first(tensors)
    first = [t for t in ranked if not t.equal][:TENSOR_ROWS]
    shown = {t.name for t in first}
    rest = [t for t in ranked if t.name not in shown]
    equal = sum(t.equal for t in tensors)
    body = _sqnr_plot(tensors) if first else ""
    if first:
        body += _table(columns, [_tensor_row(t) for t in first], (1, 2, 3, 4, 5))
    if rest:
        table = _table(columns, [_tensor_row(t) for t in rest], (1, 2, 3, 4, 5))
        body += f"<details><summary>the other {len(rest)}, {equal} of them equal</summary>{table}</details>"
    return f"""<h2>Tensors</h2>
<p class="dim">{len(tensors)} of the same name, on {comparison.tensor_images} images, {equal} equal to the last bit; worst first, heads in bold.
The limit applies to the heads. Channels that an INT8 model rescales on purpose are scaled back before they are compared.</p>
<div class="tensors">{body}</div>"""


def _sqnr_plot(tensors: Sequence[TensorDifference]) -> str:
    """SQNR in the order of the network: where it gets lost."""
    drawn = [
        svg.Point(float(i), t.sqnr_db, "head" if t.head else "point", f"{t.name}: {t.sqnr_db:.1f} dB")
        for i, t in enumerate(tensors)
        if math.isfinite(t.sqnr_db)  # equal ones are infinite
    ]  # fmt: skip
    if len(drawn) < 3:
        return ""
    low = min(0.0, *(point.y for point in drawn))
    plot = svg.points(
        drawn,
        x_label="tensor, from the input to the heads", y_label="SQNR, dB",
        x_range=(0.0, float(max(1, len(tensors) - 1))), y_range=(low, max(point.y for point in drawn) * 1.05 + 1e-9),
    )  # fmt: skip
    return f'<div class="plots one"><figure><figcaption>Signal to difference, through the network</figcaption>{plot}</figure></div>'


def _tensor_row(tensor: TensorDifference) -> str:
    name = escape(tensor.name)
    if tensor.shapes:
        left, right = tensor.shapes
        return f'<tr class="broken"><td class="name"><strong>{name}</strong></td><td colspan="5">shapes {left} and {right}</td></tr>'
    cells = {
        "max": tensor.maximum,
        "mean": tensor.mean,
        "cosine": tensor.cosine,
        "sqnr_db": tensor.sqnr_db,
        "non_finite": float(tensor.non_finite),
    }
    texts = {"cosine": f"{tensor.cosine:.6f}", "sqnr_db": "equal" if tensor.equal else f"{tensor.sqnr_db:.1f}", "non_finite": str(tensor.non_finite)}  # fmt: skip
    row = "".join(
        f'<td class="number">{_metric(f"tensors.{tensor.name}.{key}", value, texts.get(key))}</td>'
        for key, value in cells.items()
    )
    label = f"<strong>{name}</strong>" if tensor.head else name
    return (
        f'<tr{" class=broken" if tensor.non_finite else ""}><td class="name">{label}</td>{row}</tr>'
    )
