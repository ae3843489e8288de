# SPDX-License-Identifier: Apache-2.0
"""What is shown on stderr: progress bars, and what native libraries write there."""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

#: This project's own logger: at WARNING or above nothing but trouble is to be seen.
PROJECT = "trtdet"


def no_bar() -> bool | None:
    """tqdm's `disable`: True where this project's log is quiet, None elsewhere, for tqdm to ask
    whether stderr is a terminal.
    """
    return True if logging.getLogger(PROJECT).level >= logging.WARNING else None


@contextmanager
def native_stderr_held() -> Iterator[None]:
    """Hold back what native code writes to stderr; it comes out if the block fails, or with debug
    logging.

    TensorFlow and nvImageCodec greet with lines on what is missing before any log level of their
    own is read.
    """
    if logging.getLogger(PROJECT).isEnabledFor(logging.DEBUG):
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
