# SPDX-License-Identifier: Apache-2.0
"""The version, and the files that come with the package."""

from pathlib import Path

__version__ = "0.1.0"

#: A photograph to try a model on: NASA, Eileen Collins, in the public domain; 512 x 512.
PHOTOGRAPH = Path(__file__).parent / "data" / "astronaut.jpg"
#: Four photographs that a converted model is compared with its source on; NOTICE has their
#: licences.
PHOTOGRAPHS = (
    PHOTOGRAPH,
    *(Path(__file__).parent / "data" / f"{name}.jpg" for name in ("chelsea", "coffee", "rocket")),
)
