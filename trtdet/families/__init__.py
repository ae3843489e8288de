# SPDX-License-Identifier: Apache-2.0
"""The detector families that create_onnx.py knows. To add one: docs/adding_a_family.md."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
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
    "centernet",
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
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        code = compile(path.read_bytes(), str(path), "exec")
    except (SyntaxError, ValueError) as error:  # ValueError: of a NUL
        raise ValueError(
            f"--family {path}: expected Python source, {type(error).__name__}: {error}"
        ) from error
    try:
        exec(code, module.__dict__)  # not by the import system, which would leave a __pycache__
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
