# SPDX-License-Identifier: Apache-2.0
"""The kernel of `trtdet.runtimes.gpu_images` compiled for the CPU, thread after thread: the same
source, without a GPU.
"""

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trtdet.runtimes import place

LAUNCH = r"""
extern "C" void launch(const Image* images, int count, int height, int width, int how, float red, float green, float blue)
{
    blockDim = Index{width, height, 1};
    for (int z = 0; z < count; ++z)
        for (int y = 0; y < height; ++y)
            for (int x = 0; x < width; ++x) {
                blockIdx = Index{0, 0, z};
                threadIdx = Index{x, y, 0};
                place_images(images, height, width, how, red, green, blue);
            }
}
"""


@cache
def library() -> Any:
    """The kernel as a shared library."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to compile the kernel for the CPU")
    folder = Path(mkdtemp())
    source = folder / "kernel.cpp"
    header = Path(__file__).with_name("kernel_on_cpu.h")
    source.write_text(f'#include "{header}"\n{place.SOURCE.read_text()}\n{LAUNCH}')
    command = [compiler, "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-o", str(folder / "kernel.so"), str(source)]  # fmt: skip
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "kernel.so"))


def launch(table: NDArray[Any], launched: "place.Launch") -> None:
    """Run the kernel on a table whose addresses are those of host memory."""
    colors = map(ctypes.c_float, launched.pad_rgb)
    library().launch(
        ctypes.c_void_p(np.ascontiguousarray(table).ctypes.data),
        len(table),
        *launched.size_hw,
        launched.how,
        *colors,
    )
