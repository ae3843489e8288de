# SPDX-License-Identifier: Apache-2.0
"""Fixtures and helpers of the tests that run engines on stand-ins for TensorRT and for the CUDA
runtime.
"""

import dataclasses
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import standin_tensorrt_runtime as standin
from numpy.typing import NDArray
from standin_cudart import StandinCudart
from standin_detector import CpuBackend, detect

from trtdet import cuda
from trtdet.engine import sidecar
from trtdet.engine.options import BatchRange
from trtdet.engine.sidecar import EngineInfo
from trtdet.spec import ModelSpec, Nms, Preprocessing

SHAPE = (16, 16, 3)
SLOTS = 5
SPEC = ModelSpec(
    family="automl",
    preprocessing=Preprocessing((16, 16), "NHWC", "uint8"),
    nms=Nms(max_output_boxes=SLOTS),
    category_ids=tuple(range(1, 91)),
)


@dataclass
class Rig:
    """Stand-ins in place of CUDA and TensorRT."""

    cudart: StandinCudart
    trt: ModuleType

    @property
    def contexts(self) -> list[Any]:
        return [context for engine in self.trt.Runtime.engines for context in engine.contexts]


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Rig]]:
    """Installs stand-ins; at the end nothing may be left of what was created on them."""
    rigs = []

    def install(*, name: str = "tensorrt", version: str = standin.VERSION, **options: Any) -> Rig:
        cudart = StandinCudart(**options)
        trt = standin.make_module(CpuBackend(cudart), name=name, version=version)
        monkeypatch.setattr(cuda, "cudart", lambda: cudart)
        for module in ("tensorrt", "tensorrt_rtx"):
            monkeypatch.setitem(sys.modules, module, trt if module == name else None)
        rigs.append(Rig(cudart, trt))
        return rigs[-1]

    yield install
    gc.collect()
    for each in rigs:
        assert each.cudart.live() == {}
        assert list(each.trt.Runtime.engines) == []


def write_engine(path: Path, *, info: dict[str, Any] | None = None, **options: Any) -> Path:
    """An engine of the stand-in, with a sidecar that fits it and the stand-in GPU."""
    options = {"image_shape": SHAPE, "slots": SLOTS, **options}
    standin.write_engine(path, **options)
    preprocessing = dataclasses.replace(SPEC.preprocessing, dtype=options.get("dtype", "uint8"))
    fields = {
        "spec": SPEC.replace(preprocessing=preprocessing),
        "flavor": "tensorrt",
        "version": standin.VERSION,
        "precision": "fp16",
        "batch": BatchRange(1, 4, 8),
        "compute_capabilities": ("9.0",),
    }
    sidecar.write_engine(path, path.read_bytes(), EngineInfo(**{**fields, **(info or {})}))
    return path


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return write_engine(tmp_path / "model.engine")


def noise(count: int, seed: int = 0, dtype: str = "uint8") -> NDArray[Any]:
    rng = np.random.default_rng((seed, count))
    return rng.integers(0, 256, (count, *SHAPE)).astype(dtype)


@dataclass
class Batch:
    images: NDArray[Any]
    paths: tuple[Path, ...]


def batches(sizes: list[int], allocate: Callable[..., NDArray[Any]] | None = None) -> list[Batch]:
    made = []
    for index, size in enumerate(sizes):
        images = noise(size, index)
        if allocate is not None:
            pinned = allocate(images.shape, images.dtype)
            pinned[:] = images
            images = pinned
        made.append(Batch(images, tuple(Path(f"{index}_{row}.jpg") for row in range(size))))
    return made


def assert_same(outputs: dict[str, NDArray[Any]], images: NDArray[Any], slots: int = SLOTS) -> None:
    expected = detect(images, slots)
    assert list(outputs) == list(expected)
    for name, array in expected.items():
        assert outputs[name].dtype == array.dtype
        np.testing.assert_array_equal(outputs[name], array, err_msg=name)
