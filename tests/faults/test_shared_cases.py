# SPDX-License-Identifier: Apache-2.0
"""Inputs that once ended in a traceback: one line each.

They lie beside the repository; small ones of their kinds are in the other tests here.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import fault_desk
import pytest
from conftest import EXAMPLES, SHARED

FAULTS = SHARED / "cases" / "faults"
#: A network of AutoML's that create_onnx.py can read whole, in place of the sound files that the
#: cases need beside theirs.
ANNOTATIONS = str(EXAMPLES / "annotations.json")

#: Kind of a case -> command line, the damaged file, and what its one line says; status 3 where one
#: of several files is skipped.
LINES = {
    "annotations": ("eval_coco --detections sound.json --annotations a.json --json out.json", "a.json", 1),
    "results": (f"eval_coco --detections d.json --annotations {ANNOTATIONS} --json out.json", "d.json", 1),
    "onnx": ("infer --model m.onnx --input in --output out", "m.onnx", 1),
    "sidecar": ("deploy triton --model e.engine --output out --name e", "e.engine.json", 1),
    "trtexec": ("deploy trtexec --parse_times f --batch_size 1", "f", 1),
    "tsv": ("visualize --input in --detections t --output out", "t/", 3),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", sorted(p.name for p in FAULTS.iterdir()) if FAULTS.is_dir() else []
)
def test_a_case_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "case"
    shutil.copytree(FAULTS / case, folder)
    line, file, status = LINES[case.partition("_")[0]]
    if (folder / "e.engine.json").is_file():
        (folder / "e.engine").write_bytes(b"ftrt" + bytes(range(256)))
    if not (folder / "in").exists():
        shutil.copytree(EXAMPLES / "images", folder / "in")
    (folder / "sound.json").write_text('[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 0.5}]')  # fmt: skip
    outcome = fault_desk.run(folder, line, capsys)
    assert "Traceback" not in outcome.err, outcome.err
    if status == 1:
        fault_desk.check_one_line(outcome, 1, re.escape(file))
        assert outcome.left == (), outcome.left
    else:
        assert outcome.status == status, outcome.err
        skipped = [text for text in outcome.err.splitlines() if text.startswith("W skipped: ")]
        assert skipped and all(file in text for text in skipped), outcome.err
        pictures = {os.path.basename(name) for name in outcome.left} - {"out"}
        there = {path.name for path in (folder / "in").iterdir()}
        assert "good.png" in pictures and len(pictures) == len(there) - len(skipped)


def test_cases_of_every_kind_are_there() -> None:
    if not FAULTS.is_dir():
        pytest.skip("needs ../shared/cases/faults, which is not here")
    assert {path.name.partition("_")[0] for path in FAULTS.iterdir()} == set(LINES)
