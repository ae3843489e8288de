# SPDX-License-Identifier: Apache-2.0
"""Every selection of google/automl, with `max_nms_inputs` below, at and above the number of
anchors.

TRTDET_AUTOML names the folder `efficientdet` of a checkout of google/automl.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trtdet.commands import create_onnx

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tests" / "tools" / "automl_selections.py"
INPUTS = ("0", "1000", "A", "2A")
NAMES = (
    "combined",
    *(f"{mode}_{method}_{n}" for mode in ("global", "per_class") for method in ("hard", "gaussian") for n in INPUTS),
)  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", NAMES)
def test_the_sources_own_detections(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The source's own selection, soft NMS included, in NumPy on our heads gives its detections,
    all of them.
    """
    checkout = os.environ.get("TRTDET_AUTOML")
    if not checkout:
        pytest.skip("needs TRTDET_AUTOML, the folder efficientdet of google/automl")
    pytest.importorskip("tensorflow", reason="needs requirements-tensorflow.txt")
    model = ROOT / "examples" / "tiny_shapes"
    asked = [sys.executable, str(TOOL), checkout, str(model), str(tmp_path), name]
    made = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    out = tmp_path / "out.onnx"
    assert create_onnx.main(["--saved_model", str(tmp_path / name), "--onnx", str(out)]) == 0
    found = re.search(r"(\d+) of (\d+) compared come out of our heads", capsys.readouterr().out)
    assert found and int(found.group(2)) >= 300 and found.group(1) == found.group(2)
