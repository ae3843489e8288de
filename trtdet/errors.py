# SPDX-License-Identifier: Apache-2.0
"""The errors a user is meant to read.

Each message says what was expected, what was found, what to do next.
"""

#: The end of an error that comes from what is installed.
DOCTOR = "'python -m trtdet doctor' shows what is here"


class GraphError(Exception):
    """A model graph is not what the family or the stage expects."""


class EngineError(Exception):
    """TensorRT could not parse, build, load or run; its own messages are inside."""
