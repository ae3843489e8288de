# SPDX-License-Identifier: Apache-2.0
"""build_engine.py --dry_run: what it says is what a build does; it writes nothing and refuses
what a build refuses.
"""

from pathlib import Path

import onnx.parser
import pytest
from conftest import EXAMPLES

from trtdet.commands import build_engine
from trtdet.engine import dry_run
from trtdet.errors import EngineError
from trtdet.precision.options import Int8Options
from trtdet.precision.prepare import load_model, prepare

IMAGES = EXAMPLES / "images"


def say(tiny: Path, folder: Path, capsys: pytest.CaptureFixture[str], *options: object) -> tuple[int, str]:  # fmt: skip
    """The exit status, and what was printed."""
    arguments = ["--model", tiny, "--engine", folder / "x.engine", "--dry_run", *options]
    status = build_engine.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_peak_is_what_is_alive_at_once() -> None:
    """images 2x8, a 2x8, b 2x4 of a, c 2x8 of images and a: at c's node images, a, b and c live."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[N, 8] images) => (float[N, 4] b, float[N, 8] c) <int64[1] zero = {0}, int64[1] four = {4}, int64[1] one = {1}> {
          a = Relu(images)
          b = Slice(a, zero, four, one)
          c = Add(images, a)
        }
    """)
    assert dry_run.peak_values(model, 2, (8,)) == (16 + 16 + 8 + 16, 0)
    assert dry_run.peak_values(model, 20, (8,)) == (560, 0)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_counts_are_those_of_a_build(precision: str, tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    pytest.importorskip("tensorrt_rtx", reason="needs requirements-rtx.txt")
    built = prepare(*load_model(tiny_onnx), precision)  # type: ignore[arg-type]
    assert built.report is not None
    options = ["--precision", precision, "--flavor", "tensorrt_rtx", "--compute_capability", "8.9"]
    status, text = say(tiny_onnx, tmp_path, capsys, *options, "--batch_size", "1:4:8")
    assert status == 0 and built.report.lines()[0] in text
    assert "compute capability 8.9, strongly typed" in text
    assert "NHWC 128x128x3 float32; batches of 1 to 8, tuned for 4" in text
    assert "at a batch of 8" in text and str(tmp_path / "x.engine.json") in text
    assert list(tmp_path.iterdir()) == []


def test_int8_says_what_may_be_quantized(tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    cache = tmp_path / "q.cache"
    options = ["--precision", "int8", "--calib_input", IMAGES, "--calib_num_images", 5, "--calib_cache", cache]  # fmt: skip
    status, text = say(tiny_onnx, tmp_path, capsys, *options)
    assert status == 0
    share = Int8Options(images=IMAGES, num_images=2, share=1.0)
    built = prepare(*load_model(tiny_onnx), "int8", share)
    assert built.quantization is not None
    assert f"INT8: {built.quantization.mac_share:.1%} of the multiply-accumulates may be" in text
    assert all(line in text for line in built.quantization.lines()[1:])
    assert "keeps at least 80% (--int8_share)" in text
    assert f"5 of 12 images of {IMAGES} (seed 47)" in text
    assert f"the scales are written to {cache}" in text and not cache.exists()
    status, text = say(tiny_onnx, tmp_path, capsys, *options, "--int8_share", 1)
    assert status == 0 and "keeps at least" not in text


def test_without_tensorrt_the_rest_is_said(tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def none(name: str | None) -> None:
        raise EngineError("none is installed")

    monkeypatch.setattr(dry_run, "find_flavor", none)
    status, text = say(tiny_onnx, tmp_path, capsys)
    assert status == 0
    assert "TensorRT     not found, so its limits are not checked: none is installed" in text
    assert "FP16: 385 nodes" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "64,64"], "--size: "),
        (["--precision", "int8", "--calib_cache", "none.cache"], "expected images or an existing cache, found neither"),
        (["--keep_fp32", "nothing*"], "no node has such a name"),
        (["--engine", "file/x.engine"], "cannot be written"),
    ],
)  # fmt: skip
def test_what_a_build_refuses_is_refused(options: list[str], message: str, tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    status, text = say(tiny_onnx, tmp_path, capsys, *options)
    assert status == 1 and message in text, text
