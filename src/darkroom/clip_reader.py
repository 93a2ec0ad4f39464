"""CLIP score: how well pictures fit their texts, by both towers of one published CLIP (Hessel et al. 2021).

The image tower is an extractor of `evaluation/extractors.py`, the text tower that of the conditioning
(`conditioning/text_towers.py`); this is where they meet. Nothing is downloaded: see `features/clip_image.py` for the
files. Shapes: B pictures, D width that pictures and texts are projected to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from darkroom.conditioning.encoder import Parts
from darkroom.conditioning.text_towers import TextTower, TowerConfig, Use, make_tower, with_vocabulary
from darkroom.errors import DarkroomError
from darkroom.evaluation.agreement import clip_score
from darkroom.evaluation.extractors import Extractor, open_extractor
from darkroom.features.clip_image import clip_file
from darkroom.interop.text_towers import choose, find_towers, load_tower
from darkroom.networks.text_towers import TEXT_TOWERS

SIZE = "vitl14"  # what other libraries take where nothing is said
_BASE = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "projection_dim": 512}
TEXT_NETWORKS: dict[str, dict[str, int]] = {"vitb32": _BASE, "vitb16": _BASE, "vitl14": {}}  # apart from ViT-L-14


@dataclass(frozen=True)
class ClipReader:
    """`reader(images, texts)`: uint8 (B, H, W, 3) and B texts -> (B,) float64, 100 max(cos, 0).

    images: the image tower, with the name, weights and resize rule that a record states
    """

    images: Extractor
    tower: TextTower

    @property
    def name(self) -> str:
        """What the score is called: that of other weights is another number."""
        return f"CLIP score-{self.images.name.removeprefix('clip-')}"

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B, D) float32 on the CPU. Longer ones than 77 tokens are cut."""
        pooled = self.tower(list(texts), False)[1]
        assert pooled is not None  # the tower is made to pool
        return pooled.cpu()

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        return clip_score(self.images(images).embedding, self.texts(texts))


def open_clip_reader(device: torch.device | str = "cpu", size: str = SIZE) -> ClipReader:
    """Both towers and the vocabulary of a published CLIP; a DarkroomError says which file to put where."""
    path = clip_file(size)
    config = with_vocabulary(TowerConfig(network=dict(TEXT_NETWORKS[size])), "clip", str(path))
    use = Use("clip", "ViT-L-14", pool="projected")
    if config.tokenizer is None:
        raise DarkroomError(
            f"CLIP {size}: no vocabulary beside {path}; put vocab.json and merges.txt, or tokenizer.json, there"
        )
    tower = make_tower(config, use, Parts(towers=TEXT_TOWERS))
    load_tower(tower, choose(tower, f"CLIP {size}", find_towers(path), path), f"CLIP {size}")
    tower.requires_grad_(False).eval().to(device)
    return ClipReader(open_extractor(f"clip-{size}", device), tower)
