"""Whole models in diffusers folders: model_index.json and one folder a component, found and not read yet.

A folder that we wrote notes its configuration; of any other the components' own configs tell it. Strict as everywhere:
each tensor of each component is ours, or kept by name for the way back; anything else is an error that names it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from darkroom.errors import DarkroomError
from darkroom.generation_defaults import check_defaults
from darkroom.interop import diffusers_first_stage as autoencoders
from darkroom.interop.diffusers_components import (
    MODEL,
    TRANSFORMER,
    Component,
    components,
    network_component,
    network_config,
)
from darkroom.interop.diffusers_configs import (
    MADE,
    NETWORK_CLASSES,
    FoundConfigs,
    bare_configs,
    made_tensors,
    read_configs,
)
from darkroom.interop.diffusers_pipelines import OWN_PIPELINE, Pipeline
from darkroom.interop.first_stage_files import CONFIG, PIPELINE, expected_shapes, plain_config
from darkroom.interop.found_model import NOTED, OWN, FoundModel, noted_latents
from darkroom.interop.stated_sizes import check_stated
from darkroom.interop.tensor_file import TensorFile, open_tensor_file, some
from darkroom.interop.tensor_source import FileSource, JoinedSource, Made, MadeSource, Place, Shape, Table, same
from darkroom.interop.text_towers import BESIDE
from darkroom.safe_files import read_json

NOTES = "darkroom"  # the folder of what only we read
NOTE_FILE, REST_FILE = f"{NOTES}/note.json", f"{NOTES}/rest.safetensors"
LIVE = "live/"  # in front of names of weights as the last step of training left them
LIVE_VARIANT = "non_ema"  # diffusers' word for them
# Components whose configs state numbers of layers.
WITH_LAYERS = ("unet", "transformer", "bert", *(f"text_encoder{n}" for n in ("", "_2", "_3")), *autoencoders.SUBFOLDERS)
FREE_TABLE = 2**22  # numbers of a computed table that are always allowed
# Components that are no part of a latent diffusion model: a filter behind it, estimators of conditions.
BESIDE_MODEL = ("safety_checker", "feature_extractor", "image_encoder", "depth_estimator", "watermarker")


def find_diffusers(path: Path) -> FoundModel | None:
    """The whole model in a pipeline's folder, or the denoiser in the folder of its network alone; None where there is
    neither, an error where it is not known here."""
    if not (path / PIPELINE).is_file():
        return _bare(path)
    index = read_json(path / PIPELINE, "pipeline index")
    name = index.get("_class_name")
    pipeline = str(name[-1] if isinstance(name, list) and name else name)
    if (path / NOTE_FILE).is_file():
        return _noted(path, pipeline, component_names(index))
    if pipeline == OWN_PIPELINE or isinstance(name, list):
        raise DarkroomError(f"{path} has a pipeline of its own ({pipeline}) and no {NOTE_FILE}, which says what it is")
    return _foreign(path, pipeline, index)


# ------------------------------------------------------------------------------------------------------------- files


def component_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The weight files of a component: one, or the parts that an index names; none where there are none."""
    for stem, suffix in (
        (MODEL, "safetensors"),
        (TRANSFORMER, "safetensors"),
        (MODEL, "bin"),
        ("pytorch_model", "bin"),
    ):
        for middle in (f"{variant}.",) if variant else ("", "fp16."):
            if (place := folder / f"{stem}.{middle}{suffix}").is_file():
                return [place]
            index = folder / f"{stem}.{suffix}.index.{middle}json"
            if index.is_file():
                names = read_json(index, "index of weights").get("weight_map", {})
                parts = sorted(set(names.values())) if isinstance(names, dict) else []
                if not parts or any(not isinstance(n, str) or PurePosixPath(n).name != n for n in parts):
                    raise DarkroomError(f"{index} is damaged: its parts are no names of files beside it")
                return [folder / part for part in parts]
    return []


Files = list[tuple[str, TensorFile]]  # each with what stands in front of its names


def _open(path: Path, folder: str, variant: str | None = None) -> Files:
    files = [(f"{folder}/", open_tensor_file(place)) for place in component_files(path / folder, variant)]
    if not files and variant is None:
        raise DarkroomError(
            f"{path / folder} holds no weights; {MODEL}.safetensors or {TRANSFORMER}.safetensors is needed"
        )
    return files


def component_names(index: Mapping[str, Any]) -> list[str]:
    """The folders that an index lists, without those that are left empty."""
    return [
        name
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and all(value)
    ]


# --------------------------------------------------------------------------------------------------------- other's


def _foreign(path: Path, pipeline: str, index: Mapping[str, Any]) -> FoundModel:
    names = component_names(index)
    opened: dict[str, Files] = {}
    for name in names:
        place = path / name / CONFIG
        if name in WITH_LAYERS and place.is_file():
            opened[name] = _open(path, name)
            check_stated(read_json(place, "config"), [file.shapes for _, file in opened[name]], path / name, place)
    read = read_configs(path, pipeline, names)
    source = FileSource(pair for folder in read.folders for pair in opened.get(folder) or _open(path, folder))
    tables, kept, made = _tables(path, read, source.shapes)
    left_out = [name for name in names if name in BESIDE_MODEL]
    facts = {"prediction": f"{read.configs['denoiser']['prediction_type']} (of scheduler_config.json)"}
    facts |= {"left out": ", ".join(left_out)} if left_out else {}
    live = _live(path, read.folders, tables)
    return FoundModel(
        path=path,
        layout="diffusers",
        family=read.family,
        title=read.title,
        source=JoinedSource(source, MadeSource(made), FileSource(live[0])),
        configs=read.configs,
        tables=tables | live[1],
        averaged={part: tables[part] for part in live[1]},
        latents=read.latents,
        kept=kept,
        info={"name": path.resolve().name, "defaults": read.defaults}
        | ({} if read.family == OWN else {"family": read.family}),
        facts=facts,
    )


def _tables(
    path: Path, read: FoundConfigs, shapes: Mapping[str, Shape]
) -> tuple[dict[str, Table], dict[str, str], dict[str, Made]]:
    """By part, where ours stand; what is kept; what theirs computes and ours stores."""
    first = read.configs["first_stage"]
    own = {f"autoencoder.{n}": s for n, s in expected_shapes(plain_config(first, str(path)), path).items()}
    conditions = {name: shapes[theirs] for name, theirs in read.sizes_from.items() if theirs in shapes}
    found = components(
        read.configs, {"first_stage": own, "conditioner": conditions}, read.latents, read.pipeline, read.sample_size
    )
    tables: dict[str, dict[str, Place]] = {"first_stage": {}, "denoiser": {}, "conditioner": {}}
    for component in found:
        tables[component.part] |= _as_stored(component, shapes)
    made = made_tensors(read.configs)
    _check_made(path, made, shapes)
    for ours in made:
        part, _, name = ours.removeprefix(MADE).partition("/")
        tables[part][name] = same(ours)
    used = {name for table in tables.values() for place in table.values() for name in place.names}
    kept: dict[str, str] = {}
    unknown = []
    for name in shapes:
        if name not in used:
            what = _kept(name)
            if what is None:
                unknown.append(name)
            else:
                kept[name] = what
    if unknown:
        raise DarkroomError(f"{path} holds {len(unknown)} tensors of no known part ({some(unknown)})")
    return dict(tables), kept, made


def _check_made(path: Path, made: Mapping[str, Made], shapes: Mapping[str, Shape]) -> None:
    """No weights tell the size of a table that theirs computes, so it is compared with all of them."""
    most = max(FREE_TABLE, sum(math.prod(shape) for shape in shapes.values()))
    for name, one in made.items():
        if math.prod(one.shape) > most:
            raise DarkroomError(
                f"{path} states sizes (sample_size, patch_size) whose table {name.rpartition('.')[2]} of shape "
                f"{one.shape} is larger than all its weights; give the config and the weights of one model"
            )


def _as_stored(component: Component, shapes: Mapping[str, Shape]) -> Table:
    """The component's places under the names that the files have, which older and newer releases spell otherwise."""
    return {
        ours: replace(place, names=tuple(_stored_name(name, shapes) for name in place.names))
        for ours, place in component.places().items()
    }


def _stored_name(name: str, shapes: Mapping[str, Shape]) -> str:
    if name in shapes:
        return name
    folder, _, rest = name.partition("/")
    options = [
        f"{folder}/{rest.removeprefix('text_model.')}",
        name.replace("shared.weight", "encoder.embed_tokens.weight"),
    ]
    if ".attentions." in rest:
        for new, old in autoencoders.OLD_ATTENTION.items():
            options += [f"{start}.{old}{end}" for start, dot, end in [rest_of(name, new)] if dot]
    return next((option for option in options if option in shapes), name)


def rest_of(name: str, layer: str) -> tuple[str, bool, str]:
    """(what stands before `.layer.`, whether it is there, what stands behind it with its dot)."""
    start, dot, end = name.rpartition(f".{layer}.")
    return start, bool(dot), f".{end}"


def _kept(name: str) -> str | None:
    folder, _, rest = name.partition("/")
    if not folder.startswith("text_encoder") and folder != "bert":
        return None
    if rest.endswith("position_ids"):
        return "positions of the text tower"
    if rest == "encoder.embed_tokens.weight":
        return "table of tokens, listed again"
    return "unused part of the text tower" if BESIDE.fullmatch(rest) or rest == "text_projection.weight" else None


def _live(path: Path, folders: Iterable[str], tables: Mapping[str, Table]) -> tuple[Files, dict[str, Table]]:
    """The weights before averaging, where components have them beside the averaged ones; by part, where ours stand."""
    files = [(LIVE + prefix, file) for folder in folders for prefix, file in _open(path, folder, LIVE_VARIANT)]
    there = {prefix + name for prefix, file in files for name in file.shapes}
    result: dict[str, Table] = {}
    for part, table in tables.items():
        moved = {
            ours: replace(place, names=tuple(LIVE + name for name in place.names))
            for ours, place in table.items()
            if LIVE + place.names[0] in there
        }
        if moved:
            result[part] = {**table, **moved}
    return files, result


def _bare(path: Path) -> FoundModel | None:
    """A network's own folder: a denoiser without first stage and conditions, its noise that of the published models."""
    config = read_json(path / CONFIG, "config") if (path / CONFIG).is_file() else {}
    if config.get("_class_name") not in NETWORK_CLASSES:
        return None
    files = [open_tensor_file(place) for place in component_files(path)]
    if not files:
        raise DarkroomError(f"{path} holds no weights; {MODEL}.safetensors is needed")
    check_stated(config, [file.shapes for file in files], path, path / CONFIG)
    configs = bare_configs(path / CONFIG)
    component = network_component(network_config(configs["denoiser"]), {}, None)
    source = FileSource([(f"{component.folder}/", file) for file in files])
    table = dict(_as_stored(component, source.shapes))
    made = made_tensors(configs)
    _check_made(path, made, source.shapes)
    table |= {name.removeprefix(f"{MADE}denoiser/"): same(name) for name in made}
    used = {name for place in table.values() for name in place.names}
    if unknown := [name for name in source.shapes if name not in used]:
        raise DarkroomError(f"{path} holds {len(unknown)} tensors of no known part ({some(unknown)})")
    return FoundModel(
        path=path,
        layout="diffusers",
        family=OWN,
        title=f"a diffusers {component.cls}",
        source=JoinedSource(source, MadeSource(made)),
        configs=configs,
        tables={"denoiser": table, "conditioner": {}},
        info={"name": path.resolve().name},
        facts={"prediction": f"{configs['denoiser']['prediction_type']} (of the published models)"},
    )


# -------------------------------------------------------------------------------------------------------------- ours


def _noted(path: Path, pipeline: str, names: list[str]) -> FoundModel:
    """A folder that we wrote: the note says what it is; what the components have no place for is in a file beside."""
    rest = [open_tensor_file(path / REST_FILE)] if (path / REST_FILE).is_file() else []
    inside = [name for name in names if name not in BESIDE_MODEL and PurePosixPath(name).name == name]
    opened = {name: [open_tensor_file(place) for place in component_files(path / name)] for name in inside}
    note = read_json(path / NOTE_FILE, "note about the model")
    stored = [file.shapes for file in (*(file for files in opened.values() for file in files), *rest)]
    check_stated(note.get("configs"), stored, path, path / NOTE_FILE)
    try:
        configs, latents = dict(note["configs"]), noted_latents(note["latents"])
        family, kept, info = str(note["family"]), dict(note["kept"]), dict(note["info"])
        check_defaults(info.get("defaults"), path / NOTE_FILE)
        aliases, renamed, name = dict(note["aliases"]), dict(note["renamed"]), str(note["autoencoder"])
        places: dict[str, str] = dict(note["places"])
        shapes = {part: {n: tuple(s) for n, s in table.items()} for part, table in note["shapes"].items()}
        found = components(configs, shapes, latents, Pipeline(pipeline, name))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError):
        raise DarkroomError(f"{path / NOTE_FILE} is damaged: what it says about the model cannot be read") from None
    folders = [component.folder for component in found]
    files = [(f"{folder}/", file) for folder in folders for file in opened.get(folder, ())]
    source = FileSource([*files, *(("", file) for file in rest)])
    tables: dict[str, dict[str, Place]] = {"first_stage": {}, "denoiser": {}, "conditioner": {}}
    for component in found:
        tables[component.part] |= _as_stored(component, source.shapes)
    for part, table in tables.items():
        start = f"{NOTES}/{part}/"
        table |= {n.removeprefix(start): same(n) for n in source.shapes if n.startswith(start)}
    live_files, live = _live(path, folders, tables)
    for part, table in tables.items():
        start = f"{LIVE}{NOTES}/{part}/"
        if moved := {n.removeprefix(start): same(n) for n in source.shapes if n.startswith(start)}:
            live[part] = {**live.get(part, table), **moved}
    joined = JoinedSource(source, FileSource(live_files))
    made = {f"{start}{c.folder}/{n}" for c in found for n in c.ready for start in ("", LIVE)}
    used = made | {n for t in (*tables.values(), *live.values()) for place in t.values() for n in place.names}
    used |= {str(places.get(n, n)) for n in kept if n not in aliases}
    if unknown := [n for n in joined.shapes if n not in used]:
        raise DarkroomError(f"{path} holds {len(unknown)} tensors of no known part ({some(unknown)})")
    if missing := [n for n in kept if n not in aliases and places.get(n, n) not in source.shapes]:
        raise DarkroomError(f"{path} lacks {len(missing)} tensors that its note names ({some(missing)})")
    return FoundModel(
        path=path,
        layout="diffusers",
        family=family,
        title=str(info.get("name", path.name)),
        source=joined,
        configs=configs,
        tables=tables | live,
        averaged={part: tables[part] for part in live},
        latents=latents,
        kept=kept,
        kept_places=places,
        aliases=aliases,
        renamed=renamed,
        info=info | ({} if family == OWN else {"family": family}),
        facts={"everything": f"noted in {NOTE_FILE}, which darkroom wrote"},
    )


def note_text(
    found: FoundModel, autoencoder: str, shapes: Mapping[str, Mapping[str, Shape]], places: Mapping[str, str]
) -> str:
    """What `_noted` reads. `places`: of kept tensors, the names in the written folder's files."""
    note = {
        "family": found.family,
        "configs": found.configs,
        "latents": found.latents,
        "autoencoder": autoencoder,
        "info": {key: value for key, value in found.info.items() if key in NOTED},
        "kept": found.kept,
        "places": dict(places),
        "aliases": found.aliases,
        "renamed": found.renamed,
        "shapes": {part: {n: list(s) for n, s in table.items()} for part, table in shapes.items()},
    }
    return json.dumps(note, indent=1, ensure_ascii=False) + "\n"
