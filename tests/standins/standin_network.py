# SPDX-License-Identifier: Apache-2.0
"""A real network behind the stand-in engine: ONNX Runtime computes on the device memory and the
stream that it is given.

What comes out is what ONNX Runtime finds. That it is the same as without the engine shows that the
code around an engine is right: its buffers, streams, copies, partial batches, dynamic shapes. It
says nothing of what TensorRT computes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import standin_tensorrt_runtime as standin
from standin_detector import OUTPUTS, Work

from trtdet import sessions
from trtdet.engine.options import BatchRange
from trtdet.engine.sidecar import EngineInfo, write_engine
from trtdet.nms import lowering
from trtdet.onnx_files import fixed_batch, read_onnx
from trtdet.sessions import PROVIDERS
from trtdet.spec import ModelSpec

#: Batches of an engine whose model leaves them open.
BATCHES = BatchRange(1, 4, 8)


def write_network_engine(path: Path, onnx_path: Path, *, batch: BatchRange = BATCHES) -> Path:
    """An engine of the stand-in that runs a file of create_onnx.py, with the sidecar of
    build_engine.py.

    It cannot be captured into a CUDA graph: ONNX Runtime selects detections on the CPU.
    """
    model = read_onnx(onnx_path)
    spec = ModelSpec.from_onnx(model, onnx_path)
    fixed = fixed_batch(model)
    if fixed:
        batch = BatchRange(fixed, fixed, fixed)
    lowered = path.with_suffix(".standin.onnx")
    lowered.write_bytes(lowering.lower(model, form="onnx").SerializeToString())
    standin.write_engine(
        path,
        dtype=spec.preprocessing.dtype,
        profiles=[(batch.min, batch.opt, batch.max)],
        static_batch=fixed,
        image_shapes=[spec.preprocessing.image_shapes],
        slots=spec.nms.max_output_boxes,
        capturable=False,
        network=str(lowered),
    )
    info = EngineInfo(spec, "tensorrt", standin.VERSION, "fp32", batch)
    write_engine(path, path.read_bytes(), info)
    return path


class CpuNetwork:
    """On the memory of a `StandinCudart`."""

    def __init__(self, path: str, cudart: Any) -> None:
        self._cudart = cudart
        self._session = sessions.open_session(Path(path).read_bytes(), path)

    def run(self, work: Work) -> None:
        """Fill the outputs of a batch."""
        nbytes = int(np.prod(work.shape)) * np.dtype(work.dtype).itemsize
        data = self._cudart.memory(work.addresses[""], nbytes, device=work.device)
        images = data.view(work.dtype).reshape(work.shape)
        found = self._session.run(OUTPUTS, {work.input_name: images})
        for name, array in zip(OUTPUTS, found, strict=True):
            target = self._cudart.memory(work.addresses[name], array.nbytes, device=work.device)
            target[:] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)


class CudaNetwork:
    """On a GPU, by ONNX Runtime's CUDA provider in one stream; what it lacks runs on the CPU, and a
    batch is waited for.

    Raises:
        EngineError: this ONNX Runtime has no CUDA provider, or it does not start.
    """

    def __init__(self, path: str, device: int, stream: int) -> None:
        options = {
            "device_id": str(device),
            "user_compute_stream": str(stream),
            "cudnn_conv_algo_search": "HEURISTIC",
        }
        providers = [(PROVIDERS["cuda"], options), sessions.CPU]
        session = sessions.open_session(Path(path).read_bytes(), path, providers=providers)
        if session.provider != PROVIDERS["cuda"]:
            raise sessions.SessionError(f"{path}: runs on {session.provider}, expected CUDA")
        self._session: Any = session._session

    def run(self, work: Work) -> None:
        """Fill the outputs of a batch."""
        batch, k = work.shape[0], work.slots
        shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
            "num_detections": (np.int32, (batch, 1)),
            "detection_boxes": (np.float32, (batch, k, 4)),
            "detection_scores": (np.float32, (batch, k)),
            "detection_classes": (np.int32, (batch, k)),
        }
        binding = self._session.io_binding()
        dtype = np.dtype(work.dtype).type
        binding.bind_input(work.input_name, "cuda", work.device, dtype, work.shape, work.addresses[""])  # fmt: skip
        for name, (kind, shape) in shapes.items():
            binding.bind_output(name, "cuda", work.device, kind, shape, work.addresses[name])
        self._session.run_with_iobinding(binding)
