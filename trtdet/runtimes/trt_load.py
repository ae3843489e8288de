# SPDX-License-Identifier: Apache-2.0
"""From an engine file to a deserialised engine whose inputs, outputs and profiles are known.

What can be known to be wrong is checked before TensorRT sees the bytes: it answers a foreign engine
with an internal error code.
"""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trtdet.cuda import DeviceInfo
from trtdet.engine.flavor import FLAVORS, Flavor, engine_error, find_flavor
from trtdet.engine.sidecar import EngineInfo, read_sidecar, sidecar_path
from trtdet.errors import DOCTOR, EngineError
from trtdet.machine import parse_version
from trtdet.runtimes.base import Outputs
from trtdet.spec import OUTPUT_NAMES, PREPROCESSORS, Layout, ModelSpec, Nms, Preprocessing

if TYPE_CHECKING:
    import tensorrt

logger = logging.getLogger(__name__)


#: TensorRT's name of a type -> NumPy's. Those of images and of the four outputs; others mean
#: another kind of model.
DTYPES = {"FLOAT": "float32", "HALF": "float16", "UINT8": "uint8", "INT32": "int32", "INT64": "int64"}  # fmt: skip
#: Outputs begin at multiples of this in their common buffer, as memory of their own would.
ALIGNMENT = 256
#: What an engine without sidecar is taken for: AutoML's EfficientDet, as NVIDIA's sample converts
#: it.
DEFAULT_CLASSES = 90


@dataclass(frozen=True)
class Binding:
    """An input or output tensor.

    Attributes:
        shape: of one image's part, without the batch axis; -1 where it is dynamic, which that of an
            output is not.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def image_bytes(self) -> int:
        """Bytes of one image's part."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class OutputLayout:
    """Where the outputs of one batch size lie in their common buffer: one buffer, so that one
    copy fetches all.
    """

    offsets: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Profile:
    """Shapes of the input that an optimization profile takes, batch axis first: smallest, the
    one it is tuned for, largest.
    """

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def takes_image(self, shape: Sequence[int]) -> bool:
        """Whether one image may have this shape."""
        smallest, largest = self.min[1:], self.max[1:]
        return len(shape) == len(largest) and all(
            low <= n <= high for low, n, high in zip(smallest, shape, largest, strict=True)
        )


def pick_profile(profiles: Sequence[Profile], shape: tuple[int, ...]) -> tuple[int, int]:
    """The profile that suits a batch of this shape best: the fewest rows to fill up, then the
    nearest `opt`, then the narrowest.

    Returns:
        Its index, and the rows that run: as many as `shape` has, or the smallest batch that the
            profile takes.

    Raises:
        ValueError: no profile takes the shape.
    """
    count, *image = shape
    candidates = [
        (
            max(count, p.min[0]) - count,
            abs(math.prod(p.opt) - math.prod(shape)),
            math.prod(p.max) - math.prod(p.min),
            index,
        )
        for index, p in enumerate(profiles)
        if count <= p.max[0] and p.takes_image(image)
    ]
    if not candidates:
        taken = ", ".join(f"{p.min} to {p.max}" for p in profiles)
        raise ValueError(
            f"input: expected a batch of one of the engine's profiles ({taken}), got {shape}"
        )
    *_, index = min(candidates)
    return index, max(count, profiles[index].min[0])


@dataclass
class EngineFile:
    """An engine as it lies on the disk: read once, however many GPUs load it.

    Attributes:
        info: its sidecar; None where there is none.
        spec: the sidecar's; else None until the first GPU to load the engine has guessed it.
    """

    path: Path
    plan: bytes = field(repr=False)
    info: EngineInfo | None
    spec: ModelSpec | None


@dataclass(frozen=True)
class Interface:
    """What the engine itself says of its tensors.

    An engine of one shape is `static` and has that shape for a profile.
    """

    input: Binding
    outputs: tuple[Binding, ...]
    static: bool
    profiles: tuple[Profile, ...]


class LoadedEngine:
    """A deserialised engine, checked: images in, the four outputs out. `close` frees it.

    Attributes:
        static: its input has one shape.
        batch_range: batches it takes; smaller ones than the engine wants are filled up here.
        input_bytes: of the largest batch.
    """

    def __init__(
        self,
        runtime: tensorrt.Runtime,
        engine: tensorrt.ICudaEngine,
        flavor: Flavor,
        spec: ModelSpec,
        interface: Interface,
    ) -> None:
        self._runtime = runtime  # must outlive the engine
        self._engine = engine
        self.flavor = flavor
        self.spec = spec
        self.input = interface.input
        self.outputs = interface.outputs
        self.static = interface.static
        self.profiles = interface.profiles
        self.batch_range = (1, max(profile.max[0] for profile in interface.profiles))
        largest = max(math.prod(profile.max) for profile in interface.profiles)
        self.input_bytes = largest * interface.input.dtype.itemsize
        self._layouts: dict[int, OutputLayout] = {}

    def create_context(self) -> tensorrt.IExecutionContext:
        """A new execution context, on the current device.

        Raises:
            EngineError: no memory for it.
        """
        with self.flavor.collected_errors() as messages:
            context = self.flavor.create_context(self._engine)
        if context is None:
            raise engine_error("create_execution_context failed", messages)
        return context

    def output_layout(self, batch: int) -> OutputLayout:
        """Where the outputs of `batch` images lie."""
        layout = self._layouts.get(batch)
        if layout is None:
            sizes = [batch * output.image_bytes for output in self.outputs]
            ends = accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
            offsets = (0, *ends)
            layout = OutputLayout(offsets[:-1], offsets[-1])
            self._layouts[batch] = layout
        return layout

    def unpack(self, buffer: NDArray[np.uint8], batch: int, count: int) -> Outputs:
        """The outputs of the first `count` of `batch` images, copied out of their common buffer."""
        layout = self.output_layout(batch)
        arrays = {}
        for output, offset in zip(self.outputs, layout.offsets, strict=True):
            data = buffer[offset : offset + count * output.image_bytes]
            arrays[output.name] = data.view(output.dtype).reshape(count, *output.shape).copy()
        return arrays

    def close(self) -> None:
        """Free the engine, once; its contexts must be gone."""
        del self._engine
        del self._runtime


def read_engine(path: Path) -> EngineFile:
    """Read an engine and its sidecar, each once.

    Raises:
        FileNotFoundError: no such file.
        EngineError: the sidecar is not readable, or of another engine.
    """
    path = Path(path)
    plan = path.read_bytes()
    info = read_sidecar(path, plan)
    return EngineFile(path, plan, info, info.spec if info else None)


def flavor_of(file: EngineFile) -> Flavor:
    """The TensorRT that is to load an engine.

    Raises:
        EngineError: it is not installed; says what to install.
    """
    info = file.info
    try:
        return find_flavor(info.flavor if info else None)
    except EngineError as error:
        if info is None:
            raise
        raise EngineError(
            f"{file.path} was built by {FLAVORS[info.flavor]} {info.version}: {error}; or build it again "
            "with the TensorRT that is here, build_engine.py"
        ) from error


def load_engine(
    file: EngineFile,
    device: DeviceInfo,
    *,
    plugins: Sequence[Path] = (),
    allow_host_code: bool = False,
) -> LoadedEngine:
    """Deserialise an engine on the current device, `device`.

    Raises:
        EngineError: it does not fit this TensorRT or this GPU, or is no detector of ours; says what
            to do.
    """
    path, info = file.path, file.info
    flavor = flavor_of(file)
    if info is not None:
        check_fit(path, info, flavor, device, plugins=plugins, allow_host_code=allow_host_code)
    flavor.load_plugins(plugins)
    with flavor.collected_errors() as messages:
        runtime: tensorrt.Runtime = flavor.module.Runtime(flavor.logger)
        runtime.engine_host_code_allowed = allow_host_code
        if info is not None and info.dla_core is not None:
            runtime.DLA_core = info.dla_core
        engine = runtime.deserialize_cuda_engine(file.plan)
    if engine is None:
        what = (
            f"{path}: {flavor} cannot load it on {device}; build it again here with build_engine.py"
        )
        raise engine_error(what, messages)
    interface = read_interface(path, engine)
    if file.spec is None:
        file.spec = guess_spec(path, interface)
    _check_input(path, file.spec, interface)
    return LoadedEngine(runtime, engine, flavor, file.spec, interface)


def check_fit(
    path: Path,
    info: EngineInfo,
    flavor: Flavor,
    device: DeviceInfo,
    *,
    plugins: Sequence[Path] = (),
    allow_host_code: bool = False,
) -> None:
    """Compare an engine's sidecar with what is here.

    Raises:
        EngineError: one line: what the engine was built for, what is here, what to rebuild or give.
    """

    rebuild = "build it again here with build_engine.py"

    def refuse(expected: str, found: str, action: str = rebuild) -> None:
        raise EngineError(f"{path} {expected}, {found}; {action}")

    built = parse_version(info.version)
    if info.version_compatible:
        if flavor.version < built:
            refuse(f"runs on {FLAVORS[info.flavor]} {info.version} or later", f"here is {flavor}", f"{rebuild}; {DOCTOR}")  # fmt: skip
        if not allow_host_code:
            refuse(
                "is version compatible: it holds code that would run on the CPU",
                "which is off by default",
                "if you trust the file, allow it (--allow_host_code)",
            )
    elif flavor.version[:3] != built[:3]:
        refuse(f"was built by {FLAVORS[info.flavor]} {info.version}", f"here is {flavor}", f"{rebuild}; {DOCTOR}")  # fmt: skip
    if not _runs_on(device.compute_capability, info):
        capabilities = ", ".join(info.compute_capabilities) or "8.0 and later"
        refuse(f"was built for compute capability {capabilities}", f"here is {device}")
    # TensorRT-RTX knows its GPUs, and has none of the data centre.
    supported = flavor.compute_capabilities()
    if supported and "{}.{}".format(*device.compute_capability) not in supported:
        refuse(
            f"was built by {FLAVORS[info.flavor]}, which runs on compute capability {', '.join(supported)}",
            f"here is {device}",
            "build it again here with build_engine.py --flavor tensorrt",
        )
    here = f"{platform.system()}-{platform.machine()}".lower()
    if info.platform != here:
        refuse(f"was built on {info.platform}", f"here is {here}")
    if info.stripped:
        refuse("has no weights (--strip)", "and refitting is not done here", "build it without --strip")  # fmt: skip
    missing = set(info.plugins) - {library.name for library in plugins}
    if missing and not info.version_compatible:  # which carries them
        refuse(
            f"needs the plugin libraries {', '.join(info.plugins)}",
            f"not given: {', '.join(sorted(missing))}",
            "give them (--plugins)",
        )


def _runs_on(capability: tuple[int, int], info: EngineInfo) -> bool:
    if info.hardware_compatible or (
        info.flavor == "tensorrt_rtx" and not info.compute_capabilities
    ):
        return capability >= (8, 0)
    # A TensorRT engine whose capability is not known: TensorRT will say.
    return not info.compute_capabilities or "{}.{}".format(*capability) in info.compute_capabilities


# --- what the engine says of itself ---------------------------------------------------------------


def read_interface(path: Path, engine: tensorrt.ICudaEngine) -> Interface:
    """Inputs, outputs and profiles by name.

    Raises:
        EngineError: not one input of images and the four outputs.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name).name == "INPUT"]
    outputs = [name for name in names if name not in inputs]
    if len(inputs) != 1 or set(outputs) != set(OUTPUT_NAMES):
        raise EngineError(
            f"{path}: expected one input and the outputs {', '.join(OUTPUT_NAMES)}, found inputs "
            f"{', '.join(inputs)} and outputs {', '.join(outputs)}; convert the model with create_onnx.py"
        )
    (name,) = inputs
    shape = _numbers(engine.get_tensor_shape(name))
    static = min(shape) > 0
    profiles = [Profile(shape, shape, shape)] if static else []
    for index in range(0 if static else engine.num_optimization_profiles):
        profiles.append(Profile(*map(_numbers, engine.get_tensor_profile_shape(name, index))))
    return Interface(
        input=_read_binding(path, engine, name, dynamic=True),
        outputs=tuple(_read_binding(path, engine, output) for output in OUTPUT_NAMES),
        static=static,
        profiles=tuple(profiles),
    )


def _numbers(dims: tensorrt.Dims) -> tuple[int, ...]:
    """TensorRT's `Dims` as a tuple."""
    return tuple(dims[axis] for axis in range(len(dims)))


def _read_binding(
    path: Path, engine: tensorrt.ICudaEngine, name: str, *, dynamic: bool = False
) -> Binding:
    shape = _numbers(engine.get_tensor_shape(name))[1:]
    kind = engine.get_tensor_dtype(name).name
    if kind not in DTYPES or (min(shape, default=0) < 1 and not dynamic):
        raise EngineError(
            f"{path}: tensor '{name}': expected sizes that are fixed but for the batch, of {' '.join(DTYPES)}; "
            f"found {shape} {kind}; convert the model with create_onnx.py"
        )
    return Binding(name, shape, np.dtype(DTYPES[kind]))


def guess_spec(path: Path, interface: Interface) -> ModelSpec:
    """AutoML's EfficientDet in the shapes of the tensors: what an engine without sidecar is taken
    for.

    Raises:
        EngineError: the input is no batch of RGB images.
    """
    shape, dtype = interface.input.shape, interface.input.dtype.name
    layout: Layout
    if min(shape) < 1:
        raise EngineError(
            f"{path}: has no {sidecar_path(path).name} beside it, which says what sizes of images it takes; "
            "build it with build_engine.py, which writes that file"
        )
    if len(shape) == 3 and shape[2] == 3:
        layout, size_hw = "NHWC", (shape[0], shape[1])
    elif len(shape) == 3 and shape[0] == 3:
        layout, size_hw = "NCHW", (shape[1], shape[2])
    else:
        raise EngineError(
            f"{path}: has no {sidecar_path(path).name} beside it, and its input {shape} is no RGB image; "
            "build it with build_engine.py, which writes that file"
        )
    slots = next(b.shape[0] for b in interface.outputs if b.name == "detection_scores")
    logger.warning(
        "%s has no %s beside it: taken for AutoML's EfficientDet, %s %dx%d, %d classes, boxes in pixels",
        path,
        sidecar_path(path).name,
        layout,
        *size_hw,
        DEFAULT_CLASSES,
    )
    return ModelSpec(
        family="automl",
        preprocessing=Preprocessing(
            size_hw=size_hw,
            layout=layout,
            dtype="uint8" if dtype == "uint8" else "float32",
            pad_rgb=PREPROCESSORS["imagenet"][0],
        ),
        nms=Nms(max_output_boxes=slots),
        category_ids=tuple(range(1, DEFAULT_CLASSES + 1)),
    )


def _check_input(path: Path, spec: ModelSpec, interface: Interface) -> None:
    expected, binding = spec.preprocessing, interface.input
    wanted = expected.image_shapes
    taken = all(any(p.takes_image(shape) for p in interface.profiles) for shape in wanted)
    if not taken or binding.dtype != np.dtype(expected.dtype):
        ranges = ((p.min[1:], p.max[1:]) for p in interface.profiles)
        found = ", ".join(_range_text(smallest, largest) for smallest, largest in ranges)
        raise EngineError(
            f"{path}: expected an input of {_range_text(wanted[0], wanted[2])} {expected.dtype}, found "
            f"{found} {binding.dtype}; build it again with build_engine.py"
        )


def _range_text(smallest: tuple[int, ...], largest: tuple[int, ...]) -> str:
    return str(smallest) if smallest == largest else f"{smallest} to {largest}"
