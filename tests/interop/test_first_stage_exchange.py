"""First stages of others compute what theirs compute; whole checkpoints give theirs; bad files end in one line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from official_files import diffusers_folder, golden, hollow_file, hollow_layout, layout, write_checkpoint
from parity_data import case_names, load_case, make_input, weights
from torch import Tensor

import darkroom
from darkroom.build import build_first_stage
from darkroom.cli.main import main
from darkroom.errors import DarkroomError
from darkroom.exchange import Conversion, convert, export
from darkroom.first_stage.first_stage import FirstStage
from darkroom.interop import compvis_first_stage as compvis
from darkroom.interop.first_stage_files import find_first_stage, same_bits, write_compvis
from darkroom.interop.tensor_file import open_tensor_file
from darkroom.model_io import load, load_first_stage, save
from darkroom.safe_files import write_safetensors

LDM = case_names("latent_diffusion_tiny")
DIFFUSERS_CLASS = {"kl": AutoencoderKL, "vq": VQModel}


def differs_by(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the root mean square of theirs."""
    return float((ours - theirs).abs().max() / theirs.square().mean().sqrt())


def theirs_encode(model: Any, image: Tensor) -> Tensor:
    return model.encode(image).latent_dist.mean if isinstance(model, AutoencoderKL) else model.encode(image).latents


# --- against diffusers' classes


@pytest.mark.parametrize(
    ("topic", "name"),
    [("autoencoder_kl", "kl_f8_attn"), ("autoencoder_vq", "vq_f8_attn"), ("autoencoder_vq", "vq_f4_noattn")],
)
@torch.no_grad()
def test_diffusers_computes_the_same_from_what_we_write(topic: str, name: str, tmp_path: Path) -> None:
    _, state = golden(topic, name)
    convert(write_checkpoint(tmp_path / "official.ckpt", state), tmp_path / "theirs", "diffusers", scale=0.5)
    ours = load(tmp_path / "official.ckpt").autoencoder
    theirs = DIFFUSERS_CLASS[topic[-2:]].from_pretrained(tmp_path / "theirs").eval()
    assert theirs.config.scaling_factor == 0.5
    image = make_input(1, (1, 3, 64, 32), 0.5)
    z = ours.encode(image).mean
    assert differs_by(z, theirs_encode(theirs, image)) <= 1e-4
    assert differs_by(ours.decode(z), theirs.decode(z).sample) <= 1e-4
    if topic == "autoencoder_vq":
        plain = theirs.decode(z, force_not_quantize=True).sample
        assert differs_by(ours.decode(z, quantize=False), plain) <= 1e-4


@pytest.mark.parametrize("safe", [True, False])
@torch.no_grad()
def test_what_diffusers_writes_is_read(safe: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=8,
        latent_channels=5,
        in_channels=2,
        out_channels=3,
        latents_mean=(0.0, 0.1, 0.2, 0.3, 0.4),
        latents_std=(1.0, 2.0, 3.0, 4.0, 5.0),
        scaling_factor=0.7,
    ).eval()
    theirs.save_pretrained(tmp_path / "vae", safe_serialization=safe)
    ours = load(tmp_path / "vae")
    image = make_input(2, (1, 2, 16, 24), 0.5)
    z = ours.autoencoder.encode(image).mean
    assert differs_by(z, theirs_encode(theirs, image)) <= 1e-4
    assert differs_by(ours.autoencoder.decode(z), theirs.decode(z).sample) <= 1e-4
    # latent = (z - mean) * scaling_factor / std, as diffusers' pipelines have it.
    mean, std = (torch.tensor(v).view(1, 5, 1, 1) for v in (theirs.config.latents_mean, theirs.config.latents_std))
    torch.testing.assert_close(ours.encode(image).mean, (z - mean) * 0.7 / std)
    export(ours, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["norm_num_groups"] == 8
    again = load(tmp_path / "again")
    assert all(torch.equal(again.state_dict()[key], value) for key, value in ours.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kl-f8", "vq-f4"])
@torch.no_grad()
def test_full_size_official_weights_compute_what_diffusers_computes(name: str, big_path: Path) -> None:
    spec = layout(name)
    state = weights().make_state_dict(spec["layout"], spec.get("derived"))
    ours = load(write_checkpoint(big_path / "official.ckpt", state)).autoencoder
    convert(big_path / "official.ckpt", big_path / "theirs", "diffusers")
    theirs = DIFFUSERS_CLASS[name[:2]].from_pretrained(big_path / "theirs").eval()
    image = make_input(3, (1, 3, 64, 96), 0.5)
    z = ours.encode(image).mean
    found = {"encode": differs_by(z, theirs_encode(theirs, image))}
    found["decode"] = differs_by(ours.decode(z), theirs.decode(z).sample)
    if name[:2] == "vq":
        found["unquantised"] = differs_by(
            ours.decode(z, quantize=False), theirs.decode(z, force_not_quantize=True).sample
        )
    print(name, found)
    assert max(found.values()) <= 1e-4, found


# --- whole checkpoints


@pytest.mark.parametrize("name", LDM)
@torch.no_grad()
def test_whole_tiny_checkpoints_give_their_first_stage(name: str, tmp_path: Path) -> None:
    case, state = golden("latent_diffusion_tiny", name)
    path = write_checkpoint(tmp_path / "model.ckpt", state)
    first_stage = load_first_stage(path)
    expected = {"tiny_text2img": 0.18215, "tiny_uncond_scale_by_std": 0.625}.get(name, 1.0)
    assert float(first_stage.scale) == pytest.approx(expected, rel=1e-7) and float(first_stage.shift) == 0.0
    posterior = first_stage.encode(case.input("image"))
    latent = posterior.mean if posterior.logvar is None else posterior.sample_with(case.input("eps"))
    case.check("latent", latent)
    case.check("decoded", first_stage.decode(case.input("z_t")))
    if "posterior_mode" in case.spec["outputs"]:
        case.check("posterior_mode", first_stage.autoencoder.encode(case.input("image")).mean)
    convert(path, tmp_path / "vae.safetensors", first_stage=True)
    assert all(
        key.startswith(("encoder.", "decoder.", "quant")) or "quant_conv" in key
        for key in open_tensor_file(tmp_path / "vae.safetensors").shapes
    )


@torch.no_grad()
def test_the_sixteen_channel_first_stage_of_sd3(tmp_path: Path) -> None:
    case, state = golden("sd3", "vae16")
    names = {f"first_stage_model.{key}": tensor for key, tensor in state.items()}
    names["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"] = torch.zeros(1, 1)
    write_safetensors(tmp_path / "sd3.safetensors", names)
    first_stage = load_first_stage(tmp_path / "sd3.safetensors")
    assert (float(first_stage.shift), float(first_stage.scale)) == pytest.approx((0.0609, 1.5305))
    case.check("decode", first_stage.autoencoder.decode(case.input("z")))
    case.check("moments", first_stage.autoencoder.moments(case.input("x")))
    latents = load_case("sd3", "latent_format")
    latents.check("process_in", first_stage.normalise(latents.input("z")))
    latents.check("process_out", first_stage.denormalise(latents.input("z")))
    known = load_first_stage(tmp_path / "sd3.safetensors", shift=0.1159, scale=0.3611)
    assert (float(known.shift), float(known.scale)) == pytest.approx((0.1159, 0.3611))


def test_averaged_weights_of_a_bare_first_stage(tmp_path: Path) -> None:
    _, state = golden("autoencoder_kl", "kl_eps_probe")
    averaged = {f"model_ema.{key.replace('.', '')}": tensor * 0.5 for key, tensor in state.items()}
    averaged |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    path = write_checkpoint(tmp_path / "fs.ckpt", state | averaged)
    one, two = load(path).autoencoder, load(path, weights="live").autoencoder
    assert torch.equal(one.encoder.conv_in.weight, state["encoder.conv_in.weight"] * 0.5)
    assert torch.equal(two.encoder.conv_in.weight, state["encoder.conv_in.weight"])
    convert(path, tmp_path / "averaged.safetensors")
    written = open_tensor_file(tmp_path / "averaged.safetensors")
    assert torch.equal(written.read(["encoder.conv_in.weight"])["encoder.conv_in.weight"], one.encoder.conv_in.weight)


def test_training_leftovers_and_lightnings_bookkeeping_are_stepped_over(tmp_path: Path) -> None:
    _, state = golden("autoencoder_vq", "vq_f4")
    extra = {
        "loss.discriminator.main.0.weight": torch.zeros(2, 3, 4, 4),
        "loss.discriminator.main.3.num_batches_tracked": torch.tensor(0),
        "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 2, 1, 1),
        "loss.logvar": torch.zeros(()),
        "colorize": torch.zeros(3, 2, 1, 1),
    }
    found = find_first_stage(write_checkpoint(tmp_path / "fs.ckpt", state | extra))
    assert found is not None and found.left_out == {
        "discriminator": 2,
        "perceptual network": 1,
        "log-variance of the loss": 1,
        "colours for showing maps": 1,
    }


# --- precision and our own


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("to", ["darkroom", "diffusers", "compvis"])
def test_a_conversion_keeps_the_precision(dtype: torch.dtype, to: str, tmp_path: Path) -> None:
    _, state = golden("autoencoder_kl", "kl_eps_probe")
    half = {name: tensor.to(dtype) for name, tensor in state.items()}
    write_safetensors(tmp_path / "half.safetensors", half)
    place = tmp_path / ("out.ckpt" if to == "compvis" else "out")
    assert convert(tmp_path / "half.safetensors", place, to).tensors == len(half)
    convert(place, tmp_path / "again.safetensors")
    again = open_tensor_file(tmp_path / "again.safetensors")
    tensors = again.read(again.shapes)
    assert all(same_bits(tensors[name], half[name]) for name in half)


def own_first_stage(**options: Any) -> FirstStage:
    torch.manual_seed(4)
    config = {"channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 8, "z_channels": 3}
    first_stage = build_first_stage(config | {"embed_dim": 3} | options)
    first_stage.shift, first_stage.scale = torch.tensor(0.25), torch.tensor(1.7)
    return first_stage.eval()


@torch.no_grad()
def test_our_own_run_in_diffusers(tmp_path: Path) -> None:
    first_stage = own_first_stage(attention_levels=[1])
    assert darkroom.export(first_stage, tmp_path / "vae", format="diffusers") == tmp_path / "vae"
    theirs = AutoencoderKL.from_pretrained(tmp_path / "vae").eval()
    image = make_input(5, (1, 3, 16, 16), 0.5)
    latent = first_stage.encode(image).mean
    c = theirs.config
    assert differs_by(latent, (theirs_encode(theirs, image) - c.shift_factor) * c.scaling_factor) <= 1e-4
    decoded = theirs.decode(latent / c.scaling_factor + c.shift_factor).sample
    assert differs_by(first_stage.decode(latent), decoded) <= 1e-4
    again = load(tmp_path / "vae")
    assert all(torch.equal(again.state_dict()[key], value) for key, value in first_stage.state_dict().items())
    first_stage.scale = torch.tensor([1.7, 0.3, 5.0])
    export(first_stage, tmp_path / "vae")  # an earlier export is replaced
    assert torch.equal(load(tmp_path / "vae").scale, first_stage.scale)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_our_own_in_the_official_layout_keep_their_scale(suffix: str, tmp_path: Path) -> None:
    first_stage = own_first_stage(channels=32, norm_groups=32, codebook_size=50)
    place = tmp_path / f"fs{suffix}"
    with pytest.raises(DarkroomError, match=r"no place for the shift 0.25 .*--shift 0"):
        export(first_stage, place, format="compvis")
    assert not place.exists()
    for scale in (1.7, 1.3):  # an earlier export is replaced
        export(first_stage, place, format="compvis", shift=0.0, scale=scale)
        assert set(open_tensor_file(place).shapes) == set(first_stage.autoencoder.state_dict())  # nothing strange in it
        again = load(place)
        assert float(again.scale) == pytest.approx(scale) and float(again.shift) == 0.0
    if suffix == ".ckpt":
        theirs = torch.load(place, weights_only=True)["state_dict"]
        assert all(torch.equal(theirs[key], value) for key, value in first_stage.autoencoder.state_dict().items())


@pytest.mark.parametrize("place", ["vae", "fs.safetensors", "fs.ckpt"])
def test_models_whose_config_leaves_defaults_out(place: str, tmp_path: Path) -> None:
    first_stage = own_first_stage(channels=32, norm_groups=32)
    save(first_stage, tmp_path / "older")
    file = tmp_path / "older" / "first_stage" / "config.json"
    config = json.loads(file.read_text())
    left_out = ("kind", "pixels", "codebook_size", "quant_conv", "attention_levels", "decoder_channels")
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in left_out}))
    done = convert(tmp_path / "older", tmp_path / place, "diffusers" if place == "vae" else None, shift=0.0)
    assert isinstance(done, Conversion) and "KL, f 2" in done.source.what
    assert done.tensors == len(first_stage.autoencoder.state_dict())
    again = load(tmp_path / place).autoencoder.state_dict()
    assert all(torch.equal(again[key], value) for key, value in first_stage.autoencoder.state_dict().items())


def test_the_bundled_model_converts(tmp_path: Path) -> None:
    done = convert("emoji", tmp_path / "vae", "diffusers", first_stage=True)
    assert isinstance(done, Conversion) and done.source.what == "KL, f 4, 4 latent channels"
    with pytest.raises(DarkroomError, match="norms of 8 groups"):
        convert("emoji", tmp_path / "emoji.safetensors", first_stage=True)


def test_a_refusal_comes_before_the_tensors_are_read(tmp_path: Path) -> None:
    save(own_first_stage(channels=32, norm_groups=32, codebook_size=9), tmp_path / "vq")
    steps: list[int] = []
    with pytest.raises(DarkroomError, match=r"the shift 0.25 of the latents: give --shift 0 to leave yours out$"):
        convert(tmp_path / "vq", tmp_path / "vae", "diffusers", progress=steps.append)
    with pytest.raises(DarkroomError, match=r"give --shift 0 to leave yours out$"):
        convert(tmp_path / "vq", tmp_path / "vq.ckpt", progress=steps.append)
    with pytest.raises(DarkroomError, match=r"give one --scale$"):
        convert(tmp_path / "vq", tmp_path / "vae", "diffusers", shift=0.0, scale=[1.0, 2.0, 3.0], progress=steps.append)
    assert not steps and [path.name for path in tmp_path.iterdir()] == ["vq"]
    convert(tmp_path / "vq", tmp_path / "vae", "diffusers", shift=0.0)  # the cure, alone
    assert float(load(tmp_path / "vae").scale) == pytest.approx(1.7)


def test_what_cannot_be_expressed_is_named(tmp_path: Path) -> None:
    def refused(words: str, first_stage: Any, format: str, place: str = "out", **options: Any) -> None:
        with pytest.raises(DarkroomError) as error:
            export(first_stage, tmp_path / place, format=format, **options)
        assert words in str(error.value) and "\n" not in str(error.value), error.value
        assert not (tmp_path / place).exists()

    refused("norms of 8 groups", own_first_stage(), "compvis", "out.ckpt", shift=0.0)
    refused("norms of 16 and 32 groups", own_first_stage(norm_groups=32), "diffusers")
    refused("3 channels around 5 latent ones", own_first_stage(embed_dim=5), "diffusers")
    refused("decoder of other widths", own_first_stage(decoder_channels=32), "diffusers")
    refused("decoder with grain", own_first_stage(decoder_grain=True), "diffusers")
    refused("decoder with grain", own_first_stage(channels=32, norm_groups=32, decoder_grain=True), "compvis", "a.ckpt")
    refused("image with grain", own_first_stage(output_grain=True), "diffusers")
    refused("first level of 2 times", own_first_stage(channel_mult=[2, 2]), "diffusers")
    refused("VQModel has no place for the shift 0.25", own_first_stage(codebook_size=9), "diffusers")
    per_channel = own_first_stage(channels=32, norm_groups=32)
    refused("scale per channel", per_channel, "compvis", "out.ckpt", shift=0.0, scale=[1.0, 2.0, 3.0])
    with pytest.raises(DarkroomError, match=r"a shift of 0.0609: .*--shift 0.0609"):
        write_compvis(tmp_path / "out.ckpt", {}, SD3, 0.0, 1.5305)
    refused("8 bits only", own_first_stage(pixels={"dtype": "uint16", "low": 0.0, "high": 65535.0}), "diffusers")
    refused("identity", build_first_stage({"kind": "identity", "channels": 3}), "diffusers")
    refused("is not known", own_first_stage(), "onnx")
    refused("is one file", own_first_stage(), "compvis")
    refused("is a folder", own_first_stage(), "diffusers", "out.ckpt")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    (tmp_path / "mine.ckpt").write_text("x")
    with pytest.raises(DarkroomError, match="holds other files"):
        export(own_first_stage(), tmp_path / "mine")
    with pytest.raises(DarkroomError, match="another file has that name"):
        export(own_first_stage(channels=32, norm_groups=32), tmp_path / "mine.ckpt", format="compvis", shift=0.0)
    assert (tmp_path / "mine.ckpt").read_text() == "x"


SD3 = compvis.RELEASED["sd3"] | {
    "channels": 128,
    "num_res_blocks": 2,
    "in_channels": 3,
    "out_channels": 3,
    "norm_groups": 32,
}


# --- the command


def test_convert_says_what_it_did(tmp_path: Path, capfd: pytest.CaptureFixture[str], refused: Any) -> None:
    _, state = golden("autoencoder_kl", "kl_eps_probe")
    extra = {"loss.logvar": torch.zeros(())}
    path = write_checkpoint(tmp_path / "fs.ckpt", state | extra)
    assert main(["convert", str(path), str(tmp_path / "ours"), "--scale", "0.5"]) == 0
    out = capfd.readouterr().out
    assert "KL, f 2, 3 latent channels" in out and "log-variance of the loss (1 tensor)" in out
    assert "shift 0, scale 0.5 (from what was asked for)" in out
    assert f"{len(state) + 1} tensors, bit for bit" in out
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "diffusers"]) == 0
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["scaling_factor"] == 0.5
    assert main(["info", str(tmp_path / "theirs")]) == 0
    assert "KL, f 2, 3 latent channels" in capfd.readouterr().out
    assert main(["info", str(path)]) == 0
    assert "first stage: KL, f 2, 3 latent channels" in capfd.readouterr().out
    _, whole = golden("latent_diffusion_tiny", "tiny_text2img")
    write_checkpoint(tmp_path / "whole.ckpt", whole)
    assert main(["convert", str(tmp_path / "whole.ckpt"), str(tmp_path / "part"), "--first-stage"]) == 0
    out = capfd.readouterr().out
    assert "only the first stage of a latent diffusion of the paper's code checkpoint" in out and "scale 0.18215" in out
    assert isinstance(load(tmp_path / "part"), FirstStage)

    assert "no such file" in refused("convert", tmp_path / "absent", tmp_path / "x")
    assert "the official layout is one file" in refused("convert", path, tmp_path / "x", "--to", "compvis")
    assert "Invalid value for '--to'" in refused("convert", path, tmp_path / "x", "--to", "onnx")
    assert "must be finite" in refused("convert", path, tmp_path / "x", "--scale", "0")
    assert not (tmp_path / "x").exists()


def test_a_given_official_first_stage_trains_and_serves(tmp_path: Path) -> None:
    """`first_stage.path` and `first_stage.train.init_from` of a recipe take official files as they are."""
    _, state = golden("autoencoder_kl", "kl_eps_probe")
    path = write_checkpoint(tmp_path / "fs.ckpt", state)
    short = {"steps": 1, "batch_size": 2, "data.count": 8, "data.size": 32, "evaluate.samples": 1, "evaluate.steps": 1}
    given = short | {"first_stage.train": None, "first_stage.path": str(path)}
    darkroom.train("shapes-tiny", tmp_path / "given", overrides=given, quiet=True)
    model = load(tmp_path / "given" / "model")
    assert torch.equal(model.first_stage.autoencoder.encoder.conv_in.weight, state["encoder.conv_in.weight"])
    tuned = short | {"first_stage.train.init_from": str(path), "first_stage.train.steps": 1, "steps": 0}
    darkroom.train("shapes-tiny", tmp_path / "tuned", overrides=tuned | {"first_stage.train.batch_size": 2}, quiet=True)
    first_stage = load(tmp_path / "tuned" / "first_stage")
    assert not torch.equal(first_stage.autoencoder.encoder.conv_in.weight, state["encoder.conv_in.weight"])
    convert(tmp_path / "tuned" / "first_stage", tmp_path / "vae", "diffusers")


# --- bad files


def test_bad_official_files_end_in_one_line(tmp_path: Path, refused: Callable[..., str]) -> None:
    shapes = {name: list(shape) for name, shape in layout("kl-f8")["layout"].items() if not name.startswith("loss.")}

    def bad(words: str, changed: dict[str, Any], dtypes: dict[str, str] | None = None) -> None:
        path = hollow_file(tmp_path / "bad.safetensors", changed, dtypes)
        with pytest.raises(DarkroomError) as error:
            load(path)
        assert words in str(error.value), error.value
        assert words in refused("convert", path, tmp_path / "out")

    def without(*starts: str) -> dict[str, Any]:
        return {name: shape for name, shape in shapes.items() if not name.startswith(starts)}

    bad("1 tensor missing (decoder.mid.attn_1.norm.bias)", without("decoder.mid.attn_1.norm.bias"))
    bad("10 tensors missing (decoder.mid.attn_1.k.bias, ", without("decoder.mid.attn_1."))
    bad("lacks 'encoder.conv_in.weight'", without("encoder.conv_in"))
    bad("lacks 'decoder.up.0.block.0.conv1.weight'", without("decoder."))
    bad("lacks 'encoder.down.1.block.0.conv1.weight'", without("encoder.down.1."))
    bad("4 levels and the decoder 3", without("decoder.up.3."))
    bad("lacks 'post_quant_conv.weight'", without("post_quant_conv."))
    bad("2 tensors unknown (encoder.extra, other)", shapes | {"encoder.extra": [1], "other": [2, 2]})
    bad("5 tensors unknown (a0, a1, a2, a3, ...)", shapes | {f"a{i}": [1] for i in range(5)})
    bad(
        "of another shape or type (encoder.norm_out.weight (511,) for (512,))",
        shapes | {"encoder.norm_out.weight": [511]},
    )
    bad("encoder.norm_out.weight int64", shapes, {"encoder.norm_out.weight": "int64"})
    bad("no multiples of 96", shapes | {"encoder.conv_in.weight": [96, 3, 3, 3]})
    bad("neither a codebook nor means and variances", shapes | {"encoder.conv_out.weight": [4, 512, 3, 3]})
    bad("both a codebook and variances", shapes | {"quantize.embedding.weight": [8, 4]})
    bad("unknown (encoder.mid.attn_1.to_qkv.weight)", shapes | {"encoder.mid.attn_1.to_qkv.weight": [3, 3]})
    bad("scale_factor is 0.0", shapes | {"scale_factor": []})


def test_damaged_and_other_files(tmp_path: Path, refused: Callable[..., str]) -> None:
    _, state = golden("autoencoder_kl", "kl_eps_probe")
    write_safetensors(tmp_path / "whole.safetensors", state)
    write_checkpoint(tmp_path / "whole.ckpt", state)
    for suffix in (".safetensors", ".ckpt"):
        data = (tmp_path / f"whole{suffix}").read_bytes()
        cut = tmp_path / f"cut{suffix}"
        for keep in (0, 5, len(data) // 2, len(data) - 1):
            cut.write_bytes(data[:keep])
            refused("convert", cut, tmp_path / "out")
            with pytest.raises(DarkroomError):
                load(cut)
    hollow_layout(tmp_path, "diffusers-sd1-unet")
    assert "is a diffusers denoiser" in refused(
        "convert", tmp_path / "diffusers-sd1-unet.safetensors", tmp_path / "out"
    )
    (tmp_path / "text.ckpt").write_text("hello")
    assert "not a checkpoint" in refused("convert", tmp_path / "text.ckpt", tmp_path / "out")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    assert "holds no weights" in refused("convert", tmp_path / "unet", tmp_path / "out")
    save(own_first_stage(), tmp_path / "ours")
    assert "a folder; leave .ckpt out" in refused("convert", tmp_path / "ours", tmp_path / "x.ckpt", "--to", "darkroom")
    assert not (tmp_path / "out").exists()


def test_changed_names_and_shapes_never_escape(tmp_path: Path) -> None:
    """Names cut, renumbered, repeated; axes dropped, added, changed: found as something else, or one line."""
    rng = random.Random(0)
    whole = {name: list(shape) for name, shape in load_case("autoencoder_vq", "vq_f4").spec["layout"].items()}
    for _ in range(40):
        shapes = dict(whole)
        for _ in range(rng.choice([1, 2, 20])):
            name = rng.choice(list(shapes))
            shape = shapes.pop(name)
            new = [
                {},
                {name: shape[:-1]},
                {name: [*shape, rng.choice([0, 1, 2])]},
                {name: [rng.choice([0, 1, 64, 2**31]), 0]},
                {name.replace("0", "9999").replace("1", "12345"): shape},
                {name[: rng.randrange(len(name))]: shape},
                {name: shape, f"{name}.0.weight": [1, 1]},
            ]
            shapes |= rng.choice(new)
        path = hollow_file(tmp_path / "changed.safetensors", shapes)
        try:
            find_first_stage(path)
        except DarkroomError as error:
            assert "\n" not in str(error), error


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("\"act_fn\" is 'relu'", {"act_fn": "relu"}),
        ('unknown entry "latent_chanels" (did you mean "latent_channels"?)', {"latent_chanels": 4}),
        ("blocks of type 'DownBlock3D'", {"down_block_types": ["DownBlock3D"] * 4}),
        ("must mirror each other", {"down_block_types": ["AttnDownEncoderBlock2D"] + ["DownEncoderBlock2D"] * 3}),
        ('"block_out_channels" [96, 128, 512, 512] are no multiples', {"block_out_channels": [96, 128, 512, 512]}),
        ('"norm_num_groups" 48', {"norm_num_groups": 48}),
        ('"use_post_quant_conv" differ', {"use_post_quant_conv": False}),
        ('"latents_mean" and "latents_std" go together', {"latents_mean": [0.0] * 4}),
        ("\"scaling_factor\" is 'big'", {"scaling_factor": "big"}),
        ('"latent_channels" is 0', {"latent_channels": 0}),
        ("4 tensors missing", {"latent_channels": 4, "block_out_channels": [128, 256, 512, 256]}),
        ("of another shape", {"in_channels": 1}),
        ("holds 248 tensors, too few", {"layers_per_block": 1_000_000}),
    ],
)
def test_configs_of_diffusers_that_we_cannot_honour(words: str, changed: dict[str, Any], tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path / "vae", "diffusers-sd1-vae")
    config = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DarkroomError) as error:
        load(folder)
    assert words in str(error.value) and "\n" not in str(error.value), error.value


def test_a_vq_model_without_scaling_factor_has_the_papers_scale(tmp_path: Path) -> None:
    """The published VQModel folders have no such entry; diffusers' default of 0.18215 is that of Stable Diffusion."""
    _, state = golden("autoencoder_vq", "vq_f4")
    convert(write_checkpoint(tmp_path / "fs.ckpt", state), tmp_path / "vq", "diffusers")
    config = json.loads((tmp_path / "vq" / "config.json").read_text())
    assert config.pop("scaling_factor") == 1.0
    (tmp_path / "vq" / "config.json").write_text(json.dumps(config))
    assert float(load(tmp_path / "vq").scale) == 1.0


@pytest.mark.parametrize("to", ["darkroom", "compvis", "diffusers"])
def test_numbers_that_cannot_be_a_scale_are_refused_for_every_target(to: str, tmp_path: Path) -> None:
    place = tmp_path / ("out.safetensors" if to == "compvis" else "out")
    with pytest.raises(DarkroomError, match=r"the scale of the latents is 0.* a scale positive"):
        convert("emoji", place, to=to, shift=0.0, scale=0.0, first_stage=True)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("first_stage", [True, False])
def test_a_model_that_does_not_come_back_leaves_the_old_one(
    first_stage: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert("emoji", tmp_path / "out", first_stage=first_stage)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}

    def differs(*_: object) -> int:
        raise DarkroomError("encoder.conv_in.weight did not come back")

    monkeypatch.setattr("darkroom.exchange.count_equal" if first_stage else "darkroom.whole_models.count_same", differs)
    with pytest.raises(DarkroomError, match="did not come back"):
        convert("emoji", tmp_path / "out", scale=2.0, first_stage=first_stage)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
