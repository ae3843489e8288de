# SPDX-License-Identifier: Apache-2.0
"""The detector families that create_onnx.py knows. To add one: docs/adding_a_family.md."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from trtdet.families.base import Family

#: Modules of this package, in the order in which they are asked; the command line lists them without importing one.
FAMILIES = ("automl", "tfod", "retinanet", "yolo", "detr", "deformable_detr")


def load_families() -> list[Family]:
    """The modules of `FAMILIES`."""
    return [cast("Family", import_module(f"trtdet.families.{name}")) for name in FAMILIES]
