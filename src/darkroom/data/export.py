"""Writing a data set as files: a tar shard or a folder that any WebDataset reader, and this package, can read."""

from __future__ import annotations

import io
import json
import os
import secrets
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from darkroom.data.image_files import check_suffix, image_bytes
from darkroom.data.io import png_bytes
from darkroom.data.sources import ShapesDataset
from darkroom.data.synthetic import SyntheticDataset
from darkroom.errors import DarkroomError
from darkroom.safe_files import discard, new_folder, save_error, write_file

CLASS_NAMES = "classes.json"


def write_shapes(dataset: ShapesDataset, path: Path, progress: Callable[[int], None] | None = None) -> list[Path]:
    """Write the whole set: to a tar shard if the path ends in .tar, else to a new folder. Gives what was written.

    Label maps count the background as 0, so the class list begins with it and `.cls` is 1 + shape.
    """
    path = Path(path)
    names = json.dumps(
        {"classes": ["background", *dataset.class_names], "boxes": {"classes": dataset.box_names}}, indent=1
    ).encode()
    if path.suffix != ".tar":
        with new_folder(path) as folder:
            (folder / CLASS_NAMES).write_bytes(names)
            for index, files in enumerate(_samples(dataset)):
                for name, data in files.items():
                    (folder / name).write_bytes(data)
                if progress is not None:
                    progress(index + 1)
        return [path]
    beside = path.parent / CLASS_NAMES
    if beside.exists() and beside.read_bytes() != names:
        raise DarkroomError(f"{beside} names other classes; write the shard into another folder")
    _write_tar(dataset, path, progress)
    write_file(beside, names)
    return [path, beside]


def write_synthetic(
    dataset: SyntheticDataset, path: Path, suffix: str, progress: Callable[[int], None] | None = None
) -> None:
    """Write a set of images without captions to a new folder, one file each."""
    path = Path(path)
    check_suffix(path / f"image{suffix}", dataset.config.channels, dataset.pixels.dtype)
    with new_folder(path) as folder:
        for index in range(len(dataset)):
            values = dataset[index]["image"].permute(1, 2, 0).contiguous().numpy()
            (folder / f"{index:06d}{suffix}").write_bytes(image_bytes(values, suffix))
            if progress is not None:
                progress(index + 1)


def _samples(dataset: ShapesDataset) -> Iterator[dict[str, bytes]]:
    """The files of one example after the other, by name."""
    for index in range(len(dataset)):
        example = dataset[index]
        key = f"{index:06d}"
        boxes = [{"cls": int(row[0]), "bbox": [float(v) for v in row[1:]]} for row in example["boxes"].tolist()]
        labels = example["segmentation"].numpy().astype(np.uint8)
        depth = np.rint(example["depth"][0].numpy() * 255).astype(np.uint8)
        yield {
            f"{key}.png": png_bytes(example["image"].permute(1, 2, 0).numpy()),
            f"{key}.txt": example["text"].encode(),
            f"{key}.cls": str(1 + example["class_label"]).encode(),
            f"{key}.json": json.dumps({"boxes": boxes}).encode(),
            f"{key}.seg.png": png_bytes(Image.fromarray(labels)),
            f"{key}.depth.png": png_bytes(Image.fromarray(depth)),
        }


def _write_tar(dataset: ShapesDataset, path: Path, progress: Callable[[int], None] | None) -> None:
    """Equal examples give equal bytes: the members carry no date and no owner."""
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as shard:
                for index, files in enumerate(_samples(dataset)):
                    for name, data in files.items():
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        shard.addfile(member, io.BytesIO(data))
                    if progress is not None:
                        progress(index + 1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise save_error(path, error) from None
    finally:
        discard(temporary)
