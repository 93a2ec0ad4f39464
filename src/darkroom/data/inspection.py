"""What a source of pictures holds, before anything is cropped, resized or converted."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from darkroom.data.image_files import Samples, is_array_file, read_samples
from darkroom.data.pixels import widest
from darkroom.data.records import EXTRAS, Record, label_by_folder, read_parts, reason_of
from darkroom.data.sources import SYNTHETIC, DataConfig, ShapesDataset, open_dataset
from darkroom.errors import DarkroomError
from darkroom.pixel_format import PixelType

_KINDS = {"f": " float", "i": " signed"}
SHAPES_LOOKED_AT = 256  # scenes of the procedural set, which has no end
SYNTHETIC_LOOKED_AT = 64
SMALL_SET = 2000  # images below which a model mostly repeats what it has seen


@dataclass(frozen=True)
class _Picture:
    """One file as it is stored."""

    size: tuple[int, int]
    format: str
    mode: str
    channels: int
    bits: str
    low: float
    high: float
    rotated: bool
    transparent: bool
    digest: bytes


def inspect_source(source: str, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Counts, sizes, value range, captions, classes and problems, ready for JSON. Decodes every picture once."""
    if source.split(":")[0] == "shapes":
        return _inspect_shapes(source)
    if source in SYNTHETIC:
        return _inspect_synthetic(source)
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
        samples = read_samples(data)
        values = samples.values
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            return "holds values that are not finite (NaN or infinity); replace them by numbers"
        return _Picture(
            size=(values.shape[1], values.shape[0]),
            format=samples.format,
            mode=_mode(data, values),
            channels=values.shape[2] - samples.alpha,
            bits=f"{8 * values.dtype.itemsize}{_KINDS.get(values.dtype.kind, '')}",
            low=float(values.min()),
            high=float(values.max()),
            rotated=samples.rotated,
            transparent=samples.alpha,
            digest=hashlib.sha256(data).digest(),
        )
    except DarkroomError as error:  # a library is missing
        return str(error)
    except Exception as error:  # whatever a damaged file makes a decoder raise, it is only one picture
        return reason_of(error)


def _mode(data: bytes, values: np.ndarray) -> str:
    """Pillow's word where it has one, else type and channels."""
    if not is_array_file(data):
        with contextlib.suppress(UnidentifiedImageError), Image.open(io.BytesIO(data)) as image:
            return str(image.mode)
    return f"{values.dtype}x{values.shape[2]}"


@dataclass(frozen=True)
class Glimpse:
    """What a few pictures, taken evenly from a source, have in common. short_side: the median, in pixels; channels:
    the most frequent number, without opacity; pixels: the type that holds them all."""

    short_side: int
    grey: bool
    channels: int = 3
    pixels: PixelType = "uint8"


def glimpse(source: str | list[str], count: int = 64) -> Glimpse | None:
    """A quick look, to decide how to train; None when nothing can be read (the full reading will say why)."""
    records = read_parts(source)[0].records
    chosen = [records[i * len(records) // count] for i in range(count)] if len(records) > count else records
    sides: list[int] = []
    counts: Counter[int] = Counter()
    grey = True
    for record in chosen:
        try:
            samples = read_samples(record.image.read())
        except Exception:  # one damaged picture
            continue
        sides.append(min(samples.values.shape[:2]))
        counts[samples.values.shape[2] - samples.alpha] += 1
        grey = grey and _is_grey(samples)
    if not sides:
        return None
    channels = 1 if grey else counts.most_common(1)[0][0]
    return Glimpse(sorted(sides)[len(sides) // 2], grey, channels, widest(chosen))


def _is_grey(samples: Samples) -> bool:
    """Whether no visible pixel has a colour. Only three channels can be colours."""
    colours = samples.values
    if samples.alpha:
        colours = colours[colours[..., -1] > 0][:, :-1]
    if colours.shape[-1] not in (1, 3):
        return False
    return bool((colours == colours[..., :1]).all())


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
        "channels": dict(Counter(p.channels for p in pictures).most_common()),
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
    found = Counter(field for record in records for field in record.companions)
    found["boxes"] = sum(record.boxes is not None for record in records)
    facts |= {field: found[field] for field in EXTRAS if found[field]}
    return facts


def _notes(pictures: Sequence[_Picture]) -> list[str]:
    """What somebody who is about to train should know."""
    notes = []
    if 0 < len(pictures) < SMALL_SET:
        notes.append(f"with fewer than {SMALL_SET} pictures a model will partly memorise them")
    kinds = {p.bits for p in pictures}
    if "16" in kinds:
        notes.append("16-bit samples are scaled to 8 bits unless data.pixels is uint16 (or auto)")
    if kinds - {"8", "16"}:
        low, high = min(p.low for p in pictures), max(p.high for p in pictures)
        notes.append(
            f"samples that are no 8 or 16-bit integers need data.pixels=float32 (or auto); their range, {low:g} to "
            f"{high:g}, is that of the training images unless data.value_range says another"
        )
    counts = {p.channels for p in pictures}
    if len(counts) > 1 and counts - {1, 3}:
        notes.append(
            "the pictures have different numbers of channels: those that do not fit data.channels are left out"
        )
    elif counts - {1, 3}:
        notes.append(f"set data.channels to {max(counts)}")
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


def _inspect_synthetic(source: str) -> dict[str, Any]:
    from darkroom.data.synthetic import SETS

    channels = SETS[source].channels
    train, validation = (
        open_dataset(DataConfig(source=source, channels=channels, pixels="auto"), split)
        for split in ("train", "validation")
    )
    images = [train[i]["image"].numpy() for i in range(SYNTHETIC_LOOKED_AT)]
    return {
        "source": source,
        "pictures": len(train),
        "train": len(train),
        "validation": len(validation),
        "channels": {channels: len(train)},
        "bits": {str(train.pixels.bits): len(train)},
        "values": [min(float(i.min()) for i in images), max(float(i.max()) for i in images)],
        "notes": [f"drawn on demand; values were seen in {SYNTHETIC_LOOKED_AT} images; pixels: {train.pixels}"],
        "problems": [],
    }
