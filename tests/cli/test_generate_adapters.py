"""`generate --lora --embedding`: applied, noted in the picture, and found again by --from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_files import kohya, low_rank, small_stable_diffusion
from click.testing import CliRunner
from PIL import Image

from darkroom.cli.adapters import given_adapters
from darkroom.cli.generate import generate
from darkroom.errors import DarkroomError
from darkroom.png_settings import read_png_text, read_settings
from darkroom.safe_files import write_safetensors

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    small_stable_diffusion(tmp_path).save("small")
    kohya(Path("fox.safetensors"), low_rank({LAYER: (32, 32)}, seed=3), "lora_unet_", 20.0)
    write_safetensors("thing.safetensors", {"emb_params": 3 * torch.randn(2, 32)})
    return tmp_path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(generate, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output + result.stderr


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_pictures_note_their_adapters_and_are_repeated(folder: Path) -> None:
    common = ("-m", "small", "--seed", "1", "--steps", "2", "a thing fox")
    run(*common, "-o", "plain.png")
    run(*common, "-o", "both.png", "--lora", "fox.safetensors:0.7", "--embedding", "thing.safetensors")
    assert (pixels("plain.png") != pixels("both.png")).any()
    lora, word = read_settings("both.png")["model"]["adapters"]
    assert (lora["kind"], lora["weight"], lora["source"]) == ("lora", 0.7, "fox.safetensors")
    assert (word["kind"], word["word"]) == ("embedding", "thing")
    assert 'Adapters: "fox.safetensors 0.7, thing.safetensors 1"' in read_png_text("both.png")["parameters"]
    said = run("--from", "both.png", "-o", "again.png")
    assert (pixels("again.png") == pixels("both.png")).all() and "note" not in said
    Path("fox.safetensors").rename("wolf.safetensors")
    with pytest.raises(DarkroomError, match=r"made with fox\.safetensors, which is not here; add --lora FILE"):
        run("--from", "both.png", "-o", "third.png")
    said = run(
        "--from", "both.png", "-o", "third.png", "--lora", "wolf.safetensors:0.7", "--embedding", "thing.safetensors"
    )
    assert (pixels("third.png") == pixels("both.png")).all() and "adapters was fox.safetensors" in said


def test_weights_and_words_stand_behind_the_last_colon(folder: Path) -> None:
    Path("a:0.5").write_bytes(b"")
    paths = [(str(a.path), a.weight, a.word) for a in given_adapters(["b:0.5", "c", "a:0.5"], ["d:<cat>", "e"])]
    assert paths == [("b", 0.5, None), ("c", 1.0, None), ("a:0.5", 1.0, None), ("d", 1.0, "<cat>"), ("e", 1.0, None)]
    with pytest.raises(DarkroomError, match="give FILE or FILE:WEIGHT"):
        given_adapters(["b:much"], [])
