"""Recipes: small YAML files that say what differs from the defaults, read strictly. Their keys: `Recipe`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from darkroom.conditioning.encoders import AnyEncoderConfig
from darkroom.config import from_dict, merge, nearest, with_overrides
from darkroom.data.sources import DataConfig
from darkroom.denoiser import DenoiserConfig
from darkroom.errors import DarkroomError
from darkroom.first_stage.autoencoder import AutoencoderConfig
from darkroom.first_stage.grain import check_share
from darkroom.first_stage.statistics import LatentStatistics
from darkroom.objective import ObjectiveConfig
from darkroom.training.first_stage_step import FirstStageTrainConfig
from darkroom.training.loop import LoopConfig
from darkroom.training.perceptual_step import PerceptualRecipe
from darkroom.training.preview_step import PreviewRecipe

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


@dataclass(frozen=True)
class FirstStageRecipe(LoopConfig):
    """Training a first stage: its network, its losses, and the loop.

    init_from: a model whose first stage to start from (its network is then taken, not `autoencoder`). With
        `objective.train_encoder: false` its shift and scale stay too, so that denoisers trained on it keep working.
    autoencoder: the network; its in_channels and out_channels follow from `data.channels`. null: that of `init_from`
    add_grain: give the decoder of `init_from` noise to draw texture from, if it has none: at each of its "levels"
        (`autoencoder.decoder_grain`) or on its "output" (`autoencoder.output_grain`)
    grain_share: of the roughness that images of a decoder with `output_grain` lack, how much grain adds; it is measured
        when the training has ended, and needs none (`steps: 0`). 1 is all of it, less costs less in squared error
    latents: how shift and scale are measured: one mean and standard deviation ("global"), one per latent channel
        ("channel"), or one standard deviation alone, shift 0 ("std", the paper's)
    """

    init_from: str | None = None
    add_grain: Literal["levels", "output"] | None = None
    grain_share: float = 0.9
    latents: LatentStatistics = "global"
    autoencoder: AutoencoderConfig | None = field(default_factory=AutoencoderConfig)
    objective: FirstStageTrainConfig = field(default_factory=FirstStageTrainConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.grain_share)  # it is used when the training has ended


@dataclass(frozen=True)
class FirstStageChoice:
    """Exactly one of: train one, take a bundled one by name, take one from a path. None at all: work on pixels.

    latents: measure shift and scale of a given one again, on this data ("global", "channel", "std"); null keeps them
    """

    train: FirstStageRecipe | None = None
    name: str | None = None
    path: str | None = None
    latents: LatentStatistics | None = None

    @property
    def given(self) -> str | None:
        """The model whose first stage is taken or trained on, None for a fresh one and for pixels."""
        return self.name or self.path or (None if self.train is None else self.train.init_from)

    def __post_init__(self) -> None:
        given = [n for n in ("train", "name", "path") if getattr(self, n) is not None]
        if len(given) > 1:
            raise DarkroomError(f"first_stage has {' and '.join(given)}: give one of them (set the other to null)")
        if self.latents is not None and self.name is None and self.path is None:
            raise DarkroomError(
                '"first_stage.latents" is for a given first stage; else set "first_stage.train.latents"'
            )


@dataclass(frozen=True)
class ScoringConfig:
    """Scores of generated images while the denoiser is trained, against held-out ones.

    every: train steps between scores; they are also made at the end
    count: images that are made, at most as many as are held out
    metrics: names of `darkroom eval --metrics`: fd, kd, is, pr, dc, accuracy, agreement, pairs, clip, bits
    extractor: the network that looks at the images, a name of `darkroom eval --extractor`
    steps: of the solver; null: those of the samples
    batch_size: images that are made at a time
    where: "process": beside the training, in a process of its own; "inline": in its pauses; "auto": beside it where a
        processor or a GPU is idle
    """

    every: int = 1000
    count: int = 256
    metrics: tuple[str, ...] = ("fd", "kd")
    extractor: str = "auto"
    steps: int | None = None
    batch_size: int = 16
    where: Literal["auto", "process", "inline"] = "auto"

    def __post_init__(self) -> None:
        least = {"every": 1, "count": 2, "batch_size": 1, "steps": 1}
        for name, low in least.items():
            if (value := getattr(self, name)) is not None and value < low:
                raise DarkroomError(f'"evaluate.scores.{name}" is {value}: it must be at least {low}')


@dataclass(frozen=True)
class EvaluateConfig:
    """How the sample grids are made, and what the model uses by default afterwards.

    scores: also score generated images while the denoiser is trained; null: no
    """

    samples: int = 16
    solver: str = "dpm++2m"
    steps: int = 20
    guidance_scale: float = 4.0
    prompts: tuple[str, ...] | None = None  # None: captions (or classes) of the validation split
    scores: ScoringConfig | None = None

    def __post_init__(self) -> None:
        if self.samples < 1 or self.steps < 1:
            raise DarkroomError(
                f'"evaluate" asks for {self.samples} samples of {self.steps} steps: both must be at least 1'
            )


@dataclass(frozen=True)
class Recipe(LoopConfig):
    """A resolved recipe. The loop's own fields (steps, batch_size, optimizer, ...) are the denoiser's;
    `steps: 0` trains a first stage alone.

    base: another recipe (name, or path beside this file) that this one changes; mappings merge; null switches a setting
        off, takes an encoder out of `conditioner`, and otherwise means the default. Not in a resolved recipe.
    data: where the images are and what is made of them
    first_stage: one of `train` (how to train one), `name` (bundled) or `path` (a model folder); none: pixels (f1)
    denoiser: network, noise schedule and prediction type
    conditioner: encoders by name, each with its `kind`
    objective: loss weighting and time sampling
    init_from: a model whose denoiser and conditioner to start from
    perceptual: train a perceptual network instead of a latent diffusion model; only this and `data` then count
    preview: train a preview decoder for the first stage, given or trained before
    evaluate: how samples are made during and after training
    expect: what the recipe reached when it was last run: metric, value, protocol, hardware, minutes
    """

    name: str = "custom"
    description: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    first_stage: FirstStageChoice = field(default_factory=FirstStageChoice)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    conditioner: dict[str, AnyEncoderConfig] = field(default_factory=dict)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    init_from: str | None = None
    perceptual: PerceptualRecipe | None = None
    preview: PreviewRecipe | None = None
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    expect: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.first_stage.name or self.first_stage.path
        if self.preview is not None and self.preview.install and given is None:
            raise DarkroomError(
                '"preview.install" needs a given first stage: one that is trained here is saved with its preview anyway'
            )


def recipe_names() -> dict[str, Path]:
    """The shipped recipes by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*/*.yaml"))}


def find_recipe(source: str, beside: Path | None = None) -> Path:
    """The file of a recipe given by path or shipped name; a path wins over a name."""
    candidates = [Path(source)] if beside is None else [beside / source, Path(source)]
    for path in candidates:
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return path
    if beside is None and (len(Path(source).parts) > 1 or source.endswith(("/", "\\"))):
        raise DarkroomError(f"{source}: no such file or folder; check the path, or name a shipped recipe")
    names = recipe_names()
    if source in names:
        return names[source]
    raise DarkroomError(f'no recipe "{source}": neither a file nor a shipped recipe{nearest(source, names)}')


def read_recipe(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The recipe of a file with its bases merged in, as a plain dict (not yet checked)."""
    path = path.resolve()
    if path in _seen:
        raise DarkroomError(f"{path.name}: its bases form a circle: {' -> '.join(p.name for p in (*_seen, path))}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise DarkroomError(f"{path}: not a readable recipe: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise DarkroomError(f"{path}: a recipe is a mapping of settings; this file holds {type(data).__name__}")
    base = data.pop("base", None)
    data.setdefault("name", path.stem)
    if base is None:
        return data
    settings = read_recipe(find_recipe(str(base), path.parent), (*_seen, path))
    return merge(_without_other_kinds(settings, data), data)


def _without_other_kinds(settings: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those parts that `change` makes another kind of: their options belong to the old kind."""
    network = _entry(_entry(settings, "denoiser"), "network")
    kind = _entry(_entry(change, "denoiser"), "network").get("kind")
    if kind is not None and kind != network.get("kind", DenoiserConfig().network.kind):
        settings = merge(settings, {"denoiser": {"network": None}})
    encoders = _entry(settings, "conditioner")
    for name, encoder in _entry(change, "conditioner").items():
        kind = encoder.get("kind") if isinstance(encoder, Mapping) else None
        if kind is not None and kind != _entry(encoders, name).get("kind", kind):
            settings = merge(settings, {"conditioner": {name: None}})
    return settings


def _entry(settings: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A mapping inside the settings; empty where it is missing or anything else, of which `from_dict` complains."""
    value = settings.get(key)
    return value if isinstance(value, Mapping) else {}


def with_changes(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`with_overrides` for recipes: {"denoiser.network.kind": "dit"} takes the options of the old kind away first."""
    kinds = {key: value for key, value in changes.items() if key.endswith(".kind")}
    settings = _without_other_kinds(dict(settings), with_overrides({}, kinds))
    return with_overrides(settings, changes)


def resolve(data: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Apply overrides and read strictly: misspelt keys, wrong types and impossible choices raise DarkroomError."""
    return from_dict(Recipe, _with_image_channels(with_changes(data, overrides or {})))


def _with_image_channels(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the widths at which a trained first stage meets the images, where nobody stated them."""
    data, choice = settings.get("data") or {}, settings.get("first_stage")
    train = choice.get("train") if isinstance(choice, Mapping) else None
    network = train.get("autoencoder", {}) if isinstance(train, Mapping) else None
    if not isinstance(network, Mapping) or not isinstance(data, Mapping):
        return settings  # none, or what `from_dict` complains about
    channels = data.get("channels") or DataConfig.channels
    widths = {name: channels for name in ("in_channels", "out_channels") if network.get(name) is None}
    return merge(settings, {"first_stage": {"train": {"autoencoder": {**network, **widths}}}})
