"""A million directions of every law that draws them weight by weight, under pytest-benchmark."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from forwardgrad import Gaussian, Law, Rademacher, Sphere

NUMBERS = 1 << 20


@pytest.mark.parametrize("law", [Gaussian(), Rademacher(), Sphere()], ids=lambda law: law.name)
def test_draw(benchmark: BenchmarkFixture, law: Law) -> None:
    generator, memory = torch.Generator().manual_seed(0), torch.empty(NUMBERS)
    benchmark.group = f"{NUMBERS:,} numbers, {torch.get_num_threads()} threads"
    benchmark(law.fill_, [memory], generator)
