"""The random walk of parameters: against training itself, and its parts by hand."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from forwardgrad.lab import models, store
from forwardgrad.lab.statistics import walk
from forwardgrad.lab.studies.run import Optimizer, Run
from forwardgrad.lab.training import builders, loop

SGD = Optimizer("sgd", 0.02)


@pytest.mark.parametrize("held", [{}, {"weight_decay": 1.0}, {"anneal": True}, {"cap": 0.05}], ids=["bare", "decay", "anneal", "cap"])
@pytest.mark.parametrize("clip", [1.0, None])
def test_the_norm_of_a_run_grows_as_the_walk_says(tmp_path: Path, held: dict[str, Any], clip: float | None) -> None:
    run = Run("digits", "mlp", {"name": "forward", "clip": clip}, dataclasses.replace(SGD, **held), epochs=6)
    result = loop.train(run, tmp_path)
    derivatives, table = store.read_table(tmp_path / "losses.csv.gz")["derivative"], store.read_table(tmp_path / "walk.csv")
    how = {"clip": clip, "parameters": result["parameters"], "norm": result["initial_norm"], "planned": result["steps"]}
    found = walk.growth(derivatives, run.optimizer, **how)
    told = [found[int(step) - 1] for step in table["step"]]
    length = 2 * math.log(walk.growth(derivatives, dataclasses.replace(run.optimizer, weight_decay=0.0), **how)[-1])  # Σ‖Δθ‖²/‖θ‖²
    bound = 4.5 * math.sqrt(length / result["parameters"])  # a step's angle to θ scatters by 1/√n: 7 false alarms in a million
    assert told == pytest.approx(table["norm_growth"], rel=bound)
    assert max(abs(growth - 1) for growth in told) > 2 * bound


def test_growth_is_its_formula() -> None:
    options = Optimizer("sgd", 0.1, decay=0.5, weight_decay=2.0, cap=0.3)
    found = walk.growth([3.0, 0.5, 0.01], options, clip=1.0, parameters=100, norm=10.0, planned=3)
    rates = [0.1, 0.1 * math.exp(-0.5), 0.1 * math.exp(-1)]
    square, wanted = 1.0, []
    for rate, d in zip(rates, (1.0, 0.5, 0.01), strict=True):
        square *= (1 - 2 * rate) ** 2
        square += min((rate * d) ** 2, 0.09 * square)  # √n/‖θ₀‖ is 1
        wanted.append(math.sqrt(square))
    assert found == pytest.approx(wanted, rel=1e-12)
    assert walk.growth([3.0], SGD, clip=None, parameters=100, norm=10.0, planned=1) == pytest.approx([math.sqrt(1 + 0.06**2)])


def test_rates_are_those_of_training() -> None:
    options = Optimizer("sgd", 0.5, decay=0.1, anneal=True)
    model = models.build("logistic", (1, 8, 8), 10)
    optimizer = builders.optimizer(options, model)
    schedule = builders.lr_schedule(options, optimizer, 5)
    wanted = []
    for _ in range(5):
        wanted.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert walk.rates(options, 5, 5) == pytest.approx(wanted, rel=1e-9)


def test_a_loss_is_outside_where_the_mean_of_a_window_is() -> None:
    losses = [2.0] * 10 + [5.0] * 10
    assert walk.first_outside(losses, 1.0, 3.0, window=4) == 12  # (2 + 2 + 5 + 5)/4 is the first mean above 3
    assert walk.first_outside(losses, 1.0, 6.0, window=4) == math.inf
    assert walk.first_outside([2.0, math.nan], 1.0, 6.0, window=4) == 2
    assert walk.first_outside([9.0] * 3, 1.0, 6.0, window=4) == math.inf  # no window is full
