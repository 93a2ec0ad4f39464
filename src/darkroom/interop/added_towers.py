"""Text towers that come in files of their own, joined to a model whose file leaves them out (Stable Diffusion 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from darkroom.errors import DarkroomError
from darkroom.interop.compvis_conditions import clip_network, t5_network
from darkroom.interop.found_model import FoundModel
from darkroom.interop.tensor_file import TensorFile
from darkroom.interop.tensor_source import FileSource, Place, Table, same
from darkroom.interop.text_towers import find_towers

EMBEDDING, SECOND_NAME = "shared.weight", "encoder.embed_tokens.weight"  # one table of T5, under either name or both


def with_towers(found: FoundModel, places: str | Path | Sequence[str | Path]) -> FoundModel:
    """The model with the towers in these files or folders: both CLIPs, and T5 where it is there."""
    if found.configs["denoiser"]["network"].get("kind") != "mmdit" or found.configs["conditioner"]["encoders"]:
        raise DarkroomError(f"{found.path} ({found.title}) takes no text towers of other files; leave text_towers out")
    if not isinstance(found.source, FileSource):
        raise DarkroomError(
            f"{found.path} takes no text_towers: they are joined to an official file only; convert it to one first"
        )
    every = [tower for place in _listed(places) for tower in find_towers(place)]
    # OpenCLIP's own names are not those that the official files have.
    clips = sorted((tower for tower in every if tower.family == "clip"), key=lambda tower: tower.width)
    towers = dict(zip(("clip_l", "clip_g"), clips, strict=False))
    if (t5 := next((tower for tower in every if tower.family == "t5"), None)) is not None:
        towers["t5"] = t5
    if len(clips) != 2:
        held = "; ".join(tower.what for tower in every) or "nothing"
        raise DarkroomError(f"text_towers: {places} holds {held}; two CLIPs are needed, and T5 may be added")
    files: list[tuple[str, TensorFile]] = []
    table: dict[str, Place] = {}
    width = found.configs["denoiser"]["network"]["context_dim"]
    config: dict[str, Any] = {"kind": "sd3_text", "t5": None, "context_dim": width}
    for name, tower in towers.items():
        prefix = f"{name}/"
        files += [(prefix, file) for file in {id(f): f for f in tower.files.values()}.values()]
        names = dict(tower.names)
        if SECOND_NAME in names:
            names.setdefault(EMBEDDING, names[SECOND_NAME])
            del names[SECOND_NAME]
        table |= {
            f"encoders.text.towers.{name}.network.{ours}": same(prefix + theirs) for ours, theirs in names.items()
        }
        config[name] = _config(name, {ours: tower.files[theirs].shapes[theirs] for ours, theirs in names.items()})
    tables: dict[str, Table] = {**found.tables, "conditioner": table}
    return replace(
        found,
        source=found.source.joined(FileSource(files)),
        configs=found.configs | {"conditioner": {"encoders": {"text": config}}},
        tables=tables,
        facts=found.facts | {"text towers": ", ".join(f"{n} from {t.place}" for n, t in towers.items())},
    )


def _listed(places: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    return [places] if isinstance(places, str | Path) else places


def _config(name: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    if name == "t5":
        return {"network": t5_network(shapes, "")}
    return {"network": clip_network(shapes, "", model="ViT-bigG-14" if name == "clip_g" else "ViT-L-14")}
