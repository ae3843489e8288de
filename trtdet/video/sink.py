# SPDX-License-Identifier: Apache-2.0
"""An annotated video, by PyAV: each picture at its own time, H.264 where this PyAV has it."""

import logging
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from trtdet import files
from trtdet.images.files import ImageArray
from trtdet.video.source import load_av

logger = logging.getLogger(__name__)

#: Ticks per second of the times in the file: of MPEG.
TICKS = 90_000
#: Those of encoders that take no more than 65535.
FEWER_TICKS = {"mpeg4": 60_000}
#: Encoder -> its options. mpeg4's quality: 4 of 1 (best) to 31, times 118; else it has 200 kbit/s.
ENCODER_OPTIONS = {
    "libx264": {"crf": "20", "preset": "veryfast"},
    "mpeg4": {"flags": "+qscale", "global_quality": str(4 * 118)},
}
#: Suffix -> FFmpeg's name of the container.
CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
#: Container -> encoders, the first that is there is taken.
ENCODERS = {".webm": ("libvpx-vp9", "libvpx")}
USUAL_ENCODERS = ("libx264", "libopenh264", "mpeg4")


class VideoSink:
    """Writes pictures to a video file, which appears only when it is whole.

    Use as a context manager.

    The first picture says how large the video is; later ones of another size are scaled.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        self._path, self._rate = path, rate
        self._av = load_av()
        self._resources = ExitStack()
        self._stream: Any = None
        self._last = -1
        self._encoder = pick_encoder(self._av, path.suffix.lower())
        self._ticks = FEWER_TICKS.get(self._encoder, TICKS)

    def __enter__(self) -> "VideoSink":
        with ExitStack() as unless_it_opens:
            temporary = unless_it_opens.enter_context(files.atomic_path(self._path))
            kind = CONTAINERS[self._path.suffix.lower()]  # a link may lead to another suffix
            self._container = unless_it_opens.enter_context(self._av.open(str(temporary), "w", format=kind))  # fmt: skip
            self._resources = unless_it_opens.pop_all()
        return self

    def write(self, picture: ImageArray, seconds: float) -> None:
        """Add a picture that is shown from this time on."""
        if self._stream is None:
            self._begin(picture)
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame = frame.reformat(width=self._stream.width, height=self._stream.height, format=self._stream.pix_fmt)  # fmt: skip
        frame.time_base = Fraction(1, self._ticks)
        frame.pts = self._last = max(round(seconds * self._ticks), self._last + 1)
        self._container.mux(self._stream.encode(frame))

    def _begin(self, picture: ImageArray) -> None:
        height, width = picture.shape[:2]
        self._stream = self._container.add_stream(self._encoder, rate=self._rate)
        self._stream.width, self._stream.height = width + width % 2, height + height % 2  # 4:2:0
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, self._ticks)
        self._stream.options = ENCODER_OPTIONS.get(self._encoder, {})

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._resources.__exit__(kind, error, trace)
            return
        with self._resources:  # an error of the last frames removes the file, too
            if self._stream is not None:
                self._container.mux(self._stream.encode(None))


def pick_encoder(av: Any, suffix: str) -> str:
    """The best encoder that this PyAV has for a container.

    Raises:
        ValueError: none.
    """
    wanted = ENCODERS.get(suffix, USUAL_ENCODERS)
    for name in wanted:
        try:
            av.codec.Codec(name, "w")
        except (av.error.FFmpegError, ValueError):
            continue
        if name != wanted[0]:
            logger.warning("this PyAV has no %s; the video is written by %s", wanted[0], name)
        return name
    raise ValueError(f"--output: this PyAV has none of the encoders {', '.join(wanted)}; give a folder and --no_images, which writes no video")  # fmt: skip
