# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402 (PyAV comes first)
"""Video: a frame gives what the same picture gives; numbers, times, rotated and broken videos;
cameras and streams by a fake source.
"""

import json
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av", reason="needs requirements-video.txt")

import toy_detector
from conftest import EXAMPLES
from PIL import Image

from trtdet.commands import infer
from trtdet.run.detect import open_model
from trtdet.run.options import RunOptions
from trtdet.spec import Preprocessing
from trtdet.video.batches import FrameBatcher
from trtdet.video.options import Live, VideoOptions, is_video, parse_source
from trtdet.video.run import Drawing, open_batcher, plan_targets, run_video
from trtdet.video.source import BrokenVideo, Info, Source, open_av

RATE = 10


def pictures() -> list[np.ndarray[Any, Any]]:
    """The example's, cut to one size."""
    paths = sorted((EXAMPLES / "images").iterdir())
    found = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    height, width = (min(picture.shape[axis] for picture in found) for axis in (0, 1))
    return [picture[:height, :width] for picture in found]


def write_video(path: Path, frames: list[Any], *, times: list[float] | None = None, audio: bool = False) -> Path:  # fmt: skip
    """A lossless video (FFV1 in RGB), or one of MPEG-4 where the container is MP4."""
    lossless = path.suffix == ".mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1" if lossless else "mpeg4", rate=RATE)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "bgr0" if lossless else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if audio:
            sound = container.add_stream("aac", rate=16000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.time_base = Fraction(1, 1000)
            frame.pts = round(1000 * (times[number] if times else number / RATE))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")  # fmt: skip
            silence.sample_rate, silence.pts = 16000, 0
            container.mux(sound.encode(silence))
            container.mux(sound.encode(None))
    return path


def rows(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()]


def run(model: Path, video: Path | str, output: Path, *options: object) -> int:
    arguments = ["--model", model, "--input", video, "--output", output, "--provider", "cpu"]
    return infer.main([str(a) for a in [*arguments, *options]])


# ---- files


def test_a_frame_gives_what_its_picture_gives(tiny_onnx: Path, tmp_path: Path) -> None:
    """Frame k of a lossless video and the same picture: the same lines, to the last digit."""
    clip = write_video(tmp_path / "clip.mkv", pictures())
    assert run(tiny_onnx, clip, tmp_path / "video") == 0
    (tmp_path / "in").mkdir()
    for number, pixels in enumerate(pictures()):
        Image.fromarray(pixels).save(tmp_path / "in" / f"{number:02d}.png")
    assert run(tiny_onnx, tmp_path / "in", tmp_path / "images", "--no_images") == 0
    found = rows(tmp_path / "video" / "clip.tsv")
    checked = 0
    for number, path in enumerate(sorted((tmp_path / "in").iterdir())):
        mine = [row[2:] for row in found if row[0] == str(number)]
        assert mine == rows(tmp_path / "images" / f"{path.stem}.tsv")
        checked += len(mine)
    assert checked == len(found) > 100
    assert {(row[0], row[1]) for row in found} == {(str(n), f"{n / RATE:.3f}") for n in range(12)}
    results, of_images = (json.loads((tmp_path / f / "detections.json").read_text()) for f in ("video", "images"))  # fmt: skip
    assert [{**r, "image_id": 0} for r in results] == [{**r, "image_id": 0} for r in of_images]
    assert [r["image_id"] for r in results] == [int(row[0]) for row in found]
    assert (tmp_path / "video" / "labels.txt").read_text().split() == ["circle", "square", "triangle"]  # fmt: skip


def test_the_annotated_video(tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """Named by --output, with results beside it; as many frames, at the same times, with boxes
    drawn.
    """
    # H.264 takes even sizes alone.
    shown = [
        p[: p.shape[0] - 1 + p.shape[0] % 2, : p.shape[1] - 1 + p.shape[1] % 2] for p in pictures()
    ]
    clip = write_video(tmp_path / "clip.mkv", shown, audio=True)
    target = tmp_path / "found" / "marked.mp4"
    assert run(tiny_onnx, clip, target) == 0
    assert sorted(p.name for p in target.parent.iterdir()) == ["marked.json", "marked.mp4", "marked.tsv"]  # fmt: skip
    listed = json.loads((target.parent / "marked.json").read_text())
    assert len(listed) == len(rows(target.parent / "marked.tsv")) > 100
    assert "the sound is left out" in capsys.readouterr().err
    with av.open(str(target)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name in ("h264", "mpeg4") and not container.streams.audio
        frames = list(container.decode(stream))
    height, width = shown[0].shape[:2]
    assert height % 2 and width % 2
    assert (stream.width, stream.height) == (width + 1, height + 1)
    assert [frame.time for frame in frames] == pytest.approx([n / RATE for n in range(12)], abs=1e-4)  # fmt: skip
    drawn = frames[0].to_ndarray(format="rgb24")[:height, :width]
    moved = np.abs(drawn.astype(int) - shown[0]).max(axis=2)
    assert (moved > 60).mean() > 0.01  # outlines and labels
    assert np.median(moved) < 12  # the rest is the picture


def test_a_named_video_leaves_other_files_alone(tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """`--output out.mp4` writes into a folder that is the user's."""
    clip = write_video(tmp_path / "clip.mkv", pictures()[:2])
    monkeypatch.chdir(tmp_path)
    for name in ("labels.txt", "detections.json", "manifest.json"):
        Path(name).write_text("mine")
    assert run(tiny_onnx, clip, Path("out.mp4")) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mkv", "detections.json", "labels.txt", "manifest.json", "out.json", "out.mp4", "out.tsv"]  # fmt: skip
    assert {Path(n).read_text() for n in ("labels.txt", "detections.json", "manifest.json")} == {"mine"}  # fmt: skip


def test_times_of_a_variable_rate_are_kept(tiny_onnx: Path, tmp_path: Path) -> None:
    times = [0, 0.1, 0.15, 0.9, 1.0, 2.5]
    clip = write_video(tmp_path / "clip.mkv", pictures()[:6], times=times)
    assert run(tiny_onnx, clip, tmp_path / "out") == 0
    found = dict(row[:2] for row in rows(tmp_path / "out" / "clip.tsv"))
    assert [float(found[str(n)]) for n in range(6)] == pytest.approx(times, abs=1e-3)
    with av.open(str(tmp_path / "out" / "clip.mp4")) as container:
        assert [f.time for f in container.decode(video=0)] == pytest.approx(times, abs=2e-3)


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        (["--every", 5], [0, 5, 10]),
        (["--start", 0.35], [4, 5, 6, 7, 8, 9, 10, 11]),
        (["--start", 0.3, "--duration", 0.4], [3, 4, 5, 6]),
        (["--start", 0.3, "--duration", 0.5, "--every", 2], [3, 5, 7]),
        (["--batch_size", 5], list(range(12))),
    ],
)
def test_parts_keep_their_numbers(options: list[object], numbers: list[int], tiny_onnx: Path, tmp_path: Path) -> None:  # fmt: skip
    clip = write_video(tmp_path / "clip.mkv", pictures())
    assert run(tiny_onnx, clip, tmp_path / "out", *options, "--no_images") == 0
    found = rows(tmp_path / "out" / "clip.tsv")
    assert sorted({int(row[0]) for row in found}) == numbers
    assert not (tmp_path / "out" / "clip.mp4").exists()
    source = Source(clip, VideoOptions(*(dict(zip(options[::2], options[1::2], strict=True)).get(k, d) for k, d in (("--every", 1), ("--start", 0.0), ("--duration", None)))))  # type: ignore[arg-type]  # fmt: skip
    assert source.expected is None or abs(source.expected - len(numbers)) <= 1


def rotate_tag(path: Path, degrees: int) -> None:
    """Write a rotation, clockwise on the screen, into the track header of an MP4 file: its
    matrix, numbers of 16.16 bits.
    """
    matrix = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    a, b, c, d = (value << 16 for value in matrix)
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    struct.pack_into(">9i", data, place, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_rotation_tag_is_applied(degrees: int, tmp_path: Path) -> None:
    """A telephone's video: the picture lies in the file, the tag says how it is held."""
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:32, :32] = 255  # white in the top left corner
    clip = write_video(tmp_path / "clip.mp4", [pixels] * 3)
    rotate_tag(clip, degrees)
    frame = next(iter(Source(clip)))
    expected = np.rot90(pixels, -degrees // 90)
    assert frame.pixels.shape == expected.shape
    assert np.abs(frame.pixels.astype(int) - expected).mean() < 8


def test_a_damaged_file_gives_what_comes_before(tiny_onnx: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    clip = write_video(tmp_path / "clip.mkv", pictures())

    def breaking(video: Any) -> Any:
        info, frames = open_av(video)

        def some() -> Iterator[Any]:
            for number, frame in enumerate(frames):
                if number == 7:
                    raise BrokenVideo("clip.mkv: Invalid data found")
                yield frame

        return info, some()

    whole = run_video(tiny_onnx, clip, tmp_path / "out", RunOptions(provider="cpu"), VideoOptions(), Drawing(), open_video=breaking)  # fmt: skip
    assert not whole
    assert "clip.mkv: Invalid data found; it ends after 7 frames" in caplog.text
    assert sorted({int(row[0]) for row in rows(tmp_path / "out" / "clip.tsv")}) == list(range(7))
    assert json.loads((tmp_path / "out" / "detections.json").read_text())


def test_a_cut_file_is_no_traceback(tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    clip = write_video(tmp_path / "clip.mp4", pictures())
    clip.write_bytes(clip.read_bytes()[:2000])  # the index at the end is lost
    assert run(tiny_onnx, clip, tmp_path / "out") == 1
    assert "cannot be opened as a video" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- usage


@pytest.mark.parametrize(
    ("text", "video"),
    [
        ("clip.mp4", True), ("a/B.MKV", True), ("photo.jpg", False), ("photos", False), ("/dev/video0", True), ("0", True),
        ("rtsp://user:secret@host/x", True), ("http://host/x.m3u8", True),
    ],
)  # fmt: skip
def test_what_is_taken_for_a_video(text: str, video: bool) -> None:
    assert is_video(parse_source(text)) == video


def test_a_password_is_not_printed() -> None:
    source = parse_source("rtsp://user:secret@host/x")
    assert str(source) == "rtsp://host/x" and source.name == "stream"
    assert parse_source("0") == Live("/dev/video0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["clip.mp4", "other.mp4"], "expected one video"),
        (["clip.mp4", "--resume"], "--resume: not for a video"),
        (["clip.mp4", "--image_format", "png"], "--image_format: not for a video"),
        (["clip.mp4", "--benchmark"], "--benchmark"),
        (["photos", "--every", "2"], "--every needs a video; photos is not one"),
        (["clip.mp4", "--every", "0"], "expected a whole number of at least 1"),
        (["clip.mp4", "--no_images", "--output", "out.mp4"], "--no_images: writes no annotated video, and --output names one, out.mp4"),
        (["clip.mp4", "--output", "out.avi"], "expected a folder, or a video with the suffix .mp4, .mov, .mkv or .webm, found out.avi"),
        (["clip.mp4", "--no_images", "--output", "out.ts"], "not written as .ts"),
    ],
)  # fmt: skip
def test_usage(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        infer.main(["--model", "m.onnx", "--output", "out", "--input", *options])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_video_that_is_read_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="is the video that is read"):
        plan_targets(tmp_path, tmp_path / "clip.mp4", pictures=True)
    assert plan_targets(tmp_path, tmp_path / "clip.mp4", pictures=False).video is None


def test_a_folder_may_have_the_name_of_a_video(tmp_path: Path) -> None:
    folder = tmp_path / "found.avi"
    folder.mkdir()
    targets = plan_targets(folder, Path("clip.mp4"), pictures=True)
    assert (targets.video, targets.labels) == (folder / "clip.mp4", folder)
    with pytest.raises(ValueError, match=r"\.mp4, \.mov, \.mkv or \.webm"):
        plan_targets(tmp_path / "other.avi", Path("clip.mp4"), pictures=True)
    with pytest.raises(ValueError, match="--no_images"):
        plan_targets(tmp_path / "other.mp4", Path("clip.mp4"), pictures=False)


# ---- cameras and streams, by a fake source


@dataclass
class FakeFrame:
    """What PyAV gives for a frame."""

    time: float
    number: int
    rotation: int = 0

    def to_ndarray(self, format: str) -> Any:
        return np.zeros((32, 32, 3), np.uint8)


class FakeCamera:
    """Opens as a stream of some frames, which then breaks; `breaks` says how many frames each
    time, None: it cannot be opened. With a duration it ends instead.
    """

    def __init__(self, breaks: list[int | None], pause: float = 0.0, duration: float | None = None) -> None:  # fmt: skip
        self.breaks, self.pause, self.duration = list(breaks), pause, duration
        self.opened = 0

    def __call__(self, video: Any) -> Any:
        count = self.breaks[self.opened] if self.opened < len(self.breaks) else None
        self.opened += 1
        if count is None:
            raise BrokenVideo("no route to host")

        def frames() -> Iterator[FakeFrame]:
            for number in range(count):
                time.sleep(self.pause)
                yield FakeFrame(number / RATE, number)
            if self.duration is None:
                raise BrokenVideo("the connection was reset")

        return Info(None, Fraction(RATE), False, self.duration), frames()


@pytest.mark.parametrize(
    ("breaks", "numbers", "opened", "slept"),
    [
        ([3], 3, 4, [1, 2, 4]),  # is given up after three attempts
        ([3, 4], 7, 4, [1, 2, 4]),  # goes on after a break
        ([3, 101], 104, 5, [1, 1, 2, 4]),  # ten seconds of frames: three attempts again
        ([3, 100], 103, 4, [1, 2, 4]),  # less
        ([2, None, 2], 4, 4, [1, 2, 4]),
        ([2, None, 101, None, 2], 105, 6, [1, 2, 1, 2, 4]),
        ([1] * 50, 4, 4, [1, 2, 4]),  # one frame each time does not go on for ever
    ],
)
def test_a_stream_that_breaks_is_opened_again(breaks: list[int | None], numbers: int, opened: int, slept: list[float]) -> None:  # fmt: skip
    camera, pauses = FakeCamera(breaks), []
    source = Source(Live("rtsp://x"), open_video=camera, sleep=pauses.append)
    found = list(source)
    assert [frame.number for frame in found] == list(range(numbers))
    times = [frame.seconds for frame in found]
    assert times == sorted(times)
    assert (camera.opened, pauses) == (opened, slept)
    assert source.ended == f"the connection was reset; it ends after {numbers} frames"


def test_an_address_with_a_duration_is_a_file() -> None:
    """It is read to its end once, and a slow consumer gets every frame."""
    camera = FakeCamera([60, 60], duration=6.0)
    source = Source(Live("https://host/clip.mp4"), open_video=camera, sleep=lambda s: None)
    assert not source.is_live
    with FrameBatcher(source, Preprocessing((32, 32)), 2) as batcher:
        seen = []
        for batch in batcher:
            time.sleep(0.005)
            seen += [int(path.name) for path in batch.paths]
    assert (seen, batcher.dropped) == (list(range(60)), 0)
    assert (camera.opened, source.ended) == (1, "")
    assert Source(Live("rtsp://x"), open_video=FakeCamera([1])).is_live


def test_a_video_of_a_web_server_ends(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mkv", pictures())

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            source = Source(Live(f"http://127.0.0.1:{server.server_port}/clip.mkv"), sleep=lambda s: None)  # fmt: skip
            frames = list(islice(source, 30))
        finally:
            server.shutdown()
    assert source.info.duration == pytest.approx(12 / RATE, abs=0.01)
    assert [frame.number for frame in frames] == list(range(12)) and source.ended == ""
    np.testing.assert_array_equal(frames[7].pixels, pictures()[7])


def test_a_stream_that_cannot_be_opened_is_an_error(tiny_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(BrokenVideo, match="no route"):
        run_video(tiny_onnx, Live("rtsp://x"), tmp_path / "out", RunOptions(), VideoOptions(), Drawing(), open_video=FakeCamera([None]))  # fmt: skip


def test_a_slow_model_drops_frames_and_does_not_lag(tmp_path: Path) -> None:
    """300 frames in no time, and a consumer that takes its time: it sees the newest, and knows
    how many it missed.
    """
    source = Source(Live("rtsp://x"), open_video=FakeCamera([300]), sleep=lambda s: None)
    with FrameBatcher(source, Preprocessing((32, 32)), 2) as batcher:
        seen: list[int] = []
        for batch in batcher:
            if not seen:
                time.sleep(0.5)  # all the others come meanwhile
            seen += [int(path.name) for path in batch.paths]
    assert seen == sorted(seen) and seen[-1] == 299
    assert len(seen) + batcher.dropped == 300 and batcher.dropped > 250


def test_a_file_waits_for_a_slow_model(tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mkv", pictures() * 4)
    with FrameBatcher(Source(clip), Preprocessing((32, 32)), 3) as batcher:
        seen = []
        for batch in batcher:
            time.sleep(0.01)
            seen += [int(path.name) for path in batch.paths]
    assert seen == list(range(48)) and batcher.dropped == 0


@pytest.mark.parametrize(
    ("part", "size", "sizes"),
    [
        (VideoOptions(), 5, [5, 5, 2]),
        (VideoOptions(duration=0.3), 3, [3]),  # no larger than the video is long
    ],
)
def test_every_batch_has_one_size_where_another_takes_long(
    part: VideoOptions, size: int, sizes: list[int], tiny_onnx: Path, tmp_path: Path
) -> None:
    clip = write_video(tmp_path / "clip.mp4", pictures())
    source, options = Source(clip, part), RunOptions(provider="cpu", batch_size=5)
    with open_model(tiny_onnx, options) as runtime:
        runtime.one_size = True
        with open_batcher(runtime, source, options) as batcher:
            batches = list(batcher)
    assert [len(batch.images) for batch in batches] == [size] * len(sizes)
    assert [len(batch) for batch in batches] == sizes
    assert not batches[-1].images[sizes[-1] :].any()


def test_leaving_early_ends_the_threads(tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mkv", pictures() * 4)
    with FrameBatcher(Source(clip), Preprocessing((32, 32)), 2) as batcher:
        batches = iter(batcher)
        next(batches)
        batches.close()  # type: ignore[attr-defined]
    assert [t.name for t in threading.enumerate() if t.name.startswith("video")] == []


def test_a_live_run_has_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = toy_detector.save(tmp_path / "toy.onnx")
    camera = FakeCamera([30], pause=0.01)
    part = VideoOptions(duration=1.0)
    assert run_video(model, Live("/dev/video0"), tmp_path / "out", RunOptions(provider="cpu"), part, Drawing(), open_video=camera)  # fmt: skip
    with av.open(str(tmp_path / "out" / "camera.mp4")) as container:
        assert 1 <= len(list(container.decode(video=0))) <= 10  # those of a second
    assert (tmp_path / "out" / "camera.tsv").is_file()
