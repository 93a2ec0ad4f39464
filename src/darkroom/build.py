"""Configs -> objects. Constructions only; what a config may say is in the dataclass beside what it configures.

Every part remembers the plain dict it was built from as `part.config_dict`, which is what a model folder stores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from darkroom.conditioning.classes import ClassEncoder, ClassEncoderConfig
from darkroom.conditioning.conditioner import Conditioner
from darkroom.conditioning.encoder import ConditionEncoder
from darkroom.conditioning.text import TextEncoder, TextEncoderConfig
from darkroom.conditioning.tokenizer import WordPieceTokenizer
from darkroom.config import from_dict, nearest, to_dict
from darkroom.denoiser import Denoiser, DenoiserConfig
from darkroom.diffusion.schedules import make_schedule
from darkroom.errors import DarkroomError
from darkroom.first_stage.autoencoder import Autoencoder, AutoencoderConfig
from darkroom.first_stage.first_stage import FirstStage
from darkroom.first_stage.identity import IdentityAutoencoder, IdentityConfig
from darkroom.first_stage.preview import PreviewDecoder, PreviewDecoderConfig
from darkroom.networks.text import TextTransformer, TextTransformerConfig
from darkroom.networks.unet import UNet
from darkroom.pixel_format import PixelFormat

ENCODERS: dict[str, type[ClassEncoderConfig] | type[TextEncoderConfig]] = {
    "class": ClassEncoderConfig,
    "text": TextEncoderConfig,
}


def build_first_stage(config: Mapping[str, Any]) -> FirstStage:
    """An untrained first stage (shift 0, scale 1) from the dict form of `AutoencoderConfig`; of kind "identity" from
    its number of channels. "kl" and "vq" follow from `codebook_size`; one that is stated and disagrees is an error.
    `pixels` is the dict form of `PixelFormat`; 8 bits where there is none."""
    pixels = from_dict(PixelFormat, config.get("pixels") or {}, "first_stage.pixels")
    first_stage = _build_autoencoder({k: v for k, v in config.items() if k != "pixels"})
    first_stage.pixels = pixels
    first_stage.config_dict = {**first_stage.config_dict, "pixels": to_dict(pixels)}  # type: ignore
    return first_stage


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
    network = UNet(denoiser_config.network)
    denoiser = Denoiser(
        network, make_schedule(denoiser_config.schedule), denoiser_config.prediction_type, denoiser_config.sigma_data
    )
    denoiser.config_dict = to_dict(denoiser_config)
    return denoiser


def build_encoder(
    config: ClassEncoderConfig | TextEncoderConfig, tokenizer: WordPieceTokenizer | None
) -> ConditionEncoder:
    """One condition encoder; text needs its tokenizer."""
    if isinstance(config, ClassEncoderConfig):
        return ClassEncoder(config)
    if tokenizer is None:
        raise DarkroomError(
            "a text encoder needs its tokenizer: train it on captions, or keep it in the model's config"
        )
    tower = TextTransformer(
        TextTransformerConfig(
            vocabulary_size=tokenizer.vocabulary_size,
            width=config.width,
            depth=config.depth,
            heads=config.heads,
            head_width=config.head_width,
            length=config.length,
            dropout=config.dropout,
        )
    )
    return TextEncoder(
        tower, tokenizer, config.length, config.drop_rate, config.use_mask, config.field, vector=config.vector
    )


def build_conditioner(config: Mapping[str, Any]) -> Conditioner:
    """A conditioner from {"encoders": {name: encoder config, for text with its "tokenizer"}}."""
    unknown = set(config) - {"encoders"}
    if unknown:
        raise DarkroomError(f'unknown key "conditioner.{min(unknown)}"{nearest(min(unknown), ["encoders"])}')
    encoders: dict[str, ConditionEncoder] = {}
    for name, entry in config.get("encoders", {}).items():
        entry = dict(entry)
        tokenizer = WordPieceTokenizer.from_json(entry.pop("tokenizer")) if "tokenizer" in entry else None
        kind = entry.get("kind")
        if kind not in ENCODERS:
            raise DarkroomError(f'"conditioner.{name}.kind" is {kind!r}{nearest(str(kind), ENCODERS)}')
        encoders[name] = build_encoder(from_dict(ENCODERS[kind], entry, f"conditioner.{name}"), tokenizer)
    conditioner = Conditioner(encoders)
    conditioner.config_dict = dict(config)  # type: ignore[assignment]
    return conditioner


def conditioner_config(
    encoders: Mapping[str, ClassEncoderConfig | TextEncoderConfig],
    class_names: Sequence[str] | None,
    captions: Sequence[str] | None,
) -> dict[str, Any]:
    """The complete conditioner config of a recipe on given data: class names from the data where the recipe names none,
    tokenizer trained on the captions."""
    result: dict[str, Any] = {}
    for name, config in encoders.items():
        entry = to_dict(config)
        if isinstance(config, ClassEncoderConfig) and not config.classes:
            if not class_names:
                raise DarkroomError(
                    f'"conditioner.{name}" needs classes, but the data has none: use class folders or .cls'
                )
            entry["classes"] = list(class_names)
        if isinstance(config, TextEncoderConfig):
            if not captions:
                raise DarkroomError(
                    f'"conditioner.{name}" needs captions, but the data has none: add metadata.jsonl or .txt files'
                )
            entry["tokenizer"] = WordPieceTokenizer.train(captions, config.vocabulary_size).to_json()
        result[name] = entry
    return {"encoders": result}


def denoiser_config(
    config: DenoiserConfig, stated: Mapping[str, Any], latent_channels: int, conditioner: Conditioner
) -> dict[str, Any]:
    """The recipe's denoiser with every derived width filled in.

    `stated` is the recipe's own `denoiser.network` mapping: a width that it states and that differs is an error.
    """
    network = config.network
    derived: dict[str, Any] = {
        "in_channels": latent_channels + conditioner.concat_channels,
        "out_channels": latent_channels,
        "context_dim": conditioner.context_dim,
        "use_spatial_transformer": conditioner.context_dim is not None,
        "adm_in_channels": conditioner.vector_dim,
        # A kind of embedding ("sequential") is a choice, a number of classes follows.
        "num_classes": conditioner.label_count
        or (network.num_classes if isinstance(network.num_classes, str) else None),
    }
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
