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
from trtdet.machine import parse_version
from trtdet.terminal import native_stderr_held

INSTALL = "pip install -r requirements-gpu.txt (which says what CUDA 12 needs)"
#: The first nvImageCodec that these calls were tried with.
OLDEST = (0, 9)
#: Chroma is interpolated, as libjpeg does by default.
OPTIONS = ":fancy_upsampling=1"


class Decoder:
    """nvImageCodec on one GPU. `decoder_of` has it once each.

    Raises:
        EngineError: nvImageCodec is not installed, is too old, or does not start.
    """

    def __init__(self, device: int) -> None:
        self._codec = _import_nvimgcodec()
        version = getattr(self._codec, "__version__", None)
        if version is not None and parse_version(version) < OLDEST:
            raise EngineError(f"nvImageCodec {version} is too old, expected 0.9 or later")
        cuda.use_device(device)
        self._parameters = self._codec.DecodeParams(apply_exif_orientation=False)
        self._lock = threading.Lock()
        kinds = self._codec.BackendKind
        # The decoding unit that some GPUs have is the fastest, and slower where it shares with the
        # other kinds. The CPU is none of them: what is left goes the way of all other images.
        units = self._open(device, kinds.HW_GPU_ONLY)
        others = self._open(device, kinds.GPU_ONLY, kinds.HYBRID_CPU_GPU)
        self._decoders = [decoder for decoder in (units, others) if not isinstance(decoder, str)]
        if not self._decoders:
            raise EngineError(f"nvImageCodec does not start ({others})")

    def _open(self, device: int, *kinds: Any) -> Any:
        """A decoder of these kinds; the reason where it does not start."""
        backends = [self._codec.Backend(kind) for kind in kinds]
        with native_stderr_held():
            try:
                return self._codec.Decoder(device_id=device, backends=backends, options=OPTIONS)
            except RuntimeError as error:  # inside: many GPUs have no such unit, and need none
                return str(error)

    def stream_of(self, data: bytes) -> Any:
        """An encoded image for `decode`. Any thread may call this.

        Raises:
            ValueError: nvImageCodec does not know the format.
        """
        try:
            return self._codec.CodeStream(data)
        except RuntimeError as error:
            raise ValueError(str(error)) from error

    def decode(
        self, encoded: Sequence[Any], stream: cuda.Stream, reuse: Sequence[Any] = ()
    ) -> list[Any]:
        """Queue the decoding of encoded images: each as an image on the GPU, (h, w, 3) uint8 RGB,
        complete once `stream` is at this point; None where it cannot be decoded.

        Args:
            reuse: as many earlier images, whose memory is filled again; fewer are left alone.

        Raises:
            EngineError: nvImageCodec failed.
        """
        found: list[Any] = [None] * len(encoded)
        left = list(range(len(encoded)))
        with self._lock:
            for decoder in self._decoders:
                again = {"images": list(reuse)} if len(reuse) == len(left) else {}
                try:
                    images = decoder.decode(
                        [encoded[row] for row in left],
                        params=self._parameters,
                        cuda_stream=int(stream.handle),
                        **again,
                    )
                except RuntimeError as error:
                    raise EngineError(f"nvImageCodec failed ({error}); --decode cpu does without it") from error  # fmt: skip
                for row, image in zip(left, images, strict=True):
                    found[row] = image
                left = [row for row in left if found[row] is None]
                if not left:
                    break
        return found


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
