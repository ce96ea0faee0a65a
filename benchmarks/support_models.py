"""The models of transformers and timm that `support.py` checks: tiny, with random weights, made from configurations without a download.

Each has a batch of examples, and a loss as the library itself computes it, or the cross-entropy of what the model gives.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[nn.Module], Tensor]
BATCH, LENGTH, WORDS, CLASSES = 3, 5, 17, 3
_SMALL = {"vocab_size": WORDS, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
_LONG = {"max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_PATCHES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "image_size": 8, "patch_size": 4}


def _words() -> Tensor:
    return torch.randint(3, WORDS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def _batch(kind: str) -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(1)
    labels = torch.arange(BATCH) % CLASSES
    if kind == "classes":
        return {"input_ids": _words(), "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long), "labels": labels}
    if kind == "words":
        return {"input_ids": _words(), "labels": _words()}
    if kind == "image":
        return {"pixel_values": torch.randn(BATCH, 3, 8, 8, dtype=torch.float64, generator=drawn), "labels": labels}
    if kind == "large image":
        return {"pixel_values": torch.randn(BATCH, 3, 32, 32, dtype=torch.float64, generator=drawn), "labels": labels}
    if kind == "pairs":
        return {
            "input_ids": _words(),
            "pixel_values": torch.randn(BATCH, 3, 8, 8, dtype=torch.float64, generator=drawn),
            "return_loss": True,
        }
    assert kind == "sound"
    return {"input_features": torch.randn(BATCH, 4, 16, dtype=torch.float64, generator=drawn), "labels": _words()}


# name: the model's class, its configuration's, what differs from _SMALL and _LONG (None: all of it is said here), and the batch
_TEXT: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "BERT": ("BertForSequenceClassification", "BertConfig", {}, "classes"),
    "RoBERTa": ("RobertaForSequenceClassification", "RobertaConfig", {}, "classes"),
    "DistilBERT": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 8, "hidden_dim": 12, "n_layers": 2, "n_heads": 2},
        "classes",
    ),
    "ALBERT": ("AlbertForSequenceClassification", "AlbertConfig", {"embedding_size": 6}, "classes"),
    "ELECTRA": ("ElectraForSequenceClassification", "ElectraConfig", {"embedding_size": 6}, "classes"),
    "DeBERTa-v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 8},
        "classes",
    ),
    "MobileBERT": (
        "MobileBertForSequenceClassification",
        "MobileBertConfig",
        {"embedding_size": 8, "intra_bottleneck_size": 8, "true_hidden_size": 8},
        "classes",
    ),
    "MPNet": ("MPNetForSequenceClassification", "MPNetConfig", {}, "classes"),
    "BERT (masked words)": ("BertForMaskedLM", "BertConfig", {}, "words"),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}, "words"),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {}, "words"),
    "OPT": ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 12, "word_embed_proj_dim": 8}, "words"),
    "BLOOM": ("BloomForCausalLM", "BloomConfig", {"n_layer": 2, "n_head": 2}, "words"),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {"num_key_value_heads": 1}, "words"),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {"num_key_value_heads": 1, "sliding_window": 4}, "words"),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {"num_key_value_heads": 1}, "words"),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", {"num_key_value_heads": 1, "head_dim": 4}, "words"),
    "Phi": ("PhiForCausalLM", "PhiConfig", {}, "words"),
    "Mamba": ("MambaForCausalLM", "MambaConfig", {"state_size": 4, "time_step_rank": 2}, "words"),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
        "words",
    ),
    "BART": (
        "BartForConditionalGeneration",
        "BartConfig",
        {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        | {"encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "decoder_start_token_id": 2, "forced_eos_token_id": None},
        "words",
    ),
    "ViT": ("ViTForImageClassification", "ViTConfig", _PATCHES, "image"),
    "DeiT": ("DeiTForImageClassification", "DeiTConfig", _PATCHES, "image"),
    "Swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
        "large image",
    ),
    "ConvNeXT": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2},
        "large image",
    ),
    "ResNet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]},
        "large image",
    ),
    "Whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        | {"encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 16}
        | {"decoder_start_token_id": 2, "suppress_tokens": None, "begin_suppress_tokens": None},
        "sound",
    ),
    "CLIP": ("CLIPModel", "CLIPConfig", {}, "pairs"),
}
_IMAGES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "resnet18": ("resnet18", 32, {"layers": (1, 1, 1, 1), "channels": (4, 8, 8, 8)}),
    "convnext": ("convnext_atto", 32, {"depths": (1, 1, 1, 1), "dims": (4, 8, 8, 8)}),
    "mobilenetv3": ("mobilenetv3_small_050", 32, {}),
    "efficientnet": ("efficientnet_lite0", 32, {}),
    "vit_tiny": ("vit_tiny_patch16_224", 32, {"img_size": 32, "embed_dim": 12, "depth": 2, "num_heads": 3}),
    "mixer": ("MlpMixer", 32, {"img_size": 32, "patch_size": 16, "embed_dim": 8, "num_blocks": 2}),
    "regnet": ("regnetx_002", 32, {}),
    "densenet": ("densenet121", 32, {"growth_rate": 4, "block_config": (1, 1, 1, 1)}),
}
TRANSFORMERS, TIMM = tuple(_TEXT), tuple(_IMAGES)


def of_transformers(name: str) -> tuple[nn.Module, Loss]:
    import transformers

    model_class, config_class, options, kind = _TEXT[name]
    torch.manual_seed(0)
    if name == "CLIP":
        text, vision = {**_SMALL, **_LONG, "projection_dim": 6}, {**_PATCHES, "projection_dim": 6}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
    else:
        plain = kind in ("image", "large image")
        config = getattr(transformers, config_class)(**({} if plain else {**_SMALL, **_LONG}) | {"num_labels": CLASSES} | options)
    model: nn.Module = getattr(transformers, model_class)(config).double().train()
    batch = _batch(kind)
    return model, lambda model: model(**batch).loss


def of_timm(name: str) -> tuple[nn.Module, Loss]:
    timm = import_timm()
    entry, size, options = _IMAGES[name]
    torch.manual_seed(0)
    made = timm.models.mlp_mixer.MlpMixer if entry == "MlpMixer" else partial(timm.create_model, entry, pretrained=False)
    model: nn.Module = made(num_classes=CLASSES, **options).double().train()
    x = torch.randn(BATCH, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return model, lambda model: F.cross_entropy(model(x), torch.arange(BATCH) % CLASSES)


def import_timm() -> Any:
    _without_torchvision()
    import timm

    return timm


def _without_torchvision() -> None:
    """timm imports torchvision for its data pipeline. Where it cannot be imported, an empty module stands in: no model here calls it."""
    try:
        import torchvision  # noqa: F401
    except Exception:  # not installed, or built for another torch
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.meta_path.insert(0, _Empty())


class _Empty:
    """Finds every module of torchvision, and makes it one whose names are all empty classes."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: _empty(name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Named(type):
    """A class whose attributes are their own names, as an enumeration's are unlike each other."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


def _empty(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Named(name, (), {})
