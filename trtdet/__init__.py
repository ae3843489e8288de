# SPDX-License-Identifier: Apache-2.0
"""Take a trained object detector to NVIDIA TensorRT. See README.md for the chain of scripts."""

from trtdet.about import __version__

__all__ = ["__version__"]
