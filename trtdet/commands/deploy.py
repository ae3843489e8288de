# SPDX-License-Identifier: Apache-2.0
"""On from an engine: a model repository for Triton, a folder for DeepStream, a line for trtexec. docs/deploy.md has the traps.

  deploy.py triton --engine d0.engine --repository models --name d0 --ensemble
  deploy.py deepstream --engine d0.engine --output d0_deepstream
  deploy.py trtexec --engine d0.engine --run
  deploy.py check models
  deploy.py pad_color --onnx d0.onnx --output d0_black.onnx

Shapes, types, batch sizes, classes and preprocessing come from the engine's .json and the ONNX file's metadata. What is written is
checked as it stands; `check` does that again, for files that were edited.
"""

import argparse
import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from trtdet import files
from trtdet.commands.cli import positive_int, run_main, setup_logging, unit_interval
from trtdet.deploy.options import DEFAULT_MAX_BATCH
from trtdet.errors import GraphError
from trtdet.machine import parse_version

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


def check_folder(path: Path, option: str) -> None:
    """Find out before anything is written whether a folder can be there.

    Raises:
        NotADirectoryError: names the option.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{option}: expected a folder, found a file at {path}")


def check_written(repository: Path, names: Sequence[str]) -> None:
    """Fail for faults of the models just written, warn of those of others in the repository.

    Raises:
        GraphError: there are some.
    """
    from trtdet.deploy import triton, triton_check

    if triton.config_class() is None:
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

    check_folder(args.repository, "--repository")
    engines = [with_labels(open_engine(path), args.labels) for path in args.engine]
    onnx_model = with_labels(open_onnx(args.onnx), args.labels) if args.onnx else None
    options = triton.TritonOptions(
        max_batch=args.max_batch,
        instances=args.instances,
        gpus=args.gpus,
        queue_delay_us=args.queue_delay_us,
        cuda_graphs=args.cuda_graphs,
    )
    written = triton.write_repository(
        args.repository, args.name, engines, onnx_model, options, ensemble=args.ensemble
    )
    for folder in written:
        logger.info("%s", folder)
    check_written(args.repository, [folder.parent.name for folder in written])
    print(triton.serve_command(args.repository, engines, onnx_model))


def deploy_deepstream(args: argparse.Namespace) -> None:
    from trtdet.deploy import deepstream, deepstream_check
    from trtdet.deploy.model import check_servable, open_engine, with_labels
    from trtdet.deploy.pad_color import SOURCE_KEY

    check_folder(args.output, "--output")
    model = open_engine(args.engine)
    check_servable(model, "DeepStream")
    model = with_labels(model, args.labels)
    options = deepstream.DeepStreamOptions(
        batch=args.batch_size,
        gpu=args.gpu,
        threshold=args.threshold,
        class_thresholds=dict(args.class_threshold),
        stream_wh=args.stream_size,
    )
    padding = model.spec.preprocessing
    painted = SOURCE_KEY in model.spec.source
    if padding.resize == "letterbox" and any(padding.pad_rgb) and not painted:
        logger.warning(
            "nvinfer pads with black, this model was trained on padding of %s; deploy.py pad_color makes that good before the engine is "
            "built",
            tuple(round(value, 1) for value in padding.pad_rgb),
        )
    for path in deepstream.write_folder(args.output, args.name, model, options):
        logger.info("%s", path)
    report(deepstream_check.check_folder(args.output))
    check_written(args.output / "triton", [args.name])
    make = shlex.join(["make", "-C", str(args.output / "parser")])
    print(make)
    print(shlex.join(["deepstream-app", "-c", str(args.output / deepstream.APP_FILE)]))


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
        measured = trtexec_lines.measurement_of_log(text, batch)
        print("\n".join(measured.lines()))
        return
    model = open_engine(args.engine) if args.engine else open_onnx(args.onnx)
    options = trtexec_lines.TrtexecOptions(
        batch=args.batch_size,
        precision=args.precision or "typed",
        save_engine=args.save_engine,
        times=args.times,
        iterations=args.iterations,
        device=args.device,
        plugins=tuple(args.plugins),
    )
    trtexec = Path("trtexec") if args.version else trtexec_lines.find_trtexec()
    version = args.version or trtexec_lines.installed_version(trtexec)
    arguments = trtexec_lines.command(model, version, options)
    fault = trtexec_lines.version_fault(model, version)
    if fault:
        logger.warning("%s", fault)
    print(shlex.join([str(trtexec), *arguments]))
    if args.run:
        text = trtexec_lines.run(trtexec, arguments)
        batch = args.batch_size or model.preferred
        if args.times:
            measured = trtexec_lines.measurement_of_times(args.times, batch)
        else:
            measured = trtexec_lines.measurement_of_log(text, batch)
        print("\n".join(measured.lines()))


def check(args: argparse.Namespace) -> None:
    from trtdet.deploy import deepstream_check, triton, triton_check

    folder: Path = args.folder
    if any(folder.glob("config_infer*")):
        problems = deepstream_check.check_folder(folder)
        if (folder / "triton").is_dir():
            if triton.config_class() is None:
                report(problems)  # what could be found without it
            problems += triton_check.check_repository(folder / "triton")
    else:
        problems = triton_check.check_repository(folder)
    report(problems)
    print(f"{folder}: no faults found")


def pad_color(args: argparse.Namespace) -> None:
    from trtdet.deploy.model import open_onnx
    from trtdet.deploy.pad_color import insert_pad_color
    from trtdet.onnx_files import read_onnx

    files.check_outputs([args.output], [args.onnx])
    model = read_onnx(open_onnx(args.onnx).path)
    insert_pad_color(model)
    files.write_bytes(args.output, model.SerializeToString())
    print(args.output)


# ---- command line


def parse_trt_version(text: str) -> tuple[int, ...]:
    """argparse type: "10.13" -> (10, 13)"""
    try:
        return parse_version(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def non_negative_int(text: str) -> int:
    """argparse type: an integer of at least 0."""
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def parse_gpus(text: str) -> tuple[int, ...]:
    """argparse type: "0,1" -> (0, 1)"""
    try:
        return tuple(non_negative_int(part) for part in text.split(","))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"expected GPUs such as 0,1, got {text!r}") from error


def parse_wh(text: str) -> tuple[int, int]:
    """argparse type: "1920x1080" -> (1920, 1080)"""
    try:
        width, height = (positive_int(part) for part in text.split("x"))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(
            f"expected a size such as 1920x1080, got {text!r}"
        ) from error
    return width, height


def parse_class_threshold(text: str) -> tuple[int, float]:
    """argparse type: "0=0.5" -> (0, 0.5)"""
    class_id, _, threshold = text.partition("=")
    try:
        return int(class_id), unit_interval(threshold)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected CLASS_ID=SCORE such as 0=0.5, got {text!r}"
        ) from error


def parse_name(text: str) -> str:
    """argparse type: a name that is a folder's."""
    if not text or not all(c.isalnum() or c in "_-." for c in text) or text.startswith("."):
        raise argparse.ArgumentTypeError(f"expected letters, digits, _ - and ., got {text!r}")
    return text


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, stage: Callable[[argparse.Namespace], None], text: str
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.add_argument("-v", "--verbose", action="store_true", help="log more")
        made.set_defaults(stage=stage)
        return made

    # fmt: off
    def add_labels(to: argparse.ArgumentParser) -> None:
        to.add_argument("--labels", type=Path, metavar="FILE", help="class names, one per line, or 'coco' (default: the model's own)")

    to_triton = add("triton", deploy_triton, "write a model repository for Triton, and print the command that serves it")
    to_triton.add_argument("-e", "--engine", type=Path, nargs="+", default=[], metavar="FILE", help="engine with its .json; several: the same model for several kinds of GPU")
    to_triton.add_argument("-o", "--onnx", type=Path, metavar="FILE", help="ONNX file of create_onnx.py, served by ONNX Runtime without the plugin")
    to_triton.add_argument("-r", "--repository", type=Path, required=True, metavar="DIR", help="the model repository; what is there is kept, a model of that name gets a new version")
    to_triton.add_argument("-n", "--name", type=parse_name, required=True, help="what clients call the model")
    to_triton.add_argument("--ensemble", action="store_true", help="also NAME_ensemble: encoded images in, boxes in source pixels out (the server needs pillow and opencv-python-headless)")
    to_triton.add_argument("--max_batch", type=positive_int, metavar="N", help=f"images at a time (default: the engine's largest; {DEFAULT_MAX_BATCH} where nothing bounds it)")
    to_triton.add_argument("--instances", type=positive_int, default=1, metavar="N", help="execution contexts per GPU (default: %(default)s)")
    to_triton.add_argument("--gpus", type=parse_gpus, default=(), metavar="0,1", help="GPUs to use (default: all)")
    to_triton.add_argument("--queue_delay_us", type=non_negative_int, default=1000, metavar="US", help="how long a request waits for others to share its batch (default: %(default)s)")
    to_triton.add_argument("--no_cuda_graphs", dest="cuda_graphs", action="store_false", help="launch kernel by kernel")
    add_labels(to_triton)

    to_deepstream = add("deepstream", deploy_deepstream, "write a folder for DeepStream, and print the commands that run it")
    to_deepstream.add_argument("-e", "--engine", type=Path, required=True, metavar="FILE", help="engine with its .json")
    to_deepstream.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="a new folder")
    to_deepstream.add_argument("-n", "--name", type=parse_name, default="detector", help="of the model in it (default: %(default)s)")
    to_deepstream.add_argument("-b", "--batch_size", type=positive_int, metavar="N", help="frames at a time: the number of streams (default: what the engine is tuned for)")
    to_deepstream.add_argument("-t", "--threshold", type=unit_interval, default=0.3, help="lowest score (default: %(default)s)")
    to_deepstream.add_argument("--class_threshold", type=parse_class_threshold, nargs="+", default=[], metavar="ID=SCORE", help="lowest score of single classes")
    to_deepstream.add_argument("--gpu", type=non_negative_int, default=0, metavar="N", help="(default: %(default)s)")
    to_deepstream.add_argument("--stream_size", type=parse_wh, default=(1920, 1080), metavar="WxH", help="size of the video in the sample pipeline (default: 1920x1080)")
    add_labels(to_deepstream)

    to_trtexec = add("trtexec", deploy_trtexec, "print trtexec's line for a model, run it, or show what it measured as infer.py --benchmark does")
    what = to_trtexec.add_mutually_exclusive_group(required=True)
    what.add_argument("-e", "--engine", type=Path, metavar="FILE", help="engine with its .json")
    what.add_argument("-o", "--onnx", type=Path, metavar="FILE", help="ONNX file of create_onnx.py, or of build_engine.py --save_onnx")
    what.add_argument("--parse_times", type=Path, metavar="FILE", help="show a file of trtexec --exportTimes")
    what.add_argument("--parse_log", type=Path, metavar="FILE", help="show a log of trtexec")
    to_trtexec.add_argument("--version", type=parse_trt_version, metavar="10.13", help="of TensorRT (default: the installed trtexec's)")
    to_trtexec.add_argument("--run", action="store_true", help="run it too, and show the table")
    to_trtexec.add_argument("-b", "--batch_size", type=positive_int, metavar="N", help="images at a time (default: what the engine is tuned for; with --parse_log, what its --shapes says)")
    to_trtexec.add_argument("-p", "--precision", choices=["typed", "fp32", "fp16", "int8"], help="for --onnx: as the types in the file say, or weakly typed (before TensorRT 11) (default: typed)")
    to_trtexec.add_argument("--save_engine", type=Path, metavar="FILE", help="for --onnx: keep the engine; it has no .json")
    to_trtexec.add_argument("--times", type=Path, metavar="FILE", help="write the time of every batch to this file")
    to_trtexec.add_argument("--iterations", type=positive_int, default=200, metavar="N", help="batches measured (default: %(default)s)")
    to_trtexec.add_argument("--device", type=non_negative_int, default=0, metavar="N", help="GPU (default: %(default)s)")
    to_trtexec.add_argument("--plugins", type=Path, nargs="+", default=[], metavar="LIB.so", help="libraries of plugins that the model uses (default: those that the engine's .json names, found by the loader)")

    to_check = add("check", check, "check a model repository, or a folder for DeepStream")
    to_check.add_argument("folder", type=Path, help="the repository or the folder")

    to_pad = add("pad_color", pad_color, "make an ONNX file take frames padded with black, as DeepStream pads them")
    to_pad.add_argument("-i", "--onnx", type=Path, required=True, metavar="FILE", help="ONNX file of create_onnx.py")
    to_pad.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the ONNX file to write")
    # fmt: on
    args = parser.parse_args(argv)
    if args.command == "triton" and not args.engine and not args.onnx:
        to_triton.error("expected --engine, --onnx or both")
    if args.command == "trtexec":
        check_trtexec_usage(to_trtexec, args)
    return args


def check_trtexec_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Options that do not go together, or would have no effect, are wrong usage."""

    if args.run and args.version:
        parser.error("--run measures with the installed trtexec; leave --version out")
    if not args.onnx and (args.precision or args.save_engine):
        parser.error("--precision and --save_engine go with --onnx")
    if args.run and (args.parse_times or args.parse_log):
        parser.error("--run goes with --engine or --onnx")
    if args.parse_times and not args.batch_size:
        parser.error("--parse_times needs --batch_size: the file does not say it")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    setup_logging(args.verbose)
    return run_main(lambda: args.stage(args))
