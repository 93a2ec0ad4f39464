"""`Conditioner`: all condition encoders of a model; merges what they give by slot.

Shapes: B batch, L tokens, D width, C channels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from darkroom.conditioning.encoder import ConditionEncoder, batch_values
from darkroom.conditioning.types import Conditioning
from darkroom.config import merge as merge_settings
from darkroom.errors import DarkroomError


class Conditioner(nn.Module):
    """`conditioner(batch, generator=None) -> Conditioning`. Without encoders it gives an empty one.

    Two encoders may fill one slot: tokens of `context` are put one after the other, `vector` and `concat` are joined
    along their channels. The order is that of `encoders`.
    """

    def __init__(self, encoders: Mapping[str, ConditionEncoder] | None = None) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(dict(encoders or {}))
        widths = [(name, e.widths["context"]) for name, e in self._items() if "context" in e.widths]
        if len({width for _, width in widths}) > 1:
            found = ", ".join(f"{name} has {width}" for name, width in widths)
            raise DarkroomError(f"conditioner: encoders of the slot 'context' differ in width ({found}); give them one")
        if sum("label" in e.widths for _, e in self._items()) > 1:
            raise DarkroomError("conditioner: two encoders fill the slot 'label'; let one use 'context' or 'vector'")

    def _items(self) -> list[tuple[str, ConditionEncoder]]:
        return [(name, encoder) for name, encoder in self.encoders.items() if isinstance(encoder, ConditionEncoder)]

    @property
    def context_dim(self) -> int | None:
        """D of the slot `context`; None if nothing fills it."""
        return next((e.widths["context"] for _, e in self._items() if "context" in e.widths), None)

    @property
    def vector_dim(self) -> int | None:
        return self._total("vector")

    @property
    def concat_channels(self) -> int:
        """Channels that the network gets besides the latent's."""
        return self._total("concat") or 0

    @property
    def label_count(self) -> int | None:
        """Number of classes of the slot `label`, the null class included; None if nothing fills it."""
        return self._total("label")

    def _total(self, slot: str) -> int | None:
        widths = [e.widths[slot] for _, e in self._items() if slot in e.widths]
        return sum(widths) if widths else None

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that a batch must have."""
        return tuple(dict.fromkeys(field for _, e in self._items() for field in e.fields))

    def forward(
        self,
        batch: Mapping[str, Any],
        generator: torch.Generator | None = None,
        absent: Collection[str] = (),
        alone_rate: float = 0.0,
    ) -> Conditioning:
        """Encode the batch's fields; a field whose value is None is null for the whole batch, and so are the encoders
        whose names are in `absent`.

        With a (CPU) generator each encoder drops each example by its drop_rate and augments its values. The draws are
        made for every encoder, also for a rate of 0, so that changing one rate leaves the other encoders' draws as they
        are. A share `alone_rate` of the examples keeps one condition alone, of those that are ever dropped.
        """
        for name, encoder in self._items():
            for field in encoder.fields:
                if field not in batch and not encoder.optional:
                    raise DarkroomError(
                        f"conditioner: the encoder {name!r} reads the field {field!r}, but the data has "
                        f"{', '.join(sorted(batch))}; add it to the data or remove the encoder"
                    )
        parts = []
        size = self._batch_size(batch)
        alone = None if generator is None else self._alone(size, alone_rate, generator)
        for name, encoder in self._items():
            keep = None if generator is None else torch.rand(size, generator=generator) >= encoder.drop_rate
            if alone is not None and keep is not None and encoder.drop_rate > 0:
                keep = torch.tensor([k if one is None else one == name for k, one in zip(keep, alone, strict=True)])
            values = batch_values(batch, encoder.fields)
            if values is None or name in absent:
                parts.append(encoder.null(size))
                continue
            if generator is not None:
                values = encoder.augment(values, generator)
            # Also where all are kept by chance: every process then uses every parameter at every step.
            whole = keep is None or encoder.drop_rate == 0
            parts.append(encoder.encode(values) if keep is None or whole else encoder.encode_kept(values, keep))
        return self._merged(parts)

    def _alone(self, size: int, rate: float, generator: torch.Generator) -> list[str | None] | None:
        """For each example the name of the encoder that it keeps alone, or None; None where there is no choice."""
        names = [name for name, encoder in self._items() if encoder.drop_rate > 0]
        if rate == 0 or len(names) < 2:
            return None
        chosen = torch.rand(size, generator=generator) < rate
        which = torch.randint(len(names), (size,), generator=generator)
        return [names[i] if is_chosen else None for i, is_chosen in zip(which.tolist(), chosen.tolist(), strict=True)]

    def set_vocabulary(self, path: str | Path, family: str = "clip") -> None:
        """Give the text towers of a family ("clip", which OpenCLIP shares; "t5"; "bert") their vocabulary, from a
        folder with its files or from one of them. A model that is saved then keeps it."""
        changes = {name: encoder.set_vocabulary(path, family) for name, encoder in self._items()}
        if not any(changes.values()):
            raise DarkroomError(f'this model has no text tower that reads the vocabulary "{family}"')
        if isinstance(config := getattr(self, "config_dict", None), dict):
            present = {"encoders": {name: change for name, change in changes.items() if change}}
            self.config_dict = merge_settings(config, present)

    def null(self, batch_size: int) -> Conditioning:
        """Every condition absent."""
        return self._merged([encoder.null(batch_size) for _, encoder in self._items()])

    def _merged(self, parts: Sequence[Conditioning]) -> Conditioning:
        """Joined where the parameters are; encoders without any give what they give where their values are."""
        device = next((p.device for p in self.parameters()), None)
        return merge([part.to(device) for part in parts])

    def _batch_size(self, batch: Mapping[str, Any]) -> int:
        sizes = {field: len(batch[field]) for field in self.fields if batch.get(field) is not None}
        if not sizes:  # conditions that data may lack
            sizes = {name: len(batch[name]) for name in ("image", "moments") if batch.get(name) is not None}
        if len(set(sizes.values())) > 1:
            raise DarkroomError(f"conditioner: fields of one batch differ in length: {sizes}")
        if self.fields and not sizes:
            raise DarkroomError("conditioner: no field of the batch has a value; use null(batch_size)")
        return next(iter(sizes.values()), 0)


def merge(parts: Sequence[Conditioning]) -> Conditioning:
    """Join the slots of several encoders for the same examples."""
    contexts = [p.context for p in parts if p.context is not None]
    mask = None
    if any(p.context_mask is not None for p in parts):
        mask = torch.cat([_mask(p) for p in parts if p.context is not None], dim=1)
    vectors = [p.vector for p in parts if p.vector is not None]
    concats = _same_size([p.concat for p in parts if p.concat is not None])
    return Conditioning(
        context=torch.cat(contexts, dim=1) if contexts else None,
        context_mask=mask,
        vector=torch.cat(vectors, dim=1) if vectors else None,
        concat=torch.cat(concats, dim=1) if concats else None,
        label=next((p.label for p in parts if p.label is not None), None),
    )


def _mask(part: Conditioning) -> Tensor:
    """(B, L): a part without a mask has only real tokens."""
    assert part.context is not None
    if part.context_mask is not None:
        return part.context_mask
    return torch.ones(part.context.shape[:2], dtype=torch.bool, device=part.context.device)


def _same_size(maps: Sequence[Tensor]) -> list[Tensor]:
    """Maps (B, C, h, w), those of one pixel spread to the size of the others."""
    sizes = {(m.shape[2], m.shape[3]) for m in maps} - {(1, 1)}
    if len(sizes) > 1:
        found = ", ".join(f"{w}x{h}" for h, w in sorted(sizes))
        raise DarkroomError(
            f"conditioner: maps of the slot 'concat' differ in size ({found}); they must be the latent's"
        )
    return [m.expand(-1, -1, *size) for size in (sizes or {(1, 1)}) for m in maps]
