"""From what someone names (a recipe, a folder, a tar, a model to start from) to a checked recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from glob import glob
from pathlib import Path
from typing import Any

from darkroom.config import merge, with_overrides
from darkroom.data.locations import is_shapes, is_there, part_of
from darkroom.errors import DarkroomError
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_folder import find_source, is_model_folder
from darkroom.model_io import load, load_first_stage
from darkroom.pixel_format import PixelFormat
from darkroom.plan import automatic_recipe, check_crop
from darkroom.training.recipe import Recipe, find_recipe, read_recipe, resolve, with_changes

# Of `denoiser.network`; they follow from the first stage and the conditioner.
DERIVED_WIDTHS = ("in_channels", "out_channels", "context_dim", "adm_in_channels", "num_classes")


def new_recipe(
    source: str | os.PathLike[str] | None,
    *,
    data: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    changes: Mapping[str, Any] | None = None,
    first_stage: str | os.PathLike[str] | None = None,
    init_from: str | os.PathLike[str] | None = None,
    minutes: float | None = None,
    gpu: bool = False,
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, and the widths that follow from other parts but that someone wrote down nevertheless.

    The arguments are those of `darkroom.train`; `changes` are its overrides, `gpu` whether it trains on one.
    """
    changes = dict(changes or {})
    if source is None:
        raise DarkroomError("nothing to train on: give a recipe, a folder of images or a tar")
    if first_stage is not None and init_from is not None:
        raise DarkroomError("--init-from brings its model's own first stage; leave out --first-stage")
    text = str(source)
    is_recipe = Path(text).suffix in (".yaml", ".yml") or not Path(text).exists()
    settings = read_recipe(find_recipe(text)) if is_recipe else {}
    parts: dict[str, Any] = {}
    if init_from is not None and _trains_first_stage_alone(settings):
        train = merge(section(section(settings, "first_stage"), "train"), {"init_from": str(init_from)})
        parts = {"first_stage": {"train": train | {"autoencoder": None}}}  # the network is that model's
        settings["data"] = _image_settings(str(init_from)) | section(settings, "data")
    elif init_from is not None:
        parts = _parts_of_model(str(init_from))
        kept = next((key for key in changes if key.split(".")[0] in ("denoiser", "conditioner")), None)
        if kept is not None:
            raise DarkroomError(f'--init-from keeps its model\'s denoiser and conditioner: leave out --set "{kept}"')
    elif first_stage is not None:
        parts = {"first_stage": {"path": str(first_stage)}}
        if is_recipe:
            settings["data"] = _image_settings(str(first_stage)) | section(settings, "data")
    if is_recipe:
        root = os.environ.get("DARKROOM_DATA")
        if data is not None:
            settings["data"] = found_at(section(settings, "data"), str(data))
        elif root and (moved := _under_root(section(settings, "data"), root, relative_only=True)):
            settings["data"] = moved
    else:
        fixed = section(with_overrides({}, changes), "data")
        given = first_stage or init_from
        if given is not None:
            fixed = _image_settings(str(given)) | fixed
        settings = automatic_recipe(str(data or text), minutes, fixed, gpu)
    settings |= parts
    if seed is not None:
        settings["seed"] = seed
        if section(settings, "first_stage").get("train"):
            settings = with_overrides(settings, {"first_stage.train.seed": seed})
    settings = with_changes(settings, changes)
    denoiser = settings.get("denoiser")
    network = denoiser.get("network") if isinstance(denoiser, dict) else None
    stated: dict[str, Any] = {}
    if isinstance(network, dict):  # anything else is what `resolve` complains about
        stated = {k: network[k] for k in DERIVED_WIDTHS if network.get(k) is not None}
        network.pop("context_dim", None)
    recipe = resolve(settings)
    check_recipe(recipe, data)
    return recipe, stated


def resumed_recipe(folder: Path, changes: Mapping[str, Any], data: str | os.PathLike[str] | None = None) -> Recipe:
    """The run's own recipe; `data` says where its files lie now if they were moved."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise DarkroomError(f"{folder}: no run to resume (config.yaml is missing); start it without --resume")
    settings = read_recipe(path)
    if data is not None:
        settings["data"] = found_at(section(settings, "data"), str(data))
    recipe = resolve(settings, changes)
    _check_files(recipe, data)
    return recipe


def check_recipe(recipe: Recipe, data: str | os.PathLike[str] | None = None) -> None:
    """Raises DarkroomError for what a recipe lacks and only its user can say, before anything is read or built."""
    train = recipe.first_stage.train
    if recipe.preview is not None and train is None and recipe.first_stage.given is None:
        raise DarkroomError(f"{recipe.name} needs a first stage: --first-stage MODEL")
    if train is not None and train.init_from is None:
        why = None
        if not train.objective.train_encoder:
            why = '"first_stage.train.objective.train_encoder" is false'
        elif train.autoencoder is None:
            why = '"first_stage.train.autoencoder" is null'
        if why is not None:
            raise DarkroomError(f"{recipe.name} goes on with a given first stage ({why}): --init-from MODEL")
    known = None if train is None or train.init_from is not None else train.autoencoder
    check_crop(recipe, 1 if known is None else 2 ** (len(known.channel_mult) - 1))
    _check_files(recipe, data)


def _check_files(recipe: Recipe, data: str | os.PathLike[str] | None) -> None:
    """The recipe's files must be there. Of a missing place that was given as `data` their reader tells."""
    source, validation = recipe.data.source, recipe.data.validation
    if recipe.data.is_synthetic:
        return
    for place in [source] if isinstance(source, str) else source:
        if data is None and not is_there(place):
            raise DarkroomError(
                f"{place}: no such file or folder; say where the images of {recipe.name} are with --data DIR, or the "
                "folder around them in the environment variable DARKROOM_DATA"
            )
    named = [validation] if isinstance(validation, str) else validation if isinstance(validation, list) else []
    for place in named:
        if not is_there(place):
            raise DarkroomError(
                f'{place}: no such file or folder; "data.validation" names it: set that to files that are there, or to '
                "a share of the images such as --set data.validation=0.05"
            )


def section(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A part of the settings that is a mapping; {} where it is left out or null."""
    value = settings.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise DarkroomError(f'"{key}" is a mapping of settings, got {value!r}')
    return dict(value)


def found_at(settings: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A recipe's data settings with the data at `place`: the folder that holds the files that the recipe names, or else
    the images themselves, which then also replace the recipe's validation files."""
    moved = _under_root(settings, place)
    if moved is not None:
        return moved
    changed = merge(settings, {"source": place})
    if isinstance(changed.get("validation"), (str, list)):
        del changed["validation"]
    return changed


def _under_root(settings: Mapping[str, Any], root: str, relative_only: bool = False) -> dict[str, Any] | None:
    """Data settings with the recipe's paths looked up below `root`; None where they are not there.

    relative_only: leave recipes alone that say exactly where their files lie.
    """
    named = settings.get("source") or "shapes"
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not Path(root).is_dir():
        return None
    if relative_only and any(Path(name).is_absolute() for name in names):
        return None
    places = [_place(root, name) for name in names]
    files = [part_of(place)[0] for place in places if not is_shapes(place)]
    if not files or not all(map(glob, files)):
        return None
    moved: dict[str, Any] = {"source": places}
    validation = settings.get("validation")
    if isinstance(validation, str):
        moved["validation"] = _place(root, validation)
    if isinstance(validation, list):
        moved["validation"] = [_place(root, str(name)) for name in validation]
    return merge(settings, moved)


def _place(root: str, name: str) -> str:
    """Where a file of the recipe lies below `root`. Absolute names are those of a run's resolved recipe: the file was
    moved, with or without the folder around it."""
    location, count = part_of(name)
    if is_shapes(location):
        return name
    path = Path(location)
    place = Path(root) / path
    if path.is_absolute():
        together = Path(root) / path.parent.name / path.name
        place = together if glob(str(together)) else Path(root) / path.name
    return str(place) if count is None else f"{place}@{count}"


def _parts_of_model(path: str) -> dict[str, Any]:
    """Recipe settings that rebuild a given model's architecture, for --init-from."""
    model = load(path, device="cpu")
    if not isinstance(model, LatentDiffusion):
        raise DarkroomError(f"--init-from {path}: holds only a first stage; use --first-stage {path}")
    config: Any = model.conditioner.config_dict
    encoders = _without_vocabularies(config.get("encoders", {}))
    return {
        "denoiser": model.denoiser.config_dict,
        "conditioner": encoders,
        "first_stage": {} if model.first_stage is None else {"path": path},
        "init_from": path,
    }


def _without_vocabularies(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Vocabularies are large, and the model itself is asked for them."""
    return {
        name: _without_vocabularies(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if name != "tokenizer"
    }


def _trains_first_stage_alone(settings: Mapping[str, Any]) -> bool:
    """Whether a recipe's only task is a first stage, so that a model to start from is one for that."""
    return settings.get("steps") == 0 and bool(section(settings, "first_stage").get("train"))


def _image_settings(path: str) -> dict[str, Any]:
    """Channels and pixel format of the images that a model makes: those to train it on."""
    source = find_source(path)
    model = load(source, device="cpu") if is_model_folder(source) else load_first_stage(source, device="cpu")
    settings: dict[str, Any] = {"channels": model.image_channels}
    if model.pixels != PixelFormat():
        settings |= {"pixels": model.pixels.dtype, "value_range": [model.pixels.low, model.pixels.high]}
    return settings
