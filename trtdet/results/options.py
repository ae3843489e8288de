# SPDX-License-Identifier: Apache-2.0
"""What can be asked of results. Standard library only: the command lines read it."""

from typing import Literal

#: What pictures are written as.
ImageFormat = Literal["png", "jpg"]

#: Pictures show detections from this score on; below it most are wrong. Of the thresholds tried,
#: 0.1 to 0.6, this one loses least where the best is not known: F1 at IoU 0.5 is 0.665 (best:
#: 0.672, at 0.35) on 100 photographs of people with D0, 0.922 (best: 0.930, at 0.25) on drawn
#: shapes with a small model.
DRAW_THRESHOLD = 0.3

#: Below this score a model guesses: pictures and tracks are full of boxes.
CLUTTER_THRESHOLD = 0.05
