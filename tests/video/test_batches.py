# SPDX-License-Identifier: Apache-2.0
"""How many batches a video has. What is in them: test_video.py."""

from fractions import Fraction
from operator import length_hint
from pathlib import Path

import pytest

from trtdet.spec import Preprocessing
from trtdet.video.batches import FrameBatcher
from trtdet.video.options import Live, Video, VideoOptions
from trtdet.video.source import Info, Source

FILE = Path("clip.mp4")


@pytest.mark.parametrize(
    ("video", "info", "options", "batch_size", "batches"),
    [
        (FILE, Info(12, Fraction(25), False, 0.48), VideoOptions(), 5, 3),
        (FILE, Info(12, Fraction(25), False, 0.48), VideoOptions(), 4, 3),
        (FILE, Info(12, Fraction(25), False, 0.48), VideoOptions(), 1, 12),
        (FILE, Info(100, Fraction(10), False, 10.0), VideoOptions(every=3), 5, 7),  # 34 frames
        (FILE, Info(100, Fraction(10), False, 10.0), VideoOptions(start=2.0, duration=3.0), 8, 4),
        (FILE, Info(100, Fraction(10), False, 10.0), VideoOptions(start=20.0), 8, 0),
        (FILE, Info(None, Fraction(10), False, None), VideoOptions(), 8, 0),  # nobody knows
        (FILE, Info(None, Fraction(10), False, None), VideoOptions(duration=3.0), 8, 4),
        (Live("rtsp://x"), Info(None, Fraction(10), False, None), VideoOptions(), 8, 0),
        # Live frames are looked at as they come, however many it will be.
        (Live("rtsp://x"), Info(None, Fraction(10), False, None), VideoOptions(duration=3.0), 8, 0),
        # An address whose container knows its duration is a file.
        (Live("https://x/a.mp4"), Info(60, Fraction(10), False, 6.0), VideoOptions(), 7, 9),
    ],
)
def test_how_many_are_announced(video: Video, info: Info, options: VideoOptions, batch_size: int, batches: int) -> None:  # fmt: skip
    source = Source(video, options, open_video=lambda _: (info, iter(())))
    assert length_hint(FrameBatcher(source, Preprocessing((32, 32)), batch_size), 99) == batches
