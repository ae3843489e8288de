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
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest

from trtdet import about
from trtdet.commands import create_onnx
from trtdet.labels import COCO_80_IDS
from trtdet.run.detect import detect, open_batcher, open_model
from trtdet.run.options import RunOptions
from trtdet.spec import ModelSpec

DATA = Path(__file__).parents[1] / "data" / "libreyolo"
TOOL = Path(__file__).parents[1] / "tools" / "libreyolo_exports.py"
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
    "LibreEC:s:320",
    "LibreGTR:s:320",
    "LibreTinyFormer:s:320",
    "LibreLWDETR:t:320",
    "LibreDETR:r50:320",
    "LibreDeformableDETR:r50:320",
    "LibreDINODETR:r50:320",
)


def share_found(model: Path, reference: dict, photographs: dict[str, Path]) -> float:
    """The share of the reference's detections that the converted model finds; each of ours
    counts once.
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
            wanted = COCO_80_IDS[class_id] if spec.num_classes == 91 else class_id
            for i, (s, c, b) in enumerate(free):
                near = np.abs(b - np.clip(box, 0, limit)).max() <= 1
                if c == wanted and abs(s - score) <= 0.02 and near:
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


def test_small_exports_stay_small() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*.*")) < 5_000_000


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ALL)
def test_every_family(wanted: str, tmp_path: Path) -> None:
    python = os.environ.get("TRTDET_LIBREYOLO_PYTHON")
    if not python:
        pytest.skip("needs TRTDET_LIBREYOLO_PYTHON, the Python of an environment with libreyolo")
    photographs = {path.name: path for path in about.PHOTOGRAPHS}
    made = subprocess.run(
        [python, str(TOOL), str(tmp_path), wanted, "--photos", str(about.PHOTOGRAPH.parent), "--seed", "11"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout[-2000:]
    folder = tmp_path / "_".join(wanted.split(":")[:2])
    reference = json.loads((folder / "reference.json").read_text())
    suppresses = re.match("Libre(YOLO(?!9E2E)|PICODET|PPYOLOE|RTMDet|SSD|EfficientDet)", wanted)
    convert(
        folder / "model.onnx", tmp_path / "out.onnx", reference, suppresses=suppresses is not None
    )
    assert share_found(tmp_path / "out.onnx", reference, photographs) >= LEAST
