"""The procedural sets: always the same, more than 8 bits, sensible spectra, and as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from darkroom.data.export import write_synthetic
from darkroom.data.sources import DataConfig, open_dataset
from darkroom.data.synthetic import BANDS, SETS, open_synthetic
from darkroom.errors import DarkroomError


@pytest.mark.parametrize("name", sorted(SETS))
def test_examples_are_always_the_same(name: str) -> None:
    config = DataConfig(source=name, channels=SETS[name].channels, pixels="auto", size=(32, 24), count=20)
    one, two = open_dataset(config), open_dataset(config)
    held_out = open_dataset(config, "validation")
    assert len(one) == 20 and len(held_out) == 2 and one.digest == two.digest != held_out.digest
    image = one[3]["image"]
    assert image.shape == (SETS[name].channels, 24, 32) and str(image.dtype) == f"torch.{one.pixels.dtype}"
    assert np.array_equal(image.numpy(), two[3]["image"].numpy())
    assert not np.array_equal(image.numpy(), one[4]["image"].numpy())
    assert not np.array_equal(image.numpy(), held_out[3 % 2]["image"].numpy())
    with pytest.raises(IndexError):
        one[20]


def test_phantoms_use_their_sixteen_bits() -> None:
    data = open_synthetic("phantoms16", (64, 64), 16)
    images = np.stack([data[i]["image"].numpy() for i in range(16)]).astype(int)
    assert images.max() == 65535 and images.min() < 6000
    levels = [len(np.unique(image)) for image in images]
    assert min(levels) > 1000 and max(len(np.unique(image // 257)) for image in images) <= 256
    # Neighbours mostly differ by less than one step of 8 bits: this is what an 8-bit copy loses.
    steps = np.abs(np.diff(images, axis=-1))
    assert ((steps > 0) & (steps < 257)).mean() > 0.3


def test_bands_have_the_spectra_of_land() -> None:
    data = open_synthetic("bands6", (64, 64), 24)
    images = np.stack([data[i]["image"].numpy() for i in range(24)])
    assert images.shape[1] == len(BANDS) and images.min() >= 0 and images.max() <= data.pixels.high
    assert (images == data.pixels.high).mean() < 1e-3
    blue, _, red, near, _, _ = images.mean((0, 2, 3))
    assert near > 1.5 * red and 0.02 < blue < 0.2
    correlation = np.corrcoef(images.transpose(1, 0, 2, 3).reshape(6, -1))
    assert correlation[0, 1] > 0.8 and correlation[0, 3] < 0.6  # bands are related, and not copies


def test_as_files(tmp_path: Path) -> None:
    for name, suffix in (("phantoms16", ".png"), ("bands6", ".tif"), ("bands6", ".npy")):
        drawn = open_synthetic(name, (32, 32), 3)
        place = tmp_path / f"{name}{suffix}"
        write_synthetic(drawn, place, suffix)
        config = DataConfig(
            source=str(place), channels=drawn.config.channels, pixels=drawn.pixels.dtype, size=32, validation=0.0
        )
        read = open_dataset(config)
        for k in range(3):
            assert np.array_equal(read[k]["image"].numpy(), drawn[k]["image"].numpy())


def test_settings_that_do_not_fit() -> None:
    for changes, message in (
        ({"channels": 3}, "has 1 channels"),
        ({"channels": 1, "pixels": "uint8"}, "has uint16 pixels"),
        ({"channels": 1, "pixels": "uint16", "captions": "a {label}"}, "no classes"),
        ({"channels": 1, "pixels": "uint16", "count": 0}, "1 or more"),
    ):
        with pytest.raises(DarkroomError, match=message):
            open_dataset(DataConfig(source="phantoms16", **changes))  # type: ignore[arg-type]
    with pytest.raises(DarkroomError, match="no procedural set"):
        open_synthetic("phantoms17", (8, 8), 1)
