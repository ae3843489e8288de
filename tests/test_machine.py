# SPDX-License-Identifier: Apache-2.0
"""`trtdet.machine`: how much memory is free, and how much this process has."""

import mmap
import sys
from pathlib import Path

import pytest

from trtdet import machine

MIB = 1 << 20
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone says it")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GiB free, in a folder; the files of its group are not there."""
    (tmp_path / "meminfo").write_text(
        "MemTotal:       16777216 kB\nMemFree:         1048576 kB\n\nMemAvailable:    8388608 kB\nHugePages_Total:       0\n"
    )
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    return tmp_path


def group(folder: Path, limit: str, used_mib: int, files_mib: int) -> None:
    """The files of a group, as the kernel writes them."""
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used_mib * MIB}\n")
    stat = {"anon": 7, "file": 9, "inactive_anon": 11, "active_file": 13, "inactive_file": files_mib * MIB}  # fmt: skip
    (folder / "memory.stat").write_text("".join(f"{name} {n}\n" for name, n in stat.items()))


@pytest.mark.parametrize(
    ("limit", "used_mib", "files_mib", "free_mib"),
    [
        ("max", 3000, 500, 8192),  # no limit: the machine's
        (str(4096 * MIB), 1000, 0, 3096),
        (str(4096 * MIB), 1000, 600, 3696),  # of files that make room
        (str(16384 * MIB), 1000, 0, 8192),  # more than the machine has
        (str(1024 * MIB), 1024, 0, 0),
        (str(1024 * MIB), 1500, 100, 0),  # beyond the limit
    ],
)
def test_memory_of_a_container(limit: str, used_mib: int, files_mib: int, free_mib: int, system: Path) -> None:  # fmt: skip
    group(system, limit, used_mib, files_mib)
    assert machine.available_memory() == free_mib * MIB


@pytest.mark.parametrize("missing", ["memory.max", "memory.current", "memory.stat", "all"])
def test_memory_where_the_group_says_nothing(missing: str, system: Path) -> None:
    group(system, str(1024 * MIB), 500, 0)
    assert machine.available_memory() == 524 * MIB
    for name in ("memory.max", "memory.current", "memory.stat"):
        if missing in (name, "all"):
            (system / name).unlink()
    assert machine.available_memory() == 8192 * MIB


@pytest.mark.parametrize(
    ("name", "text"), [("memory.stat", "anon 1\n\nfile 2\n"), ("memory.current", "\n")]
)
def test_memory_where_the_group_says_something_else(name: str, text: str, system: Path) -> None:
    group(system, str(1024 * MIB), 500, 0)
    (system / name).write_text(text)
    assert machine.available_memory() == 8192 * MIB


@pytest.mark.parametrize("text", [None, "", "MemTotal: 16777216 kB\nMemFree: 1048576 kB\n"])
def test_memory_where_the_system_says_nothing(text: str | None, system: Path) -> None:
    group(system, str(1024 * MIB), 500, 0)
    (system / "meminfo").unlink()
    if text is not None:
        (system / "meminfo").write_text(text)
    assert machine.available_memory() is None


@LINUX
def test_memory_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {line.split()[0]: int(line.split()[1]) << 10 for line in Path("/proc/meminfo").read_text().splitlines()}  # fmt: skip
    limited = machine.available_memory()
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    free = machine.available_memory()
    assert free is not None and limited is not None and limited < said["MemTotal:"]
    assert abs(free - said["MemAvailable:"]) < 1024 * MIB  # others come and go


def said_resident() -> int:
    """Bytes, by another file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmRSS:")))


@LINUX
def test_memory_of_this_process() -> None:
    """It has what it has touched, of memory from the system itself: malloc may keep what is
    freed.
    """
    before = machine.resident_memory()
    assert before is not None and abs(before - said_resident()) < 8 * MIB
    with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as taken:
        untouched = machine.resident_memory()
        assert untouched is not None and abs(untouched - before) < 8 * MIB
        for page in range(0, 64 * MIB, mmap.PAGESIZE):
            taken[page] = 1
        after = machine.resident_memory()
        assert after is not None and abs(after - before - 64 * MIB) < 8 * MIB
    freed = machine.resident_memory()
    assert freed is not None and abs(freed - before) < 8 * MIB
