"""Tiny language models with random weights, and tokenizers trained on the spot: folders as `from_pretrained` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = ["the", "a", "film", "play", "was", "is", "not", "very", "good", "bad", "fine", "dull", "i", "liked", "it", "and", "but"]
SENTENCES = [f"{a} {b} {c} {d}" for a in WORDS[:2] for b in WORDS[2:4] for c in WORDS[4:6] for d in WORDS[8:12]]


def transformers() -> Any:
    """The package, or a skip that says how to get it."""
    return pytest.importorskip("transformers", reason="transformers is not installed: pip install 'forwardgrad[finetune]'")


def bert(folder: Path, *, head: tuple[str, ...] = (), **config: Any) -> Path:
    """A BERT of two layers with a WordPiece tokenizer; `head` are the labels of a classifier that it already has."""
    t, tokenizers = transformers(), pytest.importorskip("tokenizers")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trained = tokenizers.BertWordPieceTokenizer()
    trained.train_from_iterator([" ".join(WORDS)] * 3, vocab_size=120, special_tokens=pieces, show_progress=False)
    tokenizer = t.BertTokenizerFast(tokenizer_object=trained._tokenizer)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    more = {"max_position_embeddings": 32, "initializer_range": 0.3}  # of so narrow a model the usual 0.02 leaves nothing to learn from
    made = t.BertConfig(vocab_size=len(tokenizer), **{**sizes, **more, **config})
    if head:
        made.num_labels = len(head)
        made.id2label, made.label2id = dict(enumerate(head)), {name: i for i, name in enumerate(head)}
    return _saved(folder, t.BertForSequenceClassification if head else t.BertModel, made, tokenizer)


def gpt2(folder: Path) -> Path:
    """A GPT-2 of two layers with a byte-level BPE tokenizer that has an end of text, and no padding."""
    t, tokenizers = transformers(), pytest.importorskip("tokenizers")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator([" ".join(WORDS)] * 3, vocab_size=320, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    made = t.GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=32, **ends)
    return _saved(folder, t.GPT2LMHeadModel, made, tokenizer)


def llama(folder: Path) -> Path:
    """A Llama of two layers with grouped heads."""
    t, tokenizers = transformers(), pytest.importorskip("tokenizers")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator([" ".join(WORDS)] * 3, vocab_size=320, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="</s>", bos_token="<s>")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    made = t.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes, **ends)
    return _saved(folder, t.LlamaForCausalLM, made, tokenizer)


def _saved(folder: Path, kind: Any, config: Any, tokenizer: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reviews(path: Path, count: int = 48) -> Path:
    """Sentences with a label that follows from their last word: good and fine, or bad and dull."""
    separator = {".csv": ",", ".tsv": "\t"}[path.suffix]
    lines = [separator.join(("text", "label"))]
    for i in range(count):
        sentence = SENTENCES[(i * 7) % len(SENTENCES)]
        lines.append(separator.join((sentence, "pos" if sentence.split()[-1] in ("good", "fine") else "neg")))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
