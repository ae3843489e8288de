# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on a CPU: many batches run at once, one in each thread."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from operator import length_hint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_detector
from numpy.typing import NDArray
from test_ort_runtime import NamedBatch, images

from trtdet import sessions
from trtdet.errors import EngineError
from trtdet.images.batcher import ImageBatcher
from trtdet.run.detect import detect
from trtdet.run.tune import View, ViewingRuntime
from trtdet.runtimes import ort
from trtdet.runtimes.at_once import batches_that_fit
from trtdet.runtimes.base import Images, Outputs
from trtdet.runtimes.ort import MANY_BATCHES, OnnxRuntime
from trtdet.spec import OUTPUT_NAMES

HERE = threading.current_thread().name
#: Seconds that threads wait for each other, where they do not meet.
TIMEOUT = 20


@pytest.fixture(autouse=True)
def _memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than any batch takes."""
    monkeypatch.setattr(ort, "available_memory", lambda: 1 << 40)
    monkeypatch.setattr(ort, "resident_memory", lambda: 1 << 30)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_detector.save(tmp_path_factory.mktemp("toy") / "toy.onnx")


class Watched(OnnxRuntime):
    """Notes what runs where.

    Args:
        meet: threads of its own, each of which waits at its first batch until all of them have one.
        failing: number of a batch that fails.

    Attributes:
        ran: number of a batch, thread, session.
        loaded: threads of each session that was loaded later.
    """

    def __init__(self, path: Path, *, threads: int, meet: int = 0, failing: int = -1) -> None:
        super().__init__(path, provider="cpu", threads=threads)
        self.ran: list[tuple[int, str, sessions.Session]] = []
        self.loaded: list[int] = []
        self._all = threading.Barrier(meet) if meet else None
        self._came: set[str] = set()
        self._failing = failing
        load = self._load

        def note(threads: int) -> sessions.Session:
            self.loaded.append(threads)
            assert load is not None
            return load(threads=threads)

        if load is not None:
            self._load = note

    def _infer(self, images: Images, session: sessions.Session) -> Outputs:
        assert isinstance(images, np.ndarray)
        number, name = int(images[0, 0, 0, 0]), threading.current_thread().name
        self.ran.append((number, name, session))
        if self._all is not None and name != HERE and name not in self._came:
            self._came.add(name)
            self._all.wait(TIMEOUT)
        if number == self._failing:
            raise EngineError("out of memory")
        return super()._infer(images, session)

    @property
    def threads(self) -> set[str]:
        """Those that ran a batch."""
        return {name for _, name, _ in self.ran}

    @property
    def used(self) -> set[sessions.Session]:
        """The sessions that ran one."""
        return {session for _, _, session in self.ran}


def batches(count: int) -> list[NamedBatch]:
    """Of two images, whose red is the batch's number, and more."""
    return [
        NamedBatch(
            images((number, number % 5, 1), (number + 100, 3, number % 2)),
            (Path(f"{number}.jpg"), Path(f"{number}b.jpg")),
        )
        for number in range(count)
    ]


class Source:
    """Batches, of which so many are announced; notes those that were taken."""

    def __init__(self, some: Sequence[NamedBatch], announced: int | None = None) -> None:
        self._batches = some
        self._announced = len(some) if announced is None else announced
        self.taken: list[int] = []

    def __length_hint__(self) -> int:
        return self._announced

    def __iter__(self) -> Iterator[NamedBatch]:
        for number, batch in enumerate(self._batches):
            self.taken.append(number)
            yield batch


def one_by_one(path: Path, some: Iterable[NamedBatch], threads: int = 1) -> list[Outputs]:
    with OnnxRuntime(path, provider="cpu", threads=threads) as runtime:
        return [runtime.infer(batch.images) for batch in some]


def assert_equal(found: Sequence[tuple[Any, Outputs]], some: Sequence[Any], expected: Sequence[Outputs]) -> None:  # fmt: skip
    """These batches, in this order, each with its outputs to the bit."""
    assert [batch for batch, _ in found] == some
    for (_, outputs), others in zip(found, expected, strict=True):
        assert list(outputs) == list(OUTPUT_NAMES)
        for name in OUTPUT_NAMES:
            assert outputs[name].dtype == others[name].dtype
            np.testing.assert_array_equal(outputs[name], others[name])


def of_onnx_runtime() -> list[str]:
    """The threads that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("onnxruntime")]  # fmt: skip


# ---- at once


@pytest.mark.parametrize("threads", [2, 3])
def test_each_thread_has_a_batch(threads: int, toy: Path) -> None:
    some = batches(41)
    expected = one_by_one(toy, some, threads)
    with Watched(toy, threads=threads, meet=threads) as runtime:
        assert_equal(list(runtime.map(some)), some, expected)
        assert runtime.loaded == [1]
        # The first one, which shows how much memory it takes, and the others.
        assert runtime.ran[0] == (0, HERE, runtime._session)
        assert sorted(number for number, _, _ in runtime.ran) == list(range(41))
        runtime.ran = runtime.ran[1:]
        assert len(runtime.threads) == threads and HERE not in runtime.threads
        assert runtime.used == {runtime._one_thread}
        assert of_onnx_runtime() == []


def test_the_model_is_loaded_once_more_and_no_oftener(toy: Path) -> None:
    some = batches(40)
    expected = one_by_one(toy, some)
    with Watched(toy, threads=2) as runtime:
        list(runtime.map(some))
        for count, at_once in ((4, True), (2, True), (1, False), (40, True)):
            runtime.ran.clear()
            assert_equal(list(runtime.map(some[:count])), some[:count], expected[:count])
            assert (HERE not in runtime.threads, len(runtime.ran)) == (at_once, count)
            assert runtime.used == {runtime._one_thread if at_once else runtime._session}
        runtime.ran.clear()
        assert_equal([(some[7], runtime.infer(some[7].images))], [some[7]], [expected[7]])
        assert runtime.ran == [(7, HERE, runtime._session)]
        assert runtime.loaded == [1]
    for run in (lambda: runtime.infer(some[0].images), lambda: list(runtime.map(some))):
        with pytest.raises(EngineError, match=r"^infer: the model is closed$"):
            run()
    assert runtime._one_thread is None


def test_the_same_batch_again_and_again(toy: Path) -> None:
    """As --benchmark does."""
    (batch,) = batches(1)
    expected = one_by_one(toy, [batch]) * 40
    with Watched(toy, threads=2, meet=2) as runtime:
        assert_equal(list(runtime.map(repeat(batch, 40))), [batch] * 40, expected)
        assert runtime.loaded == [1]


def test_a_batcher_says_how_many_come(toy: Path, tmp_path: Path) -> None:
    """And so its batches run at once."""
    paths = [toy_detector.image(tmp_path / f"{n:02}.png", red=n, green=n % 5, blue=n % 2) for n in range(40)]  # fmt: skip
    with (
        Watched(toy, threads=2, meet=2) as runtime,
        ImageBatcher(paths, runtime.spec.preprocessing, 1, workers=2) as batcher,
    ):
        found = list(detect(runtime, batcher))
        assert runtime.loaded == [1] and len(runtime.threads - {HERE}) == 2
    assert [one.path for one in found] == paths
    for number, one in enumerate(found):
        kept = [share * number / 255 for share in (1, 0.75, 0.5, 0.25)][: number % 5]
        np.testing.assert_allclose(one.detections.scores, kept, rtol=1e-6)
        classes = ([number % 2, number % 2 + 1] * 2)[: number % 5]
        assert one.detections.class_ids.tolist() == classes


def test_a_view_is_that_of_its_batch(toy: Path) -> None:
    rng = np.random.default_rng(0)
    shape = (2, *toy_detector.SIZE_HW, 3)
    some = [NamedBatch(rng.integers(1, 5, shape).astype(np.float32), (Path(f"{n}.jpg"),)) for n in range(40)]  # fmt: skip
    with ViewingRuntime(toy, provider="cpu", threads=2) as runtime:
        runtime.view = View.number(3)
        expected = [runtime.infer(batch.images) for batch in some]
        assert runtime._one_thread is None
        assert_equal(list(runtime.map(some)), some, expected)
        assert runtime._one_thread is not None
    left, right = np.array(toy_detector.BOXES_YXYX, np.float32)[:, [1, 3]].T
    for batch, outputs in zip(some, expected, strict=True):
        corner = batch.images[:, 0, -1, 0]  # mirrored, that is the one at the top left
        np.testing.assert_allclose(outputs["detection_scores"][:, 0], corner * 0.97 / 255, rtol=1e-6)  # fmt: skip
        np.testing.assert_array_equal(outputs["detection_boxes"][..., 1], [48 - right] * 2)
        np.testing.assert_array_equal(outputs["detection_boxes"][..., 3], [48 - left] * 2)


# ---- one after the other


@pytest.mark.parametrize(
    ("threads", "count", "announced"),
    [
        (2, MANY_BATCHES - 1, MANY_BATCHES - 1),  # too few
        (2, 40, 0),  # nobody knows how many
        (1, 40, 40),  # no other thread
        (20, 40, 19),  # less than one for each
    ],
)
def test_one_after_the_other(threads: int, count: int, announced: int, toy: Path) -> None:
    some = batches(count)
    expected = one_by_one(toy, some)
    with Watched(toy, threads=threads) as runtime:
        source = Source(some, announced)
        assert length_hint(source) == announced
        results = runtime.map(source)
        assert_equal([next(results) for _ in range(5)], some[:5], expected[:5])
        assert source.taken == list(range(5))  # none ahead
        assert_equal(list(results), some[5:], expected[5:])
        assert runtime.ran == [(number, HERE, runtime._session) for number in range(count)]
        assert runtime.loaded == []


def test_an_iterator_of_unknown_length(toy: Path) -> None:
    some = batches(40)
    expected = one_by_one(toy, some)
    with Watched(toy, threads=2) as runtime:
        assert_equal(list(runtime.map(batch for batch in some)), some, expected)
        assert runtime.ran == [(number, HERE, runtime._session) for number in range(40)]
        assert list(runtime.map([])) == []
        assert runtime.loaded == []


@pytest.mark.parametrize(("before", "count", "at_once"), [(0, 32, True), (0, 31, False), (28, 4, True), (27, 4, False), (100, 3, True), (100, 1, False)])  # fmt: skip
def test_batches_seen_earlier_count(before: int, count: int, at_once: bool, toy: Path) -> None:
    some = batches(before + count)
    expected = one_by_one(toy, some)
    with Watched(toy, threads=2, meet=2) as runtime:
        for batch in some[:before]:
            runtime.infer(batch.images)
        assert runtime._batches == before
        assert_equal(list(runtime.map(some[before:])), some[before:], expected[before:])
        assert runtime._batches == before + count
        assert runtime.loaded == ([1] if at_once else [])
        assert len(runtime.threads - {HERE}) == (2 if at_once else 0)


# ---- memory


@pytest.mark.parametrize(
    ("free", "at_once", "loaded"),
    [
        (0, 1, []),
        (399, 1, []),
        (400, 2, []),  # in the session that the threads share
        (599, 2, []),
        (600, 3, [1]),
        (None, 1, []),
    ],
)
def test_as_many_as_memory_has_room_for(free: int | None, at_once: int, loaded: list[int], toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    some = batches(40)
    expected = one_by_one(toy, some)
    looks = iter((5000, 5100))  # around the first batch: no other is looked at
    monkeypatch.setattr(ort, "resident_memory", lambda: next(looks))
    monkeypatch.setattr(ort, "available_memory", lambda: free)
    with Watched(toy, threads=3, meet=at_once if at_once > 1 else 0) as runtime:
        assert_equal(list(runtime.map(some)), some, expected)
        assert (runtime._batch_bytes, runtime.loaded) == (100, loaded)
        assert runtime.ran[0] == (0, HERE, runtime._session)
        runtime.ran = runtime.ran[1:]
        assert runtime.used == {runtime._one_thread if loaded else runtime._session}
        assert len(runtime.threads) == at_once
        assert (HERE in runtime.threads) == (at_once == 1)


@pytest.mark.parametrize(("free", "at_once"), [(599, 1), (600, 2)])
def test_a_larger_batch_takes_more(free: int, at_once: int, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Of one image 100 bytes; of three, in memory that is there for one, 50 more."""
    one, three = batches(1)[0].images, batches(1)[0].images.repeat(3, axis=0)
    looks = iter((5000, 5100, 6000, 6050))
    monkeypatch.setattr(ort, "resident_memory", lambda: next(looks))
    monkeypatch.setattr(ort, "available_memory", lambda: free)
    some = [NamedBatch(three, (Path(f"{number}.jpg"),)) for number in range(40)]
    with Watched(toy, threads=4) as runtime:
        for _ in range(3):
            runtime.infer(one)
        list(runtime.map(some))
        assert runtime._batch_bytes == 150
        runtime.ran = runtime.ran[4:]
        assert len(runtime.threads) <= at_once and (HERE in runtime.threads) == (at_once == 1)


def test_a_batch_that_is_larger_than_all_before_runs_alone(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    some = batches(60)
    for number in (20, 41):
        images = some[number].images.repeat(2 if number == 20 else 3, axis=0)
        some[number] = NamedBatch(images, some[number].paths)
    some[30] = NamedBatch(some[30].images.repeat(2, axis=0), some[30].paths)  # no larger than 20
    expected = one_by_one(toy, some)
    looks = iter(range(0, 600, 100))
    monkeypatch.setattr(ort, "resident_memory", lambda: next(looks))
    with Watched(toy, threads=2) as runtime:
        assert_equal(list(runtime.map(some)), some, expected)
        assert [number for number, name, _ in runtime.ran if name == HERE] == [0, 20, 41]
        assert (runtime._batch_bytes, runtime.loaded) == (300, [1])


def test_memory_that_is_held_already_is_not_missed(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """What the batches of an earlier run took is there for those of the next."""
    some = batches(40)
    free = iter((1000, 400, 399, 500))
    looks = iter((0, 100))
    monkeypatch.setattr(ort, "resident_memory", lambda: next(looks))
    monkeypatch.setattr(ort, "available_memory", lambda: next(free))
    with Watched(toy, threads=4) as runtime:
        for at_once in (True, True, False, True):  # 400 are held; then 300, by those that share
            runtime.ran.clear()
            list(runtime.map(some))
            assert (runtime._one_thread is not None) == at_once
            assert runtime.used - {runtime._session} == ({runtime._one_thread} if at_once else set())  # fmt: skip
        assert runtime.loaded == [1, 1]


def test_a_model_that_cannot_be_loaded_once_more_runs_as_it_is(toy: Path) -> None:
    some = batches(40)
    expected = one_by_one(toy, some)

    def fail(threads: int) -> sessions.Session:
        raise sessions.SessionError(f"no memory for {threads} thread")

    with Watched(toy, threads=2) as runtime:
        runtime._load = fail
        assert_equal(list(runtime.map(some)), some, expected)
        assert runtime.ran == [(number, HERE, runtime._session) for number in range(40)]


def test_a_runtime_that_is_closed_meanwhile(toy: Path) -> None:
    some = batches(40)
    with Watched(toy, threads=2) as runtime:
        results = runtime.map(some)
        next(results)
        next(results)
        runtime.close()
        with pytest.raises(EngineError, match=r"^batch \d+: infer: the model is closed"):
            list(results)


def test_where_the_system_does_not_say_what_a_batch_takes(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    some = batches(40)
    expected = one_by_one(toy, some)
    monkeypatch.setattr(ort, "resident_memory", lambda: None)
    with Watched(toy, threads=2) as runtime:
        for _ in range(2):
            assert_equal(list(runtime.map(some)), some, expected)
        assert runtime.ran == [(number, HERE, runtime._session) for number in range(40)] * 2
        assert (runtime._batch_bytes, runtime.loaded) == (None, [])


@pytest.mark.parametrize(
    ("free", "nbytes", "fitting"),
    [
        (1000, 100, 5),
        (1000, 101, 4),
        (1000, 500, 1),
        (1000, 5000, 1),
        (0, 100, 1),
        (1000, 0, 500),  # too little to be seen
        (1000, -70, 500),  # somebody else has given more back
        (1000, None, 1),
        (None, 100, 1),
        (None, None, 1),
    ],
)
def test_batches_that_fit(free: int | None, nbytes: int | None, fitting: int) -> None:
    assert batches_that_fit(nbytes, free) == fitting


# ---- the end


@pytest.mark.parametrize("failing", [0, 1, 20, 39])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_failure_names_its_batch_and_ends_the_others(threads: int, failing: int, toy: Path) -> None:  # fmt: skip
    some = batches(40)
    expected = one_by_one(toy, some)
    source = Source(some)
    with Watched(toy, threads=threads, failing=failing) as runtime:
        found = []
        with pytest.raises(EngineError, match=rf"^batch {failing}: out of memory \(images: {failing}\.jpg, {failing}b\.jpg\)$"):  # fmt: skip
            for one in runtime.map(source):
                found.append(one)
        assert_equal(found, some[:failing], expected[:failing])
        ahead = threads if threads > 1 and failing else 0
        assert source.taken == list(range(min(failing + ahead + 1, 40)))
        assert {number for number, _, _ in runtime.ran} <= set(source.taken)
        assert of_onnx_runtime() == []
        assert_equal([(some[5], runtime.infer(some[5].images))], [some[5]], [expected[5]])


def test_a_batch_that_cannot_be_had(toy: Path) -> None:
    """The error is that of who makes the batches, and it ends the threads."""

    class Broken(Source):
        def __iter__(self) -> Iterator[NamedBatch]:
            yield from self._batches[:20]
            raise OSError("no more images")

    with Watched(toy, threads=2, meet=2) as runtime:
        found = []
        with pytest.raises(OSError, match=r"^no more images$"):
            for batch, _ in runtime.map(Broken(batches(40))):
                found.append(batch)
        assert len(found) == 18  # two were in flight
        assert of_onnx_runtime() == []


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_leaving_early_ends_the_threads(count: int, threads: int, toy: Path) -> None:
    some = batches(40)
    source = Source(some)
    with Watched(toy, threads=threads) as runtime:
        results = runtime.map(source)
        for number in range(count):
            assert next(results)[0] is some[number]
            # The first one is alone; then there is one for each thread beyond those handed out.
            assert source.taken == list(range(number + 1 + threads if number else 1))
        assert (of_onnx_runtime() != []) == (count > 1)
        results.close()  # type: ignore[attr-defined]
        assert of_onnx_runtime() == []
        assert len(source.taken) == (count + threads if count > 1 else 1)
        assert {number for number, _, _ in runtime.ran} <= set(source.taken)
        assert_equal(list(runtime.map(some)), some, one_by_one(toy, some))


def test_what_a_batch_of_the_wrong_kind_is_told_in_a_thread(toy: Path) -> None:
    some = batches(40)
    odd: NDArray[Any] = some[30].images.astype(np.uint8)
    some[30] = NamedBatch(odd, some[30].paths)
    with Watched(toy, threads=2) as runtime, pytest.raises(ValueError, match=r"^batch 30: input: expected images of .* \(images: 30\.jpg, 30b\.jpg\)$"):  # fmt: skip
        list(runtime.map(some))
    assert of_onnx_runtime() == []
