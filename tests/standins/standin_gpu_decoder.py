# SPDX-License-Identifier: Apache-2.0
"""CPU stand-ins for nvImageCodec and for the launch of a kernel, on the memory and the streams of a
`StandinCudart`.

They stand in where there is no GPU: JPEGs are decoded by OpenCV, the kernel is the project's own,
compiled for the CPU (`kernel_on_cpu`). Both run when the stream does, and raise `Violation` where
memory that they read or write is not there.
"""

import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import kernel_on_cpu
import numpy as np
from numpy.typing import NDArray
from standin_cudart import POISON, StandinCudart

from trtdet import cuda
from trtdet.errors import EngineError
from trtdet.images.files import decode_image
from trtdet.runtimes import place

#: A JPEG that ends in this is one that nvImageCodec cannot decode, for the tests.
REFUSED = b"\x00refused\xff\xd9"


class _Image:
    """What nvImageCodec gives back: freed in the order of its stream."""

    def __init__(self, cudart: StandinCudart, pixels: NDArray[np.uint8], handle: Any) -> None:
        status, address = cudart.cudaMalloc(pixels.nbytes)
        assert not int(status)
        device = cudart.current()
        self._pixels = pixels
        self.capacity = pixels.nbytes
        self.__cuda_array_interface__ = {
            "shape": pixels.shape,
            "strides": None,
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }

        def write() -> None:
            cudart.memory(address, pixels.nbytes, device=device)[:] = pixels.reshape(-1)

        cudart.launch(handle, write)
        weakref.finalize(self, cudart.free_in_order, address, handle)

    def cpu(self) -> NDArray[np.uint8]:
        return self._pixels


class StandinDecoder:
    """Stands where `trtdet.runtimes.gpu_decoder.Decoder` would."""

    def __init__(self, cudart: StandinCudart) -> None:
        self._cudart = cudart
        self.decoded: list[int] = []  # how many at a time
        self.most_bytes = 0  # of images that were there at a time
        self._images: weakref.WeakSet[_Image] = weakref.WeakSet()

    def _spoil(self, address: int, nbytes: int, device: int) -> None:
        self._cudart.memory(address, nbytes, device=device)[:] = POISON

    def stream_of(self, data: bytes) -> bytes:
        return data

    def decode(
        self, encoded: Sequence[bytes], stream: cuda.Stream, reuse: Sequence[Any] = ()
    ) -> list[Any]:
        self.decoded.append(len(encoded))
        for image in reuse:  # whoever reads them still would find other pixels
            address = image.__cuda_array_interface__["data"][0]
            nbytes, device = image.capacity, self._cudart.current()
            self._cudart.launch(stream.handle, partial(self._spoil, address, nbytes, device))
        images = [
            None
            if data.endswith(REFUSED)
            else _Image(self._cudart, decode_image(data, "a JPEG"), stream.handle)
            for data in encoded
        ]
        self._images.update(image for image in images if image is not None)
        self.most_bytes = max(self.most_bytes, sum(image.capacity for image in self._images))
        return images


class StandinKernel:
    """Stands where `trtdet.cuda_kernel.Kernel` would."""

    def __init__(self, cudart: StandinCudart, device: int) -> None:
        self._cudart = cudart
        self._device = device

    def launch(
        self,
        stream: cuda.Stream,
        grid: tuple[int, int, int],
        block: tuple[int, int],
        arguments: Sequence[tuple[Any, Any]],
    ) -> None:
        (address, height, width, how, *color), _ = zip(*arguments, strict=True)
        launched = place.Launch((height, width), how, (color[0], color[1], color[2]))
        if grid[:2] != launched.grid(1)[:2] or block != place.BLOCK:
            raise EngineError(f"launch: a grid of {grid} does not cover {height}x{width}")
        nbytes = height * width * 3 * (4 if how & place.FLOAT32 else 1)

        def run() -> None:
            table = self._cudart.memory(address, grid[2] * place.ROW.itemsize, device=self._device)
            rows = table.view(place.ROW)
            for row in rows:
                source = int(row["pitch"]) * int(row["height"])
                self._cudart.memory(int(row["source"]), source, device=self._device)
                self._cudart.memory(int(row["target"]), nbytes, device=self._device)
            kernel_on_cpu.launch(rows, launched)

        self._cudart.launch(stream.handle, run)


def install(monkeypatch: Any, cudart: StandinCudart) -> StandinDecoder:
    """Put both in the place of the real ones."""
    from trtdet.runtimes import gpu_images

    decoder = StandinDecoder(cudart)

    def kernel(source: Path, name: str, device: int) -> StandinKernel:
        assert (source, name) == (place.SOURCE, place.NAME)
        return StandinKernel(cudart, device)

    monkeypatch.setattr(gpu_images, "decoder_of", lambda device: decoder)
    monkeypatch.setattr(gpu_images, "kernel_of", kernel)
    gpu_images.missing.cache_clear()
    return decoder
