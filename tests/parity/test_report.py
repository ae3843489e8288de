# SPDX-License-Identifier: Apache-2.0
"""The page of compare.py --report: its figures, and how it looks in a real Chromium, on a phone
and on a desk.
"""

import json
import re
from pathlib import Path
from typing import Any

import chromium
import numpy as np
import onnx
import pytest
from conftest import EXAMPLES
from onnx import numpy_helper

from trtdet.commands import compare
from trtdet.parity import svg
from trtdet.spec import ModelSpec

WIDTHS = (390, 1440)
#: How many of the worst images the page has here.
WORST = 4


@pytest.fixture(scope="module")
def report(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page about a model with larger anchors and two classes swapped: something of everything.

    The summary lies beside it.
    """
    folder = tmp_path_factory.mktemp("report")
    model = onnx.load(tiny_onnx)
    anchors = next(t for t in model.graph.initializer if t.name == "nms/anchors")
    values = numpy_helper.to_array(anchors) * np.float32([1, 1, 1.4, 1.4])
    anchors.CopyFrom(numpy_helper.from_array(values, anchors.name))
    spec = ModelSpec.from_onnx(model)
    spec.replace(category_ids=(1, 3, 2), labels=("<b>circle", "a & b", "x")).attach(model)
    onnx.save(model, folder / "faulty.onnx")
    arguments = ["--reference", tiny_onnx, "--candidate", folder / "faulty.onnx", "--input", EXAMPLES / "images"]  # fmt: skip
    arguments += ["--annotations", EXAMPLES / "annotations.json", "--tensor_images", 1, "--worst", WORST]  # fmt: skip
    arguments += ["--report", folder / "page.html", "--json", folder / "summary.json"]
    assert compare.main([str(a) for a in arguments]) == 1
    return folder / "page.html"


@pytest.fixture(scope="module")
def summary(report: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((report.parent / "summary.json").read_text())
    return data


def look_up(summary: dict[str, Any], metric: str) -> float | None:
    """The figure of the summary that an element with `data-metric` shows."""
    kind, _, rest = metric.partition(".")
    if kind == "limits":
        return next(c["value"] for c in summary["limits"] if c["metric"] == rest)
    if kind == "tensors":
        name, _, key = rest.rpartition(".")
        return next(t[key] for t in summary["tensors"] if t["name"] == name)
    value: Any = summary
    for key in metric.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value  # type: ignore[no-any-return]


@pytest.mark.parametrize("width", WIDTHS)
def test_page_fits_and_every_picture_is_there(
    page: chromium.Page, report: Path, summary: dict[str, Any], width: int
) -> None:
    page.open(report, width=width)
    assert page.js("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    # Nothing sticks out either, but inside the tables that scroll by themselves.
    outside = """[...document.querySelectorAll("body *")].filter(e => !e.closest(".wide") && !e.closest("svg")
                 && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
    assert page.js(outside) == []
    images = page.js(
        "[...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width])"
    )
    assert len(images) == 2 * WORST
    assert all(done and natural > 50 and 100 < shown < width for done, natural, shown in images)
    boxes = page.js("document.querySelectorAll('.picture rect').length")
    worst = summary["worst_images"][:WORST]
    wanted = sum(2 * (i["matched"] + i["class_flips"]) + i["missing"] + i["extra"] for i in worst)
    assert boxes == wanted > 0
    assert page.requests == [report.resolve().as_uri()]  # nothing but the file itself


def test_reference_and_candidate_stand_as_the_screen_allows(page: chromium.Page, report: Path) -> None:  # fmt: skip
    """Landscape pictures: side by side on a desk, one above the other on a phone.

    Limits: the verdict is seen without scrolling.
    """
    tops = "[...document.querySelectorAll('.sides2.landscape')].map(s => [...s.querySelectorAll('img')].map(i => Math.round(i.getBoundingClientRect().top)))"
    marks = "Math.max(...[...document.querySelectorAll('.limits .mark')].map(m => m.getBoundingClientRect().right))"
    page.open(report, width=1440)
    assert all(left == right for left, right in page.js(tops))
    page.open(report, width=390)
    assert all(left < right for left, right in page.js(tops))
    assert page.js(marks) < 390


def test_figures_on_the_page_are_those_of_the_summary(
    page: chromium.Page, report: Path, summary: dict[str, Any]
) -> None:
    page.open(report, width=1440)
    assert page.js("JSON.parse(document.getElementById('summary').textContent)") == summary
    shown = page.js("[...document.querySelectorAll('[data-metric]')].map(e => [e.dataset.metric, e.dataset.value, e.textContent])")  # fmt: skip
    names = [name for name, _, _ in shown]
    assert {"images", "detections.class_flips", "limits.ap_drop", "ap.difference.AP", "detections.box.percentile"} <= {*names}  # fmt: skip
    assert sum(name.startswith("tensors.") for name in names) == 5 * len(summary["tensors"])
    for name, value, text in shown:
        want = look_up(summary, name)
        assert value == ("" if want is None else repr(float(want)) if "." in value else repr(int(want))), name  # fmt: skip
        digits = re.match(r"[-+]?[\d.]+(e[-+]?\d+)?", text)
        if want is not None and digits:
            percent = 100 if text.endswith("%") else 1
            rel = 0.06 if name.endswith(".bias") else 2e-3  # two digits, or four
            assert float(digits[0]) == pytest.approx(want * percent, rel=rel, abs=6e-4), name
    headline = page.js("document.getElementById('verdict').textContent")
    failed = sum(not c["passed"] for c in summary["limits"])
    assert headline == f"✗ {failed} of {len(summary['limits'])} limits broken"
    assert page.js("document.querySelectorAll('.limits tr.broken').length") == failed


def test_boxes_that_match_can_be_hidden(page: chromium.Page, report: Path) -> None:
    page.open(report, width=1440)
    seen = "[...document.querySelectorAll('.picture rect.{}')].filter(r => getComputedStyle(r).display != 'none').length"
    before = page.js(seen.format("flip"))
    assert page.js(seen.format("matched")) > 0 and before > 0
    page.js("document.getElementById('only-differences').click()")
    assert (page.js(seen.format("matched")), page.js(seen.format("flip"))) == (0, before)


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_in_both_colour_schemes(page: chromium.Page, report: Path, dark: bool) -> None:  # fmt: skip
    """Contrast of 4.5 to 1 (WCAG AA) of text, plots included, with the paper."""
    page.open(report, width=1440, dark=dark)
    style = "getComputedStyle(document.querySelector({!r})).{}"
    paper = page.js(style.format("body", "backgroundColor"))
    assert luminance(paper) < 0.05 if dark else luminance(paper) > 0.9
    for selector, prop in (("body", "color"), (".dim", "color"), ("th", "color"), (".plot .tick", "fill"), (".plot .label", "fill"), ("td .mark", "color")):  # fmt: skip
        assert contrast(page.js(style.format(selector, prop)), paper) >= 4.5, selector


def luminance(color: str) -> float:
    """Of "rgb(1, 2, 3)". Source: WCAG 2.1, relative luminance."""
    values = [int(x) / 255 for x in re.findall(r"\d+", color)[:3]]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in values)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


# ---- without a browser


def test_page_is_self_contained_and_escapes_what_models_say(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", text)
    assert not re.search(r"url\(|@import|https?://", text)
    assert len(re.findall(r'src="data:image/jpeg;base64,', text)) == 2 * WORST
    body = text[text.index("<body>") : text.index('id="summary"')]
    assert "category_ids" in body and "(1, 3, 2)" in body  # what the models disagree on
    assert "<b>circle" not in body
    assert len(text) < 1_000_000


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-0.05, 0.05, [-0.04, -0.02, 0, 0.02, 0.04]),
        (0, 52, [0, 20, 40]),
        (0, 0, [0]),
    ],
)
def test_ticks_are_round_and_within(low: float, high: float, want: list[float]) -> None:
    assert svg.ticks(low, high) == pytest.approx(want)


def test_histogram_counts_every_value_once() -> None:
    text = svg.histogram([-1.0, 0.0, 0.0, 0.5, 1.0], x_label="x", y_label="n", bins=3)
    counts = [int(n) for n in re.findall(r"<title>[^<]*: (\d+)</title>", text)]
    assert counts == [1, 2, 2]
    heights = [float(h) for h in re.findall(r'class="bar"[^>]* height="([\d.]+)"', text)]
    assert heights[1] == heights[2] == pytest.approx(2 * heights[0], abs=0.2)
    assert svg.histogram([], x_label="x", y_label="n").count('class="bar"') == 0


def test_points_stand_where_they_belong() -> None:
    data = [svg.Point(0, 0), svg.Point(1, 1, "missing", "a<b")]
    text = svg.points(data, x_label="x & y", y_label="y", x_range=(0, 1), y_range=(0, 1))
    (x0, y0), (x1, y1) = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', text)
    assert (float(x0), float(y0)) == (svg.LEFT, svg.HEIGHT - svg.BOTTOM)
    assert (float(x1), float(y1)) == (svg.WIDTH - svg.RIGHT, svg.TOP)
    assert "<title>a&lt;b</title>" in text and "x &amp; y" in text
