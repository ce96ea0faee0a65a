"""Rows of files, and what is said of those that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.finetuning.asked import FineTuning
from forwardgrad.lab.finetuning.rows import divided, read_table

ASKED = FineTuning(Path("model"), Path("data"))


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_the_three_kinds_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [{"text": 'a "b", c', "label": "1"}, {"text": "two\nlines", "label": "0"}]
    found = [
        written(tmp_path, "a.csv", '\ufefftext,label\r\n"a ""b"", c",1\r\n\r\n"two\nlines",0\r\n'),
        written(tmp_path, "a.tsv", 'text\tlabel\n"a ""b"", c"\t1\n"two\nlines"\t0\n'),
        written(tmp_path, "a.jsonl", "".join(json.dumps({**row, "label": int(row["label"])}) + "\n" for row in rows)),
    ]
    for path in found:
        table = read_table(path, ASKED, None)
        assert (table.task, table.texts("text"), table.labels()) == ("classification", [r["text"] for r in rows], ["1", "0"])
    assert read_table(found[0], ASKED, None).numbers == [2, 4]  # the lines of the file, an empty one among them


@pytest.mark.parametrize(
    ("columns", "task", "used"),
    [
        ("text,label", "classification", {"text", "label"}),
        ("text,text2,label", "classification", {"text", "second", "label"}),
        ("text,id", "causal-lm", {"text"}),
        ("prompt,completion,text", "causal-lm", {"prompt", "completion"}),
    ],
)
def test_the_columns_tell_the_task(columns: str, task: str, used: set[str], tmp_path: Path) -> None:
    table = read_table(written(tmp_path, "a.csv", f"{columns}\n{','.join('x' for _ in columns.split(','))}\n"), ASKED, None)
    assert (table.task, set(table.used)) == (task, used)


MISTAKES: list[tuple[str, str, str]] = [
    ("a.txt", "text\nx\n", "a.txt is of no kind that is read: give a file that ends in .csv, .tsv or .jsonl"),
    ("a.csv", "", "has no column 'text', only none"),
    ("a.csv", "text,label\n", "a.csv has no rows"),
    ("a.csv", "text,label\nx\n", "line 2 of a.csv has 1 fields, and the first line names 2 columns"),
    ("a.csv", "text,text\nx,y\n", "two columns of one name"),
    ("a.csv", 'text,label\n"x,1\n', "cannot be read as CSV"),
    ("a.csv", "review,stars\nx,1\n", "no column 'text', only 'review', 'stars': add it, or name another one with --text-column"),
    ("a.csv", "text,label\nx,1\n ,1\n", "line 3 of a.csv has no text in the column 'text'"),
    ("a.csv", "text,label\nx,1\ny,\n", "line 3 of a.csv has no label in the column 'label'"),
    ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "y"\n', "line 2 of a.jsonl is no JSON"),
    ("a.jsonl", "[1]\n", "line 1 of a.jsonl is no JSON object"),
    ("a.jsonl", '{"text": 3, "label": 1}\n', "line 1 of a.jsonl has no text"),
    ("a.jsonl", '{"text": "x", "label": [1]}\n', "line 1 of a.jsonl has no label"),
]


@pytest.mark.parametrize(("name", "text", "said"), MISTAKES)
def test_a_mistake_in_a_file_is_one_sentence_with_its_place(name: str, text: str, said: str, tmp_path: Path) -> None:
    def read() -> None:
        table = read_table(written(tmp_path, name, text), ASKED, None)
        table.texts("text")
        table.labels()

    with pytest.raises(UserError) as told:
        read()
    assert said in str(told.value)
    assert "\n" not in str(told.value)


def test_a_file_of_another_encoding_and_one_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\ncafé,1\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.csv is not UTF-8 \(byte 14\)"):
        read_table(path, ASKED, None)
    with pytest.raises(UserError, match="there is no file"):
        read_table(tmp_path / "b.csv", ASKED, None)


def test_a_named_column_has_to_be_there(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "review,stars\nx,1\n")
    asked = FineTuning(Path("m"), path, columns={"text": "review", "label": "stars"})
    assert read_table(path, asked, None).labels() == ["1"]
    with pytest.raises(UserError, match=r"a\.csv has no column 'rating' for the label: it has 'review', 'stars'"):
        read_table(path, FineTuning(Path("m"), path, columns={"text": "review", "label": "rating"}), None)


def test_rows_held_out_are_chosen_by_the_seed_and_are_no_others(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "text,label\n" + "".join(f"row {i},{i % 3}\n" for i in range(20)))
    table = read_table(path, ASKED, None)
    one, again, other = (divided(table, 0.25, seed) for seed in (0, 0, 1))
    assert one[1] is not None
    assert again[1] is not None
    assert other[1] is not None
    assert (len(one[0]), len(one[1])) == (15, 5)
    assert sorted(one[0].texts("text") + one[1].texts("text")) == sorted(table.texts("text"))
    assert one[1].texts("text") == again[1].texts("text") != other[1].texts("text")
    assert divided(table, 0.0, 0) == (table, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 1, "steps": 2}, "a run has one length: give one of --epochs, --steps"),
        ({"lr": 0.0}, "--lr must be a positive number"),
        ({"seconds": float("inf")}, "--seconds must be a positive number"),
        ({"held_out": 1.0}, "--held-out must lie in"),
        ({"batch_size": 0}, "--batch-size must be a whole number of at least 1"),
        ({"keep_adapters": True}, "--keep-adapters belongs to --lora"),
        ({"lora_alpha": 4.0}, "--lora-alpha belongs to --lora"),
        ({"precision": "bfloat16", "weights": "bfloat16"}, "--precision bfloat16 is for weights in float32"),
        ({"weight_decay": -1.0}, "--weight-decay must be zero or positive"),
    ],
)
def test_options_have_their_limits(options: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        FineTuning(Path("m"), Path("d"), **options)  # type: ignore[arg-type]
