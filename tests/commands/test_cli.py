# SPDX-License-Identifier: Apache-2.0
"""What the scripts share at the border, `trtdet.commands.cli` and `trtdet.files`; and their
options for files that are not there.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from PIL import Image

from trtdet import files
from trtdet.commands import cli, create_onnx, eval_coco, infer, visualize
from trtdet.commands.cli import run_main
from trtdet.errors import EngineError

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")


def raises(error: BaseException) -> Callable[[], int]:
    def run() -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "status", "message"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (raises(EngineError("two\n  lines")), 1, "error: two lines\n"),
        (raises(OSError()), 1, "error: OSError\n"),
        (
            raises(FileNotFoundError(2, "No such file or directory", "a.json")),
            1,
            "error: a.json: no such file or directory\n",
        ),
        (
            raises(ValueError("--output: [Errno 28] No space left on device")),
            1,
            "error: --output: No space left on device\n",
        ),
        (raises(KeyboardInterrupt()), 130, "interrupted\n"),
    ],
)
def test_exit_status(run: Callable[[], int], status: int, message: str, capsys: Any) -> None:
    assert run_main(run) == status
    assert capsys.readouterr().err == message


@posix
def test_sigterm_cleans_up(tmp_path: Path, capsys: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def run() -> None:
        with files.atomic_path(tmp_path / "a.txt"):
            signal.raise_signal(signal.SIGTERM)

    assert run_main(run) == 143
    assert capsys.readouterr().err == "terminated\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


@posix
@pytest.mark.parametrize("interrupt", [signal.SIG_IGN, signal.SIG_DFL])
def test_sigterm_ends_a_background_job(interrupt: Any) -> None:
    """A shell starts those with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        assert run_main(lambda: signal.raise_signal(signal.SIGTERM)) == 143
    finally:
        signal.signal(signal.SIGINT, before)


@posix
def test_sigterm_does_what_ctrl_c_does_at_that_moment() -> None:
    """As while TensorRT builds, where an exception would end the process."""
    seen = []

    def run() -> int:
        before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
        try:
            signal.raise_signal(signal.SIGTERM)
            raise KeyboardInterrupt  # what the builder makes of it
        finally:
            signal.signal(signal.SIGINT, before)

    assert run_main(run) == 143
    assert seen == [signal.SIGINT]


def test_run_main_in_another_thread() -> None:
    status: list[int] = []
    thread = threading.Thread(target=lambda: status.append(run_main(lambda: 3)))
    thread.start()
    thread.join()
    assert status == [3]


def test_check_input(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^--x: expected a file of x, found a folder at "):  # fmt: skip
        files.check_input(tmp_path, "--x", "a file of x")
    with pytest.raises(FileNotFoundError, match=r"^--x: expected a file of x, found nothing at "):
        files.check_input(tmp_path / "no", "--x", "a file of x")
    (tmp_path / "yes").write_text("")
    files.check_input(tmp_path / "yes", "--x", "a file of x")


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (infer, "-e m.onnx -i in -o out --labels no.txt", "--labels: expected a text file with one class name per line, or the word coco, found nothing at no.txt"),
        (infer, "-e m.onnx -i in -o out --annotations no.json", "--annotations: expected COCO annotations, such as instances_val2017.json, found nothing at no.json"),
        (eval_coco, "-e m.onnx -i in -a no.json", "--annotations: expected COCO annotations"),
        (eval_coco, "--detections no.json -a yes.json", "--detections: expected detections in COCO's results format, such as infer.py's detections.json, found nothing at no.json"),
        (visualize, "--input in --detections in -o out --labels no.txt", "--labels: expected a text file"),
        (visualize, "--input in --detections in -o out --annotations in", "--annotations: expected COCO annotations, such as instances_val2017.json, found a folder at in"),
        (visualize, "--input in --detections no -o out", "--detections: expected a folder with TSVs of infer.py, found nothing at no"),
    ],
)  # fmt: skip
def test_files_that_are_missing_are_named(
    script: Any,
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "yes.json").write_text("{}")
    assert script.main(arguments.split()) == 1
    (line,) = capsys.readouterr().err.splitlines()  # one error, whatever the number of images
    assert line.startswith(f"error: {message}")


def test_control_characters_of_names_do_not_reach_the_terminal(capsys: Any) -> None:
    def fail() -> None:
        cli.logger.warning("skipped: %s", "a\x1b[2Jb\nE c.jpg")
        raise ValueError("\x1b]0;title\x07.png: no image")

    cli.setup_logging()
    assert run_main(fail) == 1
    assert (
        capsys.readouterr().err
        == "W skipped: a\\x1b[2Jb\\nE c.jpg\nerror: \\x1b]0;title\\x07.png: no image\n"
    )


@pytest.mark.parametrize(
    ("script", "arguments", "package"),
    [
        ("infer", ["--engine", "a.onnx", "--input", "photos", "--output", "found"], "cv2|numpy"),
        ("create_onnx", ["--source_onnx", "a.onnx", "--onnx", "b.onnx"], "numpy|onnx"),
        ("eval_coco", ["--detections", "d.json", "--annotations", "a.json"], "numpy"),
    ],
)
def test_a_missing_package_is_one_line(script: str, arguments: list[str], package: str) -> None:
    """-S leaves site-packages out, as before anything is installed."""
    command = [sys.executable, "-S", "-E", str(ROOT / f"{script}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    line = rf"error: the Python package ({package}) is not installed here; activate .*\.venv/bin/activate.*requirements\.txt; 'python -m trtdet doctor' shows what is here\n"
    assert re.fullmatch(line, done.stderr), done.stderr


def test_a_closed_stderr_is_no_error(tmp_path: Path) -> None:
    """Nothing that is opened later gets its number, and the status says what happened."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    script = f"exec '{sys.executable}' '{ROOT / 'image_batcher.py'}' --size 8,8 --input '{tmp_path / 'a.png'}' --output '{tmp_path / 'seen'}' 2>&- 0<&-"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == str(tmp_path / "seen")
    assert (tmp_path / "seen" / "a.png").is_file()


def test_the_parser_knows_which_options_were_given() -> None:
    """Defaults that are given count, under whichever name; those that are not do not, lists
    among them.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("source", nargs="?")
    parser.add_argument("-t", "--score_threshold", "--nms_threshold", type=float, default=0.5)
    parser.add_argument("--mode", choices=["model", "other"], default="model")
    parser.add_argument("--map", action="append", default=[])
    parser.add_argument("--quiet", action="store_true")
    for words, given in (
        ([], set()),
        (["--mode", "model"], {"mode"}),
        (["--nms_threshold", "0.5", "--quiet", "a"], {"score_threshold", "quiet", "source"}),
        (["--map", "x", "--map", "y", "-t=0.1"], {"map", "score_threshold"}),
    ):
        args, found = cli.parse_given(parser, words)
        assert found == given
        assert vars(args) == vars(parser.parse_args(words))  # the defaults are back


def test_create_onnx_hands_on_what_was_given() -> None:
    words = ["--source_onnx", "a", "--onnx", "b", "--nms_mode", "model", "--iou_threshold", "0.5"]
    options = create_onnx.options_from(create_onnx.parse_args(words))
    assert options.given == {"source_onnx", "onnx", "nms_mode", "iou_threshold"}
