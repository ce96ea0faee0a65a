"""The command line as a user meets it: what commands print and leave, their help, and Ctrl-C that keeps finished work."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.command import DIGITS, run
from tests.support.stored import put

import forwardgrad as fg
from forwardgrad.lab.commands import options, training
from forwardgrad.lab.commands import studies as study_commands
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.recipes import paper
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.estimator_text import format_value
from forwardgrad.lab.studies.run import Run


def test_train_prints_its_result_and_a_second_call_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path) if a == "OUT" else a for a in DIGITS]
    status, out, err = run(monkeypatch, capsys, *arguments)
    told, folder = out.splitlines()[0], Path(out.splitlines()[1])
    assert status == 0
    assert told.startswith("finished, validation loss")
    assert "[1/1] logistic forward: finished" in err
    result = (folder / "result.json").read_bytes()
    status, out, err = run(monkeypatch, capsys, *arguments)
    assert (status, out) == (0, f"{told}\n{folder}\n")
    assert "1 finished before" in err
    assert (folder / "result.json").read_bytes() == result


@pytest.mark.parametrize(
    ("recipe", "rows", "planned"), [("beyond", "nn-local,cnn-linear", 6), ("noise", "paper-x10", 1), ("faster", "nn", 12)]
)
def test_studies_beyond_the_papers_table_are_run_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: str, rows: str, planned: int
) -> None:
    trained, places = [], []

    def execute(runs: Sequence[Run], store: Store, place: Any, progress: Any) -> dict[str, Any]:
        trained.extend(runs)
        places.append(place)
        for one in runs:
            put(store, one, 0.5)
        return {one.identity: store.result(one.identity) for one in runs}

    monkeypatch.setattr("forwardgrad.lab.execution.execute", execute)
    monkeypatch.setattr("forwardgrad.lab.tuning.check_buildable", lambda *_: None)  # there are no data
    monkeypatch.setattr("forwardgrad.lab.bench.measure_steps", lambda *_, **__: pytest.fail("arms that are not there were timed"))
    status, out, _ = run(monkeypatch, capsys, "reproduce", recipe, "--rows", rows, "--out", str(tmp_path))
    assert (status, out) == (0, f"report: {tmp_path / 'report.html'}\n")
    assert len([one for one in trained if one.test]) == planned
    assert len([one for one in trained if not one.test]) == {"noise": 0, "faster": 72}.get(recipe, 8)
    assert (tmp_path / "studies" / f"{recipe}.json").exists()
    assert {one.engine for one in trained} == ({"compile"} if recipe == "faster" else {"eager"})
    timed = (1, False) if recipe == "faster" else (None, None)  # alike for all runs, and each by itself
    assert {(place.threads, place.batched) for place in places} == {timed}


def candidates(value: Any) -> list[Any]:
    """Values that an option of an estimator may take, besides `value`: those of its kind, and every component there is."""
    numbers: list[Any] = [1, 2, 3, 0.5, 1.5]
    words = [kind.name for kind in (*fg.LAWS, *fg.PERTURBATIONS)]
    told = [choice for choice in getattr(value, "__args__", ()) if isinstance(choice, str)]
    return [True, False, *numbers, *words, *told, ["0.weight"]]


WITH = {
    ("guess", "complement"): "source=given, ",
    ("forward", "exact_output"): "perturb=activity, ",
    ("zeroth-order", "normalize"): "tangents=2, ",
}  # options that another one has to go with


@pytest.mark.parametrize("kind", fg.ESTIMATORS, ids=lambda kind: kind.name)
def test_every_estimator_and_every_field_can_be_chosen(kind: type[fg.Estimator]) -> None:
    usual = options.estimator_of(kind.name)
    assert usual["name"] == kind.name
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        chosen, extra = [], WITH.get((kind.name, field.name), "")
        for value in candidates(types[field.name]):
            with contextlib.suppress(UserError):
                chosen.append(options.estimator_of(f"{kind.name}({extra}{field.name}={format_value(value)})")[field.name])
        assert any(value != usual[field.name] for value in chosen), f"no value of {kind.name}'s {field.name} but its default can be chosen"


def test_estimators_lists_every_option_and_component(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(monkeypatch, capsys, "estimators")
    assert status == 0
    for kind in (*fg.ESTIMATORS, *fg.LAWS):
        assert f"\n  {kind.name}: " in out
        for field in dataclasses.fields(kind):
            assert re.search(rf"\n    {field.name}( \(required\)|=\S+): ", out)
    assert "tangents=1: K ≥ 1, the number of directions averaged" in out
    assert "no description" not in out


def test_tune_trains_the_best_point_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arm = ("tune", "--data", "digits", "--model", "logistic", "--estimator", "backprop")
    budget = ("--lr", "0.01,0.1,1", "--epochs", 3, "--tuning-epochs", 1, "--seeds", 2)
    status, out, _ = run(monkeypatch, capsys, *arm, *budget, "--out", tmp_path)
    (study,) = [json.loads(p.read_text()) for p in (tmp_path / "studies").iterdir()]
    (stored,) = study["arms"]
    assert status == 0
    assert len(stored["trials"]) == 3
    assert stored["chosen"]["values"]["lr"] == 1.0
    assert stored["chosen"]["at_edge"] == ["lr"]
    assert len(stored["runs"]) == 2
    assert str(tmp_path / "report.html") in out
    assert (tmp_path / "report.md").exists()


def test_the_demo_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(monkeypatch, capsys, "demo", "--epochs", 2, "--seeds", 1, "--jobs", 1, "--out", tmp_path)
    assert status == 0
    assert str(tmp_path / "report.html") in out
    page = (tmp_path / "report.html").read_text()
    assert "backpropagation" in page
    assert "<svg" in page
    report, *following = out.splitlines()[-4:]
    assert report == f"report: {tmp_path / 'report.html'}"
    assert following == [f"{purpose}: {command}" for purpose, command in training.next_commands(tmp_path)]
    quality = shlex.split(training.next_commands(tmp_path)[0][1])[1:]
    assert run(monkeypatch, capsys, *quality, "--repeats", 10, "--tangents", 1)[0] == 0  # fewer than it says: this is a test
    assert "How good the estimates are" in (tmp_path / "report.md").read_text()


def test_what_the_demo_names_next_works_as_it_stands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All commands of an installed package, in a shell: none needs a file of the checkout, and data are fetched before they are used."""
    asked: list[Any] = []

    def carried_out(studies: Sequence[Any], out: Path, place: Any) -> Any:
        asked.extend((studies, place))
        raise KeyboardInterrupt

    monkeypatch.setattr("forwardgrad.lab.data.fetch", lambda name, where: asked.append(name) or [])
    monkeypatch.setattr(study_commands, "carry_out", carried_out)
    _, listing, campaign = (command for _, command in training.next_commands(Path("a demo")))
    fetch, reproduce = campaign.split(" && ")
    assert [run(monkeypatch, capsys, *shlex.split(words)[1:])[0] for words in (listing, fetch, reproduce)] == [0, 0, 130]
    fetched, studies, place = asked
    assert {arm.run.data for study in studies for arm in study.arms} == {fetched} == {"mnist"}
    assert place.jobs == 2
    assert "--out 'a demo'" in training.next_commands(Path("a demo"))[0][1]


@pytest.mark.full
def test_reproduce_runs_rows_shortened_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data_dir: Path
) -> None:
    short = (dataclasses.replace(paper.TABLE1[0].run, model="logistic"), dataclasses.replace(paper.TABLE1[1].run, model="logistic"))
    rows = tuple(dataclasses.replace(row, run=run) for row, run in zip(paper.TABLE1[:2], short, strict=True))
    monkeypatch.setattr(paper, "TABLE1", rows)  # the smallest network in place of the NN
    status, _, _ = run(monkeypatch, capsys, "reproduce", "table1", "--epochs", 1, "--data-dir", data_dir, "--out", tmp_path)
    assert status == 0
    report = (tmp_path / "report.md").read_text()
    assert "shortened: 1 of 50 epochs" in report
    assert str(data_dir) not in report.replace(f"--data-dir {data_dir}", "")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("train",),
        ("tune",),
        ("estimators",),
        ("reproduce",),
        ("demo",),
        ("bench",),
        ("check",),
        ("quality",),
        ("layers",),
        ("report",),
        ("list",),
        ("replay",),
        ("data",),
    ],
)
def test_help_explains_every_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    status, out, _ = run(monkeypatch, capsys, *arguments, "--help")
    assert status == 0
    assert "Usage: forwardgrad" in out
    options = [line.split() for line in out.splitlines() if line.startswith("  --")]
    assert all(len(words) > 1 for words in options)


def test_no_arguments_show_the_help_as_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ((), ("data",)):
        _, out, err = run(monkeypatch, capsys, *words)
        assert "Commands:\n" in out
        assert err == ""


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, capsys, "--version")[:2] == (0, f"forwardgrad {fg.__version__}\n")


def test_data_verify_tells_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(monkeypatch, capsys, "data", "verify", "--data-dir", tmp_path)
    assert status == 2
    assert out.count("missing") == 11
    assert "11 of 11 files are missing or damaged" in err
    assert "4 of 4 files" in run(monkeypatch, capsys, "data", "verify", "mnist", "--data-dir", tmp_path)[2]
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"not it")
    status, out, err = run(monkeypatch, capsys, "data", "verify", "--data-dir", tmp_path)
    assert status == 2
    assert "damaged" in out
    assert "forwardgrad data fetch" in err


@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.full)])
def test_ctrl_c_keeps_finished_work_and_the_same_command_goes_on(tmp_path: Path, jobs: str) -> None:
    command = [sys.executable, "-m", "forwardgrad", "demo", "--epochs", "60", "--seeds", "1", "--jobs", jobs, "--out", str(tmp_path)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job would ignore it
    )
    deadline = time.monotonic() + 120
    while not (finished := list(tmp_path.glob("runs/*/result.json"))) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
    _, err = process.communicate(timeout=60)
    assert finished
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "interrupted; finished runs are kept" in err
    assert all(json.loads(path.read_text()) for path in tmp_path.glob("runs/*/*.json"))
    assert not list(tmp_path.rglob(".*"))  # no temporary file is left
