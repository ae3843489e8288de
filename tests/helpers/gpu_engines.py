# SPDX-License-Identifier: Apache-2.0
"""Engines for the tests and benchmarks on a GPU: real TensorRT where it is installed, else the
stand-in on real CUDA memory.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args
from unittest import mock

import numpy as np
import onnx.parser
import standin_tensorrt_runtime as standin
import toy_network
from numpy.typing import NDArray
from standin_detector import CudaBackend, detect

from trtdet import cuda
from trtdet.engine import build
from trtdet.engine.flavor import find_flavor
from trtdet.engine.options import BatchRange, BuildOptions
from trtdet.engine.sidecar import EngineInfo, write_engine
from trtdet.errors import EngineError
from trtdet.spec import InputDtype, ModelSpec, Nms, Preprocessing

Outputs = dict[str, NDArray[Any]]
_displaced: list[ModuleType | None] = []  # what the stand-in took the place of
SLOTS = 5

#: Engines to test with: float32 (uint8 for the stand-in); those that differ from it in one thing.
Case = Literal["plain", "uint8", "two profiles", "static batch", "dynamic size", "nms"]
CASES: tuple[Case, ...] = get_args(Case)
#: Batches of an engine, of the one of two profiles, and of the one of a fixed size.
BATCHES = BatchRange(1, 4, 8)
TWO_PROFILES = (BatchRange(1, 2, 2), BatchRange(3, 4, 8))
STATIC_BATCH = 4
#: Smallest, best and largest shape of an image of the engines of dynamic size.
DYNAMIC_SHAPES = ((8, 8, 3), (16, 16, 3), (32, 64, 3))
#: The four outputs of a toy: pixels passed on, and a count made from their mean. It works at any
#: size.
TOY = """
<ir_version: 8, opset_import: ["" : 17]>
toy (TYPE[N,H,W,3] images) => (int32[N,1] num_detections, float[N,5,4] detection_boxes, float[N,5] detection_scores, int32[N,5] detection_classes)
<int64[2] flat_shape = {0, -1}, int64[3] boxes_shape = {0, 5, 4}, int64[1] zero = {0}, int64[1] five = {5}, int64[1] twenty = {20}, int64[1] axis = {1}, float fifty = {50.0}, float sixty_four = {64.0}, float full = {255.0}>
{
    pixels = Cast <to = 1> (images)
    flat = Reshape (pixels, flat_shape)
    mean = ReduceMean <axes = [1], keepdims = 1> (flat)
    tens = Div (mean, fifty)
    num_detections = Cast <to = 6> (tens)
    first = Slice (flat, zero, twenty, axis)
    detection_boxes = Reshape (first, boxes_shape)
    some = Slice (flat, zero, five, axis)
    detection_scores = Div (some, full)
    classes = Div (some, sixty_four)
    detection_classes = Cast <to = 6> (classes)
}
"""


def toy_reference(images: NDArray[Any]) -> Outputs:
    """`TOY` in NumPy."""
    flat = images.reshape(len(images), -1).astype(np.float32)
    return {
        "num_detections": (flat.mean(axis=1, keepdims=True) / 50).astype(np.int32),
        "detection_boxes": flat[:, :20].reshape(-1, 5, 4),
        "detection_scores": flat[:, :5] / np.float32(255),
        "detection_classes": (flat[:, :5] / 64).astype(np.int32),
    }


@dataclass(frozen=True)
class GpuEngine:
    """An engine to test with.

    Attributes:
        kind: "tensorrt", "tensorrt_rtx" or "stand-in".
        spin_ms: what a batch takes at least.
        tolerance: of its numbers, relative.
        has_nms: slots beyond the number of detections hold anything.
    """

    kind: str
    path: Path
    reference: Callable[[NDArray[Any]], Outputs]
    dtype: str
    spin_ms: float = 0.0
    tolerance: float = 1e-6
    has_nms: bool = False

    def images(
        self, count: int, seed: int = 0, size_hw: tuple[int, int] = (16, 16)
    ) -> NDArray[Any]:
        """Random images; the toy's count is far from where rounding would decide."""
        rng = np.random.default_rng((seed, count))
        return rng.integers(0, 256, (count, *size_hw, 3)).astype(self.dtype)


def find_gpu() -> str | None:
    """Why there is no GPU to test on; None where there is one."""
    try:
        cuda.device_info(0)
    except EngineError as error:
        return str(error)
    return None


def make_engine(
    kind: str, folder: Path, *, case: Case = "plain", spin_ms: float = 0.0
) -> GpuEngine:
    """An engine of 16 x 16 images and batches of 1 to 8, but for what `case` says.

    Raises:
        EngineError: that TensorRT is not here, or cannot build this one, or not for this GPU.
        ImportError, OSError: the stand-in lacks cuda-python, or a compiler for its kernel.
    """
    if kind == "stand-in":
        return _make_standin(folder, case, spin_ms)
    path = folder / f"{kind} {case}.engine"
    if case == "nms":
        _build(kind, path, toy_network.network(), toy_network.SPEC)
        return GpuEngine(kind, path, nms_reference(path.parent), "float32", tolerance=1e-4, has_nms=True)  # fmt: skip
    dtype: InputDtype = "uint8" if case == "uint8" else "float32"
    text = TOY.replace("TYPE", "uint8" if case == "uint8" else "float")
    if case == "static batch":
        text = text.replace("[N,", f"[{STATIC_BATCH},")
    if case != "dynamic size":
        text = text.replace("[N,H,W,3]", "[N,16,16,3]").replace(f"[{STATIC_BATCH},H,W,3]", f"[{STATIC_BATCH},16,16,3]")  # fmt: skip
    spec = _spec(dtype=dtype, dynamic_size=case == "dynamic size")
    model = onnx.parser.parse_model(text)
    profiles = TWO_PROFILES if case == "two profiles" else ()
    batch = BatchRange(*[STATIC_BATCH] * 3) if case == "static batch" else BATCHES
    _build(kind, path, model, spec, batch=batch, profiles=profiles)
    return GpuEngine(kind, path, toy_reference, dtype)


def _make_standin(folder: Path, case: Case, spin_ms: float) -> GpuEngine:
    if case == "nms":
        raise EngineError("the stand-in computes no network")
    install_standin()
    path = folder / f"standin {case}.engine"
    shapes = [DYNAMIC_SHAPES] if case == "dynamic size" else ()
    ranges = TWO_PROFILES if case == "two profiles" else (BATCHES,)
    standin.write_engine(
        path,
        slots=SLOTS,
        spin_ms=spin_ms,
        image_shapes=shapes,
        profiles=[(each.min, each.opt, each.max) for each in ranges],
        static_batch=STATIC_BATCH if case == "static batch" else None,
    )
    if case == "dynamic size":  # an engine without sidecar has one size
        spec = _spec(dtype="uint8", dynamic_size=True)
        info = EngineInfo(spec, "tensorrt", standin.VERSION, "fp32", BATCHES)
        write_engine(path, path.read_bytes(), info)
    return GpuEngine("stand-in", path, lambda images: detect(images, SLOTS), "uint8", spin_ms)


def nms_reference(folder: Path) -> Callable[[NDArray[Any]], Outputs]:
    """`toy_network` with its NMS, by ONNX Runtime."""
    from trtdet.runtimes.ort import OnnxRuntime

    path = toy_network.save(folder / "toy_network.onnx")

    def run(images: NDArray[Any]) -> Outputs:
        with OnnxRuntime(path, provider="cpu", threads=1) as runtime:
            return runtime.infer(images)

    return run


def install_standin() -> None:
    """Let the stand-in be what `import tensorrt` finds in this process, until `remove_standin`."""
    if not _standin_is_in():
        module = standin.make_module(CudaBackend())
        _displaced.append(sys.modules.get("tensorrt"))
        sys.modules["tensorrt"] = module


def remove_standin() -> None:
    """Undo `install_standin`; without it, nothing happens."""
    while _displaced:
        before = _displaced.pop()
        if before is not None:
            sys.modules["tensorrt"] = before
        else:
            del sys.modules["tensorrt"]


def _standin_is_in() -> bool:
    return getattr(sys.modules.get("tensorrt"), "__file__", None) == standin.__file__


def _spec(*, dtype: InputDtype = "float32", dynamic_size: bool) -> ModelSpec:
    size_range = (DYNAMIC_SHAPES[0][:2], DYNAMIC_SHAPES[2][:2]) if dynamic_size else None
    return ModelSpec(
        family="automl",
        preprocessing=Preprocessing((16, 16), dtype=dtype, size_range=size_range, size_multiple=8),
        nms=Nms(max_output_boxes=SLOTS),
        category_ids=tuple(range(1, 91)),
    )


def _build(
    kind: str,
    path: Path,
    model: onnx.ModelProto,
    spec: ModelSpec,
    *,
    batch: BatchRange = BATCHES,
    profiles: tuple[BatchRange, ...] = (),
) -> None:
    """Build an engine, with its sidecar.

    Args:
        profiles: batches of each of its optimization profiles, instead of one of `batch`:
            build_engine.py makes one, others make more.
    """
    from trtdet.engine import config
    from trtdet.precision import prepare

    remove_standin()
    if importlib.util.find_spec(kind) is None:
        raise EngineError(f"{kind} is not installed")
    flavor = find_flavor(kind)
    capability = "{}.{}".format(*cuda.device_info(0).compute_capability)
    if flavor.is_rtx and capability not in flavor.compute_capabilities():
        raise EngineError(f"{flavor} does not support compute capability {capability}")
    spec.attach(model)
    options = BuildOptions(precision="fp32", batch=batch)
    set_profile = config.set_profile

    def set_profiles(*arguments: Any) -> BatchRange:
        *before, _, preprocessing = arguments
        for each in profiles or (batch,):
            set_profile(*before, replace(options, batch=each), preprocessing)
        return batch

    with mock.patch.object(build, "set_profile", set_profiles):
        built = build.build(flavor, prepare.Prepared(model, model), options, spec.preprocessing)
    info = EngineInfo(
        spec=spec,
        flavor=flavor.name,
        version=flavor.version_text,
        precision="fp32",
        batch=built.batch,
    )
    write_engine(path, built.plan, info)
