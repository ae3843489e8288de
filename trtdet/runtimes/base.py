# SPDX-License-Identifier: Apache-2.0
"""Runtimes: what turns a batch of images into the four outputs.

Every backend honours one contract, `Runtime`; `open_runtime` picks it by the file's suffix, or by
the URL.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trtdet.closing import Closing
from trtdet.cuda import CudaError
from trtdet.errors import EngineError
from trtdet.spec import ModelSpec


@dataclass(frozen=True)
class BatchTimes:
    """One batch on the device's own clock, milliseconds.

    Attributes:
        enqueue_ms: host time to hand the batch to the device.
        h2d_ms, compute_ms, d2h_ms: input copy, kernels, output copy.
    """

    enqueue_ms: float
    h2d_ms: float
    compute_ms: float
    d2h_ms: float

    @property
    def latency_ms(self) -> float:
        """With both transfers: trtexec's "Latency"."""
        return self.h2d_ms + self.compute_ms + self.d2h_ms


@dataclass(frozen=True, eq=False)
class DeviceImages:
    """A batch that lies in the memory of a GPU, complete.

    Attributes:
        address: of the first image; the others follow it.
        shape: (n, *image_shape).
        device: the GPU.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    device: int

    def __len__(self) -> int:
        """The number of images."""
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


#: A batch as a runtime takes it; one on a GPU only where `Runtime.images_on` says so.
Images: TypeAlias = NDArray[Any] | DeviceImages
#: Output name -> array, `trtdet.spec.OUTPUT_NAMES`. Row i of every array belongs to image i.
Outputs = dict[str, NDArray[Any]]


class ImageBatch(Protocol):
    """What a runtime needs of a batch: the images, and their files for its messages."""

    @property
    def images(self) -> Images: ...

    @property
    def paths(self) -> Sequence[Path]: ...


AnyBatch = TypeVar("AnyBatch", bound=ImageBatch)


class Runtime(Closing):
    """One loaded model: the contract of every backend.

    Use as a context manager: leaving it frees what it holds.

    A backend has to have the three attributes, `infer` and `close`. The rest has defaults, for a
    backend that runs one batch after the other out of ordinary memory.

    Attributes:
        spec: what the model is.
        batch_range: batch sizes the model takes: smallest and largest. The largest is None where
            nothing bounds it.
        description: one line for the log and for reports: backend, version, device.
        frees_cpu: whether the network runs elsewhere, on a GPU or a server. This machine's cores
            are then free for images and files, and may have to hurry.
        one_size: whether a batch of another size takes long the first time, so that all should have
            one.
        pins: whether `pin` makes any memory as good as that of `allocate`.
        images_on: the GPU whose memory batches may lie in, as `DeviceImages`; None: arrays alone
            are taken.
        without_value: the weights that are NaN, with which the model finds nothing; "": none is, as
            far as that is known.
        timed_on: of several devices, the one that `infer_timed` runs on; "": there is one.
    """

    spec: ModelSpec
    batch_range: tuple[int, int | None]
    description: str
    frees_cpu: bool = False
    one_size: bool = False
    pins: bool = False
    images_on: int | None = None
    timed_on: str = ""
    without_value: str = ""

    @abstractmethod
    def infer(self, images: Images) -> Outputs:
        """Run one batch.

        Args:
            images: (n, *spec.preprocessing.image_shape), or another size that `spec.preprocessing`
                allows, of its dtype, n within `batch_range`, C-contiguous.

        Returns:
            The four outputs, n rows each, owned by the caller (never overwritten by a later call).

        Raises:
            EngineError: the backend failed, or the batch does not fit the model.
        """

    def map(self, batches: Iterable[AnyBatch]) -> Iterator[tuple[AnyBatch, Outputs]]:
        """Run batches: each with its outputs, in order. Default: one after the other.

        A backend may have several in flight: the time from one result to the next then is not that
        of a batch.

        Raises:
            EngineError, ValueError: a batch failed; names its number and its images.
        """
        yield from run_one_by_one(self.infer, enumerate(batches))

    @property
    def preferred_batch(self) -> int:
        """The batch size to use where nobody names one, if the model takes it. Default: 8."""
        return 8

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Memory for batches that the backend can read without a copy. Default: ordinary memory."""
        return np.empty(shape, dtype)

    def pin(self, memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The same memory, which the backend can now read without a copy while this array, or a
        view of it, is alive. Default: as it is.
        """
        return memory

    def infer_timed(self, images: Images) -> BatchTimes | None:
        """Run one batch; how long its parts took on the device's own clock.

        Default: None, there is no such clock, and nothing is run.
        """
        return None


@contextmanager
def naming_batch(
    index: int, batch: ImageBatch, *, before: int = 0, after: int = 0
) -> Iterator[None]:
    """Add the number of the batch, counted from 0, and its images to the errors of the block.

    Args:
        before, after: batches that are in flight on the same GPU, older and younger. A kernel that
            faults does so for all of them: whose it was, CUDA does not say.
    """
    try:
        yield
    except (EngineError, ValueError) as error:
        names = ", ".join(str(path) for path in batch.paths)
        which = f"batch {index}"
        if isinstance(error, CudaError) and error.is_fault:
            for count, where in ((before, "before"), (after, "after")):
                if count:
                    batches = "the batch" if count == 1 else f"one of the {count} batches"
                    which += f", or {batches} {where} it on its GPU"
        kind = EngineError if isinstance(error, EngineError) else ValueError
        raise kind(f"{which}: {error} (images: {names})") from error


#: Runs a batch.
Run: TypeAlias = Callable[[Images], Outputs]


def run_one_by_one(
    run: Run, batches: Iterable[tuple[int, AnyBatch]]
) -> Iterator[tuple[AnyBatch, Outputs]]:
    """Numbered batches, each with its outputs; errors name theirs."""
    for index, batch in batches:
        with naming_batch(index, batch):
            outputs = run(batch.images)
        yield batch, outputs


def as_array(images: Images) -> NDArray[Any]:
    """Images of a runtime that takes arrays alone.

    Raises:
        ValueError: they lie on a GPU.
    """
    if isinstance(images, DeviceImages):
        raise ValueError(f"input: expected an array, got images on GPU {images.device}")
    return images


def default_batch_size(runtime: Runtime) -> int:
    """The batch size where nobody names one: what the runtime prefers, within what the model
    takes.
    """
    smallest, largest = runtime.batch_range
    preferred = runtime.preferred_batch
    return max(smallest, min(preferred, largest or preferred))


def check_batch(images: Images, spec: ModelSpec, batch_range: tuple[int, int | None]) -> None:
    """Check one batch at the border of a runtime.

    Raises:
        ValueError: shape, dtype or batch size differ from what the model takes; names both.
    """
    expected = spec.preprocessing.image_shape
    takes = spec.preprocessing.takes(images.shape[1:])
    if not takes or images.dtype != np.dtype(spec.preprocessing.dtype):
        raise ValueError(
            f"input: expected images of shape {expected} and type {spec.preprocessing.dtype}, "
            f"got {images.shape[1:]} {images.dtype}"
        )
    smallest, largest = batch_range
    if len(images) < smallest or (largest is not None and len(images) > largest):
        raise ValueError(
            f"input: expected a batch of {smallest} to {largest or 'any'}, got {len(images)}"
        )
