"""The README is short, its example runs as printed in twelve lines and learns, and its links and numbers lead somewhere."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_read_in_a_minute() -> None:
    assert len(README.encode()) <= 6_144
    assert len(README.splitlines()) <= 110


def test_the_example_runs_and_learns() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) == 12
    printed: list[str] = []
    names: dict[str, Any] = {"print": printed.append}
    exec(compile(example, "README.md", "exec"), names)
    assert printed
    assert float(re.findall(r"loss ([\d.]+)", printed[-1])[0]) < 0.35 < 0.69  # 0.69 is guessing between two classes
    assert all(p.grad is not None for p in names["model"].parameters())
    assert example in (ROOT / "docs" / "start.md").read_text(encoding="utf-8")


def test_links_lead_to_files() -> None:
    links = re.findall(r'\]\(([^)#]+)[)#]|(?:src|srcset)="([^"]+)"', README)
    assert len(links) > 15
    for link in (one or other for one, other in links):
        assert (ROOT / link).is_file(), link


def test_the_numbers_of_the_findings_stand_in_the_results() -> None:
    findings = README[README.index("## Five findings") : README.index("## Read on")]
    results = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    numbers = set(re.findall(r"\d+\.\d+", findings))
    assert len(numbers) > 10
    rounded = {"56.4"}  # 56.37 % there
    assert {number for number in numbers - rounded if number not in results} == set()
