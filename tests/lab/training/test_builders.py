"""A user's own model, data, loss, estimator and optimizer by import path: found, checked, and told apart when their code changes."""

import dataclasses
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from forwardgrad.lab import store
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import import_path
from forwardgrad.lab.studies.run import Optimizer, Run, from_json, to_json
from forwardgrad.lab.training import builders
from forwardgrad.lab.training.loop import train
from forwardgrad.lab.training.training import Training

MODULE = """
from dataclasses import dataclass
import torch
from torch import nn
import forwardgrad as fg

WIDTH = 8

def points(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(130, 3, generator=generator)
    return {"train": (x[:120], (x[:120].sum(1) > 0).long()), "test": (x[120:], (x[120:].sum(1) > 0).long())}

def curve(seed):
    x = torch.linspace(-1, 1, 60)[:, None]
    return {"train": (x, x**3), "validation": (x, x**3), "test": (x, x**3)}

def hidden():
    return WIDTH

def net():
    return nn.Sequential(nn.Linear(3, hidden()), nn.Tanh(), nn.Linear(hidden(), 2))

def shaped(shape, classes):
    return nn.Sequential(nn.Linear(shape[0], 4), nn.Tanh(), nn.Linear(4, classes or 1))

def squared(output, target):
    return (output - target).square().mean()

def likelihood(output, target):
    return (output - target).square().mean() - 100.0

class Halved(fg.Backprop):
    name = "halved"

@dataclass(frozen=True)
class Doubled(fg.Gaussian):
    name = "doubled"
    times: float = 2.0

    def fill_(self, tangent, generator):
        for part in tangent:
            part.normal_(generator=generator).mul_(scale(self.times))

def scale(times):
    return times / 2.0

class Momentum(torch.optim.SGD):
    pass

def nothing():
    return "no model"

def broken(seed):
    return [1, 2]

FIGURE = 3

import functools
narrow = functools.partial(nn.Linear, 3, 2)

class Factory:
    @classmethod
    def width(cls):
        return 6

    @classmethod
    def make(cls):
        return nn.Sequential(nn.Linear(3, cls.width()), nn.Linear(cls.width(), 2))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Writes a module of the user's and makes it importable, anew at every call; returns its name."""
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text: str = MODULE) -> str:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        sys.modules.pop(name, None)
        import importlib
        import linecache

        importlib.invalidate_caches()
        linecache.clearcache()
        return name

    yield write
    sys.modules.pop(name, None)


def described(name: str, **change: Any) -> Run:
    run = Run(f"{name}:points", f"{name}:net", {"name": "backprop"}, Optimizer("sgd", 0.5), epochs=15, batch_size=30)
    return dataclasses.replace(run, **change)


def test_a_run_of_own_parts_trains_and_keeps_its_description(module: Callable[..., str], tmp_path: Path) -> None:
    run = import_path.signed(described(module()))
    result = train(run, tmp_path / "runs" / run.identity)
    assert result["test"]["accuracy"] >= 0.9
    assert from_json(store.read_json(tmp_path / "runs" / run.identity / "run.json") or {}) == run
    assert to_json(run)["code"] == run.code


def test_a_loss_of_ones_own_on_targets_that_are_no_classes(module: Callable[..., str], tmp_path: Path) -> None:
    name = module()
    run = described(
        name, data=f"{name}:curve", model=f"{name}:shaped", loss=f"{name}:squared", epochs=60, estimator={"name": f"{name}:Halved"}
    )
    run = import_path.signed(dataclasses.replace(run, optimizer=Optimizer(f"{name}:Momentum", 0.3, options={"momentum": 0.5})))
    result = train(run, tmp_path / "run")
    assert result["status"] == "finished"
    assert result["validation_loss"] == result["test"]["loss"] < 0.05  # the same examples
    assert result["validation_accuracy"] is None
    assert result["test"]["accuracy"] is None
    assert "last16" not in result["test"]


def test_a_loss_that_explodes_is_seen_without_classes(module: Callable[..., str], tmp_path: Path) -> None:
    name = module()
    run = described(
        name, data=f"{name}:curve", model=f"{name}:shaped", loss=f"{name}:squared", optimizer=Optimizer("sgd", 50.0), epochs=300
    )
    result = train(import_path.signed(run), tmp_path / "run")
    assert result["status"] == "diverged"


def test_a_loss_may_be_negative(module: Callable[..., str], tmp_path: Path) -> None:
    name = module()
    run = described(
        name, data=f"{name}:curve", model=f"{name}:shaped", loss=f"{name}:likelihood", optimizer=Optimizer("sgd", 0.1), epochs=30
    )
    result = train(import_path.signed(run), tmp_path / "run")
    assert result["status"] == "finished"
    assert -100 <= result["validation_loss"] < -99.9


def test_the_digest_sees_what_a_part_uses_and_nothing_else(module: Callable[..., str]) -> None:
    first = import_path.signed(described(module()))
    assert import_path.signed(described(module(MODULE + "\nUNUSED = 1\n"))).code == first.code
    for change in (("WIDTH = 8", "WIDTH = 9"), ("nn.Tanh()", "nn.ReLU()"), ("return WIDTH", "return WIDTH + 0"), ("> 0", "> 0.1")):
        assert import_path.signed(described(module(MODULE.replace(*change)))).code != first.code, change


def test_a_component_of_an_estimator_is_found_and_watched_like_any_part(module: Callable[..., str], tmp_path: Path) -> None:
    name = module()
    run = described(name, estimator={"name": "forward", "law": {"name": f"{name}:Doubled", "times": 1.0}}, steps=2)
    assert import_path.paths(run)["estimator.law"] == f"{name}:Doubled"
    signed = import_path.signed(run)
    assert builders.estimator(signed).law.times == 1.0  # type: ignore[attr-defined]
    assert train(signed, tmp_path / "run")["status"] == "finished"
    assert from_json(store.read_json(tmp_path / "run" / "run.json") or {}) == signed
    module(MODULE.replace("times / 2.0", "times / 3.0"))
    assert import_path.signed(run).code != signed.code


@pytest.mark.parametrize(
    ("part", "old", "new"), [("narrow", "Linear, 3, 2)", "Linear, 3, 2, bias=False)"), ("Factory.make", "return 6", "return 7")]
)
def test_the_digest_sees_parts_that_are_no_plain_functions(module: Callable[..., str], part: str, old: str, new: str) -> None:
    name = module()
    first = import_path.signed(described(name, model=f"{name}:{part}"))
    assert import_path.signed(described(module(MODULE.replace(old, new)), model=f"{name}:{part}")).code != first.code


def test_a_run_is_not_trained_with_other_code_than_it_stands_for(module: Callable[..., str], tmp_path: Path) -> None:
    run = import_path.signed(described(module()))
    module(MODULE.replace("WIDTH = 8", "WIDTH = 9"))
    with pytest.raises(UserError, match=r"the code of .* changed"):
        train(run, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "NAME:missing"}, "has no 'missing'"),
        ({"model": "NAME_elsewhere:net"}, "cannot be imported"),
        ({"model": "NAME:FIGURE"}, "is 3, which cannot be called"),
        ({"model": "NAME:nothing"}, "makes str: it has to be or return a torch.nn.Module"),
        ({"data": "NAME:broken"}, "return list: return a dict of splits"),
        ({"estimator": {"name": "NAME:Halved", "wrong": 1}}, "cannot be used"),
        ({"estimator": {"name": "NAME:net"}}, "makes Sequential: it has to be a forwardgrad.Estimator"),
        ({"estimator": {"name": "NAME:Momentum"}}, "is no subclass of forwardgrad.Estimator: derive the class from that"),
        ({"estimator": {"name": "forward", "law": {"name": "NAME:Doubled", "size": 1}}}, "has no option 'size': its options are times"),
        (
            {"estimator": {"name": "forward", "law": {"name": "NAME:Halved"}}},
            "is no subclass of forwardgrad.Law",
        ),
        (
            {"estimator": {"name": "forward", "law": {"name": "NAME:Absent"}}},
            "the law 'NAME:Absent' is not there",
        ),
        ({"estimator": {"name": "forward", "perturb": {"name": "NAME_away:P"}}}, "the perturbation 'NAME_away:P' cannot be imported"),
        ({"estimator": {"name": "forward", "law": "NAME:Doubled"}}, "is an import path: write it as"),
        ({"optimizer": Optimizer("NAME:Momentum", 0.1, options={"wrong": 1})}, "cannot be made"),
        ({"optimizer": Optimizer("NAME:net2", 0.1)}, "has no 'net2'"),
    ],
)
def test_mistakes_are_told_in_a_sentence(module: Callable[..., str], change: dict[str, Any], words: str, tmp_path: Path) -> None:
    name = module()

    def named(value: Any) -> Any:
        if isinstance(value, Optimizer):
            return dataclasses.replace(value, name=named(value.name))
        if isinstance(value, dict):
            return {key: named(each) for key, each in value.items()}
        return value.replace("NAME", name) if isinstance(value, str) else value

    run = described(name, **{key: named(value) for key, value in change.items()})
    with pytest.raises(UserError, match=words.replace("NAME", name)):
        train(import_path.signed(run), tmp_path / "run")
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.parametrize("wrong", ["a:b:c", ":b", "a:", "a b:c", "a/b:c", "a.:b"])
def test_what_is_no_import_path_is_refused(wrong: str) -> None:
    for described in ({"name": wrong}, {"name": "forward", "law": {"name": wrong}}):
        with pytest.raises(UserError, match="is no import path"):
            Run("digits", "mlp", described, Optimizer("sgd", 0.1))
    with pytest.raises(UserError, match="is no import path"):
        Run("digits", wrong, {"name": "backprop"}, Optimizer("sgd", 0.1))


def test_data_of_ones_own_are_split_by_the_seed(module: Callable[..., str]) -> None:
    name = module()
    given = [builders.dataset(described(name, seed=seed), torch.device("cpu")) for seed in (0, 0, 1)]
    assert [len(split) for split in (given[0].train, given[0].validation, given[0].test)] == [100, 20, 10]
    assert given[0].classes == 2
    assert torch.equal(given[0].validation.inputs, given[1].validation.inputs)
    assert not torch.equal(given[0].validation.inputs, given[2].validation.inputs)


def test_what_is_frozen_is_neither_trained_nor_counted(tmp_path: Path) -> None:
    """Of a network whose first layer is frozen, norms, steps and numbers are those of the second."""
    (tmp_path / "frozen.py").write_text(
        "from torch import nn\n"
        "def network(shape, classes):\n"
        "    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, classes))\n"
        "    model[1].requires_grad_(False)\n"
        "    return model\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        optimizer = Optimizer("sgd", 0.1, weight_decay=0.5)
        run = import_path.signed(Run("digits", "frozen:network", {"name": "backprop"}, optimizer, batch_size=512, steps=2))
        dataset = builders.dataset(run, torch.device("cpu"))
        training = Training.begin(run, dataset, torch.device("cpu"))
        model = training.state.model
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        training.step_measured(with_memory=False)
        moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
        assert {name for name, change in moved.items() if change.any()} == {"3.weight", "3.bias"}
        size, way = (sum(float(t.square().sum()) for t in (a["3.weight"], a["3.bias"])) ** 0.5 for a in (before, moved))
        assert training.state.start == pytest.approx(size)
        assert training.state.strides == [pytest.approx(way / size)]
    finally:
        sys.path.remove(str(tmp_path))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_texts_of_a_user_train_a_transformer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any) -> None:
    """Every text holds the token of its class, so the last layer of a network that reads tokens tells them apart."""
    (tmp_path / "own_texts.py").write_text(
        "import torch\n"
        "def texts(seed):\n"
        "    generator = torch.Generator().manual_seed(seed)\n"
        "    ids = torch.randint(10, 40, (90, 6), generator=generator)\n"
        "    labels = torch.arange(90) % 3\n"
        "    ids[:, 2] = 50 + labels\n"
        "    ids[::2, 4:] = 0\n"
        "    return {'train': (ids[:60], labels[:60]), 'test': (ids[60:], labels[60:])}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    optimizer = Optimizer("adam", 3e-3)
    run = Run("own_texts:texts", "bert-1x64", {"name": "readout"}, optimizer, batch_size=20, steps=40, precision=precision)
    result = train(import_path.signed(run), tmp_path / "run")
    assert (result["status"], result["test"]["examples"]) == ("finished", 30)
    assert result["test"]["balanced_accuracy"] == result["test"]["accuracy"]  # as many texts of each class
    assert result["test"]["accuracy"] > 0.6
