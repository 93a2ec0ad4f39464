"""What lies in folders and shards: `Record`s, read without decoding a picture.

A sample is a picture and what stands beside it under the same name:
    .txt      caption
    .cls      class number
    .seg.png  label map, one 8-bit channel of class numbers; 255 is no class
    .mask.png mask for inpainting, white = repaint
    .depth.png, .depth.tif, .depth.npy  depth map of one channel, larger = nearer
    .emb.npy  a vector, such as the embedding of the picture
    .json     metadata, any keys; `text` or `caption`, `cls` or `label`, and `boxes`: a list of
              {"cls" or "class", "bbox": [x0, y0, x1, y1] divided by width and height}
In an image folder, `metadata.jsonl` (one object a line: `file_name`, `text`, any keys as in .json) takes the place of
.txt, .cls and .json. When no class is stated and all pictures are in two or more sub-folders, these are the classes. In
a tar shard the name up to the first dot is the sample (WebDataset). `classes.json` beside shards or pictures states
names: {"classes": [names], "boxes": {"classes": [names]}}.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darkroom.data.image_files import ARRAY_SUFFIXES
from darkroom.data.lmdb_file import DATA, is_lmdb, lmdb_values
from darkroom.errors import DarkroomError

# Arrays last: beside a picture of the same name an array is something else (an embedding, a depth map).
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", *ARRAY_SUFFIXES)
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
# What lies beside a picture besides words, and the field that it becomes.
COMPANIONS = {
    ".seg.png": "segmentation",
    ".mask.png": "repaint_mask",
    ".depth.png": "depth",
    ".depth.tif": "depth",
    ".depth.npy": "depth",
    ".emb.npy": "embedding",
}
EXTRAS = ("boxes", *dict.fromkeys(COMPANIONS.values()))  # fields besides words and classes
METADATA = "metadata.jsonl"
# A part named in a sub-folder or shard: "clothing-train-00.tar", "val/", "camvid-test20.tar".
_PART = re.compile(r"(?:^|[-_.])(train|training|val|valid|validation|test)(?=[-_.\d]|$)", re.IGNORECASE)
_PART_OF = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}


@dataclass(frozen=True)
class Blob:
    """Bytes that are read when needed: a file, a stretch of an uncompressed shard, or bytes already in memory."""

    path: str
    offset: int = 0
    size: int | None = None
    data: bytes | None = field(default=None, repr=False)

    def read(self) -> bytes:
        if self.data is not None:
            return self.data
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read() if self.size is None else file.read(self.size)

    def identity(self) -> list[Any]:
        """Changes when the bytes may have changed."""
        stat = os.stat(self.path)
        return [os.path.basename(self.path), self.offset, self.size, stat.st_size, stat.st_mtime_ns]


@dataclass
class Record:
    """One sample. `label` is a class number or a class name."""

    key: str
    name: str  # for people: where it is
    image: Blob
    text: str | None = None
    label: int | str | None = None
    folder: str | None = None  # first sub-folder in its path: its class when nothing else states one
    boxes: list[dict[str, Any]] | None = None
    companions: dict[str, Blob] = field(default_factory=dict)  # by field: label map, mask, depth map, vector
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class Reading:
    """All samples of a source and what is wrong with it."""

    records: list[Record] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    class_names: list[str] | None = None
    box_names: list[str] | None = None


def read_parts(source: str | list[str]) -> tuple[Reading, Reading | None]:
    """(train, validation) of a source; validation None when the source does not divide itself."""
    locations = [source] if isinstance(source, str) else list(source)
    if not locations:
        raise DarkroomError("the data source is an empty list; name a folder or a tar shard")
    from darkroom.data.published import read_published  # it builds on this module

    train, validation = Reading(), Reading()
    divided = False
    for location in locations:
        paths = _expand(location)
        published = read_published(paths[0]) if len(paths) == 1 and paths[0].is_dir() else None
        if published is not None:
            divided = divided or "validation" in published
            for part, reading in (("train", train), ("validation", validation)):
                if part in published:
                    _join(published[part], reading, location)
            continue
        parts = _divide(location)
        divided = divided or "validation" in parts
        for part, reading in (("train", train), ("validation", validation)):
            for path in parts.get(part, []):
                _read_path(path, reading)
    return train, validation if divided else None


def read_whole(source: str) -> Reading:
    """Everything at a path or glob, whatever its parts are called."""
    reading = Reading()
    for path in _expand(source):
        shards = _shards_in(path) if path.is_dir() else []
        for each in shards or [path]:
            _read_path(each, reading)
    return reading


def _join(part: Reading, reading: Reading, where: object) -> None:
    """Add what one place holds."""
    reading.records += part.records
    reading.problems += part.problems
    if part.class_names is not None and part.box_names is not None:
        _take_names(part.class_names, part.box_names, where, reading)


def _take_names(class_names: list[str], box_names: list[str], where: object, reading: Reading) -> None:
    if (reading.class_names, reading.box_names) not in ((None, None), (class_names, box_names)):
        raise DarkroomError(f"{where} names other classes than the rest of the data; train on one set of classes")
    reading.class_names, reading.box_names = class_names, box_names


def _expand(location: str) -> list[Path]:
    """The paths that a location names; it may be a glob."""
    text = os.path.expanduser(location)
    if not os.path.exists(text) and glob.has_magic(text):
        paths = [Path(p) for p in sorted(glob.glob(text, recursive=True))]
        if not paths:
            raise DarkroomError(f"{location}: nothing matches this pattern; check the path")
        return paths
    if not os.path.exists(text):
        raise DarkroomError(f"{location}: no such file or folder; check the path of the data")
    return [Path(text)]


def _shards_in(folder: Path) -> list[Path]:
    """Tar shards, and LMDB folders, which are read like them."""
    return sorted(
        p
        for p in folder.iterdir()
        if not p.name.startswith(".") and (p.name.lower().endswith(SHARD_SUFFIXES) or (p.is_dir() and is_lmdb(p)))
    )


def _divide(location: str) -> dict[str, list[Path]]:
    """Paths by part. Only folders and globs divide themselves: a path that was named is used as a whole."""
    paths = _expand(location)
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        paths = _shards_in(folder)
        if not paths:
            children = [p for p in sorted(folder.iterdir()) if p.is_dir()]
            if not any(_PART.fullmatch(p.name) and part_name(p.name) == "train" for p in children):
                return {"train": [folder]}
            paths = [p for p in children if _PART.fullmatch(p.name)]
    elif len(paths) == 1:
        return {"train": paths}
    parts: dict[str, list[Path]] = {}
    for path in paths:
        parts.setdefault(part_name(path.name) or "train", []).append(path)
    # A folder of nothing but validation or test shards is simply the data.
    return parts if "train" in parts else {"train": paths}


def part_name(name: str) -> str | None:
    """ "train", "validation", "test" or None, from the last such word in a name."""
    words = [m.group(1).lower() for m in _PART.finditer(name)]
    return _PART_OF.get(words[-1], "test") if words else None


def _read_path(path: Path, reading: Reading) -> None:
    name = path.name.lower()
    if path.is_dir() and is_lmdb(path):
        _read_lmdb(path, reading)
    elif path.is_dir():
        _read_folder(path, reading)
        _read_class_names(path / "classes.json", reading)
    elif name.endswith(SHARD_SUFFIXES):
        _read_shard(path, reading)
        _read_class_names(path.parent / "classes.json", reading)
    elif name.endswith(IMAGE_SUFFIXES):
        raise DarkroomError(f"{path} is a single picture; name the folder that holds the pictures")
    else:
        raise DarkroomError(f"{path} is neither a folder of pictures nor a tar shard; name one of these")


def _read_class_names(path: Path, reading: Reading) -> None:
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = [str(n) for n in content["classes"]]
        boxes = content.get("boxes")
        box_names = [str(n) for n in boxes["classes"]] if isinstance(boxes, dict) else names
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DarkroomError(f'{path} is not of the form {{"classes": ["name", ...]}}; correct or remove it') from None
    _take_names(names, box_names, path, reading)


# --- image folders ----------------------------------------------------------------------------------------------------


def _walk(folder: Path) -> Iterator[Path]:
    """All visible files below a folder in a stable order. Links to folders are followed, but never in circles."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield from (Path(parent, f) for f in sorted(files) if not f.startswith("."))


def _read_folder(folder: Path, reading: Reading) -> None:
    files = list(_walk(folder))
    names = {str(f) for f in files}
    pictures = [f for f in files if _is_picture(f.name)]
    drawn = {f.with_suffix("") for f in pictures if not f.name.lower().endswith(ARRAY_SUFFIXES)}
    pictures = [f for f in pictures if not f.name.lower().endswith(ARRAY_SUFFIXES) or f.with_suffix("") not in drawn]
    if not pictures:
        raise DarkroomError(
            f"{folder}: no pictures ({', '.join(s[1:] for s in IMAGE_SUFFIXES)}) and no tar shards in this folder; "
            "put some in or name another folder"
        )
    listed = {f.parent: _read_metadata(f, reading) for f in files if f.name == METADATA}
    for picture in pictures:
        relative = picture.relative_to(folder)
        record = Record(relative.as_posix(), str(picture), Blob(str(picture)))
        record.folder = relative.parts[0] if len(relative.parts) > 1 else None
        sheet = next((p for p in picture.parents if p in listed), None)
        stem = str(picture.with_suffix(""))
        beside = {s[1:]: Blob(stem + s) for s in (".txt", ".cls", ".json", *COMPANIONS) if stem + s in names}
        if sheet is not None:
            row = listed[sheet].pop(picture.relative_to(sheet).as_posix(), None)
            if row is None:
                reading.problems.append((str(picture), f"not listed in {sheet / METADATA}"))
                continue
            _take_metadata(record, row)
            _take_companions(record, beside)
        else:
            try:
                _take_fields(record, beside)
            except (OSError, ValueError) as error:
                reading.problems.append((str(picture), reason_of(error)))
                continue
        reading.records.append(record)
    for sheet, rows in listed.items():
        reading.problems += [(str(sheet / name), f"listed in {METADATA} but not there") for name in rows]


def label_by_folder(records: list[Record]) -> None:
    """Folders are classes where nothing else says what the classes are and every picture lies in one of several."""
    folders = {r.folder for r in records}
    if all(r.label is None for r in records) and None not in folders and len(folders) > 1:
        for record in records:
            record.label = record.folder


def _read_metadata(path: Path, reading: Reading) -> dict[str, dict[str, Any]]:
    """Rows of a metadata.jsonl by file name. Lines that cannot be read are problems."""
    rows: dict[str, dict[str, Any]] = {}
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                rows[Path(row["file_name"]).as_posix()] = row
            except (ValueError, KeyError, TypeError):
                reading.problems.append((f"{path}:{number}", 'not a JSON object with "file_name"'))
    return rows


# --- shards -----------------------------------------------------------------------------------------------------------


def _read_shard(path: Path, reading: Reading) -> None:
    """Members of an uncompressed shard are left where they are; those of a compressed one are kept in memory."""
    before = len(reading.records)
    key: str | None = None
    fields: dict[str, Blob] = {}

    def finish() -> None:
        if key is not None:
            _add_sample(path, key, fields, reading)

    for name, blob in _members(path, reading):
        folder, base = os.path.split(name)
        stem, _, ending = base.partition(".")
        if base.startswith(".") or not ending:
            continue
        sample = f"{folder}/{stem}" if folder else stem
        if sample != key:
            finish()
            key, fields = sample, {}
        fields[ending.lower()] = blob
    finish()
    if len(reading.records) == before and not reading.problems:
        raise DarkroomError(f"{path}: no pictures in this shard; its members should be named like 0001.jpg, 0001.txt")


def _members(path: Path, reading: Reading) -> Iterator[tuple[str, Blob]]:
    """Files of a shard in order. A shard that ends too early gives what it has and is a problem."""
    count = 0
    try:
        with open(path, "rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
        with tarfile.open(path, "r|gz" if compressed else "r:") as shard:
            for member in shard:
                if not member.isfile():
                    continue
                count += 1
                name = member.name.removeprefix("./")
                if compressed:
                    stream = shard.extractfile(member)
                    assert stream is not None  # a regular file
                    yield name, Blob(str(path), member.offset_data, member.size, stream.read())
                else:
                    yield name, Blob(str(path), member.offset_data, member.size)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if not count:
            raise DarkroomError(f"{path} cannot be read as a tar shard ({reason_of(error)}); check the file") from None
        reading.problems.append((str(path), f"ends too early: {reason_of(error)}"))


def _read_lmdb(folder: Path, reading: Reading) -> None:
    """Pictures under their keys, as LSUN has them."""
    file = folder / DATA
    try:
        for key, offset, size in lmdb_values(file):
            name = key.decode("utf-8", errors="replace")
            reading.records.append(Record(name, f"{folder}:{name}", Blob(str(file), offset, size)))
    except ValueError as error:
        raise DarkroomError(f"{file} cannot be read ({error}); check the file") from None


def _add_sample(path: Path, key: str, fields: dict[str, Blob], reading: Reading) -> None:
    name = f"{path}:{key}"
    endings = [e for e in fields if _is_picture(f".{e}")]
    endings.sort(key=lambda e: f".{e}".endswith(ARRAY_SUFFIXES))
    if not endings:
        reading.problems.append((name, "no picture among its members"))
        return
    record = Record(key, f"{name}.{endings[0]}", fields[endings[0]])
    try:
        _take_fields(record, fields)
    except (OSError, ValueError) as error:
        reading.problems.append((name, reason_of(error)))
        return
    reading.records.append(record)


# --- what stands beside a picture -------------------------------------------------------------------------------------


def _is_picture(name: str) -> bool:
    """Whether a file is a sample's picture, not what lies beside one."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.lower().endswith(tuple(COMPANIONS))


def _take_fields(record: Record, fields: dict[str, Blob]) -> None:
    """Fill a record from the members of its sample, by ending without the first dot."""
    if "json" in fields:
        content = json.loads(fields["json"].read().decode("utf-8"))
        if not isinstance(content, dict):
            raise ValueError("its .json is not an object")
        _take_metadata(record, content)
    if "txt" in fields:
        record.text = fields["txt"].read().decode("utf-8-sig", errors="replace").strip()
    if "cls" in fields:
        record.label = int(fields["cls"].read().decode("ascii"))
    _take_companions(record, fields)


def _take_companions(record: Record, fields: dict[str, Blob]) -> None:
    record.companions = {name: fields[s[1:]] for s, name in COMPANIONS.items() if s[1:] in fields}


def _take_metadata(record: Record, content: dict[str, Any]) -> None:
    record.metadata = content
    for name in ("text", "caption"):
        if isinstance(content.get(name), str):
            record.text = content[name].strip()
            break
    for name in ("cls", "label"):
        value = content.get(name)
        if isinstance(value, int | str) and not isinstance(value, bool):
            record.label = value
            break
    if isinstance(content.get("boxes"), list):
        record.boxes = content["boxes"]


def reason_of(error: BaseException) -> str:
    """An exception as one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__
