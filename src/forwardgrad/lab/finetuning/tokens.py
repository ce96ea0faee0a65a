"""Rows as tokens, and batches of them: padded to the longest row, in steps of eight tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.finetuning.asked import FineTuning
from forwardgrad.lab.finetuning.model_folder import LONGEST, ModelFolder
from forwardgrad.lab.finetuning.rows import Row, TextTable

STEP = 8  # tokens: shapes of batches repeat, and products of matrices have sizes that machines like
IGNORED = -100  # a target that does not count, as torch's cross-entropy has it


@dataclass(frozen=True)
class Examples:
    """Rows as lists of tokens, none longer than the model's limit.

    Of a classifier, `classes` has the class of each row. Of a language model, `starts` has the first token of each row that counts.
    """

    ids: list[list[int]]
    types: list[list[int]] | None
    classes: list[int] | None
    starts: list[int] | None
    rows: list[Row]
    truncated: int  # rows that were cut

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def longest(self) -> list[int]:
        """The rows by how many tokens they have, the longest first."""
        return sorted(range(len(self)), key=lambda i: -len(self.ids[i]))


@dataclass(frozen=True)
class PaddedBatch:
    """A batch of examples as the model takes it. `targets` are classes [n], or tokens [n, length] of which some are IGNORED."""

    inputs: dict[str, Tensor]
    targets: Tensor
    rows: list[Row]


def length_of(asked: FineTuning, source: ModelFolder) -> int:
    """The tokens a row may have; UserError where the model cannot take as many as are asked for."""
    if asked.max_length is None:
        return min(source.limit, LONGEST)
    if asked.max_length > source.limit:
        raise UserError(f"--max-length {asked.max_length} is more than the {source.limit} tokens that {source.folder.name} takes")
    return asked.max_length


def encode(table: TextTable, source: ModelFolder, most: int) -> Examples:
    """The rows as tokens, at most so many each.

    A text that is too long loses its end. A prompt that is too long loses its beginning, so that it still leads to its completion.

    Raises UserError for a row without text or label, and for a label that the model has no output for.
    """
    if table.task == "classification":
        return _classified(table, source, most)
    tokenizer = source.tokenizer
    if "completion" in table.used:
        return _completed(table, source, most)
    whole = tokenizer(table.texts("prompt" if "prompt" in table.used else "text"), verbose=False)["input_ids"]
    if "prompt" in table.used:  # nothing follows but what the model says
        ids = [row[-most:] for row in whole]
        return Examples(ids, None, None, [len(row) for row in ids], table.rows, sum(len(row) > most for row in whole))
    ended = [_ended(row, tokenizer) for row in whole]
    for number, row in zip(table.numbers, ended, strict=True):
        if len(row) < 2:
            raise UserError(f"line {number} of {table.name} is a single token, so no token of it can be predicted: leave the row out")
    return Examples([row[:most] for row in ended], None, None, [1] * len(ended), table.rows, sum(len(row) > most for row in ended))


def _classified(table: TextTable, source: ModelFolder, most: int) -> Examples:
    first, second = table.texts("text"), table.texts("second") if "second" in table.used else None
    found = source.tokenizer(first, second, verbose=False)
    ids, types = list(found["input_ids"]), list(found["token_type_ids"]) if source.typed and "token_type_ids" in found else None
    too_long = [i for i, row in enumerate(ids) if len(row) > most]
    for i in too_long:
        cut = source.tokenizer(first[i], second[i] if second else None, truncation=True, max_length=most, verbose=False)
        ids[i] = cut["input_ids"]
        if types is not None:
            types[i] = cut["token_type_ids"]
    numbers = {name: index for index, name in enumerate(source.classes)}
    labels = table.labels()
    for number, label in zip(table.numbers, labels, strict=True):
        if label not in numbers:
            known = ", ".join(map(repr, source.classes[:8])) + (" ..." if len(source.classes) > 8 else "")
            raise UserError(f"line {number} of {table.name} has the label {label!r}, which no row to train on has: they have {known}")
    return Examples(ids, types, [numbers[label] for label in labels], None, table.rows, len(too_long))


def _completed(table: TextTable, source: ModelFolder, most: int) -> Examples:
    tokenizer = source.tokenizer
    prompts = tokenizer(table.texts("prompt"), verbose=False)["input_ids"]
    ends = tokenizer(table.texts("completion"), add_special_tokens=False, verbose=False)["input_ids"]
    ids, starts, cut = [], [], 0
    for prompt, end in zip(prompts, ends, strict=True):
        wanted = _ended(end, tokenizer)
        kept = wanted[: most - 1]  # one token of the prompt at least, from which the first is predicted
        before = prompt[-(most - len(kept)) :]
        cut += len(before) + len(kept) < len(prompt) + len(wanted)
        ids.append([*before, *kept])
        starts.append(len(before))
    return Examples(ids, None, None, starts, table.rows, cut)


def _ended(row: list[int], tokenizer: Any) -> list[int]:
    """The tokens with the one that ends a text behind them."""
    end = tokenizer.eos_token_id
    return row if end is None or row[-1:] == [end] else [*row, end]


def batch_of(
    examples: Examples, which: Sequence[int], source: ModelFolder, most: int, on: torch.device, *, left: bool = False
) -> PaddedBatch:
    """Some of the examples as one batch, padded on the right, or on the `left` where a model is to go on from their ends."""
    longest = max(len(examples.ids[i]) for i in which)
    length = min(-(-longest // STEP) * STEP, max(most, longest))

    def padded(rows: Sequence[list[int]], filling: int) -> Tensor:
        filled = [[filling] * (length - len(row)) + row if left else row + [filling] * (length - len(row)) for row in rows]
        return torch.tensor(filled, device=on)

    rows = [examples.ids[i] for i in which]
    inputs = {"input_ids": padded(rows, source.tokenizer.pad_token_id), "attention_mask": padded([[1] * len(row) for row in rows], 0)}
    if examples.types is not None:
        inputs["token_type_ids"] = padded([examples.types[i] for i in which], 0)
    if examples.classes is not None:
        targets = torch.tensor([examples.classes[i] for i in which], device=on)
    else:
        starts = examples.starts or []
        targets = padded([[IGNORED] * starts[i] + examples.ids[i][starts[i] :] for i in which], IGNORED)
    return PaddedBatch(inputs, targets, [examples.rows[i] for i in which])
