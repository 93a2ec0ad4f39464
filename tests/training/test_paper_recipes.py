"""The published configurations: each has exactly the published parameters, and its training runs.

Parameters are counted on the meta device, at full size. Two real steps of every recipe run at reduced width on the set
`shapes`, written as files in the recipe's fields.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from paper_models import FIRST_STAGES, MODELS, NAMES, RECIPES, autoencoder_config, on_meta, parts_of
from parity_data import PARITY, weights
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from darkroom.data.batches import Batches
from darkroom.data.export import write_shapes
from darkroom.data.sources import DataConfig, ShapesDataset, open_dataset
from darkroom.first_stage.autoencoder import Autoencoder, AutoencoderConfig
from darkroom.networks.unet import UNet
from darkroom.training.denoiser_step import DenoiserStep
from darkroom.training.first_stage_step import FirstStageStep
from darkroom.training.loop import Trainer
from darkroom.training.recipe import Recipe, read_recipe, resolve, with_changes

# The recipe of each published layout of tensors.
LAYOUTS = {
    "bsr_sr": "ldm-sr",
    "celeba256": "ldm-celeba256",
    "cin256": "ldm-cin256-f8",
    "inpainting_big": "ldm-inpainting-big",
    "text2img-large": "ldm-text2img-large",
    "sd-v1": "sd-v1",
    "sd-v1-inpainting": "sd-v1-inpainting",
    "sd-v2-1-v768": "sd-v2-v768",
}
# Parameters of the published denoisers in millions: as printed by the official code, and in the tables of the papers.
MILLIONS = {
    "ldm-celeba256": 274.06,
    "ldm-ffhq256": 274.06,
    "ldm-lsun-beds256": 274.06,
    "ldm-lsun-churches256": 294.97,
    "ldm-cin256-f8": 394.98,
    "ldm-cin256": 400.92,
    "ldm-text2img256": 403.62,
    "ldm-text2img-large": 872.30,
    "ldm-layout2img-openimages256": 246.28,
    "ldm-semantic256": 215.23,
    "ldm-semantic512": 215.23,
    "ldm-sr": 113.62,
    "ldm-sr-bsr": 113.62,
    "ldm-inpainting-big": 387.25,
    "sd-v1": 859.52,
    "sd-v1-inpainting": 859.54,
    "sd-v2-base": 865.91,
    "sd-v2-v768": 865.91,
    "sd-v2-inpainting": 865.93,
    "sd-v2-depth": 865.91,
    "sd-v2-x4-upscaler": 473.40,
    "sdxl-base": 2567.46,
    "dit-xl-2": 674.83,
    "sd3-medium": 2028.33,
    "sd3.5-medium": 2243.17,
    "sd3.5-large": 8056.63,
}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---- parameters


def layout_of(name: str) -> dict[str, list[int]]:
    found = next(p for p in (PARITY / "layouts").iterdir() if p.name in (f"{name}.json", f"{name}.json.gz"))
    return dict(weights().load_layout(found)["layout"])


def elements(layout: dict[str, list[int]], prefix: str, without: tuple[str, ...] = ()) -> int:
    shapes = (s for k, s in layout.items() if k.startswith(prefix) and not k.startswith(without))
    return sum(torch.Size(shape).numel() for shape in shapes)


def test_every_published_layout_has_its_recipe() -> None:
    files = {p.name.split(".json")[0] for p in (PARITY / "layouts").iterdir()}
    others = {n for n in files if n.startswith("diffusers-")} | {"sd3-medium"}
    assert files == others | LAYOUTS.keys() | {n for n in FIRST_STAGES if n not in ("kl-f4-d4", "kl-f8-d16")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_are_those_of_the_published_files(layout: str) -> None:
    """Network, condition encoders and first stage, each to the last parameter."""
    first_stage, denoiser, conditioner = on_meta(LAYOUTS[layout])
    tensors = layout_of(layout)
    assert count(denoiser) == elements(tensors, "model.diffusion_model.")
    # The official files list a buffer of positions, and for inpainting the first stage a second time.
    buffers = ("cond_stage_model.transformer.text_model.embeddings.position_ids",)
    if layout == "inpainting_big":
        assert elements(tensors, "cond_stage_model.") in (0, elements(tensors, "first_stage_model."))
    else:
        published = elements(tensors, "cond_stage_model.", buffers)
        # OpenCLIP's last block and projection are in the files and are not used: ours hold them too.
        assert count(conditioner) == published
    # The perceptual loss and the discriminator of some files are not part of the model.
    loss = ("first_stage_model.loss.",)
    assert count(first_stage.autoencoder) == elements(tensors, "first_stage_model.", loss)


@pytest.mark.parametrize("name", [n for n in FIRST_STAGES if n not in ("kl-f4-d4", "kl-f8-d16")])
def test_first_stages_are_those_of_the_published_files(name: str) -> None:
    with torch.device("meta"):
        autoencoder = Autoencoder(autoencoder_config(RECIPES[name]))
    layout = layout_of(name)
    published = {k: v for k, v in layout.items() if not k.startswith(("loss.", "model_ema."))}
    assert {k: list(v.shape) for k, v in autoencoder.state_dict().items()} == published


def test_sd3_is_that_of_the_published_file() -> None:
    first_stage, denoiser, _ = on_meta("sd3-medium")
    layout = layout_of("sd3-medium")
    network = sum(t.numel() for t in denoiser.network.state_dict().values())  # with the table of positions
    assert network == elements(layout, "model.diffusion_model.") == 2_084_951_104
    assert count(first_stage.autoencoder) == elements(layout, "first_stage_model.")


@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_all_denoisers(name: str) -> None:
    _, denoiser, _ = on_meta(name)
    assert count(denoiser) / 1e6 == pytest.approx(MILLIONS[name], abs=0.0051)


def test_whole_models_of_the_paper() -> None:
    """Table 15 of the paper counts all that a model needs: 169 M for super-resolution, 1.45 B with its text tower."""
    first_stage, denoiser, _ = on_meta("ldm-sr")
    assert round((count(first_stage.autoencoder) + count(denoiser)) / 1e6) == 169
    _, denoiser, conditioner = on_meta("ldm-text2img-large")
    assert round((count(conditioner) + count(denoiser)) / 1e9, 2) == 1.45


# ---- how they were trained

# Images of a batch and the rate for each of them, of the released configurations whose rate is scaled so.
SCALED = {
    "kl-f4": (10, 4.5e-6),
    "kl-f8": (4, 4.5e-6),
    "kl-f16": (6, 4.5e-6),
    "kl-f32": (6, 4.5e-6),
    "vq-f4": (8, 4.5e-6),
    "vq-f4-noattn": (8, 4.5e-6),
    "vq-f8": (10, 4.5e-6),
    "vq-f8-n256": (10, 4.5e-6),
    "vq-f16": (14, 4.5e-6),
    "ldm-celeba256": (48, 2e-6),
    "ldm-ffhq256": (42, 2e-6),
    "ldm-lsun-beds256": (48, 2e-6),
    "ldm-cin256-f8": (64, 1e-6),
    "ldm-text2img256": (28, 2e-6),
    "ldm-layout2img-openimages256": (24, 2e-6),
    "ldm-semantic256": (48, 1e-6),
    "ldm-semantic512": (8, 1e-6),
    "ldm-sr": (64, 1e-6),
}
# Those whose released configuration asks for the absolute error.
ABSOLUTE = ("lsun-churches256", "layout2img-openimages256", "semantic256", "semantic512", "inpainting-big")


@pytest.mark.parametrize("name", SCALED)
def test_rates_are_those_of_the_released_configurations(name: str) -> None:
    recipe, (batch, rate) = RECIPES[name], SCALED[name]
    loop: Any = recipe if recipe.steps else recipe.first_stage.train
    assert loop.batch_size == batch and loop.optimizer.learning_rate == pytest.approx(batch * rate)


def test_errors_are_those_of_the_released_configurations() -> None:
    absolute = {name for name in MODELS if RECIPES[name].objective.loss_type == "l1"}
    assert absolute == {f"ldm-{name}" for name in ABSOLUTE}


def test_every_recipe_says_where_its_numbers_come_from() -> None:
    own = {name: path.read_text() for name, path in NAMES.items() if "steps:" in path.read_text()}
    assert len(own) > 25
    assert [name for name, text in own.items() if not text.split("\n")[1].startswith("# ")] == []


# ---- two steps


@pytest.fixture(scope="module")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures with captions, classes, boxes, label maps and depth beside them."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(ShapesDataset(DataConfig(source="shapes:single", size=64, count=6), "train"), folder)
    return folder


def words() -> str:
    """A vocabulary of words of the captions, in the JSON of the tokenizers library."""
    known = ["[UNK]", "a", "red", "green", "blue", "yellow", "circle", "square", "triangle", "star", "on", "the"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return str(tokenizer.to_str())


CLIP = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "projection_dim": 32, "bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 63,
}  # fmt: skip
OPEN_CLIP = {"vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
T5 = {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
TOWER = {"width": 32, "depth": 1, "heads": 2, "head_width": 16}
# What makes each kind of part small.
ENCODERS: dict[str, dict[str, Any]] = {
    "class": {"width": 32},
    "text": {**TOWER, "length": 12, "vocabulary": "learned", "vocabulary_size": 64},
    "boxes": {**TOWER, "max_objects": 4},
    "clip": {"network": CLIP, "tokenizer": words()},
    "open_clip": {"network": OPEN_CLIP, "tokenizer": words()},
    "sdxl_text": {
        "clip_l": {"network": CLIP, "tokenizer": words()},
        "clip_g": {"network": OPEN_CLIP, "tokenizer": words()},
    },
    "sd3_text": {
        "clip_l": {"network": CLIP, "tokenizer": words()},
        "clip_g": {"network": CLIP, "tokenizer": words()},
        "t5": {"network": T5, "tokenizer": words()},
    },
}  # fmt: skip
UNET = {"model_channels": 32, "num_res_blocks": 1, "transformer_depth": 1}
NETWORKS: dict[str, dict[str, Any]] = {
    "unet": UNET,
    "dit": {"hidden_size": 64, "depth": 2, "num_heads": 4},
    "mmdit": {"hidden_size": 64, "depth": 2, "num_heads": 4, "pos_embed_max_size": 32},
}


def small(config: AutoencoderConfig) -> AutoencoderConfig:
    codes = None if config.codebook_size is None else 16
    return replace(config, channels=8, norm_groups=8, num_res_blocks=1, codebook_size=codes)


def reduced(name: str, folder: Path) -> Recipe:
    """The recipe with narrow networks, small pictures and the test's data; everything else is as published."""
    recipe = RECIPES[name]
    f = 2 ** (len(autoencoder_config(recipe).channel_mult) - 1)
    size = max(32, f * (recipe.denoiser.network.size_multiple if recipe.steps else 1))
    changes: dict[str, Any] = {
        "data.source": str(folder),
        "data.validation": 0.0,
        "data.size": size,
        "data.random_crop": None,
        "precision": "float32",
    }
    if recipe.first_stage.train is not None:
        changes |= {f"first_stage.train.{k}": v for k, v in (("batch_size", 2), ("objective.perceptual", "laplacian"))}
        return resolve(with_changes(read_recipe(NAMES[name]), changes))
    changes |= {"batch_size": 2, "init_from": None}
    network = recipe.denoiser.network
    for option, value in NETWORKS[network.kind].items():
        changes[f"denoiser.network.{option}"] = value
    if network.kind == "unet" and network.num_head_channels is not None:
        changes["denoiser.network.num_head_channels"] = 8
    if getattr(network, "x_block_self_attn_layers", ()):
        changes["denoiser.network.x_block_self_attn_layers"] = [0]
    for encoder, config in recipe.conditioner.items():
        for option, value in ENCODERS.get(config.kind, {}).items():
            if not (config.kind == "class" and getattr(config, "slot", "") == "label"):
                changes[f"conditioner.{encoder}.{option}"] = value
    return resolve(with_changes(read_recipe(NAMES[name]), changes))


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps(name: str, shapes_folder: Path, tmp_path: Path) -> None:
    recipe = reduced(name, shapes_folder)
    data = open_dataset(recipe.data)
    torch.manual_seed(0)
    config = small(autoencoder_config(recipe))
    step: Any
    if recipe.first_stage.train is not None:
        loop: Any = recipe.first_stage.train
        step = FirstStageStep(Autoencoder(config), recipe.first_stage.train.objective)
    else:
        loop = recipe
        first_stage, denoiser, conditioner = parts_of(recipe, data, config)
        step = DenoiserStep(denoiser, conditioner, first_stage, recipe.objective)
        assert isinstance(denoiser.network, UNet) == (recipe.denoiser.network.kind == "unet")
    module = step.phases[0].module
    before = [p.detach().clone() for p in module.parameters() if p.requires_grad]
    trainer = Trainer("test", step, Batches(data, loop.batch_size, seed=0), loop, tmp_path, quiet=True)
    for _ in range(2):
        trainer.run_step()
    after = [p for p in module.parameters() if p.requires_grad]
    assert all(p.isfinite().all() for p in after)
    changed = sum(not torch.equal(p, q) for p, q in zip(before, after, strict=True))
    # Blocks that begin as the identity, and rates that are warmed up, let few move at first.
    assert changed > 0
