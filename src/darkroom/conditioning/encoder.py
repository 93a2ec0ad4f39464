"""`ConditionEncoder`: turns fields of a batch into slots of a `Conditioning`, and knows what "nothing" looks like.

A new modality is a subclass of this and of `EncoderConfig`, and a row in `encoders.py`; nothing else.

Shapes: B batch, C channels, H W image size.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from darkroom.conditioning.types import Conditioning
from darkroom.errors import DarkroomError


class DataFacts(Protocol):
    """What an encoder's config may learn from the data that it is trained on: see `darkroom.data.sources`."""

    @property
    def class_names(self) -> Sequence[str]: ...
    @property
    def box_names(self) -> Sequence[str]: ...
    @property
    def map_names(self) -> Sequence[str]: ...
    @property
    def low_resolution_factor(self) -> int | None: ...
    @property
    def size(self) -> tuple[int, int]: ...
    def captions(self) -> Sequence[str]: ...


@dataclass
class EncoderConfig:
    """What every encoder has. The config of an encoder extends it, with its own `kind`.

    kind:      which encoder, a name of the table in `encoders.py`
    field:     the field of the batch that it reads
    drop_rate: share of training examples for which the null condition takes the place of the real one, which is what
               classifier-free guidance needs (Ho & Salimans 2022). A condition that is never dropped stays on both
               sides of guidance
    guidance_scale: how closely to follow this condition, when each has a scale of its own; null: that of the request
    """

    kind: str = ""
    field: str = ""
    drop_rate: float = 0.1
    guidance_scale: float | None = None

    def completed(self, name: str, data: DataFacts) -> Self:
        """The config with what the data decides: classes, a tokenizer. `name` is for messages."""
        return self

    def fitted(self, parts: Parts) -> Self:
        """The config with what the first stage decides: channels, sizes. What it states already, it keeps."""
        return self


@dataclass(frozen=True)
class Parts:
    """What an encoder may be handed when it is built, because it must not import it.

    encode:          images (B, C, H, W) in [-1, 1] -> latents (B, E, h, w), normalised or as the autoencoder gives them
    downsampling:    pixels of an image per pixel of its latent, along each side
    latent_channels, image_channels: E and C. None without a first stage: the config must then say what it needs
    transformer:     makes the text tower of the paper from the options of `networks.text.TextTransformerConfig`
    towers:          by family, makes a published text tower from the name of a size and options that differ from it
    """

    encode: Callable[[Tensor, bool], Tensor] | None = None
    downsampling: int | None = None
    latent_channels: int | None = None
    image_channels: int | None = None
    transformer: Callable[..., nn.Module] | None = None
    towers: Mapping[str, Callable[[str, Mapping[str, Any]], nn.Module]] = field(default_factory=dict)

    def needed_encode(self, kind: str) -> Callable[[Tensor, bool], Tensor]:
        if self.encode is None:
            raise DarkroomError(f"a condition of kind {kind!r} needs latents of images: give the model a first stage")
        return self.encode


class ConditionEncoder(nn.Module, ABC):
    """One encoder of a `Conditioner`.

    fields:    the fields of the batch that it reads; `encode` is given the value of one, or a dict of several
    widths:    for each slot that it fills the size the network must expect: D of `context` and `vector`, C of `concat`,
               the number of classes (with the null class) of `label`
    drop_rate, guidance_scale: see `EncoderConfig`
    """

    config_class: ClassVar[type[EncoderConfig]] = EncoderConfig

    def __init__(
        self,
        fields: str | tuple[str, ...],
        widths: dict[str, int],
        drop_rate: float,
        guidance_scale: float | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= drop_rate <= 1.0:
            raise DarkroomError(f"conditioner: drop_rate is {drop_rate}; give a share between 0 and 1")
        self.fields = (fields,) if isinstance(fields, str) else fields
        self.widths = widths
        self.drop_rate = drop_rate
        self.guidance_scale = guidance_scale

    @classmethod
    def build(cls, config: Any, parts: Parts) -> ConditionEncoder:
        """The encoder of a complete config; override it to take something of `parts`."""
        make: Callable[[Any], ConditionEncoder] = cls
        return make(config)

    @property
    def field(self) -> str:
        """The field that a person gives; with several the last, such as the mask of a masked image."""
        return self.fields[-1]

    @property
    def stays(self) -> bool:
        """Whether guidance has this condition on both sides: a map that training never dropped has no null that the
        network knows. So it is in the official inpainting, depth and upscaling models."""
        return "concat" in self.widths and self.drop_rate == 0

    @property
    def optional(self) -> bool:
        """Whether data may lack the field: its null then says all that is known."""
        return False

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(self.widths)

    @abstractmethod
    def encode(self, values: Any) -> Conditioning:
        """The batch's values of the field, B of them -> slots of B examples."""

    @abstractmethod
    def null(self, batch_size: int) -> Conditioning:
        """The absence of the condition, in the slots of `encode`. A map that is the same everywhere may have one pixel:
        (B, C, 1, 1) is spread over the latent."""

    def encode_kept(self, values: Any, keep: Tensor) -> Conditioning:
        """`encode` where keep (B,) bool is True, `null` elsewhere. Override it where dropping the value first is
        cheaper than encoding both."""
        return Conditioning.where(keep, self.encode(values), self.null(len(keep)))

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What training changes; override it where some stay as they were published, or take no part in the result."""
        return list(self.parameters())

    def unfreeze(self) -> None:
        """Prepare what training changes for gradients."""
        for parameter in self.trainable_parameters():
            parameter.requires_grad_(True)

    def ready(self) -> None:
        """Raise DarkroomError if values cannot be encoded, as for want of a vocabulary: asked before long work."""

    def set_vocabulary(self, path: str | Path, family: str) -> dict[str, Any]:
        """Read the vocabulary of a family of text towers, if it has such a tower; what changes in its config."""
        return {}

    def augment(self, values: Any, generator: torch.Generator) -> Any:
        """What training adds to the values before they are encoded, such as noise, drawn from the generator."""
        return values

    @property
    def noise_levels(self) -> int:
        """Above 0: the values get noise of a level below this, in training and when images are made."""
        return 0

    def noised(self, values: Any, level: int | None, noise: Tensor) -> Any:
        """The values with noise of a level, as generation uses them; None: the config's own level."""
        return values

    def from_request(self, field: str, value: Any, size: tuple[int, int]) -> Any:
        """What someone asked for one image of (width, height) -> one example's value of the field, as the data would
        give it. Raises DarkroomError for what cannot be."""
        return value

    def from_size(self, size: tuple[int, int]) -> Any:
        """One example's value where nobody gave one, if it follows from the (width, height) of the image that is asked
        for; None: absent."""
        return None

    def record(self, field: str, value: Any) -> Any:
        """That value as JSON, for the settings inside an image: tensors are known by their digest."""
        return {"sha256": digest_of(value), "shape": list(value.shape)} if isinstance(value, Tensor) else value

    def several(self, value: Any) -> bool:
        """Whether a value of a request is a list with one entry per image, not one value for all of them."""
        return isinstance(value, (list, tuple))


def fill(config: Any, **values: Any) -> Any:
    """The dataclass with `values` in the fields that are None. Raises DarkroomError where nobody knows one."""
    missing = {name: value for name, value in values.items() if getattr(config, name) is None}
    if any(value is None for value in missing.values()):
        raise DarkroomError(
            f'a condition of kind "{config.kind}" needs {" and ".join(missing)}: '
            "give the model a first stage, or state it in the condition's settings"
        )
    return replace(config, **missing)


def digest_of(value: Tensor) -> str:
    """SHA-256 of a tensor's numbers."""
    return hashlib.sha256(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def batch_values(batch: Mapping[str, Any], fields: Collection[str]) -> Any:
    """What `encode` is given: the value of the only field, a dict of several, or None if one is missing or None."""
    found = {name: batch.get(name) for name in fields}
    if any(value is None for value in found.values()):
        return None
    return next(iter(found.values())) if len(found) == 1 else found
