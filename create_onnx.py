#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Convert a trained detector to an ONNX file that ends in EfficientNMS, ready for build_engine.py, trtexec or infer.py.

  create_onnx.py --saved_model efficientdet-d0 --onnx d0.onnx

Input size, normalisation, anchors, classes and NMS are read from the model; options override. The result is compared with the
source, on a photograph, before it is written: the exit status is 1 when it differs.
"""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

import trtdet
from trtdet import cli, files, graph, nms, nms_reference
from trtdet.errors import GraphError
from trtdet.families import FAMILIES
from trtdet.family import (
    ANCHORS,
    CLASS_LOGITS,
    RAW_BOXES,
    Reading,
    pick_family,
    read_converted,
)
from trtdet.labels import read_labels
from trtdet.source import OnnxSource, Source, run_onnx
from trtdet.spec import InputDtype, Layout, ModelSpec, Preprocessing

logger = logging.getLogger("create_onnx")

#: Largest absolute difference of raw boxes and class logits that passes, in float32 on a photograph.
HEAD_TOLERANCE = 5e-3
#: Where the model itself answers rounding with more than a tenth of that, this many times the answer passes,
ROUNDING_MARGIN = 10
#: as long as the answer is at most this part of the largest logit.
MAX_ROUNDING_SHARE = 1e-2
#: Pixels of the network input, for boxes up to its size.
DECODE_TOLERANCE = 0.05
#: A public-domain photograph (NASA, Eileen Collins) that the result is verified on.
VERIFY_IMAGE = trtdet.PHOTOGRAPH

#: ONNX's file format of 1.10 (2021), which TensorRT 8.6 reads.
IR_VERSION = 8

PREPROCESSORS = {  # mean, std: the choices of NVIDIA's sample, for models whose export lost theirs
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "scale_range": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
}


NmsForm = Literal["plugin", "onnx", "graph", "none", "legacy"]


@dataclass(frozen=True)
class Options:
    """What the command line asks for; None takes what the model has."""

    family: str = "auto"
    batch: int | None = None  # None: free
    size_hw: tuple[int, int] | None = None
    layout: Layout = "NHWC"
    input_dtype: InputDtype = "float32"
    preprocessor: str | None = None
    score_threshold: float | None = None
    iou_threshold: float | None = None
    max_detections: int | None = None
    nms_mode: str = "model"
    nms_form: NmsForm = "plugin"
    labels: tuple[str, ...] = ()
    opset: int | None = None  # None: 17, or the source's where that is ONNX
    raw_path: Path | None = None  # keep the unedited conversion here
    verify: bool = True
    settled: frozenset[str] = (
        frozenset()
    )  # options given on the command line: no need to warn of what they settle


@dataclass(frozen=True)
class Difference:
    """How far two tensors of the same shape are apart."""

    name: str
    maximum: float
    mean: float

    @classmethod
    def of(cls, name: str, expected: NDArray[Any], actual: NDArray[Any]) -> "Difference":
        gap = np.abs(expected.astype(np.float64) - actual)
        return cls(name, float(gap.max()), float(gap.mean()))


def open_source(path: Path, *, is_onnx: bool) -> Source:
    """A SavedModel directory or an ONNX file."""
    if is_onnx:
        return OnnxSource(path)
    from trtdet.saved_model import SavedModelSource

    return SavedModelSource(path)


def convert(source: Source, options: Options) -> tuple[onnx.ModelProto, Reading]:
    """The ONNX model with its spec attached, not yet verified, and what was found in the source.

    Raises:
        GraphError: the source is not what a family expects, or an option contradicts it.
    """
    if source.spec:
        reading = read_converted(source, source.spec)
    else:
        reading = pick_family(source, FAMILIES, options.family).read(source)
    spec = specify(reading, options)
    for note in reading.notes:
        if note.option not in options.settled:
            logger.warning(note.text)

    batch = options.batch or "N"
    height, width = spec.preprocessing.size_hw
    shape = (
        (None, height, width, 3) if reading.network_layout == "NHWC" else (None, 3, height, width)
    )
    raw = source.extract(
        {reading.network_input: shape},
        [reading.raw_boxes, reading.class_logits],
        opset=options.opset,
    )
    if options.raw_path:
        files.write_bytes(options.raw_path, raw.SerializeToString())

    body = gs.import_onnx(raw)
    graph.tidy(body)
    boxes, logits = body.outputs
    anchors = len(reading.anchors)
    for tensor, name, last in ((boxes, RAW_BOXES, 4), (logits, CLASS_LOGITS, spec.num_classes)):
        graph.set_static_batch_free(body, tensor, last)
        tensor.name, tensor.shape, tensor.dtype = name, [batch, anchors, last], np.dtype(np.float32)
    graph.free_batch(body, reading.batch)
    graph.set_input(body, spec.preprocessing, batch)
    model = gs.export_onnx(body)
    model.ir_version = min(model.ir_version, IR_VERSION)
    model.producer_name, model.producer_version = "trtdet", trtdet.__version__
    spec.attach(model)
    return end_in_nms(model, reading, spec, options), reading


def end_in_nms(
    model: onnx.ModelProto, reading: Reading, spec: ModelSpec, options: Options
) -> onnx.ModelProto:
    """Put the form of NMS that was asked for behind the heads."""
    insert = {"legacy": nms.insert_legacy, "none": nms.insert_decoded}.get(
        options.nms_form, nms.insert_plugin
    )
    insert(
        model,
        boxes=RAW_BOXES,
        scores=CLASS_LOGITS,
        anchors=reading.anchors,
        nms=spec.nms,
        batch=options.batch or "N",
    )
    if (
        options.nms_form == "onnx"
    ):  # no more candidates than TensorRT takes, whose INMSLayer this form is for
        return nms.lower(model, "onnx", candidates=nms.TENSORRT_TOPK)
    if options.nms_form == "graph":
        return nms.lower(model, "graph")
    return model


def specify(reading: Reading, options: Options) -> ModelSpec:
    """The spec of the result: the source's, with the options in place of what they override.

    Raises:
        GraphError: an option contradicts the model.
    """
    found = reading.spec
    size_hw = found.preprocessing.size_hw
    if options.size_hw and options.size_hw != size_hw:
        raise GraphError(
            f"--input_shape asks for {_hw(options.size_hw)} (height x width), the model was exported for {_hw(size_hw)}; leave the "
            "option out, or export the model again at the other size"
        )
    preprocessing = dataclasses.replace(
        found.preprocessing, layout=options.layout, dtype=options.input_dtype
    )
    if options.preprocessor:
        mean, std = PREPROCESSORS[options.preprocessor]
        preprocessing = dataclasses.replace(preprocessing, mean=mean, std=std, pad_rgb=mean)
    settings: dict[str, Any] = {
        "score_threshold": options.score_threshold,
        "iou_threshold": options.iou_threshold,
        "max_output_boxes": options.max_detections,
        "class_agnostic": None
        if options.nms_mode == "model"
        else options.nms_mode == "class_agnostic",
    }
    if options.nms_form == "legacy":
        settings["class_agnostic"] = False  # BatchedNMS has no other mode; insert_legacy warns
    given = {name: value for name, value in settings.items() if value is not None}
    if options.labels and len(options.labels) != found.num_classes:
        raise ValueError(
            f"--labels: expected {found.num_classes} lines, one per class of the model, found {len(options.labels)}"
        )
    return found.replace(
        preprocessing=preprocessing,
        nms=dataclasses.replace(found.nms, **given),
        labels=options.labels or found.labels,
    )


def verify(source: Source, reading: Reading, model: onnx.ModelProto) -> list[Difference]:
    """Compare the result with the source on a photograph: TensorFlow (or the source ONNX) against ONNX Runtime.

    Compared are raw boxes and class logits, and the decoding of boxes with the anchors in the file against the source's own. The
    source is fed the image, so its own normalisation is part of the comparison, unless --preprocessor replaced it. Images of
    a batch differ, so that rows cannot leak into one another.

    Raises:
        GraphError: the model is malformed, or something differs by more than its limit.
    """
    spec = ModelSpec.from_onnx(model)
    check(model)
    image = verification_image(spec.preprocessing)
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 2  # 0: free
    images = np.stack([image if row % 2 == 0 else image[:, ::-1] for row in range(batch)])
    by_image = [_source_heads(source, reading, spec.preprocessing, x)[0] for x in images[:2]]
    expected = [np.stack(values) for values in zip(*by_image, strict=True)]
    fed = _in_layout(images.astype(spec.preprocessing.dtype), spec.preprocessing.layout)
    names = (RAW_BOXES, CLASS_LOGITS)
    actual = run_onnx(model, names, {graph.INPUT: fed})
    differences = []
    limit = HEAD_TOLERANCE
    for name, want, got in zip(names, expected, actual, strict=True):
        if got.shape[1:] != want.shape[1:]:
            raise GraphError(
                f"'{name}': expected shape {want.shape[1:]} as in the source, the ONNX gives {got.shape[1:]}"
            )
        differences.append(Difference.of(name, want, got[: len(want)]))
    if not max(d.maximum for d in differences) <= limit:  # also where it is NaN
        limit = relaxed_limit(source, reading, spec.preprocessing, image)
    if reading.decoded_boxes:
        differences.append(compare_decoding(source, reading, model, image))
    for difference, allowed in zip(differences, (limit, limit, DECODE_TOLERANCE), strict=False):
        if not difference.maximum <= allowed:
            raise GraphError(
                f"verification failed: {difference.name} of the ONNX differ from {source.path} by up to {difference.maximum:.3g} "
                f"(mean {difference.mean:.3g}), expected at most {allowed:.3g}; no model was written. Please report it, or look "
                "at the model with --no_verify"
            )
    return differences


def compare_decoding(
    source: Source, reading: Reading, model: onnx.ModelProto, image: NDArray[np.uint8]
) -> Difference:
    """Boxes decoded from the source's own regression, with the anchors in the file, against what enters the source's NMS.

    In pixels of the network input; boxes larger than it count in proportion (float32 has 7 digits).
    """
    spec = ModelSpec.from_onnx(model)
    batch = _in_layout(np.repeat(image[None], reading.batch or 1, axis=0), reading.image_layout)
    fetches = [reading.raw_boxes, reading.decoded_boxes or ""]
    raw, decoded = source.run(fetches, {reading.image_input: batch})
    written = next((i for i in model.graph.initializer if i.name == ANCHORS), None)
    anchors = reading.anchors if written is None else onnx.numpy_helper.to_array(written)
    ours = nms_reference.decode_boxes(raw[:1], spec.nms.box_coding, anchors.reshape(1, -1, 4))[0]
    theirs = decoded.reshape(-1, 4)[: len(ours)]
    scale = np.maximum(1, np.abs(theirs) / max(spec.preprocessing.size_hw))
    return Difference.of("decoded boxes (pixels)", theirs / scale, ours / scale)


def relaxed_limit(
    source: Source, reading: Reading, preprocessing: Preprocessing, image: NDArray[np.uint8]
) -> float:
    """The limit for heads of a model that is itself less stable than HEAD_TOLERANCE; that limit for any other.

    Raises:
        GraphError: so unstable that nothing could be told.
    """
    floor, largest = rounding_floor(source, reading, preprocessing, image)
    if floor <= HEAD_TOLERANCE / ROUNDING_MARGIN:
        return HEAD_TOLERANCE
    if floor > MAX_ROUNDING_SHARE * largest:
        raise GraphError(
            f"verification failed: the model is numerically unstable; a change of its input in float32's last digit moves logits by "
            f"{floor:.3g} of {largest:.3g}. Are these trained weights? --no_verify writes the file all the same"
        )
    limit = ROUNDING_MARGIN * floor
    logger.warning(
        "a change of the input in float32's last digit moves this model's logits by %.3g, so no two frameworks agree on it to %g; "
        "the limit is raised to %.3g",
        floor, HEAD_TOLERANCE, limit,
    )  # fmt: skip
    return limit


def rounding_floor(
    source: Source, reading: Reading, preprocessing: Preprocessing, image: NDArray[np.uint8]
) -> tuple[float, float]:
    """How far the source's own logits move when the normalised pixels change by float32's resolution, about 1e-6; and the largest.

    A trained network damps rounding (EfficientDet-D0: 1e-5 in the logits); one with unsuitable weights amplifies it.
    """
    ((_, logits), pixels) = _source_heads(source, reading, preprocessing, image)
    noise = np.random.default_rng(0).normal(scale=1e-6, size=pixels.shape).astype(np.float32)
    (moved,) = source.run([reading.class_logits], {reading.network_input: pixels + noise})
    return float(np.abs(moved[0] - logits).max()), float(np.abs(logits).max())


def check(model: onnx.ModelProto) -> None:
    """onnx.checker with strict shape inference, the plugin (which it cannot know) replaced by operators that compute the same.

    Raises:
        GraphError: what the checker says.
    """
    lowered = nms.lower(model, form="onnx") if nms.has_plugin(model) else model
    try:
        onnx.checker.check_model(lowered, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(f"the converted model is not valid ONNX: {error}") from error


def verification_image(preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """The photograph at the size of the network input, uint8 [h,w,3] RGB."""
    from PIL import Image

    height, width = preprocessing.size_hw
    with Image.open(VERIFY_IMAGE) as photograph:
        return np.asarray(
            photograph.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        )


def _source_heads(
    source: Source, reading: Reading, preprocessing: Preprocessing, image: NDArray[np.uint8]
) -> tuple[list[NDArray[np.float32]], NDArray[np.float32]]:
    """([raw boxes, class logits] of one image by the source, the normalised pixels behind them as a batch of the source's size)."""
    batch = np.repeat(image[None], reading.batch or 1, axis=0)
    measured = reading.spec.preprocessing
    if (preprocessing.mean, preprocessing.std) == (measured.mean, measured.std):
        fed = _in_layout(batch, reading.image_layout)
        (pixels,) = source.run([reading.network_input], {reading.image_input: fed})
    else:  # --preprocessor: the source's own normalisation is not wanted
        mean, std = (np.array(x, np.float32) for x in (preprocessing.mean, preprocessing.std))
        pixels = _in_layout((batch - mean) / std, reading.network_layout)
    heads = source.run([reading.raw_boxes, reading.class_logits], {reading.network_input: pixels})
    return [value[0] for value in heads], pixels


def _in_layout(images: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """NHWC images in another layout."""
    return np.ascontiguousarray(images if layout == "NHWC" else images.transpose(0, 3, 1, 2))


def _hw(size_hw: tuple[int, int]) -> str:
    return f"{size_hw[0]}x{size_hw[1]}"


def run(source_path: Path, onnx_path: Path, options: Options, *, is_onnx: bool) -> None:
    """Convert, verify, write; on stdout the differences and the path of the file."""
    files.check_outputs([onnx_path, options.raw_path], [source_path] if is_onnx else [])
    with open_source(source_path, is_onnx=is_onnx) as source:
        logger.info("read %s", source_path)
        model, reading = convert(source, options)
        if options.verify:
            for difference in verify(source, reading, model):
                sys.stdout.write(
                    f"{difference.name}: max abs difference {difference.maximum:.3g}, mean {difference.mean:.3g}\n"
                )
        else:
            logger.warning("not verified (--no_verify)")
    spec = ModelSpec.from_onnx(model)
    spec.replace(source=provenance(source_path)).attach(model)
    files.write_bytes(onnx_path, model.SerializeToString())
    logger.info(
        "%s %s, batch %s, %d classes, %d anchors, mean %s, std %s",
        spec.family, _hw(spec.preprocessing.size_hw), options.batch or "free", spec.num_classes, len(reading.anchors),
        spec.preprocessing.mean, spec.preprocessing.std,
    )  # fmt: skip
    logger.info("NMS (%s): %s", options.nms_form, spec.nms)
    sys.stdout.write(f"{onnx_path}\n")


def provenance(source_path: Path) -> dict[str, str]:
    """Where a model came from: the name and the SHA-256 of its file, a SavedModel's variables included."""
    if source_path.is_dir():
        parts = [source_path / "saved_model.pb", *sorted(source_path.glob("variables/*"))]
    else:
        parts = [source_path]
    return {
        "name": source_path.resolve().name,
        "sha256": files.sha256(*parts),
        "trtdet": trtdet.__version__,
    }


def parse_input_shape(text: str) -> tuple[int | None, tuple[int, int], Layout]:
    """argparse type: '1,512,512,3', 'N,3,512,512', '-1,512,512,3' -> batch (None: free), (height, width), layout."""
    fields = [field.strip() for field in text.split(",")]
    free = fields[0] in ("N", "n", "-1", "")
    try:
        batch = None if free else int(fields[0])
        a, b, c = (int(field) for field in fields[1:])
    except ValueError:
        a = b = c = 0
        batch = None
    if (c == 3) == (a == 3) or min(a, b, c) < 1 or (batch is not None and batch < 1):
        raise argparse.ArgumentTypeError(
            f"expected N,HEIGHT,WIDTH,3 or N,3,HEIGHT,WIDTH, N a number or -1 for a free batch, got {text!r}"
        )
    return (batch, (a, b), "NHWC") if c == 3 else (batch, (b, c), "NCHW")


def parse_size(text: str) -> tuple[int, int]:
    """argparse type: 'H,W'."""
    try:
        height, width = (int(field) for field in text.split(","))
    except ValueError:
        height = width = 0
    if min(height, width) < 1:
        raise argparse.ArgumentTypeError(f"expected HEIGHT,WIDTH, got {text!r}")
    return height, width


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-m", "--saved_model", type=Path, metavar="DIR", help="SavedModel directory (or an ONNX file)")
    source.add_argument("--source_onnx", type=Path, metavar="FILE", help="ONNX file of the model: needs no TensorFlow")
    parser.add_argument("-o", "--onnx", type=Path, required=True, metavar="FILE", help="the ONNX file to write")
    parser.add_argument("--family", default="auto", choices=["auto", *(f.NAME for f in FAMILIES)], help="kind of detector (default: recognise it)")
    shape = parser.add_argument_group("input")
    shape.add_argument("--input_shape", type=parse_input_shape, metavar="N,H,W,3|N,3,H,W", help="batch, size and layout; N or -1: free batch (default: free batch, the model's size, NHWC)")
    shape.add_argument("-i", "--input_size", type=parse_size, metavar="H,W", help="the size alone; it can only confirm the model's")
    shape.add_argument("-f", "--input_format", choices=["NHWC", "NCHW"], help="the layout alone (default: NHWC)")
    shape.add_argument("--input_dtype", default="float32", choices=["float32", "uint8"], help="uint8 moves a quarter of the bytes (default: float32)")
    shape.add_argument("-p", "--preprocessor", choices=sorted(PREPROCESSORS), help="normalise like this, whatever the model says (default: as the model)")
    detections = parser.add_argument_group("detections")
    detections.add_argument("-t", "--score_threshold", "--nms_threshold", type=cli.unit_interval, metavar="X", help="lowest score to keep (default: the model's)")
    detections.add_argument("--iou_threshold", type=cli.positive_unit_interval, metavar="X", help="overlap from which NMS suppresses (default: the model's)")
    detections.add_argument("-d", "--max_detections", "--nms_detections", type=cli.positive_int, metavar="K", help="detections per image (default: the model's)")
    detections.add_argument("--nms_mode", default="model", choices=["model", "per_class", "class_agnostic"], help="which boxes compete (default: as the model)")
    detections.add_argument("--nms", default="plugin", choices=["plugin", "onnx", "graph", "none"], help="EfficientNMS_TRT, ONNX NonMaxSuppression, ordinary operators, or no NMS (default: plugin; later stages replace it where it is missing)")
    detections.add_argument("--legacy_plugins", action="store_true", help="BatchedNMS_TRT instead, for TensorRT before 8")
    detections.add_argument("--labels", type=Path, metavar="FILE", help="class names to store in the model, one a line")
    other = parser.add_argument_group("other")
    other.add_argument("--opset", type=int, choices=range(11, 19), metavar="11..18", help="ONNX opset (default: 17, or 11 with --legacy_plugins)")
    other.add_argument("--tf2onnx", type=Path, metavar="FILE", help="keep the raw conversion of the network here")
    other.add_argument("--no_verify", action="store_true", help="write without comparing with the source")
    other.add_argument("-v", "--verbose", action="store_true")
    # fmt: on
    args = parser.parse_args(_bind_input_shape(sys.argv[1:] if argv is None else argv))
    if args.input_shape and (args.input_size or args.input_format):
        parser.error(
            "--input_shape says size and layout; leave out --input_size and --input_format"
        )
    if args.legacy_plugins and args.nms != "plugin":
        parser.error(f"--legacy_plugins is a form of NMS of its own; leave out --nms {args.nms}")
    return args


def _bind_input_shape(argv: Sequence[str]) -> list[str]:
    """'--input_shape', '-1,512,512,3' as one word: argparse takes a value that starts with a dash for an option."""
    words = list(argv)
    for position, word in enumerate(words[:-1]):
        if word == "--input_shape":
            words[position : position + 2] = [f"{word}={words[position + 1]}"]
            break
    return words


def options_from(args: argparse.Namespace) -> Options:
    """The options of a parsed command line.

    Raises:
        ValueError, OSError: the label file cannot be read.
    """
    batch: int | None = None
    layout: Layout = args.input_format or "NHWC"
    size_hw: tuple[int, int] | None = args.input_size
    if args.input_shape:
        batch, size_hw, layout = args.input_shape
    return Options(
        family=args.family,
        batch=batch,
        size_hw=size_hw,
        layout=layout,
        input_dtype=args.input_dtype,
        preprocessor=args.preprocessor,
        score_threshold=args.score_threshold,
        iou_threshold=args.iou_threshold,
        max_detections=args.max_detections,
        nms_mode=args.nms_mode,
        nms_form="legacy" if args.legacy_plugins else args.nms,
        labels=tuple(read_labels(args.labels)) if args.labels else (),
        opset=args.opset or (11 if args.legacy_plugins else None),
        raw_path=args.tf2onnx,
        verify=not args.no_verify,
        settled=frozenset(
            name
            for name in ("score_threshold", "iou_threshold", "nms_mode", "preprocessor")
            if getattr(args, name) not in (None, "model")
        ),
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    cli.setup_logging(args.verbose)
    source = args.saved_model or args.source_onnx
    is_onnx = source is args.source_onnx or source.suffix.lower() == ".onnx"
    return cli.run_main(lambda: run(source, args.onnx, options_from(args), is_onnx=is_onnx))


if __name__ == "__main__":
    raise SystemExit(main())
