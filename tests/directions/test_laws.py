"""The laws: mean 0, covariance I, their further moments, and draws that replay.

Statistical tests have fixed seeds. A |z| ≥ 4.5 has probability 6.8e-6 for a correct law, so a test of m numbers gives a false alarm for
less than m · 6.8e-6 of all seeds (Bonferroni); m is stated in each.
"""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.cases import seeded
from torch import Tensor

import forwardgrad as fg
from forwardgrad.directions import laws

LAWS = [law() for law in fg.LAWS]
SEPARATE = [law for law in LAWS if not law.joint]
SHAPES = {"matrix": (3, 5), "vector": (7,), "scalar": (), "empty": (0, 2), "cube": (2, 1, 4)}
LIKE = {name: torch.empty(shape, dtype=torch.float64) for name, shape in SHAPES.items()}


def joined(tangents: dict[str, Tensor]) -> Tensor:
    return torch.cat([v.reshape(len(v), -1) for v in tangents.values()], dim=1).double()


def z_scores(samples: Tensor, mean: Tensor | float) -> Tensor:
    """How many of its standard errors the average of the rows lies from `mean`; where nothing varies, the average has to hit."""
    error = samples.std(dim=0) / math.sqrt(len(samples))
    gap = samples.mean(dim=0) - mean
    return torch.where(error > 1e-14, gap / error, torch.where(gap.abs() < 1e-12, 0.0, torch.inf))


def singly(law: fg.Law, like: dict[str, Tensor], count: int, seed: int) -> Tensor:
    """As many independent tangents: those of a joint law are drawn one at a time."""
    generator = seeded(seed)
    return torch.cat([joined(law.draw(like, 1 if law.joint else count, generator)) for _ in range(count if law.joint else 1)])


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_mean_is_zero_and_covariance_is_the_identity(law: fg.Law) -> None:
    v = singly(law, LIKE, 2_000, 1)  # m = 31 + 31·32/2 = 527 numbers a law: false alarms below 0.36 %
    n = v.shape[1]
    assert z_scores(v, 0.0).abs().max() < 4.5
    i, j = torch.triu_indices(n, n)
    assert z_scores(v[:, i] * v[:, j], (i == j).double()).abs().max() < 4.5


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_fourth_moments(law: fg.Law) -> None:
    v = singly(law, LIKE, 2_000, 2)  # m = 31 + 30 numbers a law: false alarms below 0.05 %
    n = v.shape[1]
    alone, pair = {"gaussian": (3, 1), "rademacher": (1, 1), "sphere": (3 * n / (n + 2), n / (n + 2))}[
        "sphere" if law.joint else law.name  # an orthogonal tangent alone is uniform on the sphere
    ]
    assert z_scores(v**4, alone).abs().max() < 4.5
    assert z_scores(v[:, 1:] ** 2 * v[:, :1] ** 2, pair).abs().max() < 4.5


@pytest.mark.parametrize("law", LAWS, ids=repr)
@pytest.mark.parametrize("n", [1, 2, 10, 65])
def test_second_moment_of_the_forward_gradient(law: fg.Law, n: int) -> None:
    g = torch.linspace(-1, 2, n, dtype=torch.float64)
    v = singly(law, {"all": g}, 3_000, 3)  # m = 1 number a law and size: 16 in all, false alarms below 0.02 %
    noise = (v @ g) ** 2 * (v**2).sum(dim=1) / (g @ g)
    assert z_scores(noise[:, None], law.second_moment(n)).abs().max() < 4.5
    assert law.second_moment(n) == {"gaussian": n + 2, "rademacher": n, "sphere": n, "orthogonal": n}[law.name]


def test_second_moment_of_a_mean_of_tangents() -> None:
    assert [law.second_moment(12, tangents=4) for law in LAWS] == [1 + 13 / 4, 1 + 11 / 4, 1 + 11 / 4, 12 / 4]
    g, generator, squares = torch.linspace(-1, 2, 12, dtype=torch.float64), seeded(8), []
    for _ in range(2_000):
        v = fg.Orthogonal().draw({"all": g}, 4, generator)["all"]
        squares.append(((v @ g) @ v / 4).square().sum() / (g @ g))
    assert z_scores(torch.stack(squares)[:, None], 3.0).abs().max() < 4.5  # m = 1


@pytest.mark.parametrize("count", [1, 5, 31])
def test_orthogonal_tangents_are_orthogonal_over_all_parameters_together(count: int) -> None:
    v = joined(fg.Orthogonal().draw(LIKE, count, seeded(9)))
    torch.testing.assert_close(v @ v.T, 31.0 * torch.eye(count, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    if count == 31:
        torch.testing.assert_close(v.T @ v / 31, torch.eye(31, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_orthogonal_draws_have_no_preferred_direction() -> None:
    """Haar: covariance I also of the pair, E[v₁v₂ᵀ] = 0 entry by entry; without the sign of R's diagonal the first fails."""
    generator = seeded(10)
    q = torch.stack([fg.Orthogonal().draw({"all": torch.empty(4, dtype=torch.float64)}, 4, generator)["all"] for _ in range(4_000)])
    flat = q.flatten(1)  # [draws, 16]: tangent k, weight i
    i, j = torch.triu_indices(16, 16)
    assert z_scores(flat, 0.0).abs().max() < 4.5  # m = 16 + 136: false alarms below 0.11 %
    assert z_scores(flat[:, i] * flat[:, j], (i == j).double()).abs().max() < 4.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_orthogonal_tangents_in_low_precision_are_orthogonal_up_to_rounding(dtype: torch.dtype) -> None:
    v = joined(fg.Orthogonal().draw({"a": torch.empty(15, 10, dtype=dtype), "b": torch.empty(50, dtype=dtype)}, 20, seeded(4)))
    torch.testing.assert_close(v @ v.T / 200, torch.eye(20, dtype=torch.float64), rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_more_orthogonal_tangents_than_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="at most as many orthogonal tangents as weights: 32 were asked for, with 31 weights"):
        fg.Orthogonal().draw(LIKE, 32, seeded())


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_chunks_are_the_draw_cut_in_pieces(law: fg.Law) -> None:
    like = {**LIKE, "half": torch.empty(33, dtype=torch.bfloat16)}
    whole = law.draw(like, 5, seeded(6))
    for size in (1, 2, 5, 9):
        chunks = list(law.chunks(like, 5, size, seeded(6)))
        assert [len(chunk["scalar"]) for chunk in chunks] == {1: [1] * 5, 2: [2, 2, 1], 5: [5], 9: [5]}[size]
        assert all(torch.equal(torch.cat([chunk[name] for chunk in chunks]), whole[name]) for name in like)
        storages = {part.untyped_storage().data_ptr() for chunk in chunks for part in chunk.values() if part.numel()}
        assert len(storages) == len(chunks) * (len(like) - 1)  # a chunk keeps nothing else in memory; "empty" has no storage


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_a_part_can_be_drawn_alone_where_the_law_says_so(law: fg.Law) -> None:
    """What `independent` promises: one parameter filled by itself has the moments of the law, 3 and 1 or 1 and 1."""
    v, generator = torch.empty(2_000, 3, dtype=torch.float64), seeded(11)
    for row in v:
        law.fill_([row], generator)
    alone = {"gaussian": 3.0, "rademacher": 1.0}.get(law.name)
    assert law.independent == (alone is not None)
    if alone is not None:
        assert z_scores(v**4, alone).abs().max() < 4.5  # m = 3 + 3 a law
        assert z_scores(v[:, 1:] ** 2 * v[:, :1] ** 2, 1.0).abs().max() < 4.5


def test_sphere_has_one_norm_over_all_parameters_together() -> None:
    v = joined(fg.Sphere().draw(LIKE, 50, seeded()))
    torch.testing.assert_close(v.norm(dim=1), torch.full((50,), math.sqrt(v.shape[1]), dtype=torch.float64), rtol=1e-14, atol=0)
    parts = fg.Sphere().draw(LIKE, 50, seeded())["vector"].norm(dim=1)
    assert parts.std() > 0.1  # the norm of one parameter does vary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sphere_in_low_precision_is_on_the_sphere_up_to_rounding(dtype: torch.dtype) -> None:
    v = joined(fg.Sphere().draw({"a": torch.empty(150, dtype=dtype), "b": torch.empty(50, dtype=dtype)}, 20, seeded(4)))
    # entries and scale are rounded by less than eps / 2 each; Gaussian norms would spread by 5 %
    assert (v.norm(dim=1) / math.sqrt(200) - 1).abs().max() < torch.finfo(dtype).eps


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 63, 64, 65, 130, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rademacher_entries_are_signs(count: int, dtype: torch.dtype) -> None:
    v = fg.Rademacher().draw({"all": torch.empty(count, dtype=dtype)}, 3, seeded())["all"]
    assert (v.dtype, v.shape) == (dtype, (3, count))
    assert (v.abs() == 1).all()


def test_rademacher_signs_are_fair_and_independent_across_bytes_and_words() -> None:
    v = fg.Rademacher().draw({"all": torch.empty(131)}, 4_000, seeded(5))["all"].double()
    means = v.mean(dim=0) * math.sqrt(4_000)
    correlations = (v.T @ v).fill_diagonal_(0) / math.sqrt(4_000)
    assert means.abs().max() < 4.5  # m = 131: false alarms below 0.09 %
    assert correlations.abs().max() < 5.5  # m = 8,515 at 3.8e-8 each: below 0.04 %
    flat = v.flatten()
    for lag in (1, 7, 8, 9, 63, 64, 65, 131):  # m = 8 lags, also from one tangent to the next
        product = flat[lag:] * flat[:-lag]
        assert abs(product.sum()) / math.sqrt(len(product)) < 4.5


@pytest.mark.parametrize("law", SEPARATE, ids=repr)
def test_tangents_drawn_at_once_are_the_bits_of_tangents_drawn_one_by_one(law: fg.Law) -> None:
    like = {**LIKE, "half": torch.empty(33, dtype=torch.bfloat16), "single": torch.empty(16)}
    at_once, generator = law.draw(like, 5, seeded(6)), seeded(6)
    for index in range(5):
        one = law.draw(like, 1, generator)
        assert all(torch.equal(one[name][0], at_once[name][index]) for name in like)


def test_what_a_gpu_draws_at_once_are_parts_of_one_draw_a_tangent() -> None:
    like = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.float64), "c": torch.zeros(()), "d": torch.zeros(70)}
    together, apart, plain = seeded(1), seeded(1), seeded(1)
    found = fg.Gaussian()._at_once(like, 3, together)
    singly = [fg.Gaussian()._at_once(like, 1, apart) for _ in range(3)]
    for name, p in like.items():
        assert (found[name].shape, found[name].dtype) == ((3, *p.shape), p.dtype)
        assert torch.equal(found[name], torch.cat([one[name] for one in singly]))
    whole = [
        (torch.empty(64 + 64 + 128).normal_(generator=plain), torch.empty(64, dtype=torch.float64).normal_(generator=plain))
        for _ in range(3)
    ]
    for k, (single, double) in enumerate(whole):
        assert torch.equal(found["a"][k].flatten(), single[:15])
        assert torch.equal(found["c"][k], single[64])
        assert torch.equal(found["d"][k], single[128:198])
        assert torch.equal(found["b"][k], double[:7])


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_a_draw_replays_from_its_seed_and_leaves_the_global_generator_alone(law: fg.Law) -> None:
    state = torch.get_rng_state()
    first, again, other = (joined(law.draw(LIKE, 2, seeded(seed))) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_tangents_have_shape_and_dtype_of_their_parameters(law: fg.Law) -> None:
    like = {"a": torch.empty(2, 3, dtype=torch.bfloat16), "b": torch.empty((), dtype=torch.float64), "c": torch.empty(4, 5).t()}
    drawn = law.draw(like, 3, seeded())
    assert list(drawn) == list(like)
    assert all(v.shape == (3, *like[name].shape) and v.dtype == like[name].dtype and not v.requires_grad for name, v in drawn.items())


def test_laws_have_names_and_are_values() -> None:
    assert [law.name for law in fg.LAWS] == ["gaussian", "rademacher", "sphere", "orthogonal"]
    assert fg.Gaussian() == fg.Gaussian() != fg.Sphere()
    assert len({hash(fg.Gaussian()), hash(fg.Gaussian())}) == 1


@pytest.mark.parametrize("law", [fg.Gaussian(), fg.Sphere()], ids=lambda law: law.name)
def test_many_numbers_are_the_same_bits_on_any_number_of_cores(law: fg.Law) -> None:
    """And normal: mean and fourth moment of 5 million within 4.5 standard errors, no block like another."""
    like, threads = {"w": torch.empty(5_000_000)}, torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(law.draw(like, 1, seeded(8))["w"][0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    v, n = found[0].double(), 5_000_000
    assert abs(v.mean()) < 4.5 / math.sqrt(n)
    assert abs((v**4).mean() - 3) < 4.5 * math.sqrt(96 / n)
    assert len({float(block[0]) for block in found[0].split(2**20)}) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 31, 64, 1000])
def test_signs_by_operations_are_those_of_the_table(count: int, dtype: torch.dtype) -> None:
    words = laws._words(count, seeded(4))
    signs = laws._shifted(words, count, dtype)
    assert torch.equal(signs, laws._looked_up(words, count, dtype))
    assert signs.dtype == dtype
    assert len(signs.unique()) == min(count, 2)


@pytest.mark.parametrize("law", [fg.Gaussian(), fg.Rademacher()], ids=repr)
def test_a_part_drawn_alone_has_the_moments_of_its_law(law: fg.Law, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laws, "_WORTH_A_STREAM", 100)
    like, generator = torch.empty(30, 40, dtype=torch.float64), torch.Generator()
    parts = torch.stack([law.part(like, generator, lambda seed=seed: seed, seed) for seed in range(400)])
    assert torch.equal(parts[7], law.part(like, generator, lambda: 7, "another"))
    n = parts.numel()
    assert abs(float(parts.mean())) * n**0.5 < 4.5  # m = 4 with the two below, a law: false alarms below 0.01 % in all
    spread = {"gaussian": 2.0, "rademacher": 0.0}[law.name]
    assert abs(float(parts.square().mean()) - 1) * n**0.5 <= 4.5 * spread**0.5
    between = (parts[:, 0, :-1] * parts[:, 0, 1:]).flatten()  # of neighbours, which may come from one word
    assert abs(float(between.mean())) * len(between) ** 0.5 < 4.5
    steps = (parts[:-1] * parts[1:]).flatten()  # of seeds that follow one another
    assert abs(float(steps.mean())) * len(steps) ** 0.5 < 4.5
