# SPDX-License-Identifier: Apache-2.0
"""How the channels of activations go together: their covariance, over samples of positions.

One pass over images, of which nothing is kept but sums.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtdet.precision.body import Body, watched
from trtdet.sessions import open_session

#: Positions of a feature map that are looked at, in each image.
SAMPLES = 512


class Moments:
    """Of one tensor: sums of x and of x x' over its samples."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.first = np.zeros(channels)
        self.second = np.zeros((channels, channels), np.float32)

    def add(self, samples: NDArray[np.float32]) -> None:
        """(n, channels)"""
        self.count += len(samples)
        self.first += samples.sum(0, dtype=np.float64)
        self.second += samples.T @ samples

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Zeros where nothing was added."""
        count = max(self.count, 1)
        mean = self.first / count
        return self.second.astype(np.float64) / count - np.outer(mean, mean)


def measure_moments(
    body: Body, tensors: Mapping[str, int], feeds: Iterable[Mapping[str, NDArray[Any]]]
) -> dict[str, Moments]:
    """
    Args:
        tensors: activations [N, C, ...] of the network -> their C.
        feeds: one image each, in every row of a fixed batch. Looked at one at a time.
    """
    found = {name: Moments(channels) for name, channels in tensors.items()}
    inputs = {info.name for info in body.network.graph.input}
    inner = [name for name in tensors if name not in inputs]  # an input is no output, too
    session = open_session(watched(body.network, inner), "the model") if inner else None
    for number, feed in enumerate(feeds):
        rng = np.random.default_rng(number)
        values = dict(feed)
        if session is not None:
            values.update(zip(inner, session.run(inner, feed), strict=True))
        for name, moments in found.items():
            rows = values[name][0].reshape(tensors[name], -1)
            if rows.shape[1] > SAMPLES:
                rows = rows[:, rng.integers(rows.shape[1], size=SAMPLES)]
            moments.add(np.ascontiguousarray(rows.T, np.float32))
    return found
