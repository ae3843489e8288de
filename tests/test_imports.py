# SPDX-License-Identifier: Apache-2.0
"""The order of the rooms, read from the imports in the code; docs/design.md has the reasons.

Blocks under `if TYPE_CHECKING:` are left out: they are not run.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest
from conftest import ROOT

#: From the ground up: a room imports only from rooms before it.
ORDER = (
    "about", "errors", "files", "checks", "reading", "closing", "cgroups", "machine", "terminal", "streams", "processes", "shared_memory", "start", "doctor", "sessions", "onnx_files", "cuda", "cuda_kernel", "spec", "labels", "geometry",
    "sources", "detections", "graph", "nms", "images", "precision", "engine", "runtimes", "results", "run", "video", "deploy",
    "families", "conversion", "parity", "api", "commands",
)  # fmt: skip
SCRIPTS = ("create_onnx", "build_engine", "infer", "eval_coco", "compare", "tune_precision", "deploy", "image_batcher", "visualize")  # fmt: skip
#: Stages that are no script of their own: `trtdet doctor`.
ONLY_STAGES = ("doctor",)

#: Heavy packages -> where they may be imported.
HOMES = {
    "onnxruntime": ("trtdet.sessions",),
    "tensorflow": ("trtdet.sources.saved_model",),
    "tf2onnx": ("trtdet.sources.saved_model",),
    "tensorrt": ("trtdet.engine", "trtdet.runtimes"),
    "tensorrt_rtx": ("trtdet.engine", "trtdet.runtimes"),
    "cuda": ("trtdet.cuda", "trtdet.cuda_kernel", "trtdet.runtimes"),
    "nvidia": ("trtdet.runtimes.gpu_decoder",),
    "cv2": ("trtdet.images", "trtdet.results"),
    "fpng": ("trtdet.results.naming",),
    "msgspec": ("trtdet.reading",),
    "matplotlib": ("trtdet.results.coco", "trtdet.precision.sensitivity"),
    "pycocotools": ("trtdet.results.coco",),
    "ray": ("trtdet.run.ray_cluster",),
    "av": ("trtdet.video.source",),
    "pyarrow": ("trtdet.run.ray_cluster",),
    "tritonclient": ("trtdet.runtimes.triton", "trtdet.deploy.triton_config"),
    "aiohttp": ("trtdet.runtimes.triton",),
}
#: Imported inside the functions that need them, never with a module.
AT_THE_POINT_OF_USE = HOMES.keys() - {"cv2"}
#: Modules that import by a name which is not written there: that of a stage, a TensorRT, a family,
#: or a package that doctor looks for.
BY_NAME = (
    "trtdet.start",
    "trtdet.cuda_kernel",
    "trtdet.commands.main",
    "trtdet.commands.stages",
    "trtdet.engine.flavor",
    "trtdet.families",
    "trtdet.doctor.probe",
)


def imports_of(source: str) -> Iterator[tuple[str, bool]]:
    """Dotted names that a module imports, and whether it does when it is imported itself."""

    def visit(node: ast.AST, at_once: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_once) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                start = "." * child.level + (child.module or "")
                yield from ((f"{start}.{alias.name}", at_once) for alias in child.names)
            elif _imports_by_function(child):
                literal = child.args[0].value if isinstance(child.args[0], ast.Constant) else "?"
                yield (str(literal), at_once)
            later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from visit(child, at_once and not later)

    yield from visit(ast.parse(source), True)


def _imports_by_function(node: ast.AST) -> TypeGuard[ast.Call]:
    """Whether this is `import_module(...)`."""
    return isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module"


def modules(root: Path) -> dict[str, str]:
    """Dotted name -> source of every module of the package; `deploy/assets` is code for other
    programs.
    """
    found = {}
    for path in sorted((root / "trtdet").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if "assets" not in parts:
            found[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return found


def owner(name: str, known: dict[str, str]) -> str:
    """The module that an imported name is, or is in."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def upward(known: dict[str, str]) -> list[str]:
    """Imports of a room from itself upwards."""
    found = []
    for module, source in known.items():
        room = module.split(".")[1] if "." in module else ""
        if room == "__main__":
            continue
        for name, _ in imports_of(source):
            if not room or name.split(".")[0] != "trtdet":
                continue
            target = owner(name, known)
            other = target.split(".")[1] if "." in target else ""
            if not other or (other != room and ORDER.index(other) > ORDER.index(room)):
                found.append(f"{module} -> {target or name}")
    return found


def circles(known: dict[str, str]) -> list[list[str]]:
    """Modules that import each other, those inside functions counted too."""
    graph = {
        module: {owner(n, known) for n, _ in imports_of(source) if n.split(".")[0] == "trtdet"}
        - {module, "", "trtdet"}
        for module, source in known.items()
    }
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append(trail[trail.index(module) :])
        elif module not in done:
            for other in sorted(graph[module]):
                walk(other, [*trail, module])
            done.add(module)

    for module in graph:
        walk(module, [])
    return found


def misplaced(known: dict[str, str]) -> list[str]:
    """Heavy packages imported too early, or outside their homes."""
    found = []
    for module, source in known.items():
        for name, at_once in imports_of(source):
            package = name.split(".")[0]
            homes = HOMES.get(package)
            at_home = homes is None or any(module == h or module.startswith(f"{h}.") for h in homes)
            if not at_home or (at_once and package in AT_THE_POINT_OF_USE):
                found.append(f"{module} imports {name}")
    return found


def unseen(known: dict[str, str]) -> list[str]:
    """Imports that the other rules cannot follow: relative ones, and those of a name that is not
    written there.
    """
    found = []
    for module, source in known.items():
        names = [name for name, _ in imports_of(source)]
        found += [f"{module} imports {name}" for name in names if name.startswith(".")]
        found += [f"{module} imports by name" for name in names if name == "?" and module not in BY_NAME]  # fmt: skip
    return found


def onnx_readers(known: dict[str, str]) -> list[str]:
    """Calls that read ONNX files, outside of their one home."""
    found = []
    for module, source in known.items():
        if module == "trtdet.onnx_files":
            continue
        for node in ast.walk(ast.parse(source)):
            names = []
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[0] == "onnx":
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "onnx":
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute) and node.attr == "ParseFromString":
                names = [node.attr]
            found += [f"{module}:{node.lineno} {name}" for name in names if name.startswith("load") or name == "ParseFromString"]  # fmt: skip
    return found


def beyond_the_standard_library(entry: str, known: dict[str, str]) -> set[str]:
    """What importing a module brings in, besides this package and the standard library."""
    seen: set[str] = set()
    outside: set[str] = set()
    pending = [entry]
    while pending:
        module = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        if parent := module.rpartition(".")[0]:
            pending.append(parent)
        for name, at_once in imports_of(known[module]):
            package = name.split(".")[0]
            if not at_once or name == "?" or package in sys.stdlib_module_names:
                continue
            if package == "trtdet":
                pending.append(owner(name, known))
            else:
                outside.add(f"{module} imports {name}")
    return outside


def test_rooms_import_from_below() -> None:
    assert upward(modules(ROOT)) == []


def test_there_are_no_circles() -> None:
    assert circles(modules(ROOT)) == []


def test_every_room_has_its_place() -> None:
    rooms = {name.split(".")[1] for name in modules(ROOT) if "." in name} - {"__main__"}
    assert rooms <= set(ORDER), rooms - set(ORDER)


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    assert misplaced(modules(ROOT)) == []


def test_every_import_can_be_followed() -> None:
    assert unseen(modules(ROOT)) == []


def test_what_import_module_loads_is_seen() -> None:
    """CUDA and TensorRT are loaded so."""
    known = modules(ROOT)
    assert ("cuda.bindings.runtime", False) in set(imports_of(known["trtdet.cuda"]))
    assert ("?", False) in set(imports_of(known["trtdet.engine.flavor"]))


def test_onnx_files_are_read_in_one_place() -> None:
    assert onnx_readers(modules(ROOT)) == []
    assert len(onnx_readers({"a": modules(ROOT)["trtdet.onnx_files"]})) == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_doors(script: str) -> None:
    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) < 15
    assert [name for name, _ in imports_of(source)] == ["trtdet.start.run_stage"]
    assert f'SystemExit(run_stage("{script}"))' in source


def test_the_package_imports_no_script() -> None:
    for module, source in modules(ROOT).items():
        assert not {name.split(".")[0] for name, _ in imports_of(source)} & set(SCRIPTS), module


@pytest.mark.parametrize(
    "module",
    ["trtdet", "trtdet.commands.main", *(f"trtdet.commands.{script}" for script in SCRIPTS)],
)
def test_command_lines_need_the_standard_library_alone(module: str) -> None:
    assert beyond_the_standard_library(module, modules(ROOT)) == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_works_before_anything_is_installed(script: str) -> None:
    """-S leaves site-packages out."""
    command = [sys.executable, "-S", "-E", str(ROOT / f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")


def test_the_rules_see_what_breaks_them() -> None:
    known = {"trtdet": "", "trtdet.spec": "import numpy", "trtdet.run": "", "trtdet.run.a": "from trtdet.run import b"}  # fmt: skip
    known["trtdet.run.b"] = "def f():\n    from trtdet.run.a import x"
    known["trtdet.nms"] = "if TYPE_CHECKING:\n    import tensorrt\nfrom trtdet.run.a import x"
    known["trtdet.engine"] = "import tensorrt"
    known["trtdet.images"] = "def f():\n    import cuda.bindings"
    known["trtdet.results"] = "import importlib\nimportlib.import_module('matplotlib.figure')"
    known["trtdet.deploy"] = (
        "def f():\n    import_module('ray')\n    import_module(x)\nfrom . import y\nfrom ..spec import z"
    )
    known["trtdet.commands"] = "from trtdet.spec import x"
    known["trtdet.files"] = "import onnx\nfrom onnx import load_model\nonnx.load(p)\nonnx.ModelProto().ParseFromString(b)\nonnx.save(m)"  # fmt: skip
    assert onnx_readers(known) == ["trtdet.files:2 load_model", "trtdet.files:3 load", "trtdet.files:4 ParseFromString"]  # fmt: skip
    assert upward(known) == ["trtdet.nms -> trtdet.run.a"]
    assert circles(known) == [["trtdet.run.a", "trtdet.run.b"]]
    assert misplaced(known) == ["trtdet.engine imports tensorrt", "trtdet.images imports cuda.bindings", "trtdet.results imports matplotlib.figure", "trtdet.deploy imports ray"]  # fmt: skip
    assert unseen(known) == ["trtdet.deploy imports ..y", "trtdet.deploy imports ..spec.z", "trtdet.deploy imports by name"]  # fmt: skip
    assert beyond_the_standard_library("trtdet.commands", known) == {"trtdet.spec imports numpy"}
