"""`benchmarks/inpainting_table.py`: rows of one table fill the same holes and leave their protocol."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from condition_models import make_model
from PIL import Image

from darkroom.data.masks import RandomMask
from darkroom.data.shapes import draw_scene, render
from darkroom.data.sources import DataConfig, open_dataset
from darkroom.evaluation.protocol import check_comparable, read_record

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(render(draw_scene(i, size=(32, 32)))[0]).save(folder / f"{i}.png")
    return folder


def test_every_baseline_fills_the_hole() -> None:
    from inpainting_table import baselines

    image = np.full((32, 32, 3), 200, np.uint8)
    mask = np.zeros((32, 32), bool)
    mask[8:20, 10:22] = True
    holed = np.where(mask[..., None], np.uint8(0), image)
    methods = baselines()
    assert [m.name for m in methods] == ["mean colour", "push-pull", "OpenCV Telea", "OpenCV Navier-Stokes"]
    for method in methods:
        assert np.abs(method.fill(holed, mask, 0)[mask].astype(int) - 200).max() <= 2, method.name


def test_a_table(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import inpainting_table

    made = make_model("masked_image")
    made.info["defaults"]["guidance_scale"] = 1.0
    model = made.save(tmp_path / "model")
    arguments = ["--data", str(pictures), "--size", "32", "32", "--count", "4", "--steps", "1", "--pictures", "1"]
    output = tmp_path / "table"
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "--model", f"tried={model}", "-o", str(output)])
    inpainting_table.main()
    text = (output / "table.md").read_text()
    assert text.count("\n| 40-50 % |") == text.count("\n| all |") == 5 and "| tried |" in text
    assert text in capsys.readouterr().out
    for masks in ("40-50", "all"):
        records = [read_record(path) for path in sorted((output / masks).glob("*.json"))]
        assert len(records) == 5 and (output / masks / "pictures.png").is_file()
        check_comparable([inpainting_table.without_time(r) for r in records], [r.sampling.model for r in records])
        tried = next(r for r in records if r.sampling.model == "tried")
        assert tried.sampling.steps == 1 and tried.sampling.nfe == 1 and tried.sampling.conditions_digest
        assert tried.sampling.made["repaint_mask"]["share"] == ([0.4, 0.5] if masks == "40-50" else [0.02, 0.5])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--speed-only"])
    inpainting_table.main()
    assert "| tried |" in (output / "speed.md").read_text() and "training samples/s" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", sys.argv[:-1])
    # What is there already is not made again.
    monkeypatch.setattr(inpainting_table.FilledPictures, "read", None)
    inpainting_table.main()
    assert (output / "table.md").read_text() == text


def test_known_pixels_are_those_of_the_picture(pictures: Path) -> None:
    from inpainting_table import FilledPictures, Method

    dataset = open_dataset(
        DataConfig(source=str(pictures), size=32, validation=0.0, repaint_mask=RandomMask((0.4, 0.5)))
    )
    method = Method("black", lambda image, mask, number: image * 0, "0", {})
    source = FilledPictures(dataset, 3, method, None)  # type: ignore[arg-type]
    for number in range(3):
        image, mask, result = source.filled(number)
        assert np.array_equal(result[~mask], image[~mask]) and not result[mask].any() and 0.4 <= mask.mean() <= 0.5
