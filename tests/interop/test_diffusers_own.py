"""Models of ours in diffusers: where no pipeline of that library does, the folder brings one; what no component can
express is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_runs import contents, found, pipeline

import darkroom
from darkroom.build import build_conditioner, build_denoiser, build_first_stage
from darkroom.diffusion.noise import SeededNoise
from darkroom.errors import DarkroomError
from darkroom.exchange import convert, export
from darkroom.interop.first_stage_files import same_bits
from darkroom.latent_diffusion import LatentDiffusion

CLASSES = ["boot", "coat", "shirt"]
FLOW = {"schedule": {"kind": "flow", "shift": 2.0}, "prediction_type": "velocity"}
WORDS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "red": 4, "fox": 5}


def own_model(
    encoders: dict[str, Any], network: dict[str, Any], shift: Any = 0.25, scale: Any = 1.5, **denoiser: Any
) -> LatentDiffusion:
    """Random weights; 32x32 images at f 2, 4 latent channels."""
    torch.manual_seed(0)
    first = {"kind": "kl", "channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "z_channels": 4, "embed_dim": 4}
    first_stage = build_first_stage(first)
    first_stage._set(torch.as_tensor(shift), torch.as_tensor(scale))
    conditioner = build_conditioner({"encoders": encoders}, first_stage)
    unet = {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [2]}
    unet |= {"num_head_channels": 16, "use_scale_shift_norm": True, "use_spatial_transformer": "text" in encoders}
    if network.get("kind", "unet") != "unet":
        unet = {}
    unet |= {"context_dim": conditioner.context_dim, "use_spatial_transformer": True} if conditioner.context_dim else {}
    unet |= {"adm_in_channels": conditioner.vector_dim} if conditioner.vector_dim else {}
    made = build_denoiser({"network": {"in_channels": 4, "out_channels": 4, **unet, **network}, **denoiser})
    with torch.no_grad():  # an untrained output layer is zero and would hide differences
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    info = {"name": "ours", "defaults": {"size": [32, 32], "steps": 4}}
    return LatentDiffusion(first_stage, made, conditioner, info).eval()


def tokenizer() -> str:
    from darkroom.conditioning.tokenizer import WordPieceTokenizer

    return WordPieceTokenizer.from_vocabulary(list(WORDS)).to_json()


def text_encoder(**more: Any) -> dict[str, Any]:
    sizes = {"width": 32, "depth": 2, "heads": 2, "head_width": 16, "length": 8}
    return {"text": {"kind": "text", **sizes, "tokenizer": tokenizer(), **more}}


def class_encoder(**more: Any) -> dict[str, Any]:
    return {"class": {"kind": "class", "classes": CLASSES, "width": 32, **more}}


LABELS = {"slot": "label", "width": None}
DIT = {"kind": "dit", "input_size": 16, "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 2}
# What each is asked for here, and there.
PROMPT = ({"prompt": ["red fox", "fox"]}, {"prompt": ["red fox", "fox"]})
LABEL = ({"class_label": ["coat", "shirt"]}, {"class_labels": [1, 2]})


def own(name: str) -> tuple[LatentDiffusion, tuple[dict[str, Any], dict[str, Any]]]:
    per_channel = {"shift": [0.1, -0.2, 0.3, 0.0], "scale": [1.5, 1.0, 0.5, 2.0]}
    if name == "text":
        return own_model(text_encoder(vector=True), {}, **per_channel, **FLOW), PROMPT
    if name == "text without mask":
        return own_model(text_encoder(use_mask=False), {}), PROMPT
    if name == "class":
        return own_model(class_encoder(), {}, **FLOW), LABEL
    if name == "label":
        return own_model(class_encoder(**LABELS), {"num_classes": 4}, **per_channel, **FLOW), LABEL
    if name == "dit":
        return own_model(class_encoder(**LABELS), {**DIT, "num_classes": 4}, **FLOW), LABEL
    return own_model({}, {}, **FLOW), ({"seed": [7, 8]}, {"num_images": 2})


NAMES = ("text", "text without mask", "class", "label", "dit", "nothing")


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """diffusers copies a folder's code to a place of its own before it imports it."""
    import diffusers.utils.dynamic_modules_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def run_both(
    model: LatentDiffusion, folder: Path, ours: dict[str, Any], theirs: dict[str, Any], **options: Any
) -> None:
    """The images differ by at most 2 of 255, the latents by less than 1e-3."""
    seeds = [7, 8]
    result = model.generate(**{**ours, "seed": seeds}, **options)
    other = pipeline(folder, trust_remote_code=True)
    noise = SeededNoise(seeds, tuple(result.latents.shape[1:]))(0)
    run = {"num_inference_steps": options["steps"], "guidance_scale": options["guidance_scale"], "latents": noise}
    latents = other(**theirs, **run, output_type="latent").images
    assert float((latents - result.latents).abs().max()) < 1e-3
    images = np.round(other(**theirs, **run, output_type="np").images * 255)
    assert images.std() > 5
    assert np.abs(images - result.images).max() <= 2


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_runs_in_diffusers(name: str, tmp_path: Path) -> None:
    model, (ours, theirs) = own(name)
    folder = export(model, tmp_path / "exported", format="diffusers")
    is_flow = model.denoiser.schedule.config.kind == "flow"
    if not is_flow:  # to the even times that our solvers take on a table
        place = folder / "scheduler" / "scheduler_config.json"
        config = json.loads(place.read_text())
        place.write_text(json.dumps(config | {"timestep_spacing": "trailing", "set_alpha_to_one": True}))
    if name == "dit":
        _like_theirs(model)
    solver = "euler" if is_flow else "ddim"
    scale = 1.0 if name == "nothing" else 3.0
    run_both(model, folder, ours, theirs, steps=4, guidance_scale=scale, size=(32, 32), solver=solver)


def _like_theirs(model: LatentDiffusion) -> None:
    """diffusers computes the frequencies of DiT's time features as 10000^(-i/127); see diffusers_transformers.py."""
    import math

    def features(time: torch.Tensor, width: int) -> torch.Tensor:
        half = width // 2
        angles = time[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / (half - 1))
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    embedder: Any = model.denoiser.network.t_embedder  # type: ignore[union-attr]
    embedder.forward = lambda time: embedder.mlp(features(time.float(), embedder.mlp[0].in_features))


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_gives_back_the_model(name: str, tmp_path: Path) -> None:
    model, _ = own(name)
    folder = export(model, tmp_path / "exported", format="diffusers")
    again = darkroom.load(folder, device="cpu")
    assert isinstance(again, LatentDiffusion)
    assert all(same_bits(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    assert again.conditioner.config_dict == model.conditioner.config_dict
    assert again.denoiser.config_dict == model.denoiser.config_dict
    assert again.defaults == model.defaults


@pytest.mark.parametrize("name", ["text", "class", "dit"])
def test_weights_before_averaging_come_back(name: str, tmp_path: Path) -> None:
    """Training averages the trained conditions too."""
    model, _ = own(name)
    parts = {"denoiser": model.denoiser, "conditioner": model.conditioner}
    live = {part: {n: t + 1 for n, t in module.state_dict().items()} for part, module in parts.items()}
    model.save(tmp_path / "ours", live={part: state for part, state in live.items() if state})
    there = convert(tmp_path / "ours", tmp_path / "folder", "diffusers")
    again = convert(tmp_path / "folder", tmp_path / "again")
    assert there.tensors == again.tensors
    for kind, wanted in (("live", live), ("ema", {part: module.state_dict() for part, module in parts.items()})):
        loaded = darkroom.load(tmp_path / "folder", kind, "cpu")
        assert isinstance(loaded, LatentDiffusion)
        for part, state in wanted.items():
            assert all(same_bits(t, state[n]) for n, t in getattr(loaded, part).state_dict().items())


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    model, _ = own("nothing")
    folder = export(model, tmp_path / "exported", format="diffusers")
    before = contents(folder)
    export(model, folder, format="diffusers")
    after = contents(folder)
    assert before.keys() == after.keys() and all(same_bits(before[name], after[name]) for name in before)
    (folder / "darkroom" / "note.json").unlink()
    with pytest.raises(DarkroomError, match="holds other files"):
        export(model, folder, format="diffusers")


def test_the_bundled_text_model_runs_in_diffusers(tmp_path: Path) -> None:
    """Trained on real pictures; its mask, its vector and its rectified flow are not what stock pipelines know."""
    folder = tmp_path / "emoji"
    done = convert("emoji", folder, "diffusers")
    assert done.tensors == sum(len(table) for table in found(folder).tables.values())
    model = darkroom.load("emoji", device="cpu")
    assert isinstance(model, LatentDiffusion)
    prompts = {"prompt": ["red heart", "a cat with a very long name that goes on and on until no token of it is left"]}
    run_both(model, folder, prompts, prompts, steps=8, guidance_scale=4.0, size=(64, 64), solver="euler")


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("encoders", "network", "options", "named"),
    [
        ({"boxes": {"kind": "boxes", "classes": CLASSES, "width": 32}}, {}, FLOW, "no pipeline for a unet with boxes"),
        (class_encoder(slot="vector"), {}, FLOW, "no vector as condition"),
        ({}, {"position_embedding": True}, FLOW, "position_embedding"),
        ({}, {"target_time": True}, FLOW, "target_time"),
        ({}, {}, {"schedule": {"kind": "edm"}, "prediction_type": "edm"}, "predictions of the type 'edm'"),
        ({}, {}, {**FLOW, "schedule": {"kind": "flow", "shift_rule": "sqrt"}}, 'the rule "sqrt"'),
        (class_encoder(), {"context_dim": 32, "channel_mult": [2, 4]}, FLOW, "a first level of 2 times"),
        ({}, {"model_channels": 48, "num_head_channels": 48}, FLOW, "norms of 16 and 32 groups"),
    ],
)
def test_what_diffusers_cannot_express_is_named(
    encoders: dict[str, Any], network: dict[str, Any], options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(DarkroomError, match=named):
        export(own_model(encoders, network, **options), tmp_path / "folder", format="diffusers")
    assert not (tmp_path / "folder").exists()


def test_a_model_without_first_stage_is_refused(tmp_path: Path) -> None:
    model = own_model({}, {}, **FLOW)
    model.first_stage = None
    with pytest.raises(DarkroomError, match="no first stage"):
        export(model, tmp_path / "folder", format="diffusers")
