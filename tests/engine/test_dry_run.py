# SPDX-License-Identifier: Apache-2.0
"""build_engine.py --dry_run: what it says is what a build does; it writes nothing and refuses
what a build refuses.
"""

import sys
from pathlib import Path

import onnx.parser
import pytest
import standin_tensorrt_builder as standin
import toy_network
from conftest import EXAMPLES
from fault_inputs import split_weights

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
        (["--timing_cache", "file/t.cache"], "cannot be written"),
        (["--timing_cache", "x.engine"], "x.engine: is an input, or written twice"),
        (["--save_onnx", "split.onnx.data"], "split.onnx.data: is an input, or written twice"),
        (["--fp16_check_input", "nowhere"], "--fp16_check_input: expected an image or a folder"),
        (["--precision", "int8", "--calib_input", str(IMAGES), "--calib_cache", "file/q.cache"], "cannot be written"),
        (["--precision", "int8", "--calib_input", str(IMAGES), "--calib_cache", "q", "--save_onnx", "q.json"], "q.json: is an input, or written twice"),
        (["--precision", "int8", "--calib_input", str(IMAGES), "--provider", "cuda"], "this ONNX Runtime has CPUExecutionProvider only"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dry", [True, False])
def test_what_a_build_refuses_is_refused(dry: bool, options: list[str], message: str, tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """In the same words, whatever TensorRT is here."""
    monkeypatch.setitem(sys.modules, "tensorrt", standin.make_module("10.13.3"))
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    split_weights(tiny_onnx, tmp_path / "split.onnx")
    arguments = ["--model", "split.onnx", "--engine", "x.engine", *options, *(["--dry_run"] if dry else [])]  # fmt: skip
    left = sorted(tmp_path.iterdir())
    assert build_engine.main(arguments) == 1
    text = capsys.readouterr().err
    if not dry and options[-1] == "none.cache":
        message = "expected images or an existing cache, found no cache at none.cache"
    assert message in text, text
    assert sorted(tmp_path.iterdir()) == left


def written(text: str) -> list[str]:
    """The row of what is written."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("writes"))
    rows = [lines[start].removeprefix("writes")]
    for line in lines[start + 1 :]:
        if not line.startswith(" "):
            break
        rows.append(line)
    return [row.strip() for row in rows]


def test_all_that_is_written_is_said(tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """It is what a build then leaves; an existing cache is added to, and one is not read where the
    model has Q/DQ of its own.
    """
    monkeypatch.setitem(sys.modules, "tensorrt", standin.make_module("10.13.3"))
    cache, saved = tmp_path / "q.cache", tmp_path / "q.onnx"
    options = ["--precision", "int8", "--calib_input", IMAGES, "--calib_num_images", 1, "--calib_cache", cache]  # fmt: skip
    options += ["--int8_share", 1, "--timing_cache", tmp_path / "t.cache", "--save_onnx", saved]
    status, text = say(tiny_onnx, tmp_path, capsys, *options)
    assert status == 0
    names = ["q.cache", "q.cache.json", "q.onnx", "t.cache", "x.engine", "x.engine.json"]
    assert sorted(written(text)) == [str(tmp_path / name) for name in names]
    arguments = ["--model", tiny_onnx, "--engine", tmp_path / "x.engine", *options]
    assert build_engine.main([str(a) for a in arguments]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    capsys.readouterr()
    _, text = say(tiny_onnx, tmp_path, capsys, *options, "--calib_cache_version", "8.6.1")
    assert written(text)[-2:] == [
        f"{cache}: its first line, for another TensorRT",
        f"{cache}.json: what it does not say yet, of rounding and of --int8_share",
    ]
    _, text = say(tiny_onnx, tmp_path, capsys, "--precision", "int8", "--calib_cache", cache)
    assert written(text) == [str(tmp_path / "x.engine"), str(tmp_path / "x.engine.json")]
    new = tmp_path / "new.cache"
    _, text = say(saved, tmp_path, capsys, "--precision", "int8", "--calib_input", IMAGES, "--calib_cache", new)  # fmt: skip
    assert written(text) == [str(tmp_path / "x.engine"), str(tmp_path / "x.engine.json")]


def test_without_an_engine_its_limits_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """What --save_onnx alone does for a model that no engine is built of."""
    source = toy_network.network()
    source.graph.node.add(op_type="NonZero", name="rows", input=["input"], output=["found"])
    path = tmp_path / "x.onnx"
    onnx.save(source, path)
    arguments = ["--model", str(path), "--save_onnx", str(tmp_path / "y.onnx"), "--precision", "fp32"]  # fmt: skip
    assert build_engine.main([*arguments, "--dry_run"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "TensorRT     none: the ONNX file alone is written"  # fmt: skip
    assert build_engine.main(arguments) == 0
    assert build_engine.main([*arguments, "--engine", str(tmp_path / "x.engine"), "--dry_run"]) == 1
    assert "as many rows as a picture has boxes" in capsys.readouterr().err
