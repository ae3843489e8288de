# SPDX-License-Identifier: Apache-2.0
"""What an earlier run left in the output folder: said, gone on with, and put in order with what is
new.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from trtdet.results import naming
from trtdet.results.found import Found
from trtdet.results.manifest import JOURNAL, RunFolder, fingerprint

logger = logging.getLogger(__name__)


def say_stale(folder: RunFolder, output: Path, names: Iterable[str], *, clean: bool) -> None:
    """Warn of what an earlier run left, unless it is removed."""
    stale = folder.stale()
    if stale and not clean:
        logger.warning(
            "%s has %d files of an earlier run that this one does not write, such as %s; they are kept (--clean removes them)",
            output,
            len(stale),
            stale[0],
        )
    listed = folder.before.files if folder.before else []
    others = naming.left_over(
        output, [*names, *(name.removesuffix(".tsv") for name in listed if name.endswith(".tsv"))]
    )
    if others:
        logger.warning(
            "%s has results of %d other images, which no manifest lists; they are kept",
            output,
            others,
        )


def find_kept(
    folder: RunFolder,
    output: Path,
    names: Mapping[Path, str],
    image_ids: Mapping[Path, int | str],
    suffixes: Sequence[str],
) -> dict[Path, str]:
    """Images that a run that was broken off has done -> their part of detections.json.

    Args:
        suffixes: of the files of an image, all of which have to be there.
    """
    done = folder.done()
    kept = {}
    for path, name in names.items():
        one = done.get(name)
        if (
            one is not None
            and (one.id, one.image) == (image_ids.get(path), fingerprint(path))
            and all((output / f"{name}{suffix}").is_file() for suffix in suffixes)
        ):
            kept[path] = one.text
    if kept:
        logger.info("--resume: %d of %d images are done already", len(kept), len(names))
    else:
        logger.warning("--resume: %s has no run that was broken off; it begins anew", output)
    return kept


def in_order(
    paths: Sequence[Path], kept: Mapping[Path, str], founds: Iterable[Found]
) -> Iterator[Found | str]:
    """What was done before and what is done now, in the order of the images; those that cannot
    be read are in neither.
    """
    if not kept:
        yield from founds
        return
    waiting = iter(paths)
    for found in founds:
        start = 0
        for at, path in enumerate(found.paths):
            before = [kept[p] for p in takewhile(path.__ne__, waiting) if p in kept]
            if before:
                if at > start:
                    yield found[start:at]
                start = at
                yield from before
        yield found[start:]
    yield from (kept[path] for path in waiting if path in kept)


@contextmanager
def saying_what_is_kept(output: Path, *, resumable: bool) -> Iterator[None]:
    """Let Ctrl-C say how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if resumable and (output / JOURNAL).is_file():
            logger.info("%s keeps what is done; --resume goes on with it", output)
        raise
