# SPDX-License-Identifier: Apache-2.0
"""Small plots as SVG text, for a page that needs no library: points, and a histogram.

Colours and fonts are the page's style sheet's.

CSS classes: `plot` the figure, `grid` and `axis` its lines, `tick` and `label` its texts, `bar` of
a histogram; points have a class of their own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import ArrayLike

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 46

#: Of the tick distances, in units of a power of ten.
_STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    css: str = "point"
    title: str = ""  # shown when pointed at


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    span = high - low
    if not span > 0:
        return [low]
    power = 10 ** math.floor(math.log10(span / count))
    step = next(s * power for s in _STEPS if s * power * count >= span * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def points(
    data: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    diagonal: bool = False,
) -> str:
    """A scatter plot; `diagonal` draws y = x."""
    to_x, to_y = _scales(x_range, y_range)
    marks = []
    if diagonal:
        ends = (max(x_range[0], y_range[0]), min(x_range[1], y_range[1]))
        line = " ".join(f"{to_x(v):.1f},{to_y(v):.1f}" for v in ends)
        marks.append(f'<polyline class="axis dashed" points="{line}"/>')
    for point in data:
        title = f"<title>{escape(point.title)}</title>" if point.title else ""
        marks.append(
            f'<circle class="{point.css}" cx="{to_x(point.x):.1f}" cy="{to_y(point.y):.1f}" r="3.5">{title}</circle>'
        )
    return _figure(marks, x_label, y_label, x_range, y_range)


def histogram(values: ArrayLike, *, x_label: str, y_label: str, bins: int = 31) -> str:
    """How often values of which size occur; whole bins, zero on an edge or in the middle of one."""
    numbers = np.asarray(values, np.float64)
    low, high = float(numbers.min(initial=0)), float(numbers.max(initial=0))
    if low < 0:
        high = max(-low, high)
        low = -high
    high = high or 1.0
    low = -high if low < 0 else 0.0
    counts, edges = np.histogram(numbers, bins, (low, high))
    top = max(1, int(counts.max()))
    x_range, y_range = (low, high), (0.0, top * 1.05)
    to_x, to_y = _scales(x_range, y_range)
    marks = []
    for count, left, right in zip(counts, edges, edges[1:], strict=False):
        if count:
            x, y = to_x(left), to_y(count)
            title = f"<title>{left:.3g} to {right:.3g}: {count}</title>"
            marks.append(
                f'<rect class="bar" x="{x + 0.5:.1f}" y="{y:.1f}" width="{to_x(right) - x - 1:.1f}" '
                f'height="{to_y(0) - y:.1f}">{title}</rect>'
            )
    return _figure(marks, x_label, y_label, x_range, y_range, whole_y=True)


Scale = Callable[[float], float]


def _scales(x_range: tuple[float, float], y_range: tuple[float, float]) -> tuple[Scale, Scale]:
    """From data to picture coordinates."""
    (x0, x1), (y0, y1) = x_range, y_range
    per_x, per_y = (WIDTH - LEFT - RIGHT) / (x1 - x0), (HEIGHT - TOP - BOTTOM) / (y1 - y0)
    return lambda x: LEFT + (x - x0) * per_x, lambda y: HEIGHT - BOTTOM - (y - y0) * per_y


def _figure(
    marks: Sequence[str],
    x_label: str,
    y_label: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    *,
    whole_y: bool = False,
) -> str:
    to_x, to_y = _scales(x_range, y_range)
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} over {escape(x_label)}">']  # fmt: skip
    for value in ticks(*y_range):
        if whole_y and value != round(value):
            continue
        y = to_y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{y + 4:.1f}">{value:.4g}</text>')  # fmt: skip
    for value in ticks(*x_range):
        x = to_x(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{bottom + 16}">{value:.4g}</text>')  # fmt: skip
    parts.append(f'<polyline class="axis" points="{LEFT},{TOP} {LEFT},{bottom} {right},{bottom}"/>')
    parts += marks
    middle_x, middle_y = (LEFT + right) / 2, (TOP + bottom) / 2
    parts.append(f'<text class="label" text-anchor="middle" x="{middle_x:.0f}" y="{HEIGHT - 8}">{escape(x_label)}</text>')  # fmt: skip
    parts.append(f'<text class="label" text-anchor="middle" transform="translate(14 {middle_y:.0f}) rotate(-90)">{escape(y_label)}</text>')  # fmt: skip
    return "".join([*parts, "</svg>"])
