# SPDX-License-Identifier: Apache-2.0
"""The two things of which `trtdet.runtimes.trt` has several: batches in flight, and execution
contexts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from numpy.typing import NDArray

from trtdet import cuda
from trtdet.engine.flavor import engine_error
from trtdet.errors import EngineError
from trtdet.runtimes.base import DeviceImages, Images
from trtdet.runtimes.trt_load import LoadedEngine

if TYPE_CHECKING:
    import tensorrt

logger = logging.getLogger(__name__)


class Lane:
    """One execution context and the stream it runs on.

    A context runs one batch at a time: its scratch memory is one.
    """

    def __init__(self, engine: LoadedEngine, *, cuda_graph: bool, resources: ExitStack) -> None:
        self._engine = engine
        self._use_graphs = cuda_graph
        self.stream = resources.enter_context(cuda.Stream())
        self._context: tensorrt.IExecutionContext = engine.create_context()
        self._shape: tuple[int, tuple[int, ...]] | None = None  # profile, shape of the input
        self._has_run = False  # with this shape
        self._bound: Slot | None = None  # whose addresses the context has
        self._graphs: dict[Slot, cuda.Graph] = {}
        resources.callback(self._close)

    def _close(self) -> None:
        self._free_graphs()
        self._bound = None
        del self._context

    def _free_graphs(self) -> None:
        while self._graphs:
            self._graphs.popitem()[1].close()

    def set_shape(self, profile: int, shape: tuple[int, ...]) -> None:
        """Prepare for batches of this shape. Earlier batches may still be running."""
        if (profile, shape) == self._shape:
            return
        if self._graphs:
            self.stream.synchronize()  # they may be running
            self._free_graphs()
        self._shape, self._bound, self._has_run = None, None, False
        context, stream = self._context, int(self.stream.handle)
        with self._refused() as refuse:
            switch = context.active_optimization_profile != profile
            if switch and not context.set_optimization_profile_async(profile, stream):
                refuse(f"set_optimization_profile_async({profile})")
            name = self._engine.input.name
            if not self._engine.static and not context.set_input_shape(name, shape):
                refuse(f"set_input_shape{shape}")
        self._shape = (profile, shape)

    def run(self, slot: Slot) -> None:
        """Queue the network on the slot's buffers."""
        if self._use_graphs and slot not in self._graphs and self._has_run:
            self._capture(slot)
        if slot in self._graphs:
            self._graphs[slot].launch(self.stream)
        else:
            self._execute(slot)
            self._has_run = True

    def _capture(self, slot: Slot) -> None:
        stream = int(self.stream.handle)
        try:
            if not self._engine.flavor.can_capture(self._context, stream):
                raise EngineError("it works with memory that it allocates as it runs")
            self._graphs[slot] = cuda.Graph(self.stream, lambda: self._execute(slot))
        except EngineError as error:
            slot.in_end.done()  # raises where the GPU has faulted: then it is not the capture that failed
            self._use_graphs = False
            logger.warning(
                "this engine cannot be captured into a CUDA graph, running without: %s", str(error)
            )

    def _execute(self, slot: Slot) -> None:
        context = self._context
        with self._refused() as refuse:
            if self._bound is not slot:
                self._bound = None
                for name, address in self._addresses(slot):
                    if not context.set_tensor_address(name, address):
                        refuse(f"set_tensor_address({name})")
                self._bound = slot
            if not context.execute_async_v3(int(self.stream.handle)):
                refuse("execute_async_v3")

    def _addresses(self, slot: Slot) -> Iterator[tuple[str, int]]:
        yield self._engine.input.name, slot.device_in.handle
        layout = self._engine.output_layout(slot.batch)
        for output, offset in zip(self._engine.outputs, layout.offsets, strict=True):
            yield output.name, slot.device_out.handle + offset

    @contextmanager
    def _refused(self) -> Iterator[Callable[[str], NoReturn]]:
        """What to call where TensorRT answers False: raises with the reasons that TensorRT
        logged in the block.
        """
        with self._engine.flavor.collected_errors() as messages:

            def refuse(what: str) -> NoReturn:
                raise engine_error(f"{what} failed", messages)

            yield refuse


class Slot:
    """The buffers and marks of one batch in flight."""

    def __init__(
        self, engine: LoadedEngine, lane: Lane, copies_in: cuda.Stream, resources: ExitStack
    ) -> None:
        largest = engine.batch_range[1]
        output_bytes = engine.output_layout(largest).nbytes
        self.lane = lane
        self.device_in = resources.enter_context(cuda.DeviceBuffer(engine.input_bytes))
        self.device_out = resources.enter_context(cuda.DeviceBuffer(output_bytes))
        self.host_out = cuda.pinned_empty((output_bytes,), np.uint8)
        # For batches that are not pinned themselves.
        self._host_in: NDArray[np.uint8] | None = None
        # Rows that fill up a batch hold zeros or an earlier image, never what lay in the memory
        # before.
        copies_in.clear(self.device_in.handle, self.device_in.nbytes)
        copies_in.synchronize()
        # Time stamps cost a microsecond each; trtexec sets the same six.
        self.in_start, self.in_end, self.run_start, self.run_end, self.out_start, self.out_end = (
            resources.enter_context(cuda.Event(timed=True)) for _ in range(6)
        )
        self.images: Images | None = None  # kept alive while the GPU may read it
        self.count = 0  # images in the batch
        self.batch = 0  # rows that run: more where the profile or the engine wants more
        self.enqueue_ms = 0.0

    def stage(self, images: Images) -> None:
        """Keep `images` where the GPU can read them: where they are, or copied into the slot's own
        pinned memory.
        """
        if isinstance(images, np.ndarray) and not (
            cuda.is_pinned(images) and images.flags.c_contiguous
        ):
            if self._host_in is None:
                self._host_in = cuda.pinned_empty((self.device_in.nbytes,), np.uint8)
            staged = self._host_in[: images.nbytes].view(images.dtype).reshape(images.shape)
            np.copyto(staged, images)
            images = staged
        self.images = images

    def copy_in(self, stream: cuda.Stream) -> None:
        """Queue the copy of what was staged to the network's input."""
        if isinstance(self.images, DeviceImages):
            stream.copy(self.device_in.handle, self.images.address, self.images.nbytes)
        elif self.images is not None:
            stream.copy_in(self.device_in.handle, self.images)
