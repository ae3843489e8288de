# SPDX-License-Identifier: Apache-2.0
"""Copy the type stubs of the installed tensorrt-stubs to a folder, repaired so that mypy can read
them.

    python scripts/tensorrt_typings.py build/typings

The package is no typed one to mypy (it has no py.typed), so everything of `tensorrt` would pass;
and its files, generated from the bindings of TensorRT 10.13, are not valid Python everywhere.
pyproject.toml has mypy look into build/typings.
"""

import argparse
import ast
import importlib.metadata
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

DISTRIBUTION = "tensorrt-stubs"
#: Names that the stubs use and do not define. "capsule" is a C pointer.
MISSING_NAMES = "import typing_extensions\ncapsule = typing.Any\n"
#: The constant `tensorrt.bool` of the same module makes `bool` in its annotations mean nothing.
SHADOW = re.compile("^bool: DataType.*\n", re.MULTILINE)
SIGNATURE = re.compile(r"( *)def (\w+)\(.*:$")


def repair(stub: str) -> str:
    """A stub file that mypy reads, from one that it does not.

    A signature that is no Python (a parameter named `in`, one without a default after one with)
    becomes one that takes anything.
    """
    stub = SHADOW.sub("", stub).replace("import typing\n", f"import typing\n{MISSING_NAMES}", 1)
    return "".join(f"{_repair_signature(line)}\n" for line in stub.splitlines())


def _repair_signature(line: str) -> str:
    match = SIGNATURE.match(line)
    if match is None or _is_python(f"{line.strip()} ..."):
        return line
    indent, name = match.groups()
    return f"{indent}def {name}(self, *args: typing.Any, **kwargs: typing.Any) -> typing.Any:"


def _is_python(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def copy_stubs(target: Path) -> int:
    """Write the repaired stubs below `target`, which is emptied first.

    Returns how many files there are.

    Raises:
        importlib.metadata.PackageNotFoundError: tensorrt-stubs is not installed.
    """
    files = importlib.metadata.distribution(DISTRIBUTION).files or []
    stubs = [file for file in files if file.suffix == ".pyi"]
    shutil.rmtree(target, ignore_errors=True)
    for stub in stubs:
        path = target / stub
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(repair(stub.read_text("utf-8")), encoding="utf-8")
    return len(stubs)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, metavar="DIR", help="where they go")
    args = parser.parse_args(argv)
    try:
        count = copy_stubs(args.target)
    except importlib.metadata.PackageNotFoundError:
        count = 0
    if not count:
        sys.stderr.write(
            f"error: {DISTRIBUTION} is not installed; pip install --no-deps 'tensorrt-stubs>=10.13,<11'\n"
        )
        return 1
    print(args.target)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
