"""Studies' records beside what is stored: rows merge, and no record forgets a run that has ended."""

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.studies.test_study import arm
from tests.support.stored import fail, put

from forwardgrad.lab import environment
from forwardgrad.lab.commands import options, studies
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.recipes import paper
from forwardgrad.lab.report.claims.judged import judge
from forwardgrad.lab.store import results
from forwardgrad.lab.store.files import PACKED, write_json
from forwardgrad.lab.store.schema import read_study
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.length import Length, Pace
from forwardgrad.lab.studies.run import SCHEMA, Optimizer, Run
from forwardgrad.lab.studies.study import Arm, Study
from forwardgrad.lab.tuning.campaign import Campaign, run_study

ROOT = Path(__file__).resolve().parents[3]
TWO = (arm("a", lr=(0.1, 0.2)), arm("b", lr=(0.1, 0.2)))
STUDY = Study("s", "S", TWO, seeds=2, tuning=Length(epochs=2))


class Storing:
    """Trains nothing: a run ends with a loss that its learning rate says, and is stored; `stop` is how many runs it takes to be killed."""

    def __init__(self, store: Store, stop: int | None = None) -> None:
        self.store, self.left = store, stop

    def __call__(self, runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
        for run in runs:
            if self.store.result(run.identity) is None:
                if self.left == 0:
                    raise KeyboardInterrupt
                self.left = None if self.left is None else self.left - 1
                put(self.store, run, run.optimizer.lr, steps=4)
        return {run.identity: self.store.result(run.identity) or {} for run in runs}


def carried(store: Store, study: Study, command: str = "command", *, stop: int | None = None) -> dict[str, Any]:
    return run_study(study, store, Storing(store, stop), command, pace=lambda run: Pace(0.01, 1))


def contents(store: Store) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((store.root / "studies").glob("*.json"))}


def with_run(**change: Any) -> Study:
    return dataclasses.replace(STUDY, arms=tuple(dataclasses.replace(each, run=dataclasses.replace(each.run, **change)) for each in TWO))


ANOTHER = {
    "engine": with_run(engine="compile"),
    "precision": with_run(precision="bfloat16"),
    "hyperparameter": with_run(optimizer=Optimizer("sgd", 0.5, decay=1e-4)),
    "batch size": with_run(batch_size=32),
    "length": with_run(epochs=7),
    "length of trials": dataclasses.replace(STUDY, tuning=Length(epochs=1)),
    "length in steps": dataclasses.replace(STUDY, training=Length(steps=50)),
    "seconds": dataclasses.replace(STUDY, training=Length(seconds=3.0)),
    "space": dataclasses.replace(STUDY, arms=(arm("a", lr=(0.3, 0.4)), arm("b", lr=(0.3, 0.4)))),
    "smaller space": dataclasses.replace(STUDY, arms=(arm("a", lr=(0.2,)), arm("b", lr=(0.2,)))),
}


@pytest.mark.parametrize("other", ANOTHER.values(), ids=ANOTHER)
def test_another_study_of_the_same_name_is_another_record(tmp_path: Path, other: Study) -> None:
    store = Store(tmp_path)
    carried(store, STUDY, "first")
    before = contents(store)
    record = carried(store, other, "second")
    assert (record["name"], record["of"], record["title"]) == ("s-2", "s", "S (2)")
    assert contents(store)["s.json"] == before["s.json"]
    assert [len(each["runs"]) for each in record["arms"]] == [2, 2]
    after = contents(store)
    assert carried(store, other, "third")["name"] == "s-2"  # the same command goes on in its record, and adds none
    assert carried(store, STUDY, "fourth")["name"] == "s"
    assert contents(store) == after
    assert {study.name: study.family for study in results.studies(store)} == {"s": "s", "s-2": "s"}


@pytest.mark.parametrize("stop", range(4))
def test_an_interrupted_one_leaves_the_record_that_is_there_and_goes_on_in_its_own(tmp_path: Path, stop: int) -> None:
    store, other = Store(tmp_path), with_run(epochs=7, engine="compile")
    carried(store, STUDY)
    before = contents(store)["s.json"]
    with pytest.raises(KeyboardInterrupt):
        carried(store, other, stop=stop)
    assert contents(store)["s.json"] == before
    assert carried(store, other)["name"] == "s-2"
    assert set(contents(store)) == {"s.json", "s-2.json"}


def test_the_same_study_at_an_earlier_stage_takes_nothing_from_its_record(tmp_path: Path) -> None:
    store = Store(tmp_path)
    carried(store, STUDY, "first")
    before = contents(store)
    (missing, *_) = read_study(tmp_path / "studies" / "s.json")["arms"][0]["trials"]
    shutil.rmtree(store.folder(missing["run"]))
    with pytest.raises(KeyboardInterrupt):
        carried(store, STUDY, "second", stop=0)
    assert contents(store) == before  # its final runs are still named, though this command has not come to them
    carried(store, STUDY, "third")
    assert contents(store) == before


def test_more_of_the_same_extends_the_record(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = carried(store, STUDY, "first")
    more = carried(store, dataclasses.replace(STUDY, seeds=3), "second")
    assert (more["name"], [len(each["runs"]) for each in more["arms"]], more["arms"][0]["command"]) == ("s", [3, 3], "second")
    assert more["arms"][0]["runs"][:2] == first["arms"][0]["runs"]
    before = contents(store)
    carried(store, STUDY, "third")  # fewer seeds
    assert [each["runs"] for each in read_study(tmp_path / "studies" / "s.json")["arms"]] == [each["runs"] for each in more["arms"]]
    assert contents(store).keys() == before.keys()
    wider = tuple(arm(name, lr=(0.1, 0.2, 0.3)) for name in "ab")  # the winner is the same
    record = carried(store, dataclasses.replace(STUDY, arms=wider, seeds=3), "fourth")
    assert record["name"] == "s-2"  # its plan does not name the final runs before it has searched
    assert carried(store, dataclasses.replace(STUDY, arms=wider, seeds=3), "fifth")["name"] == "s-2"
    assert set(contents(store)) == {"s.json", "s-2.json"}
    assert [len(each["trials"]) for each in record["arms"]] == [3, 3]


def test_a_study_whose_runs_only_failed_is_replaced_after_it_was_mended(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def failing(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
        for run in runs:
            fail(store, run, "no such luck")
        return {run.identity: store.result(run.identity) or {} for run in runs}

    assert run_study(STUDY, store, failing, "first")["arms"][0]["no_winner"] == "all 2 trials failed"
    record = carried(store, with_run(code="mended"), "second")
    assert (record["name"], record["arms"][0]["command"], "no_winner" in record["arms"][0]) == ("s", "second", False)
    assert set(contents(store)) == {"s.json"}


def test_a_study_that_is_called_like_a_further_record_stays_its_own(tmp_path: Path) -> None:
    store = Store(tmp_path)
    own = Study("s-2", "mine", (arm("x"),))
    carried(store, own)
    carried(store, STUDY)
    assert carried(store, with_run(epochs=7))["name"] == "s-3"
    assert carried(store, own)["name"] == "s-2"
    assert [each["name"] for each in read_study(tmp_path / "studies" / "s-2.json")["arms"]] == ["x"]


def test_the_published_record_is_kept_to_the_byte(tmp_path: Path) -> None:
    store = Store(tmp_path)
    shutil.copytree(ROOT / "results" / "studies", tmp_path / "studies", dirs_exist_ok=True)
    shutil.copy(ROOT / "results" / PACKED, tmp_path)
    before = contents(store)
    published = paper.table1().computed(engine="graph")
    carried(store, published, "forwardgrad reproduce table1 --engine graph", stop=0)  # all is there: nothing is trained
    assert contents(store) == before
    with pytest.raises(KeyboardInterrupt):
        carried(store, paper.table1(), "forwardgrad reproduce table1", stop=0)
    after = contents(store)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"table1-2.json"}
    assert json.loads(after["table1-2.json"])["of"] == "table1"


@pytest.mark.parametrize("full_first", [True, False])
def test_claims_are_decided_by_the_fullest_of_several_records(tmp_path: Path, full_first: bool) -> None:
    store = Store(tmp_path)
    short, full = paper.table1(["1", "2"], epochs=1, seeds=3), paper.table1(["1", "2"], seeds=3)
    for study in (full, short) if full_first else (short, full):
        carried(store, study)
    assert [study.name for study in results.studies(store)] == ["table1-2", "table1"]
    whole = [study for study in results.studies(store) if not any(each.shortened for each in study.arms)]
    assert judge(results.studies(store), {}) == judge([dataclasses.replace(whole[0], of="table1")], {})


def test_steps_timed_elsewhere_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`reproduce` times steps by the way: into a folder that holds no times, and beside those of the same machine and commit."""
    store, asked = Store(tmp_path), []
    monkeypatch.setattr(
        "forwardgrad.lab.bench.measure_steps", lambda store, cases, *_, **__: asked.append([case.model for case in cases]) or []
    )
    studies._time_steps(store, {"cnn", "nn"}, "cpu")
    assert asked == [["cnn", "nn"]]
    here = environment.describe(torch.device("cpu"))
    cases = [{"model": "nn", "batch": 64, "layout": "contiguous", "accelerator": "cpu", "arms": []}]
    for change, times in (({"commit": here["commit"]}, 2), ({"commit": "another"}, 2), ({"device": "another"}, 2)):
        write_json(tmp_path / "bench.json", {"schema": SCHEMA, "environment": {**here, **change}, "cases": cases})
        before = (tmp_path / "bench.json").read_bytes()
        studies._time_steps(store, {"cnn"}, "cpu")
        assert len(asked) == times
        assert (tmp_path / "bench.json").read_bytes() == before
    assert "bench.json is of another machine or commit and is kept" in capsys.readouterr().err


def test_published_commands_say_where_the_evidence_lies() -> None:
    commands = re.findall(r"^ +(forwardgrad .*)$", (ROOT / "results" / "README.md").read_text(), re.MULTILINE)
    assert len(commands) > 15
    assert [command for command in commands if not re.search(r" --out results(/gpu|/faster|/finetune|/passes|/cifar)?( |$)", command)] == []
    assert Path("results") != options.OUT


def test_what_cannot_begin_is_examined_before_anything_is_written(tmp_path: Path) -> None:
    store, asked = Store(tmp_path), []

    def examine(runs: Sequence[Run]) -> None:
        asked.append([run.identity for run in runs])
        if len(asked) > 1:
            raise UserError("the data are missing")

    first = Campaign(STUDY, store, Storing(store), "command", examine=examine)
    first.plan()
    assert not contents(store)
    fixed: tuple[Arm, ...] = (arm("fixed"),)
    with pytest.raises(UserError, match="the data are missing"):
        Campaign(dataclasses.replace(STUDY, arms=fixed), store, Storing(store), "command", examine=examine).run()
    assert not contents(store)
    assert [len(runs) for runs in asked] == [2, 2]  # arms of one description share their trials; a fixed arm has final runs alone


def test_older_records_are_read_as_they_were(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = carried(store, STUDY)
    for each in record["arms"]:
        each["chosen"] = {"values": {"lr": 0.1}, "validation_loss": None, "at_edge": ["lr"]}  # as where all had diverged
    write_json(tmp_path / "studies" / "s.json", record)
    assert read_study(tmp_path / "studies" / "s.json") == record
