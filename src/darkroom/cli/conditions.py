"""Conditions from files: what `--boxes`, `--segmentation`, `--image`, ... of `generate` name, as a request takes it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from darkroom.errors import DarkroomError

if TYPE_CHECKING:
    from darkroom.latent_diffusion import LatentDiffusion

# Option and field: what the help says.
OPTIONS: dict[str, tuple[str, str]] = {
    "boxes": ("boxes", 'A .json: [{"class": NAME, "bbox": [x0, y0, x1, y1]}, ...], from 0 to 1; or a list of these.'),
    "segmentation": ("segmentation", "A label map: a picture of one channel of class numbers."),
    "low-resolution": ("low_resolution", "A picture to be enlarged or sharpened."),
    "image": ("image", "A picture of which --mask is repainted."),
    "mask": ("repaint_mask", "White is repainted, black is kept."),
    "depth": ("depth", "A depth map of one channel: bright is near."),
}
Function = TypeVar("Function", bound=Callable[..., Any])


def condition_options(command: Function) -> Function:
    """The options of this module on a command; `click` gives them under the names of the fields."""
    for flag, (field, about) in reversed(OPTIONS.items()):
        command = click.option(f"--{flag}", field, type=click.Path(path_type=Path), metavar="FILE", help=about)(command)
    other = click.option(
        "--condition",
        "others",
        multiple=True,
        metavar="FIELD=FILE",
        help="Any other field: a picture, .npy or .json (repeatable).",
    )
    level = click.option(
        "--noise-level", type=click.IntRange(min=0), help="Noise on a condition, for models trained so."
    )
    return level(other(command))


def given_files(options: Mapping[str, Any]) -> dict[str, Path]:
    """By field, the file that was named."""
    files = {field: options[field] for field, _ in OPTIONS.values() if options.get(field) is not None}
    for text in options.get("others") or ():
        field, equals, name = text.partition("=")
        if not equals or not field or not name:
            raise DarkroomError(f"--condition {text}: give FIELD=FILE")
        field = field.replace("-", "_")
        if field in files:
            raise DarkroomError(f"--condition {text}: there is a file for {field} already; give one")
        files[field] = Path(name)
    return files


def flag_of(field: str) -> str:
    """The option that gives a field."""
    return next((f"--{flag}" for flag, (name, _) in OPTIONS.items() if name == field), f"--condition {field}=")


def natural_size(model: LatentDiffusion, files: Mapping[str, Path]) -> tuple[int, int] | None:
    """The (width, height) that follows from a picture to be enlarged, or from one to be repainted; None without."""
    from darkroom.conditioning.requests import encoder_of

    for field in ("low_resolution", "image"):
        if field in files:
            config: Any = getattr(encoder_of(model.conditioner, field), "config", None)
            factor = config.factor if field == "low_resolution" else 1
            width, height = _size_of(files[field])
            return width * factor, height * factor
    return None


def read_files(model: LatentDiffusion, files: Mapping[str, Path], size: tuple[int, int]) -> dict[str, Any]:
    """By field, what the files hold, for images of (width, height): cut and resized to it by the rule of the data."""
    from darkroom.conditioning.requests import encoder_of

    conditions = {}
    for field, path in files.items():
        encoder = encoder_of(model.conditioner, field)
        try:
            conditions[field] = _read(model, field, path, size, getattr(encoder, "config", None))
        except (OSError, ValueError, SyntaxError) as error:
            known: dict[type[Exception], str] = {FileNotFoundError: "no such file", IsADirectoryError: "it is a folder"}
            reason = known.get(type(error)) or str(error).split("\n")[0]
            raise DarkroomError(f"{flag_of(field)} {path}: cannot be read: {reason}") from None
    return conditions


def _read(model: LatentDiffusion, field: str, path: Path, size: tuple[int, int], config: Any) -> Any:
    import json

    import numpy as np
    import torch
    from PIL import Image

    from darkroom.data import transforms

    if path.suffix.lower() == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if field == "boxes":
        raise ValueError("boxes are a .json")
    data = path.read_bytes()
    if field in ("image", "low_resolution"):
        factor = config.factor if field == "low_resolution" else 1
        small = (-(-size[0] // factor), -(-size[1] // factor))
        values, _ = transforms.decode(data, small, model.image_channels, model.pixels)
        return model.pixels.to_network(torch.from_numpy(values))
    if field == "depth":
        return torch.from_numpy(transforms.depth_to_network(data, size))
    if path.suffix.lower() == ".npy":
        return np.load(path, allow_pickle=False)
    with Image.open(path) as picture:
        if field == "repaint_mask":
            return torch.from_numpy(transforms.mask_to_network(picture, size))
        return torch.from_numpy(transforms.labels_to_network(picture, size))


def _size_of(path: Path) -> tuple[int, int]:
    from darkroom.data.image_files import read_samples

    try:
        values = read_samples(path.read_bytes()).values
    except (OSError, ValueError, SyntaxError) as error:
        raise DarkroomError(f"{path} cannot be read as a picture: {str(error).splitlines()[0]}") from None
    return values.shape[1], values.shape[0]


def idle_guidance(
    model: LatentDiffusion, scales: Mapping[str, float], asked: Collection[str], size: tuple[int, int]
) -> list[str]:
    """Why scales of single conditions change nothing, of those that do not; asked: the fields that were given."""
    from darkroom.conditioning.requests import named_encoders

    encoders = dict(named_encoders(model.conditioner))
    missing = [n for n in scales if encoders[n].from_size(size) is None and not {*encoders[n].fields} & {*asked}]
    staying = [n for n in scales if encoders[n].stays and n not in missing]
    return [f"{n} was not given" for n in missing] + [f"{n} is never guided away from" for n in staying]


def recorded_conditions(
    model: LatentDiffusion, recorded: Mapping[str, Any] | None, files: Mapping[str, Path], size: tuple[int, int]
) -> dict[str, Any] | None:
    """The conditions of an image that is made again: those inside it, and the files for those of which it only knows a
    digest. Raises DarkroomError where such a file is missing, or is another."""
    if not recorded:
        return None
    conditions = dict(recorded)
    known_by_digest = {
        field: {entry["sha256"] for entry in entries if isinstance(entry, dict) and "sha256" in entry}
        for field, entries in recorded.items()
        if isinstance(entries, list)
    }
    needed = {field: digests for field, digests in known_by_digest.items() if digests}
    if missing := [flag_of(field) for field in needed if field not in files]:
        raise DarkroomError(
            f"this image was made with pictures that are not inside it: add {' and '.join(missing)} with the same files"
        )
    if surplus := [flag_of(field) for field in files if field not in needed]:
        raise DarkroomError(f"--from repeats an image with its own settings; leave out {surplus[0]}")
    conditions |= read_files(model, {field: files[field] for field in needed}, size)
    from darkroom.conditioning.encoder import digest_of
    from darkroom.conditioning.requests import read_conditions

    read = read_conditions(model.conditioner, conditions, size)
    for field, digests in needed.items():
        found = {digest_of(value) for value in read[field]}
        if found != digests:
            raise DarkroomError(f"{files[field]} is not the {field} that this image was made with")
    return conditions
