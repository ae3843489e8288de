# SPDX-License-Identifier: Apache-2.0
"""Check this machine: what works, what is missing, and the command that installs it.

    trtdet doctor
    python -m trtdet doctor --json doctor.json

Nothing is changed. It needs only Python: packages are imported in separate processes to see whether
they work. This takes some seconds, most of them for TensorFlow.

The JSON file has the same facts for a bug report. It names no host and no user; paths in the home
folder begin with ~.

Exit status: 0 an ONNX file can be converted, run and evaluated; 1 it cannot; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from trtdet import files
from trtdet.commands.cli import ArgumentParser, run_main, setup_logging
from trtdet.commands.options import add


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add(parser, "--json")
    return parser.parse_args(argv)


def run(report: Path | None = None) -> int:
    """Look, print, and write `report`; the exit status."""
    from trtdet.doctor.facts import collect
    from trtdet.doctor.judge import judge
    from trtdet.doctor.text import render

    if report is not None:
        files.check_writable(report)
    facts = collect()
    diagnosis = judge(facts)
    print(render(facts, diagnosis))
    if report is not None:
        content = {"facts": asdict(facts), "diagnosis": asdict(diagnosis)}
        files.write_text(report, json.dumps(content, indent=2) + "\n")
    return 0 if diagnosis.ready else 1


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    setup_logging()
    return run_main(lambda: run(args.json))
