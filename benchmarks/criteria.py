# SPDX-License-Identifier: Apache-2.0
"""How a benchmark ends: what was asked for and whether it is so, the JSON file, the exit status."""

import argparse
import json
from collections.abc import Mapping
from typing import Any

from trtdet.files import write_text


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
