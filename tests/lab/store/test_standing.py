"""How far a store is: snapshots of made-up stores against sums worked out by hand, drawn at every width, and watched in a terminal."""

from __future__ import annotations

import dataclasses
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from tests.support.stored import put, record, seeds, timed, tried, under_way

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store import progress, runs_now, standing, time_left
from forwardgrad.lab.store.files import read_json, write_json
from forwardgrad.lab.store.progress import Display, Progress
from forwardgrad.lab.store.standing import StoreWatch, snapshot
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.length import Length
from forwardgrad.lab.studies.run import Optimizer, Run
from forwardgrad.lab.studies.study import Arm, Study

T = 1_700_000_000.0
RUN = Run("digits", "mlp", {"name": "backprop"}, Optimizer("sgd", 0.1), 4)
SPACE = {"lr": (0.01, 0.1, 1.0)}
ONE = Arm("one", "digits", "backprop", "backpropagation", RUN, SPACE)
TWO = dataclasses.replace(ONE, name="two", run=dataclasses.replace(RUN, estimator={"name": "forward"}))
STUDY = Study("both", "Two arms", (ONE, TWO), seeds=2, tuning=Length(epochs=2))


def trials(arm: Arm) -> list[Run]:
    return [run for _, run in tried(STUDY, arm)]


def change(store: Store, edit: Any) -> None:
    path = store.root / "studies" / "both.json"
    stored = read_json(path)
    edit(stored)
    write_json(path, stored)  # its size differs, so a watch reads it again whatever the clock says


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Arm one: three trials of 400 steps done in 4 s each, one of them diverged; seed 0 at step 100 of 800. Arm two has not begun."""
    store = Store(tmp_path)
    record(store, STUDY)
    for index, run in enumerate(trials(ONE)):
        put(store, run, 0.5 - index / 10, diverged="the loss is not finite" if index == 2 else None)
        timed(store, run, T + 4 * index, T + 4 * index + 4)
    first, _ = seeds(ONE, 2)
    under_way(store, first, 100, 800, 0.5, 0.35)
    timed(store, first, T + 20, T + 22)
    return store


def test_rate_best_and_time_left_are_what_one_works_out_by_hand(store: Store) -> None:
    now = snapshot(store, now=T + 23)
    one, two = now.arms
    assert (one.name, one.phase, one.running, one.done, one.planned) == ("one", standing.Phase("seed", 1, 2), 1, 3, 5)
    assert one.share == (100 / 800) / 2
    assert one.rate == 100 / 0.5  # of training alone
    assert one.best == 0.35  # of the run under way: 0.4 and 0.5 are those of the trials, and 0.3 of the diverged one does not count
    assert (one.diverged, one.failed) == (1, 0)
    rest = 700 * 2 / 100  # it took 2 s for 100 steps, evaluations included
    pace = (3 * 4 + 2) / (3 * 400 + 100)
    assert one.work == time_left.WorkLeft(pytest.approx(rest + 800 * pace), rest, 1)
    assert one.work.left == pytest.approx(rest + 800 * pace)
    assert (two.phase, two.rate, two.best, two.latest) == (standing.Phase("waiting", 0, 3), None, None, 0.0)
    assert two.work.seconds == pytest.approx((3 * 400 + 2 * 800) * pace)  # as long as the other arm of its group
    (study,) = now.studies
    assert (study.name, study.done, study.planned, study.running, study.diverged) == ("both", 3, 10, 1, 1)
    assert study.elapsed == 23
    assert study.work.left == pytest.approx(one.work.seconds + two.work.seconds)
    assert not study.complete
    assert not now.complete


def test_runs_at_the_same_time_share_the_time_left(store: Store) -> None:
    _, second = seeds(ONE, 2)
    under_way(store, second, 400, 800, 2.0, 0.3)
    timed(store, second, T + 18, T + 22)
    one = snapshot(store, now=T + 23).arms[0]
    assert (one.phase, one.running, one.best) == (standing.Phase("seed", 2, 2), 2, 0.3)
    assert one.rate == 100 / 0.5 + 400 / 2
    assert one.work.left == 700 * 2 / 100  # half of (14 + 4) s would be 9, but the first alone takes 14
    assert one.share == (100 + 400) / 800 / 2


def test_a_run_that_fell_silent_is_not_under_way(store: Store) -> None:
    now = snapshot(store, now=T + 22 + runs_now.FRESH_SECONDS + 1)
    one = now.arms[0]
    assert (one.phase, one.running, one.rate, one.best) == (standing.Phase("stopped", 0, 2), 0, None, 0.4)
    assert one.work.left == pytest.approx((700 + 800) * 14 / 1300)
    assert now.studies[0].elapsed == 22
    assert "none under way" in progress.head(now.studies[0])


def test_what_is_not_known_is_not_made_up(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record(store, STUDY)
    now = snapshot(store, now=T)
    assert now.studies[0].work.left is None
    assert now.studies[0].elapsed is None
    assert progress.head(now.studies[0]) == "Two arms: 0 of 10 runs · none under way · – elapsed · – left"
    under_way(store, trials(ONE)[0], 100, 400, 1.0, None)
    timed(store, trials(ONE)[0], T, T + 1)
    work = snapshot(store, now=T + 1).studies[0].work
    assert work.partly  # how long final runs are is not said before one has begun
    assert work.seconds == pytest.approx((300 + 5 * 400) / 100)
    assert progress.left(work) == "≥ 0:23"


def test_a_record_from_before_the_first_trial(store: Store) -> None:
    def early(stored: dict[str, Any]) -> None:
        stored["seeds"] = 7
        for arm in stored["arms"]:
            arm |= {"runs": [], "sampler": "optuna", "budget": {"trials": 12, "epochs": 2}, "epochs": 4}

    change(store, early)
    one = snapshot(store, ["both"], now=T + 23).arms[0]
    assert (one.phase, one.planned, one.done) == (standing.Phase("waiting", 3, 12), 12 + 7, 3)
    pace = 12 / 1200
    assert one.work.seconds == pytest.approx((9 * 400 + 7 * 800) * pace)  # epochs say how much longer the final runs are
    assert not one.work.partly


def test_only_the_studies_asked_for(store: Store) -> None:
    assert snapshot(store, ["another"]).arms == ()
    assert len(snapshot(store, ["both"], now=T + 23).arms) == 2


def test_a_complete_study_is_done(store: Store) -> None:
    for run in (*trials(TWO), *seeds(ONE, 2), *seeds(TWO, 2)):
        put(store, run, 0.2)
        (store.folder(run.identity) / "status.json").unlink(missing_ok=True)
    now = snapshot(store)
    assert now.complete
    assert {arm.phase.kind for arm in now.arms} == {"done"}
    assert {arm.share for arm in now.arms} == {1.0}


def test_a_failed_run_counts_and_stands_for_no_loss(store: Store) -> None:
    run = seeds(ONE, 2)[1]
    put(store, run, 0.0)
    path = store.folder(run.identity) / "result.json"
    lost = {"status": "failed", "reason": "out of memory", "validation_loss": None, "validation_accuracy": None, "test": None}
    result = (read_json(path) or {}) | lost
    write_json(path, result)
    one = snapshot(store, now=T + 23).arms[0]
    assert (one.failed, one.diverged, one.best) == (1, 1, 0.35)
    assert progress.describe(result) == "failed at step 400 (out of memory); 0.8 s"


def test_every_result_is_read_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    read_result = runs_now.read_result
    monkeypatch.setattr(runs_now, "read_result", lambda folder: read.append(folder.name) or read_result(folder))
    watched = StoreWatch(store)
    first = watched.snapshot(T + 23)
    assert set(read) == {run.identity for run in (*trials(ONE), seeds(ONE, 1)[0])}
    read.clear()
    assert watched.snapshot(T + 23) == first
    assert read == [seeds(ONE, 1)[0].identity]  # the one without a result
    for path in store.folder(trials(ONE)[0].identity).iterdir():
        path.unlink()
    store.folder(trials(ONE)[0].identity).rmdir()
    assert watched.snapshot(T + 23).arms[0].done == 2


WRONG: list[dict[str, Any]] = [{"step": "1"}, {"steps": 0}, {"step": -1}, {"seconds": None}, {"validation_loss": 10**400}]
STATUS = {"step": 1, "steps": 2, "seconds": 1.0, "validation_loss": 1.0}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"step": 1}',
        *(STATUS | wrong for wrong in WRONG),
        '{"step": NaN, "steps": 1, "seconds": 1}',
        '{"step": 1e400, "steps": 1, "seconds": 1}',
    ],
)
def test_a_status_that_is_half_there_waits_for_the_next_look(store: Store, content: str | dict[str, Any]) -> None:
    path = store.folder(seeds(ONE, 1)[0].identity) / "status.json"
    path.write_text(content) if isinstance(content, str) else write_json(path, content)
    one = snapshot(store, now=T + 23).arms[0]
    assert (one.running, one.done) == (0, 3)


def test_damaged_records_and_vanished_files_stop_nobody(store: Store) -> None:
    (store.root / "studies" / "half.json").write_text('{"schema": 1, "na')
    (store.folder(trials(ONE)[0].identity) / "result.json").write_text("{}")
    (store.folder(trials(ONE)[1].identity) / "run.json").unlink()
    (store.root / "runs" / "stray").write_text("no folder")
    now = snapshot(store, now=T + 23)
    (unread,) = now.unread
    assert re.search(r"studies/half\.json is damaged \(.*\): delete this file", unread)
    assert now.arms[0].done == 1
    assert "is damaged" in drawn(now, 200)


def test_runs_outside_studies_are_arms_of_their_own(store: Store) -> None:
    alone = dataclasses.replace(RUN, seed=77)
    under_way(store, alone, 10, 40, 2.0, None)
    timed(store, alone, T + 20, T + 22)
    now = snapshot(store, now=T + 23)
    arm = now.arms[[arm.study for arm in now.arms].index("")]
    assert (arm.name, arm.phase.kind, arm.share, arm.rate) == ("digits mlp backprop sgd seed 77", "run", 0.25, 5.0)
    assert arm.work.left == 30 * 2 / 10
    assert [study.title for study in now.studies] == ["Two arms", "other runs"]
    named = StoreWatch(store, runs=[alone.identity, "not begun"], names={alone.identity: "mine"}).snapshot(T + 23)
    assert [arm.name for arm in named.arms] == ["mine"]
    assert [(study.title, study.done, study.planned) for study in named.studies] == [("runs", 0, 2)]


@pytest.fixture(scope="module")
def sixty(tmp_path_factory: pytest.TempPathFactory) -> standing.StoreNow:
    """Sixty arms of three runs, the first twenty of them under way with a run that diverged."""
    store = Store(tmp_path_factory.mktemp("sixty"))
    long = "an arm with a long name of its own"
    made = [
        dataclasses.replace(ONE, name=f"{long} {index:02}", space={}, run=dataclasses.replace(RUN, epochs=index + 1)) for index in range(60)
    ]
    record(store, Study("many", "Many arms", tuple(made), seeds=3))
    for index, arm in enumerate(made[:20]):
        run = seeds(arm, 3)[0]
        under_way(store, run, 10 + index, 100, 1.0, 0.123456)
        timed(store, run, T + index, T + 100)
        put(store, seeds(arm, 3)[1], None, diverged="the loss is not finite")
        timed(store, seeds(arm, 3)[1], T + index, T + 50)
    return snapshot(store, now=T + 101)


def drawn(now: standing.StoreNow, width: int, height: int = 25, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, record=True, **options)
    console.print(Display(now))
    return console.export_text()


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("height", [10, 24, 100])
def test_sixty_arms_fit_every_terminal(sixty: standing.StoreNow, width: int, height: int) -> None:
    lines = drawn(sixty, width, height).splitlines()
    assert len(lines) < height
    assert max(map(cell_len, lines)) <= width
    assert lines[0].startswith("Many arms: 20 of 180 runs · 20 under way · 1:41 elapsed")
    first = next(line for line in lines if line.startswith("an arm"))
    assert "seed 2 of 3" in first or "seed 2/3" in first
    assert first.split(" seed")[0].rstrip().endswith("own 19")  # the last to have begun, with its loss, rate, time left and trouble
    assert "0.123" in first
    assert "29" in first
    assert "1 div" in first
    assert ":" in first.split("/s")[1]
    shown = sum(line.startswith("an arm") for line in lines)
    assert (lines[-1] == f"… and {60 - shown} more") == (shown < 60)
    assert shown == 60 or shown >= height - 6
    if width == 200:
        assert "an arm with a long name of its own 19" in first


def test_no_colour_where_none_is_wanted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    now = snapshot(store, now=T + 23)

    def written(**options: Any) -> str:
        console = Console(file=(file := io.StringIO()), width=100, force_terminal=True, color_system="256", **options)
        console.print(Display(now))
        return file.getvalue()

    assert re.search(r"\x1b\[[\d;]*3\d", written())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[\d;]*3\d", written())


def test_plain_lines_without_control_characters_where_there_is_no_terminal(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.01)
    monkeypatch.setenv("FORCE_COLOR", "1")
    run = seeds(ONE, 2)[1]
    with Progress({run.identity: "one seed 1"}).over(store, [run.identity], done=3):
        time.sleep(0.1)
        put(store, run, 0.25)
    written = capsys.readouterr().err
    assert written.startswith("3 finished before\n")
    assert "[1/1] one seed 1: finished, validation loss 0.250, accuracy 90.00%; test loss 0.250, accuracy 90.00%; 0.8 s\n" in written
    assert "Two arms: 4 of 10 runs" in written
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", written)


def test_quiet_is_quiet(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(quiet=True).over(store, [seeds(ONE, 2)[1].identity], done=3):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_folder_that_is_no_store_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an output folder"):
        Store(tmp_path / "nowhere", create=False)


def test_once_prints_a_snapshot_and_ends(store: Store) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "forwardgrad", "watch", str(store.root), "--once"], capture_output=True, text=True, check=True
    )
    heading, one, two = done.stdout.splitlines()
    assert heading.startswith("Two arms: 3 of 10 runs · none under way · 0:22 elapsed · ")
    assert re.match(r"one\s+stopped 0 of 2 +╸ +best 0\.400\s+0:16 left\s+1 diverged", one)
    assert two.startswith("two")
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", done.stdout)


SCRIPT = """
import sys
from pathlib import Path
from forwardgrad.lab.execution import Place, execute
from forwardgrad.lab.store import Progress
from forwardgrad.lab.studies import Optimizer, Run
from forwardgrad.lab.store import Store
from forwardgrad.lab.studies import Arm, Study
from forwardgrad.lab.tuning.campaign import run_study

run = Run("digits", "logistic", {"name": "backprop"}, Optimizer("sgd", 0.1), int(sys.argv[2]))
store, study = Store(Path(sys.argv[1])), Study("pair", "A pair", (Arm("only", "g", "backprop", "b", run),), seeds=2)
run_study(study, store, lambda runs: execute(runs, store, Place(), Progress(quiet=True)), "test")
"""


def terminal(*words: str, until: bytes, interrupt: bool = False, seconds: float = 90.0) -> tuple[int, str]:
    """Run a command in a terminal of 24 lines of 80 columns; with `interrupt`, press Ctrl-C when it has written `until`."""
    child, screen = pty.fork()
    if not child:
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
        os.execv(sys.executable, [sys.executable, "-m", "forwardgrad", *words])
    written, deadline = b"", time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            if not select.select([screen], [], [], 0.5)[0]:
                continue
            try:
                more = os.read(screen, 1 << 16)
            except OSError:  # the child has closed its terminal
                break
            if not more:
                break
            written += more
            if interrupt and until in written:
                os.write(screen, b"\x03")
                interrupt = False
        else:
            os.kill(child, signal.SIGKILL)
            pytest.fail(f"no end in {seconds} s: {written[-500:]!r}")
    finally:
        os.close(screen)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), written.decode()


@pytest.mark.full
def test_a_study_is_watched_from_another_terminal_until_it_is_done(tmp_path: Path) -> None:
    study = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), "120"])
    try:
        while not (tmp_path / "studies" / "pair.json").exists():
            assert study.poll() is None
            time.sleep(0.05)
        status, shown = terminal("watch", str(tmp_path), until=b"")
    finally:
        study.wait()
    assert status == 0
    assert "A pair: 0 of 2 runs" in shown
    assert re.search(r"only.*seed 1/2.*/s", shown)
    assert re.search(r"only.*seed 2/2.*/s", shown)
    assert shown.rindex("A pair: 2 of 2 runs") > shown.rindex("A pair: 1 of 2 runs")
    assert shown.count("\x1b[?25h") == 1  # the cursor is shown again


def test_ctrl_c_ends_the_watching_with_status_0(store: Store) -> None:
    status, shown = terminal("watch", str(store.root), until=b"Two arms", interrupt=True)
    assert status == 0
    assert "interrupted" not in shown
    assert "Traceback" not in shown
    assert shown.count("\x1b[?25h") == 1
