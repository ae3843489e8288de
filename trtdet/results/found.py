# SPDX-License-Identifier: Apache-2.0
"""What a model found: of a batch, as it came out or decoded, and of one image."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from trtdet.detections import Detections, decode
from trtdet.geometry import ResizeTransform
from trtdet.images.files import ImageArray
from trtdet.spec import ModelSpec


@dataclass(frozen=True)
class ImageResult:
    """One image and what was found in it.

    Attributes:
        source: (h, w, 3) uint8 RGB; None where the batcher does not keep it.
    """

    path: Path
    detections: Detections
    source: ImageArray | None


ImageResults = Generator[ImageResult, None, None]


@dataclass(frozen=True, eq=False)
class RawResults:
    """The outputs of some images, not decoded yet: whoever writes the files does that.

    Attributes:
        arrays: by name, `trtdet.spec.OUTPUT_NAMES`; a row for each image.
        transforms: one per image.
        size_hw: height and width of the network input.
        score_threshold: of the detections to keep.
        classes: ids of those to keep; None: all.
    """

    arrays: dict[str, NDArray[Any]]
    transforms: Sequence[ResizeTransform]
    size_hw: tuple[int, int]
    score_threshold: float = 0.0
    classes: Sequence[int] | None = None

    def __len__(self) -> int:
        """The number of images."""
        return len(self.transforms)

    def __getitem__(self, part: slice) -> "RawResults":
        arrays = {name: rows[part] for name, rows in self.arrays.items()}
        return RawResults(arrays, self.transforms[part], self.size_hw, self.score_threshold, self.classes)  # fmt: skip

    def decoded(self, spec: ModelSpec) -> list[Detections]:
        """What was found in each image.

        Raises:
            ValueError: outputs of other shapes, or a class that the model does not have.
        """
        found = decode(self.arrays, spec, self.transforms, size_hw=self.size_hw)
        if self.score_threshold > 0:
            found = [one.above(self.score_threshold) for one in found]
        if self.classes is not None:
            found = [one.of_classes(self.classes) for one in found]
        return found


@dataclass(frozen=True, eq=False)
class Found:
    """Some images in a row, and what was found in them.

    Attributes:
        sources: (h, w, 3) uint8 RGB each; None where the batcher does not keep them, or where a
            process does not see one.
    """

    paths: Sequence[Path]
    results: RawResults | Sequence[Detections]
    sources: Sequence[ImageArray | None] | None = None

    def __len__(self) -> int:
        """The number of images."""
        return len(self.paths)

    def __getitem__(self, part: slice) -> "Found":
        sources = None if self.sources is None else self.sources[part]
        return Found(self.paths[part], self.results[part], sources)

    def decoded(self, spec: ModelSpec) -> Sequence[Detections]:
        """What was found in each image; see `RawResults.decoded`."""
        return self.results.decoded(spec) if isinstance(self.results, RawResults) else self.results
