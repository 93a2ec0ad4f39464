"""Several sources in one data set: order, counts, splits, fields, and what cannot be mixed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from darkroom.data.locations import is_mixture, part_of
from darkroom.data.mixture import MixtureDataset
from darkroom.data.sources import DataConfig, open_dataset
from darkroom.errors import DarkroomError
from darkroom.recipe_source import found_at


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Two folders: ten reddish pictures with captions, six bluish ones without."""
    for name, count, colour in (("red", 10, (200, 0, 0)), ("blue", 6, (0, 0, 200))):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (16, 16), tuple(c + i for c in colour)).save(tmp_path / name / f"{i}.png")
            if name == "red":
                (tmp_path / name / f"{i}.txt").write_text(f"red {i}")
    return [str(tmp_path / "red"), str(tmp_path / "blue")]


def colours(dataset: MixtureDataset) -> list[str]:
    return ["red" if int(dataset[i]["image"][0, 0, 0]) >= 200 else "blue" for i in range(len(dataset))]


def test_files_shapes_and_counts_in_one_list(folders: list[str]) -> None:
    config = DataConfig(source=[f"{folders[0]}@4", "shapes@5", folders[1]], size=32, validation=0.0)
    dataset = open_dataset(config)
    assert isinstance(dataset, MixtureDataset) and len(dataset) == 4 + 5 + 6
    assert [len(part) for part in dataset.parts] == [4, 5, 6]
    assert dataset.fields == ("image",)  # the blue ones have no text
    assert all(dataset[i]["image"].shape == (3, 32, 32) for i in range(15))
    alone = open_dataset(DataConfig(source="shapes", size=32, count=5))
    assert torch.equal(dataset[4]["image"], alone[0]["image"]) and torch.equal(dataset[8]["image"], alone[4]["image"])
    with pytest.raises(IndexError):
        dataset[15]
    assert dataset.describe()["parts"][0]["examples"] == 4
    assert open_dataset(config).digest == dataset.digest
    other = open_dataset(DataConfig(source=[f"{folders[0]}@3", "shapes@5", folders[1]], size=32, validation=0.0))
    assert other.digest != dataset.digest


def test_sources_with_other_fields_lose_nothing(folders: list[str], tmp_path: Path) -> None:
    """Classes here, captions there: read as one source, the pictures without a class would be left out."""
    for name in ("cat", "dog"):
        (tmp_path / "animals" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (0, 90, 0)).save(tmp_path / "animals" / name / "1.png")
    dataset = open_dataset(
        DataConfig(source=[str(tmp_path / "animals"), "shapes@2", folders[0]], size=32, validation=0.0)
    )
    assert len(dataset) == 2 + 2 + 10 and not dataset.problems


def test_text_stays_where_every_example_has_one(folders: list[str]) -> None:
    dataset = open_dataset(DataConfig(source=[f"{folders[0]}@2", "shapes@2"], size=32, validation=0.0))
    texts = dataset.captions()
    assert dataset.fields == ("image", "text") and len(texts) == 4 and texts[0].startswith("red ")
    assert [dataset[i]["text"] for i in range(4)] == texts
    assert dataset.without_image(3) == {"text": texts[3]} and dataset.without_image(0, ()) == {}


def test_named_validation_files_are_wholly_validation(folders: list[str]) -> None:
    config = DataConfig(source=folders[0], size=32, validation=[f"{folders[1]}@3", "shapes@20"])
    train, validation = open_dataset(config), open_dataset(config, "validation")
    assert len(train) == 10 and set(colours(train)) == {"red"}  # type: ignore[arg-type]
    assert [len(part) for part in validation.parts] == [3, 2]  # type: ignore[attr-defined]
    scenes = open_dataset(DataConfig(source="shapes", size=32, count=20), "validation")
    assert torch.equal(validation[3]["image"], scenes[0]["image"])  # not scenes of the train split


def test_a_share_divides_each_part(folders: list[str]) -> None:
    config = DataConfig(source=[folders[0], "shapes@20"], size=32, validation=0.3)
    train, validation = open_dataset(config), open_dataset(config, "validation")
    assert len(train.parts[0]) + len(validation.parts[0]) == 10  # type: ignore[attr-defined]
    assert len(validation.parts[0]) >= 1 and len(validation.parts[1]) == 2  # type: ignore[attr-defined]


def test_the_words_of_a_location(tmp_path: Path) -> None:
    odd = tmp_path / "a@3"
    odd.mkdir()
    assert part_of("x/y.tar@12") == ("x/y.tar", 12) and part_of("x@0") == ("x@0", None)
    assert part_of(str(odd)) == (str(odd), None)
    assert is_mixture("x.tar@2") and is_mixture(["a.tar", "shapes"])
    assert not is_mixture(["a.tar", "b.tar"]) and not is_mixture("shapes")


def test_moved_data_keeps_counts_and_shapes(folders: list[str]) -> None:
    root = str(Path(folders[0]).parent)
    settings = {"source": ["red@4", "shapes@9", "blue"], "validation": ["blue@1"]}
    moved = found_at(settings, root)
    assert moved["source"] == [f"{folders[0]}@4", "shapes@9", folders[1]]
    assert moved["validation"] == [f"{folders[1]}@1"]
    gone = {"source": ["/old/place/red@4", "shapes@9"], "validation": ["/old/place/blue"]}
    assert found_at(gone, root)["source"] == [f"{folders[0]}@4", "shapes@9"]


def test_what_cannot_be_mixed(folders: list[str]) -> None:
    with pytest.raises(DarkroomError, match="PATH@COUNT"):
        open_dataset(DataConfig(source=[folders[0], "shapes"], size=32, limit=3))
    with pytest.raises(DarkroomError, match="no such file"):
        open_dataset(DataConfig(source=["nowhere@4", "shapes"], size=32))
