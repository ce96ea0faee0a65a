"""results/records.md is what its generator makes of the results beside it, and says what they hold."""

from __future__ import annotations

import math
import re
from pathlib import Path

from forwardgrad.lab.records.candidates import best, candidates
from forwardgrad.lab.records.page import records_page
from forwardgrad.lab.records.tasks import TASKS
from forwardgrad.lab.records.wording import RULE, TEST
from forwardgrad.lab.store.store import Store

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "results" / "records.md"


def test_the_page_is_that_of_the_results() -> None:
    """Where this fails: `forwardgrad record list --out results/records.md`."""
    assert PAGE.read_text(encoding="utf-8") == records_page(ROOT / "results")


def test_every_task_has_a_row_and_every_source_a_commit_and_a_command() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in TASKS:
        assert re.search(rf"^\| `{name}`: .* \| \*\*forward-only\*\* \|", text, re.MULTILINE), name
    numbered = re.findall(r"^\d+\. .*$", text, re.MULTILINE)
    assert numbered
    for line in numbered:
        assert re.search(r"commit [0-9a-f]{12}\+?\. `forwardgrad .*`$", line), line


def test_the_documentation_states_the_rule_and_the_test_as_the_program_has_them() -> None:
    told = " ".join((ROOT / "docs" / "records.md").read_text(encoding="utf-8").split())
    for words in (RULE, TEST):
        assert words in told


def test_the_best_is_found_again_by_hand() -> None:
    """From the files of the runs themselves: the mean test accuracy of every arm of the NN with three seeds or more."""
    found = candidates(ROOT / "results")
    task = TASKS["mnist-nn-accuracy"]
    record = best(task, [each for each in found if each.claim.task == task.name], None, reverse=False)
    assert record is not None
    means: dict[str, float] = {}
    for folder in ("results", "results/faster"):
        store = Store(ROOT / folder, create=False)
        for study in store.studies():
            for arm in study["arms"]:
                stored = [store.stored(name) for name in arm["runs"]]
                if len(stored) < 3 or any(each is None or each.result is None for each in stored):
                    continue
                asked = [each.description for each in stored if each is not None]
                if {each["model"] for each in asked} == {"nn"} and {each["estimator"]["name"] for each in asked}.isdisjoint({"backprop"}):
                    tests = [each.result["test"]["accuracy"] for each in stored if each is not None and each.result is not None]
                    means[f"{folder} {arm['name']}"] = math.fsum(tests) / len(tests)
    assert record.claim.value() == max(means.values())
    assert len(record.claim.runs) >= 3
