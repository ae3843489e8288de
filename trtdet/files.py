# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all, and their hashes."""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it into place if the block succeeds, else delete it.

    Parent folders are made. The temporary name keeps the suffix, for writers that look at it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.stem[:80]}.", suffix=path.suffix
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 would hide the file from other users
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_input(path: Path, option: str, what: str) -> None:
    """Find out before long work whether a file that an option names is there.

    Raises:
        FileNotFoundError: names the option, and says what was expected.
    """
    if not Path(path).is_file():
        found = "a directory" if Path(path).is_dir() else "nothing"
        raise FileNotFoundError(f"{option}: expected {what}, found {found} at {path}")


def check_writable(path: Path) -> None:
    """Find out before long work whether a file can be written.

    Raises:
        ValueError: the path is a folder, or the folder it shall be in cannot be made or written to.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: expected the name of a file to write, found a folder")
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(
            f"{path}: cannot be written, {existing} is not a folder that takes files; choose another"
        )


def check_outputs(outputs: Iterable[Path | None], inputs: Iterable[Path | None]) -> None:
    """Find out before long work whether every output can be written, and that none is an input or another output.

    Raises:
        ValueError: names the file.
    """
    taken = {path.resolve() for path in inputs if path is not None}
    for path in outputs:
        if path is None:
            continue
        check_writable(path)
        if path.resolve() in taken:
            raise ValueError(f"{path}: is an input, or written twice; give the output another name")
        taken.add(path.resolve())


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def sha256(*paths: Path) -> str:
    """The SHA-256, in hex, of the bytes of one file, or of several files one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
