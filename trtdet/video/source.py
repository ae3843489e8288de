# SPDX-License-Identifier: Apache-2.0
"""Frames of a video file, a camera or a stream, by PyAV, the right way up, each with its number
and time.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from trtdet import files
from trtdet.errors import EngineError
from trtdet.images.files import ImageArray
from trtdet.video.options import Live, Video, VideoOptions

logger = logging.getLogger(__name__)

#: How often a stream that breaks is opened again, and how long is waited before: 1, 2, 4 seconds.
RETRIES = 3
FIRST_PAUSE_S = 1.0
#: Seconds of frames after which a stream that was opened again has all its attempts anew.
STABLE_S = 10.0
#: Seconds that a stream may be silent.
TIMEOUT_S = 10.0
#: What a file may be, by FFmpeg's names.
DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,asf,flv,ogg,mjpeg,h264,hevc"  # fmt: skip
INSTALL = "pip install -r requirements-video.txt"


class BrokenVideo(OSError):
    """What ended a video before its end."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a video.

    Attributes:
        number: counted from 0, from the beginning of the video.
        seconds: when it is shown.
        pixels: (h, w, 3) uint8 RGB, the right way up.
    """

    number: int
    seconds: float
    pixels: ImageArray


@dataclass(frozen=True)
class Info:
    """What a container says of itself.

    Attributes:
        frames: how many there are; None: not known.
        rate: frames per second, on average.
        has_audio: there is sound.
        duration: seconds; None: not known, as of a camera or a live stream.
    """

    frames: int | None
    rate: Fraction
    has_audio: bool
    duration: float | None = None


#: Opens a video: what it is, and its frames as PyAV has them.
Opened = tuple[Info, Iterator[Any]]
Open = Callable[[Video], Opened]


def load_av() -> Any:
    """PyAV.

    Raises:
        EngineError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise EngineError(f"--input: a video needs PyAV ({error}); {INSTALL}") from error
    av.logging.set_level(None)  # what matters is in its exceptions
    return av


def open_av(video: Video) -> Opened:
    """Open with PyAV.

    Raises:
        BrokenVideo: there is no video in it, or nothing there.
    """
    av = load_av()
    if isinstance(video, Path):
        files.check_input(video, "--input", "a video")
    address = video.address if isinstance(video, Live) else str(video)
    camera = address.startswith("/dev/")
    options = {"rtsp_transport": "tcp"} if address.startswith("rtsp") else {}
    if isinstance(video, Path):  # not a playlist, which names other files and addresses
        options = {"format_whitelist": DEMUXERS, "protocol_whitelist": "file"}
    try:
        container = av.open(
            address,
            format="v4l2" if camera else None,
            options=options,
            timeout=TIMEOUT_S if isinstance(video, Live) else None,
        )
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise BrokenVideo(f"--input: {video}: cannot be opened as a video: {reason(error)}") from error  # fmt: skip
    if not container.streams.video:
        container.close()
        raise BrokenVideo(f"--input: {video}: expected a video, found no picture in it")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    duration = container.duration / av.time_base if container.duration else None
    info = Info(_frame_count(stream), stream.average_rate or Fraction(25), bool(container.streams.audio), duration)  # fmt: skip
    return info, _decode(av, container, stream, video)


def _frame_count(stream: Any) -> int | None:
    """Of the container, or by its length; None where neither is known."""
    if stream.frames:
        return int(stream.frames)
    if stream.duration and stream.average_rate:
        return round(stream.duration * stream.time_base * stream.average_rate)
    return None


def _decode(av: Any, container: Any, stream: Any, video: Video) -> Iterator[Any]:
    """Frames to the end.

    Raises:
        BrokenVideo: it ends in the middle.
    """
    try:
        with container:
            yield from container.decode(stream)
    except (av.error.FFmpegError, OSError) as error:
        raise BrokenVideo(f"{video}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The one line that says what is wrong."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def upright(frame: Any) -> ImageArray:
    """The pixels of PyAV's frame, rotated as its rotation tag says."""
    pixels: ImageArray = frame.to_ndarray(format="rgb24")
    quarters = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, quarters)) if quarters else pixels


class Source:
    """The frames of one video that are wanted.

    A file that is damaged ends where it is; a live one is opened again a few times. An address
    whose container knows its duration is a file. `ended` says why it ended early.

    Attributes:
        info: of the video.
        ended: "" for a video that came to its end, or to the end that was asked for.
    """

    def __init__(
        self,
        video: Video,
        options: VideoOptions = VideoOptions(),
        *,
        open_video: Open = open_av,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._video, self._options = video, options
        self._open, self._sleep = open_video, sleep
        self.info, self._first = open_video(video)
        self.ended = ""

    @property
    def is_live(self) -> bool:
        """Whether it goes on without end, and does not wait."""
        return isinstance(self._video, Live) and self.info.duration is None

    @property
    def expected(self) -> int | None:
        """How many frames will come; None where nobody knows."""
        rate = float(self.info.rate)
        left = self.info.frames - self._options.start * rate if self.info.frames else None
        if self._options.duration is not None:
            asked = self._options.duration * rate
            left = asked if left is None else min(left, asked)
        return None if left is None else max(0, -(-round(left) // self._options.every))

    def __iter__(self) -> Iterator[Frame]:
        """Those of `every`, from `start` on, for `duration`."""
        first = None
        for number, seconds, frame in self._numbered():
            if seconds < self._options.start:
                continue
            first = number if first is None else first
            if self._options.duration is not None and seconds >= self._options.start + self._options.duration:  # fmt: skip
                return
            if (number - first) % self._options.every == 0:
                yield Frame(number, seconds, upright(frame))

    def _numbered(self) -> Iterator[tuple[int, float, Any]]:
        """All frames, each with its number and time; a live one goes on counting after a break."""
        frames, number, tries = self._first, 0, 0
        begun, offset, seconds = time.monotonic(), 0.0, 0.0
        while True:
            origin = None
            try:
                for frame in frames:
                    own = frame.time if frame.time is not None else number / float(self.info.rate)
                    origin = own if origin is None else origin
                    seconds = own - origin + offset
                    yield number, seconds, frame
                    number += 1
                    if own - origin >= STABLE_S:
                        tries = 0
                if not self.is_live:
                    return
                problem = "the stream ended"
            except BrokenVideo as error:
                problem = str(error)
            again = self._reopen(problem, tries) if self.is_live else None
            if again is None:
                self.ended = f"{problem}; it ends after {number} frames"
                return
            frames, tries = again
            offset = max(time.monotonic() - begun, seconds)

    def _reopen(self, problem: str, tries: int) -> tuple[Iterator[Any], int] | None:
        """A stream that broke, opened again, and how often that has been tried now; None where it
        was often enough.
        """
        for attempt in range(tries, RETRIES):
            pause = FIRST_PAUSE_S * 2**attempt
            logger.warning("%s; opening it again in %g s", problem, pause)
            self._sleep(pause)
            try:
                return self._open(self._video)[1], attempt + 1
            except BrokenVideo as error:
                problem = str(error)
        return None
