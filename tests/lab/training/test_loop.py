"""The training loop: against a loop written by hand, killed and resumed, diverging, and evaluated on whole splits."""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from forwardgrad.engines import eager
from forwardgrad.estimators import Backprop, Estimate, Estimator, configuration
from forwardgrad.lab import models, store
from forwardgrad.lab.data import datasets
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies.run import Optimizer, Run, stream
from forwardgrad.lab.training import builders, divergence, evaluation, loop, schedule, training
from forwardgrad.lab.training.training import Training
from forwardgrad.objective import Objective
from forwardgrad.optim.nesterov import Nesterov

BACKPROP = {"name": "backprop"}
FORWARD = {"name": "forward", "clip": 1.0}
RUN = Run("digits", "logistic", BACKPROP, Optimizer("sgd", 0.5, decay=1e-3, momentum=0.5), epochs=3)
UNTIMED = {"seconds"}


def left_behind(folder: Path) -> tuple[Any, ...]:
    """Everything a run leaves behind, but for the time it took."""
    result = store.read_result(folder)
    assert result is not None
    evaluations = store.read_table(folder / "evaluations.csv")
    kept = [{key: value for key, value in table.items() if key not in UNTIMED} for table in (result, evaluations)]
    return (*kept, (folder / "losses.csv.gz").read_bytes(), (folder / "walk.csv").read_bytes())


def test_backprop_is_the_loop_anyone_would_write(tmp_path: Path) -> None:
    result = loop.train(RUN, tmp_path)
    digits = datasets.load("digits", RUN.seed)
    torch.manual_seed(stream(RUN.seed, "initialisation"))
    model = models.build("logistic", digits.shape, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.5)
    losses = []
    for epoch in range(3):
        order = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(stream(RUN.seed, f"order of epoch {epoch}")))
        for batch in order.split(64):
            optimizer.param_groups[0]["lr"] = 0.5 * math.exp(-1e-3 * len(losses))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(digits.train.inputs[batch].float() / 16), digits.train.labels[batch])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert result["steps"] == len(losses) == 3 * 17
    assert store.read_table(tmp_path / "losses.csv.gz")["loss"] == pytest.approx(losses, rel=1e-5)
    with torch.no_grad():
        logits = model(digits.test.inputs.float() / 16)
    assert result["test"]["loss"] == pytest.approx(float(F.cross_entropy(logits.double(), digits.test.labels)), rel=1e-5)
    assert result["test"]["accuracy"] == float((logits.argmax(1) == digits.test.labels).double().mean())
    assert result["test"]["examples"] == 360


@dataclasses.dataclass(frozen=True)
class Remembering(Estimator):
    """For tests: the mean of the gradient now and the one it remembers, and a count that it keeps."""

    name: ClassVar[str] = "remembering"
    unbiased = False
    stateful = True

    def estimate(
        self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]
    ) -> tuple[Estimate, dict[str, Tensor | None]]:
        record, gradients = Backprop().estimate(objective, generator, state)
        state.setdefault("count", torch.zeros((), dtype=torch.int64)).add_(1)
        for name, gradient in gradients.items():
            assert gradient is not None
            gradients[name] = mean = state.get(name, torch.zeros_like(gradient)).lerp(gradient, 0.5)
            state[name] = mean.clone()
        return dataclasses.replace(record, forward_passes=3), gradients


@pytest.fixture
def remembering(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setitem(configuration._KINDS, Estimator, (*configuration.ESTIMATORS, Remembering))
    return {"name": "remembering"}


def test_an_estimator_remembers_from_step_to_step_and_its_passes_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remembering: dict[str, Any]
) -> None:
    states = []
    finish = loop.finish
    monkeypatch.setattr(loop, "finish", lambda training, *rest, **how: states.append(training.state) or finish(training, *rest, **how))
    result = loop.train(dataclasses.replace(RUN, estimator=remembering), tmp_path)
    assert int(states[0].memory["count"]) == result["steps"] == 51
    assert set(states[0].memory) == {"count", "model.1.weight", "model.1.bias"}
    assert result["forward_passes"] == 3 * 51
    assert loop.train(RUN, tmp_path / "b")["forward_passes"] == 51
    assert loop.train(dataclasses.replace(RUN, estimator={"name": "forward", "tangents": 4}), tmp_path / "f")["forward_passes"] == 5 * 51


HELD = {"weight_decay": 0.1, "anneal": True, "cap": 0.02}


@pytest.mark.product
@pytest.mark.parametrize("estimator", [BACKPROP, FORWARD, {"name": "remembering"}], ids=lambda e: e["name"])
@pytest.mark.parametrize(
    "optimizer",
    [
        Optimizer("sgd", 0.01, 1e-4),
        Optimizer("nesterov", 0.01, 1e-4, momentum=0.9),
        Optimizer("adam", 0.001, 1e-4),
        Optimizer("adam", 0.001, 1e-4, **HELD),
        Optimizer("nesterov", 0.1, momentum=0.9, **HELD),
    ],
    ids=lambda o: o.name + ("-held" if o.anneal else ""),
)
@pytest.mark.usefixtures("remembering")
def test_a_killed_run_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: dict[str, Any], optimizer: Optimizer
) -> None:
    run = dataclasses.replace(RUN, estimator=estimator, optimizer=optimizer, epochs=4)
    loop.train(run, tmp_path / "undisturbed")
    monkeypatch.setattr(schedule, "FIRST_EVALUATIONS", (7,))  # other interruptions of the loop must not matter either
    loop.train(run, tmp_path / "reference")

    tell, kills = loop.write_status, iter([7, 17, 51])
    kill_at = next(kills)

    def killed(training: Training, *rest: Any) -> None:
        nonlocal kill_at
        tell(training, *rest)
        if training.state.step >= kill_at:
            kill_at = next(kills, 10**9)
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "write_status", killed)
    interruptions = 0
    while not (tmp_path / "killed" / "result.json").exists():
        try:
            loop.train(run, tmp_path / "killed", checkpoint_seconds=0.0)
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions == 3
    assert left_behind(tmp_path / "killed") == left_behind(tmp_path / "reference")
    assert left_behind(tmp_path / "undisturbed")[2] == left_behind(tmp_path / "reference")[2]
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == [
        "environment.json",
        "evaluations.csv",
        "losses.csv.gz",
        "result.json",
        "run.json",
        "walk.csv",
    ]


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam"])
def test_weight_decay_annealing_and_cap_are_their_formulas(tmp_path: Path, name: Any) -> None:
    momentum = {"nesterov": 0.5}.get(name, 0.0)
    options = Optimizer(name, 0.05, decay=1e-3, momentum=momentum, weight_decay=0.5, anneal=True, cap=0.01)
    result = loop.train(dataclasses.replace(RUN, optimizer=options), tmp_path)
    digits = datasets.load("digits", RUN.seed)
    torch.manual_seed(stream(RUN.seed, "initialisation"))
    model = models.build("logistic", digits.shape, 10)
    held = list(model.parameters())
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[name](held, 0.05) if name != "nesterov" else Nesterov(held, 0.05, 0.5)
    norm = lambda tensors: math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))  # noqa: E731
    start, strides, losses, cut = norm(held), [], [], 0
    for epoch in range(3):
        order = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(stream(RUN.seed, f"order of epoch {epoch}")))
        for batch in order.split(64):
            before, t = [p.detach().clone() for p in held], len(losses)
            rate = 0.05 * math.exp(-1e-3 * t) * 0.5 * (1 + math.cos(math.pi * t / 51))
            optimizer.param_groups[0]["lr"] = rate

            def closure(batch: Tensor = batch) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(digits.train.inputs[batch].float() / 16), digits.train.labels[batch])
                loss.backward()
                return loss.detach()

            with torch.no_grad():
                for p in held:
                    p *= 1 - rate * 0.5
            shrunk = [p.detach().clone() for p in held]
            losses.append(float(optimizer.step(closure)))
            long = norm(p - b for p, b in zip(held, shrunk, strict=True)) / norm(shrunk) / 0.01
            cut += long > 1
            with torch.no_grad():
                for p, b in zip(held, shrunk, strict=True):
                    p.copy_(b + (p - b) / max(1.0, long))
            strides.append(norm(p - b for p, b in zip(held, before, strict=True)) / norm(before))
    assert 0 < cut < 51  # the cap was met, and not always
    assert store.read_table(tmp_path / "losses.csv.gz")["loss"] == pytest.approx(losses, rel=1e-4)
    table = store.read_table(tmp_path / "evaluations.csv")
    assert table["norm_growth"][-1] == pytest.approx(norm(held) / start, rel=1e-5)
    assert table["step"] == [17, 34, 51]
    assert table["relative_step"] == pytest.approx([strides[16], strides[33], strides[50]], rel=1e-3)
    assert result["initial_norm"] == pytest.approx(start, rel=1e-6)
    walk = store.read_table(tmp_path / "walk.csv")
    assert walk == {name: table[name] for name in ("step", "norm_growth", "relative_step")}  # nothing else was looked at
    assert store.read_table(tmp_path / "losses.csv.gz").keys() == {"step", "loss"}  # backpropagation has no directional derivative


def test_annealing_ends_at_zero_and_starts_at_the_rate() -> None:
    model = models.build("logistic", (1, 8, 8), 10)
    optimizer = builders.optimizer(Optimizer("sgd", 0.5, anneal=True), model)
    rate = builders.lr_schedule(Optimizer("sgd", 0.5, anneal=True), optimizer, 4)
    rates = []
    for _ in range(5):
        rates.append(rate.get_last_lr()[0])
        optimizer.step()
        rate.step()
    assert rates == pytest.approx([0.5, 0.25 + 0.25 / 2**0.5, 0.25, 0.25 - 0.25 / 2**0.5, 0.0], abs=1e-15)


def test_the_relative_step_is_the_root_mean_square_of_those_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "CHECK_EVERY", 5)
    seen = []
    measured = Training.step_measured
    monkeypatch.setattr(Training, "step_measured", lambda self, **how: seen.append((self.state.step + 1, s := measured(self, **how))) or s)
    loop.train(RUN, tmp_path)
    assert [step for step, _ in seen] == [5, 10, 15, 17, 20, 25, 30, 34, 35, 40, 45, 50, 51]
    parts = [[s for step, s in seen if low < step <= low + 17] for low in (0, 17, 34)]
    wanted = [math.sqrt(sum(s**2 for s in part) / len(part)) for part in parts]
    assert store.read_table(tmp_path / "evaluations.csv")["relative_step"] == pytest.approx(wanted, rel=1e-12)


def test_the_derivative_of_every_step_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = []
    estimate = eager.estimate_grad_
    monkeypatch.setattr(eager, "estimate_grad_", lambda *a, **k: records.append(r := estimate(*a, **k)) or r)
    loop.train(dataclasses.replace(RUN, estimator={"name": "forward", "tangents": 3, "clip": 0.1}), tmp_path)
    wanted = [math.sqrt(float(record.derivatives.square().mean())) for record in records]
    assert store.read_table(tmp_path / "losses.csv.gz")["derivative"] == pytest.approx(wanted, rel=1e-5)


def test_watching_the_memory_changes_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = dataclasses.replace(RUN, model="mlp", estimator={"name": "feedback"}, optimizer=Optimizer("adam", 0.01))
    watched = loop.train(run, tmp_path / "watched")
    monkeypatch.setattr(Training, "step_with_memory", lambda self: self.advance_timed(self.state.step + 1))
    plain = loop.train(run, tmp_path / "plain")
    assert plain.pop("peak_bytes") is None
    peak = watched.pop("peak_bytes")
    assert watched.keys() == plain.keys()
    assert all(watched[name] == plain[name] for name in plain if name not in UNTIMED)
    assert left_behind(tmp_path / "watched")[1:] == left_behind(tmp_path / "plain")[1:]
    held = 4 * (3 * plain["parameters"] + 10 * 64)  # parameters, Adam's two moments, the feedback matrix of the hidden layer
    assert held < peak < 3 * held


def test_what_is_held_for_a_backward_pass_counts(tmp_path: Path) -> None:
    """The steps watched end an epoch, with 54 examples: backpropagation holds the hidden layer's activities to its end."""
    runs = {
        name: dataclasses.replace(RUN, model="mlp", estimator={"name": name}, optimizer=Optimizer("sgd", 0.1))
        for name in ("backprop", "readout")
    }
    peaks = {name: loop.train(run, tmp_path / name)["peak_bytes"] for name, run in runs.items()}
    assert peaks["backprop"] - peaks["readout"] >= 4 * 54 * 64


def test_the_watched_step_counts_as_long_as_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peak_bytes = training.peak_bytes
    monkeypatch.setattr(training, "peak_bytes", lambda work, devices: time.sleep(0.5) or peak_bytes(work, devices))
    assert loop.train(RUN, tmp_path)["seconds"] < 0.5  # three watched steps of 51


def test_an_unknown_estimator_is_told_before_anything_is_written(tmp_path: Path) -> None:
    for estimator in ({"name": "evolution"}, {"name": "forward", "tangents": 0}, {"name": "backprop", "clip": 1.0}):
        with pytest.raises(UserError, match="cannot be used: "):
            loop.train(dataclasses.replace(RUN, estimator=estimator), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = loop.train(RUN, tmp_path)
    monkeypatch.setattr(loop, "train_to_end", lambda *_: pytest.fail("trained again"))
    assert loop.train(RUN, tmp_path) == first


def test_seeds_differ_and_repeat(tmp_path: Path) -> None:
    run = dataclasses.replace(RUN, estimator=FORWARD, optimizer=Optimizer("sgd", 0.01))
    first, again = loop.train(run, tmp_path / "a"), loop.train(run, tmp_path / "b")
    other = loop.train(dataclasses.replace(run, seed=1), tmp_path / "c")
    assert first["test"] == again["test"] != other["test"]


def test_a_run_that_explodes_is_a_result(tmp_path: Path) -> None:
    run = dataclasses.replace(RUN, model="mlp", optimizer=Optimizer("sgd", 1e20), epochs=10)
    result = loop.train(run, tmp_path)
    assert result["status"] == "diverged"
    assert result["reason"] == "the loss is not finite"
    losses = store.read_table(tmp_path / "losses.csv.gz")["loss"]
    assert result["diverged_at"] == result["steps"] == len(losses)
    assert all(map(math.isfinite, losses[:-1]))
    assert not math.isfinite(losses[-1])
    assert result["test"]["loss"] is None
    json.dumps(result, allow_nan=False)


def test_a_run_stuck_above_the_bound_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "STUCK_STEPS", 50)
    monkeypatch.setattr(divergence, "STUCK_FACTOR", 0.01)
    result = loop.train(dataclasses.replace(RUN, epochs=20), tmp_path)
    assert (result["status"], result["diverged_at"]) == ("diverged", 100)  # the first look after 50 steps
    assert result["reason"] == f"the loss stayed above {0.01 * math.log(10):.1f} for 50 steps"


def test_tuning_trials_never_read_the_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    losses_of = evaluation.losses_of
    monkeypatch.setattr(
        evaluation,
        "losses_of",
        lambda model, data, split, *rest, **named: seen.append(split) or losses_of(model, data, split, *rest, **named),
    )
    digits = datasets.load("digits", RUN.seed)
    assert loop.train(dataclasses.replace(RUN, test=False), tmp_path)["test"] is None
    assert seen
    assert all(torch.equal(split.labels, digits.validation.labels) for split in seen)


def test_the_published_reading_is_the_loss_of_sixteen_images() -> None:
    losses = torch.zeros(1000, dtype=torch.float64)
    losses[::16] = 16.0  # so a mini-batch's mean is the number of such images in it
    readings = [evaluation.published_reading(losses, seed) for seed in range(20)]
    assert all(float(r["last16"]).is_integer() for r in readings)  # type: ignore[arg-type]
    assert len({r["last16"] for r in readings}) > 1
    assert all(r["last16_low"] == 0.0 and r["last16_high"] in (2.0, 3.0) for r in readings)  # binomial(16, 0.063)


@pytest.mark.parametrize("held", [{}, HELD], ids=["free", "held"])
def test_steps_do_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch, held: dict[str, Any]) -> None:
    run = dataclasses.replace(RUN, estimator=FORWARD, optimizer=Optimizer("sgd", 0.5, decay=1e-3, momentum=0.5, **held))
    digits = datasets.load("digits", 0)
    begun = Training.begin(run, digits, torch.device("cpu"))
    begun.advance(1)

    def waits(*_: Any, **__: Any) -> None:
        pytest.fail("a step read a value from the device")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    begun.advance(5)
    monkeypatch.undo()
    assert begun.state.step == 5
    assert begun.state.losses[:5].isfinite().all()


def test_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loop.train(RUN, tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_a_damaged_checkpoint_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged"):
        loop.train(RUN, tmp_path)


def test_a_checkpoint_of_unknown_origin_executes_nothing(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"model": Trap()}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="damaged"):
        loop.train(RUN, tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_a_gpu_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no GPU for --device cuda:99"):
        loop.train(RUN, tmp_path, device="cuda:99")
    with pytest.raises(UserError, match="choose cpu, cuda"):
        loop.train(RUN, tmp_path, device="gpu")
    assert not list(tmp_path.iterdir())


def test_mnist_trains(tmp_path: Path, data_dir: Path) -> None:
    run = Run("mnist", "logistic", BACKPROP, Optimizer("sgd", 0.1), epochs=1)
    result = loop.train(run, tmp_path, data_dir=data_dir)
    assert result["steps"] == 782
    assert result["test"]["examples"] == 10_000
    assert 0.88 < result["test"]["accuracy"] < 0.93  # logistic regression after one epoch


def test_the_balanced_accuracy_is_the_mean_of_every_classs_share() -> None:
    right = torch.tensor([True, True, True, False, False, True])
    assert evaluation.balanced_accuracy(right, torch.tensor([0, 0, 0, 0, 2, 2])) == pytest.approx((0.75 + 0.5) / 2)
    assert math.isnan(evaluation.balanced_accuracy(torch.full((6,), math.nan), torch.zeros(6)))
