# SPDX-License-Identifier: Apache-2.0
"""Every reader of files from outside: a value, or one line that names the file; nothing else,
whatever stands in it.
"""

import copy
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import deploy_models
import numpy as np
import pytest
from conftest import ROOT

pytest.importorskip("hypothesis", reason="needs requirements-dev.txt")

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from trtdet import checks, reading
from trtdet.deploy.trtexec import measurement_of_log, measurement_of_times
from trtdet.detections import read_tsv
from trtdet.engine.options import BatchRange
from trtdet.engine.sidecar import EngineInfo, read_info
from trtdet.errors import EngineError, GraphError
from trtdet.labels import read_labels
from trtdet.precision.calibration_cache import CalibrationCache, Origin, read_cache
from trtdet.precision.file import PrecisionFile, read_precision_file
from trtdet.precision.histograms import ChannelMoments
from trtdet.precision.sensitivity import Journal
from trtdet.results import coco
from trtdet.runtimes.options import parse_url
from trtdet.runtimes.triton import spec_in_config
from trtdet.spec import METADATA_KEY, ModelSpec, Nms, Preprocessing

SPEC = deploy_models.D0
#: Examples of each property test. A longer search: TRTDET_FUZZ_EXAMPLES=20000
EXAMPLES = int(os.environ.get("TRTDET_FUZZ_EXAMPLES", "150"))


# ---- the reader itself


@dataclass(frozen=True)
class Inner:
    kind: Literal["a", "b"] = "a"
    pair: tuple[int, float] | None = None


@dataclass(frozen=True)
class Outer:
    SCHEMA: ClassVar[int] = 3
    JSON_NAMES: ClassVar[dict[str, str]] = {"in_file": "inner"}

    inner: Inner
    counts: dict[str, int]
    label: str = ""

    def __post_init__(self) -> None:
        checks.text("label", self.label)


SOUND = {"schema": 3, "in_file": {"kind": "b", "pair": [1, 2]}, "counts": {"x": 1}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 4}, "expected schema 3, found 4"),
        ({"schema": True}, "expected schema 3, found true"),
        ({"schema": None}, "expected schema 3, found null"),
        ({"in_file": None}, "in_file: expected an object, found null"),
        ({"in_file": {"kind": "c"}}, "in_file.kind: expected a or b, found 'c'"),
        ({"in_file": {"kind": 1}}, "in_file.kind: expected text, found 1"),
        ({"in_file": {"pair": [1]}}, "in_file.pair: expected a list of length 2, found a list of 1"),
        ({"in_file": {"pair": [1.5, 2]}}, "in_file.pair[0]: expected a whole number, found 1.5"),
        ({"in_file": {"pair": [1, 10**400]}}, "in_file.pair[1]: expected a smaller number, found a number of 1329 bits"),
        ({"in_file": {"pair": [True, 1]}}, "in_file.pair[0]: expected a whole number, found true"),
        ({"counts": {"x": 1, "y\n": "2"}}, r"counts['y\n']: expected a whole number, found '2'"),
        ({"counts": None}, "counts: expected an object, found null"),
        ({"label": "a\tb"}, r"label: expected text without control characters, found 'a\tb'"),
        ({"label": "\u2028"}, r"label: expected text without control characters, found '\u2028'"),
        ({"label": "\ud800"}, r"label: expected text without control characters, found '\ud800'"),
        ({"label": "x" * 101}, "label: expected at most 100 characters, found 101"),
    ],
)  # fmt: skip
def test_a_message_names_file_place_expected_found_and_next_step(change: dict[str, Any], message: str) -> None:  # fmt: skip
    with pytest.raises(ValueError) as caught:
        reading.parse(json.dumps(SOUND | change), Outer, name="f.json", remedy="make it anew")
    assert str(caught.value) == f"f.json: {message}; make it anew"


def test_a_missing_field_has_the_name_it_has_in_the_file() -> None:
    with pytest.raises(ValueError, match="f: expected 'in_file', found no field of that name; anew"):  # fmt: skip
        reading.parse('{"schema": 3, "counts": {}}', Outer, name="f", remedy="anew")


@pytest.mark.parametrize("text", ["", "{", "[" * 10**5, "[" * 10**5 + "]" * 10**5, "9" * 5000, "\x00", '{"a": 1} 2'])  # fmt: skip
@pytest.mark.parametrize("kind", [Outer, list[Any], Inner])
def test_what_is_no_json(text: str, kind: Any) -> None:
    with pytest.raises(EngineError, match=r"^f: expected .*, found .*; anew$"):
        reading.parse(text.encode(), kind, name="f", remedy="anew", error=EngineError)


def test_depth_within_a_field_that_nobody_reads() -> None:
    deep = b'{"schema": 3, "in_file": {}, "counts": {}, "more": ' + b"[" * 10**5 + b"]" * 10**5
    with pytest.raises(
        ValueError, match=r"f: expected plain JSON, found .* too deep to read; anew"
    ):
        reading.parse(deep + b"}", Outer, name="f", remedy="anew")


def test_a_byte_order_mark_and_unknown_fields_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text(json.dumps(SOUND | {"later": float("nan")}), encoding="utf-8-sig")
    found = reading.read(path, Outer, remedy="")
    assert found == Outer(Inner("b", (1, 2.0)), {"x": 1})
    assert reading.parse("\ufeff[1]", list[int], name="", remedy="") == [1]
    path.write_bytes(b'{"schema": "\xff"}')
    with pytest.raises(ValueError, match=r"f\.json: expected JSON in UTF-8"):
        reading.read(path, Outer, remedy="")


# ---- what every reader takes


def write_cache(path: Path) -> None:
    moments = ChannelMoments()
    moments.add(np.ones((1, 2, 3), "f4"))
    origin = Origin("m" * 64, {"size_hw": [8, 8]}, "i" * 64, 2, "entropy", 0)
    CalibrationCache({"x": 0.5}, {"x": moments.statistics(0.1)}, origin).write(path)


def _cache_sidecar(path: Path) -> None:
    cache = path.with_name("c.cache")
    cache.write_text(f"TRT-8601-EntropyCalibration2\nx: {struct.pack('!f', 0.5).hex()}\n")
    path.rename(path.with_name("c.cache.json"))
    read_cache(cache)


def _precision(path: Path) -> None:
    read_precision_file(path, model_sha256="a", precision="int8")


def _results(path: Path) -> None:
    objects = path.with_name("objects.json")
    objects.write_text(json.dumps(ANNOTATIONS))
    annotations = coco.read_annotations(objects)
    coco.evaluate(annotations, coco.read_results(path, annotations), annotations.image_ids.values())


def _annotations(path: Path) -> None:
    """Read, and used for all that they are used for."""
    annotations = coco.read_annotations(path)
    coco.ids_differ_from_names(annotations)
    labels = coco.labels_of(annotations.categories)
    coco.ground_truth(annotations, coco.class_ids_of(annotations.categories, labels))
    coco.evaluate(annotations, [], annotations.image_ids.values())


def _times(path: Path) -> None:
    str(measurement_of_times(path, 1))


def _spec(path: Path) -> None:
    ModelSpec.from_json(path.read_text(encoding="utf-8", errors="replace"))


def _served(path: Path) -> None:
    text = path.read_text(encoding="utf-8", errors="replace")
    spec_in_config({"parameters": {METADATA_KEY: {"string_value": text}}}, parse_url("grpc://h:1/m"))  # fmt: skip


def _journal(path: Path) -> None:
    Journal(path, {})


IMAGES = [{"id": n, "file_name": f"{n}.png", "width": 64, "height": 64} for n in (1, 2)]
OBJECT = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1.0, 2.0, 30.0, 20.0], "area": 600.0, "iscrowd": 0}  # fmt: skip
ROTATED = OBJECT | {"bbox": [1.0, 2.0, 30.0, 20.0, 0.1], "segmentation": [[1, 2, 1, 22, 31, 22, 31, 2]]}  # fmt: skip
ANNOTATIONS = {"images": IMAGES, "annotations": [OBJECT], "categories": [{"id": 1, "name": "a"}]}
FOUND = [{"image_id": 1, "category_id": 1, "bbox": [1.0, 2.0, 30.0, 20.0], "score": 0.5}]
RECORD = {"startEnqMs": 0.0, "endEnqMs": 0.1, "startH2dMs": 0.0, "endD2hMs": 1.0, "h2dMs": 0.1, "computeMs": 0.7, "d2hMs": 0.1}  # fmt: skip
INFO = EngineInfo(SPEC, "tensorrt", "10.13.3.9", "fp16", BatchRange(1, 2, 4), ("8.9",), layers={"FP16": 3})  # fmt: skip
PRECISION = {"schema": 1, "model_sha256": "a", "precision": "int8", "keep": {"x*": "fp16"}, "note": ""}  # fmt: skip
LINE = {"schema": 1, "key": "k", "kind": "ap", "layers": ["a"], "values": {"AP": 0.5}}


def _cache_json(tmp: Path) -> Any:
    write_cache(tmp / "sound.cache")
    return json.loads((tmp / "sound.cache.json").read_text())


#: Reader -> a sound file of it.
READERS: dict[str, tuple[Callable[[Path], Any], Any]] = {
    "spec": (_spec, SPEC.to_dict()),
    "served spec": (_served, SPEC.to_dict()),
    "sidecar": (read_info, json.loads(json.dumps(INFO.to_dict()))),
    "precision": (_precision, PRECISION),
    "journal": (_journal, LINE),
    "cache": (_cache_sidecar, _cache_json),
    "annotations": (_annotations, ANNOTATIONS),
    "rotated": (_annotations, ANNOTATIONS | {"annotations": [ROTATED]}),
    "results": (_results, FOUND),
    "rotated results": (_results, [FOUND[0] | {"bbox": ROTATED["bbox"], "segmentation": ROTATED["segmentation"]}]),
    "times": (_times, [RECORD, RECORD | {"endD2hMs": 2.0}]),
}  # fmt: skip

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({}),
    st.sampled_from([-1, 0, 10**12, 2**31, 2**63, 10**400, 1e308, -1e308, 0.5, "1", "../x", "a\nb", "\ud800", "x" * 5000, [[]], [None]]),
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, sound: Any) -> Any:
    """A document with one or two places replaced, left out or doubled."""
    data = json.loads(json.dumps(sound))
    for _ in range(draw(st.integers(1, 2))):
        data = _mutate(draw, data)
    return data


def _mutate(draw: st.DrawFn, node: Any) -> Any:
    keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []  # fmt: skip
    if not keys or draw(st.integers(0, 5)) == 0:
        return copy.deepcopy(draw(ODD))  # a second mutation may go into it
    key = draw(st.sampled_from(keys))
    action = draw(st.sampled_from(["into", "into", "into", "drop", "double"]))
    if action == "drop":
        del node[key]
    elif action == "double" and isinstance(node, list):
        node.append(node[key])
    else:
        node[key] = _mutate(draw, node[key])
    return node


def value_or_one_line(read: Callable[[Path], Any], path: Path) -> None:
    try:
        read(path)
    except (ValueError, GraphError, EngineError) as error:
        assert not isinstance(error, UnicodeError) and "\n" not in str(error), error
        assert len(str(error)) < 1000, error
        str(error).encode()


@pytest.mark.parametrize("name", READERS)
def test_a_sound_file_is_read(name: str, tmp_path: Path) -> None:
    read, sound = READERS[name]
    data = sound(tmp_path) if callable(sound) else sound
    (tmp_path / "f.json").write_text(json.dumps(data), encoding="utf-8-sig")
    if name in ("spec", "served spec"):  # text in a field, where no mark is expected
        (tmp_path / "f.json").write_text(json.dumps(data))
    read(tmp_path / "f.json")


@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_is_read_or_refused_with_one_line(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    read, sound = READERS[name]
    document = sound(folder) if callable(sound) else sound

    @settings(max_examples=EXAMPLES, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(mutated(document))
    def check(data: Any) -> None:
        path = folder / "f.json"
        path.write_text(json.dumps(data))
        value_or_one_line(read, path)

    check()


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=EXAMPLES // 3, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))  # fmt: skip
@given(data=st.binary(max_size=60))
@example(b"[" * 10**5)
@example(b'{"a":' * 10**5)
@example(b"9" * 5000)
@example(b"\xef\xbb\xbf")
@example(b'"\\ud800"')
def test_other_bytes_are_refused_with_one_line(
    name: str, tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "f.json"
    path.write_bytes(data)
    value_or_one_line(READERS[name][0], path)


FIELD = st.one_of(
    st.floats().map(str), st.integers().map(str), st.text(max_size=4),
    st.sampled_from(["inf", "nan", "1e308", "-1e308", "1e999", "9" * 5000, "0x10", "1_0", ""]),
)  # fmt: skip


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.lists(FIELD, max_size=8), max_size=3))
@example([["0", "0", "1e308", "1", "0.5", "1"]])
@example([["0", "0", "inf", "1", "0.5", "1"]])
@example([["0", "0", "1", "1", "0.5", "1000000000000"]])
def test_a_tsv_is_drawn_or_refused_with_one_line(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]
) -> None:
    from trtdet.results.draw import draw

    path = tmp_path_factory.mktemp("tsv") / "a.tsv"
    path.write_bytes("\n".join("\t".join(row) for row in rows).encode("utf-8", "surrogatepass"))
    image = np.zeros((8, 8, 3), "u1")
    value_or_one_line(lambda p: draw(image, read_tsv(p)), path)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=80))
@example(b"a\tb\n")
@example(b"x" * 300)
def test_labels_are_lines_or_refused_with_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("labels") / "l.txt"
    path.write_bytes(data)

    def read(path: Path) -> None:
        for label in read_labels(path):
            assert len(label.splitlines()) == 1 and "\t" not in label

    value_or_one_line(read, path)


LOG = "--shapes=input:2x3\nThroughput: 100 qps\nTotal Host Walltime: 3 s\nLatency: min = 1 ms, max = 2 ms, mean = 1.5 ms, median = 1.5 ms\n"  # fmt: skip


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["100", "3 s", "1 ms", "2 ms", "min", "median", "mean = 1.5"]), FIELD)
@example("100", "1e999")
@example("100", "1e5-")
@example("min", "low")
def test_a_log_is_read_or_refused_with_one_line(old: str, new: str) -> None:
    value_or_one_line(lambda path: measurement_of_log(LOG.replace(old, new), 1), ROOT)


def test_a_log_of_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match="Total Host Walltime: expected more than 0 s, found 0"):
        measurement_of_log(LOG.replace("3 s", "0 s"), 1)


def test_preprocessing_and_nms_have_bounds_wherever_they_are_made() -> None:
    with pytest.raises(ValueError, match=r"size_hw: expected a whole number from 1 to 32768, found 0"):  # fmt: skip
        Preprocessing((0, 8))
    with pytest.raises(ValueError, match=r"std: expected a number from 1e-06 to 1e\+06, found nan"):
        Preprocessing((8, 8), std=(1.0, 1.0, float("nan")))
    with pytest.raises(ValueError, match=r"size_hw: expected \[16, 16\] to \[32, 32\] \(size_range\), found \[8, 16\]"):  # fmt: skip
        Preprocessing((8, 16), size_range=((16, 16), (32, 32)))
    with pytest.raises(ValueError, match=r"max_output_boxes: expected a whole number from 1 to 1000000, found 2147483648"):  # fmt: skip
        Nms(max_output_boxes=2**31)


def test_a_journal_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.journal"
    path.write_text(json.dumps(LINE) + "\n" + json.dumps(LINE | {"schema": 2}) + "\n")
    with pytest.raises(ValueError, match=r"p.journal:2: expected schema 1, found 2; delete it"):
        Journal(path, {})


def test_what_is_written_has_a_schema_number(tmp_path: Path) -> None:
    PrecisionFile("a", "int8", {}).write(tmp_path / "p.json")
    journal = Journal(tmp_path / "j", {})
    journal.measure("ap", ["x"], ["AP"], lambda: {"AP": 0.5})
    write_cache(tmp_path / "c")
    texts = [(tmp_path / name).read_text() for name in ("p.json", "j", "c.json")]
    assert [json.loads(text)["schema"] for text in texts] == [1, 1, 1]
    assert (SPEC.to_dict()["schema"], INFO.to_dict()["schema"]) == (1, 1)
    assert len(Journal(tmp_path / "j", {})) == 1
