"""A whole model in other people's files, found and not read yet: what it is, and where each tensor of ours stands.

`find_model` tries the layouts; a layout's module makes a `FoundModel`. Every tensor of the source is accounted for by
name: it is ours (`tables`), the averaged copy of one of ours (`averaged`), or kept for the way back (`kept`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darkroom.config import understanding
from darkroom.errors import DarkroomError
from darkroom.interop.diffusers_first_stage import Number
from darkroom.interop.tensor_file import TensorFile, opened, some
from darkroom.interop.tensor_source import Place, Shape, Table, TensorSource, fits

PARTS = ("first_stage", "denoiser", "conditioner")
LATENTS = ("shift", "scale")  # tensors of our first stage that are numbers elsewhere
OWN = "own"  # the family of models of ours that are of no published one
MODEL_NOTE = "darkroom_model"  # in files that we wrote: the configuration, in JSON
NOTED = ("name", "description", "defaults", "merged_adapters")  # of a model's info, in such notes
KEPT_FILE = "official/kept.safetensors"  # in our folders


@dataclass(frozen=True)
class FoundModel:
    """path:     what was asked for
    layout:   "compvis" (one official file) | "diffusers" | "darkroom"
    family:   a name of `FAMILIES`, or "own" for a model of ours that is of no published family
    title:    the family, for people
    source:   the tensors
    configs:  by part, the dicts that `build_first_stage`, `build_denoiser` and `build_conditioner` take
    tables:   by part, our names -> places in the source, of the weights as the last step of training left them
    averaged: the same for averaged weights, for the parts that have them
    latents:  shift and scale of the latents; None without a first stage
    kept:     tensors of the source that our model does not need, and what they are; a round trip gives them back
    kept_prefix: of their names in the source
    kept_places: their names in the source, of those that have no such prefix
    aliases:  kept ones that are equal to a tensor of the first stage, whose official name is given
    renamed:  our names -> official ones that are not the usual ones
    info:     of the model: name, defaults of generation
    facts:    what no tensor tells and where it is from, for people: "prediction": "v (family)"
    """

    path: Path
    layout: str
    family: str
    title: str
    source: TensorSource
    configs: dict[str, dict[str, Any]]
    tables: dict[str, Table]
    averaged: dict[str, Table] = field(default_factory=dict)
    latents: tuple[Number, Number] | None = None
    kept: dict[str, str] = field(default_factory=dict)
    kept_prefix: str = ""
    kept_places: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)

    def tables_of(self, weights: str) -> dict[str, Table]:
        """The averaged weights where there are some, unless "live"."""
        return self.tables if weights == "live" else {**self.tables, **self.averaged}

    def kept_place(self, name: str) -> str:
        """The name in the source of a kept tensor."""
        if name in self.aliases:
            ours = "autoencoder." + self.aliases[name].removeprefix("first_stage_model.")
            return self.tables["first_stage"][ours].names[0]
        return self.kept_places.get(name, self.kept_prefix + name)

    @property
    def official(self) -> dict[str, str]:
        """The kept tensors of one official file; those of diffusers folders have their folder's name in front."""
        return {name: what for name, what in self.kept.items() if "/" not in name}

    @property
    def left_out(self) -> dict[str, int]:
        """What the model does not need: how many tensors of it."""
        return {what: list(self.kept.values()).count(what) for what in dict.fromkeys(self.kept.values())}

    @property
    def dtypes(self) -> set[str]:
        """Of the tensors that are there; `check_tables` tells of those that are not."""
        names = {n for table in self.tables.values() for place in table.values() for n in place.names}
        return {self.source.dtypes[name] for name in names if name in self.source.dtypes}


def find_model(path: Path, file: TensorFile | None = None) -> FoundModel | None:
    """The whole model in a file or folder; None where there is none, an error where it is damaged. `file`: the one of
    that path, where it was opened before."""
    from darkroom.interop.compvis_model import find_compvis

    if path.is_dir():
        from darkroom.interop.diffusers_folder import find_diffusers

        with understanding(path, "a model"):
            return find_diffusers(path)
    file = file or opened(path)
    with understanding(path, "a model"):
        return None if file is None else find_compvis(file)


def noted_latents(noted: Any) -> tuple[Number, Number]:
    """Shift and scale out of a note that anybody may have changed; ValueError where they are none."""
    shift, scale = noted
    for value in (shift, scale):
        if not is_numbers(value):
            raise ValueError(f"{value!r} is no number")
    return shift, scale


def is_numbers(value: Any) -> bool:
    """One number, or a list of some."""
    numbers = value if isinstance(value, list | tuple) and value else [value]
    return all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)


def check_tables(found: FoundModel, expected: Mapping[str, Mapping[str, Shape]]) -> None:
    """Strict: `expected` are names and shapes of the model built from the configs. Whatever is missing, unknown or of
    another shape ends in one error."""
    missing: list[str] = []
    wrong: list[str] = []
    unknown: list[str] = []
    for part, shapes in expected.items():
        for table in (found.tables[part], found.averaged.get(part, {})):
            unknown += [name for ours in table.keys() - shapes.keys() for name in table[ours].names]
            if not table:
                continue
            for ours, shape in shapes.items():
                if part == "first_stage" and ours in LATENTS:
                    continue
                _compare(ours, shape, table.get(ours), found.source, missing, wrong)
    problems = [
        f"{len(names)} tensor{'s' * (len(names) != 1)} {verb} ({some(names)})"
        for verb, found_names in (("missing", missing), ("unknown", unknown), ("of another shape or type", wrong))
        if (names := list(dict.fromkeys(found_names)))  # averaged copies lack what their originals lack
    ]
    if problems:
        raise DarkroomError(f"{found.path} does not fit {found.title}: {', '.join(problems)}")


def _compare(
    ours: str, shape: Shape, place: Place | None, source: TensorSource, missing: list[str], wrong: list[str]
) -> None:
    if place is None:
        missing.append(ours)
        return
    absent = [name for name in place.names if name not in source.shapes]
    if absent:
        missing.extend(absent)
    elif not fits(place, shape, source.shapes):
        wrong.append(f"{place.names[0]} {source.shapes[place.names[0]]} for {shape}")
    elif bad := [name for name in place.names if "float" not in source.dtypes[name]]:
        wrong.append(f"{bad[0]} {source.dtypes[bad[0]]}")
    elif other := next((n for n in place.names if source.dtypes[n] != source.dtypes[place.names[0]]), None):
        # Both become one tensor of ours, which has one type.
        first = place.names[0]
        wrong.append(f"{other} {source.dtypes[other]} beside {first} {source.dtypes[first]}, which it is joined to")
