# SPDX-License-Identifier: Apache-2.0
"""`trtdet.conversion.specify`: the table of facts says what the spec says."""

import pytest

from trtdet.conversion.options import Options
from trtdet.conversion.specify import specify
from trtdet.families.base import Reading
from trtdet.labels import COCO_80_IDS, COCO_80_LABELS
from trtdet.spec import Fact, ModelSpec, Nms, Preprocessing


@pytest.mark.parametrize(
    ("labels", "ids", "fact"),
    [
        ((), tuple(range(80)), Fact("category ids", "0..79", "convention: DETR: class index")),
        (COCO_80_LABELS, COCO_80_IDS, Fact("category ids", "COCO's 80", "given: --labels, COCO's names")),
        (("human", "bike", *COCO_80_LABELS[2:]), COCO_80_IDS, Fact("category ids", "COCO's 80", "given: --labels, COCO's names")),
        (tuple("x" + name for name in COCO_80_LABELS), tuple(range(80)), Fact("category ids", "0..79", "convention: DETR: class index")),
    ],
)  # fmt: skip
def test_category_ids(labels: tuple[str, ...], ids: tuple[int, ...], fact: Fact) -> None:
    spec = ModelSpec(
        family="detr",
        preprocessing=Preprocessing((32, 32)),
        nms=Nms(),
        category_ids=tuple(range(80)),
        box_order="xyxy",
        selection="topk",
        anchored=False,
    )
    facts = (Fact("category ids", "0..79", "convention: DETR: class index"),)
    found = specify(Reading(spec, "i", "i", "NCHW", {}, facts=facts), Options(labels=labels))
    assert found.category_ids == ids
    assert found.evidence == (fact,)
