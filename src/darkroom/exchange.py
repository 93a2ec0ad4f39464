"""Models in the layouts of other libraries: `export` writes them, `convert` turns files into one another and checks.

Whole models and first stages. A file is read again after it was written, and must give back every tensor of its source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from darkroom.errors import DarkroomError, warn
from darkroom.first_stage.first_stage import FirstStage
from darkroom.interop.diffusers_first_stage import Number
from darkroom.interop.facts import latent_facts, with_facts
from darkroom.interop.first_stage_files import (
    FoundFirstStage,
    as_number,
    count_equal,
    find_first_stage,
    in_darkroom_folder,
    is_former_export,
    plain_config,
    refuse_inexpressible,
    write_compvis,
    write_diffusers,
)
from darkroom.interop.first_stage_rest import count_rest, rest_of
from darkroom.interop.kept_tensors import Kept, reachable
from darkroom.interop.tensor_file import TensorFile, opened
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_folder import CONVERTED_FROM, WEIGHTS, find_source, is_model_folder, read_index
from darkroom.model_io import build_found, latent_numbers, refuse_official, save, set_latents
from darkroom.safe_files import PICKLED, SAFETENSORS, new_file, new_folder
from darkroom.whole_models import ModelConversion, find_whole, found_in_memory, write_whole

Format = Literal["darkroom", "compvis", "diffusers"]
FORMATS: tuple[Format, ...] = ("darkroom", "compvis", "diffusers")
FILE_SUFFIXES = (SAFETENSORS, *PICKLED)


@dataclass(frozen=True)
class Conversion:
    """What `convert` did."""

    source: FoundFirstStage
    destination: Path
    format: Format
    shift: Number
    scale: Number
    scale_from: str
    tensors: int  # all of them came back from the written file bit for bit
    has_both: bool = False  # whether the source has averaged weights and live ones


def export(
    model: FirstStage | LatentDiffusion,
    place: str | Path,
    format: str = "diffusers",
    *,
    shift: Number | None = None,
    scale: Number | None = None,
) -> Path:
    """Write a model or a first stage for other libraries: "diffusers" (a folder) or "compvis" (one file, the official).

    place: a folder, or the name of a .safetensors or .ckpt file. An earlier export is replaced, anything else is kept.
    shift, scale: instead of the first stage's own, where the other library has no place for those.

    What the layout cannot express is refused by name.
    """
    if format not in ("diffusers", "compvis"):
        raise DarkroomError(f'format "{format}" is not known; use "diffusers" or "compvis" (model.save writes ours)')
    if isinstance(model, LatentDiffusion):
        return _export_whole(model, _destination(place, format), format, shift, scale)
    config = plain_config(getattr(model, "config_dict", {}) or {"kind": "identity"}, "this first stage")
    tensors = {name: tensor.detach().cpu() for name, tensor in model.autoencoder.state_dict().items()}
    shift = as_number(model.shift) if shift is None else shift
    scale = as_number(model.scale) if scale is None else scale
    destination = _destination(place, format)
    if format == "compvis":
        with new_file(destination, replaces=is_former_export) as temporary:
            write_compvis(temporary, tensors | _beside(model.kept), config, shift, scale)
    else:
        with new_folder(destination, replaces=is_former_export) as temporary:
            write_diffusers(temporary, tensors, config, shift, scale)
    return destination


def _beside(kept: Kept | None) -> dict[str, Tensor]:
    """Tensors that an official file of a first stage holds besides the autoencoder's."""
    source = reachable(kept).source
    return source.read(source.shapes)


def _export_whole(
    model: LatentDiffusion, destination: Path, format: str, shift: Number | None, scale: Number | None
) -> Path:
    facts = {name: value for name, value in (("shift", shift), ("scale", scale)) if value is not None}
    done = write_whole(with_facts(found_in_memory(model), facts), destination, format)
    if done.left_out:
        warn(f"{destination}: left out, as the {format} layout has no place for it: {', '.join(done.left_out)}")
    return done.destination


def convert(
    source: str | Path,
    destination: str | Path,
    to: str | None = None,
    *,
    weights: str | None = None,
    shift: Number | None = None,
    scale: Number | None = None,
    facts: Mapping[str, Any] | None = None,
    first_stage: bool = False,
    progress: Callable[[int], None] = lambda step: None,
) -> Conversion | ModelConversion:
    """A file or folder in another layout, every tensor checked to come back bit for bit: the whole model, or the first
    stage where there is no more, or where `first_stage` asks for it alone.

    weights: "ema" or "live"; None: all that a whole model has, of a first stage the averaged ones where there are some.
    shift, scale: of the latents; facts: see `load`.
    to: "darkroom", "compvis" or "diffusers"; None: "compvis" for a destination that is named like a weight file, else
    "darkroom". The numbers keep the precision that they are stored in. `progress` is called with 1 to 3.
    """
    to = to or ("compvis" if Path(destination).suffix.lower() in FILE_SUFFIXES else "darkroom")
    if to not in FORMATS:
        raise DarkroomError(f'format "{to}" is not known; use {", ".join(FORMATS)}')
    place = _destination(destination, to)
    if weights not in (None, *WEIGHTS):
        raise DarkroomError(f'weights="{weights}" is not known; use "ema" or "live"')
    path = find_source(source)
    file = opened(path)
    whole = None if first_stage else find_whole(path, file)
    if whole is not None:
        given = {name: value for name, value in (("shift", shift), ("scale", scale)) if value is not None}
        progress(1)
        done = write_whole(with_facts(whole, {**given, **(facts or {})}), place, to, weights or "all")
        progress(3)
        return done
    own = latent_facts(facts or {}, source, "a first stage")
    shift, scale = own.get("shift", shift), own.get("scale", scale)
    weights = weights or "ema"
    found = _find(path, weights, file)
    if "float64" in found.dtypes and to == "darkroom":
        raise DarkroomError(
            f"{found.path} holds float64, which a Darkroom model would round; convert it to float32 first"
        )
    scale_from = found.scale_from if shift is None and scale is None else "what was asked for"
    wanted = replace(
        found, shift=found.shift if shift is None else shift, scale=found.scale if scale is None else scale
    )
    for name, value in (("shift", wanted.shift), ("scale", wanted.scale)):
        latent_numbers(name, value, wanted.config["embed_dim"])
    if to != "darkroom":
        refuse_inexpressible(to, wanted.config, wanted.shift, wanted.scale)
    progress(1)
    if to == "darkroom":
        tensors = _to_darkroom(wanted, place, weights)
    else:
        replaced = new_file if to == "compvis" else new_folder
        write = write_compvis if to == "compvis" else write_diffusers
        with replaced(place, replaces=is_former_export) as temporary:
            beside = _beside(rest_of(found)) if to == "compvis" else {}
            write(temporary, found.read(weights) | beside, wanted.config, wanted.shift, wanted.scale)
            progress(2)
            again = find_first_stage(temporary)
            assert again is not None
            tensors = count_equal(again, found, weights) + (count_rest(again, found) if beside else 0)
    progress(3)
    return Conversion(found, place, to, wanted.shift, wanted.scale, scale_from, tensors, _has_both(found))


def _find(path: Path, weights: str, file: TensorFile | None) -> FoundFirstStage:
    """Weights stay in the file until they are wanted, so that a conversion keeps their precision."""
    if not is_model_folder(path):
        found = find_first_stage(path, file)
        return refuse_official(path, found, file) if found is None else found
    index = read_index(path)
    if "first_stage" not in index.parts:
        raise DarkroomError(f"{path}: holds no first stage")
    part = index.parts["first_stage"]
    live = weights == "live" and (part / WEIGHTS["live"]).is_file()
    inside = None if index.kind == "first_stage" else "a Darkroom latent diffusion model"
    return in_darkroom_folder(path, part, WEIGHTS["live" if live else "ema"], inside)


def _has_both(found: FoundFirstStage) -> bool:
    return bool(found.averaged) or (found.layout == "darkroom" and (found.file.path.parent / WEIGHTS["live"]).is_file())


def _to_darkroom(wanted: FoundFirstStage, place: Path, weights: str) -> int:
    """Save, and count the tensors that came back bit for bit before the model takes its place."""
    counted: list[int] = []

    def verify(written: Path) -> None:
        again = in_darkroom_folder(written, written / "first_stage", WEIGHTS["ema"], None)
        counted.append(count_equal(again, wanted, weights) + count_rest(again, wanted))

    first_stage = build_found(wanted, weights)
    set_latents(first_stage, wanted.shift, wanted.scale)
    precision = next(iter(wanted.dtypes)) if len(wanted.dtypes) == 1 else "float32"
    info = {CONVERTED_FROM: f"{wanted.path.name} ({wanted.layout})"}
    save(first_stage, place, info=info, dtype=precision, verify=verify)
    return counted[0]


def _destination(place: str | Path, format: str) -> Path:
    path = Path(place).expanduser()
    is_file_name = path.suffix.lower() in FILE_SUFFIXES
    if format == "compvis" and not is_file_name:
        raise DarkroomError(
            f"cannot save to {path}: the official layout is one file; name it {path.name}.safetensors or .ckpt"
        )
    if format == "darkroom" and is_model_folder(path) and CONVERTED_FROM not in read_index(path).info:
        raise DarkroomError(
            f"{path} holds a model that was not converted, such as a trained one, and is kept: give another name"
        )
    if format != "compvis" and is_file_name:
        raise DarkroomError(f"cannot save to {path}: the {format} layout is a folder; leave {path.suffix} out")
    return path
