# SPDX-License-Identifier: Apache-2.0
"""JPEGs decoded by a GPU: nvImageCodec, the only place that imports it.

A decoder lives as long as the process: nvImageCodec crashes where one goes before the last of its
images, or goes in another thread than it was made in.
"""

import atexit
import importlib
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

from trtdet import cuda
from trtdet.errors import EngineError
from trtdet.terminal import native_stderr_held

INSTALL = "pip install -r requirements-gpu.txt"
#: Chroma is interpolated, as libjpeg does by default.
OPTIONS = ":fancy_upsampling=1"


class Decoder:
    """nvImageCodec on one GPU. `decoder_of` has it once each.

    Raises:
        EngineError: nvImageCodec is not installed, or does not start.
    """

    def __init__(self, device: int) -> None:
        self._codec = _import_nvimgcodec()
        cuda.use_device(device)
        kinds = self._codec.BackendKind
        # Not the CPU: what the GPU cannot decode goes the way of all other images.
        backends = [self._codec.Backend(kind) for kind in (kinds.HW_GPU_ONLY, kinds.GPU_ONLY, kinds.HYBRID_CPU_GPU)]  # fmt: skip
        self._parameters = self._codec.DecodeParams(apply_exif_orientation=False)
        self._lock = threading.Lock()
        try:
            with native_stderr_held():
                self._decoder = self._codec.Decoder(device_id=device, backends=backends, options=OPTIONS)  # fmt: skip
        except RuntimeError as error:
            raise EngineError(f"nvImageCodec does not start ({error})") from error

    def stream_of(self, data: bytes) -> Any:
        """An encoded image for `decode`. Any thread may call this.

        Raises:
            ValueError: nvImageCodec does not know the format.
        """
        try:
            return self._codec.CodeStream(data)
        except RuntimeError as error:
            raise ValueError(str(error)) from error

    def decode(self, encoded: Sequence[Any], stream: cuda.Stream) -> list[Any]:
        """Queue the decoding of encoded images: each as an image on the GPU, (h, w, 3) uint8 RGB,
        complete once `stream` is at this point; None where it cannot be decoded.
        """
        with self._lock:
            found = self._decoder.decode(list(encoded), params=self._parameters, cuda_stream=int(stream.handle))  # fmt: skip
        return list(found)


def _import_nvimgcodec() -> Any:
    try:
        with native_stderr_held():
            return importlib.import_module("nvidia.nvimgcodec")
    except ImportError as error:
        raise EngineError(f"nvImageCodec does not load ({error})") from error


@cache
def decoder_of(device: int) -> Decoder:
    """The decoder of this GPU."""
    if not decoder_of.cache_info().currsize:
        atexit.register(decoder_of.cache_clear)  # before the interpreter takes its modules apart
    return Decoder(device)
