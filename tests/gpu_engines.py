# SPDX-License-Identifier: Apache-2.0
"""Engines for the tests and benchmarks on a GPU: real TensorRT where it is installed, else the stand-in on real CUDA memory."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import standin_tensorrt_runtime as standin
from numpy.typing import NDArray
from standin_detector import CudaBackend, detect

from trtdet import device
from trtdet.errors import EngineError
from trtdet.sidecar import BatchRange, EngineInfo, write_engine
from trtdet.spec import ModelSpec, Nms, Preprocessing
from trtdet.tensorrt_flavor import find_flavor

Outputs = dict[str, NDArray[Any]]
SLOTS = 5

#: The four outputs of a toy: pixels passed on, and a count made from their mean.
TOY = """
<ir_version: 8, opset_import: ["" : 17]>
toy (float[N,16,16,3] images) => (int32[N,1] num_detections, float[N,5,4] detection_boxes, float[N,5] detection_scores, int32[N,5] detection_classes)
<int64[2] flat_shape = {0, 768}, int64[3] boxes_shape = {0, 5, 4}, int64[1] zero = {0}, int64[1] five = {5}, int64[1] twenty = {20}, int64[1] axis = {1}, float fifty = {50.0}, float full = {255.0}>
{
    flat = Reshape (images, flat_shape)
    mean = ReduceMean <axes = [1], keepdims = 1> (flat)
    tens = Div (mean, fifty)
    num_detections = Cast <to = 6> (tens)
    first = Slice (flat, zero, twenty, axis)
    detection_boxes = Reshape (first, boxes_shape)
    some = Slice (flat, zero, five, axis)
    detection_scores = Div (some, full)
    detection_classes = Cast <to = 6> (some)
}
"""


def toy_reference(images: NDArray[Any]) -> Outputs:
    """`TOY` in NumPy."""
    flat = images.reshape(len(images), -1).astype(np.float32)
    return {
        "num_detections": (flat.mean(axis=1, keepdims=True) / 50).astype(np.int32),
        "detection_boxes": flat[:, :20].reshape(-1, 5, 4),
        "detection_scores": flat[:, :5] / np.float32(255),
        "detection_classes": flat[:, :5].astype(np.int32),
    }


@dataclass(frozen=True)
class GpuEngine:
    """An engine to test with.

    Attributes:
        kind: "tensorrt", "tensorrt_rtx" or "stand-in".
        spin_ms: what a batch takes at least.
    """

    kind: str
    path: Path
    reference: Callable[[NDArray[Any]], Outputs]
    dtype: str
    spin_ms: float = 0.0

    def images(self, count: int, seed: int = 0) -> NDArray[Any]:
        """Random images; the toy's count is far from where rounding would decide."""
        rng = np.random.default_rng((seed, count))
        return rng.integers(0, 256, (count, 16, 16, 3)).astype(self.dtype)


def find_gpu() -> str | None:
    """Why there is no GPU to test on; None where there is one."""
    try:
        device.device_info(0)
    except EngineError as error:
        return str(error)
    return None


def make_engine(kind: str, folder: Path, *, spin_ms: float = 0.0) -> GpuEngine:
    """An engine of 16 x 16 images and batches of 1 to 8.

    Raises:
        EngineError: that TensorRT is not here, or cannot build for this GPU.
        ImportError, OSError: the stand-in lacks cuda-python, or a compiler for its kernel.
    """
    if kind == "stand-in":
        install_standin()
        path = standin.write_engine(folder / "standin.engine", slots=SLOTS, spin_ms=spin_ms)
        return GpuEngine(kind, path, lambda images: detect(images, SLOTS), "uint8", spin_ms)
    return GpuEngine(kind, _build_toy(kind, folder), toy_reference, "float32")


def install_standin() -> None:
    """Let the stand-in be what `import tensorrt` finds in this process."""
    if not _standin_is_in():
        sys.modules["tensorrt"] = standin.make_module(CudaBackend())


def _standin_is_in() -> bool:
    return getattr(sys.modules.get("tensorrt"), "__file__", None) == standin.__file__


def _build_toy(kind: str, folder: Path) -> Path:
    from trtdet import engine

    if _standin_is_in():
        del sys.modules["tensorrt"]
    if importlib.util.find_spec(kind) is None:
        raise EngineError(f"{kind} is not installed")
    flavor = find_flavor(kind)
    capability = "{}.{}".format(*device.device_info(0).compute_capability)
    if flavor.is_rtx and capability not in flavor.compute_capabilities():
        raise EngineError(f"{flavor} does not support compute capability {capability}")
    model = onnx.parser.parse_model(TOY)
    spec = ModelSpec(
        family="automl",
        preprocessing=Preprocessing((16, 16)),
        nms=Nms(max_output_boxes=SLOTS),
        category_ids=tuple(range(1, 91)),
    )
    spec.attach(model)
    options = engine.BuildOptions(precision="fp32", batch=BatchRange(1, 4, 8))
    built = engine.build(flavor, engine.Prepared(model, model), options)
    info = EngineInfo(
        spec=spec,
        flavor=flavor.name,
        version=flavor.version_text,
        precision="fp32",
        batch=built.batch,
    )
    path = folder / f"{kind}.engine"
    write_engine(path, built.plan, info)
    return path
