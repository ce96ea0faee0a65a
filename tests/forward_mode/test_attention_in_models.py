"""Attention by tiles inside models and steps: backpropagation's derivative, no step that holds all scores, one node of a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.engines.test_engines import compare, uncompiled  # noqa: F401  # a fixture among them
from tests.forward_mode.test_attention import draw
from tests.forward_mode.test_explicit import both as in_both_ways
from tests.forward_mode.test_explicit import same, ways
from tests.support.cases import Loss, rows, seeded, true_gradient
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.diagnostics import peak_bytes
from forwardgrad.engines import compiled
from forwardgrad.engines.trace import trace
from forwardgrad.forward_mode.explicit import Explicit
from forwardgrad.forward_mode.rules import attention

Attention = Callable[..., Tensor]
sdpa: Attention = F.scaled_dot_product_attention


class Decoder(nn.Module):
    """A block of a language model: two heads of queries share one of keys."""

    def __init__(self, width: int = 8, p: float = 0.0) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(5, width), nn.LayerNorm(width)
        self.queries, self.shared, self.out, self.p = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 5), p

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        h = self.norm(x)
        q = self.queries(h).unflatten(-1, (4, -1)).transpose(1, 2)
        k, v = (part.transpose(1, 2) for part in self.shared(h).unflatten(-1, (4, -1)).chunk(2, -2))
        seen = sdpa(q, k, v, dropout_p=self.p, is_causal=True, enable_gqa=True)
        return self.out(x + seen.transpose(1, 2).flatten(-2))


def next_word(words: Tensor) -> Loss:
    return lambda model: F.cross_entropy(model(words)[:, :-1].flatten(0, 1), words[:, 1:].flatten())


def words(count: int, length: int) -> Tensor:
    return torch.randint(5, (count, length), generator=seeded(4))


@pytest.mark.parametrize("method", [fg.ForwardGradient(2), fg.ForwardGradient(perturb=fg.LowRank())], ids=repr)
def test_no_step_holds_all_scores_not_even_the_first(method: fg.Estimator) -> None:
    """In the first both ways are compared, and for low rank the model is tried beforehand."""
    model, loss = Decoder(), next_word(words(1, 2048))
    peaks = [peak_bytes(lambda: fg.estimate_grad_(loss, model, method, generator=seeded()), [torch.device("cpu")]) for _ in range(2)]
    assert max(peaks) <= 0.25 * 4 * 4 * 2048**2
    assert ways(model, loss) == [False]


# Models -----------------------------------------------------------------------------------------------------------------------------------


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **{"dropout": 0.0, **options})
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def pooled(x: Tensor, **options: Any) -> Loss:
    return lambda model: model(x, **options).square().mean()


X = rows(3, 9, 8)
PADDED = torch.arange(9) >= torch.tensor([[9], [6], [7]])
MODELS: dict[str, Callable[[], tuple[nn.Module, Loss]]] = {
    "decoder": lambda: (Decoder().double(), next_word(words(3, 9))),
    "encoder": lambda: (encoder().double(), pooled(X)),
    "encoder, evaluated": lambda: (encoder(dropout=0.3, norm_first=True).double().eval(), pooled(X)),
    "encoder, padded": lambda: (encoder().double(), pooled(X, src_key_padding_mask=PADDED)),
    "encoder, causal": lambda: (
        encoder().double(),
        pooled(X, mask=nn.Transformer.generate_square_subsequent_mask(9).double(), is_causal=True),
    ),
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", MODELS)
def test_a_models_derivative_is_backpropagations(name: str) -> None:
    torch.manual_seed(0)
    model, loss = MODELS[name]()
    gradient = true_gradient(model, loss)
    v = fg.Gaussian().draw(dict(model.named_parameters()), 1, seeded(3))
    found = fg.estimate_grad_(loss, model, fg.ForwardGradient(), generator=seeded(3)).derivatives
    exact = torch.stack([(gradient[name] * v[name][0]).sum() for name in gradient]).sum()
    torch.testing.assert_close(found[0], exact, rtol=1e-10, atol=1e-12)
    assert ways(model, loss) == [False]
    rows = [row for row in fg.explain(loss, model).calls if row.function == "scaled_dot_product_attention"]
    assert [row.way for row in rows] == ["rule"]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("method", [fg.ForwardGradient(2), fg.ForwardGradient(perturb=fg.LowRank())], ids=repr)
def test_with_dropout_both_ways_see_the_same_masks(method: fg.Estimator) -> None:
    torch.manual_seed(0)
    model, loss = Decoder(p=0.4).double(), next_word(words(3, 9))
    one, other = in_both_ways(model, loss, method)
    same(one, other)
    assert ways(one[2], loss) == [False]


@pytest.mark.usefixtures("small_tiles", "uncompiled")
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_graph_of_a_step_is_the_eager_one(p: float) -> None:
    """One node of the graph for each attention, whatever its length: no loop over tiles is written out."""
    given = [words(2, 9), words(2, 9).flip(0), words(2, 9).flip(1)]

    def make() -> nn.Module:
        torch.manual_seed(1)
        return Decoder(p=p)

    of = lambda model, x: next_word(x)(model)  # noqa: E731
    step = compare(make, fg.ForwardGradient(perturb=fg.LowRank()), loss=of, run=lambda step: [step(x) for x in given], graphs=1)
    assert not step.fallback


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, as its compiler loads
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_compiler_keeps_the_node_and_its_bits(p: float) -> None:
    q, v, mask = draw(2, 3, 9, 4, dtype=torch.float32), draw(2, 2, 3, 9, 4, dtype=torch.float32), draw(9, 9) > -0.5

    def work() -> list[Tensor]:
        with Explicit(2, {id(q): v}) as evaluation:
            h = sdpa(q * 2, q, q, mask, p)
            return [h + 1, evaluation.derivative(h)]

    traced = trace(work, [q, v, mask])
    assert sum("attention" in str(node.target) for node in traced.graph.graph.nodes) == 1
    assert traced.random == bool(p)
    with torch.no_grad():
        function = compiled.compiled(traced, [q, v, mask])
        torch.manual_seed(3)
        found, after = function(q, v, mask), torch.get_rng_state()
        torch.manual_seed(3)
        for one, other in zip(found, work(), strict=True):
            torch.testing.assert_close(one, other)
        assert torch.equal(after, torch.get_rng_state())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_the_node_says_truly_what_it_returns(kind: torch.dtype) -> None:
    """Its shapes, types and order in memory, as a compiler reckons with them, for every argument that may be there or not."""
    q, k, v = draw(2, 3, 4, 5, dtype=kind).transpose(1, 2), draw(2, 2, 6, 5, dtype=kind), draw(2, 2, 6, 3, dtype=kind)
    mask, moves = draw(4, 1, 6), [draw(2, *t.shape, dtype=kind) for t in (q, k, v)]
    node = attention._operator(False)
    torch.library.opcheck(node, (q, k, v, mask.bool(), *moves, None, 0.0, False, 0.5, [2, 2], [2, 2, 2], 2))
    torch.library.opcheck(
        node, (q, q, q, mask[..., :3].to(kind), None, None, None, draw(2, 4, 1, 3, dtype=kind), 0.0, False, 0.5, [], [2, 4], 2)
    )
    torch.library.opcheck(node, (q, q, q, None, None, None, None, None, 0.0, True, 0.5, [], [2, 4], 0))


@pytest.mark.usefixtures("small_tiles", "uncompiled")
def test_what_does_not_move_is_one_node_of_a_graph_too() -> None:
    """A frozen attention in front of what is trained."""

    def make() -> nn.Module:
        torch.manual_seed(1)
        model = Decoder()
        model.requires_grad_(False)
        model.out.requires_grad_(True)
        return model

    of = lambda model, x: next_word(x)(model)  # noqa: E731
    compare(make, fg.ForwardGradient(2), loss=of, run=lambda step: [step(words(2, 9)) for _ in range(2)], graphs=1)
