# SPDX-License-Identifier: Apache-2.0
"""tune_precision.py: that it finds a convolution which INT8 destroys, and what it asks for on
the way.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
from conftest import EXAMPLES
from onnx import helper, numpy_helper
from PIL import Image

from trtdet.commands import build_engine, cli, tune_precision
from trtdet.geometry import rotated_corners
from trtdet.images.batcher import ImageBatcher
from trtdet.precision import prepare
from trtdet.precision.body import Body, ConvLayer
from trtdet.precision.objective import Damage
from trtdet.precision.options import Int8Options
from trtdet.precision.sensitivity import Journal, LayerNoise, patterns, smallest_set
from trtdet.run import tune as run_tune
from trtdet.run.detect import detect
from trtdet.run.options import METRICS
from trtdet.run.tune import View
from trtdet.spec import ModelSpec, Nms, Preprocessing

ARGUMENTS = ("--calib_input", EXAMPLES / "images", "--input", EXAMPLES / "images", "--annotations", EXAMPLES / "annotations.json")  # fmt: skip
FAST = ("--threads", 1, "--views", 1, "--noise_images", 1)
PLANTED = "planted/merge"


def tune(model: Path, output: Path, *options: object) -> int:
    arguments = ["--onnx", model, *ARGUMENTS, "--output", output, *FAST, *options]
    return tune_precision.main([str(a) for a in arguments])


def plant(model: onnx.ModelProto, tensor: str) -> None:
    """Two convolutions behind `tensor` that change nothing in floating point, the second beyond
    INT8.

    x  ->  [x, x, x]  ->  2^14 x - 2^14 x + x

    Beside 2^14, of 127 levels, 1 is nothing; and a factor that makes its weight larger makes its
    activation as much smaller. FP16 is exact: both products differ from x in their exponents alone.
    """
    weights = {w.name: list(w.dims) for w in model.graph.initializer}
    maker = next(node for node in model.graph.node if tensor in node.output)
    channels = next(weights[node.input[1]][1] for node in model.graph.node if tensor in node.input and node.op_type == "Conv")  # fmt: skip
    one = np.eye(channels, dtype=np.float32)[:, :, None, None]
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.concatenate([one] * 3), "planted/spread/weight"),
            numpy_helper.from_array(
                np.concatenate([2**14 * one, -(2**14) * one, one], 1), f"{PLANTED}/weight"
            ),
        ]
    )
    nodes = list(model.graph.node)
    for node in nodes:
        for i, name in enumerate(node.input):
            if name == tensor:
                node.input[i] = PLANTED
    place = nodes.index(maker) + 1
    nodes[place:place] = [
        helper.make_node("Conv", [tensor, "planted/spread/weight"], ["planted/spread"], "planted/spread"),
        helper.make_node("Conv", ["planted/spread", f"{PLANTED}/weight"], [PLANTED], PLANTED),
    ]  # fmt: skip
    del model.graph.node[:]
    model.graph.node.extend(nodes)


@pytest.fixture(scope="module")
def planted(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with planted.onnx, the small detector with the two convolutions in front of
    blocks_1, and what tuning it wrote.
    """
    folder = tmp_path_factory.mktemp("planted")
    model = onnx.load(tiny_onnx)
    first = next(
        layer
        for layer in Body(model, ModelSpec.from_onnx(model)).layers
        if layer.block == "blocks_1"
    )
    plant(model, first.input)
    onnx.save(model, folder / "planted.onnx")
    options = ["--calib_cache", folder / "planted.cache", "--max_ap_drop", 0.02]
    options += ["--table", folder / "table.tsv", "--plot", folder / "plot.png"]
    assert tune(folder / "planted.onnx", folder / "precision.json", *options) == 0
    return folder


# --- the whole ------------------------------------------------------------------------------------


def test_names_exactly_the_planted_convolution(planted: Path) -> None:
    found = json.loads((planted / "precision.json").read_text())
    assert found["keep"] == {PLANTED: "fp16"}
    assert (found["schema"], found["precision"]) == (1, "int8")
    assert "on 12 images, 89.6% of the multiply-accumulates in INT8, calibration by mse" in found["note"]  # fmt: skip
    header, first, second, *rest = [line.split("\t") for line in (planted / "table.tsv").read_text().splitlines()]  # fmt: skip
    assert header[-4:] == ["error_percent", "box_loss", "score_loss", "precision"]
    assert (first[0], first[-1]) == (PLANTED, "fp16")
    assert float(first[4]) > 99  # % of the error
    assert second[-1] == "int8"
    assert len(rest) == 121
    assert (planted / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_build_engine_reads_what_was_found(planted: Path, tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    arguments = ["--onnx", planted / "planted.onnx", "--precision", "int8", "--save_onnx", path]
    arguments += ["--calib_cache", planted / "planted.cache"]
    arguments += ["--precision_json", planted / "precision.json"]
    assert build_engine.main([str(a) for a in arguments]) == 0
    model = onnx.load(path)
    weights = {w.name: w.data_type for w in model.graph.initializer}
    types = {node.name: weights.get(node.input[1]) for node in model.graph.node if node.op_type == "Conv"}  # fmt: skip
    assert types[PLANTED] == onnx.TensorProto.FLOAT16
    assert types["planted/spread"] is None  # behind a DequantizeLinear


def test_goes_on_where_it_stopped(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    """A whole journal: nothing is measured again.

    One that ends within a line: that line is. Another model's: everything.
    """
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(cli, "setup_logging", lambda *_: None)  # it would take caplog's place
    lines = (planted / "precision.json.journal").read_text().splitlines()
    kinds = Counter(json.loads(line)["kind"].partition(",")[0].partition(" ")[0] for line in lines)
    # All in INT8, what build_engine.py leaves out, half of that, ..., the planted one; every
    # convolution alone.
    assert kinds["float32"] == 1 and kinds["alone"] == 123 and 3 <= kinds["int8"] <= 10
    measured: list[Collection[str] | None] = []
    evaluate = run_tune.Tuner._evaluate

    def counted(self: run_tune.Tuner, kept: Collection[str] | None) -> dict[str, float]:
        measured.append(kept)
        return evaluate(self, kept)

    monkeypatch.setattr(run_tune.Tuner, "_evaluate", counted)
    output = tmp_path / "precision.json"
    options = ["--calib_cache", planted / "planted.cache", "--max_ap_drop", 0.02]
    journal = tmp_path / "precision.json.journal"
    journal.write_text("\n".join(lines) + "\n")
    assert tune(planted / "planted.onnx", output, *options) == 0
    assert measured == []
    assert output.read_bytes() == (planted / "precision.json").read_bytes()

    journal.write_text("\n".join(lines)[:-20])
    assert tune(planted / "planted.onnx", output, *options) == 0
    assert measured == [[PLANTED]]
    assert "left out a line that is not whole" in caplog.text
    assert journal.read_text().splitlines()[-1] == lines[-1]

    other = [line.replace('"key": "', '"key": "0') for line in lines]
    journal.write_text("\n".join(other) + "\n")
    assert tune(planted / "planted.onnx", output, *options, "--noise_images", 2, "--max_ap_drop", 1) == 0  # fmt: skip
    assert measured == [[PLANTED], None, ()]
    assert json.loads(output.read_text())["keep"] == {}


def test_no_set_is_good_enough(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    def worse(self: run_tune.Tuner, kept: Collection[str] | None) -> dict[str, float]:
        return {f"{name}/0": 0.5 if kept is None else 0.4 for name in METRICS}

    monkeypatch.setattr(run_tune.Tuner, "_evaluate", worse)
    monkeypatch.setattr(run_tune.Tuner, "noises", lambda self: [LayerNoise(layer, Damage(1.0, 1e-4, 1e-4), 1 / 123) for layer in self.layers])  # fmt: skip
    output = tmp_path / "precision.json"
    options = ["--calib_cache", planted / "planted.cache", "--table", tmp_path / "table.tsv"]
    assert tune(planted / "planted.onnx", output, *options, "--max_ap_drop", 0.05) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --max_ap_drop 0.05: AP falls further below float32's 0.5000 even with all but the least noisy of 123 ")  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["precision.json.journal"]


def test_annotations_without_objects_are_refused(tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """AP is -1 without: every set would be as good as any other."""
    monkeypatch.setattr(prepare, "scales_of", None)  # not called
    data = json.loads((EXAMPLES / "annotations.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps({**data, "annotations": []}))
    output = tmp_path / "new" / "precision.json"
    assert tune(tiny_onnx, output, "--annotations", tmp_path / "a.json") == 1
    assert "has none in the 12 images that are looked at, so there is no AP" in capsys.readouterr().err  # fmt: skip
    assert not output.parent.exists()


def test_calibration_options_are_those_of_build_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # fmt: skip
    """All reach the calibration; the folder of --output is there by then, and the journal can be
    written.
    """
    asked: list[Int8Options] = []
    output = tmp_path / "new" / "folder" / "precision.json"

    def stop(body: object, int8: Int8Options) -> None:
        assert output.parent.is_dir()
        asked.append(int8)
        raise ValueError("enough")

    monkeypatch.setattr(prepare, "scales_of", stop)
    monkeypatch.setattr(prepare, "load_model", lambda path: (None, ModelSpec("toy", Preprocessing((4, 4)), Nms(), (1, 2, 3))))  # fmt: skip
    (tmp_path / "a.onnx").write_bytes(b"not read")
    options = ["--calib_fraction", 0.5, "--calib_batch_size", 2, "--calib_batches", 3, "--provider", "cpu"]  # fmt: skip
    assert tune(tmp_path / "a.onnx", output, *options) == 1
    wanted = Int8Options(EXAMPLES / "images", num_images=6, fraction=0.5, batch_size=2, provider="cpu")  # fmt: skip
    assert asked == [wanted]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give images to calibrate on"),
        (("--calib_input", "x", "--plot", "a.tsv"), "--plot: expected a name that ends in .png"),
        (("--calib_input", "x", "--max_ap_drop", "5"), "expected a number from 0 to 1"),
    ],
)
def test_wrong_usage(options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    required = ["--onnx", "a.onnx", "--input", "b", "--annotations", "c.json", "--output", "d.json"]
    with pytest.raises(SystemExit) as stopped:
        tune_precision.main([*required, *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# --- the parts ------------------------------------------------------------------------------------


def layers(*macs: int) -> list[ConvLayer]:
    """Convolutions a, b, c, ..., noisiest first."""
    names = "abcdefghijklmnopqrst"[: len(macs)]
    return [
        ConvLayer(
            n,
            "",
            "",
            "",
            "",
            "block",
            m,
            depthwise=False,
            pooled=False,
            padded=False,
            constant=True,
        )
        for n, m in zip(names, macs, strict=True)
    ]


def needs(*wanted: str) -> tuple[Callable[[Collection[str]], bool], list[str]]:
    """A judge who is content when these are left out, and what it was asked about."""
    asked: list[str] = []

    def fits(kept: Collection[str]) -> bool:
        asked.append("".join(sorted(kept)))
        return set(wanted) <= set(kept)

    return fits, asked


@pytest.mark.parametrize(
    ("wanted", "most"),
    [
        ("a", 1),  # the noisiest, at the first attempt
        ("b", 4),
        ("af", 16),
        ("abcdefgh", 24),
        ("s", 25),  # a ranking that is wrong costs evaluations, not the result
    ],
)
def test_smallest_set(wanted: str, most: int) -> None:
    fits, asked = needs(*wanted)
    found = smallest_set(layers(*range(20, 0, -1)), fits)
    assert found is not None
    assert "".join(sorted(found)) == wanted
    assert len(asked) <= most
    assert len(asked) == len(set(asked)) or wanted != "a"


def test_smallest_set_begins_where_it_is_told() -> None:
    fits, asked = needs("a", "c")
    found = smallest_set(layers(*range(20, 0, -1)), fits, first=5)
    assert found is not None and sorted(found) == ["a", "c"]
    assert asked[:3] == ["abcde", "ab", "abc"]


def test_smallest_set_gives_back_the_most_macs_first() -> None:
    """Either of two will do: the one with fewer multiply-accumulates stays out."""
    found = smallest_set(layers(1, 50, 3, 2, 2), lambda kept: {"a", "b"} <= set(kept) or ({"a", "c"} <= set(kept) and len(kept) > 1))  # fmt: skip
    assert found == ["b", "a"]  # bisection stopped at two
    found = smallest_set(layers(50, 1, 1, 1, 1), lambda kept: len(kept) >= 2)
    assert found is not None
    assert sorted(found) == ["a", "b"]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_no_smallest_set(count: int) -> None:
    everything = "".join(layer.name for layer in layers(*[1] * count))
    fits, asked = needs(*everything)
    assert smallest_set(layers(*[1] * count), fits) is None
    assert everything not in asked  # nothing in INT8 is no answer


def test_views_are_undone() -> None:
    """A box found in a mirrored image stands where the object is; the dark view changes pixels
    alone.
    """
    spec = ModelSpec("toy", Preprocessing((4, 10)), Nms(), (1,))
    images = np.zeros((1, 4, 10, 3), np.float32)
    images[0, 1, 2:5] = 200  # x 2 to 5
    mirrored = View.number(1)
    shown = mirrored.show(images, spec.preprocessing)
    assert np.flatnonzero(shown[0, 1, :, 0]).tolist() == [5, 6, 7]
    assert shown.flags.c_contiguous
    found = np.array([[[1, 5, 2, 8]]], np.float32)  # y x y x
    assert mirrored.undo(found, spec).tolist() == [[[1, 2, 2, 5]]]
    xyxy = spec.replace(box_order="xyxy", boxes_normalized=True)
    found = np.array([[[0.5, 0.25, 0.75, 0.5]]], np.float32)
    assert mirrored.undo(found, xyxy).tolist() == [[[0.25, 0.25, 0.5, 0.5]]]
    dark = View.number(2)
    assert not dark.mirrored
    assert dark.show(images, spec.preprocessing).max() == pytest.approx(194)
    assert dark.undo(found, xyxy) is found
    channels_first = spec.replace(preprocessing=Preprocessing((4, 10), layout="NCHW")).preprocessing
    moved = mirrored.show(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), channels_first)
    assert np.flatnonzero(moved[0, 0, 1]).tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("order", "normalized", "inclusive", "edge"),
    [("xyxy", False, False, 64), ("yxyx", True, False, 64), ("xyxy", False, True, 63)],
)
def test_rotated_boxes_of_a_mirrored_image_are_mirrored_back(
    order: Literal["xyxy", "yxyx"], normalized: bool, inclusive: bool, edge: int, tmp_path: Path
) -> None:
    """Their corners are those of the polygon in the mirror, by way of a file that always finds the
    same two boxes. ODTK's corners are pixels, of which the last is 63.
    """
    boxes = np.array([[10, 20, 40, 30, -0.3], [5, 8, 25, 48, 1.2]], np.float32)
    written = boxes[:, [1, 0, 3, 2, 4]] if order == "yxyx" else boxes.copy()
    if normalized:
        written[:, :4] /= 64
    outputs = {
        "num_detections": np.array([[2]], np.int32),
        "detection_boxes": written[None],
        "detection_scores": np.array([[0.9, 0.8]], np.float32),
        "detection_classes": np.zeros((1, 2), np.int32),
    }
    graph = helper.make_graph(
        [helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value)) for name, value in outputs.items()],
        "standin",
        [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape) for name, value in outputs.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    spec = ModelSpec(
        "standin",
        Preprocessing((64, 64), layout="NCHW"),
        Nms(max_output_boxes=2),
        (1,),
        box_order=order,
        boxes_normalized=normalized,
        inclusive_corners=inclusive,
        selection="rotated_nms",
    )
    spec.attach(model)
    onnx.save(model, tmp_path / "standin.onnx")
    Image.new("RGB", (128, 64)).save(tmp_path / "image.png")
    with run_tune.ViewingRuntime(tmp_path / "standin.onnx", provider="cpu", threads=1) as runtime:
        found = []
        for number in (0, 1):
            runtime.view = View.number(number)
            with ImageBatcher([tmp_path / "image.png"], spec.preprocessing, 1) as batcher:
                found += [image.detections for image in detect(runtime, batcher)]
    corners = rotated_corners(boxes[:, :4], boxes[:, 4])
    np.testing.assert_allclose(found[0].corners, 2 * corners, rtol=1e-5)
    # Top left becomes top right: the corners of the mirror image go the other way round.
    mirrored = (corners * [-1, 1] + [edge, 0])[:, [3, 2, 1, 0]]
    np.testing.assert_allclose(found[1].corners, 2 * mirrored, rtol=1e-5)
    assert found[1].angles is not None
    np.testing.assert_allclose(found[1].angles, [0.3, -1.2], rtol=1e-6)


def test_boxes_are_mirrored_in_the_width_of_their_batch() -> None:
    """Where the size is dynamic, that is not the one in the file."""
    preprocessing = Preprocessing((4, 10), size_range=((2, 2), (20, 20)))
    spec = ModelSpec("toy", preprocessing, Nms(), (1,), box_order="xyxy")
    found = np.array([[[2, 1, 5, 3]]], np.float32)
    assert View.number(1).undo(found, spec, 16).tolist() == [[[11, 1, 14, 3]]]


def test_the_journal_knows_its_context(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    assert Journal(path, {"model": 1}).measure("ap", ["b", "a"], ["AP"], lambda: {"AP": 0.5}) == {
        "AP": 0.5
    }
    again = Journal(path, {"model": 1})
    assert again.measure("ap", ["a", "b"], ["AP"], dict) == {"AP": 0.5}  # in any order
    assert again.measure("ap", ["a"], ["AP"], lambda: {"AP": 0.6}) == {"AP": 0.6}
    assert Journal(path, {"model": 2}).measure("ap", ["a", "b"], ["AP"], lambda: {"AP": 0.7}) == {
        "AP": 0.7
    }
    assert len(path.read_text().splitlines()) == 3


def test_names_are_patterns_for_themselves_alone() -> None:
    (pattern,) = patterns(["net[1]/conv*"])
    assert fnmatchcase("net[1]/conv*", pattern)
    assert not fnmatchcase("net1/convolution", pattern)
