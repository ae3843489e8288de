# SPDX-License-Identifier: Apache-2.0
"""Stands in for a Triton server: one model, over Triton's own gRPC service and over its HTTP
protocol with binary tensors.

The messages are those of tritonclient's protobufs and of KServe's v2 protocol with Triton's binary
data and shared memory extensions; requests are checked against config.pbtxt as Triton checks them.
What computes the outputs is a Python function. Faults can be planted.

`tests/runtimes/test_triton_runtime.py` runs the same tests against a real server where there is
one.
"""

import json
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

DTYPES = {"FP32": np.float32, "UINT8": np.uint8, "INT32": np.int32}
VERSION = "2.51.0"
EXTENSIONS = ("model_configuration", "model_repository", "binary_tensor_data", "system_shared_memory")  # fmt: skip
MAX_MESSAGE = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Refusal(Exception):
    """An error answer: Triton's text and gRPC code. HTTP knows 503 and 400 only."""

    def __init__(self, message: str, code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT) -> None:  # fmt: skip
        super().__init__(message)
        self.code = code
        self.http_status = 503 if code == grpc.StatusCode.UNAVAILABLE else 400


@dataclass
class Input:
    """The input of a request: its bytes, or where they are in shared memory."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | None
    region: tuple[str, int, int] | None  # name, offset, bytes


@dataclass
class Server:
    """One model, and what happened to its requests.

    Attributes:
        faults: taken from the left by the next requests: a `Refusal` to raise, seconds to wait.
        index_seconds: that it takes to say what models there are.
        shared: requests whose images came in shared memory. `sent`: in the request.
        most_at_once: requests that were in the model at the same time.
    """

    config: model_config_pb2.ModelConfig
    model: Callable[[NDArray[Any]], Mapping[str, NDArray[Any]]]
    extensions: Sequence[str] = EXTENSIONS
    faults: deque[Refusal | float] = field(default_factory=deque)
    regions: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    index_seconds: float = 0
    shared: int = 0
    sent: int = 0
    most_at_once: int = 0
    _inside: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def metadata(self) -> dict[str, Any]:
        return {"name": "triton", "version": VERSION, "extensions": list(self.extensions)}

    def ready_models(self) -> list[dict[str, str]]:
        time.sleep(self.index_seconds)
        return [{"name": self.config.name, "version": "1", "state": "READY"}]

    def is_ready(self, name: str, version: str) -> bool:
        return name == self.config.name and version in ("", "1")

    def check_name(self, name: str, version: str) -> None:
        if not self.is_ready(name, version):
            raise Refusal(f"Request for unknown model: '{name}' is not found", grpc.StatusCode.NOT_FOUND)  # fmt: skip

    def register(self, name: str, key: str, offset: int, nbytes: int) -> None:
        """Map shared memory, as Triton does when it is registered, not when it is used."""
        if name in self.regions:
            raise Refusal(f"shared memory region '{name}' already in manager")
        try:
            handle = os.open(f"/dev/shm/{key.lstrip('/')}", os.O_RDWR)
        except OSError as error:
            raise Refusal(f"Unable to open shared memory region: '{key}'") from error
        try:
            if os.fstat(handle).st_size < offset + nbytes:
                raise Refusal(f"failed to register shared memory region '{name}': invalid args")
            mapped = np.frombuffer(mmap.mmap(handle, offset + nbytes), np.uint8)
        finally:
            os.close(handle)
        self.regions[name] = mapped[offset:]

    def infer(self, inputs: Sequence[Input], names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """The wanted outputs of one request."""
        with self._lock:
            fault = self.faults.popleft() if self.faults else None
            self._inside += 1
            self.most_at_once = max(self.most_at_once, self._inside)
        try:
            if isinstance(fault, Refusal):
                raise fault
            time.sleep(fault or 0)
            found = self.model(self._images(inputs))
            return {name: np.ascontiguousarray(found[name]) for name in names}
        finally:
            with self._lock:
                self._inside -= 1

    def _images(self, inputs: Sequence[Input]) -> NDArray[Any]:
        if len(inputs) != 1 or inputs[0].name != self.config.input[0].name:
            raise Refusal(f"expected 1 input '{self.config.input[0].name}', got {inputs}")
        (tensor,), wanted = inputs, self.config.input[0]
        largest = self.config.max_batch_size
        expected = [-1, *wanted.dims] if largest else list(wanted.dims)
        fits = len(tensor.shape) == len(expected) and all(
            want in (-1, got) for want, got in zip(expected, tensor.shape, strict=True)
        )
        type_name = model_config_pb2.DataType.Name(wanted.data_type)
        if not fits or f"TYPE_{tensor.datatype}" != type_name:
            raise Refusal(f"unexpected shape or type for input '{tensor.name}': expected {expected} {type_name}, got {list(tensor.shape)} {tensor.datatype}")  # fmt: skip
        if largest and not 1 <= tensor.shape[0] <= largest:
            raise Refusal(f"inference request batch-size must be <= {largest}")
        dtype = DTYPES[tensor.datatype]
        if tensor.region is None:
            self.sent += 1
            return np.frombuffer(tensor.data or b"", dtype).reshape(tensor.shape)
        name, offset, nbytes = tensor.region
        if name not in self.regions:
            raise Refusal(f"Unable to find shared memory region: '{name}'", grpc.StatusCode.NOT_FOUND)  # fmt: skip
        self.shared += 1
        return self.regions[name][offset : offset + nbytes].view(dtype).reshape(tensor.shape)


# ---- gRPC


class _Service(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, server: Server) -> None:
        self._server = server

    def ServerMetadata(self, request, context):
        return service_pb2.ServerMetadataResponse(**self._server.metadata())

    def ModelReady(self, request, context):
        return service_pb2.ModelReadyResponse(ready=self._server.is_ready(request.name, request.version))  # fmt: skip

    def ModelConfig(self, request, context):
        with _aborting(context):
            self._server.check_name(request.name, request.version)
        return service_pb2.ModelConfigResponse(config=self._server.config)

    def RepositoryIndex(self, request, context):
        answer = service_pb2.RepositoryIndexResponse()
        for model in self._server.ready_models():
            answer.models.add(**model)
        return answer

    def SystemSharedMemoryRegister(self, request, context):
        with _aborting(context):
            self._server.register(request.name, request.key, request.offset, request.byte_size)
        return service_pb2.SystemSharedMemoryRegisterResponse()

    def SystemSharedMemoryUnregister(self, request, context):
        self._server.regions.pop(request.name, None)
        return service_pb2.SystemSharedMemoryUnregisterResponse()

    def ModelInfer(self, request, context):
        contents = deque(request.raw_input_contents)
        inputs = []
        for tensor in request.inputs:
            place = tensor.parameters
            region = None
            if "shared_memory_region" in place:
                region = (
                    place["shared_memory_region"].string_param,
                    place["shared_memory_offset"].int64_param,
                    place["shared_memory_byte_size"].int64_param,
                )
            data = None if region else contents.popleft()
            inputs.append(Input(tensor.name, tensor.datatype, tuple(tensor.shape), data, region))
        with _aborting(context):
            self._server.check_name(request.model_name, request.model_version)
            outputs = self._server.infer(inputs, [output.name for output in request.outputs])
        answer = service_pb2.ModelInferResponse(model_name=request.model_name, model_version="1")
        for name, value in outputs.items():
            answer.outputs.add(name=name, datatype=_datatype(value), shape=value.shape)
            answer.raw_output_contents.append(value.tobytes())
        return answer


@contextmanager
def _aborting(context: Any) -> Iterator[None]:
    try:
        yield
    except Refusal as refusal:
        context.abort(refusal.code, str(refusal))


def _datatype(value: NDArray[Any]) -> str:
    return next(name for name, dtype in DTYPES.items() if value.dtype == dtype)


@contextmanager
def serve_grpc(server: Server) -> Iterator[str]:
    """Yields host:port."""
    running = grpc.server(ThreadPoolExecutor(16), options=MAX_MESSAGE)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Service(server), running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        running.stop(grace=None).wait()


# ---- HTTP


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    core: Server

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def log_message(self, *_: Any) -> None:
        """Not on stderr."""

    def _answer(self, body: bytes) -> None:
        headers: dict[str, str] = {}
        try:
            status, content = 200, self._route(self.path.strip("/").split("/"), body, headers)
        except Refusal as refusal:
            status, content = refusal.http_status, json.dumps({"error": str(refusal)}).encode()
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        with suppress(ConnectionError):  # the client would not wait
            self.wfile.write(content)

    def _route(self, parts: list[str], body: bytes, headers: dict[str, str]) -> bytes:
        match parts:
            case ["v2"]:
                return json.dumps(self.core.metadata()).encode()
            case ["v2", "repository", "index"]:
                return json.dumps(self.core.ready_models()).encode()
            case ["v2", "systemsharedmemory", "region", name, "register"]:
                place = json.loads(body)
                self.core.register(name, place["key"], place["offset"], place["byte_size"])
                return b""
            case ["v2", "systemsharedmemory", "region", name, "unregister"]:
                self.core.regions.pop(name, None)
                return b""
            case ["v2", "models", name, "versions", version, verb]:
                return self._model(name, version, verb, body, headers)
            case ["v2", "models", name, verb]:
                return self._model(name, "", verb, body, headers)
        raise Refusal(f"not found: {self.path}")

    def _model(self, name: str, version: str, verb: str, body: bytes, headers: dict[str, str]) -> bytes:  # fmt: skip
        self.core.check_name(name, version)
        if verb == "ready":
            return b""
        if verb == "config":
            text = json_format.MessageToDict(self.core.config, preserving_proto_field_name=True)
            return json.dumps(_with_numbers(text)).encode()
        length = int(self.headers.get("Inference-Header-Content-Length", len(body)))
        request, rest = json.loads(body[:length]), body[length:]
        inputs = []
        for tensor in request["inputs"]:
            place = tensor.get("parameters", {})
            region, data = None, None
            if "shared_memory_region" in place:
                region = (place["shared_memory_region"], place.get("shared_memory_offset", 0), place["shared_memory_byte_size"])  # fmt: skip
            else:
                size = place["binary_data_size"]
                data, rest = rest[:size], rest[size:]
            inputs.append(Input(tensor["name"], tensor["datatype"], tuple(tensor["shape"]), data, region))  # fmt: skip
        outputs = self.core.infer(inputs, [output["name"] for output in request["outputs"]])
        described = [
            {"name": name, "datatype": _datatype(value), "shape": value.shape, "parameters": {"binary_data_size": value.nbytes}}
            for name, value in outputs.items()
        ]  # fmt: skip
        head = json.dumps({"model_name": name, "model_version": "1", "outputs": described}).encode()
        headers["Inference-Header-Content-Length"] = str(len(head))
        return head + b"".join(value.tobytes() for value in outputs.values())


def _with_numbers(message: Any) -> Any:
    """Triton's JSON has int64 as numbers; protobuf's has them as text."""
    if isinstance(message, dict):
        return {key: [int(dim) for dim in value] if key == "dims" else _with_numbers(value) for key, value in message.items()}  # fmt: skip
    return [_with_numbers(item) for item in message] if isinstance(message, list) else message


@contextmanager
def serve_http(server: Server) -> Iterator[str]:
    """Yields host:port."""
    handler = type("Handler", (_Handler,), {"core": server})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        running.server_close()
        thread.join()
