"""The arrangements of text towers in SDXL (two) and Stable Diffusion 3 (three).

Source: Podell et al. 2023, sec. 2.1; Esser et al. 2024, sec. 4 and App. B.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from typing import Any, ClassVar, Literal, Self

from darkroom.conditioning.encoder import DataFacts, Parts
from darkroom.conditioning.text_towers import TextTowers, TowerConfig, TowersConfig, Use, make_tower, with_vocabulary


@dataclass
class SDXLTextConfig(TowersConfig):
    """SDXL's two towers: penultimate states of CLIP-L and of OpenCLIP bigG, joined along channels (2048 wide); bigG's
    pooled, projected text as `vector` (1280). No text is zeros.

    clip_l, clip_g: the towers; without clip_l it is the refiner's, which reads bigG alone
    weights:        of both, where they do not name their own: a pipeline's folder or a whole checkpoint
    """

    kind: str = "sdxl_text"
    no_text: Literal["empty", "zeros"] = "zeros"
    clip_l: TowerConfig | None = dataclass_field(default_factory=TowerConfig)
    clip_g: TowerConfig = dataclass_field(default_factory=TowerConfig)
    weights: str | None = None

    uses: ClassVar[dict[str, Use]] = {
        "clip_l": Use("clip", "ViT-L-14", skip_layers=1, final_norm=False),
        "clip_g": Use("open_clip", "ViT-bigG-14", skip_layers=1, final_norm=False, pool="projected"),
    }

    def completed(self, name: str, data: DataFacts) -> Self:
        return _all_completed(self)


@dataclass
class SD3TextConfig(TowersConfig):
    """SD 3's three towers: penultimate states of CLIP-L and CLIP bigG joined along channels and filled up to T5's
    width, then T5's along tokens (4096 wide); the pooled texts of both CLIPs as `vector` (2048).

    clip_l, clip_g, t5: the towers; without t5 zeros take the place of its tokens, which the model was trained for.
                  T5 reads texts of any `length`: 77 in the official code, 256 for long captions
    t5_length:    the number of those zeros
    drop_rates:   by tower, the share of training examples for which that one alone is dropped, on top of `drop_rate`,
                  which drops all together. The paper (Esser et al. 2024, App. B.3) drops each in 46.4 %: all are gone
                  in 10 %, and the model can do without T5. Where no_text is zeros a dropped tower gives zeros
    project_l:    whether CLIP-L's pooled text is projected: not in the official code; yes in the diffusers library
    context_dim:  D; null: that of T5
    weights:      of all, where they do not name their own: a pipeline's folder or a whole checkpoint
    """

    kind: str = "sd3_text"
    clip_l: TowerConfig = dataclass_field(default_factory=TowerConfig)
    clip_g: TowerConfig = dataclass_field(default_factory=TowerConfig)
    t5: TowerConfig | None = dataclass_field(default_factory=TowerConfig)
    t5_length: int = 77
    drop_rates: dict[str, float] = dataclass_field(default_factory=dict)
    project_l: bool = False
    context_dim: int | None = None
    weights: str | None = None

    uses: ClassVar[dict[str, Use]] = {
        "clip_l": Use("clip", "ViT-L-14", skip_layers=1, final_norm=False, pool="plain"),
        "clip_g": Use("clip", "ViT-bigG-14", skip_layers=1, final_norm=False, pool="projected"),
        "t5": Use("t5", "t5-v1_1-xxl"),
    }

    def completed(self, name: str, data: DataFacts) -> Self:
        return _all_completed(self)


def _all_completed(config: Any) -> Any:
    """An arrangement's config with every tower's vocabulary read into it."""
    towers = {name: getattr(config, name) for name in config.uses}
    found = {
        name: with_vocabulary(tower, tower.family or config.uses[name].family, config.weights)
        for name, tower in towers.items()
        if tower is not None
    }
    return replace(config, **found)


class SDXLTextEncoder(TextTowers):
    config_class = SDXLTextConfig

    @classmethod
    def build(cls, config: SDXLTextConfig, parts: Parts) -> SDXLTextEncoder:
        towers = {
            name: make_tower(tower, use, parts)
            for name, use in config.uses.items()
            if (tower := getattr(config, name)) is not None
        }
        return cls(config, towers, [list(towers)], ["clip_g"])


class SD3TextEncoder(TextTowers):
    config_class = SD3TextConfig

    @classmethod
    def build(cls, config: SD3TextConfig, parts: Parts) -> SD3TextEncoder:
        uses = dict(config.uses)
        if config.project_l:
            uses["clip_l"] = replace(uses["clip_l"], pool="projected")
        towers = {
            name: make_tower(tower, use, parts)
            for name, use in uses.items()
            if (tower := getattr(config, name)) is not None
        }
        rows = [["clip_l", "clip_g"], *([["t5"]] if "t5" in towers else [])]
        width = config.context_dim or (4096 if config.t5 is None else None)
        blank = config.t5_length if config.t5 is None else 0
        return cls(config, towers, rows, ["clip_l", "clip_g"], width, blank, config.drop_rates)
