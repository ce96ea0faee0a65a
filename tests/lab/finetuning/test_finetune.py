"""Whole runs on tiny models: the loss is transformers' own, the saved folder is the trained model, and a killed run goes on to its bits."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support import language_models

from forwardgrad.estimators import from_config
from forwardgrad.lab import interrupts
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.finetuning import FineTuning, finetune, memory_plan
from forwardgrad.lab.finetuning.begin import Prepared, _Trial, prepared
from forwardgrad.lab.finetuning.memory_plan import planned
from forwardgrad.lab.finetuning.model_folder import build, quiet, weight_bytes
from forwardgrad.lab.finetuning.outcomes import evaluate, quality_of_labels
from forwardgrad.lab.finetuning.tokens import batch_of
from forwardgrad.lab.studies import parse_estimator

CPU = torch.device("cpu")
BACKPROP = {"name": "backprop"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind of model, and files of rows."""
    root = tmp_path_factory.mktemp("models")
    found = {"bert": language_models.bert(root / "bert"), "gpt2": language_models.gpt2(root / "gpt2")}
    found |= {"llama": language_models.llama(root / "llama"), "head": language_models.bert(root / "head", head=("neg", "pos"))}
    found["reviews"] = language_models.reviews(root / "reviews.csv")
    pairs = [{"prompt": "the film was", "completion": " good and fine"}, {"prompt": "it is very very", "completion": " dull"}] * 6
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in language_models.SENTENCES))
    return {**found, "pairs": root / "pairs.jsonl", "texts": root / "texts.jsonl"}


def quietly(asked: FineTuning, out: Path, **options: Any) -> dict[str, Any]:
    return finetune(asked, out, say=lambda line: None, **options)


def ready(asked: FineTuning) -> Prepared:
    return prepared(asked, CPU, lambda line: None)


def bits(out: Path) -> list[bytes]:
    """All that a run comes to, but for times."""
    return [(out / "model" / "model.safetensors").read_bytes(), gzip.decompress((out / "losses.csv.gz").read_bytes())]


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_the_loss_is_the_one_that_transformers_computes(kind: str, folders: dict[str, Path]) -> None:
    """Padding, prompts that do not count and the shift by one token are transformers' own, computed by its code from labels."""
    rows = folders["reviews" if kind == "bert" else "pairs"]
    made = ready(FineTuning(folders[kind], rows, estimator=BACKPROP, held_out=0.0))
    model = build(made.source, made.asked, CPU)
    batch = batch_of(made.train, [0, 1, 2, 3], made.source, 32, CPU)
    assert batch.inputs["input_ids"].shape[1] % 8 == 0
    with torch.no_grad():
        theirs = model(**batch.inputs, labels=batch.targets).loss
        ours = made.task.loss(model, batch)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        if kind != "bert":
            assert evaluate(model, made.task, made.train, None)["loss"] == pytest.approx(_loss_of_all(model, made), rel=1e-6)
            counted = (batch.targets != -100).sum(1).tolist()
            ends = [made.source.tokenizer(row["completion"], add_special_tokens=False)["input_ids"] for row in batch.rows]
            assert counted == [len(end) + 1 for end in ends]  # and the token that ends a text
            assert batch_of(made.train, [0, 1], made.source, 32, CPU, left=True).inputs["attention_mask"][:, -1].all()


def _loss_of_all(model: torch.nn.Module, made: Prepared) -> float:
    """The loss of all rows as one batch, by transformers' own code: rows of several lengths, each token with the same weight."""
    batch = batch_of(made.train, range(len(made.train)), made.source, 32, CPU)
    return float(model(**batch.inputs, labels=batch.targets).loss)


def test_labels_are_judged_class_by_class() -> None:
    found = quality_of_labels([0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 0, 0])
    assert found["accuracy"] == pytest.approx(4 / 7)
    assert found["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    assert found["macro_f1"] == pytest.approx((2 * 3 / (2 * 3 + 2 + 1) + 2 * 1 / (2 * 1 + 1 + 1) + 0) / 3)  # 2tp / (2tp + fp + fn)


def test_weights_in_pieces_are_read_from_the_pieces_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    """A folder may hold the same weights a second time, in a form of somebody else's."""
    t = language_models.transformers()
    with quiet():
        model = t.AutoModelForCausalLM.from_pretrained(folders["llama"])
        model.save_pretrained(tmp_path / "cut", max_shard_size="20kB")
        t.AutoTokenizer.from_pretrained(folders["llama"]).save_pretrained(tmp_path / "cut")
    shutil.copy(folders["llama"] / "model.safetensors", tmp_path / "cut" / "consolidated.safetensors")
    asked = FineTuning(tmp_path / "cut", folders["texts"], BACKPROP, steps=1)
    assert len(list((tmp_path / "cut").glob("model-*.safetensors"))) > 1
    assert weight_bytes(tmp_path / "cut", asked) == 4 * sum(p.numel() for p in model.parameters())
    assert quietly(asked, tmp_path / "out")["status"] == "finished"


def test_a_classifier_learns_and_its_folder_is_the_trained_model(folders: dict[str, Path], tmp_path: Path) -> None:
    asked = FineTuning(folders["bert"], folders["reviews"], estimator=BACKPROP, lr=0.003, steps=60, evaluate_every=15, held_out=0.25)
    result = quietly(asked, tmp_path / "out", log="jsonl")
    assert result["status"] == "finished"
    assert result["after"]["validation_accuracy"] == 1.0 > result["before"]["validation_accuracy"]
    t = language_models.transformers()
    folder = tmp_path / "out" / "model"
    model, tokenizer = t.AutoModelForSequenceClassification.from_pretrained(folder), t.AutoTokenizer.from_pretrained(folder)
    assert model.config.id2label == {0: "neg", 1: "pos"}
    assert model.config.use_cache is True  # as it was published
    held = ready(asked).validation
    assert held is not None
    found = [model.config.id2label[int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax())] for row in held.rows]
    assert found == [row["label"] for row in held.rows]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"log.jsonl", "losses.csv.gz", "model", "result.json", "run.json"}
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [0, 15, 30, 45, 60]
    assert (result["steps"], result["forward_passes"], result["trained"]) == (60, 60, model.num_parameters())
    assert str(tmp_path) not in (tmp_path / "out" / "result.json").read_text()  # where files lie is nobody's business
    lines: list[str] = []
    assert finetune(asked, tmp_path / "out", say=lines.append) == result  # read, and not trained again
    assert "this run is finished" in lines[-1]


@pytest.mark.parametrize(
    ("kind", "rows", "estimator", "options"),
    [
        pytest.param("bert", "reviews", "feedback", {"clip": 0.5, "dropout": True, "weight_decay": 0.01}, marks=pytest.mark.full),
        ("gpt2", "pairs", "zeroth-order", {"lora": 2, "schedule": "constant"}),
        pytest.param("llama", "texts", "forward(perturb=low-rank(rank=1), tangents=2)", {"optimizer": "adam"}, marks=pytest.mark.full),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    kind: str, rows: str, estimator: str, options: dict[str, Any], folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = FineTuning(folders[kind], folders[rows], parse_estimator(estimator), steps=5, batch_size=4, lr=1e-3, **options)
    whole = quietly(asked, tmp_path / "whole")
    left = [3]

    def count() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(interrupts, "check", count)
        with pytest.raises(KeyboardInterrupt):
            quietly(asked, tmp_path / "killed", checkpoint_seconds=0.0)
    assert not (tmp_path / "killed" / "model").exists()
    said: list[str] = []
    result = finetune(asked, tmp_path / "killed", say=said.append)
    assert "going on from step 3 of 5" in said
    assert bits(tmp_path / "killed") == bits(tmp_path / "whole")
    assert {**result, "seconds": 0, "plan": 0, "environment": 0} == {**whole, "seconds": 0, "plan": 0, "environment": 0}


def test_a_damaged_checkpoint_is_not_gone_on_from(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = FineTuning(folders["bert"], folders["reviews"], estimator=BACKPROP, steps=3, lr=1e-3)
    with monkeypatch.context() as patch:
        patch.setattr("forwardgrad.lab.finetuning.begin.save_model", lambda *given: pytest.fail("stop"))
        with pytest.raises(pytest.fail.Exception):
            quietly(asked, tmp_path / "out", checkpoint_seconds=0.0)
    path = tmp_path / "out" / "training" / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged \(its content and its digest do not agree\)"):
        quietly(asked, tmp_path / "out")


def test_adapters_merged_are_the_adapters_on_their_model(folders: dict[str, Path], tmp_path: Path) -> None:
    peft, t = pytest.importorskip("peft"), language_models.transformers()
    asked = FineTuning(folders["bert"], folders["reviews"], BACKPROP, lora=2, steps=4, lr=0.01, held_out=0.0)
    quietly(asked, tmp_path / "merged")
    quietly(dataclasses.replace(asked, keep_adapters=True), tmp_path / "kept")
    assert not (tmp_path / "kept" / "model" / "model.safetensors").exists()
    base = t.AutoModelForSequenceClassification.from_pretrained(folders["bert"], num_labels=2)
    with quiet():
        one = peft.PeftModel.from_pretrained(base, tmp_path / "kept" / "model").eval()
    other = t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged" / "model")
    tokens = torch.arange(5, 15).view(2, 5)
    torch.testing.assert_close(one(tokens).logits, other(tokens).logits, rtol=1e-4, atol=1e-6)


@pytest.mark.full
def test_a_score_is_maximised(folders: dict[str, Path], tmp_path: Path) -> None:
    """The score is the share of rows that are called 'pos' and so no function that has a derivative."""
    (tmp_path / "liking.py").write_text("def share(predictions, rows):\n    return [float(p == 'pos') for p in predictions]\n")
    estimator = parse_estimator("zeroth-order(epsilon=0.1, tangents=4)")
    score = f"{tmp_path}/liking.py:share"
    asked = FineTuning(folders["head"], folders["reviews"], estimator, score=score, steps=30, lr=0.02, held_out=0.5)
    result = quietly(asked, tmp_path / "out")
    assert result["after"]["validation_score"] == 1.0 > result["before"]["validation_score"]
    assert result["loss"] == pytest.approx(-1.0, abs=0.5)


def test_texts_are_generated_and_scored(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "judging.py").write_text("def short(texts, rows):\n    assert rows[0]['prompt']\n    return -sum(map(len, texts))\n")
    asked = FineTuning(folders["gpt2"], folders["pairs"], score=f"{tmp_path}/judging.py:short", steps=1, max_new_tokens=3, batch_size=2)
    result = quietly(asked, tmp_path / "out")
    assert set(result["before"]) == {"validation_score"}
    assert result["forward_passes"] == 2


def test_only_zeroth_order_takes_a_score_and_only_a_good_one(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("def many(predictions, rows):\n    return [1.0]\n")
    asked = FineTuning(folders["head"], folders["reviews"], score=f"{tmp_path}/wrong.py:many", steps=1)
    with pytest.raises(UserError, match="returns 1 numbers for 5 rows: return one, or one a row"):
        quietly(asked, tmp_path / "out")
    with pytest.raises(UserError, match="a score has no derivative"):
        quietly(dataclasses.replace(asked, estimator=BACKPROP), tmp_path / "other")
    with pytest.raises(UserError, match=r"the score .* is not there"):
        quietly(dataclasses.replace(asked, score=f"{tmp_path}/wrong.py:none"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


REFUSING = """
from dataclasses import dataclass
from typing import ClassVar

import forwardgrad as fg


@dataclass(frozen=True)
class Refusing(fg.Estimator):
    name: ClassVar[str] = "refusing"
    unbiased = True

    def estimate(self, objective, generator, state):
        raise ValueError("there is a layer that\\nit does not know")
"""


def test_an_estimator_that_cannot_train_the_model_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "refusing.py").write_text(REFUSING)
    asked = FineTuning(folders["bert"], folders["reviews"], {"name": f"{tmp_path}/refusing.py:Refusing"})
    with pytest.raises(UserError, match="the estimator refusing takes no step on this model: there is a layer that it does not know"):
        quietly(asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_divergence_is_a_result(folders: dict[str, Path], tmp_path: Path) -> None:
    asked = FineTuning(folders["bert"], folders["reviews"], BACKPROP, optimizer="sgd", lr=1e9, epochs=2)
    result = quietly(asked, tmp_path / "out")
    assert (result["status"], (tmp_path / "out" / "model").exists()) == ("diverged", False)
    assert result["steps"] < 6 or "stayed above" in result["reason"]


def test_the_plan_counts_what_there_is(folders: dict[str, Path], tmp_path: Path) -> None:
    """Parameters and Adam's state by their sizes; a step by tensors alive; and nothing is written."""
    asked = FineTuning(folders["bert"], folders["reviews"], optimizer="adam")
    steps = {}
    for name in ("backprop", "zeroth-order"):
        made = ready(dataclasses.replace(asked, estimator=parse_estimator(name)))
        plan, trial = planned(lambda made=made: _Trial(made, CPU), 16, 8, CPU)
        numbers = sum(p.numel() for p in trial.model.parameters())
        assert plan.parameters >= 4 * numbers  # and buffers
        assert 8 * numbers <= plan.optimizer <= 8 * numbers + 8 * len(list(trial.model.parameters()))
        steps[name] = plan.step
    assert steps["zeroth-order"] < steps["backprop"]
    told = quietly(asked, tmp_path / "out", plan_only=True)
    assert told["status"] == "planned"
    assert not (tmp_path / "out").exists()


def test_a_batch_that_is_too_large_is_refused_before_it_is_tried(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    made, tried = ready(FineTuning(folders["bert"], folders["reviews"], BACKPROP)), list[int]()

    class Counted(_Trial):
        def step(self, rows: int) -> None:
            tried.append(rows)
            super().step(rows)

    plan, _ = planned(lambda: Counted(made, CPU), 32, 8, CPU)
    assert (plan.exact, tried) == (True, [1, 1, 2, 4, 8, 16, 32])
    tried.clear()
    monkeypatch.setattr(memory_plan, "free_bytes", lambda on: plan.total * 3 // 4)
    with pytest.raises(UserError, match="the run takes about"):
        planned(lambda: Counted(made, CPU), 32, 8, CPU)
    assert max(tried) < 32


def test_what_does_not_fit_is_refused_before_anything_is_written(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = FineTuning(folders["bert"], folders["reviews"], BACKPROP)
    total = sum(quietly(asked, tmp_path / "out", plan_only=True)["plan"][part] for part in ("parameters", "optimizer", "step"))
    monkeypatch.setattr(memory_plan, "free_bytes", lambda on: total - 1)
    with pytest.raises(UserError, match=r"the run takes .*, and .* are free: --batch-size 1\d would fit"):
        quietly(asked, tmp_path / "out")
    monkeypatch.setattr(memory_plan, "free_bytes", lambda on: 1000)
    with pytest.raises(UserError, match=r"the parameters alone take .* kB, and 1.0 kB are free"):
        quietly(asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_length_in_seconds_becomes_steps_that_are_kept(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forwardgrad.lab.finetuning.begin._pace", lambda trial, ready, on: 0.5)
    asked = FineTuning(folders["bert"], folders["reviews"], BACKPROP, seconds=2.0)
    assert quietly(asked, tmp_path / "out")["steps"] == 4
    assert json.loads((tmp_path / "out" / "run.json").read_text())["steps"] == 4


def test_weights_in_half_precision_stay_so(folders: dict[str, Path], tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    asked = FineTuning(folders["gpt2"], folders["texts"], parse_estimator("zeroth-order(epsilon=0.05)"), weights="bfloat16", steps=2)
    assert quietly(asked, tmp_path / "out")["status"] == "finished"
    with safetensors.safe_open(tmp_path / "out" / "model" / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_rows_that_are_too_long_are_cut_and_counted_once(folders: dict[str, Path], tmp_path: Path) -> None:
    said: list[str] = []
    asked = FineTuning(folders["gpt2"], folders["pairs"], BACKPROP, max_length=4, steps=1, held_out=0.25)
    result = finetune(asked, tmp_path / "out", say=said.append)
    assert len([line for line in said if "longer than 4 tokens and were cut" in line]) == 1
    assert result["truncated"] > 0
    cut = ready(asked).train
    assert max(map(len, cut.ids)) == 4
    assert all(1 <= start < len(ids) for start, ids in zip(cut.starts or [], cut.ids, strict=True))  # something is left to predict


def test_every_default_is_an_estimator_that_there_is() -> None:
    from forwardgrad.lab.finetuning import customary

    for text in (customary.ESTIMATOR, customary.SCORED):
        from_config(parse_estimator(text))
    for name in customary.RATES:
        from_config({"name": name})
