# SPDX-License-Identifier: Apache-2.0
"""The command lines of all stages: one vocabulary, help that reads well, errors that say what to
do.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from trtdet.commands import (
    build_engine,
    cli,
    compare,
    create_onnx,
    deploy,
    doctor,
    eval_coco,
    image_batcher,
    infer,
    tune_precision,
    visualize,
)
from trtdet.commands.advice import plain
from trtdet.commands.habits import HABITS
from trtdet.commands.options import SHARED
from trtdet.commands.stages import STAGES as ALL_STAGES
from trtdet.commands.stages import options_everywhere
from trtdet.engine.options import BatchRange, SizeRange, parse_batch, parse_gib, parse_sizes
from trtdet.images.options import parse_size

STAGES = {
    "create_onnx.py": create_onnx, "build_engine.py": build_engine, "infer.py": infer, "eval_coco.py": eval_coco, "compare.py": compare,
    "tune_precision.py": tune_precision, "deploy.py": deploy, "image_batcher.py": image_batcher, "visualize.py": visualize,
    "trtdet doctor": doctor,
}  # fmt: skip

#: Short letters of NVIDIA's sample, in its own stages.
SAMPLE_LETTERS = {
    "create_onnx.py": "m o f i p t d",
    "build_engine.py": "o e b d p w",
    "infer.py": "e i o l t",
    "eval_coco.py": "e i a p t",
}

#: Second names: those of NVIDIA's sample, and the shared ones where hers comes first.
SECOND_NAMES = {"--model", "--engine", "--onnx", "--output", "--nms_threshold", "--nms_detections", "--input_size"}  # fmt: skip

#: Names that mean two things, or one that cannot have the usual default: where -> why.
DIFFERENT = {
    ("eval_coco.py", "--detections"): "COCO results, where visualize.py reads a folder of TSVs",
    (
        "deploy.py trtexec",
        "--precision",
    ): "trtexec's weak types, where build_engine.py puts types into the graph",
    ("compare.py", "--max_ap_drop"): "depends on the candidate's precision",
    ("deploy.py triton", "--devices"): "a server uses every GPU",
}


class Captured(Exception):
    """Carries a parser out of the function that makes it."""


@pytest.fixture(scope="module")
def parsers() -> dict[str, cli.ArgumentParser]:
    """Every parser, those of sub-commands too, by the name of its program."""

    def capture(self: cli.ArgumentParser, *arguments: Any) -> None:
        raise Captured(self)

    found: dict[str, cli.ArgumentParser] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.ArgumentParser, "parse_args", capture)
        for name, stage in STAGES.items():
            patch.setattr(sys, "argv", [name])
            with pytest.raises(Captured) as caught:
                stage.parse_args([])
            (parser,) = caught.value.args
            found[name] = parser
            if parser._commands:
                found |= {sub.prog: sub for sub in parser._commands.choices.values()}
    return found


def options_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if action.option_strings and not isinstance(action, argparse._HelpAction):
            yield action


def canonical(action: argparse.Action) -> str:
    """The shared name of an option where it has one, else its first."""
    shared = {row.name for row in SHARED.values()}
    return next((o for o in action.option_strings if o in shared), action.option_strings[0])


def rule_of(action: argparse.Action) -> tuple[str, str]:
    """Help text, and what it says of the default."""
    text = (action.help or "") % vars(action)
    found = re.fullmatch(r"(.*) \(default: (.*)\)", text)
    return (found[1], found[2]) if found else (text, "")


def form_of(action: argparse.Action) -> tuple[Any, ...]:
    choices = tuple(action.choices) if action.choices else None
    return action.metavar, action.type, choices, type(action).__name__


def faults(parsers: dict[str, cli.ArgumentParser]) -> list[str]:
    """Options of one name that differ in form, default rule or help text; shared ones are as
    their row says.
    """
    found = []
    seen: dict[str, tuple[str, argparse.Action]] = {}
    for prog, parser in parsers.items():
        for action in options_of(parser):
            name = canonical(action)
            if (prog, name) in DIFFERENT:
                continue
            rows = [row for row in SHARED.values() if row.name == name]
            text, rule = rule_of(action)
            if prog in ("create_onnx.py", "build_engine.py") and name in ("--model", "--output"):
                continue  # what goes in and what comes out has the sample's name there
            if rows:
                right = [
                    row for row in rows
                    if (row.metavar, text.partition("; ")[0]) == (action.metavar, row.help.partition("; ")[0])
                    and text.startswith(row.help) and (action.required or rule == row.rule)
                    and (action.type == row.keywords.get("type") or name == "--name")
                ]  # fmt: skip
                if not right:
                    found.append(
                        f"{prog} {name}: not as in SHARED: {action.metavar}, {text!r}, {rule!r}"
                    )
                continue
            other, first = seen.setdefault(name, (prog, action))
            if form_of(first) != form_of(action) or rule_of(first) != rule_of(action):
                found.append(f"{prog} {name}: not as in {other}")
    return found


def test_one_form_for_one_thing(parsers: dict[str, cli.ArgumentParser]) -> None:
    assert len(parsers) == 15
    assert faults(parsers) == []


@pytest.mark.parametrize(
    ("name", "changes", "fault"),
    [
        ("--batch_size", {"metavar": "BATCH"}, "infer.py --batch_size: not as in SHARED"),
        ("--batch_size", {"type": int}, "infer.py --batch_size: not as in SHARED"),
        ("--workers", {"help": "threads (default: one per core)"}, "infer.py --workers: not as in SHARED"),
        ("--workers", {"help": "threads that decode and resize images (default: 4)"}, "infer.py --workers: not as in SHARED"),
        ("--requests", {"metavar": "COUNT"}, "eval_coco.py --requests: not as in infer.py"),
    ],
)  # fmt: skip
def test_other_forms_are_found(
    parsers: dict[str, cli.ArgumentParser], name: str, changes: dict[str, Any], fault: str
) -> None:
    action = parsers["infer.py"]._option_string_actions[name]
    before = {key: getattr(action, key) for key in changes}
    try:
        vars(action).update(changes)
        assert [line.startswith(fault) for line in faults(parsers)] == [True]
    finally:
        vars(action).update(before)


def test_no_second_name_but_the_samples(parsers: dict[str, cli.ArgumentParser]) -> None:
    second = {
        name
        for parser in parsers.values()
        for action in options_of(parser)
        for name in [o for o in action.option_strings if o.startswith("--")][1:]
    }
    assert second == SECOND_NAMES


def test_short_letters_are_the_samples(parsers: dict[str, cli.ArgumentParser]) -> None:
    for prog, parser in parsers.items():
        letters = {o for o in parser._option_string_actions if not o.startswith("--")}
        sample = {f"-{letter}" for letter in SAMPLE_LETTERS.get(prog, "").split()}
        assert letters - sample <= {"-h", "-v", "-o"}, prog
        assert sample <= letters, prog


@pytest.mark.parametrize(
    ("script", "line"),
    [
        (create_onnx, "--saved_model d --onnx o --input_format NCHW --input_size 512,512 --preprocessor imagenet --nms_threshold 0.4 --nms_detections 100 --tf2onnx t"),
        (create_onnx, "-m d -o o -f NHWC -i 512,512 -p scale_range -t 0.4 -d 100"),
        (create_onnx, "--saved_model d --onnx o --input_shape 1,512,512,3 --legacy_plugins"),
        (build_engine, "--onnx o --engine e --batch_size 8 --precision int8 --calib_input i --calib_cache c --calib_num_images 9 --calib_batch_size 8 --timing_cache t --workspace 8 --verbose"),
        (build_engine, "-o o -e e -b 8 -p fp16 -w 8 -v"),
        (build_engine, "-o o -e e -d 1,4,8"),
        (infer, "--engine e --input i --output o --labels l --nms_threshold 0.4"),
        (infer, "-e e -i i -o o -l l -t 0.4"),
        (eval_coco, "--engine e --input i --annotations a --automl_path p --nms_threshold 0.4"),
        (eval_coco, "-e e -i i -a a -p p -t 0.4"),
    ],
)  # fmt: skip
def test_lines_of_the_sample_still_work(script: Any, line: str) -> None:
    script.parse_args(line.split())


def test_help_names_the_default_and_prints_well(
    parsers: dict[str, cli.ArgumentParser], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for prog, parser in parsers.items():
        for action in options_of(parser):
            text = (action.help or "") % vars(action)
            where = f"{prog} {action.option_strings[0]}: {text!r}"
            takes_value = action.nargs != 0 and not isinstance(action, argparse._VersionAction)
            assert not takes_value or action.required or re.search(r"\(default: .*\)$", text) or _in_required_group(parser, action), where  # fmt: skip
            assert re.match(r"[^\s(].*[^\s.]$", text) and "  " not in text and "\n" not in text, where  # fmt: skip
        printed = parser.format_help()
        options = printed[printed.index("\noptions:") :]
        assert "%%" not in printed and "%(" not in printed, prog
        assert max(map(len, printed.splitlines())) <= 100, prog
        for line in options.splitlines():  # an option and its help, a group's name, or text
            assert re.match(r"^(  -|  [a-z]| {10,28}\S|  [A-Z0-9]|\S.*:$|\s*$)", line), (
                f"{prog}: {line!r}"
            )
        for group in parser._action_groups:
            assert len(group.title or "") <= 60, f"{prog}: {group.title}"


def _in_required_group(parser: argparse.ArgumentParser, action: argparse.Action) -> bool:
    return any(g.required and action in g._group_actions for g in parser._mutually_exclusive_groups)


@pytest.mark.parametrize("script", STAGES)
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_before_anything_is_installed(script: str, option: str) -> None:
    """-S leaves out site-packages, -E the variables that could name them."""
    path = ["-m", *script.split()] if " " in script else [str(ROOT / script)]
    done = subprocess.run([sys.executable, "-S", "-E", *path, option], cwd=ROOT, capture_output=True, text=True, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("trtdet " if option == "--version" else f"usage: {script} ")


def error_of(script: str, line: str, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> list[str]:  # fmt: skip
    patch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit) as caught:
        STAGES[script].parse_args(line.split())
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("script", "line", "error"),
    [
        ("create_onnx.py", "--saved_modle d", "unknown option --saved_modle: did you mean --saved_model?"),
        ("create_onnx.py", "--saved-model d", "unknown option --saved-model: did you mean --saved_model?"),
        ("create_onnx.py", "--imgsz 640", "unknown option --imgsz: here it is --size H,W"),
        ("build_engine.py", "--num_images 20", "unknown option --num_images: did you mean --calib_num_images?"),
        ("create_onnx.py", "--batch_size 4", "unknown option --batch_size: here it is --input_shape N,H,W,3"),
        ("create_onnx.py", "--conf 0.3", "unknown option --conf: here it is --score_threshold SCORE"),
        ("build_engine.py", "--fp16", "unknown option --fp16: here it is --precision fp16"),
        ("build_engine.py", "--model a --int8", "unknown option --int8: here it is --precision int8 --calib_input DIR"),
        ("build_engine.py", "--saveEngine=x", "unknown option --saveEngine: here it is --engine FILE"),
        ("build_engine.py", "--calib_preprocessor V2", "unknown option --calib_preprocessor: not needed: calibration prepares images as the model says; create_onnx.py --preprocessor overrides that"),
        ("build_engine.py", "-onnx a", "unknown option -onnx: did you mean --onnx?"),
        ("build_engine.py", "--model a --workspace 4096", "argument --workspace/-w: 4096 GiB is more than any GPU has; did you mean MiB? 4096 MiB is --workspace 4"),
        ("infer.py", "--treshold 0.3", "unknown option --treshold: here it is --score_threshold SCORE"),
        ("infer.py", "--int8", "unknown option --int8: that is build_engine.py --precision int8 --calib_input DIR"),
        ("infer.py", "--rec", "unknown option --rec: did you mean --recursive? Names are not shortened"),
        ("infer.py", "--triton grpc://h/m", "unknown option --triton: here it is --model URL"),
        ("infer.py", "--qqq", "unknown option --qqq: infer.py --help lists all"),
        ("infer.py", "--fp16 --qqq", "unknown options --fp16: that is build_engine.py --precision fp16; --qqq: infer.py --help lists all"),
        ("infer.py", "--model a b.jpg", "b.jpg: belongs to no option; write the option before it, as in --input b.jpg"),
        ("infer.py", "--input a.jpg --model a b.jpg", "b.jpg: belongs to no option; several values go behind one option, as in --input a.jpg b.jpg"),
        ("infer.py", "photos --model a", "photos: belongs to no option; write the option before it, as in --input photos"),
        ("create_onnx.py", "--onnx b.onnx a.pt", "a.pt: belongs to no option; write the option before it, as in --saved_model a.pt"),
        ("create_onnx.py", "--saved_model d a.pt", "a.pt: belongs to no option; write the option before it, as in --onnx a.pt"),
        ("build_engine.py", "--model a b.engine", "b.engine: belongs to no option; write the option before it"),
        ("create_onnx.py", "--onnx b.onnx", "missing --saved_model DIR|FILE or --source_onnx FILE"),
        ("infer.py", "--model m --input a --output out.jpg", "--output: expected a folder, out.jpg looks like a picture; did you mean out?"),
        ("visualize.py", "--score_threshold 0.3", "unknown option --score_threshold: here it is --draw_threshold SCORE"),
        ("compare.py", "--conf 0.3", "unknown option --conf: here it is --min_score SCORE"),
        ("compare.py", "--engine a", "unknown option --engine: here it is --candidate MODEL"),
        ("create_onnx.py", "--saved_model d", "missing --onnx FILE"),
        ("infer.py", "--input photos", "missing --model FILE|URL"),
        ("infer.py", "--model m -b 4", "unknown option -b: here it is --batch_size N"),
        ("infer.py", "--device cpu", "unknown option --device: here it is --devices N, and for an ONNX file --provider {cuda,cpu}"),
        ("eval_coco.py", "--output m.json", "unknown option --output: here it is --json FILE, and the page is --report FILE.html"),
        ("compare.py", "--input photos", "missing --reference MODEL, --candidate MODEL"),
        ("infer.py", "model=m source=a", "missing --model FILE|URL; write --NAME VALUE, not model=m"),
        ("create_onnx.py", "--saved_model d --onnx d.engine", "--onnx: an ONNX file, not an engine; write d.onnx, then build_engine.py --engine d.engine"),
        ("deploy.py", "", "give a command: triton, deepstream, trtexec, check, pad_color"),
        ("deploy.py", "trition --model a", "unknown command trition: did you mean triton?"),
        ("deploy.py", "serve", "unknown command serve: expected one of triton, deepstream, trtexec, check, pad_color"),
        ("deploy.py", "--engine x", "give a command before --engine: triton, deepstream, trtexec"),
        ("deploy.py", "--ensemble triton", "give a command before --ensemble: triton"),
        ("deploy.py", "--qqq", "give a command before --qqq: triton, deepstream, trtexec, check, pad_color"),
        ("tune_precision.py", "--max_drop 0.1", "unknown option --max_drop: here it is --max_ap_drop DROP"),
        # of another stage
        ("infer.py", "--model m --font x", "unknown option --font: that is an option of visualize.py"),
        ("infer.py", "--keep_fp16 x", "unknown option --keep_fp16: that is an option of build_engine.py"),
        ("visualize.py", "--precision fp16", "unknown option --precision: that is an option of build_engine.py and deploy.py trtexec"),
        ("visualize.py", "--plugins a.so", "unknown option --plugins: that is an option of build_engine.py, infer.py, eval_coco.py and others"),
        ("infer.py", "--boxes_outptu a", "unknown option --boxes_outptu: did you mean --boxes_output? That is an option of create_onnx.py"),
        # of other programs
        ("infer.py", "--conf_thres 0.3", "unknown option --conf_thres: here it is --score_threshold SCORE"),
        ("visualize.py", "--conf 0.3", "unknown option --conf: here it is --draw_threshold SCORE"),
        ("infer.py", "--confidence 0.3", "unknown option --confidence: here it is --score_threshold SCORE"),
        ("infer.py", "--thres 0.3", "unknown option --thres: here it is --score_threshold SCORE"),
        ("infer.py", "--iou_thres 0.5", "unknown option --iou_thres: that is create_onnx.py --iou_threshold IOU"),
        ("create_onnx.py", "--iou_thres 0.5", "unknown option --iou_thres: here it is --iou_threshold IOU"),
        ("infer.py", "--video a.mp4", "unknown option --video: here it is --input clip.mp4"),
        ("eval_coco.py", "--video a.mp4", "unknown option --video: that is infer.py --input clip.mp4"),
        ("eval_coco.py", "--gt a.json", "unknown option --gt: here it is --annotations FILE"),
        ("build_engine.py", "--fp 16", "unknown option --fp: here it is --precision fp16 or fp32"),
        ("build_engine.py", "--quantize", "unknown option --quantize: here it is --precision int8 --calib_input DIR"),
        ("create_onnx.py", "--input a.onnx", "unknown option --input: here it is --source_onnx FILE, or --saved_model DIR"),
        ("build_engine.py", "--input a", "unknown option --input: here it is --calib_input DIR for images, and --model FILE for the model"),
        ("visualize.py", "--model a", "unknown option --model: here it is --detections DIR, the TSVs of infer.py: no model is needed"),
        ("compare.py", "--model a", "unknown option --model: here it is --candidate MODEL"),
        ("trtdet doctor", "--model a", "unknown option --model: not needed: this reads no model"),
        # like none
        ("infer.py", "--optimize", "unknown option --optimize: infer.py --help lists all"),
        ("infer.py", "--memory 4", "unknown option --memory: infer.py --help lists all"),
        ("infer.py", "--int4", "unknown option --int4: infer.py --help lists all"),
        ("infer.py", "--formats x", "unknown option --formats: infer.py --help lists all"),
    ],
)  # fmt: skip
def test_unknown_options(
    script: str,
    line: str,
    error: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage, found = error_of(script, line, capsys, monkeypatch)
    assert usage.startswith(f"usage: {script} ") and len(usage) < 160
    assert found == f"{script}: error: {error}"


def test_a_sub_command_shows_its_own_usage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, error = error_of("deploy.py", "triton --model a --gpus 0", capsys, monkeypatch)
    assert usage == "usage: deploy.py triton --model FILE --output DIR --name NAME [options] (--help lists the options)"  # fmt: skip
    assert error == "deploy.py triton: error: unknown option --gpus: here it is --devices N,..."
    usage, error = error_of("deploy.py", "check models", capsys, monkeypatch)
    assert usage.startswith("usage: deploy.py check --output DIR")
    assert error == "deploy.py check: error: models: belongs to no option; write the option before it, as in --output models"  # fmt: skip
    assert error_of("deploy.py", "check --model a", capsys, monkeypatch)[1] == "deploy.py check: error: unknown option --model: not needed: this reads no model"  # fmt: skip


@pytest.mark.parametrize(
    ("script", "line", "advice"),
    [
        ("infer.py", "--model m --benchmark", "; a smaller --batch_size or --size, or fewer --workers or --contexts, needs less"),
        ("image_batcher.py", "--model m --input a --output b", "; a smaller --batch_size or --size, or fewer --workers, needs less"),
        ("create_onnx.py", "--saved_model d --onnx o", "; a smaller --size needs less"),
        ("build_engine.py", "--model a --engine b", "; a smaller --batch_size or --calib_batch_size or --size needs less"),
        ("deploy.py", "triton --model a --output b --name n", "; a smaller --batch_size needs less"),
        ("deploy.py", "check --output b", ""),
        ("visualize.py", "--input a --detections b --output c", ""),
    ],
)  # fmt: skip
def test_lack_of_memory_names_options_that_the_stage_has(
    script: str, line: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    STAGES[script].parse_args(line.split())

    def run() -> int:
        raise MemoryError("9 GiB")

    assert cli.run_main(run) == 1
    assert capsys.readouterr().err == f"error: not enough memory (9 GiB){advice}\n"


def test_options_of_other_stages_are_those_of_their_parsers(
    parsers: dict[str, cli.ArgumentParser],
) -> None:
    assert tuple(STAGES) == tuple("trtdet doctor" if s == "doctor" else f"{s}.py" for s in ALL_STAGES)  # fmt: skip
    found = options_everywhere()
    assert len(found) > 120
    for option, programs in found.items():
        having = [p for p, made in parsers.items() if option in made._option_string_actions and p != "deploy.py"]  # fmt: skip
        assert sorted(programs) == sorted(having), option


def test_habits_lead_to_options_that_exist(parsers: dict[str, cli.ArgumentParser]) -> None:
    known = {prog: set(parser._option_string_actions) for prog, parser in parsers.items()}
    every = set().union(*known.values())
    for habit, ways in HABITS.items():
        assert habit == plain(habit), habit
        for way in ways.split(" | "):
            if way.startswith("--"):
                assert way.split()[0] in every, f"{habit}: {way}"
        for prog, option in re.findall(r"((?:deploy\.py )?(?:trtexec|\w+\.py)) (--\w+)", ways):
            assert option in known[prog], f"{habit}: {prog} {option}"


@pytest.mark.parametrize(
    ("text", "size"),
    [("512,640", (512, 640)), ("512x640", (512, 640)), ("512", (512, 512))],
)
def test_sizes(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "512,", "-1", "1,2,3", "512*512", "512x640x3"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected H,W or HxW, height first, or one number for a square, got"):  # fmt: skip
        parse_size(text)


def test_ranges() -> None:
    assert parse_batch("8") == BatchRange(8, 8, 8)
    assert parse_batch("1:4:8") == parse_batch("1,4,8") == BatchRange(1, 4, 8)
    square = SizeRange((320, 320), (640, 640), (1280, 1280))
    assert parse_sizes("320:640:1280") == parse_sizes("320,640,1280") == square
    wide = SizeRange((320, 416), (640, 640), (1280, 1280))
    assert parse_sizes("320x416:640:1280") == parse_sizes("320,416:640:1280,1280") == wide
    assert parse_sizes("320,416") == SizeRange((320, 416), (320, 416), (320, 416))
    for text in ("1:4", "1,4", "4:1:8", "1:4:8:9", "0", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="expected N or MIN:OPT:MAX"):
            parse_batch(text)
    for text in ("320:640", "640:320:1280", "320,640,1280,1"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected SIZE or MIN:OPT:MAX"):
            parse_sizes(text)


def test_workspace_in_mib() -> None:
    assert parse_gib("8") == 8 and parse_gib("288") == 288
    with pytest.raises(argparse.ArgumentTypeError, match=r"did you mean MiB\? 1536 MiB is --workspace 1.5"):  # fmt: skip
        parse_gib("1536")
    for text in ("0", "-1", "inf", "nan", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a size in GiB above 0"):
            parse_gib(text)


def test_the_model_is_a_file_or_a_url() -> None:
    given = infer.parse_args(["--model", "http://h/m", "--benchmark"]).engine
    assert (given.scheme, given.address, given.model) == ("http", "h:8000", "m")
    assert infer.parse_args(["--engine", "a.onnx", "--benchmark"]).engine == Path("a.onnx")


def test_triton_sorts_its_models() -> None:
    args = deploy.parse_args(["triton", "--model", "a.engine", "b.onnx", "--engine", "c.plan", "--output", "o", "--name", "n"])  # fmt: skip
    assert (args.engines, args.onnx) == ([Path("a.engine"), Path("c.plan")], Path("b.onnx"))
