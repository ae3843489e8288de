# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402 (PyAV comes first)
"""VideoSink: frame times in every container and by every encoder, and nothing left of a failure."""

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

av = pytest.importorskip("av", reason="needs requirements-video.txt")

from trtdet.video import sink
from trtdet.video.options import WRITTEN
from trtdet.video.sink import VideoSink

RATE = Fraction(30000, 1001)
#: Uneven, as a telephone's; two frames at once.
TIMES = [0, 1 / 30, 0.05, 0.05, 0.4, 0.41, 3.0, 3 + 1001 / 30000, 12.5, 12.6]


def pictures() -> list[np.ndarray[Any, Any]]:
    """A soft pattern that moves."""
    noise = np.random.default_rng(1).integers(0, 256, (120, 160, 3), np.uint8)
    soft = cv2.GaussianBlur(noise, (0, 0), 4).astype(float)
    pattern = ((soft - soft.mean()) * 6 + 128).clip(0, 255).astype(np.uint8)
    return [np.roll(pattern, 2 * number, 1) for number in range(len(TIMES))]


def write(path: Path) -> None:
    with VideoSink(path, RATE) as video:
        for picture, seconds in zip(pictures(), TIMES, strict=True):
            video.write(picture, seconds)


def check(path: Path, codec: str) -> None:
    """The times of the frames, and what they show."""
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == codec
        frames = list(container.decode(video=0))
    assert [frame.time for frame in frames] == pytest.approx(TIMES, abs=1e-3)
    for frame, picture in zip(frames, pictures(), strict=True):
        assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - picture).mean() < 8


@pytest.mark.parametrize("suffix", WRITTEN)
def test_every_container_keeps_the_times(suffix: str, tmp_path: Path) -> None:
    encoder = sink.pick_encoder(av, suffix)
    codecs = {"libx264": "h264", "libopenh264": "h264", "libvpx-vp9": "vp9", "libvpx": "vp8"}
    write(tmp_path / f"out{suffix}")
    check(tmp_path / f"out{suffix}", codecs.get(encoder, encoder))


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_without_an_encoder_of_h264(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    """MPEG-4 takes no more than 65535 ticks per second."""
    monkeypatch.setattr(sink, "USUAL_ENCODERS", ("no_such_encoder", "mpeg4"))
    write(tmp_path / f"out{suffix}")
    assert "this PyAV has no no_such_encoder; the video is written by mpeg4" in caplog.text
    check(tmp_path / f"out{suffix}", "mpeg4")


def test_nothing_is_left_where_a_file_cannot_be_opened(tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no muxer")

    video = VideoSink(tmp_path / "out.mp4", RATE)
    video._av = SimpleNamespace(open=fail)
    with pytest.raises(OSError, match="no muxer"), video:
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["encode", "mux"])
def test_nothing_is_left_where_the_last_frames_fail(where: str, tmp_path: Path) -> None:
    """An encoder keeps frames back; writing them is the last that can go wrong."""

    class Failing:
        """Passes all on, but for the end."""

        def __init__(self, real: Any) -> None:
            self._real = real

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

        def encode(self, frame: Any) -> Any:
            if frame is None and where == "encode":
                raise ValueError("out of memory")
            return self._real.encode(frame)

    class FailingContainer(Failing):
        def mux(self, packets: Any) -> None:
            raise ValueError("out of memory")

    video = VideoSink(tmp_path / "out.mp4", RATE)
    with pytest.raises(ValueError, match="out of memory"), video:
        for picture, seconds in zip(pictures(), TIMES, strict=True):
            video.write(picture, seconds)
        assert len(list(tmp_path.iterdir())) == 1  # the temporary file
        video._stream = Failing(video._stream)
        if where == "mux":
            video._container = FailingContainer(video._container)
    assert list(tmp_path.iterdir()) == []
