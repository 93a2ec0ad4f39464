"""Vocabularies in diffusers folders: written from the JSON that our configs keep, in the files that the transformers
library reads. A model whose vocabulary is not at hand is written without one; its pipeline then takes embedded texts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from darkroom.conditioning.vocabularies import END, START
from darkroom.interop.diffusers_components import TOWER_FOLDERS, towers_of

SPECIAL_BERT = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}


def write_tokenizers(folder: Path, encoders: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Writes them, and gives their entries of the index."""
    index: dict[str, Any] = {}
    for encoder in encoders.values():
        if encoder["kind"] == "text":
            index["tokenizer"] = _bert(folder / "tokenizer", encoder)
        for name, (tower, use) in towers_of(encoder).items() if encoder["kind"] in TOWER_FOLDERS else ():
            place = TOWER_FOLDERS[encoder["kind"]][name].replace("text_encoder", "tokenizer")
            if tower.tokenizer is None:
                index[place] = [None, None]
            elif use.family == "t5":
                index[place] = _t5(folder / place, tower.tokenizer, tower.length)
            else:
                # OpenCLIP fills texts up with its first piece, OpenAI's CLIP with the end of a text.
                is_open = use.family == "open_clip" or "bigG" in use.model or "ViT-H" in use.model
                index[place] = _clip(folder / place, tower.tokenizer, tower.length, "!" if is_open else END)
    return index


def _write(folder: Path, name: str, value: Any) -> None:
    text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    (folder / name).write_text(text, encoding="utf-8")


def _clip(folder: Path, text: str, length: int, pad: str) -> list[str]:
    folder.mkdir()
    model = json.loads(text)["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    _write(folder, "vocab.json", model["vocab"])
    _write(folder, "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    _write(folder, "special_tokens_map.json", special)
    more = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True}
    _write(folder, "tokenizer_config.json", {**special, **more, "add_prefix_space": False, "errors": "replace"})
    return ["transformers", "CLIPTokenizer"]


def _t5(folder: Path, text: str, length: int) -> list[str]:
    folder.mkdir()
    content = json.loads(text)
    if content.get("post_processor") is None:  # the end of a text, which ours adds itself
        end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
        one = {"Sequence": {"id": "A", "type_id": 0}}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [one, end],
            "pair": [one, end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        }
    _write(folder, "tokenizer.json", content)
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    _write(folder, "special_tokens_map.json", special)
    _write(
        folder,
        "tokenizer_config.json",
        {**special, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length},
    )
    return ["transformers", "PreTrainedTokenizerFast"]


def _bert(folder: Path, encoder: Mapping[str, Any]) -> list[str | None]:
    text = encoder.get("tokenizer")
    if text is None:
        return [None, None]
    folder.mkdir()
    _write(folder, "tokenizer.json", text)
    _write(folder, "special_tokens_map.json", SPECIAL_BERT)
    more = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": encoder.get("length", 32)}
    _write(folder, "tokenizer_config.json", {**SPECIAL_BERT, **more})
    return ["transformers", "PreTrainedTokenizerFast"]
