"""Textual inversion (Gal et al. 2022): a word whose vectors were learned, in a file of a few kilobytes.

    {"<cat>": (D,) or (k, D)}                                     diffusers (learned_embeds.bin or .safetensors)
    {"string_to_param": {"*": (k, D)}, "name": "cat", ...}        A1111 (.pt)
    {"emb_params": (k, D)}                                        A1111 (.safetensors)
    {"clip_l": (k, 768), "clip_g": (k, 1280)}                     SDXL and SD 3: by tower

The word is the file's own, else the file's name. Each of the k vectors takes the place of one token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from darkroom.config import understanding
from darkroom.errors import DarkroomError
from darkroom.safe_files import SAFETENSORS, is_weight_file, read_safetensors
from darkroom.safe_pickle import read_checkpoint

TOWERS = {"clip_l": "clip_l", "clip_g": "clip_g", "t5xxl": "t5", "t5": "t5"}  # key: our name of the tower
MOST_VECTORS = 1000
MOST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class LearnedWord:
    """vectors: by the name of a tower, or "" for the only one; each (k, D)."""

    path: Path
    word: str
    vectors: dict[str, Tensor]


def read_learned_word(path: Path, word: str | None = None) -> LearnedWord:
    """`word`: instead of the one in the file."""
    if not path.is_file() or not is_weight_file(path):
        raise DarkroomError(f"{path} is not a file of a learned embedding; give a .safetensors, .pt or .bin")
    if path.stat().st_size > MOST_BYTES:
        raise DarkroomError(f"{path} is too large for a learned embedding ({path.stat().st_size >> 20} MB)")
    with understanding(path, "a learned embedding"):
        content = read_safetensors(path) if path.suffix.lower() == SAFETENSORS else read_checkpoint(path)
        own, vectors = _parts(content, path)
    chosen = word or own or path.stem
    if not chosen.strip() or chosen != chosen.strip() or not chosen.isprintable():
        raise DarkroomError(f"{path}: {chosen!r} cannot be a word in a text; name another one")
    return LearnedWord(path, chosen, {name: _rows(tensor, path) for name, tensor in vectors.items()})


def _parts(content: Any, path: Path) -> tuple[str | None, dict[str, Any]]:
    """(word or None, vectors by tower)."""
    if not isinstance(content, dict) or not content:
        raise DarkroomError(f"{path} holds no table; it is not a learned embedding")
    if "string_to_param" in content:
        table = content["string_to_param"]
        if not isinstance(table, dict) or len(table) != 1:
            raise DarkroomError(f"{path} holds {len(table)} learned embeddings; give files of one")
        name = content.get("name")
        return (name if isinstance(name, str) else None), {"": next(iter(table.values()))}
    if set(content) <= set(TOWERS):
        return None, {TOWERS[key]: value for key, value in content.items()}
    if len(content) != 1:
        raise DarkroomError(f"{path} holds {', '.join(map(str, list(content)[:4]))}; that is not a learned embedding")
    (name, value), *_ = content.items()
    return (None if name == "emb_params" else str(name)), {"": value}


def _rows(value: Any, path: Path) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim not in (1, 2) or not value.is_floating_point():
        raise DarkroomError(f"{path}: vectors of shape (D,) or (k, D) were expected")
    rows = value.detach().float().reshape(-1, value.shape[-1])
    if not 1 <= len(rows) <= MOST_VECTORS or not bool(rows.isfinite().all()):
        raise DarkroomError(f"{path}: one to {MOST_VECTORS} finite vectors were expected, there are {len(rows)}")
    return rows.clone()
