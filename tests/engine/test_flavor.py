# SPDX-License-Identifier: Apache-2.0
"""Which TensorRT is found, what each version is known to do, its logger and its plugins."""

import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import standin_tensorrt_builder as standin
from conftest import ROOT

from trtdet.engine import flavor as engine_flavor
from trtdet.engine.flavor import Flavor, find_flavor
from trtdet.errors import EngineError
from trtdet.machine import parse_version

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make exactly these modules importable: name -> module, or the exception that the import
    raises.
    """

    def make(**modules: ModuleType | Exception) -> None:
        def import_module(name: str) -> ModuleType:
            found = modules.get(name, ModuleNotFoundError(f"No module named {name!r}"))
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(
            engine_flavor, "importlib", SimpleNamespace(import_module=import_module)
        )

    return make


@pytest.fixture
def rtx() -> Any:
    """The real one: its builder is installed where no GPU is."""
    return pytest.importorskip("tensorrt_rtx", reason="needs requirements-rtx.txt")


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("8.6.1", (8, 6, 1)),
        ("8.6.1.post1", (8, 6, 1)),
        ("10.0.0b6", (10, 0, 0)),
        ("10.13.3.9", (10, 13, 3, 9)),
        ("1.7.1.116+cu13", (1, 7, 1, 116)),
    ],
)
def test_versions_are_integers(text: str, version: tuple[int, ...]) -> None:
    assert parse_version(text) == version
    assert parse_version("10.2.0") > parse_version("9.3.0")


def test_version_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"expected a version such as 10.13.3, found 'unknown'"):
        parse_version("unknown")


def test_tensorrt_comes_before_rtx_unless_named(install: Install, rtx: Any) -> None:
    install(tensorrt=standin.make_module("10.13.3.9"), tensorrt_rtx=rtx)
    assert str(find_flavor()) == "TensorRT 10.13.3.9"
    assert str(find_flavor("tensorrt_rtx")) == f"TensorRT-RTX {rtx.__version__}"
    with pytest.raises(ValueError, match="flavor: expected tensorrt or tensorrt_rtx, got 'trt'"):
        find_flavor("trt")


def test_type_stubs_are_no_tensorrt(install: Install, rtx: Any) -> None:
    install(tensorrt=ModuleType("tensorrt"), tensorrt_rtx=rtx)
    assert find_flavor().name == "tensorrt_rtx"
    install(tensorrt=ModuleType("tensorrt"))
    with pytest.raises(EngineError, match="only a folder of that name"):
        find_flavor("tensorrt")


def test_broken_installation_is_named_and_passed_over(install: Install, rtx: Any, caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    broken = OSError("libnvinfer.so.10: cannot open shared object file")
    install(tensorrt=broken, tensorrt_rtx=rtx)
    assert find_flavor().name == "tensorrt_rtx"
    assert "tensorrt is installed but does not import: libnvinfer.so.10" in caplog.text
    with pytest.raises(EngineError, match=r"no usable TensorRT \(tensorrt: libnvinfer.so.10.*pip install.*'python -m trtdet doctor' shows what is here$"):  # fmt: skip
        find_flavor("tensorrt")


def test_nothing_installed_says_what_to_install(install: Install) -> None:
    install()
    with pytest.raises(EngineError, match=r"tensorrt: No module.*tensorrt_rtx: No module.*pip install tensorrt-rtx"):  # fmt: skip
        find_flavor()


def test_too_old(install: Install) -> None:
    install(tensorrt=standin.make_module("8.5.3"))
    with pytest.raises(EngineError, match=r"TensorRT 8.5.3: expected TensorRT 8.6 or later"):
        find_flavor()


QUESTIONS = ("strongly_typed", "has_precision_flags", "needs_explicit_batch", "has_efficient_nms", "has_bf16", "has_timing_cache", "version_compatible", "hardware_compatible", "can_strip_weights", "has_dla")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "version", "answers"),
    [  #                              strong flags batch nms bf16 cache vc hc strip dla
        ("tensorrt", (8, 6, 1),        "no     yes   yes   yes no   yes  yes yes no   yes"),
        ("tensorrt", (9, 3, 0),        "no     yes   yes   yes no   yes  yes yes no   yes"),
        ("tensorrt", (10, 0, 0),       "yes    yes   no    yes yes  yes  yes yes yes  yes"),
        ("tensorrt", (10, 13, 3, 9),   "yes    yes   no    yes yes  yes  yes yes yes  yes"),
        ("tensorrt", (11, 1, 0),       "yes    no    no    yes yes  yes  yes yes yes  no"),
        ("tensorrt", (11, 4, 1),       "yes    no    no    yes yes  yes  yes yes yes  yes"),
        ("tensorrt_rtx", (1, 7, 1),    "yes    no    no    no  yes  no   no  no  yes  no"),
    ],
)  # fmt: skip
def test_what_each_version_does(name: str, version: tuple[int, ...], answers: str) -> None:
    flavor = Flavor(name, version, ModuleType(name))
    found = ["yes" if getattr(flavor, question) else "no" for question in QUESTIONS]
    assert dict(zip(QUESTIONS, found, strict=True)) == dict(
        zip(QUESTIONS, answers.split(), strict=True)
    )
    assert flavor.compute_capabilities() == {}
    with pytest.raises(EngineError, match=rf"--x: {flavor} does not support it; use y"):
        flavor.refuse("--x", "use y")


def test_real_rtx_names_its_gpus() -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs requirements-rtx.txt")
    flavor = find_flavor("tensorrt_rtx")
    names = list(flavor.compute_capabilities())
    assert names[0] == "7.5" and {"8.0", "8.6", "8.9", "12.0"} < set(names)
    assert names == sorted(names, key=float)
    assert flavor.logger is find_flavor("tensorrt_rtx").logger


def test_logger_writes_to_logging(caplog: pytest.LogCaptureFixture) -> None:
    flavor = Flavor("tensorrt", (10, 13, 3), standin.make_module("10.13.3"))
    assert flavor.logger is flavor.logger
    caplog.set_level(logging.DEBUG, "tensorrt")
    severity = standin.Severity
    for level in severity:
        flavor.logger.log(level, f"message {level.name} 100%")
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("ERROR", "message INTERNAL_ERROR 100%"),
        ("ERROR", "message ERROR 100%"),
        ("WARNING", "message WARNING 100%"),
        ("DEBUG", "message INFO 100%"),  # VERBOSE is dropped
    ]
    caplog.clear()
    with flavor.collected_errors() as outer:
        flavor.logger.log(severity.ERROR, "first")
        with flavor.collected_errors() as inner:
            flavor.logger.log(severity.INTERNAL_ERROR, "second")
        flavor.logger.log(severity.WARNING, "seen")
        flavor.logger.log(severity.ERROR, "third")
    flavor.logger.log(severity.ERROR, "fourth")
    assert (outer, inner) == (["first", "second", "third"], ["second"])
    assert [r.getMessage() for r in caplog.records if r.levelno > logging.DEBUG] == ["seen", "fourth"]  # fmt: skip


def test_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = standin.make_module("10.13.3")
    flavor = Flavor("tensorrt", (10, 13, 3), module)
    flavor.load_plugins()
    assert sorted(module.PLUGINS) == ["EfficientNMS_TRT"]
    fake = tmp_path / "libmine.so"
    fake.write_bytes(b"no library")
    with pytest.raises(EngineError, match=r"plugin library .*libmine.so: expected a shared library for TensorRT 10.13.3.*: "):  # fmt: skip
        flavor.load_plugins([fake])

    loaded: list[str] = []
    module.get_plugin_registry = lambda: SimpleNamespace(load_library=loaded.append)
    libraries = {"old.so": SimpleNamespace(), "8.6.so": SimpleNamespace(getPluginCreators=0), "10.so": SimpleNamespace(getCreators=0)}  # fmt: skip
    monkeypatch.setattr(engine_flavor.ctypes, "CDLL", lambda name, mode: libraries[name])
    flavor.load_plugins(list(libraries))
    assert loaded == ["8.6.so", "10.so"]  # the others register themselves when they are loaded
    Flavor("tensorrt", (10, 13, 3), module).load_plugins(list(libraries))
    assert loaded == ["8.6.so", "10.so"]  # once in a process, whoever asks


def test_a_plugin_library_in_this_folder_needs_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's loader would look for a bare name elsewhere."""
    import _ctypes

    flavor = Flavor("tensorrt", (10, 13, 3), standin.make_module("10.13.3"))
    with pytest.raises(EngineError, match=r"plugin library libmine.so: .*; build it against this TensorRT, or correct the path"):  # fmt: skip
        flavor.load_plugins([Path("libmine.so")])
    shutil.copy(_ctypes.__file__, tmp_path / "libmine.so")
    monkeypatch.chdir(tmp_path)
    flavor.load_plugins([Path("libmine.so")])


# --- the stand-in and the annotations against the real bindings -----------------------------------


#: How the stand-in works inside, or what a test asks of it.
STANDIN_ONLY = {"ALLOWED", "module", "cancelled"}


def public(cls: type) -> set[str]:
    return {name for base in cls.__mro__ for name in vars(base) if not name.startswith("_")} | set(getattr(cls, "ALLOWED", ()))  # fmt: skip


def test_standin_has_only_what_the_bindings_of_11_have() -> None:
    """TensorRT-RTX shares the API of 11, and its wheels install without a GPU."""
    real = pytest.importorskip("tensorrt_rtx", reason="needs requirements-rtx.txt")
    module: Any = standin.make_module("11.1.0")
    kinds = [standin.OnnxParser, standin.IBuilderConfig10, standin.Builder, standin.Runtime, standin.INetworkDefinition, standin.IOptimizationProfile, standin.ITimingCache, standin.EngineInspector, standin.ICudaEngine, standin.ParserError10]  # fmt: skip
    for cls in kinds:
        theirs = set(dir(getattr(real, cls.__name__.removesuffix("10"))))
        assert public(cls) - STANDIN_ONLY - theirs == set(), cls
    for name in ("BuilderFlag", "NetworkDefinitionCreationFlag", "OnnxParserFlag", "MemoryPoolType", "HardwareCompatibilityLevel", "ProfilingVerbosity", "LayerInformationFormat", "DeviceType"):  # fmt: skip
        members = set(getattr(module, name).__members__)
        assert members - set(getattr(real, name).__members__) <= {"PREFER_AOT_PYTHON_PLUGINS"}, name  # fmt: skip


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stubs of TensorRT 10, repaired: as published they hold three lines that are not
    Python.
    """
    spec = find_spec("tensorrt_bindings")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs tensorrt-stubs (requirements-dev.txt)")
    source = Path(spec.submodule_search_locations[0])
    if not (source / "tensorrt.pyi").is_file():
        pytest.skip("the real TensorRT is installed instead of its stubs")
    target = tmp_path_factory.mktemp("stubs")
    for name in ("tensorrt", "tensorrt_bindings"):
        shutil.copytree(source.parent / name, target / name)
    path = target / "tensorrt_bindings" / "tensorrt.pyi"
    text = re.sub(r"(def .*)\bin: ", r"\1in_: ", path.read_text())
    path.write_text(text.replace("channel_axis: int)", "channel_axis: int = ...)"))
    return target


def test_standin_has_only_what_the_bindings_of_10_have(stubs: Path) -> None:
    text = (stubs / "tensorrt_bindings" / "tensorrt.pyi").read_text()
    bodies = dict(re.findall(r"^class (\w+)[^\n]*:\n((?:[ \t].*\n|\n)*)", text, re.MULTILINE))
    module: Any = standin.make_module("10.13.3")
    classes = [standin.OnnxParser, standin.IBuilderConfigBefore11, standin.BuilderBefore11, standin.Runtime, standin.INetworkDefinition, standin.IOptimizationProfile, standin.ITimingCache, standin.EngineInspector, standin.ICudaEngine, standin.ILayer, standin.ParserError10]  # fmt: skip
    enums = [module.BuilderFlag, module.NetworkDefinitionCreationFlag, module.OnnxParserFlag, module.ProfilingVerbosity, module.DeviceType]  # fmt: skip
    checked = 0
    for cls in (*classes, *enums):
        body = bodies[re.sub(r"10$|Before11$", "", cls.__name__)]
        names = set(cls.__members__) if cls in enums else public(cls) - STANDIN_ONLY
        assert {name for name in names if not re.search(rf"\b{name}\b", body)} == set(), cls
        checked += len(names)
    assert checked > 60


@pytest.mark.slow
def test_tensorrt_code_is_typed_as_the_stubs_say(stubs: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="needs requirements-dev.txt")
    config = tmp_path / "mypy.ini"
    config.write_text(
        f"[mypy]\nmypy_path = {stubs}:{ROOT}\npython_version = 3.10\nignore_missing_imports = True\ncheck_untyped_defs = True\n"
        "[mypy-tensorrt.*]\nignore_errors = True\n[mypy-tensorrt_bindings.*]\nignore_errors = True\n"
    )
    files = [ROOT / "trtdet" / name for name in ("engine/build.py", "engine/config.py", "engine/support.py", "runtimes/trt_load.py", "runtimes/trt_lane.py")]  # fmt: skip
    command = [sys.executable, "-m", "mypy", "--config-file", config, "--cache-dir", tmp_path / "cache", *files]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stdout
