"""Whole models in the layouts of other libraries: found in files, folders and memory, written, compared bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from darkroom.adapters import saved_info
from darkroom.assemble import checked_parts, hollow_parts, latent_numbers, shapes_of
from darkroom.errors import DarkroomError
from darkroom.interop import diffusers_write
from darkroom.interop.compvis_write import refuse_inexpressible, write_compvis_model
from darkroom.interop.darkroom_model import Kept, find_darkroom, write_kept, write_parts
from darkroom.interop.first_stage_files import as_number, is_former_export, same_bits
from darkroom.interop.found_model import LATENTS, OWN, PARTS, FoundModel, find_model
from darkroom.interop.tensor_source import MemorySource, Shape, Table, groups, same, taken
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_folder import CONVERTED_FROM, INDEX, find_source, index_text, is_model_folder, read_index
from darkroom.safe_files import new_file, new_folder

Shapes = Mapping[str, Mapping[str, Shape]]


@dataclass(frozen=True)
class ModelConversion:
    """What a conversion of a whole model did. `tensors`: so many came back from what was written, bit for bit; `kept`:
    among them those that only the source's layout has; `weights`: "all", "ema" or "live"."""

    source: FoundModel
    destination: Path
    format: str
    weights: str
    tensors: int
    kept: int


def find_whole(source: str | Path) -> FoundModel | None:
    """The whole model that a path or bundled name means; None if there is a first stage alone, or nothing known."""
    path = find_source(source)
    if not is_model_folder(path):
        return find_model(path)
    index = read_index(path)
    if index.kind != "latent_diffusion":
        return None
    return find_darkroom(path, {part: place for part, place in index.parts.items() if part in PARTS}, index.info)


def found_in_memory(model: LatentDiffusion) -> FoundModel:
    """A model at hand as a found one: what `export` writes."""
    modules = {"first_stage": model.first_stage, "denoiser": model.denoiser, "conditioner": model.conditioner}
    configs: dict[str, dict[str, Any]] = {}
    carried: Kept = model.kept or Kept({}, {}, {})
    tensors: dict[str, torch.Tensor] = {f"official/{name}": tensor for name, tensor in carried.tensors.items()}
    tables: dict[str, Table] = {}
    for part, module in modules.items():
        if module is None:
            continue
        config = getattr(module, "config_dict", None)
        if not isinstance(config, dict):
            raise DarkroomError(f"the model's {part} has no config_dict: build it with darkroom.build to export it")
        configs[part] = config
        state = {name: tensor for name, tensor in module.state_dict().items() if name not in ("shift", "scale")}
        tables[part] = {name: same(f"{part}/{name}") for name in state}
        tensors |= {f"{part}/{name}": tensor for name, tensor in state.items()}
    first = model.first_stage
    return FoundModel(
        path=Path(str(model.info.get("path", model.info.get("name", "model")))),
        layout="darkroom",
        family=str(model.info.get("family", OWN)),
        title=str(model.info.get("name", "this model")),
        source=MemorySource(tensors),
        configs=configs,
        tables=tables,
        latents=None if first is None else (as_number(first.shift), as_number(first.scale)),
        kept=dict.fromkeys([*carried.tensors, *carried.aliases], "kept"),
        kept_prefix="official/",
        aliases=dict(carried.aliases),
        renamed=dict(carried.renamed),
        info=saved_info(model),
    )


def write_whole(found: FoundModel, destination: Path, to: str, weights: str = "all") -> ModelConversion:
    """Write a found model in another layout, and compare what was written with the source, bit for bit, before it takes
    its place. weights: "all" that the source has, or one of "ema" and "live"."""
    if weights == "live" and not found.averaged:
        weights = "all"  # there are no others
    if found.latents is not None:
        for name, value in zip(LATENTS, found.latents, strict=True):
            latent_numbers(name, value, found.configs["first_stage"]["embed_dim"])
    if to == "compvis":
        refuse_inexpressible(found)
    elif to == "diffusers":
        diffusers_write.refuse_inexpressible(found)
    elif "float64" in found.dtypes:
        raise DarkroomError(f"{found.path} holds float64, which a Darkroom model would round; convert it to float32")
    parts = checked_parts(found)
    place: AbstractContextManager[Path] = (
        new_file(destination, replaces=is_former_export)
        if to == "compvis"
        else new_folder(
            destination, replaces=diffusers_write.is_former_folder if to == "diffusers" else is_model_folder
        )
    )
    with place as temporary:
        if to == "compvis":
            write_compvis_model(temporary, found, shapes_of(parts), weights)
            written = _again(temporary)
        elif to == "diffusers":
            diffusers_write.write_diffusers_model(temporary, found, shapes_of(parts), weights)
            written = _again(temporary)
        else:
            written = _write_folder(temporary, found, parts, weights, destination)
        tensors, kept = count_same(written, found, weights)
    return ModelConversion(found, destination, to, weights, tensors, kept)


def _again(place: Path) -> FoundModel:
    found = find_model(place)
    assert found is not None
    return found


def _write_folder(
    folder: Path, found: FoundModel, parts: Mapping[str, Any], weights: str, destination: Path
) -> FoundModel:
    shapes = shapes_of(parts)
    configs = {part: module.config_dict for part, module in parts.items()}
    files = write_parts(folder, found, configs, shapes, weights)
    files |= write_kept(folder, found)
    info = {k: v for k, v in found.info.items() if k not in ("path", "sha256", "weights")}
    info = {"name": destination.name} | info | {CONVERTED_FROM: f"{found.path.name} ({found.layout})"}
    places = {part: part for part in parts}
    with open(folder / INDEX, "x", encoding="utf-8") as file:
        file.write(index_text("latent_diffusion", info, places, files))
    return find_darkroom(folder, {part: folder / part for part in parts}, info)


def count_same(written: FoundModel, source: FoundModel, weights: str) -> tuple[int, int]:
    """How many tensors the written model gives back, and how many of them are kept ones: all, or an error."""
    shapes = shapes_of(hollow_parts(source.configs))
    compared = [
        name for part in source.tables if part in written.tables for name in _pairs(written, source, part, weights)
    ]
    count = sum(_compare(source, theirs, written, ours, shapes[part]) for part, theirs, ours in compared)
    if not source.kept or not written.kept:
        return count, 0
    # One official file has no place for what only diffusers' folders have.
    names = [name for name in source.kept if name in written.kept or "/" not in name]
    theirs, ours = ({n: same(found.kept_place(n)) for n in names if n in found.kept} for found in (source, written))
    kept = _compare(source, theirs, written, ours, {n: source.source.shapes[p.names[0]] for n, p in theirs.items()})
    return count + kept, kept


def _pairs(written: FoundModel, source: FoundModel, part: str, weights: str) -> list[tuple[str, Table, Table]]:
    """(part, table of the source, table of what was written), of every kind of weights that was written."""
    if weights == "all" and part in source.averaged:
        return [
            (part, source.tables[part], written.tables[part]),
            (part, source.averaged[part], written.averaged[part]),
        ]
    one = source.tables_of("ema" if weights == "all" else weights)[part]
    return [(part, one, written.tables_of("ema")[part])]


def _compare(source: FoundModel, theirs: Table, written: FoundModel, ours: Table, shapes: Mapping[str, Shape]) -> int:
    """The number of tensors, all equal bit for bit; both files are read once more."""
    if theirs.keys() != ours.keys():
        raise DarkroomError(f"{written.path} does not give back the tensors of {source.path}")
    for names in groups(source.source, theirs):
        first, second = (
            found.source.read(dict.fromkeys(n for name in names for n in table[name].names))
            for found, table in ((source, theirs), (written, ours))
        )
        for name in names:
            pair = (taken(theirs[name], first, shapes[name]), taken(ours[name], second, shapes[name]))
            if not same_bits(*pair):
                raise DarkroomError(f"{written.path} does not give back {name} of {source.path} bit for bit")
    return len(theirs)
