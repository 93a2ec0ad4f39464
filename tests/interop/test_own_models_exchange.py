"""Models of ours in the official layout, facts that no tensor tells, and files that are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from official_files import golden, write_checkpoint
from text_tower_files import CLIP_L, clip_model, t5_model
from torch import Tensor

from darkroom.build import build_conditioner, build_denoiser, build_first_stage
from darkroom.cli.main import main
from darkroom.errors import DarkroomError, DarkroomWarning
from darkroom.exchange import convert, export
from darkroom.interop.facts import with_facts
from darkroom.interop.found_model import find_model
from darkroom.interop.tensor_file import open_tensor_file
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_io import load, save
from darkroom.safe_files import read_safetensors_header, write_safetensors
from darkroom.whole_models import ModelConversion, found_in_memory

FIRST_STAGE = {"channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "z_channels": 4, "embed_dim": 4}
UNET = {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [2], "num_heads": 2}
CLASS = {"kind": "class", "classes": ["boot", "coat", "shirt"], "width": 24}
TEXT = {"kind": "text", "width": 24, "depth": 1, "heads": 8, "head_width": 64, "length": 9, "vocabulary": "bert",
        "vocabulary_size": 200, "use_mask": False, "logits_head": True}  # fmt: skip
BOXES = {"kind": "boxes", "classes": ["sofa"], "tokens": 100, "max_objects": 2, "crop": True, "use_mask": False,
         "width": 24, "depth": 1, "heads": 8, "head_width": 64}  # fmt: skip
MAP = {"kind": "segmentation", "classes": ["sky", "sea"]}


def own_model(
    encoders: dict[str, dict[str, Any]], first_stage: dict[str, Any] | None = None, **denoiser: Any
) -> LatentDiffusion:
    """Random weights everywhere; widths follow from the parts."""
    torch.manual_seed(0)
    stage = build_first_stage(FIRST_STAGE | (first_stage or {}))
    stage.scale = torch.tensor(0.7)
    conditioner = build_conditioner({"encoders": encoders}, stage)
    network = {**UNET, **denoiser.pop("network", {})}
    if network.get("kind", "unet") == "unet" and conditioner.context_dim is not None:
        network["use_spatial_transformer"] = True
    network |= {"in_channels": 4 + conditioner.concat_channels, "context_dim": conditioner.context_dim}
    if conditioner.label_count is not None:
        network["num_classes"] = conditioner.label_count
    built = build_denoiser({"network": network, **denoiser})
    model = LatentDiffusion(stage, built, conditioner, {"name": "mine", "defaults": {"steps": 3}})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape) + parameter)
    return model


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize(
    ("encoders", "denoiser"),
    [
        ({}, {}),
        ({"kind of thing": CLASS}, {"prediction_type": "v", "schedule": {"zero_terminal_snr": True}}),
        ({"caption": TEXT}, {"schedule": {"kind": "cosine"}}),
        ({"boxes": BOXES}, {}),
        ({"map": MAP}, {"prediction_type": "x0"}),
        ({"hole": {"kind": "masked_image"}}, {}),
    ],
    ids=["nothing", "class", "text", "boxes", "map", "hole"],
)
def test_ours_in_the_official_layout(
    encoders: dict[str, Any], denoiser: dict[str, Any], suffix: str, tmp_path: Path
) -> None:
    """The configuration, which that layout has no place for, stands beside the tensors."""
    model = own_model(encoders, **denoiser)
    path = export(model, tmp_path / f"mine{suffix}", format="compvis")
    again = load(path, device="cpu")
    assert isinstance(again, LatentDiffusion)
    for part in ("first_stage", "denoiser", "conditioner"):
        one, other = getattr(model, part), getattr(again, part)
        assert other.config_dict == one.config_dict
        assert one.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    assert again.defaults == model.defaults and again.denoiser.prediction_type == model.denoiser.prediction_type
    found = find_model(path)
    assert found is not None and {"betas", "posterior_mean_coef2"} <= found.source.shapes.keys()
    # And through the command, which replaces its own file.
    assert main(["convert", str(path), str(tmp_path / "folder")]) == 0
    assert main(["convert", str(tmp_path / "folder"), str(path)]) == 0
    done = convert(path, tmp_path / "again.safetensors")
    assert isinstance(done, ModelConversion) and done.tensors == len(found.source.shapes)


def test_a_dit_is_written_alone(tmp_path: Path) -> None:
    """The official file of a DiT is the network."""
    network = {"kind": "dit", "input_size": 8, "hidden_size": 64, "depth": 1, "num_heads": 2}
    for option in UNET:
        network.setdefault(option, None)
    conditioner = {"encoders": {"class": CLASS | {"slot": "label", "width": None}}}
    dit = {key: value for key, value in network.items() if value is not None} | {"num_classes": 4}
    model = LatentDiffusion(
        build_first_stage(FIRST_STAGE), build_denoiser({"network": dit}), build_conditioner(conditioner)
    )
    with pytest.warns(DarkroomWarning, match="the compvis layout has no place for it: first stage"):
        path = export(model, tmp_path / "dit.safetensors", format="compvis")
    assert set(read_safetensors_header(path).tensors) == set(model.denoiser.network.state_dict())
    again = load(path, device="cpu")
    assert isinstance(again, LatentDiffusion) and again.first_stage is None
    assert again.denoiser.config_dict == model.denoiser.config_dict
    assert all(torch.equal(t, again.denoiser.state_dict()[n]) for n, t in model.denoiser.state_dict().items())


LACKING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "position embedding in its U-Net": ({}, {"network": {"position_embedding": True}}),
    "second time": ({}, {"network": {"target_time": True}}),
    'prediction of the type "velocity"': ({}, {"prediction_type": "velocity", "schedule": {"kind": "flow"}}),
    "schedule 'edm'": ({}, {"schedule": {"kind": "edm"}}),
    "norms of widths like \\[48, 96\\]": ({}, {"network": {"model_channels": 48, "num_heads": 3}}),
    "conditions class, class together": ({"a": CLASS, "b": CLASS}, {}),
    "condition label": ({"tags": {"kind": "label", "count": 3}}, {}),
    "text tower with 4 heads of 64": ({"text": TEXT | {"heads": 4}}, {}),
    "mask for padding": ({"text": TEXT | {"use_mask": True}}, {}),
    "places of boxes with ids of their own": ({"boxes": BOXES | {"tokens": None}}, {}),
    "low-resolution picture through the first stage": (
        {"small": {"kind": "low_resolution", "factor": 2, "via": "latent"}},
        {},
    ),
}


@pytest.mark.parametrize("words", LACKING)
def test_what_the_official_code_lacks_is_named(words: str, tmp_path: Path) -> None:
    encoders, denoiser = LACKING[words]
    try:
        model = own_model(encoders, **denoiser)
    except DarkroomError:
        pytest.fail("the model itself should be possible")
    with pytest.raises(DarkroomError, match=f"the official code has no .*{words}.* cannot be written in its layout"):
        export(model, tmp_path / "mine.safetensors", format="compvis")
    assert not any(tmp_path.iterdir())


def test_shifts_and_scales_that_the_layout_lacks(tmp_path: Path) -> None:
    model = own_model({})
    assert model.first_stage is not None
    model.first_stage.shift = torch.tensor(0.25)
    with pytest.raises(DarkroomError, match=r"has no shift of the latents \(--shift 0 leaves it out\)"):
        export(model, tmp_path / "mine.ckpt", format="compvis")
    export(model, tmp_path / "mine.ckpt", format="compvis", shift=0.0)
    model.first_stage.shift, model.first_stage.scale = torch.zeros(()), torch.tensor([1.0, 2.0, 3.0, 4.0])
    with pytest.raises(DarkroomError, match="has no scale per channel"):
        export(model, tmp_path / "other.ckpt", format="compvis")


# ---- facts and damage


def tiny(folder: Path, name: str = "tiny_cin", changes: dict[str, Tensor | None] | None = None) -> Path:
    _, state = golden("latent_diffusion_tiny", name)
    changed = {**state, **(changes or {})}
    return write_checkpoint(folder / f"{name}.ckpt", {k: v for k, v in changed.items() if v is not None})


def test_facts_win_over_the_family(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    facts = {"prediction": "v", "num_head_channels": 16, "scale": 0.5, "conditioner.class.drop_rate": 0.3}
    model = load(path, device="cpu", facts=facts)
    assert isinstance(model, LatentDiffusion) and model.first_stage is not None
    assert model.denoiser.prediction_type == "v" and float(model.first_stage.scale) == 0.5
    assert model.denoiser.config_dict["network"]["num_head_channels"] == 16  # type: ignore[index]
    assert model.conditioner.config_dict["encoders"]["class"]["drop_rate"] == 0.3  # type: ignore[index]
    heads = load(path, device="cpu", facts={"num_heads": 2})
    assert isinstance(heads, LatentDiffusion)
    assert heads.denoiser.config_dict["network"]["num_heads"] == 2  # type: ignore[index]
    found = find_model(path)
    assert found is not None
    with pytest.raises(DarkroomError, match=r'"predicton" is no fact of a model \(did you mean "prediction"\?\)'):
        with_facts(found, {"predicton": "v"})
    with pytest.raises(DarkroomError, match="takes no text towers of other files"):
        with_facts(found, {"text_towers": str(tmp_path)})


@torch.no_grad()
@pytest.mark.parametrize("with_t5", [True, False])
def test_towers_of_other_files(with_t5: bool, tmp_path: Path) -> None:
    """Stable Diffusion 3 without text towers, as it is published, and the towers as transformers saves them."""
    sizes = {**CLIP_L, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 1, "num_hidden_layers": 2}
    clips = {
        "l": clip_model(sizes, act="quick_gelu"),
        "g": clip_model({**sizes, "hidden_size": 128, "num_attention_heads": 2, "projection_dim": 96}, act="gelu"),
    }
    files = []
    for name, tower in clips.items():
        files.append(tmp_path / f"clip_{name}.safetensors")
        write_safetensors(files[-1], tower.state_dict())
    t5 = t5_model()
    if with_t5:
        files.append(tmp_path / "t5.safetensors")
        write_safetensors(files[-1], {k: v for k, v in t5.state_dict().items() if "embed_tokens" not in k})
    network = {"kind": "mmdit", "depth": 1, "hidden_size": 64, "num_heads": 1, "context_dim": 96 if with_t5 else 200,
               "adm_in_channels": 64 + 96, "pos_embed_max_size": 8}  # fmt: skip
    torch.manual_seed(0)
    if with_t5:
        network["context_dim"] = max(int(t5.config.d_model), 64 + 128)
    denoiser = build_denoiser({"network": network, "prediction_type": "velocity", "schedule": {"kind": "flow"}})
    _, vae = golden("sd3", "vae16")
    names = {f"first_stage_model.{key}": tensor for key, tensor in vae.items()}
    names |= {f"model.diffusion_model.{key}": tensor for key, tensor in denoiser.network.state_dict().items()}
    write_safetensors(tmp_path / "sd3.safetensors", names)

    bare = load(tmp_path / "sd3.safetensors", device="cpu")
    assert isinstance(bare, LatentDiffusion) and not bare.conditioner.encoders
    model = load(tmp_path / "sd3.safetensors", device="cpu", facts={"text_towers": [str(file) for file in files]})
    assert isinstance(model, LatentDiffusion)
    ours = {k.removeprefix("encoders.text.towers."): v for k, v in model.conditioner.state_dict().items()}
    for name, tower in clips.items():
        for key, tensor in tower.state_dict().items():
            if "position_ids" not in key:
                full = key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"
                assert torch.equal(ours[f"clip_{name}.network.{full}"], tensor), key
    assert ("t5.network.shared.weight" in ours) == with_t5
    # As much as a prompt of token ids needs.
    ids = {"clip": [5, 6, 7], "t5": [4, 5]} if with_t5 else {"clip": [5, 6, 7]}
    assert model.conditioner({"text": [ids]}).vector.shape == (1, 160)  # type: ignore[union-attr]
    with pytest.raises(DarkroomError, match="two CLIPs are needed"):
        load(tmp_path / "sd3.safetensors", device="cpu", facts={"text_towers": str(files[0])})
    # Written out, they stand inside the file.
    export(model, tmp_path / "whole.safetensors", format="compvis")
    again = load(tmp_path / "whole.safetensors", device="cpu")
    assert isinstance(again, LatentDiffusion)
    state = again.conditioner.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.conditioner.state_dict().items())


def test_the_command_says_what_it_took(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    path = tiny(tmp_path)
    assert main(["convert", str(path), str(tmp_path / "cin"), "--set", "prediction=x0"]) == 0
    out = capfd.readouterr().out
    for words in (
        "the paper's LDM-4 on ImageNet with guidance",
        "prediction: x0 (as asked for)",
        "weights: averaged, and as training left them",
        "tables of the noise schedule (12 tensors)",
        "820 tensors, bit for bit",
    ):
        assert words in out
    assert main(["info", str(path)]) == 0
    out = capfd.readouterr().out
    assert "denoiser 324 tensors" in out and "averaged copies 324 tensors" in out
    export(own_model({"class": CLASS}), tmp_path / "mine.safetensors", format="compvis")
    assert main(["info", str(tmp_path / "mine.safetensors")]) == 0
    assert "model: mine, written by darkroom" in capfd.readouterr().out
    assert '"nonsense" is no fact of a model' in refused("convert", path, tmp_path / "x", "--set", "nonsense=1")


@pytest.mark.parametrize("level", ["text_model.", ""])
def test_names_of_either_release_of_transformers(level: str, tmp_path: Path) -> None:
    """A Stable Diffusion 1 file keeps the spelling that it came with, on the whole way."""
    tower = {"kind": "clip", "network": {**CLIP_L, "hidden_size": 64, "num_attention_heads": 1}}
    model = own_model({"text": tower}, network={"num_heads": 8, "legacy": False})
    file = open_tensor_file(export(model, tmp_path / "mine.safetensors", format="compvis"))
    start = "cond_stage_model.transformer."
    state = {
        name.replace(f"{start}text_model.", f"{start}{level}"): tensor
        for name, tensor in file.read(file.shapes).items()
    }
    path = write_checkpoint(tmp_path / "official.ckpt", state)  # without our note
    found = find_model(path)
    assert found is not None and found.family == "sd-v1"
    assert "positions of the text tower" in found.kept.values()
    convert(path, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back.ckpt")
    for source, target in ((tmp_path / "ours", "again.safetensors"), (path, "direct.safetensors")):
        loaded = load(source, device="cpu")
        assert isinstance(loaded, LatentDiffusion)
        ours = loaded.conditioner.state_dict()
        assert all(torch.equal(ours[name], tensor) for name, tensor in model.conditioner.state_dict().items())
        export(loaded, tmp_path / target, format="compvis")
    for target in ("back.ckpt", "again.safetensors", "direct.safetensors"):
        back = open_tensor_file(tmp_path / target)
        written = back.read(back.shapes)
        assert written.keys() == state.keys(), target
        assert all(torch.equal(written[name], state[name]) for name in state)


AVERAGED = "model_ema.diffusion_modelout2weight"
WRONG: dict[str, dict[str, Tensor | None]] = {
    "1 tensor missing (network.out.0.bias)": {
        "model.diffusion_model.out.0.bias": None,
        "model_ema.diffusion_modelout0bias": None,
    },
    "1 tensor of another shape or type (model.diffusion_model.out.0.bias (31,) for (32,))": {
        "model.diffusion_model.out.0.bias": torch.zeros(31)
    },
    "model.diffusion_model.out.0.bias int64": {"model.diffusion_model.out.0.bias": torch.zeros(32, dtype=torch.int64)},
    "holds 2 tensors of no known part (extra.a, extra.b)": {"extra.b": torch.zeros(1), "extra.a": torch.zeros(1)},
    "2 tensors unknown (model.diffusion_model.extra, model_ema.diffusion_modelextra)": {
        "model.diffusion_model.extra": torch.zeros(1),
        "model_ema.diffusion_modelextra": torch.zeros(1),
    },
    "no averaged copies of model.diffusion_model.out.2.weight: these do not belong there": {AVERAGED: None},
    "are of no known schedule": {"betas": torch.linspace(0.5, 0.1, 1000)},
    "of no known family (its network unet, channels of its condition 2, condition class)": {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 5, 3, 3)
    },
    "lacks the encoder of its condition: its network reads a context of width": {
        "cond_stage_model.embedding.weight": None
    },
}


@pytest.mark.parametrize("words", WRONG)
def test_files_that_do_not_fit(words: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    path = tiny(tmp_path, changes=WRONG[words])
    with pytest.raises(DarkroomError) as error:
        load(path, device="cpu")
    assert "\n" not in str(error.value) and words in str(error.value), error.value
    assert words in refused("convert", path, tmp_path / "x")


def test_damaged_notes(tmp_path: Path) -> None:
    path = export(own_model({"class": CLASS}), tmp_path / "mine.safetensors", format="compvis")
    file = open_tensor_file(path)
    tensors = file.read(file.shapes)
    whole = json.loads(file.notes["darkroom_model"])
    note = "its note about the model cannot be read"
    defaults = {"info": {"defaults": {"size": "abc"}}}
    for text, words in (
        *(
            (text, note)
            for text in ("{", "[]", json.dumps({"configs": {}, "family": "own", "latents": None, "info": {}}))
        ),
        (json.dumps(whole | {"latents": ["x", "y"]}), note),
        (json.dumps(whole | {"info": {"defaults": [1]}}), "defaults: expected a mapping"),
        (json.dumps(whole | defaults), r'bad\.safetensors: "defaults\.size" is a list'),
    ):
        write_safetensors(tmp_path / "bad.safetensors", tensors, file.notes | {"darkroom_model": text})
        with pytest.raises(DarkroomError, match=words):
            load(tmp_path / "bad.safetensors")
        (tmp_path / "bad.safetensors").unlink()
    convert(tiny(tmp_path), tmp_path / "cin")
    kept = tmp_path / "cin" / "official" / "kept.safetensors"
    content = open_tensor_file(kept)
    tensors = content.read(content.shapes)
    kept.unlink()
    write_safetensors(kept, tensors, content.notes | {"aliases": "["})
    with pytest.raises(DarkroomError, match="its tables of names cannot be read"):
        load(tmp_path / "cin")


def test_info_survives_a_damaged_note(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = export(own_model({}), tmp_path / "mine.safetensors", format="compvis")
    file = open_tensor_file(path)
    note = json.loads(file.notes["darkroom_model"])
    del note["configs"]["denoiser"]["network"]
    notes = file.notes | {"darkroom_model": json.dumps(note)}
    write_safetensors(tmp_path / "bad.safetensors", file.read(file.shapes), notes)
    assert main(["info", str(tmp_path / "bad.safetensors")]) == 0
    assert "model: cannot be loaded: " in capfd.readouterr().out


def test_double_precision_is_not_rounded_unseen(tmp_path: Path) -> None:
    _, state = golden("latent_diffusion_tiny", "tiny_cin")
    path = write_checkpoint(
        tmp_path / "double.ckpt", {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
    )
    with pytest.raises(DarkroomError, match="holds float64, which a Darkroom model would round"):
        convert(path, tmp_path / "ours")
    done = convert(path, tmp_path / "again.safetensors")
    assert isinstance(done, ModelConversion) and done.tensors == len(state)


def test_half_precision_stays_half(tmp_path: Path) -> None:
    _, state = golden("latent_diffusion_tiny", "tiny_cin")
    path = write_checkpoint(
        tmp_path / "half.ckpt", {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    )
    convert(path, tmp_path / "ours")
    stored = read_safetensors_header(tmp_path / "ours" / "denoiser" / "model.safetensors")
    assert {entry.dtype for entry in stored.tensors.values()} == {"F16"}
    model = load(tmp_path / "ours", device="cpu")
    assert isinstance(model, LatentDiffusion)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert convert(tmp_path / "ours", tmp_path / "back.ckpt").tensors == len(state)


def with_live_weights(
    model: LatentDiffusion, folder: Path, parts: tuple[str, ...] = ("denoiser", "conditioner")
) -> None:
    """A model folder as a trained run leaves it."""
    save(model, folder, live={p: {n: t + 1 for n, t in getattr(model, p).state_dict().items()} for p in parts})


def test_a_trained_model_keeps_its_averages(tmp_path: Path) -> None:
    model = own_model({"class": CLASS})
    with_live_weights(model, tmp_path / "ours")
    done = convert(tmp_path / "ours", tmp_path / "mine.safetensors")
    assert isinstance(done, ModelConversion) and done.weights == "all"
    assert done.left_out == ("conditioner's weights as training left them",)
    for weights, more in (("ema", 0), ("live", 1)):
        again = load(tmp_path / "mine.safetensors", weights, "cpu")
        assert isinstance(again, LatentDiffusion)
        state = again.denoiser.state_dict()
        assert all(torch.equal(tensor + more, state[n]) for n, tensor in model.denoiser.state_dict().items())
        state = again.conditioner.state_dict()
        assert all(torch.equal(tensor, state[n]) for n, tensor in model.conditioner.state_dict().items())


def test_a_trained_dit_says_what_it_leaves_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its official file is the bare network: no first stage, one kind of weights."""
    network = {"kind": "dit", "input_size": 8, "hidden_size": 64, "depth": 1, "num_heads": 2, "num_classes": 4}
    conditioner = build_conditioner({"encoders": {"class": CLASS | {"slot": "label", "width": None}}})
    model = LatentDiffusion(build_first_stage(FIRST_STAGE), build_denoiser({"network": network}), conditioner)
    with_live_weights(model, tmp_path / "ours", ("denoiser",))
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "dit.safetensors")]) == 0
    out = capfd.readouterr().out
    assert "left out, as the layout has no place for it: weights as training left them, first stage" in out
    again = load(tmp_path / "dit.safetensors", device="cpu")
    assert isinstance(again, LatentDiffusion)
    assert all(torch.equal(t, again.denoiser.state_dict()[n]) for n, t in model.denoiser.state_dict().items())


def test_converting_onto_a_model_keeps_other_files(tmp_path: Path) -> None:
    source = export(own_model({"class": CLASS}), tmp_path / "mine.safetensors", format="compvis")
    convert(source, tmp_path / "ours")
    for name in ("README.md", "notes/first.txt"):
        (tmp_path / "ours" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "ours" / name).write_text("mine")
    convert(source, tmp_path / "ours")
    assert (tmp_path / "ours" / "README.md").read_text() == (tmp_path / "ours/notes/first.txt").read_text() == "mine"


def test_the_preview_decoder_comes_along_or_is_named(tmp_path: Path) -> None:
    there = convert("emoji", tmp_path / "ours")
    assert isinstance(there, ModelConversion) and there.left_out == ()
    again = load(tmp_path / "ours", device="cpu")
    assert (
        isinstance(again, LatentDiffusion) and again.first_stage is not None and again.first_stage.preview is not None
    )
    done = convert("emoji", tmp_path / "theirs", "diffusers")
    assert isinstance(done, ModelConversion) and done.left_out == ("preview decoder",)


def test_facts_of_what_says_everything_itself(tmp_path: Path, refused: Callable[..., str]) -> None:
    """A model folder and a first stage take scale and shift; no other fact is passed over."""
    model = own_model({})
    save(model, tmp_path / "ours")
    assert model.first_stage is not None
    save(model.first_stage, tmp_path / "stage")
    stage = export(model.first_stage, tmp_path / "stage.safetensors", format="compvis")
    for place in (tmp_path / "ours", tmp_path / "stage", stage):
        loaded = load(place, device="cpu", facts={"scale": 0.5})
        first_stage = loaded.first_stage if isinstance(loaded, LatentDiffusion) else loaded
        assert first_stage is not None and float(first_stage.scale) == 0.5
        with pytest.raises(DarkroomError, match='for which "prediction" cannot be set; only shift and scale can'):
            load(place, device="cpu", facts={"prediction": "v"})
    done = convert(stage, tmp_path / "again", facts={"scale": 0.25})
    assert not isinstance(done, ModelConversion) and done.scale == 0.25
    assert 'for which "prediction" cannot be set' in refused("convert", stage, tmp_path / "x", "--set", "prediction=v")
    for source in (tmp_path / "ours", stage):
        words = refused("convert", source, tmp_path / "x", "--set", "scale=big")
        assert "scale=big is no number; give one number, or a list of one per latent channel" in words


def test_an_unknown_family_in_the_index(tmp_path: Path, refused: Callable[..., str]) -> None:
    save(own_model({}), tmp_path / "ours", info={"family": "sd-v11"})
    words = refused("convert", tmp_path / "ours", tmp_path / "mine.safetensors")
    assert '"sd-v11" is no family of models (did you mean "sd-v1"?)' in words


def test_text_towers_are_for_files(tmp_path: Path) -> None:
    network = {"kind": "mmdit", "depth": 1, "hidden_size": 64, "num_heads": 1, "context_dim": 96,
               "adm_in_channels": 160, "pos_embed_max_size": 8}  # fmt: skip
    denoiser = build_denoiser({"network": network, "prediction_type": "velocity", "schedule": {"kind": "flow"}})
    model = LatentDiffusion(build_first_stage(FIRST_STAGE), denoiser, build_conditioner({"encoders": {}}))
    with pytest.raises(DarkroomError, match="they are joined to an official file only"):
        with_facts(found_in_memory(model), {"text_towers": str(tmp_path)})
