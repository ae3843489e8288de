# SPDX-License-Identifier: Apache-2.0
"""README and docs: their commands run, their links and options exist, their prose keeps to the
house's terms.

`STAND_INS` has the small models and pictures that stand for those that the pages name.
"""

import argparse
import ast
import importlib
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import deploy_models
import odtk_network
import onnx
import pytest
import yolo_networks
from conftest import EXAMPLES, ROOT
from pages import CHINESE, PAGES, Block, all_parsers, anchors, blocks, inline_commands, prose
from test_imports import ONLY_STAGES, SCRIPTS

from trtdet.commands import build_engine
from trtdet.commands import main as entry
from trtdet.spec import ModelSpec

BLOCKS = [block for page in PAGES for block in blocks(page)]
INLINE = [(page, command) for page in PAGES for command in inline_commands(page)]
STAGES = (*(Path(name).stem for name in SCRIPTS), *ONLY_STAGES)

#: Where the code is.
ROOMS = ("trtdet", "tests", "benchmarks", "examples", "scripts")

#: First words of commands that are not of this project: not run.
FOREIGN = (
    "docker",
    "make",
    "tritonserver",
    "trtexec",
    "git",
    "cd",
    ".",
    "source",
    "ray",
    "wget",
    "tar",
    "env",
    "pip",
    "odtk",
    "yolo",
)
#: Scripts of other projects that make a model.
OTHER_SCRIPTS = ("object_detection/exporter_main_v2.py", "export_onnx.py")
#: Commands that run tests or change the environment.
NOT_RUN = (
    "bash tests/run.sh",
    "bash examples/gpu.sh",
    "python -m pytest",
    "python -m venv",
    ".venv/bin/ruff",
)

TRTEXEC_LOG = "[11/21/2026-07:00:00] [I] === Performance summary ===\n" + "".join(
    f"[11/21/2026-07:00:00] [I] {line}\n"
    for line in (
        "Throughput: 412.5 qps",
        *(
            f"{name}: min = 2 ms, max = 3 ms, mean = 2.4 ms, median = 2.4 ms, percentile(90%) = 2.5 ms, percentile(95%) = 2.6 ms, percentile(99%) = 2.9 ms"
            for name in (
                "Latency",
                "Enqueue Time",
                "H2D Latency",
                "GPU Compute Time",
                "D2H Latency",
            )
        ),
        "Total Host Walltime: 0.484848 s",
        "Total GPU Compute Time: 0.44 s",
    )
)


def copy_images(chosen: slice) -> Callable[[Path, Path], object]:
    def copy(path: Path, tiny: Path) -> None:
        path.mkdir()
        for image in sorted((EXAMPLES / "images").iterdir())[chosen]:
            shutil.copy(image, path)

    return copy


def save(model: Callable[[], onnx.ModelProto]) -> Callable[[Path, Path], object]:
    return lambda path, tiny: onnx.save(model(), path)


def round_to_fp16(path: Path, tiny: Path) -> None:
    options = ["--save_onnx", str(path), "--precision", "fp16"]
    assert build_engine.main(["--model", str(tiny), *options]) == 0


def make_engine(path: Path, tiny: Path) -> None:
    deploy_models.make_engine(path, ModelSpec.from_onnx(onnx.load(tiny)))


#: What the pages name -> what makes its stand-in, of a path and examples/tiny_shapes as an ONNX
#: file.
STAND_INS: dict[str, Callable[[Path, Path], object]] = {
    "efficientdet-d0": lambda path, tiny: shutil.copytree(EXAMPLES / "tiny_shapes", path),
    "d0.onnx": lambda path, tiny: shutil.copy(tiny, path),
    "d0_fp16.onnx": round_to_fp16,
    "d0.engine": make_engine,
    "yolov8n.onnx": save(yolo_networks.v8),
    "retinanet.onnx": save(odtk_network.odtk_model),
    "mydet.onnx": save(yolo_networks.v8),
    "photos": copy_images(slice(0, 6)),
    "photo.jpg": lambda path, tiny: shutil.copy(EXAMPLES / "images" / "shapes_val_000.png", path),
    "val": copy_images(slice(6, 12)),
    "val.json": lambda path, tiny: shutil.copy(EXAMPLES / "annotations.json", path),
    "val2017": copy_images(slice(0, 12)),
    "instances_val2017.json": lambda path, tiny: shutil.copy(EXAMPLES / "annotations.json", path),
    "trtexec.log": lambda path, tiny: path.write_text(TRTEXEC_LOG),
    "examples": lambda path, tiny: shutil.copytree(EXAMPLES, path, ignore=shutil.ignore_patterns("out")),
}  # fmt: skip

#: Options of other programs that look like ours.
OTHERS = {
    "--calib",
    "--fp16",
    "--int8",
    "--grid",
    "--ipc",
    "--ckpt_path",
    "--hparams",
    "--min_score_thresh",
    "--gpus",
}


class Folder:
    """Where the commands run: on every page the stand-ins as they were, and what earlier
    commands wrote beside them.
    """

    def __init__(self, path: Path, tiny: Path) -> None:
        self.path, self._stock = path / "reader", path / "stock"
        for folder in (self.path, self._stock):
            folder.mkdir()
        for name, make in STAND_INS.items():
            make(self._stock / name, tiny)
        self._page: Path | None = None

    def open(self, page: Path) -> Path:
        if page != self._page:
            self._page = page
            for path in self._stock.iterdir():  # an engine has its .json beside it
                replace(path, self.path / path.name)
        return self.path


def replace(source: Path, target: Path) -> None:
    """Put a copy of a file or folder where another may be."""
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


@pytest.fixture(scope="module")
def folder(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("docs"), tiny_onnx)


@pytest.fixture(scope="module")
def done() -> set[str]:
    """Commands that have been run: pages repeat some."""
    return set()


def stage_of(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """The stage and its arguments, for `python infer.py ...`, `trtdet infer ...` and `python -m
    trtdet infer ...`.
    """
    if words[0] == "python" and words[1].removesuffix(".py") in STAGES:
        return words[1].removesuffix(".py"), list(words[2:])
    begin = 1 if words[0] == "trtdet" else 3 if list(words[:3]) == ["python", "-m", "trtdet"] else 0
    if begin and len(words) > begin and words[begin] in STAGES:
        return words[begin], list(words[begin + 1 :])
    return None


def run(command: str) -> None:
    """Run one command of a page in the current folder; its exit status must be 0."""
    words = shlex.split(command)
    if stage := stage_of(words):
        name, arguments = stage
        if "efficientdet-d0" in arguments or "--saved_model" in arguments:
            pytest.importorskip("tensorflow", reason="needs requirements-tensorflow.txt")
        if "tensorrt_rtx" in arguments:
            pytest.importorskip("tensorrt_rtx", reason="needs requirements-rtx.txt")
        try:
            status = importlib.import_module(f"trtdet.commands.{name}").main(arguments)
        except SystemExit as stopped:  # --help
            status = stopped.code
        assert status == 0, command
    elif words[0] == "trtdet":
        with pytest.raises(SystemExit) as stopped:
            entry.main(words[1:])
        assert stopped.value.code == 0, command
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        subprocess.run([sys.executable, ROOT / words[1], *words[2:]], check=True)
    elif words == ["bash", "examples/run.sh"]:
        run_example()
    elif "pip" in words[:3] and "install" in words:
        named = [words[i + 1] for i, word in enumerate(words) if word == "-r"]
        assert [name for name in named if not (ROOT / name).is_file()] == [], command
    else:
        assert words[0] in FOREIGN or command.startswith(NOT_RUN), (
            f"{command}: unknown to this test"
        )


def run_example() -> None:
    """The steps of examples/run.sh, without the environment that it makes first."""
    script = (ROOT / "examples" / "run.sh").read_text()
    steps = re.findall(r"^step (python .*)$", script.replace("$out", "examples/out"), re.M)
    assert len(steps) >= 4
    for step in steps:
        run(step)


def parse(command: str) -> None:
    """Parse the options of a command that cannot be run here, in a folder that has all files it
    names.
    """
    words = shlex.split(command)
    if stage := stage_of(words):
        name, arguments = stage
        for word in arguments:
            if re.fullmatch(r"[\w-]+\.[a-z]\w*", word):
                Path(word).touch()
        importlib.import_module(f"trtdet.commands.{name}").parse_args(arguments)
    elif words[:1] in (["python"], ["bash"]) and words[1].startswith("benchmarks/"):
        assert (ROOT / words[1]).is_file(), command
    elif words[:1] == ["python"] and words[1] in OTHER_SCRIPTS:
        pass
    else:
        assert words[0] in FOREIGN or command.startswith(NOT_RUN), (
            f"{command}: unknown to this test"
        )


def marked(block: Block) -> object:
    return pytest.param(block, id=block.name, marks=[pytest.mark.slow] if block.is_slow else [])


@pytest.mark.parametrize(
    "block",
    [marked(b) for b in BLOCKS if b.language == "bash" and not b.is_parsed_only],
)
def test_commands_run(
    block: Block, folder: Folder, done: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.open(block.page))
    assert block.commands, f"{block.name}: no command"
    for command in block.commands:
        if command not in done:
            run(command)
            done.add(command)


@pytest.mark.parametrize(
    ("page", "command"), [pytest.param(p, c, id=f"{p.name}: {c[:60]}") for p, c in INLINE]
)
def test_commands_in_the_text_run(
    page: Path, command: str, folder: Folder, done: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine is built and run on a GPU only: the build is parsed, the rest takes the ONNX
    file in its place.
    """
    monkeypatch.chdir(folder.open(page))
    parse(command)
    command = command.replace("d0.engine", "d0.onnx")
    if "build_engine.py" not in command and command not in done:
        run(command)
        done.add(command)


@pytest.mark.parametrize("block", [marked(b) for b in BLOCKS if b.is_parsed_only])
def test_commands_that_need_more_have_options_that_exist(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if block.language == "python":
        compile(block.text, block.name, "exec")
        return
    assert block.language == "bash", f"{block.name}: expected a bash or python block"
    assert block.commands, f"{block.name}: no command"
    for command in block.commands:
        parse(command)


@pytest.mark.parametrize(
    "block", [marked(b) for b in BLOCKS if b.language == "python" and not b.is_parsed_only]
)
def test_python_runs(block: Block, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.open(block.page))
    exec(compile(block.text, block.name, "exec"), {"__name__": "page"})


def test_blocks_say_what_they_are() -> None:
    """`bash` and `python` are run; what is not is `text`."""
    assert {block.language for block in BLOCKS} == {"bash", "python", "text"}
    assert [b.name for b in BLOCKS if b.language == "text" and "python " in b.text] == []


def test_a_command_that_is_wrong_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("python infer.py --model d0.engine --treshold 0.4", "python build_engine.py"):
        with pytest.raises(SystemExit):
            parse(command)
    with pytest.raises(AssertionError, match="unknown to this test"):
        parse("curl -O d0.onnx")
    capsys.readouterr()


@pytest.mark.skipif(not CHINESE.is_file(), reason="README.zh-CN.md is not there")
def test_chinese_readme_has_the_commands_and_links_of_the_english_one() -> None:
    english, chinese = (
        [(b.language, c) for b in blocks(page) if b.language == "bash" for c in b.commands]
        for page in (PAGES[0], CHINESE)
    )
    assert chinese == english
    assert inline_commands(CHINESE) == inline_commands(PAGES[0])
    conditions = [
        [b.is_parsed_only for b in blocks(page) if b.language == "bash"]
        for page in (PAGES[0], CHINESE)
    ]
    assert conditions[0] == conditions[1]
    assert links_of(CHINESE) - {"README.md"} == links_of(PAGES[0]) - {CHINESE.name}


ALL_PAGES = [page for page in (*PAGES, CHINESE) if page.is_file()]


def links_of(page: Path) -> set[str]:
    text = "\n".join(line for _, line in prose(page))
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return set(found)


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links_of(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def test_options_named_in_prose_exist() -> None:
    known = set().union(*map(options_of, all_parsers().values()))
    assert len(known) > 100
    others = [
        *(ROOT / "benchmarks").glob("*.py"),
        ROOT / "tests" / "conftest.py",
    ]  # and pytest's own
    known |= set(re.findall(r'"(--[a-z_]+)"', "".join(path.read_text() for path in others)))
    wrong = []
    for page in ALL_PAGES:
        for number, line in prose(page):
            for span in re.findall(r"`([^`]+)`", line):
                for option in re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", span):
                    # Ours are in small letters with underscores; a hyphen or a capital is another
                    # program's.
                    other = "-" in option[2:] or option.lower() != option or option in OTHERS
                    if not other and option not in known:
                        wrong.append(f"{page.name}:{number}: {option}")
    assert wrong == []


def columns(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


def test_prose_is_at_most_100_columns_wide() -> None:
    """But for tables and lines with a link."""
    wrong = [
        f"{page.name}:{number}: {columns(line)}"
        for page in (*ALL_PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md")
        for number, line in prose(page)
        if columns(line) > 100 and not line.lstrip("> ").startswith("|") and "](" not in line
    ]
    assert wrong == []


def test_docstrings_and_comments_are_at_most_100_columns_wide() -> None:
    """But for tables, and what stands behind code."""
    wrong = []
    for path in (*ROOT.glob("*.py"), *(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        looked_at = {i for i, line in enumerate(lines, 1) if line.lstrip().startswith("#")}
        for node in ast.walk(ast.parse(text)):
            value = node.value if isinstance(node, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                looked_at.update(range(node.lineno, (node.end_lineno or 0) + 1))
        wrong += [
            f"{path.relative_to(ROOT)}:{number}"
            for number in sorted(looked_at)
            if len(lines[number - 1]) > 100 and not lines[number - 1].lstrip().startswith("|")
        ]
    assert wrong == []


#: What this field calls otherwise: rotated boxes; dynamic size, batch, dimension.
WRONG_TERMS = re.compile(
    r"\bturned box|\bfree (input )?(size|batch|dimension)|\b(size|batch|dimension) is free", re.I
)


def test_terms_of_pages_and_help() -> None:
    wrong = [
        f"{page.name}:{number}: {line}"
        for page in (*ALL_PAGES, ROOT / "CHANGELOG.md")
        for number, line in prose(page)
        if WRONG_TERMS.search(line)
    ]
    for name, parser in all_parsers().items():
        wrong += [
            f"{name} --help: {term[0]}" for term in WRONG_TERMS.finditer(parser.format_help())
        ]
    assert wrong == []


def test_terms_of_messages() -> None:
    """Every string in the code, docstrings included."""
    wrong = []
    for path in sorted((ROOT / "trtdet").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = " ".join(node.value.split())
                wrong += [
                    f"{path.relative_to(ROOT)}:{node.lineno}: {term[0]}"
                    for term in WRONG_TERMS.finditer(text)
                ]
    assert wrong == []
