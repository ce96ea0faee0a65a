"""The paper as studies: Table I's hyperparameters and results, the grids, the figures, Baydin's comparison, and the demonstration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import Arm, DataName, Length, ModelName, Optimizer, Published, Run, Study, logspace

Kind = Literal["forward", "backprop"]
KINDS: tuple[Kind, ...] = ("forward", "backprop")

BACKPROP: dict[str, Any] = {"name": "backprop"}
FORWARD: dict[str, Any] = {"name": "forward", "tangents": 1, "law": "gaussian", "clip": None, "chunk_size": None}
CLIPPED: dict[str, Any] = {**FORWARD, "clip": 1.0}
LABELS: dict[str, str] = {"forward": "forward gradient", "backprop": "backpropagation"}
BAYDIN_EPOCHS = 10
BAYDIN_LR, BAYDIN_DECAY = 2e-4, 1e-4  # η₀ and k of η_i = η₀·exp(−i·k), the same for both arms


def _row(model: ModelName, optimizer: Optimizer, kind: Kind, epochs: int, test_loss: float) -> Arm:
    data: DataName = "cifar10" if model == "cifar-cnn" else "mnist"
    clipped = optimizer.name != "adam"  # the paper's Adam runs have no clip
    estimator = BACKPROP if kind == "backprop" else CLIPPED if clipped else FORWARD
    group = f"{'CNN' if 'cnn' in model else 'NN'} · {'CIFAR-10' if data == 'cifar10' else 'MNIST'} · {TITLES[optimizer.name]}"
    return Arm(
        name=f"{model}-{optimizer.name}-{kind}",
        group=group,
        kind=kind,
        label=LABELS[kind],
        run=Run(data=data, model=model, estimator=estimator, optimizer=optimizer, epochs=epochs),
        published=Published(epochs, test_loss),
    )


TITLES: dict[str, str] = {"sgd": "SGD", "nesterov": "Nesterov", "adam": "Adam"}

TABLE1 = (
    _row("nn", Optimizer("sgd", 0.000464, 1e-5), "forward", 50, 0.332),
    _row("nn", Optimizer("sgd", 0.1), "backprop", 50, 0.000),
    _row("nn", Optimizer("nesterov", 0.000320, 1e-5, momentum=0.367), "forward", 50, 0.270),
    _row("nn", Optimizer("nesterov", 0.1, momentum=0.5), "backprop", 50, 0.000),
    _row("nn", Optimizer("adam", 0.0005, 5e-5, beta1=0.99), "forward", 50, 0.283),
    _row("nn", Optimizer("adam", 0.0001), "backprop", 50, 0.000),
    _row("cnn", Optimizer("sgd", 0.000398, 1e-5), "forward", 50, 0.548),
    _row("cnn", Optimizer("sgd", 0.1), "backprop", 50, 0.000),
    _row("cnn", Optimizer("nesterov", 0.0001, 1e-4, momentum=0.9), "forward", 50, 0.559),
    _row("cnn", Optimizer("nesterov", 0.01, momentum=0.783), "backprop", 50, 0.000),
    _row("cnn", Optimizer("adam", 0.00025, 1e-4, beta2=0.9999), "forward", 50, 0.669),
    _row("cnn", Optimizer("adam", 0.000236), "backprop", 50, 0.000),
    _row("cifar-cnn", Optimizer("sgd", 0.000433, 1e-6), "forward", 100, 6.955),
    _row("cifar-cnn", Optimizer("sgd", 0.01, 1e-4), "backprop", 100, 1.685),
)
"""Table I as published, with the epochs and the 'test loss' printed there."""

# The paper's learning-rate grids where they are known, and as many points for backpropagation as for the forward gradient.
_DECAYS = (0.0, 1e-6, 1e-5)
GRIDS: dict[tuple[str, str, Kind], dict[str, tuple[float, ...]]] = {
    ("nn", "sgd", "forward"): {"lr": logspace(-4, -3, 4), "decay": _DECAYS},
    ("nn", "sgd", "backprop"): {"lr": logspace(-3, -1, 4), "decay": _DECAYS},
    ("nn", "nesterov", "forward"): {"lr": logspace(-4, -3, 4), "momentum": (0.1, 0.367, 0.633, 0.9)},
    ("nn", "nesterov", "backprop"): {"lr": logspace(-3, -1, 4), "momentum": (0.1, 0.367, 0.633, 0.9)},
    ("nn", "adam", "forward"): {"lr": logspace(-4, -3, 4), "decay": (0.0, 5e-5, 1e-4), "beta1": (0.9, 0.99)},
    ("nn", "adam", "backprop"): {"lr": logspace(-4, -2, 4), "decay": (0.0, 5e-5, 1e-4), "beta1": (0.9, 0.99)},
    ("cifar-cnn", "sgd", "forward"): {"lr": logspace(-7, -2, 12)},
    ("cifar-cnn", "sgd", "backprop"): {"lr": logspace(-4, -2, 12)},
}


def grid(arm: Arm) -> dict[str, tuple[float, ...]]:
    """The search space of a Table I row; both MNIST networks are searched on the same grids."""
    model = "nn" if arm.run.model == "cnn" else arm.run.model
    kind: Kind = "backprop" if arm.kind == "backprop" else "forward"
    return GRIDS[model, arm.run.optimizer.name, kind]


def table1(
    rows: list[str] | None = None, epochs: int | None = None, seeds: int = 1, retune: bool = False, tuning_epochs: int | None = None
) -> Study:
    """Table I, or the rows whose number (1 to 14) or name starts with one of `rows`; with `retune`, from a search of our own."""
    arms = _chosen(rows)
    arms = tuple(_resized(arm, epochs=epochs, space=grid(arm) if retune else {}) for arm in arms)
    long = 20 if all(arm.run.data == "cifar10" for arm in arms) else 10
    title = "Table I, hyperparameters from a search of our own" if retune else "Table I, hyperparameters as published"
    length = Length(epochs=tuning_epochs or min(long, *(a.run.epochs for a in arms)))
    return Study("table1-retuned" if retune else "table1", title, arms, seeds, length)


def _chosen(rows: list[str] | None) -> tuple[Arm, ...]:
    names = [arm.name for arm in TABLE1]
    if not rows:
        return TABLE1
    wanted = set()
    for row in rows:
        numbered = row.isdigit() and 1 <= int(row) <= len(names)
        found = [names[int(row) - 1]] if numbered else [name for name in names if f"{name}-".startswith(f"{row}-")]
        if not found:
            raise UserError(f"no row {row!r} in Table I: choose a number from 1 to {len(names)} or a start of {', '.join(names)}")
        wanted.update(found)
    return tuple(arm for arm in TABLE1 if arm.name in wanted)


def _resized(arm: Arm, *, epochs: int | None, space: dict[str, tuple[float, ...]]) -> Arm:
    return replace(arm, run=replace(arm.run, epochs=epochs or arm.run.epochs), space=space)


def baydin(epochs: int | None = None, seeds: int = 1, tuning_epochs: int | None = None, rows: list[str] | None = None) -> Study:
    """Baydin's comparison at one learning rate for both arms, and beside it each arm tuned with seven points.

    Trials are as long as the final runs unless told otherwise: the largest rate that survives a short trial need not survive a long run.
    """
    epochs = epochs or BAYDIN_EPOCHS
    arms: list[Arm] = []
    models: tuple[ModelName, ...] = ("logistic", "nn")
    for model in models:
        if rows and model not in rows:
            continue
        arms += [_baydin_arm(model, kind, tuned, epochs) for tuned in (False, True) for kind in KINDS]
    if not arms:
        raise UserError(f"no row {rows[0] if rows else ''!r} in Baydin's comparison: choose from {', '.join(models)}")
    title = "Baydin's comparison: one learning rate for both arms, and each arm tuned"
    return Study("baydin", title, tuple(arms), seeds, Length(epochs=tuning_epochs or epochs))


def _baydin_arm(model: ModelName, kind: Kind, tuned: bool, epochs: int) -> Arm:
    spaces: dict[Kind, tuple[float, ...]] = {"forward": logspace(-5, -2, 7), "backprop": logspace(-3, 0, 7)}
    name = {"logistic": "logistic regression", "nn": "NN"}[model]
    return Arm(
        name=f"{model}-{'tuned' if tuned else 'same'}-{kind}",
        group=f"{name} · MNIST · {'each arm tuned' if tuned else 'one learning rate'}",
        kind=kind,
        label=LABELS[kind],
        run=Run(
            data="mnist",
            model=model,
            estimator=BACKPROP if kind == "backprop" else FORWARD,
            optimizer=Optimizer("sgd", BAYDIN_LR, BAYDIN_DECAY),
            epochs=epochs,
        ),
        space={"lr": spaces[kind]} if tuned else {},
        full_epochs=BAYDIN_EPOCHS,
    )


def demo(epochs: int = 30, seeds: int = 3) -> Study:
    """Both arms on scikit-learn's handwritten digits, tuned with five points each; the forward gradient averages eight tangents."""
    spaces: dict[Kind, tuple[float, ...]] = {"forward": logspace(-3, -1, 5), "backprop": logspace(-1.5, 0.5, 5)}
    averaged = {**FORWARD, "tangents": 8}
    arms = tuple(
        Arm(
            name=f"digits-{kind}",
            group="MLP · digits · SGD",
            kind=kind,
            label=LABELS[kind],
            run=Run("digits", "mlp", BACKPROP if kind == "backprop" else averaged, Optimizer("sgd", 0.01), epochs, batch_size=32),
            space={"lr": space},
        )
        for kind, space in spaces.items()
    )
    return Study("demo", "Forward gradient and backpropagation on handwritten digits", arms, seeds, Length(epochs=min(10, epochs)))
