# SPDX-License-Identifier: Apache-2.0
"""The stages by name, and their options without running them."""

import argparse
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from importlib import import_module

#: Stage -> what it does. Each is a module of this package, imported when it is called.
STAGES = {
    "create_onnx": "convert a trained model to an ONNX file that ends in NMS",
    "build_engine": "build a TensorRT engine from that ONNX file",
    "infer": "find objects in images: pictures and TSV files",
    "eval_coco": "measure mAP on images with COCO annotations",
    "compare": "compare two forms of a model, such as FP32 and INT8",
    "tune_precision": "find the convolutions that must stay in FP16 with INT8",
    "deploy": "write files for Triton or DeepStream, or the trtexec command",
    "image_batcher": "show images as the network gets them",
    "visualize": "draw existing TSV files into pictures",
    "doctor": "check what works on this machine, and what is missing",
}

_wanted: ContextVar[bool] = ContextVar("_wanted", default=False)


class _ParserMade(Exception):
    """Carries a parser out of the stage that made it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def hand_over(parser: argparse.ArgumentParser) -> None:
    """To be called before a command line is parsed: `options_everywhere` wants only the parser."""
    if _wanted.get():
        raise _ParserMade(parser)


def _parser_of(stage: str) -> argparse.ArgumentParser:
    token = _wanted.set(True)
    try:
        import_module(f"trtdet.commands.{stage}").parse_args([])
    except _ParserMade as made:
        return made.parser
    finally:
        _wanted.reset(token)
    raise AssertionError(f"{stage} parses nothing")


def _programs() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every stage, and every command of deploy.py, by the name that it is called by."""
    for stage in STAGES:
        parser = _parser_of(stage)
        commands = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        name = "trtdet doctor" if stage == "doctor" else f"{stage}.py"
        for action in commands:
            yield from ((f"{name} {command}", sub) for command, sub in action.choices.items())
        if not commands:
            yield name, parser


@cache
def options_everywhere() -> dict[str, tuple[str, ...]]:
    """Option -> the programs that have it."""
    found: dict[str, list[str]] = {}
    for program, parser in _programs():
        for option in parser._option_string_actions:
            if option.startswith("--"):
                found.setdefault(option, []).append(program)
    return {option: tuple(programs) for option, programs in found.items()}
