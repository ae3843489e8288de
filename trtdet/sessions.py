# SPDX-License-Identifier: Apache-2.0
"""The only place that imports ONNX Runtime: opens sessions, and makes its failures errors of one
line.

ONNX Runtime sends telemetry by default from 1.31 on, on Linux too. It reads ORT_DISABLE_TELEMETRY
when it is imported, so that is set before; a value that the user has set stays.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trtdet.closing import without_interrupt
from trtdet.errors import EngineError

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

#: Set to 1 before ONNX Runtime is imported, unless the user has set it.
TELEMETRY_SWITCH = "ORT_DISABLE_TELEMETRY"
CPU = "CPUExecutionProvider"

Provider = Literal["auto", "tensorrt", "cuda", "cpu"]
#: ONNX Runtime's names, fastest first: the order in which "auto" takes what is there.
PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": CPU,
}
#: ONNX Runtime's levels of its own messages on stderr.
ERRORS, FATAL_ERRORS = 3, 4
INSTALL = "pip install onnxruntime"


class SessionError(EngineError):
    """ONNX Runtime cannot load a model, or fails on it; its own message is inside."""


def load_onnxruntime() -> Any:
    """The module `onnxruntime`, with its telemetry off.

    Raises:
        EngineError: it is not installed, or does not start; names the command that installs it.
    """
    os.environ.setdefault(TELEMETRY_SWITCH, "1")
    try:
        with without_interrupt():
            import onnxruntime
    except ModuleNotFoundError as error:
        raise EngineError(f"ONNX Runtime is not installed: {INSTALL}") from error
    except ImportError as error:  # a library that it needs is missing
        raise EngineError(f"ONNX Runtime does not start ({one_line(error)}): {INSTALL}") from error
    return onnxruntime


def is_installed() -> bool:
    """Whether ONNX Runtime can be imported."""
    try:
        load_onnxruntime()
    except EngineError:
        return False
    return True


def version() -> str:
    """ONNX Runtime's version."""
    return str(load_onnxruntime().__version__)


def available_providers() -> list[str]:
    """The execution providers that this ONNX Runtime was built with."""
    return list(load_onnxruntime().get_available_providers())


class Session:
    """A model that ONNX Runtime has loaded.

    Attributes:
        provider: the execution provider in use, ONNX Runtime's name.
    """

    def __init__(self, session: Any, name: str) -> None:
        self._session = session
        self._name = name
        self.provider: str = session.get_providers()[0]

    def run(
        self, outputs: Sequence[str] | None, feeds: Mapping[str, NDArray[Any]]
    ) -> list[NDArray[Any]]:
        """The named outputs, all of them for None. Arrays that the CPU can use are read in place.

        Raises:
            SessionError: ONNX Runtime failed.
        """
        names = None if outputs is None else list(outputs)
        with self._failing():
            values: list[NDArray[Any]] = self._session.run(names, dict(feeds))
        return values

    def bind(self, name: str, array: NDArray[Any], outputs: Sequence[str], device: str) -> Bound:
        """Keep memory on a device ("cuda", "cpu") for an input of this shape and type; see `Bound`.

        Raises:
            SessionError: ONNX Runtime failed.
        """
        with self._failing():
            # Not made of the array itself: on a CPU that would be the caller's memory.
            new = load_onnxruntime().OrtValue.ortvalue_from_shape_and_type
            buffer = new(list(array.shape), array.dtype, device, 0)
            binding = self._session.io_binding()
            binding.bind_ortvalue_input(name, buffer)
            for output in outputs:
                binding.bind_output(output)
        return Bound(self, binding, buffer)

    def run_at(
        self,
        address: int,
        shape: Sequence[int],
        dtype: np.dtype[Any],
        device: int,
        name: str,
        outputs: Sequence[str],
    ) -> list[NDArray[Any]]:
        """The named outputs for an input that lies in the memory of a GPU, which the CUDA provider
        reads in place.

        Raises:
            SessionError: ONNX Runtime failed.
        """
        with self._failing():
            binding = self._session.io_binding()
            binding.bind_input(name, "cuda", device, dtype.type, list(shape), address)
            for output in outputs:
                binding.bind_output(output)
            self._session.run_with_iobinding(binding)
            values: list[NDArray[Any]] = binding.copy_outputs_to_cpu()
        return values

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Make an error of ONNX Runtime one line that names the model."""
        try:
            yield
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base
            raise SessionError(f"{self._name}: ONNX Runtime failed: {one_line(error)}") from error


class Bound:
    """A session whose one input lies in memory on a device that every run fills again.

    Outputs are in host memory.
    """

    def __init__(self, session: Session, binding: Any, buffer: Any) -> None:
        self._session = session
        self._binding = binding
        self._buffer = buffer

    def run(self, array: NDArray[Any]) -> list[NDArray[Any]]:
        """The outputs for an input of the shape and type that was bound; they are the caller's.

        Raises:
            SessionError: ONNX Runtime failed.
        """
        with self._session._failing():
            self._buffer.update_inplace(array)
            self._session._session.run_with_iobinding(self._binding)
            # The next run may write into the same memory.
            return [value.numpy().copy() for value in self._binding.get_outputs()]


def pick_providers(provider: Provider) -> list[str]:
    """ONNX Runtime's provider list for `provider`, the wanted one first, CPU last.

    Raises:
        EngineError: this ONNX Runtime was built without it.
    """
    available = available_providers()
    there = [name for name in PROVIDERS.values() if name in available]
    if provider == "auto":
        return there
    wanted = PROVIDERS[provider]
    if wanted not in there:
        raise EngineError(
            f"--provider {provider}: this ONNX Runtime has {', '.join(there)} only; "
            "install onnxruntime-gpu (requirements-cuda.txt), or leave --provider out"
        )
    return there[there.index(wanted) :]


def check_provider(got: str, wanted: str, provider: Provider) -> None:
    """Warn of a provider that did not start, so that another runs.

    Raises:
        EngineError: it was asked for by name.
    """
    if got == wanted:
        return
    message = f"{wanted} does not start here (its own message is above)"
    if provider != "auto":
        raise EngineError(
            f"--provider {provider}: {message}; install its libraries or choose another"
        )
    logger.warning("%s; running on %s", message, got)


def with_options(providers: Sequence[str], cuda: Mapping[str, str]) -> list[Any]:
    """The providers as ONNX Runtime takes them: names, or a name with its options."""
    return [(name, dict(cuda)) if name == PROVIDERS["cuda"] else name for name in providers]


def open_session(
    model: onnx.ModelProto | bytes,
    name: Path | str,
    *,
    providers: Sequence[Any] = (CPU,),
    threads: int | None = None,
    optimize: bool = True,
    integer_kernels: bool = True,
    external_data: Path | None = None,
    spin_us: int | None = None,
    log_level: int = ERRORS,
) -> Session:
    """Load a model into ONNX Runtime.

    Args:
        name: of the model, for messages: its file, or what it is a part of.
        providers: ONNX Runtime's execution providers, the wanted one first.
        threads: CPU threads of one operator; None: ONNX Runtime's default, one per core.
        optimize: False keeps the graph as it is written.
        integer_kernels: False computes every Q/DQ pair as it is written.
        external_data: the folder that the files of a model with external data are in.
        spin_us: microseconds that a thread spins while it waits for work; None: ONNX Runtime's
            default.
        log_level: what ONNX Runtime itself writes to stderr.

    Raises:
        SessionError: ONNX Runtime cannot load it.
        EngineError: ONNX Runtime is not installed.
    """
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = log_level
    if threads:
        options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in {
        "session.disable_quant_qdq": None if integer_kernels else "1",
        "session.model_external_initializers_file_folder_path": external_data,
        "session.intra_op.spin_duration_us": spin_us,  # versions that do not know it ignore it
    }.items():
        if value is not None:
            options.add_session_config_entry(key, str(value))
    if list(providers) != [CPU] and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # finds the CUDA libraries that pip installed
    try:
        serialized = model if isinstance(model, bytes) else model.SerializeToString()
        session = onnxruntime.InferenceSession(serialized, options, providers=list(providers))
    except Exception as error:  # ONNX Runtime's exceptions share no narrower base
        raise SessionError(f"{name}: ONNX Runtime cannot load it: {one_line(error)}") from error
    return Session(session, str(name))


def one_line(error: BaseException) -> str:
    """The message of an exception on one line; its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
