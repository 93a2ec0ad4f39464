"""Settings written into a PNG come back; the `parameters` text is the one that other tools write and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from darkroom.errors import DarkroomError
from darkroom.png_settings import format_parameters, parse_parameters, png_text, read_png_text, read_settings

REQUEST = {
    "prompts": ["a red fox", "a snail"],
    "class_labels": None,
    "seeds": [3, 4],
    "steps": 20,
    "guidance_scale": 5.0,
    "solver": "dpm++2m",
    "eta": 0.0,
    "size": [96, 64],
    "negative_prompt": None,
    "batch_size": 2,
}
SETTINGS: dict[str, Any] = {
    "version": "0.1.0",
    "model": {"name": "emoji", "sha256": "ab" * 32},
    "request": REQUEST,
    "index": 1,
}


def test_parameters_text() -> None:
    assert format_parameters(SETTINGS) == (
        "a snail\nSteps: 20, Sampler: dpm++2m, CFG scale: 5.0, Seed: 4, Size: 96x64, "
        "Model hash: ababababab, Model: emoji, Version: Darkroom 0.1.0"
    )
    classes = {**REQUEST, "prompts": None, "class_labels": ["boot", "T-Shirt, long"]}
    assert 'Class: "T-Shirt, long"' in format_parameters({**SETTINGS, "request": classes})


@pytest.mark.parametrize("prompt", ["a fox", "", "two\nlines", 'a "b", c: d', "Steps: 3", "ünï ☃", "  spaces  "])
@pytest.mark.parametrize("negative", [None, "blurry", "a,\nb: c"])
def test_round_trip(prompt: str, negative: str | None) -> None:
    request = {**REQUEST, "prompts": [prompt, prompt], "negative_prompt": negative}
    settings = {**SETTINGS, "request": request, "model": {"name": 'my, "odd": model'}}
    table = parse_parameters(format_parameters(settings))
    assert table["Prompt"] == prompt and table.get("Negative prompt") == negative
    assert table["Model"] == 'my, "odd": model' and table["Seed"] == "4"


def test_text_of_another_tool() -> None:
    text = (
        "masterpiece, (fox:1.2) <lora:x:1>\nsecond line\nNegative prompt: bad, worse\n"
        "Steps: 28, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1, Size: 512x768, "
        'Lora hashes: "a: 1, b: 2", Version: v1.6'
    )
    table = parse_parameters(text)
    assert (
        table["Prompt"] == "masterpiece, (fox:1.2) <lora:x:1>\nsecond line" and table["Negative prompt"] == "bad, worse"
    )
    assert table["Lora hashes"] == "a: 1, b: 2" and table["Sampler"] == "DPM++ 2M Karras" and table["Version"] == "v1.6"
    assert parse_parameters("only a prompt: yes") == {"Prompt": "only a prompt: yes"}


def write(path: Path, **text: str) -> Path:
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    Image.new("RGB", (2, 2)).save(path, "PNG", pnginfo=info)
    return path


def test_settings_survive_the_file(tmp_path: Path) -> None:
    settings = {**SETTINGS, "request": {**REQUEST, "prompts": ["ünï ☃\n", "b"]}}
    path = write(tmp_path / "a.png", **png_text(settings))
    assert read_settings(path) == settings
    assert read_png_text(path)["parameters"] == format_parameters(settings)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    for text, words in (
        ({}, "no settings"),
        ({"parameters": "a fox"}, "another tool"),
        ({"darkroom": "{"}, "damaged"),
        ({"darkroom": "[]"}, "damaged"),
        ({"darkroom": "[" * 100_000}, "damaged"),
        ({"darkroom": json.dumps({"request": {}})}, "newer version"),
    ):
        with pytest.raises(DarkroomError, match=words):
            read_settings(write(tmp_path / "a.png", **text))
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:20])
    for name in ("cut.png", "absent.png", "."):
        with pytest.raises(DarkroomError):
            read_settings(tmp_path / name)
