# SPDX-License-Identifier: Apache-2.0
"""A CUDA kernel, compiled when it is first needed (NVRTC), for the GPU that it runs on.

Only cuda-python (`cuda.bindings.driver` and `nvrtc`), imported at the first call.
"""

import ctypes
import importlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from trtdet import cuda
from trtdet.errors import EngineError


class Kernel:
    """A kernel that is loaded on a GPU, for the rest of the process. `kernel_of` has it once each.

    Raises:
        EngineError: NVRTC is not installed, or does not know the GPU.
    """

    def __init__(self, source: Path, name: str, device: int) -> None:
        self._driver = _module("driver")
        cuda.use_device(device)
        cuda.free_memory()  # starts CUDA's own context, in which the kernel is to be
        capability = cuda.device_info(device).compute_capability
        code = _compile(source, "sm_{}{}".format(*capability))
        module = self._call("cuModuleLoadData", code)
        self._function = self._call("cuModuleGetFunction", module, name.encode())

    def launch(
        self,
        stream: cuda.Stream,
        grid: tuple[int, int, int],
        block: tuple[int, int],
        arguments: Sequence[tuple[Any, Any]],
    ) -> None:
        """Queue one launch.

        Args:
            arguments: values, each with its ctypes type (an address: `ctypes.c_void_p`).

        Raises:
            EngineError: CUDA refused.
        """
        values, kinds = zip(*arguments, strict=True)
        self._call("cuLaunchKernel", self._function, *grid, *block, 1, 0, int(stream.handle), (values, kinds), 0)  # fmt: skip

    def _call(self, function: str, *args: Any) -> Any:
        status, *values = getattr(self._driver, function)(*args)
        if int(status) != 0:
            raise EngineError(f"{function}: {status.name}")
        return values[0] if values else None


@cache
def kernel_of(source: Path, name: str, device: int) -> Kernel:
    """The kernel on this GPU."""
    return Kernel(source, name, device)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise EngineError(f"cuda-python does not load ({error})") from error


def _compile(source: Path, architecture: str) -> bytes:
    """Machine code for "sm_90".

    Multiplications and additions are not fused, so that a kernel counts as a CPU does.
    """
    nvrtc = _module("nvrtc")

    def call(function: str, *args: Any) -> Any:
        try:
            status, *values = getattr(nvrtc, function)(*args)
        except RuntimeError as error:  # cuda-python finds no library
            raise EngineError(f"NVRTC does not load ({error})") from error
        if int(status) != 0:
            raise EngineError(f"{function}: {status.name}{log()}")
        return values[0] if values else None

    def log() -> str:
        if program is None:
            return ""
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        text = b" " * size
        nvrtc.nvrtcGetProgramLog(program, text)
        return ": " + " ".join(text.decode(errors="replace").split())

    program = None
    program = call("nvrtcCreateProgram", source.read_bytes(), source.name.encode(), 0, [], [])
    options = [f"--gpu-architecture={architecture}".encode(), b"--fmad=false"]
    call("nvrtcCompileProgram", program, len(options), options)
    code = b" " * call("nvrtcGetCUBINSize", program)
    call("nvrtcGetCUBIN", program, code)
    return code


#: ctypes of an address, for `Kernel.launch`.
ADDRESS = ctypes.c_void_p
