from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = [
    pytest.mark.full,
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),  # there is no GPU
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # of transformers, for peft
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # of torch, for Lightning
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The `srun` command is available"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_adapters_learn_the_new_task(tmp_path: Path) -> None:
    assert example("hf_trainer").main(steps=50, folder=str(tmp_path)) > 0.9
    assert (tmp_path / "checkpoint-50" / "forwardgrad.pt").exists()


def test_the_module_learns(tmp_path: Path) -> None:
    assert example("lightning_module").main(epochs=2, count=3000, folder=str(tmp_path)) > 0.85
