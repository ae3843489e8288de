# SPDX-License-Identifier: Apache-2.0
"""`trtdet.cgroups`: limits of memory and CPU time, as both versions of Linux's groups say them."""

from pathlib import Path

import pytest

from trtdet import cgroups

MIB = 1 << 20
#: What version 1 says of a group without a limit: the largest number of whole pages.
NO_LIMIT = 9223372036854771712


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Groups in a folder; the process is in none."""
    monkeypatch.setattr(cgroups, "ROOT", tmp_path / "groups")
    monkeypatch.setattr(cgroups, "OWN", tmp_path / "own")
    return tmp_path / "groups"


def be_in(root: Path, *lines: str) -> None:
    (root.parent / "own").write_text("".join(f"{line}\n" for line in lines))


def write(folder: Path, **files: object) -> None:
    """Files of a group, their names with _ for the first dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{content}\n")


def stat(**fields: int) -> str:
    other = {"anon": 7, "file": 9, "inactive_anon": 11, "active_file": 13}
    return "\n".join(f"{name} {value}" for name, value in (other | fields).items())


def second(folder: Path, limit: object, used_mib: int, files_mib: int) -> None:
    """A group of version 2."""
    write(folder, memory_max=limit, memory_current=used_mib * MIB, memory_stat=stat(inactive_file=files_mib * MIB))  # fmt: skip


def first(folder: Path, limit: object, used_mib: int, files_mib: int) -> None:
    """A group of version 1, whose own files are not those of all groups below it."""
    write(
        folder,
        memory_limit_in_bytes=limit,
        memory_usage_in_bytes=used_mib * MIB,
        memory_stat=stat(inactive_file=3, total_inactive_file=files_mib * MIB),
    )


@pytest.mark.parametrize(
    ("limit_mib", "used_mib", "files_mib", "left_mib"),
    [
        (4096, 1000, 0, 3096),
        (4096, 1000, 600, 3696),  # files make room
        (1024, 1024, 0, 0),
        (1024, 1500, 100, 0),  # beyond the limit
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_memory_of_a_container(version: int, limit_mib: int, used_mib: int, files_mib: int, left_mib: int, root: Path) -> None:  # fmt: skip
    """It sees its own group as the root."""
    group, folder = (first, root / "memory") if version == 1 else (second, root)
    group(folder, limit_mib * MIB, used_mib, files_mib)
    assert cgroups.memory_limit() == limit_mib * MIB
    assert cgroups.memory_left() == left_mib * MIB


def test_memory_without_a_limit(root: Path) -> None:
    assert (cgroups.memory_limit(), cgroups.memory_left()) == (None, None)
    second(root, "max", 3000, 500)
    assert (cgroups.memory_limit(), cgroups.memory_left()) == (None, None)
    first(root / "memory", NO_LIMIT, 3000, 500)
    assert (cgroups.memory_limit(), cgroups.memory_left()) == (None, None)


def test_memory_of_a_job_and_of_the_groups_above_it(root: Path) -> None:
    """The smallest limit, and what is left of the fullest."""
    be_in(root, "0::/system.slice/job_7/step:0")
    second(root / "system.slice", 8192 * MIB, 8000, 100)  # others fill it
    second(root / "system.slice" / "job_7", 4096 * MIB, 1000, 0)
    second(root / "system.slice" / "job_7" / "step:0", "max", 900, 0)
    second(root / "system.slice" / "job_8", 16 * MIB, 16, 0)  # not its own
    assert cgroups.memory_limit() == 4096 * MIB
    assert cgroups.memory_left() == 292 * MIB


def test_memory_of_a_job_of_the_first_version(root: Path) -> None:
    """Beside controllers of its own, and a second version that limits nothing."""
    be_in(root, "7:cpu,cpuacct:/other", "4:hugetlb,memory:/slurm/job_7", "0::/user.slice")
    first(root / "memory", NO_LIMIT, 5000, 0)
    first(root / "memory" / "slurm" / "job_7", 2048 * MIB, 500, 20)
    first(root / "memory" / "other", 1 * MIB, 0, 0)
    assert cgroups.memory_limit() == 2048 * MIB
    assert cgroups.memory_left() == 1568 * MIB


def test_memory_of_a_container_that_is_called_otherwise_outside(root: Path) -> None:
    be_in(root, "4:memory:/docker/0123abcd")
    first(root / "memory", 512 * MIB, 100, 0)
    assert (cgroups.memory_limit(), cgroups.memory_left()) == (512 * MIB, 412 * MIB)


@pytest.mark.parametrize("missing", ["memory.max", "memory.current", "memory.stat"])
def test_memory_where_a_file_is_missing(missing: str, root: Path) -> None:
    second(root, 1024 * MIB, 500, 0)
    assert cgroups.memory_left() == 524 * MIB
    (root / missing).unlink()
    assert cgroups.memory_left() is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("memory.stat", b"anon 1\n\nfile 2\n"),
        ("memory.stat", b"inactive_file\n"),
        ("memory.stat", b"inactive_file some\n"),
        ("memory.current", b"\n"),
        ("memory.max", b"\xff\n"),
    ],
)
def test_memory_where_the_group_says_something_else(name: str, content: bytes, root: Path) -> None:
    second(root, 1024 * MIB, 500, 0)
    (root / name).write_bytes(content)
    assert cgroups.memory_left() is None


@pytest.mark.parametrize("own", ["", "0::", "nonsense", "0::relative", "1:memory:/a/../../../etc"])
def test_groups_that_cannot_be_told(own: str, root: Path) -> None:
    """The root remains."""
    be_in(root, own)
    first(root / "memory", 512 * MIB, 100, 0)
    assert cgroups.memory_left() == 412 * MIB


def test_cpu_time_of_a_container(root: Path) -> None:
    assert cgroups.cpu_limit() is None
    write(root, cpu_max="max 100000")
    assert cgroups.cpu_limit() is None
    write(root, cpu_max="150000 100000")
    assert cgroups.cpu_limit() == 1.5
    write(root, cpu_max="150000")
    assert cgroups.cpu_limit() is None


def test_cpu_time_of_a_container_of_the_first_version(root: Path) -> None:
    write(root / "cpu", cpu_cfs_quota_us=-1, cpu_cfs_period_us=100000)
    assert cgroups.cpu_limit() is None
    write(root / "cpu", cpu_cfs_quota_us=25000)
    assert cgroups.cpu_limit() == 0.25


def test_cpu_time_of_the_groups_above(root: Path) -> None:
    be_in(root, "3:cpu,cpuacct:/pods/pod_1", "0::/pods/pod_1")
    write(root / "pods", cpu_max="800000 100000")
    write(root / "pods" / "pod_1", cpu_max="600000 200000")
    assert cgroups.cpu_limit() == 3
    write(root / "cpu" / "pods", cpu_cfs_quota_us=200000, cpu_cfs_period_us=100000)
    assert cgroups.cpu_limit() == 2
