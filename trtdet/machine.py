# SPDX-License-Identifier: Apache-2.0
"""The machine a program runs on: how many cores it may use, and what a measured figure was
measured on.
"""

import math
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TypedDict

from trtdet import cgroups

#: Packages whose version explains a figure.
PACKAGES = ("tensorrt", "tensorrt_rtx", "onnxruntime", "onnxruntime-gpu", "cuda-bindings", "numpy", "opencv-python-headless", "pillow")  # fmt: skip
#: Where Linux says how much memory is free.
MEMINFO = Path("/proc/meminfo")


def available_cores() -> int:
    """CPU cores this process may use: of its affinity where the system has one, no more than the
    CPU time of its container is worth, not the machine's count.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    limit = cgroups.cpu_limit()
    return cores if limit is None else max(1, min(cores, math.ceil(limit)))


class Machine(TypedDict):
    """What a figure was measured on."""

    system: str
    cpu: str
    cpu_cores: int
    memory_gib: float | None
    gpus: list[str]
    python: str
    packages: dict[str, str]


def describe_machine() -> Machine:
    """The machine this process runs on. Nothing that identifies it: no host name, no paths."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cpu_cores": available_cores(),
        "memory_gib": memory_gib(),
        "gpus": _gpus(),
        "python": platform.python_version(),
        "packages": packages,
    }


def cpu_name() -> str:
    """The processor, as the system calls it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def memory_gib() -> float | None:
    """Memory this process may use: the machine's, or less in a container; None where the system
    does not say.
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None  # not POSIX
    limit = cgroups.memory_limit()
    return round((memory if limit is None else min(memory, limit)) / 2**30, 1)


def part_of_memory(part: float, most: int) -> float:
    """Bytes: this part of the memory that there is, but no more than `most`, which it is where the
    system does not say.
    """
    memory = memory_gib()
    return most if memory is None else min(most, memory * 2**30 * part)


def available_memory() -> int | None:
    """Bytes that programs can still get, of the machine and of the container that this one runs in;
    None where the system does not say. Linux alone does.
    """
    free = cgroups.maybe_field(MEMINFO, "MemAvailable:")  # KiB
    if free is None:
        return None
    left = cgroups.memory_left()
    return 1024 * free if left is None else min(1024 * free, left)


def resident_memory() -> int | None:
    """Bytes of memory that this process has; None where the system does not say. Linux alone
    does.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _gpus() -> list[str]:
    """One line per GPU, from the driver's own tool; none where it is missing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = "--query-gpu=name,memory.total,driver_version,clocks.max.sm"
    try:
        done = subprocess.run(
            [tool, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        )
    except subprocess.TimeoutExpired:  # a driver in trouble: what is described does without it
        return []
    return [line.strip() for line in done.stdout.splitlines()] if done.returncode == 0 else []


def parse_version(text: str) -> tuple[int, ...]:
    """The leading integers of a version: "8.6.1.post1" -> (8, 6, 1), "10.0.0b6" -> (10, 0, 0).

    Raises:
        ValueError: it does not begin with a number.
    """
    match = re.match(r"\d+(\.\d+)*", text)
    if match is None:
        raise ValueError(f"expected a version such as 10.13.3, found {text!r}")
    return tuple(map(int, match[0].split(".")))
