"""One whole step of every arm of `forwardgrad bench` under pytest-benchmark: `pytest benchmarks`, never part of the tests.

`pip install -e '.[bench]'` brings what it needs. The arms run one after the other here and not in turn, so their ratios are those of
`forwardgrad bench` only on a quiet machine. What this is for is the same arm before and after a change: `--benchmark-save before`, then
`--benchmark-compare`.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from forwardgrad.lab.bench.arms import ARMS, ArmStep, BenchArm
from forwardgrad.lab.bench.cases import BenchCase, build_case

CASES = (
    BenchCase("nn", 64, "contiguous"),
    BenchCase("nn", 8, "contiguous"),
    BenchCase("cnn", 64, "channels-last"),
    BenchCase("cifar-cnn", 64, "channels-last"),
    BenchCase("mlp-64x1024", 64, "contiguous"),
)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own, when it compiles
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model}-{case.batch}")
@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_step(benchmark: BenchmarkFixture, arm: BenchArm, case: BenchCase) -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        torch.compiler.reset()
        step = ArmStep(arm, build_case(case, torch.device("cpu")))
        step()
        benchmark.group = f"{case.model}, batch {case.batch}, {case.layout}, {torch.get_num_threads()} threads"
        benchmark.pedantic(step, rounds=20, warmup_rounds=2)
