# SPDX-License-Identifier: Apache-2.0
"""Whether progress bars are shown."""

import logging

#: This project's own logger: at WARNING or above nothing but trouble is to be seen.
PROJECT = "trtdet"


def no_bar() -> bool | None:
    """tqdm's `disable`: True where this project's log is quiet, None elsewhere, for tqdm to ask
    whether stderr is a terminal.
    """
    return True if logging.getLogger(PROJECT).level >= logging.WARNING else None
