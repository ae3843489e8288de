# SPDX-License-Identifier: Apache-2.0
"""The limits of the control groups that this process is in: those of a container, of a job of a
cluster, of a service. Linux alone has them; elsewhere there is no limit.

A group's limit holds for all groups below it, so the smallest counts. Both versions are read:
https://docs.kernel.org/admin-guide/cgroup-v2.html, .../cgroup-v1/memory.html and
https://docs.kernel.org/scheduler/sched-bwc.html.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

#: Where the groups are, and which of them this process is in. A container often sees its own group
#: as the root, whatever it is called outside.
ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
#: Of version 2, then 1: the controller, the files of the limit and of what is used, and the line of
#: memory.stat with the file contents that would be dropped first.
MEMORY = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
#: No machine has so many bytes.
UNLIMITED = 1 << 60


def memory_limit() -> int | None:
    """Bytes; None where there is no limit."""
    limits = [
        limit
        for controller, file, *_ in MEMORY
        for folder in _groups(controller)
        if (limit := _maybe_number(folder / file)) is not None
    ]
    return min(limits, default=None)


def memory_left() -> int | None:
    """Bytes that can still be taken; None where there is no limit. File contents that the system
    would drop first do not count as taken.
    """
    left = []
    for controller, limit_file, used_file, dropped in MEMORY:
        for folder in _groups(controller):
            limit, used = _maybe_number(folder / limit_file), _maybe_number(folder / used_file)
            files = maybe_field(folder / "memory.stat", dropped)
            if limit is not None and used is not None and files is not None:
                left.append(max(0, limit - used + files))
    return min(left, default=None)


def cpu_limit() -> float | None:
    """CPU time a second, so 1.5 for one and a half cores; None where there is no limit."""
    limits = []
    for folder in _groups(""):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):
            limits.append(int(quota) / int(period))
    for folder in _groups("cpu"):
        time, per = (_maybe_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if time is not None and per:
            limits.append(time / per)
    return min(limits, default=None)


def maybe_field(path: Path, name: str) -> int | None:
    """The number behind a name in a file of such lines; None where the file does not have it."""
    for line in _text(path).splitlines():
        words = line.split()
        if words[:1] == [name] and words[1:] and words[1].isdecimal():
            return int(words[1])
    return None


def _groups(controller: str) -> Iterator[Path]:
    """The folders of the group that this process is in, and of all above it, in the hierarchy of
    a controller of version 1, or with "" of version 2. Not all need to be there.
    """
    own = PurePosixPath("/")
    for line in _text(OWN).splitlines():
        _, _, named = line.partition(":")
        controllers, _, path = named.partition(":")
        if controller in controllers.split(",") and path.startswith("/"):
            own = PurePosixPath(path)
    for group in (own, *own.parents):
        yield ROOT / controller / str(group).lstrip("/")


def _maybe_number(path: Path) -> int | None:
    """None where there is no such file, and for what says that there is no limit: "max", -1, and
    the largest number of whole pages.
    """
    text = _text(path)
    return int(text) if text.isdecimal() and int(text) < UNLIMITED else None


def _text(path: Path) -> str:
    """Empty where the file cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
