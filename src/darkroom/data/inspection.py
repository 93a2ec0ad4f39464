"""What a source of pictures holds, before anything is cropped, resized or reduced to 8 bits."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from darkroom.data.records import Record, label_by_folder, read_parts, reason_of
from darkroom.data.sources import DataConfig, ShapesDataset

SHAPES_LOOKED_AT = 256  # scenes of the procedural set, which has no end
SMALL_SET = 2000  # images below which a model mostly repeats what it has seen


@dataclass(frozen=True)
class _Picture:
    """One file as it is stored."""

    size: tuple[int, int]
    format: str
    mode: str
    bits: int
    low: float
    high: float
    rotated: bool
    transparent: bool
    digest: bytes


def inspect_source(source: str, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Counts, sizes, value range, captions, classes and problems, ready for JSON. Decodes every picture once."""
    if source.split(":")[0] == "shapes":
        return _inspect_shapes(source)
    train, validation = read_parts(source)
    readings = [train] if validation is None else [train, validation]
    records = [record for reading in readings for record in reading.records]
    label_by_folder(records)
    problems = [problem for reading in readings for problem in reading.problems]
    pictures: list[_Picture] = []
    good: list[Record] = []
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        chunk = 64
        for start in range(0, len(records), chunk):
            part = records[start : start + chunk]
            for record, found in zip(part, pool.map(_look, part), strict=True):
                if isinstance(found, str):
                    problems.append((record.name, found))
                else:
                    good.append(record)
                    pictures.append(found)
            if progress is not None:
                progress(start + len(part), len(records))
    facts: dict[str, Any] = {
        "source": source,
        "pictures": len(pictures),
        "train": len(train.records),
        "validation": None if validation is None else len(validation.records),
    }
    facts |= _picture_facts(pictures)
    names = next((reading.class_names for reading in readings if reading.class_names is not None), None)
    facts |= _label_facts(good, names)
    facts["notes"] = _notes(pictures)
    facts["problems"] = problems
    return facts


def _look(record: Record) -> _Picture | str:
    """The stored picture's facts, or why it cannot be used."""
    try:
        data = record.image.read()
        with Image.open(io.BytesIO(data)) as image:
            rotated = image.getexif().get(0x0112, 1) != 1
            transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
            shown = image.convert("RGBA" if transparent else "RGB") if image.mode == "P" else image
            pixels = np.asarray(shown)
            return _Picture(
                size=image.size,
                format=str(image.format),
                mode=image.mode,
                bits={"I": 16, "F": 32}.get(image.mode[:1], 8),
                low=float(pixels.min()),
                high=float(pixels.max()),
                rotated=rotated,
                transparent=transparent,
                digest=hashlib.sha256(data).digest(),
            )
    except Exception as error:  # whatever a damaged file makes a decoder raise, it is only one picture
        return reason_of(error)


@dataclass(frozen=True)
class Glimpse:
    """What a few pictures, taken evenly from a source, have in common. short_side: the median, in pixels."""

    short_side: int
    grey: bool


def glimpse(source: str | list[str], count: int = 64) -> Glimpse | None:
    """A quick look, to decide how to train; None when nothing can be read (the full reading will say why)."""
    records = read_parts(source)[0].records
    chosen = [records[i * len(records) // count] for i in range(count)] if len(records) > count else records
    sides: list[int] = []
    grey = True
    for record in chosen:
        try:
            with Image.open(io.BytesIO(record.image.read())) as image:
                sides.append(min(image.size))
                grey = grey and _is_grey(image)
        except Exception:  # one damaged picture
            continue
    return Glimpse(sorted(sides)[len(sides) // 2], grey) if sides else None


def _is_grey(image: Image.Image) -> bool:
    """Whether no visible pixel has a colour."""
    if image.mode in ("1", "L", "LA", "La") or image.mode[0] in "IF":  # "LAB" has colour
        return True
    pixels = np.asarray(image.convert("RGBA"))
    colours = pixels[pixels[..., 3] > 0][:, :3]
    return bool((colours == colours[:, :1]).all())


def _picture_facts(pictures: Sequence[_Picture]) -> dict[str, Any]:
    if not pictures:
        return {}
    sizes = Counter(p.size for p in pictures)
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    common, times = sizes.most_common(1)[0]
    return {
        "formats": dict(Counter(p.format for p in pictures).most_common()),
        "modes": dict(Counter(p.mode for p in pictures).most_common()),
        "sizes": {
            "smallest": list(by_area[0]),
            "largest": list(by_area[-1]),
            "most_common": list(common),
            "share_of_most_common": times / len(pictures),
        },
        "bits": dict(Counter(p.bits for p in pictures).most_common()),
        "values": [min(p.low for p in pictures), max(p.high for p in pictures)],
        "rotated_by_exif": sum(p.rotated for p in pictures),
        "transparent": sum(p.transparent for p in pictures),
        "duplicates": len(pictures) - len({p.digest for p in pictures}),
    }


def _label_facts(records: Sequence[Record], class_names: list[str] | None) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    texts = [record.text for record in records if record.text is not None]
    if texts:
        facts["captions"] = {
            "count": len(texts),
            "different": len(set(texts)),
            "words": sum(len(text.split()) for text in texts) / len(texts),
            "examples": texts[:3],
        }
    labels = [record.label for record in records if record.label is not None]
    if labels:

        def name(label: int | str) -> str:
            known = isinstance(label, int) and class_names is not None and 0 <= label < len(class_names)
            return class_names[label] if known else str(label)  # type: ignore[index]

        facts["classes"] = dict(Counter(map(name, labels)).most_common())
    for field in ("boxes", "segmentation"):
        if count := sum(getattr(record, field) is not None for record in records):
            facts[field] = count
    return facts


def _notes(pictures: Sequence[_Picture]) -> list[str]:
    """What somebody who is about to train should know."""
    notes = []
    if 0 < len(pictures) < SMALL_SET:
        notes.append(f"with fewer than {SMALL_SET} pictures a model will partly memorise them")
    if any(p.bits == 16 for p in pictures):
        notes.append("16-bit samples are scaled to 8 bits")
    if any(p.bits == 32 for p in pictures):
        notes.append("floating-point samples have no stated range and cannot be used")
    if any(p.transparent for p in pictures):
        notes.append("transparent parts are laid over the background colour (white unless set)")
    return notes


def _inspect_shapes(source: str) -> dict[str, Any]:
    dataset = ShapesDataset(DataConfig(source=source), "train")
    scenes = [dataset.scene(i) for i in range(SHAPES_LOOKED_AT)]
    captions = [scene.caption for scene in scenes]
    return {
        "source": source,
        "pictures": len(dataset),
        "train": len(dataset),
        "validation": len(ShapesDataset(DataConfig(source=source), "validation")),
        "captions": {
            "count": len(dataset),
            "different": len(set(captions)),
            "words": sum(len(text.split()) for text in captions) / len(captions),
            "examples": captions[:3],
        },
        "classes": dict(Counter(dataset.class_names[scene.class_label] for scene in scenes).most_common()),
        "notes": [f"drawn on demand; captions and classes were counted over {SHAPES_LOOKED_AT} scenes"],
        "problems": [],
    }
