"""Carries a study out: tunes every arm on validation data, trains each winner on fresh seeds, and records which run was what.

It trains nothing itself. It is given a function that executes runs and one that says what a step costs. Loads without torch.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store import Store, arrival, records, write_json
from forwardgrad.lab.studies import SCHEMA, Arm, Pace, Point, Run, Study, space, unpaced
from forwardgrad.lab.tuning.planner import Planner, Trial

Results = dict[str, dict[str, Any]]
Execute = Callable[[Sequence[Run]], Results]
Rank = Callable[[Run, dict[str, Any]], tuple[float, ...]]
ASKED = 4  # points that Optuna is asked for at a time: a fixed number, so that the same study asks the same wherever it runs


@dataclass
class ArmProgress:
    """What is known of an arm so far. `no_winner` says why none of its points was chosen."""

    arm: Arm
    trials: list[Trial] = field(default_factory=list)
    chosen: dict[str, Any] = field(default_factory=lambda: {"values": {}, "validation_loss": None, "at_edge": []})
    finals: list[Run] = field(default_factory=list)
    no_winner: str = ""


class Campaign:
    """One study, its store, and how its runs are executed.

    `examine` is given runs before a record names them, and raises UserError where they cannot even begin.
    """

    def __init__(
        self,
        study: Study,
        store: Store,
        execute: Execute,
        command: str,
        pace: Callable[[Run], Pace] = unpaced,
        examine: Callable[[Sequence[Run]], None] = lambda runs: None,
    ) -> None:
        self.planner = Planner(study, store, pace)
        self.study, self.store, self.execute, self.command = study, store, execute, command
        self.record_name: str | None = None  # once there is a record
        self.names: dict[str, str] = {}
        self.arms = [ArmProgress(arm) for arm in study.arms]
        self.results: Results = {}
        self._examine, self._planned = examine, False
        self._good: set[str] = set()  # runs that were examined

    def plan(self) -> None:
        """Plan every run that is known before the first one is trained; UserError where one of them cannot begin. Writes nothing."""
        for state in self.arms:
            self._plan(state, self.study.points(state.arm))
            if not state.arm.space:
                state.finals = self._finals(state)
        self._check()
        self._planned = True

    def run(self) -> dict[str, Any]:
        """Tune, train, and return the stored record. An arm without a single finished trial has no winner, and is trained no further."""
        if not self._planned:
            self.plan()
        self._try()
        if self.study.sampler == "optuna":
            self._adapt()
        for _ in range(self.study.widen):
            if not self._widen():
                break
            self._try()
        for state in self.arms:
            if state.arm.space:
                state.chosen = choose(state.arm, state.trials, self.results, self._rank)
                state.no_winner = without_winner(state.trials, self.results)
                state.finals = [] if state.no_winner else self._finals(state)
        self.record()  # before the long part: a report can be made of what is there
        if finals := by_seed([state.finals for state in self.arms]):
            self.results |= self.execute(finals)
        return self.record()

    def _plan(self, state: ArmProgress, points: Sequence[Point]) -> None:
        planned = self.planner.trials(state.arm, points)
        self.names |= {run.identity: f"{state.arm.name} trial {_short(point)}" for point, run in planned}
        state.trials += planned

    def _finals(self, state: ArmProgress) -> list[Run]:
        runs = self.planner.finals(state.arm, state.chosen["values"])
        self.names |= {run.identity: f"{state.arm.name} seed {seed}" for seed, run in enumerate(runs)}
        return runs

    def _check(self) -> None:
        """Let the runs be examined that are still to be trained."""
        named = {run.identity: run for state in self.arms for run in (*(run for _, run in state.trials), *state.finals)}
        new = [run for key, run in named.items() if key not in self._good and self.store.result(key) is None]
        if new:
            self._examine(new)
        self._good |= named.keys()

    def _try(self) -> None:
        """Execute every planned trial that has no result yet, those of all arms together."""
        self.record()
        waiting = [run for state in self.arms for _, run in state.trials if run.identity not in self.results]
        if waiting:
            self.results |= self.execute(waiting)

    def _adapt(self) -> None:
        """Ask Optuna for the points of every arm, a few at a time, and tell it what came of them."""
        from forwardgrad.lab.tuning.adaptive import AdaptiveSearch

        journal = self.store.root / "studies" / f"{self.record_name}.journal"
        searches = [(state, AdaptiveSearch(self.study.name, state.arm, journal)) for state in self.arms if state.arm.space]
        for start in range(0, self.study.trials or 0, ASKED):
            count = min(ASKED, (self.study.trials or 0) - start)
            for state, search in searches:
                self._plan(state, search.ask(count))
            self._try()
            for state, search in searches:
                search.tell([self._told(run) for _, run in state.trials[start:]])

    def _told(self, run: Run) -> float | None:
        """What Optuna is to make small; None for a run that did not finish."""
        return self._rank(run, self.results[run.identity])[0] if _fit([({}, run)], self.results) else None

    def _rank(self, run: Run, result: dict[str, Any]) -> tuple[float, ...]:
        """What puts finished trials in order, the best first."""
        loss, accuracy = result["validation_loss"], result.get("validation_accuracy") or 0.0
        if self.study.chosen_by == "loss":
            return (loss,)
        if self.study.target is None:
            return (-accuracy, loss)
        return (arrival(self.store, run.identity, self.study.target + self.study.margin), -accuracy)

    def _widen(self) -> bool:
        """Plan further points for every tuned arm of a group in which a winner lies on an edge; whether there was one.

        An arm of which every trial failed is left out: nothing is known of where to look on.
        """
        planned = False
        best = {state.arm.name: choose(state.arm, state.trials, self.results, self._rank, or_least=True) for state in self.arms}
        for group in dict.fromkeys(arm.group for arm in self.study.arms):
            tuned = [state for state in self.arms if state.arm.group == group and best[state.arm.name]["values"]]
            if not any(best[state.arm.name]["at_edge"] for state in tuned):
                continue
            points = [self._further(state, best[state.arm.name]["values"]) for state in tuned]
            equal = min(map(len, points))  # fewer where an arm's values are words: no arm gets more trials than another
            for state, found in zip(tuned, points, strict=True):
                self._plan(state, found[:equal])
            planned = planned or equal > 0
        return planned

    def _further(self, state: ArmProgress, best: Point) -> list[Point]:
        tried, possible = [point for point, _ in state.trials], functools.partial(_possible, state.arm)
        return space.further(state.arm.space, tried, best, possible)

    def record(self) -> dict[str, Any]:
        """Store the study. Arms that were run before and are not part of this call are kept, and so is every result (`records`)."""
        self._check()
        rows = [self._described(state) for state in self.arms]
        with self.store.changing():
            name, path, stored, arms = records.placed(self.store, self.study.name, rows, self.record_name)
            self.record_name, further = name, name != self.study.name
            title = self.study.title + (f" ({name.rpartition('-')[2]})" if further else "")
            if stored is not None and (stored["title"], stored["arms"]) == (title, arms):
                return stored
            record = {
                "schema": SCHEMA,
                "name": name,
                **({"of": self.study.name} if further else {}),
                "title": title,
                "seeds": self.study.seeds,
                **({"paces": self.planner.paces} if self.planner.paces else {}),
                "arms": arms,
            }
            write_json(path, record)
        return record

    def _described(self, state: ArmProgress) -> dict[str, Any]:
        arm, study = state.arm, self.study
        return {
            "name": arm.name,
            "group": arm.group,
            "kind": arm.kind,
            "label": arm.label,
            "command": self.command,
            "published": dataclasses.asdict(arm.published) if arm.published else None,
            "space": space.to_json(arm.space),
            "tuning_epochs": (study.tuning.epochs or 0) if arm.space and study.tuning else 0,
            "trials": [{"values": values, "run": run.identity} for values, run in state.trials],
            "chosen": state.chosen,
            "runs": [run.identity for run in state.finals],
            **({"no_winner": state.no_winner} if state.no_winner else {}),
            **({"full_epochs": arm.full_epochs} if arm.full_epochs else {}),
            **({"budget": self._budget(state), "sampler": study.sampler} if arm.space else {}),
            **({"chosen_by": study.chosen_by} if arm.space and study.chosen_by != "loss" else {}),
            **({"target": study.target, "margin": study.margin} if study.target is not None else {}),
            **({"training": study.training.given} if study.training else {}),
            **({"epochs": arm.run.epochs} if not study.training and arm.run.steps is None else {}),
        }

    def _budget(self, state: ArmProgress) -> dict[str, Any]:
        """What an arm may spend on tuning: planned trials, those of widening among them, and how long each is."""
        length = self.study.tuning.given if self.study.tuning else {}
        return {"trials": max(self.study.budget(state.arm), len(state.trials)), **length}


def run_study(
    study: Study,
    store: Store,
    execute: Execute,
    command: str,
    names: dict[str, str] | None = None,
    pace: Callable[[Run], Pace] = unpaced,
) -> dict[str, Any]:
    """Tune every arm on validation, train each winner on fresh seeds, and store which run was what. Returns the stored record.

    `names`, if given, is filled with what to call each run on a display.
    """
    campaign = Campaign(study, store, execute, command, pace)
    campaign.names = names if names is not None else {}
    return campaign.run()


def by_seed(finals: Sequence[Sequence[Run]]) -> list[Run]:
    """The runs of all arms, a seed of every arm before the next seed: a machine that slows down slows all arms alike."""
    return [run for of_a_seed in itertools.zip_longest(*finals) for run in of_a_seed if run is not None]


def _possible(arm: Arm, point: Point) -> bool:
    """Whether optimizer and estimator take these values: beyond an edge of a space they may not."""
    from forwardgrad.lab.training import builders

    try:
        builders.estimator(arm.at(point))
    except UserError:
        return False
    return True


def _short(values: Point) -> str:
    return " ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items())


def without_winner(trials: Sequence[Trial], results: Results) -> str:
    """Why no trial can be chosen: how many failed, and how many diverged. Empty where one can be chosen."""
    if not trials or _fit(trials, results):
        return ""
    statuses = [results[run.identity]["status"] for _, run in trials]
    ended = {"failed": "failed", "diverged": "diverged", "finished": "ended without a validation loss"}
    counted = [(statuses.count(status), words) for status, words in ended.items() if status in statuses]
    if len(counted) == 1:
        return f"all {len(trials)} trials {counted[0][1]}" if len(trials) > 1 else f"its only trial {counted[0][1]}"
    return f"of {len(trials)} trials {' and '.join(f'{n} {words}' for n, words in counted)}"


def choose(arm: Arm, trials: Sequence[Trial], results: Results, rank: Rank, *, or_least: bool = False) -> dict[str, Any]:
    """The trial of the least rank, and on which edges of its space it lies. Without a finished trial there are no values.

    With `or_least`, where none finished and some diverged, it is the trial of the least learning rate: rates below it are the ones to try.
    """
    tried = [values for values, _ in trials]
    if fit := _fit(trials, results):
        values, run = min(fit, key=lambda trial: rank(trial[1], results[trial[1].identity]))
        loss = results[run.identity]["validation_loss"]
        return {"values": values, "validation_loss": loss, "at_edge": list(space.edges(arm.space, tried, values))}
    diverged = [values for values, run in trials if results[run.identity]["status"] == "diverged"]
    if or_least and diverged:
        values = min(diverged, key=lambda values: values.get("lr", 0.0))
        return {
            "values": values,
            "validation_loss": None,
            "at_edge": [name for name, values in arm.space.items() if space.size({name: values}) > 1],
        }
    return {"values": {}, "validation_loss": None, "at_edge": []}


def _fit(trials: Sequence[Trial], results: Results) -> list[Trial]:
    """The trials that finished."""

    def ended(result: dict[str, Any]) -> bool:
        return result["status"] == "finished" and result["validation_loss"] is not None

    return [(values, run) for values, run in trials if ended(results[run.identity])]
