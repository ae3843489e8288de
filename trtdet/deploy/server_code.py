# SPDX-License-Identifier: Apache-2.0
"""What a server gets of this package: the modules themselves, so that it computes what infer.py
computes.

Beside `model.py` lies a folder `trtdet` with the modules that it imports and those that these
import. They need the standard library, NumPy, OpenCV and Pillow, nothing else of this project's;
imports inside functions are left out, as their functions are not called there.
"""

import ast
from collections.abc import Iterator
from importlib import resources
from pathlib import PurePosixPath

from trtdet import about

PACKAGE = "trtdet"
#: In place of the `__init__.py` of this package, which is for users of all of it.
INIT = f'# SPDX-License-Identifier: Apache-2.0\n"""A part of {PACKAGE} {about.__version__}, as {PACKAGE} deploy wrote it."""\n'


def python_model(asset: str) -> dict[str, bytes]:
    """A Python model of Triton: path in the version folder -> content, of `model.py` and of the
    modules that it needs.

    Args:
        asset: file name in `trtdet/deploy/assets`.
    """
    model = (resources.files("trtdet.deploy") / "assets" / asset).read_bytes()
    contents = {"model.py": model}
    pending = list(_imports(model))
    while pending:
        path = _path(pending.pop())
        if str(path) in contents:
            continue
        source = resources.files(PACKAGE).joinpath(*path.parts[1:]).read_bytes()
        contents[str(path)] = source
        for folder in path.parents[:-1]:
            contents[str(folder / "__init__.py")] = INIT.encode("utf-8")
        pending += _imports(source)
    return contents


def _imports(source: bytes) -> Iterator[str]:
    """Names of this package that a module imports when it is imported itself."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _path(name: str) -> PurePosixPath:
    """The file of the module that a dotted name is, or is in."""
    parts = name.split(".")
    for end in (len(parts), len(parts) - 1):
        path = PurePosixPath(*parts[:end]).with_suffix(".py")
        if resources.files(PACKAGE).joinpath(*path.parts[1:]).is_file():
            return path
    raise ValueError(f"{name}: expected a module of {PACKAGE}, or a name in one")
