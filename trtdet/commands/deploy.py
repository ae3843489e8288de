# SPDX-License-Identifier: Apache-2.0
"""Deploy a model: a model repository for Triton, a folder for DeepStream, or the trtexec command.

  deploy.py triton --model d0.engine --output models --name d0 --ensemble
  deploy.py deepstream --model d0.engine --output d0_deepstream
  deploy.py trtexec --model d0.engine --run
  deploy.py check --output models
  deploy.py pad_color --model d0.onnx --output d0_black.onnx

Shapes, types, batch sizes, classes and preprocessing come from the engine's .json and the ONNX
file's metadata. What is written is checked at once; `check` checks it again after you edited it.
docs/deploy.md lists the pitfalls.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from trtdet import files
from trtdet.commands import deploy_options
from trtdet.commands.cli import run_main, setup_logging
from trtdet.commands.deploy_options import is_onnx
from trtdet.errors import GraphError
from trtdet.results.options import CLUTTER_THRESHOLD, DRAW_THRESHOLD

logger = logging.getLogger(__name__)


def report(problems: Sequence[str]) -> None:
    """Raise for the faults that a check found, one a line in the log.

    Raises:
        GraphError: there are some.
    """
    for problem in problems:
        logger.error("%s", problem)
    if problems:
        raise GraphError(
            f"faults found: {len(problems)}, listed above; correct them, or write the files again"
        )


def check_written(repository: Path, names: Sequence[str]) -> None:
    """Fail for faults of the models just written, warn of those of others in the repository.

    Raises:
        GraphError: there are some.
    """
    from trtdet.deploy import triton_check
    from trtdet.deploy.triton_config import config_class

    if config_class() is None:
        logger.warning(
            "config.pbtxt not validated: that needs Triton's protobuf; pip install -r requirements-triton.txt"
        )
        return
    found = triton_check.check_models(repository)
    for name in found.keys() - set(names):
        for problem in found[name]:
            logger.warning("%s", problem)
    report([problem for name in names for problem in found[name]])


def deploy_triton(args: argparse.Namespace) -> None:
    from trtdet.deploy import triton
    from trtdet.deploy.model import open_engine, open_onnx, with_labels
    from trtdet.deploy.triton_config import TritonOptions

    files.check_folder(args.output)
    engines = [with_labels(open_engine(path), args.labels) for path in args.engines]
    onnx_model = with_labels(open_onnx(args.onnx), args.labels) if args.onnx else None
    options = TritonOptions(
        max_batch=args.batch_size,
        instances=args.instances,
        gpus=() if args.devices in (None, "all") else args.devices,
        queue_delay_us=args.queue_delay_us,
        cuda_graphs=args.cuda_graph is None,
    )
    written = triton.write_repository(
        args.output, args.name, engines, onnx_model, options, ensemble=args.ensemble
    )
    for folder in written:
        logger.info("%s", folder)
    check_written(args.output, [folder.parent.name for folder in written])
    print(triton.serve_command(args.output, engines, onnx_model))


def deploy_deepstream(args: argparse.Namespace) -> None:
    from trtdet.deploy import deepstream, deepstream_check
    from trtdet.deploy.model import check_servable, open_engine, open_onnx, with_labels
    from trtdet.deploy.pad_color import SOURCE_KEY

    files.check_folder(args.output)
    model = open_onnx(args.model) if is_onnx(args.model) else open_engine(args.model)
    check_servable(model, "DeepStream")
    if model.engine is None and model.precision == "fp32":
        logger.warning(
            "%s is in float32, and so will be the engine that nvinfer builds of it; build_engine.py --model %s --save_onnx FILE "
            "--precision fp16 (or int8) writes one in another precision",
            args.model,
            args.model,
        )
    model = with_labels(model, args.labels)
    threshold = args.score_threshold
    if threshold is None:
        threshold = model.spec.nms.score_threshold
        if threshold < CLUTTER_THRESHOLD:
            logger.warning(
                "everything from a score of %g on is shown and tracked; --score_threshold %g leaves out what is unlikely",
                threshold,
                DRAW_THRESHOLD,
            )
    options = deepstream.DeepStreamOptions(
        batch=args.batch_size,
        gpu=args.gpu,
        threshold=threshold,
        class_thresholds=dict(args.class_threshold),
        stream_wh=(args.stream_width, args.stream_height),
    )
    padding = model.spec.preprocessing
    if padding.is_warped:
        logger.warning(
            "nvinfer places pictures at whole pixels of the network input, this model's are warped, to fractions of them: boxes differ by up to "
            "a pixel of the input; Triton has the model's own pixels"
        )
    painted = SOURCE_KEY in model.spec.source
    if padding.sampling == "cubic":
        logger.warning(
            "nvinfer resizes pictures bilinearly, this model's are interpolated cubically: scores and boxes differ a little; Triton has the "
            "model's own pixels"
        )
    if padding.resize == "letterbox" and any(padding.pad_rgb) and not painted:
        logger.warning(
            "nvinfer pads with black, this model was trained on padding of %s; deploy.py pad_color makes that good before the engine is "
            "built",
            tuple(round(value, 1) for value in padding.pad_rgb),
        )
    for path in deepstream.write_folder(args.output, args.name, model, options):
        logger.info("%s", path)
    report(deepstream_check.check_folder(args.output))
    if model.engine is not None:
        check_written(args.output / "triton", [args.name])
    make = files.shell_line(["make", "-C", str(args.output / "parser")])
    print(make)
    print(files.shell_line(["deepstream-app", "-c", str(args.output / deepstream.APP_FILE)]))


def deploy_trtexec(args: argparse.Namespace) -> None:

    from trtdet.deploy import trtexec as trtexec_lines
    from trtdet.deploy.model import open_engine, open_onnx

    if args.parse_times:
        files.check_input(args.parse_times, "--parse_times", "a file of trtexec --exportTimes")
        measured = trtexec_lines.measurement_of_times(args.parse_times, args.batch_size)
        print("\n".join(measured.lines()))
        return
    if args.parse_log:
        files.check_input(args.parse_log, "--parse_log", "a log of trtexec")
        text = args.parse_log.read_text(encoding="utf-8", errors="replace")
        batch = args.batch_size or trtexec_lines.batch_of_log(text)
        if batch is None:
            raise ValueError(
                f"{args.parse_log}: expected --shapes in trtexec's line, to know the batch, found none; say it with --batch_size"
            )
        try:
            measured = trtexec_lines.measurement_of_log(text, batch)
        except ValueError as error:
            raise ValueError(f"{args.parse_log}: {error}") from error
        print("\n".join(measured.lines()))
        return
    model = open_onnx(args.model) if is_onnx(args.model) else open_engine(args.model)
    options = trtexec_lines.TrtexecOptions(
        batch=args.batch_size,
        precision=args.precision or "typed",
        save_engine=args.output,
        times=args.times,
        iterations=args.iterations,
        device=args.device,
        plugins=tuple(args.plugins or ()),
    )
    trtexec = Path("trtexec") if args.tensorrt_version else trtexec_lines.find_trtexec()
    version = args.tensorrt_version or trtexec_lines.installed_version(trtexec)
    arguments = trtexec_lines.command(model, version, options)
    fault = trtexec_lines.version_fault(model, version)
    if fault:
        logger.warning("%s", fault)
    print(files.shell_line([str(trtexec), *arguments]))
    if args.run:
        text = trtexec_lines.run(trtexec, arguments)
        batch = args.batch_size or model.preferred
        if args.times:
            measured = trtexec_lines.measurement_of_times(args.times, batch)
        else:
            measured = trtexec_lines.measurement_of_log(text, batch)
        print("\n".join(measured.lines()))


def check(args: argparse.Namespace) -> None:
    from trtdet.deploy import deepstream_check, triton_check
    from trtdet.deploy.triton_config import config_class

    folder: Path = args.output
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--output: expected the folder that deploy.py wrote, found {files.found_at(folder)} at {folder}"
        )
    if any(folder.glob("config_infer*")):
        problems = deepstream_check.check_folder(folder)
        if (folder / "triton").is_dir():
            if config_class() is None:
                report(problems)  # what could be found without it
            problems += triton_check.check_repository(folder / "triton")
    else:
        problems = triton_check.check_repository(folder)
    report(problems)
    print(f"{folder}: no faults found")


def pad_color(args: argparse.Namespace) -> None:
    from trtdet.deploy.model import describe_onnx
    from trtdet.deploy.pad_color import insert_pad_color
    from trtdet.onnx_files import check_apart, read_onnx
    from trtdet.runtimes.kinds import ONNX, check_model

    files.check_outputs([args.output], [args.model])
    check_model(args.model, what=ONNX)
    check_apart([args.output], args.model)
    model = read_onnx(args.model, option="--model")
    describe_onnx(model, args.model)  # refuses what is not of create_onnx.py
    insert_pad_color(model)
    files.write_bytes(args.output, model.SerializeToString())
    print(args.output)


#: Sub-command -> what it does.
STAGES = {
    "triton": deploy_triton,
    "deepstream": deploy_deepstream,
    "trtexec": deploy_trtexec,
    "check": check,
    "pad_color": pad_color,
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return deploy_options.parse_args(__doc__ or "", argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    setup_logging(args.verbose, args.quiet)
    return run_main(lambda: STAGES[args.command](args))
