# SPDX-License-Identifier: Apache-2.0
"""Frames -> batches: one thread decodes, a pool places them in the network input, ahead of the
consumer.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtdet.closing import Closing
from trtdet.geometry import ResizeTransform
from trtdet.images.batch import Batch
from trtdet.images.batcher import Allocate
from trtdet.images.options import Resample
from trtdet.images.preprocess import ShorterSide, preprocess
from trtdet.machine import available_cores
from trtdet.spec import Preprocessing
from trtdet.video.source import Frame, Source

#: Batches that are decoded ahead.
AHEAD = 2


class FrameBatcher(Closing):
    """The frames of a `Source` as `Batch`es; `paths` of a batch are the numbers of its frames.

    A file waits for the consumer. A live source does not: where frames come faster than they are
    taken, the oldest are dropped, so what is shown is never more than `AHEAD` batches old.

    Attributes:
        dropped: frames of a live source that nobody took.
        seconds: number of a frame -> its time, of those handed out.
    """

    def __init__(
        self,
        source: Source,
        preprocessing: Preprocessing,
        batch_size: int,
        *,
        resample: Resample | None = None,
        resize: ShorterSide | None = None,
        workers: int | None = None,
        pad_to_batch: bool = False,
        allocate: Allocate = np.empty,
    ) -> None:
        self._source, self._preprocessing, self._batch_size = source, preprocessing, batch_size
        self._resample, self._resize = resample, resize
        self._workers = workers or available_cores()
        self._pad, self._allocate = pad_to_batch, allocate
        self._limit = AHEAD * batch_size
        self._waiting: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._stopped = self._done = False
        self._error: BaseException | None = None
        self.dropped = 0
        self.seconds: dict[int, float] = {}

    def close(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def __length_hint__(self) -> int:
        """Batches that a file has, where that is known; 0: a live source, of which each is to be
        looked at as it comes.
        """
        return 0 if self._source.is_live else -(-(self._source.expected or 0) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        reader = threading.Thread(target=self._read, name="video-reader", daemon=True)
        reader.start()
        try:
            with ThreadPoolExecutor(self._workers, thread_name_prefix="video") as pool:
                pending: queue.SimpleQueue[Future[Batch]] = queue.SimpleQueue()
                for frames in self._groups():
                    pending.put(pool.submit(self._batch, frames))
                    if self._source.is_live or pending.qsize() > AHEAD:
                        yield pending.get().result()
                while not pending.empty():
                    yield pending.get().result()
        finally:
            self.close()
            reader.join()
        if self._error is not None:
            raise self._error

    def _read(self) -> None:
        """What the reader's thread does."""
        try:
            for frame in self._source:
                with self._changed:
                    if self._source.is_live:
                        while len(self._waiting) >= self._limit:
                            self._waiting.popleft()
                            self.dropped += 1
                    else:
                        self._changed.wait_for(lambda: self._stopped or len(self._waiting) < self._limit)  # fmt: skip
                    if self._stopped:
                        return
                    self._waiting.append(frame)
                    self._changed.notify_all()
        except BaseException as error:  # the consumer raises it
            self._error = error
        finally:
            with self._changed:
                self._done = True
                self._changed.notify_all()

    def _groups(self) -> Iterator[list[Frame]]:
        """Frames of one batch: full ones of a file; of a live source what is there, at least
        one.
        """
        while True:
            wanted = 1 if self._source.is_live else self._batch_size
            with self._changed:
                self._changed.wait_for(lambda: self._done or self._stopped or len(self._waiting) >= wanted)  # noqa: B023  # fmt: skip
                count = min(self._batch_size, len(self._waiting))
                group = [self._waiting.popleft() for _ in range(count)]
                self._changed.notify_all()
            if not group or self._stopped:
                return
            yield group

    def _batch(self, frames: list[Frame]) -> Batch:
        """Place some frames, one after the other: batches, not frames, are what the pool works
        on at the same time.
        """
        preprocessing = self._preprocessing
        if self._resize:
            sizes = [frame.pixels.shape[:2] for frame in frames]
            preprocessing = preprocessing.at(self._resize.canvas(sizes, preprocessing))
        rows = self._batch_size if self._pad else len(frames)
        images: NDArray[Any] = self._allocate((rows, *preprocessing.image_shape), np.dtype(preprocessing.dtype))  # fmt: skip
        images[len(frames) :] = 0
        transforms: list[ResizeTransform] = []
        for frame, out in zip(frames, images, strict=False):
            scale = self._resize.scale(frame.pixels.shape) if self._resize else None
            transforms.append(preprocess(frame.pixels, preprocessing, resample=self._resample, scale=scale, out=out)[1])  # fmt: skip
        self.seconds.update({frame.number: frame.seconds for frame in frames})
        paths = tuple(Path(str(frame.number)) for frame in frames)
        return Batch(images, paths, tuple(transforms), tuple(frame.pixels for frame in frames))
