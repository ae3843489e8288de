# SPDX-License-Identifier: Apache-2.0
"""The page of gpu_report.py: one HTML file that loads nothing from elsewhere.

And its table of figures as text.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from gpu_steps import Row

from trtdet.doctor.facts import Facts
from trtdet.doctor.text import machine_lines

TEMPLATE = Path(__file__).with_name("gpu_report.html")

#: Column -> key of a row, and how its number is written.
COLUMNS = {
    "AP": ("ap", "{:.4f}"),
    "to FP32 in ORT": ("ap_difference", "{:+.4f}"),
    "score, 95 %": ("score_difference", "{:.4f}"),
    "box, 95 %, px": ("box_difference", "{:.2f}"),
    "batch": ("batch", "{}"),
    "median, ms": ("median_ms", "{:.3f}"),
    "99 %, ms": ("p99_ms", "{:.3f}"),
    "images/s": ("images_per_second", "{:.0f}"),
    "trtexec, images/s": ("trtexec_images_per_second", "{:.0f}"),
    "size, MiB": ("size_mib", "{:.2f}"),
}
#: Status -> its sign and its word, for eyes that see no colours.
SIGNS = {"pass": "✓ pass", "ok": "◦ stand-in", "fail": "✗ fail", "skipped": "- skipped"}


def cells(row: Mapping[str, Any]) -> list[str]:
    """The numbers of one precision, in the order of `COLUMNS`."""
    return ["-" if row[key] is None else form.format(row[key]) for key, form in COLUMNS.values()]


def table_text(rows: Sequence[Row]) -> str:
    """For a terminal."""
    head = ["", *COLUMNS]
    body = [[row.precision.upper(), *cells(vars(row))] for row in rows]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in (head, *body))  # fmt: skip


def render(report: Mapping[str, Any], facts: Facts) -> str:
    """The page.

    Args:
        report: what the JSON file says.
    """
    headlines = {"pass": "✓ It works on this GPU", "fail": "✗ Something failed", "nothing": "✗ Nothing was run", "stand-in": "◦ Tried with a stand-in: no TensorRT engine was run"}  # fmt: skip
    parts = [
        f'<header class="verdict {report["verdict"]}"><h1 id="verdict">{headlines[report["verdict"]]}</h1><p>{escape(report["summary"])}</p></header>',
        f'<p class="facts">trtdet {escape(report["trtdet"])} · {escape(report["ran_by"])} · {escape(report["model"])}</p>',
        _figures(report["precisions"]),
        _lines(report["lines"]),
        f"<h2>The machine</h2><pre>{escape(chr(10).join(machine_lines(facts)))}</pre>",
    ]
    data = json.dumps(report).replace("<", "\\u003c")  # no </script> within
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=escape(f"GPU report: {report['verdict']}"), body="\n".join(parts), data=data)  # fmt: skip


def _figures(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f'<th class="number">{name}</th>' for name in COLUMNS)
    body = []
    for row in rows:
        values = "".join(f'<td class="number" data-key="{key}">{value}</td>' for (key, _), value in zip(COLUMNS.values(), cells(row), strict=True))  # fmt: skip
        by = "; ".join(filter(None, [row["ran_by"] and f"run by {row['ran_by']}", row["size_of"] and f"size: {row['size_of']}"]))  # fmt: skip
        body.append(f'<tr class="figures"><th>{row["precision"].upper()}</th>{values}</tr>')
        body.append(f'<tr class="by"><td></td><td colspan="{len(COLUMNS)}">{escape(by or "not run")}</td></tr>')  # fmt: skip
    return f"""<h2>Figures</h2>
<p class="dim">Score and box: what 95 % of the detections stay within, against the FP32 ONNX file in ONNX Runtime; boxes in pixels of the network input.</p>
<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>"""


def _lines(lines: Sequence[Mapping[str, Any]]) -> str:
    found = []
    for line in lines:
        mark = f'<span class="mark {line["status"]}">{SIGNS[line["status"]]}</span>'
        seconds = f'<span class="dim seconds">{line["seconds"]:.0f} s</span>' if line["seconds"] else ""  # fmt: skip
        head = f'{mark}<span class="name">{escape(line["name"])}</span>{seconds}<span class="dim detail">{escape(line["detail"])}</span>'  # fmt: skip
        if not line["command"]:
            found.append(f'<div class="line {line["status"]}">{head}</div>')
            continue
        opened = " open" if line["status"] == "fail" else ""
        log = f"$ {line['command']}\n{line['log']}"
        found.append(f'<details class="line {line["status"]}"{opened}><summary>{head}</summary><pre>{escape(log)}</pre></details>')  # fmt: skip
    return f'<h2>Lines</h2><p class="dim">Open a line for its command and the end of its log.</p><div class="lines">{"".join(found)}</div>'
