"""Ranks that train one run end where one process does, up to rounding; what each draws; and batches that are too small for them."""

from __future__ import annotations

import dataclasses
import io
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support.processes import in_processes

from forwardgrad.lab import lockstep, store
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.lockstep import Team
from forwardgrad.lab.studies.run import Optimizer, Run
from forwardgrad.lab.training import builders, loop, run_folder
from forwardgrad.lab.training.step_logs import replay_run
from forwardgrad.lab.training.training import Training

# 1,077 examples in batches of 65 leave 37: neither can be halved, and the halves of the last one weigh otherwise than those of the others
RUN = Run("digits", "logistic", {"name": "backprop"}, Optimizer("sgd", 0.1, momentum=0.5), epochs=2, batch_size=65)
LOW_RANK = {"name": "forward", "tangents": 2, "perturb": {"name": "low-rank"}}
RUNS = {
    "backprop": RUN,
    "dense": dataclasses.replace(RUN, estimator={"name": "forward", "clip": 1.0}, optimizer=Optimizer("sgd", 0.01)),
    "low rank": dataclasses.replace(RUN, estimator=LOW_RANK, augment="crop-flip"),
    "local losses": dataclasses.replace(RUN, model="mlp", estimator={"name": "local", "feedback": True}),
    "diverging": dataclasses.replace(RUN, model="mlp", optimizer=Optimizer("sgd", 1e20), epochs=20),
}
DIVIDED = {  # two ranks with the same batch, each of which evaluates half of the directions
    "dense, divided": dataclasses.replace(RUN, estimator={"name": "forward", "tangents": 4}, optimizer=Optimizer("sgd", 0.01)),
    "low rank, divided": dataclasses.replace(RUN, estimator=LOW_RANK),
    "zeroth order, divided": dataclasses.replace(RUN, estimator={"name": "zeroth-order", "tangents": 2}, optimizer=Optimizer("sgd", 0.01)),
}
LOGGED = ("dense", "low rank", "low rank, divided")


def work(here: Path, rank: int) -> dict[str, list[int]]:
    seeds, step = dict[str, list[int]](), Training._step

    for name, run in {**RUNS, **DIVIDED}.items():
        team = Team(2 if name in DIVIDED else 1)

        def noting(self: Training, *rest: Any, name: str = name) -> torch.Tensor:
            seeds.setdefault(name, []).append(torch.initial_seed())
            return step(self, *rest)

        Training._step = noting  # type: ignore[method-assign]  # in a process of its own
        if rank:
            loop.follow(run, team)
        else:
            loop.train(run, here / name, keep_weights=True, log=name in LOGGED, team=team)
    return seeds


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, list[int]]]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, in_processes(2, folder, partial(work, folder), limit=400)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(io.BytesIO(store.read_checkpoint(folder / "weights.pt")), weights_only=True)["model"]
    return found


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in RUNS if name != "diverging"])
def test_two_ranks_end_where_one_process_does(two: Any, name: str, tmp_path: Path) -> None:
    """In float32: 34 steps of numbers of size 1 leave some 1e-7. Without the weights of the parts it would be 1e-3."""
    result, alone = store.read_result(two[0] / name), loop.train(RUNS[name], tmp_path, keep_weights=True)
    assert result is not None
    one, other = (store.read_table(folder / "losses.csv.gz")["loss"] for folder in (tmp_path, two[0] / name))
    assert len(one) == 34
    assert other == pytest.approx(one, rel=1e-5)
    for key, wanted in weights(tmp_path).items():
        torch.testing.assert_close(weights(two[0] / name)[key], wanted, rtol=1e-5, atol=1e-6)
    assert result["validation_loss"] == pytest.approx(alone["validation_loss"], rel=1e-5)
    assert result["forward_passes"] == alone["forward_passes"]
    assert {key for key, value in result.items() if value is not None} == {key for key, value in alone.items() if value is not None}


@pytest.mark.some(1)
@pytest.mark.parametrize("name", DIVIDED)
def test_two_ranks_that_divide_the_directions_end_where_one_process_does(two: Any, name: str, tmp_path: Path) -> None:
    """In float32; a difference of two losses has their rounding over its epsilon, some 1e-5, in every step."""
    result, alone = store.read_result(two[0] / name), loop.train(DIVIDED[name], tmp_path, keep_weights=True)
    assert result is not None
    bound = 1e-3 if "zeroth" in name else 1e-5
    one, other = (store.read_table(folder / "losses.csv.gz")["loss"] for folder in (tmp_path, two[0] / name))
    assert other == pytest.approx(one, rel=bound)
    for key, wanted in weights(tmp_path).items():
        torch.testing.assert_close(weights(two[0] / name)[key], wanted, rtol=bound, atol=bound)
    assert result["forward_passes"] < alone["forward_passes"]  # those of a rank
    here = store.read_json(two[0] / name / "environment.json")
    assert here is not None
    assert (here["ranks"], here["directions"]) == (2, 2)


@pytest.mark.parametrize("name", LOGGED)
def test_the_log_of_the_first_rank_leads_to_the_weights_of_all(two: Any, name: str) -> None:
    on = torch.device("cpu")
    run = {**RUNS, **DIVIDED}[name]
    training = Training.begin(run, builders.dataset(run, on, None), on)
    rebuilt = replay_run(training, two[0] / name / "steps.log", None)
    assert (rebuilt.steps, rebuilt.compared, rebuilt.kept) == (34, True, True)


def test_divergence_is_a_result_on_all_ranks_alike(two: Any, tmp_path: Path) -> None:
    result, alone = store.read_result(two[0] / "diverging"), loop.train(RUNS["diverging"], tmp_path)
    assert result is not None
    assert (result["status"], result["diverged_at"]) == ("diverged", alone["diverged_at"])
    assert [len(seeds["diverging"]) for seeds in two[1]] == [100, 100]  # steps until it was looked for


def test_a_run_over_ranks_says_how_many_they_were(two: Any, tmp_path: Path) -> None:
    here = store.read_json(two[0] / "backprop" / "environment.json")
    assert here is not None
    assert here["ranks"] == 2
    alone = {key: value for key, value in here.items() if key != "ranks"}
    run_folder.write_environment(tmp_path, here)
    run_folder.write_environment(tmp_path, alone)  # goes on with one
    assert store.read_json(tmp_path / "environment.json") == {**alone, "before": here}
    run_folder.write_environment(tmp_path, alone)  # goes on as it is
    assert store.read_json(tmp_path / "environment.json") == {**alone, "before": here}
    run_folder.write_environment(tmp_path, here)
    assert store.read_json(tmp_path / "environment.json") == {**here, "before": {**alone, "before": here}}


def test_what_a_model_draws_differs_by_rank(two: Any) -> None:
    first, second = (seeds["backprop"] for seeds in two[1])
    assert len(set(first)) == 1
    assert len({*first, *second}) == 1 + len(second) == 35


def test_draws_follow_from_the_seed_the_step_and_the_part() -> None:
    def drawn(seed: int, step: int, part: int) -> float:
        lockstep.draw_apart(dataclasses.replace(RUN, seed=seed), step, SimpleNamespace(shard=part))  # type: ignore[arg-type]
        return float(torch.rand(()))

    with torch.random.fork_rng(devices=[]):
        assert len({drawn(seed, step, part) for seed in (0, 1) for step in (0, 1) for part in (1, 2)}) == 8
        assert drawn(0, 1, 2) == drawn(0, 1, 2)
        state = torch.get_rng_state()
        lockstep.draw_apart(RUN, 1, SimpleNamespace(shard=0))  # type: ignore[arg-type]
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [5, 6, 37])
def test_parts_make_up_the_batch_and_their_means_its_mean(count: int, ranks: int) -> None:
    groups: list[Any] = [SimpleNamespace(shard=rank, shards=ranks) for rank in range(ranks)]
    values = torch.arange(count, dtype=torch.float64).square()
    parts = [values[lockstep.part(count, group)] for group in groups]
    assert torch.equal(torch.cat(parts), values)
    means = [part.mean() * lockstep.weight(count, group) for part, group in zip(parts, groups, strict=True)]
    assert float(sum(means)) / ranks == pytest.approx(float(values.mean()), rel=1e-14)


@pytest.mark.parametrize(
    ("batch", "ranks", "sentence"),
    [
        (3, 4, "ranks divide every batch into 4 parts, and a batch has 3: take fewer --ranks, or another --batch-size than 3"),
        (269, 3, "the last batch of an epoch of 1,077 examples has 1: take fewer --ranks, or another --batch-size than 269"),
        (5000, 1078, "a batch has 1077"),
    ],
)
def test_a_batch_smaller_than_the_ranks_is_refused(batch: int, ranks: int, sentence: str, tmp_path: Path) -> None:
    team: Any = SimpleNamespace(size=ranks, group=SimpleNamespace(shards=ranks, directions=1))
    with pytest.raises(UserError, match=re.escape(sentence)):
        loop.train(dataclasses.replace(RUN, batch_size=batch), tmp_path / "run", team=team)
    assert not (tmp_path / "run").exists()
