# SPDX-License-Identifier: Apache-2.0
"""Trained object detectors to NVIDIA TensorRT: `load`, `convert`, `build`.

README.md has the chain of scripts.

The API is imported when it is first asked for: `import trtdet` alone needs the standard library.
"""

from typing import TYPE_CHECKING, Any

from trtdet.about import __version__

if TYPE_CHECKING:
    from trtdet.api import Detections, Model, build, convert, load

__all__ = ["Detections", "Model", "__version__", "build", "convert", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'trtdet' has no attribute {name!r}")
    from trtdet import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted(__all__)
