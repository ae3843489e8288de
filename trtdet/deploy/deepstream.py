# SPDX-License-Identifier: Apache-2.0
"""A folder for DeepStream: nvinfer and nvinferserver configurations, the parser's source, labels,
the engine, a sample pipeline.

    config_infer.txt, config_infer.yml   for nvinfer: the same keys in its two notations
    config_inferserver.txt               for nvinferserver, on the model repository in triton/
    deepstream_app.txt                   a pipeline for deepstream-app: decoder, detector, tracker,
                                         on-screen display
    parser/                              the bounding-box parser, to be made on the target
    triton/<name>/                       engine, sidecar and labels, for all of the above
    model/                               in place of triton/ for an ONNX file, of which nvinfer
                                         builds the engine when it first starts

Source of keys and behaviour: NVIDIA/DeepStream 9.1, src/gst-plugins/gst-nvinfer,
src/utils/nvdsinfer, src/utils/nvdsinferserver.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtdet import files
from trtdet.deploy import text_format, triton
from trtdet.deploy.model import Deployable, check_servable, label_lines
from trtdet.deploy.text_format import Word
from trtdet.deploy.triton_config import LABELS_FILE, TritonOptions
from trtdet.onnx_files import check_external_data, external_files, read_onnx
from trtdet.spec import OUTPUT_NAMES, ModelSpec

logger = logging.getLogger(__name__)


NVINFER_FILE, NVINFER_YAML = "config_infer.txt", "config_infer.yml"
SERVER_FILE, APP_FILE = "config_inferserver.txt", "deepstream_app.txt"
PARSER_LIBRARY = "parser/libnvdsinfer_trtdet.so"
PARSER_FILES = {"nvdsinfer_trtdet.cpp": "nvdsinfer_trtdet.cpp", "Makefile": "Makefile"}
#: nvinfer's network-mode; it matters only where nvinfer builds an engine itself.
NETWORK_MODES = {"int8": 1, "fp16": 2}
MODE_NAMES = {0: "fp32", 1: "int8", 2: "fp16"}  # in the name of the engine that it writes
MODEL_FOLDER = "model"
#: Of DeepStream's own trackers, the one between speed and accuracy.
TRACKER = "/opt/nvidia/deepstream/deepstream"

Group = Mapping[str, str | int | float]


@dataclass(frozen=True)
class DeepStreamOptions:
    """What the sidecar cannot know.

    Attributes:
        batch: frames at a time, commonly the number of streams; None: what the engine is tuned for.
        threshold: lowest score of a detection; class_thresholds: of some classes.
        stream_wh: size of the frames that the sample pipeline batches.
    """

    batch: int | None = None
    gpu: int = 0
    threshold: float = 0.3
    class_thresholds: Mapping[int, float] = field(default_factory=dict)
    stream_wh: tuple[int, int] = (1920, 1080)
    uri: str = f"file://{TRACKER}/samples/streams/sample_1080p_h264.mp4"


def write_folder(
    output: Path, name: str, model: Deployable, options: DeepStreamOptions
) -> list[Path]:
    """Write everything that DeepStream needs to run an engine, or an ONNX file.

    Returns:
        The configurations written.

    Raises:
        ValueError: the folder has a configuration already, or options that the engine does not fit.
        EngineError: an engine that DeepStream cannot load.
    """
    check_servable(model, "DeepStream")
    check_pictures(model)
    if any((output / file).exists() for file in (NVINFER_FILE, SERVER_FILE)):
        raise ValueError(
            f"{output} has a DeepStream configuration already; choose another --output, or remove it"
        )
    batch = pick_batch(model, options)
    unknown = sorted(set(options.class_thresholds) - set(range(model.spec.num_classes)))
    if unknown:
        raise ValueError(
            f"--class_threshold: expected class ids of 0 to {model.spec.num_classes - 1}, found {unknown}"
        )
    for_nvinfer, for_server = usable(model)
    own = [NVINFER_FILE, NVINFER_YAML, SERVER_FILE, APP_FILE]
    for file in (*own, *(f"parser/{target}" for target in PARSER_FILES)):
        files.check_writable(output / file)
    if model.engine is None:
        engine, labels = write_onnx(output, name, model, options, batch)
    else:
        triton_options = TritonOptions(gpus=(options.gpu,))
        (version,) = triton.write_repository(output / "triton", name, [model], None, triton_options)
        engine = (version / "model.plan").relative_to(output)
        labels = engine.parents[1] / LABELS_FILE
    for target, source in PARSER_FILES.items():
        files.write_bytes(output / "parser" / target, triton.asset(source))
    texts: dict[str, str] = {}
    if for_nvinfer:
        groups = nvinfer_groups(model, options, batch, engine, labels)
        texts[NVINFER_FILE] = _ini(groups, "nvinfer of DeepStream 9.1")
        texts[NVINFER_YAML] = _yaml(groups, "nvinfer of DeepStream 9.1")
    if for_server:
        message = server_config(name, model, options)
        texts[SERVER_FILE] = "# nvinferserver of DeepStream 9.1\n" + text_format.dumps(message)
    texts[APP_FILE] = _ini(app_groups(options, batch, nvinfer=for_nvinfer), "deepstream-app")
    for file, text in texts.items():
        files.write_text(output / file, text)
    return [output / file for file in texts]


def write_onnx(
    output: Path, name: str, model: Deployable, options: DeepStreamOptions, batch: int
) -> tuple[Path, Path]:
    """Copy an ONNX file, with the files of its weights, and write the labels.

    Returns:
        Where nvinfer will look for the engine, and write the one that it builds, by its own rule
        for names; and the labels.
    """
    folder = output / MODEL_FOLDER
    target = folder / f"{name}.onnx"
    graph = read_onnx(model.path, weights=False)
    check_external_data(graph, model.path)
    locations = set(external_files(graph.graph))
    for source, copy in [
        (model.path, target),
        *((model.path.resolve().parent / f, folder / f) for f in locations),
    ]:
        with files.atomic_path(copy) as temporary, files.naming_output(copy):
            shutil.copyfile(source, temporary)
    labels = folder / LABELS_FILE
    files.write_text(labels, "".join(f"{line}\n" for line in label_lines(model.spec)))
    mode = MODE_NAMES[NETWORK_MODES.get(model.precision, 0)]
    engine = target.with_name(f"{target.name}_b{batch}_gpu{options.gpu}_{mode}.engine")
    return engine.relative_to(output), labels.relative_to(output)


def usable(model: Deployable) -> tuple[bool, bool]:
    """Whether nvinfer, and whether nvinferserver can feed this engine; at least one can.

    An ONNX file is for nvinfer, which builds an engine of it.

    nvinfer writes float32 whatever the input is declared as: an engine for uint8 would be read
    beyond its end. nvinferserver converts, but leaves the batch to Triton, which cannot choose it
    for an engine of a fixed one.

    Raises:
        ValueError: neither can.
    """
    is_float = model.spec.preprocessing.dtype == "float32"
    if model.engine is None:
        if not is_float:
            raise ValueError(
                f"{model.path}: nvinfer feeds float32 and this file takes uint8; convert with --input_dtype float32, or build an engine for nvinferserver"
            )
        if model.precision not in ("fp32", *NETWORK_MODES):
            raise ValueError(
                f"{model.path}: is in {model.precision.upper()}, which nvinfer does not build; write it with build_engine.py --save_onnx FILE --precision fp16 or int8"
            )
        return True, False
    batches = model.smallest == 1
    if not is_float and not batches:
        raise ValueError(
            f"{model.path}: nvinfer feeds float32 and this engine takes uint8; nvinferserver needs batches from 1, this takes "
            f"{model.batches}; convert with --input_dtype float32, or build with --batch_size 1,N,N"
        )
    if not is_float:
        logger.warning("the engine takes uint8, which nvinfer cannot feed: only for nvinferserver")
    if not batches:
        logger.warning("the engine takes batches of %s: only for nvinfer", model.batches)
    return is_float, batches


def check_pictures(model: Deployable) -> None:
    """Refuse a model whose pictures neither nvinfer nor nvinferserver can place: both make them as
    large as the network input.

    Raises:
        ValueError: it takes them at sizes of their own, or smaller than its input.
    """
    model.check_one_size("DeepStream")
    preprocessing = model.spec.preprocessing
    longest, (height, width) = preprocessing.longest, preprocessing.size_hw
    if longest:
        raise ValueError(
            f"DeepStream makes pictures as large as the network input; this model takes them {longest} pixels long in an input of "
            f"{height}x{width}; export it for {longest} pixels, or serve it with Triton"
        )


def pick_batch(model: Deployable, options: DeepStreamOptions) -> int:
    """nvinfer's batch-size: frames it gathers, and the size of its buffers, which must hold the
    engine's smallest batch.

    Raises:
        ValueError: out of the engine's range.
    """
    batch = options.batch or model.preferred
    if batch < model.smallest or (model.largest is not None and batch > model.largest):
        raise ValueError(f"--batch_size {batch}: the engine takes batches of {model.batches}")
    return batch


def parser_function(spec: ModelSpec) -> str:
    """The function of the parser for a model's boxes."""
    order = "" if spec.box_order == "yxyx" else "Xyxy"
    return f"NvDsInferParseCustomTrtdet{order}{'Normalized' if spec.boxes_normalized else ''}"


def nvinfer_groups(
    model: Deployable, options: DeepStreamOptions, batch: int, engine: Path, labels: Path
) -> dict[str, Group]:
    """nvinfer's configuration, group by group. Paths are relative to its file."""
    spec = model.spec
    preprocessing = spec.preprocessing
    height, width = preprocessing.size_hw
    letterbox = preprocessing.resize == "letterbox"
    properties: dict[str, str | int | float] = {
        "gpu-id": options.gpu,
        "gie-unique-id": 1,
        "process-mode": 1,  # whole frames
        "network-type": 0,  # a detector
        "model-engine-file": engine.as_posix(),
        "batch-size": batch,
        "network-mode": NETWORK_MODES.get(model.precision, 0),
        "infer-dims": f"3;{height};{width}",  # in this order for NHWC too
        "network-input-order": 0 if preprocessing.layout == "NCHW" else 1,
        "model-color-format": 0,  # RGB: normalisation and a swap to BGR are in the graph
        "net-scale-factor": 1.0,
        "offsets": "0;0;0",
        "maintain-aspect-ratio": int(letterbox),
        "symmetric-padding": int(letterbox and preprocessing.placement == "center"),
        "scaling-filter": 1,  # bilinear
        "num-detected-classes": spec.num_classes,
        "labelfile-path": labels.as_posix(),
        "cluster-mode": 4,  # none: suppression is in the engine
        "crop-objects-to-roi-boundary": 1,  # clips boxes at the right and the bottom
        "output-blob-names": ";".join(OUTPUT_NAMES),
        "parse-bbox-func-name": parser_function(spec),
        "custom-lib-path": PARSER_LIBRARY,
    }
    if model.engine is None:
        properties["onnx-file"] = f"{MODEL_FOLDER}/{engine.name.partition('.onnx_')[0]}.onnx"
        if model.precision != "fp32":
            properties["strongly-typed"] = 1  # the types in the file are the engine's
    if model.engine is not None and model.engine.dla_core is not None:
        properties |= {"enable-dla": 1, "use-dla-core": model.engine.dla_core}
    groups: dict[str, Group] = {
        "property": properties,
        "class-attrs-all": {"pre-cluster-threshold": options.threshold},
    }
    for class_id, threshold in sorted(options.class_thresholds.items()):
        groups[f"class-attrs-{class_id}"] = {"pre-cluster-threshold": threshold}
    return groups


def server_config(name: str, model: Deployable, options: DeepStreamOptions) -> dict[str, Any]:
    """nvinferserver's configuration: Triton inside the pipeline, on the repository beside this
    file.
    """
    spec = model.spec
    preprocessing = spec.preprocessing
    letterbox = preprocessing.resize == "letterbox"
    order = "TENSOR_ORDER_NHWC" if preprocessing.layout == "NHWC" else "TENSOR_ORDER_LINEAR"
    detection: dict[str, Any] = {
        "num_detected_classes": spec.num_classes,
        "custom_parse_bbox_func": parser_function(spec),
        "simple_cluster": {"threshold": options.threshold},
    }
    if options.class_thresholds:
        detection["per_class_params"] = [
            {"key": class_id, "value": {"pre_threshold": threshold}}
            for class_id, threshold in sorted(options.class_thresholds.items())
        ]
    infer = {
        "unique_id": 1,
        "gpu_ids": [options.gpu],
        "max_batch_size": pick_batch(model, options),
        "backend": {
            "triton": {
                "model_name": name,
                "version": -1,
                "model_repo": {"root": "triton", "strict_model_config": True},
            }
        },
        "preprocess": {
            "network_format": Word("IMAGE_FORMAT_RGB"),
            "tensor_order": Word(order),
            "tensor_name": model.input_name,
            "maintain_aspect_ratio": int(letterbox),
            "symmetric_padding": int(letterbox and preprocessing.placement == "center"),
            "frame_scaling_filter": 1,
            "normalize": {"scale_factor": 1.0, "channel_offsets": [0.0, 0.0, 0.0]},
        },
        "postprocess": {
            "labelfile_path": f"triton/{name}/{LABELS_FILE}",
            "detection": detection,
        },
        "custom_lib": {"path": PARSER_LIBRARY},
    }
    return {
        "infer_config": infer,
        "input_control": {"process_mode": Word("PROCESS_MODE_FULL_FRAME"), "interval": 0},
    }


def app_groups(options: DeepStreamOptions, batch: int, *, nvinfer: bool) -> dict[str, Group]:
    """A pipeline for deepstream-app: one video, the detector, a tracker, boxes drawn, written to
    a file.
    """
    width, height = options.stream_wh
    gpu = {"enable": 1, "gpu-id": options.gpu}
    return {
        "application": {"enable-perf-measurement": 1, "perf-measurement-interval-sec": 5},
        "tiled-display": {**gpu, "rows": 1, "columns": 1, "width": 1280, "height": 720},
        "source0": {**gpu, "type": 3, "num-sources": 1, "uri": options.uri},
        "streammux": {
            "gpu-id": options.gpu,
            "batch-size": batch,
            "batched-push-timeout": 40000,
            # The size of the source: what is scaled here is scaled twice.
            "width": width,
            "height": height,
        },
        "primary-gie": {
            **gpu,
            "plugin-type": 0 if nvinfer else 1,
            "batch-size": batch,
            "gie-unique-id": 1,
            "config-file": NVINFER_FILE if nvinfer else SERVER_FILE,
        },
        "tracker": {
            **gpu,
            "tracker-width": 640,
            "tracker-height": 384,
            "ll-lib-file": f"{TRACKER}/lib/libnvds_nvmultiobjecttracker.so",
            "ll-config-file": f"{TRACKER}/samples/configs/deepstream-app/config_tracker_NvDCF_perf.yml",
            "display-tracking-id": 1,
        },
        "osd": {**gpu, "border-width": 2, "text-size": 12, "font": "Serif"},
        "sink0": {
            "enable": 1,
            "type": 3,  # a file
            "container": 1,
            "codec": 1,
            "sync": 0,
            "output-file": "out.mp4",
            "source-id": 0,
        },
        "tests": {"file-loop": 0},
    }


def _ini(groups: Mapping[str, Group], reader: str) -> str:
    blocks = [
        f"[{name}]\n" + "".join(f"{key}={files.printable(value)}\n" for key, value in group.items())
        for name, group in groups.items()
    ]
    return f"# {reader}\n" + "\n".join(blocks)


def _yaml(groups: Mapping[str, Group], reader: str) -> str:
    blocks = [
        f"{name}:\n"
        + "".join(f"  {key}: {files.printable(value)}\n" for key, value in group.items())
        for name, group in groups.items()
    ]
    return f"# {reader}\n" + "\n".join(blocks)
