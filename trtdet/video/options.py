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
#: Containers that an annotated video is written to: those that keep the time of each frame.
WRITTEN = (".mp4", ".mov", ".mkv", ".webm")
SCHEMES = ("rtsp", "rtsps", "rtmp", "srt", "udp", "tcp", "http", "https")


@dataclass(frozen=True)
class Live:
    """A camera, or an address: a stream, or a file that is read over the network."""

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


def named_video(output: Path) -> Path | None:
    """The annotated video, where an output is one by its name; None for a folder.

    Raises:
        ValueError: a container that is not written.
    """
    suffix = output.suffix.lower()
    if suffix not in SUFFIXES or output.is_dir():
        return None
    if suffix not in WRITTEN:
        others = f"{', '.join(WRITTEN[:-1])} or {WRITTEN[-1]}"
        raise ValueError(f"--output: expected a folder, or a video with the suffix {others}, found {output}; an annotated video is not written as {suffix}")  # fmt: skip
    return output


def check_output(output: Path, *, pictures: bool) -> None:
    """Check an output before anything is read.

    Raises:
        ValueError: a container that is not written; or a video where none is wanted.
    """
    if named_video(output) and not pictures:
        raise ValueError(f"--no_images: writes no annotated video, and --output names one, {output}; give a folder, or leave --no_images out")  # fmt: skip


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
