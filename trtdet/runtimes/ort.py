# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime: the same ONNX file on a CPU, or on a GPU that has no TensorRT engine yet.

The file keeps its EfficientNMS_TRT node, which ONNX Runtime does not know; it is lowered in memory
(`trtdet.nms`).
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from operator import length_hint
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from trtdet import sessions
from trtdet.errors import EngineError, GraphError
from trtdet.machine import available_cores, available_memory, resident_memory
from trtdet.nms import lowering
from trtdet.onnx_files import check_external_data, image_input, naming, read_onnx, without_value
from trtdet.runtimes.at_once import batches_that_fit, run_ahead, up_to
from trtdet.runtimes.base import (
    AnyBatch,
    DeviceImages,
    Images,
    Outputs,
    Runtime,
    check_batch,
    run_one_by_one,
)
from trtdet.sessions import PROVIDERS, Provider
from trtdet.spec import OUTPUT_NAMES, ModelSpec

logger = logging.getLogger(__name__)


ConvSearch = Literal["heuristic", "exhaustive"]

#: Shapes of batches whose buffers are kept on the device: those of dynamic size come in any number.
KEPT_INPUTS = 4

#: Batches from which on it is worth loading the model once more, for one thread: 0.15 s for D0.
MANY_BATCHES = 32

#: Threads that spin while they wait for work take the cores from those that decode and draw. With
#: 20 us of it D0 keeps its speed on 2 cores (25.6 against 26.5 images/s; 23.0 against 22.6 with
#: pictures), and where other programs want the cores too it is 2.5 times as fast.
SPIN_US = 20


class OnnxRuntime(Runtime):
    """`trtdet.runtimes.base.Runtime` on ONNX Runtime.

    Args:
        path: an ONNX file written by create_onnx.py; external data is found beside it.
        model: what `read_onnx(path, weights=False)` gave, of who has read it.
        provider: "auto" is the first of TensorRT, CUDA, CPU that this ONNX Runtime has. A named one
            is used or it is an error.
        threads: CPU threads, which share a batch, or have one each: see `map`; default: one for
            every core this process may use.
        optimize: False keeps the graph as it is written, to compare numbers (fusions alone move
            D0's logits by 1e-2).
        integer_kernels: False computes every Q/DQ pair of an INT8 model as it is written. ONNX
            Runtime's integer kernels, which else replace them, saturate on processors without VNNI.
        conv_search: how CUDA picks the algorithm of each convolution, anew for each shape of batch.
            "exhaustive" tries all of them, which takes seconds.

    Raises:
        GraphError: not an ONNX file, no ModelSpec in it, other inputs or outputs than stage 1
            writes.
        EngineError: ONNX Runtime cannot run it, or lacks `provider`.
    """

    def __init__(
        self,
        path: Path,
        *,
        model: onnx.ModelProto | None = None,
        provider: Provider = "auto",
        threads: int | None = None,
        optimize: bool = True,
        integer_kernels: bool = True,
        conv_search: ConvSearch = "heuristic",
    ) -> None:
        path = Path(path)
        if model is None:
            model = read_onnx(path, weights=False)  # ONNX Runtime reads them itself
        check_external_data(model, path)
        self.spec = ModelSpec.from_onnx(model, path)
        self._input, self.batch_range = _check_interface(model, self.spec, path)
        if tensor := without_value(model.graph, path.resolve().parent):
            self.without_value = tensor
            logger.warning("%s: the weights '%s' hold NaN, so it finds nothing, or nonsense; train or export the model again", path, tensor)  # fmt: skip
        threads = threads or available_cores()
        wanted = sessions.pick_providers(provider)
        options = {"cudnn_conv_algo_search": conv_search.upper()}
        open_session = partial(
            sessions.open_session,
            name=path,
            providers=sessions.with_options(wanted, options),
            optimize=optimize,
            integer_kernels=integer_kernels,
            external_data=path.resolve().parent,
            spin_us=SPIN_US,
        )
        session, self._load = self._open_lowered(model, path, open_session, wanted[0], threads)
        self._session: sessions.Session | None = session
        self._threads = threads
        self._one_thread: sessions.Session | None = None  # for batches that run at once
        self._batches = 0  # so far
        self._largest = 0  # bytes of the largest batch so far
        self._batch_bytes: int | None = None  # of memory that it takes; None: not known
        self._held = 0  # bytes of memory that batches at once have taken
        self.provider = session.provider
        sessions.check_provider(self.provider, wanted[0], provider)
        if self.provider != PROVIDERS["cpu"] or threads == 1:
            self._load = None  # and the serialized model with it
        self._device = "cpu" if self.provider == PROVIDERS["cpu"] else "cuda"
        self.frees_cpu = self.one_size = self._device != "cpu"
        self.images_on = 0 if self.provider == PROVIDERS["cuda"] else None
        # By shape, the one used last at the end.
        self._bound: OrderedDict[tuple[int, ...], sessions.Bound] = OrderedDict()
        where = f"{threads} threads" if self._device == "cpu" else "GPU 0"
        self.description = f"ONNX Runtime {sessions.version()}, {self.provider}, {where}"

    @property
    def preferred_batch(self) -> int:
        """The batch size to use where nobody names one: a CPU gains nothing from more than one
        image (D0: 34 ms for 1, 48 ms each for 8).
        """
        return 1 if self._device == "cpu" else 8

    def map(self, batches: Iterable[AnyBatch]) -> Iterator[tuple[AnyBatch, Outputs]]:
        """Run batches: each with its outputs, in order.

        A GPU runs the next one while the caller works on the outputs. On a CPU, threads that share
        a batch spend much of their time waiting for each other. Where many batches are known to
        come (`operator.length_hint`), each thread has one of its own, as far as memory allows: D0
        takes 42 ms in place of 47 on 2 cores, 9 in place of 30 on 16.

        Raises:
            EngineError, ValueError: a batch failed; names its number and its images.
        """
        _ = self._open  # or an error that is no batch's
        expected = length_hint(batches)
        source = enumerate(batches)
        enough = self._batches + expected >= MANY_BATCHES and expected >= self._threads
        if self.frees_cpu:
            yield from run_ahead(self.infer, source, 1)
        elif enough and self._load is not None:
            yield from self._map_at_once(source)
        else:
            yield from run_one_by_one(self.infer, source)

    def _map_at_once(
        self, source: Iterator[tuple[int, AnyBatch]]
    ) -> Iterator[tuple[AnyBatch, Outputs]]:
        """Run numbered batches of a CPU, several at once. The first runs alone, and one that is
        larger than all before: it shows what memory it takes.
        """
        alone: list[tuple[int, AnyBatch]] = []
        if self._one_thread is None:
            alone = list(islice(source, 1))
        while True:
            yield from run_one_by_one(self.infer, alone)
            at_once, session = self._share_out()
            if at_once == 1:
                yield from run_one_by_one(self.infer, source)
                return
            alone = []
            run = partial(self._infer, session=session)
            yield from run_ahead(run, up_to(self._largest, source, alone), at_once)
            if not alone:
                return

    def _share_out(self) -> tuple[int, sessions.Session]:
        """How many batches of a CPU run at once, and the session that runs them."""
        free = available_memory()
        fitting = batches_that_fit(self._batch_bytes, None if free is None else free + self._held)
        session = self._open
        if fitting < self._threads:  # they share the threads
            if self._one_thread is not None:
                self._one_thread, self._held = None, 0  # it gives its memory back
        else:
            fitting = self._threads
            try:
                session = self._one_thread = self._one_thread or self._load_again()
            except EngineError as error:
                logger.debug("batches run one by one: %s", error)
                return 1, session
        self._held = max(self._held, fitting * (self._batch_bytes or 0))
        return fitting, session

    def _load_again(self) -> sessions.Session:
        assert self._load is not None
        return self._load(threads=1)

    def infer(self, images: Images) -> Outputs:
        """Run one batch. See `trtdet.runtimes.base.Runtime.infer`."""
        return self._infer(images, self._open)

    def _infer(self, images: Images, session: sessions.Session) -> Outputs:
        check_batch(images, self.spec, self.batch_range)
        _ = self._open  # closed meanwhile, this is an error
        before = resident_memory() if images.nbytes > self._largest else None
        if isinstance(images, DeviceImages):
            place = images.address, images.shape, images.dtype, images.device
            values = session.run_at(*place, self._input, OUTPUT_NAMES)
        elif self._device == "cpu":  # reads the array in place: nothing to bind
            values = session.run(OUTPUT_NAMES, {self._input: images})
        else:
            values = self._run_bound(images)
        if before is not None:  # what was there for smaller ones is used again
            self._batch_bytes = (self._batch_bytes or 0) + (resident_memory() or before) - before
            self._largest = images.nbytes
        self._batches += 1
        return dict(zip(OUTPUT_NAMES, values, strict=True))

    def _open_lowered(
        self,
        model: onnx.ModelProto,
        path: Path,
        open_session: Callable[..., sessions.Session],
        wanted: str,
        threads: int,
    ) -> tuple[sessions.Session, Callable[..., sessions.Session] | None]:
        """A session of the model with the NMS that is fast on the provider that starts, and what
        opens another.
        """
        form = lowering.fast_form(self.spec, cuda=wanted == PROVIDERS["cuda"])
        while True:
            # Weights in files of their own (all of those over protobuf's 2 GB) stay there: the
            # bytes refer to them.
            with naming(path):
                lowered = lowering.lower(model, form).SerializeToString()
            load = partial(open_session, lowered)
            session = load(threads=threads)
            suits = lowering.fast_form(self.spec, cuda=session.provider == PROVIDERS["cuda"])
            if suits == form:
                return session, load
            form = suits  # another provider has started

    def _run_bound(self, images: NDArray[Any]) -> list[NDArray[Any]]:
        """Run with the input copied into memory on the device, kept for the shapes used last."""
        bound = self._bound.pop(images.shape, None)
        if bound is None:
            bound = self._open.bind(self._input, images, OUTPUT_NAMES, self._device)
        self._bound[images.shape] = bound
        if len(self._bound) > KEPT_INPUTS:
            self._bound.popitem(last=False)
        return bound.run(images)

    @property
    def _open(self) -> sessions.Session:
        if self._session is None:
            raise EngineError("infer: the model is closed")
        return self._session

    def close(self) -> None:
        self._bound.clear()
        self._session = self._one_thread = self._load = None


def _check_interface(
    model: onnx.ModelProto, spec: ModelSpec, path: Path
) -> tuple[str, tuple[int, int | None]]:
    """The input's name and the batch sizes it takes.

    Raises:
        GraphError: the graph's input or outputs are not those that its ModelSpec promises.
    """
    outputs = tuple(output.name for output in model.graph.output)
    if set(outputs) != set(OUTPUT_NAMES):
        raise GraphError(
            f"{path}: expected the outputs {', '.join(OUTPUT_NAMES)}, found {', '.join(outputs) or 'none'}; "
            "write it again with create_onnx.py (any --nms but none)"
        )
    images = image_input(model, path)
    tensor = images.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    expected = spec.preprocessing
    # None: dynamic.
    declared = tuple(d if isinstance(d, int) else None for d in expected.image_dims)
    if tuple(dims[1:]) != declared or dtype != np.dtype(expected.dtype):
        raise GraphError(
            f"{path}: its ModelSpec says images of {declared} {expected.dtype}, its input "
            f"'{images.name}' takes {tuple(dims[1:])} {dtype}; write it again with create_onnx.py"
        )
    batch = dims[0]
    return images.name, (1, None) if batch is None else (batch, batch)
