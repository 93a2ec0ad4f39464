"""Configs -> objects. Constructions only; what a config may say is in the dataclass beside what it configures.

Every part remembers the plain dict it was built from as `part.config_dict`, which is what a model folder stores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from darkroom.conditioning.conditioner import Conditioner
from darkroom.conditioning.encoder import ConditionEncoder, DataFacts, EncoderConfig, Parts
from darkroom.conditioning.encoders import ENCODERS
from darkroom.config import from_dict, nearest, to_dict
from darkroom.denoiser import Denoiser, DenoiserConfig
from darkroom.diffusion.schedules import make_schedule
from darkroom.errors import DarkroomError
from darkroom.first_stage.autoencoder import Autoencoder, AutoencoderConfig
from darkroom.first_stage.first_stage import FirstStage
from darkroom.first_stage.identity import IdentityAutoencoder, IdentityConfig
from darkroom.first_stage.preview import PreviewDecoder, PreviewDecoderConfig
from darkroom.networks.kinds import make_network
from darkroom.networks.text import TextTransformer, TextTransformerConfig
from darkroom.networks.text_towers import TEXT_TOWERS
from darkroom.pixel_format import PixelFormat


def build_first_stage(config: Mapping[str, Any]) -> FirstStage:
    """An untrained first stage (shift 0, scale 1) from the dict form of `AutoencoderConfig`; of kind "identity" from
    its number of channels. "kl" and "vq" follow from `codebook_size`; one that is stated and disagrees is an error.
    `pixels` is the dict form of `PixelFormat`; 8 bits where there is none."""
    pixels = from_dict(PixelFormat, config.get("pixels") or {}, "first_stage.pixels")
    first_stage = _build_autoencoder({k: v for k, v in config.items() if k != "pixels"})
    first_stage.pixels = pixels
    first_stage.config_dict = {**first_stage.config_dict, "pixels": to_dict(pixels)}  # type: ignore
    return first_stage


def with_grain(first_stage: FirstStage, place: Literal["levels", "output"] | None) -> FirstStage:
    """The same first stage, whose decoder has noise to draw texture from, and does not use it yet: at each of its
    levels, or (faintly) on its image. None: as it is."""
    if place is None:
        return first_stage
    return _rebuilt(first_stage, {"decoder_grain" if place == "levels" else "output_grain": True})


def without_output_grain(first_stage: FirstStage) -> FirstStage:
    """The same first stage without grain on its image: the mean, of the least squared error."""
    config: dict[str, Any] = first_stage.config_dict  # type: ignore[assignment]
    if not config.get("output_grain"):
        return first_stage
    return _rebuilt(first_stage, {"output_grain": False})


def _rebuilt(first_stage: FirstStage, changes: Mapping[str, Any]) -> FirstStage:
    """The same weights in another configuration, as far as it has them; what it has beyond them is new."""
    config: dict[str, Any] = first_stage.config_dict  # type: ignore[assignment]
    result = build_first_stage({**config, **changes})
    state = result.state_dict()
    result.load_state_dict(state | {name: value for name, value in first_stage.state_dict().items() if name in state})
    result.preview = first_stage.preview
    return result.to(first_stage.shift.device).train(first_stage.training)


def _build_autoencoder(config: Mapping[str, Any]) -> FirstStage:
    kind, values = config.get("kind"), {k: v for k, v in config.items() if k != "kind"}
    if kind == "identity":
        identity = from_dict(IdentityConfig, values, "first_stage")
        first_stage = FirstStage(IdentityAutoencoder(identity.channels))
        first_stage.config_dict = {"kind": kind, **to_dict(identity)}
        return first_stage
    autoencoder_config = from_dict(AutoencoderConfig, values, "first_stage")
    follows = "kl" if autoencoder_config.codebook_size is None else "vq"
    if kind not in (None, follows):
        raise DarkroomError(
            f'"first_stage.kind" is {kind!r} but codebook_size={autoencoder_config.codebook_size} makes it '
            f'"{follows}": remove the line (known: "kl", "vq", "identity")'
        )
    first_stage = FirstStage(Autoencoder(autoencoder_config))
    first_stage.config_dict = {"kind": follows, **to_dict(autoencoder_config)}
    return first_stage


def pixel_first_stage(channels: int, pixels: PixelFormat) -> FirstStage:
    """The identity (f = 1): the first stage of a model that works on pixels."""
    return build_first_stage({"kind": "identity", "channels": channels, "pixels": to_dict(pixels)})


def build_preview(
    config: Mapping[str, Any], shift: Tensor | float = 0.0, scale: Tensor | float = 1.0
) -> PreviewDecoder:
    """An untrained preview decoder from the dict form of `PreviewDecoderConfig`; its `first_stage` is the fingerprint
    of the encoder whose latents it is for."""
    preview_config = from_dict(PreviewDecoderConfig, {k: v for k, v in config.items() if k != "first_stage"}, "preview")
    preview = PreviewDecoder(preview_config, shift, scale)
    preview.config_dict = {**to_dict(preview_config), "first_stage": config.get("first_stage")}
    return preview


def build_denoiser(config: Mapping[str, Any]) -> Denoiser:
    """A denoiser from the dict form of `DenoiserConfig`."""
    denoiser_config = from_dict(DenoiserConfig, config, "denoiser")
    network = make_network(denoiser_config.network)
    denoiser = Denoiser(
        network,
        make_schedule(denoiser_config.schedule),
        denoiser_config.prediction_type,
        denoiser_config.sigma_data,
        denoiser_config.learned_variance,
    )
    denoiser.config_dict = to_dict(denoiser_config)
    return denoiser


def _parts(first_stage: FirstStage | None) -> Parts:
    """What condition encoders may be handed; `encode` gives the posterior's mode."""

    def transformer(**options: Any) -> TextTransformer:
        return TextTransformer(TextTransformerConfig(**options))

    if first_stage is None:
        return Parts(transformer=transformer, towers=TEXT_TOWERS)

    @torch.no_grad()
    def encode(image: Tensor, normalised: bool) -> Tensor:
        latent = first_stage.encode(image.to(first_stage.device)).mode().float()
        return latent if normalised else first_stage.denormalise(latent)

    sizes = first_stage.downsampling, first_stage.latent_channels, first_stage.image_channels
    return Parts(encode, *sizes, transformer, TEXT_TOWERS)


def build_conditioner(config: Mapping[str, Any], first_stage: FirstStage | None = None) -> Conditioner:
    """A conditioner from {"encoders": {name: the dict form of a complete encoder config}}. Encoders that need latents
    encode with `first_stage`, and do not own it."""
    unknown = set(config) - {"encoders"}
    if unknown:
        raise DarkroomError(f'unknown key "conditioner.{min(unknown)}"{nearest(min(unknown), ["encoders"])}')
    parts = _parts(first_stage)
    encoders: dict[str, ConditionEncoder] = {}
    entries: dict[str, Any] = {}
    for name, entry in config.get("encoders", {}).items():
        kind = entry.get("kind")
        if kind not in ENCODERS:
            raise DarkroomError(f'"conditioner.{name}.kind" is {kind!r}{nearest(str(kind), ENCODERS)}')
        encoder = ENCODERS[kind]
        stated = from_dict(encoder.config_class, entry, f"conditioner.{name}")
        complete = stated.fitted(parts)
        encoders[name] = encoder.build(complete, parts)
        entries[name] = dict(entry) if complete is stated else to_dict(complete)
    conditioner = Conditioner(encoders)
    conditioner.config_dict = {"encoders": entries}
    return conditioner


def conditioner_config(encoders: Mapping[str, EncoderConfig], data: DataFacts) -> dict[str, Any]:
    """The complete conditioner config of a recipe on given data: names of classes that the recipe does not state, a
    tokenizer trained on the captions."""
    return {"encoders": {name: to_dict(config.completed(name, data)) for name, config in encoders.items()}}


def denoiser_config(
    config: DenoiserConfig, stated: Mapping[str, Any], latent_channels: int, conditioner: Conditioner
) -> dict[str, Any]:
    """The recipe's denoiser with every derived width filled in.

    `stated` is the recipe's own `denoiser.network` mapping: a width that it states and that differs is an error.
    """
    network = config.network
    derived: dict[str, Any] = {
        "in_channels": latent_channels + conditioner.concat_channels,
        "out_channels": latent_channels * (2 if config.learned_variance else 1),
        "context_dim": conditioner.context_dim,
        "adm_in_channels": conditioner.vector_dim,
        # A kind of embedding ("sequential") is a choice, a number of classes follows.
        "num_classes": conditioner.label_count
        or (network.num_classes if isinstance(network.num_classes, str) else None),
    }
    if network.kind == "unet":
        derived["use_spatial_transformer"] = conditioner.context_dim is not None
    if network.num_classes == "continuous" and conditioner.vector_dim != 1:
        raise DarkroomError(
            f'"denoiser.network.num_classes" is "continuous", which embeds one number, but the conditioner gives '
            f'{conditioner.vector_dim or 0}: use "sequential"'
        )
    for key, value in derived.items():
        if key in stated and stated[key] != value:
            raise DarkroomError(
                f'"denoiser.network.{key}" is {stated[key]} in the recipe but {value} follows from the first stage '
                "and the conditioner: remove the line"
            )
    data = to_dict(config)
    data["network"] |= derived
    return data
