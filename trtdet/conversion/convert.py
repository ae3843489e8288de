# SPDX-License-Identifier: Apache-2.0
"""Source and family -> an ONNX model that ends in NMS: cut, tidy, assemble, select.

The recipe of stage 1.
"""

import dataclasses
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtdet import about, files, onnx_files
from trtdet.conversion.options import Options
from trtdet.conversion.specify import specify, warn_of_nms
from trtdet.errors import GraphError
from trtdet.families import load_families, load_family
from trtdet.families.base import (
    ANCHORS,
    CLASS_LOGITS,
    RAW_BOXES,
    Reading,
    best_class_only,
    pick_family,
    read_converted,
)
from trtdet.families.evidence import BATCH
from trtdet.graph import deformable_attention, dynamic_batch, tidy
from trtdet.graph.builder import COMPUTE_OPS, POSITIONS_PREFIX, Builder
from trtdet.graph.map_op import OpMapping, custom_ops, map_ops, ops_of_onnxruntime
from trtdet.nms import lowering, plugin, static_rows
from trtdet.nms.candidates import TENSORRT_TOPK
from trtdet.nms.rotated import insert_rotated_nms
from trtdet.nms.topk import insert_topk
from trtdet.onnx_files import fixed_batch, naming
from trtdet.sources.base import Source, cut_onnx, run_onnx
from trtdet.sources.onnx_file import NEWEST_OPSET, OnnxSource
from trtdet.spec import OUTPUT_NAMES, Fact, ModelSpec

logger = logging.getLogger(__name__)


#: ONNX's file format of 1.10 (2021), which TensorRT 8.6 reads.
IR_VERSION = 8


def open_source(
    path: Path,
    *,
    is_onnx: bool,
    mappings: Sequence[OpMapping] = (),
    signature: str | None = None,
) -> Source:
    """A SavedModel folder, of which one signature, or an ONNX file, in which custom operators
    are replaced by plugins.
    """
    if is_onnx:
        return OnnxSource(
            path, edit=lambda model: map_ops(model, mappings), lower=deformable_attention.lower
        )
    from trtdet.sources.saved_model import SavedModelSource

    return SavedModelSource(path, signature=signature)


@dataclass(frozen=True)
class Converted:
    """What stage 1 made of a source, not yet verified.

    Attributes:
        model: with `spec` in its metadata, for the stages after this one.
        reading: what was found in the source.
    """

    model: onnx.ModelProto
    spec: ModelSpec
    reading: Reading

    @property
    def anchors(self) -> NDArray[np.float32] | None:
        """[1, A, 4], those in the file if it has them, else the source's.

        None where boxes are decoded already.
        """
        written = next((i for i in self.model.graph.initializer if i.name == ANCHORS), None)
        anchors = self.reading.anchors if written is None else onnx.numpy_helper.to_array(written)
        return None if anchors is None else anchors.reshape(1, -1, 4)

    @property
    def normalisation_replaced(self) -> bool:
        """Whether --preprocessor replaced the source's own."""
        ours, theirs = self.spec.preprocessing, self.reading.spec.preprocessing
        return (ours.mean, ours.std) != (theirs.mean, theirs.std)


def convert(source: Source, options: Options) -> Converted:
    """Read a source and make its ONNX model.

    A batch that cannot be made dynamic stays as it is in the source, unless the options ask for
    one.

    Raises:
        GraphError: the source is not what a family expects, or an option contradicts it.
    """
    with naming(source.path):
        reading = read_source(source, options)
    if (reading.shorter_side or reading.own_size) and options.size_hw is None:
        options = dataclasses.replace(options, dynamic_size=True)
    if reading.one_by_one:
        if options.batch not in (None, 1):
            raise GraphError(
                f"--input_shape asks for a batch of {options.batch}; the number of this model's detections follows the picture, so it takes one "
                "picture at a time: give 1, or leave it out"
            )
        options = dataclasses.replace(options, batch=1)
    for note in reading.notes:
        if note.option not in options.given:
            logger.warning(note.text)
    warn_of_nms(reading.spec, options)
    done = assemble(source, reading, options)
    if options.batch is None and reading.batch and not takes_others(done):
        logger.warning(
            "the export is fixed to a batch of %d, and so is this model; export it with a dynamic batch for another",
            reading.batch,
        )
        done = assemble(source, reading, dataclasses.replace(options, batch=reading.batch))
    if options.batch is None and reading.batch and fixed_batch(done.model) is None:
        dynamic = Fact(
            BATCH, "dynamic", f"measured: {reading.batch} in the source, but its network takes any"
        )
        facts = tuple(dynamic if fact.name == BATCH else fact for fact in done.spec.evidence)
        done = dataclasses.replace(done, spec=done.spec.replace(evidence=facts))
    if alone := ops_of_onnxruntime(done.model):
        logger.warning(
            "%s: TensorRT does not read %s, which ONNX Runtime's optimizer or quantizer writes: export the model without that step",
            source.path, ", ".join(alone),
        )  # fmt: skip
    return done


def takes_others(converted: Converted) -> bool:
    """Whether the heads can be computed for more images than the source has in a batch, and for
    one; also where ONNX Runtime does not know an operator, so that nothing can be told.
    """
    preprocessing, batch = converted.spec.preprocessing, converted.reading.batch or 1
    lowered = deformable_attention.lower(converted.model)
    try:
        for n in {1, batch + 1} - {batch}:
            images = np.zeros((n, *preprocessing.image_shape), preprocessing.dtype)
            run_onnx(lowered, list(converted.reading.heads), {tidy.INPUT: images})
    except GraphError:
        return bool(custom_ops(cut_onnx(lowered, [tidy.INPUT], converted.reading.heads)))
    return True


def read_source(source: Source, options: Options) -> Reading:
    """What the family finds."""
    if source.spec:
        return read_converted(source, source.spec)
    name = options.family
    if name == "auto" and options.hints.declared:
        name = "heads"
    if name.endswith(".py"):
        return load_family(Path(name)).read(source, options.hints)
    return pick_family(source, load_families(), name).read(source, options.hints)


def assemble(source: Source, reading: Reading, options: Options) -> Converted:
    """The ONNX model of a reading."""
    spec = specify(reading, options)
    height, width = (None, None) if options.dynamic_size else spec.preprocessing.size_hw
    shape = (
        (None, height, width, 3) if reading.network_layout == "NHWC" else (None, 3, height, width)
    )
    others = {name: value.shape for name, value in reading.feeds.items()}
    is_static = reading.one_by_one and not options.dynamic_size
    if is_static:
        shape = (1, *shape[1:])
    opset = options.opset or (_with_grid_sample(source) if is_static else None)
    raw = source.extract(
        {reading.network_input: shape, **others}, list(reading.heads.values()), opset=opset
    )
    if options.raw_path:
        files.write_bytes(options.raw_path, raw.SerializeToString())
    if is_static:
        raw = with_fixed_shapes(raw)
    model = finish_network(raw, reading, spec, options.batch or "N")
    if is_static:
        # Where a box is looked at, and on which level of the pyramid.
        of = {"GridSample": 1, "Where": 0}
        ours = [node for node in model.graph.node if node.name.startswith(POSITIONS_PREFIX)]
        where = [node.input[of[node.op_type]] for node in ours if node.op_type in of]
        deformable_attention.name_positions(model, [*reading.heads, *where], COMPUTE_OPS)
    spec.attach(model)
    if reading.assemble:
        build = Builder(model, "decode/")
        made = reading.assemble(build, spec)
        if options.nms_mode == "best_class":
            lowest = -100.0 if spec.nms.score_activation else 0.0
            scores = best_class_only(build, made.scores, lowest=lowest)
            made = dataclasses.replace(made, scores=scores)
        for tensor, name in ((made.boxes, RAW_BOXES), (made.scores, CLASS_LOGITS)):
            passed_on = tensor in reading.heads
            build.output(build.node("Identity", name, tensor) if passed_on else tensor, name)
        build.append_to(model)
    elif options.nms_mode == "best_class":
        raise GraphError(
            "--nms_mode best_class: this model's scores are its network's own outputs, and its NMS takes every class of a box; leave it out"
        )
    return Converted(select(model, reading, spec, options), spec, reading)


def with_fixed_shapes(raw: onnx.ModelProto) -> onnx.ModelProto:
    """The network without shapes that follow the picture, which no TensorRT-RTX builds; as it is,
    with a warning, where there is no such form of it.
    """
    if static_rows.maybe_data_sized(raw) is None:
        return raw
    try:
        return static_rows.make_static(raw)
    except GraphError as error:
        logger.warning(
            "shapes inside the model follow the picture, which TensorRT-RTX does not build: %s",
            error,
        )
        return raw


def _with_grid_sample(source: Source) -> int | None:
    """The opset that operators of fixed shapes need, where the source has an older one."""
    if not isinstance(source, OnnxSource):
        return None
    found = next(o.version for o in source.model.opset_import if o.domain in ("", "ai.onnx"))
    return max(found, NEWEST_OPSET)


def finish_network(
    raw: onnx.ModelProto, reading: Reading, spec: ModelSpec, batch: int | str
) -> onnx.ModelProto:
    """The cut network, tidied, with its public input before it and its outputs called as the
    reading says.
    """
    body = gs.import_onnx(raw)
    if reading.rewrite:
        reading.rewrite(body)
    tidy.tidy(body, (RAW_BOXES, CLASS_LOGITS, *reading.heads, *OUTPUT_NAMES))
    for tensor, name in zip(body.outputs, reading.heads, strict=True):
        if name in (RAW_BOXES, CLASS_LOGITS) and reading.anchors is not None:
            last = 4 if name == RAW_BOXES else spec.num_classes
            if reading.batch:
                dynamic_batch.make_static_batch_dynamic(tensor, last)
            tensor.shape = [batch, len(reading.anchors), last]
        tensor.name, tensor.dtype = name, np.dtype(np.float32)
    if not reading.one_by_one and batch != reading.batch:
        dynamic_batch.make_batch_dynamic(body, reading.batch)
    tidy.set_input(body, spec.preprocessing, batch)
    model = gs.export_onnx(body)
    model.ir_version = min(model.ir_version, IR_VERSION)
    model.producer_name, model.producer_version = "trtdet", about.__version__
    return model


def select(
    model: onnx.ModelProto, reading: Reading, spec: ModelSpec, options: Options
) -> onnx.ModelProto:
    """Put what selects the detections behind the heads: the form of NMS that was asked for, or
    what the family has instead.
    """
    heads: dict[str, Any] = {
        "boxes": RAW_BOXES,
        "scores": CLASS_LOGITS,
        "nms": spec.nms,
        "batch": options.batch or "N",
    }
    form = options.nms_form
    if form == "none":
        rotated = spec.selection == "rotated_nms"
        plugin.insert_decoded(model, anchors=reading.anchors, rotated=rotated, **heads)
    elif spec.selection == "topk":
        insert_topk(model, **heads)
    elif spec.selection == "rotated_nms":
        insert_rotated_nms(model, mode=spec.rotated_mode, **heads)
    elif form == "legacy":
        plugin.insert_legacy(model, anchors=reading.anchors, **heads)
    else:
        plugin.insert_plugin(model, anchors=reading.anchors, **heads)
        if form == "onnx":  # for TensorRT's INMSLayer: no more candidates than its TopK takes
            return lowering.lower(model, "onnx", candidates=TENSORRT_TOPK)
        if form == "graph":
            return lowering.lower(model, "graph")
    return model


def provenance(source_path: Path) -> dict[str, str]:
    """Where a model came from: the name and the SHA-256 of its file, with a SavedModel's variables
    and an ONNX file's weights that lie in files of their own.
    """
    if source_path.is_dir():
        variables = sorted(source_path.glob("variables/*"))
        digest = files.sha256(source_path / "saved_model.pb", *variables)
    else:
        digest = onnx_files.sha256(source_path)
    return {
        "name": Path(os.path.realpath(source_path)).name,
        "sha256": digest,
        "trtdet": about.__version__,
    }
