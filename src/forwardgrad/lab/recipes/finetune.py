"""Fine-tuning a pretrained transformer on real text: every way to a gradient, tuned alike and given as many seconds.

MiniLM (22.6 million weights) learns to tell good reviews of films from bad ones, from 10,232 sentences and from 16 of each class, as few as
Malladi et al. (2023) take, and to sort reviews of drugs into three classes. A small GPT (1.3 million weights), which backpropagation has
trained on film critics, learns to write on as reviews of drugs do. A trial and a final run last as many seconds in every arm, on
one thread; steps follow from each arm's pace. So a method that is dear a step gets fewer of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.recipes.paper import BACKPROP
from forwardgrad.lab.studies import Arm, DataName, Length, Optimizer, OptimizerName, Run, Study

BATCH = 16
Setting = Literal["movies", "few", "drugs", "words"]
Size = Literal["small", "medium", "full"]


@dataclass(frozen=True)
class WayToTune:
    """What supplies the gradient of an arm, of which part of the network, and the four learning rates that it is tuned over."""

    label: str
    kind: str
    estimator: dict[str, Any]
    rates: tuple[float, ...]
    optimizer: OptimizerName = "adam"
    model: str = "minilm"


WHOLE = (1e-4, 3e-4, 1e-3, 3e-3)  # of Adam on all weights
PART = (3e-4, 1e-3, 3e-3, 1e-2)  # of Adam on few
HIGH = (1e-3, 3e-3, 1e-2, 3e-2)  # of Adam on the classifier, and along estimates that want larger steps
MOVED: dict[str, Any] = {"name": "forward", "law": "rademacher"}
LOCAL: dict[str, Any] = {"name": "local", "feedback": True, "ends": ["*outer.weight"]}

WAYS: dict[str, WayToTune] = {
    "backprop": WayToTune("backpropagation", "backprop", BACKPROP, WHOLE),
    "checkpoint": WayToTune("backpropagation, checkpoints", "checkpoint", {"name": "backprop", "checkpoint": True}, WHOLE),
    "lora": WayToTune("backpropagation, LoRA", "lora", BACKPROP, PART, model="minilm-lora"),
    "readout": WayToTune("classifier alone", "readout", {"name": "readout"}, HIGH, model="minilm-readout"),
    "mezo": WayToTune("MeZO", "zeroth-order", {"name": "zeroth-order"}, (3e-4, 1e-3, 3e-3, 1e-2), "sgd"),
    "mezo-lora": WayToTune("MeZO, LoRA", "mezo-lora", {"name": "zeroth-order"}, (3e-4, 1e-3, 3e-3, 1e-2), "sgd", "minilm-lora"),
    # Normalised, an estimate of FZOO is as long as 1/ε, so its rates are small; the mean over 64 directions has an eighth of one's noise.
    "fzoo": WayToTune(
        "FZOO, K = 8",
        "fzoo",
        {"name": "zeroth-order", "law": "rademacher", "sides": "one", "tangents": 8, "normalize": True},
        (3e-6, 1e-5, 3e-5, 1e-4),
        "sgd",
    ),
    "eggroll": WayToTune(
        "EGGROLL, K = 64",
        "eggroll",
        {"name": "zeroth-order", "perturb": "low-rank", "tangents": 64, "chunk_size": 8},
        (1e-3, 3e-3, 1e-2, 3e-2),
        "sgd",
    ),
    "low-rank": WayToTune("rank one, K = 8", "low-rank", MOVED | {"perturb": "low-rank", "tangents": 8}, HIGH),
    "activity": WayToTune("activities moved", "activity", MOVED | {"perturb": "activity", "exact_output": True}, WHOLE),
    "feedback": WayToTune("learned feedback", "feedback", {"name": "feedback"}, WHOLE),
    "local": WayToTune("local losses with learned feedback", "local", LOCAL, HIGH),
}
USUAL = tuple(WAYS)

GPT = "gpt-4x128"
PRETRAINING = Run(
    data="movie-words",
    model=GPT,
    estimator=BACKPROP | {"checkpoint": False},  # as `forwardgrad train` writes it, so that its run is this one
    optimizer=Optimizer("adam", 2e-3, anneal=True, warm_up=100),
    epochs=5,
    batch_size=BATCH,
)  # what the arms that predict words begin with
WRITTEN: dict[str, tuple[float, ...]] = {
    "backprop": (3e-4, 1e-3, 3e-3, 1e-2),
    "checkpoint": (3e-4, 1e-3, 3e-3, 1e-2),
    "mezo": (1e-4, 3e-4, 1e-3, 3e-3),
    "fzoo": (1e-6, 3e-6, 1e-5, 3e-5),
    "eggroll": (3e-3, 1e-2, 3e-2, 1e-1),
    "low-rank": (1e-4, 3e-4, 1e-3, 3e-3),
    "activity": (3e-5, 1e-4, 3e-4, 1e-3),
    "local": (3e-4, 1e-3, 3e-3, 1e-2),
}  # the ways that a loss of every token takes, and their rates for a network that is narrower than MiniLM
SHORT = ("backprop", "readout", "mezo", "low-rank", "activity", "local")  # of the small budget
SOME = ("backprop", "readout", "mezo", "fzoo", "low-rank", "feedback", "local")  # of the medium one


@dataclass(frozen=True)
class TunedText:
    """A set of texts, the title of its comparison, its ways, the steps between two evaluations (few where 500 texts are read each time),
    and the run whose weights its arms start from, if there is one."""

    title: str
    data: DataName
    ways: Mapping[str, WayToTune]
    every: int
    pretraining: Run | None = None


WORD_WAYS = {way: replace(WAYS[way], rates=rates, model=GPT) for way, rates in WRITTEN.items()}
WORD_WAYS["local"] = replace(WORD_WAYS["local"], estimator=LOCAL | {"classes": 512, "head_rate": 3e-3})  # not one class a word
TEXTS: dict[Setting, TunedText] = {
    "movies": TunedText("MiniLM · film reviews", "movie-reviews", WAYS, 60),
    "few": TunedText("MiniLM · film reviews, 16 of each class", "movie-reviews-16", WAYS, 20),
    "drugs": TunedText("MiniLM · drug reviews", "drug-reviews", WAYS, 20),
    "words": TunedText("GPT · the next word of drug reviews, after film critics", "drug-words", WORD_WAYS, 20, PRETRAINING),
}


@dataclass(frozen=True)
class Spent:
    """Seconds of a trial and of a final run, trials of an arm (None: its four rates), seeds, and what is compared unless rows are named."""

    tuning: float
    training: float
    trials: int | None
    seeds: int
    settings: tuple[Setting, ...]
    ways: tuple[str, ...]


SPENT: dict[Size, Spent] = {
    "small": Spent(tuning=10, training=30, trials=2, seeds=1, settings=("movies",), ways=SHORT),
    "medium": Spent(tuning=30, training=90, trials=None, seeds=3, settings=("movies",), ways=SOME),
    "full": Spent(tuning=60, training=300, trials=None, seeds=3, settings=("movies", "few"), ways=USUAL),
}


def finetune(
    rows: list[str] | None = None, seeds: int | None = None, size: Size = "full", starts: Mapping[str, str] | None = None
) -> Study:
    """The arms of all texts, or those named: a text stands for its usual arms, a full name for itself.

    On one core `small` takes some minutes, `medium` more than an hour, and `full` a night. `starts` are the digests of the weights that
    runs of `pretraining` kept, by the run's identity.
    """
    spent = SPENT[size]
    arms = tuple(_arm(setting, way, starts or {}) for setting, way in _chosen(rows, spent))
    return Study(
        "finetune",
        "Fine-tuning a pretrained network: accuracy in equal seconds, and the memory it takes",
        arms,
        seeds or spent.seeds,
        Length(seconds=spent.tuning),
        Length(seconds=spent.training),
        spent.trials,
        "grid" if spent.trials is None else "halton",
    )


def pretraining(rows: list[str] | None = None, size: Size = "full") -> list[Run]:
    """The runs whose weights the arms of these rows start from. They have to be trained first, and to keep their weights."""
    settings = dict.fromkeys(setting for setting, _ in _chosen(rows, SPENT[size]))
    return [run for setting in settings if (run := TEXTS[setting].pretraining) is not None]


def _chosen(rows: list[str] | None, spent: Spent) -> list[tuple[Setting, str]]:
    """Texts and ways, in the order in which they are listed here."""
    names = {f"{setting}-{way}": (setting, way) for setting, text in TEXTS.items() for way in text.ways}
    usual = {setting: {f"{setting}-{way}" for way in spent.ways if way in text.ways} for setting, text in TEXTS.items()}
    wanted: set[str] = set()
    for row in rows or spent.settings:
        if row in names:
            wanted.add(row)
        elif row in TEXTS:
            wanted |= usual[row]
        else:
            some = ", ".join(sorted(usual["movies"])[:3])
            known = f"choose from {', '.join(TEXTS)}, or name an arm, such as {some}"
            raise UserError(f"no row {row!r} of fine-tuning: {known}")
    return [pair for name, pair in names.items() if name in wanted]


def _start(setting: Setting, text: TunedText, starts: Mapping[str, str]) -> str | None:
    if text.pretraining is None:
        return None
    if (identity := text.pretraining.identity) not in starts:
        raise UserError(f"the arms of {setting} start from the weights of the run {identity}: give their digest among `starts`")
    return starts[identity]


def _arm(setting: Setting, name: str, starts: Mapping[str, str]) -> Arm:
    text = TEXTS[setting]
    way = text.ways[name]
    run = Run(
        data=text.data,
        model=way.model,
        estimator=way.estimator,
        optimizer=Optimizer(way.optimizer, way.rates[0], anneal=True),
        batch_size=BATCH,
        evaluate_every=text.every,
        start=_start(setting, text, starts),
    )
    return Arm(f"{setting}-{name}", text.title, way.kind, way.label, run, {"lr": way.rates})
