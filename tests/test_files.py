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

import pytest
from conftest import ROOT

from trtdet import files


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
def test_a_link_stays_a_link(tmp_path: Path, exists: bool) -> None:
    target, link = tmp_path / "real" / "a.bin", tmp_path / "a.bin"
    target.parent.mkdir()
    if exists:
        target.write_bytes(b"old")
    link.symlink_to(target)
    files.write_bytes(link, b"new")
    assert link.is_symlink() and not target.is_symlink()
    assert target.read_bytes() == b"new"


def test_a_device_stays_a_device() -> None:
    files.write_bytes(Path(os.devnull), b"x" * 1000)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_a_fifo_is_written_into(tmp_path: Path) -> None:
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


def test_a_folder_that_was_removed_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.txt"
    for text in ("first", "second"):
        files.write_text(path, text)
        assert path.read_text() == text
        shutil.rmtree(tmp_path / "a")


def test_a_folder_is_looked_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else writing many files takes time that grows with the square of their number."""
    looks: list[Path] = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: looks.append(folder) or listdir(folder))
    for number in range(20):
        files.write_text(tmp_path / f"{number}.txt", "")
    assert looks == [tmp_path]
    umask = os.umask(0o027)
    try:
        files.write_text(tmp_path / "mode.txt", "")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "mode.txt").stat().st_mode) == 0o640


def test_long_names_of_any_alphabet_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 250 + ".txt", "\N{GRINNING FACE}" * 62 + ".tsv"):
        assert len(name.encode()) in (252, 254)
        files.write_text(tmp_path / name, "1")
        assert (tmp_path / name).read_text() == "1"


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


def test_threads_may_write_into_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    """Whichever makes it, all of them write."""
    for turn in range(300):
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
