# SPDX-License-Identifier: Apache-2.0
"""Stage 1 from file to file: read, convert, verify, compare detections, write."""

import logging
from dataclasses import dataclass
from pathlib import Path

from trtdet import files
from trtdet.conversion.comparison import compare_to_the_end
from trtdet.conversion.convert import convert, open_source, provenance
from trtdet.conversion.options import Options
from trtdet.conversion.specify import size_text
from trtdet.conversion.verification import Difference, verify
from trtdet.families.evidence import table
from trtdet.onnx_files import check_apart, fixed_batch
from trtdet.sources.saved_model_folder import find_saved_model
from trtdet.spec import ModelSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """What stage 1 wrote.

    Attributes:
        path: the ONNX file.
        spec: what stands in its metadata.
        differences: each head against the source's; none where that was not asked for.
        compared: what the comparison of detections showed, in lines.
    """

    path: Path
    spec: ModelSpec
    differences: tuple[Difference, ...]
    compared: tuple[str, ...] = ()


def convert_file(
    source_path: Path, onnx_path: Path, options: Options, *, is_onnx: bool
) -> Conversion:
    """Convert, verify, write.

    Raises:
        GraphError: the source is not what a family expects, an option contradicts it, or the result
            differs from it.
        OSError, ValueError: a file that cannot be read or written.
    """
    outputs = [onnx_path, options.raw_path]
    files.check_outputs(outputs, [source_path] if is_onnx else [])
    if is_onnx and source_path.suffix.lower() == ".onnx":
        check_apart(outputs, source_path)
    if not is_onnx:
        source_path = find_saved_model(source_path)
    with open_source(
        source_path, is_onnx=is_onnx, mappings=options.map_ops, signature=options.signature
    ) as source:
        logger.info("read %s", source_path)
        done = convert(source, options)
        for line in table(done.spec.evidence).splitlines():
            logger.info("%s", line)
        differences = tuple(verify(source, done)) if options.verify else ()
        compared = tuple(compare_to_the_end(source, done)) if options.verify else ()
    if not options.verify:
        logger.warning("not verified (--no_verify)")
    spec = done.spec.replace(source=provenance(source_path))
    spec.attach(done.model)
    files.write_bytes(onnx_path, done.model.SerializeToString())
    logger.info(
        "%s %s, batch %s, %d classes, mean %s, std %s",
        spec.family, size_text(spec.preprocessing.size_hw), fixed_batch(done.model) or "dynamic", spec.num_classes,
        spec.preprocessing.mean, spec.preprocessing.std,
    )  # fmt: skip
    form = options.nms_form if spec.selection == "nms" else spec.selection
    nms = spec.nms
    overlap = f"IoU threshold {nms.iou_threshold:g}, {'across classes' if nms.class_agnostic else 'per class'}, "
    logger.info(
        "NMS (%s): score threshold %g, %sat most %d detections",
        form, nms.score_threshold, "" if spec.selection == "topk" else overlap, nms.max_output_boxes,
    )  # fmt: skip
    return Conversion(onnx_path, spec, differences, compared)
