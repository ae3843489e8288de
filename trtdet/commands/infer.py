# SPDX-License-Identifier: Apache-2.0
"""Find objects in images: one picture and one TSV file per image, and detections.json.

    infer.py --model model.engine --input photos --output found
    infer.py --model model.onnx --input photo.jpg --output found --score_threshold 0.4
    infer.py --model model.engine --input photos --benchmark
    infer.py --model grpc://localhost:8001/model --input photos --output found
    infer.py --model model.engine --input photos --output found --ray local
    infer.py --model model.engine --input clip.mp4 --output found
    infer.py --model model.engine --input rtsp://camera/stream --output found --duration 60

For photos/a.jpg, the output folder gets:

    a.png            the image with its detections, those of at least --draw_threshold; a.jpg with
                     --image_format jpg
    a.tsv            one line per detection, tab separated: xmin ymin xmax ymax score class;
                     in pixels of the source image, class counted from 0
    detections.json  all images, in COCO's results format. image_id is the number in the file
                     name if each file name has a different number (as COCO's have), else the
                     file name; with --annotations it is the id in that file.
    labels.txt       the class names, one per line, if the model has any; for visualize.py
    manifest.json    the files of this run, and what they were made with

Files of an earlier run that this one does not write are named and kept; --clean removes what that
run's manifest lists, and nothing else. --resume continues an interrupted run with the same model
and options: images that are done are not run again, and the results are the same as those of one
run.

A video file, a camera or a stream becomes one annotated video (H.264 if PyAV has it, without
sound), one TSV with two more columns in front, the number of the frame and its time in seconds,
and detections.json with the number of the frame as image_id. If --output is a folder, these are
clip.mp4, clip.tsv, detections.json and labels.txt. If it is a video (.mp4, .mov, .mkv, .webm), such
as found/marked.mp4, only marked.tsv and marked.json are written beside it. Frames count from 0 at
the beginning of the video, also with --start and --every. A file that is damaged gives what comes
before the damage. A stream that breaks is opened again three times; Ctrl-C ends it with what there
is. Frames of a stream that come faster than the model are dropped and counted. An address of a
video with a known duration is treated as a file.

--ray splits the images over the workers of a Ray cluster: one per GPU, or for an ONNX file one per
core (--threads). It writes no pictures, and also detections.parquet with one row per image. An
interrupted run continues when it is started again.

Memory does not grow with the number of images. It holds decoded images of height x width x 3 bytes:
one per core and, to draw pictures, also those of the batches that are ready (two, or two images per
core) or running (three per GPU, or one per thread of ONNX Runtime on a CPU), and four per core that
wait for the disk. With 16 cores, batches of 8 and photographs of 12 megapixels that is 5 GB.
--no_images, or a smaller --batch_size or --workers, needs less. For an engine and 2,000 images or
more, on 8 cores or more, processes decode images to draw on, and write the results. Decoded images
lie in shared memory, 5 GB at most; if a GPU decodes, or that memory is full, they are read again.
ONNX Runtime on a CPU runs as many batches at once as there are threads (--threads), if half of the
memory that is free holds them.

A JPEG that ends too early is reported as unreadable. One that is damaged in the middle is not:
libjpeg decodes it with wrong pixels and prints "Corrupt JPEG data" on stderr, without the name.

Boxes are clipped to the image. A box that lies wholly outside, in the padding, has no width or no
height after that; it is kept, because COCO's metric counts it too.

--benchmark reports the figures of trtexec's performance summary, under the same names: throughput;
minimum, maximum, mean, median and percentiles of latency (copy in + compute + copy out); enqueue
time, H2D, GPU compute and D2H. To get the same from trtexec 8.6 to 10:

    trtexec --loadEngine=model.engine --shapes=INPUT:8x512x512x3 --iterations=200 --duration=0 \\
        --useCudaGraph

From 11 on, write --includeDataTransfers --noSpinWait in place of --useCudaGraph. Add --exposeDMA
for the latencies: they are measured here in a separate pass, one batch after another. With several
GPUs, throughput is that of all GPUs together, and all other figures are those of the first. "End to
end from files" includes decoding and resizing.

Exit status: 0 every image is done; 1 an error, or no image could be read; 2 wrong usage;
3 done, but some images could not be read (each is named on stderr).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import get_args

from trtdet.commands.cli import SOME_SKIPPED, ArgumentParser, run_main, setup_logging
from trtdet.commands.options import add, add_model_option, add_run_options, parse_run_args
from trtdet.commands.values import (
    parse_classes,
    positive_float,
    positive_int,
    seconds,
    thread_count,
)
from trtdet.results.options import DRAW_THRESHOLD, ImageFormat
from trtdet.run.options import RunOptions
from trtdet.runtimes.options import TritonUrl
from trtdet.video.options import VideoOptions, check_output, is_video

#: Names that are no folder's.
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")

VIDEO_OPTIONS = ("every", "start", "duration")
#: Options that a video does not have, by their names here -> on the command line.
NOT_FOR_VIDEO = {
    "annotations": "--annotations",
    "benchmark": "--benchmark",
    "ray": "--ray",
    "resume": "--resume",
    "clean": "--clean",
    "report": "--report",
    "recursive": "--recursive",
    "num_images": "--num_images",
    "image_format": "--image_format",
}

#: Options of pictures, by their names here -> on the command line: --ray writes none.
NOT_ON_RAY = {
    "draw_threshold": "--draw_threshold",
    "image_format": "--image_format",
}

#: Options of what is written, by their names here -> on the command line: a benchmark writes
#: nothing.
NOT_MEASURED = {
    "output": "--output",
    "labels": "--labels",
    "annotations": "--annotations",
    "no_images": "--no_images",
    **NOT_ON_RAY,
    "tsv_header": "--tsv_header",
    "score_threshold": "--score_threshold",
    "classes": "--classes",
    "resume": "--resume",
    "clean": "--clean",
    "report": "--report",
    **{name: f"--{name}" for name in VIDEO_OPTIONS},
}


def given(args: argparse.Namespace, options: Mapping[str, str]) -> list[str]:
    """Those of `options` that are on the command line."""
    values = {option: getattr(args, name) for name, option in options.items()}
    return [option for option, value in values.items() if value is not None and value is not False]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add_model_option(parser, required=True)
    add(parser, "--input video", "-i")
    add(parser, "--output", "-o")
    add(parser, "--labels", "-l")
    add(parser, "--annotations", note="they give the images their ids in detections.json")
    parser.add_argument("--classes", type=parse_classes, metavar="NAME,...", help="keep only detections of these classes: names, or ids counted from 0 (default: all)")  # fmt: skip
    add(parser, "--draw_threshold", note="TSVs and detections.json keep all")
    parser.set_defaults(draw_threshold=None)  # to know whether it is given
    # fmt: off
    parser.add_argument("--no_images", action="store_true", help="write no pictures")
    parser.add_argument("--image_format", choices=get_args(ImageFormat), help="pictures are written as this; JPEG (quality 95) takes half of the time and a third of the size of PNG (default: png)")
    parser.add_argument("--tsv_header", action="store_true", help="TSVs get a first line with the column names and a seventh column with the label")
    parser.add_argument("--benchmark", type=positive_int, nargs="?", const=200, metavar="ITERATIONS", help="measure this many batches after a warm-up, in trtexec's terms (above), and write no results; with --input also end to end from files (default: off; 200 without a number)")
    # fmt: on
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted run into this folder",
    )
    folder.add_argument(
        "--clean",
        action="store_true",
        help="first remove the files that an earlier run wrote into the folder, by its manifest.json",
    )
    add(parser, "--report", note="a gallery")
    add(parser, "--embed")
    add(parser, "--json", note="goes with --benchmark")
    # fmt: off
    parser.add_argument("--ray", metavar="ADDRESS", help="run on this Ray cluster (HOST:PORT, or 'auto' on one of its machines), or start one here ('local'); every machine must see model, images and this program under the same paths (default: none)")
    parser.add_argument("--ray_workers", type=thread_count, metavar="N", help="with --ray: number of workers (default: what fits)")
    # fmt: on
    add_video_options(parser)
    add_run_options(parser)
    args = parse_run_args(parser, argv)
    check_video_usage(parser, args)
    if args.benchmark:
        if unused := given(args, NOT_MEASURED):
            parser.error(f"--benchmark writes no detections; leave {', '.join(unused)} out")
        if args.resize and not args.input:
            parser.error("--benchmark on noise has no images to --resize; give --input, or --size")
    elif not args.input or not args.output:
        parser.error("--input and --output are required (only --benchmark runs without)")
    elif args.json:
        parser.error("--json needs --benchmark; detections.json is written in any case")
    if args.output and args.output.suffix.lower() in PICTURES and not args.output.is_dir():
        parser.error(f"--output: expected a folder, {args.output} looks like a picture; did you mean {args.output.with_suffix('')}?")  # fmt: skip
    check_ray_usage(parser, args)
    check_report_usage(parser, args)
    if args.draw_threshold is None:
        args.draw_threshold = DRAW_THRESHOLD
    args.image_format = args.image_format or "png"
    return args


def add_video_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("for a video")
    # fmt: off
    group.add_argument("--every", type=positive_int, metavar="N", help="process every Nth frame (default: 1)")
    group.add_argument("--start", type=seconds, metavar="SECONDS", help="begin at this time (default: 0)")
    group.add_argument("--duration", type=positive_float, metavar="SECONDS", help="process this many seconds (default: to the end)")
    # fmt: on


def check_video_usage(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """`args.video` is the video, None for images; exit with status 2 for what it does not go
    with.
    """
    videos = [source for source in args.input or () if is_video(source)]
    args.video = videos[0] if videos else None
    if not videos:
        parts = given(args, {name: f"--{name}" for name in VIDEO_OPTIONS})
        if parts and args.input:
            parser.error(
                f"{' and '.join(parts)} {'needs' if len(parts) == 1 else 'need'} a video; {args.input[0]} is not one"
            )
        return
    if len(args.input) > 1:
        parser.error("--input: expected one video, or images; run it once for each")
    unused = given(args, NOT_FOR_VIDEO) + (["--decode gpu"] if args.decode == "gpu" else [])
    if unused:
        parser.error(f"{', '.join(unused)}: not for a video; leave it out")
    if args.output:
        try:
            check_output(args.output, pictures=not args.no_images)
        except ValueError as error:
            parser.error(str(error))


def check_ray_usage(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with status 2 for options that --ray does not go with."""
    if args.ray and (args.benchmark or isinstance(args.engine, TritonUrl)):
        parser.error("--ray: needs a model that is a file, and does not go with --benchmark")
    if args.ray and args.devices:
        parser.error("--devices: Ray hands out the GPUs; leave it out, or limit --ray_workers")
    if args.ray_workers and not args.ray:
        parser.error("--ray_workers needs --ray")
    if args.ray and (unused := given(args, NOT_ON_RAY)):
        parser.error(f"--ray writes no pictures; leave {', '.join(unused)} out")
    if args.ray and args.resume:
        parser.error("--resume: a run with --ray goes on by itself; leave it out")


def check_report_usage(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with status 2 for what a page, and a run that goes on, do not go with."""
    if args.ray and args.report:
        parser.error("--report: not with --ray; leave one of them out")
    if args.embed and not args.report:
        parser.error("--embed goes with --report")
    if args.resume and isinstance(args.engine, TritonUrl):
        parser.error("--resume: needs a model that is a file, to know that it is the same")


def run_on_video(args: argparse.Namespace, options: RunOptions) -> int:
    """The exit status."""
    from trtdet.video.run import Drawing, run_video

    part = VideoOptions(args.every or 1, args.start or 0.0, args.duration)
    whole = run_video(
        args.engine,
        args.video,
        args.output,
        options,
        part,
        Drawing(not args.no_images, args.draw_threshold, args.tsv_header),
        labels=args.labels,
        classes=args.classes,
    )
    return 0 if whole else SOME_SKIPPED


def main(argv: Sequence[str] | None = None) -> int:

    args = parse_args(argv)
    setup_logging(args.verbose, args.quiet)
    options = RunOptions.from_args(args)

    def stage() -> int:
        from trtdet.run.benchmark import run_benchmark
        from trtdet.run.infer import run
        from trtdet.run.ray import run_on_ray

        if args.ray:
            skipped = run_on_ray(
                args.engine,
                args.input,
                args.output,
                options,
                address=args.ray,
                workers=args.ray_workers,
                labels=args.labels,
                annotations=args.annotations,
                tsv_header=args.tsv_header,
                classes=args.classes,
                clean=args.clean,
            )
            return SOME_SKIPPED if skipped else 0
        if args.video:
            return run_on_video(args, options)
        if not args.benchmark:
            skipped = run(
                args.engine,
                args.input,
                args.output,
                options,
                labels=args.labels,
                annotations=args.annotations,
                pictures=not args.no_images,
                draw_threshold=args.draw_threshold,
                image_format=args.image_format,
                tsv_header=args.tsv_header,
                classes=args.classes,
                resume=args.resume,
                clean=args.clean,
                report=args.report,
                embed=args.embed,
            )
            return SOME_SKIPPED if skipped else 0
        run_benchmark(
            args.engine,
            args.input,
            options,
            iterations=args.benchmark,
            json_path=args.json,
        )
        return 0

    return run_main(stage)
