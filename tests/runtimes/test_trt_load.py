# SPDX-License-Identifier: Apache-2.0
"""Which engines `trtdet.runtimes.trt_load` opens, and what it says of the others; on stand-ins,
needs no GPU.
"""

import inspect
import logging
import platform
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import standin_tensorrt_runtime as standin
from trt_rig import SPEC, Rig, assert_same, noise, write_engine

from trtdet.engine import sidecar
from trtdet.errors import EngineError
from trtdet.runtimes import trt_lane, trt_load
from trtdet.runtimes.trt import TensorRTRuntime
from trtdet.spec import Preprocessing


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"version": "10.12.0.36"}, "was built by TensorRT 10.12.0.36, here is TensorRT 10.13.3.9; build it again here with build_engine.py; 'python -m trtdet doctor' shows what is here"),
        ({"version": "10.13.3.8"}, None),  # the same release; TensorRT itself has the last word
        ({"compute_capabilities": ("8.9", "8.6")}, "was built for compute capability 8.9, 8.6, here is GPU 0 (CPU stand-in, compute capability 9.0); build"),
        ({"compute_capabilities": ("8.0",), "hardware_compatible": True}, None),
        ({"compute_capabilities": ()}, None),  # not known
        ({"flavor": "tensorrt_rtx", "version": "1.7.1.116"}, "was built by TensorRT-RTX 1.7.1.116: no usable TensorRT"),
        ({"version": "10.0.0.6", "version_compatible": True}, "holds code that would run on the CPU, which is off by default; if you trust the file"),
        ({"version": "11.0.0.1", "version_compatible": True}, "runs on TensorRT 11.0.0.1 or later, here is TensorRT 10.13.3.9; build it again here with build_engine.py; 'python -m trtdet doctor'"),
        ({"platform": "windows-amd64"}, "was built on windows-amd64, here is "),
        ({"stripped": True}, "has no weights (--strip)"),
        ({"plugins": ("libmine.so",)}, "needs the plugin libraries libmine.so, not given: libmine.so; give them (--plugins)"),
        ({"spec": SPEC.replace(preprocessing=Preprocessing((32, 32), "NHWC", "uint8"))}, "expected an input of (32, 32, 3) uint8, found (16, 16, 3) uint8"),
    ],
)  # fmt: skip
def test_sidecar_is_compared_with_what_is_here(
    rig: Callable[..., Rig], tmp_path: Path, info: dict[str, Any], message: str | None
) -> None:
    rig()
    path = write_engine(tmp_path / "model.engine", info=info)
    if message is None:
        with TensorRTRuntime(path) as runtime:
            assert runtime.spec == SPEC
        return
    with pytest.raises(EngineError) as caught:
        TensorRTRuntime(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


#: How the stand-in works inside, or what a test asks of it.
STANDIN_ONLY = {
    "backend",
    "engines",
    "engine_type",
    "input_shape",
    "static_shape",
    "plan",
    "tensors",
    "contexts",
}


def test_rtx_engine_without_named_gpus_needs_ampere(
    rig: Callable[..., Rig], tmp_path: Path
) -> None:
    info = {"flavor": "tensorrt_rtx", "version": "1.7.1.116", "compute_capabilities": ()}
    path = write_engine(tmp_path / "rtx.engine", info=info)
    rig(name="tensorrt_rtx", version="1.7.1.116", compute_capability=(7, 5))
    with pytest.raises(EngineError, match=r"compute capability 8.0 and later, here is GPU 0"):
        TensorRTRuntime(path)


def test_rtx_does_not_run_on_data_centre_gpus(rig: Callable[..., Rig], tmp_path: Path) -> None:
    trt: Any = rig(name="tensorrt_rtx", version="1.7.1.116").trt
    trt.IBuilderConfig = SimpleNamespace(set_compute_capability=None)
    trt.ComputeCapability = SimpleNamespace(__members__={"SM86": 0, "SM120": 1, "CURRENT": 2})
    info = {"flavor": "tensorrt_rtx", "version": "1.7.1.116", "compute_capabilities": ()}
    path = write_engine(tmp_path / "rtx.engine", info=info)
    with pytest.raises(EngineError, match=r"runs on compute capability 8.6, 12.0, here is GPU 0 .*--flavor tensorrt$"):  # fmt: skip
        TensorRTRuntime(path)


def test_host_code_only_where_it_is_allowed(rig: Callable[..., Rig], tmp_path: Path) -> None:
    rig()
    info = {"version": "10.0.0.6", "version_compatible": True}
    path = write_engine(tmp_path / "vc.engine", info=info, host_code=True)
    with TensorRTRuntime(path, allow_host_code=True) as runtime:
        assert_same(runtime.infer(noise(2)), noise(2))
    sidecar.sidecar_path(path).unlink()
    with pytest.raises(EngineError, match="IRuntime: host code is not allowed"):
        TensorRTRuntime(path)


@pytest.mark.parametrize(
    ("shape", "layout", "size_hw"),
    [((16, 24, 3), "NHWC", (16, 24)), ((3, 16, 24), "NCHW", (16, 24))],
)
def test_engine_without_sidecar_is_taken_for_efficientdet(
    rig: Callable[..., Rig],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    shape: tuple[int, ...],
    layout: str,
    size_hw: tuple[int, int],
) -> None:
    rig()
    path = standin.write_engine(
        tmp_path / "old.engine", image_shape=shape, dtype="float32", slots=7
    )
    with TensorRTRuntime(path) as runtime:
        spec = runtime.spec
        images = np.random.default_rng(0).random((2, *shape), np.float32)
        assert_same(runtime.infer(images), images, slots=7)
    assert (spec.preprocessing.layout, spec.preprocessing.size_hw) == (layout, size_hw)
    assert (spec.num_classes, spec.nms.max_output_boxes, spec.box_order) == (90, 7, "yxyx")
    assert spec.preprocessing.pad_rgb == (123.675, 116.28, 103.53)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and "has no old.engine.json beside it: taken for AutoML's EfficientDet" in warnings[0]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON in UTF-8, found something else (Expecting"),
        ("\xff", "found something else ('utf-8' codec can't decode"),
        ("[]", "engine.json: expected schema 1, found a list of 0; build the engine again with build_engine.py"),
        ('{"schema": 1, "model_spec": {}}', "model_spec: expected schema 1, found null; build the engine again with build_engine.py"),
    ],
)  # fmt: skip
def test_a_sidecar_that_is_none_says_what_to_do(
    rig: Callable[..., Rig], tmp_path: Path, text: str, message: str
) -> None:
    rig()
    path = write_engine(tmp_path / "model.engine")
    sidecar.sidecar_path(path).write_bytes(text.encode("latin-1"))
    with pytest.raises(EngineError) as caught:
        TensorRTRuntime(path)
    assert str(caught.value).startswith(f"{sidecar.sidecar_path(path)}: ")
    assert message in str(caught.value)
    assert "build the engine again with build_engine.py" in str(caught.value)


def test_engines_that_are_no_detectors(rig: Callable[..., Rig], tmp_path: Path) -> None:
    rig()
    path = standin.write_engine(tmp_path / "a.engine", output_names={"detection_boxes": "nmsed_boxes"})  # fmt: skip
    with pytest.raises(EngineError, match=r"expected one input and the outputs .* found inputs images and outputs .*nmsed_boxes"):  # fmt: skip
        TensorRTRuntime(path)
    path = standin.write_engine(tmp_path / "b.engine", image_shape=(4, 4, 4))
    with pytest.raises(EngineError, match=r"its input \(4, 4, 4\) is no RGB image"):
        TensorRTRuntime(path)
    path.write_bytes(b"no plan")
    with pytest.raises(EngineError, match=r"cannot load it on GPU 0 .*build it again here.*: IRuntime: magic tag does not match"):  # fmt: skip
        TensorRTRuntime(path)


def test_standin_has_only_what_real_bindings_have() -> None:
    """Against TensorRT-RTX, whose wheels install without a GPU; TensorRT 8.6 to 11 have the same
    names in these classes.
    """
    real = pytest.importorskip("tensorrt_rtx", reason="needs requirements-rtx.txt")
    checked = 0
    for cls in (standin.Runtime, standin.ICudaEngine, standin.RtxEngine, standin.IExecutionContext, standin.TensorIOMode, standin.DataType, standin.ILogger, standin.Severity):  # fmt: skip
        theirs = getattr(real, {"RtxEngine": "ICudaEngine", "Severity": "ILogger"}.get(cls.__name__, cls.__name__))  # fmt: skip
        names = {name for name in vars(cls) if not name.startswith("_")} - STANDIN_ONLY
        assert {name for name in names if not hasattr(theirs, name)} == set(), cls
        checked += len(names)
    assert checked > 30


def test_the_runtime_calls_only_what_the_standin_has() -> None:
    """So nothing that real bindings lack: the names of TensorRT in the sources are those of the
    stand-in's classes.
    """
    known = {
        name
        for cls in (standin.Runtime, standin.ICudaEngine, standin.IExecutionContext)
        for name in (*vars(cls), "engine_host_code_allowed", "DLA_core")
    }
    called = set()
    for module in (trt_lane, trt_load):
        source = inspect.getsource(module)
        called |= set(re.findall(r"\b(?:context|engine|runtime)\.((?:get|set|num|execute|create|deserialize|active|engine)_\w+|DLA_core)", source))  # fmt: skip
    called.discard("create_context")  # ours
    assert called >= {"set_tensor_address", "get_tensor_profile_shape", "deserialize_cuda_engine"}
    assert called - known - {"active_optimization_profile"} == set()


def test_this_platform_is_accepted(rig: Callable[..., Rig], tmp_path: Path) -> None:
    rig()
    here = f"{platform.system()}-{platform.machine()}".lower()
    TensorRTRuntime(write_engine(tmp_path / "x.engine", info={"platform": here})).close()
