# SPDX-License-Identifier: Apache-2.0
"""Hash what the chain writes, to show that a change of the code changes no result.

    python tests/tools/hash_chain.py make-models MODELS
    python tests/tools/hash_chain.py run --models MODELS --repo OLD_CHECKOUT > before.txt
    python tests/tools/hash_chain.py run --models MODELS --repo NEW_CHECKOUT > after.txt
    diff before.txt after.txt

`make-models` writes small source models of every family to a folder; both runs must use the same
folder. The models come from the helpers of the tests, except the SavedModel, which `run` takes from
the examples beside this script. So do the images: both runs see the same ones, whatever --repo is.

`run` starts the four scripts of --repo (default: the checkout of this script), create_onnx.py,
build_engine.py --save_onnx, infer.py and eval_coco.py, by their command lines alone, and with this
Python. It imports nothing of the repository, so it works on any commit whose command line has not
changed. Everything runs on the CPU; no engine is built. It prints one line per output:

    SHA-256  case-precision/file

sorted, and a last line with the hash of all lines. A case is a model and its options; see CASES.
The files of a case are:

    model.onnx              what create_onnx.py wrote; in fp32 this is also what is run
    prepared.onnx           what build_engine.py --save_onnx wrote, for every other precision
    from_cache.onnx         the same in INT8, with the calibration cache instead of the images
    calibration.cache       and calibration.cache.json
    found/*.tsv             all of one folder in one hash, names included
    found/*.png             the same for the pictures that infer.py drew, as pixels
    found/detections.json   of infer.py
    detections.json         of eval_coco.py
    metrics.json

What is not a result is left out: in JSON, also within the metadata of an ONNX file, the keys in
NOT_RESULTS (times, versions, paths); in an ONNX file, the name and version of its producer. The
hashes depend on the versions of Python packages and may depend on the CPU: compare runs of one
machine and one environment. --keep DIR keeps all files: when a hash differs, keep both runs and
compare the two files. A run takes about a minute on two cores.
"""

import argparse
import concurrent.futures
import contextlib
import gzip
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
IMAGES = EXAMPLES / "images"
ANNOTATIONS = EXAMPLES / "annotations.json"
SAVED_MODEL = EXAMPLES / "tiny_shapes"

#: Keys in JSON whose values are no results.
NOT_RESULTS = frozenset(["engine", "platform", "runtime", "seconds", "tool", "trtdet", "version"])
#: Of the weights in the models of `make_models`, so that the folder stays small.
MANTISSA_BITS = 3
LARGE = 1000

QUANTIZED = ("int8", "fp8")
ALL = ("fp32", "fp16", "int8", "fp8")


@dataclass(frozen=True)
class Case:
    """A source model and the options that it goes through the chain with.

    Attributes:
        source: name of a model of `make_models`; "": the SavedModel of the examples.
        convert: options of create_onnx.py; None: the source is as create_onnx.py writes it.
        build: options of build_engine.py in INT8 and FP8.
        run: options of infer.py and eval_coco.py.
    """

    name: str
    source: str
    convert: tuple[str, ...] | None = ()
    precisions: tuple[str, ...] = ALL
    build: tuple[str, ...] = ()
    run: tuple[str, ...] = ()


#: Six kinds of model in every precision, then others, and options that take another way through the
#: code.
CASES = (
    Case("automl", "", ("--labels", str(EXAMPLES / "labels.txt"))),
    Case("detr", "detr"),
    Case("retinanet", "retinanet"),
    Case("retinanet_rotated", "retinanet_rotated"),
    Case("tfod", "tfod"),
    Case("yolo", "yolo"),
    Case("any_size", "any_size", None, ("fp32", "fp16"), run=("--resize", "32", "--max_size", "64")),
    Case("deformable_detr", "deformable_detr", (), ("fp32", "fp16", "int8")),
    Case("deformable_detr_keep", "deformable_detr", ("--deformable_attention", "keep"), ("int8",)),
    Case("deformable_detr_plugin", "deformable_detr", ("--deformable_attention", "plugin"), ("fp16",)),
    Case("detr_stretch", "detr", ("--resize_mode", "stretch"), ("fp32",)),
    Case("retinanet_antialias", "retinanet", ("--nms", "graph"), ("fp32",), run=("--resample", "antialias", "--batch_size", "3")),
    Case("retinanet_rotated_odtk", "retinanet_rotated", ("--rotated_nms", "odtk"), ("fp32",)),
    Case("tfod_nchw_uint8", "tfod", ("--input_shape", "4,3,32,48", "--input_dtype", "uint8", "--nms", "onnx"), ("int8",), ("--calib_method", "entropy", "--rest_precision", "fp32")),
    Case("yolo_obb", "yolo_obb", (), ("fp32", "int8")),
    Case("yolo_percentile", "yolo", ("-t", "0.1", "-d", "20", "--nms_mode", "class_agnostic"), ("int8",), ("--calib_method", "percentile", "--calib_num_images", "5", "--keep_fp32", "cv2_0"), ("-t", "0.2")),
    Case("yolo_topk", "yolo_topk", (), ("fp32",)),
    Case("yolox", "yolox", (), ("fp32", "fp8")),
)  # fmt: skip


# ---- source models


def make_models(folder: Path) -> None:
    """Write the source models that `CASES` names, <name>.onnx.gz each."""
    sys.path[:0] = [str(ROOT), *sorted({str(p.parent) for p in (ROOT / "tests").rglob("*.py")})]
    yolo, detr, retinanet, tfod, toy = (
        importlib.import_module(name)
        for name in ("yolo_networks", "detr_data", "test_retinanet", "test_tfod", "toy_network")
    )
    models: dict[str, onnx.ModelProto] = {
        "any_size": toy.free_network(),
        "deformable_detr": detr.load("deformable_detr_tiny")[0],
        "detr": detr.load("detr_tiny")[0],
        "retinanet": retinanet.odtk_model(),
        "retinanet_rotated": retinanet.odtk_model(rotated=True),
        "tfod": tfod.toy(),
        "yolo": yolo.v8(),
        "yolo_obb": yolo.v8(task="obb"),
        "yolo_topk": yolo.v8(end="topk"),
        "yolox": yolo.yolox(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in models.items():
        for tensor in model.graph.initializer:
            _round(tensor)
        data = gzip.compress(model.SerializeToString(deterministic=True), 9, mtime=0)
        (folder / f"{name}.onnx.gz").write_bytes(data)


def _round(tensor: onnx.TensorProto) -> None:
    """Weights of few bits, which compress well."""
    values = numpy_helper.to_array(tensor)
    if values.dtype != np.float32 or values.size < LARGE:
        return
    mantissa, exponent = np.frexp(values)
    rounded = np.ldexp(np.rint(np.ldexp(mantissa, MANTISSA_BITS)), exponent - MANTISSA_BITS)
    tensor.CopyFrom(numpy_helper.from_array(rounded.astype(np.float32), tensor.name))


# ---- the chain


class ChainError(Exception):
    """A script failed, or wrote nothing that tells one detector from another."""


@dataclass(frozen=True)
class Chain:
    """The scripts of one checkout, which write below `output`."""

    repo: Path
    models: Path
    output: Path

    def script(self, name: str, *options: str | Path) -> None:
        """Run one script to its end.

        Raises:
            ChainError: it failed.
        """
        command = [sys.executable, str(self.repo / name), *map(str, options)]
        # The scripts of `repo` import the package beside them, not one that is named elsewhere.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            command, cwd=self.repo, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise ChainError(f"exit status {done.returncode}: {' '.join(command)}\n{done.stderr}")

    def run(self, case: Case) -> None:
        """One case in all its precisions."""
        folder = self.output / case.name
        folder.mkdir(parents=True)
        if case.source:
            source = folder / f"{case.source}.onnx"
            packed = self.models / f"{case.source}.onnx.gz"
            if not packed.is_file():
                raise ChainError(f"--models: expected {packed}; make it with make-models")
            source.write_bytes(gzip.decompress(packed.read_bytes()))
        else:
            source = SAVED_MODEL
        converted = source
        if case.convert is not None:
            converted = folder / "model.onnx"
            option = "--source_onnx" if case.source else "--saved_model"
            self.script("create_onnx.py", option, source, "--onnx", converted, *case.convert)
        for precision in case.precisions:
            target = self.output / f"{case.name}-{precision}"
            target.mkdir()
            self.detect(case, self.prepare(case, precision, converted, target), target)

    def prepare(self, case: Case, precision: str, converted: Path, target: Path) -> Path:
        """The model in a precision, with its cache in `target`."""
        if precision == "fp32":
            return converted
        prepared = target / "prepared.onnx"
        common = ("build_engine.py", "--model", converted, "--precision", precision)
        if precision not in QUANTIZED:
            self.script(*common, "--save_onnx", prepared)
            return prepared
        # A fixed version: else it is that of the TensorRT at hand.
        cache = ("--calib_cache", target / "calibration.cache", "--calib_cache_version", "8.6.1")
        images = ("--calib_input", IMAGES, "--provider", "cpu")
        self.script(*common, "--save_onnx", prepared, *cache, *images, *case.build)
        if precision == "int8" and not case.build:
            self.script(*common, "--save_onnx", target / "from_cache.onnx", *cache)
        return prepared

    def detect(self, case: Case, model: Path, target: Path) -> None:
        """Detections and metric of a model.

        Raises:
            ChainError: it finds nothing, which would be the same for all changes of the code.
        """
        common = ("--model", model, "--input", IMAGES, "--annotations", ANNOTATIONS)
        where = ("--provider", "cpu", "--threads", "1", *case.run)
        found = target / "found"
        self.script("infer.py", *common, *where, "--output", found, "--draw_threshold", "0")
        if not json.loads((found / "detections.json").read_text(encoding="utf-8")):
            raise ChainError(f"{target.name}: expected detections, found none")
        files = ("--json", target / "metrics.json", "--detections", target / "detections.json")
        self.script("eval_coco.py", *common, *where, *files)


def run(repo: Path, models: Path, output: Path, cases: Sequence[Case], jobs: int) -> None:
    """All cases, `jobs` at a time.

    Raises:
        ChainError: one did not work.
    """
    chain = Chain(repo, models, output)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(chain.run, case) for case in cases]
        try:
            for future in concurrent.futures.as_completed(waiting):
                future.result()
        except ChainError:
            pool.shutdown(cancel_futures=True)
            raise


# ---- hashes


def hash_lines(output: Path) -> list[str]:
    """One line per output below a folder that `run` wrote, sorted by name; the last: of all."""
    hashes: dict[str, str] = {}
    for path in sorted(p for p in output.rglob("*") if p.is_file()):
        name = path.relative_to(output).as_posix()
        if path.suffix in (".tsv", ".png") or path.name == "labels.txt":
            continue
        if path.suffix != ".onnx" or path.stem in ("model", "prepared", "from_cache"):
            hashes[name] = _sha256(content(path))
    for folder in sorted(output.glob("*/found")):
        for suffix in (".tsv", ".png"):
            paths = sorted(folder.glob(f"*{suffix}"))
            if paths:
                parts = [path.name.encode() + b"\n" + content(path) for path in paths]
                name = f"{folder.relative_to(output).as_posix()}/*{suffix} ({len(paths)} files)"
                hashes[name] = _sha256(b"".join(parts))
    lines = [f"{digest}  {name}" for name, digest in sorted(hashes.items())]
    total = _sha256("\n".join(lines).encode())
    return [*lines, f"{total}  total of {len(lines)} lines"]


def content(path: Path) -> bytes:
    """What is a result in a file."""
    if path.suffix == ".onnx":
        return onnx_content(onnx.load(path))
    if path.suffix == ".json":
        return _json_content(path.read_text(encoding="utf-8"))
    if path.suffix == ".png":
        with Image.open(path) as picture:
            return repr((picture.mode, picture.size)).encode() + picture.tobytes()
    return path.read_bytes()


def onnx_content(model: onnx.ModelProto) -> bytes:
    """A model without what says who wrote it. `model` is changed."""
    model.ClearField("producer_name")
    model.ClearField("producer_version")
    for entry in model.metadata_props:
        with contextlib.suppress(ValueError):  # most are no JSON
            entry.value = _json_content(entry.value).decode()
    return model.SerializeToString(deterministic=True)


def _json_content(text: str) -> bytes:
    """The same JSON without `NOT_RESULTS`; the order of keys stays."""
    return json.dumps(_results(json.loads(text))).encode()


def _results(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _results(v) for k, v in value.items() if k not in NOT_RESULTS}
    if isinstance(value, list):
        return [_results(v) for v in value]
    return value


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- command line


@contextlib.contextmanager
def _output(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    keep.mkdir(parents=True, exist_ok=True)
    if any(keep.iterdir()):
        raise ChainError(f"--keep {keep}: expected an empty folder, found files; name another")
    yield keep


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = result.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make-models", help="write the source models")
    make.add_argument("models", type=Path, metavar="DIR")
    go = commands.add_parser("run", help="run the chain and print the hashes")
    go.add_argument("--models", type=Path, required=True, metavar="DIR", help="of make-models")
    go.add_argument("--repo", type=Path, default=ROOT, metavar="DIR", help="the checkout whose scripts are run (default: this one)")  # fmt: skip
    go.add_argument("--case", nargs="+", choices=[c.name for c in CASES], metavar="NAME", help=f"only these: {', '.join(c.name for c in CASES)}")  # fmt: skip
    go.add_argument("--jobs", type=int, default=2, metavar="N", help="cases at a time (default: 2)")
    go.add_argument("--keep", type=Path, metavar="DIR", help="keep the files here")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.command == "make-models":
        make_models(options.models.resolve())
        return 0
    cases = [c for c in CASES if options.case is None or c.name in options.case]
    try:
        with _output(options.keep and options.keep.resolve()) as output:
            run(options.repo.resolve(), options.models.resolve(), output, cases, options.jobs)
            print("\n".join(hash_lines(output)))
    except ChainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
