# SPDX-License-Identifier: Apache-2.0
"""`trtdet.files`: files appear whole or not at all, and nothing special is replaced by a file."""

import errno
import os
import shutil
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from trtdet import files

UNNAMED = getattr(os, "O_TMPFILE", 0)
needs_unnamed = pytest.mark.skipif(not UNNAMED, reason="this system has no files without a name")


def is_unnamed(flags: int) -> bool:
    return bool(UNNAMED) and flags & UNNAMED == UNNAMED


@pytest.fixture(params=["unnamed", "no such flag", "no such files", "no link to them"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a file is written: without a name until it is whole, or under a temporary one, for each
    reason.
    """
    way: str = request.param
    open_file = os.open

    def refuse(*arguments: Any, **_: Any) -> Any:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    def open_named(path: Any, flags: int, *mode: int, **how: Any) -> Any:
        return refuse() if is_unnamed(flags) else open_file(path, flags, *mode, **how)

    if way == "no such flag":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    elif way == "no such files":
        monkeypatch.setattr(os, "open", open_named)
    elif way == "no link to them":
        monkeypatch.setattr(os, "link", refuse)
    return way


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    files.write_text(path, "first")
    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        assert temporary.suffix == ".txt" and temporary.parent == path.parent
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_a_link(tmp_path: Path, exists: bool, way: str) -> None:
    target, link = tmp_path / "real" / "a.bin", tmp_path / "a.bin"
    target.parent.mkdir()
    if exists:
        target.write_bytes(b"old")
    link.symlink_to(target)
    files.write_bytes(link, b"new")
    assert link.is_symlink() and not target.is_symlink()
    assert target.read_bytes() == b"new"
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["a.bin", "real", "real/a.bin"]  # fmt: skip


def test_a_device_stays_a_device(way: str) -> None:
    files.write_bytes(Path(os.devnull), b"x" * 1000)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_a_fifo_is_written_into(tmp_path: Path, way: str) -> None:
    path = tmp_path / "pipe.json"
    os.mkfifo(path)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()))
    reader.start()
    files.write_text(path, "{}" * 100_000)
    reader.join(timeout=30)
    assert read == [b"{}" * 100_000]
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe.json"]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from trtdet import files\n"
        "with files.atomic_path(Path(sys.argv[1])) as t: t.write_text('half'); os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "a.json"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=Path(files.__file__).parents[1]
    )
    assert done.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".a.")
    with files.atomic_path(path) as mine:  # that of a process which is alive stays
        files.write_text(path, "whole")
        assert mine.exists() and not left.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_was_removed_is_made_again(tmp_path: Path, way: str) -> None:
    path = tmp_path / "a" / "b" / "c.txt"
    for text in ("first", "second"):
        files.write_text(path, text)
        assert path.read_text() == text
        shutil.rmtree(tmp_path / "a")


def test_a_folder_is_looked_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:  # fmt: skip
    """Else writing many files takes time that grows with the square of their number."""
    looks: list[Path] = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: looks.append(folder) or listdir(folder))
    for number in range(20):
        files.write_text(tmp_path / f"{number}.txt", "")
    assert looks == [tmp_path]


def test_long_names_of_any_alphabet_can_be_written(tmp_path: Path, way: str) -> None:
    for name in ("x" * 250 + ".txt", "\N{GRINNING FACE}" * 62 + ".tsv"):
        assert len(name.encode()) in (252, 254)
        files.write_text(tmp_path / name, "1")
        assert (tmp_path / name).read_text() == "1"


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("umask", [0o000, 0o027, 0o077])
def test_a_file_has_the_mode_of_any_other(umask: int, exists: bool, tmp_path: Path, way: str) -> None:  # fmt: skip
    path, other = tmp_path / "a.bin", tmp_path / "other"
    before = os.umask(umask)
    try:
        if exists:
            path.touch(0o600)
        files.write_bytes(path, b"new")
        other.write_bytes(b"new")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(one.stat().st_mode) for one in (path, other)]
    assert modes == [0o666 & ~umask] * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "other"]


@needs_unnamed
@pytest.mark.parametrize("count", [0, 3, 1 << 20])
def test_a_new_file_has_no_name_before_its_own(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """And is whole when it gets that; no other is made, looked for or changed."""
    try:
        os.close(os.open(tmp_path, UNNAMED | os.O_WRONLY))
    except OSError:
        pytest.skip("this file system has no files without a name")
    seen: list[tuple[list[str], int]] = []
    link = os.link

    def look(source: str, path: Path, **how: Any) -> None:
        seen.append((os.listdir(tmp_path), os.stat(source).st_size))
        link(source, path, **how)
        seen.append((os.listdir(tmp_path), os.stat(path).st_size))

    def refuse(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(os, "link", look)
    monkeypatch.setattr(files, "_temporary_beside", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    data = bytes(range(256)) * (count // 256 + 1)
    opened = len(os.listdir("/proc/self/fd"))
    files.write_bytes(tmp_path / "a.bin", data[:count])
    assert seen == [([], count), (["a.bin"], count)]
    assert (tmp_path / "a.bin").read_bytes() == data[:count]
    assert len(os.listdir("/proc/self/fd")) == opened


def test_a_file_is_replaced_and_not_written_into(tmp_path: Path, way: str) -> None:
    """Who reads the old one has the old one."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"the old one")
    with open(path, "rb") as reader:
        number = path.stat().st_ino
        files.write_bytes(path, b"new")
        assert reader.read() == b"the old one"
        assert path.read_bytes() == b"new"
        assert path.stat().st_ino != number and os.fstat(reader.fileno()).st_nlink == 0
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_two_write_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one finds the file of the first, and replaces it."""
    path = tmp_path / "a.bin"
    link = os.link

    def be_late(source: str, target: Path, **how: Any) -> None:
        path.write_bytes(b"of another one")
        link(source, target, **how)

    monkeypatch.setattr(os, "link", be_late)
    files.write_bytes(path, b"mine")
    assert path.read_bytes() == b"mine"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_what_was_left_is_removed_by_whoever_writes_another_file(tmp_path: Path, way: str) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    left = tmp_path / f".b.{files._host()}-{gone.pid}-0.txt"
    mine = tmp_path / f".b.{files._host()}-{os.getpid()}-0.txt"
    left.touch()
    mine.touch()
    files.write_bytes(tmp_path / "a.txt", b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == [mine.name, "a.txt"]


def write_on_a_full_disk(path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> OSError:
    """Returns the error. A file without a name is /dev/full then, which has room for nothing."""
    open_file = os.open

    def open_full(where: Any, flags: int, *mode: int, **how: Any) -> int:
        if is_unnamed(flags):
            return open_file("/dev/full", os.O_WRONLY)
        return open_file(where, flags, *mode, **how)

    def write(self: Path, data: bytes) -> int:
        with open(self, "wb") as half:
            half.write(data[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "open", open_full)
        full.setattr(Path, "write_bytes", write)
        with pytest.raises(OSError, match="No space left") as raised:
            files.write_bytes(path, data)
    return raised.value


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("count", [1, 1 << 20])
@pytest.mark.parametrize("place", ["a.txt", "old.txt", "b/c/a.txt"])
@pytest.mark.parametrize("unnamed", [True, False])
def test_nothing_is_left_on_a_full_disk(unnamed: bool, place: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """And the error is the same however a file is written."""
    if not unnamed:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    (tmp_path / "old.txt").write_bytes(b"old")
    opened = len(os.listdir("/proc/self/fd"))
    error = write_on_a_full_disk(tmp_path / place, b"x" * count, monkeypatch)
    assert error.errno == errno.ENOSPC and error.filename == str(tmp_path / place)
    assert error.strerror == "No space left on device; make room, or choose another folder"
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["old.txt"]
    assert (tmp_path / "old.txt").read_bytes() == b"old"
    assert len(os.listdir("/proc/self/fd")) == opened


def test_a_full_disk_is_named_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"make room.*a\.txt"), files.atomic_path(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain name.jpg", "plain name.jpg"),
        ("Größe 图.jpg", "Größe 图.jpg"),
        ("a\x1b[31mred.jpg", "a\\x1b[31mred.jpg"),
        ("two\nlines", "two\\nlines"),
        (os.fsdecode(b"\xff.jpg"), "\\udcff.jpg"),
        ("right-to-left \u202e", "right-to-left \\u202e"),
    ],
)
def test_control_characters_are_escaped(name: str, shown: str) -> None:
    assert files.printable(name) == shown


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("redirected", [True, False])
def test_what_goes_to_stdout_is_added_to_it(name: str, redirected: bool, tmp_path: Path) -> None:
    """A pipe is written into, and a file that stdout goes to is not replaced."""
    code = f"""
import sys
from pathlib import Path
from trtdet.files import write_text
print("before", flush=True)
write_text(Path("{name}"), "content\\n")
print("after")
"""
    command = [sys.executable, "-c", code]
    log = tmp_path / "log"
    if redirected:
        with log.open("ab") as file:
            subprocess.run(command, stdout=file, cwd=ROOT, check=True)
        found = log.read_text()
    else:
        found = subprocess.run(command, capture_output=True, cwd=ROOT, check=True, text=True).stdout
    assert found == "before\ncontent\nafter\n"
    assert list(tmp_path.iterdir()) == ([log] if redirected else [])


def test_threads_may_write_into_a_folder_that_is_not_there_yet(tmp_path: Path, way: str) -> None:
    """Whichever makes it, all of them write."""
    for turn in range(50):
        with ThreadPoolExecutor(4) as pool:
            paths = [tmp_path / str(turn) / f"{number}.txt" for number in range(4)]
            list(pool.map(files.write_text, paths, "abcd"))
        assert [path.read_text() for path in paths] == list("abcd")


def test_folders_that_were_made_in_vain_are_removed(tmp_path: Path) -> None:
    """But not those that were there, nor those that somebody else uses meanwhile."""
    (tmp_path / "there").mkdir()
    for place in ("a/b/c.txt", "there/d/e.txt"):
        with pytest.raises(ValueError, match="no"), files.atomic_path(tmp_path / place):
            raise ValueError("no")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    with pytest.raises(ValueError, match="no"), files.atomic_path(tmp_path / "a/b/c.txt"):
        (tmp_path / "a" / "other").touch()
        raise ValueError("no")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["a", "a/other", "there"]  # fmt: skip
    with pytest.raises(ValueError, match="no"), files.new_folder(tmp_path / "f" / "g"):
        raise ValueError("no")
    assert not (tmp_path / "f").exists()
