# SPDX-License-Identifier: Apache-2.0
"""torchvision's detectors, exported with the whole model inside, against its own detections.

Slow: it makes the exports with the Python that TRTDET_LIBREYOLO_PYTHON names, whose environment has
torch and torchvision too (tests/tools/torchvision_exports.py).
"""

import json
from pathlib import Path

import onnx
import pytest
from export_tools import run_tool
from test_libreyolo import LEAST, share_found

from trtdet import about
from trtdet.commands import create_onnx
from trtdet.nms.static_rows import maybe_data_sized
from trtdet.spec import ModelSpec

#: MODEL:FORM, and the most detections of one picture.
ALL = {
    "ssd300_vgg16:any_size": 200,
    "ssdlite320_mobilenet_v3_large:any_size": 300,
    "ssdlite320_mobilenet_v3_large:fixed": 300,
    "retinanet_resnet50_fpn:any_size": 300,
    "retinanet_resnet50_fpn:batched": 300,
    "fcos_resnet50_fpn:any_size": 100,
    "fasterrcnn_mobilenet_v3_large_320_fpn:any_size": 100,
    "fasterrcnn_mobilenet_v3_large_320_fpn:batched": 100,
    "fasterrcnn_mobilenet_v3_large_320_fpn:fixed": 100,
    "fasterrcnn_resnet50_fpn_v2:any_size": 100,
    "maskrcnn_resnet50_fpn:any_size": 100,
    "keypointrcnn_resnet50_fpn:any_size": 100,
}


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ALL)
def test_every_model(wanted: str, tmp_path: Path) -> None:
    name, form = wanted.split(":")
    run_tool("torchvision_exports.py", tmp_path, name, "--form", form, "--seed", "3")
    folder, out = tmp_path / f"{name}_{form}", tmp_path / "out.onnx"
    asked = ["--source_onnx", str(folder / "model.onnx"), "--onnx", str(out)]
    fixed = form == "fixed"
    assert create_onnx.main([*asked, *(["--resize_mode", "stretch"] if fixed else [])]) == 0
    model = onnx.load(out)
    spec = ModelSpec.from_onnx(model)
    assert spec.nms.max_output_boxes == ALL[wanted]
    assert spec.preprocessing.own_size == (not fixed) == (maybe_data_sized(model) is not None)
    assert {f.name: f.value for f in spec.evidence}["family"] == "torchvision"
    photographs = {path.name: path for path in about.PHOTOGRAPHS}
    reference = json.loads((folder / "reference.json").read_text())
    assert share_found(out, reference, photographs, are_ids=True) >= LEAST
