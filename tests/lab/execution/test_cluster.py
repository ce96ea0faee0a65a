"""Runs on Ray: the same bits as in one process, failures as results, and a lost node that costs its unfinished steps alone."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.faults import ALWAYS_DIES, DIES_ONCE, LEAVES, RUN, THROWS, folder, left, seeded, tidy

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.execution import cluster
from forwardgrad.lab.execution.dispatch import execute
from forwardgrad.lab.execution.place import Place
from forwardgrad.lab.store.progress import Progress
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.run import Optimizer, Run

QUIET = Progress(quiet=True)


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


def test_ray_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'forwardgrad\[ray\]'"):
        cluster.Cluster(Place(executor="ray"))


@pytest.mark.full
def test_ray_on_this_machine_gives_the_same_bits_and_failures_as_results(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store, serial = Store(tmp_path / "out"), Store(tmp_path / "serial")
    fine, fails = [*seeded(0, DIES_ONCE), LEAVES], seeded(THROWS, ALWAYS_DIES)
    path = folder(tmp_path / "path", store)
    place = Place(jobs=2, threads=1, executor="ray", path=path, checkpoint_seconds=0.0)
    results = execute([*fine, *fails], store, place, QUIET)
    assert capfd.readouterr() == ("", "")  # Ray says nothing of its own
    assert (path / "killed").exists()
    execute(fine, serial, Place(threads=1), QUIET)
    for run in fine:
        assert left(store, run) == left(serial, run)
        one, other = (json.loads((s.folder(run.identity) / "environment.json").read_text()) for s in (store, serial))
        assert one == other  # the command and the threads too
    assert [results[run.identity]["reason"] for run in fails] == [
        "ValueError: no such luck",
        "its worker ended without a word, as where memory runs out, 3 times in a row",
    ]
    tidy(store)
    import ray

    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster of a head without cores and nodes with one core each, that the tests join."""
    cluster._ray()
    from ray.cluster_utils import Cluster

    size = {"object_store_memory": cluster.OBJECT_STORE}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **size})
    nodes.add_node(num_cpus=1, **size)
    yield nodes
    nodes.shutdown()


@pytest.mark.full
def test_a_lost_node_costs_its_unfinished_steps_alone(tmp_path: Path, nodes: Any) -> None:
    runs, store, serial = seeded(0, 1), Store(tmp_path / "out"), Store(tmp_path / "serial")
    lost = nodes.add_node(num_cpus=1, object_store_memory=cluster.OBJECT_STORE)
    nodes.wait_for_nodes()
    place = Place(threads=1, executor="ray", address=nodes.address, checkpoint_seconds=0.0)

    def lose() -> None:  # when both nodes are at a run, each with a checkpoint
        assert wait_for(lambda: len(list(store.root.glob("runs/*/checkpoint.pt"))) == 2)
        nodes.remove_node(lost)

    loser = threading.Thread(target=lose)
    loser.start()
    longer = [cluster.dataclasses.replace(run, epochs=40) for run in runs]
    results = execute(longer, store, place, QUIET)
    loser.join()
    assert {result["status"] for result in results.values()} == {"finished"}
    execute(longer, serial, Place(threads=1), QUIET)
    for run in longer:
        assert left(store, run) == left(serial, run)
    tidy(store)


@pytest.mark.full
def test_what_is_wrong_with_all_runs_ends_the_command(tmp_path: Path, nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(threads=1, executor="ray", address=nodes.address, data_dir=tmp_path / "empty")
    run = Run("mnist", "nn", {"name": "backprop"}, Optimizer("sgd", 0.1), 1)
    with pytest.raises(UserError, match="forwardgrad data fetch mnist"):
        execute([run], Store(tmp_path / "out"), place, QUIET)
    with pytest.raises(UserError, match="no node of the Ray cluster has what a run needs, 2 cores"):
        execute([run], Store(tmp_path / "out"), cluster.dataclasses.replace(place, threads=2), QUIET)
    hidden = cluster.tempfile.mkstemp

    def elsewhere(**options: Any) -> Any:
        handle, name = hidden(**options)
        Path(name).unlink()
        return handle, name

    monkeypatch.setattr(cluster.tempfile, "mkstemp", elsewhere)
    with pytest.raises(UserError, match=r"does not see the output folder .*/out: choose with --out a folder that all nodes share"):
        execute([RUN], Store(tmp_path / "out"), place, QUIET)
    monkeypatch.undo()
    tidy(Store(tmp_path / "out"))


def test_no_cluster_at_an_address_is_one_sentence() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # a port that nobody listens at
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"cannot join a Ray cluster at '{address}' .*: start one with `ray start --head`"):
            cluster.Cluster(Place(executor="ray", address=address))


@pytest.mark.full
@pytest.mark.parametrize("executor", ["process", "ray"])
def test_ctrl_c_ends_a_command_with_all_its_processes(tmp_path: Path, executor: str) -> None:
    words = ["tune", "--data", "digits", "--model", "logistic", "--lr", "0.01,0.02", "--epochs", "5000", "--tuning-epochs", "5000"]
    words += ["--jobs", "2", "--threads", "1", "--executor", executor, "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "forwardgrad", *words],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job would ignore it
    )
    assert wait_for(lambda: len(list(tmp_path.glob("runs/*/status.json"))) == 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.endswith("interrupted; finished runs are kept, and the same command goes on from the last checkpoint\n")
    assert "Traceback" not in err
    tidy(Store(tmp_path))

    def gone() -> bool:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    assert wait_for(gone)
