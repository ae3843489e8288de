# SPDX-License-Identifier: Apache-2.0
"""What the root scripts share at the border: logging, exit codes, argument types."""

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from trtdet.errors import EngineError, GraphError
from trtdet.files import printable

logger = logging.getLogger(__name__)


#: Errors that are the user's to fix: one line on stderr, exit status 1.
USER_ERRORS = (GraphError, EngineError, ValueError, OSError)

#: Top-level package -> the file that installs it; all others are in requirements.txt.
REQUIREMENTS = {
    "tensorflow": "requirements-tensorflow.txt",
    "tf2onnx": "requirements-tensorflow.txt",
    "cuda": "requirements-tensorrt.txt",
    "tensorrt": "requirements-tensorrt.txt",
    "tensorrt_rtx": "requirements-rtx.txt",
    "tritonclient": "requirements-triton.txt",
    "ray": "requirements-ray.txt",
}

#: Exit status of a run that is done but for some images that could not be read.
SOME_SKIPPED = 3


class _PrintableFormatter(logging.Formatter):
    """One line for each message, whatever file names are in it; a terminal gets no control characters from them."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def setup_logging(verbose: bool = False) -> None:
    """Send this project's log to stderr; results alone go to stdout."""
    _open_closed_streams()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PrintableFormatter("%(levelname).1s %(message)s"))
    level = logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Third-party chatter is of interest only with -v.
    for name in ("tf2onnx", "tensorflow", "absl", "PIL", "matplotlib"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.ERROR)


def run_main(run: Callable[[], int | None]) -> int:
    """Run one stage and turn its errors into an exit status.

    Returns:
        What `run` returns (0 for None), 1 for an error of `USER_ERRORS`, 130 for Ctrl-C, 143 for SIGTERM (a batch system's or
        a container's end): as a shell would report them.
    """
    with _terminate_as_interrupt() as terminated:
        try:
            return run() or 0
        except ModuleNotFoundError as error:
            message = _missing(error)
            if message is None:
                raise
            logger.debug("traceback", exc_info=True)
            sys.stderr.write(f"error: {printable(message)}\n")
            return 1
        except USER_ERRORS as error:
            logger.debug("traceback", exc_info=True)
            message = printable(" ".join(str(error).split())) or type(error).__name__
            sys.stderr.write(f"error: {message}\n")
            return 1
        except KeyboardInterrupt:
            sys.stderr.write("terminated\n" if terminated.is_set() else "interrupted\n")
            return 143 if terminated.is_set() else 130


def _open_closed_streams() -> None:
    """Open what the caller closed, `2>&-`, onto nothing: else the next file that is opened gets its number, and messages with it."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _missing(error: ModuleNotFoundError) -> str | None:
    """What to install for a package that is not there; None for one of our own modules, whose absence is a fault of ours."""
    package = (error.name or "").partition(".")[0]
    if not package or package == "trtdet":
        return None
    file = REQUIREMENTS.get(package, "requirements.txt")
    return (
        f"the Python package {package} is not installed here; activate the environment that has it (. .venv/bin/activate), "
        f"or pip install -r {file}"
    )


@contextmanager
def _terminate_as_interrupt() -> Iterator[threading.Event]:
    """Let SIGTERM do what Ctrl-C does: by itself it ends the process where it stands, with temporary files left behind.

    Yields:
        Set once it has come.
    """
    terminated = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield terminated  # handlers belong to the main thread
        return

    def on_terminate(number: int, frame: FrameType | None) -> None:
        terminated.set()
        interrupt = signal.getsignal(signal.SIGINT)  # the builder has one of its own
        if not callable(interrupt):  # a shell's background job ignores Ctrl-C
            raise KeyboardInterrupt
        interrupt(signal.SIGINT, frame)

    previous = signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


def parse_given(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, frozenset[str]]:
    """Parse a command line.

    Returns:
        All options, and the names of those that the command line gives, be it with their default.
    """
    args = parser.parse_args(argv)
    defaults = {action: action.default for action in parser._actions}
    try:
        for action in defaults:  # without defaults, what is left is given
            action.default = argparse.SUPPRESS
        given = parser.parse_args(argv)
    finally:
        for action, default in defaults.items():
            action.default = default
    return args, frozenset(vars(given))


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


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def parse_size(text: str) -> tuple[int, int]:
    """argparse type: "512,640" -> (512, 640), height first."""
    try:
        height, width = (int(part) for part in text.split(","))
    except ValueError:
        height = width = 0
    if height < 1 or width < 1:
        raise argparse.ArgumentTypeError(f"expected HEIGHT,WIDTH such as 512,512, got {text!r}")
    return height, width
