# SPDX-License-Identifier: Apache-2.0
"""Where the time of `ImageBatcher` goes, step by step: of the clock and of the processor, with one
worker and with all.

A step that takes longer on the clock than of the processor has waited: for Python's lock, for the
disk, or for a core.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtdet.images import batcher, files
from trtdet.images.batcher import ImageBatcher
from trtdet.images.preprocess import Placer
from trtdet.spec import Preprocessing

#: What is timed -> where it is.
STEPS: dict[str, tuple[Any, str]] = {
    "read the file": (files, "_read_short"),
    "decode": (files, "_decode_jpeg"),
    "resize into the batch": (Placer, "place"),
    "hand over": (batcher._Filling, "finish"),
}
REST = "wait for work"


@dataclass(frozen=True)
class Step:
    """Microseconds per image."""

    wall_us: float
    cpu_us: float

    @property
    def waited_us(self) -> float:
        return self.wall_us - self.cpu_us


class Timer:
    """Adds up the times of one step, over all threads."""

    def __init__(self) -> None:
        self._times: list[tuple[float, float]] = []  # append is one step of Python

    def wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._times.append((time.perf_counter() - wall, time.thread_time() - cpu))

        return timed

    def per(self, images: int) -> Step:
        wall, cpu = (sum(column) for column in zip(*self._times, strict=True))
        return Step(wall / images * 1e6, cpu / images * 1e6)


@contextmanager
def timed_steps() -> Iterator[dict[str, Timer]]:
    """Time `STEPS` within the block."""
    timers = {name: Timer() for name in STEPS}
    with ExitStack() as stack:
        for name, (owner, attribute) in STEPS.items():
            honest = getattr(owner, attribute)
            stack.callback(setattr, owner, attribute, honest)
            setattr(owner, attribute, timers[name].wrapped(honest))
        yield timers


def profile(
    paths: Sequence[Path], preprocessing: Preprocessing, batch_size: int, workers: int
) -> dict[str, Step]:
    """The steps of one run over `paths`, and what is left of the workers' time."""
    begin, cpu = time.perf_counter(), time.process_time()
    with timed_steps() as timers, ImageBatcher(paths, preprocessing, batch_size, workers=workers) as batches:  # fmt: skip
        for batch in batches:
            batch.release()
    wall_us = (time.perf_counter() - begin) * workers / len(paths) * 1e6
    cpu_us = (time.process_time() - cpu) / len(paths) * 1e6
    steps = {name: timer.per(len(paths)) for name, timer in timers.items()}
    rest_wall, rest_cpu = (sum(getattr(step, name) for step in steps.values()) for name in ("wall_us", "cpu_us"))  # fmt: skip
    return steps | {REST: Step(wall_us - rest_wall, cpu_us - rest_cpu)}


def lines(alone: dict[str, Step], together: dict[str, Step], workers: int) -> list[str]:
    """The table to print."""
    found = [
        f"microseconds per image and worker {'1 worker':>18}{f'{workers} workers':>25}",
        f"{'':<24}{'clock':>10}{'CPU':>8}{'waits':>8}{'clock':>10}{'CPU':>8}{'waits':>8}",
    ]
    for name, one in alone.items():
        columns = "".join(
            f"{step.wall_us:>10.0f}{step.cpu_us:>8.0f}{step.waited_us:>8.0f}"
            for step in (one, together[name])
        )
        found.append(f"{name:<24}{columns}")
    threads = threading.active_count()
    return [*found, f"(process {os.getpid()} has {threads} threads after the run)"] if threads > 64 else found  # fmt: skip
