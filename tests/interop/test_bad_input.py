"""What people give by mistake: one line that names the input, the problem and the cure, and status 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import kohya, low_rank
from official_files import golden, write_checkpoint
from torch import Tensor

from darkroom.cli.main import main
from darkroom.errors import DarkroomError, DarkroomWarning
from darkroom.exchange import convert
from darkroom.model_io import load, save
from darkroom.safe_files import write_safetensors

Refused = Callable[..., str]


@cache
def state() -> dict[str, Tensor]:
    return golden("latent_diffusion_tiny", "tiny_cin")[1]


@pytest.fixture(scope="module")
def cin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cin") / "cin.ckpt", state())


@pytest.mark.parametrize(
    ("content", "cure"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "run `git lfs pull`"),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>\n", "download the file itself"),
        (b"weights of my model\n" * 9, "it holds text; give a weight file"),
        (b"hi\n", "give a weight file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(90), "it is a picture; give a weight file"),
        (bytes(range(200, 256)) * 3, "copy or download it again"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_files_that_are_no_weights(content: bytes, cure: str, suffix: str, tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    for command in (("info", path), ("convert", path, tmp_path / "out"), ("generate", "-m", path, "a fox")):
        words = refused(*command)
        assert str(path) in words and cure in words


def test_weights_by_another_name(cin: Path, tmp_path: Path, refused: Refused) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"weight": torch.ones(1)})
    (tmp_path / "a.safetensors").rename(tmp_path / "a.ckpt")
    (tmp_path / "b.safetensors").write_bytes(cin.read_bytes())
    for name, cure in (("a.ckpt", "ends in .safetensors"), ("b.safetensors", "ends in .ckpt")):
        for command in (("info", tmp_path / name), ("convert", tmp_path / name, tmp_path / "out")):
            words = refused(*command)
            assert "file by another name: " in words if name == "a.ckpt" else "it is a zip file" in words
            assert cure in words
    (tmp_path / "a.ckpt").rename(tmp_path / "a.jpg")
    assert "neither an image nor a model: it is a safetensors file" in refused("info", tmp_path / "a.jpg")


def test_folders_that_are_no_models(cin: Path, tmp_path: Path, refused: Refused) -> None:
    place = tmp_path / "place"
    (place / "notes").mkdir(parents=True)

    def words() -> str:
        lines = {refused("info", place), refused("convert", place, tmp_path / "out"), refused("generate", "-m", place)}
        (line,) = lines
        assert str(place) in line and "holds no darkroom.json and no model_index.json" in line
        return line

    assert "give a folder with one of these, or a weight file" in words()
    write_safetensors(place / "model.safetensors", {"weight": torch.ones(1)})
    assert f"it holds model.safetensors: give {place / 'model.safetensors'}" in words()
    convert(cin, place / "inner")
    assert f"give {place / 'inner'}" in words()
    (place / "unet").mkdir()
    (place / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    assert "(unet) are those of a diffusers pipeline, so fetch model_index.json too" in words()


@pytest.mark.parametrize(
    ("names", "cure"),
    [
        (["lora_unet_down_blocks_0_attentions_0.lora_up.weight"], "this file with --lora"),
        (["emb_params"], "this file with --embedding"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "--set text_towers=FILE"),
        (["down_blocks.0.resnets.0.conv1.weight"], "give the folder that holds it"),
        (["network.out.2.weight"], "give the whole folder"),
        (["joint_blocks.0.x"], "give the whole checkpoint"),
        (["module/a"], "give the run folder"),
        (["a"], "give a whole checkpoint, a first stage"),
    ],
)
def test_weight_files_that_are_no_models(names: list[str], cure: str, tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "file.safetensors"
    write_safetensors(path, dict.fromkeys(names, torch.ones(2, 2)))
    for command in (("convert", path, tmp_path / "out"), ("generate", "-m", path, "a fox")):
        words = refused(*command)
        assert str(path) in words and "cannot load by itself" in words and cure in words


def test_models_given_as_adapters(cin: Path, tmp_path: Path, refused: Refused) -> None:
    for flag in ("--lora", "--embedding"):
        words = refused("generate", "-m", cin, "--class", "1", flag, cin)
        assert "neither a LoRA nor a learned word; give it as the model (-m)" in words and str(cin) in words
    convert(cin, tmp_path / "ours")
    assert "ours is a whole model, neither" in refused("generate", "-m", cin, "--lora", tmp_path / "ours")
    (tmp_path / "empty").mkdir()
    assert "a folder without a LoRA" in refused("generate", "-m", cin, "--lora", tmp_path / "empty")
    lora = kohya(tmp_path / "lora.safetensors", low_rank({"x": (2, 2)}), "lora_unet_", 1.0)
    assert "was made for another model: 1 of its 1 layers" in refused("generate", "-m", cin, "--lora", lora)
    write_safetensors(tmp_path / "unet.safetensors", {"down_blocks.0.resnets.0.conv1.weight": torch.ones(2)})
    words = refused("generate", "-m", cin, "--lora", tmp_path / "unet.safetensors")
    assert "a diffusers denoiser, neither" in words and "give the file of the LoRA or of the word" in words


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("prediction", "write it as KEY=VALUE, for example --set prediction=v"),
        ("prediction=", "prediction= cannot be; it is one of epsilon, v, x0"),
        ("prediction=vv", "prediction=vv cannot be; it is one of"),
        ("prediction=edm", "has a schedule of the kind ldm; give"),
        ("num_heads=abc", "num_heads=abc cannot be; it is a whole number of at least 1"),
        ("num_heads=-1", "num_heads=-1 cannot be"),
        ("num_heads=7", "64 channels cannot be split into heads"),
        ("num_head_channels=1.5", "num_head_channels=1.5 cannot be"),
        ("flow_shift=2", "flow_shift=2 cannot be, which is about flows, and"),
        ("flow_shift=no", "flow_shift=False cannot be; it is a positive number"),
        ("zero_terminal_snr=maybe", "zero_terminal_snr=maybe cannot be; it is true or false"),
        ("zero_terminal_snr=true", "is undefined on a schedule that ends in pure noise"),
        ("learned_variance=true", "would have 3 channels of output twice, and it has 3; leave it out"),
        ("scale=abc", "scale=abc is no number"),
        ("scale=-1", "must be finite, and a scale positive"),
        ("scale=", "scale= is no number"),
        ("conditioner.label.foo=3", 'has no condition "label.foo" (known: class)'),
        ("conditioner.class.foo=3", 'unknown key "conditioner.class.foo"'),
        ("conditioner.class=3", "set an entry of it: conditioner.class.OPTION=VALUE"),
        ("conditioner=3", "has no condition of no name (known: class)"),
        ("denoiser=3", "set an entry of it: denoiser.OPTION=VALUE"),
        ("denoiser.foo=3", 'unknown key "denoiser.foo"'),
        ("denoiser.network=3", "denoiser.network: expected a mapping of settings"),
        ("first_stage.foo=3", 'unknown key "first_stage.foo"'),
        ("predicton=v", '"predicton" is no fact of a model (did you mean "prediction"?)'),
    ],
)
def test_facts_that_cannot_be(given: str, words: str, cin: Path, tmp_path: Path, refused: Refused) -> None:
    assert words in refused("convert", cin, tmp_path / "out", "--set", given)
    assert list(tmp_path.iterdir()) == []


def test_facts_of_parts_that_are_not_there(tmp_path: Path, refused: Refused) -> None:
    from paper_models import on_meta
    from test_published_layouts import FAMILIES, published_file

    family = next(family for family in FAMILIES if family.name == "dit")
    parts = dict(zip(("first_stage", "denoiser", "conditioner"), on_meta(family.recipe), strict=True))
    path, _ = published_file(tmp_path, family, parts)
    for given, words in (
        ("scale=2", "holds no first stage, whose scale could be set"),
        ("first_stage.channels=2", "holds no first stage, of which first_stage.channels could be set"),
        ("learned_variance=false", "would have 4 channels of output once, and it has 8"),
    ):
        assert words in refused("convert", path, tmp_path / "out", "--set", given)


def test_one_kind_of_weights_is_said(cin: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    live = {name: tensor for name, tensor in state().items() if not name.startswith("model_ema.")}
    path = write_checkpoint(tmp_path / "live.ckpt", live)
    for place, source, weights, is_said in (
        ("a", path, "ema", True),
        ("b", path, "live", True),
        ("c", path, None, False),
        ("d", cin, "live", False),
    ):
        given = [] if weights is None else ["--weights", weights]
        assert main(["convert", str(source), str(tmp_path / place), *given]) == 0
        assert ("the source has one kind" in capfd.readouterr().out) == is_said
    first = ["convert", str(path), str(tmp_path / "e"), "--first-stage", "--weights", "live"]
    assert main(first) == 0 and "the source has one kind" in capfd.readouterr().out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_told(
    value: float, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    name = "model.diffusion_model.out.2.weight"
    averaged = "model_ema." + name.removeprefix("model.").replace(".", "")
    spoilt = {key: tensor.clone() for key, tensor in state().items()}
    for key in (name, averaged):
        spoilt[key].view(-1)[5] = value
    path = write_checkpoint(tmp_path / "spoilt.ckpt", spoilt)
    with pytest.warns(DarkroomWarning, match=r"NaN or infinity in 1 tensor \(model_ema\.diffusion_modelout2weight\)"):
        model = load(path, device="cpu")
    assert main(["convert", str(path), str(tmp_path / "ours")]) == 0  # bit for bit all the same
    captured = capfd.readouterr()
    assert "in 2 tensors" in captured.err and captured.err.startswith("darkroom: note: ") and "warn" not in captured.err
    with pytest.warns(DarkroomWarning, match="NaN or infinity in 1 tensor"):
        load(tmp_path / "ours", device="cpu")
    first = {f"first_stage_model.{n}": t for n, t in model.first_stage.autoencoder.state_dict().items()}  # type: ignore[union-attr]
    first["first_stage_model.decoder.conv_in.bias"] = torch.full_like(
        first["first_stage_model.decoder.conv_in.bias"], value
    )
    write_safetensors(tmp_path / "stage.safetensors", first)
    with pytest.warns(DarkroomWarning, match=r"decoder\.conv_in\.bias"):
        load(tmp_path / "stage.safetensors", device="cpu")
    recwarn.clear()
    large = {key: tensor * 0 + 3e38 if key == name else tensor for key, tensor in state().items()}
    load(write_checkpoint(tmp_path / "large.ckpt", large), "live", "cpu")  # whose sum alone is not finite
    assert not [w for w in recwarn if issubclass(w.category, DarkroomWarning)]


@pytest.mark.parametrize(
    ("defaults", "words"),
    [
        ([1], "defaults: expected a mapping"),
        ({"size": "abc"}, "defaults.size"),
        ({"size": [64, 10**9]}, "the default size is 1000000000; it is 1 to 16384"),
        ({"steps": 0}, "the default steps is 0; it is 1 to 10000"),
        ({"steps": "many"}, 'defaults.steps" is a whole number'),
        ({"batch_size": -1}, "the default batch_size is -1"),
        ({"guidance_scale": 1e400}, "the default guidance_scale is inf"),
        ({"prompts": ["x"]}, 'unknown key "'),
    ],
)
def test_defaults_in_an_index_are_checked(
    defaults: Any, words: str, cin: Path, tmp_path: Path, refused: Refused
) -> None:
    convert(cin, tmp_path / "ours")
    index = tmp_path / "ours" / "darkroom.json"
    content = json.loads(index.read_text())
    content["info"]["defaults"] = defaults
    index.write_text(json.dumps(content))
    said = refused("generate", "-m", tmp_path / "ours", "--class", "1")
    assert words in said and str(index) in said


def test_a_missing_vocabulary_says_where_it_goes(tmp_path: Path, refused: Refused) -> None:
    path = write_checkpoint(tmp_path / "t.ckpt", golden("latent_diffusion_tiny", "tiny_text2img")[1])
    words = refused("generate", "-m", path, "a fox", "--steps", "1", "-o", tmp_path / "o.png")
    assert "vocab.txt" in words and "into a folder bert/" in words and "DARKROOM_VOCABULARIES" in words


def test_parts_alone_cannot_generate(cin: Path, tmp_path: Path, refused: Refused) -> None:
    convert(cin, tmp_path / "stage", first_stage=True)
    words = refused("generate", "-m", tmp_path / "stage", "-o", tmp_path / "o.png")
    assert "is a first stage only" in words and "give a whole model" in words


def test_classes_without_names_are_told_by_number(cin: Path, tmp_path: Path, refused: Refused) -> None:
    words = refused("generate", "-m", cin, "--class", "fox", "-o", tmp_path / "o.png")
    assert "unknown class 'fox'; this model knows its classes by number alone, 0 to 9" in words


def test_merged_adapters_stay_known(cin: Path, tmp_path: Path) -> None:
    """On the way through every layout."""
    model = load(cin, device="cpu")
    model.info["merged_adapters"] = [{"kind": "lora", "name": "ink.safetensors", "weight": 0.5}]
    place = save(model, tmp_path / "ours")
    for target, to in (("one.safetensors", "compvis"), ("theirs", "diffusers"), ("again", "darkroom")):
        convert(place, tmp_path / target, to)
        place = tmp_path / target
        loaded = load(place, device="cpu")
        assert loaded.info["merged_adapters"] == model.info["merged_adapters"], to  # type: ignore[union-attr]


def test_stated_classes_are_compared_with_the_weights(theirs: Path, tmp_path: Path) -> None:
    """Before a name is made for each, or a table of positions."""
    import shutil

    shutil.copytree(theirs / "dit", tmp_path / "dit")
    place = tmp_path / "dit" / "transformer" / "config.json"
    config = json.loads(place.read_text())
    for change, words in (
        ({"num_embeds_ada_norm": 10**9}, "states num_embeds_ada_norm 1,000,000,000, and no tensor"),
        ({"sample_size": 10**6}, "larger than all its weights"),
        ({"attention_head_dim": 10**9}, "larger than all its weights"),
    ):
        place.write_text(json.dumps(config | change))
        with pytest.raises(DarkroomError, match=words):
            load(tmp_path / "dit", device="cpu")
