"""Published data sets in the folders they come in, shrunk: LSUN, COCO, OpenImages, ImageNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from picture_files import encoded, write

from darkroom.data.lmdb_file import lmdb_values
from darkroom.data.sources import DataConfig, ImageDataset, open_dataset
from darkroom.errors import DarkroomError


def opened(source: Path, split: str = "train", **options: Any) -> ImageDataset:
    return open_dataset(DataConfig(source=str(source), **{"size": (12, 10), **options}), split)


# ---- LMDB


def write_lmdb(folder: Path, values: dict[bytes, bytes]) -> Path:
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=2**26) as environment:
        for start in range(0, len(values), 50):  # several transactions: the two meta pages take turns
            with environment.begin(write=True) as transaction:
                for key, value in list(values.items())[start : start + 50]:
                    transaction.put(key, value)
    return folder / "data.mdb"


@pytest.mark.parametrize("count", [0, 1, 7, 2000])
def test_values_are_those_of_the_library(tmp_path: Path, count: int) -> None:
    """Small and large values, one page and a tree of three levels."""
    rng = np.random.default_rng(count)
    sizes = rng.choice([0, 1, 40, 700, 3000, 20_000], count, p=[0.1, 0.1, 0.3, 0.3, 0.15, 0.05])
    values = {rng.bytes(20).hex().encode(): rng.bytes(int(size)) for size in sizes}
    file = write_lmdb(tmp_path / "x", values)
    data = file.read_bytes()
    found = {key: data[offset : offset + size] for key, offset, size in lmdb_values(file)}
    assert found == values and list(found) == sorted(values)


def test_files_that_are_no_lmdb(tmp_path: Path) -> None:
    file = write_lmdb(tmp_path / "x", {b"k%d" % i: b"v" * 5000 for i in range(20)})
    whole = file.read_bytes()
    for content, message in (
        (b"", "empty"),
        (b"no database" * 1000, "not an LMDB file"),
        (whole[:3000], "too early"),
        (whole[: len(whole) // 2], "too early"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            list(lmdb_values(file))
        with pytest.raises(DarkroomError, match="cannot be read"):
            opened(file.parent)


def test_several_values_of_a_key_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with lmdb.open(str(tmp_path / "x"), max_dbs=1) as environment:
        environment.open_db(b"inner")
    with pytest.raises(ValueError, match="several databases"):
        list(lmdb_values(tmp_path / "x" / "data.mdb"))


def test_lsun(tmp_path: Path) -> None:
    """Folders like church_outdoor_train_lmdb, with encoded pictures under hashed keys."""
    for part, numbers in (("train", range(5)), ("val", range(5, 7))):
        values = {f"{n:040x}".encode(): encoded(n, "webp") for n in numbers}
        write_lmdb(tmp_path / f"church_outdoor_{part}_lmdb", values)
    train, validation = opened(tmp_path), opened(tmp_path, "validation")
    assert (len(train), len(validation)) == (5, 2) and train.fields == ("image",) and not train.problems
    assert train[0]["image"].shape == (3, 10, 12)
    one = opened(tmp_path / "church_outdoor_train_lmdb", validation=0.0)
    assert len(one) == 5 and torch.equal(one[3]["image"], train[3]["image"])
    named = opened(
        tmp_path / "church_outdoor_train_lmdb", "validation", validation=str(tmp_path / "church_outdoor_val_lmdb")
    )
    assert len(named) == 2 and torch.equal(named[1]["image"], validation[1]["image"])


# ---- COCO


def coco(folder: Path) -> Path:
    categories = [{"id": 7, "name": "train"}, {"id": 1, "name": "person"}]
    for split, numbers in (("train2017", (3, 1, 2)), ("val2017", (9,))):
        images = [{"id": n, "file_name": f"{n:012d}.jpg", "width": 12, "height": 10} for n in numbers]
        captions = [
            {"image_id": n, "id": n * 10 + k, "caption": f"picture {n},\n text {k}"} for n in numbers for k in (0, 1)
        ]
        instances = [
            {"image_id": numbers[0], "category_id": 7, "bbox": [3, 2, 6, 5], "iscrowd": 0, "id": 1, "area": 30},
            {"image_id": numbers[0], "category_id": 1, "bbox": [0, 0, 12, 10], "iscrowd": 1, "id": 2, "area": 9},
            {"image_id": numbers[0], "category_id": 1, "bbox": [9, 5, 6, 5], "iscrowd": 0, "id": 3, "area": 9},
            {"image_id": numbers[0], "category_id": 1, "bbox": [4, 4, 0, 3], "iscrowd": 0, "id": 4, "area": 0},
        ]
        place = folder / "annotations"
        write(place / f"captions_{split}.json", {"images": images, "annotations": captions})
        write(
            place / f"instances_{split}.json",
            {"images": images, "annotations": instances, "categories": categories},
        )
        for n in numbers:
            write(folder / split / f"{n:012d}.jpg", encoded(n, "jpg"))
    return folder


def test_coco(tmp_path: Path) -> None:
    data = opened(coco(tmp_path))
    assert data.fields == ("image", "text", "boxes") and data.box_names == ["person", "train"]
    assert data.captions() == [f"picture {n}, text 0" for n in (1, 2, 3)]
    third = data[2]["boxes"]
    expected = torch.tensor([[1, 3 / 12, 0.2, 9 / 12, 0.7], [0, 9 / 12, 0.5, 1.0, 1.0]])  # cut at the border
    torch.testing.assert_close(third, expected)
    assert data[0]["boxes"].shape == (0, 5)
    assert opened(tmp_path, "validation").captions() == ["picture 9, text 0"]


def test_coco_captions_alone_and_missing_pictures(tmp_path: Path) -> None:
    coco(tmp_path)
    for file in (tmp_path / "annotations").glob("instances_*"):
        file.unlink()
    (tmp_path / "train2017" / "000000000002.jpg").unlink()
    data = opened(tmp_path)
    assert data.fields == ("image", "text") and len(data) == 2
    assert data.problems == [("000000000002.jpg", "listed in the annotations but not there")]


def test_coco_that_is_damaged(tmp_path: Path) -> None:
    coco(tmp_path)
    write(tmp_path / "annotations" / "captions_train2017.json", "{")
    with pytest.raises(DarkroomError, match="cannot be read"):
        opened(tmp_path)
    write(tmp_path / "annotations" / "captions_train2017.json", {"categories": []})
    with pytest.raises(DarkroomError, match="no annotation file of COCO"):
        opened(tmp_path)


def test_annotations_without_pictures(tmp_path: Path) -> None:
    coco(tmp_path / "with")
    place = tmp_path / "without"
    (place / "train2017").mkdir(parents=True)
    (tmp_path / "with" / "annotations").rename(place / "annotations")
    with pytest.raises(DarkroomError, match="none of the pictures"):
        opened(place)


# ---- OpenImages

HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
)


def open_images(folder: Path, names: bool = True) -> Path:
    rows = {
        "train": "a0,x,/m/cat,1,0.25,0.75,0.1,0.9,1,0,1,0,0\na0,x,/m/ant,1,0,0.5,0,1,0,0,0,0,1\n",
        "validation": "b0,x,/m/cat,1,0,1,0,1,0,0,0,1,0\n",
    }
    for part, lines in rows.items():
        write(folder / f"oidv6-{part}-annotations-bbox.csv", HEADER + lines)
    if names:
        write(folder / "class-descriptions-boxable.csv", "/m/dog,Dog\n/m/cat,Cat\n/m/ant,Ant\n")
    for part, keys in (("train", ("a0", "a1")), ("validation", ("b0",))):
        for n, key in enumerate(keys):
            write(folder / part / f"{key}.jpg", encoded(n, "jpg"))
    return folder


def test_open_images(tmp_path: Path) -> None:
    data = opened(open_images(tmp_path))
    assert data.fields == ("image", "boxes") and data.box_names == ["Dog", "Cat", "Ant"]
    torch.testing.assert_close(data[0]["boxes"], torch.tensor([[1, 0.25, 0.1, 0.75, 0.9], [2, 0, 0, 0.5, 1.0]]))
    assert data[1]["boxes"].shape == (0, 5)
    assert opened(tmp_path, "validation")[0]["boxes"].tolist() == [[1, 0, 0, 1, 1]]


def test_attributes_of_open_images(tmp_path: Path) -> None:
    """Bits as in the paper's models: group 1, occluded 2, depiction 4, inside 8."""
    data = opened(open_images(tmp_path), box_attributes=True)
    assert data[0]["boxes"][:, 0].tolist() == [1 + 3 * (1 + 2), 2 + 3 * 8]
    assert opened(tmp_path, "validation", box_attributes=True)[0]["boxes"][0, 0] == 1 + 3 * 4


def test_open_images_without_names(tmp_path: Path) -> None:
    assert opened(open_images(tmp_path, names=False)).box_names == ["/m/ant", "/m/cat"]


# ---- ImageNet

SYNSETS = ("n01440764", "n01443537", "n02012849", "n03126707")
MAPPING = "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius\nn02012849 crane\nn03126707 crane\n"


def imagenet(folder: Path, flat: bool, kaggle: bool = False) -> Path:
    place = folder / "ILSVRC" / "Data" / "CLS-LOC" if kaggle else folder
    for n, synset in enumerate(SYNSETS):
        for k in range(2):
            write(place / "train" / synset / f"{synset}_{k}.JPEG", encoded(10 * n + k, "jpg"))
        name = f"ILSVRC2012_val_{n:08d}.JPEG"
        write(place / "val" / name if flat else place / "val" / synset / name, encoded(n, "jpg"))
    return folder


@pytest.mark.parametrize("kaggle", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_imagenet(tmp_path: Path, flat: bool, kaggle: bool) -> None:
    imagenet(tmp_path, flat, kaggle)
    write(tmp_path / "LOC_synset_mapping.txt", MAPPING)
    if flat:
        rows = [f"ILSVRC2012_val_{n:08d},{s} 1 2 3 4 {s} 5 6 7 8" for n, s in reversed(list(enumerate(SYNSETS)))]
        write(tmp_path / "LOC_val_solution.csv", "ImageId,PredictionString\n" + "\n".join(rows))
    train, validation = opened(tmp_path), opened(tmp_path, "validation")
    assert train.class_names == ["tench", "goldfish", "crane (n02012849)", "crane (n03126707)"]
    assert validation.class_names == train.class_names
    assert [train[i]["class_label"] for i in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [validation[i]["class_label"] for i in range(4)] == [0, 1, 2, 3]


def test_imagenet_without_words(tmp_path: Path) -> None:
    assert opened(imagenet(tmp_path, flat=False)).class_names == list(SYNSETS)


def test_imagenet_without_solution(tmp_path: Path) -> None:
    with pytest.raises(DarkroomError, match=r"put LOC_val_solution\.csv into"):
        opened(imagenet(tmp_path, flat=True))


def test_other_folders_are_read_as_before(tmp_path: Path) -> None:
    write(tmp_path / "annotations" / "notes.json", {})
    for n in range(2):
        write(tmp_path / "train" / f"{n}.png", encoded(n))
    assert len(opened(tmp_path, validation=0.0)) == 2
