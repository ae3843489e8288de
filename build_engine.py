#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""build_engine.py --help says what it does; the stage itself is trtdet/commands/build_engine.py."""

from trtdet.start import run_stage

if __name__ == "__main__":
    raise SystemExit(run_stage("build_engine"))
