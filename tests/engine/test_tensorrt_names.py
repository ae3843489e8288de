# SPDX-License-Identifier: Apache-2.0
"""What the project uses of TensorRT exists in every version in which that code runs:
`tensorrt_names` against the sources' AST.

Names that not every version has are in `GUARDS`, with the question to `Flavor` before which the
code asks for them; or the code asks `hasattr`.
"""

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import standin_tensorrt_builder
import standin_tensorrt_runtime
from tensorrt_names import VERSIONS, Name, names_of, read_table
from tensorrt_uses import Finder, Use

import trtdet
from trtdet.engine.flavor import Flavor
from trtdet.machine import parse_version

TRTDET = Path(trtdet.__file__).parent
#: The only modules that touch TensorRT (a rule of docs/design.md).
SOURCES = (
    "engine/build.py",
    "engine/config.py",
    "engine/support.py",
    "engine/flavor.py",
    "runtimes/trt_lane.py",
    "runtimes/trt_load.py",
)

#: Names that every pybind11 enumeration member, or the module itself, has.
EVERYWHERE = {("", "__version__"), ("", "__name__"), ("DataType", "name"), ("LayerType", "name"), ("TensorIOMode", "name")}  # fmt: skip


def weak(flavor: Flavor) -> bool:
    return flavor.has_precision_flags


#: Names that some versions lack -> in which the code gets to them.
GUARDS: dict[tuple[str, str], Callable[[Flavor], bool]] = {
    ("BuilderFlag", "FP16"): weak,
    ("BuilderFlag", "INT8"): weak,
    ("BuilderFlag", "OBEY_PRECISION_CONSTRAINTS"): weak,
    ("Builder", "platform_has_fast_fp16"): weak,
    ("Builder", "platform_has_fast_int8"): weak,
    ("ILayer", "precision"): weak,
    ("ILayer", "set_output_type"): weak,
    ("", "IInt8EntropyCalibrator2"): weak,
    ("IBuilderConfig", "int8_calibrator"): weak,
    ("IBuilderConfig", "set_calibration_profile"): weak,
    ("BuilderFlag", "STRIP_PLAN"): lambda flavor: flavor.can_strip_weights,
    ("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH"): lambda flavor: flavor.needs_explicit_batch,
    ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"): lambda flavor: flavor.strongly_typed,
    ("", "DynamicShapesKernelSpecializationStrategy"): lambda flavor: flavor.is_rtx,
    ("ICudaEngine", "create_runtime_config"): lambda flavor: flavor.is_rtx,
    ("", "ComputeCapability"): lambda flavor: flavor.is_rtx,
    ("IBuilderConfig", "num_compute_capabilities"): lambda flavor: flavor.is_rtx,
    ("IBuilderConfig", "set_compute_capability"): lambda flavor: flavor.is_rtx,
    ("", "init_libnvinfer_plugins"): lambda flavor: flavor.has_efficient_nms,
    ("IBuilderConfig", "set_timing_cache"): lambda flavor: flavor.has_timing_cache,
    ("IBuilderConfig", "create_timing_cache"): lambda flavor: flavor.has_timing_cache,
    ("IBuilderConfig", "get_timing_cache"): lambda flavor: flavor.has_timing_cache,
    ("HardwareCompatibilityLevel", "AMPERE_PLUS"): lambda flavor: flavor.hardware_compatible,
    ("Builder", "num_DLA_cores"): lambda flavor: flavor.has_dla,
    ("DeviceType", "DLA"): lambda flavor: flavor.has_dla,
    ("BuilderFlag", "GPU_FALLBACK"): lambda flavor: flavor.has_dla,
    ("BuilderFlag", "VERSION_COMPATIBLE"): lambda flavor: flavor.version_compatible,
    ("IBuilderConfig", "plugins_to_serialize"): lambda flavor: flavor.version_compatible,
    ("OnnxParser", "get_used_vc_plugin_libraries"): lambda flavor: flavor.version_compatible,
}
#: Names that come with another one, for which the code asks `hasattr`.
COMPANIONS = {
    ("ParserError", "node_operator"): ("ParserError", "node_name"),
    ("IBuilderConfig", "progress_monitor"): ("", "IProgressMonitor"),
}


TABLE = read_table()
KNOWN = {name.name for names in TABLE.values() for name in names if name.owner}
FOUND = [Finder(TRTDET / source, KNOWN) for source in SOURCES]
USES = [
    use
    for found in FOUND
    for use in found.uses
    if (use.owner, use.name) not in EVERYWHERE and not use.name.startswith("__")
]


def fits(use: Use, names: list[Name]) -> bool:
    """Whether one of the forms of a name can be used so."""
    if use.written:
        return any(name.writable for name in names)
    if use.call is None:
        return bool(names)
    count, keywords = use.call
    for name in names:
        if not name.is_function or name.arguments is None:
            if not (name.is_function and (count > 1 or keywords)):
                return True
            continue
        arguments = [argument.rstrip("=") for argument in name.arguments]
        required = [argument for argument in name.arguments if not argument.endswith("=")]
        given = {*arguments[:count], *keywords}
        if count <= len(arguments) and keywords <= set(arguments[count:]) and given >= set(required):  # fmt: skip
            return True
    return False


def forms_of(owner: str, name: str, version: str) -> list[Name]:
    return [n for n in TABLE[version] if (n.owner, n.name) == (owner, name)]


def flavor_of(version: str) -> Flavor:
    return Flavor("tensorrt", parse_version(version), ModuleType("tensorrt"))


def test_the_types_of_all_objects_of_tensorrt_are_known() -> None:
    assert [line for found in FOUND for line in found.unresolved] == []
    owners = {use.owner for use in USES}
    assert owners >= {"", "Builder", "IBuilderConfig", "ICudaEngine", "IExecutionContext", "Runtime"}  # fmt: skip
    assert len({(use.owner, use.name) for use in USES}) > 60


def test_nothing_else_touches_tensorrt() -> None:
    for path in TRTDET.rglob("*.py"):
        if str(path.relative_to(TRTDET)).replace("\\", "/") in SOURCES:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            imported = [alias.name for alias in getattr(node, "names", ()) if isinstance(node, ast.Import)]  # fmt: skip
            if isinstance(node, ast.ImportFrom):
                imported.append(node.module or "")
            assert not {"tensorrt", "tensorrt_rtx"} & {i.partition(".")[0] for i in imported}, path


@pytest.mark.parametrize("version", VERSIONS)
def test_every_use_exists_where_its_code_runs(version: str) -> None:
    flavor = flavor_of(version)
    missing = []
    for use in USES:
        guard = GUARDS.get((use.owner, use.name))
        companion = COMPANIONS.get((use.owner, use.name))
        if (guard and not guard(flavor)) or (companion and not forms_of(*companion, version)):
            continue
        forms = forms_of(use.owner, use.name, version)
        if (forms or not use.asked) and not fits(use, forms):
            missing.append(f"{use.where} {use.owner}.{use.name}")
    assert missing == []


def test_every_guard_is_used() -> None:
    """One that no version needs, or that guards what is used nowhere, hides the next mistake."""
    used = {(use.owner, use.name) for use in USES}
    assert COMPANIONS.keys() <= used
    assert GUARDS.keys() <= used


#: How the stand-in works inside, or what a test asks of it.
INSIDE = {
    "backend",
    "engines",
    "engine_type",
    "input_shape",
    "static_shape",
    "plan",
    "tensors",
    "contexts",
}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_standin_engine_has_only_what_tensorrt_has(version: str) -> None:
    for cls in (standin_tensorrt_runtime.Runtime, standin_tensorrt_runtime.ICudaEngine, standin_tensorrt_runtime.IExecutionContext):  # fmt: skip
        names = {name for name in vars(cls) if not name.startswith("_")} - INSIDE
        assert names
        real = {name.name for name in TABLE[version] if name.owner == cls.__name__}
        assert names - real == set(), cls


@pytest.mark.parametrize("version", ["8.6.1", "10.0.0", "10.13.3", "11.1"])
def test_the_standin_builder_has_the_flags_of_each_version(version: str) -> None:
    module: Any = standin_tensorrt_builder.make_module(version)
    for owner in ("BuilderFlag", "NetworkDefinitionCreationFlag"):
        real = {name.name for name in TABLE[version] if name.owner == owner}
        assert set(getattr(module, owner).__members__) <= real, owner


def test_against_the_real_tensorrt_rtx() -> None:
    real = pytest.importorskip("tensorrt_rtx", reason="needs requirements-rtx.txt")
    flavor = Flavor("tensorrt_rtx", parse_version(real.__version__), real)
    missing = []
    checked = 0
    for use in USES:
        guard = GUARDS.get((use.owner, use.name))
        if use.asked or (guard is not None and not guard(flavor)):
            continue
        owner = {"": real, "Severity": real.ILogger.Severity}.get(use.owner) or getattr(
            real, use.owner
        )
        checked += 1
        if not hasattr(owner, use.name):
            missing.append(f"{use.where} {use.owner}.{use.name}")
        elif use.written and getattr(getattr(owner, use.name), "fset", None) is None:
            missing.append(f"{use.where} {use.owner}.{use.name} is read-only")
        elif use.call is not None and not fits(use, documented(use, owner)):
            missing.append(f"{use.where} {use.owner}.{use.name}: other arguments")
    assert missing == []
    assert checked > 60


def documented(use: Use, owner: Any) -> list[Name]:
    """The forms of a function that pybind11 writes into its documentation; a class is called as
    its `__init__`.
    """
    found = getattr(owner, use.name)
    text = (found.__init__ if inspect.isclass(found) else found).__doc__ or ""
    forms = []
    for line in text.splitlines():
        line = line.strip().split(". ", 1)[-1] if line.strip()[:1].isdigit() else line.strip()
        if not line.startswith((f"{use.name}(", "__init__(")) or "*args" in line:
            continue
        signature = ast.parse(f"def {_python(line)}: ...").body[0]
        assert isinstance(signature, ast.FunctionDef)
        names = [a.arg for a in signature.args.args]
        defaults = len(signature.args.defaults)
        marked = [n + "=" * (i >= len(names) - defaults) for i, n in enumerate(names)]
        forms.append(Name(use.owner, use.name, True, arguments=tuple(n for n in marked if n != "self")))  # fmt: skip
    return forms or [Name(use.owner, use.name, True)]


def _python(signature: str) -> str:
    """A signature of pybind11's without what is no Python in it: defaults like <Flag.X: 0>, and
    names of C++.
    """
    return re.sub(r"= ?<[^>]*>", "= 0", signature.partition(" -> ")[0]).replace("::", ".")


SOURCE = r"""
    // py::class_<Gone>(m, "Gone")
    py::class_<ICudaEngine> engine(m, "ICudaEngine", "not ; an end");
    engine.def("create", [](A& self) { call(1); return f(self); }, "one"_a, "two"_a = 3, Doc::create)
        .def_property_readonly("size", &A::size).def_property("mode", &A::get, &A::set);
    py::enum_<DataType>(m, "DataType").value("HALF", DataType::kHALF);
    m.def("free", &free, py::arg("what"), py::arg("how") = 1);
"""


def test_names_are_read_off_the_sources() -> None:
    assert [str(name) for name in names_of(SOURCE)] == [
        ".ICudaEngine",
        ".DataType",
        "DataType.HALF",
        ".free(what, how=)",
        "ICudaEngine.create(one, two=)",
        "ICudaEngine.size",
        "ICudaEngine.mode=",
    ]
    for text in ("A.b", "A.b=", "A.b(?)", "A.b(x, y=)", ".b(x)"):
        assert str(Name.parse(text)) == text


def test_the_finder_finds(tmp_path: Path) -> None:
    """A misspelt name, a wrong argument and a write to what is read-only do not pass."""
    path = tmp_path / "x.py"
    path.write_text(
        "def f(context: tensorrt.IExecutionContext, config: tensorrt.IBuilderConfig):\n"
        "    context.execute_async_v4(1)\n"
        "    context.execute_async_v3(stream=1)\n"
        "    context.set_tensor_address('a')\n"
        "    context.active_optimization_profile = 1\n"
        "    config.DLA_core = 1\n"
        "    config.set_timing_cache(b, ignore_mismatch=False)\n"
        "    unknown.execute_async_v3(1)\n"
    )
    finder = Finder(path, KNOWN)
    assert list(finder.unresolved) == ["x.py:8 unknown.execute_async_v3"]
    bad = []
    for use in finder.uses:
        if not fits(use, forms_of(use.owner, use.name, "11.1")):
            bad.append(use.where)
    assert bad == ["x.py:2", "x.py:3", "x.py:4", "x.py:5"]
