"""The field `sizes`: what a picture was before it became what the network sees, and that the condition reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_files import encoded, pixels, write
from PIL import Image

from darkroom.conditioning.conditioner import Conditioner
from darkroom.conditioning.sizes import SizesEncoder, SizesEncoderConfig
from darkroom.data import pictures as pictures_module
from darkroom.data.batches import Batches
from darkroom.data.sources import DataConfig, open_dataset
from darkroom.data.transforms import sizes_of, to_network
from darkroom.errors import DarkroomError


def folder(root: Path) -> str:
    """A wide, a tall, and a small picture of which the metadata knows that it was large."""
    write(root / "a.png", encoded(0, size=(40, 20)))
    write(root / "b.png", encoded(1, size=(16, 24)))
    write(root / "c.png", encoded(2, size=(8, 8)))
    write(root / "c.json", {"original_width": 640, "original_height": 480, "text": "small"})
    return str(root)


EXPECTED = [
    {"original_size": (20, 40), "crop": (0, 8), "target_size": (16, 16)},  # resized to 32x16
    {"original_size": (24, 16), "crop": (4, 0), "target_size": (16, 16)},
    {"original_size": (480, 640), "crop": (0, 0), "target_size": (16, 16)},
]


@pytest.mark.parametrize("in_memory", [True, False])
def test_sizes_of_files(tmp_path: Path, in_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not in_memory:
        monkeypatch.setattr(pictures_module.PictureDataset.__init__, "__defaults__", (0,))
    source = folder(tmp_path)
    dataset = open_dataset(DataConfig(source=source, size=16, validation=0.0, sizes=True))
    assert dataset.in_memory == in_memory  # type: ignore[attr-defined]
    assert [dataset[i]["sizes"] for i in range(3)] == EXPECTED
    assert dataset.without_image(1, ["sizes"]) == {"sizes": EXPECTED[1]}
    assert "sizes" in dataset.fields
    plain = open_dataset(DataConfig(source=source, size=16, validation=0.0))
    assert "sizes" not in plain.fields and "sizes" not in plain[0] and plain.digest != dataset.digest
    write(tmp_path / "c.json", {"original_width": 650, "original_height": 480, "text": "small"})
    assert open_dataset(dataset.config).digest != dataset.digest


def test_the_crop_is_where_the_picture_was_cut() -> None:
    """The picture resized as a whole and cut at `crop` is what the rule makes of it."""
    image = Image.fromarray(pixels(3, (48, 20)))
    known = sizes_of((48, 20), (10, 10))
    top, left = known["crop"]
    whole = np.asarray(image.resize((24, 10), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    ours = to_network(image, (10, 10))
    assert np.abs(whole[:, top : top + 10, left : left + 10].astype(int) - ours).max() <= 1
    assert known["original_size"] == (20, 48) and known["target_size"] == (10, 10)


def test_random_crops_and_flips(tmp_path: Path) -> None:
    """A random crop adds its corner: at `crop` of the whole resized picture lies what the batch shows."""
    source = folder(tmp_path)
    config = DataConfig(source=source, size=16, random_crop=(12, 8), flip=True, validation=0.0, sizes=True)
    dataset = open_dataset(config)
    seen = set()
    for step in range(12):
        batches = Batches(dataset, 3, seed=0)
        batch, indices = batches.batch_at(step), batches.indices(step)
        for image, sizes, index in zip(batch["image"], batch["sizes"], indices, strict=True):
            full, first = dataset[index]["image"], EXPECTED[index]
            y, x = (now - before for now, before in zip(sizes["crop"], first["crop"], strict=True))
            assert sizes["target_size"] == (8, 12) and sizes["original_size"] == first["original_size"]
            either = [view[:, y : y + 8, x : x + 12] for view in (full, full.flip(-1))]
            shown = torch.round((image + 1) * 127.5).to(torch.uint8)
            assert any(torch.equal(shown, view) for view in either)
            seen.add((y, x))
    assert len(seen) > 5


def test_the_condition_reads_them(tmp_path: Path) -> None:
    dataset = open_dataset(DataConfig(source=folder(tmp_path), size=16, validation=0.0, sizes=True))
    batch = Batches(dataset, 3, seed=0).batch_at(0)
    encoder = SizesEncoder(SizesEncoderConfig(size=(16, 16)))
    rows = [[*s["original_size"], *s["crop"], *s["target_size"]] for s in batch["sizes"]]
    assert torch.equal(Conditioner({"sizes": encoder})(batch).vector, encoder.encode(torch.tensor(rows).float()).vector)
    refiner = SizesEncoder(SizesEncoderConfig(parts=("crop", "original_size", "aesthetic_score"), score=5.5))
    numbers = torch.tensor([[*s["crop"], *s["original_size"], 5.5] for s in batch["sizes"]])
    assert torch.equal(refiner.encode(batch["sizes"]).vector, refiner.encode(numbers).vector)


def test_a_request_may_name_the_parts() -> None:
    encoder = SizesEncoder(SizesEncoderConfig())
    asked: dict[str, Any] = {"original_size": (512, 768)}
    assert encoder.from_request("sizes", asked, (64, 32)).tolist() == [512, 768, 0, 0, 32, 64]
    assert encoder.several([asked, asked]) and not encoder.several(asked)
    for wrong in ({"original": (1, 2)}, {"crop": (1,)}):
        with pytest.raises(DarkroomError, match="give 6 numbers"):
            encoder.from_request("sizes", wrong, (64, 32))
    with pytest.raises(DarkroomError, match="give 6 numbers"):
        encoder.encode([asked])


def test_mixtures_keep_them_where_all_have_them(tmp_path: Path) -> None:
    folders = [folder(tmp_path / name) for name in ("one", "two")]
    dataset = open_dataset(DataConfig(source=[f"{f}@2" for f in folders], size=16, validation=0.0, sizes=True))
    assert "sizes" in dataset.fields and set(dataset[3]["sizes"]) == set(EXPECTED[0])
    assert set(dataset.without_image(0)) == {"sizes"} | ({"text"} & set(dataset.fields))
    with_shapes = DataConfig(source=[f"{folders[0]}@2", "shapes@4"], size=16, validation=0.0, sizes=True)
    assert "sizes" not in open_dataset(with_shapes).fields
