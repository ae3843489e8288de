# SPDX-License-Identifier: Apache-2.0
"""How a video is named, and what can be asked of it.

Standard library only: the command lines read it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

#: Containers that are taken for video by their name; PyAV opens more, whatever they are called,
#: only these are looked for.
SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv", ".mjpeg", ".h264", ".hevc")  # fmt: skip
#: Containers that an annotated video is written to.
WRITTEN = (".mp4", ".mov", ".mkv", ".avi", ".webm")
SCHEMES = ("rtsp", "rtsps", "rtmp", "srt", "udp", "tcp", "http", "https")


@dataclass(frozen=True)
class Live:
    """A camera or a stream: it goes on without end, and does not wait."""

    address: str

    @property
    def name(self) -> str:
        """What its results are called: it never holds the password of an address."""
        return "camera" if self.address.startswith("/dev/") else "stream"

    def __str__(self) -> str:
        return re.sub(r"//[^/@]*@", "//", self.address)


Video = Path | Live


def parse_source(text: str) -> Path | Live:
    """A path, or a camera (`0`, `/dev/video0`), or the address of a stream."""
    if re.match(rf"({'|'.join(SCHEMES)})://", text):
        return Live(text)
    if re.fullmatch(r"\d{1,2}", text) and not Path(text).exists():
        return Live(f"/dev/video{text}")
    if re.fullmatch(r"/dev/video\d+", text):
        return Live(text)
    return Path(text)


def is_video(source: Path | Live) -> bool:
    """Whether this is taken for a video, by its name."""
    return isinstance(source, Live) or (source.suffix.lower() in SUFFIXES and not source.is_dir())


@dataclass(frozen=True)
class VideoOptions:
    """What part of a video is looked at.

    Attributes:
        every: of so many frames one.
        start, duration: seconds; None: to the end.
    """

    every: int = 1
    start: float = 0.0
    duration: float | None = None
