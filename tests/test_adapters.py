"""LoRA files change weights by weight * alpha / r * up @ down, however they are spelled, and are removed exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import change, kohya, low_rank, shaken, small_stable_diffusion, spelled
from renamed_states import renaming, to_ours, to_theirs
from text_tower_files import CLIP_G, CLIP_L, OPEN_G, T5
from tiny_models import one_line, tiny_first_stage
from torch import Tensor

from darkroom.adapters import Adapter, apply_adapters, remove_adapters
from darkroom.build import build_denoiser
from darkroom.conditioning.types import Conditioning
from darkroom.errors import DarkroomError
from darkroom.interop.diffusers_transformers import sd3_table
from darkroom.interop.diffusers_unet import key_table, to_diffusers_config
from darkroom.interop.learned_words import read_learned_word
from darkroom.interop.lora import is_lora, read_lora
from darkroom.interop.text_towers import clip_from_open_clip, open_clip_from_clip
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_io import load, save
from darkroom.safe_files import write_safetensors

PEFT = (".lora_A.weight", ".lora_B.weight")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture
def model(place: Path) -> LatentDiffusion:
    return small_stable_diffusion(place)


def state(model: LatentDiffusion) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def unet_layers(model: LatentDiffusion) -> dict[str, tuple[int, ...]]:
    """diffusers' names of all layers with a matrix or a filter, and their shapes."""
    network = model.denoiser.network
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    table = key_table(network.config)
    return {
        theirs.removesuffix(".weight"): shapes[ours]
        for ours, theirs in table.items()
        if theirs.endswith(".weight") and len(shapes[ours]) >= 2
    }


def test_kohya_file_against_the_network_of_diffusers(model: LatentDiffusion, place: Path) -> None:
    """Linear layers, 1x1 and 3x3 convolutions: all of them changed in diffusers' own network by the formula."""
    from diffusers import UNet2DConditionModel

    pairs = low_rank(unet_layers(model), rank=4)
    assert {pair[0].ndim for pair in pairs.values()} == {2, 4} and len(pairs) > 60
    file = kohya(place / "unet.safetensors", pairs, "lora_unet_", alpha=2.0)
    network = model.denoiser.network
    config = {k: v for k, v in to_diffusers_config(network.config).items() if not k.startswith("_")}
    theirs = UNet2DConditionModel(**config).eval()
    theirs.load_state_dict(to_theirs(network.state_dict(), renaming(key_table(network.config))))
    for name, pair in pairs.items():
        weight = theirs.get_submodule(name).weight
        weight.data = (weight.double() + change(pair, 0.8 * 2.0 / 4)).float()
    x, context, time = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32), torch.tensor([3.0, 700.0])
    with torch.no_grad():
        before = network(x, time, Conditioning(context=context))
        apply_adapters(model, [(file, 0.8)])
        after = network(x, time, Conditioning(context=context))
        expected = theirs(x, time, context).sample
    assert (before - expected).norm() > 0.1 * expected.norm()
    assert torch.allclose(after, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def test_every_spelling_means_the_same(model: LatentDiffusion, place: Path) -> None:
    layers = {f"{ATTENTION}.{part}": (32, 32) for part in ("to_q", "to_v", "to_out.0")}
    pairs = low_rank(layers)
    official = {name.replace(ATTENTION, "input_blocks.1.1.transformer_blocks.0.attn1"): p for name, p in pairs.items()}
    old = {name.replace("attn1.", "attn1.processor.").replace("to_out.0", "to_out"): p for name, p in pairs.items()}
    peft = place / "peft"
    peft.mkdir()
    spelled(peft / "adapter_model.safetensors", pairs, "base_model.model.", PEFT)
    (peft / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2, "peft_type": "LORA"}))
    files = [
        kohya(place / "kohya.safetensors", pairs, "lora_unet_", alpha=None),
        kohya(place / "xl.safetensors", official, "lora_unet_", alpha=2.0),
        spelled(place / "new.safetensors", pairs, "unet.", PEFT),
        spelled(place / "adapter.bin", pairs, "unet.", (".lora_A.default.weight", ".lora_B.default.weight")),
        spelled(place / "old.safetensors", pairs, "unet.", (".lora.down.weight", ".lora.up.weight")),
        spelled(place / "linear.bin", pairs, "", (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")),
        spelled(place / "processor.bin", old, "unet.", ("_lora.down.weight", "_lora.up.weight")),
        spelled(place / "comfy.safetensors", official, "diffusion_model.", PEFT),
        peft,
    ]
    base = model.denoiser.network.state_dict()
    for file in files:
        remove_adapters(model)
        apply_adapters(model, [file])
        for name, pair in pairs.items():
            ours = name.replace(ATTENTION, "input_blocks.1.1.transformer_blocks.0.attn1") + ".weight"
            now = model.denoiser.network.get_parameter(ours)
            original = next(o for p, o in model.adapters.weights if p is now)
            assert torch.allclose(now.double(), original.double() + change(pair, 1.0), atol=1e-6), (file, name)
        assert len(model.adapters.weights) == 3
    assert base.keys() == model.denoiser.network.state_dict().keys()


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"lora_alpha": 6}, 3.0),
        ({"lora_alpha": 6, "alpha_pattern": {"attn1.to_q": 1}}, 0.5),
        ({"lora_alpha": 6, "alpha_pattern": {"o_q": 1}}, 3.0),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / 2**0.5),
    ],
)
@pytest.mark.parametrize("where", ["folder", "note"])
def test_alpha_of_peft(model: LatentDiffusion, place: Path, config: dict[str, Any], factor: float, where: str) -> None:
    name = f"{ATTENTION}.to_q"
    pairs = low_rank({name: (32, 32)})
    tensors = {f"unet.{name}{end}": t for end, t in zip(PEFT, pairs[name], strict=True)}
    file = place / f"noted-{where}"
    if where == "folder":
        file.mkdir(exist_ok=True)
        (file / "adapter_model.safetensors").unlink(missing_ok=True)
        write_safetensors(file / "adapter_model.safetensors", tensors)
        (file / "adapter_config.json").write_text(json.dumps(config))
    else:
        file = file.with_suffix(".safetensors")
        file.unlink(missing_ok=True)
        note = {f"unet.{key}": value for key, value in config.items()}
        write_safetensors(file, tensors, {"lora_adapter_metadata": json.dumps(note)})
    apply_adapters(model, [file])
    ((now, before),) = model.adapters.weights
    assert torch.allclose(now.double(), before.double() + change(pairs[name], factor), atol=1e-5)


def test_several_at_once_and_removed_exactly(model: LatentDiffusion, place: Path) -> None:
    layers = unet_layers(model)
    first = kohya(place / "first.safetensors", low_rank(layers, seed=5), "lora_unet_", 1.0)
    second = spelled(place / "second.safetensors", low_rank(dict(list(layers.items())[::2]), seed=6), "unet.", PEFT)
    original, parameters = state(model), [p.data_ptr() for p in model.parameters()]
    apply_adapters(model, [(first, 0.5), (second, -1.0)])
    both = state(model)
    remove_adapters(model)
    assert same(state(model), original) and [p.data_ptr() for p in model.parameters()] == parameters
    apply_adapters(model, [(first, 0.5)])
    apply_adapters(model, [Adapter(second, -1.0)])  # beside the one that is there: not on top of rounded weights
    assert same(state(model), both) and not same(both, original)
    assert [(a["name"], a["weight"]) for a in model.info["adapters"]] == [
        ("first.safetensors", 0.5),
        ("second.safetensors", -1.0),
    ]
    apply_adapters(model, [(second, 1.0)])  # the same file twice adds up, here to nothing
    remove_adapters(model)
    apply_adapters(model, [(first, 0.5)])
    once = state(model)
    remove_adapters(model)
    assert same(state(model), original) and "adapters" not in model.info
    model.to(torch.float16).to(memory_format=torch.channels_last)
    half = state(model)
    apply_adapters(model, [first])
    changed = model.denoiser.network.get_parameter("input_blocks.1.0.in_layers.2.weight")
    assert changed.dtype == torch.float16 and changed.is_contiguous(memory_format=torch.channels_last)
    remove_adapters(model)
    assert same(state(model), half) and not same(once, original)


def test_text_towers_of_both_families(place: Path, model: LatentDiffusion) -> None:
    """Under the names of transformers, also where our tower has OpenCLIP's, with q, k and v in one matrix."""
    layer = "text_model.encoder.layers.1."
    layers = {f"{layer}self_attn.{part}_proj": (32, 32) for part in ("q", "k", "v", "out")}
    layers |= {f"{layer}mlp.fc1": (40, 32), f"{layer}mlp.fc2": (32, 40)}
    pairs = low_rank(layers)
    _check_tower(model, kohya(place / "te.safetensors", pairs, "lora_te_", 1.0), pairs, "clip", 0.5)
    remove_adapters(model)
    _check_tower(model, spelled(place / "te2.safetensors", pairs, "text_encoder.", PEFT), pairs, "clip", 1.0)
    remove_adapters(model)
    newer = {name.removeprefix("text_model."): pair for name, pair in pairs.items()}
    _check_tower(model, spelled(place / "te3.safetensors", newer, "text_encoder.", PEFT), pairs, "clip", 1.0)

    tower = {"kind": "open_clip", "network": {**OPEN_G, "width": 32}, "length": 12}
    other = small_stable_diffusion(place, tower)
    pairs = low_rank(layers | {f"{layer}mlp.fc1": (128, 32), f"{layer}mlp.fc2": (32, 128)})
    _check_tower(other, kohya(place / "sd2.safetensors", pairs, "lora_te_", 1.0), pairs, "open_clip", 0.5)


def _check_tower(model: LatentDiffusion, file: Path, pairs: dict[str, Any], family: str, factor: float) -> None:
    network = model.conditioner.encoders["text"].towers["tower"].network
    expected = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    if family == "open_clip":
        expected = clip_from_open_clip(expected)
    for name, pair in pairs.items():
        expected[f"{name}.weight"] = (expected[f"{name}.weight"].double() + change(pair, factor)).float()
    if family == "open_clip":
        expected = open_clip_from_clip(expected)
    apply_adapters(model, [file])
    now = network.state_dict()
    assert all(torch.allclose(now[name], tensor, atol=1e-6) for name, tensor in expected.items())


def test_the_towers_of_sdxl_and_sd3_have_numbers(place: Path) -> None:
    towers = {"clip_l": {"network": CLIP_L, "length": 12}, "clip_g": {"network": OPEN_G, "length": 12}}
    xl = small_stable_diffusion(place, {"kind": "sdxl_text", **towers}, num_classes="sequential", adm_in_channels=48)
    encoder = xl.conditioner.encoders["text"]
    q = "text_model.encoder.layers.0.self_attn.q_proj"
    for prefix, name, width in (("lora_te1_", "clip_l", 32), ("lora_te2_", "clip_g", 48)):
        apply_adapters(xl, [kohya(place / f"{name}.safetensors", low_rank({q: (width, width)}), prefix, None)])
        assert any(
            p is parameter for p, _ in xl.adapters.weights[-1:] for parameter in encoder.towers[name].parameters()
        )
    towers |= {"clip_g": {"network": CLIP_G, "length": 12}, "t5": {"network": T5, "length": 12}}
    three = small_stable_diffusion(place, {"kind": "sd3_text", **towers}, num_classes="sequential", adm_in_channels=80)
    t5 = "encoder.block.0.layer.0.SelfAttention.q"
    apply_adapters(three, [kohya(place / "t5.safetensors", low_rank({t5: (32, 96)}), "lora_te3_", None)])
    assert len(three.adapters.weights) == 1


def test_transformers_of_diffusers_split_and_turn_rows(model: LatentDiffusion, place: Path) -> None:
    network = {
        "kind": "mmdit", "patch_size": 2, "in_channels": 4, "out_channels": 4, "depth": 2, "hidden_size": 32,
        "num_heads": 2, "context_dim": 16, "adm_in_channels": 12, "pos_embed_max_size": 8, "qk_norm": "rms",
    }  # fmt: skip
    denoiser = shaken(build_denoiser({"network": network}))
    three = LatentDiffusion(None, denoiser, model.conditioner)
    own = denoiser.network
    table = sd3_table(own.config)
    theirs = to_theirs(own.state_dict(), table)
    layers = {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in theirs.items()
        if tensor.ndim in (2, 4) and name.endswith(".weight")
    }
    pairs = low_rank(layers)
    expected = dict(theirs)
    for name, pair in pairs.items():
        expected[f"{name}.weight"] = (theirs[f"{name}.weight"].double() + change(pair, 0.25)).float()
    expected = to_ours(expected, table, own.state_dict())
    apply_adapters(three, [(spelled(place / "sd3.safetensors", pairs, "transformer.", PEFT), 0.25)])
    now = own.state_dict()
    assert all(torch.allclose(now[name], tensor, atol=1e-6) for name, tensor in expected.items())
    assert len(three.adapters.weights) < len(pairs)  # q, k and v are one weight here
    remove_adapters(three)
    apply_adapters(
        three,
        [kohya(place / "k3.safetensors", low_rank({"joint_blocks.0.x_block.attn.qkv": (96, 32)}), "lora_unet_", 1)],
    )


def test_a_core_between_the_matrices(model: LatentDiffusion, place: Path) -> None:
    down, mid, up = torch.randn(3, 32, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(32, 3, 1, 1)
    layer = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor([1.5])}
    write_safetensors(place / "core.safetensors", {f"{layer}.{end}": tensor for end, tensor in tensors.items()})
    apply_adapters(model, [place / "core.safetensors"])
    ((now, before),) = model.adapters.weights
    x = torch.randn(1, 32, 6, 6)
    conv = torch.nn.functional.conv2d  # three convolutions one after the other
    expected = conv(x, before, padding=1) + 0.5 * conv(conv(conv(x, down), mid, padding=1), up)
    assert torch.allclose(conv(x, now, padding=1), expected, atol=1e-4)


NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
GOOD = {f"{NAME}.lora_down.weight": torch.ones(2, 32), f"{NAME}.lora_up.weight": torch.ones(32, 2)}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {**GOOD, **{k.replace("blocks_0", "blocks_7"): v for k, v in GOOD.items()}},
            "1 of its 2 layers are not in.*blocks_7",
        ),
        ({**GOOD, f"{NAME}.lora_up.weight": torch.ones(31, 2)}, r"\[32, 32\] here.*\[31, 2\] times \[2, 32\]"),
        ({**GOOD, f"{NAME}.lora_up.weight": torch.ones(32, 3)}, "made for another model"),
        ({**GOOD, f"{NAME}.lora_up.weight": torch.full((32, 2), torch.nan)}, "not finite"),
        ({**GOOD, f"{NAME}.dora_scale": torch.ones(32, 1)}, "DoRA, which this version cannot apply: .*dora_scale"),
        ({f"{NAME}.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
        ({**GOOD, f"{NAME}.diff_b": torch.ones(2)}, "differences of biases"),
        ({**GOOD, "weird": torch.ones(2)}, "names that no LoRA has: weird"),
        ({f"{NAME}.lora_up.weight": torch.ones(32, 2)}, "lacks the down matrix"),
        ({**GOOD, f"{NAME}.alpha": torch.ones(2)}, "one number is needed"),
        (
            {**GOOD, f"{NAME}.lora_down.weight": torch.ones(0, 32), f"{NAME}.lora_up.weight": torch.ones(32, 0)},
            "another model",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(
    model: LatentDiffusion, tmp_path: Path, tensors: dict[str, Tensor], words: str
) -> None:
    good = kohya(tmp_path / "good.safetensors", low_rank({f"{ATTENTION}.to_k": (32, 32)}), "lora_unet_", 1.0)
    apply_adapters(model, [good])
    before = state(model)
    write_safetensors(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(DarkroomError, match=words) as error:
        apply_adapters(model, [tmp_path / "bad.safetensors"])
    one_line(error)
    assert same(state(model), before) and len(model.adapters.given) == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("no.safetensors", "does not exist"),
        (("good.safetensors", float("nan")), "finite"),
        (("good.safetensors", "much"), "give a number"),
        (("good.safetensors", 1.0, 2), "a path, or"),
    ],
)
def test_bad_requests(model: LatentDiffusion, tmp_path: Path, given: Any, words: str) -> None:
    write_safetensors(tmp_path / "good.safetensors", GOOD)
    given = (tmp_path / given[0], *given[1:]) if isinstance(given, tuple) else tmp_path / given
    with pytest.raises(DarkroomError, match=words):
        apply_adapters(model, [given])


def test_a_learned_word_may_be_called_like_a_lora(tmp_path: Path) -> None:
    for i, word in enumerate(("<flora>", "my_lora", "lora", "lora_style")):
        file = tmp_path / f"{i}.safetensors"
        write_safetensors(file, {word: torch.ones(2, 32)})
        assert not is_lora(file) and read_learned_word(file).word == word


def test_patterns_of_alphas_are_refused(tmp_path: Path) -> None:
    spelled(tmp_path / "adapter_model.safetensors", low_rank({"a": (2, 2)}), "base_model.model.", PEFT)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "alpha_pattern": {"blocks.*.to_q": 4}}))
    with pytest.raises(DarkroomError, match=r"blocks\.\*\.to_q.*write them out") as error:
        read_lora(tmp_path)
    assert str(tmp_path) in one_line(error)


def test_folders_of_other_things_hold_no_adapter(model: LatentDiffusion, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"use_dora": true, "r": 2}')
    with pytest.raises(DarkroomError, match="is a folder without a LoRA"):
        apply_adapters(model, [tmp_path])
    spelled(tmp_path / "adapter_model.safetensors", low_rank({"a": (2, 2)}), "base_model.model.", PEFT)
    with pytest.raises(DarkroomError, match="DoRA") as error:
        apply_adapters(model, [tmp_path])
    assert str(tmp_path) in one_line(error)


def test_loaded_with_adapters_and_saved_with_the_change(model: LatentDiffusion, tmp_path: Path) -> None:
    file = kohya(tmp_path / "l.safetensors", low_rank({f"{ATTENTION}.to_k": (32, 32)}), "lora_unet_", 1.0)
    model.save(tmp_path / "plain")
    loaded = load(tmp_path / "plain", adapters=[(file, 0.5)])
    assert isinstance(loaded, LatentDiffusion) and not same(state(loaded), state(model))
    (settings,) = loaded.generate("the red fox", seed=1).settings
    assert (
        settings["model"]["adapters"][0]["name"] == "l.safetensors"
        and settings["model"]["adapters"][0]["weight"] == 0.5
    )
    loaded.save(tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert isinstance(merged, LatentDiffusion) and same(state(merged), state(loaded))
    assert "adapters" not in merged.info and merged.info["merged_adapters"][0]["name"] == "l.safetensors"
    remove_adapters(loaded)
    assert same(state(loaded), state(model))

    save(tiny_first_stage(), tmp_path / "first")
    with pytest.raises(DarkroomError, match="is a first stage only"):
        load(tmp_path / "first", adapters=[file])
