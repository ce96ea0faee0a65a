"""`forwardgrad quality` from the command line to the report, on the embedded digits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.support.command import run

import forwardgrad as fg
from forwardgrad.lab.report import document
from forwardgrad.lab.report.sections import quality as quality_section
from forwardgrad.lab.store.files import write_json
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.estimator_text import format_estimator, parse_estimators

ON_DIGITS = ("quality", "--data", "digits", "--model", "logistic", "--batch-size", 16, "--repeats", 20, "--tangents", "1,4")


def stored(out: Path) -> list[dict[str, Any]]:
    settings: list[dict[str, Any]] = json.loads((out / "quality.json").read_text())["settings"]
    return settings


def test_a_measurement_is_printed_stored_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mlp = ("quality", "--data", "digits", "--model", "mlp", "--repeats", 20, "--tangents", "4,1")
    specs = "backprop; forward(law=rademacher); forward(clip=0.05); forward(perturb=activity)"
    status, out, err = run(monkeypatch, capsys, *mlp, "--estimators", specs, "--out", tmp_path)
    assert status == 0
    assert "[7/7] forward(perturb=activity), K = 4" in err
    (setting,) = stored(tmp_path)
    assert (setting["model"], setting["parameters"], setting["repeats"], setting["warm_up"]) == ("mlp", 4810, 20, 0)
    found = {(e["label"], e["tangents"]): e["quality"] for e in setting["estimates"]}
    exact, rademacher, clipped = found["backprop", None], found["forward(law=rademacher)", 4], found["forward(clip=0.05)", 4]
    assert exact["total"]["bias"]["value"] == exact["total"]["variance"]["value"] == 0
    assert exact["total"]["cosine_of_mean"] == pytest.approx(1)
    assert rademacher["theory"] == 4809 / 4
    assert 0.5 * 4809 / 4 < rademacher["total"]["variance"]["value"] < 2 * 4809 / 4
    assert clipped["total"]["p"] < 1e-4 < 0.05 < rademacher["total"]["p"]
    assert [part["name"] for part in exact["tensors"]] == ["1.weight", "1.bias", "3.weight", "3.bias"]
    lines = out.splitlines()
    assert lines[0] == "MLP · digits · 4,810 parameters · batch 64 · at initialisation · 20 estimates each"
    assert [line.split()[0] for line in lines[2:-1]] == [re.split(r"[ ]", e["label"])[0] for e in setting["estimates"]]
    assert lines[-1] == f"report: {tmp_path / 'report.html'}"
    markdown = (tmp_path / "report.md").read_text()
    assert "a bias was found in forward(clip=0.05)." in markdown
    assert "![Estimates against the number of tangents K, MLP · digits" in markdown
    assert "`forwardgrad quality --data digits --model mlp" in markdown
    assert (tmp_path / "figures" / "quality.svg").read_text().count("<svg") == 1


def test_other_settings_are_kept_and_the_same_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, capsys, *ON_DIGITS, "--out", tmp_path)[0] == 0
    first = stored(tmp_path)
    assert run(monkeypatch, capsys, *ON_DIGITS, "--warm-up", 30, "--out", tmp_path)[0] == 0
    before, after = stored(tmp_path)
    assert before == first[0]
    assert after["warm_up"] == 30
    assert after["loss"] < before["loss"]  # thirty steps of training on other batches
    assert run(monkeypatch, capsys, *ON_DIGITS, "--out", tmp_path)[0] == 0
    warm, again = stored(tmp_path)
    assert warm == after
    assert [without_time(e) for e in again["estimates"]] == [without_time(e) for e in before["estimates"]]
    assert (tmp_path / "figures" / "quality-1.svg").exists()


def without_time(estimate: dict[str, Any]) -> dict[str, Any]:
    return {**estimate, "quality": {**estimate["quality"], "seconds": None}}


def test_an_estimator_with_a_memory_learns_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What has learned feedback knows the direction of g; what has not knows the read-out layer's part alone."""
    cosines = []
    for steps in (1, 200):
        mlp = ("quality", "--data", "digits", "--model", "mlp", "--repeats", 10, "--tangents", "1", "--estimators", "feedback")
        assert run(monkeypatch, capsys, *mlp, "--learn", steps, "--out", tmp_path / str(steps))[0] == 0
        (found,) = stored(tmp_path / str(steps))[0]["estimates"]
        cosines.append(found["quality"]["tensors"][0]["cosine"]["value"])
    assert cosines[0] < 0.9 < cosines[1]


def test_what_cannot_be_measured_is_said_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from forwardgrad.lab.bench import quality_of_estimates as quality

    def broken(loss: Any, at: Any, estimator: Any, **options: Any) -> fg.Quality:
        if isinstance(estimator, fg.Backprop):
            return fg.quality(loss, at, estimator, **options)
        raise RuntimeError("out of luck\nand of much else")

    monkeypatch.setattr(quality, "quality", broken)
    status, out, _ = run(monkeypatch, capsys, *ON_DIGITS, "--out", tmp_path)
    assert status == 0
    assert out.count("not measured: out of luck\n") == 2
    exact, *others = stored(tmp_path)[0]["estimates"]
    assert exact["failed"] is None
    assert [(e["tangents"], e["failed"], e["quality"]) for e in others] == [(1, "out of luck", None), (4, "out of luck", None)]


def estimate(label: str, k: int | None, cosine: float, variance: float, theory: float | None, p: float = 0.5) -> dict[str, Any]:
    def interval(value: float) -> dict[str, float]:
        return {"value": value, "low": 0.9 * value, "high": 1.1 * value}

    total = {"bias": interval(0.5), "p": p, "length": interval(1.0), "variance": interval(variance), "cosine": interval(cosine)}
    quality = {
        "total": {**total, "cosine_of_mean": cosine},
        "theory": theory,
        "forward_passes": 3,
        "seconds": 0.002,
        "peak_bytes": 12_000_000,
    }
    return {"label": label, "tangents": k, "estimator": {"name": label}, "failed": None, "quality": quality}


SETTING = {"model": "nn", "data": "mnist", "batch": 64, "warm_up": 500, "learn": 0, "seed": 0, "repeats": 100, "parameters": 1863690}


def test_the_section_says_what_was_found() -> None:
    failed = {"label": "odd", "tangents": 2, "estimator": {"name": "odd"}, "failed": "it is odd", "quality": None}
    estimates = [
        estimate("backprop", None, 1.0, 0.0, 0.0),
        estimate("forward", 4, 0.2, 20.0, 21.0),
        estimate("forward", 1, 0.1, 80.0, 81.0),
        estimate("bent", 1, 0.3, 5.0, None, p=1e-9),
        failed,
    ]
    section = quality_section.quality_section({"settings": [{**SETTING, "estimates": estimates}]})
    assert section.verdict == (
        "NN on MNIST: of 3 estimates beside the exact gradient the closest in angle is bent with K = 1, whose cosine with it is 0.300 and "
        "whose relative variance is 5.00; a bias was found in bent."
    )
    table = next(block for block in section.blocks if isinstance(block, quality_section.Table))
    ((title, rows),) = table.groups
    assert title == "NN · MNIST · 1,863,690 parameters · batch 64 · after 500 steps of Adam · 100 estimates each"
    assert all(len(row) == len(table.columns) == len(quality_section.HEADS) for row in rows)
    forward = dict(zip(table.columns, rows[1], strict=True))
    assert (forward["K"].text, forward["variance"].text, forward["variance"].sub) == ("4", "20.0", "theory 21.0")
    assert (forward["squared bias"].text, forward["squared bias"].sub) == ("0.500", "0.450 to 0.550")
    assert (forward["peak"].text, forward["time"].text, forward["forward passes"].text) == ("12.0 MB", "2.00 ms", "3")
    assert rows[-1][0].sub == "not measured: it is odd"
    assert "odd" in quality_section.quality_text({**SETTING, "estimates": estimates}).splitlines()[-1]
    drawn = quality_section._trends({**SETTING, "estimates": estimates}, lambda e: e["quality"]["total"]["variance"], theory=True)
    assert [(t.label, t.at, t.value, t.theory) for t in drawn] == [
        ("backprop", (), (0.0,), (0.0,)),
        ("forward", (1.0, 4.0), (80.0, 20.0), (81.0, 21.0)),
        ("bent", (1.0,), (5.0,), (None,)),
    ]


def test_a_report_of_a_measurement_alone_is_the_same_bytes_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    content = {"schema": 1, "environment": {}, "settings": [{**SETTING, "estimates": [estimate("backprop", None, 1.0, 0.0, 0.0)]}]}
    write_json(store.root / "quality.json", content)
    document.write(store)
    written = {path: path.read_bytes() for path in store.root.rglob("*") if path.is_file()}
    document.write(store)
    assert {path: path.read_bytes() for path in store.root.rglob("*") if path.is_file()} == written
    assert "no estimate beside the exact gradient was measured" in (store.root / "report.md").read_text()


def test_a_spec_is_read_and_written() -> None:
    configs = [{"name": "backprop"}, {"name": "forward", "tangents": 8, "law": "sphere", "clip": None, "exact_output": True, "rate": 1e-3}]
    text = "backprop; forward(tangents=8, law=sphere, clip=none, exact_output=true, rate=0.001)"
    assert parse_estimators(text) == configs
    assert "; ".join(map(format_estimator, configs)) == text
