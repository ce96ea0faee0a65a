"""`forwardgrad layers` from kept weights to the report, on the embedded digits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.command import run

from forwardgrad.lab.execution import Place, execute
from forwardgrad.lab.layers import LayersSetting, measure_layers
from forwardgrad.lab.layers.probes import fit_probe
from forwardgrad.lab.report.figures import Trend, by_layer
from forwardgrad.lab.report.sections import layers_section, layers_text
from forwardgrad.lab.store import Progress, Store, pack
from forwardgrad.lab.studies import Optimizer, Run
from forwardgrad.lab.training import builders

EXACT = Run("digits", "mlp", {"name": "backprop"}, Optimizer("adam", 1e-3), epochs=2)
LOCAL = dataclasses.replace(EXACT, estimator={"name": "local", "feedback": True})
SMALL = ("--examples", 200, "--batches", 2, "--learn", 20)


def trained(out: Path, *runs: Run, keep_weights: bool = True) -> Store:
    store = Store(out)
    execute(runs, store, Place(keep_weights=keep_weights), Progress(quiet=True))
    return store


def stored(out: Path) -> list[dict[str, Any]]:
    measurements: list[dict[str, Any]] = json.loads((out / "layers.json").read_text())["measurements"]
    return measurements


@pytest.mark.full
def test_two_arms_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, EXACT, LOCAL)
    status, out, err = run(monkeypatch, capsys, "layers", tmp_path, *SMALL, "--untrained")
    assert status == 0, err
    (measured,) = stored(tmp_path)
    assert measured["command"].startswith("forwardgrad layers")
    arms = {arm["label"]: arm for arm in measured["arms"]}
    assert list(arms) == ["backprop", "local(feedback=true)", "untrained"]
    assert [arm["memory"] for arm in arms.values()] == ["20 steps", "its own", "20 steps"]
    for arm in arms.values():
        assert [layer["name"] for layer in arm["layers"]] == ["", "1", "3"]
        assert arm["features"] == [64, 64, 10]
        assert (arm["examples"], arm["held_out"], arm["converged"], arm["failed"]) == (200, 360, True, None)
        assert arm["layers"][0]["cosine"] is None
        assert arm["layers"][2]["cosine"]["value"] == pytest.approx(1)  # the last layer learns from the loss itself
        assert [layer["cosine"]["n"] for layer in arm["layers"][1:]] == [2, 2]
        assert arm["layers"][0]["probe"] == arms["untrained"]["layers"][0]["probe"]  # the input is the same
    lines = out.splitlines()
    assert lines[0].startswith("MLP on digits · probes of up to 200 examples and 2,048 features")
    assert "for the arm local(feedback=true) it is the run's own" in out
    markdown = (tmp_path / "report.md").read_text()
    assert "## What each layer holds and learns from" in markdown
    assert (tmp_path / "figures" / "layers.svg").read_text().count("<svg") == 1
    assert run(monkeypatch, capsys, "layers", tmp_path, *SMALL, "--untrained")[0] == 0
    assert stored(tmp_path) == [measured]  # the same numbers, in place of the first


def test_a_probe_is_that_of_the_activations_of_the_kept_weights(tmp_path: Path) -> None:
    """Worked out by hand behind the first layer: its rectified output, on the examples of the seed."""
    from forwardgrad.lab.studies import stream
    from forwardgrad.lab.training import read_weights

    store = trained(tmp_path, EXACT)
    setting = LayersSetting({"name": "backprop"}, examples=300, batches=2, l2=0.01)
    found = measure_layers(store, [EXACT], setting, device="cpu", data_dir=None, say=lambda words: None)
    dataset = builders.dataset(EXACT, torch.device("cpu"))
    model = builders.initialised_model(EXACT, dataset, torch.device("cpu"))
    read_weights(store.folder(EXACT.identity), model)
    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(stream(0, "examples of probes")))[:300]
    with torch.no_grad():
        learned, held = (model[:3](dataset.for_model(images)) for images in (dataset.train.inputs[order], dataset.validation.inputs))  # type: ignore[index]
    probe = fit_probe(learned, dataset.train.labels[order], 10, 0.01)
    layer = found["arms"][0]["layers"][1]
    assert layer["probe"]["value"] == probe.right(held, dataset.validation.labels) / 360
    assert layer["probe"]["low"] < layer["probe"]["value"] < layer["probe"]["high"]
    assert layer["cosine"]["value"] == pytest.approx(1)


def test_seeds_of_one_arm_are_averaged_and_arms_of_one_estimator_told_apart(tmp_path: Path) -> None:
    seeds = [dataclasses.replace(EXACT, seed=seed) for seed in (0, 1)]
    faster = dataclasses.replace(EXACT, optimizer=Optimizer("adam", 0.01))
    store = trained(tmp_path, *seeds, faster)
    setting = LayersSetting({"name": "forward"}, examples=150, batches=2, untrained=True)
    found = measure_layers(store, [*seeds, faster], setting, device="cpu", data_dir=None, say=lambda words: None)
    assert [(arm["label"], len(arm["runs"])) for arm in found["arms"]] == [
        ("backprop · adam, lr 0.001", 2), ("backprop · adam, lr 0.01", 1), ("untrained", 2),
    ]  # fmt: skip
    several, single, _ = ([layer["probe"] for layer in arm["layers"]] for arm in found["arms"])
    assert {(one["n"], one["over"]) for one in several} == {(2, "seeds")}
    assert {(one["n"], one["over"]) for one in single} == {(360, "examples")}


def test_an_estimator_that_cannot_is_told_and_the_probes_stay(tmp_path: Path) -> None:
    store = trained(tmp_path, EXACT)
    setting = LayersSetting({"name": "tests.lab.layers.broken:Broken"}, examples=150, batches=2)
    found = measure_layers(store, [EXACT], setting, device="cpu", data_dir=None, say=lambda words: None)
    assert found["arms"][0]["failed"] == "it does not work here"
    assert all(layer["cosine"] is None and layer["probe"] for layer in found["arms"][0]["layers"])
    section = layers_section({"measurements": [found]})
    assert any("the angle was not measured: it does not work here." in str(block) for block in section.blocks)


def test_runs_without_weights_are_trained_again_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = trained(tmp_path / "kept", EXACT)
    assert run(monkeypatch, capsys, "layers", tmp_path / "kept", *SMALL)[0] == 0
    bare = trained(tmp_path / "bare", EXACT, keep_weights=False)
    pack(bare)
    status, _, err = run(monkeypatch, capsys, "layers", tmp_path / "bare", EXACT.identity[:5], *SMALL)
    assert (status, "add --train to train it again" in err) == (2, True)
    status, _, err = run(monkeypatch, capsys, "layers", tmp_path / "bare", EXACT.identity[:5], "--train", *SMALL)
    assert status == 0
    assert "came to another validation loss" not in err
    assert stored(tmp_path / "bare")[0]["arms"] == stored(tmp_path / "kept")[0]["arms"]
    assert bare.result(EXACT.identity)["seconds"] != kept.result(EXACT.identity)["seconds"]  # type: ignore[index]  # results stay


def test_where_a_memory_came_from_is_told() -> None:
    """Of the four cases: no memory, all learned here, all brought along, and both."""
    arm = {"data": "digits", "model": "mlp", "layers": [], "features": [], "failed": None, "converged": True, "runs": ["a"], "kind": "own"}
    shared = {"spec": "local", "examples": 1, "most": 1, "l2": 1.0, "batches": 2, "batch": 4, "learn": 20}

    def told(*memories: str) -> str:
        return layers_text({**shared, "arms": [{**arm, "label": f"arm {i}", "memory": memory} for i, memory in enumerate(memories)]})

    assert "memory" not in told("none")
    assert "learned in 20 steps on other batches, the weights held still." in told("20 steps", "20 steps")
    assert "The memory of local is what it learned while the run was trained." in told("its own")
    assert "the weights held still; for the arm arm 1 it is the run's own." in told("20 steps", "its own")


MISTAKES = (
    ((), "kept its weights: train with --keep-weights"),
    (("zzz",), "is called 'zzz'"),
    ((EXACT.identity, "--l2", "0"), "--l2 must be a positive number"),
    ((EXACT.identity, "--train", "--batches", "16"), "take fewer or smaller ones with --batches and --batch-size"),
    ((EXACT.identity, "--estimator", "evolution"), "unknown estimator 'evolution'"),
    ((dataclasses.replace(EXACT, test=False).identity, "--train"), "trials keep no weights"),
)


def test_mistakes_end_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, EXACT, dataclasses.replace(EXACT, test=False), keep_weights=False)
    for words, sentence in MISTAKES:
        status, _, err = run(monkeypatch, capsys, "layers", tmp_path, *words)
        assert status == 2, err
        assert sentence in err
        assert not (tmp_path / "layers.json").exists()


def test_the_figure_holds_both_panels_and_the_same_bytes() -> None:
    probe = Trend("backprop", (0.0, 1.0, 2.0), (0.8, 0.9, 0.95), (0.7, 0.85, 0.9), (0.85, 0.93, 0.97), kind="backprop")
    angle = Trend("local(feedback=true)", (1.0, 2.0), (-0.2, 1.0), (-0.3, 1.0), (-0.1, 1.0), kind="local")
    first, second = (by_layer("layers", [("probe accuracy", [probe]), ("cosine", [probe, angle])]) for _ in range(2))
    assert first.svg == second.svg
    assert [panel["title"] for panel in first.panels] == ["probe accuracy", "cosine"]
    assert [line["name"] for line in first.panels[1]["lines"]] == ["backprop", "local(feedback=true)"]
    assert first.panels[0]["lines"][0]["x"] == [0, 1, 2]
