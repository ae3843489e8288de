# SPDX-License-Identifier: Apache-2.0
"""README and docs as the tests of them read them: blocks of code, the commands in them, prose,
links; and all parsers of the product.

The first line of a bash block says how it is tested: `# needs a GPU` (or anything else) only parses
its commands, `# takes minutes` makes it a slow test. CONTRIBUTING.md tells authors the same.
"""

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT
from test_imports import SCRIPTS

CHINESE = ROOT / "README.zh-CN.md"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        line: of the fence, counted from 1.
    """

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def first_line(self) -> str:
        return self.text.partition("\n")[0]

    @property
    def is_parsed_only(self) -> bool:
        return self.first_line.startswith("# needs ")

    @property
    def is_slow(self) -> bool:
        return self.first_line.startswith("# takes ")

    @property
    def commands(self) -> list[str]:
        """One string each, continued lines put together, comments left out."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        words = [shlex.split(line, comments=True) for line in lines]
        return [shlex.join(some) for some in words if some]


def blocks(page: Path) -> list[Block]:
    """All fenced blocks, those in lists and quotations too."""
    found: list[Block] = []
    begin, language, indent = 0, "", 0
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not (fence := re.match(r"([\s>]*)```(.*)$", line)):
            continue
        if begin:
            text = "\n".join(x[indent:] for x in lines[begin : number - 1])
            found.append(Block(page, begin, language, text))
            begin = 0
        else:
            begin, language, indent = number, fence[2].strip(), len(fence[1])
    assert not begin, f"{page.name}:{begin}: a block that does not end"
    return found


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Line number and line of everything but blocks of code."""
    inside = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if re.match(r"[\s>]*```", line):
            inside = not inside
        elif not inside:
            yield number, line


def inline_commands(page: Path) -> list[str]:
    """Whole commands in the text and in tables."""
    text = " ".join(line.strip() for _, line in prose(page))
    return [span for span in re.findall(r"`([^`]+)`", text) if re.match(r"(python|bash) \S", span)]


def anchors(page: Path) -> set[str]:
    """What a link can end in: the headings as GitHub writes them."""
    titles = [line.lstrip("#") for _, line in prose(page) if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", t.strip().lower()).replace(" ", "-") for t in titles}


class _Made(Exception):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that a stage makes."""

    def give(parser: argparse.ArgumentParser, *arguments: object) -> None:
        raise _Made(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", give)
        try:
            importlib.import_module(f"trtdet.commands.{script}").parse_args([])
        except _Made as made:
            return made.parser
    raise AssertionError(f"{script}.parse_args does not parse")


def all_parsers() -> dict[str, argparse.ArgumentParser]:
    """Name -> parser of every stage, and of every sub-command of one."""
    found: dict[str, argparse.ArgumentParser] = {}
    for script in (Path(name).stem for name in SCRIPTS):
        found[script] = parser = parser_of(script)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= {f"{script} {name}": sub for name, sub in action.choices.items()}
    return found
