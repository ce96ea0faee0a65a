"""Steps taken again from a log, against the training that wrote it and against the same training without a log: bit for bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.cases import CASES, classify, dropout, padded, rows, seeded, tied, trained
from torch import Generator, Tensor, nn

import forwardgrad as fg
from forwardgrad.journal import digest_of, read_journal

METHODS = [
    fg.ForwardGradient(),
    fg.ForwardGradient(5, chunk_size=2),
    fg.ForwardGradient(3, law=fg.Orthogonal(), chunk_size=1, clip=0.1),
    fg.ForwardGradient(2, law=fg.Sphere()),
    fg.ForwardGradient(2, law=fg.Rademacher(), combine="projection"),
    fg.ForwardGradient(2, perturb=fg.Sparse(0.3)),
    fg.ForwardGradient(3, perturb=fg.LowRank(2)),
    fg.ForwardGradient(3, perturb=fg.LowRank(), chunk_size=2, law=fg.Rademacher()),
    fg.ForwardGradient(2, perturb=fg.LowRank(), combine="projection"),
    fg.ForwardGradient(4, perturb=fg.SplitWeights(2, fg.LowRank()), chunk_size=3),
    fg.ForwardGradient(4, perturb=fg.SplitWeights(3)),
    fg.ZerothOrder(),
    fg.ZerothOrder(tangents=3, law=fg.Rademacher(), sides="one", chunk_size=None, normalize=True),
    fg.ZerothOrder(tangents=2, perturb=fg.Sparse(0.3), maximize=True),
    fg.ZerothOrder(tangents=3, perturb=fg.LowRank(2), law=fg.Rademacher(), chunk_size=2),
    fg.ZerothOrder(tangents=2, perturb=fg.LowRank(), sides="one"),
]
Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.02, weight_decay=0.1),
    "sgd, the rate a tensor": lambda params: torch.optim.SGD(params, lr=torch.tensor(0.02)),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.8),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.02),
    "look-ahead": lambda params: fg.Nesterov(params, 0.02, 0.8),
    "replayed sgd": lambda params: fg.ReplayedSGD(params, lr=0.02, window=3),
    "replayed adam": lambda params: fg.ReplayedAdam(params, lr=0.02, window=3),
}
MODELS: list[Callable[[], tuple[nn.Module, Any]]] = [dropout, tied, padded]
FLOAT32 = [case.make for case in CASES if not case.exact]
STEPS = 6


def prepared(make: Callable[[], tuple[nn.Module, Any]]) -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    model, loss = make()
    return (model if make in FLOAT32 else model.double()), loss


def run(
    make: Callable[[], tuple[nn.Module, Any]], method: fg.Estimator, descent: Make, log: fg.StepLog | None = None, steps: int = STEPS
) -> tuple[nn.Module, Generator]:
    """A training with a rate that changes at every step."""
    model, loss = prepared(make)
    optimizer, generator = descent(model.parameters()), seeded(3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    step = fg.TrainingStep(lambda m: loss(m), model, optimizer, method, generator=generator, log=log)
    for _ in range(steps):
        step()
        schedule.step()
    if log is not None:
        log.close()
    return model, generator


def replayed(
    path: Path, make: Callable[[], tuple[nn.Module, Any]], descent: Make, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, int]:
    model, _ = prepared(make)
    optimizer = descent(model.parameters())
    return model, optimizer, fg.replay(path, model, optimizer, **options)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.product(each=2)
@pytest.mark.parametrize("descent", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_the_parameters_are_those_of_the_training(
    make: Callable[[], tuple[nn.Module, Any]], method: fg.Estimator, descent: str, tmp_path: Path
) -> None:
    if descent.startswith("replayed") and not method.replayable:
        with pytest.raises(ValueError, match="cannot be made again"):
            run(make, method, OPTIMIZERS[descent])
        return
    path, generator = tmp_path / "steps.log", Generator()
    logged, left = run(make, method, OPTIMIZERS[descent], fg.StepLog(path, digest_every=1))
    plain, _ = run(make, method, OPTIMIZERS[descent])
    again, _, taken = replayed(path, make, OPTIMIZERS[descent], generator=generator)
    assert taken == STEPS
    assert_same(logged, plain)
    assert_same(logged, again)
    assert torch.equal(generator.get_state(), left.get_state())
    start, _ = prepared(make)
    assert digest_of(start) != digest_of(again)


@pytest.mark.product
@pytest.mark.parametrize("method", [METHODS[1], METHODS[6], METHODS[14]], ids=repr)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_models_of_every_kind(case: Any, method: fg.Estimator, tmp_path: Path) -> None:
    path = tmp_path / "steps.log"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of buffers, and of what a loss of this kind means for a method
        logged, _ = run(case.make, method, OPTIMIZERS["sgd"], fg.StepLog(path), steps=3)
    again, _, _ = replayed(path, case.make, OPTIMIZERS["sgd"])
    assert_same(logged, again)


def test_large_parameters_have_directions_that_are_streams(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, Any]:
        return nn.Sequential(nn.Linear(4, 300), nn.Tanh(), nn.Linear(300, 300)), classify(rows(6, 4))

    for index, method in enumerate((fg.ForwardGradient(2), fg.ZerothOrder(), fg.ForwardGradient(perturb=fg.SplitWeights(1)))):
        path = tmp_path / f"{index}.log"
        logged, _ = run(make, method, OPTIMIZERS["momentum"], fg.StepLog(path))
        assert_same(logged, replayed(path, make, OPTIMIZERS["momentum"])[0])


@pytest.mark.parametrize("descent", ["sgd", "adamw", "replayed sgd"])
@pytest.mark.parametrize("method", [METHODS[6], METHODS[14]], ids=repr)
def test_a_checkpoint_and_the_log_since_then(method: fg.Estimator, descent: str, tmp_path: Path) -> None:
    """A training that was killed: it goes on from step 4 of 7, and a replay from the start and one from step 4 both come to its end."""
    whole, _ = run(dropout, method, OPTIMIZERS[descent], steps=9)
    path = tmp_path / "steps.log"
    model, loss = prepared(dropout)
    optimizer, generator = OPTIMIZERS[descent](model.parameters()), seeded(3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    kept: dict[str, Any] = {}

    def steps(first: int, last: int, log: fg.StepLog) -> None:
        step = fg.TrainingStep(lambda m: loss(m), model, optimizer, method, generator=generator, log=log)
        for number in range(first, last + 1):
            step()
            schedule.step()
            if number == 4:
                parts: dict[str, Any] = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                }
                kept.update(copy.deepcopy({**parts, "generator": generator.get_state(), "global": torch.get_rng_state()}))

    steps(1, 7, fg.StepLog(path, digest_every=2))
    for what, name in ((model, "model"), (optimizer, "optimizer"), (schedule, "schedule")):
        what.load_state_dict(copy.deepcopy(kept[name]))
    generator.set_state(kept["generator"])
    torch.set_rng_state(kept["global"])
    with fg.StepLog(path, since=4, digest_every=2) as log:
        steps(5, 9, log)
        assert log.steps == 9
    assert_same(model, whole)
    assert_same(replayed(path, dropout, OPTIMIZERS[descent])[0], whole)

    other, _ = prepared(dropout)
    other.load_state_dict(kept["model"])
    follower, source = OPTIMIZERS[descent](other.parameters()), Generator().set_state(kept["generator"])
    follower.load_state_dict(copy.deepcopy(kept["optimizer"]))
    assert fg.replay(path, other, follower, since=4, generator=source) == 5
    assert_same(other, whole)
    assert torch.equal(source.get_state(), generator.get_state())


def test_a_generator_that_others_draw_from_too(tmp_path: Path) -> None:
    path = tmp_path / "steps.log"
    model, loss = prepared(dropout)
    optimizer, generator = OPTIMIZERS["sgd"](model.parameters()), seeded(3)
    step = fg.TrainingStep(lambda m: loss(m), model, optimizer, fg.ForwardGradient(), generator=generator, log=fg.StepLog(path))
    for number in range(4):
        if number == 2:
            torch.randperm(9, generator=generator)
        step()
    assert_same(replayed(path, dropout, OPTIMIZERS["sgd"])[0], model)
    assert [one.generator is not None for one in read_journal(path).steps] == [False, False, True, False]


def test_settings_and_trained_parameters_may_change(tmp_path: Path) -> None:
    path = tmp_path / "steps.log"
    model, loss = prepared(dropout)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, betas=(0.8, 0.9))
    step = fg.TrainingStep(lambda m: loss(m), model, optimizer, fg.ForwardGradient(2), generator=seeded(3), log=fg.StepLog(path))
    step()
    optimizer.param_groups[0]["betas"] = (0.5, 0.7)
    step()
    model[0].weight.requires_grad_(False)
    step()
    again = prepared(dropout)[0]
    fg.replay(path, again, torch.optim.Adam(again.parameters(), lr=1.0))  # the rate is that of the log
    assert_same(again, model)


def test_what_a_loop_does_around_its_steps(tmp_path: Path) -> None:
    """Weights shrink ahead of each step, and its length is capped: in the training and in the replay, with a stop between."""
    path = tmp_path / "steps.log"

    @contextmanager
    def around(model: nn.Module) -> Iterator[None]:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.99)
        with fg.cap_step(model.parameters(), 1e-3):
            yield

    model, loss = prepared(dropout)
    optimizer, generator = OPTIMIZERS["momentum"](model.parameters()), seeded(3)
    for since in (None, 4):
        with fg.StepLog(path, since=since, digest_every=2) as log:
            step = fg.TrainingStep(lambda m: loss(m), model, optimizer, fg.ForwardGradient(), generator=generator, log=log)
            for _ in range(4):
                with around(model):
                    step()
    again = prepared(dropout)[0]
    follower = OPTIMIZERS["momentum"](again.parameters())
    assert fg.replay(path, again, follower, around=lambda: around(again)) == 8
    assert_same(again, model)
    with pytest.raises(fg.JournalError, match="after step 2 are not those"):
        replayed(path, dropout, OPTIMIZERS["momentum"])


def test_until_stops_at_a_step(tmp_path: Path) -> None:
    path = tmp_path / "steps.log"
    run(tied, METHODS[6], OPTIMIZERS["adamw"], fg.StepLog(path))
    three, _ = run(tied, METHODS[6], OPTIMIZERS["adamw"], steps=3)
    model, _, taken = replayed(path, tied, OPTIMIZERS["adamw"], until=3)
    assert taken == 3
    assert_same(model, three)
    with pytest.raises(ValueError, match="holds the steps 1 to 6, and none up to step 7"):
        replayed(path, tied, OPTIMIZERS["adamw"], until=7)


def test_the_first_digest_that_differs_is_named(tmp_path: Path) -> None:
    """The parameters are pushed between steps 4 and 5, of which the log knows nothing."""
    path = tmp_path / "steps.log"
    model, loss = prepared(dropout)
    optimizer, log = OPTIMIZERS["sgd"](model.parameters()), fg.StepLog(path, digest_every=2)
    step = fg.TrainingStep(lambda m: loss(m), model, optimizer, fg.ForwardGradient(), generator=seeded(3), log=log)
    for number in range(8):
        if number == 4:
            with torch.no_grad():
                model[0].bias[0].nextafter_(torch.tensor(9.0, dtype=torch.float64))
        step()
    with pytest.raises(fg.JournalError, match="after step 6 are not those of the training, and those after step 4 were the same"):
        replayed(path, dropout, OPTIMIZERS["sgd"])
    assert replayed(path, dropout, OPTIMIZERS["sgd"], until=5)[2] == 5


def test_what_happens_after_the_last_step_is_seen_at_the_close(tmp_path: Path) -> None:
    path = tmp_path / "steps.log"
    model, loss = prepared(dropout)
    optimizer, log = OPTIMIZERS["sgd"](model.parameters()), fg.StepLog(path)
    step = fg.TrainingStep(lambda m: loss(m), model, optimizer, fg.ForwardGradient(), generator=seeded(3), log=log)
    step()
    with torch.no_grad():
        model[0].bias.add_(1)
    log.close()
    with pytest.raises(fg.JournalError, match="between step 1 and what came after it are not those of the training, and no earlier ones"):
        replayed(path, dropout, OPTIMIZERS["sgd"])
    with pytest.raises(ValueError, match="is closed: no further step can be written"):
        step()


def test_another_start_another_model_another_optimizer(tmp_path: Path) -> None:
    path = tmp_path / "steps.log"
    run(dropout, fg.ForwardGradient(), OPTIMIZERS["sgd"], fg.StepLog(path))
    other = prepared(dropout)[0]
    with torch.no_grad():
        other[0].bias[0].nextafter_(torch.tensor(9.0, dtype=torch.float64))
    with pytest.raises(fg.JournalError, match=r"not those that .* has at its start"):
        fg.replay(path, other, OPTIMIZERS["sgd"](other.parameters()))
    with pytest.raises(fg.JournalError, match=r"written with optimizer 'torch\.optim\.sgd\.SGD', and this one has 'torch\.optim\.adamw"):
        replayed(path, dropout, OPTIMIZERS["adamw"])
    with pytest.raises(fg.JournalError, match=r"written with groups \[4\], and this one has \[1\]"):
        replayed(path, dropout, lambda params: torch.optim.SGD([next(iter(params))], lr=0.1))
    with pytest.raises(ValueError, match="needs the generator as it was"):
        replayed(path, dropout, OPTIMIZERS["sgd"], since=2)
    with pytest.raises(ValueError, match="since must be a step from 0 to 6"):
        replayed(path, dropout, OPTIMIZERS["sgd"], since=7)


class OwnLaw(fg.Rademacher):
    name = "own"


def test_a_law_of_ones_own_is_named_and_never_imported(tmp_path: Path) -> None:
    path, method = tmp_path / "steps.log", fg.ForwardGradient(law=OwnLaw())
    logged, _ = run(dropout, method, OPTIMIZERS["sgd"], fg.StepLog(path))
    with pytest.raises(fg.JournalError, match=r"nothing is imported here.*: pass estimator="):
        replayed(path, dropout, OPTIMIZERS["sgd"])
    assert_same(replayed(path, dropout, OPTIMIZERS["sgd"], estimator=method)[0], logged)


@pytest.mark.parametrize(
    "method",
    [
        fg.Backprop(),
        fg.LocalLosses(),
        fg.ForwardGradient(perturb=fg.Activity()),
        fg.ForwardGradient(perturb=fg.PerExample()),
        fg.ForwardGradient(perturb=fg.LowRank(period=2)),
        fg.ForwardGradient(control_variate=0.5),
        fg.ZerothOrder(perturb=fg.PerExample()),
        fg.ZerothOrder(perturb=fg.LowRank(period=2)),
    ],
    ids=repr,
)
def test_what_a_log_cannot_hold_is_refused_at_the_start(method: fg.Estimator, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be taken again from a log: ForwardGradient and ZerothOrder can that move weights"):
        run(dropout, method, OPTIMIZERS["sgd"], fg.StepLog(tmp_path / "steps.log"))
    assert not list(tmp_path.iterdir())


def test_engines_and_optimizers_that_a_log_cannot_hold(tmp_path: Path) -> None:
    model, loss = prepared(dropout)
    log, sgd, method = fg.StepLog(tmp_path / "steps.log"), OPTIMIZERS["sgd"](model.parameters()), fg.ForwardGradient()
    with pytest.raises(ValueError, match="drawn again, which no graph can: use engine='eager'"):
        fg.TrainingStep(loss, model, sgd, method, generator=seeded(), engine="compile", log=log)
    with pytest.raises(ValueError, match="directions need an explicit generator"):
        fg.TrainingStep(loss, model, sgd, method, log=log)
    with pytest.raises(ValueError, match="LBFGS asks for more than one gradient in a step"):
        fg.TrainingStep(loss, model, torch.optim.LBFGS(model.parameters()), method, generator=seeded(), log=log)
    assert not list(tmp_path.iterdir())


class AsksTwice(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        closure()
        return super().step(closure)


def test_an_optimizer_that_asks_twice_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="AsksTwice asks for more than one gradient in a step"):
        run(dropout, fg.ForwardGradient(), lambda params: AsksTwice(params, lr=0.1), fg.StepLog(tmp_path / "steps.log"))


def test_buffers_are_not_in_the_log_and_one_warning_says_so(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, Any]:
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)), classify(rows(6, 4))

    path = tmp_path / "steps.log"
    with pytest.warns(UserWarning, match=r"buffers of the model \(1.running_mean, 1.running_var, 1.num_batches_tracked\)") as said:
        logged, _ = run(make, fg.ForwardGradient(), OPTIMIZERS["sgd"], fg.StepLog(path))
    assert len(said) == 1
    again = replayed(path, make, OPTIMIZERS["sgd"])[0]
    assert_same(logged, again)
    assert torch.equal(again[1].running_mean, torch.zeros(5, dtype=torch.float64))


def test_a_batch_without_examples_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    optimizer, log = torch.optim.SGD(model.parameters(), lr=0.1), fg.StepLog(tmp_path / "steps.log")
    method = fg.ForwardGradient(perturb=fg.LowRank())
    step = fg.TrainingStep(lambda m, x: m(x).square().sum(), model, optimizer, method, generator=seeded(), log=log)
    with pytest.raises(ValueError, match="the batch has no examples, and a log has no step of such batches"):
        step(torch.empty(0, 4))


def test_autocast_around_a_step(tmp_path: Path) -> None:
    path, ends = tmp_path / "steps.log", list[Tensor]()
    x = rows(6, 4, dtype=torch.float32)
    for log in (fg.StepLog(path), None):
        torch.manual_seed(1)
        model = nn.Linear(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = fg.TrainingStep(lambda m: m(x).square().mean(), model, optimizer, METHODS[6], generator=seeded(), log=log)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(3):
                step()
        ends.append(model.weight.detach())
    torch.manual_seed(1)
    model = nn.Linear(4, 3)
    fg.replay(path, model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(torch.equal(end, model.weight) for end in ends)


@pytest.mark.full
def test_two_hundred_steps_of_an_mlp(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, Any]:
        layers = [nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)]
        return nn.Sequential(*layers), classify(rows(64, 4))

    for index, method in enumerate((fg.ForwardGradient(), fg.ForwardGradient(4, perturb=fg.LowRank()), fg.ZerothOrder())):
        path = tmp_path / f"{index}.log"
        logged, _ = run(make, method, OPTIMIZERS["adamw"], fg.StepLog(path), steps=200)
        again, _, taken = replayed(path, make, OPTIMIZERS["adamw"])
        assert taken == 200
        assert trained(again).keys() == trained(logged).keys()
        assert_same(logged, again)
