"""Scores with everything that it takes to make them again, and what makes two of them comparable.

A score is what was measured (a model, its solver, steps, guidance, weights) under how it was measured (metric and its
options, extractor, reference set, number of images, balance of classes). Two scores belong into one column when the
second part is the same; the first is what a comparison is about.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darkroom.config import from_dict, to_dict, understanding
from darkroom.errors import DarkroomError
from darkroom.safe_files import read_json, write_file

RECORD_VERSION = 1  # changes when the same settings give other numbers
KIND = "darkroom scores"


@dataclass(frozen=True)
class Extraction:
    """The network that looked at the pictures. weights: SHA-256; resize: its own rule, in words."""

    name: str
    weights: str
    resize: str


@dataclass(frozen=True)
class Score:
    """One number.

    options: of the metric itself (`neighbours`, `levels`, ...)
    extraction: None for metrics that need no network
    deviations: of the value, when the images are drawn again with replacement; see `intervals.deviations`. Empty where
        there is no such interval
    resampled: which images those are: "images" (those scored) or "reference"
    note: about this number, for people
    """

    metric: str
    value: float
    options: dict[str, Any] = field(default_factory=dict)
    extraction: Extraction | None = None
    deviations: list[float] = field(default_factory=list)
    resampled: str = "images"
    note: str = ""


@dataclass(frozen=True)
class ImageSet:
    """Real images: the reference, or those of training. source: names without folders; digest: SHA-256 of the pixels
    that were looked at; examples: how many there are, of which `count` were used, evenly spread; crop: how they were
    brought to `size` (width, height)."""

    source: list[str]
    split: str
    digest: str
    examples: int
    count: int
    size: list[int]
    crop: str


@dataclass(frozen=True)
class Sampling:
    """Where the scored images came from.

    model: name; for stored images that of their folder or file. digest: of the model's weights, or of the pixels
    weights: "ema" or "live"; None where images were stored or nothing says it
    seed: of the first image; image k has seed + k
    conditions: the fields that each image was given, of the reference example with its number, and
    conditions_digest: SHA-256 of them
    made: by field that was made of the reference images for the model (smaller pictures, masks): the rule
    class_balance: how many images of each class were asked for; empty without classes
    """

    model: str
    digest: str
    count: int
    size: list[int]
    generated: bool = True
    weights: str | None = None
    seed: int | None = None
    solver: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    eta: float | None = None
    nfe: int | None = None
    conditions: list[str] = field(default_factory=list)
    conditions_digest: str = ""
    made: dict[str, Any] = field(default_factory=dict)
    class_balance: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Environment:
    """On what, and with which versions. The number of threads and the batch size can change the last digits."""

    darkroom: str
    torch: str
    numpy: str
    python: str
    hardware: str
    device: str
    threads: int
    batch_size: int
    precision: str


@dataclass(frozen=True)
class Curve:
    """Scores of the first `count` images over one setting: `points` are (setting, scores by metric)."""

    setting: str
    count: int
    points: list[tuple[float, dict[str, float]]]


@dataclass(frozen=True)
class Record:
    """What `darkroom eval` leaves: scores that share everything but metric and extractor.

    request: the arguments that `--repeat` calls again, places included; nothing else reads it.
    """

    scores: list[Score]
    reference: ImageSet
    sampling: Sampling
    environment: Environment
    training: ImageSet | None = None
    warnings: list[str] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    request: dict[str, Any] = field(default_factory=dict)
    record_version: int = RECORD_VERSION
    kind: str = KIND

    def score(self, metric: str) -> Score | None:
        return next((s for s in self.scores if s.metric == metric), None)

    @property
    def values(self) -> dict[str, float]:
        """By metric."""
        return {s.metric: s.value for s in self.scores}

    @property
    def name(self) -> str:
        """The model, with what is usually varied."""
        s = self.sampling
        parts = [
            f"{s.steps} step{'' if s.steps == 1 else 's'}" if s.steps else "",
            s.solver or "",
            "live weights" if s.weights == "live" else "",
        ]
        guidance = f"guidance {s.guidance_scale:g}" if s.guidance_scale is not None else ""
        settings = ", ".join(part for part in (*parts, guidance) if part)
        return f"{s.model} ({settings})" if settings else s.model


# --- files ------------------------------------------------------------------------------------------------------------


def write_record(record: Record, path: Path) -> None:
    """As JSON, whole or not at all."""
    text = json.dumps(to_dict(record), indent=1, ensure_ascii=False)
    # Lists of numbers on one line, for people. Texts inside JSON have no line breaks, so that none is touched.
    text = re.sub(r"\[\n([-+.,\deE\s]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    write_file(path, (text + "\n").encode())


def read_record(path: Path | str) -> Record:
    """A record that `darkroom eval` wrote, from the file or its folder. Raises DarkroomError for anything else."""
    path = Path(path).expanduser()
    path = path / "scores.json" if path.is_dir() else path
    if not path.is_file():
        raise DarkroomError(f"{path}: no such file; give the scores.json that `darkroom eval MODEL DATA` wrote")
    raw = read_json(path, "record of scores")
    if raw.get("kind") != KIND:
        reconstruction = isinstance(raw.get("protocol"), Mapping) and "first_stage" in raw["protocol"]
        what = "scores of a first stage" if reconstruction else "no record of scores"
        raise DarkroomError(f"{path}: holds {what}; give a scores.json that `darkroom eval MODEL DATA` wrote")
    version = raw.get("record_version")
    if version != RECORD_VERSION:
        raise DarkroomError(
            f"{path}: is a record of version {version}, this Darkroom makes and reads version {RECORD_VERSION}: its "
            "numbers are made by another protocol; measure again"
        )
    try:
        with understanding(path, "a record of scores"):
            return from_dict(Record, raw)
    except DarkroomError as error:
        raise DarkroomError(f"{path}: {str(error).removeprefix(f'{path} ')}") from error


# --- comparing --------------------------------------------------------------------------------------------------------


def protocol_of(record: Record, score: Score) -> dict[str, Any]:
    """How a score was measured, flat: what must agree for two scores to share a column."""
    reference, sampling = record.reference, record.sampling
    found: dict[str, Any] = {
        "reference set": " + ".join(reference.source),
        "reference digest": reference.digest[:16],
        "reference images": reference.count,
        "crop": reference.crop,
        "images": sampling.count,
        "size": "x".join(map(str, sampling.size)),
        "class balance": _balance(sampling.class_balance),
    }
    if sampling.conditions_digest:
        found["conditions"] = f"{', '.join(sampling.conditions)} {sampling.conditions_digest[:16]}"
    for name, rule in sampling.made.items():
        found[f"{name} made with"] = ", ".join(f"{key} {value}" for key, value in rule.items())
    if score.extraction is not None:
        found |= {
            "extractor": score.extraction.name,
            "extractor weights": score.extraction.weights[:16],
            "extractor resize": score.extraction.resize,
        }
    return found | {f"option {name}": value for name, value in sorted(score.options.items())}


def _balance(classes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(classes.items()))


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What differs, each as "name: this against that". The name of a reference is not compared: its digest is."""
    names = [n for n in dict.fromkeys((*one, *other)) if n != "reference set"]
    result = []
    for name in names:
        if one.get(name) != other.get(name):
            shown = [str(side.get(name, "none"))[:60] or "none" for side in (one, other)]
            if name == "reference digest":
                shown = [f"{side.get('reference set', '')} {side.get(name, '')}" for side in (one, other)]
            result.append(f"{name}: {shown[0]} against {shown[1]}")
    return result


def columns_of(records: Sequence[Record]) -> list[str]:
    """The metrics of all records, in the order they come."""
    return list(dict.fromkeys(score.metric for record in records for score in record.scores))


def check_comparable(records: Sequence[Record], names: Sequence[str]) -> None:
    """Raise DarkroomError, naming what differs, when scores of one metric were measured in different ways."""
    for metric in columns_of(records):
        having = [(name, record, score) for name, record in zip(names, records, strict=True)
                  if (score := record.score(metric)) is not None]  # fmt: skip
        first_name, first, first_score = having[0]
        for name, record, score in having[1:]:
            found = differences(protocol_of(first, first_score), protocol_of(record, score))
            if found:
                raise DarkroomError(
                    f"{metric} of {first_name} and of {name} are not comparable: {'; '.join(found)}; measure one of "
                    "them again in the other's way, or see them beside one another with --anyway"
                )


def settings_of(record: Record) -> dict[str, Any]:
    """What was measured, and on what: what a comparison shows where it differs."""
    s, e = record.sampling, record.environment
    return {
        "solver": s.solver,
        "steps": s.steps,
        "guidance": s.guidance_scale,
        "weights": s.weights,
        "first seed": s.seed,
        "darkroom": e.darkroom,
        "torch": e.torch,
        "numpy": e.numpy,
        "hardware": e.hardware,
        "device": e.device,
        "precision": e.precision,
    }
