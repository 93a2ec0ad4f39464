"""Text through published towers: CLIP, OpenCLIP, T5, alone or several together (see `text_arrangements`).

Sources: Rombach et al. 2022 (SD 1 and 2: one tower); Podell et al. 2023, sec. 2.1 (SDXL: two, joined along channels);
Esser et al. 2024, sec. 4 (SD 3: those two, and T5 along tokens).

Shapes: B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from darkroom.conditioning import vocabularies
from darkroom.conditioning.encoder import ConditionEncoder, DataFacts, EncoderConfig, Parts
from darkroom.conditioning.tokens import (
    SpecialIds,
    is_ids,
    pad_rows,
    real_tokens,
    split_words,
    text_body,
    without_padding,
)
from darkroom.conditioning.types import Conditioning
from darkroom.config import to_dict
from darkroom.errors import DarkroomError

Pool = Literal["none", "plain", "projected"]
Precision = Literal["float32", "bfloat16", "float16"]
VOCABULARY = {"clip": "clip", "open_clip": "clip", "t5": "t5"}


@dataclass
class TowerConfig:
    """One published text tower.

    family:     the names of its parameters: "clip" (those of transformers), "open_clip" or "t5"; null: the customary
    model:      a named size at the end of `networks/clip.py` or `networks/t5.py`; null: the customary one
    network:    options of the network where they differ from that size
    length:     tokens per text, with the start and end tokens
    dtype:      the precision of its weights; results are float32 in any case
    weights:    where training finds them: a folder of the transformers or diffusers library, or a weight file
    vocabulary: the folder (or file) with the vocabulary; null: beside the weights, or where DARKROOM_VOCABULARIES says
    tokenizer:  the vocabulary itself, in the JSON of the tokenizers library, as models keep it
    """

    family: str | None = None
    model: str | None = None
    network: dict[str, Any] = dataclass_field(default_factory=dict)
    length: int = 77
    dtype: Precision = "float32"
    weights: str | None = None
    vocabulary: str | None = None
    tokenizer: Any = None


@dataclass(frozen=True)
class Use:
    """What an arrangement takes of a tower: see `forward` of the networks."""

    family: str
    model: str
    skip_layers: int = 0
    final_norm: bool = True
    pool: Pool = "none"


def with_vocabulary(config: TowerConfig, family: str, weights: str | None = None) -> TowerConfig:
    """The config with the vocabulary read into it, if it can be found; a stated one must be there."""
    if config.tokenizer is not None:
        return config
    name = VOCABULARY[family]
    place: Path | None
    if config.vocabulary is not None:
        place = Path(config.vocabulary)
    else:
        place = vocabularies.find_vocabulary(name, _beside(config.weights or weights, name))
    if place is None:
        return config
    return replace(config, tokenizer=vocabularies.read_vocabulary(place, name).to_str())


def _beside(weights: str | None, vocabulary: str) -> list[Path]:
    """Where a vocabulary lies by custom: with the weights, or in diffusers' folders tokenizer, _2 and _3 (T5)."""
    if weights is None:
        return []
    path = Path(weights).expanduser()
    folder = path if path.is_dir() else path.parent
    tokenizers = ("tokenizer_3",) if vocabulary == "t5" else ("tokenizer", "tokenizer_2")
    return [folder, *(root / name for root in (folder, folder.parent) for name in tokenizers)]


class TextTower(nn.Module):
    """One tower with its vocabulary: texts -> (context (B, L, D), pooled or None, mask (B, L)).

    Without a vocabulary it reads token ids, and the empty text, whose ids are known.
    """

    def __init__(self, network: nn.Module, config: TowerConfig, use: Use) -> None:
        super().__init__()
        self.network = network.to(getattr(torch, config.dtype))
        self.config, self.use = config, use
        start, end, pad = network.special_ids  # type: ignore[misc]
        self.special = SpecialIds(start, end, pad)
        self.size = int(network.config.vocab_size)  # type: ignore[union-attr,arg-type]
        if (largest := max(start or 0, end, pad)) >= self.size:
            raise DarkroomError(
                f"text: the special token id {largest} is outside of a vocabulary of {self.size}; set "
                "network.bos_token_id, network.eos_token_id and network.pad_token_id"
            )
        longest = getattr(network, "longest", None)  # T5 has none
        if longest is not None and config.length > longest:
            raise DarkroomError(f"text: length {config.length} is more than the tower {use.model} reads, {longest}")
        self._found: Tokenizer | None = None
        # Words of learned embeddings, and the ids of their vectors, which follow the vocabulary's.
        self.learned: dict[str, list[int]] = {}

    @property
    def table(self) -> tuple[nn.Module, str]:
        """Where the network keeps the vectors of its tokens: module and name."""
        place = {"clip": "text_model.embeddings.token_embedding", "open_clip": "token_embedding", "t5": "shared"}
        return self.network.get_submodule(place[self.use.family]), "weight"

    @property
    def options(self) -> dict[str, Any]:
        """What `forward` of the network is told, and `unused`."""
        if self.use.family == "t5":
            return {"skip_layers": self.use.skip_layers}
        return {"skip_layers": self.use.skip_layers, "final_norm": self.use.final_norm, "pool": self.use.pool}

    @property
    def width(self) -> int:
        return int(self.network.width)  # type: ignore[arg-type]

    @property
    def pooled_width(self) -> int:
        return int(self.network.projected_width) if self.use.pool == "projected" else self.width  # type: ignore

    @property
    def tokenizer(self) -> Tokenizer:
        """The vocabulary in the config, else the one that the environment names; DarkroomError if there is none."""
        if self._found is None:
            name = VOCABULARY[self.use.family]
            place = vocabularies.find_vocabulary(name)
            if self.config.tokenizer is not None:
                found = vocabularies.from_json(self.config.tokenizer)
            elif place is not None:
                found = vocabularies.read_vocabulary(place, name)
            else:
                raise vocabularies.missing_vocabulary(name, "`vocabulary`")
            if found.get_vocab_size() > self.size:
                raise DarkroomError(
                    f"the vocabulary has {found.get_vocab_size()} tokens, but the tower {self.use.model} was built for "
                    f"{self.size}; give the one that it was trained with"
                )
            self._found = found
        return self._found

    def tokens(self, values: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """B texts, each a string, None (the empty text) or token ids -> ids (B, L) int64, mask (B, L) bool."""
        rows = [value if is_ids(value) else self._ids_of(value) for value in values]
        ids = pad_rows(rows, self.config.length, self.special.pad, self.size)
        return ids, real_tokens(ids, self.special.end)

    def _ids_of(self, text: Any) -> list[int]:
        if not (text is None or isinstance(text, str)):
            raise DarkroomError(f"a text is a string or a list of token ids, not {text!r}")

        def tokenize(text: str) -> list[int]:
            # The ids of nothing are known without a vocabulary.
            if not text:
                return []
            ids: list[int] = []
            for piece, learned in split_words(text, self.learned):
                plain = self.tokenizer.encode(piece, add_special_tokens=False).ids if piece.strip() else []
                ids += [*plain, *learned]
            return ids

        return text_body(text or "", tokenize, self.special, self.config.length)

    def forward(self, values: Sequence[Any], use_mask: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        ids, mask = (t.to(next(self.network.parameters()).device) for t in self.tokens(values))
        seen = {"mask": mask} if use_mask and self.use.family == "t5" else {}  # a causal tower never looks behind
        features = self.network(ids, **seen, **self.options)
        return features.context.float(), None if features.pooled is None else features.pooled.float(), mask

    def trainable(self) -> list[nn.Parameter]:
        """What training changes: all that takes part in the result."""
        unused = {id(p) for p in self.network.unused(**self.options)}  # type: ignore[operator]
        return [p for p in self.network.parameters() if id(p) not in unused]


def make_tower(config: TowerConfig, use: Use, parts: Parts) -> TextTower:
    """A tower whose config may replace the arrangement's family and size."""
    use = replace(use, family=config.family or use.family, model=config.model or use.model)
    if use.family not in parts.towers:
        raise DarkroomError(f'text: family "{use.family}" is not known (known: {", ".join(parts.towers)})')
    options = dict(config.network)
    if use.family == "clip" and use.pool == "projected":
        options.setdefault("with_projection", True)
    return TextTower(parts.towers[use.family](use.model, options), config, use)


@dataclass
class TowersConfig(EncoderConfig):
    """What all of these encoders have.

    no_text:   what stands for the absence of a text: "empty", the empty text, or "zeros" in the place of its vectors
    use_mask:  hide padding from T5 and from the network. Off in all published models: padding is read like words
    trainable: train the towers with the network, instead of keeping them as they were published
    """

    field: str = "text"
    no_text: Literal["empty", "zeros"] = "empty"
    use_mask: bool = False
    trainable: bool = False


@dataclass(frozen=True)
class PartlyDropped:
    """A text, and the towers that training keeps from reading it."""

    text: Any
    towers: frozenset[str]


class TextTowers(ConditionEncoder):
    """Texts -> `context` (B, sum of the rows' L, D), and `vector` if `pooled` names towers.

    towers: by name
    rows:   each a list of towers whose vectors are joined along channels; rows follow each other along tokens
    pooled: towers whose pooled vectors are joined
    width:  D, up to which narrower rows are filled with zeros; None: that of the widest row
    blank:  a row of this many zero vectors at the end, in the place of a tower that is left out
    drop_rates: by tower, the share of training examples for which it alone is dropped

    A text is a string, token ids, or a mapping of ids by the name of the tower. Bare ids go to all towers of CLIP's
    vocabulary, each with its own padding.
    """

    def __init__(
        self,
        config: TowersConfig,
        towers: Mapping[str, TextTower],
        rows: Sequence[Sequence[str]],
        pooled: Sequence[str] = (),
        width: int | None = None,
        blank: int = 0,
        drop_rates: Mapping[str, float] | None = None,
    ) -> None:
        widest = max(sum(towers[name].width for name in row) for row in rows)
        if width is not None and width < widest:
            raise DarkroomError(f"text: the towers are {widest} wide, more than the width of {width}")
        widths = {"context": width or widest}
        if pooled:
            widths["vector"] = sum(towers[name].pooled_width for name in pooled)
        super().__init__(config.field, widths, config.drop_rate, config.guidance_scale)
        for row in rows:
            lengths = {towers[name].config.length for name in row}
            if len(lengths) > 1:
                raise DarkroomError(f"text: towers of one row have the lengths {sorted(lengths)}; give them one")
        self.config = config
        self.drop_rates = dict(drop_rates or {})
        for name, rate in self.drop_rates.items():
            if name not in towers or not 0 <= rate <= 1:
                raise DarkroomError(
                    f"text: drop_rates has {name}: {rate}; give shares between 0 and 1 for {', '.join(towers)}"
                )
        self.towers = nn.ModuleDict(dict(towers))
        self.rows, self.pooled, self.blank = rows, pooled, blank
        self.requires_grad_(False)
        self.unfreeze()

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for tower in self._towers().values() for p in tower.trainable()] if self.config.trainable else []

    def _towers(self) -> dict[str, TextTower]:
        return {name: tower for name, tower in self.towers.items() if isinstance(tower, TextTower)}

    def ready(self) -> None:
        for tower in self._towers().values():
            _ = tower.tokenizer

    def set_vocabulary(self, path: str | Path, family: str) -> dict[str, Any]:
        concerned = [tower for tower in self._towers().values() if VOCABULARY[tower.use.family] == family]
        text = vocabularies.read_vocabulary(path, family).to_str() if concerned else None
        for tower in concerned:
            tower.config.tokenizer, tower._found = text, None
            _ = tower.tokenizer
        return to_dict(self.config) if concerned else {}  # the towers' configs are parts of it

    def augment(self, values: Sequence[Any] | Tensor, generator: torch.Generator) -> Sequence[Any] | Tensor:
        """Each tower is dropped by its own rate, independently of the others; draws are made for all of them."""
        if not self.drop_rates:
            return values
        names = list(self.towers)
        rates = torch.tensor([self.drop_rates.get(name, 0.0) for name in names])
        dropped = torch.rand(len(values), len(names), generator=generator) < rates
        return [
            PartlyDropped(value, frozenset(n for n, d in zip(names, row, strict=True) if d))
            for value, row in zip(values, dropped.tolist(), strict=True)
        ]

    def _for_tower(self, values: Sequence[Any], name: str, tower: TextTower) -> list[Any]:
        """Each example's text as this tower takes it."""
        result: list[Any] = []
        for value in values:
            if isinstance(value, PartlyDropped):
                value = None if name in value.towers else value.text
            if value is None:
                result.append(None)
            elif isinstance(value, Mapping):
                family = VOCABULARY[tower.use.family]
                if name not in value and family not in value:
                    raise DarkroomError(
                        f"token ids for {', '.join(map(str, value))}: this model also needs some for {name}"
                    )
                # Named by the tower they are taken as they are, named by the vocabulary they get the tower's padding.
                result.append(value[name] if name in value else without_padding(value[family], tower.special.end))
            elif is_ids(value) and len(self.towers) > 1:
                if tower.use.family == "t5":
                    raise DarkroomError(
                        'this model reads two vocabularies: give token ids as {"clip": [...], "t5": [...]}'
                    )
                result.append(without_padding(value, tower.special.end))
            else:
                result.append(value)
        return result

    def _encode(self, values: Sequence[Any]) -> Conditioning:
        found = {}
        for name, tower in self._towers().items():
            read = tower(self._for_tower(values, name, tower), self.config.use_mask)
            found[name] = self._without_dropped(name, values, *read)
        width = self.widths["context"]
        rows, masks = [], []
        for row in self.rows:
            joined = torch.cat([found[name][0] for name in row], dim=2)
            rows.append(F.pad(joined, (0, width - joined.shape[2])))
            masks.append(found[row[0]][2])
        if self.blank:
            rows.append(rows[0].new_zeros(len(values), self.blank, width))
            masks.append(masks[0].new_zeros(len(values), self.blank))
        pooled = [vector for name in self.pooled if (vector := found[name][1]) is not None]
        return Conditioning(
            context=torch.cat(rows, dim=1),
            context_mask=torch.cat(masks, dim=1) if self.config.use_mask else None,
            vector=torch.cat(pooled, dim=1) if pooled else None,
        )

    def _without_dropped(
        self, name: str, values: Sequence[Any], context: Tensor, pooled: Tensor | None, mask: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """What a tower gave, with zeros for the examples for which it was dropped, if that is what stands for no text;
        otherwise it has read the empty text there."""
        dropped = [isinstance(value, PartlyDropped) and name in value.towers for value in values]
        if self.config.no_text == "empty" or not any(dropped):
            return context, pooled, mask
        kept = torch.tensor([not d for d in dropped], device=context.device)
        zeroed = None if pooled is None else pooled * kept[:, None]
        return context * kept[:, None, None], zeroed, mask

    def encode(self, values: Sequence[Any] | Tensor) -> Conditioning:
        """B texts, or token ids (B, L) as one tensor."""
        if self.config.trainable:
            return self._encode(list(values))
        with torch.no_grad():
            return self._encode(list(values))

    def null(self, batch_size: int) -> Conditioning:
        one = self.encode([None])
        if self.config.no_text == "zeros":
            one = Conditioning(
                context=None if one.context is None else torch.zeros_like(one.context),
                context_mask=one.context_mask,
                vector=None if one.vector is None else torch.zeros_like(one.vector),
            )
        return one.map(lambda t: t.expand(batch_size, *t.shape[1:]))

    def encode_kept(self, values: Sequence[Any] | Tensor, keep: Tensor) -> Conditioning:
        kept = keep.tolist()
        texts = self.encode([value if k else None for value, k in zip(values, kept, strict=True)])
        return Conditioning.where(keep, texts, self.null(len(kept))) if self.config.no_text == "zeros" else texts


# -------------------------------------------------------------------------------------------------------- one tower


@dataclass
class OneTowerConfig(TowersConfig, TowerConfig):
    """skip_layers: blocks left out at the end: 0 the last state (SD 1), 1 the penultimate (SD 2)
    vector:      also give the pooled text as `vector`: "plain", or "projected" to the width shared with images
    """

    skip_layers: int = 0
    vector: Pool = "none"

    default: ClassVar[Use] = Use("clip", "ViT-L-14")

    def use(self) -> Use:
        return replace(self.default, skip_layers=self.skip_layers, pool=self.vector)

    def completed(self, name: str, data: DataFacts) -> Self:
        return with_vocabulary(self, self.family or self.default.family)  # type: ignore[return-value]


@dataclass
class ClipEncoderConfig(OneTowerConfig):
    """final_norm: the context goes through the final LayerNorm, as in SD 1 and SD 2"""

    kind: str = "clip"
    final_norm: bool = True

    def use(self) -> Use:
        return replace(super().use(), final_norm=self.final_norm)


@dataclass
class OpenClipEncoderConfig(ClipEncoderConfig):
    """The defaults are those of SD 2: the penultimate state, then the final LayerNorm."""

    kind: str = "open_clip"
    skip_layers: int = 1

    default: ClassVar[Use] = Use("open_clip", "ViT-H-14")


@dataclass
class T5EncoderConfig(OneTowerConfig):
    """T5 pools nothing, so `vector` stays "none"."""

    kind: str = "t5"

    default: ClassVar[Use] = Use("t5", "t5-v1_1-xxl")


class OneTower(TextTowers):
    """Texts -> `context` (B, L, D) of one tower, and its pooled vector if asked for."""

    config_class: ClassVar[type[EncoderConfig]] = OneTowerConfig

    @classmethod
    def build(cls, config: OneTowerConfig, parts: Parts) -> OneTower:
        use = config.use()
        tower = make_tower(config, use, parts)
        if tower.use.family == "t5" and use.pool != "none":
            raise DarkroomError('text: T5 has no pooled vector; set vector: "none"')
        return cls(config, {"tower": tower}, [["tower"]], ["tower"] if use.pool != "none" else [])


class ClipEncoder(OneTower):
    """SD 1's: CLIP-L, the last state, normalised."""

    config_class = ClipEncoderConfig


class OpenClipEncoder(OneTower):
    """SD 2's: ViT-H, the penultimate state, normalised."""

    config_class = OpenClipEncoderConfig


class T5TextEncoder(OneTower):
    config_class = T5EncoderConfig
