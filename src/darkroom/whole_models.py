"""Whole models in the layouts of other libraries: found in files, folders and memory, written, compared bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from darkroom.adapters import saved_info
from darkroom.assemble import FiniteCheck, checked_parts, hollow_parts, latent_numbers, shapes_of
from darkroom.errors import DarkroomError
from darkroom.interop import diffusers_write
from darkroom.interop.compvis_write import keeps_averages, refuse_inexpressible, write_compvis_model
from darkroom.interop.darkroom_model import find_darkroom, write_kept, write_parts
from darkroom.interop.first_stage_files import as_number, is_former_export, same_bits
from darkroom.interop.found_model import LATENTS, OWN, PARTS, FoundModel, find_model
from darkroom.interop.kept_tensors import reachable
from darkroom.interop.tensor_file import TensorFile
from darkroom.interop.tensor_source import JoinedSource, MemorySource, Shape, Table, groups, same, taken
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_folder import CONFIG, CONVERTED_FROM, INDEX, index_text, is_model_folder, read_index
from darkroom.model_io import keep_other_files
from darkroom.safe_files import new_file, new_folder, sha256_of

Shapes = Mapping[str, Mapping[str, Shape]]


@dataclass(frozen=True)
class ModelConversion:
    """What a conversion of a whole model did. `tensors`: so many came back from what was written, bit for bit; `kept`:
    among them those that only the source's layout has; `weights`: "all", "ema" or "live"; `left_out`: parts of the
    source, and kinds of their weights, that the layout has no place for."""

    source: FoundModel
    destination: Path
    format: str
    weights: str
    tensors: int
    kept: int
    left_out: tuple[str, ...] = ()

    @property
    def has_both(self) -> bool:
        """Whether the source has averaged weights and live ones."""
        return bool(self.source.averaged)


def find_whole(path: Path, file: TensorFile | None = None) -> FoundModel | None:
    """The whole model in a file or folder; None if there is a first stage alone, or nothing known. `file`: the one of
    that path, where it was opened before."""
    if not is_model_folder(path):
        return find_model(path, file)
    index = read_index(path)
    if index.kind != "latent_diffusion":
        return None
    return find_darkroom(path, {part: place for part, place in index.parts.items() if part in PARTS}, index.info)


def found_in_memory(model: LatentDiffusion) -> FoundModel:
    """A model at hand as a found one: what `export` writes."""
    modules = {"first_stage": model.first_stage, "denoiser": model.denoiser, "conditioner": model.conditioner}
    configs: dict[str, dict[str, Any]] = {}
    carried = reachable(model.kept)
    tensors: dict[str, torch.Tensor] = {}
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
        source=JoinedSource(MemorySource(tensors), carried.source),
        configs=configs,
        tables=tables,
        latents=None if first is None else (as_number(first.shift), as_number(first.scale)),
        kept={name: carried.what.get(name, "kept") for name in (*carried.source.shapes, *carried.aliases)},
        aliases=dict(carried.aliases),
        renamed=dict(carried.renamed),
        info=saved_info(model),
    )


def write_whole(found: FoundModel, destination: Path, to: str, weights: str = "all") -> ModelConversion:
    """Write a found model in another layout, and compare what was written with the source, bit for bit, before it takes
    its place. weights: "all" that the source has, or one of "ema" and "live"."""
    if weights == "live" and not found.averaged:
        weights = "all"  # there are no others
    left_out: list[str] = []
    if to == "compvis" and weights == "all" and found.averaged:
        if not keeps_averages(found, weights):
            weights = "ema"
            left_out.append("weights as training left them")
        left_out += [f"{p}'s weights as training left them" for p in found.averaged if p != "denoiser"] * (
            weights == "all"
        )
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
    left_out += [_name(part) for part, table in found.tables.items() if table and not written.tables.get(part)]
    if _preview_of(found) is not None and not (destination / "preview" / CONFIG).is_file():
        left_out.append(_name("preview"))
    return ModelConversion(found, destination, to, weights, tensors, kept, tuple(left_out))


def _name(part: str) -> str:
    return {"preview": "preview decoder"}.get(part, part.replace("_", " "))


def _preview_of(found: FoundModel) -> Path | None:
    """The folder of the source's preview decoder."""
    if found.layout != "darkroom" or not is_model_folder(found.path):
        return None
    return read_index(found.path).parts.get("preview")


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
    # It shows the latents of the averaged first stage.
    if (preview := _preview_of(found)) is not None and not (weights == "live" and "first_stage" in found.averaged):
        shutil.copytree(preview, folder / "preview")
        files |= {f"preview/{file.name}": sha256_of(file) for file in sorted((folder / "preview").iterdir())}
        places["preview"] = "preview"
    with open(folder / INDEX, "x", encoding="utf-8") as file:
        file.write(index_text("latent_diffusion", info, places, files))
    keep_other_files(destination, folder, replaced={INDEX, "official", "preview", *PARTS})
    return find_darkroom(folder, {part: folder / part for part in parts}, info)


def count_same(written: FoundModel, source: FoundModel, weights: str) -> tuple[int, int]:
    """How many tensors the written model gives back, and how many of them are kept ones: all, or an error."""
    shapes = shapes_of(hollow_parts(source.configs))
    compared = [
        name for part in source.tables if part in written.tables for name in _pairs(written, source, part, weights)
    ]
    check = FiniteCheck(source.path)
    count = sum(_compare(source, theirs, written, ours, shapes[part], check) for part, theirs, ours in compared)
    check.tell()
    if not source.kept or not written.kept:
        return count, 0
    # One official file has no place for what only diffusers' folders have.
    names = [name for name in source.kept if name in written.kept or "/" not in name]
    theirs, ours = ({n: same(found.kept_place(n)) for n in names if n in found.kept} for found in (source, written))
    kept = _compare(source, theirs, written, ours, {n: source.source.shapes[p.names[0]] for n, p in theirs.items()})
    return count + kept, kept


def _pairs(written: FoundModel, source: FoundModel, part: str, weights: str) -> list[tuple[str, Table, Table]]:
    """(part, table of the source, table of what was written), of every kind of weights that was written."""
    # The official layout has a second place for the denoiser's weights alone.
    if weights == "all" and part in source.averaged and (part == "denoiser" or written.layout != "compvis"):
        return [
            (part, source.tables[part], written.tables[part]),
            (part, source.averaged[part], written.averaged[part]),
        ]
    one = source.tables_of("ema" if weights == "all" else weights)[part]
    return [(part, one, written.tables_of("ema")[part])]


def _compare(
    source: FoundModel,
    theirs: Table,
    written: FoundModel,
    ours: Table,
    shapes: Mapping[str, Shape],
    check: FiniteCheck | None = None,
) -> int:
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
            if check is not None:
                check.see(theirs[name].names[0], pair[0])
    return len(theirs)
