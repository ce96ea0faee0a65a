"""The command line as a user meets it: every mistake one sentence and status 2, Ctrl-C status 130, finished work kept."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.stored import put

import forwardgrad as fg
from forwardgrad.lab import cli
from forwardgrad.lab.commands import options, training
from forwardgrad.lab.commands import studies as study_commands
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.recipes import paper
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.estimator_text import format_value
from forwardgrad.lab.studies.run import Run


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["forwardgrad", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


DIGITS = ("train", "--data", "digits", "--model", "logistic", "--epochs", "2", "--lr", "0.01", "--out", "OUT")
MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (("train", "--data", "imagenet"), "'digits', 'mnist', 'cifar10'"),
    (("train", "--model", "resnet"), "'cifar-cnn'"),
    (("train", "--estimator", "evolution"), "unknown estimator 'evolution': choose one of backprop, forward"),
    (("train", "--optimizer", "lion"), "'sgd', 'nesterov', 'adam'"),
    (("train", "--estimator", "forward(law=cauchy)"), "unknown law 'cauchy': choose one of gaussian, rademacher, sphere"),
    (("train", "--lr", "0"), "learning rate must be a positive number, not 0.0"),
    (("train", "--lr", "-1"), "learning rate must be a positive number, not -1.0"),
    (("train", "--lr", "nan"), "learning rate must be a positive number"),
    (("train", "--lr", "fast"), "--lr"),
    (("train", "--decay", "-1"), "decay must be zero or positive"),
    (("train", "--momentum", "1"), "momentum must lie in [0, 1)"),
    (("train", "--beta1", "1"), "beta1 must lie in [0, 1)"),
    (("train", "--epochs", "0"), "--epochs"),
    (("train", "--epochs", "-3"), "--epochs"),
    (("train", "--batch-size", "0"), "--batch-size"),
    (("train", "--estimator", "forward(tangents=0)"), "tangents must be a whole number of at least 1, not 0"),
    (("train", "--estimator", "forward(tangents=two)"), "tangents must be a whole number of at least 1, not 'two'"),
    (("train", "--estimator", "forward(clip=0)"), "clip must be a number above 0, not 0"),
    (("train", "--estimator", "forward(clip=-1.5)"), "clip must be a number above 0, not -1.5"),
    (("train", "--estimator", "backprop(tangents=2)"), "backprop estimator has no option 'tangents'"),
    (("train", "--estimator", "forward(tangents=2"), "',' or ')' is expected at its end"),
    (("train", "--estimator", "forward; backprop"), "the end is expected at character 8"),
    (("train", "--estimator", ""), "a name is expected at its end"),
    (("train", "--tangents", "2"), "--tangents"),
    (("train", "--weight-decay", "-1"), "weight decay must be zero or positive"),
    (("train", "--lr", "0.1", "--weight-decay", "10"), "weight decay must be zero or positive and below 1/lr"),
    (("train", "--cap", "0"), "the cap of the relative step must be a positive number, not 0.0"),
    (("tune", "--lr", "0.1", "--weight-decay", "0,nan"), "--weight-decay takes finite numbers"),
    (("tune", "--lr", "0.1", "--weight-decay", "0,-0.1"), "weight decay must be zero or positive"),
    (("tune", "--lr", "0.1", "--estimator", "forward(tangents=0)"), "tangents must be"),
    (("train", "--seed", "-1"), "--seed"),
    (("train", "--device", "cuda:77"), "no GPU for --device cuda:77"),
    (("train", "--device", "abacus"), "choose cpu, cuda"),
    (("train", "--data", "mnist", "--data-dir", "NOWHERE"), "forwardgrad data fetch mnist"),
    (("train", "--data", "digits", "--model", "cnn"), "needs larger images"),
    (("train", "--data", "digits", "--out", "FILE/out"), "cannot write to the output folder"),
    (("tune", "--lr", "0.1,high"), "--lr takes numbers separated by commas"),
    (("tune", "--lr", "0.1,-0.1"), "learning rate must be a positive number, not -0.1"),
    (("tune",), "--lr"),
    (("reproduce", "table2"), "'table1', 'figure1', 'figure2', 'baydin', 'beyond', 'noise'"),
    (("reproduce", "table1", "--rows", "15"), "choose a number from 1 to 14"),
    (("reproduce", "table1", "--epochs", "0"), "--epochs"),
    (("reproduce", "table1", "--seeds", "0"), "--seeds"),
    (("reproduce", "table1", "--jobs", "0"), "--jobs"),
    (("reproduce", "baydin", "--rows", "cnn"), "choose from logistic, nn"),
    (("reproduce", "baydin", "--retune"), "leave --retune out"),
    (("reproduce", "beyond", "--retune"), "beyond always tunes every arm; leave --retune out"),
    (("reproduce", "beyond", "--rows", "nn,cifar"), "no row 'cifar' beyond the paper: choose from nn, cnn, cifar-cnn"),
    (("reproduce", "noise", "--rows", "nn"), "no row 'nn' on noise: choose from paper-x1"),
    (("reproduce", "noise", "--retune"), "noise has the paper's hyperparameters, times a factor; leave --retune out"),
    (("bench", "--models", "resnet"), "unknown model 'resnet': choose from logistic, mlp, nn, cnn, cifar-cnn, or mlp-LAYERSxWIDTH"),
    (("bench", "--models", "mlp-0x8"), "unknown model 'mlp-0x8'"),
    (("bench", "--models", "nn", "--sweep", "depth"), "--sweep depth has its own networks: leave --models out"),
    (("bench", "--batch-size", "64,0"), "--batch-size takes whole numbers from 1 to 1,000,000 separated by commas, not '0'"),
    (("bench", "--sweep", "time"), "'depth', 'width', 'batch'"),
    (("bench", "--arms", "plain,evolution"), "unknown arm 'evolution'"),
    (("bench", "--arms", "forward(tangents=0)"), "the arm 'forward(tangents=0)' cannot be used: tangents must be"),
    (("bench", "--arms", "forward(tangents=2"), "cannot read the estimator"),
    (("bench", "--layout", "diagonal"), "'contiguous', 'channels-last'"),
    (("bench", "--rounds", "4"), "--rounds"),
    (("bench", "--repeats", "9"), "--repeats must be 0, or an even number of at least 10, not 9"),
    (("bench", "--repeats", "-2"), "--repeats must be 0"),
    (("bench", "--cosine", "0.5,1"), "--cosine takes numbers between 0 and 1"),
    (("bench", "--cosine", "half"), "--cosine takes numbers separated by commas"),
    (("bench", "--threads", "0"), "--threads"),
    (("bench", "--device", "cuda:77"), "no GPU for --device cuda:77"),
    (("quality", "--estimators", "evolution"), "the estimator 'evolution' cannot be used: unknown estimator 'evolution'"),
    (("quality", "--estimators", "forward(clip=-1)"), "clip must be a number above 0, not -1"),
    (("quality", "--estimators", "forward(clip"), "cannot read the estimator 'forward(clip'"),
    (("quality", "--estimators", "forward; forward(tangents=2)"), "the same estimator is there twice"),
    (("quality", "--tangents", "0"), "--tangents takes whole numbers of at least 1"),
    (("quality", "--tangents", "1,many"), "--tangents takes whole numbers of at least 1"),
    (("quality", "--repeats", "9"), "--repeats must be an even number of at least 10, not 9"),
    (("quality", "--data", "digits", "--model", "mlp", "--batch-size", "2000"), "needs more than the 1,077 examples"),
    (("report", "NOWHERE"), "not an output folder of forwardgrad"),
    (("watch", "NOWHERE"), "not an output folder of forwardgrad"),
    (("data", "fetch", "imagenet"), "imagenet"),
    (("tarin",), "train"),
    (("train", "--data", "digits", "--model", "logistc"), "Invalid value for '--model': 'logistc' is not one of 'logistic', 'mlp'"),
    (("train", "--learning-rate", "1"), "--learning-rate"),
    (("train", "--data", "digits", "--lr", "1e300"), "at most 1e+30"),
    (("train", "--data", "digits", "--epochs", "1000000000000"), "at most 1,000,000"),
    (("train", "--data", "digits", "--optimizer", "adam", "--momentum", "0.9"), "Adam takes no momentum"),
    (("train", "--data", "digits", "--optimizer", "sgd", "--beta1", "0.5"), "sgd takes no beta1"),
    (("train", "--data", "digits", "--out", ""), "not the current folder"),
    (("reproduce", "table1", "--rows", ","), "no row ''"),
    (("data", "verify", "digits"), "choose from mnist, cifar10"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_a_mistake_is_one_sentence_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORWARDGRAD_DATA", raising=False)
    (tmp_path / "FILE").write_text("")
    status, _, err = run(monkeypatch, capsys, *arguments)
    told = [line for line in err.strip().splitlines() if line.startswith("forwardgrad: ")]
    assert status == 2
    assert len(told) == 1
    assert words in told[0]
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("run.json"))  # nothing half-written


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


@pytest.mark.parametrize(("recipe", "rows", "planned"), [("beyond", "nn-local,cnn-linear", 6), ("noise", "paper-x10", 1)])
def test_studies_beyond_the_papers_table_are_run_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: str, rows: str, planned: int
) -> None:
    trained = []

    def execute(runs: Sequence[Run], store: Store, place: Any, progress: Any) -> dict[str, Any]:
        trained.extend(runs)
        for one in runs:
            put(store, one, 0.5)
        return {one.identity: store.result(one.identity) for one in runs}

    monkeypatch.setattr("forwardgrad.lab.execution.execute", execute)
    monkeypatch.setattr("forwardgrad.lab.tuning.check_buildable", lambda *_: None)  # there are no data
    monkeypatch.setattr("forwardgrad.lab.bench.measure_steps", lambda *_, **__: pytest.fail("arms that are not there were timed"))
    status, out, _ = run(monkeypatch, capsys, "reproduce", recipe, "--rows", rows, "--out", str(tmp_path))
    assert (status, out) == (0, f"report: {tmp_path / 'report.html'}\n")
    assert len([one for one in trained if one.test]) == planned
    assert len([one for one in trained if not one.test]) == (8 if recipe == "beyond" else 0)
    assert (tmp_path / "studies" / f"{recipe}.json").exists()


def candidates(value: Any) -> list[Any]:
    """Values that an option of an estimator may take, besides `value`: those of its kind, and every component there is."""
    numbers: list[Any] = [1, 2, 3, 0.5, 1.5]
    words = [kind.name for kind in (*fg.LAWS, *fg.PERTURBATIONS)]
    told = [choice for choice in getattr(value, "__args__", ()) if isinstance(choice, str)]
    return [True, False, *numbers, *words, *told, ["0.weight"]]


WITH = {
    ("guess", "complement"): "source=given, ",
    ("forward", "exact_output"): "perturb=activity, ",
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
        ("report",),
        ("list",),
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


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path / "out") if a == "OUT" else a for a in DIGITS]

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, _, err = run(monkeypatch, capsys, *arguments)
    assert status == 2
    assert "forwardgrad: cannot write to the output folder" in err
    assert "(No space left on device)" in err
    monkeypatch.undo()
    assert run(monkeypatch, capsys, *arguments)[0] == 0


DAMAGE = [
    ("runs/*/result.json", "{}"),
    ("runs/*/result.json", '{"status": 3}'),
    ("runs/*/result.json", "[]"),
    ("runs/*/result.json", "\x00\xff"),
    ("runs/*/run.json", "{}"),
    ("runs/*/evaluations.csv", "step\n1\n"),
    ("runs/*/evaluations.csv", ""),
    ("runs/*/losses.csv.gz", "not gzip"),
    ("studies/tune.json", "{}"),
    ("studies/tune.json", '{"schema": 1, "name": "tune", "title": "", "arms": 3}'),
    ("studies/tune.json", '{"schema": 1, "name": "tune", "title": "", "arms": [{}]}'),
    ("studies/tune.json", '{"schema": 99}'),
    ("cost.json", "{"),
    ("cost.json", '{"schema": 1}'),
    ("bench.json", "{"),
    ("bench.json", '{"schema": 1}'),
    ("bench.json", '{"schema": 1, "environment": {}, "cases": [{"model": "nn"}]}'),
    ("functions.json", '{"schema": 1, "functions": [1]}'),
    ("quality.json", '{"schema": 1}'),
    ("quality.json", '{"schema": 1, "environment": {}, "settings": [{"model": "nn"}]}'),
]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned")
    words = "tune --data digits --model logistic --estimator backprop --lr 0.1 --epochs 1 --tuning-epochs 1 --out"
    subprocess.run([sys.executable, "-m", "forwardgrad", *words.split(), str(out)], check=True, capture_output=True)
    return out


@pytest.mark.parametrize(("name", "content"), DAMAGE)
def test_a_damaged_store_is_one_sentence(
    tmp_path: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    shutil.copytree(tuned, tmp_path / "out")
    for path in list((tmp_path / "out").glob(name)) or [tmp_path / "out" / name]:
        path.write_text(content)
    status, _, err = run(monkeypatch, capsys, "report", tmp_path / "out")
    assert status == 2
    assert err.startswith("forwardgrad: ")
    assert len(err.splitlines()) == 1
    assert Path(name).name in err
    if not name.startswith("runs"):
        assert "delete the folder" not in err  # the folder is that of every run


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
