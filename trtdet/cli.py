# SPDX-License-Identifier: Apache-2.0
"""What the root scripts share at the border: logging, exit codes, argument types."""

import argparse
import logging
import sys
from collections.abc import Callable

from trtdet.errors import EngineError, GraphError

logger = logging.getLogger(__name__)

#: Errors that are the user's to fix: one line on stderr, exit status 1.
USER_ERRORS = (GraphError, EngineError, ValueError, OSError)

#: Exit status of a run that is done but for some images that could not be read.
SOME_SKIPPED = 3


def setup_logging(verbose: bool = False) -> None:
    """Send this project's log to stderr; results alone go to stdout."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(levelname).1s %(message)s",
        stream=sys.stderr,
        force=True,
    )
    # Third-party chatter is of interest only with -v.
    for name in ("tf2onnx", "tensorflow", "absl", "PIL", "matplotlib"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.ERROR)


def run_main(run: Callable[[], int | None]) -> int:
    """Run one stage and turn its errors into an exit status.

    Returns:
        What `run` returns (0 for None), 1 for an error of `USER_ERRORS`, 130 for Ctrl-C.
    """
    try:
        return run() or 0
    except USER_ERRORS as error:
        logger.debug("traceback", exc_info=True)
        message = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"error: {message}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def unit_interval(text: str) -> float:
    """argparse type: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value


def positive_unit_interval(text: str) -> float:
    """argparse type: a number above 0, up to 1."""
    value = unit_interval(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, up to 1, got {text!r}")
    return value


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value
