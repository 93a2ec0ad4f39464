"""Every published family: recognised by its names and shapes, understood as its recipe says, each tensor accounted for,
and written under the same names again. Files have their full size and take no place: their weights are holes.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from official_files import INSIDE, fill_in, filled_layout, hollow_file, hollow_layout, layout, published_tensor
from paper_models import RECIPES, on_meta
from torch import nn

from darkroom.assemble import checked_parts, shapes_of
from darkroom.conditioning.encoders import ENCODERS
from darkroom.config import from_dict, to_dict
from darkroom.errors import DarkroomError
from darkroom.exchange import convert
from darkroom.interop.compvis_schedule import BUFFERS, buffers
from darkroom.interop.compvis_write import compvis_content, standard_tables
from darkroom.interop.families import FAMILIES, Family
from darkroom.interop.first_stage_files import same_bits
from darkroom.interop.found_model import FoundModel, find_model
from darkroom.interop.tensor_file import open_tensor_file
from darkroom.model_io import load

FAMILY_OF_LAYOUT = {"sd-v2-1-v768": "sd-v2-v768"}  # the others have the layout's name
# Read by training alone.
TRAINING = ("use_checkpoint", "dropout", "drop_rate", "drop_rates", "shuffle")
CONDITION = "cond_stage_model."


def found(path: Path) -> FoundModel:
    result = find_model(path)
    assert result is not None
    return result


def network(config: dict[str, Any]) -> dict[str, Any]:
    """What a network computes: without options of training, attention at factors that no level has, and the order of a
    set."""
    config = {key: value for key, value in config.items() if key not in TRAINING}
    if config["kind"] == "unet":
        present = [2**level for level in range(len(config["channel_mult"]))]
        config["attention_resolutions"] = [f for f in present if f in config["attention_resolutions"]]
        config["transformer_depth"] = config["transformer_depth"] if config["use_spatial_transformer"] else None
    return config


def encoders(config: dict[str, Any]) -> dict[str, Any]:
    """What encoders compute, completely. Names of classes are in no file, a vocabulary neither; the sizes of towers are
    compared as shapes."""
    result = {}
    for name, entry in config["encoders"].items():
        complete = to_dict(from_dict(ENCODERS[entry["kind"]].config_class, entry, name))
        for inner in (complete, *(value for value in complete.values() if isinstance(value, dict))):
            for key in (*TRAINING, "classes", "tokenizer", "network", "size"):
                inner.pop(key, None)
        if complete["kind"] == "sd3_text":  # trained with zeros, used with the empty text
            del complete["no_text"]
        result[name] = complete
    return result


def official_layout(family: Family, parts: dict[str, nn.Module]) -> dict[str, list[int]]:
    """Names and shapes of a family's file, of a model built from its recipe."""
    configs = {part: module.config_dict for part, module in parts.items()}
    own = FoundModel(Path("model"), "darkroom", family.name, family.name, None, configs, {})  # type: ignore[arg-type]
    shapes = shapes_of(parts)
    result = {
        place.names[0]: list(shapes[part][ours])
        for part, table in standard_tables(own, shapes).items()
        for ours, place in table.items()
    }
    if family.averaged:
        names = [name for name in result if name.startswith("model.diffusion_model.")]
        result |= {"model_ema." + name.removeprefix("model.").replace(".", ""): result[name] for name in names}
        result |= {"model_ema.decay": [], "model_ema.num_updates": []}
    return result


def beside(family: Family) -> dict[str, list[int]]:
    """Tensors of official files that are not the model's."""
    tables: dict[str, list[int]] = {} if family.prediction == "velocity" else {key: [1000] for key in BUFFERS}
    return tables | {
        "layout2img-openimages256": {
            f"{CONDITION}transformer.to_logits.weight": [8192, 512],
            f"{CONDITION}transformer.to_logits.bias": [8192],
            "ddim_sigmas": [200],
        },
        "sd-v2-x4-upscaler": {f"low_scale_model.{name}": [1000] for name in BUFFERS[:8]},
        "sd-v2-depth": {"depth_model.model.pretrained.model.cls_token": [1, 1, 768]},
        "sd-v1": {f"{CONDITION}transformer.text_model.embeddings.position_ids": [1, 77]},
        "sdxl-base": {
            "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": [1, 77],
            "denoiser.sigmas": [1000],
        },
        "lsun_churches256": {"scale_factor": []},
        "dit": {},
    }.get(family.name, {})


def published_file(folder: Path, family: Family, parts: dict[str, nn.Module]) -> tuple[Path, dict[str, list[int]]]:
    shapes = official_layout(family, parts) | beside(family)
    if family.name == "dit":
        shapes = {name: shape for name, shape in shapes.items() if name not in BUFFERS}
    dtypes = {name: "int64" for name in shapes if name.endswith("position_ids")} | {"model_ema.num_updates": "int32"}
    name = {"sd-v2-base": "512-base-ema", "semantic_synthesis512": "semantic-512"}.get(family.name, "model")
    path = hollow_file(folder / f"{name}.safetensors", shapes, dtypes)
    values = {name: tensor.numpy() for name, tensor in buffers(family.schedule).items()} if "betas" in shapes else {}
    if "scale_factor" in shapes:
        import numpy as np

        values["scale_factor"] = np.float32(0.9)
    fill_in(path, values)
    return path, shapes


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families(family: Family, tmp_path: Path) -> None:
    first_stage, denoiser, conditioner = on_meta(family.recipe)
    parts: dict[str, nn.Module] = {"first_stage": first_stage, "denoiser": denoiser, "conditioner": conditioner}
    path, shapes = published_file(tmp_path, family, parts)
    one = found(path)
    assert one.family == family.name
    built = checked_parts(one)

    recipe, its = denoiser.config_dict, built["denoiser"].config_dict  # type: ignore[union-attr]
    assert network(its["network"]) == network(recipe["network"])
    assert {k: v for k, v in its.items() if k != "network"} == {k: v for k, v in recipe.items() if k != "network"}
    assert encoders(built["conditioner"].config_dict) == encoders(conditioner.config_dict)  # type: ignore[arg-type]
    assert {part: shapes_of(built)[part] for part in built} == {part: shapes_of(parts)[part] for part in built}
    if "first_stage" in built:
        assert built["first_stage"].config_dict == first_stage.config_dict
        assert one.latents == (family.shift, 0.9 if "scale_factor" in shapes else family.scale)
    else:
        assert family.name == "dit"

    names = [n for table in (*one.tables.values(), *one.averaged.values()) for p in table.values() for n in p.names]
    assert sorted([*names, *one.kept]) == sorted(shapes)
    assert set(one.averaged) == ({"denoiser"} if family.averaged else set())
    written_under_the_same_names(one, shapes)


def written_under_the_same_names(one: FoundModel, shapes: dict[str, Any]) -> None:
    """As a model of ours that has never seen this file's names."""
    ours = replace(one, layout="darkroom")
    content = compvis_content(ours, shapes_of(checked_parts(one)), "all")
    entries = {name: list(shape) for name, (_, shape) in content.entries().items()}
    assert entries == {name: list(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", INSIDE)
def test_public_layouts(name: str, tmp_path: Path) -> None:
    """Against the lists of names, shapes and hyper-parameters of the official code itself."""
    spec = layout(name)
    one = found(hollow_layout(tmp_path, name))
    assert one.family == FAMILY_OF_LAYOUT.get(name, name)
    parts = checked_parts(one)
    names = [n for table in (*one.tables.values(), *one.averaged.values()) for p in table.values() for n in p.names]
    assert sorted([*names, *one.kept]) == sorted(spec["layout"])
    written_under_the_same_names(one, spec["layout"])
    total = sum(math.prod(shape) for part in shapes_of(parts).values() for shape in part.values())
    copies = {n for table in one.averaged.values() for place in table.values() for n in place.names}
    rest = [n for n in spec["layout"] if n not in copies and n not in one.kept]
    assert total - 2 == sum(math.prod(spec["layout"][n]) for n in rest)  # shift and scale are ours

    args = spec["hyper_parameters"].get("args", {})
    if not args:
        return
    stated = {
        k: v for k, v in args["unet_config"]["args"].items() if k not in ("image_size", "use_checkpoint", "use_fp16")
    }
    network_config = one.configs["denoiser"]["network"]
    present = [2**level for level in range(len(stated["channel_mult"]))]
    stated["attention_resolutions"] = [f for f in present if f in stated["attention_resolutions"]]
    assert {key: network_config.get(key) for key in stated} == stated
    assert one.configs["denoiser"]["prediction_type"] == {"eps": "epsilon"}.get(
        args["parameterization"], args["parameterization"]
    )
    schedule = one.configs["denoiser"]["schedule"]
    assert (schedule["beta_start"], schedule["beta_end"]) == (args["linear_start"], args["linear_end"])
    assert one.latents == (0.0, args["scale_factor"])


def test_the_paper_has_a_family_for_every_recipe() -> None:
    models = {name for name, recipe in RECIPES.items() if recipe.steps}
    same_tensors = {"ldm-ffhq256": "ldm-celeba256", "ldm-lsun-beds256": "ldm-celeba256", "ldm-sr-bsr": "ldm-sr"}
    assert {family.recipe for family in FAMILIES} == models - same_tensors.keys()
    for name, other in same_tensors.items():
        assert to_dict(RECIPES[name].denoiser) == to_dict(RECIPES[other].denoiser)


@pytest.mark.slow
@pytest.mark.parametrize("name", INSIDE)
def test_full_size_numbers_come_back(name: str, big_path: Path) -> None:
    """Through our folder and back, and loaded: the numbers are made again for each comparison, so little memory is
    taken beside the model."""
    spec = layout(name)
    path = filled_layout(big_path / "official.safetensors", name)
    done = convert(path, big_path / "ours")
    assert done.tensors == len(spec["layout"])
    assert convert(big_path / "ours", big_path / "again.safetensors").tensors == len(spec["layout"])
    again = open_tensor_file(big_path / "again.safetensors")
    assert again.shapes.keys() == spec["layout"].keys()
    for key in spec["layout"]:
        assert same_bits(again.read([key])[key], published_tensor(spec, key)), key
    (big_path / "again.safetensors").unlink()
    shutil.rmtree(big_path / "ours")
    one, model = found(path), load(path, device="cpu")
    for part, table in one.tables_of("ema").items():
        state = getattr(model, part).state_dict()
        for ours, place in table.items():
            assert same_bits(state[ours], published_tensor(spec, place.names[0])), ours


@pytest.mark.parametrize(
    ("lacking", "channels", "words"),
    [
        (CONDITION, 4, "lacks the encoder of its condition: its network reads a context of width 768"),
        ("", 8, "of no known family (its network unet, channels of its condition 4, condition clip)"),
    ],
)
def test_what_only_resembles_a_family_is_refused(lacking: str, channels: int, words: str, tmp_path: Path) -> None:
    """Stable Diffusion 1 without its text tower, and with the latent of a second picture at its input."""
    first_stage, denoiser, conditioner = on_meta("sd-v1")
    family = next(family for family in FAMILIES if family.name == "sd-v1")
    shapes = official_layout(family, {"first_stage": first_stage, "denoiser": denoiser, "conditioner": conditioner})
    shapes = {name: shape for name, shape in shapes.items() if not (lacking and name.startswith(lacking))}
    first = "model.diffusion_model.input_blocks.0.0.weight"
    shapes[first] = [shapes[first][0], channels, *shapes[first][2:]]
    with pytest.raises(DarkroomError) as error:
        find_model(hollow_file(tmp_path / "model.safetensors", shapes, {}))
    assert words in str(error.value)
