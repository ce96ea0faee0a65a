"""The README's examples run as printed: the first in twelve lines, the others after it."""

import re
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def test_the_examples_run_and_learn() -> None:
    first, second, third = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in first.splitlines() if line.strip()]) == 12
    printed: list[str] = []
    names: dict[str, Any] = {"print": printed.append}
    exec(compile(first, "README.md", "exec"), names)
    assert printed
    assert float(re.findall(r"loss ([\d.]+)", printed[-1])[0]) < 0.35 < 0.69  # 0.69 is guessing between two classes
    before = [p.grad.clone() for p in names["model"].parameters()]
    exec(compile(second, "README.md", "exec"), names)
    assert any(p.grad.ne(b).any() for p, b in zip(names["model"].parameters(), before, strict=True))
    assert names["state"]
    moved = [p.detach().clone() for p in names["model"].parameters()]
    exec(compile(third, "README.md", "exec"), names)
    assert names["record"].forward_passes == 2
    assert all(p.grad is None for p in names["model"].parameters())
    assert any(not torch.equal(p, before) for p, before in zip(names["model"].parameters(), moved, strict=True))
