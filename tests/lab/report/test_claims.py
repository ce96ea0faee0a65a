"""Claims are decided by their rules from stored results: made-up stores in which each claim is confirmed, refuted and left open."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from scipy import stats as reference
from tests.support.stored import ENVIRONMENT, fail, put, record, reported, seeds, undrawn, vouch

from forwardgrad.lab.recipes import paper
from forwardgrad.lab.recipes.beyond import beyond
from forwardgrad.lab.recipes.paper import TABLE1
from forwardgrad.lab.report import figures
from forwardgrad.lab.report.blocks.kinds import Judged
from forwardgrad.lab.report.claims import evidence, verdict
from forwardgrad.lab.report.claims import judged as claims
from forwardgrad.lab.report.claims.evidence import CONFIRMED, OPEN, REFUTED
from forwardgrad.lab.store import results
from forwardgrad.lab.store.files import read_json, write_json, write_table
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.study import Study

NN, CNN, CIFAR = ["1", "2", "3", "4", "5", "6"], ["7", "8", "9", "10", "11", "12"], ["13", "14"]
Loss = Callable[[str, str, int], float | None]  # of an optimizer, an arm's kind and a seed


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(figures, "curves", undrawn)
    return Store(tmp_path / "out")


def trained(store: Store, study: Study, loss: Loss, **options: Any) -> None:
    record(store, study)
    for arm in study.arms:
        for run in seeds(arm, study.seeds):
            put(store, run, loss(run.optimizer.name, arm.kind, run.seed), **options)


def apart(forward: float, backprop: float) -> Loss:
    """These losses, a thousandth more for every seed, whatever the optimizer."""
    return lambda optimizer, kind, seed: (forward if kind == "forward" else backprop) + (seed + (kind == "forward") * seed**2) / 1000


def judged(store: Store) -> dict[str, Judged]:
    measured = {name: found for name in ("bench.json", "functions.json", "quality.json") if (found := read_json(store.root / name))}
    return {claim.id: claim for claim in claims.judge(results.studies(store), measured)}


def test_nothing_stored_decides_nothing_and_names_the_commands(store: Store) -> None:
    found = judged(store)
    assert {claim.status for claim in found.values()} == {OPEN}
    assert all(claim.command.startswith("forwardgrad ") and claim.why and claim.rule for claim in found.values())
    assert claims.claims_section([], {}) is None


@pytest.mark.parametrize(
    ("forward", "backprop", "status"), [(0.5, 0.1, CONFIRMED), (0.1, 0.5, REFUTED), (0.3, 0.3, OPEN), (None, 0.1, OPEN)]
)
def test_by_optimizer_the_paired_interval_over_seeds_decides(store: Store, forward: float | None, backprop: float, status: str) -> None:
    def loss(optimizer: str, kind: str, seed: int) -> float | None:
        scatter = (0.001, -0.002, 0.001)[seed]
        return forward + scatter if kind == "forward" and forward is not None else None if kind == "forward" else backprop

    trained(store, paper.table1(rows=["1", "2", "7", "8"], seeds=3), loss)
    found = judged(store)
    assert found["lower-sgd"].status == status
    assert (found["lower-sgd"].command == "") == (status != OPEN)
    assert found["lower-adam"].status == OPEN


def test_one_seed_or_a_missing_network_decides_nothing(store: Store) -> None:
    for options, why in (
        ({"seeds": 1}, "one seed"),
        ({"seeds": 3, "rows": ["1", "2"]}, "not run"),
    ):
        trained(store, paper.table1(**{"rows": ["1", "2", "7", "8"], **options}), apart(0.5, 0.1))
        claim = judged(store)["lower-sgd"]
        assert claim.status == OPEN
        assert why in claim.why
        assert "--rows nn-sgd,cnn-sgd" in claim.command


def test_arms_shortened_alike_decide_which_is_lower_and_it_is_said_by_how_much(store: Store) -> None:
    trained(store, paper.table1(rows=["1", "2", "7", "8"], seeds=3, epochs=2), apart(0.5, 0.1))
    claim = judged(store)["lower-sgd"]
    assert claim.status == CONFIRMED
    assert all("(shortened: 2 of 50 epochs)" in reading.value for reading in claim.readings)


def test_hyperparameters_of_our_own_search_go_before_the_published_ones(store: Store) -> None:
    trained(store, paper.table1(rows=["1", "2", "7", "8"], seeds=3), apart(0.1, 0.5))
    assert judged(store)["lower-sgd"].status == REFUTED
    trained(store, paper.table1(rows=["1", "2", "7", "8"], seeds=3, retune=True), apart(0.5, 0.1))
    claim = judged(store)["lower-sgd"]
    assert (claim.status, claim.evidence) == (CONFIRMED, "table1-retuned")


def test_over_optimizers_the_interval_of_the_ratio_is_that_of_its_logarithm(store: Store) -> None:
    forward = {"sgd": 0.4, "nesterov": 0.5, "adam": 0.8}
    trained(store, paper.table1(rows=NN), lambda optimizer, kind, seed: forward[optimizer] if kind == "forward" else 0.1)
    claim = judged(store)["lower-loss-nn"]
    logs = [math.log(value / 0.1) for value in forward.values()]
    low, high = reference.t.interval(0.95, 2, loc=sum(logs) / 3, scale=reference.sem(logs))
    assert claim.status == CONFIRMED
    assert f"{math.exp(sum(logs) / 3):.2f} (95 % interval {math.exp(low):.2f} to {math.exp(high):.1f})" in claim.readings[-1].value
    assert judged(store)["lower-loss-cnn"].status == OPEN


def test_a_failed_run_counts_as_infinitely_bad_and_is_not_left_out(store: Store) -> None:
    study = paper.table1(rows=NN, seeds=2)
    trained(store, study, apart(0.5, 0.1))
    for run in seeds(study.arms[1], 2)[:1]:  # of backpropagation with SGD
        folder = store.folder(run.identity)
        (folder / "evaluations.csv").unlink()
        fail(store, run, "memory was exhausted")
    found = judged(store)
    assert found["lower-loss-nn"].status == OPEN
    assert "no interval" not in found["lower-sgd"].readings[0].value
    assert "not finite with backpropagation" in found["lower-sgd"].readings[0].value
    assert "failed (memory was exhausted)" in reported(store)


def test_one_network_above_zero_refutes_that_all_reach_it(store: Store) -> None:
    trained(store, paper.table1(rows=[*NN, *CNN]), lambda optimizer, kind, seed: 0.3 if kind == "forward" else 1e-4)
    assert judged(store)["zero-loss"].status == OPEN  # one seed has no interval that could lie below
    trained(store, paper.table1(rows=[*NN, *CNN], seeds=2), lambda optimizer, kind, seed: 0.3 if kind == "forward" else 1e-4)
    assert judged(store)["zero-loss"].status == CONFIRMED
    trained(store, paper.table1(rows=["1", "2"]), apart(0.3, 0.07))
    assert judged(store)["zero-loss"].status == REFUTED


@pytest.mark.parametrize(("slower", "status"), [(2.9, CONFIRMED), (30, REFUTED), (1, REFUTED)])
def test_two_to_four_times_faster_is_counted_in_steps(store: Store, slower: float, status: str) -> None:
    study = paper.table1(rows=NN)
    trained(store, study, apart(0.3, 0.1))
    for place, arm in enumerate(study.arms):
        step = round(1000 * (slower * (1 + place / 50) if arm.kind == "forward" else 1))
        header = ["step", "epoch", "seconds", "validation_loss", "validation_accuracy"]
        write_table(store.folder(arm.run.identity) / "evaluations.csv", header, [[10, 1, 1, 2.0, 0.5], [step, 2, 2, 0.4, 0.9]])
        vouch(store, arm.run)
    claim = judged(store)["faster"]
    assert claim.status == status
    assert claim.readings[-1].n == "3 configurations"


def test_rates_differ_by_more_than_the_grid_can_explain(store: Store) -> None:
    study = paper.baydin()
    trained(store, study, apart(0.3, 0.1))
    path = store.root / "studies" / "baydin.json"
    for rates, status in (((1e-3, 1.0), CONFIRMED), ((1e-2, 0.0316228), OPEN), ((0.01, 0.001), OPEN), ((0.01, 0.0005), REFUTED)):
        stored = read_json(path) or {}
        for arm in stored["arms"]:
            if arm["space"]:
                lr = rates[arm["kind"] == "backprop"]
                run = paper.replace(next(a.run for a in study.arms if a.name == arm["name"]), optimizer=paper.Optimizer("sgd", lr, 1e-4))
                put(store, run, 0.1)
                arm["runs"] = [run.identity]
        write_json(path, stored)
        assert judged(store)["rates"].status == status


@pytest.mark.parametrize(("accuracy", "status"), [(0.85, REFUTED), (0.97, CONFIRMED), (0.92, OPEN)])
def test_doing_well_is_doing_better_than_a_linear_classifier(store: Store, accuracy: float, status: str) -> None:
    record(store, beyond(["nn-linear"], seeds=1))
    put(store, beyond(["nn-linear"]).arms[0].run, 0.3, accuracy=0.92)
    trained(store, paper.table1(rows=NN), apart(0.3, 0.1), accuracy=accuracy)
    found = judged(store)
    assert found["simple-tasks"].status == status
    assert found["trains"].status == CONFIRMED
    trained(store, paper.table1(rows=NN), apart(0.3, 0.1), accuracy=0.1)
    assert judged(store)["trains"].status == REFUTED


def test_the_interval_of_one_network_is_wilsons() -> None:
    for hits, n in ((8701, 10_000), (0, 7), (6, 6)):
        low, high = reference.binomtest(hits, n).proportion_ci(method="wilson")
        found = evidence.wilson(hits, n)
        assert (found.mean, found.low, found.high) == pytest.approx((hits / n, low, high))


def test_cifar_fails_or_learns_and_explodes_where_it_does(store: Store) -> None:
    study = paper.table1(rows=CIFAR)
    trained(store, study, apart(2.31, 1.2), steps=800)
    found = judged(store)
    assert (found["cifar-fails"].status, found["cifar-explodes"].status) == (CONFIRMED, REFUTED)
    run = study.arms[0].run
    losses = [2.3] * 41_000 + [50.0] * 100
    write_table(store.folder(run.identity) / "losses.csv.gz", ["step", "loss"], [(i + 1, loss) for i, loss in enumerate(losses)])
    vouch(store, run)
    assert judged(store)["cifar-explodes"].status == CONFIRMED
    put(store, run, 1.5, steps=800)
    assert judged(store)["cifar-fails"].status == REFUTED


def test_clipping_is_judged_by_runs_that_differ_in_nothing_else(store: Store) -> None:
    def arms(lost_without: int) -> None:
        for name, clip in (("clipped", paper.CLIPPED), ("bare", paper.FORWARD)):
            base = paper.demo(3, seeds=8).arms[0]
            arm = paper.replace(base, name=name, space={}, run=paper.replace(base.run, estimator=dict(clip)))
            study = Study(name, name, (arm,), 8)
            record(store, study)
            for number, run in enumerate(seeds(arm, 8)):
                put(store, run, 0.3, diverged="the loss is not finite" if name == "bare" and number < lost_without else None)

    arms(8)
    found = judged(store)["clipping"]
    assert (found.status, [reading.n for reading in found.readings]) == (CONFIRMED, ["8 runs", "8 runs"])
    arms(2)
    assert judged(store)["clipping"].status == OPEN


@pytest.mark.parametrize(("inside", "status"), [(6, CONFIRMED), (2, REFUTED)])
def test_published_values_lie_within_our_readings_or_not(store: Store, inside: int, status: str) -> None:
    study = paper.table1(rows=NN)
    trained(store, study, apart(0.3, 0.1))
    for place, arm in enumerate(study.arms):
        path = store.folder(arm.run.identity) / "result.json"
        result: dict[str, Any] = read_json(path) or {}
        published = next(row.published.test_loss for row in TABLE1 if row.name == arm.name and row.published)
        low = published - 0.01 if place < inside else published + 0.5
        write_json(path, {**result, "test": {**result["test"], "last16": low, "last16_low": low, "last16_high": low + 0.1}})
    assert judged(store)["published-nn"].status == status
    assert judged(store)["published-cnn"].status == OPEN


def bench(low: float, high: float) -> dict[str, Any]:
    arm = {"name": "forward", "failed": None, "to_backprop": {"value": (low + high) / 2, "low": low, "high": high, "refused": None}}
    return {"environment": ENVIRONMENT, "cases": [{"model": "nn", "data": "mnist", "batch": 64, "rounds": 30, "arms": [arm]}]}


@pytest.mark.parametrize(
    ("low", "high", "status"), [(0.55, 0.62, CONFIRMED), (0.3, 0.4, CONFIRMED), (0.7, 0.8, REFUTED), (2.4, 2.7, REFUTED), (0.5, 1.2, OPEN)]
)
def test_twice_as_fast_is_read_from_the_benchmark(low: float, high: float, status: str) -> None:
    (claim,) = [one for one in claims.judge([], {"bench.json": bench(low, high)}) if one.id == "twice-as-fast"]
    assert claim.status == status
    assert "A Processor" in claim.why


@pytest.mark.parametrize(("forward", "status"), [(0.1, CONFIRMED), (0.5, REFUTED), (0.105, OPEN)])
def test_as_good_means_within_a_hundredth(store: Store, forward: float, status: str) -> None:
    def loss(optimizer: str, kind: str, seed: int) -> float:
        return (forward + (0.01, -0.01, 0.0)[seed] * (forward == 0.105)) if kind == "forward" else 0.1

    trained(store, paper.baydin(seeds=3), loss)
    assert judged(store)["as-good-same"].status == status


def functions(forward: float, *, start: float = 100.0) -> dict[str, Any]:
    arms = [
        {"kind": kind, "tuned": False, "values": [start, end], "final_median": end, "seeds": 3}
        for kind, end in (("forward", forward), ("backprop", 0.0))
    ]
    return {"functions": [{"name": "Beale", "arms": arms}]}


@pytest.mark.parametrize(("end", "status"), [(0.5, CONFIRMED), (1.5, REFUTED)])
def test_a_function_is_minimised_to_a_hundredth(end: float, status: str) -> None:
    found = {claim.id: claim.status for claim in claims.judge([], {"functions.json": functions(end)})}
    assert (found["minimises-beale"], found["minimises-rosenbrock"]) == (status, OPEN)


def measured(p: float, *lengths: tuple[float, float, float]) -> dict[str, Any]:
    config = {"name": "forward", "law": "gaussian", "clip": None}
    totals = [{"p": p, "length": dict(zip(("value", "low", "high"), length, strict=True))} for length in lengths]
    estimates = [{"estimator": config, "tangents": 4**at, "quality": {"total": total}} for at, total in enumerate(totals)]
    return {"settings": [{"model": "nn", "data": "mnist", "repeats": 100, "estimates": estimates}]}


@pytest.mark.parametrize(
    ("p", "lengths", "status"),
    [
        (0.5, [(1.01, 0.95, 1.07)], CONFIRMED),
        (0.001, [(1.01, 0.95, 1.07)], REFUTED),
        (0.03, [(1.01, 0.95, 1.07)] * 2, CONFIRMED),  # one of two p-values
        (0.5, [(1.06, 1.01, 1.11)], OPEN),
        (0.5, [(1.05, 1.005, 1.095), (1.01, 0.95, 1.07)], CONFIRMED),  # of two intervals at once the first holds 1
        (0.5, [(1.06, 1.03, 1.09), (1.01, 0.95, 1.07)], OPEN),
        (0.5, [(1.2, 0.8, 1.6)], OPEN),  # would hold 0.9 and 1.5 as well
    ],
)
def test_unbiased_is_read_from_measured_estimates(p: float, lengths: list[tuple[float, float, float]], status: str) -> None:
    found = {claim.id: claim.status for claim in claims.judge([], {"quality.json": measured(p, *lengths)})}
    assert found["unbiased"] == status


def said(store: Store, measured: Sequence[str] = ()) -> str:
    return " ".join(verdict.verdict(results.studies(store), read_json(store.root / "bench.json")))


def test_the_verdict_says_which_by_how_much_and_how_sure(store: Store) -> None:
    trained(store, paper.table1(rows=["1", "2"]), apart(0.5, 0.1))
    assert "Backpropagation is ahead of the forward gradient" in said(store)
    assert "in 1 of 1 comparison, by a factor of 5.00. How sure: there is no interval" in said(store)
    trained(store, paper.table1(rows=["1", "2"], seeds=3), apart(0.5, 0.1))
    assert "excludes zero in 1 of 1 comparison with several seeds" in said(store)
    assert "needs 6 shared seeds: here are 3" in said(store)
    trained(store, paper.table1(rows=["1", "2", "3", "4"], seeds=3), apart(0.1, 0.5))
    assert "The forward gradient is ahead of backpropagation" in said(store)
    assert "in 2 of 2 comparisons, by a factor of" in said(store)
    write_json(store.root / "bench.json", bench(0.7, 0.8))
    assert "A step of the forward gradient takes, in steps of backpropagation, 0.750 (95 % interval 0.700 to 0.800) on NN · MNIST." in said(
        store
    )
    assert said(Store(store.root / "empty")) == "No comparison is finished yet."


def test_a_finished_comparison_of_other_arms_is_not_called_unfinished(store: Store) -> None:
    study = paper.table1(rows=["1", "2"])
    others = dataclasses.replace(study, name="mine", arms=tuple(dataclasses.replace(arm, kind="mine") for arm in study.arms))
    trained(store, others, apart(0.5, 0.1))
    assert said(store) == "1 comparison finished: the verdict stands below."
