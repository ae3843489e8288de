# SPDX-License-Identifier: Apache-2.0
"""A model on a Triton server, over gRPC or HTTP.

Several requests are in flight, so that decoding here, the network and the work of the server
overlap. They are tritonclient's coroutines; one event loop, in a thread of its own, runs them all.

Shared memory. Where client and server see the same /dev/shm, the images are decoded into it and a
request only names the place; a batch of 8 at 512x512 in float32 is 25 MB that then is neither
packed, sent, nor unpacked. Results, 2.4 kB an image, travel in the answer. The file is unlinked as
soon as the server has it mapped, so none is left behind, however this process ends.

Retries. Detection changes nothing on the server, so a request that it did not take (connection
lost, queue full, restarting) is sent again, and the log says so. One that fails, or takes too long,
is an error.
"""

import asyncio
import logging
import mmap
import os
import threading
import uuid
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trtdet.engine.sidecar import read_spec
from trtdet.errors import EngineError, GraphError
from trtdet.runtimes.base import (
    AnyBatch,
    Images,
    Outputs,
    Runtime,
    as_array,
    check_batch,
    naming_batch,
)
from trtdet.runtimes.options import TritonUrl
from trtdet.spec import METADATA_KEY, OUTPUT_NAMES, ModelSpec

logger = logging.getLogger(__name__)

#: NumPy's type -> that of requests; configurations say TYPE_FP32, TYPE_UINT8, TYPE_INT32.
DATATYPES = {"float32": "FP32", "uint8": "UINT8", "int32": "INT32"}
SHARED_MEMORY = Path("/dev/shm")
#: Seconds before a request that was not taken is sent again.
RETRY_PAUSES_S = (0.5, 1.0, 2.0, 4.0)
#: How a server, or a balancer before it, says that it did not take a request.
NOT_TAKEN = frozenset({"StatusCode.UNAVAILABLE", "502", "503"})
CONNECT_TIMEOUT_S = 10.0
#: Characters of a message that are shown: a server of another kind answers with a page.
MESSAGE_LIMIT = 300


class TritonRuntime(Runtime):
    """`trtdet.runtimes.base.Runtime` on a Triton server.

    Args:
        spec: where the ModelSpec is, if not in the model's configuration: an ONNX file, an engine,
            or an engine's .json.
        requests: at most so many are in flight.
        timeout: seconds that one request may take.
        shared_memory: False sends every image in its request.

    Raises:
        EngineError: no server, or no such model; a model that is not what `create_onnx.py` makes;
            no tritonclient.
        GraphError: no ModelSpec, or one of another model.
    """

    frees_cpu = True

    def __init__(
        self,
        url: TritonUrl,
        *,
        spec: Path | None = None,
        requests: int = 4,
        timeout: float = 60.0,
        shared_memory: bool = True,
    ) -> None:
        self.url = url
        self._module = _aio_module(url)
        self._requests = requests
        self._timeout = timeout
        self._regions: list[_Region] = []
        self._loop = _EventLoop()
        self._client: Any = None
        try:
            self._client = self._loop.wait(self._connect())
            server, config = self._loop.wait(self._look_up())
            self.spec = read_spec(spec) if spec else spec_in_config(config, url)
            self._input, self.batch_range = _check_tensors(config, self.spec, url)
            self._share = (
                shared_memory
                and url.is_local
                and "system_shared_memory" in server.get("extensions", ())
                and self._maybe_share(mmap.PAGESIZE) is not None
            )
        except BaseException:
            self.close()
            raise
        preferred = config.get("dynamic_batching", {}).get("preferred_batch_size", [])
        self._preferred: int | None = min(map(int, preferred), default=None)
        way = "in shared memory" if self._share else "in the requests"
        self.description = f"Triton {server.get('version', '')} at {url}, {requests} requests in flight, images {way}"

    @property
    def preferred_batch(self) -> int:
        """The smallest that the server's dynamic batching prefers."""
        return super().preferred_batch if self._preferred is None else self._preferred

    # --- requests ---------------------------------------------------------------------------------

    def infer(self, images: Images) -> Outputs:
        """Run one batch. See `trtdet.runtimes.base.Runtime.infer`."""
        return self._submit(as_array(images)).result()

    def map(self, batches: Iterable[AnyBatch]) -> Iterator[tuple[AnyBatch, Outputs]]:
        """Run batches, several requests in flight: each with its outputs, in order.

        Raises:
            EngineError, ValueError: a batch failed; names its number and its images. Requests in
                flight are cancelled.
        """
        waiting: deque[tuple[int, AnyBatch, Future[Outputs]]] = deque()
        try:
            for index, batch in enumerate(batches):
                while waiting and (len(waiting) >= self._requests or waiting[0][2].done()):
                    yield _finish(*waiting.popleft())
                with naming_batch(index, batch):
                    waiting.append((index, batch, self._submit(as_array(batch.images))))
            while waiting:
                yield _finish(*waiting.popleft())
        finally:
            for *_, future in waiting:
                future.cancel()

    def _submit(self, images: NDArray[Any]) -> "Future[Outputs]":
        check_batch(images, self.spec, self.batch_range)
        return self._loop.submit(self._request(images))

    async def _request(self, images: NDArray[Any]) -> Outputs:
        """Send one batch until the server takes it."""
        for pause in (*RETRY_PAUSES_S, None):
            region = self._region_of(images) if self._share else None
            try:
                return await asyncio.wait_for(self._send(images, region), self._timeout)
            except _failures() as error:
                problem = _Problem.of(error, self.url, self._timeout)
                if region is not None and "shared memory" in problem.message:
                    self._share = False  # a server that was restarted knows nothing of it
                elif not problem.not_taken:
                    raise EngineError(f"{self.url}: {problem.message}") from error
                if pause is None:
                    raise EngineError(
                        f"{self.url}: {problem.message}; tried {len(RETRY_PAUSES_S) + 1} times, see the server's log"
                    ) from error
                logger.warning("%s: %s; trying again in %g s", self.url, problem.message, pause)
                await asyncio.sleep(pause)
        raise AssertionError("not reached: the last round returns or raises")

    async def _send(self, images: NDArray[Any], region: "_Region | None") -> Outputs:
        tensor = self._module.InferInput(
            self._input, list(images.shape), DATATYPES[images.dtype.name]
        )
        if region is not None:
            tensor.set_shared_memory(region.name, images.nbytes, region.offset_of(images))
        else:
            tensor.set_data_from_numpy(images)
        result = await self._client.infer(
            self.url.model,
            [tensor],
            model_version=self.url.version,
            outputs=[self._module.InferRequestedOutput(name) for name in OUTPUT_NAMES],
        )
        return {name: self._rows(result, name, len(images)) for name in OUTPUT_NAMES}

    def _rows(self, result: Any, name: str, count: int) -> NDArray[Any]:
        """One output of an answer; a copy, as the answer's own memory is read-only."""
        try:
            value = result.as_numpy(name)
        except ValueError as error:  # its bytes are not of its shape
            raise EngineError(f"{self.url}: '{name}': {error}; see the server's log") from error
        if value is None or value.shape[:1] != (count,):
            found = "nothing" if value is None else f"shape {value.shape}"
            raise EngineError(
                f"{self.url}: '{name}': expected {count} rows, got {found}; see the server's log"
            )
        return np.array(value)

    # --- shared memory ----------------------------------------------------------------------------

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Memory for batches: shared with the server, where there is some left, else ordinary."""
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape)) * dtype.itemsize
        region = self._maybe_share(nbytes) if self._share else None
        if region is None:
            return np.empty(shape, dtype)
        return region.memory[:nbytes].view(dtype).reshape(shape)

    def _maybe_share(self, nbytes: int) -> "_Region | None":
        """Shared memory that the server has mapped too, or None where that is not to be had."""
        name = f"trtdet-{os.getpid()}-{uuid.uuid4().hex}"
        path = SHARED_MEMORY / name
        try:
            region = _Region(name, _map_new_file(path, nbytes))
            self._loop.wait(
                self._client.register_system_shared_memory(name, f"/{name}", len(region.memory))
            )
        except _failures() as error:
            logger.info("%s: shared memory not used (%s)", self.url, " ".join(str(error).split()))
            return None
        finally:
            path.unlink(missing_ok=True)
        self._regions.append(region)
        return region

    def _region_of(self, images: NDArray[Any]) -> "_Region | None":
        return next((region for region in self._regions if region.holds(images)), None)

    # --- opening and closing ----------------------------------------------------------------------

    async def _connect(self) -> Any:
        secure = self.url.scheme in ("grpcs", "https")
        options: dict[str, Any] = {"ssl": secure}
        if self.url.is_http:  # True: aiohttp's usual checks
            options |= {"ssl_context": secure, "conn_limit": self._requests, "conn_timeout": self._timeout}  # fmt: skip
        return self._module.InferenceServerClient(self.url.address, **options)

    async def _look_up(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the server says of itself, and the model's configuration."""
        as_json = {} if self.url.is_http else {"as_json": True}
        model = (self.url.model, self.url.version)
        limit = min(CONNECT_TIMEOUT_S, self._timeout)
        try:
            server = await asyncio.wait_for(self._client.get_server_metadata(**as_json), limit)
        except _failures() as error:
            problem = _Problem.of(error, self.url, limit)
            raise EngineError(
                f"--model: no Triton server answers at {self.url.scheme}://{self.url.address} ({problem.message}); "
                "start it, or correct the address"
            ) from error
        try:
            if await asyncio.wait_for(self._client.is_model_ready(*model), limit):
                config = await asyncio.wait_for(
                    self._client.get_model_config(*model, **as_json), limit
                )
                return server, config if self.url.is_http else config["config"]
            message = "it is not ready"
        except _failures() as error:
            message = _Problem.of(error, self.url, limit).message
        there = await self._models(limit)
        raise EngineError(
            f"--model: expected a model '{'/'.join(filter(None, model))}' that is ready at {self.url.scheme}://{self.url.address} "
            f"({message}), found {', '.join(there) or 'none'}; correct the name, or see the server's log"
        )

    async def _models(self, limit: float) -> list[str]:
        """Names of the models that are ready; none where the server does not say, in `limit`
        seconds.
        """
        as_json = {} if self.url.is_http else {"as_json": True}
        try:
            index = self._client.get_model_repository_index(**as_json)
            found = await asyncio.wait_for(index, limit)
        except _failures() as error:
            logger.debug("no index of models: %s", error)
            return []
        entries = found if self.url.is_http else found.get("models", [])
        return sorted({entry["name"] for entry in entries if entry.get("state") == "READY"})

    def close(self) -> None:
        """Cancel what is in flight, give the shared memory back, and disconnect."""
        if self._loop.closed:
            return
        client = self._client
        try:
            if client is not None:
                self._loop.wait(self._disconnect(client))
        finally:
            self._loop.close()
            self._regions.clear()

    async def _disconnect(self, client: Any) -> None:
        try:
            for region in self._regions:
                unregistered = client.unregister_system_shared_memory(region.name)
                await asyncio.wait_for(unregistered, CONNECT_TIMEOUT_S)
        except _failures() as error:  # the server is gone, and its mapping with it
            logger.debug("shared memory not unregistered: %s", error)
        await client.close()


def _finish(index: int, batch: AnyBatch, future: "Future[Outputs]") -> tuple[AnyBatch, Outputs]:
    with naming_batch(index, batch):
        return batch, future.result()


class _EventLoop:
    """An asyncio loop in a thread of its own, for callers that have none."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        # The failures of requests that were cancelled: the caller has met the first one already.
        self._loop.set_exception_handler(lambda _, context: logger.debug("%s", context["message"]))
        self._thread = threading.Thread(target=self._loop.run_forever, name="triton", daemon=True)
        self._thread.start()
        self.closed = False

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.submit(coroutine).result()

    async def _cancel_others(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def close(self) -> None:
        self.closed = True
        self.wait(self._cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@dataclass(frozen=True, eq=False)
class _Region:
    """Memory shared with the server, under the name by which requests refer to it."""

    name: str
    memory: NDArray[np.uint8]

    def offset_of(self, images: NDArray[Any]) -> int:
        return int(images.ctypes.data - self.memory.ctypes.data)

    def holds(self, images: NDArray[Any]) -> bool:
        offset = self.offset_of(images)
        return offset >= 0 and offset + images.nbytes <= len(self.memory)


def _map_new_file(path: Path, nbytes: int) -> NDArray[np.uint8]:
    """The memory of a new file in /dev/shm; lives as long as the array, with or without the file's
    name.

    Raises:
        OSError: no /dev/shm, or too small (a container's has 64 MB).
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        # Reserved now: a full /dev/shm would end the process with SIGBUS on the first write.
        os.posix_fallocate(handle, 0, nbytes)
        return np.frombuffer(mmap.mmap(handle, nbytes), np.uint8)
    finally:
        os.close(handle)


# ---- what the server said


def _aio_module(url: TritonUrl) -> Any:
    """tritonclient's coroutines for the URL's protocol.

    Raises:
        EngineError: not installed.
    """
    try:
        if url.is_http:
            import tritonclient.http.aio as module
        else:
            import tritonclient.grpc.aio as module
    except (
        ImportError,
        RuntimeError,
    ) as error:  # RuntimeError: without the packages of the protocol
        raise EngineError(
            f"--model {url}: needs tritonclient ({error}); pip install -r requirements-triton.txt"
        ) from error
    return module


def _failures() -> tuple[type[Exception], ...]:
    """What tritonclient raises when a call fails."""
    from tritonclient.utils import InferenceServerException

    known = (InferenceServerException, asyncio.TimeoutError, OSError)
    try:
        from aiohttp import ClientError
    except ImportError:  # tritonclient[grpc] comes without, and raises none of it
        return known
    return *known, ClientError


@dataclass(frozen=True)
class _Problem:
    """Why a call failed, in one line, and whether the server has not even taken it."""

    message: str
    not_taken: bool = False

    @classmethod
    def of(cls, error: Exception, url: TritonUrl, timeout: float) -> "_Problem":
        from tritonclient.utils import InferenceServerException

        said = error.message() if isinstance(error, InferenceServerException) else str(error)
        text = " ".join(str(said).split())[:MESSAGE_LIMIT] or type(error).__name__
        if isinstance(error, InferenceServerException):
            return cls(text, error.status() in NOT_TAKEN)
        if isinstance(error, asyncio.TimeoutError):  # an OSError from Python 3.11 on: asked first
            return cls(f"no answer within {timeout:g} s (--timeout)")
        return cls(text, not_taken=True)


def spec_in_config(config: dict[str, Any], url: TritonUrl) -> ModelSpec:
    """The ModelSpec in a model's configuration, where deploy.py puts it.

    Raises:
        GraphError: none there.
    """
    text = config.get("parameters", {}).get(METADATA_KEY, {}).get("string_value")
    if not text:
        raise GraphError(
            f"{url}: expected the parameter '{METADATA_KEY}' in its config.pbtxt, found none; write the repository with deploy.py triton, "
            "or name the engine's .json or the ONNX file with --spec"
        )
    remedy = "write the repository with deploy.py triton"
    return ModelSpec.from_json(text, f"{url}: parameter '{METADATA_KEY}'", remedy)


def _check_tensors(
    config: dict[str, Any], spec: ModelSpec, url: TritonUrl
) -> tuple[str, tuple[int, int | None]]:
    """The input's name, and the batch sizes that the model takes.

    Raises:
        GraphError: the tensors are not those that the ModelSpec promises.
    """
    inputs = config.get("input", [])
    outputs = {tensor["name"]: tensor for tensor in config.get("output", [])}
    if len(inputs) != 1 or set(outputs) != set(OUTPUT_NAMES):
        raise GraphError(
            f"{url}: expected one input and the outputs {', '.join(OUTPUT_NAMES)}, found {len(inputs)} and "
            f"{', '.join(outputs) or 'none'}; name a detector of deploy.py triton (not its ensemble)"
        )
    largest = int(config.get("max_batch_size", 0))
    image = tuple(dim if isinstance(dim, int) else -1 for dim in spec.preprocessing.image_dims)
    slots = spec.nms.max_output_boxes
    values = 5 if spec.selection == "rotated_nms" else 4  # a rotated box has an angle
    expected = {
        inputs[0]["name"]: (spec.preprocessing.dtype, image),
        "num_detections": ("int32", (1,)),
        "detection_boxes": ("float32", (slots, values)),
        "detection_scores": ("float32", (slots,)),
        "detection_classes": ("int32", (slots,)),
    }
    for tensor in (inputs[0], *outputs.values()):
        dtype, dims = expected[tensor["name"]]
        found = tuple(int(dim) for dim in tensor["dims"])
        without_batch = found if largest else found[1:]
        fits = len(without_batch) == len(dims) and all(
            there in (-1, dim) for there, dim in zip(without_batch, dims, strict=True)
        )
        if not fits or tensor["data_type"] != f"TYPE_{DATATYPES[dtype]}":
            raise GraphError(
                f"{url}: '{tensor['name']}': its ModelSpec says {dims} {dtype} an image, the server {without_batch} {tensor['data_type']}; "
                "write the repository again with deploy.py triton, or name the right --spec"
            )
    if largest:
        return inputs[0]["name"], (1, largest)
    batch = int(inputs[0]["dims"][0])
    return inputs[0]["name"], (1, None) if batch == -1 else (batch, batch)
