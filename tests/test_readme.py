"""The README's example runs as printed, in twelve lines."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_example_runs_and_learns() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) == 12
    printed: list[str] = []
    exec(compile(example, "README.md", "exec"), {"print": printed.append})
    assert printed
    assert float(re.findall(r"loss ([\d.]+)", printed[-1])[0]) < 0.35 < 0.69  # 0.69 is guessing between two classes
