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

import trtdet
from trtdet import cli, files, graph, nms
from trtdet.errors import GraphError
from trtdet.families import FAMILIES
from trtdet.family import (
    CLASS_LOGITS,
    NO_HINTS,
    PREPROCESSORS,
    RAW_BOXES,
    Hints,
    Reading,
    pick_family,
    read_converted,
)
from trtdet.labels import read_labels
from trtdet.map_op import OpMapping, map_ops
from trtdet.onnx_builder import Builder
from trtdet.rotated_nms import insert_rotated_nms
from trtdet.source import OnnxSource, Source
from trtdet.spec import InputDtype, Layout, ModelSpec
from trtdet.topk import insert_topk
from trtdet.verification import verify

logger = logging.getLogger("create_onnx")

#: Pixels: where the range of an input of free size ends.
MAX_SIDE = 8192
#: ONNX's file format of 1.10 (2021), which TensorRT 8.6 reads.
IR_VERSION = 8

NmsForm = Literal["plugin", "onnx", "graph", "none", "legacy"]


@dataclass(frozen=True)
class Options:
    """What the command line asks for; None takes what the model has."""

    family: str = "auto"
    batch: int | None = None  # None: free
    size_hw: tuple[int, int] | None = None
    free_size: bool = False
    layout: Layout = "NHWC"
    input_dtype: InputDtype | None = None
    preprocessor: str | None = None
    score_threshold: float | None = None
    iou_threshold: float | None = None
    max_detections: int | None = None
    nms_mode: str = "model"
    nms_form: NmsForm = "plugin"
    hints: Hints = NO_HINTS
    labels: tuple[str, ...] = ()
    opset: int | None = None  # None: 17, or the source's where that is ONNX
    raw_path: Path | None = None  # keep the unedited conversion here
    map_ops: tuple[OpMapping, ...] = ()
    verify: bool = True
    settled: frozenset[str] = (
        frozenset()
    )  # options given on the command line: no need to warn of what they settle


def open_source(path: Path, *, is_onnx: bool, mappings: Sequence[OpMapping] = ()) -> Source:
    """A SavedModel directory or an ONNX file, in the latter custom operators replaced by plugins."""
    if is_onnx:
        return OnnxSource(path, lambda model: map_ops(model, mappings))
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
        reading = pick_family(source, FAMILIES, options.family).read(source, options.hints)
    spec = specify(reading, options)
    for note in reading.notes:
        if note.option not in options.settled:
            logger.warning(note.text)

    height, width = (None, None) if options.free_size else spec.preprocessing.size_hw
    shape = (
        (None, height, width, 3) if reading.network_layout == "NHWC" else (None, 3, height, width)
    )
    others = {name: value.shape for name, value in reading.feeds.items()}
    raw = source.extract(
        {reading.network_input: shape, **others}, list(reading.heads.values()), opset=options.opset
    )
    if options.raw_path:
        files.write_bytes(options.raw_path, raw.SerializeToString())
    model = finish_network(raw, reading, spec, options.batch or "N")
    spec.attach(model)
    if reading.assemble:
        build = Builder(model, "decode/")
        made = reading.assemble(build, spec)
        for tensor, name in ((made.boxes, RAW_BOXES), (made.scores, CLASS_LOGITS)):
            passed_on = tensor in reading.heads
            build.output(build.node("Identity", name, tensor) if passed_on else tensor, name)
        build.append_to(model)
    return select(model, reading, spec, options), reading


def finish_network(
    raw: onnx.ModelProto, reading: Reading, spec: ModelSpec, batch: int | str
) -> onnx.ModelProto:
    """The cut network, tidied, with its public input before it and its outputs called as the reading says."""
    body = gs.import_onnx(raw)
    if reading.rewrite:
        reading.rewrite(body)
    graph.tidy(body)
    for tensor, name in zip(body.outputs, reading.heads, strict=True):
        if name in (RAW_BOXES, CLASS_LOGITS) and reading.anchors is not None:
            last = 4 if name == RAW_BOXES else spec.num_classes
            if reading.batch:
                graph.set_static_batch_free(body, tensor, last)
            tensor.shape = [batch, len(reading.anchors), last]
        tensor.name, tensor.dtype = name, np.dtype(np.float32)
    graph.free_batch(body, reading.batch)
    graph.set_input(body, spec.preprocessing, batch)
    model = gs.export_onnx(body)
    model.ir_version = min(model.ir_version, IR_VERSION)
    model.producer_name, model.producer_version = "trtdet", trtdet.__version__
    return model


def select(
    model: onnx.ModelProto, reading: Reading, spec: ModelSpec, options: Options
) -> onnx.ModelProto:
    """Put what selects the detections behind the heads: the form of NMS that was asked for, or what the family has instead."""
    heads: dict[str, Any] = {
        "boxes": RAW_BOXES,
        "scores": CLASS_LOGITS,
        "nms": spec.nms,
        "batch": options.batch or "N",
    }
    form = options.nms_form
    if form == "none":
        turned = spec.selection == "rotated_nms"
        nms.insert_decoded(model, anchors=reading.anchors, turned=turned, **heads)
    elif spec.selection == "topk":
        insert_topk(model, **heads)
    elif spec.selection == "rotated_nms":
        insert_rotated_nms(model, mode=spec.rotated_mode, **heads)
    elif form == "legacy":
        nms.insert_legacy(model, anchors=reading.anchors, **heads)
    else:
        nms.insert_plugin(model, anchors=reading.anchors, **heads)
        if form == "onnx":  # for TensorRT's INMSLayer: no more candidates than its TopK takes
            return nms.lower(model, "onnx", candidates=nms.TENSORRT_TOPK)
        if form == "graph":
            return nms.lower(model, "graph")
    return model


def specify(reading: Reading, options: Options) -> ModelSpec:
    """The spec of the result: the source's, with the options in place of what they override.

    Raises:
        GraphError: an option contradicts the model.
    """
    found = reading.spec
    refuse_without_effect(reading, options)
    size_hw = found.preprocessing.size_hw
    if options.size_hw and options.size_hw != size_hw:
        raise GraphError(
            f"--input_shape asks for {_hw(options.size_hw)} (height x width), the model was exported for {_hw(size_hw)}; leave the "
            "option out, or export the model again at the other size"
        )
    preprocessing = dataclasses.replace(
        found.preprocessing,
        layout=options.layout,
        dtype=options.input_dtype or found.preprocessing.dtype,
    )
    if options.free_size:
        multiple = reading.size_multiple
        if found.selection != "nms":
            raise GraphError(
                f"--input_shape asks for a free size, which goes with EfficientNMS alone; this model ends in {found.selection}: name a size"
            )
        if multiple is None:
            raise GraphError(
                f"--input_shape asks for a free size, the model takes {_hw(size_hw)} (height x width) alone; name that size, or export "
                "the model with dynamic height and width"
            )
        largest = MAX_SIDE // multiple * multiple
        preprocessing = dataclasses.replace(
            preprocessing,
            size_range=((multiple, multiple), (largest, largest)),
            size_multiple=multiple,
        )
    if options.preprocessor:
        mean, std = PREPROCESSORS[options.preprocessor]
        pad_rgb = preprocessing.pad_rgb
        if pad_rgb == preprocessing.mean:  # zeros behind the normalisation
            pad_rgb = mean
        preprocessing = dataclasses.replace(preprocessing, mean=mean, std=std, pad_rgb=pad_rgb)
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
        rotated_mode=options.hints.rotated_nms or found.rotated_mode,
    )


def refuse_without_effect(reading: Reading, options: Options) -> None:
    """Options that the model has no use for are errors, so that nobody believes they did something.

    Raises:
        GraphError: names the option, and what the model has instead.
    """
    hints, found = options.hints, reading.spec
    if hints.rotated_nms and found.selection != "rotated_nms":
        raise GraphError(
            f"--rotated_nms: this {found.family} model has no turned boxes; leave it out"
        )
    if hints.deformable_attention and (found.family != "deformable_detr" or not reading.rewrite):
        raise GraphError(
            f"--deformable_attention: this {found.family} model has none that could be rewritten; leave it out, or convert from the source"
        )
    if hints.resize and hints.resize != found.preprocessing.resize:
        raise GraphError(
            f"--resize_mode {hints.resize}: this {found.family} model was trained with {found.preprocessing.resize}, and its boxes go "
            "with that; leave it out"
        )
    if found.selection == "topk" and "iou_threshold" in options.settled:
        raise GraphError(
            f"--iou_threshold: this {found.family} model needs no suppression and gets none; leave it out"
        )


def _hw(size_hw: tuple[int, int]) -> str:
    return f"{size_hw[0]}x{size_hw[1]}"


def run(source_path: Path, onnx_path: Path, options: Options, *, is_onnx: bool) -> None:
    """Convert, verify, write; on stdout the differences and the path of the file."""
    files.check_outputs([onnx_path, options.raw_path], [source_path] if is_onnx else [])
    with open_source(source_path, is_onnx=is_onnx, mappings=options.map_ops) as source:
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
        "%s %s, batch %s, %d classes, mean %s, std %s",
        spec.family, _hw(spec.preprocessing.size_hw), options.batch or "free", spec.num_classes,
        spec.preprocessing.mean, spec.preprocessing.std,
    )  # fmt: skip
    form = options.nms_form if spec.selection == "nms" else spec.selection
    logger.info("NMS (%s): %s", form, spec.nms)
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


def parse_input_shape(text: str) -> tuple[int | None, tuple[int, int] | None, Layout]:
    """argparse type: '1,512,512,3', 'N,3,512,512', '-1,-1,-1,3' -> batch, (height, width), layout; None: free."""
    fields = [field.strip() for field in text.split(",")]
    free = fields[0] in ("N", "n", "-1", "")
    try:
        batch = None if free else int(fields[0])
        a, b, c = (int(field) for field in fields[1:])
    except ValueError:
        a = b = c = 0
        batch = None
    size_hw = (a, b) if c == 3 else (b, c)
    wrong_size = min(size_hw) < 1 and size_hw != (-1, -1)
    if (c == 3) == (a == 3) or wrong_size or (batch is not None and batch < 1):
        raise argparse.ArgumentTypeError(
            "expected N,HEIGHT,WIDTH,3 or N,3,HEIGHT,WIDTH, N a number or -1 for a free batch, HEIGHT and WIDTH numbers or both -1, "
            f"got {text!r}"
        )
    return batch, None if size_hw == (-1, -1) else size_hw, "NHWC" if c == 3 else "NCHW"


def parse_mapping(text: str) -> OpMapping:
    """argparse type: 'CustomOp=PluginName[:version]'."""
    try:
        return OpMapping.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


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
    shape.add_argument("--input_shape", type=parse_input_shape, metavar="N,H,W,3|N,3,H,W", help="batch, size and layout; N or -1: free batch; -1,-1 for H,W: free size, where the model has that (default: free batch, the model's size, NHWC)")
    shape.add_argument("-i", "--input_size", type=cli.parse_size, metavar="H,W", help="the size alone, for a model that takes any; it can only confirm that of another")
    shape.add_argument("-f", "--input_format", choices=["NHWC", "NCHW"], help="the layout alone (default: NHWC)")
    shape.add_argument("--input_dtype", choices=["float32", "uint8"], help="uint8 moves a quarter of the bytes (default: as the model's own code resizes: uint8 for YOLO, else float32)")
    shape.add_argument("-p", "--preprocessor", choices=sorted(PREPROCESSORS), help="normalise like this, whatever the model says; unit: RGB 0 to 1 (default: as the model)")
    shape.add_argument("--resize_mode", choices=["letterbox", "stretch"], help="keep the aspect of images or not (default: as the model was trained)")
    detections = parser.add_argument_group("detections")
    detections.add_argument("-t", "--score_threshold", "--nms_threshold", type=cli.unit_interval, metavar="X", help="lowest score to keep (default: the model's)")
    detections.add_argument("--iou_threshold", type=cli.positive_unit_interval, metavar="X", help="overlap from which NMS suppresses (default: the model's)")
    detections.add_argument("-d", "--max_detections", "--nms_detections", type=cli.positive_int, metavar="K", help="detections per image (default: the model's)")
    detections.add_argument("--nms_mode", default="model", choices=["model", "per_class", "class_agnostic"], help="which boxes compete (default: as the model)")
    detections.add_argument("--nms", default="plugin", choices=["plugin", "onnx", "graph", "none"], help="EfficientNMS_TRT, ONNX NonMaxSuppression, ordinary operators, or no NMS (default: plugin; later stages replace it where it is missing)")
    detections.add_argument("--legacy_plugins", action="store_true", help="BatchedNMS_TRT instead, for TensorRT before 8")
    detections.add_argument("--labels", type=Path, metavar="FILE", help="class names to store in the model, one a line")
    detections.add_argument("--rotated_nms", choices=["exact", "odtk", "probiou"], help="overlap of turned boxes: of their true outlines, as ODTK's own kernel computes it, or as Ultralytics does (default: probiou for YOLO, else exact)")
    other = parser.add_argument_group("other")
    other.add_argument("--opset", type=int, choices=range(11, 19), metavar="11..18", help="ONNX opset (default: 17, or 11 with --legacy_plugins; an ONNX source keeps its own if that is at least 13)")
    other.add_argument("--tf2onnx", type=Path, metavar="FILE", help="keep the raw conversion of the network here")
    other.add_argument("--deformable_attention", choices=["keep", "plugin", "gather"], help="GridSample as it is, as MultiscaleDeformableAttnPlugin_TRT, or in ordinary operators (default: gather)")
    other.add_argument("--map_op", type=parse_mapping, action="append", default=[], metavar="OP=PLUGIN[:VERSION]", help="replace a custom operator of an ONNX source by a TensorRT plugin; may be repeated. ONNX Runtime does not know plugins: takes --no_verify")
    other.add_argument("--no_verify", action="store_true", help="write without comparing with the source")
    other.add_argument("-v", "--verbose", action="store_true")
    # fmt: on
    args = parser.parse_args(_bind_input_shape(sys.argv[1:] if argv is None else argv))
    names_size = args.input_shape and args.input_shape[1]
    if args.input_shape and (args.input_format or (names_size and args.input_size)):
        parser.error(
            "--input_shape says size and layout; leave out --input_size and --input_format"
        )
    if args.map_op and not args.source_onnx:
        parser.error("--map_op edits an ONNX file; give --source_onnx")
    if args.map_op and not args.no_verify:
        parser.error(
            "--map_op puts in plugins that ONNX Runtime cannot run, so nothing can be compared; add --no_verify"
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
        batch, named, layout = args.input_shape
        size_hw = named or size_hw
    labels = tuple(read_labels(args.labels)) if args.labels else ()
    return Options(
        family=args.family,
        batch=batch,
        size_hw=size_hw,
        free_size=bool(args.input_shape and not args.input_shape[1]),
        layout=layout,
        input_dtype=args.input_dtype,
        preprocessor=args.preprocessor,
        score_threshold=args.score_threshold,
        iou_threshold=args.iou_threshold,
        max_detections=args.max_detections,
        nms_mode=args.nms_mode,
        nms_form="legacy" if args.legacy_plugins else args.nms,
        labels=labels,
        hints=Hints(
            size_hw=size_hw,
            preprocessor=args.preprocessor,
            resize=args.resize_mode,
            labels=labels,
            rotated_nms=args.rotated_nms,
            deformable_attention=args.deformable_attention,
        ),
        opset=args.opset or (11 if args.legacy_plugins else None),
        raw_path=args.tf2onnx,
        map_ops=tuple(args.map_op),
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
