# SPDX-License-Identifier: Apache-2.0
"""Things that hold something: use them in a `with` block, or close them by hand."""

from abc import ABC, abstractmethod
from typing import TypeVar

AnyClosing = TypeVar("AnyClosing", bound="Closing")


class Closing(ABC):
    """A context manager whose end is `close()`."""

    @abstractmethod
    def close(self) -> None:
        """Free what is held; a second call does no harm."""

    def __enter__(self: AnyClosing) -> AnyClosing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
