"""The batches that tokenizers and models of transformers make, through the library's own steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from tests.engines.test_engines import uncompiled  # noqa: F401  # a fixture
from tests.support.cases import seeded
from tests.support.loops import bert
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput

import forwardgrad as fg
from forwardgrad.training_step import EngineName

WORDS = ["not", "a", "good", "film", "but", "very", "bad", "one"]
TEXTS = [["a good film", "not a good film", "bad"], ["very very bad", "one film", "a film"], ["good", "but not bad", "not one"]]
LABELS = torch.tensor([0, 1, 2])


def encoded(texts: list[str]) -> BatchEncoding:
    vocabulary = {word: index for index, word in enumerate(["[UNK]", "[PAD]", *WORDS])}
    inside = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    inside.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inside, unk_token="[UNK]", pad_token="[PAD]")
    return tokenizer(texts, padding="max_length", max_length=5, return_tensors="pt")


@dataclasses.dataclass(frozen=True)
class Labelled:
    texts: BatchEncoding
    labels: Tensor
    names: tuple[str, ...] = ("first", "second", "third")


class Named(NamedTuple):
    texts: BatchEncoding
    rest: dict[str, list[Tensor]]


KINDS: dict[str, Any] = {
    "encoding": lambda texts: encoded(texts) | {"labels": LABELS},
    "dataclass": lambda texts: Labelled(encoded(texts), LABELS),
    "tuple": lambda texts: (encoded(texts), LABELS),
    "nested": lambda texts: Named(encoded(texts), {"labels": [LABELS]}),
}


def loss(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Labelled):
        texts, labels = batch.texts, batch.labels
    elif isinstance(batch, Named):
        texts, labels = batch.texts, batch.rest["labels"][0]
    elif isinstance(batch, tuple):
        texts, labels = batch
    else:
        return model(**batch).loss
    return model(**texts, labels=labels).loss


Taken = tuple[list[Tensor], dict[str, Tensor], fg.TrainingStep]


def taken(kind: str, estimator: fg.Estimator, engine: EngineName) -> Taken:
    model, generator = bert(dropout=0.0), seeded()
    step = fg.TrainingStep(loss, model, torch.optim.SGD(model.parameters(), lr=0.05), estimator, generator=generator, engine=engine)
    losses = [step(KINDS[kind](texts)).loss for texts in TEXTS]
    return losses, model.state_dict(), step


ESTIMATORS = {
    "rank one": fg.ForwardGradient(perturb=fg.LowRank()),
    "activities": fg.ForwardGradient(perturb=fg.Activity()),
    "zeroth order": fg.ZerothOrder(),
}


@pytest.mark.parametrize(
    ("kind", "estimator"),
    [("encoding", "rank one"), ("dataclass", "zeroth order"), ("tuple", "zeroth order"), ("nested", "activities")],
)
def test_a_step_takes_them_as_it_takes_their_tensors(kind: str, estimator: str) -> None:
    losses, weights, _ = taken(kind, ESTIMATORS[estimator], "eager")
    model, generator = bert(dropout=0.0), seeded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for texts, found in zip(TEXTS, losses, strict=True):
        tensors, labels = encoded(texts), LABELS
        optimizer.zero_grad()
        record = fg.estimate_grad_(
            lambda model, given=dict(tensors), labels=labels: model(**given, labels=labels).loss,
            model,
            ESTIMATORS[estimator],
            generator=generator,
        )
        optimizer.step()
        torch.testing.assert_close(found, record.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(weights, model.state_dict(), rtol=1e-4, atol=1e-6)  # plain SGD: no gradient is written down


class Reader(nn.Module):
    """A model that is handed the whole encoding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, texts: BatchEncoding, labels: Tensor, reduction: str = "mean") -> Any:
        out = self.out(self.embedding(texts["input_ids"]).mean(1))
        return nn.functional.cross_entropy(out, labels, reduction=reduction)


def read(model: nn.Module, texts: BatchEncoding, labels: Tensor) -> Tensor:
    return model(texts, labels)


@pytest.mark.usefixtures("uncompiled")
def test_a_graph_reads_their_tensors_anew() -> None:
    same_as_eager(lambda engine: taken("nested", fg.ZerothOrder(), engine))


@pytest.mark.full
def test_a_compiled_step_takes_an_encoding() -> None:
    def steps(engine: EngineName) -> Taken:
        torch.manual_seed(0)
        model = Reader()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        estimator = fg.ForwardGradient(perturb=fg.LowRank())
        step = fg.TrainingStep(read, model, optimizer, estimator, generator=seeded(), engine=engine)
        return [step(encoded(texts), labels=LABELS).loss for texts in TEXTS], model.state_dict(), step

    same_as_eager(steps)


def same_as_eager(steps: Callable[[EngineName], Taken]) -> None:
    (losses, weights, step), (wanted, eager, _) = steps("compile"), steps("eager")
    assert step.fallback == ""
    torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=0)
    torch.testing.assert_close(weights, eager, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("uncompiled")
def test_what_a_model_returns_may_be_a_batch() -> None:
    """As where a student is taught by the layers of a teacher."""

    def distilled(student: nn.Module, x: Tensor, teacher: BaseModelOutput) -> Tensor:
        return (student(x) - teacher.last_hidden_state).square().mean() + (student(x) * teacher.hidden_states[1]).mean()

    found = []
    for engine in ("eager", "compile"):
        torch.manual_seed(0)
        student = nn.Linear(4, 3)
        step = fg.TrainingStep(
            distilled, student, torch.optim.SGD(student.parameters(), lr=0.1), fg.ForwardGradient(), generator=seeded(), engine=engine
        )
        for index in range(4):
            x, one, other = (torch.randn(5, size, generator=torch.Generator().manual_seed(index + size)) for size in (4, 3, 3))
            step(x, BaseModelOutput(last_hidden_state=one, hidden_states=(one, other + index)))
        assert step.fallback == ""
        found.append(student.weight)
    torch.testing.assert_close(found[0], found[1])


def test_a_batch_without_examples_is_seen_inside_an_encoding() -> None:
    model = Reader()
    none = BatchEncoding({"input_ids": torch.zeros(0, 5, dtype=torch.int64)})
    for estimator in (fg.LocalLosses(), fg.ForwardGradient(perturb=fg.Activity())):
        record = fg.estimate_grad_(lambda m: m(none, LABELS[:0], reduction="sum"), model, estimator, generator=seeded(), state={})
        assert float(record.loss) == 0
