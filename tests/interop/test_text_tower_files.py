"""Weights of published text towers: from transformers' folders, from pipelines, from checkpoints of each family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_data import PARITY, weights
from safetensors.torch import save_file
from text_tower_files import CLIP_G, CLIP_L, OPEN_G, T5, clip_model, encoder, t5_model
from torch import Tensor

from darkroom.build import build_conditioner
from darkroom.errors import DarkroomError
from darkroom.interop.text_towers import (
    choose,
    clip_from_open_clip,
    fill,
    find_towers,
    load_tower,
    open_clip_from_clip,
)

State = dict[str, Tensor]


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor.contiguous() for name, tensor in state.items()}


def clip_state(model: Any) -> State:
    """Under the names of released files, whatever this version of transformers calls them."""
    return {
        n if n.startswith("text_") else f"text_model.{n}": t.detach().clone() for n, t in model.state_dict().items()
    }


def random_open_clip() -> State:
    torch.manual_seed(3)
    state = encoder(kind="open_clip", network=OPEN_G).towers.tower.network.state_dict()
    return {name: torch.randn_like(t) for name, t in state.items()}


def filled(path: Path, **config: Any) -> Any:
    conditioner = build_conditioner({"encoders": {"text": {**config, "weights": str(path)}}})
    said = fill(conditioner)
    assert len(said) == len(conditioner.encoders["text"].towers)  # type: ignore[arg-type]
    return conditioner.encoders["text"]


def equal(network: torch.nn.Module, state: State) -> None:
    own = network.state_dict()
    assert set(own) == set(state)
    for name, tensor in own.items():
        assert torch.equal(tensor, state[name]), name


# ---- names


def test_names_are_translated_both_ways() -> None:
    state = random_open_clip()
    theirs = clip_from_open_clip(state)
    clip_model(CLIP_G).load_state_dict(theirs, strict=True)
    again = open_clip_from_clip(theirs)
    assert set(state) - set(again) == {"logit_scale"}
    assert all(torch.equal(again[name], state[name]) for name in again)


def test_every_tensor_of_the_official_layouts_has_a_place() -> None:
    """Shapes only: SD 2's OpenCLIP names become those of transformers, complete."""
    layout = weights().load_layout(PARITY / "layouts" / "sd-v2-1-v768.json.gz")["layout"]
    prefix = "cond_stage_model.model."
    with torch.device("meta"):
        state = {n.removeprefix(prefix): torch.empty(s) for n, s in layout.items() if n.startswith(prefix)}
        tower = build_conditioner(
            {"encoders": {"text": {"kind": "clip", "model": "ViT-H-14", "vector": "projected"}}}
        ).encoders["text"]
        translated = clip_from_open_clip(state)
    own = tower.towers.tower.network.state_dict()  # type: ignore[union-attr]
    assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in translated.items()}


# ---- transformers' folders


@pytest.mark.parametrize("projection", [True, False])
def test_transformers_folder_of_clip(projection: bool, tmp_path: Path) -> None:
    model = clip_model(CLIP_L, projection)
    model.save_pretrained(tmp_path)
    state = clip_state(model)
    plain = {n: t for n, t in state.items() if not n.startswith("text_projection")}
    equal(filled(tmp_path, kind="clip", network=CLIP_L).towers.tower.network, plain)
    if projection:
        projected = filled(tmp_path, kind="clip", network=CLIP_L, vector="projected")
        equal(projected.towers.tower.network, state)
    else:
        with pytest.raises(DarkroomError, match=r"has no text_projection\.weight"):
            filled(tmp_path, kind="clip", network=CLIP_L, vector="projected")


def test_folder_of_a_whole_clip(tmp_path: Path) -> None:
    """Text and images together: the image half is left out by name."""
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=CLIP_L, vision_config=vision, projection_dim=32))
    model.save_pretrained(tmp_path)
    (found,) = find_towers(tmp_path)
    assert found.what == "CLIP, 32 wide, 3 layers"
    ours = filled(tmp_path, kind="clip", network=CLIP_L, vector="projected")
    ids = torch.tensor([[522, 5, 6, 523]])
    with torch.no_grad():
        expected = model.get_text_features(ids)
        expected = getattr(expected, "pooler_output", expected)
        actual = ours.towers.tower.network(ids, pool="projected").pooled
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_folder_in_parts_of_t5(tmp_path: Path) -> None:
    model = t5_model()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    state = {n: t for n, t in model.state_dict().items() if n != "encoder.embed_tokens.weight"}
    equal(filled(tmp_path, kind="t5", network=T5).towers.tower.network, state)


def test_pickled_weights(tmp_path: Path) -> None:
    model = clip_model(CLIP_L, projection=False)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    equal(filled(tmp_path, kind="clip", network=CLIP_L).towers.tower.network, clip_state(model))
    equal(filled(tmp_path / "pytorch_model.bin", kind="clip", network=CLIP_L).towers.tower.network, clip_state(model))


def test_pipeline_folders(tmp_path: Path) -> None:
    """text_encoder, _2 and _3 are told apart by family and width."""
    models = {"text_encoder": clip_model(CLIP_L), "text_encoder_2": clip_model(CLIP_G), "text_encoder_3": t5_model()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    small = {"clip_l": {"network": CLIP_L}, "clip_g": {"network": {**CLIP_G, "pad_token_id": 0}}, "t5": {"network": T5}}
    towers = filled(tmp_path, kind="sd3_text", project_l=True, **small).towers
    equal(towers.clip_l.network, clip_state(models["text_encoder"]))
    equal(towers.clip_g.network, clip_state(models["text_encoder_2"]))
    equal(
        towers.t5.network, {n: t for n, t in models["text_encoder_3"].state_dict().items() if "embed_tokens" not in n}
    )
    # SDXL's second tower under OpenCLIP's names, from a folder under those of transformers.
    towers = filled(tmp_path, kind="sdxl_text", clip_l={"network": CLIP_L}, clip_g={"network": OPEN_G}).towers
    state = clip_from_open_clip(towers.clip_g.network.state_dict())
    assert all(torch.equal(t, state[n]) for n, t in clip_state(models["text_encoder_2"]).items())


# ---- checkpoints


def test_sd1_checkpoint(tmp_path: Path) -> None:
    state = clip_state(clip_model(CLIP_L, projection=False))
    file = {
        **prefixed("cond_stage_model.transformer.", state),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2),
    }
    save_file(file, tmp_path / "sd1.safetensors")
    equal(filled(tmp_path / "sd1.safetensors", kind="clip", network=CLIP_L).towers.tower.network, state)


def test_sd2_checkpoint(tmp_path: Path) -> None:
    state = random_open_clip()
    save_file(prefixed("cond_stage_model.model.", state), tmp_path / "sd2.safetensors")
    (found,) = find_towers(tmp_path / "sd2.safetensors")
    assert (found.family, found.width, found.layers) == ("open_clip", 48, 3)
    equal(filled(tmp_path / "sd2.safetensors", kind="open_clip", network=OPEN_G).towers.tower.network, state)
    # The layer that the penultimate state leaves out, and the projection, may be missing: nothing reads them.
    short = {n: t for n, t in state.items() if ".resblocks.2." not in n and n != "text_projection"}
    save_file(prefixed("cond_stage_model.model.", short), tmp_path / "short.safetensors")
    own = filled(tmp_path / "short.safetensors", kind="open_clip", network=OPEN_G).towers.tower.network.state_dict()
    assert all(torch.equal(own[n], t) for n, t in short.items())


def test_sdxl_checkpoint(tmp_path: Path) -> None:
    left, right = clip_state(clip_model(CLIP_L, projection=False)), random_open_clip()
    file = prefixed("conditioner.embedders.0.transformer.", left) | prefixed("conditioner.embedders.1.model.", right)
    save_file(file, tmp_path / "xl.safetensors")
    small = {"clip_l": {"network": CLIP_L}, "clip_g": {"network": OPEN_G}}
    towers = filled(tmp_path / "xl.safetensors", kind="sdxl_text", **small).towers
    equal(towers.clip_l.network, left)
    equal(towers.clip_g.network, right)


def test_sd3_checkpoint(tmp_path: Path) -> None:
    parts = {"clip_l": clip_state(clip_model(CLIP_L)), "clip_g": clip_state(clip_model(CLIP_G))}
    t5 = {n: t for n, t in t5_model().state_dict().items() if n != "shared.weight"}
    file = prefixed("text_encoders.t5xxl.transformer.", t5)
    for name, state in parts.items():
        file |= prefixed(f"text_encoders.{name}.transformer.", state)
        file[f"text_encoders.{name}.logit_scale"] = torch.tensor(4.6)
    save_file(file, tmp_path / "sd3.safetensors")
    small = {"clip_l": {"network": CLIP_L}, "clip_g": {"network": {**CLIP_G, "pad_token_id": 0}}, "t5": {"network": T5}}
    towers = filled(tmp_path / "sd3.safetensors", kind="sd3_text", **small).towers
    equal(towers.clip_l.network, {n: t for n, t in parts["clip_l"].items() if n != "text_projection.weight"})
    equal(towers.clip_g.network, parts["clip_g"])
    assert torch.equal(towers.t5.network.shared.weight, t5["encoder.embed_tokens.weight"])


# ---- refusals


def test_what_does_not_fit(tmp_path: Path) -> None:
    model = clip_model(CLIP_L, projection=False)
    model.save_pretrained(tmp_path / "l")
    state = clip_state(model)

    def refused(match: str, path: Path, **config: Any) -> None:
        with pytest.raises(DarkroomError, match=match) as error:
            filled(path, **config)
        assert "\n" not in str(error.value)

    file = tmp_path / "file.safetensors"
    save_file(state, file)
    narrow = {**CLIP_L, "hidden_size": 24}
    refused("holds CLIP, 32 wide, 3 layers, but .* is CLIP, 24 wide", file, kind="clip", network=narrow)
    refused("is T5, 96 wide", file, kind="t5", network=T5)
    refused("holds no text tower", tmp_path, kind="clip", network=CLIP_L)
    refused("is not there", tmp_path / "nowhere", kind="clip", network=CLIP_L)
    (tmp_path / "notes.txt").write_text("x")
    refused("not a weight file", tmp_path / "notes.txt", kind="clip", network=CLIP_L)
    refused(r"has no text_model\.encoder\.layers\.3", file, kind="clip", network={**CLIP_L, "num_hidden_layers": 4})
    refused(r"holds .*layers\.2.* no place", file, kind="clip", network={**CLIP_L, "num_hidden_layers": 2})
    wide = {**CLIP_L, "intermediate_size": 41}
    refused(r"has .*fc1.* of shape \[40.*\], not \[41", file, kind="clip", network=wide)
    save_file(state | {"text_model.surprise": torch.zeros(1)}, file)
    refused("holds text_model.surprise, which has no place", file, kind="clip", network=CLIP_L)
    # What no tensor shows, the config does.
    refused("hidden_act 'quick_gelu'", tmp_path / "l", kind="clip", network={**CLIP_L, "hidden_act": "gelu"})
    refused("num_attention_heads 4", tmp_path / "l", kind="clip", network={**CLIP_L, "num_attention_heads": 2})


def test_frozen_towers_need_weights() -> None:
    conditioner = build_conditioner({"encoders": {"text": {"kind": "clip", "network": CLIP_L}}})
    with pytest.raises(DarkroomError, match=r'"conditioner\.text" keeps its published weights, but no file is named'):
        fill(conditioner)
    conditioner = build_conditioner({"encoders": {"text": {"kind": "clip", "network": CLIP_L, "trainable": True}}})
    assert fill(conditioner) == []


def test_the_index_of_an_incomplete_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(DarkroomError, match=r"model-1\.safetensors"):
        find_towers(tmp_path)


def test_a_file_of_the_same_family_comes_first(tmp_path: Path) -> None:
    """A file with the same tower under both names: no translation where none is needed."""
    state = random_open_clip()
    file = prefixed("a.", clip_from_open_clip(state)) | prefixed("b.", state)
    save_file({name: t.clone() for name, t in file.items()}, tmp_path / "both.safetensors")
    found = find_towers(tmp_path / "both.safetensors")
    assert {f.family for f in found} == {"clip", "open_clip"}
    tower = encoder(kind="open_clip", network=OPEN_G).towers.tower
    load_tower(tower, choose(tower, "it", found, tmp_path))
    equal(tower.network, state)
