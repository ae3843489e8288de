# SPDX-License-Identifier: Apache-2.0
"""The detector families that create_onnx.py knows. To add one: docs/adding_a_family.md."""

from __future__ import annotations

from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, cast

from trtdet import files

if TYPE_CHECKING:
    from trtdet.families.base import Family

#: Modules of this package, in the order in which they are asked; the command line lists them
#: without importing one.
FAMILIES = (
    "automl",
    "tfod",
    "retinanet",
    "yolo",
    "detr",
    "deformable_detr",
    "rtdetr",
    "rfdetr",
    "libreyolo",
    "heads",
)


def load_family(path: Path) -> Family:
    """A user's own family: a Python file with `NAME`, `matches` and `read`.

    Raises:
        ValueError: no such file, it does not run, or a name is missing.
    """
    if not path.is_file():
        raise ValueError(
            f"--family {path}: expected one of {', '.join(FAMILIES)} or a Python file, found {files.found_at(path)} there"
        )
    spec = spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--family {path}: expected a Python file (.py)")
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises
        raise ValueError(f"--family {path}: {type(error).__name__}: {error}") from error
    missing = [name for name in ("NAME", "matches", "read") if not hasattr(module, name)]
    if missing:
        raise ValueError(
            f"--family {path}: expected NAME, matches and read, missing: {', '.join(missing)}; docs/adding_a_family.md has an example"
        )
    return cast("Family", module)


def load_families() -> list[Family]:
    """The modules of `FAMILIES`."""
    return [cast("Family", import_module(f"trtdet.families.{name}")) for name in FAMILIES]
