# SPDX-License-Identifier: Apache-2.0
"""What can be asked of the preprocessing. Standard library only: the command lines read it."""

from typing import Literal

#: Pixels of the longer side with --resize, as ODTK has it.
DEFAULT_MAX_SIZE = 1333
Resample = Literal["bilinear", "antialias"]
