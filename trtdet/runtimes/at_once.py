# SPDX-License-Identifier: Apache-2.0
"""Batches several at once, in threads."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from trtdet.runtimes.base import AnyBatch, Outputs, Run, naming_batch

#: Which part of the memory that is free may be taken by the batches that run at once.
MOST_OF_MEMORY = 1 / 2


def batches_that_fit(nbytes: int | None, free: int | None) -> int:
    """How many batches may run at once: at least 1, which it is where one of these is not known.

    Args:
        nbytes: of memory that a batch takes.
        free: bytes of memory.
    """
    if nbytes is None or free is None:
        return 1
    return max(1, int(free * MOST_OF_MEMORY / max(nbytes, 1)))


def up_to(
    nbytes: int, batches: Iterator[tuple[int, AnyBatch]], larger: list[tuple[int, AnyBatch]]
) -> Iterator[tuple[int, AnyBatch]]:
    """Numbered batches until one has more bytes, which is added to `larger`."""
    for numbered in batches:
        if numbered[1].images.nbytes > nbytes:
            larger.append(numbered)
            return
        yield numbered


def run_ahead(
    run: Run, batches: Iterable[tuple[int, AnyBatch]], at_once: int
) -> Iterator[tuple[AnyBatch, Outputs]]:
    """`run_one_by_one` in `at_once` threads, while the caller works on the outputs of earlier
    batches.
    """
    running: deque[tuple[int, AnyBatch, Future[Outputs]]] = deque()
    with ThreadPoolExecutor(at_once, thread_name_prefix="onnxruntime") as threads:
        try:
            for index, batch in batches:
                running.append((index, batch, threads.submit(run, batch.images)))
                if len(running) > at_once:
                    yield _fetch(*running.popleft())
            while running:
                yield _fetch(*running.popleft())
        finally:
            for _, _, outputs in running:
                outputs.cancel()


def _fetch(index: int, batch: AnyBatch, outputs: Future[Outputs]) -> tuple[AnyBatch, Outputs]:
    """Wait for a batch; its errors name it."""
    with naming_batch(index, batch):
        return batch, outputs.result()
