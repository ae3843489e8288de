# SPDX-License-Identifier: Apache-2.0
"""The names and arguments of TensorRT's Python bindings, version by version: facts read off their
C++ sources.

    python tests/tools/tensorrt_names.py CHECKOUT_OF_NVIDIA_TENSORRT >
    tests/tools/tensorrt_names.tsv

No TensorRT can be imported without its GPU libraries, and type stubs exist for one version. A line
of the table is a name, its arguments where it has some, and the versions that have it so:

    IBuilderConfig.set_timing_cache(cache, ignore_mismatch)  8.6.1..11.1
    IBuilderConfig.DLA_core=                    a property; without "=" read-only, or a constant
    IExecutionContext.infer_shapes(?)           the sources do not name its arguments
    .init_libnvinfer_plugins(logger, namespace) of the module itself

In the arguments "x=" has a default. Where a function has several forms, each has a line.
"""

import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("tensorrt_names.tsv")
#: The releases of the table, as they are tagged; 10.3 is JetPack 6's, 10.7 the last with DLA before
#: 11.
TAGS = ("v8.6.1", "v10.0.0", "v10.3.0", "v10.7.0", "v10.13.3", "v10.16", "v11.0", "v11.1")
VERSIONS = tuple(tag[1:] for tag in TAGS)
#: Classes that the project or its stand-ins use; all their names are in the table.
CLASSES = (
    "Builder", "BuilderFlag", "DataType", "DeviceType", "Dims", "EngineInspector", "HardwareCompatibilityLevel", "IBuilderConfig",
    "ICudaEngine", "IExecutionContext", "IInt8EntropyCalibrator2", "ILayer", "ILogger", "INetworkDefinition", "IOptimizationProfile",
    "IPluginRegistry", "IProgressMonitor", "ITensor", "ITimingCache", "LayerInformationFormat", "LayerType", "Logger", "MemoryPoolType",
    "NetworkDefinitionCreationFlag", "OnnxParser", "OnnxParserFlag", "ParserError", "ProfilingVerbosity", "Runtime", "Severity",
    "TensorIOMode",
)  # fmt: skip

_COMMENT = re.compile(r'//[^\n]*|/\*.*?\*/|("(?:\\.|[^"\\])*")', re.DOTALL)
_BOUND = re.compile(r"py::(?:class_|enum_)<")
_DEFINITION = re.compile(r'\.(def\w*|value)\s*\(\s*"(\w+)"')
_TOKEN = re.compile(r"""\"(?:\\.|[^"\\])*\"|'(?:\\.|[^'\\])'|[(){};]""")
_ARGUMENT = re.compile(r'"(\w+)"_a(\s*=)?|py::arg\(\s*"(\w+)"\s*\)(\s*=)?')


@dataclass(frozen=True)
class Name:
    """One name of one version.

    Attributes:
        owner: class; "" for the module.
        arguments: of a function, "x" or "x="; None: not a function, or not said.
    """

    owner: str
    name: str
    is_function: bool = False
    writable: bool = False
    arguments: tuple[str, ...] | None = None

    def __str__(self) -> str:
        text = f"{self.owner}.{self.name}"
        if self.is_function:
            return f"{text}({'?' if self.arguments is None else ', '.join(self.arguments)})"
        return f"{text}=" if self.writable else text

    @classmethod
    def parse(cls, text: str) -> "Name":
        """The inverse of `str`."""
        owner, _, rest = text.partition(".")
        name, call, arguments = rest.partition("(")
        if not call:
            return cls(owner, name.rstrip("="), writable=name.endswith("="))
        listed = tuple(filter(None, arguments.rstrip(")").split(", ")))
        return cls(owner, name, True, arguments=None if listed == ("?",) else listed)


def read_table(path: Path = TABLE) -> dict[str, set[Name]]:
    """Version -> its names."""
    versions: dict[str, set[Name]] = defaultdict(set)
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        name, _, found = line.partition("\t")
        for run in found.split():
            first, _, last = run.partition("..")
            start, end = VERSIONS.index(first), VERSIONS.index(last or first)
            for version in VERSIONS[start : end + 1]:
                versions[version].add(Name.parse(name))
    return versions


def names_of(source: str) -> Iterator[Name]:
    """The names that one file of the bindings binds."""
    text = _COMMENT.sub(lambda match: match[1] or " ", source)
    variables = {"m": ""}  # of C++ -> the class they bind
    for match in _BOUND.finditer(text):
        statement = text[match.start() : _end(text, match.start())]
        declared = re.match(r"py::\w+<.*?>\s*(\w*)\s*[({]\s*(\w+)\s*,\s*\"(\w+)\"", statement, re.DOTALL)  # fmt: skip
        if declared is None:  # a template over several classes: none of ours
            continue
        variable, scope, owner = declared.groups()
        if variable:
            variables[variable] = owner
        yield Name(variables.get(scope, scope), owner)
        yield from _definitions(statement, owner, is_enum="enum_" in match[0])
    for variable, owner in variables.items():
        for match in re.finditer(rf"(?<![\w.]){variable}\s*\.def", text):
            statement = text[match.start() : _end(text, match.start())]
            yield from _definitions(statement, owner, is_enum=False)


def _definitions(statement: str, owner: str, *, is_enum: bool) -> Iterator[Name]:
    for match in _DEFINITION.finditer(statement):
        kind, name = match.groups()
        if kind == "value" or kind.endswith("_readonly"):
            yield Name(owner, name)
        elif kind in ("def", "def_static") and not is_enum:
            call = statement[match.end() : _end(statement, match.end())]
            found = [(a or c, b or d) for a, b, c, d in _ARGUMENT.findall(call)]
            arguments = tuple(f"{name}=" if default else name for name, default in found)
            yield Name(owner, name, True, arguments=arguments or None)
        elif kind in ("def_property", "def_readwrite"):
            yield Name(owner, name, writable=True)


def _end(text: str, start: int) -> int:
    """Where the statement that begins at `start` ends: at a semicolon, or at a bracket that it
    did not open.
    """
    depth = 0
    for match in _TOKEN.finditer(text, start):
        symbol = match[0]
        if symbol in ("(", "{"):
            depth += 1
        elif symbol in (")", "}"):
            depth -= 1
        if depth < 0 or (depth == 0 and symbol == ";"):
            return match.start()
    return len(text)


def _git(checkout: Path, *arguments: str) -> str:
    command = ["git", "-C", str(checkout), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def make_table(checkout: Path) -> str:
    """The table for `TAGS`."""
    rows: dict[str, list[str]] = defaultdict(list)
    for tag in TAGS:
        files = _git(checkout, "ls-tree", "-r", "--name-only", tag, "python/src").split()
        found = set[str]()
        for file in files:
            if not file.endswith(".cpp"):
                continue
            for name in names_of(_git(checkout, "show", f"{tag}:{file}")):
                in_module = not name.owner and (name.is_function or name.name in CLASSES)
                if (name.owner in CLASSES or in_module) and not name.name.startswith("__"):
                    found.add(str(name))
        for row in found:
            rows[row].append(tag[1:])
    head = "# SPDX-License-Identifier: Apache-2.0\n# Written by tensorrt_names.py, which says what it means.\n"
    return head + "".join(f"{row}\t{_ranges(rows[row])}\n" for row in sorted(rows))


def _ranges(tags: list[str]) -> str:
    """Some of `VERSIONS`, in order, as ranges."""
    runs: list[list[str]] = []
    for tag in tags:
        if runs and VERSIONS.index(runs[-1][-1]) == VERSIONS.index(tag) - 1:
            runs[-1].append(tag)
        else:
            runs.append([tag])
    return " ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else run[0] for run in runs)


if __name__ == "__main__":
    sys.stdout.write(make_table(Path(sys.argv[1])))
