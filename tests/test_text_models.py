"""Whole models that read text through published towers: generating from text and from token ids, saving, training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from text_tower_files import CLIP_L, OPEN_G, SIZE, encoder, write_clip_vocabulary

from darkroom.build import build_conditioner, build_denoiser
from darkroom.conditioning.text_towers import TextTowers
from darkroom.conditioning.vocabularies import VOCABULARIES, read_vocabulary
from darkroom.errors import DarkroomError
from darkroom.generation_request import Request, Result
from darkroom.interop.text_towers import find_towers
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_io import load, save
from darkroom.png_settings import format_parameters
from darkroom.train_job import train

XL = {
    "text": {
        "kind": "sdxl_text",
        "clip_l": {"network": CLIP_L, "length": 8},
        "clip_g": {"network": OPEN_G, "length": 8},
    },
    "sizes": {"kind": "sizes", "width": 8},
}
FOX = [SIZE - 2, 513, 515, 517, SIZE - 1]  # "the red fox"


def model(tokenizer: str | None = None) -> LatentDiffusion:
    """Pixels of 8x8 with SDXL's conditions in small."""
    torch.manual_seed(0)
    config = json.loads(json.dumps({"encoders": XL}))
    for tower in ("clip_l", "clip_g"):
        config["encoders"]["text"][tower]["tokenizer"] = tokenizer
    conditioner = build_conditioner(config)
    network = {
        "in_channels": 3, "out_channels": 3, "model_channels": 32, "channel_mult": [1], "num_res_blocks": 1,
        "attention_resolutions": [1], "num_heads": 2, "use_spatial_transformer": True, "num_classes": "sequential",
        "context_dim": conditioner.context_dim, "adm_in_channels": conditioner.vector_dim,
    }  # fmt: skip
    denoiser = build_denoiser({"network": network})
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return LatentDiffusion(None, denoiser, conditioner, {"name": "xl", "defaults": {"size": [8, 8], "steps": 2}})


def same(one: Result, other: Result) -> bool:
    """Latents tell more than pictures, whose colours an untrained network drives to their limits."""
    return torch.equal(one.latents, other.latents)


def test_text_and_ids_give_the_same_picture(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv(VOCABULARIES, raising=False)
    with_words = model(read_vocabulary(write_clip_vocabulary(tmp_path / "clip"), "clip").to_str())
    without = model()
    expected = with_words.generate("the red fox", seed=3, guidance_scale=5.0)
    other = with_words.generate("", seed=3, guidance_scale=5.0)
    assert not same(expected, other)
    for ids in (FOX, torch.tensor(FOX), [FOX], torch.tensor([FOX]), {"clip": FOX}):
        result = without.generate(ids, seed=3, guidance_scale=5.0)
        assert same(result, expected)
    with pytest.raises(DarkroomError, match=r"vocab\.json and merges\.txt.*token ids"):
        without.generate("the red fox")
    # What is recorded makes the picture again, and can be read by people.
    settings = json.loads(json.dumps(result.settings[0]))
    assert settings["request"]["prompts"] == [{"clip": FOX}]
    again = without.generate(Request(**{**settings["request"], "size": (8, 8)}))
    assert same(again, expected)
    assert format_parameters(settings).startswith(json.dumps({"clip": FOX}))
    negative = without.generate(FOX, seed=3, guidance_scale=5.0, negative_prompt=[SIZE - 2, SIZE - 1])
    assert not same(negative, expected)  # the empty text is not the absence of one, which is zeros
    assert same(negative, with_words.generate("the red fox", seed=3, guidance_scale=5.0, negative_prompt=" "))
    with pytest.raises(DarkroomError, match="a string or a list of token ids"):
        without.generate([3.5])


def test_sizes_follow_the_picture_and_stay_under_guidance() -> None:
    ours = model()
    expected = ours.generate(FOX, seed=1, guidance_scale=3.0)
    stated = ours.generate(FOX, seed=1, guidance_scale=3.0, sizes=[8, 8, 0, 0, 8, 8])
    other = ours.generate(FOX, seed=1, guidance_scale=3.0, sizes=[900, 8, 0, 0, 8, 8])
    assert same(expected, stated) and not same(expected, other)
    request = ours.validate(Request(prompts=[FOX]))
    positive, negative = ours.encode_condition(request, slice(0, 1)), ours.encode_negative(request, slice(0, 1))
    assert negative is not None and positive.vector is not None and negative.vector is not None
    assert torch.equal(positive.vector[:, 48:], negative.vector[:, 48:]) and not negative.vector[:, :48].any()
    assert stated.settings[0]["request"]["conditions"] == {"sizes": [[8, 8, 0, 0, 8, 8]]}


def test_saved_models_keep_tower_and_vocabulary(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv(VOCABULARIES, raising=False)
    ours = model(read_vocabulary(write_clip_vocabulary(tmp_path / "clip"), "clip").to_str())
    save(ours, tmp_path / "model")
    again = load(tmp_path / "model", device="cpu")
    assert isinstance(again, LatentDiffusion)
    assert same(again.generate("the red fox"), ours.generate("the red fox"))


RECIPE: dict[str, Any] = {
    "data": {"source": "shapes", "size": 32, "count": 16},
    "denoiser": {"network": {"model_channels": 32, "channel_mult": [1], "num_res_blocks": 1, "num_heads": 2,
                             "attention_resolutions": [1]}},
    "conditioner": {"text": {"kind": "clip", "network": CLIP_L, "length": 8}},
    "batch_size": 4, "steps": 3, "optimizer": {"warmup_steps": 0, "learning_rate": 0.01},
    "evaluate": {"samples": 1, "steps": 1},
}  # fmt: skip


def recipe(tmp_path: Path, **changes: Any) -> Path:
    text = {**RECIPE["conditioner"]["text"], **changes}
    path = tmp_path / "recipe.json.yaml"
    path.write_text(json.dumps({**RECIPE, "conditioner": {"text": text}}))
    return path


def test_training_on_published_weights(tmp_path: Path, monkeypatch: Any) -> None:
    """A frozen tower from a folder of transformers: read once, not changed, in the model that comes out."""
    monkeypatch.delenv(VOCABULARIES, raising=False)
    folder = tmp_path / "clip"
    folder.mkdir()
    torch.manual_seed(5)
    tower = encoder(kind="clip", network=CLIP_L).towers.tower.network
    save_file(tower.state_dict(), folder / "model.safetensors")

    with pytest.raises(DarkroomError, match=r"vocab\.json and merges\.txt"):  # before any work is done
        train(recipe(tmp_path, weights=str(folder)), output=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    write_clip_vocabulary(folder)
    with pytest.raises(DarkroomError, match="no file is named: set `weights`"):
        train(recipe(tmp_path, vocabulary=str(folder)), output=tmp_path / "none")

    train(recipe(tmp_path, weights=str(folder)), output=tmp_path / "run")
    trained = load(tmp_path / "run", device="cpu")
    assert isinstance(trained, LatentDiffusion)
    text = trained.conditioner.encoders["text"]
    assert isinstance(text, TextTowers)
    published = find_towers(folder)[0].read()
    own = text.towers["tower"].network.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(own[name], tensor) for name, tensor in published.items())
    trained.generate("a red circle", steps=1)

    # Going on from that model trains the same: its tower stays as it is, its vocabulary comes along.
    train(recipe(tmp_path), output=tmp_path / "next", init_from=str(tmp_path / "run"))
    again = load(tmp_path / "next", device="cpu")
    assert isinstance(again, LatentDiffusion)
    own = again.conditioner.encoders["text"].towers["tower"].network.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(own[name], tensor) for name, tensor in published.items())


def test_training_a_tower_from_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    write_clip_vocabulary(tmp_path / "all" / "clip")
    monkeypatch.setenv(VOCABULARIES, str(tmp_path / "all"))
    train(recipe(tmp_path, trainable=True), output=tmp_path / "run")
    trained = load(tmp_path / "run", device="cpu")
    assert isinstance(trained, LatentDiffusion)
    live = load(tmp_path / "run", device="cpu", weights="live")
    name = "encoders.text.towers.tower.network.text_model.encoder.layers.0.mlp.fc1.weight"
    assert isinstance(live, LatentDiffusion)
    assert not torch.equal(trained.conditioner.state_dict()[name], live.conditioner.state_dict()[name])
