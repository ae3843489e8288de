# SPDX-License-Identifier: Apache-2.0
"""Which TensorRT is here, and what it can do: `tensorrt` 8.6, 10 or 11, or `tensorrt_rtx`.

The version is parsed once, into integers. Everything that differs between the four is a question to
a `Flavor`; how the answer is put into effect stands in `trtdet.engine.config`.

| | 8.6, 9 | 10 | 11 | RTX |
|---|---|---|---|---|
| typing of the network | weak | strong; weak for DLA | strong | strong |
| builder flags FP16, INT8 | yes | yes | removed | none |
| EfficientNMS_TRT | yes | yes | yes | no plugin library |
| lean runtime (version-compatible engines) | yes | yes | yes | not shipped |
| DLA | Jetson | Jetson, to 10.7 | Jetson, from 11.4.1 | no |
| builds for a GPU that is not there | no | no | no | yes |
"""

import ctypes
import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from trtdet.errors import DOCTOR, EngineError
from trtdet.machine import parse_version

logger = logging.getLogger(__name__)


#: Module name -> what it is called; in the order in which they are looked for.
FLAVORS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}

#: The first release with the tensor-name API, version-compatible engines and memory pools, all of
#: which are taken for granted.
OLDEST_TENSORRT = (8, 6)

INSTALL_HINT = (
    "install one: pip install tensorrt (any NVIDIA GPU), or pip install tensorrt-rtx (GeForce and RTX GPUs; "
    "builds without a GPU too)"
)


@dataclass(frozen=True)
class Flavor:
    """One importable TensorRT.

    Attributes:
        name: of the module, a key of `FLAVORS`.
        version: as integers, (10, 13, 3, 9); compares as versions do.
        module: the imported module.
    """

    name: str
    version: tuple[int, ...]
    module: ModuleType = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{FLAVORS[self.name]} {self.version_text}"

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))

    @property
    def is_rtx(self) -> bool:
        return self.name == "tensorrt_rtx"

    # --- what it can do: one question each --------------------------------------------------------

    @property
    def strongly_typed(self) -> bool:
        """Whether a network's tensor types say what is computed in which precision."""
        return self.is_rtx or self.version >= (10,)

    @property
    def has_precision_flags(self) -> bool:
        """Whether weak typing, `BuilderFlag.FP16` and `INT8`, exists: removed in 11.0."""
        return not self.is_rtx and self.version < (11,)

    @property
    def needs_explicit_batch(self) -> bool:
        """Whether networks have an implicit batch unless told otherwise."""
        return not self.is_rtx and self.version < (10,)

    @property
    def has_efficient_nms(self) -> bool:
        """Whether the EfficientNMS_TRT plugin comes with it."""
        return not self.is_rtx

    @property
    def contexts_share_profiles(self) -> bool:
        """Whether several execution contexts may use one optimization profile; before 10 only
        with a preview feature at build time.
        """
        return self.is_rtx or self.version >= (10,)

    @property
    def has_bf16(self) -> bool:
        return self.strongly_typed

    @property
    def has_fp8(self) -> bool:
        """Whether Q/DQ may be of FP8; the GPU must have it, too."""
        return self.strongly_typed

    @property
    def has_timing_cache(self) -> bool:
        """RTX times nothing when it builds; its functions for the cache are deprecated and do
        nothing (1.2).
        """
        return not self.is_rtx

    @property
    def version_compatible(self) -> bool:
        """Whether it builds engines for later versions of itself.

        RTX accepts the flag and then misses its lean runtime.
        """
        return not self.is_rtx

    @property
    def hardware_compatible(self) -> bool:
        """Whether `HardwareCompatibilityLevel` means something: RTX engines are portable without
        it.
        """
        return not self.is_rtx

    @property
    def can_strip_weights(self) -> bool:
        return self.is_rtx or self.version >= (10,)

    @property
    def has_dla(self) -> bool:
        """Whether a version may drive the DLA of a Jetson (10.8 to 10.16 do not everywhere); if
        one is here, the builder knows.
        """
        return not self.is_rtx and not (11,) <= self.version < (11, 4, 1)

    @property
    def names_compute_capabilities(self) -> bool:
        """Whether it builds for GPUs that are named rather than for the one that is here."""
        config = getattr(self.module, "IBuilderConfig", None)
        return hasattr(config, "set_compute_capability")

    def compute_capabilities(self) -> dict[str, Any]:
        """ "8.9" -> the member of `ComputeCapability`, in rising order; empty where none can be
        named.
        """
        if not self.names_compute_capabilities:
            return {}
        found = self.module.ComputeCapability.__members__
        digits = sorted((int(name[2:]), value) for name, value in found.items() if name[:2] == "SM")
        return {f"{number // 10}.{number % 10}": value for number, value in digits}

    def create_context(self, engine: Any) -> Any:
        """An execution context that uses its final kernels from a shape's first run on.

        None where memory is short.

        RTX by default begins a new shape with general kernels, and compiles the right ones
        meanwhile: a CUDA graph captured in that time would keep the slow ones. (RTX can capture
        graphs of its own, but anew at every change of an address.)
        """
        if not self.is_rtx:
            return engine.create_execution_context()
        config = engine.create_runtime_config()
        strategies = self.module.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        return engine.create_execution_context(config)

    def can_capture(self, context: Any, stream: int) -> bool:
        """Whether a context may be captured into a CUDA graph; where TensorRT cannot tell,
        trying is the way to know.
        """
        return not hasattr(context, "is_stream_capturable") or context.is_stream_capturable(stream)

    def refuse(self, what: str, alternative: str) -> NoReturn:
        """Raise the error for what this version cannot do."""
        raise EngineError(f"{what}: {self} does not support it; {alternative}")

    # --- logger and plugins -----------------------------------------------------------------------

    @property
    def logger(self) -> Any:
        """TensorRT's logger for this process, which writes to `logging`."""
        return _bridged_logger(self.module)

    @contextmanager
    def collected_errors(self) -> Iterator[list[str]]:
        """Collect TensorRT's error messages in a list, for the exception that follows, and keep
        them from the log.

        A message does not say whose it is: where several threads collect, each gets it.
        """
        messages: list[str] = []
        collectors: dict[int, list[str]] = self.logger.collectors
        collectors[id(messages)] = messages
        try:
            yield messages
        finally:
            del collectors[id(messages)]

    def load_plugins(self, libraries: Sequence[Path | str] = ()) -> None:
        """Register the plugins that come with TensorRT, and those of some libraries: each library
        once in a process.

        Args:
            libraries: files; a name that is no file here is looked for where the system's loader
                looks.

        Raises:
            EngineError: a library that does not load; with the loader's reason.
        """
        if self.has_efficient_nms and hasattr(self.module, "init_libnvinfer_plugins"):
            self.module.init_libnvinfer_plugins(self.logger, "")
        for given in libraries:
            # The loader takes a name without a folder for one to search for, not for a file that
            # lies here.
            path = Path(given).resolve() if Path(given).is_file() else given
            if str(path) in _loaded_libraries(self.module):
                continue
            try:
                library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                raise EngineError(
                    f"plugin library {given}: expected a shared library for {self}, but it does not load: {error}; "
                    "build it against this TensorRT, or correct the path"
                ) from error
            # Plugins register themselves when the library is loaded, or leave it to these entry
            # points.
            if hasattr(library, "getPluginCreators") or hasattr(library, "getCreators"):
                self.module.get_plugin_registry().load_library(str(path))
            _loaded_libraries(self.module).add(str(path))


def find_flavor(name: str | None = None) -> Flavor:
    """The TensorRT that is installed.

    Args:
        name: a key of `FLAVORS`; None: the first that imports.

    Raises:
        EngineError: none, or not the one named, or too old; says what to install.
        ValueError: not a key of `FLAVORS`.
    """
    if name is not None and name not in FLAVORS:
        raise ValueError(f"flavor: expected {' or '.join(FLAVORS)}, got {name!r}")
    reasons = []
    for candidate in [name] if name else FLAVORS:
        try:
            flavor = _import_flavor(candidate)
        except (ImportError, OSError, RuntimeError) as error:
            reasons.append(f"{candidate}: {error}")
            # One that is installed but broken is worth a word: the user may think it is the one in
            # use.
            if not isinstance(error, ModuleNotFoundError) and name is None:
                logger.warning("%s is installed but does not import: %s", candidate, error)
            continue
        if not flavor.is_rtx and flavor.version < OLDEST_TENSORRT:
            raise EngineError(f"{flavor}: expected TensorRT 8.6 or later; update it")
        return flavor
    raise EngineError(f"no usable TensorRT ({'; '.join(reasons)}); {INSTALL_HINT}; {DOCTOR}")


def _import_flavor(name: str) -> Flavor:
    module = importlib.import_module(name)
    # A folder of type stubs imports as an empty namespace package.
    if not hasattr(module, "__version__"):
        raise ModuleNotFoundError(f"No module named {name!r} (only a folder of that name)")
    return Flavor(name, parse_version(module.__version__), module)


@cache
def _loaded_libraries(trt: ModuleType) -> set[str]:
    """Plugin libraries that are registered with this TensorRT: a second time, it would log an
    error for each plugin.
    """
    return set()


@cache
def _bridged_logger(trt: ModuleType) -> Any:
    """One per process: TensorRT keeps the first logger it is given and ignores later ones."""
    log = logging.getLogger(trt.__name__)
    severity = trt.ILogger.Severity
    # TensorRT's INFO is chatter by the standards of a command-line tool, its VERBOSE by any.
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.DEBUG,
    }

    class BridgedLogger(trt.ILogger):  # type: ignore[name-defined]
        """Writes to `logging`; errors go to the lists in `collectors` while there are any."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.collectors: dict[int, list[str]] = {}

        def log(self, severity: Any, msg: str) -> None:
            level = levels.get(severity)
            if level is None:
                return
            if level == logging.ERROR and self.collectors:
                for messages in list(self.collectors.values()):
                    messages.append(msg)
                level = logging.DEBUG
            log.log(level, "%s", msg)

    return BridgedLogger()


def engine_error(what: str, messages: Sequence[str]) -> EngineError:
    """An error with TensorRT's own messages in it."""
    return EngineError(f"{what}: {'; '.join(messages) or 'TensorRT gave no reason'}")
