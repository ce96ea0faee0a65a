"""The list of stored runs: every run once, what was asked and what came of it, as a table and as a CSV that others read in one line."""

import csv
import dataclasses
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import pandas
import polars
import pytest
from tests.support.stored import put, record, seeds, tried

from forwardgrad.lab import cli
from forwardgrad.lab.recipes import paper
from forwardgrad.lab.store import catalogue
from forwardgrad.lab.store.files import write_json
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.run import Optimizer, Run, to_json
from forwardgrad.lab.studies.study import Study

ALONE = Run("digits", "logistic", {"name": "forward", "tangents": 3}, Optimizer("adam", 0.5), epochs=2, seed=7)


@pytest.fixture
def demo() -> Study:
    return paper.demo(epochs=1, seeds=3)


@pytest.fixture
def store(tmp_path: Path, demo: Study) -> Store:
    """Two arms of three seeds: the backprop arm's second diverged, its third was only begun; trials of one arm; a run of no study."""
    store = Store(tmp_path / "out")
    record(store, demo)
    for arm in demo.arms:
        for seed, run in enumerate(seeds(arm, 3)):
            if (arm.kind, seed) == ("backprop", 2):
                store.folder(run.identity).mkdir()
                write_json(store.folder(run.identity) / "run.json", to_json(run))
            else:
                lost = "the loss is not finite" if (arm.kind, seed) == ("backprop", 1) else None
                put(store, run, None if lost else 0.1 * (seed + 1), diverged=lost, accuracy=0.9 - 0.01 * seed)
    for _, run in tried(demo, demo.arms[0]):
        put(store, run, 0.5)
    put(store, ALONE, 0.25)
    return store


def listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[list[dict[str, str]], str]:
    monkeypatch.setattr(sys, "argv", ["forwardgrad", "list", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert not ended.value.code, err
    return list(csv.DictReader(out.splitlines(), delimiter="\t")), err


def test_every_run_is_listed_once_with_what_came_of_it(
    store: Store, demo: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, err = listed(monkeypatch, capsys, store.root)
    found = {row["identity"]: row for row in rows}
    assert sorted(found) == [row["identity"] for row in sorted(rows, key=lambda row: row["identity"])] == store.runs()
    points = demo.budget(demo.arms[0])
    assert err == f"{7 + points} runs: {5 + points} finished, 1 diverged, 1 unfinished\n"
    alone = found[ALONE.identity]
    assert (alone["study"], alone["arm"], alone["optimizer"], alone["lr"], alone["seed"]) == ("", "", "adam", "0.5", "7")
    assert (alone["estimator"], alone["validation loss"], alone["test accuracy"]) == ("forward(tangents=3)", "0.25", "0.9")
    backprop = next(arm for arm in demo.arms if arm.kind == "backprop")
    first, second, third = (found[run.identity] for run in seeds(backprop, 3))
    assert (first["study"], first["arm"], first["status"], first["steps"]) == ("demo", backprop.name, "finished", "400")
    assert (second["status"], second["validation loss"]) == ("diverged", "")
    assert (third["status"], third["seconds"]) == ("unfinished", "")


def test_runs_are_chosen_ordered_and_cut(
    store: Store, demo: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def of(*words: Any) -> list[str]:
        return [row["identity"] for row in listed(monkeypatch, capsys, store.root, *words)[0]]

    backprop = next(arm for arm in demo.arms if arm.kind == "backprop")
    first, second, third = (run.identity for run in seeds(backprop, 3))
    assert {first, second, third} <= set(of("--study", "demo", "--arm", backprop.name))
    assert ALONE.identity in of()
    assert ALONE.identity not in of("--study", "*")
    assert of("--status", "diverged") == [second]
    assert of("--status", "unfinished") == [third]
    assert of("--study", "nothing") == []
    losses = [row["validation loss"] for row in listed(monkeypatch, capsys, store.root, "--sort", "validation-loss")[0]]
    assert losses[-2:] == ["", ""]  # nothing there comes last, whatever the order
    assert losses[:-2] == sorted(losses[:-2], key=float)
    turned = [row["validation loss"] for row in listed(monkeypatch, capsys, store.root, "--sort", "validation-loss", "--reverse")[0]]
    assert turned[-2:] == ["", ""]
    assert turned[:-2] == losses[-3::-1]
    assert of("--limit", 2) == of()[:2]


def test_the_csv_is_read_in_one_line_and_holds_every_hyperparameter(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "runs.csv"
    monkeypatch.setattr(sys, "argv", ["forwardgrad", "list", str(store.root), "--csv", str(path)])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out == f"{path}\n"
    wanted = {row["identity"]: row for row in catalogue.rows(store, where=True)}
    for table in (polars.read_csv(path, infer_schema_length=None).to_dicts(), duckdb.read_csv(str(path)).df().to_dict("records"),
                  pandas.read_csv(path).to_dict("records")):  # fmt: skip
        assert {row["identity"] for row in table} == wanted.keys()
        for row in table:
            mine = wanted[row["identity"]]
            for name in ("optimizer.lr", "optimizer.beta2", "estimator.tangents", "seed", "epochs", "validation_loss", "test_accuracy"):
                assert row[name] == mine.get(name) or (mine.get(name) is None and (row[name] is None or row[name] != row[name]))
            assert (row["precision"], row["status"]) == ("float32", mine["status"])
    optimizer = {f"optimizer.{field.name}" for field in dataclasses.fields(Optimizer)}
    assert optimizer <= set(polars.read_csv(path, infer_schema_length=None).columns)


def test_a_terminal_gets_a_table_that_fits_and_nothing_that_it_would_obey(store: Store, demo: Study) -> None:
    (arm, *rest) = demo.arms
    record(store, dataclasses.replace(demo, arms=(dataclasses.replace(arm, name="\x1b[31mred\a"), *rest)))
    master, slave = pty.openpty()
    words = [sys.executable, "-m", "forwardgrad", "list", str(store.root), "--study", "demo"]
    process = subprocess.Popen(words, stdout=slave, stderr=subprocess.DEVNULL, env={"TERM": "dumb", "COLUMNS": "80", **_environment()})
    os.close(slave)
    shown = b""
    try:
        while part := os.read(master, 1 << 16):
            shown += part
    except OSError:  # how a terminal ends
        pass
    os.close(master)
    assert process.wait(timeout=60) == 0
    text = shown.decode()
    assert "\x1b[31m" not in text
    assert "\a" not in text
    assert "\N{REPLACEMENT CHARACTER}[31mred\N{REPLACEMENT CHARACTER}" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("TERM", "COLUMNS")}


@pytest.mark.full
def test_the_benchmark_runs() -> None:
    script = Path(__file__).resolve().parents[3] / "benchmarks" / "many_runs.py"
    words = ("--arms", "2", "--runs", "2", "--trials", "3", "--steps", "51")
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.startswith("10 runs of 51 steps")
    assert [line.split()[0] for line in rest] == ["list", "list", "report"]
