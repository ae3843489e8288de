#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""image_batcher.py --help says what it does; the stage itself is
trtdet/commands/image_batcher.py.
"""

from trtdet.start import run_stage

if __name__ == "__main__":
    raise SystemExit(run_stage("image_batcher"))
