# SPDX-License-Identifier: Apache-2.0
"""What a run leaves in its output folder, written down: so that the next run knows what is stale,
and one that was broken off can go on.

manifest.json lists the files and what they were made with. While a run is under way,
detections.partial.jsonl has a line for each image that is done: its name, its id and its part of
detections.json.
"""

import dataclasses
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, TextIO

from trtdet import checks, files, reading
from trtdet.closing import Closing
from trtdet.labels import LABELS_FILE

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
JOURNAL = "detections.partial.jsonl"


@dataclass(frozen=True)
class Manifest:
    """One run.

    Attributes:
        files: that it and earlier ones have written, relative to the output folder, with "/"; of an
            unfinished run, `JOURNAL` says what it has written besides.
        run: what must be the same for a run to go on with them.
        complete: whether it came to its end.
        suffixes: of the files of an image.
    """

    SCHEMA: ClassVar[int] = 1

    files: list[str]
    run: dict[str, Any]
    complete: bool
    suffixes: list[str]

    def __post_init__(self) -> None:
        for name in self.files:
            if not _is_within(name):
                raise ValueError(f"files: expected names within the folder, found {name!r}")


@dataclass(frozen=True)
class Done:
    """A line of `JOURNAL`: one image.

    Attributes:
        name: of its outputs, relative to the output folder, without suffix.
        id: its id in detections.json.
        image: its fingerprint, see `fingerprint`.
        text: its part of detections.json.
    """

    name: str
    id: int | str | None
    image: str
    text: str


def journal_line(path: Path, name: str, image_id: int | str | None, text: str) -> str:
    """The line of an image whose files are written; see `Done`."""
    done = Done(name, image_id, fingerprint(path), text)
    return json.dumps(dataclasses.asdict(done)) + "\n"


def fingerprint(path: Path) -> str:
    """What tells an image from another of the same name: its path, size and time, as a hash."""
    try:
        found = os.stat(path)
        about = f"{found.st_size} {found.st_mtime_ns} "
    except OSError:  # it has gone meanwhile
        about = ""
    return hashlib.sha256(about.encode() + os.fsencode(path.absolute())).hexdigest()[:16]


class RunFolder(Closing):
    """The output folder of one run.

    Args:
        planned: files that this run writes, relative to `output`.
        suffixes: of the files of an image.
        run: JSON-ready, see `Manifest`.

    Raises:
        OSError, ValueError: a manifest that cannot be read.
    """

    def __init__(
        self, output: Path, planned: Sequence[str], suffixes: Sequence[str], run: Mapping[str, Any]
    ) -> None:
        self._output = output
        self._suffixes = list(suffixes)
        self._planned = dict.fromkeys(planned)
        self._run: dict[str, Any] = json.loads(json.dumps(run))  # as it is read
        self._lock = threading.Lock()
        self._partial: TextIO | None = None
        self.before: Manifest | None = None
        path = output / MANIFEST
        if files.is_beside(path):
            remedy = f"remove it, and what else {output} has of an earlier run"
            self.before = reading.read(path, Manifest, remedy=remedy)

    @property
    def broken_off(self) -> bool:
        """Whether an earlier run did not come to its end, and left what is done."""
        unfinished = self.before is not None and not self.before.complete
        return unfinished and (self._output / JOURNAL).is_file()

    def stale(self) -> list[str]:
        """What an earlier run left, and this one does not write."""
        listed = [*self.before.files, *self._written_by_unfinished()] if self.before else []
        return [
            name
            for name in listed
            if name not in self._planned and os.path.isfile(self._output / name)
        ]

    def clean(self) -> int:
        """Remove what an earlier run wrote, nothing else; returns how many files that were."""
        if self.before is None:
            return 0
        root = os.path.realpath(self._output)
        removed = 0
        written = [*self.before.files, *self._written_by_unfinished()]
        for name in [*written, MANIFEST, JOURNAL]:
            path = self._output / name
            if _lies_in(path.parent, root) and (os.path.isfile(path) or os.path.islink(path)):
                path.unlink()
                removed += 1
        folders = {parent for name in written for parent in PurePosixPath(name).parents}
        for folder in sorted(folders - {PurePosixPath(".")}, key=lambda f: -len(f.parts)):
            path = self._output / folder
            if _lies_in(path, root) and not os.path.islink(path) and os.path.isdir(path):
                files.remove_empty([path])
        self.before = None
        return removed

    def done(self) -> dict[str, Done]:
        """Images of a run that was broken off: output name -> its line.

        Raises:
            ValueError: the folder has results of a run with other options.
        """
        path = self._output / JOURNAL
        if self.before is None or self.before.complete or not files.is_beside(path):
            return {}
        if self.before.run != self._run:
            other = [
                key
                for key in {*self._run, *self.before.run}
                if self._run.get(key) != self.before.run.get(key)
            ]
            raise ValueError(
                f"--resume: {self._output} has results of a run with another {' and '.join(sorted(other))}; "
                "finish that one, or start anew without --resume"
            )
        return {one.name: one for one in self._journal()}

    def _journal(self) -> Iterator[Done]:
        """The lines of `JOURNAL`.

        Raises:
            ValueError: one that is none.
        """
        path = self._output / JOURNAL
        for line in files.read_text(path).splitlines(keepends=True):
            if line.endswith("\n"):  # the last one may be cut
                one = reading.parse(
                    line, Done, name=str(path), remedy="start anew without --resume"
                )
                _check_results(path, one.text)
                yield one

    def _written_by_unfinished(self) -> list[str]:
        """What a run that was broken off has written for its images."""
        if self.before is None or not self.broken_off:
            return []
        try:
            names = [one.name for one in self._journal()]
        except (OSError, ValueError) as error:  # of no use, and no reason to stop
            logger.debug("%s", error)
            return []
        written = [name + suffix for name in names for suffix in self.before.suffixes]
        return [name for name in written if _is_within(name)]

    def start(self, *, clean: bool = False, resumed: bool = False, partial: bool = True) -> None:
        """The first result is there: remove what an earlier run wrote, if that is asked for, and
        begin.
        """
        if clean:
            removed = self.clean()
            logger.info("--clean: removed %d files of an earlier run", removed)
        self.begin(resumed=resumed, partial=partial)

    def begin(self, *, resumed: bool = False, partial: bool = True) -> None:
        """Write the manifest, and open `JOURNAL`: a run has results from here on.

        Args:
            resumed: go on with the lines that are there.
            partial: keep one.
        """
        self._write_manifest(complete=False)
        path = self._output / JOURNAL
        if not resumed:
            path.unlink(missing_ok=True)
        if partial:
            if resumed and path.is_file():
                _cut_last_line(path)
            self._partial = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)

    def add(self, line: str) -> None:
        """An image whose files are written: its `journal_line`, or those of several."""
        if self._partial is None:
            return
        with self._lock:
            self._partial.write(line)
            self._partial.flush()

    def finish(self, not_read: Iterable[str] = ()) -> None:
        """All is written.

        Args:
            not_read: names of the outputs of images that could not be read.
        """
        self.close()
        if self.before and LABELS_FILE in self.before.files and LABELS_FILE not in self._planned:
            (self._output / LABELS_FILE).unlink(missing_ok=True)  # of other classes
        names = [name + suffix for name in not_read for suffix in self._suffixes]
        if old := [name for name in names if os.path.isfile(self._output / name)]:
            logger.warning("%s has results of an earlier run of images that could not be read now, such as %s", self._output, old[0])  # fmt: skip
        self._write_manifest(complete=True)
        (self._output / JOURNAL).unlink(missing_ok=True)

    def list_again(self) -> None:
        """The page of the run is written, too."""
        self._write_manifest(complete=True)

    def close(self) -> None:
        if self._partial is not None:
            self._partial.close()
            self._partial = None

    def _write_manifest(self, *, complete: bool) -> None:
        # Only what was written, so that nothing else is ever removed; what is kept of an earlier
        # run can be removed later.
        earlier = [*self.before.files, *self._written_by_unfinished()] if self.before else []
        names = {*earlier, *(self._planned if complete else ())}
        content = {
            "schema": Manifest.SCHEMA,
            "complete": complete,
            "run": self._run,
            "suffixes": self._suffixes,
            "files": sorted(name for name in names if os.path.isfile(self._output / name)),
        }
        files.write_text(self._output / MANIFEST, json.dumps(content, indent=1) + "\n")


def _lies_in(path: Path, root: str) -> bool:
    """Whether a path leads into a folder, links followed."""
    return Path(os.path.realpath(path)).is_relative_to(root)


def _is_within(name: str) -> bool:
    """Whether a name stays within the folder that it is relative to."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and bool(path.name)


def _check_results(path: Path, text: str) -> None:
    """Find out whether the part of detections.json that a line keeps is one: it is copied as it is.

    Raises:
        ValueError: it is none.
    """
    try:
        entries = json.loads(f"[{text}]")
    except (ValueError, RecursionError):
        entries = [None]
    if not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: text: expected detections in JSON, found {checks.shown(text)}; start anew without --resume")  # fmt: skip


def _cut_last_line(path: Path) -> None:
    """Remove a last line that was not written to its end."""
    data = path.read_bytes()
    path.write_bytes(data[: data.rfind(b"\n") + 1])
