# SPDX-License-Identifier: Apache-2.0
"""LibreYOLO's exports, converted with no option, against the detections of LibreYOLO itself.

`tests/data/libreyolo` has small ones, made by tests/tools/libreyolo_exports.py on the package's
photographs:

    python tests/tools/libreyolo_exports.py tests/data/libreyolo --small --seed 5 --photos
        trtdet/data \\ LibrePICODET:s:256 LibreYOLOX:n:256 LibreYOLO9:t:256 LibreRTMDet:t:256
        LibreDFINE:n:320 LibreDEIMv2:atto:320

The slow test makes others, of every family, with the Python that TRTDET_LIBREYOLO_PYTHON names. Its
environment has torch and libreyolo 1.6.0, which brings another OpenCV: an environment of its own.
"""

import json
import lzma
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from export_tools import run_tool
from onnx import TensorProto, helper, numpy_helper

from trtdet import about
from trtdet.commands import create_onnx
from trtdet.conversion.verification import verification_image
from trtdet.labels import COCO_80_IDS
from trtdet.run.detect import detect, open_batcher, open_model
from trtdet.run.options import RunOptions
from trtdet.sources.base import run_onnx
from trtdet.spec import ModelSpec

DATA = Path(__file__).parents[1] / "data" / "libreyolo"
#: The least share of LibreYOLO's detections that are ours too: class, score to .02, box to 1 pixel.
LEAST = 0.98

SMALL = {
    "LibrePICODET_s": "nms",
    "LibreYOLOX_n": "nms",
    "LibreYOLO9_t": "nms",
    "LibreRTMDet_t": "nms",
    "LibreDFINE_n": "topk",
    "LibreDEIMv2_atto": "topk",
}
#: CLASS:SIZE:PIXELS of every family that is exported without further packages or weights from the
#: net. RT-DETRv2 has its own size: LibreYOLO's export of another fails, as the traced network takes
#: the positions of 640.
ALL = (
    "LibreYOLO9:t:288",
    "LibreYOLO9E2E:t:288",
    "LibreYOLO9P2:t:320",
    "LibreYOLO1:t:448",
    "LibreYOLO2:t:416",
    "LibreYOLO3:t:320",
    "LibreYOLO4:t:416",
    "LibreYOLO7:b:320",
    "LibreSSD:300:300",
    "LibreEfficientDet:d0:512",
    "LibreRetinaNet:r50:320",
    "LibreFCOS:r50:320",
    "LibreFasterRCNN:n:320",
    "LibreMaskRCNN:r50:320",
    "LibreCenterNet:resdcn18:512",
    "LibreYOLOX:t:288",
    "LibreYOLONAS:s:256",
    "LibrePICODET:m:320",
    "LibrePPYOLOE:s:288",
    "LibreRTMDet:t:288",
    "LibreRTDETRv2:r18:640",
    "LibreRTDETRv4:s:320",
    "LibreDFINE:n:320",
    "LibreDEIM:n:320",
    "LibreDEIMv2:atto:320",
    "LibreDEIMv2:s:320",
    "LibreEC:s:320",
    "LibreGTR:s:320",
    "LibreTinyFormer:s:320",
    "LibreLWDETR:t:320",
    "LibreDETR:r50:320",
    "LibreDeformableDETR:r50:320",
    "LibreDINODETR:r50:320",
    "LibreRFDETR:n:384",  # needs transformers
)


def share_found(
    model: Path, reference: dict, photographs: dict[str, Path], *, are_ids: bool = False
) -> float:
    """The share of the reference's detections that the converted model finds; each of ours
    counts once.

    Args:
        are_ids: its classes are category ids.
    """
    spec = ModelSpec.from_onnx(onnx.load(model))
    found = {}
    paths = [photographs[image["file"]] for image in reference["images"]]
    with (
        open_model(model, RunOptions()) as runtime,
        open_batcher(runtime, paths, RunOptions()) as batcher,
    ):
        for image in detect(runtime, batcher, score_threshold=0.0):
            d = image.detections
            found[image.path.name] = [*zip(d.scores, d.class_ids, d.boxes_xyxy, strict=True)]
    hits = total = 0
    for image in reference["images"]:
        free = list(found[image["file"]])
        limit = np.array([image["width"], image["height"]] * 2)
        rows = zip(image["scores"], image["classes"], image["boxes"], strict=True)
        for score, class_id, box in rows:
            total += 1
            # LibreYOLO counts COCO's 80 classes where the network has a column for each of its ids.
            wanted = COCO_80_IDS[class_id] if spec.num_classes == 91 and not are_ids else class_id
            for i, (s, c, b) in enumerate(free):
                near = np.abs(b - np.clip(box, 0, limit)).max() <= 1
                if (
                    (spec.category_ids[c] if are_ids else c) == wanted
                    and abs(s - score) <= 0.02
                    and near
                ):
                    hits += 1
                    del free[i]
                    break
    assert total >= 200
    return hits / total


def convert(source: Path, out: Path, reference: dict, *, suppresses: bool) -> None:
    """No option says anything of the model: thresholds are those that LibreYOLO was asked for."""
    asked = ["--source_onnx", str(source), "--onnx", str(out)]
    if suppresses:
        asked += ["--iou_threshold", str(reference["iou"])]
        asked += ["--score_threshold", str(reference["confidence"])]
    assert create_onnx.main(asked) == 0


@pytest.mark.parametrize("name", SMALL)
def test_small_exports(name: str, tmp_path: Path) -> None:
    folder = DATA / name
    source, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    source.write_bytes(lzma.decompress((folder / "model.onnx.xz").read_bytes()))
    reference = json.loads((folder / "reference.json").read_text())
    convert(source, out, reference, suppresses=SMALL[name] == "nms")
    spec = ModelSpec.from_onnx(onnx.load(out))
    assert spec.selection == SMALL[name] and spec.num_classes == 80
    origins = {fact.origin.split(":")[0] for fact in spec.evidence}
    assert not origins & {"given", "ASSUMED"}
    (selection,) = [fact.value for fact in spec.evidence if fact.name == "selection"]
    cut_off = name in ("LibreYOLOX_n", "LibreYOLO9_t", "LibreRTMDet_t")
    assert selection.endswith("to half a pixel of the input") == cut_off
    photographs = {path.name: path for path in about.PHOTOGRAPHS}
    assert share_found(out, reference, photographs) >= LEAST


def put_behind(model: onnx.ModelProto, form: str) -> None:
    """What LibreYOLO puts behind YOLOv9's rows [N, 84, A] with deepstream=True (a box, its best
    score and class) and with nms=True (rows that an NMS selects, which is left out here, beside
    the rows before it).
    """
    graph = model.graph
    (was,) = graph.output
    raw = was.name
    graph.initializer.append(numpy_helper.from_array(np.array([4, 80], np.int64), "parts"))
    make = helper.make_node
    nodes = [
        make("Transpose", [raw], ["in_rows"], perm=[0, 2, 1]),
        make("Split", ["in_rows", "parts"], ["of_boxes", "of_scores"], axis=2),
        make("ReduceMax", ["of_scores"], ["best_score"], axes=[2], keepdims=1),
        make("ArgMax", ["of_scores"], ["best_class"], axis=2, keepdims=1),
        make("Cast", ["best_class"], ["class_number"], to=TensorProto.FLOAT),
        make("Concat", ["of_boxes", "best_score", "class_number"], ["rows"], axis=2),
    ]
    graph.node.extend(nodes)
    del graph.output[:]
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", None, 6])
    graph.output.extend([rows] if form == "deepstream" else [rows, was])
    found = {p.key: p.value for p in model.metadata_props} | {form: "true"}
    helper.set_model_props(model, found)
    if form == "nms":
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = ["raw" if name == raw else name for name in names]
        graph.output[1].name = "raw"


@pytest.mark.parametrize("form", ["deepstream", "nms"])
def test_what_libreyolo_puts_behind_the_rows(form: str, tmp_path: Path) -> None:
    """Its own runs of such exports take every class of a box, and so does the converted model."""
    folder = DATA / "LibreYOLO9_t"
    model = onnx.load_from_string(lzma.decompress((folder / "model.onnx.xz").read_bytes()))
    put_behind(model, form)
    onnx.checker.check_model(model)
    source, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(model, source)
    reference = json.loads((folder / "reference.json").read_text())
    convert(source, out, reference, suppresses=True)
    photographs = {path.name: path for path in about.PHOTOGRAPHS}
    assert share_found(out, reference, photographs) >= LEAST


@pytest.mark.parametrize("name", ["LibreYOLOX_n", "LibreDFINE_n"])
def test_half_precision(name: str, tmp_path: Path) -> None:
    """An export with its weights, input and outputs in float16 finds what one in float32 with the
    same numbers finds.
    """
    packed = lzma.decompress((DATA / name / "model.onnx.xz").read_bytes())
    half, same = onnx.load_from_string(packed), onnx.load_from_string(packed)
    assert narrow(half) == narrow(same, np.float32) >= 100
    heads = []
    for number, model in enumerate((half, same)):
        source, out = tmp_path / f"{number}.onnx", tmp_path / f"{number}_out.onnx"
        onnx.save(model, source)
        assert create_onnx.main(["--source_onnx", str(source), "--onnx", str(out)]) == 0
        made = onnx.load(out)
        assert TensorProto.FLOAT16 not in {t.data_type for t in made.graph.initializer}
        spec = ModelSpec.from_onnx(made)
        image = verification_image(spec.preprocessing)[None].astype(spec.preprocessing.dtype)
        heads.append(run_onnx(made, ["raw_boxes", "class_logits"], {"input": image}))
    for ours, theirs in zip(*heads, strict=True):
        assert ours.dtype == np.float32 and np.abs(ours - theirs).max() <= 1e-3
        assert np.ptp(ours) > 0.5


def narrow(model: onnx.ModelProto, dtype: type[np.floating] = np.float16) -> int:
    """float16 in place of float32, as `model.half()` exports it; scales of Resize stay. With
    float32 for `dtype` the numbers of float16 alone. Returns the number of tensors that changed.
    """
    narrowed = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph, changed = model.graph, 0
    scales = {name for node in graph.node if node.op_type == "Resize" for name in node.input[1:]}
    tensors = [t for t in graph.initializer if t.name not in scales]
    for node in graph.node:
        if node.op_type == "Constant" and node.output[0] not in scales:
            tensors += [a.t for a in node.attribute if a.name == "value"]
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = narrowed
            if node.op_type == "ConstantOfShape":
                tensors.append(attribute.t)
    for tensor in tensors:
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor).astype(np.float16).astype(dtype)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
            changed += 1
    for info in (*graph.input, *graph.output, *graph.value_info):
        if info.type.tensor_type.elem_type == TensorProto.FLOAT:
            info.type.tensor_type.elem_type = narrowed
    return changed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_family": "faster_rcnn"}, "expected boxes [n, 4], scores [n] and labels [n] of LibreYOLO's Faster R-CNN, found output"),
        ({"model_family": "mask_rcnn", "task": "segment"}, "expected boxes [n, 4], scores [n] and labels [n] of LibreYOLO's Mask R-CNN, found output"),
        ({"task": "segment"}, "found a LibreYOLO model for the task 'segment'; export one for the task 'detect'"),
        ({"nms": "true"}, "one with its output 'raw'; export it with nms=False"),
        ({"model_family": "yolo99"}, "found 'yolo99'; to convert it all the same, add --family heads"),
    ],
)  # fmt: skip
def test_refused(
    changes: dict[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = lzma.decompress((DATA / "LibreYOLO9_t" / "model.onnx.xz").read_bytes())
    model = onnx.load_from_string(packed)
    helper.set_model_props(model, {p.key: p.value for p in model.metadata_props} | changes)
    source, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(model, source)
    assert create_onnx.main(["--source_onnx", str(source), "--onnx", str(out)]) == 1
    assert said in capsys.readouterr().err and not out.exists()


LETTERBOX = (
    "--resize_mode letterbox --placement top_left --pad_color 114 --rounding floor --clip_boxes"
)
#: What says of each what its metadata would.
SAID = {
    "LibrePICODET_s": "--preprocessor imagenet --resize_mode stretch --clip_boxes",
    "LibreYOLOX_n": f"--preprocessor raw --channel_order bgr {LETTERBOX} --antialias --nms_mode best_class",
    "LibreYOLO9_t": f"--preprocessor 0,0,0/255,255,255 {LETTERBOX}",
    "LibreRTMDet_t": f"--preprocessor 123.675,116.28,103.53/58.395,57.12,57.375 --channel_order bgr {LETTERBOX} --antialias",
    "LibreDFINE_n": "",
    "LibreDEIMv2_atto": "",
}


@pytest.mark.parametrize("name", SAID)
def test_without_metadata(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options say what its metadata would; a set prediction is told by its structure. Without
    them nothing is written.
    """
    folder = DATA / name
    model = onnx.load_from_string(lzma.decompress((folder / "model.onnx.xz").read_bytes()))
    del model.metadata_props[:]
    source, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(model, source)
    reference = json.loads((folder / "reference.json").read_text())
    asked = ["--source_onnx", str(source), "--onnx", str(out), *SAID[name].split()]
    if SMALL[name] == "nms":
        assert create_onnx.main(asked[:4]) == 1 and not out.exists()
        said = capsys.readouterr().err
        assert "--rounding floor, --longest_side, --antialias" in said and "--clip_boxes" in said
        asked += ["--iou_threshold", str(reference["iou"])]
        asked += ["--score_threshold", str(reference["confidence"])]
    assert create_onnx.main(asked) == 0
    photographs = {path.name: path for path in about.PHOTOGRAPHS}
    assert share_found(out, reference, photographs) >= LEAST
    facts = {fact.name: fact.value for fact in ModelSpec.from_onnx(onnx.load(out)).evidence}
    assert ("antialiased" in facts["resize"]) == ("--antialias" in asked or SMALL[name] == "topk")
    assert ("boxes clipped to the picture" in facts["selection"]) == ("--clip_boxes" in asked)


def test_objectness_is_found_without_metadata(tmp_path: Path) -> None:
    """YOLOX cuts its columns apart for the boxes, and puts them together again: 2, 2 and 81, of
    which the first is the objectness.
    """
    folder = DATA / "LibreYOLOX_n"
    model = onnx.load_from_string(lzma.decompress((folder / "model.onnx.xz").read_bytes()))
    del model.metadata_props[:]
    source, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(model, source)
    asked = ["--source_onnx", str(source), "--onnx", str(out), "--nms_mode", "best_class"]
    asked += ["--preprocessor", "raw", "--channel_order", "bgr", "--placement", "top_left"]
    asked += ["--resize_mode", "letterbox", "--pad_color", "114", "--iou_threshold", "0.6"]
    assert create_onnx.main(asked) == 0
    spec = ModelSpec.from_onnx(onnx.load(out))
    assert spec.num_classes == 80 and spec.category_ids[-1] == 90
    facts = {fact.name: fact.value for fact in spec.evidence}
    assert facts["scores"].startswith("column 4 objectness, 5..84 classes")


def test_small_exports_stay_small() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*.*")) < 5_000_000


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ALL)
def test_every_family(wanted: str, tmp_path: Path) -> None:
    run_tool("libreyolo_exports.py", tmp_path, wanted, "--seed", "11")
    photographs = {path.name: path for path in about.PHOTOGRAPHS}
    folder = tmp_path / "_".join(wanted.split(":")[:2])
    reference = json.loads((folder / "reference.json").read_text())
    suppresses = re.match(
        "Libre(YOLO(?!9E2E)|PICODET|PPYOLOE|RTMDet|SSD|EfficientDet|RetinaNet|FCOS)", wanted
    )
    convert(
        folder / "model.onnx", tmp_path / "out.onnx", reference, suppresses=suppresses is not None
    )
    assert share_found(tmp_path / "out.onnx", reference, photographs) >= LEAST
