# SPDX-License-Identifier: Apache-2.0
"""Which TensorRT knows which card, and which driver CUDA needs: NVIDIA's own words, each with its
page. What no page says is not here.

Pages are below docs.nvidia.com/deeplearning/tensorrt where not said otherwise.
"""

from __future__ import annotations

Version = tuple[int, ...]

#: From this TensorRT on -> the oldest compute capability it runs on, newest first. 10.5: "Volta
#: support (compute capability 7.0) has been removed",
#: latest/getting-started/release-notes-10/10.5.0.html; 10: "compiled to support all NVIDIA hardware
#: with capability SM 7.0 or higher", archives/tensorrt-1010/support-matrix; 9: "Support for Maxwell
#: (SM 5.x) devices will be dropped in TensorRT 9.0"; 8.6: "8.5 will be the last release supporting
#: Kepler (SM 3.x)", both archives/tensorrt-852/release-notes/tensorrt-8.html.
OLDEST_CARD: tuple[tuple[Version, Version], ...] = (
    ((10, 5), (7, 5)),
    ((10,), (7, 0)),
    ((9,), (6, 0)),
    ((8, 6), (5, 0)),
)

#: Compute capability -> the first TensorRT that runs on it; those that 8.6 knows are left out. 10.0
#: and 12.0: "This release supports NVIDIA Blackwell GPUs, such as the GeForce 50-series. B200 and
#: GB200 NVL have limited support", 10.8.0/getting-started/release-notes.html; 10.3 and 12.1:
#: "Support for NVIDIA GB300, NVIDIA DGX B300, and NVIDIA DGX Spark", 10.14.1's release notes,
#: release-notes/tensorrt-7.html (the numbers of these cards: developer.nvidia.com/cuda-gpus).
FIRST_TENSORRT: dict[Version, Version] = {
    (10, 0): (10, 8),
    (12, 0): (10, 8),
    (10, 3): (10, 14),
    (12, 1): (10, 14),
}

#: CUDA's major version -> the oldest driver; within a major version newer toolkits run on older
#: drivers. docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html, table 1.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}

#: CUDA's major version from which on CUDA for Python, 12.9.1 or later (requirements-tensorrt.txt),
#: runs.
OLDEST_CUDA = 12

#: "r535+ on Linux", with CUDA 12 too: 11.2.1 and 11.4.0/installing-tensorrt/prerequisites.html.
DRIVER_OF_TENSORRT_11 = 535


def oldest_card(tensorrt: Version) -> Version:
    """The oldest compute capability that a TensorRT runs on."""
    return next((card for version, card in OLDEST_CARD if tensorrt >= version), (5, 0))


def knows_card(tensorrt: Version, capability: Version) -> bool:
    """Whether a TensorRT runs on a card, as far as NVIDIA's pages say; True where they do not."""
    first = FIRST_TENSORRT.get(capability, (8, 6))
    return tensorrt >= first and capability >= oldest_card(tensorrt)


def tensorrt_for(capability: Version) -> tuple[Version, Version]:
    """The versions that know a card: from the first, up to but without the second."""
    first = FIRST_TENSORRT.get(capability, (8, 6))
    end: Version = (12,)
    for version, card in OLDEST_CARD:
        if capability < card:
            end = version
    return first, end
