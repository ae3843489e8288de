# SPDX-License-Identifier: Apache-2.0
"""The packages this project uses: which requirement file and which extra of the package bring
them.
"""

from __future__ import annotations

#: Top-level module -> the file that installs it; all others are in requirements.txt.
REQUIREMENTS = {
    "tensorflow": "requirements-tensorflow.txt",
    "tf2onnx": "requirements-tensorflow.txt",
    "cuda": "requirements-tensorrt.txt",
    "tensorrt": "requirements-tensorrt.txt",
    "tensorrt_rtx": "requirements-rtx.txt",
    "nvidia.nvimgcodec": "requirements-gpu.txt",
    "tritonclient": "requirements-triton.txt",
    "ray": "requirements-ray.txt",
    "av": "requirements-video.txt",
}

#: Where the modules of every stage come from.
BASE = "requirements.txt"

#: Module -> the distribution that brings it, where the names differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "onnx_graphsurgeon": "onnx-graphsurgeon",
    "cuda": "cuda-python",
    "tensorrt_rtx": "tensorrt-rtx",
}


def requirement_file(module: str) -> str:
    """The requirement file that installs a top-level module."""
    return REQUIREMENTS.get(module, BASE)


def extra_of(file: str) -> str:
    """requirements-tensorrt.txt -> tensorrt, the extra of the installed package that brings the
    same; "" for requirements.txt.
    """
    return file.removeprefix("requirements").removesuffix(".txt").removeprefix("-")
