"""Darkroom model folders as found models, and found models written as such folders, tensor by tensor.

What an official file held and the model does not need is kept in `official/kept.safetensors`, so that the way back
gives it again: small things mostly, but also the perceptual network and discriminator of some files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkroom.interop.content import Content
from darkroom.interop.first_stage_files import as_number
from darkroom.interop.found_model import KEPT_FILE, LATENTS, FoundModel
from darkroom.interop.kept_tensors import Kept, keep, kept_notes, write_kept_file
from darkroom.interop.tensor_file import TensorFile, open_tensor_file
from darkroom.interop.tensor_source import FileSource, Place, Shape, Table, groups, same
from darkroom.safe_files import read_json, sha256_of, stream_safetensors

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, AVERAGED, LIVE = "config.json", "model.safetensors", "model.live.safetensors"


def find_darkroom(path: Path, places: Mapping[str, Path], info: Mapping[str, Any]) -> FoundModel:
    """A model folder. `places`: by part, the folder of its files."""
    files: list[tuple[str, TensorFile]] = []
    tables: dict[str, Table] = {}
    averaged: dict[str, Table] = {}
    configs: dict[str, dict[str, Any]] = {}
    latents = None
    for part, place in places.items():
        configs[part] = read_json(place / CONFIG, "config")
        first = open_tensor_file(place / AVERAGED)
        files.append((f"{part}/", first))
        table = {name: same(f"{part}/{name}") for name in first.shapes}
        if part == "first_stage":
            values = first.read(LATENTS)
            latents = (as_number(values["shift"]), as_number(values["scale"]))
            table = {name: spot for name, spot in table.items() if name not in LATENTS}
        tables[part] = table
        if (place / LIVE).is_file():
            averaged[part] = table
            live = open_tensor_file(place / LIVE)
            files.append((f"live/{part}/", live))
            tables[part] = {name: same(f"live/{part}/{name}") for name in live.shapes if name not in LATENTS}
    kept: dict[str, str] = {}
    aliases: dict[str, str] = {}
    renamed: dict[str, str] = {}
    if (path / KEPT_FILE).is_file():
        file = open_tensor_file(path / KEPT_FILE)
        files.append(("official/", file))
        kept, aliases, renamed = kept_notes(file)
    family = str(info.get("family", "own"))
    return FoundModel(
        path=path,
        layout="darkroom",
        family=family,
        title=str(info.get("name", path.name)),
        source=FileSource(files),
        configs=configs,
        tables=tables,
        averaged=averaged,
        latents=latents,
        kept=kept,
        kept_prefix="official/",
        aliases=aliases,
        renamed=renamed,
        info=dict(info),
    )


def write_parts(
    folder: Path,
    found: FoundModel,
    configs: Mapping[str, Mapping[str, Any]],
    shapes: Mapping[str, Mapping[str, Shape]],
    weights: str,
) -> dict[str, str]:
    """The parts' folders, each with its config and weights; gives the SHA-256 of each file. `configs`: complete ones.

    weights: "all" (averaged ones, and beside them those of the last step), or one of "ema" and "live".
    """
    digests: dict[str, str] = {}
    first = found.tables_of("ema" if weights == "all" else weights)
    for part, names in shapes.items():
        place = folder / part
        place.mkdir()
        with open(place / CONFIG, "x", encoding="utf-8") as file:
            file.write(json.dumps(configs[part], indent=2, ensure_ascii=False) + "\n")
        digests[f"{part}/{CONFIG}"] = sha256_of(place / CONFIG)
        digests[f"{part}/{AVERAGED}"] = _write_part(place / AVERAGED, found, part, first[part], names)
        if weights == "all" and part in found.averaged:
            digests[f"{part}/{LIVE}"] = _write_part(place / LIVE, found, part, found.tables[part], names)
    return digests


def _write_part(path: Path, found: FoundModel, part: str, table: Table, shapes: Mapping[str, Shape]) -> str:
    content = Content(ready=_latents(found) if part == "first_stage" else {})
    content.add({name: same(name) for name in table}, found.source, table, shapes)
    return stream_safetensors(path, content.entries(), content.produce)


def _latents(found: FoundModel) -> dict[str, Tensor]:
    import torch

    assert found.latents is not None
    return {name: torch.tensor(value) for name, value in zip(LATENTS, found.latents, strict=True)}


def write_kept(folder: Path, found: FoundModel) -> dict[str, str]:
    """The tensors that the model does not need; those that are equal to one of the model's are noted instead."""
    if not (found.kept or found.renamed):
        return {}
    aliases = found.aliases or _copies(found)
    content = Content()
    for name in found.kept:
        if name not in aliases:
            content.copied[name] = (found.source, found.kept_place(name))
    what = {name: what for name, what in found.kept.items() if name in content.copied}
    return write_kept_file(folder, content, what, aliases, found.renamed)


def kept_of(found: FoundModel) -> Kept | None:
    """What a model that is loaded from there carries along."""
    aliases = found.aliases or _copies(found)
    names = {name: found.kept_place(name) for name in found.kept if name not in aliases}
    return keep(found.source, names, found.kept, aliases, found.renamed)


def _copies(found: FoundModel) -> dict[str, str]:
    """Kept tensors -> the official name of one of the first stage's that is equal to it, bit for bit."""
    from darkroom.interop.compvis_model import CONDITION, FIRST_STAGE
    from darkroom.interop.first_stage_files import same_bits

    shapes = found.source.shapes
    pairs = {name: FIRST_STAGE + name.removeprefix(CONDITION) for name in found.kept if name.startswith(CONDITION)}
    pairs = {name: original for name, original in pairs.items() if shapes.get(original) == shapes[name]}
    result: dict[str, str] = {}
    for names in groups(found.source, {name: Place((name, original)) for name, original in pairs.items()}):
        tensors = found.source.read([*names, *(pairs[name] for name in names)])
        result |= {name: pairs[name] for name in names if same_bits(tensors[name], tensors[pairs[name]])}
    return result
