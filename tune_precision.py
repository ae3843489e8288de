#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""tune_precision.py --help says what it does; the stage itself is
trtdet/commands/tune_precision.py.
"""

from trtdet.start import run_stage

if __name__ == "__main__":
    raise SystemExit(run_stage("tune_precision"))
