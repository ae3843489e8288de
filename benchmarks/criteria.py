# SPDX-License-Identifier: Apache-2.0
"""How a benchmark ends: what was asked for and whether it is so, the JSON file, the exit status;
and what benchmarks have in common before that.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trtdet.commands.cli import run_main, setup_logging
from trtdet.files import write_text

Report = dict[str, Any]


def add_ending(parser: argparse.ArgumentParser) -> None:
    """The options of `conclude`."""
    # fmt: off
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, with the machine, as JSON")
    parser.add_argument("--check", action="store_true", help="exit with status 1 where a criterion is not met")
    # fmt: on


def add_graphs(parser: argparse.ArgumentParser) -> None:
    """Our graph and that of NVIDIA's sample."""
    # fmt: off
    parser.add_argument("--onnx", type=Path, required=True, metavar="FILE", help="a file of create_onnx.py")
    parser.add_argument("--sample_onnx", type=Path, required=True, metavar="FILE", help="the file of NVIDIA's sample for the same model")
    # fmt: on


def run_benchmark(
    args: argparse.Namespace,
    measure: Callable[[], Report],
    show: Callable[[Report], None],
    criteria: Callable[[Report], Mapping[str, bool]],
) -> int:
    """Measure, show and conclude; returns the exit status, that of an error too."""
    setup_logging()

    def run() -> int:
        report = measure()
        show(report)
        print()
        return conclude(report, criteria(report), args)

    return run_main(run)


def conclude(report: dict[str, Any], criteria: Mapping[str, bool], args: argparse.Namespace) -> int:
    """Print the criteria and write the report with them.

    Args:
        args: `json`, the file or None; `check`: a criterion that is not met is exit status 1.

    Returns:
        The exit status.
    """
    for text, met in criteria.items():
        print(f"{text}: {'yes' if met else 'NO'}")
    report["criteria"] = dict(criteria)
    if args.json:
        write_text(args.json, json.dumps(report, indent=2) + "\n")
    return 1 if args.check and not all(criteria.values()) else 0
