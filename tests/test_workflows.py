# SPDX-License-Identifier: Apache-2.0
"""The workflows of the hosting: that they are well formed, name files that are there, and may
write nothing.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

yaml = pytest.importorskip("yaml", reason="needs requirements-dev.txt")

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.name for path in WORKFLOWS])
def test_a_workflow_is_well_formed(path: Path) -> None:
    workflow: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    assert set(workflow) <= {
        "name",
        True,
        "permissions",
        "concurrency",
        "jobs",
    }  # YAML 1.1 reads `on` as true
    for name, job in workflow["jobs"].items():
        assert job["runs-on"] == "ubuntu-latest"
        assert job["steps"][0] == {"uses": "actions/checkout@v4"}, name
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert not re.search(r"https?://|--index-url|--extra-index", step.get("run", ""))
            for file in re.findall(r"[\w/.-]+\.(?:sh|py|txt)\b", step.get("run", "")):
                assert (ROOT / file).is_file(), file


def test_they_run_what_ci_runs() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    assert "run: bash tests/run.sh\n" in text
    assert "tests/run.sh" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    listed = set(re.findall(r"requirements[\w-]*\.txt", text)) - {"requirements*.txt"}
    assert listed == {p.name for p in ROOT.glob("requirements*.txt")} - {"requirements-tensorrt.txt", "requirements-rtx.txt"}  # fmt: skip
    assert set(re.findall(r'"(3\.\d+)"', text)) == {"3.10", "3.11", "3.12", "3.13"}


def test_two_workflows_are_there() -> None:
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "security.yml"]
