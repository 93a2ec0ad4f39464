"""Folders and shards in all their forms, splits, and what happens to bad files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_files import encoded, label_map, pixels, write, write_shard
from PIL import Image

from darkroom.data.pictures import PictureDataset
from darkroom.data.sources import DataConfig, ImageDataset, open_dataset
from darkroom.errors import DarkroomError


def opened(source: Path | list[str], split: str = "train", **options: Any) -> ImageDataset:
    options = {"size": (12, 10), "validation": 0.0} | options
    return open_dataset(DataConfig(source=source if isinstance(source, list) else str(source), **options), split)


def chw(number: int) -> torch.Tensor:
    return torch.from_numpy(pixels(number)).permute(2, 0, 1)


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_shapes() -> None:
    data = open_dataset(DataConfig(count=200))
    assert len(data) == 200 and data.fields == ("image", "text", "class_label", "boxes", "segmentation", "depth")
    one = data[5]
    assert one["image"].shape == (3, 64, 64) and one["image"].dtype == torch.uint8
    assert one["boxes"].dtype == torch.float32 and one["segmentation"].dtype == torch.int64
    assert data.class_names[one["class_label"]] == one["text"].split()[2]
    assert data.captions()[5] == one["text"]
    validation = open_dataset(DataConfig(count=200), "validation")
    assert len(validation) == 20 and validation.digest != data.digest
    assert (
        open_dataset(DataConfig(count=200)).digest == data.digest != open_dataset(DataConfig(count=200, seed=1)).digest
    )
    assert open_dataset(DataConfig(size=(96, 64), count=1))[0]["image"].shape == (3, 64, 96)
    kinds = {len(open_dataset(DataConfig("shapes:single", count=20))[i]["boxes"]) for i in range(20)}
    assert kinds == {1}
    with pytest.raises(IndexError):
        data[200]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flip": True}, "flip=false"),
        ({"channels": 1}, "channels=3"),
        ({"source": "shapes:round"}, "shapes:round"),
        ({"count": 0}, "1 or more"),
        ({"size": 16}, "32x32"),
        ({"size": 0}, "size=0"),
        ({"size": 64, "random_crop": 96}, "does not fit"),
        ({"captions": "a {label}"}, "captions"),
    ],
)
def test_shapes_refuse_what_they_cannot_do(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DarkroomError, match=words):
        open_dataset(DataConfig(**options))[0]


def test_unknown_split() -> None:
    with pytest.raises(DarkroomError, match="train or validation"):
        open_dataset(DataConfig(), "test")


# --- folders ----------------------------------------------------------------------------------------------------------


def test_plain_folder(tmp_path: Path) -> None:
    for number, ending in enumerate(("png", "webp", "bmp", "gif")):
        write(tmp_path / f"p{number}.{ending}", encoded(number, ending))
    write(tmp_path / "notes.md", "not a picture")
    write(tmp_path / ".hidden.png", b"junk")
    data = opened(tmp_path)
    assert len(data) == 4 and data.fields == ("image",) and data.problems == [] and data.captions() == []
    assert torch.equal(data[0]["image"], chw(0)) and torch.equal(data[2]["image"], chw(2))


def test_class_folders(tmp_path: Path) -> None:
    for number in range(6):
        write(tmp_path / ("cat", "dog", "ant")[number % 3] / "deep" / f"{number}.png", encoded(number))
    data = opened(tmp_path)
    assert data.class_names == ["ant", "cat", "dog"] and data.fields == ("image", "class_label")
    assert [data[i]["class_label"] for i in range(6)] == [0, 0, 1, 1, 2, 2]
    told = opened(tmp_path, captions="a photo of a {label}")
    assert told.captions()[0] == "a photo of a ant" == told[0]["text"]
    with pytest.raises(DarkroomError, match=r"has no \{label\}"):
        opened(tmp_path, captions="a photo")


def test_one_folder_is_not_a_class(tmp_path: Path) -> None:
    write(tmp_path / "all" / "a.png", encoded(0))
    assert opened(tmp_path).fields == ("image",)
    with pytest.raises(DarkroomError, match="no classes"):
        opened(tmp_path, captions="a {label}")


def test_side_car_files(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"p{number}.v1.jpg", encoded(number, "jpg"))
        write(tmp_path / f"p{number}.v1.txt", f" caption {number} é\n")
        write(tmp_path / f"p{number}.v1.seg.png", label_map(np.full((10, 12), number)))
        boxes = [{"class": "b", "bbox": [0, 0, 0.5, 1]}] * number
        write(tmp_path / f"p{number}.v1.json", {"cls": 2 - number, "boxes": boxes, "group": "g"})
    write(tmp_path / "classes.json", {"classes": ["x", "y", "z"], "boxes": {"classes": ["a", "b"]}})
    data = opened(tmp_path)
    assert data.fields == ("image", "text", "class_label", "boxes", "segmentation")
    assert data.captions() == [f"caption {n} é" for n in range(3)]
    assert data.class_names == ["x", "y", "z"] and data.box_names == ["a", "b"]
    assert data[0]["boxes"].shape == (0, 5) and data[2]["boxes"].tolist() == [[1, 0, 0, 0.5, 1]] * 2
    assert data[1]["class_label"] == 1 and (data[1]["segmentation"] == 1).all()


def test_metadata_jsonl(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / "pics" / f"{number}.png", encoded(number))
    lines = [
        '{"file_name": "pics/0.png", "text": "zero", "label": "even"}',
        '{"file_name": "pics/1.png", "text": "one", "label": "odd"}',
        "",
        "not json",
        '{"file_name": "pics/2.png", "text": "two", "label": "even"}',
        '{"file_name": "pics/9.png", "text": "nine", "label": "odd"}',
    ]
    sheet = write(tmp_path / "metadata.jsonl", "\n".join(lines))
    data = opened(tmp_path)
    assert data.captions() == ["zero", "one", "two"] and data.class_names == ["even", "odd"]
    assert sorted(data.problems) == sorted(
        [
            (f"{sheet}:4", 'not a JSON object with "file_name"'),
            (str(tmp_path / "pics/3.png"), f"not listed in {sheet}"),
            (str(tmp_path / "pics/9.png"), "listed in metadata.jsonl but not there"),
        ]
    )


def test_folder_with_its_own_parts(tmp_path: Path) -> None:
    for part, numbers in (("train", (0, 1, 2)), ("val", (3,)), ("test", (4, 5))):
        for number in numbers:
            write(tmp_path / part / "ab"[number % 2] / f"{number}.png", encoded(number))
    data, validation = opened(tmp_path), opened(tmp_path, "validation")
    assert (len(data), len(validation)) == (3, 1)
    # The validation part has one class of the two; its number is still that of the train part.
    assert validation.class_names == ["a", "b"]
    assert torch.equal(validation[0]["image"], chw(3))


# --- shards -----------------------------------------------------------------------------------------------------------


def members(numbers: range, **more: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for number in numbers:
        out[f"{number:04d}.cls"] = str(number % 2)
        out[f"{number:04d}.json"] = {"group": "odd" if number % 2 else "even", "tags": [f"t{number}"]}
        out[f"{number:04d}.png"] = encoded(number)
        out[f"{number:04d}.txt"] = f"number {number}"
    return out | more


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tgz"])
def test_shard(tmp_path: Path, ending: str) -> None:
    path = write_shard(tmp_path / f"set.{ending}", members(range(5)))
    data = opened(path)
    assert len(data) == 5 and data.fields == ("image", "text", "class_label") and data.class_names == ["0", "1"]
    assert torch.equal(data[3]["image"], chw(3)) and data[3]["text"] == "number 3" and data[3]["class_label"] == 1
    write(tmp_path / "classes.json", {"classes": ["even", "odd"]})
    assert opened(path).class_names == ["even", "odd"]


def test_shard_with_label_maps_and_boxes(tmp_path: Path) -> None:
    ids = np.zeros((20, 24), np.uint8)
    ids[:, 12:] = 1
    content = {
        "a.jpg": encoded(0, "jpg", (24, 20)),
        "a.json": {"boxes": [{"cls": 1, "bbox": [0.5, 0.0, 1.0, 1.0]}]},
        "a.seg.png": label_map(ids),
    }
    write(tmp_path / "classes.json", {"classes": ["sky", "road"]})
    data = opened(write_shard(tmp_path / "seg.tar", content), size=10)
    one = data[0]
    assert data.fields == ("image", "boxes", "segmentation") and one["image"].shape == (3, 10, 10)
    assert one["segmentation"].tolist() == [[0] * 5 + [1] * 5] * 10
    assert one["boxes"].tolist() == [[1, 0.5, 0, 1, 1]]  # 24x20 is cropped to its middle 20x20


def test_shards_by_glob_list_and_folder(tmp_path: Path) -> None:
    write_shard(tmp_path / "s-train-00.tar", members(range(0, 4)))
    write_shard(tmp_path / "s-train-01.tar.gz", members(range(4, 8)))
    write_shard(tmp_path / "s-val.tar", members(range(8, 10)))
    write_shard(tmp_path / "s-test20.tar", members(range(10, 12)))
    assert len(opened(tmp_path)) == 8 and len(opened(tmp_path, "validation")) == 2
    assert len(opened(tmp_path / "*.tar*")) == 8
    assert len(opened([str(tmp_path / "s-train-00.tar"), str(tmp_path / "s-val.tar")])) == 6
    # A file that is named is used as a whole, whatever it is called.
    assert len(opened(tmp_path / "s-val.tar")) == 2
    other = opened(tmp_path / "s-train-00.tar", "validation", validation=str(tmp_path / "s-test20.tar"))
    assert other.captions() == ["number 10", "number 11"]


def test_exclude_and_limit(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "s.tar", members(range(40)))
    assert opened(path, exclude={"group": ["odd"]}).captions() == [f"number {n}" for n in range(0, 40, 2)]
    assert len(opened(path, exclude={"group": ["odd"], "tags": ["t0", "t2"]})) == 18
    with pytest.raises(DarkroomError, match=r"'grup' \(group, tags\)"):
        opened(path, exclude={"grup": ["odd"]})
    with pytest.raises(DarkroomError, match="no training examples are left"):
        opened(path, exclude={"group": ["odd", "even"]})
    few = opened(path, limit=7)
    assert len(few) == 7 and few.captions() != [f"number {n}" for n in range(7)]
    assert few.captions() == opened(path, limit=7).captions()


def test_validation_share_is_stable(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "s.tar", members(range(60)))
    train, validation = opened(path, validation=0.25), opened(path, "validation", validation=0.25)
    assert set(train.captions()).isdisjoint(validation.captions()) and len(train) + len(validation) == 60
    assert 6 <= len(validation) <= 26
    more = write_shard(tmp_path / "more.tar", members(range(80)))
    assert set(validation.captions()) < set(opened(more, "validation", validation=0.25).captions())
    assert len(opened(path, "validation", validation=0.0)) == 0
    two = write_shard(tmp_path / "two.tar", members(range(2)))
    for share in (0.0001, 0.9999):
        assert len(opened(two, validation=share)) == len(opened(two, "validation", validation=share)) == 1
    with pytest.raises(DarkroomError, match=r"validation=1\.5"):
        opened(path, validation=1.5)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_corrupt_pictures_are_skipped_counted_and_named(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / f"{number}.png", encoded(number))
    write(tmp_path / "bad.png", b"this is text")
    write(tmp_path / "cut.png", encoded(5, size=(64, 64))[:-400])
    write(tmp_path / "zero.png", b"")
    data = opened(tmp_path)
    assert len(data) == 4 and data.describe()["problems"] == 3
    assert sorted(Path(name).name for name, _ in data.problems) == ["bad.png", "cut.png", "zero.png"]
    assert all("\n" not in reason and reason for _, reason in data.problems)


def test_corrupt_samples_of_a_shard(tmp_path: Path) -> None:
    extra = {"x.png": b"junk", "x.cls": "0", "x.txt": "x", "y.txt": "no picture", "z.png": encoded(1), "z.cls": "many"}
    data = opened(write_shard(tmp_path / "s.tar", members(range(3), **extra)))
    assert len(data) == 3 and len(data.problems) == 3
    high = members(range(3), **{"q.png": encoded(1), "q.cls": "7"})
    write(tmp_path / "classes.json", {"classes": ["a", "b"]})
    assert [r for _, r in opened(write_shard(tmp_path / "t.tar", high)).problems] == ["class 7 is not among the names"]


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_truncated_shard_gives_what_it_has(tmp_path: Path, ending: str) -> None:
    path = write_shard(tmp_path / f"s.{ending}", members(range(30)))
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) * 2 // 3])
    data = opened(path)
    assert 5 < len(data) < 30
    assert any("ends too early" in reason or "end" in reason.lower() for _, reason in data.problems)


def test_all_bad_is_an_error(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.png", b"junk")
    with pytest.raises(DarkroomError, match="none of its pictures"):
        opened(tmp_path)
    with pytest.raises(DarkroomError, match=r"the first: .*0\.png \(not a picture"):
        PictureDataset(DataConfig(str(tmp_path), validation=0.0), "train", in_memory_bytes=0)


def test_paths_that_are_not_data(tmp_path: Path) -> None:
    cases = {
        "nowhere": "no such file or folder",
        "empty": "no pictures",
        "one.png": "single picture",
        "text.txt": "neither a folder",
        "not.tar": "cannot be read as a tar shard",
        "bare.tar": "no pictures in this shard",
        "*.none": "nothing matches",
    }
    (tmp_path / "empty").mkdir()
    write(tmp_path / "one.png", encoded(0))
    write(tmp_path / "text.txt", "hello")
    write(tmp_path / "not.tar", b"hello" * 500)
    write_shard(tmp_path / "bare.tar", {})
    for name, words in cases.items():
        with pytest.raises(DarkroomError, match=words) as caught:
            opened(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(DarkroomError, match="empty list"):
        opened([])
    write(tmp_path / "odd" / "classes.json", ["a"])
    write(tmp_path / "odd" / "a.png", encoded(0))
    with pytest.raises(DarkroomError, match="not of the form"):
        opened(tmp_path / "odd")


# --- large sets -------------------------------------------------------------------------------------------------------


def test_decoding_on_access_gives_the_same(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "s.tar", members(range(6)))
    config = DataConfig(str(path), size=8, validation=0.0)
    at_once, later = PictureDataset(config, "train"), PictureDataset(config, "train", in_memory_bytes=0)
    assert at_once.in_memory and not later.in_memory
    for i in range(6):
        one, other = at_once[i], later[i]
        assert torch.equal(one["image"], other["image"])
        assert {k: v for k, v in one.items() if k != "image"} == later.without_image(i) == at_once.without_image(i)


def test_wanted_fields_are_those_of_the_example(tmp_path: Path) -> None:
    shapes = open_dataset(DataConfig("shapes", size=32, count=4))
    write_shard(tmp_path / "s.tar", members(range(4)))
    pictures = open_dataset(DataConfig(str(tmp_path / "s.tar"), size=8, validation=0.0))
    for data in (shapes, pictures):
        example = data[3]
        for wanted in ([], ["text"], ["class_label", "text"], list(example)):
            found = data.without_image(3, wanted)
            assert set(found) == set(wanted) & set(example) - {"image"}
            for name, value in found.items():
                assert torch.equal(value, example[name]) if isinstance(value, torch.Tensor) else value == example[name]


def test_unreadable_pictures_are_replaced_on_access(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", members(range(2), **{"b.png": b"junk", "b.txt": "bad", "b.cls": "0"}))
    data = PictureDataset(DataConfig(str(tmp_path / "s.tar"), size=8, validation=0.0), "train", in_memory_bytes=0)
    assert len(data) == 3 and data.problems == []
    assert data[2]["text"] == "number 0" == data.without_image(2)["text"]
    assert data[2]["text"] == "number 0" and len(data.problems) == 1 and data.replaced == {2: 0}


def test_digest_follows_the_content(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "s.tar", members(range(3)))
    first = opened(path).digest
    assert opened(path).digest == first
    assert opened(path, size=8).digest != first
    write_shard(tmp_path / "s.tar", members(range(3)) | {"0001.txt": "another text"})
    assert opened(path).digest != first
    changed = pixels(1)
    changed[0, 0, 0] ^= 1
    buffer = tmp_path / "x.png"
    Image.fromarray(changed).save(buffer)
    write_shard(tmp_path / "s.tar", members(range(3)) | {"0001.png": buffer.read_bytes()})
    assert opened(path).digest != first
