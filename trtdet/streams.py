# SPDX-License-Identifier: Apache-2.0
"""Standard output and standard error that may be closed, full, or a pipe that nobody reads any
more: no reason to end before the work is done.
"""

import io
import os
import sys

#: How an error of standard output names it.
STANDARD_OUTPUT = "standard output"


class _Stream(io.TextIOWrapper):
    """A stream of text on a file descriptor.

    What a pipe's reader (`| head`) no longer takes is dropped. Whatever else is wrong is an error
    that names the stream, once; `must_succeed` False drops that too.
    """

    must_succeed = True

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """From here on, let everything go to nowhere, that which waits in the buffer first."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        super().flush()
        if self.must_succeed and not isinstance(error, BrokenPipeError):
            raise OSError(error.errno, error.strerror, STANDARD_OUTPUT) from error


class _Messages(_Stream):
    must_succeed = False


def open_streams() -> None:
    """Make the standard streams such that they can be written to.

    What the caller closed, `2>&-`, is opened onto nothing: else the next file that is opened gets
    its number, and messages with it. A stream that a program has put in place of the first one is
    left alone.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for name, kind in (("stdout", _Stream), ("stderr", _Messages)):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper and stream is getattr(sys, f"__{name}__"):
            stream.flush()
            # A name that the terminal's alphabet does not have is no reason to end.
            setattr(sys, name, kind(stream.buffer, stream.encoding, "backslashreplace", None, stream.line_buffering, stream.write_through))  # fmt: skip


def flush_output() -> None:
    """Write what waits.

    Raises:
        OSError: it cannot be written; names standard output.
    """
    if sys.stdout is not None:
        sys.stdout.flush()
