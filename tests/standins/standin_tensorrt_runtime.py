# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the run-time half of `tensorrt`: it checks that every call is legal, and runs
`standin_detector` as the engine.

It exists because an engine runs only where its exact TensorRT and GPU are. Calls that TensorRT
refuses are refused as it does (False, with an error in the logger); calls after which TensorRT's
behaviour is undefined raise `Violation`.

Its engine files are JSON behind the first bytes of a plan; `write_engine` makes them.
"""

import json
import weakref
from collections.abc import Sequence
from enum import Enum, IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from standin_cudart import Violation
from standin_detector import Work

VERSION = "10.13.3.9"
IMAGES = "images"


class DataType(Enum):
    FLOAT = 0
    INT32 = 3
    UINT8 = 5


class TensorIOMode(Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    """Base of the loggers that a user derives; the severities hang on it as in TensorRT."""

    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class Logger(ILogger):
    """TensorRT's own logger."""

    def __init__(self, min_severity: Severity = Severity.WARNING) -> None:
        self.min_severity = min_severity

    def log(self, severity: Severity, msg: str) -> None:
        pass


#: How TensorRT's plans begin: what is not taken for a text file.
PLAN_MAGIC = b"ftrt\0"


def write_engine(
    path: Path,
    *,
    image_shape: tuple[int, ...] = (16, 16, 3),
    dtype: str = "uint8",
    profiles: Sequence[tuple[int, int, int]] = ((1, 4, 8),),
    static_batch: int | None = None,
    image_shapes: Sequence[Sequence[tuple[int, ...]]] = (),
    slots: int = 5,
    spin_ms: float = 0.0,
    kernels: int = 1,
    capturable: bool = True,
    host_code: bool = False,
    output_names: dict[str, str] | None = None,
    network: str = "",
) -> Path:
    """Write an engine of the stand-in.

    Args:
        profiles: smallest, best and largest batch of each optimization profile.
        static_batch: a fixed batch size instead.
        image_shapes: smallest, best and largest shape of an image in each profile, instead of
            `image_shape`.
        slots: detections per image.
        spin_ms: device time of a batch of any size (on a GPU; the CPU does not wait).
        kernels: launches that a batch is made of (on a GPU).
        capturable: False: it cannot be captured into a CUDA graph.
        host_code: it needs `engine_host_code_allowed`, as a version-compatible engine does.
        output_names: standard output name -> the name this engine has for it.
        network: an ONNX file of the same inputs and outputs to run (`standin_network`).
    """
    batches = [(static_batch,) * 3] if static_batch else list(profiles)
    images = list(image_shapes) or [(image_shape,) * 3] * len(batches)
    batches *= len(images) // len(batches)
    plan = {
        "standin": "tensorrt runtime",
        "dtype": dtype,
        "profiles": [
            [(n, *image) for n, image in zip(*profile, strict=True)]
            for profile in zip(batches, images, strict=True)
        ],
        "dynamic_batch": static_batch is None,
        "slots": slots,
        "spin_ms": spin_ms,
        "kernels": kernels,
        "capturable": capturable,
        "host_code": host_code,
        "output_names": output_names or {},
        "network": network,
    }
    path.write_bytes(PLAN_MAGIC + json.dumps(plan).encode())
    return path


class IExecutionContext:
    def __init__(self, engine: "ICudaEngine", profile: int) -> None:
        self.engine = engine
        self.active_optimization_profile = profile
        self._shape = engine.static_shape
        self._addresses: dict[str, int] = {}
        self._ran_with_shape = False
        self._stream: int | None = None
        self._device = engine.backend.current_device()
        self.runtime_config: Any = None
        self.fail_after: int | None = None  # a test's: runs before execute_async_v3 refuses

    def _refuse(self, message: str) -> bool:
        self.engine.logger.log(Severity.ERROR, f"IExecutionContext: {message}")
        return False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.engine.backend.check_stream(stream_handle)
        if not 0 <= profile_index < self.engine.num_optimization_profiles:
            return self._refuse(f"no optimization profile {profile_index}")
        self.active_optimization_profile = profile_index
        self._shape, self._ran_with_shape = self.engine.static_shape, False
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        if name != IMAGES:
            return self._refuse(f"no input {name}")
        if self.active_optimization_profile < 0:
            return self._refuse("an optimization profile must be set first")
        smallest, _, largest = self.engine.plan["profiles"][self.active_optimization_profile]
        sides = zip(smallest, shape, largest, strict=True)
        if not all(low <= n <= high for low, n, high in sides):
            return self._refuse(
                f"{tuple(shape)} is not within profile {self.active_optimization_profile}"
            )
        if tuple(shape) != self._shape:
            self._shape, self._ran_with_shape = tuple(shape), False
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if self._shape is None:
            return self.engine.get_tensor_shape(name)
        return self._shape if name == IMAGES else (self._shape[0], *self.engine.tensors[name][1])

    def infer_shapes(self) -> list[str]:
        return [IMAGES] if self._shape is None else []

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine.tensors:
            return self._refuse(f"no tensor {name}")
        if memory % 256:
            raise Violation(f"{name}: address {memory:#x} is not aligned to 256 bytes")
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine, backend = self.engine, self.engine.backend
        backend.check_stream(stream_handle)
        backend.check_clean()
        if backend.current_device() != self._device:
            raise Violation(f"the thread's GPU is {backend.current_device()}, not {self._device}")
        if self._stream not in (None, stream_handle):
            raise Violation("a context was used on two streams: it has one set of scratch memory")
        self._stream = stream_handle
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                return self._refuse("a test made it fail")
        if self._shape is None:
            return self._refuse("the input shape is not set")
        missing = engine.tensors.keys() - self._addresses.keys()
        if missing:
            return self._refuse(f"address not set: {', '.join(sorted(missing))}")
        capturing = backend.capturing(stream_handle)
        for name, (_, _, dtype) in engine.tensors.items():
            nbytes = int(np.prod(self.get_tensor_shape(name))) * np.dtype(dtype).itemsize
            if not (capturing and backend.asks_cuda):  # nothing but work may be asked of a capture
                backend.check_memory(self._addresses[name], nbytes, self._device)
        if capturing and not (engine.plan["capturable"] and self._ran_with_shape):
            return self._refuse("cannot be captured (never ran with this shape, or not capturable)")
        standard = {own: name for name, own in engine.plan["output_names"].items()}
        addresses = {standard.get(name, name): a for name, a in self._addresses.items()}
        addresses[""] = addresses.pop(IMAGES)
        work = Work(
            device=self._device,
            addresses=addresses,
            batch=self._shape[0],
            words=int(np.prod(self._shape[1:])) * np.dtype(engine.plan["dtype"]).itemsize // 4,
            slots=engine.plan["slots"],
            spin_ms=engine.plan["spin_ms"],
            kernels=engine.plan["kernels"],
            shape=self._shape,
            dtype=engine.plan["dtype"],
            network=engine.plan["network"],
        )
        backend.launch(stream_handle, work)
        self._ran_with_shape = True
        return True


class ICudaEngine:
    def __init__(self, plan: dict[str, Any], backend: Any, logger: Any) -> None:
        self.plan, self.backend, self.logger = plan, backend, logger
        shapes = {tuple(shape) for profile in plan["profiles"] for shape in profile}
        # Where all profiles agree, the engine has that size; a dimension that they leave open is
        # -1.
        shape = tuple(
            sizes.pop() if len(sizes := set(axis)) == 1 else -1
            for axis in zip(*shapes, strict=True)
        )
        dynamic_batch = plan["dynamic_batch"]
        self.input_shape = (-1, *shape[1:]) if dynamic_batch else shape
        self.static_shape = None if -1 in self.input_shape else self.input_shape
        k, name = plan["slots"], plan["output_names"]
        # name -> mode, shape of one image's part, NumPy dtype
        self.tensors: dict[str, tuple[TensorIOMode, tuple[int, ...], str]] = {
            IMAGES: (TensorIOMode.INPUT, self.input_shape[1:], plan["dtype"])
        }
        for standard, shape, dtype in (
            ("num_detections", (1,), "int32"),
            ("detection_boxes", (k, 4), "float32"),
            ("detection_scores", (k,), "float32"),
            ("detection_classes", (k,), "int32"),
        ):
            self.tensors[name.get(standard, standard)] = (TensorIOMode.OUTPUT, shape, dtype)
        self.contexts: weakref.WeakSet[IExecutionContext] = weakref.WeakSet()

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.plan["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self.tensors[name][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.input_shape[0], *self.tensors[name][1])

    def get_tensor_dtype(self, name: str) -> DataType:
        return {"float32": DataType.FLOAT, "int32": DataType.INT32, "uint8": DataType.UINT8}[
            self.tensors[name][2]
        ]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self.plan["profiles"][profile_index]]

    def create_execution_context(self, runtime_config: Any = None) -> IExecutionContext:
        context = IExecutionContext(self, 0)
        context.runtime_config = runtime_config
        self.contexts.add(context)
        return context


class RtxEngine(ICudaEngine):
    """What TensorRT-RTX adds to an engine."""

    def create_runtime_config(self) -> SimpleNamespace:
        return SimpleNamespace(dynamic_shapes_kernel_specialization_strategy="LAZY")


class Runtime:
    """Keeps track of what it made, so that a test can ask whether anything is left."""

    backend: Any = None  # these are set by make_module
    engine_type: type[ICudaEngine] = ICudaEngine
    engines: weakref.WeakSet[ICudaEngine]

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        try:
            plan = json.loads(bytes(serialized_engine).removeprefix(PLAN_MAGIC))
        except ValueError:
            self.logger.log(Severity.ERROR, "IRuntime: magic tag does not match")
            return None
        if plan.get("host_code") and not self.engine_host_code_allowed:
            self.logger.log(Severity.ERROR, "IRuntime: host code is not allowed")
            return None
        engine = self.engine_type(plan, self.backend, self.logger)
        self.engines.add(engine)
        return engine


def make_module(backend: Any, *, name: str = "tensorrt", version: str = VERSION) -> ModuleType:
    """A module to put at `sys.modules["tensorrt"]`, with `backend` (`standin_detector`) behind
    its engines.
    """
    module = ModuleType(name)
    rtx = name == "tensorrt_rtx"
    members = {
        "backend": backend,
        "engines": weakref.WeakSet(),
        "engine_type": RtxEngine if rtx else ICudaEngine,
    }
    runtime = type("Runtime", (Runtime,), members)
    if rtx:
        module.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(LAZY="LAZY", EAGER="EAGER")  # type: ignore[attr-defined]  # fmt: skip
    for value in (DataType, TensorIOMode, ILogger, Logger, ICudaEngine, IExecutionContext):
        setattr(module, value.__name__, value)
    vars(module).update(__version__=version, Runtime=runtime, __file__=__file__)
    return module
