"""diffusers folders: every kind of pipeline comes in and goes out bit for bit; what is damaged is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_models import NAMES
from diffusers_runs import contents, found, loaded
from official_files import golden, hollow_layout, layout, write_checkpoint
from safetensors.torch import save_file

from darkroom.assemble import hollow_parts, shapes_of
from darkroom.cli.main import main
from darkroom.errors import DarkroomError
from darkroom.exchange import convert
from darkroom.interop import tensor_file
from darkroom.interop.diffusers_components import components
from darkroom.interop.diffusers_pipelines import choose_pipeline
from darkroom.interop.first_stage_files import same_bits
from darkroom.interop.found_model import find_model
from darkroom.interop.tensor_file import open_tensor_file
from darkroom.interop.tensor_source import inverse
from darkroom.model_io import load

FAMILIES = {
    "sd1": "sd-v1",
    "sd2": "sd-v2-v768",
    "inpaint": "sd-v1-inpainting",
    "upscale": "sd-v2-x4-upscaler",
    "sdxl": "sdxl-base",
    "sd3": "sd3-medium",
    "dit": "dit",
    "ldm": "celeba256",
    "ldm_updown": "lsun_churches256",
    "ldm_upscale": "bsr_sr",
    "ldm_text": "text2img-large",
}


def without_vocabularies(configs: Any) -> Any:
    """Releases of the tokenizers library write the same vocabulary differently."""
    if isinstance(configs, dict):
        return {key: without_vocabularies(value) for key, value in configs.items() if key != "tokenizer"}
    return configs


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_comes_back_through_our_folder(name: str, theirs: Path, tmp_path: Path) -> None:
    there = convert(theirs / name, tmp_path / "ours")
    again = convert(tmp_path / "ours", tmp_path / "again", to="diffusers")
    assert there.source.family == FAMILIES[name]  # type: ignore[union-attr]
    assert there.tensors == again.tensors
    before, after = contents(theirs / name), contents(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(same_bits(before[key], after[key]) for key in before)
    index, written = (
        json.loads((place / "model_index.json").read_text()) for place in (theirs / name, tmp_path / "again")
    )
    assert index["_class_name"] == written["_class_name"]
    assert {k for k, v in index.items() if isinstance(v, list) and v[0]} == {
        k for k, v in written.items() if isinstance(v, list) and v[0]
    }
    # Without our note, what the components' configs say is the same model.
    shutil.rmtree(tmp_path / "again" / "darkroom")
    one, other = found(theirs / name), found(tmp_path / "again")
    assert without_vocabularies(one.configs) == without_vocabularies(other.configs)
    assert (one.latents, one.family, one.info["defaults"]) == (other.latents, other.family, other.info["defaults"])


# ------------------------------------------------------------------------------------------- from one official file


def official(folder: Path, name: str) -> Path:
    return write_checkpoint(folder / f"{name}.ckpt", golden("latent_diffusion_tiny", name)[1])


@pytest.mark.parametrize("name", ["tiny_cin", "tiny_text2img"])
def test_an_official_file_comes_back_through_a_folder(name: str, tmp_path: Path) -> None:
    """Tables of the schedule and both kinds of weights included: the averaged ones are those that diffusers loads, the
    others its variant "non_ema"."""
    state = golden("latent_diffusion_tiny", name)[1]
    first = convert(official(tmp_path, name), tmp_path / "folder", to="diffusers")
    again = convert(tmp_path / "folder", tmp_path / "back.ckpt")
    assert first.tensors == again.tensors == len(state)
    file = open_tensor_file(tmp_path / "back.ckpt")
    back = file.read(file.shapes)
    assert back.keys() == state.keys() and all(same_bits(back[key], state[key]) for key in state)
    written = tmp_path / "folder" / "unet"
    has_averaged = any(key.startswith("model_ema.diffusion_model") for key in state)
    assert (written / "diffusion_pytorch_model.non_ema.safetensors").is_file() == has_averaged
    start = (
        "model_ema.diffusion_modelinput_blocks00weight"
        if has_averaged
        else "model.diffusion_model.input_blocks.0.0.weight"
    )
    main = open_tensor_file(written / "diffusion_pytorch_model.safetensors")
    assert same_bits(main.read(["conv_in.weight"])["conv_in.weight"], state[start])


@pytest.mark.parametrize(("name", "named"), [("tiny_semantic", "segmentation"), ("tiny_inpainting", "masked_image")])
def test_official_models_without_a_pipeline_are_refused(name: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(DarkroomError, match=f"no pipeline for a unet with {named}"):
        convert(official(tmp_path, name), tmp_path / "folder", to="diffusers")
    assert not (tmp_path / "folder").exists()


# ------------------------------------------------------------------------------------------------- names of full sizes

LAYOUTS = {"sd-v1": ("unet", "diffusers-sd1-unet"), "sd3-medium": ("transformer", "diffusers-sd3-transformer")}


@pytest.mark.parametrize("name", LAYOUTS)
def test_full_size_components_have_the_published_names(name: str, big_path: Path) -> None:
    one = found(hollow_layout(big_path, name))
    shapes = shapes_of(hollow_parts(one.configs))
    parts = components(one.configs, shapes, one.latents, choose_pipeline(one.configs, one.latents), 64)
    folder, published = LAYOUTS[name]
    component = next(part for part in parts if part.folder == folder)
    own = {ours: shapes["denoiser"][ours] for ours in component.table}
    written = inverse(component.table, own, dict.fromkeys(own, "float32"))
    wanted = {key: tuple(shape) for key, shape in layout(published)["layout"].items()}
    assert {key: target.shape for key, target in written.items()} == wanted


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd1", "sd3", "dit", "ldm"])
def test_a_network_alone_is_a_denoiser(name: str, theirs: Path, tmp_path: Path) -> None:
    """Its folder says nothing of the noise, which is that of the published models."""
    place = next(theirs / name / folder for folder in ("unet", "transformer") if (theirs / name / folder).is_dir())
    alone, whole = loaded(place), loaded(theirs / name)
    assert alone.first_stage is None and not alone.conditioner.encoders
    assert alone.denoiser.prediction_type == whole.denoiser.prediction_type
    assert alone.denoiser.schedule.config.kind == whole.denoiser.schedule.config.kind
    state = whole.denoiser.state_dict()
    assert all(same_bits(tensor, state[n]) for n, tensor in alone.denoiser.state_dict().items())
    convert(place, tmp_path / "ours")
    assert loaded(tmp_path / "ours").denoiser.config_dict == alone.denoiser.config_dict
    with pytest.raises(DarkroomError, match="no first stage"):
        convert(place, tmp_path / "again", to="diffusers")


# -------------------------------------------------------------------------------------------------- files of all kinds


def saved(theirs: Path, folder: Path, **options: Any) -> Path:
    """A pipeline of Stable Diffusion 1 in another kind of files."""
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.from_pretrained(theirs / "sd1").save_pretrained(folder, **options)
    return folder


def test_shards_pickles_and_half_precision(theirs: Path, tmp_path: Path) -> None:
    wanted = contents(theirs / "sd1")
    shards = saved(theirs, tmp_path / "shards", max_shard_size="400KB")
    assert (shards / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    convert(shards, tmp_path / "one", to="diffusers")
    assert all(same_bits(tensor, wanted[name]) for name, tensor in contents(tmp_path / "one").items())
    for folder, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        place = shards / folder
        tensors = {n.partition("/")[2]: t for n, t in wanted.items() if n.startswith(f"{folder}/")}
        for path in place.glob("*.safetensors*"):
            path.unlink()
        torch.save(tensors, place / f"{stem}.bin")
    for path in (shards / "vae").glob("*.safetensors*"):
        path.unlink()
    half = {n.partition("/")[2]: t.half() for n, t in wanted.items() if n.startswith("vae/")}
    save_file(half, shards / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    done = convert(shards, tmp_path / "two", to="diffusers")
    again = contents(tmp_path / "two")
    assert done.tensors == len(wanted) == len(again)
    assert all(same_bits(t, wanted[n].half() if n.startswith("vae/") else wanted[n]) for n, t in again.items())


def test_positions_and_unused_projections_are_kept(theirs: Path, tmp_path: Path) -> None:
    """As files of older releases have them."""
    folder = saved(theirs, tmp_path / "old")
    place = folder / "text_encoder" / "model.safetensors"
    file = open_tensor_file(place)
    more = {"text_model.embeddings.position_ids": torch.arange(77)[None], "text_projection.weight": torch.eye(32)}
    tensors = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in file.read(file.shapes).items()}
    save_file(tensors | more, place)
    done = convert(folder, tmp_path / "ours")
    assert done.source.left_out == {"positions of the text tower": 1, "unused part of the text tower": 1}
    again = convert(tmp_path / "ours", tmp_path / "again", to="diffusers")
    assert done.tensors == again.tensors
    written = open_tensor_file(tmp_path / "again" / "text_encoder" / "model.safetensors")
    assert written.shapes.keys() == tensors.keys() | more.keys()
    official = convert(tmp_path / "again", tmp_path / "one.safetensors")  # which has no place for them
    assert official.tensors == again.tensors - 2


def broken(folder: Path, file: str, **changes: Any) -> None:
    place = folder / file
    place.write_text(json.dumps(json.loads(place.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("unet/config.json", {"layers_per_block": 2}, "tensors missing"),
        ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, "UNet3DConditionModel"),
        ("unet/config.json", {"block_out_channels": [64, 128]}, "of another shape"),
        ("vae/config.json", {"latent_channels": 8}, "does not fit"),
        ("scheduler/scheduler_config.json", {"prediction_type": "noise"}, "noise"),
        ("scheduler/scheduler_config.json", {"_class_name": "OtherScheduler"}, "OtherScheduler"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "sigmoid"),
        ("text_encoder/config.json", {"num_hidden_layers": 2}, "no known part"),
        ("text_encoder/config.json", {"num_hidden_layers": 30_000}, "too few for the 30,000 layers"),
        ("unet/config.json", {"layers_per_block": 30_000}, "too few for the 60,000 layers"),
        ("unet/config.json", {"layers_per_block": 99, "transformer_layers_per_block": [1, 99]}, "too few for"),
        ("unet/config.json", {"block_out_channels": [32] * 33}, "33 levels"),
        ("vae/config.json", {"layers_per_block": 30_000}, "too few for"),
        ("model_index.json", {"unet": [None, None]}, "without a denoiser"),
        ("model_index.json", {"_class_name": ["pipeline", "Other"]}, "a pipeline of its own"),
    ],
)
def test_what_does_not_fit_is_one_line(
    file: str, changes: dict[str, Any], named: str, theirs: Path, tmp_path: Path
) -> None:
    shutil.copytree(theirs / "sd1", tmp_path / "broken")
    broken(tmp_path / "broken", file, **changes)
    with pytest.raises(DarkroomError, match=named) as error:
        convert(tmp_path / "broken", tmp_path / "ours")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_a_damaged_note_is_one_line(theirs: Path, tmp_path: Path) -> None:
    convert(theirs / "ldm", tmp_path / "folder", to="diffusers")
    broken(tmp_path / "folder", "darkroom/note.json", latents=None)
    with pytest.raises(DarkroomError, match=r"note\.json is damaged"):
        find_model(tmp_path / "folder")
    broken(tmp_path / "folder", "darkroom/note.json", latents=[0.0, 1.0], kept={"betas": "tables"})
    with pytest.raises(DarkroomError, match=r"lacks 1 tensors that its note names \(betas\)"):
        find_model(tmp_path / "folder")


def test_a_note_of_more_layers_than_tensors_is_one_line(theirs: Path, tmp_path: Path) -> None:
    convert(theirs / "ldm", tmp_path / "folder", to="diffusers")
    note = tmp_path / "folder" / "darkroom" / "note.json"
    configs = json.loads(note.read_text())["configs"]
    configs["denoiser"]["network"]["num_res_blocks"] = 8000
    broken(tmp_path / "folder", "darkroom/note.json", configs=configs)
    with pytest.raises(DarkroomError, match=r"tensors, too few for .*note\.json"):
        find_model(tmp_path / "folder")


@pytest.mark.parametrize("name", ["dit/transformer", "sd3/transformer", "ldm/unet"])
def test_a_network_of_more_layers_than_tensors_is_one_line(name: str, theirs: Path, tmp_path: Path) -> None:
    shutil.copytree(theirs / name, tmp_path / "broken")
    key = "layers_per_block" if name.endswith("unet") else "num_layers"
    broken(tmp_path / "broken", "config.json", **{key: 30_000})
    with pytest.raises(DarkroomError, match="too few for the"):
        find_model(tmp_path / "broken")


def test_shards_stay_in_their_folder(theirs: Path, tmp_path: Path) -> None:
    shutil.copytree(theirs / "sd1", tmp_path / "broken")
    place = tmp_path / "broken" / "unet"
    (place / "diffusion_pytorch_model.safetensors").unlink()
    index = {"weight_map": {"conv_in.weight": "../vae/diffusion_pytorch_model.safetensors"}}
    (place / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DarkroomError, match="no names of files beside it"):
        find_model(tmp_path / "broken")


def test_the_command_line_tells_what_a_folder_is(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(theirs / "sdxl")]) == 0
    told = capsys.readouterr().out
    assert "Stable Diffusion XL base (diffusers)" in told and "epsilon (of scheduler_config.json)" in told
    assert main(["convert", str(theirs / "ldm"), str(tmp_path / "folder"), "--to", "diffusers"]) == 0
    assert "(diffusers): 311 tensors, bit for bit" in capsys.readouterr().out


def test_joined_tensors_have_one_type(theirs: Path, tmp_path: Path) -> None:
    """Queries, keys and values of plain attention are three tensors there and one here."""
    shutil.copytree(theirs / "ldm", tmp_path / "mixed")
    file = next((tmp_path / "mixed" / "unet").glob("*.safetensors"))
    tensors = dict(open_tensor_file(file).read(open_tensor_file(file).shapes))
    name = next(name for name in tensors if name.endswith("to_q.weight"))
    save_file(tensors | {name: tensors[name].half()}, file)
    with pytest.raises(DarkroomError, match="which it is joined to") as error:
        convert(tmp_path / "mixed", tmp_path / "ours")
    assert "float16" in str(error.value) and "\n" not in str(error.value)


def test_every_header_is_read_once(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of large pickles take a second each."""
    convert(theirs / "sd1", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "noted", "diffusers")
    convert(tmp_path / "ours", tmp_path / "whole.safetensors")
    convert(tmp_path / "ours", tmp_path / "stage.safetensors", first_stage=True)
    read: list[str] = []
    original = tensor_file.read_safetensors_header

    def counted(path: Path) -> Any:
        read.append(str(path))
        return original(path)

    monkeypatch.setattr(tensor_file, "read_safetensors_header", counted)
    for source in (theirs / "sd1", *(tmp_path / name for name in ("noted", "whole.safetensors", "stage.safetensors"))):
        read.clear()
        load(source, device="cpu")
        assert read and len(set(read)) == len(read), source
