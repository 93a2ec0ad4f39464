"""Whole official checkpoints: the six tiny ones load, compute what the official code computes, and come back."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from official_files import golden, write_checkpoint
from parity_data import Case, case_names, load_case, make_input
from tiny_models import tiny_model
from torch import Tensor

from darkroom.build import build_denoiser
from darkroom.conditioning.types import Conditioning
from darkroom.diffusion.grids import make_grid
from darkroom.errors import DarkroomError
from darkroom.exchange import convert, export
from darkroom.guidance import Guided
from darkroom.interop.first_stage_files import same_bits
from darkroom.interop.found_model import FoundModel, find_model
from darkroom.interop.tensor_file import open_tensor_file
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_io import load, save
from darkroom.solvers import ddim, plms
from darkroom.whole_models import ModelConversion

TINY = case_names("latent_diffusion_tiny")
FAMILIES = {
    "tiny_cin": "cin256-v2",
    "tiny_text2img": "text2img-large",
    "tiny_uncond_scale_by_std": "lsun_churches256",
    "tiny_inpainting": "inpainting_big",
    "tiny_semantic": "semantic_synthesis256",
    "tiny_x0": "cin256-v2",
}
# What the file does not say, and its family's default has wrong.
FACTS: dict[str, dict[str, Any]] = {"tiny_x0": {"prediction": "x0"}}


@cache
def checkpoint(name: str) -> tuple[Case, dict[str, Tensor]]:
    return golden("latent_diffusion_tiny", name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tiny")
    for name in TINY:
        write_checkpoint(place / f"{name}.ckpt", checkpoint(name)[1])
    return place


def model(folder: Path, name: str, weights: str = "ema") -> LatentDiffusion:
    loaded = load(folder / f"{name}.ckpt", weights, "cpu", facts=FACTS.get(name))
    assert isinstance(loaded, LatentDiffusion)
    return loaded


def found(path: Path) -> FoundModel:
    result = find_model(path)
    assert result is not None
    return result


def condition(case: Case, loaded: LatentDiffusion) -> Conditioning:
    """Through the model's own conditioner."""
    given = case.spec["inputs"]
    if "class_label" in given:
        return loaded.conditioner({"class_label": case.input("class_label")})
    if "tokens" in given:
        return loaded.conditioner({"text": case.input("tokens").tolist()})
    if "labels" in given:
        return loaded.conditioner({"segmentation": case.input("labels")})
    if "masked_image" not in given:
        return Conditioning()
    # The golden's picture is already masked, so nothing is to be filled in, and its mask has the values 0 and 1.
    assert loaded.first_stage is not None
    latent = loaded.first_stage.denormalise(loaded.first_stage.encode(case.input("masked_image")).mode())
    mask = (case.input("mask_field") > 0).float()
    return Conditioning(concat=torch.cat([latent, torch.nn.functional.interpolate(mask, latent.shape[2:])], dim=1))


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_outputs_are_those_of_the_official_code(name: str, folder: Path) -> None:
    case, _ = checkpoint(name)
    outputs = case.spec["outputs"]
    for weights, output in (("ema", "model_output_ema"), ("live", "model_output")):
        loaded = model(folder, name, weights)
        assert loaded.first_stage is not None and not loaded.training
        given = condition(case, loaded)
        expected = output if output in outputs else "model_output"
        case.check(expected, loaded.denoiser.network(case.input("z_t"), case.input("t"), given))
        assert loaded.info["weights"] == ("ema" if expected == "model_output_ema" else "live")
    for slot, key in (("context", "context"), ("concat", "concat_condition")):
        if key in outputs:
            case.check(key, getattr(given, slot))
    posterior = loaded.first_stage.encode(case.input("image"))
    noise = case.input("eps") if "eps" in case.spec["inputs"] else None
    std = None if posterior.logvar is None else torch.exp(0.5 * posterior.logvar)
    case.check("latent", posterior.mean if noise is None or std is None else posterior.mean + std * noise)
    case.check("decoded", loaded.first_stage.decode(case.input("z_t")))


@pytest.mark.parametrize("name", TINY)
def test_every_option_is_that_of_the_official_configuration(name: str, folder: Path) -> None:
    case, state = checkpoint(name)
    one = found(folder / f"{name}.ckpt")
    assert one.family == FAMILIES[name]
    network = one.configs["denoiser"]["network"]
    stated = {k: v for k, v in case.args["unet_config"]["args"].items() if k != "image_size"}
    assert {key: network[key] for key in stated} == stated
    schedule = one.configs["denoiser"]["schedule"]
    for key, official in (("beta_start", "linear_start"), ("beta_end", "linear_end"), ("timesteps", "timesteps")):
        assert schedule[key] == case.args[official]
    scale = float(state["scale_factor"]) if "scale_factor" in state else case.args.get("scale_factor", 1.0)
    assert one.latents == (0.0, scale)
    assert bool(one.averaged) == case.args.get("use_ema", True)
    names = [n for table in (*one.tables.values(), *one.averaged.values()) for p in table.values() for n in p.names]
    assert sorted([*names, *one.kept]) == sorted(state)


@torch.no_grad()
@pytest.mark.parametrize("name", ["ddim10_eta0", "ddim10_eta0_cfg3", "ddim10_eta0.5_cfg1.5_live", "plms10_cfg3"])
def test_sampling(name: str, folder: Path) -> None:
    case = load_case("samplers_ldm", name)
    loaded = model(folder, case.args["model"], case.args["weights"].lower())
    given, null = (loaded.conditioner({"class_label": case.input(key)}) for key in ("class_label", "uncond_label"))
    # The last of the official classes is "none", which is our null.
    assert null.context is not None and torch.equal(null.context, loaded.conditioner.null(2).context)  # type: ignore[arg-type]
    denoise = Guided(loaded.denoiser, given, null, case.args.get("guidance_scale", 1.0))
    x = case.input("x_T")
    grid = make_grid(loaded.denoiser.schedule, case.args["steps"], "ddim")
    if name.startswith("plms"):
        final = plms(denoise, x, grid)
    else:
        final = ddim(denoise, x, grid, lambda i: make_input(4000 + i, tuple(x.shape)), eta=case.args["eta"])
    case.check("final", final, relative=1e-4)


def test_a_loaded_model_generates(folder: Path) -> None:
    result = model(folder, "tiny_cin").generate(class_label=3, seed=[1, 2], steps=2, size=(32, 48))
    assert result.images.shape == (2, 48, 32, 3)
    assert result.settings[0]["model"]["name"] == "tiny_cin"


# ---- and back


def contents(path: Path) -> dict[str, Tensor]:
    file = open_tensor_file(path)
    return file.read(file.shapes)


def is_equal(path: Path, state: dict[str, Tensor]) -> bool:
    written = contents(path)
    return written.keys() == state.keys() and all(same_bits(written[name], state[name]) for name in state)


def converted(*arguments: Any, **options: Any) -> ModelConversion:
    done = convert(*arguments, **options)
    assert isinstance(done, ModelConversion)
    return done


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("name", TINY)
def test_every_tensor_comes_back_through_our_folder(name: str, suffix: str, folder: Path, tmp_path: Path) -> None:
    _, state = checkpoint(name)
    first = converted(folder / f"{name}.ckpt", tmp_path / "ours", facts=FACTS.get(name))
    again = converted(tmp_path / "ours", tmp_path / f"back{suffix}")
    assert first.tensors == again.tensors == len(state)
    assert is_equal(tmp_path / f"back{suffix}", state)
    # What the file cannot say is noted in it.
    assert found(tmp_path / f"back{suffix}").configs["denoiser"]["prediction_type"] == (
        "x0" if name == "tiny_x0" else "epsilon"
    )
    denoisers = [build_denoiser(f.configs["denoiser"]) for f in (first.source, found(tmp_path / f"back{suffix}"))]
    assert denoisers[0].config_dict == denoisers[1].config_dict


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_the_converted_folder_is_the_model(name: str, folder: Path, tmp_path: Path) -> None:
    converted(folder / f"{name}.ckpt", tmp_path / "ours", facts=FACTS.get(name))
    for weights in ("ema", "live") if name not in ("tiny_text2img", "tiny_x0") else ("ema",):
        direct, ours = model(folder, name, weights), load(tmp_path / "ours", weights, "cpu")
        assert isinstance(ours, LatentDiffusion)
        assert all(same_bits(t, direct.state_dict()[n]) for n, t in ours.state_dict().items())
        assert ours.defaults == direct.defaults and ours.kept.tensors.keys() == direct.kept.tensors.keys()
        assert ours.denoiser.prediction_type == direct.denoiser.prediction_type


@pytest.mark.parametrize("weights", ["ema", "live"])
def test_one_kind_of_weights_stands_in_both_places(weights: str, folder: Path, tmp_path: Path) -> None:
    """The official code samples with the averaged copies wherever its configuration says so."""
    _, state = checkpoint("tiny_cin")
    converted(folder / "tiny_cin.ckpt", tmp_path / "one.safetensors", weights=weights)
    written = contents(tmp_path / "one.safetensors")
    assert written.keys() == state.keys()
    name = "diffusion_model.input_blocks.0.0.weight"
    averaged = "model_ema." + name.replace(".", "")
    wanted = state[averaged if weights == "ema" else f"model.{name}"]
    assert torch.equal(written[averaged], wanted) and torch.equal(written[f"model.{name}"], wanted)


@pytest.mark.parametrize("name", TINY)
def test_a_loaded_model_is_exported(name: str, folder: Path, tmp_path: Path) -> None:
    _, state = checkpoint(name)
    export(model(folder, name), tmp_path / "again.safetensors", format="compvis")
    written = contents(tmp_path / "again.safetensors")
    assert written.keys() == state.keys()
    for key in state:
        # The network's tensors are the averaged ones, where there are some.
        averaged = "model_ema." + key.removeprefix("model.").replace(".", "")
        original = averaged if key.startswith("model.diffusion_model.") and averaged in state else key
        assert same_bits(written[key], state[original]), key


@pytest.mark.parametrize("name", ["tiny_cin", "tiny_text2img", "tiny_uncond_scale_by_std", "tiny_x0"])
def test_every_tensor_comes_back_through_diffusers(name: str, folder: Path, tmp_path: Path) -> None:
    """The other two have conditions that diffusers has no pipeline for."""
    _, state = checkpoint(name)
    there = converted(folder / f"{name}.ckpt", tmp_path / "theirs", "diffusers", facts=FACTS.get(name))
    assert there.tensors == len(state)
    converted(tmp_path / "theirs", tmp_path / "back.safetensors")
    assert is_equal(tmp_path / "back.safetensors", state)


def test_a_trained_model_is_not_converted_over(tmp_path: Path) -> None:
    """What `convert` made it may make again; a model that was trained or saved is somebody's work."""
    save(tiny_model(), tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "converted")
    convert(tmp_path / "own", tmp_path / "converted")
    before = {path: path.read_bytes() for path in (tmp_path / "own").rglob("*") if path.is_file()}
    for only_first_stage in (False, True):
        with pytest.raises(DarkroomError, match=r"own holds a model that was not converted.*give another name"):
            convert(tmp_path / "converted", tmp_path / "own", first_stage=only_first_stage)
    assert before == {path: path.read_bytes() for path in (tmp_path / "own").rglob("*") if path.is_file()}


def test_a_tensor_too_few_or_too_many_is_named_as_the_file_names_it(tmp_path: Path) -> None:
    _, state = checkpoint("tiny_cin")
    bias = "model.diffusion_model.out.2.bias"
    assert bias in state and "model_ema.diffusion_modelout2bias" in state
    write_checkpoint(tmp_path / "few.ckpt", {name: tensor for name, tensor in state.items() if name != bias})
    with pytest.raises(DarkroomError, match=r"averaged copies of tensors that it lacks \(model_ema\S*out2bias\)"):
        load(tmp_path / "few.ckpt")
    extra = "model.diffusion_model.extra.weight"
    write_checkpoint(tmp_path / "many.ckpt", state | {extra: torch.zeros(3)})
    with pytest.raises(DarkroomError, match=f"no averaged copies of {extra}: these do not belong there"):
        load(tmp_path / "many.ckpt")
