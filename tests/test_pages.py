# SPDX-License-Identifier: Apache-2.0
"""Pages for people in trouble, or on their way here: what they quote is what the program says, and
each stage has the options that they advise.

`test_docs.py` runs their commands.
"""

import ast
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_imports import SCRIPTS

from trtdet.commands import cli

PAGES = [ROOT / "docs" / f"{name}.md" for name in ("troubleshooting", "migrating", "models")]
TROUBLE = PAGES[0]


def ours(line: str) -> list[str] | None:
    """The words of a command of this project, its stage first; None for another's."""
    if line.count("'") % 2:
        return None
    words = shlex.split(line)
    if words[:3] == ["python", "-m", "trtdet"]:
        return words[3:]
    if words[:1] == ["python"]:
        words = words[1:]
    stage = words[0].removesuffix(".py") if words else ""
    return [stage, *words[1:]] if stage in SCRIPTS and words[0].endswith(".py") else None


def inline(text: str) -> list[str]:
    """Inline code outside blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def options_of(stage: str, command: str = "") -> set[str]:
    """The options of a stage, or of one of its commands."""
    module: Any = import_module(f"trtdet.commands.{stage}")
    caught: list[cli.ArgumentParser] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cli.ArgumentParser, "parse_args", lambda self, *_: caught.append(self) or 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            module.parse_args([])
    (parser,) = caught
    if command:
        assert parser._commands is not None
        parser = parser._commands.choices[command]
    return set(parser._option_string_actions)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_options_in_the_text_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page.stem == "migrating":  # the left column is other tools'
        rows = [line.split("|") for line in text.splitlines() if line.startswith("|")]
        text = "\n".join(row[2] for row in rows)
    known = set().union(*(options_of(stage) for stage in SCRIPTS if stage != "deploy"))
    known |= set().union(*(options_of("deploy", c) for c in ("triton", "deepstream", "trtexec", "check")))  # fmt: skip
    checked = 0
    for code in inline(text):
        words = ours(code)
        options = [word.partition("=")[0] for word in code.split() if word.startswith("--")]
        if words is not None:
            stage, *rest = words
            commands = [word for word in rest[:1] if stage == "deploy"]
            missing = set(options) - options_of(stage, *commands)
        elif code.startswith("--"):
            missing = set(options) - known
        else:
            continue
        assert not missing - FOREIGN, f"{code}: {missing}"
        checked += len(options)
    assert checked >= (3 if page.stem == "models" else 25)


#: Options of other programs that stand alone in the text.
FOREIGN = {"--grid", "--ckpt_path", "--hparams", "--min_score_thresh", "--batch_size"}


def test_quoted_messages_are_the_programs() -> None:
    """Of the left column, what is code is in the source, piece by piece between the names and
    numbers.
    """
    constants = []
    for path in sorted((ROOT / "trtdet").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                constants.append(" ".join(node.value.split()))
    rows = [line.split(" | ") for line in TROUBLE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]  # fmt: skip
    quoted = [row[0].split("`")[1] for row in rows]
    checked = 0
    for message in quoted:
        if "AttributeError" in message:  # another program's
            continue
        for piece in message.split("…"):
            words = piece.strip(" ,'")
            if words:
                assert any(words in constant for constant in constants), message
                checked += 1
    assert checked >= 25


def test_forms_for_issues() -> None:
    """They ask for what the program writes, in the form that GitHub takes."""
    yaml = pytest.importorskip("yaml")
    for name in ("bug", "gpu"):
        form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
        assert form["name"] and form["description"]
        fields = {item["id"]: item for item in form["body"] if item["type"] != "markdown"}
        assert len(fields) == len(form["body"]) - 1
        assert all(item["type"] in ("textarea", "input") and item["attributes"]["label"] for item in fields.values())  # fmt: skip
        wanted = {"bug": "doctor", "gpu": "report"}[name]
        assert fields[wanted]["validations"] == {"required": True}
        for item in fields.values():
            for code in inline(item["attributes"].get("description", "")):
                words = ours(code if code.startswith("python") else f"python {code}")
                if words is not None:
                    import_module(f"trtdet.commands.{words[0]}").parse_args(words[1:])


def test_the_notice_names_files_that_are_there() -> None:
    names = [line for line in (ROOT / "NOTICE").read_text().splitlines() if re.match(r"(trtdet|examples|tests)/", line)]  # fmt: skip
    assert len(names) >= 7
    for line in names:
        first = line.split(",")[0]
        assert list(ROOT.glob(first)), first
