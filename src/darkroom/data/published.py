"""Published data sets in the folders in which they come: COCO, OpenImages, ImageNet.

A folder is recognised by what lies in it. COCO: `annotations/captions_*.json` or `instances_*.json`, the pictures in
`train2017/` and so on. OpenImages: `*-annotations-bbox.csv`, the pictures in `train/`, `validation/`. ImageNet:
`train/` with folders named by synsets (n01440764). LSUN needs nothing: its LMDB folders are read like shards.
"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from darkroom.data.records import IMAGE_SUFFIXES, Blob, Reading, Record, part_name
from darkroom.errors import DarkroomError

Parts = dict[str, Reading]  # by "train" and "validation"
_SYNSET = re.compile(r"n\d{8}")
# Attributes of a box in OpenImages, bit by bit in the order of the paper's models.
_ATTRIBUTES = ("IsGroupOf", "IsOccluded", "IsDepiction", "IsInside")


def read_published(folder: Path) -> Parts | None:
    """The parts of a published data set; None for any other folder."""
    for recognised, read in LAYOUTS.values():
        if recognised(folder):
            parts = read(folder)
            if not any(reading.records for reading in parts.values()):
                raise DarkroomError(f"{folder}: its annotations are there, but none of the pictures; put them beside")
            return parts
    return None


def _pictures(folder: Path) -> dict[str, Path]:
    """Pictures of a folder and its sub-folders by name."""
    return {p.name: p for p in sorted(folder.rglob("*")) if p.name.lower().endswith(IMAGE_SUFFIXES)}


def _record(path: Path, folder: Path) -> Record:
    return Record(path.relative_to(folder).as_posix(), str(path), Blob(str(path)))


# --- COCO -------------------------------------------------------------------------------------------------------------


def _coco_files(folder: Path) -> list[Path]:
    place = folder / "annotations"
    return sorted([*place.glob("captions_*.json"), *place.glob("instances_*.json")])


def _is_coco(folder: Path) -> bool:
    return bool(_coco_files(folder))


def read_coco(folder: Path) -> Parts:
    """Texts from the captions (the first of each picture; all are in its metadata), boxes from the instances, without
    crowds. A part (train2017) has what its files say."""
    parts: Parts = {}
    by_split: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for file in _coco_files(folder):
        kind, _, split = file.stem.partition("_")
        by_split[split][kind] = _json(file)
    for split, files in by_split.items():
        part = part_name(split) or "train"
        place = next((p for p in (folder / split, folder / "images" / split) if p.is_dir()), None)
        if part not in ("train", "validation") or place is None:
            continue
        reading = parts.setdefault(part, Reading())
        _read_coco_split(folder, _pictures(place), files, reading)
    return parts


def _read_coco_split(folder: Path, there: dict[str, Path], files: dict[str, Any], reading: Reading) -> None:
    captions, instances = files.get("captions", {}), files.get("instances", {})
    texts: dict[int, list[str]] = defaultdict(list)
    for row in captions.get("annotations", []):
        texts[row["image_id"]].append(" ".join(row["caption"].split()))
    categories = sorted(instances.get("categories", []), key=lambda c: int(c["id"]))
    number = {category["id"]: place for place, category in enumerate(categories)}
    shapes = {row["id"]: row for content in (captions, instances) for row in content.get("images", [])}
    boxes: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in instances.get("annotations", []):
        if not row.get("iscrowd"):
            x, y, w, h = row["bbox"]
            width, height = shapes[row["image_id"]]["width"], shapes[row["image_id"]]["height"]
            box = _inside(x / width, y / height, (x + w) / width, (y + h) / height)
            if box is not None:
                boxes[row["image_id"]].append({"cls": number[row["category_id"]], "bbox": box})
    if categories:
        reading.class_names, reading.box_names = [], [str(category["name"]) for category in categories]
    for key, shape in sorted(shapes.items()):
        path = there.get(shape["file_name"].rpartition("/")[2])
        if path is None:
            reading.problems.append((str(shape["file_name"]), "listed in the annotations but not there"))
            continue
        record = _record(path, folder)
        if texts[key]:
            record.text, record.metadata = texts[key][0], {"captions": texts[key]}
        record.boxes = boxes[key] if instances else None
        reading.records.append(record)


# --- OpenImages -------------------------------------------------------------------------------------------------------


def _open_images_files(folder: Path) -> list[Path]:
    return sorted(p for place in (folder, folder / "annotations") for p in place.glob("*-annotations-bbox.csv"))


def _is_open_images(folder: Path) -> bool:
    return bool(_open_images_files(folder))


def read_open_images(folder: Path) -> Parts:
    """Boxes with their attributes (group, occluded, depiction, inside) as bits. Classes are named by
    `*class-descriptions-boxable.csv`, in its order; without it by their labels, in alphabetical order."""
    found: dict[str, list[Path]] = defaultdict(list)
    for file in _open_images_files(folder):
        part = part_name(file.name.removesuffix("-annotations-bbox.csv"))
        if part in ("train", "validation"):
            found[part].append(file)
    names = _open_images_names(folder)
    if names is None:
        labels = {row["LabelName"] for files in found.values() for file in files for row in _csv(file)}
        names = {label: label for label in sorted(labels)}
    number = {label: place for place, label in enumerate(names)}
    parts: Parts = {}
    for part, files in found.items():
        place = next((p for p in (folder / part, folder / "images" / part) if p.is_dir()), None)
        if place is None:
            continue
        reading = parts.setdefault(part, Reading(class_names=[], box_names=list(names.values())))
        boxes = _open_images_boxes(files, number)
        for path in _pictures(place).values():
            record = _record(path, folder)
            record.boxes = boxes.get(path.stem, [])
            reading.records.append(record)
    return parts


def _open_images_names(folder: Path) -> dict[str, str] | None:
    for place in (folder, folder / "annotations"):
        for file in sorted(place.glob("*class-descriptions-boxable.csv")):
            with open(file, newline="", encoding="utf-8-sig") as lines:
                rows = [row for row in csv.reader(lines) if len(row) >= 2]
            return {row[0]: row[1] for row in rows if row[0] != "LabelName"}
    return None


def _open_images_boxes(files: list[Path], number: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    boxes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for file in files:
        for row in _csv(file):
            box = _inside(*(float(row[name]) for name in ("XMin", "YMin", "XMax", "YMax")))
            if box is None or row["LabelName"] not in number:
                continue
            bits = sum(1 << bit for bit, name in enumerate(_ATTRIBUTES) if row.get(name) == "1")
            boxes[row["ImageID"]].append({"cls": number[row["LabelName"]], "bbox": box, "attributes": bits})
    return boxes


# --- ImageNet ---------------------------------------------------------------------------------------------------------


def _imagenet_pictures(folder: Path) -> Path | None:
    """Where train/ and val/ are: here, or where the archive of Kaggle has them."""
    for place in (folder, folder / "ILSVRC" / "Data" / "CLS-LOC"):
        train = place / "train"
        if train.is_dir() and any(_SYNSET.fullmatch(child.name) for child in train.iterdir()):
            return place
    return None


def _is_imagenet(folder: Path) -> bool:
    return _imagenet_pictures(folder) is not None


def read_imagenet(folder: Path) -> Parts:
    """Classes in the official order, that of their synsets, named by the first word of `LOC_synset_mapping.txt` where
    it is there. A `val/` without folders needs `LOC_val_solution.csv`."""
    place = _imagenet_pictures(folder)
    assert place is not None
    synsets = sorted(child.name for child in (place / "train").iterdir() if _SYNSET.fullmatch(child.name))
    mapping = folder / "LOC_synset_mapping.txt"
    spoken: dict[str, str] = {}
    if mapping.is_file():
        for line in mapping.read_text(encoding="utf-8").splitlines():
            synset, _, text = line.partition(" ")
            spoken[synset] = text.split(",")[0].strip()
    words = [spoken.get(synset, synset) for synset in synsets]
    # Two classes are called "crane" and two "maillot": these keep their synsets beside the word.
    names = [w if words.count(w) == 1 else f"{w} ({s})" for w, s in zip(words, synsets, strict=True)]
    number = {synset: place for place, synset in enumerate(synsets)}
    parts: Parts = {}
    for child in sorted(place.iterdir()):
        part = part_name(child.name) if child.is_dir() else None
        if part not in ("train", "validation"):
            continue
        reading = parts.setdefault(part, Reading(class_names=names, box_names=names))
        for path, synset in _imagenet_labels(child, folder):
            record = _record(path, place)
            record.label = number.get(synset)
            reading.records.append(record)
    return parts


def _imagenet_labels(part: Path, folder: Path) -> Iterator[tuple[Path, str]]:
    pictures = sorted(p for p in part.rglob("*") if p.name.lower().endswith(IMAGE_SUFFIXES))
    flat = [p for p in pictures if p.parent == part]
    solution: dict[str, str] = {}
    if flat:
        file = folder / "LOC_val_solution.csv"
        if not file.is_file():
            raise DarkroomError(
                f"{part}: pictures without class folders; sort them into folders named by synset, or put "
                f"LOC_val_solution.csv into {folder}"
            )
        solution = {row["ImageId"]: row["PredictionString"].split()[0] for row in _csv(file)}
    for path in pictures:
        yield path, solution.get(path.stem, "") if path.parent == part else path.parent.name


# --- small helpers ----------------------------------------------------------------------------------------------------


def _inside(x0: float, y0: float, x1: float, y1: float) -> list[float] | None:
    """The part of a normalised box that is in the picture; None if there is none."""
    box = [min(max(v, 0.0), 1.0) for v in (x0, y0, x1, y1)]
    return box if box[0] < box[2] and box[1] < box[3] else None


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DarkroomError(f"{file} cannot be read ({error}); fetch it again") from None
    if not isinstance(content, dict) or "images" not in content:
        raise DarkroomError(f'{file} has no "images": it is no annotation file of COCO; remove or replace it')
    return content


def _csv(file: Path) -> Iterator[dict[str, str]]:
    with open(file, newline="", encoding="utf-8-sig") as lines:
        yield from csv.DictReader(lines)


LAYOUTS: dict[str, tuple[Callable[[Path], bool], Callable[[Path], Parts]]] = {
    "COCO": (_is_coco, read_coco),
    "OpenImages": (_is_open_images, read_open_images),
    "ImageNet": (_is_imagenet, read_imagenet),
}
