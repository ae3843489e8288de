# SPDX-License-Identifier: Apache-2.0
"""Start a stage: what a script calls before anything else is imported, so that Ctrl-C meanwhile
ends it with a word, not a traceback.
"""

import sys
from importlib import import_module

from trtdet.streams import flush_output, open_streams


def run_stage(stage: str) -> int:
    """Import a module of `trtdet.commands` and run its `main`.

    Returns:
        Its exit status; 130 for Ctrl-C before or behind the stage itself, which catches its own.
    """
    try:
        open_streams()
        status: int = import_module(f"trtdet.commands.{stage}").main()
    except SystemExit:  # --help, --version, wrong usage
        try:
            flush_output()
        except OSError as error:
            sys.stderr.write(f"error: {error.filename}: {str(error.strerror).lower()}\n")
            return 1
        raise
    except KeyboardInterrupt:
        if sys.stderr is not None:
            sys.stderr.write("interrupted\n")
        return 130
    return status


def main() -> int:
    """The command `trtdet`."""
    return run_stage("main")
