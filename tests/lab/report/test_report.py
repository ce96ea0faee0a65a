import dataclasses
import html.parser
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.stored import ENVIRONMENT, put, record, reported, row, seeds, tried, undrawn

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.recipes import paper
from forwardgrad.lab.report import document, figures
from forwardgrad.lab.store.files import write_json
from forwardgrad.lab.store.schema import read_study
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.run import SCHEMA


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store; reports of it have figures without drawing."""
    monkeypatch.setattr(figures, "curves", undrawn)
    return Store(tmp_path / "out")


@pytest.fixture
def table1(store: Store) -> Store:
    """Row 1 (forward) and 2 (backprop), 1 of 50 epochs, three seeds each."""
    study = paper.table1(rows=["1", "2"], epochs=1, seeds=3)
    record(store, study)
    for arm, losses in zip(study.arms, ([0.4, 0.5, 0.6], [0.1, 0.1, 0.1]), strict=True):
        for run, loss in zip(seeds(arm, 3), losses, strict=True):
            put(store, run, loss)
    return store


NN_SGD = "NN · MNIST · SGD"


def test_means_and_intervals_are_those_computed_by_hand(table1: Store) -> None:
    forward = row(reported(table1), "Results", NN_SGD, "forward gradient")
    assert forward["test loss"] == "0.500 (0.252 to 0.748, n = 3)"  # 0.5 ± 4.30265·0.1/√3
    assert forward["test accuracy"] == "90.00 % (90.00 to 90.00 %, n = 3)"
    assert forward["published 'test loss'"] == "0.332 (after 50 epochs)"
    assert forward["ours, last 16"] == "0.400 (0.200 to 0.800)"
    assert forward["hyperparameters"] == "lr 0.000464 · decay 1e-5 · clip ±1"
    assert forward["#"] == "1"
    backprop = row(reported(table1), "Results", NN_SGD, "backpropagation")
    assert backprop["test loss"] == "0.100 (0.100 to 0.100, n = 3)"


def test_shortened_runs_are_marked_in_table_and_figure(table1: Store) -> None:
    text = reported(table1)
    assert row(text, "Results", NN_SGD, "forward gradient")["epochs"] == "1 (shortened: 1 of 50 epochs)"
    assert "Every arm trained for fewer epochs than the paper's (shortened: 1 of 50 epochs)" in text
    assert re.search(r"!\[Figure [12]\. Training loss .*Shortened: 1 of 50 epochs\.\]", text)


def test_the_verdict_is_counted_from_the_results(table1: Store) -> None:
    text = reported(table1)
    sizes = "0.100 with backpropagation, 0.500 with the forward gradient"
    assert f"Backpropagation reached the lower test loss in 1 of 1 comparison: {sizes}." in text
    assert "the 95 % interval of the paired difference excludes zero in 1 of 1." in text
    for arm in paper.table1(rows=["1"], epochs=1).arms:
        for run in seeds(arm, 3):
            put(table1, run, 0.01)
    assert "The forward gradient reached the lower test loss in 1 of 1 comparison: 0.100 with" in reported(table1)


def test_what_is_not_comparable_is_not_compared(table1: Store) -> None:
    longer = paper.table1(rows=["1"], epochs=2, seeds=3)
    path = table1.root / "studies" / "table1.json"
    (backprop,) = [arm for arm in read_study(path)["arms"] if arm["kind"] == "backprop"]
    record(table1, longer)
    write_json(path, {**read_study(path), "arms": [*read_study(path)["arms"], backprop]})
    for run in seeds(longer.arms[0], 3):
        put(table1, run, 0.2)
    text = reported(table1)
    assert f"Not comparable, and left out of the count: {NN_SGD} (different epochs)." in text
    assert "No fair comparison is finished yet." in text


def test_targets_are_timed_and_misses_said(table1: Store) -> None:
    speed = row(reported(table1), "Speed on MNIST", NN_SGD, "forward gradient")
    assert speed["time per step"] == "2.00 ms (2.00 to 2.00 ms, n = 3)"
    assert speed["to loss 1.0"] == "100 steps (200 ms)"  # seed 0: 0.4 + 1.9/4 = 0.875, seed 1: 0.95, seed 2: 1.025
    assert speed["to loss 0.5"] == "not reached (except in 1 of 3 runs)"
    assert speed["to loss 0.1"] == "not reached"


def test_one_seed_has_no_interval(store: Store) -> None:
    study = paper.table1(rows=["1", "2"], seeds=1)
    record(store, study)
    for arm, loss in zip(study.arms, (0.3, 0.2), strict=True):
        put(store, arm.run, loss)
    text = reported(store)
    assert row(text, "Results", NN_SGD, "forward gradient")["test loss"] == "0.300 (n = 1, no interval)"
    assert "one seed, which decides nothing about spread" in text
    assert "shortened: " not in text
    assert "Of 2 arms trained as long as the paper's, 1 has the published reading within" in text


def test_divergence_says_where_and_why(store: Store) -> None:
    study = paper.table1(rows=["cifar-cnn-sgd"], seeds=1)
    record(store, study)
    put(store, study.arms[0].run, None, steps=120, diverged="the loss is not finite")
    put(store, study.arms[1].run, 1.2)
    text = reported(store)
    forward = row(text, "Results", "CNN · CIFAR-10 · SGD", "forward gradient")
    assert forward["outcome"] == "diverged at step 120 (the loss is not finite)"
    assert forward["test loss"] == "not finite in 1 of 1 run"
    assert "Diverged: 1 of 1 run of the forward gradient." in text
    assert "Backpropagation reached the lower test loss in 1 of 1 comparison: 1.20 with" in text
    assert not re.search(r"\b(nan|inf|None)\b", text, flags=re.IGNORECASE)


def test_unfinished_arms_are_shown_and_left_out_of_the_verdict(table1: Store) -> None:
    study = paper.table1(rows=["1", "2", "3"], epochs=1, seeds=3)
    record(table1, study)
    (table1.folder(dataclasses.replace(study.arms[1].run, seed=2).identity) / "result.json").unlink()
    text = reported(table1)
    assert row(text, "Results", NN_SGD, "backpropagation")["outcome"] == "unfinished (2 of 3 runs)"
    assert row(text, "Results", "NN · MNIST · Nesterov", "forward gradient")["outcome"] == "unfinished (0 of 3 runs)"
    assert "No fair comparison is finished yet." in text
    assert "2 of 3 arms are unfinished" in text


def test_the_winner_on_an_edge_is_flagged(store: Store) -> None:
    study = paper.demo(epochs=1, seeds=2)
    record(store, study, edge=("lr",))
    for arm in study.arms:
        for _, run in tried(study, arm)[:4]:
            put(store, run, 0.3, diverged="the loss is not finite" if run.optimizer.lr > 1e-2 else None)
        for run in seeds(arm, 2):
            put(store, run, 0.3)
    text = reported(store)
    forward = row(text, "Tuning", "MLP · digits · SGD", "forward gradient")
    assert forward["winner's place"] == "on the edge of its grid: lr"
    assert forward["grid points"] == "5 (1 epoch each, 1 diverged, 1 unfinished)"
    assert forward["chosen"] == "lr 0.001"
    assert "and 1 was level" in text
    assert (store.root / "figures" / "demo-training.svg").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Every part of a report, with runs that diverged, are unfinished or absent."""
    store = Store(tmp_path_factory.mktemp("whole"))
    retuned = paper.table1(rows=["1", "2"], epochs=2, retune=True)
    for study in (paper.table1(epochs=2, seeds=2), retuned, paper.baydin(epochs=2), paper.demo(2)):
        record(store, study, edge=("lr",))
        for number, arm in enumerate(study.arms):
            if study.name == "table1" and number in (9, 10, 11):
                continue
            for run in seeds(arm, study.seeds):
                put(store, run, 0.5 if arm.kind == "forward" else 0.05, diverged="the loss is not finite" if number == 12 else None)
    arms = [
        {"name": name, "kind": kind, "n": 9, "seconds": 0.001 * r, "low": 0.0009 * r, "high": 0.0011 * r,
         "ratio": r, "ratio_low": 0.95 * r, "ratio_high": 1.05 * r}
        for name, kind, r in (("plain forward", "plain", 1.0), ("backpropagation", "backprop", 3.0), ("forward gradient", "forward", 2.25))
    ]  # fmt: skip
    network = {"model": "nn", "data": "mnist", "batch": 64, "parameters": 1863690, "arms": arms}
    write_json(store.root / "cost.json", {"environment": {**ENVIRONMENT, "commit": None}, "networks": [network]})
    axis = [i / 10 - 2 for i in range(41)]
    beale = [[(1.5 - x + x * y) ** 2 + (2.25 - x + x * y * y) ** 2 for x in axis] for y in axis]
    descents = [
        {"kind": kind, "lr": 0.01, "tuned": tuned, "path": [[0.1 * i, 0.01 * i] for i in range(20)] + [[None, None]], "values": [1.0],
         "diverged": tuned and kind == "forward", "final_median": None if tuned else 0.5, "seeds": 5}
        for tuned in (False, True) for kind in ("forward", "backprop")
    ]  # fmt: skip
    function = {"name": "Beale", "minimum": [3, 0.5], "bounds": [[-2, 2], [-2, 2]], "start": [0, 0], "arms": descents}
    stored = {"environment": ENVIRONMENT, "functions": [{**function, "grid": {"x": axis, "y": axis, "z": beale}}]}
    write_json(store.root / "functions.json", stored)
    document.write(store)
    return store


class Links(html.parser.HTMLParser):
    """Collects what a browser would fetch, and every id."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        assert tag not in ("link", "iframe", "object"), f"the page holds a <{tag}>"


def test_the_page_is_whole_in_itself(whole: Store) -> None:
    text = (whole.root / "report.html").read_text()
    links = Links()
    links.feed(text)
    assert all(target.startswith("#") for target in links.targets)
    assert {target[1:] for target in links.targets} <= set(links.ids)
    assert len(links.ids) == len(set(links.ids))
    assert not re.search(r"@import|url\((?!#)", text)
    assert "prefers-color-scheme: dark" in text
    names = {path.name for path in (whole.root / "figures").glob("*.svg")}
    assert not list((whole.root / "figures").glob("*.pdf"))  # they were not asked for
    assert set(re.findall(r"\]\(figures/(.*?)\)", (whole.root / "report.md").read_text())) == names
    expected = ("table1-figure-1", "table1-figure-2", "baydin-nn", "function-beale", "cost-of-a-step", "demo-training", "demo-validation")
    assert {f"{name}.svg" for name in expected} <= names


def test_a_report_is_made_again_to_the_same_bytes(table1: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # with its figures
    document.write(table1)
    written = {path: path.read_bytes() for path in table1.root.rglob("*") if path.is_file()}
    document.write(table1)
    assert {path: path.read_bytes() for path in table1.root.rglob("*") if path.is_file()} == written


def test_every_part_has_its_computed_words(whole: Store) -> None:
    text = (whole.root / "report.md").read_text()
    assert "At one learning rate: backpropagation reached the lower test loss in 2 of 2 comparisons: " in text
    assert "Each arm tuned: backpropagation reached the lower test loss in 2 of 2 comparisons: " in text
    assert "NN on MNIST: at one learning rate (0.0002) the validation loss ends at 0.500 with the forward gradient and 0.0500" in text
    assert "In steps of backpropagation, a step costs 0.750 (the forward gradient) on NN · MNIST, batch 64." in text
    where = "NN · MNIST · batch 64 · 1,863,690 parameters · contiguous · 9 rounds"
    cost = row(text, "The time of a step, as measured earlier", where, "forward gradient")
    assert (cost["/ plain"], cost["/ backprop"]) == ("2.25 (2.14 to 2.36)", "0.750")
    assert row(text, "Descents", "Beale", "each arm tuned")["value at the end"] == "not finite (median of 5 seeds, the path shown diverged)"
    source = row(text, "Where every number comes from", "Table I, hyperparameters as published", f"forward gradient ({NN_SGD})")
    assert source["command"] == "`forwardgrad reproduce table1`"
    assert source["hardware"] == "A Processor, 2 of 8 cores, Linux x86_64"
    assert source["software"] == "forwardgrad 0.1.0, commit abc123def456, torch 2.11.0, Python 3.11.9"
    first = paper.table1(rows=["1"], epochs=2).arms[0].run
    assert first.identity in source["runs"]
    assert "commit unknown" in text


def test_stored_text_is_escaped(table1: Store) -> None:
    path = table1.root / "studies" / "table1.json"
    write_json(path, json.loads(path.read_text().replace('"forwardgrad reproduce table1"', '"<script>|`"')))
    text = reported(table1)
    assert "<script>|" not in (table1.root / "report.html").read_text()
    assert "| `<script>\\|'` |" in text


def test_nothing_to_report_is_one_sentence(store: Store) -> None:
    with pytest.raises(UserError, match=r"nothing to report in .*: no command has left anything there"):
        document.write(store)


@pytest.mark.parametrize(("count", "words"), [(1, "its one run belongs to no study"), (3, "its 3 runs belong to no study")])
def test_runs_outside_studies_are_listed_and_not_reported(tmp_path: Path, count: int, words: str) -> None:
    lone = Store(tmp_path / "a folder's name")
    for run in seeds(paper.TABLE1[0], count):
        put(lone, run, 0.5)
    with pytest.raises(UserError) as told:
        document.write(lone)
    assert words in str(told.value)
    (command,) = re.findall(r"`(.*?)`", str(told.value))
    assert shlex.split(command) == ["forwardgrad", "list", str(lone.root)]


@pytest.mark.parametrize("name", ["cost.json", "bench.json", "functions.json"])
def test_a_measurement_with_parts_missing_is_one_sentence(store: Store, name: str) -> None:
    write_json(store.root / name, {"environment": ENVIRONMENT})
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        document.write(store)


def test_a_study_with_parts_missing_is_one_sentence(table1: Store) -> None:
    write_json(table1.root / "studies" / "table1.json", {"schema": SCHEMA, "name": "table1", "title": "Table I", "arms": [{"name": "x"}]})
    with pytest.raises(UserError, match=r"table1\.json .*damaged"):
        document.write(table1)
    write_json(table1.root / "studies" / "table1.json", {"schema": SCHEMA + 1, "name": "table1"})
    with pytest.raises(UserError, match="another version"):
        document.write(table1)


@pytest.mark.full
def test_figures_leave_matplotlib_as_it_was(table1: Store) -> None:
    code = f"""
import pathlib, sys
import matplotlib
before = dict(matplotlib.rcParams)
from forwardgrad.lab import report
from forwardgrad.lab.store import Store
report.write(Store(pathlib.Path({str(table1.root)!r})))
assert dict(matplotlib.rcParams) == before
assert "torch" not in sys.modules, "torch was imported"
assert "matplotlib.pyplot" not in sys.modules, "pyplot was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
