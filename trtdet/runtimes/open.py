# SPDX-License-Identifier: Apache-2.0
"""Open a model with the runtime that its name asks for."""

from pathlib import Path
from typing import Any

from trtdet.runtimes.base import Runtime
from trtdet.runtimes.options import TritonUrl


def open_runtime(path: Path | TritonUrl, **options: Any) -> Runtime:
    """Open an ONNX file with ONNX Runtime, a URL as a model on a Triton server, anything else as a
    TensorRT engine.

    Args:
        options: of `trtdet.runtimes.ort.OnnxRuntime`, of `trtdet.runtimes.triton.TritonRuntime`, or
            of `trtdet.runtimes.multi.open_devices`.

    Raises:
        FileNotFoundError: no such file.
        GraphError, EngineError: the file is not what it should be; the message names the next step.
    """
    from trtdet.runtimes.triton import TritonRuntime

    if isinstance(path, TritonUrl):
        return TritonRuntime(path, **options)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"--model: expected an engine or an ONNX file, found nothing at {path}"
        )
    if path.suffix.lower() == ".onnx":
        from trtdet.runtimes.ort import OnnxRuntime

        return OnnxRuntime(path, **options)
    from trtdet.runtimes.multi import open_devices

    return open_devices(path, **options)
