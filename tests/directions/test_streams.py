"""Streams of normal numbers: the published generator, the law, and independence of seeds, places and threads.

Statistical tests have fixed seeds; each family of p-values is held to the false-alarm rate that stands beside it.
"""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import forwardgrad as fg
from forwardgrad.directions import laws, streams
from forwardgrad.directions.plan import planned
from forwardgrad.directions.streams import mixed, normal, sown

ALARM = 1e-4  # that a family of tests fails by chance, were the seeds not fixed
MASK = 2**64 - 1
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF]


def unsigned(words: Tensor | list[int]) -> list[int]:
    return [int(word) & MASK for word in words]


def test_the_words_are_those_of_splitmix64() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    steps = torch.arange(1, 6) * streams._signed(streams._GOLDEN)
    assert unsigned(mixed(steps + 1234567)) == published
    assert unsigned([sown(1234567, place) for place in range(5)]) == published


def by_hand(seed: int, count: int, bits: int) -> list[float]:
    """The definition, in Python's own integers and floating-point numbers."""

    def finished(z: int, factors: tuple[int, int], shifts: tuple[int, int, int]) -> int:
        z = (z ^ z >> shifts[0]) * factors[0] & MASK
        z = (z ^ z >> shifts[1]) * factors[1] & MASK
        return z ^ z >> shifts[2]

    def signed(z: int, size: int) -> int:
        return z - (z >> size - 1 << size)

    stafford, murmur = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB), (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)
    start = finished(seed + 0x9E3779B97F4A7C15 & MASK, stafford, (30, 27, 31))
    gamma = finished(seed + 2 * 0x9E3779B97F4A7C15 & MASK, murmur, (33, 33, 33)) | 1
    if sum((gamma >> bit & 1) != (gamma >> bit + 1 & 1) for bit in range(63)) < 24:
        gamma ^= 0xAAAAAAAAAAAAAAAA
    half = -(-count // 2)
    words = [finished(start + (i + 1) * gamma & MASK, stafford, (30, 27, 31)) for i in range(2 * half)]
    if bits == 32:
        pairs = [(signed(word >> 32, 32), signed(word & 2**32 - 1, 32)) for word in words[:half]]
    else:
        pairs = [(signed(one, 64), signed(other, 64)) for one, other in zip(words[:half], words[half:], strict=True)]
    polar = [(math.sqrt(-2 * math.log(abs(u + 0.5) / 2 ** (bits - 1))), math.pi * t / 2 ** (bits - 1)) for u, t in pairs]
    return [*(r * math.cos(t) for r, t in polar), *(r * math.sin(t) for r, t in polar)][:count]


@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize(("dtype", "bits", "close"), [(torch.float32, 32, 1e-5), (torch.float64, 64, 1e-13)])
def test_numbers_are_those_of_the_definition(dtype: torch.dtype, bits: int, close: float, count: int) -> None:
    expected = torch.tensor([by_hand(seed, count, bits) for seed in SEEDS], dtype=dtype)
    torch.testing.assert_close(normal(SEEDS, count, dtype), expected, rtol=close, atol=close)
    torch.testing.assert_close(normal(torch.tensor(SEEDS), count, dtype), expected, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 3, 1000, 2**18 + 5])
def test_both_ways_of_making_numbers_agree(count: int, dtype: torch.dtype) -> None:
    blocks, operations = normal(SEEDS[:2], count, dtype), normal(torch.tensor(SEEDS[:2]), count, dtype)
    assert blocks.dtype == operations.dtype == dtype
    assert blocks.shape == operations.shape == (2, count)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(blocks, operations, rtol=8 * eps, atol=8 * eps)


def test_a_stream_is_the_same_among_others_and_on_any_number_of_threads() -> None:
    together = normal(SEEDS, 2**17 + 1, torch.float32)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(torch.cat([normal([seed], 2**17 + 1, torch.float32) for seed in SEEDS]), together)
    finally:
        torch.set_num_threads(before)


def test_steps_are_odd_and_change_often_enough() -> None:
    seeds = torch.arange(20_000) * streams._signed(streams._GOLDEN)
    _, gammas = streams._begun_together(seeds)
    assert bool((gammas & 1).all())
    assert len(set(gammas.tolist())) == len(seeds)
    changes = [(g ^ g >> 1).bit_count() - (g >> 63) for g in unsigned(gammas)]
    assert min(changes) >= 24
    assert [streams._begun(seed)[1] for seed in seeds[:500].tolist()] == gammas[:500].tolist()


def p_values(z: np.ndarray) -> Iterator[float]:
    """Of one stream: the law as a whole, four moments, its tails, and neighbours."""
    n = len(z)
    yield float(stats.kstest(z, "norm").pvalue)
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        yield float(2 * stats.norm.sf(abs(np.mean(z**power) - mean) / math.sqrt(variance / n)))
    for bound in (2.5, 3.5, 4.5):
        yield float(stats.binomtest(int(np.sum(np.abs(z) > bound)), n, 2 * stats.norm.sf(bound)).pvalue)
    for lag in (1, 2, 64, n // 2):  # the numbers of a pair stand half a stream apart
        for f in (np.asarray, np.square):
            one, other = f(z[:-lag]), f(z[lag:])
            yield float(2 * stats.norm.sf(abs(np.corrcoef(one, other)[0, 1]) * math.sqrt(n - lag)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numbers_are_standard_normal_and_independent(dtype: torch.dtype) -> None:
    found = [p for seed in range(4) for p in p_values(normal([seed], 2**19, dtype)[0].double().numpy())]
    assert min(found) > ALARM / len(found)


@pytest.mark.full
def test_the_bits_of_words_are_fair_coins() -> None:
    start, gamma = streams._begun_together(torch.arange(1000))
    words = mixed(torch.arange(1, 1001) * gamma.unsqueeze(1) + start.unsqueeze(1))
    bits = words.unsqueeze(2) >> torch.arange(64) & 1
    ones = bits.double().sum((0, 1)).numpy()
    found = [float(stats.binomtest(int(count), 1_000_000, 0.5).pvalue) for count in ones]
    flips = (bits[:, 1:] ^ bits[:, :-1]).double().sum((0, 1)).numpy()  # from word to word
    across = (bits[1:] ^ bits[:-1]).double().sum((0, 1)).numpy()  # from seed to seed
    found += [float(stats.binomtest(int(count), 999_000, 0.5).pvalue) for count in (*flips, *across)]
    assert min(found) > ALARM / len(found)


def test_streams_of_close_seeds_and_close_places_are_unrelated() -> None:
    seeds = [*range(8), *(1 << bit for bit in range(8, 63, 6)), *(sown(5, place) for place in range(8))]
    z = normal(seeds, 200_000, torch.float64)
    for rows in (z, z.square() - 1):
        rows = rows / rows.norm(dim=1, keepdim=True)
        correlations = (rows @ rows.T)[~torch.eye(len(seeds), dtype=torch.bool)]
        assert 2 * stats.norm.sf(float(correlations.abs().max()) * math.sqrt(200_000)) > ALARM / (2 * len(correlations))


def test_a_law_draws_what_is_large_from_streams_in_the_same_order() -> None:
    like = {"small": torch.empty(10), "large": torch.empty(300, 300), "wide": torch.empty(2**16, dtype=torch.float64)}
    assert sum(p.numel() >= laws._WORTH_A_STREAM for p in like.values()) == 2
    law, at_once = fg.Gaussian(), fg.Gaussian().draw(like, 3, torch.Generator().manual_seed(4))
    one_by_one = torch.Generator().manual_seed(4)
    singles = [law.draw(like, 1, one_by_one) for _ in range(3)]
    for name in like:
        assert torch.equal(at_once[name], torch.cat([single[name] for single in singles]))
        assert at_once[name].dtype == like[name].dtype
    assert not torch.equal(at_once["large"][0], at_once["large"][1])


def test_a_step_that_is_planned_is_handed_seeds_in_place_of_large_directions() -> None:
    like = {"small": torch.empty(10), "large": torch.empty(300, 300)}
    generator = torch.Generator().manual_seed(4)
    with planned() as plan:
        first = fg.Gaussian().draw(like, 2, generator)
    generator.manual_seed(4)
    handed = plan.again()
    assert [(t.shape, t.dtype) for t in handed] == [((2, 10), torch.float32), ((2,), torch.int64)]
    assert torch.equal(normal(handed[1].tolist(), 90_000, torch.float32).view(2, 300, 300), first["large"])
