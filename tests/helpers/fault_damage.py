# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a file, whatever it is meant to be: each function damages the file at a
path.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Damage = Callable[[Path], None]


def missing(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(7).bytes(2000))


def zeros(path: Path) -> None:
    path.write_bytes(bytes(2000))


def picture(path: Path) -> None:
    Image.new("RGB", (8, 8)).save(path, format="PNG")


def archive(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + bytes(200))


def text(path: Path) -> None:
    path.write_text("the quick brown fox\n" * 20)


def page(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>\n")


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")


def latin1(path: Path) -> None:
    path.write_bytes("caf\xe9\n".encode("latin-1") * 5)


def utf16(path: Path) -> None:
    path.write_bytes(path.read_bytes().decode("utf-8", "replace").encode("utf-16"))


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/null")


def forbidden(path: Path) -> None:
    path.chmod(0)


#: Damage -> what it does. All of them make every file unreadable.
WHOLE: dict[str, Damage] = {
    f.__name__: f
    for f in (
        missing, folder, empty, truncated, noise, zeros, picture, archive, text, page, pointer, latin1, utf16, fifo, loop, dangling, endless,
        nothing, forbidden,
    )
}  # fmt: skip


# ---- odd names


#: 252 bytes, 63 characters of four bytes each: with a suffix at the limit of file systems.
EMOJI = "\U0001f600" * 62
#: A name that is not UTF-8.
NO_UTF8 = os.fsdecode(b"caf\xe9")


def renamed(path: Path, stem: str) -> Path:
    """Give a file another name with the same suffix; what stands beside it comes along."""
    target = path.with_name(stem + path.suffix)
    beside = path.with_name(path.name + ".json")
    path.rename(target)
    if beside.is_file():
        beside.rename(target.with_name(target.name + ".json"))
    return target


def copy_of(source: Path, target: Path) -> Path:
    shutil.copyfile(source, target)
    return target
