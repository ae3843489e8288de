# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all, and their hashes."""

import errno
import hashlib
import math
import os
import platform
import re
import shlex
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path

#: Bytes of a temporary name that come from the file's own: with the rest it stays below the 255
#: that file systems take.
_STEM_BYTES = 80
#: Seconds until a folder is looked through again for what killed processes left.
_SEARCH_AGAIN_S = 60.0
#: Folder -> when that was done.
_searched: dict[Path, float] = {}
#: Of temporary files, different in each name.
_numbers = count()
#: How files of other kinds begin.
OTHER_FILES = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"PK\x03\x04": "a ZIP archive, as PyTorch's .pt and Keras' .keras are",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive",
    b"version https://git-lfs": "a pointer of Git LFS (git lfs pull gets the file)",
}
#: What text consists of: printable ASCII, tabs and ends of lines.
TEXT_BYTES = frozenset((*range(0x20, 0x7F), *b"\t\n\r"))


#: What writing ends with where there is no room, or a limit, or a fault of the disk.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


#: Letters that are shown of a word of twice as many.
_LONG_WORD = 250


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it into place if the block succeeds, else delete
    it.

    Parent folders are made, and removed again if the block fails. The temporary name keeps the
    suffix, for writers that look at it, and holds host and process, so that what a killed process
    left is found and removed by the next one that writes the same file. A symbolic link is
    followed: the file that it names is replaced, the link stays. A device or a FIFO is never
    replaced: it is written into when the block has succeeded.

    Raises:
        OSError: the file cannot be written; names it, also where the disk is full.
    """
    path = Path(path)
    try:
        if _is_special(path):
            with tempfile.TemporaryDirectory() as folder:
                temporary = Path(folder, f"content{path.suffix}")
                yield temporary
                with open(temporary, "rb") as source, open(path, "ab", buffering=0) as special:
                    shutil.copyfileobj(source, special)
            return
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        new_folders = missing_folders(target)
        try:
            temporary = _temporary_beside(target)
            try:
                yield temporary
                _move(temporary, target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        except BaseException:
            remove_empty(new_folders)
            raise
    except OSError as error:
        if error.errno in NO_ROOM and not error.filename:
            raise _no_room(error, path) from error
        raise


def _no_room(error: OSError, path: Path) -> OSError:
    return OSError(error.errno, f"{error.strerror}; make room, or choose another folder", str(path))


@contextmanager
def naming_output(path: Path) -> Iterator[None]:
    """Let a full disk name what is written, not what it is copied from, nor a temporary name."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise _no_room(error, path) from error
        raise


def missing_folders(path: Path) -> list[Path]:
    """The folders above a path that are not there, the lowest first."""
    missing = []
    for folder in path.parents:
        if os.path.lexists(folder):
            break
        missing.append(folder)
    return missing


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders that a run has made for what it could not write; the lowest first, and none
    that somebody else has put a file into.
    """
    for folder in filter(os.path.isdir, folders):
        try:
            folder.rmdir()
        except OSError:
            return


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make a folder, with those above it; what is still empty goes again if the block fails."""
    missing = missing_folders(folder / "x")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        remove_empty(missing)
        raise


def _move(temporary: Path, target: Path) -> None:
    """Put a file in its place; what is wrong names the place, not the temporary name."""
    try:
        temporary.replace(target)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(target)) from error


#: Paths of files that this process has open.
_OPEN_FILE = re.compile(r"/dev/(stdout|stderr|fd/\d+)|/proc/(self|\d+)/fd/\d+")


def _is_special(path: Path) -> bool:
    """Whether this is a device, a FIFO or an open file, such as /dev/stdout, whatever that is."""
    if _OPEN_FILE.fullmatch(str(path)):
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:  # nothing there, or nothing that can be reached: writing says which
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _temporary_beside(target: Path) -> Path:
    """An empty file of a name of its own; those of processes that are gone are removed."""
    _remove_left_over_at_times(target.parent)
    stem = os.fsencode(target.stem)[:_STEM_BYTES].decode(sys.getfilesystemencoding(), "ignore")
    is_made = False
    while True:
        name = f".{stem}.{_host()}-{os.getpid()}-{next(_numbers)}{target.suffix}"
        temporary = target.with_name(name)
        try:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
            os.close(os.open(temporary, flags, 0o666))
        except FileExistsError:  # of a process that had the same number
            continue
        except FileNotFoundError as error:
            if is_made and target.parent.is_dir():  # /proc: nothing can be made in it
                raise FileNotFoundError(error.errno, error.strerror, str(target)) from error
            target.parent.mkdir(parents=True, exist_ok=True)
            is_made = True  # by this thread, or by another one meanwhile
            continue
        except OSError as error:  # names the file that is written, not the temporary one
            raise type(error)(error.errno, error.strerror, str(target)) from error
        return temporary


@cache
def _host() -> str:
    """Of all machines and containers whose process numbers mean other processes."""
    try:
        space = re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    except OSError:  # no Linux
        space = "0"
    return f"{platform.node() or 'host'}-{space}"


def _remove_left_over_at_times(folder: Path) -> None:
    """`remove_left_over`, but each folder once in a while: a look at all names takes longer than to
    write a file.
    """
    now = time.monotonic()
    if now - _searched.get(folder, -math.inf) >= _SEARCH_AGAIN_S:
        _searched[folder] = now
        remove_left_over(folder)


def remove_left_over(folder: Path) -> None:
    """Remove what killed processes of this machine left in a folder."""
    kept = re.compile(rf"\..*\.{re.escape(_host())}-(\d+)-", re.DOTALL)
    for name in os.listdir(folder) if folder.is_dir() else ():
        made = kept.match(name)
        if made and not _is_running(int(made[1])):
            (folder / name).unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    """Whether a process of this machine is alive; where that cannot be told, it is taken to be."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def printable(text: object) -> str:
    """A name as it may go to a terminal: control characters and bytes that are no text are escaped.

    A file name may hold any byte but / and NUL, and a terminal obeys some.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in str(text)
    )


def printable_lines(text: str) -> str:
    """The same of a text of several lines: tables with names of files and tensors in them."""
    return "\n".join(printable(line) for line in text.split("\n"))


def shell_line(words: Iterable[str]) -> str:
    """A command line for a shell, each word quoted; one with control characters or bytes that
    are no text as bash's $'...', exact and printable.
    """
    return " ".join(
        shlex.quote(word)
        if word.isprintable()
        else f"$'{''.join(map(_escaped, os.fsencode(word)))}'"
        for word in words
    )


def _escaped(byte: int) -> str:
    plain = 0x20 <= byte < 0x7F and byte not in b"'\\"
    return chr(byte) if plain else f"\\x{byte:02x}"


def message_of(error: BaseException) -> str:
    """An error in one line, the operating system's with the file first and without its number."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        reason = error.strerror[0].lower() + error.strerror[1:]
        text = f"{error.filename}: {reason}" if error.filename else reason
        if error.errno in NO_ROOM and not error.filename:  # of no file that anybody has named
            text += "; make room, also where temporary files are (TMPDIR, else /tmp)"
    text = re.sub(r"\[Errno -?\d+\] ", "", text)
    return shortened(printable(" ".join(text.split()))) or type(error).__name__


def shortened(text: str) -> str:
    """A message without what nobody reads of it: the rest of a word of hundreds of letters,
    which stood in a damaged file.
    """
    return re.sub(rf"\S{{{2 * _LONG_WORD},}}", lambda word: f"{word[0][:_LONG_WORD]}...", text)


def read_text(path: Path) -> str:
    """The contents of a text file; a byte order mark is passed over.

    Raises:
        OSError: not readable; names the file.
        ValueError: no regular file, or not UTF-8; names the file.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, found other bytes ({error})") from error


def check_input(path: Path, option: str, what: str) -> None:
    """Find out before long work whether a file that an option names is there.

    Raises:
        FileNotFoundError: names the option, and says what was expected.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{option}: expected {what}, found {found_at(path)} at {path}")


#: What a path may lead to, by `stat`: to be read, only a regular file will do. A FIFO waits for
#: ever, a device may have no end.
_KINDS = {
    stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip


#: Of a symbolic link.
LOOP = "a link that leads to itself"


def found_at(path: Path) -> str:
    """What is at a path, in words."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            return LOOP
        if isinstance(error, PermissionError):
            return "a path you may not read"
        return "a link to nothing" if os.path.islink(path) else "nothing"
    return _KINDS.get(stat.S_IFMT(mode), "no regular file")


def is_beside(path: Path) -> bool:
    """Whether a file that may be missing, such as an engine's `.json`, is there.

    Raises:
        ValueError: something else is, which nobody put there to be passed over.
    """
    if not os.path.lexists(path):
        return False
    if not Path(path).is_file():
        raise ValueError(f"{path}: expected a file, found {found_at(path)}; put the file there, or remove that")  # fmt: skip
    return True


def read_bytes(path: Path) -> bytes:
    """The contents of a regular file.

    Raises:
        OSError: not readable; names the file.
        ValueError: a FIFO, which would wait for ever, or a device, which may have no end.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{path}: expected a file, found {found_at(path)}")
    return Path(path).read_bytes()


def kind_of(start: bytes) -> str:
    """What a file is, by its first bytes: one that can be neither a model nor an engine; "" for
    others.
    """
    if not start:
        return "an empty file"
    for magic, kind in OTHER_FILES.items():
        if start.startswith(magic):
            return kind
    return "a text file" if all(byte in TEXT_BYTES for byte in start) else ""


def check_writable(path: Path) -> None:
    """Find out before long work whether a file can be written.

    Raises:
        ValueError: the path is a folder, or the folder it shall be in cannot be made or written to.
    """
    path = Path(path)
    if path.is_dir() or (os.path.islink(path) and found_at(path) == LOOP):
        raise ValueError(f"{path}: expected the name of a file to write, found {found_at(path)}")
    existing = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(
            f"{path}: cannot be written, {existing} is not a folder that takes files; choose another"
        )


def check_folder(folder: Path, option: str = "--output") -> None:
    """Find out before long work whether files can be written into a folder, which is made later.

    Raises:
        OSError: it is a file, or lies below one, or takes no files.
    """
    existing = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not existing.is_dir():
        raise OSError(f"{option}: expected a folder, {existing} is {found_at(existing)}; choose another name")  # fmt: skip
    if not os.access(existing, os.W_OK):
        raise OSError(f"{option}: {existing} takes no files from you; choose another folder")


def check_outputs(outputs: Iterable[Path | None], inputs: Iterable[Path | None]) -> None:
    """Find out before long work whether every output can be written, and that none is an input or
    another output.

    Raises:
        ValueError: names the file.
    """
    taken = {os.path.realpath(path) for path in inputs if path is not None}
    for path in outputs:
        if path is None:
            continue
        check_writable(path)
        if (target := os.path.realpath(path)) in taken:
            raise ValueError(f"{path}: is an input, or written twice; give the output another name")
        taken.add(target)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    path = Path(path)
    if not _write_new(path, data):
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)


def _write_new(path: Path, data: bytes) -> bool:
    """Write a file that has no name until it is whole, where there is nothing yet.

    Processes that write many files into one folder wait for each other whenever a name is looked
    for, made or changed: here one is made, and that is all.

    Returns:
        False: it cannot be done in this way. There is something, or no such folder, or no room, or
        the system does not have such files.
    """
    if not hasattr(os, "O_TMPFILE") or not _has_proc():
        return False
    try:
        file = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    except OSError:
        return False
    try:
        with open(file, "wb") as unnamed:
            _remove_left_over_at_times(path.parent)
            unnamed.write(data)
            unnamed.flush()
            # A folder makes Python call the system's function that follows the link in /proc.
            os.link(f"/proc/self/fd/{file}", path, src_dir_fd=file, follow_symlinks=True)
    except OSError:
        return False
    return True


@cache
def _has_proc() -> bool:
    """Whether there is /proc, through which a file without a name gets one."""
    return os.path.isdir("/proc/self/fd")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, UTF-8; bytes of file names that are no text are
    escaped.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def sha256(*paths: Path) -> str:
    """The SHA-256, in hex, of the bytes of one file, or of several files one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
