"""The folder that a run leaves: a model that `from_pretrained` reads, or adapters."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from forwardgrad.lab import store
from forwardgrad.lab.finetuning.asked import FineTuning
from forwardgrad.lab.finetuning.model_folder import ModelFolder, quiet

MODEL = "model"  # the folder's name in the output folder


def save_model(model: nn.Module, source: ModelFolder, asked: FineTuning, out: Path, scratch: Path) -> Path:
    """Write the model and its tokenizer whole or not at all, and return their folder. Adapters are merged unless they are to be kept."""
    partial, folder = scratch / MODEL, out / MODEL
    shutil.rmtree(partial, ignore_errors=True)
    whole: Any = model
    with quiet():
        if asked.lora and not asked.keep_adapters:
            whole = whole.merge_and_unload()
        if source.caches is not None:
            whole.config.use_cache = source.caches
        whole.save_pretrained(partial)
        source.tokenizer.save_pretrained(partial)
    for path in partial.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors writes for the owner alone
            with path.open("rb") as file:
                os.fsync(file.fileno())
    store.sync(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    store.sync(out)
    return folder
