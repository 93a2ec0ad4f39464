"""`PictureDataset`: the examples of image folders and shards, decoded by the one rule of `transforms`.

Shapes: N examples, C channels, H W image size.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from darkroom.data.records import COMPANIONS, Reading, Record, label_by_folder, read_parts, read_whole, reason_of
from darkroom.data.sources import DataConfig, ImageDataset
from darkroom.data.transforms import (
    NO_LABEL,
    RULE_VERSION,
    crop_box,
    crop_boxes,
    decode,
    depth_to_network,
    labels_to_network,
    mask_to_network,
    read_vector,
    sizes_of,
)
from darkroom.errors import DarkroomError
from darkroom.pixel_format import PixelFormat

IN_MEMORY_BYTES = 1_500_000_000  # decoded sets up to this size are decoded once, when they are opened

# By field: image (C,H,W), boxes (n,5), segmentation (H,W), repaint_mask and depth (1,H,W), embedding (D,); of `sizes`
# the width and height of the file.
Decoded = dict[str, np.ndarray]
_SPOKEN = {"segmentation": "label map", "repaint_mask": "mask", "depth": "depth map", "embedding": "vector"}
# Bytes of a pixel of a map in memory.
_MAP_BYTES = {"segmentation": 1, "repaint_mask": 4, "depth": 4}


class PictureDataset(ImageDataset):
    """Pictures with what stands beside them.

    Small sets are decoded at once; pictures that cannot be read are left out and listed in `problems`. Large sets are
    decoded on access; there the next readable picture takes the place of an unreadable one.
    A field belongs to the set when at least half of the examples have it: without a text or boxes an example then has
    empty ones, without a class, a map or a vector it is left out.
    """

    def __init__(self, config: DataConfig, split: str, in_memory_bytes: int = IN_MEMORY_BYTES) -> None:
        super().__init__(config, split)
        reading, names_from = _split(config, split)
        self.problems += reading.problems
        self._keep(reading.records, names_from)
        self.fields = ("image", *self._extra)
        width, height = self.size
        maps = sum(_MAP_BYTES.get(name, 0) for name in self._extra)
        bytes_each = width * height * (config.channels * self.pixels.bits // 8 + maps)
        self.in_memory = len(self._records) * bytes_each <= in_memory_bytes
        if self.in_memory:
            self._decode_all()
        elif self._records:
            self._next_readable(0)  # complains when all are bad
        self.digest = self._digest()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self._records):
            raise IndexError(index)
        if self.in_memory:
            decoded = {"image": self._images[index], **self._others[index]}
        else:
            index, decoded = self._next_readable(index)
        example = {"image": torch.from_numpy(decoded["image"]), **self._words(index)}
        for name in self._drawn:
            if name == "sizes":
                width, height = decoded[name].tolist()
                example[name] = sizes_of((width, height), self.size, _original_size(self._records[index]))
                continue
            values = torch.from_numpy(decoded[name])
            example[name] = values.long() if name == "segmentation" else values
        return example

    def without_image(self, index: int, wanted: Collection[str] | None = None) -> dict[str, Any]:
        if self._drawn and (wanted is None or set(self._drawn) & set(wanted)):
            return super().without_image(index, wanted)
        words = self._words(self.replaced.get(index, index))  # nothing to decode
        return words if wanted is None else {name: value for name, value in words.items() if name in wanted}

    def _words(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        words: dict[str, Any] = {}
        if "text" in self._extra:
            words["text"] = record.text or ""
        if "class_label" in self._extra:
            words["class_label"] = record.label
        return words

    def captions(self) -> list[str]:
        return [r.text or "" for r in self._records] if "text" in self._extra else []

    @property
    def records(self) -> list[Record]:
        """The samples, before any is decoded."""
        return list(self._records)

    def key(self, index: int) -> str:
        """The name of an example inside its source."""
        return self._records[index].key

    # --- opening ---

    def _keep(self, records: list[Record], names_from: list[Reading]) -> None:
        """Decide on the fields, number the classes, and leave out what lacks a needed field."""
        everything = [r for reading in names_from for r in reading.records]
        label_by_folder(everything)
        count = len(records)
        has = {
            "text": sum(r.text is not None for r in records),
            "class_label": sum(r.label is not None for r in records),
            "boxes": sum(r.boxes is not None for r in records),
            **{name: sum(name in r.companions for r in records) for name in COMPANIONS.values()},
        }
        fields = {name for name, n in has.items() if n and n * 2 >= count}
        named = next((r for r in names_from if r.class_names is not None), None)
        if named is not None:
            self.class_names, self.box_names = list(named.class_names or []), list(named.box_names or [])
        elif "class_label" in fields:
            self.class_names = self.box_names = _names([r.label for r in everything])
        if self.config.captions is not None:
            self._write_captions(records, fields)
        kept = []
        for record in records:
            if "class_label" in fields:
                number = _class_number(record.label, self.class_names)
                if number is None:
                    reason = "no class" if record.label is None else f"class {record.label!r} is not among the names"
                    self.problems.append((record.name, reason))
                    continue
                record.label = number
            missing = [name for name in COMPANIONS.values() if name in fields and name not in record.companions]
            if missing:
                self.problems.append((record.name, f"no {_SPOKEN[missing[0]]}"))
                continue
            kept.append(record)
        if count and not kept:
            self._nothing_readable()
        self._records = kept
        self._extra = [*(f for f in has if f in fields), *(["sizes"] if self.config.sizes else [])]
        self._drawn = [f for f in self._extra if f not in ("text", "class_label")]  # what costs reading a file

    def _write_captions(self, records: list[Record], fields: set[str]) -> None:
        template = str(self.config.captions)
        if "{label}" not in template:
            raise DarkroomError(
                f"captions template {template!r} has no {{label}}; write for example 'a photo of a {{label}}'"
            )
        if "class_label" not in fields and records:
            raise DarkroomError(f"{self.config.source}: no classes for the captions template; leave `captions` out")
        for record in records:
            number = _class_number(record.label, self.class_names)
            if number is not None:
                record.text = template.replace("{label}", self.class_names[number].replace("_", " "))
        fields.add("text")

    # --- decoding ---

    def _decode(self, record: Record) -> Decoded:
        config = self.config
        image, shape = decode(record.image.read(), self.size, config.channels, self.pixels, config.background)
        decoded = {"image": image}
        for name in self._drawn:
            if name not in ("boxes", "sizes"):
                decoded[name] = self._companion(name, record.companions[name].read())
        if "sizes" in self._drawn:
            decoded["sizes"] = np.array(shape)
        if "boxes" in self._drawn:
            x0, y0, x1, y1 = crop_box(shape, self.size)
            part = (x0 / shape[0], y0 / shape[1], x1 / shape[0], y1 / shape[1])
            decoded["boxes"] = crop_boxes(_box_rows(record.boxes or [], self.box_names, config.box_attributes), part)
        return decoded

    def _companion(self, name: str, data: bytes) -> np.ndarray:
        """One field from the content of its file, by the rule of the image."""
        if name == "depth":
            return depth_to_network(data, self.size)
        if name == "embedding":
            return read_vector(data)
        with Image.open(io.BytesIO(data)) as picture:
            if name == "repaint_mask":
                return mask_to_network(picture, self.size)
            maps = labels_to_network(picture, self.size)
        known = maps[maps != NO_LABEL]
        if self.class_names and known.size and int(known.max()) >= len(self.class_names):
            raise ValueError(f"label map has id {int(known.max())}, there are {len(self.class_names)} classes")
        return maps

    def _try(self, record: Record) -> Decoded | str:
        """The decoded picture, or why there is none."""
        try:
            return self._decode(record)
        except UnidentifiedImageError:
            return "not a picture in a known format"
        except DarkroomError:  # a library is missing: no other picture of this kind can be read either
            raise
        except Exception as error:  # whatever a damaged file makes a decoder raise, it is only one picture
            return reason_of(error)

    def _decode_all(self) -> None:
        width, height = self.size
        count = len(self._records)
        images = np.empty((count, self.config.channels, height, width), np.dtype(self.pixels.dtype))
        self._others: list[Decoded] = []
        kept: list[Record] = []
        for record, result in zip(self._records, in_threads(self._try, self._records), strict=True):
            if isinstance(result, str):
                self.problems.append((record.name, result))
                continue
            images[len(kept)] = result.pop("image")
            self._others.append(result)
            kept.append(record)
        if count and not kept:
            self._nothing_readable()
        self._records = kept
        self._images = images[: len(kept)]

    def _next_readable(self, index: int) -> tuple[int, Decoded]:
        for place in range(len(self._records)):
            at = (index + place) % len(self._records)
            result = self._try(self._records[at])
            if not isinstance(result, str):
                if place:
                    self.replaced[index] = at
                return at, result
            if (self._records[at].name, result) not in self.problems:
                self.problems.append((self._records[at].name, result))
        self._nothing_readable()

    def _nothing_readable(self) -> NoReturn:
        name, reason = self.problems[0]
        raise DarkroomError(
            f"{self.config.source}: none of its pictures can be used; the first: {name} ({reason}); check the files"
        )

    def _digest(self) -> str:
        config = self.config
        total = hashlib.sha256()
        facts = [RULE_VERSION, self.size, config.channels, config.background, self.class_names, list(self._extra)]
        if self.pixels != PixelFormat():  # caches of 8-bit pictures made before there were others keep their key
            facts.append(self.pixels.to_dict())
        total.update(json.dumps(facts).encode())
        for index, record in enumerate(self._records):
            content: list[Any] = [record.key, record.text, record.label, record.boxes]
            content += [_original_size(record)] if "sizes" in self._extra else []
            total.update(json.dumps(content, default=str).encode())
            if self.in_memory:
                total.update(np.ascontiguousarray(self._images[index]).data)
                for name in self._drawn:
                    if name != "boxes":  # they are in `content`
                        total.update(np.ascontiguousarray(self._others[index][name]).data)
            else:
                blobs = [b.identity() for b in (record.image, *record.companions.values())]
                total.update(json.dumps(blobs).encode())
        return total.hexdigest()


# --- choosing examples ------------------------------------------------------------------------------------------------


def _split(config: DataConfig, split: str) -> tuple[Reading, list[Reading]]:
    """The samples of a split after `exclude` and `limit`, and where class names come from (both splits share them)."""
    train, validation = read_parts(config.source)
    readings = [train, validation] if validation is not None else [train]
    if isinstance(config.validation, str):
        validation = read_whole(config.validation)
        readings = [train, validation]
    elif isinstance(config.validation, list) or not 0 <= config.validation < 1:
        raise DarkroomError(f"validation={config.validation} is not a share; give a number in [0, 1) or a path")
    chosen = train if split == "train" else validation
    if validation is None:  # the source does not divide itself
        records = _share(train.records, float(config.validation), split)
        chosen = Reading(records, train.problems, train.class_names, train.box_names)
    assert chosen is not None
    records = _without(chosen.records, config.exclude, readings)
    if config.limit is not None and len(records) > config.limit:
        within = {r.key for r in sorted(records, key=lambda r: _position(r.key + "#"))[: config.limit]}
        records = [r for r in records if r.key in within][: config.limit]
    if split == "train" and not records:
        raise DarkroomError(
            f"{config.source}: no training examples are left; check `exclude`, `limit` and `validation`"
        )
    return Reading(records, chosen.problems, chosen.class_names, chosen.box_names), readings


def training_records(config: DataConfig) -> list[Record]:
    """The samples of the training split, before any is decoded."""
    return _split(config, "train")[0].records


def _position(key: str) -> float:
    """A number in [0, 1) from the key alone, so that an example stays in its split when others come or go."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def _share(records: list[Record], share: float, split: str) -> list[Record]:
    """The part of a split. With a share above 0 and two examples or more, neither part is empty."""
    inside = {r.key for r in records if _position(r.key) < share}
    keys = sorted({r.key for r in records}, key=_position)
    if share > 0 and len(keys) > 1:
        inside = (inside or {keys[0]}) - ({keys[-1]} if len(inside) == len(keys) else set())
    return [r for r in records if (r.key in inside) == (split == "validation")]


def _without(records: list[Record], exclude: dict[str, list[str]], readings: Iterable[Reading]) -> list[Record]:
    if not exclude:
        return records
    known = {name for reading in readings for r in reading.records for name in r.metadata}
    for name in exclude:
        if name not in known:
            have = ", ".join(sorted(known)) or "there is no metadata"
            raise DarkroomError(f"exclude: no example has metadata {name!r} ({have}); correct the name")

    def out(record: Record) -> bool:
        for name, values in exclude.items():
            value = record.metadata.get(name)
            mine = value if isinstance(value, list) else [value]
            if any(v is not None and str(v) in {str(x) for x in values} for v in mine):
                return True
        return False

    return [r for r in records if not out(r)]


def _names(labels: list[int | str | None]) -> list[str]:
    """Class names when no file states them: names in alphabetical order, or numbers up to the highest."""
    words = sorted({label for label in labels if isinstance(label, str)})
    if words:
        return words
    return [str(n) for n in range(max((n for n in labels if isinstance(n, int)), default=-1) + 1)]


def _class_number(label: int | str | None, names: list[str]) -> int | None:
    if isinstance(label, str):
        return names.index(label) if label in names else None
    return label if label is not None and 0 <= label < len(names) else None


def _original_size(record: Record) -> tuple[int, int] | None:
    """(width, height) that the metadata says the picture once had."""
    found = [record.metadata.get(name) for name in ("original_width", "original_height")]
    numbers = [int(value) for value in found if isinstance(value, (int, float)) and value >= 1]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else None


def _box_rows(boxes: list[dict[str, Any]], names: list[str], attributes: bool) -> np.ndarray:
    """float32 (n, 5): class, x0, y0, x1, y1; with attributes class + (number of classes) * bits."""
    rows = []
    for box in boxes:
        number = box["cls"] if "cls" in box else names.index(box["class"])
        x0, y0, x1, y1 = (float(v) for v in box["bbox"])
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise ValueError(f"box {box['bbox']} is not x0, y0, x1, y1 in [0, 1]")
        if names and not 0 <= number < len(names):
            raise ValueError(f"box class {number} is not among the {len(names)} names")
        bits = int(box.get("attributes", 0)) if attributes else 0
        rows.append((number + len(names) * bits, x0, y0, x1, y1))
    return np.array(rows, np.float32).reshape(-1, 5)


def in_threads(function: Any, items: list[Any], chunk: int = 256) -> Iterator[Any]:
    """map() in threads (Pillow decodes without the interpreter lock), never more than `chunk` results ahead."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for start in range(0, len(items), chunk):
            yield from pool.map(function, items[start : start + chunk])
