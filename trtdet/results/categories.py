# SPDX-License-Identifier: Apache-2.0
"""Which category of an annotation file is which class of a model: by name where both have names,
else by id.
"""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from trtdet.labels import COCO_80_IDS, plain

logger = logging.getLogger(__name__)


def match_categories(
    labels: Sequence[str], category_ids: Sequence[int], categories: Mapping[int, str], path: Path
) -> tuple[int, ...]:
    """[class_id] -> the annotation file's category id; a negative number where it has none.

    Args:
        labels: [class_id] -> name, empty where the model has none.
        category_ids: [class_id] -> id, as the model has it.
        categories: category id -> name, of the annotation file at `path`.

    Raises:
        ValueError: no category of the file is a class of the model.
    """
    named = {plain(name): i for i, name in categories.items() if name != str(i)}
    by_name = [named.get(plain(label)) for label in labels]
    if any(i is not None for i in by_name):
        return _matched_by_name(labels, category_ids, by_name, categories, path)
    ids = set(categories)
    if (
        len(category_ids) == len(COCO_80_IDS)
        and ids <= set(COCO_80_IDS)
        and max(ids, default=0) > 80
    ):
        if tuple(category_ids) != COCO_80_IDS:
            logger.warning(
                "%s has COCO's ids (1 to 90), the model 80 classes %d to %d: matched in COCO's order",
                path, category_ids[0], category_ids[-1],
            )  # fmt: skip
        return COCO_80_IDS
    counted = sorted(category_ids)
    if len(ids) == len(counted) and ids != set(counted):
        # That 80 classes are COCO's may be a convention alone.
        by_convention = tuple(counted) == COCO_80_IDS
        is_counted = by_convention or counted == list(range(counted[0], counted[0] + len(counted)))
        for start in (0, 1):
            if is_counted and ids == set(range(start, start + len(ids))):
                logger.warning(
                    "%s counts categories from %d, the model %s: matched in their order",
                    path, start, "has COCO's ids" if by_convention else f"from {counted[0]}",
                )  # fmt: skip
                _warn_of_names(labels, named, path, "in their order")
                return tuple(start + counted.index(i) for i in category_ids)
    _check(category_ids, categories, path)
    _warn_of_names(labels, named, path, "by id")
    return tuple(category_ids)


def _warn_of_names(labels: Sequence[str], named: Collection[str], path: Path, how: str) -> None:
    """Say where both have names, of which none is the same."""
    if labels and named:
        logger.warning(
            "none of the model's class names (%s) is in %s (%s): matched %s",
            some(labels), path, some(named), how,
        )  # fmt: skip


def _matched_by_name(
    labels: Sequence[str],
    category_ids: Sequence[int],
    by_name: Sequence[int | None],
    categories: Mapping[int, str],
    path: Path,
) -> tuple[int, ...]:
    matched = tuple(-1 - k if i is None else i for k, i in enumerate(by_name))
    moved = [k for k, i in enumerate(matched) if i >= 0 and i != category_ids[k]]
    if moved:
        first = moved[0]
        logger.warning(
            "%s and the model give the same names other ids (%s is %d there, %d in the model; %d of %d differ): matched by name",
            path, labels[first], matched[first], category_ids[first], len(moved), len(matched),
        )  # fmt: skip
    missed = sorted(set(categories) - set(matched), key=str)
    if missed:
        names = some(f"{i} ({categories[i]})" for i in missed)
        logger.warning("categories that the model does not know, all objects missed: %s", names)
    return matched


def _check(category_ids: Sequence[int], categories: Mapping[int, str], path: Path) -> None:
    unknown = categories.keys() - set(category_ids)
    if unknown and len(unknown) == len(categories):
        raise ValueError(
            f"--annotations: expected categories of the model ({some(category_ids)}), "
            f"{path} has {some(sorted(unknown, key=str))}, and no name is the same; give the annotations that the model was trained for, or convert it with "
            "--labels"
        )
    if unknown:
        names = some(f"{i} ({categories[i]})" for i in sorted(unknown, key=str))
        logger.warning("categories that the model does not know, all objects missed: %s", names)


def some(values: Iterable[object], limit: int = 10) -> str:
    """The first few of many, for a message."""
    texts = [str(value) for value in values]
    return ", ".join(texts[:limit]) + (", ..." if len(texts) > limit else "")
