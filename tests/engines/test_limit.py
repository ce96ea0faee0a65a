"""Compiling that takes too long: stopped, told once, and without a trace in what follows."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from threading import enumerate as threads
from typing import Any

import pytest
import torch
from tests.engines.test_engines import RANK_1, X, Y, batches, loss, made, network, outcome, sgd
from tests.support.cases import seeded

import forwardgrad as fg
from forwardgrad.engines import compiled
from forwardgrad.engines.limit import Late, within


def for_ever() -> None:
    while True:
        time.sleep(0.01)


def stubborn() -> None:
    """Work that keeps every error to itself, as compilers do."""
    while True:
        with suppress(Exception):
            for_ever()


def running() -> bool:
    return any(thread.name == "forwardgrad limit" for thread in threads())


@pytest.mark.parametrize("make", [for_ever, stubborn])
def test_work_is_stopped_when_its_time_is_over(make: Any) -> None:
    with pytest.raises(Late):
        within(0.05, make)
    assert not running()


def test_work_in_time_returns_or_raises_what_it_made() -> None:
    assert within(60, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 / 0)
    with pytest.raises(Late):
        within(0, lambda: 3)


def steps(**options: Any) -> fg.TrainingStep:
    model = network()
    torch.manual_seed(7)
    return fg.TrainingStep(loss, model, sgd(model), RANK_1, generator=seeded(3), state={}, **options)


def test_a_kind_of_step_whose_compiler_is_late_stays_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smaller batch of an epoch is another kind: here its compiler is late, and the other's is not."""

    def compiler(traced: Any, inputs: list[torch.Tensor]) -> Any:
        if any(tensor.shape == X[:7].shape for tensor in inputs):
            raise Late
        return traced.graph

    monkeypatch.setattr(compiled, "compiled", compiler)
    step = steps(engine="compile", compile_limit=500.0)
    with pytest.warns(UserWarning, match=r"the compiler had not finished after compile_limit=500 s, for steps of this kind") as told:
        found = outcome(step, batches(step))
    assert (sum("falls back" in str(warning.message) for warning in told), len(made(step))) == (1, 1)
    torch.testing.assert_close(found, outcome(eager := steps(), batches(eager)), rtol=1e-5, atol=1e-5)


@pytest.mark.full
def test_a_compiler_that_was_stopped_compiles_the_next_step(caplog: pytest.LogCaptureFixture) -> None:
    import torch._inductor.config as config

    with config.patch({"force_disable_caches": True}):
        late = steps(engine="compile", compile_limit=1.0)
        with pytest.warns(UserWarning, match="the compiler had not finished"):
            late(X, Y)
        with caplog.at_level(logging.INFO, "forwardgrad"):
            step = steps(engine="compile", compile_limit=500.0)
            found = outcome(step, [step(X, Y), step(X, Y)])
    assert len(made(step)) == 1
    assert [record.message.split()[1] for record in caplog.records if record.name == "forwardgrad"] == ["traced", "compiled"]
    torch.testing.assert_close(found, outcome(eager := steps(), [eager(X, Y), eager(X, Y)]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limit", [0, -1.0, float("nan")])
def test_a_limit_that_is_no_time_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="compile_limit must be a number of seconds above 0, or None"):
        steps(engine="compile", compile_limit=limit)
