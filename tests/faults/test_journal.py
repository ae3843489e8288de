# SPDX-License-Identifier: Apache-2.0
"""The journal of tune_precision.py: a line that is not whole is left out and named, the others
count; what is no journal is one line.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import fault_damage
import pytest

from trtdet.precision.sensitivity import Journal

LINE = {"schema": 1, "key": "k", "kind": "ap", "layers": ["a"], "values": {"AP": 0.5}}
SOUND = json.dumps(LINE | {"key": "sound"})

#: What stands in place of a line.
LEFT_OUT: dict[str, bytes] = {
    "null": b"null", "number": b"7", "list": b"[]", "object": b"{}", "half": SOUND[:40].encode(), "noise": b"\x8b\xff\x00\x12", "deep": b"[" * 10**5,
    "text": b"the quick brown fox", "NUL": b"\0\0", "schema null": json.dumps(LINE | {"schema": None}).encode(),
    "schema text": json.dumps(LINE | {"schema": "1"}).encode(), "key null": json.dumps(LINE | {"key": None}).encode(),
    "no key": json.dumps({k: v for k, v in LINE.items() if k != "key"}).encode(), "values null": json.dumps(LINE | {"values": None}).encode(),
    "value null": json.dumps(LINE | {"values": {"AP": None}}).encode(), "value text": json.dumps(LINE | {"values": {"AP": "0.5"}}).encode(),
    "value NaN": json.dumps(LINE | {"values": {"AP": float("nan")}}).encode(), "value inf": json.dumps(LINE | {"values": {"AP": float("inf")}}).encode(),
    "value of 400 digits": json.dumps(LINE | {"values": {"AP": 10**400}}).encode(), "values list": json.dumps(LINE | {"values": [0.5]}).encode(),
    "long number": b"9" * 5000, "two": SOUND.encode() + b" " + SOUND.encode(),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_line_that_is_not_whole_is_left_out(name: str, tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "p.json.journal"
    path.write_bytes(LEFT_OUT[name] + b"\n" + SOUND.encode() + b"\n")
    with caplog.at_level(logging.WARNING):
        journal = Journal(path, {})
    assert len(journal) == 1
    (record,) = caplog.records
    text = record.getMessage()
    assert f"left out a line that is not whole: {path}:1: " in text
    assert re.search(r"\bexpected .*, found ", text)


@pytest.mark.parametrize("schema", [0, 2, 99, 10**400])
def test_a_journal_of_another_schema_is_refused(schema: int, tmp_path: Path) -> None:
    path = tmp_path / "p.json.journal"
    path.write_text(f"{SOUND}\n{json.dumps(LINE | {'schema': schema})}\n")
    with pytest.raises(ValueError, match=r"p\.json\.journal:2: expected schema 1, found .*; delete it"):  # fmt: skip
        Journal(path, {})


@pytest.mark.parametrize("damage", ["folder", "fifo", "loop", "dangling", "endless", "nothing"])
def test_what_is_no_file_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json.journal"
    path.write_text(SOUND)
    fault_damage.WHOLE[damage](path)
    with pytest.raises(ValueError, match=r"p\.json\.journal: expected a file, found a (folder|FIFO|link|device)"):  # fmt: skip
        Journal(path, {})


def test_a_journal_that_was_cut_off_goes_on_with_a_new_line(tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "p.json.journal"
    path.write_text(f"{SOUND}\n{SOUND[:30]}")
    journal = Journal(path, {"model": "m"})
    journal.measure("ap", ["a"], ["AP"], lambda: {"AP": 0.25})
    assert len(Journal(path, {"model": "m"})) == 2
    assert path.read_text().count("\n") == 3
