"""Run descriptions: limits, JSON, identity; the store's atomic files."""

import dataclasses
import gzip
import json
import math
from pathlib import Path

import pytest

from forwardgrad.lab import store
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store.files import parse_json
from forwardgrad.lab.store.packed import packed_runs
from forwardgrad.lab.studies.run import Optimizer, Run, from_json, stream, to_json

ROOT = Path(__file__).resolve().parents[3]
RUN = Run("digits", "logistic", {"name": "backprop"}, Optimizer("sgd", 0.5), epochs=2)


def test_json_and_back() -> None:
    assert from_json(json.loads(json.dumps(to_json(RUN)))) == RUN


PUBLISHED = packed_runs(ROOT / "results")


def test_published_runs_are_there() -> None:
    assert len(PUBLISHED) == 154


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_stored_runs_keep_their_identity(name: str) -> None:
    stored = parse_json(Path("run.json"), PUBLISHED[name]["run.json"])
    assert to_json(from_json(stored)) == stored
    assert from_json(stored).identity == name


def test_an_option_that_came_later_is_described_only_where_it_is_used() -> None:
    usual = to_json(RUN)["optimizer"]
    assert usual.keys() == {"name", "lr", "decay", "momentum", "beta1", "beta2"}
    identities = {RUN.identity}
    for option, value in (("weight_decay", 0.1), ("anneal", True), ("cap", 0.01), ("warm_up", 5)):
        run = dataclasses.replace(RUN, optimizer=dataclasses.replace(RUN.optimizer, **{option: value}))  # type: ignore[arg-type]
        assert to_json(run)["optimizer"] == {**usual, option: value}
        assert from_json(json.loads(json.dumps(to_json(run)))) == run
        identities.add(run.identity)
    assert len(identities) == 5


def test_identity_is_stable_and_sees_every_field() -> None:
    assert RUN.identity == "be4c1a67debf"  # changes only with SCHEMA: stored runs are found by it
    changed = [
        dataclasses.replace(RUN, **change)
        for change in (
            {"data": "mnist"},
            {"model": "mlp"},
            {"estimator": {"name": "forward"}},
            {"epochs": 3},
            {"batch_size": 32},
            {"seed": 1},
            {"test": False},
            {"optimizer": Optimizer("sgd", 0.5, decay=1e-5)},
            {"precision": "bfloat16"},
            {"engine": "compile"},
            {"steps": 7},
            {"loss": "mine:loss"},
            {"code": "0123456789ab"},
            {"augment": "crop-flip"},
            {"label_smoothing": 0.1},
            {"evaluate_every": 100},
            {"start": "a" * 64},
        )
    ]
    assert len({run.identity for run in [RUN, *changed]}) == 1 + len(changed) == 1 + len(dataclasses.fields(Run))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": "imagenet"}, "choose one of digits, mnist, cifar10"),
        ({"model": "resnet"}, "choose one of logistic"),
        ({"engine": "jit"}, "unknown engine 'jit': choose one of eager, compile, graph"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1"),
        ({"epochs": 1.5}, "epochs must be a whole number"),
        ({"batch_size": -1}, "batch size must be a whole number"),
        ({"seed": -1}, "seed must be zero or positive"),
        ({"estimator": {}}, "needs a name"),
    ],
)
def test_a_run_outside_its_limits_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        dataclasses.replace(RUN, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "lion"}, "choose one of sgd, nesterov, adam"),
        ({"lr": 0.0}, "learning rate must be a positive number"),
        ({"lr": -1.0}, "learning rate must be a positive number"),
        ({"lr": math.nan}, "learning rate must be a positive number"),
        ({"decay": -1e-5}, "decay must be zero or positive"),
        ({"weight_decay": -0.1}, "weight decay must be zero or positive"),
        ({"weight_decay": math.nan}, "weight decay must be zero or positive"),
        ({"weight_decay": 10.0}, "below 1/lr"),
        ({"cap": 0.0}, "cap of the relative step must be a positive number"),
        ({"cap": math.inf}, "cap of the relative step must be a positive number"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\)"),
        ({"beta2": 1.0}, r"beta2 must lie in \[0, 1\)"),
    ],
)
def test_an_optimizer_outside_its_limits_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Optimizer(**{"name": "sgd", "lr": 0.1, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", [{"schema": 0}, {"data": "nothing"}, {"surprise": 1}, {"optimizer": {"name": "sgd"}}])
def test_a_foreign_or_damaged_description_is_refused(damage: dict[str, object]) -> None:
    with pytest.raises(UserError):
        from_json({**to_json(RUN), **damage})


def test_streams_differ_by_seed_and_purpose() -> None:
    seeds = {stream(seed, purpose) for seed in range(50) for purpose in ("split", "directions", "order of epoch 1")}
    assert len(seeds) == 150
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert stream(0, "split") == stream(0, "split")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    store.write_json(path, {"a": 1})

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        store.write_json(path, {"a": 2})
    assert store.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_tables_round_trip_and_compress_to_the_same_bytes(tmp_path: Path) -> None:
    rows = [[1, 2.5], [2, None]]
    for name in ("a.csv", "b.csv.gz", "c.csv.gz"):
        store.write_table(tmp_path / name, ["step", "loss"], rows)
        table = store.read_table(tmp_path / name)
        assert table["step"] == [1, 2]
        assert table["loss"][0] == 2.5
        assert math.isnan(table["loss"][1])
    assert (tmp_path / "b.csv.gz").read_bytes() == (tmp_path / "c.csv.gz").read_bytes()
    assert gzip.decompress((tmp_path / "b.csv.gz").read_bytes()) == (tmp_path / "a.csv").read_bytes()


def test_damaged_files_are_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "losses.csv.gz").write_bytes(b"\x1f\x8bnot gzip")
    for read, name in ((store.read_json, "result.json"), (store.read_json, "list.json"), (store.read_table, "losses.csv.gz")):
        with pytest.raises(UserError, match=name):
            read(tmp_path / name)


def test_an_output_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another with --out"):
        store.Store(tmp_path / "file" / "out")
    with pytest.raises(UserError, match="not an output folder"):
        store.Store(tmp_path, create=False)
