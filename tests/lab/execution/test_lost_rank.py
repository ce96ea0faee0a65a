"""Ranks that are killed: those that are left go on from the last checkpoint, or torchrun starts all of them again."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.execution.test_team import ROOT, RUN, assert_the_same, environment
from tests.support.faults import tidy

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.execution import place as places
from forwardgrad.lab.execution import workers as rooms
from forwardgrad.lab.execution.dispatch import execute
from forwardgrad.lab.execution.place import Place
from forwardgrad.lab.execution.unit import FewerRanks, Reply, Unit, train_unit
from forwardgrad.lab.execution.workers import InThisProcess
from forwardgrad.lab.lockstep import RankLost
from forwardgrad.lab.store.progress import Progress
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies import from_json, signed
from forwardgrad.lab.studies.run import Run
from forwardgrad.lab.training import builders
from forwardgrad.lab.training.step_logs import replay_run
from forwardgrad.lab.training.training import Training

LOW_RANK = {"name": "forward", "tangents": 2, "perturb": {"name": "low-rank"}}
MODULE = """
import os, signal
import torch.distributed as dist
from torch import nn

class Dies(nn.Linear):
    # The second of two ranks is killed in the middle of the first life of a run.
    calls = 0

    def __init__(self):
        super().__init__(64, 10)

    def forward(self, x):
        if dist.is_initialized() and dist.get_rank() == 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            self.calls += 1
            if self.calls == 45:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x.flatten(1))
"""
COMMAND = """
import sys
from functools import partial
from pathlib import Path
from forwardgrad.lab.cli import main
from forwardgrad.lab.commands import training
from forwardgrad.lab.lockstep import Team

begin = Team.begin

def noted(self, checkpoint):
    with Path("begun.txt").open("a") as file:
        file.write(f"{bool(checkpoint)} ")
    begin(self, checkpoint)

Team.begin = noted
training.Place = partial(training.Place, checkpoint_seconds=0.0)
sys.exit(main())
"""


class Said(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def dying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "dying_rank.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("dying_rank", None)


@pytest.mark.full
def test_a_run_goes_on_with_the_ranks_that_are_left(dying: Path) -> None:
    run = signed(dataclasses.replace(RUN, model="dying_rank:Dies", estimator=LOW_RANK, epochs=4))
    store, alone, said = Store(dying / "out"), Store(dying / "alone"), Said()
    here: dict[str, Any] = {"threads": 1, "path": dying, "checkpoint_seconds": 0.0, "keep_weights": True}
    execute([run], store, Place(**here, ranks=2, lost_rank="go-on", log=True), said)
    killed = "rank 1 of 2 was killed by SIGKILL, as is done where memory runs out"
    assert said.lines == [f"{run.identity}: {killed}; it goes on from its last checkpoint with one process"]
    execute([run], alone, Place(**here), Said())
    assert_the_same(store, alone, run)
    found = environment(store, run)
    assert "ranks" not in found
    assert found["before"]["ranks"] == 2
    on = torch.device("cpu")
    again = Training.begin(run, builders.dataset(run, on, None), on)
    rebuilt = replay_run(again, store.folder(run.identity) / "steps.log", None)
    assert (rebuilt.steps, rebuilt.compared, rebuilt.kept) == (4 * 17, True, True)  # each step once
    tidy(store)


@pytest.mark.full
def test_torchrun_starts_all_ranks_again_and_they_go_on(dying: Path) -> None:
    (dying / "command.py").write_text(COMMAND)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "command.py"]
    train = ["train", "--data", "digits", "--model", "dying_rank:Dies", "--estimator", "backprop", "--lr", "0.1", "--momentum", "0.5"]
    words = [*start, *train, "--epochs", "4", "--out", "out"]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), str(dying)])
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=dying, timeout=300, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished, validation loss") == 1
    assert (dying / "begun.txt").read_text().split() == ["False", "True"]  # at the start, and at a checkpoint
    store, alone = Store(dying / "out"), Store(dying / "alone")
    (name,) = store.runs()
    run = from_json(json_of(store, name), "run.json")
    execute([run], alone, Place(threads=1, path=dying), Said())
    assert_the_same(store, alone, run)
    assert environment(store, run)["ranks"] == 2
    tidy(store)


def json_of(store: Store, name: str) -> dict[str, Any]:
    from forwardgrad.lab.store import read_json

    return read_json(store.folder(name) / "run.json") or {}


class Losing(InThisProcess):
    """Workers whose runs lose two ranks at a time."""

    def start(self, unit: Unit, store: Store, ranks: int | None) -> None:
        self.places = [*getattr(self, "places", []), self.place.with_ranks(ranks)]
        if self.places[-1].ranks > 1:
            self._done.append((unit, FewerRanks("two ranks are gone", max(1, self.places[-1].ranks - 2))))
        else:
            super().start(unit, store, ranks)


def test_ranks_are_lost_down_to_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Losing] = []
    monkeypatch.setattr(rooms, "_workers", lambda place: made.append(Losing(place)) or made[0])
    said = Said()
    result = execute([RUN], Store(tmp_path), Place(threads=1, ranks=6, directions=2, lost_rank="go-on"), said)
    assert [(place.ranks, place.directions, place.lost_rank) for place in made[0].places] == [
        (6, 2, "go-on"),
        (4, 2, "go-on"),
        (2, 2, "go-on"),
        (1, 1, "end"),
    ]
    assert [line.partition("; ")[2] for line in said.lines] == [
        "it begins again with 4 ranks",
        "it begins again with 2 ranks",
        "it begins again with one process",
    ]
    assert result[RUN.identity]["status"] == "finished"


def test_as_many_ranks_divide_directions_as_still_can() -> None:
    place = Place(ranks=6, directions=6, lost_rank="go-on")
    assert [place.with_ranks(ranks).directions for ranks in (5, 4, 3, 2, 1)] == [1, 2, 3, 2, 1]
    assert place.with_ranks(None) is place


@pytest.mark.parametrize(("lost", "left"), [(1, 3), (2, 2), (9, 1)])
def test_a_lost_rank_ends_a_run_or_leaves_it_fewer(lost: int, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def losing(*_: Any) -> Reply:
        raise RankLost("gone", lost)

    monkeypatch.setattr("forwardgrad.lab.execution.unit._train", losing)
    assert isinstance(train_unit((RUN,), Store(tmp_path), Place(ranks=4)), RankLost)
    reply = train_unit((RUN,), Store(tmp_path), Place(ranks=4, lost_rank="go-on", jobs=2))
    assert isinstance(reply, FewerRanks)
    assert (reply.how, reply.left) == ("gone", left)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"directions": 0}, "the number of ranks that divide directions must be at least 1, not 0"),
    ({"directions": 2}, "--directions 2 must divide the number of ranks, which is 1: give a multiple of it"),
    ({"directions": 2, "ranks": 3}, "--directions 2 must divide the number of ranks, which is 3"),
    ({"lost_rank": "wait", "ranks": 2}, "unknown lost_rank 'wait': choose one of end, go-on"),
    ({"lost_rank": "go-on"}, "--lost-rank go-on is for runs of several ranks: add --ranks, or leave it out"),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED)
def test_ranks_that_make_no_sense_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Place(**options)


def test_under_torchrun_the_ranks_are_those_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert places.launched() == 4
    assert Place(directions=2).directions == 2
    with pytest.raises(UserError, match="--directions 3 must divide the number of ranks, which is 4"):
        Place(directions=3)
    with pytest.raises(UserError, match="torchrun starts ranks again by itself, with its --max-restarts: leave --lost-rank out"):
        Place(lost_rank="go-on")


UNDIVIDED: dict[str, tuple[dict[str, Any], str]] = {
    "no directions": ({"name": "backprop"}, "is not told by numbers alone, so ranks cannot divide its directions: take directions=1"),
    "a number that cannot be divided": ({"name": "forward", "tangents": 3}, "take a multiple of 2 for tangents"),
    "one difference": ({"name": "zeroth-order"}, "take a multiple of 2 for tangents"),
    "parts of the model": (
        {"name": "forward", "tangents": 2, "perturb": {"name": "split", "parts": 2}},
        "each of which moves other layers: take directions=1",
    ),
    "a guess": ({"name": "guess"}, "follow from one another, so ranks cannot divide them: take directions=1"),
}


@pytest.mark.parametrize("name", UNDIVIDED)
def test_directions_that_ranks_cannot_divide_are_told(name: str) -> None:
    config, sentence = UNDIVIDED[name]
    run: Run = dataclasses.replace(RUN, estimator=config)
    builders.check_divided(run, 1)
    with pytest.raises(UserError, match=sentence) as told:
        builders.check_divided(run, 2)
    assert str(told.value).startswith("--directions 2: ")
