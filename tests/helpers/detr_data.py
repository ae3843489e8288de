# SPDX-License-Identifier: Apache-2.0
"""Tiny DETRs as torch exported them, and what transformers makes of three pictures;
tests/data/make_detr.py made both.
"""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from trtdet.detections import Detections, decode
from trtdet.geometry import ResizeTransform
from trtdet.spec import ModelSpec

DATA = Path(__file__).resolve().parents[1] / "data"
HEIGHT, WIDTH = 64, 96


@dataclass(frozen=True)
class Expected:
    """Detections of one picture by transformers: boxes xyxy in source pixels, not clipped, in
    its own order.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Pictures:
    """Three pictures at the network's size; `extents_wh`: what of each is picture when
    letterboxed; `source_wh`: of the file.
    """

    images: NDArray[np.uint8]
    extents_wh: NDArray[np.int64]
    source_wh: NDArray[np.int64]
    letterbox: list[Expected]
    stretch: list[Expected]

    def fed(self, spec: ModelSpec) -> tuple[NDArray[np.float32], list[ResizeTransform]]:
        """What the host feeds the converted model, and the way back."""
        batch = self.images.astype(np.float32)
        used = np.tile([WIDTH, HEIGHT], (len(batch), 1))
        if spec.preprocessing.resize == "letterbox":
            used = self.extents_wh
            for image, (w, h) in zip(batch, used, strict=True):
                image[h:] = image[:, w:] = spec.preprocessing.pad_rgb
        transforms = [
            ResizeTransform((int(w), int(h)), (float(u / w), float(v / h)))
            for (u, v), (w, h) in zip(used, self.source_wh, strict=True)
        ]
        if spec.preprocessing.dtype == "uint8":
            batch = np.rint(batch).astype(np.uint8)
        return batch, transforms


def load(name: str) -> tuple[onnx.ModelProto, Pictures]:
    """The model of `name`.onnx.txt with the weights of `name`.npz, and its pictures."""
    path = DATA / f"{name}.onnx.txt"
    text = (
        path.read_text()
        if path.exists()
        else gzip.decompress((DATA / f"{name}.onnx.txt.gz").read_bytes()).decode()
    )
    model = parser.parse_model(text)
    values = np.load(DATA / f"{name}.npz")
    weights = {
        k.removeprefix("weight/"): values[k] for k in values.files if k.startswith("weight/")
    }
    inputs = [info for info in model.graph.input if info.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(
        numpy_helper.from_array(value.astype(np.float32), key) for key, value in weights.items()
    )
    results = {
        mode: [
            Expected(*row)
            for row in zip(
                *(values[f"{mode}_{part}"] for part in ("boxes", "scores", "labels")), strict=True
            )
        ]
        for mode in ("letterbox", "stretch")
    }
    return model, Pictures(values["images"], values["extents_wh"], values["source_wh"], **results)


def detect(
    model: onnx.ModelProto, pictures: Pictures, rows: slice = slice(None)
) -> list[Detections]:
    """The converted model's detections, by ONNX Runtime."""
    import onnxruntime

    from trtdet.nms import lowering

    spec = ModelSpec.from_onnx(model)
    lowered = lowering.lower(model, "onnx") if lowering.has_plugin(model) else model
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        lowered.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    batch, transforms = pictures.fed(spec)
    names = [output.name for output in session.get_outputs()]
    values = session.run(None, {"input": batch[rows]})
    return decode(dict(zip(names, values, strict=True)), spec, transforms[rows])


def assert_detections(
    found: list[Detections], expected: list[Expected], pictures: Pictures
) -> None:
    """Each of transformers' detections is there, clipped to its picture: class, score to 1e-3,
    box to 0.1 pixel; and no other.
    """
    assert len(found) == len(expected)
    for one, theirs, (w, h) in zip(found, expected, pictures.source_wh, strict=True):
        assert len(one) == len(theirs.scores)
        order = np.argsort(-theirs.scores, kind="stable")
        np.testing.assert_allclose(one.scores, theirs.scores[order], atol=1e-5)
        boxes = np.clip(theirs.boxes, 0, [w, h, w, h])
        free = list(range(len(one)))
        for box, score, label in zip(boxes, theirs.scores, theirs.labels, strict=True):
            same = [
                i
                for i in free
                if one.class_ids[i] == label
                and abs(one.scores[i] - score) < 1e-3
                and np.abs(one.boxes_xyxy[i] - box).max() < 0.1
            ]
            assert same, f"{label} {score} {box} not found"
            free.remove(same[0])
