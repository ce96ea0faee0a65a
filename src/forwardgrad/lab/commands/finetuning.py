"""The command that fine-tunes a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from forwardgrad.lab.commands.ending import DIVERGED, end
from forwardgrad.lab.commands.options import Device, Precise, Seed, estimator_of
from forwardgrad.lab.finetuning import FineTuning, OptimizerKind, RateSchedule, StoredPrecision, Task

COLUMN_OPTIONS = ("text", "second", "label", "prompt", "completion")


def finetune(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A transformers folder: config.json, safetensors and a tokenizer.")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="Rows to train on: a .csv, .tsv or .jsonl file.")],
    validation: Annotated[Path | None, typer.Option(metavar="FILE", help="Rows for validation. [default: a part of --data]")] = None,
    held_out: Annotated[float, typer.Option(help="The part of --data for validation, chosen by the seed; 0: none.")] = 0.1,
    task: Annotated[Task | None, typer.Option(help="What the rows are for. [default: classification if they have labels]")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column with the text. [default: text]")] = None,
    second_column: Annotated[str | None, typer.Option(help="Column with a second text. [default: text2, if there is one]")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column with the label, a word or a number. [default: label]")] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column with the prompt; the loss leaves it out. [default: prompt]")] = None,
    completion_column: Annotated[str | None, typer.Option(help="Column with what follows a prompt. [default: completion]")] = None,
    estimator: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="How the gradient is found, as `forwardgrad estimators` lists it. [default: rank one]"),
    ] = None,
    lora: Annotated[int | None, typer.Option(min=1, metavar="RANK", help="Train adapters of this rank, and not the weights.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Scale of the adapters, over the rank. [default: twice the rank]")] = None,
    keep_adapters: Annotated[bool, typer.Option("--keep-adapters", help="Save the adapters by themselves, and do not merge them.")] = False,
    score: Annotated[
        str | None,
        typer.Option(metavar="FILE.py:FUNCTION", help="Maximise function(predictions, rows) in place of the loss: labels, or texts."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that the model may write for a score.")] = 32,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a row; longer ones are cut. [default: the model's, 512 at most]")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the rows. [default: 3]")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps, in place of --epochs.")] = None,
    seconds: Annotated[float | None, typer.Option(help="About so much training, in place of --epochs: steps by a timed warm-up.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 16,
    optimizer: Annotated[
        OptimizerKind | None, typer.Option(help="Optimizer; adam decays weights as AdamW. [default: by the estimator]")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the first step. [default: by the estimator]")] = None,
    schedule: Annotated[RateSchedule, typer.Option(help="The learning rate stays, or falls to zero on a line.")] = "linear",
    clip: Annotated[float | None, typer.Option(help="Largest norm of an estimate; longer ones are cut. [default: none]")] = None,
    weight_decay: Annotated[float, typer.Option(help="Decoupled weight decay.")] = 0.0,
    dropout: Annotated[bool, typer.Option("--dropout/--no-dropout", help="Train with the model's dropout: noise on top.")] = False,
    evaluate_every: Annotated[int | None, typer.Option(min=1, help="Steps between two evaluations. [default: an epoch]")] = None,
    precision: Precise = "float32",
    weights: Annotated[StoredPrecision, typer.Option(help="What parameters are kept in.")] = "float32",
    seed: Seed = 0,
    device: Device = "cpu",
    log: Annotated[Literal["csv", "jsonl"], typer.Option(help="How the log is written.")] = "csv",
    plan: Annotated[bool, typer.Option("--plan", help="Say what memory the run takes, and end.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of this run alone: the model goes to its folder `model`.")] = Path("finetuned"),
) -> None:
    """Fine-tune a language model or a text classifier without a backward pass, and save a folder that from_pretrained reads.

    Exit status: 0 where it finished, 3 where it diverged.
    """
    named = dict(zip(COLUMN_OPTIONS, (text_column, second_column, label_column, prompt_column, completion_column), strict=True))
    options: dict[str, Any] = {
        "estimator": estimator_of(estimator) if estimator is not None else None,
        "task": task,
        "columns": {what: column for what, column in named.items() if column is not None},
        "validation": validation,
        "held_out": held_out,
        "lora": lora,
        "lora_alpha": lora_alpha,
        "keep_adapters": keep_adapters,
        "score": score,
        "max_length": max_length,
        "max_new_tokens": max_new_tokens,
        "epochs": epochs,
        "steps": steps,
        "seconds": seconds,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "lr": lr,
        "schedule": schedule,
        "clip": clip,
        "weight_decay": weight_decay,
        "dropout": dropout,
        "evaluate_every": evaluate_every,
        "precision": precision,
        "weights": weights,
        "seed": seed,
    }
    asked = FineTuning(model, data, **options)
    from forwardgrad.lab.finetuning import finetune as carried_out

    result = carried_out(asked, out, device=device, log=log, plan_only=plan)
    if result["status"] == "diverged":
        end(DIVERGED, f"the run diverged at step {result['steps']:,} ({result['reason']}): that is its result, and no model was saved")
