"""Small published towers as the transformers library has them: networks with random weights, and vocabularies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from darkroom.build import build_conditioner
from darkroom.conditioning.vocabularies import byte_characters

MERGES = [
    ("t", "h"), ("th", "e</w>"), ("r", "e"), ("re", "d</w>"), ("o", "x</w>"), ("f", "ox</w>"), ("i", "n"),
    ("in", "g</w>"), ("a", "t</w>"), ("c", "at</w>"),
]  # fmt: skip
_CHARACTERS = byte_characters()
TOKENS = [
    *_CHARACTERS, *(c + "</w>" for c in _CHARACTERS), *("".join(p) for p in MERGES), "<|startoftext|>", "<|endoftext|>"
]  # fmt: skip
SIZE = len(TOKENS)  # 524
IDS = {"bos_token_id": SIZE - 2, "eos_token_id": SIZE - 1, "pad_token_id": SIZE - 1}
PIECES = [
    ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁the", -2.0), ("▁red", -3.0), ("▁fox", -3.5), ("▁", -4.0),
    *((letter, -6.0 - i / 50) for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")),
    *((f"<extra_id_{i}>", 0.0) for i in reversed(range(100))),
]  # fmt: skip

CLIP_L = {
    "vocab_size": SIZE, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "projection_dim": 32, **IDS,
}  # fmt: skip
CLIP_G = {**CLIP_L, "hidden_size": 48, "hidden_act": "gelu", "intermediate_size": 192, "projection_dim": 48}
OPEN_G = {"vocab_size": SIZE, "width": 48, "heads": 4, "layers": 3}
T5 = {"vocab_size": 140, "d_model": 96, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


def clip_tokenizer(pad: str = "<|endoftext|>") -> Any:
    from transformers import CLIPTokenizer

    vocabulary = {token: i for i, token in enumerate(TOKENS)}
    return CLIPTokenizer(vocab=vocabulary, merges=MERGES, pad_token=pad, model_max_length=77)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    return T5Tokenizer(vocab=PIECES, model_max_length=77)


def clip_model(settings: dict[str, Any], projection: bool = True, act: str = "quick_gelu") -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(**{"hidden_act": act, **settings})
    return randomised((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def t5_model() -> Any:
    from transformers import T5Config, T5EncoderModel

    return randomised(T5EncoderModel(T5Config(**T5, feed_forward_proj="gated-gelu")))


def randomised(model: Any) -> Any:
    """Norms and biases too, so that none of them can be forgotten."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write_clip_vocabulary(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(TOKENS)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version\n" + "\n".join(" ".join(p) for p in MERGES), encoding="utf-8")
    return folder


def write_t5_vocabulary(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    t5_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def encoder(**config: Any) -> Any:
    """The only encoder of a conditioner built from this config."""
    return build_conditioner({"encoders": {"text": config}}).eval().encoders["text"]
