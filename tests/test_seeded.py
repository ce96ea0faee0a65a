"""The same seeds give the same bits as when the numbers beside this file were written: each estimator, each engine, three seeds.

Where code is moved and nothing is meant to change, this is what tells. On the processor and the torch that the numbers come from they are
compared to the bit, elsewhere to the rounding of another order of sums. `python -m tests.test_seeded` writes them again, which is for
changes that mean to change them alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.estimators.test_contract import METHODS, short
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.engines import compiled
from forwardgrad.engines.trace import Traced

KNOWN = Path(__file__).with_suffix(".json")
SEEDS = (0, 1, 2)
METHOD = {short(method): method for method in METHODS}
COMPILED = {
    short(method): method
    for method in (
        fg.Backprop(),
        fg.ForwardGradient(),
        fg.ForwardGradient(perturb=fg.LowRank()),
        fg.ForwardGradient(perturb=fg.Activity()),
        fg.LearnedFeedback(),
        fg.LocalLosses(),
        fg.ZerothOrder(),
    )
}
BATCHED = {short(method): method for method in (fg.Backprop(), fg.ForwardGradient(2), fg.ForwardGradient(perturb=fg.LowRank()))}


def machine() -> str:
    """What the last bits of a float hang on."""
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {names[0] if names else 'unknown'}"


def network(seed: int, dropout: float = 0.2) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        return nn.Sequential(*first, nn.Linear(36, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))


def batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(100 + seed)
    return [(torch.randn(8, 1, 6, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(4)]


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def said(tensors: Iterable[Tensor]) -> dict[str, Any]:
    """A digest of every bit, and the sums that are compared where the bits need not be the same."""
    kept = [tensor.detach().contiguous() for tensor in tensors]
    bits = hashlib.sha256(b"".join(tensor.flatten().view(torch.uint8).numpy().tobytes() for tensor in kept)).hexdigest()[:16]
    return {"bits": bits, "norms": [float(tensor.double().norm()) for tensor in kept]}


def stepped(method: fg.Estimator, engine: Any, seed: int) -> dict[str, Any]:
    """Four steps of SGD with momentum, which keeps `.grad`, and what they leave: losses, parameters, buffers."""
    # of a time when a compiled zeroth-order step could not have dropout: tests/engines/test_compiled_zeroth_order.py has it
    dropout = 0.0 if engine == "compile" and isinstance(method, fg.ZerothOrder) else 0.2
    # a difference of losses has rounding of u|f|/ε, which in float32 and for ε = 1e-4 differs between processors by as much as the bound
    dtype = torch.float64 if isinstance(method, fg.ZerothOrder) and method.epsilon < 1e-3 else torch.float32
    model, generator = network(seed, dropout).to(dtype), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + seed)  # for dropout
        step = fg.TrainingStep(loss, model, optimizer, method, generator=generator, engine=engine)
        losses = [step(x.to(dtype), y).loss for x, y in batches(seed)]
    return said([torch.stack(losses), *model.state_dict().values()])


def batched(method: fg.Estimator, seed: int) -> dict[str, Any]:
    """One estimate for three replicas as one program."""
    make = lambda number: nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3))  # noqa: E731
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models = [make(seed + number) for number in range(3)]
    x, y = batches(seed)[0]
    generators = [torch.Generator().manual_seed(seed + number) for number in range(3)]
    wide = (x.expand(3, -1, -1, -1, -1), y.expand(3, -1))
    record = fg.estimate_grads_(loss, fg.Ensemble(models), wide, method, generators=generators)
    return said([record.loss, *(p.grad for model in models for p in model.parameters() if p.grad is not None)])


def measured(name: str) -> dict[str, Any]:
    """What a case of the list comes to now."""
    engine, method, seed = name.split("|")
    if engine == "batched":
        return batched(BATCHED[method], int(seed))
    return stepped((METHOD if engine == "eager" else COMPILED)[method], engine, int(seed))


def names() -> list[str]:
    arms = [("eager", METHOD), ("compile", COMPILED), ("batched", BATCHED)]
    return [f"{engine}|{method}|{seed}" for engine, methods in arms for method in methods for seed in SEEDS]


def check(name: str) -> None:
    known = json.loads(KNOWN.read_text())
    now, then = measured(name), known["results"][name]
    if machine() == known["machine"] and then["bits"] is not None:  # None: first measured on another machine
        assert now["bits"] == then["bits"]
    assert now["norms"] == pytest.approx(then["norms"], rel=1e-3, abs=1e-6)


def test_every_case_is_known() -> None:
    assert list(json.loads(KNOWN.read_text())["results"]) == names()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name.endswith(f"|{SEEDS[0]}") else pytest.mark.full)
        for name in names()
        if not name.startswith("compile")
    ],
)
def test_the_same_seed_gives_the_same_bits_as_ever(name: str) -> None:
    check(name)


@pytest.fixture
def compiled_once() -> Iterator[None]:
    """One function of the compiler for all seeds of a method: the graph is the same, and what it is given differs."""
    compiler, functions = compiled.compiled, dict[Any, Any]()

    def once(traced: Traced, inputs: list[Tensor]) -> Any:
        assert not any(node.op == "get_attr" for node in traced.graph.graph.nodes)
        graph = traced.graph.code, traced.random, tuple((t.dtype, t.shape, t.stride()) for t in inputs)
        if graph not in functions:
            functions[graph] = compiler(traced, inputs)
        return functions[graph]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "compiled", once)
        yield
    assert len(functions) == 1


@pytest.mark.full
@pytest.mark.usefixtures("compiled_once")
@pytest.mark.parametrize("method", COMPILED)
def test_the_same_seed_gives_the_same_bits_as_ever_in_a_compiled_step(method: str) -> None:
    for seed in SEEDS:
        check(f"compile|{method}|{seed}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    KNOWN.write_text(json.dumps({"machine": machine(), "results": {name: measured(name) for name in names()}}, indent=1) + "\n")
