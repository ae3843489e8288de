# SPDX-License-Identifier: Apache-2.0
"""Runs the scripts in tests/tools, which export models of frameworks, in their environment."""

import os
import subprocess
from pathlib import Path

import pytest

from trtdet import about

TOOLS = Path(__file__).parents[1] / "tools"


def run_tool(name: str, out: Path, *options: str) -> None:
    """Export to `out` with the shipped photographs; skips the test where there is no such
    environment.
    """
    python = os.environ.get("TRTDET_LIBREYOLO_PYTHON")
    if not python:
        pytest.skip("needs TRTDET_LIBREYOLO_PYTHON, the Python of an environment with libreyolo and torchvision")  # fmt: skip
    photographs = str(about.PHOTOGRAPH.parent)
    made = subprocess.run(
        [python, str(TOOLS / name), str(out), *options, "--photos", photographs],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
