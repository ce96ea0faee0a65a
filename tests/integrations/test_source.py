from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import torch
from tests.support.loops import DRAWN, Rows, net, same

import forwardgrad as fg
from forwardgrad.integrations import GradientSource


def steps(source: GradientSource, model: torch.nn.Module, count: int) -> dict[str, torch.Tensor]:
    data = Rows()
    for _ in range(count):
        source.add_(lambda model: model(data.x, data.labels)["loss"], model)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_source_goes_on_from_its_state() -> None:
    whole = steps(GradientSource(DRAWN, seed=1), net(), 4)
    source, model = GradientSource(DRAWN, seed=1), net()
    steps(source, model, 2)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    other = GradientSource(DRAWN, seed=2)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same(steps(other, model, 2), whole)


def test_a_state_that_has_not_begun_can_be_kept() -> None:
    source = GradientSource(seed=1)
    source.load_state_dict(GradientSource(seed=2).state_dict())
    assert same(steps(source, net(), 1), steps(GradientSource(seed=1), net(), 1))


def test_a_state_from_a_gpu_is_kept_as_such_until_a_model_is_there() -> None:
    source = GradientSource(DRAWN)
    steps(source, net(), 1)
    saved = source.state_dict()
    saved["state"] = {name: (False, kept) for name, (_, kept) in saved["state"].items()}  # as it was saved there
    source.load_state_dict(saved)
    assert not any(at_home for at_home, _ in source.state_dict()["state"].values())
    steps(source, net(), 1)
    assert all(at_home for at_home, _ in source.state_dict()["state"].values())  # the model is on the processor


def test_a_generator_that_was_given_is_the_one_that_goes_on() -> None:
    generator = torch.Generator().manual_seed(1)
    source = GradientSource(generator=generator)
    steps(source, net(), 1)
    saved = source.state_dict()
    steps(source, net(), 1)
    source.load_state_dict(saved)
    assert source.generator is generator
    assert torch.equal(generator.get_state(), saved["generator"])


def test_directions_are_not_the_numbers_that_the_same_seed_gives_elsewhere() -> None:
    source, model = GradientSource(fg.ForwardGradient(), seed=0), torch.nn.Linear(20, 1, bias=False)
    source.add_(lambda model: model(torch.ones(1, 20)).sum(), model)
    direction = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    assert torch.cosine_similarity(model.weight.grad, direction).abs() < 0.9


def test_a_copy_goes_its_own_way() -> None:
    """As where a callback keeps a copy of a whole module."""
    source, model = GradientSource(DRAWN), net()
    steps(source, model, 1)
    model.zero_grad()
    other, twin = copy.deepcopy((source, model))
    assert same(steps(other, twin, 1), steps(source, model, 1))


def test_data_parallel_is_refused() -> None:
    with pytest.raises(ValueError, match="see one GPU"):
        GradientSource().add_(lambda model: model(torch.ones(1, 4)).sum(), torch.nn.DataParallel(torch.nn.Linear(4, 1)))


WITHOUT_AND_WITH = """
import sys

FRAMEWORKS = {"accelerate", "lightning", "peft", "transformers"}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FRAMEWORKS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())

import forwardgrad as fg
import forwardgrad.integrations as loops

for name in fg.__all__:
    getattr(fg, name)
loops.GradientSource()
names = {"ForwardTrainer": "hf", "ForwardAccelerator": "accelerate", "ForwardLightningModule": "lightning", "ForwardStrategy": "lightning"}
for name, extra in names.items():
    try:
        getattr(loops, name)
    except ImportError as error:
        said = str(error)
        assert "\\n" not in said and f"pip install 'forwardgrad[{extra}]'" in said and said.startswith(name), said
    else:
        sys.exit(f"{name} needs nothing")

sys.meta_path.pop(0)
assert not FRAMEWORKS & set(sys.modules)
loops.ForwardAccelerator
assert FRAMEWORKS & set(sys.modules) == {"accelerate"}
"""


def test_a_framework_is_imported_by_its_own_name_alone() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_AND_WITH], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
