# SPDX-License-Identifier: Apache-2.0
"""All stages under one command. Each has the options of the script of its name.

trtdet create_onnx --saved_model efficientdet-d0 --onnx d0.onnx
trtdet build_engine --model d0.onnx --engine d0.engine
trtdet infer --model d0.engine --input photos --output found
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from trtdet.commands import cli
from trtdet.commands.advice import nearest
from trtdet.commands.stages import STAGES


def parser() -> cli.ArgumentParser:
    stages = "\n".join(f"  {name:<16}{text}" for name, text in STAGES.items())
    made = cli.ArgumentParser(
        prog="trtdet",
        description=f"{__doc__}\nstages:\n{stages}\n\ntrtdet STAGE --help shows the options of a stage.",
    )
    made.add_argument("stage", metavar="STAGE", help="one of the above")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    entry = parser()
    if not words:
        entry.error(f"give a stage: {', '.join(STAGES)}")
    if words and words[0].startswith("-") and words[0] not in entry._option_string_actions:
        entry.error(f"give a stage before {words[0]}: {', '.join(STAGES)}")
    stage = entry.parse_args(words[:1]).stage
    if stage not in STAGES:
        near = nearest(stage, STAGES)
        advice = f"did you mean {near}?" if near else f"expected one of {', '.join(STAGES)}"
        entry.error(f"unknown stage {stage}: {advice}")
    sys.argv = [f"trtdet {stage}", *words[1:]]  # argparse takes the name for usage from here
    status: int = import_module(f"trtdet.commands.{stage}").main(words[1:])
    return status
