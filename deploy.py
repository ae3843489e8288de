#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""deploy.py --help says what it does; the stage itself is trtdet/commands/deploy.py."""

from trtdet.commands.deploy import main

if __name__ == "__main__":
    raise SystemExit(main())
