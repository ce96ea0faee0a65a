"""A transformers folder on the disk: what it holds, and the model made of it. No pickle is read, and nothing but this folder.

The configuration and the tokenizer are read first: they are small, and most mistakes show there.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forwardgrad.lab.data import need
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.finetuning.asked import FineTuning, Task
from forwardgrad.lab.studies import stream

EXTRA = "finetune"
LOCAL = {"local_files_only": True, "trust_remote_code": False}
HEADS = {"classification": ("ForSequenceClassification",), "causal-lm": ("ForCausalLM", "LMHeadModel")}
LONGEST = 512  # tokens of a row where neither the user nor the model says less
OFFSET = {"roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "data2vec-text"}  # their positions begin behind that of the padding


@dataclass(frozen=True)
class ModelFolder:
    """What a folder holds, but for its weights, and what the run makes of it."""

    folder: Path
    task: Task
    config: Any
    tokenizer: Any
    classes: tuple[str, ...]  # of a classifier, in the order of its outputs
    fresh: bool  # whether its head is a new one
    limit: int  # tokens of a row that the model can take
    caches: bool | None  # whether it is published to keep keys and values as it writes; a step has no use for them

    @property
    def typed(self) -> bool:
        """Whether the model tells the first text of a pair from the second by a number beside each token."""
        return int(getattr(self.config, "type_vocab_size", 0) or 0) > 1


def read_folder(folder: Path, task: Task, labels: Sequence[str]) -> ModelFolder:
    """The configuration and the tokenizer of a folder. `labels` are those of the data, each once or more.

    Raises UserError for a folder that is none, has no safetensors, holds code of its own, or has no head for the task.
    """
    check_folder(folder)
    transformers = need("transformers", EXTRA)
    with quiet():
        config = _read(lambda: transformers.AutoConfig.from_pretrained(folder, **LOCAL), folder, "configuration")
        tokenizer = _read(lambda: transformers.AutoTokenizer.from_pretrained(folder, **LOCAL), folder, "tokenizer")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(f"the tokenizer of {folder.name} has neither a padding token nor an end: rows of one batch cannot be padded")
        tokenizer.pad_token = tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id
    caches = getattr(config, "use_cache", None)
    if caches is not None:
        config.use_cache = False
    heads = config.architectures or []
    has_head = any(name.endswith(HEADS[task]) for name in heads)
    if task == "causal-lm":
        if not has_head:
            made_for = ", ".join(heads) or "nothing that it names"
            raise UserError(f"{folder.name} holds weights of {made_for}, and no causal language model: give data with a label column")
        return ModelFolder(folder, task, config, tokenizer, (), False, _limit(config, tokenizer), caches)
    classes, fresh = _classes(config, has_head, labels)
    config.num_labels = len(classes)
    config.id2label, config.label2id = dict(enumerate(classes)), {name: i for i, name in enumerate(classes)}
    config.problem_type = "single_label_classification"
    return ModelFolder(folder, task, config, tokenizer, classes, fresh, _limit(config, tokenizer), caches)


def check_folder(folder: Path) -> None:
    """UserError unless this is a folder with a configuration and weights as safetensors."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give one that holds config.json, safetensors and a tokenizer")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} holds adapters: merge them into their model first, and give the folder of that")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: give a folder that transformers' save_pretrained wrote")
    if not list(folder.glob("*.safetensors")):
        pickled = next((path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)), None)
        why = f"only {pickled}, which is a pickle and is not read: save the model as safetensors" if pickled else "and no weights at all"
        raise UserError(f"{folder} has no .safetensors file, {why}")


def digest(folder: Path) -> str:
    """Twelve hexadecimal digits of the configuration, the tokenizer and the weights."""
    found = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors"), *folder.glob("*.txt"), *folder.glob("*.model")]):
        with path.open("rb") as file:
            found.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()[:12]


def weight_bytes(folder: Path, asked: FineTuning) -> int:
    """The bytes of the folder's parameters in the precision they are kept in, from the heads of the files: no weight is read."""
    safetensors = need("safetensors", EXTRA)
    numbers = 0
    for path in _weight_files(folder):
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                numbers += sum(_product(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  # it is no mapping
        except Exception as error:  # safetensors' own kind, which is no subclass of anything narrower
            raise UserError(f"{path} cannot be read as safetensors ({_line(error)})") from error
    return numbers * dtype_of(asked).itemsize


def _weight_files(folder: Path) -> list[Path]:
    """The files that the weights are read from; a folder may hold copies in another form."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    try:
        return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
    except FileNotFoundError:
        return sorted(folder.glob("*.safetensors"))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} does not say which file holds which weights: put back a copy of it") from error


def dtype_of(asked: FineTuning) -> torch.dtype:
    """What the parameters are kept in."""
    found: torch.dtype = getattr(torch, asked.weights)
    return found


def build(source: ModelFolder, asked: FineTuning, on: torch.device) -> nn.Module:
    """The model on its device, with adapters where they are asked for; what is new in it follows from the seed.

    The global generator is that of the run from here on.
    """
    transformers = need("transformers", EXTRA)
    kind = transformers.AutoModelForSequenceClassification if source.task == "classification" else transformers.AutoModelForCausalLM
    torch.manual_seed(stream(asked.seed, "initialisation"))
    options = {"config": source.config, "dtype": dtype_of(asked), "use_safetensors": True, "ignore_mismatched_sizes": source.fresh}
    with quiet():
        loaded = lambda: kind.from_pretrained(source.folder, output_loading_info=True, **options, **LOCAL)  # noqa: E731
        model, info = _read(loaded, source.folder, "model")
        _check_new(model, info, source)
        model = _with_adapters(model, source, asked) if asked.lora else model
    model.to(on)
    model.train(asked.dropout)
    return model  # type: ignore[no-any-return]


def _check_new(model: Any, info: Any, source: ModelFolder) -> None:
    """UserError where weights are missing that the data cannot be expected to teach: all but those of a classifier's head."""
    lacking = sorted({*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])})
    known = [name for name in lacking if not source.fresh or name.startswith(f"{model.base_model_prefix}.")]
    known = [name for name in known if "pooler" not in name]  # many encoders are published without it
    if known:
        more = f" and {len(known) - 1} more" if len(known) > 1 else ""
        raise UserError(f"{source.folder} lacks weights of {type(model).__name__}: {known[0]}{more}; it is no whole copy of such a model")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(source.tokenizer) > rows:
        raise UserError(f"the tokenizer of {source.folder} has {len(source.tokenizer):,} tokens, and its model knows {rows:,} of them")


def _with_adapters(model: Any, source: ModelFolder, asked: FineTuning) -> Any:
    peft = need("peft", EXTRA)
    kind = "SEQ_CLS" if source.task == "classification" else "CAUSAL_LM"
    options = {"r": asked.lora, "lora_alpha": asked.lora_alpha or 2 * (asked.lora or 1), "task_type": kind}
    try:
        return peft.get_peft_model(model, peft.LoraConfig(**options))
    except ValueError:  # a model that peft has no customary places for
        return peft.get_peft_model(model, peft.LoraConfig(**options, target_modules="all-linear"))


def _classes(config: Any, has_head: bool, labels: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """The labels in the order of the outputs, and whether the head for them is a new one: the folder's, where it knows all labels."""
    found = sorted(set(labels), key=lambda label: (int(label) if label.lstrip("-").isdecimal() else 0, label))
    if len(found) < 2:
        raise UserError(f"all rows have the label {found[0]!r}: a classifier needs two labels at least")
    if has_head:
        stored = [str(config.id2label[i]) for i in range(config.num_labels)]
        if set(found) <= set(stored):
            return tuple(stored), False
        if stored == [f"LABEL_{i}" for i in range(len(stored))] and set(found) <= {str(i) for i in range(len(stored))}:
            return tuple(str(i) for i in range(len(stored))), False
    return tuple(found), True


def _limit(config: Any, tokenizer: Any) -> int:
    """How many tokens of a row the model can take."""
    places = getattr(config, "max_position_embeddings", None) or LONGEST
    if config.model_type in OFFSET:
        places -= tokenizer.pad_token_id + 1
    return int(min(places, tokenizer.model_max_length))


def _read(work: Any, folder: Path, what: str) -> Any:
    """What transformers makes of a folder; it raises many kinds of errors for files that are damaged or ask for code of their own."""
    try:
        return work()
    except UserError:
        raise
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"the {what} of {folder} cannot be read: {_line(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers and peft give no advice: what a user has to know is said in this project's own sentences."""
    transformers = need("transformers", EXTRA)
    said, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(said)
        if bars:
            transformers.logging.enable_progress_bar()


def _product(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _line(error: Exception) -> str:
    """An error's message in one line, no longer than a reader wants it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} ..."
