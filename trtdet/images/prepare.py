# SPDX-License-Identifier: Apache-2.0
"""One image file -> one row of a batch: what each worker of `ImageBatcher` does."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from numpy.typing import NDArray

from trtdet.files import message_of
from trtdet.geometry import ResizeTransform
from trtdet.images import files
from trtdet.images.files import ImageArray
from trtdet.images.options import Resample
from trtdet.images.preprocess import Placer, ShorterSide, placer
from trtdet.spec import Preprocessing

#: The way back to source pixels, and the source where it is kept.
Prepared: TypeAlias = tuple[ResizeTransform, ImageArray | None]
#: What came of an image: itself, the reason why it cannot be used, or an error that ends the
#: iteration.
Result: TypeAlias = Prepared | str | BaseException


@dataclass(frozen=True)
class Preparer:
    """Decodes and places images.

    Attributes:
        resize: scale every image by itself.
        keep_sources: return the decoded images too.
        load: what makes an image of a path; None: `load_image`.
    """

    preprocessing: Preprocessing
    resample: Resample | None = None
    resize: ShorterSide | None = None
    keep_sources: bool = False
    load: Callable[[Path], ImageArray] | None = None

    def prepare(self, path: Path, out: NDArray[Any]) -> Result:
        """Write one image into `out`."""
        try:
            return self._prepare(path, out)
        except BaseException as error:  # the consumer raises it
            return error

    def _prepare(self, path: Path, out: NDArray[Any]) -> Prepared | str:
        try:
            image = (self.load or files.load_image)(path)
        except (OSError, ValueError) as error:
            return message_of(error)
        place, scale = self._placer, None
        if self.resize:
            preprocessing = self.preprocessing.at(self.preprocessing.size_of(out.shape))
            place, scale = placer(preprocessing, self.resample), self.resize.scale(image.shape)
            if max(image.shape[:2]) * scale >= max(preprocessing.size_hw) + 1:
                return f"{path}: expected the size in the file's header, found {image.shape[:2]}"
        transform = place.place(image, out, scale)
        return transform, image if self.keep_sources else None

    @cached_property
    def _placer(self) -> Placer:
        return placer(self.preprocessing, self.resample)
