"""A study carried out: every arm tuned on validation data, each winner trained on fresh seeds, and a record of which run was what.

Of training it knows two functions that it is given: one that executes runs, one that says what a step of a run costs. Loads without torch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from forwardgrad.lab import space
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.length import Pace, paced_alike, unpaced
from forwardgrad.lab.run import SCHEMA, Run
from forwardgrad.lab.space import Point
from forwardgrad.lab.store import Store, read_study, write_json
from forwardgrad.lab.study import Arm, Study, check

Results = dict[str, dict[str, Any]]
Execute = Callable[[Sequence[Run]], Results]
ASKED = 4  # points that Optuna is asked for at a time: a fixed number, so that the same study asks the same wherever it runs

Trial = tuple[Point, Run]


@dataclass
class _Progress:
    """What is known of an arm so far."""

    arm: Arm
    trials: list[Trial] = field(default_factory=list)
    chosen: dict[str, Any] = field(default_factory=lambda: {"values": {}, "validation_loss": None, "at_edge": []})
    finals: list[Run] = field(default_factory=list)


class Campaign:
    """One study, its store, and how its runs are executed."""

    def __init__(self, study: Study, store: Store, execute: Execute, command: str, pace: Callable[[Run], Pace] = unpaced) -> None:
        check(study)
        self.study, self.store, self.execute, self.command = study, store, execute, command
        self.store = store
        self.path = store.root / "studies" / f"{study.name}.json"
        self.names: dict[str, str] = {}
        self.arms = [_Progress(arm) for arm in study.arms]
        self.results: Results = {}
        self._measure = pace
        self.paces: dict[str, Any] = (read_study(self.path).get("paces") or {}) if self.path.exists() else {}

    def run(self) -> dict[str, Any]:
        """Tune, train, and return the stored record."""
        for state in self.arms:
            self._plan(state, self.study.points(state.arm))
        self.record()
        self._try()
        if self.study.sampler == "optuna":
            self._adapt()
        for _ in range(self.study.widen):
            if not self._widen():
                break
            self._try()
        for state in self.arms:
            state.chosen = choose(state.arm, state.trials, self.results)
            state.finals = [self._final(state, seed) for seed in range(self.study.seeds)]
        self.record()  # before the long part: a report can be made of what is there
        self.execute([run for state in self.arms for run in state.finals])
        return self.record()

    def pace(self, run: Run) -> Pace:
        """What a step costs, measured once for all runs whose steps cost the same, and stored."""
        key = paced_alike(run)
        if key not in self.paces:
            self.paces[key] = dataclasses.asdict(self._measure(run))
        return Pace(**self.paces[key])

    def _plan(self, state: _Progress, points: Sequence[Point]) -> None:
        for point in points:
            run = self.study.trial(state.arm, point, self.pace)
            self.names[run.identity] = f"{state.arm.name} trial {_short(point)}"
            state.trials.append((point, run))

    def _final(self, state: _Progress, seed: int) -> Run:
        run = self.study.final(state.arm, state.chosen["values"], seed, self.pace)
        self.names[run.identity] = f"{state.arm.name} seed {seed}"
        return run

    def _try(self) -> None:
        """Execute every planned trial that has no result yet, those of all arms together."""
        self.record()
        waiting = [run for state in self.arms for _, run in state.trials if run.identity not in self.results]
        if waiting:
            self.results |= self.execute(waiting)

    def _adapt(self) -> None:
        """Ask Optuna for the points of every arm, a few at a time, and tell it what came of them."""
        from forwardgrad.lab.adaptive import Asker

        askers = [(state, Asker(self.study.name, state.arm, self.path.with_suffix(".journal"))) for state in self.arms if state.arm.space]
        for start in range(0, self.study.trials or 0, ASKED):
            count = min(ASKED, (self.study.trials or 0) - start)
            for state, asker in askers:
                self._plan(state, asker.ask(count))
            self._try()
            for state, asker in askers:
                asker.tell([self.results[run.identity] for _, run in state.trials[start:]])

    def _widen(self) -> bool:
        """Plan further points for every tuned arm of a group in which a winner lies on an edge; whether there was one."""
        planned = False
        for group in dict.fromkeys(arm.group for arm in self.study.arms):
            tuned = [state for state in self.arms if state.arm.group == group and state.arm.space]
            for state in tuned:
                state.chosen = choose(state.arm, state.trials, self.results)
            if not any(state.chosen["at_edge"] for state in tuned):
                continue
            points = [self._further(state) for state in tuned]
            equal = min(map(len, points))  # fewer where an arm's values are words: no arm gets more trials than another
            for state, found in zip(tuned, points, strict=True):
                self._plan(state, found[:equal])
            planned = planned or equal > 0
        return planned

    def _further(self, state: _Progress) -> list[Point]:
        tried, possible = [point for point, _ in state.trials], functools.partial(_possible, state.arm)
        return space.further(state.arm.space, tried, state.chosen["values"], possible)

    def record(self) -> dict[str, Any]:
        """Store the study; arms of the same study that were run before and are not part of this call are kept."""
        with self.store.changing():
            before = {arm["name"]: arm for arm in (read_study(self.path)["arms"] if self.path.exists() else [])}
            before |= {state.arm.name: self._described(state) for state in self.arms}
            record = {
                "schema": SCHEMA,
                "name": self.study.name,
                "title": self.study.title,
                "seeds": self.study.seeds,
                **({"paces": self.paces} if self.paces else {}),
                "arms": list(before.values()),
            }
            write_json(self.path, record)
        return record

    def _described(self, state: _Progress) -> dict[str, Any]:
        arm, study = state.arm, self.study
        return {
            "name": arm.name,
            "group": arm.group,
            "kind": arm.kind,
            "label": arm.label,
            "command": self.command,
            "published": dataclasses.asdict(arm.published) if arm.published else None,
            "space": space.to_json(arm.space),
            "tuning_epochs": (study.tuning.epochs or 0) if arm.space else 0,
            "trials": [{"values": values, "run": run.identity} for values, run in state.trials],
            "chosen": state.chosen,
            "runs": [run.identity for run in state.finals],
            **({"full_epochs": arm.full_epochs} if arm.full_epochs else {}),
            **({"budget": self._budget(state), "sampler": study.sampler} if arm.space else {}),
            **({"training": study.training.given} if study.training else {}),
            **({"epochs": arm.run.epochs} if not study.training and arm.run.steps is None else {}),
        }

    def _budget(self, state: _Progress) -> dict[str, Any]:
        """What an arm may spend on tuning: planned trials, those of widening among them, and how long each is."""
        return {"trials": max(self.study.budget(state.arm), len(state.trials)), **self.study.tuning.given}


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


def _possible(arm: Arm, point: Point) -> bool:
    """Whether there is such a run: beyond an edge may lie what no optimizer and no estimator takes."""
    from forwardgrad.lab import own

    try:
        own.estimator(arm.at(point))
    except UserError:
        return False
    return True


def _short(values: Point) -> str:
    return " ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items())


def choose(arm: Arm, trials: Sequence[Trial], results: Results) -> dict[str, Any]:
    """The trial with the least validation loss, and on which edges of its space it lies."""
    if not trials:
        return {"values": {}, "validation_loss": None, "at_edge": []}
    finished = [(results[run.identity], values) for values, run in trials if results[run.identity]["status"] == "finished"]
    fit = [(result["validation_loss"], values) for result, values in finished if result["validation_loss"] is not None]
    tried = [values for values, _ in trials]
    if not fit:  # every point diverged: the least learning rate is the best guess there is, and the report shows it
        values = min(tried, key=lambda values: values.get("lr", 0.0))
        return {
            "values": values,
            "validation_loss": None,
            "at_edge": [name for name, values in arm.space.items() if space.size({name: values}) > 1],
        }
    loss, values = min(fit, key=lambda pair: pair[0])
    return {"values": values, "validation_loss": loss, "at_edge": list(space.edges(arm.space, tried, values))}
