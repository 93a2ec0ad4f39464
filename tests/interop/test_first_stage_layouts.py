"""Every public layout with a first stage is recognised by names and shapes, compared strictly, and can be written back.

The files here are hollow: full-size headers over zeros that take no place. Runs with numbers in them are marked slow.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from official_files import (
    BARE,
    DIFFUSERS,
    INSIDE,
    diffusers_folder,
    fill_in,
    golden,
    hollow_file,
    hollow_layout,
    layout,
    official_config,
    write_checkpoint,
)
from parity_data import case_names, load_case, weights

from darkroom.errors import DarkroomError
from darkroom.exchange import convert
from darkroom.interop import compvis_first_stage as compvis
from darkroom.interop import diffusers_first_stage as diffusers
from darkroom.interop.first_stage_files import FoundFirstStage, find_first_stage, same_bits
from darkroom.interop.first_stage_rest import count_rest
from darkroom.interop.tensor_file import open_tensor_file
from darkroom.model_io import load, load_first_stage
from darkroom.safe_files import write_safetensors


def found(path: Path) -> FoundFirstStage:
    result = find_first_stage(path)
    assert result is not None
    return result


@pytest.mark.parametrize("name", BARE)
def test_the_papers_first_stages(name: str, tmp_path: Path) -> None:
    spec = layout(name)
    first_stage = found(hollow_layout(tmp_path, name))
    assert first_stage.config == official_config(spec["hyper_parameters"]["args"])
    assert first_stage.what.startswith(f"{name}: ")
    assert (first_stage.shift, first_stage.scale, first_stage.inside) == (0.0, 1.0, None)
    # Every tensor is accounted for: the autoencoder's under our own names, the others by what they are.
    assert first_stage.names == {key: key for key in spec["layout"] if not key.startswith("loss.")}
    assert sum(first_stage.left_out.values()) == sum(key.startswith("loss.") for key in spec["layout"])
    assert set(first_stage.left_out) <= {"perceptual network", "discriminator", "log-variance of the loss"}
    _names_and_shapes_come_back_through_diffusers(first_stage)


@pytest.mark.parametrize("name", INSIDE)
def test_first_stages_inside_whole_checkpoints(name: str, tmp_path: Path) -> None:
    spec = layout(name)
    first_stage = found(hollow_layout(tmp_path, name))
    family, shift, scale = INSIDE[name]
    assert first_stage.what.startswith(f"{family}: ") and (first_stage.shift, first_stage.scale) == (shift, scale)
    if "first_stage_config" in spec["hyper_parameters"].get("args", {}):
        assert first_stage.config == official_config(spec["hyper_parameters"]["args"]["first_stage_config"]["args"])
    own = [key for key in spec["layout"] if key.startswith("first_stage_model.")]
    assert sorted(first_stage.names.values()) == sorted(own)
    assert first_stage.left_out == {"other parts of the checkpoint": len(spec["layout"]) - len(own)}
    assert first_stage.inside is not None and "checkpoint" in first_stage.inside


@pytest.mark.parametrize("name", DIFFUSERS)
@pytest.mark.parametrize("place", ["folder", "file", "pipeline"])
def test_diffusers_folders(name: str, place: str, tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path / "p" / "vae" if place == "pipeline" else tmp_path / "vae", name)
    path = {"folder": folder, "file": folder / "diffusion_pytorch_model.safetensors", "pipeline": tmp_path / "p"}[place]
    if place == "pipeline":
        (path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    first_stage = found(path)
    family, shift, scale = DIFFUSERS[name]
    assert first_stage.what.startswith(f"{family}: ") and (first_stage.shift, first_stage.scale) == (shift, scale)
    assert sorted(first_stage.names.values()) == sorted(layout(name)["layout"])
    assert (first_stage.inside is not None) == (place == "pipeline")
    # Our own description of it is diffusers' description again, and the names too.
    hyper = {
        key: value for key, value in layout(name)["hyper_parameters"].items() if key not in ("class", "sample_size")
    }
    written = diffusers.to_diffusers_config(first_stage.config, first_stage.shift, first_stage.scale)
    assert {key: value for key, value in written.items() if key in hyper} | {"force_upcast": True} == hyper | {
        "force_upcast": True
    }
    _names_and_shapes_come_back_through_diffusers(first_stage, layout(name)["layout"])


def _names_and_shapes_come_back_through_diffusers(
    first_stage: FoundFirstStage, expected: dict[str, list[int]] | None = None
) -> None:
    levels = len(first_stage.config["channel_mult"])
    theirs = {name: diffusers.to_theirs(name, levels) for name in first_stage.shapes}
    assert len(set(theirs.values())) == len(theirs)
    assert all(diffusers.to_ours(new, levels) == name for name, new in theirs.items())
    if expected is not None:
        shapes = {new: diffusers.stored_shape(new, first_stage.shapes[name]) for name, new in theirs.items()}
        assert shapes == {name: tuple(shape) for name, shape in expected.items()}


@pytest.mark.parametrize("name", ["diffusers-sd1-vae", "diffusers-sd3-vae"])
def test_a_diffusers_file_without_its_config(name: str, tmp_path: Path) -> None:
    """The shapes say enough; shift and scale are those of the family, where that is known."""
    first_stage = found(hollow_layout(tmp_path, name))
    known = found(diffusers_folder(tmp_path / "vae", name))
    assert first_stage.config == known.config and first_stage.names == known.names
    assert (first_stage.shift, first_stage.scale) == ((0.0609, 1.5305) if "sd3" in name else (0.0, 1.0))


@pytest.mark.parametrize("as_matrix", [False, True])
def test_old_attention_names_and_shapes(as_matrix: bool, tmp_path: Path) -> None:
    """Released Stable Diffusion 1 files call the projections query, key, value and proj_attn."""
    folder = diffusers_folder(tmp_path / "vae", "diffusers-sd1-vae")
    old = {}
    for name, shape in layout("diffusers-sd1-vae")["layout"].items():
        for new_name, old_name in diffusers.OLD_ATTENTION.items():
            name = name.replace(f".attentions.0.{new_name}.", f".attentions.0.{old_name}.")
        is_projection = ".attentions." in name and len(shape) == 2
        old[name] = [*shape, 1, 1] if is_projection and not as_matrix else shape
    assert "encoder.mid_block.attentions.0.query.weight" in old
    hollow_file(folder / "diffusion_pytorch_model.safetensors", old)
    first_stage = found(folder)
    assert sorted(first_stage.names.values()) == sorted(old)
    assert first_stage.shapes["encoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)


@pytest.mark.parametrize("topic", ["autoencoder_kl", "autoencoder_vq"])
def test_the_shapes_of_the_goldens_say_their_hyper_parameters(topic: str) -> None:
    seen = 0
    for name in case_names(topic):
        case = load_case(topic, name)
        if not case.spec.get("layout"):
            continue
        seen += 1
        shapes = {key: tuple(shape) for key, shape in case.spec["layout"].items()}
        assert compvis.infer_config(shapes, name) == official_config(case.args), name
    assert seen >= 3


def test_a_decoder_of_its_own_size_is_seen(tmp_path: Path) -> None:
    from darkroom.build import build_first_stage

    config = {"channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "decoder_channels": 64}
    state = build_first_stage(config | {"decoder_num_res_blocks": 2}).autoencoder.state_dict()
    inferred = compvis.infer_config({name: tuple(tensor.shape) for name, tensor in state.items()}, "x")
    assert inferred["decoder_channels"] == 64 and inferred["decoder_num_res_blocks"] == 2
    with pytest.raises(Exception, match="decoder of other widths"):
        diffusers.to_diffusers_config(inferred, 0.0, 1.0)


# --- with numbers


@pytest.mark.parametrize(
    ("topic", "name"),
    [
        ("autoencoder_kl", "kl_f8_attn"),
        ("autoencoder_kl", "kl_f4_embed_differs"),
        ("autoencoder_vq", "vq_f8_attn"),
        ("autoencoder_vq", "vq_f4_noattn"),
        ("sd3", "vae16"),
    ],
)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_numbers_come_back_from_every_layout(topic: str, name: str, suffix: str, tmp_path: Path) -> None:
    _, state = golden(topic, name)
    write_checkpoint(tmp_path / "official.ckpt", state)
    stops = [tmp_path / f"again{suffix}"]
    done = convert(tmp_path / "official.ckpt", tmp_path / "ours")
    assert done.tensors == sum(not key.startswith("loss.") for key in state)
    stops.insert(0, tmp_path / "ours")
    if name != "kl_f4_embed_differs":
        stops.insert(1, tmp_path / "theirs")
        convert(tmp_path / "ours", tmp_path / "theirs", "diffusers")
    convert(stops[-2], stops[-1], "compvis")
    again = open_tensor_file(stops[-1])
    assert set(again.shapes) == {key for key in state if not key.startswith("loss.")}
    tensors = again.read(again.shapes)
    assert all(same_bits(tensors[key], state[key]) and tensors[key].shape == state[key].shape for key in tensors)
    loaded = [load(stop).state_dict() for stop in stops]
    assert all(
        torch.equal(a[key], b[key]) for a in loaded for b in loaded for key in a if key not in ("shift", "scale")
    )


@pytest.mark.parametrize("through", ["ours", None])
def test_the_rest_of_a_file_comes_back(through: str | None, tmp_path: Path) -> None:
    """Perceptual network and discriminator are no part of the model, and of the file they are."""
    _, state = golden("autoencoder_kl", "kl_f8_attn")
    state |= {
        "loss.logvar": torch.tensor(0.25),
        "loss.discriminator.main.2.weight": torch.randn(4, 3, 4, 4),
        "loss.discriminator.main.3.num_batches_tracked": torch.tensor(7),
    }
    path = write_checkpoint(tmp_path / "official.ckpt", state)
    if through is not None:
        assert convert(path, tmp_path / through).tensors == len(state)
        path = tmp_path / through
    assert convert(path, tmp_path / "again.safetensors").tensors == len(state)
    again = open_tensor_file(tmp_path / "again.safetensors")
    tensors = again.read(again.shapes)
    assert tensors.keys() == state.keys() and all(same_bits(tensors[key], state[key]) for key in state)
    if through is not None:
        kept = tmp_path / through / "official" / "kept.safetensors"
        content = open_tensor_file(kept)
        changed = {name: tensor + 1 for name, tensor in content.read(content.shapes).items()}
        kept.unlink()
        write_safetensors(kept, changed)
        source, other = (find_first_stage(p) for p in (tmp_path / "official.ckpt", tmp_path / "again.safetensors"))
        assert source is not None and other is not None and count_rest(other, source) == 3
        with pytest.raises(DarkroomError, match=r"does not give back loss\.\w+"):
            convert(tmp_path / through, tmp_path / "changed.safetensors")
            changed_one = find_first_stage(tmp_path / "changed.safetensors")
            assert changed_one is not None
            count_rest(changed_one, source)


@pytest.mark.slow
@pytest.mark.parametrize("name", BARE)
def test_full_size_numbers_come_back(name: str, big_path: Path) -> None:
    spec = layout(name)
    state = weights().make_state_dict(spec["layout"], spec.get("derived"))
    write_checkpoint(big_path / "official.ckpt", state)
    loaded = load(big_path / "official.ckpt").autoencoder.state_dict()
    assert all(same_bits(loaded[key], state[key]) for key in loaded)
    del loaded
    assert convert(big_path / "official.ckpt", big_path / "ours").tensors == len(state)
    convert(big_path / "ours", big_path / "theirs", "diffusers")
    own = {key for key in state if not key.startswith("loss.")}  # diffusers has no place for the rest
    for source, name, expected in (("ours", "whole.safetensors", set(state)), ("theirs", "again.ckpt", own)):
        convert(big_path / source, big_path / name, "compvis")
        again = open_tensor_file(big_path / name)
        tensors = again.read(again.shapes)
        assert tensors.keys() == expected and all(same_bits(tensors[key], state[key]) for key in tensors)
        (big_path / name).unlink()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd-v1", "sd-v2-1-v768", "sd3-medium"])
def test_full_size_first_stages_leave_their_checkpoints(name: str, big_path: Path) -> None:
    """Numbers for the first stage, a hollow rest: the file has its full size, the memory a first stage's."""
    spec = layout(name)
    path = hollow_layout(big_path, name)
    made = dict(weights().iter_arrays(spec["layout"], spec.get("derived"), prefix="first_stage_model."))
    entries = open_tensor_file(path)
    assert set(made) < set(entries.shapes)
    fill_in(path, made)
    loaded = load_first_stage(path).autoencoder.state_dict()
    for key, tensor in loaded.items():
        assert same_bits(tensor, torch.from_numpy(made[f"first_stage_model.{key}"])), key
    convert(path, big_path / "vae", "diffusers", first_stage=True)
    convert(big_path / "vae", big_path / "vae.safetensors")
    again = open_tensor_file(big_path / "vae.safetensors")
    tensors = again.read(again.shapes)
    assert all(same_bits(tensors[key], loaded[key]) for key in loaded) and tensors.keys() == loaded.keys()
