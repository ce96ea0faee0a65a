"""The report at equal forward passes, from stores made up for it: ratios, gaps, the claims by their intervals, and what forbids one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.stored import put, reported, row, undrawn

from forwardgrad.lab.recipes.passes import WALKERS, passes
from forwardgrad.lab.report import figures
from forwardgrad.lab.statistics import stats
from forwardgrad.lab.store.files import write_table
from forwardgrad.lab.store.run_files import read_result, write_result
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies import Pace, Run, format_estimator
from forwardgrad.lab.tuning.campaign import run_study

MLP, TABLE = "MLP · MNIST", "At equal forward passes"
OPEN = "not decided by this budget"
CLAIMS = {
    "fzoo": "One-sided differences divided by the spread of the losses (FZOO) need a third of MeZO's forward passes",
    "rank": "Directions of rank one lose nothing against whole ones, at an equal population and equally many steps",
    "forward": "Forward-mode AD beats zeroth order at equal forward passes",
    "seconds": "Forward-mode AD beats zeroth order in equal time",
    "directions": "One direction a step does as well as several at as many forward passes",
}
NAMES = {repr(sorted(walker.estimator.items(), key=str)): name for name, walker in WALKERS.items()}
Ends = dict[str, float]
GOOD: Ends = {"mezo": 0.8, "forward": 0.7, "mezo-8": 0.8, "rank-one": 0.8, "forward-8": 0.5, "fzoo": 0.2}  # the loss at the end


@pytest.fixture(autouse=True)
def _not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "curves", undrawn)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "out")


def named(run: Run) -> str:
    return NAMES[repr(sorted(run.estimator.items(), key=str))]


def trained(
    store: Store,
    ends: Ends,
    *,
    seconds: Ends | None = None,
    changed: Callable[[Run], dict[str, Any]] = lambda _: {},
    **options: Any,
) -> str:
    """Runs whose loss falls evenly from 1 to that of their arm's end, a hundredth more for every seed; accuracy is 1 less the loss.

    They take 10 s, or what `seconds` has for the arm.
    """

    def execute(runs: Sequence[Run]) -> dict[str, Any]:
        for run in runs:
            name = named(run)
            end, steps, whole = ends[name] + 0.01 * run.seed * run.test, run.steps or 0, (seconds or {}).get(name, 10.0)
            put(store, run, end, steps=1, accuracy=1 - end)
            at = [*range(run.evaluate_every or 1, steps, run.evaluate_every or 1), steps]
            rows = [[step, step / 782, whole * step / steps, 1 - (1 - end) * step / steps, (1 - end) * step / steps] for step in at]
            folder = store.folder(run.identity)
            write_table(folder / "evaluations.csv", ["step", "epoch", "seconds", "validation_loss", "validation_accuracy"], rows)
            made = {"steps": steps, "seconds": whole, "forward_passes": steps * WALKERS[name].passes, "validation_loss": end}
            write_result(folder, {**(read_result(folder) or {}), **made, **changed(run)})
        return {run.identity: store.result(run.identity) for run in runs}

    study = passes(**options)
    run_study(study, store, execute, "forwardgrad reproduce passes", pace=lambda run: Pace(0.001, WALKERS[named(run)].passes))
    return reported(store)


def statuses(text: str) -> dict[str, str]:
    """What became of each claim."""
    found = {}
    for name, said in CLAIMS.items():
        (line,) = (line for line in text.splitlines() if line.startswith("- **") and f"**: {said}: {MLP}" in line)
        found[name] = line.split("**")[1]
    return found


def test_claims_that_hold_are_confirmed(store: Store) -> None:
    text = trained(store, GOOD)
    assert set(statuses(text).values()) == {"confirmed"}
    assert "Of 5 claims, 5 are confirmed, 0 refuted and 0 not decided by this budget." in text  # and of older papers nothing is stored
    fzoo = row(text, TABLE, MLP, f"FZOO, K = 8 ({format_estimator(WALKERS['fzoo'].estimator)})")
    assert fzoo["a step"] == "9 passes (8 directions)"
    assert fzoo["steps"] == "888 (7,992 passes)"
    assert fzoo["learning rate"].startswith("5e-6 (on the edge of its grid)")


def test_passes_are_those_to_the_loss_that_mezo_ends_with(store: Store) -> None:
    """MeZO is at 0.80 after all of its 8,000 passes, FZOO where it has fallen by 0.2 of its 0.8: at its first look from a quarter on."""
    text = trained(store, GOOD)
    ratios = []
    for seed in range(8):
        mezo, fzoo = 0.8 + 0.01 * seed, 0.2 + 0.01 * seed
        steps = next(step for step in range(22, 889, 22) if 1 - (1 - fzoo) * step / 888 <= mezo)
        ratios.append(9 * steps / 8000)
    mean = statistics.geometric_mean(ratios)
    (line,) = (line for line in text.splitlines() if "FZOO, K = 8 beside MeZO, to MeZO's loss" in line)
    assert f"{mean:.3f} (95 % interval" in line
    assert "8 seeds" in line


def test_claims_that_fail_are_refuted(store: Store) -> None:
    ends = {"mezo": 0.4, "forward": 0.4, "mezo-8": 0.3, "rank-one": 0.5, "forward-8": 0.3, "fzoo": 0.3}
    assert set(statuses(trained(store, ends)).values()) == {"refuted"}


def test_two_arms_of_one_estimate_decide_nothing(store: Store) -> None:
    """Along one direction forward mode is zeroth order up to ε², whatever rates the two were given."""
    text = trained(store, GOOD | {"forward": 0.95})
    assert statuses(text)["forward"] == "confirmed"
    assert "forward mode beside MeZO: −15.00 points of accuracy" in text


def test_an_arm_that_never_comes_to_mezos_loss_refutes_a_third(store: Store) -> None:
    text = trained(store, GOOD | {"fzoo": 0.9})
    assert statuses(text)["fzoo"] == "refuted"
    assert "not reached in 8 of 8 runs" in text


def test_equal_time_is_that_of_the_faster_arm(store: Store) -> None:
    """Both arms end alike; forward mode does so in a fifth of the time, when MeZO has a fifth of its accuracy."""
    even = GOOD | {"forward": 0.8, "forward-8": 0.8}
    text = trained(store, even, seconds={"forward": 2.0, "forward-8": 2.0})
    found = statuses(text)
    assert (found["forward"], found["seconds"]) == ("refuted", "confirmed")
    gains = stats.estimate([100 * 0.8 * (0.2 - 0.01 * seed) for seed in range(8)])
    assert f"forward mode beside MeZO: +{gains.mean:.2f} points of accuracy" in text


UNTIMED = [({"replicas": 6}, "shared by 6 runs at once"), ({"fallback": "a module has hooks"}, "not compiled (a module has hooks)")]


@pytest.mark.parametrize(("field", "words"), UNTIMED, ids=["one program", "eager steps"])
def test_seconds_that_say_nothing_decide_nothing(store: Store, field: dict[str, Any], words: str) -> None:
    text = trained(store, GOOD, changed=lambda run: field if named(run) == "forward-8" else {})
    assert (statuses(text)["seconds"], statuses(text)["forward"]) == (OPEN, "confirmed")
    assert f"Seconds are not comparable: forward mode, K = 8: {'' if 'shared' in words else 'steps were '}{words}." in text


def test_one_seed_decides_nothing_and_the_command_for_more_is_named(store: Store) -> None:
    text = trained(store, GOOD, seeds=1)
    assert set(statuses(text).values()) == {OPEN}
    assert "One seed gives no interval." in text
    for row_ in ("fzoo", "rank", "forward", "directions"):
        assert f"- What would decide it: `forwardgrad reproduce passes --rows {row_} --seeds 16`" in text


def test_short_runs_and_missing_arms_decide_nothing(store: Store, tmp_path: Path) -> None:
    text = trained(store, GOOD, small=True)
    assert "shortened: 3,000 forward passes on digits, of 8,000 on mnist" in text.lower()
    assert "**confirmed**" not in text
    text = trained(Store(tmp_path / "part"), GOOD, rows=["directions"])
    assert statuses(text) == dict.fromkeys(CLAIMS, OPEN) | {"directions": "confirmed"}
    assert "An arm is not there, or unfinished." in text


def test_a_lost_run_counts_as_infinitely_bad(store: Store) -> None:
    lost = {"status": "diverged", "reason": "the loss was not finite", "diverged_at": 10}
    text = trained(store, GOOD, changed=lambda run: lost if run.test and run.seed == 1 and named(run) == "rank-one" else {})
    assert statuses(text)["rank"] == OPEN
    assert "A run was lost, or did not get there." in text
    assert "Runs that diverged or failed" in text
