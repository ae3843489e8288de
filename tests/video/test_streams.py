# SPDX-License-Identifier: Apache-2.0

"""Real streams from a server on this machine, which break and come back; `tests/helpers/streams.py`
says what it speaks. There is no camera here: those are opened by a fake source in test_video.py.
"""

import json
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("av", reason="needs requirements-video.txt")

import streams
import toy_network

from trtdet.commands import infer
from trtdet.video import source as video_source
from trtdet.video.options import Live
from trtdet.video.source import Frame, Source

SCHEMES = ("tcp", "rtsp")


def greys(frames: list[Frame]) -> list[int]:
    return [round(float(frame.pixels.mean())) for frame in frames]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_stream_that_breaks_goes_on(scheme: str) -> None:
    """Two connections, 40 and 30 frames: one count, times that never go back, every picture."""
    programmes = [streams.transport_stream(40), streams.transport_stream(30, first=40)]
    pauses: list[float] = []
    with streams.served(scheme, programmes) as address:
        source = Source(Live(address), sleep=pauses.append)
        frames = list(source)
    assert source.is_live and source.info.rate == streams.RATE
    # RTP does not say where its last picture ends: the decoder waits for the next one.
    lost = 1 if scheme == "rtsp" else 0
    assert len(frames) == 70 - 2 * lost
    assert [frame.number for frame in frames] == list(range(len(frames)))
    times = [frame.seconds for frame in frames]
    assert times == sorted(times) and times[1] - times[0] == pytest.approx(1 / streams.RATE)
    sent = [n for n in range(70) if not (lost and n in (39, 69))]
    expected = [20 + 4 * (n % 50) for n in sent]
    np.testing.assert_allclose(greys(frames), expected, atol=3)
    assert pauses == [1, 2, 4]
    assert source.ended == f"the stream ended; it ends after {len(frames)} frames"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_stream_that_stands_still_is_given_up(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_source, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(video_source, "RETRIES", 0)
    start = time.monotonic()
    with streams.served(scheme, [streams.transport_stream(20)], pause_s=1.5) as address:
        source = Source(Live(address))
        frames = list(source)
        waited = time.monotonic() - start
    assert 18 <= len(frames) <= 20
    assert 0.4 < waited < 1.4
    assert "it ends after" in source.ended


@pytest.mark.parametrize("scheme", SCHEMES)
def test_detections_of_a_stream(scheme: str, tmp_path: Path) -> None:
    """By the command; --duration ends what has no end."""
    onnx.save(toy_network.network(), tmp_path / "net.onnx")
    with streams.served(scheme, [streams.transport_stream(100)]) as address:
        arguments = ["--model", tmp_path / "net.onnx", "--input", address, "--output", tmp_path / "out", "--duration", 1, "--provider", "cpu"]  # fmt: skip
        assert infer.main([str(word) for word in arguments]) == 0
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert {"stream.mp4", "stream.tsv", "detections.json"} <= set(found)
    rows = [line.split("\t") for line in (tmp_path / "out" / "stream.tsv").read_text().splitlines()]
    assert len(rows) == len(json.loads((tmp_path / "out" / "detections.json").read_text())) > 0
    assert max(int(row[0]) for row in rows) <= 24
    assert max(float(row[1]) for row in rows) < 1


def test_a_password_of_a_stream_is_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    onnx.save(toy_network.network(), tmp_path / "net.onnx")
    address = "rtsp://user:secret@127.0.0.1:1/stream"
    arguments = ["--model", tmp_path / "net.onnx", "--input", address, "--output", tmp_path / "out"]
    assert infer.main([str(word) for word in arguments]) == 1
    said = capsys.readouterr().err
    assert "rtsp://127.0.0.1:1/stream: cannot be opened as a video" in said
    assert "secret" not in said
    assert not (tmp_path / "out").exists()
