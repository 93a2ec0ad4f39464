"""What the words of `darkroom eval MODEL DATA` mean: which is a model, which are images, and how these are opened.

Nothing is held in memory: pictures are read when their turn comes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from PIL import Image

from darkroom.conditioning.requests import encoders_of
from darkroom.config import from_dict, understanding
from darkroom.data.degradations import LowResolution
from darkroom.data.derived import DerivedDataset
from darkroom.data.locations import data_names, is_shapes, is_there, part_of
from darkroom.data.masks import RandomMask
from darkroom.data.pictures import PictureDataset
from darkroom.data.records import read_parts
from darkroom.data.sources import SYNTHETIC, DataConfig, ImageDataset, open_dataset
from darkroom.errors import DarkroomError
from darkroom.interop.tensor_file import is_weight_file
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_folder import bundled, find_source, is_diffusers_folder, is_model_folder, read_index
from darkroom.pixel_format import PixelFormat

Size = tuple[int, int]  # (width, height)
T = TypeVar("T")


def model_name(model: str | os.PathLike[str]) -> str:
    """runs/kl-f4/model -> "kl-f4", kl-f8.ckpt -> "kl-f8", emoji -> "emoji"."""
    path = Path(model)
    name = path.resolve().parent.name if path.name in ("model", "first_stage") else path.resolve().name
    return name if path.is_dir() else name.removesuffix(path.suffix)


def trained_size(model: str | os.PathLike[str]) -> tuple[int, int] | None:
    """(width, height) of the images that a model was trained on, where it or the run around it says so."""
    path = find_source(os.fspath(model))
    found: Any = None
    if path.is_dir() and is_model_folder(path):
        info = read_index(path).info
        found = (info.get("defaults") or {}).get("size") or (info.get("data") or {}).get("size")
    config = path.parent / "config.yaml"
    if found is None and config.is_file():
        try:
            found = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]["size"]
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
            return None  # not the config of a run
    sides = [found, found] if isinstance(found, int) else found
    if isinstance(sides, list) and len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides):
        return sides[0], sides[1]
    return None


def is_images(place: str) -> bool:
    """Whether a place holds images rather than a model: `shapes`, a tar, a glob, or a folder that is no model's."""
    path = Path(place).expanduser()
    if path.is_dir():
        model = is_model_folder(path) or is_model_folder(path / "model") or is_diffusers_folder(path)
        return not model and any(path.iterdir())
    if path.is_file():
        return not is_weight_file(path)
    return place not in bundled() and (is_there(place) or part_of(place)[0] in SYNTHETIC)


def check_places(places: Sequence[str]) -> None:
    """Raise DarkroomError for data that is not there."""
    for place in places:
        if not is_there(place) and part_of(place)[0] not in SYNTHETIC:
            raise DarkroomError(f"{place}: no such file or folder; check the path of the data")


def open_reference(places: Sequence[str], size: Size, channels: int, pixels: PixelFormat) -> ImageDataset:
    """The images that others are compared with: of a source that divides itself the held-out part, else all of it."""
    return _open(places, "validation", size, channels, pixels)


def open_training(places: Sequence[str], size: Size, channels: int, pixels: PixelFormat) -> ImageDataset | None:
    """The training part of sources that divide themselves; None where there is none."""
    drawn = [is_shapes(place) or part_of(place)[0] in SYNTHETIC for place in places]
    if not all(drawn) and not _divided(places):
        return None
    return _open(places, "train", size, channels, pixels)


def open_whole(places: Sequence[str], size: Size, channels: int, pixels: PixelFormat) -> ImageDataset:
    """Images that were named for what they are: the training part, or all where there are no parts."""
    return open_training(places, size, channels, pixels) or _open(places, "train", size, channels, pixels)


def _source(places: Sequence[str]) -> str | list[str]:
    return part_of(places[0])[0] if len(places) == 1 else list(places)


def _open(places: Sequence[str], split: str, size: Size, channels: int, pixels: PixelFormat) -> ImageDataset:
    if not places:
        raise DarkroomError("nothing to evaluate on: give a folder of images, a tar, or shapes")
    options: dict[str, Any] = {"size": size, "channels": channels, "pixels": pixels.dtype}
    if pixels.dtype == "float32" or pixels != PixelFormat.of(pixels.dtype):
        options["value_range"] = (pixels.low, pixels.high)
    if len(places) == 1:
        path, count = part_of(places[0])
        options["limit"] = count
        if is_shapes(path) or path in SYNTHETIC:  # procedural sets have held-out images of their own
            return open_dataset(DataConfig(source=path, **options), split, in_memory=False)
    source, divided = _source(places), _divided(places)
    dataset = open_dataset(
        DataConfig(source=source, validation=0.0, **options), split if divided else "train", in_memory=False
    )
    if not divided and not _counted(places):
        dataset.split = "all"  # for the record: nobody said that these are images of training
    if not len(dataset):
        raise DarkroomError(f"{', '.join(data_names(source))}: there are no images to evaluate on; check the data")
    return dataset


def _counted(places: Sequence[str]) -> bool:
    """Whether these are several readers' sources: with counts, or with `shapes` among them."""
    return len(places) > 1 and any(part_of(place)[1] is not None or is_shapes(place) for place in places)


def _divided(places: Sequence[str]) -> bool:
    """Whether a source has parts of its own for training and for validation."""
    return not _counted(places) and read_parts(_source(places))[1] is not None


def with_derived_fields(dataset: ImageDataset, model: LatentDiffusion) -> ImageDataset:
    """The same images with what must be made of them for this model: smaller or blurred pictures, masks. By the rule
    of its training, where the model states it."""
    made: dict[str, Any] = {}
    for encoder in encoders_of(model.conditioner):
        if "low_resolution" in encoder.fields and "low_resolution" not in dataset.fields:
            made["low_resolution"] = trained_degradation(model, getattr(encoder, "config", None))
        if "repaint_mask" in encoder.fields and "repaint_mask" not in dataset.fields:
            made["repaint_mask"] = _trained_rule(model, "repaint_mask", RandomMask) or RandomMask()
    return DerivedDataset(dataset, replace(dataset.config, **made)) if made else dataset


def trained_degradation(model: LatentDiffusion, config: Any) -> LowResolution:
    """How the small pictures that a model was trained with were made; of one that does not say so, plain bicubic."""
    factor = getattr(config, "factor", None)
    recorded = _trained_rule(model, "low_resolution", LowResolution)
    if recorded is not None and recorded.factor == factor:
        return recorded
    if factor is None or factor < 2:
        raise DarkroomError(
            "the model sharpens blurred pictures and does not say how blurred: evaluate it on data with pictures of "
            "low resolution"
        )
    return LowResolution(factor=factor)


def _trained_rule(model: LatentDiffusion, field: str, kind: type[T]) -> T | None:
    """How a field was made of the images in training; None where the model does not say."""
    data = model.info.get("data")
    rule = data.get(field) if isinstance(data, Mapping) else None
    if not isinstance(rule, Mapping):
        return None
    with understanding(f"the model's record of its data ({field})", "a rule"):
        return from_dict(kind, rule, f"data.{field}")


def stored_size(place: str) -> Size:
    """(width, height) of the images of a place, which must all have one: scaling them would change what is scored."""
    path, count = part_of(place)
    if is_shapes(path) or path in SYNTHETIC:
        return 64, 64
    config = DataConfig(source=path, validation=0.0, limit=count, size=1)
    dataset = open_dataset(config, "train", in_memory=False)
    assert isinstance(dataset, PictureDataset)
    found: tuple[str, Size] | None = None
    for record in dataset.records:
        try:
            with Image.open(io.BytesIO(record.image.read())) as picture:
                size = picture.size
        except OSError:  # not one that Pillow opens: it is read, or left out, later
            continue
        if found is not None and size != found[1]:
            raise DarkroomError(
                f"{place}: {record.name} is {size[0]}x{size[1]} and {found[0]} is {found[1][0]}x{found[1][1]}; images "
                "to be scored have one size, or state one with --size"
            )
        found = found or (record.name, size)
    if found is None:
        raise DarkroomError(f"{place}: the size of its images is not known; state it with --size")
    return found[1]
