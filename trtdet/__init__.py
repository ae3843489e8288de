# SPDX-License-Identifier: Apache-2.0
"""Trained object detectors to NVIDIA TensorRT: `load`, `convert`, `build`.

README.md has the chain of scripts.

The API is imported when it is first asked for: `import trtdet` alone needs the standard library.
"""

from __future__ import annotations

TYPE_CHECKING = False  # Ctrl-C is caught once this is imported: nothing here may take long
if TYPE_CHECKING:
    from typing import Any

    from trtdet.about import __version__
    from trtdet.api import Detections, Model, build, convert, load

__all__ = ["Detections", "Model", "__version__", "build", "convert", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'trtdet' has no attribute {name!r}")
    if name == "__version__":
        from trtdet.about import __version__

        return __version__
    from trtdet import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted(__all__)
