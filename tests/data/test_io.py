"""Reading with clear errors, writing whole or not at all, grids and contact sheets."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_files import encoded, pixels, write
from PIL import Image

from darkroom.data.io import contact_sheet, image_grid, read_image, write_image, write_png
from darkroom.data.sources import DataConfig, open_dataset
from darkroom.errors import DarkroomError


def test_read_image(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", encoded(3))
    assert np.array_equal(read_image(path), pixels(3))
    assert read_image(path, (6, 5)).shape == (5, 6, 3)
    assert read_image(path, channels=1).shape == (10, 12, 1)


def test_read_image_errors(tmp_path: Path) -> None:
    with pytest.raises(DarkroomError, match="no such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(DarkroomError, match="is a folder"):
        read_image(tmp_path)
    for name, data in (("text.png", b"hello"), ("cut.png", encoded(0, size=(90, 90))[:-99]), ("zero.png", b"")):
        with pytest.raises(DarkroomError, match="not a picture that can be read") as caught:
            read_image(write(tmp_path / name, data))
        assert "\n" not in str(caught.value)


def test_write_png_with_text(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out.png"
    text = {"parameters": "a red fox, été 日本\nSteps: 20", "darkroom": '{"seed": 1}'}
    write_png(path, pixels(1), text)
    with Image.open(path) as picture:
        assert picture.text == text
        assert np.array_equal(np.asarray(picture), pixels(1))
    write_image(pixels(2, channels=1), path)
    assert read_image(path, channels=1)[..., 0].tolist() == pixels(2, channels=1).tolist()
    assert [p.name for p in path.parent.iterdir()] == ["out.png"]
    with pytest.raises(ValueError, match="uint8"):
        write_png(path, np.zeros((2, 2, 3), np.float32))


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.png"
    write_png(path, pixels(1))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DarkroomError, match="No space left on device"):
        write_png(path, pixels(2))
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]
    assert np.array_equal(read_image(path), pixels(1))


def test_image_grid() -> None:
    images = np.stack([pixels(n) for n in range(5)])
    grid = np.asarray(image_grid(images, columns=3, padding=2))
    assert grid.shape == (10 * 2 + 2, 12 * 3 + 4, 3)
    assert np.array_equal(grid[12:22, 14:26], images[4])
    assert (grid[12:22, 28:] == 255).all()  # the empty cell
    assert image_grid(images).size == (12 * 3 + 4, 10 * 2 + 2)
    assert image_grid(images[..., :1]).mode == "L"
    with pytest.raises(ValueError, match="at least one"):
        image_grid([])


def test_contact_sheet_shows_what_the_network_sees() -> None:
    data = open_dataset(DataConfig(count=10))
    sheet = np.asarray(contact_sheet([{"image": data[i]["image"], "text": data[i]["text"]} for i in range(10)]))
    enlarged = data[1]["image"].permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)
    assert np.array_equal(sheet[:128, 134:262], enlarged)
    assert (sheet[128:150, :128] < 100).any()  # the caption below the first picture


def test_boxes_are_outlined_to_the_pixel_of_the_enlarged_picture() -> None:
    """Edges within a small picture's pixels, each of which is shown as four by four."""
    boxes = torch.tensor([[0.0, 5.5 / 32, 8.5 / 32, 20.25 / 32, 1.0]])
    example = {"image": torch.zeros(3, 32, 32, dtype=torch.uint8), "boxes": boxes}
    lines = (np.asarray(contact_sheet([example]))[:128, :128] == (255, 0, 255)).all(-1)
    rows, columns = lines.any(1).nonzero()[0], lines.any(0).nonzero()[0]
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (34, 127, 22, 80)
    assert lines.sum() == 2 * (94 + 59) - 4  # one pixel wide, nothing inside
    for sliver in ([0.0, 0.998, 0.2, 1.0, 0.6], [0.0, 0.0, 0.2, 0.002, 0.6], [0.0, 0.2, 0.999, 0.6, 1.0]):
        thin = contact_sheet([example | {"boxes": torch.tensor([sliver])}])
        assert (np.asarray(thin)[:128, :128] == (255, 0, 255)).all(-1).sum() == 51


def test_contact_sheet_of_arrays_and_classes() -> None:
    assert contact_sheet([pixels(0), pixels(1)], ["Åland", "b"], columns=1).width < 200
    example = {"image": open_dataset(DataConfig(count=1))[0]["image"], "class_label": 1}
    with_name, without = contact_sheet([example], class_names=["a", "dog"]), contact_sheet([example])
    assert np.asarray(with_name).tobytes() != np.asarray(without).tobytes()
