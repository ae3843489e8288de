# SPDX-License-Identifier: Apache-2.0
"""Detection in many images by the workers of a Ray cluster, with Ray Data.

One actor per GPU, or per `threads` CPU cores, keeps a model open and is handed some images at a
time. Their rows come back to the driver, which keeps them in Parquet files as they come. So a
worker that dies costs what it was at, which Ray hands to another one; a driver that dies costs the
last `FLUSH_SECONDS`, as the next run leaves out the images that are there.

Every machine of the cluster must see this checkout, the model and the images under the same paths,
as on a shared file system, and have the same Python packages.
"""

import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trtdet import files, reading
from trtdet.closing import Closing
from trtdet.detections import Detections
from trtdet.errors import EngineError
from trtdet.spec import METADATA_KEY, ModelSpec

#: An image, and what was found in it or why it could not be read.
Found = tuple[Path, Detections | str]
#: What a worker makes once and then calls with some images at a time. Results are in any order.
Detector = Callable[[Sequence[Path]], Sequence[Found]]

#: Images per call: enough calls for every worker to end at about the same time, and not so many
#: that calls cost.
CALLS_PER_WORKER = 8
MAX_CHUNK = 256
#: Results are written out this often.
FLUSH_SECONDS = 30.0
#: How often a worker that died is replaced, and its images are tried again: an image that kills
#: every worker must end the run.
MAX_RESTARTS = 4
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Workers:
    """How many workers there are, and what each of them has."""

    count: int
    cpus: int
    gpus: int

    def chunk_size(self, images: int, multiple: int) -> int:
        """Images of one call: a multiple of the batch size, so that batches are those of one
        process.
        """
        wanted = min(-(-images // (self.count * CALLS_PER_WORKER)), MAX_CHUNK)
        return max(1, -(-wanted // multiple)) * multiple


def plan_workers(
    resources: Mapping[str, float], *, wanted: int | None, threads: int, on_gpu: bool
) -> Workers:
    """Share out a cluster: one worker per GPU with its part of the CPU cores, or one per `threads`
    cores.

    Args:
        resources: of the cluster, "CPU" and "GPU".
        wanted: so many workers instead.

    Raises:
        ValueError: the cluster does not have what they need.
    """
    cpus, gpus = (int(resources.get(name, 0)) for name in ("CPU", "GPU"))
    room = gpus if on_gpu else cpus // threads
    count = wanted or room
    if not 1 <= count <= room:
        needs = "a GPU" if on_gpu else f"{threads} CPU cores"
        raise ValueError(
            f"--ray: {wanted or 'some'} workers of {needs} each do not fit a cluster of {cpus} CPU cores and {gpus} GPUs; "
            + ("run an ONNX file, or add GPUs" if on_gpu else "ask for fewer with --ray_workers")
        )
    return Workers(count, max(1, cpus // count) if on_gpu else threads, int(on_gpu))


def check_installed() -> None:
    """Before anything else is done.

    Raises:
        EngineError: Ray or what it brings is missing.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import pyarrow  # noqa: F401
        import ray.data  # noqa: F401
    except ImportError as error:
        raise EngineError(
            f"--ray needs Ray ({error}); pip install -r requirements-ray.txt"
        ) from error


@contextmanager
def connect(address: str) -> Iterator[Mapping[str, float]]:
    """Join a cluster, or start one on this machine for "local". Yields its resources.

    Raises:
        EngineError: Ray is not installed, or no cluster is there.
    """
    check_installed()
    import ray

    inherited = os.environ.get("PYTHONPATH")
    python_path = os.pathsep.join([str(ROOT), *([inherited] if inherited else [])])
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(
            address,
            runtime_env={"env_vars": {"PYTHONPATH": python_path}},
            logging_level=logging.ERROR,
            log_to_driver=False,
            **options,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        message = " ".join(str(error).split())
        raise EngineError(
            f"--ray: no Ray cluster at {address} ({message}); give HOST:PORT of 'ray start --head', 'auto' on one of its machines, or 'local'"
        ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


class _Worker:
    """What Ray Data makes of a `Detector`: rows in, rows out."""

    def __init__(self, make_detector: Callable[[], Detector]) -> None:
        self._detector = make_detector()

    def __call__(self, rows: dict[str, Any]) -> Any:
        paths = [Path(path) for chunk in rows["paths"] for path in chunk]
        return to_table(self._detector(paths))


def detect(
    paths: Sequence[Path],
    make_detector: Callable[[], Detector],
    workers: Workers,
    *,
    batch_size: int,
) -> Iterator[Any]:
    """Run the workers of the cluster that this process is connected to.

    Args:
        make_detector: is pickled, and called once in every worker.

    Yields:
        Tables of `to_table`, of some images each, in any order.

    Raises:
        EngineError: a worker failed, or its replacements died too.
    """
    import ray

    size = workers.chunk_size(len(paths), batch_size)
    texts = [str(path) for path in paths]
    chunks = [{"paths": texts[i : i + size]} for i in range(0, len(texts), size)]
    # Ray keeps one call ahead of the one that runs: more would leave some workers idle in the end.
    pool = ray.data.ActorPoolStrategy(size=workers.count, max_tasks_in_flight_per_actor=2)
    with warnings.catch_warnings():
        # From Ray 2.64 on the two limits will be set in another way; 2.60 has only this one.
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        found = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map_batches(
            _Worker,
            batch_size=1,
            fn_constructor_args=(make_detector,),
            compute=pool,
            num_cpus=workers.cpus,
            num_gpus=workers.gpus,
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
        )
    try:
        yield from found.iter_batches(batch_size=None, batch_format="pyarrow")
    except ray.exceptions.RayError as error:
        raise EngineError(f"--ray: a worker failed: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """The line of a worker's traceback that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


# ---- results


def schema() -> Any:
    """One row per image: boxes in pixels of the source image, best first.

    `angles` is null where boxes are not rotated.
    """
    import pyarrow as pa

    return pa.schema(
        {
            "path": pa.string(),
            "error": pa.string(),
            "boxes_xyxy": pa.list_(pa.list_(pa.float32(), 4)),
            "scores": pa.list_(pa.float32()),
            "class_ids": pa.list_(pa.int32()),
            "angles": pa.list_(pa.float32()),
        }
    )


def to_table(found: Sequence[Found]) -> Any:
    """Results as an Arrow table."""
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    for path, result in found:
        if isinstance(result, str):
            rows.append({"path": str(path), "error": result})
            continue
        row = {"boxes_xyxy": result.boxes_xyxy, "scores": result.scores, "class_ids": result.class_ids, "angles": result.angles}  # fmt: skip
        lists = {name: None if value is None else value.tolist() for name, value in row.items()}
        rows.append({"path": str(path), **lists})
    return pa.Table.from_pylist(rows, schema=schema())


def from_row(row: Mapping[str, Any]) -> Detections | str:
    """The inverse of `to_table`, for one row of `Table.to_pylist`."""
    if row["error"] is not None:
        return str(row["error"])
    return Detections(
        np.array(row["boxes_xyxy"], np.float32).reshape(-1, 4),
        np.array(row["scores"], np.float32),
        np.array(row["class_ids"], np.int32),
        None if row["angles"] is None else np.array(row["angles"], np.float32),
    )


@dataclass(frozen=True)
class RunRecord:
    """What results that are done so far belong to: `run.json` beside them."""

    SCHEMA: ClassVar[int] = 1

    run: dict[str, Any]


class Results(Closing):
    """What is done so far: a folder of Parquet files, from which a run that was broken off goes on.

    Args:
        run: what must be the same in the run that goes on, JSON-ready.

    Raises:
        ValueError: the folder has results of another run, or its record cannot be read.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        import pyarrow.parquet as parquet

        self._folder = folder
        self._waiting: list[Any] = []
        self._flushed = time.monotonic()
        self._record = folder / "run.json"
        as_read = json.loads(json.dumps(run))
        self._run = {"schema": RunRecord.SCHEMA, "run": as_read}
        if self._record.is_file():
            found = reading.read(self._record, RunRecord, remedy=f"remove the folder {folder}")
            if found.run != self._run["run"]:
                raise ValueError(
                    f"{folder} has results of a run with another model or other options; finish that one, or remove the folder"
                )
        self._parts = sorted(folder.glob("part-*.parquet"))
        self.done: set[str] = set()
        for part in self._parts:
            self.done.update(parquet.read_table(part, columns=["path"])["path"].to_pylist())

    def add(self, table: Any) -> None:
        """Keep the results of some images."""
        self._waiting.append(table)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.close()

    def close(self) -> None:
        """Write out what is not written yet."""
        import pyarrow as pa
        import pyarrow.parquet as parquet

        self._flushed = time.monotonic()
        if self._waiting:
            if not self._parts:
                text = json.dumps(self._run, indent=2, sort_keys=True) + "\n"
                files.write_text(self._record, text)
            part = self._folder / f"part-{len(self._parts):06d}.parquet"
            with files.atomic_path(part) as temporary:
                parquet.write_table(pa.concat_tables(self._waiting), temporary)
            self._parts.append(part)
            self._waiting = []

    def write_in_order(self, paths: Sequence[Path], target: Path, spec: ModelSpec) -> Iterator[Found]:  # fmt: skip
        """Write all results to one Parquet file in the order of `paths`, with the ModelSpec in
        its metadata, and yield them.
        """
        import pyarrow as pa
        import pyarrow.parquet as parquet

        self.close()
        table = pa.concat_tables([parquet.read_table(part) for part in self._parts])
        rows = {path: number for number, path in enumerate(table["path"].to_pylist())}
        order = [rows[str(path)] for path in paths]
        metadata = {METADATA_KEY: json.dumps(spec.to_dict())}
        with (
            files.atomic_path(target) as temporary,
            parquet.ParquetWriter(temporary, schema().with_metadata(metadata)) as writer,
        ):
            for start in range(0, len(order), MAX_CHUNK):
                some = table.take(order[start : start + MAX_CHUNK])
                writer.write_table(some.replace_schema_metadata(metadata))
                for row in some.to_pylist():
                    yield Path(row["path"]), from_row(row)

    def remove(self) -> None:
        """Delete the folder, once the results are elsewhere."""
        shutil.rmtree(self._folder)
