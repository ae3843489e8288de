# SPDX-License-Identifier: Apache-2.0
"""What the stand-in engine computes: four outputs that depend on every byte of an image, in NumPy
and as a CUDA kernel.

Integers modulo 2**32 and multiples of 2**-24, so CPU and GPU agree to the last bit, and one wrong
byte changes every number. The kernel sums its image twice, before and after it spins, and ruins the
result where the sums differ: it finds an input that arrives late, and one that is overwritten while
the batch runs.
"""

import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_CLASSES = 90
OUTPUTS = ("num_detections", "detection_boxes", "detection_scores", "detection_classes")

SOURCE = r"""
__device__ unsigned long long now_ns() {
    unsigned long long t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

__device__ unsigned image_sum(const unsigned* image, int words) {
    __shared__ unsigned total;
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    unsigned part = 0;
    for (int j = threadIdx.x; j < words; j += blockDim.x) {
        part += __ldcg(image + j) * (2u * j + 1u);  // past the first-level cache: the second sum must see the memory
    }
    atomicAdd(&total, part);
    __syncthreads();
    unsigned result = total;
    __syncthreads();
    return result;
}

extern "C" __global__ void standin_nothing() {}

extern "C" __global__ void standin_detect(
    const unsigned* images, int words, int slots, unsigned long long spin_ns,
    int* counts, float* boxes, float* scores, int* classes)
{
    const unsigned* image = images + (size_t)blockIdx.x * words;
    const unsigned long long start = now_ns();
    unsigned sum = image_sum(image, words);
    if (threadIdx.x == 0) while (now_ns() - start < spin_ns) {}
    __syncthreads();
    if (image_sum(image, words) != sum) sum = ~sum;
    const int count = sum % (slots + 1);
    if (threadIdx.x == 0) counts[blockIdx.x] = count;
    for (int k = threadIdx.x; k < slots; k += blockDim.x) {
        const size_t row = (size_t)blockIdx.x * slots + k;
        const bool used = k < count;
        for (int c = 0; c < 4; ++c) {
            const unsigned bits = sum * 2654435761u + k * 40503u + c * 69621u;
            boxes[4 * row + c] = used ? (bits >> 8) * (1.0f / 16777216.0f) : 0.0f;
        }
        scores[row] = used ? ((sum ^ (k * 0x9E3779B9u)) >> 8) * (1.0f / 16777216.0f) : 0.0f;
        classes[row] = used ? (int)((sum + k) % 90u) : 0;
    }
}
"""


def detect(images: NDArray[Any], slots: int) -> dict[str, NDArray[Any]]:
    """The four outputs for a batch.

    Args:
        images: (n, ...) any dtype; the bytes of one image are a multiple of 4.
        slots: detections per image, the K of the outputs.
    """
    words = np.ascontiguousarray(images).reshape(len(images), -1).view(np.uint32)
    with np.errstate(over="ignore"):
        weights = 2 * np.arange(words.shape[1], dtype=np.uint32) + np.uint32(1)
        sums = (words * weights).sum(axis=1, dtype=np.uint32)
        k = np.arange(slots, dtype=np.uint32)
        c = np.arange(4, dtype=np.uint32)
        bits = (
            (sums * np.uint32(2654435761))[:, None, None]
            + (k * np.uint32(40503))[None, :, None]
            + (c * np.uint32(69621))[None, None, :]
        )
        boxes = (bits >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)
        scores = (sums[:, None] ^ (k * np.uint32(0x9E3779B9))[None]) >> np.uint32(8)
        classes = ((sums[:, None] + k[None]) % np.uint32(NUM_CLASSES)).astype(np.int32)
    counts = (sums % np.uint32(slots + 1)).astype(np.int32)
    used = np.arange(slots)[None] < counts[:, None]
    return {
        "num_detections": counts[:, None],
        "detection_boxes": np.where(used[..., None], boxes, np.float32(0)),
        "detection_scores": np.where(
            used, scores.astype(np.float32) * np.float32(2**-24), np.float32(0)
        ),
        "detection_classes": np.where(used, classes, 0).astype(np.int32),
    }


@dataclass(frozen=True)
class Work:
    """One batch for a backend.

    Attributes:
        addresses: of the four outputs by name, and of the input under "".
        words: of 4 bytes, in one image.
        slots: detections per image.
        spin_ms: device time (on a GPU).
        kernels: launches it is made of (on a GPU): one that works, after some that do nothing.
        shape, dtype: of the input, the batch first.
        network: an ONNX file that makes the outputs (`standin_network`); "": `detect` does.
    """

    device: int
    addresses: Mapping[str, int]
    batch: int
    words: int
    slots: int
    spin_ms: float
    kernels: int
    shape: tuple[int, ...] = ()
    dtype: str = "uint8"
    network: str = ""
    input_name: str = "input"


class CpuBackend:
    """Runs `detect` on the memory and the streams of a `StandinCudart`."""

    asks_cuda = False

    def __init__(self, cudart: Any) -> None:
        self._cudart = cudart
        self._networks: dict[str, Any] = {}

    def check_memory(self, address: int, nbytes: int, device: int) -> None:
        """Raise where the bytes are not live memory of the device."""
        self._cudart.memory(address, nbytes, device=device)

    def check_stream(self, handle: int) -> None:
        """Raise where the handle is not a live stream."""
        self._cudart.stream(handle)

    def check_clean(self) -> None:
        """Raise where an earlier error was left for the kernels' own check of the last error."""
        if self._cudart.last_error() != 0:
            raise AssertionError(f"{self._cudart.last_error()!r} was left behind")

    def capturing(self, handle: int) -> bool:
        return self._cudart.stream(handle).capture is not None

    def current_device(self) -> int:
        return int(self._cudart.current())

    def launch(self, handle: int, work: Work) -> None:
        """Queue one batch."""
        if work.network:
            from standin_network import CpuNetwork

            if work.network not in self._networks:
                self._networks[work.network] = CpuNetwork(work.network, self._cudart)
            network = self._networks[work.network]
            self._cudart.launch(handle, lambda: network.run(work))
            return
        device, addresses, batch, words, slots = work.device, work.addresses, work.batch, work.words, work.slots  # fmt: skip

        def kernel() -> None:
            data = self._cudart.memory(addresses[""], batch * words * 4, device=device)
            for name, array in detect(data.reshape(batch, -1), slots).items():
                target = self._cudart.memory(addresses[name], array.nbytes, device=device)
                target[:] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)

        self._cudart.launch(handle, kernel)


class CudaBackend:
    """Runs the kernel on a GPU, on memory and streams of the real CUDA runtime; needs cuda-python
    and NVRTC, or nvcc.

    Raises:
        ImportError, OSError: neither is here.
    """

    asks_cuda = True

    def __init__(self) -> None:
        from cuda.bindings import driver, runtime

        self._driver, self._runtime = driver, runtime
        self._kernels: dict[int, dict[str, Any]] = {}  # device -> name -> function
        self._networks: dict[tuple[str, int, int], Any] = {}  # file, device, stream
        self._lock = threading.Lock()

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        status, *values = function(*args)
        if int(status) != 0:
            raise AssertionError(f"{function.__name__}: {status!r}")
        return values[0] if len(values) == 1 else values

    def check_memory(self, address: int, nbytes: int, device: int) -> None:
        """Raise where the bytes are not within one live allocation of the device."""
        attributes = self._call(self._runtime.cudaPointerGetAttributes, address)
        if attributes.type != self._runtime.cudaMemoryType.cudaMemoryTypeDevice:
            raise AssertionError(f"{address:#x} is not device memory")
        if attributes.device != device:
            raise AssertionError(
                f"{address:#x} is memory of GPU {attributes.device}, expected {device}"
            )
        base, size = self._call(self._driver.cuMemGetAddressRange, address)
        if address + nbytes > int(base) + size:
            raise AssertionError(f"{nbytes} bytes at {address:#x} reach past their allocation")

    def check_stream(self, handle: int) -> None:
        """Raise where the handle is the default stream. (CUDA itself faults on a dead one.)"""
        if handle in (0, 1, 2):
            raise AssertionError("the default stream synchronises with all others")

    def check_clean(self) -> None:
        """Raise where an earlier error was left for the kernels' own check of the last error."""
        self._call(self._runtime.cudaPeekAtLastError)

    def capturing(self, handle: int) -> bool:
        state = self._call(self._runtime.cudaStreamIsCapturing, handle)
        return bool(state != self._runtime.cudaStreamCaptureStatus.cudaStreamCaptureStatusNone)

    def current_device(self) -> int:
        return int(self._call(self._runtime.cudaGetDevice))

    def launch(self, handle: int, work: Work) -> None:
        """Queue one batch."""
        if work.network:
            self._network(work, handle).run(work)
            return
        kernels = self._load(work.device)
        for _ in range(work.kernels - 1):
            self._call(self._driver.cuLaunchKernel, kernels["standin_nothing"], 1, 1, 1, 32, 1, 1, 0, handle, 0, 0)  # fmt: skip
        values = (
            np.array(work.addresses[""], np.uint64),
            np.array(work.words, np.int32),
            np.array(work.slots, np.int32),
            np.array(round(work.spin_ms * 1e6), np.uint64),
            *(np.array(work.addresses[name], np.uint64) for name in OUTPUTS),
        )
        pointers = np.array([value.ctypes.data for value in values], np.uint64)
        # fmt: off
        self._call(self._driver.cuLaunchKernel, kernels["standin_detect"], work.batch, 1, 1, 256, 1, 1, 0, handle, pointers.ctypes.data, 0)
        # fmt: on

    def _network(self, work: Work, handle: int) -> Any:
        from standin_network import CudaNetwork

        key = (work.network, work.device, handle)
        with self._lock:
            if key not in self._networks:
                self._networks[key] = CudaNetwork(*key)
            return self._networks[key]

    def _load(self, device: int) -> dict[str, Any]:
        with self._lock:
            if device not in self._kernels:
                properties = self._call(self._runtime.cudaGetDeviceProperties, device)
                code = np.frombuffer(compile_kernels(f"sm_{properties.major}{properties.minor}"), np.uint8)  # fmt: skip
                module = self._call(self._driver.cuModuleLoadData, code.ctypes.data)
                self._kernels[device] = {
                    name: self._call(self._driver.cuModuleGetFunction, module, name.encode())
                    for name in ("standin_detect", "standin_nothing")
                }
            return self._kernels[device]


def compile_kernels(architecture: str) -> bytes:
    """Machine code for "sm_90", made by NVRTC, or by nvcc where cuda-python finds no NVRTC.

    Raises:
        OSError: neither is here.
    """
    try:
        return _compile_with_nvrtc(architecture)
    except (ImportError, RuntimeError, OSError) as error:
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        if nvcc is None:
            raise OSError(f"NVRTC does not load ({error}) and there is no nvcc") from error
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "k.cu"), Path(folder, "k.cubin")
        source.write_text(SOURCE, encoding="utf-8")
        subprocess.run([nvcc, "-cubin", f"-arch={architecture}", "-o", target, source], check=True)
        return target.read_bytes()


def _compile_with_nvrtc(architecture: str) -> bytes:
    from cuda.bindings import nvrtc

    def call(function: Callable[..., Any], *args: Any) -> Any:
        status, *values = function(*args)
        if int(status) != 0:
            raise RuntimeError(f"{function.__name__}: {status!r}")
        return values[0] if values else None

    program = call(nvrtc.nvrtcCreateProgram, SOURCE.encode(), b"standin.cu", 0, [], [])
    call(nvrtc.nvrtcCompileProgram, program, 1, [f"--gpu-architecture={architecture}".encode()])
    code = b" " * call(nvrtc.nvrtcGetCUBINSize, program)
    call(nvrtc.nvrtcGetCUBIN, program, code)
    return code
