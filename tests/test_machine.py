# SPDX-License-Identifier: Apache-2.0
"""`trtdet.machine`: how much memory is free, and how much this process has."""

import mmap
import os
import sys
from pathlib import Path

import pytest

from trtdet import cgroups, machine

MIB = 1 << 20
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone says it")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GiB free, in a folder; no group limits it."""
    (tmp_path / "meminfo").write_text(
        "MemTotal:       16777216 kB\nMemFree:         1048576 kB\n\nMemAvailable:    8388608 kB\nHugePages_Total:       0\n"
    )
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(cgroups, "memory_left", lambda: None)
    return tmp_path


@pytest.mark.parametrize(
    ("left_mib", "free_mib"), [(None, 8192), (3096, 3096), (9000, 8192), (0, 0)]
)
def test_free_memory_is_the_machines_or_what_the_group_has_left(left_mib: int | None, free_mib: int, system: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    left = None if left_mib is None else left_mib * MIB
    monkeypatch.setattr(cgroups, "memory_left", lambda: left)
    assert machine.available_memory() == free_mib * MIB


@pytest.mark.parametrize("text", [None, "", "MemTotal: 16777216 kB\nMemFree: 1048576 kB\n"])
def test_memory_where_the_system_says_nothing(text: str | None, system: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(cgroups, "memory_left", lambda: 524 * MIB)
    (system / "meminfo").unlink()
    if text is not None:
        (system / "meminfo").write_text(text)
    assert machine.available_memory() is None


@pytest.mark.parametrize(
    ("limit", "cores"), [(None, 16), (64.0, 16), (2.0, 2), (1.5, 2), (0.25, 1), (0.0, 1)]
)
def test_cores_are_no_more_than_the_cpu_time_of_the_group(limit: float | None, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(cgroups, "cpu_limit", lambda: limit)
    assert machine.available_cores() == cores


def test_memory_is_no_more_than_the_limit_of_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "memory_limit", lambda: None)
    whole = machine.memory_gib()
    assert whole is not None
    monkeypatch.setattr(cgroups, "memory_limit", lambda: 1 << 60)
    assert machine.memory_gib() == whole
    monkeypatch.setattr(cgroups, "memory_limit", lambda: 512 * MIB)
    assert machine.memory_gib() == 0.5
    assert machine.part_of_memory(0.25, 1 << 40) == 128 * MIB
    assert machine.part_of_memory(0.25, MIB) == MIB


@LINUX
def test_memory_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {line.split()[0]: int(line.split()[1]) << 10 for line in Path("/proc/meminfo").read_text().splitlines()}  # fmt: skip
    limited = machine.available_memory()
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
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
