"""`darkroom train`, `data`, `info` and `doctor`."""

from __future__ import annotations

import json
import os
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from darkroom.build import build_first_stage
from darkroom.cli.train import parse_overrides, run_name
from darkroom.data.sources import DataConfig, ShapesDataset, open_dataset
from darkroom.errors import DarkroomError
from darkroom.model_io import load, save
from darkroom.safe_files import write_safetensors

# --- train


def test_train_hands_its_arguments_over(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def train(source: Any, output: Any, **options: Any) -> Any:
        calls.append((source, output, options))
        return SimpleNamespace(interrupted=source == "stopped")

    monkeypatch.setattr("darkroom.train_job.train", train)
    nothing = {"data": None, "seed": None, "resume": False, "init_from": None, "first_stage": None, "minutes": None}
    assert run("train", "pictures/")[0] == 0
    rest = {"dry_run": False, "overrides": {}, "device": "auto", "threads": None}
    assert calls.pop() == ("pictures/", Path("runs/pictures"), nothing | rest)
    assert run("train", "stopped")[0] == 130
    calls.clear()
    run(
        *("train", "shapes-tiny", "-o", "x", "--data", "d", "--seed", 3, "--resume", "--init-from", "m"),
        *("--first-stage", "f", "--minutes", 1.5, "--dry-run", "--set", "steps=60", "--set", "a.b=[1, x]"),
        *("--device", "cpu", "--threads", 2),
    )
    source, output, options = calls.pop()
    assert (source, output) == ("shapes-tiny", Path("x"))
    assert options == {
        **{"data": "d", "seed": 3, "resume": True, "init_from": "m", "first_stage": "f", "minutes": 1.5},
        **{"dry_run": True, "overrides": {"steps": 60, "a.b": [1, "x"]}, "device": "cpu", "threads": 2},
    }
    run("train", "--resume", "-o", "x")
    assert calls.pop()[0] is None


def test_train_details() -> None:
    assert run_name("a/shards-00.tar.gz") == "shards-00" and run_name("my recipe.yaml") == "my-recipe"
    assert parse_overrides(("a=", "b=null", "c=1e-4", "d=true", "e=x=y")) == {
        **{"a": None, "b": None, "c": "1e-4", "d": True, "e": "x=y"}
    }
    for bad in ("steps", "=3", "a=[1"):
        with pytest.raises(DarkroomError):
            parse_overrides((bad,))


def test_train_refuses_bad_input(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "typo.yaml").write_text("base: shapes-tiny\nstepz: 3\n")
    assert "nothing to train on" in refused("train")
    assert "nothing to train on" in refused("train", "--resume")
    assert "no recipe" in refused("train", "absent")
    assert "empty" in refused("train", "empty")
    assert '"steps"' in refused("train", "typo.yaml")
    assert '"steps"' in refused("train", "shapes-tiny", "--set", "stepz=3")
    assert "KEY=VALUE" in refused("train", "shapes-tiny", "--set", "steps")
    assert "--minutes" in refused("train", "shapes-tiny", "--minutes", 0)


# --- data


def photos(folder: Path) -> Path:
    """Two class folders; a 16-bit, a transparent, a turned, a broken and a repeated picture."""
    rng = np.random.default_rng(0)
    for name in ("boat", "car"):
        (folder / name).mkdir(parents=True)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / "boat" / f"{i}.png")
    (folder / "boat" / "0.txt").write_text("a small boat")
    deep = rng.integers(0, 4096, (64, 48)).astype(np.uint16)
    deep[0, 0], deep[0, 1] = 0, 4095
    Image.fromarray(deep).save(folder / "car" / "deep.png")
    Image.new("RGBA", (10, 10)).save(folder / "car" / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(folder / "car" / "turned.jpg", exif=exif)
    (folder / "car" / "broken.png").write_bytes((folder / "boat" / "0.png").read_bytes()[:200])
    (folder / "boat" / "again.png").write_bytes((folder / "boat" / "0.png").read_bytes())
    return folder


def test_inspect_folder(run: Any, tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    status, out, error = run("data", "inspect", "photos", "--size", "24x16", "--json")
    assert status == 0 and error == ""
    facts = json.loads(out)
    assert facts["pictures"] == 8 and facts["classes"] == {"boat": 5, "car": 3}
    assert facts["sizes"] == {
        **{"smallest": [10, 10], "largest": [48, 64], "most_common": [30, 20], "share_of_most_common": 5 / 8}
    }
    assert facts["values"] == [0, 4095] and facts["bits"] == {"8": 7, "16": 1}
    assert (facts["rotated_by_exif"], facts["transparent"], facts["duplicates"]) == (1, 1, 1)
    assert facts["captions"]["examples"] == ["a small boat"]
    assert len(facts["problems"]) == 1 and "broken.png" in facts["problems"][0][0]
    assert Image.open("contact-sheet.png").size[0] > 100
    out = run("data", "inspect", "photos", "--no-sheet")[1]
    assert "8 pictures" in out and "10x10 to 48x64" in out and "problems: 1" in out and "16-bit" in out


def test_inspect_refuses_bad_input(refused: Callable[..., str], run: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.tar").write_text("no tar")
    assert "no pictures" in refused("data", "inspect", "empty")
    assert "no such file" in refused("data", "inspect", "absent")
    assert "notes.tar" in refused("data", "inspect", "notes.tar")
    assert "--size" in refused("data", "inspect", "shapes", "--size", "12x")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("not a picture")
    status, out, error = run("data", "inspect", "bad")
    assert status == 2 and "problems: 1" in out and error.count("\n") == 1


@pytest.mark.parametrize("target", ["set.tar", "set"])
def test_build_shapes_can_be_read_back(run: Any, tmp_path: Path, target: str) -> None:
    arguments = ("--count", 12, "--size", "48x32", "--seed", 5)
    status, out, _ = run("data", "build", "shapes", "-o", f"out/{target}", *arguments)
    assert status == 0 and out.splitlines()[0] == f"out/{target}"
    drawn = ShapesDataset(DataConfig(source="shapes", size=(48, 32), count=12, seed=5), "train")
    read = open_dataset(DataConfig(source=f"out/{target}", size=(48, 32), validation=0.0))
    assert len(read) == 12 and read.captions() == drawn.captions()
    for i in range(12):
        ours, theirs = drawn[i], read[i]
        assert read.class_names[theirs["class_label"]] == drawn.class_names[ours["class_label"]]
        assert torch.equal(ours["image"], theirs["image"]) and torch.equal(ours["segmentation"], theirs["segmentation"])
        assert torch.allclose(ours["boxes"], theirs["boxes"], atol=1e-6)
    assert run("data", "inspect", f"out/{target}", "--no-sheet")[0] == 0
    if target == "set.tar":
        first = Path("out/set.tar").read_bytes()
        run("data", "build", "shapes", "-o", "out/set.tar", *arguments)
        assert Path("out/set.tar").read_bytes() == first
        with tarfile.open("out/set.tar") as shard:
            assert shard.getnames()[:2] == ["000000.png", "000000.txt"]
    assert list(tmp_path.rglob("*.tmp")) == []


def test_build_shapes_validation_split_is_another_one(run: Any) -> None:
    for split in ("train", "validation"):
        assert run("data", "build", "shapes", "-o", split, "-n", 20, "--split", split)[0] == 0
    captions = [[p.read_text() for p in sorted(Path(split).glob("*.txt"))] for split in ("train", "validation")]
    assert len(captions[1]) == 20 and captions[0] != captions[1]


def test_build_shapes_refuses_bad_input(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_text("x")
    (tmp_path / "mine" / "classes.json").write_text("{}")
    assert "holds other files" in refused("data", "build", "shapes", "-o", "mine")
    assert "names other classes" in refused("data", "build", "shapes", "-o", "mine/a.tar")
    assert "--output" in refused("data", "build", "shapes")
    assert "--size" in refused("data", "build", "shapes", "-o", "x", "--size", "big")
    assert "cannot be told apart" in refused("data", "build", "shapes", "-o", "x", "--size", "8")
    assert sorted(os.listdir()) == ["mine"] and len(os.listdir("mine")) == 2


# --- info


def test_info_of_models(run: Any, models: Path, tmp_path: Path) -> None:
    status, out, error = run("info", models / "class")
    assert status == 0 and error == ""
    assert "latent diffusion tiny" in out and "f 2, 3 latent channels" in out and "3 classes, boot, coat, shirt" in out
    assert "as they were saved" in out
    facts = json.loads(run("info", models / "class", "--json")[1])
    model = load(models / "class", device="cpu")
    assert facts["sha256"] == model.info["sha256"]
    counted = sum(tensor.numel() for tensor in model.state_dict().values())
    assert sum(part["parameters"] for part in facts["parts"].values()) == counted
    assert "first stage" in run("info", models / "fs")[1]

    model.save(tmp_path / "changed")
    weights = tmp_path / "changed" / "denoiser" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "CHANGED since it was saved: denoiser/model.safetensors" in run("info", "changed")[1]


SMALL = {"channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "z_channels": 3, "embed_dim": 3}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"kind": "identity", "channels": 2}, "first stage: identity, 2 channels, "),
        (SMALL | {"codebook_size": 9}, "first stage: VQ with 9 codes, f 2, 3 latent channels, "),
        (SMALL, "first stage: KL, f 2, 3 latent channels, "),
    ],
)
def test_info_says_the_kind_of_first_stage(run: Any, tmp_path: Path, config: dict[str, Any], words: str) -> None:
    save(build_first_stage(config), tmp_path / "fs")
    assert words in run("info", "fs")[1]
    file = tmp_path / "fs" / "first_stage" / "config.json"
    file.write_text(json.dumps(config))  # as older versions wrote it, or by hand
    assert words in run("info", "fs")[1]


def test_info_of_files(run: Any, refused: Callable[..., str], models: Path, tmp_path: Path) -> None:
    names = {"model.diffusion_model.a": torch.ones(2, 3), "first_stage_model.b": torch.ones(4).half()}
    write_safetensors(tmp_path / "sd.safetensors", names, {"format": "pt"})
    torch.save({"state_dict": names, "global_step": 3}, tmp_path / "sd.ckpt")
    for name in ("sd.safetensors", "sd.ckpt"):
        out = run("info", name)[1]
        assert "latent diffusion checkpoint of the paper's code with its first stage" in out
        assert "2 tensors, 10 numbers" in out
        assert json.loads(run("info", name, "--json")[1])["tensors"]["model.diffusion_model.a"] == [2, 3]
    assert "without running anything" in run("info", "sd.ckpt")[1]
    assert "the denoiser of a Darkroom model" in run("info", models / "text" / "denoiser" / "model.safetensors")[1]
    run("generate", "a fox", "-m", models / "text", "--seed", 7, "-o", "a.png")
    out = run("info", "a.png")[1]
    assert "Prompt: a fox" in out and "Seed: 7" in out and "darkroom generate --from a.png" in out
    Image.new("RGB", (4, 5)).save("plain.jpg")
    assert "size: 4x5" in run("info", "plain.jpg")[1]
    (tmp_path / "notes.txt").write_text("x")
    assert "neither an image nor a model" in refused("info", "notes.txt")
    assert "no such file" in refused("info", "absent")
    (tmp_path / "empty").mkdir()
    assert "empty folder" in refused("info", "empty")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "sd.safetensors").read_bytes()[:-1])
    assert "truncated" in refused("info", "cut.safetensors")
    (tmp_path / "huge.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    assert "not a safetensors file" in refused("info", "huge.safetensors")


# --- doctor


def test_doctor(run: Any, models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("darkroom.model_folder", "darkroom.model_io"):
        monkeypatch.setattr(f"{module}.BUNDLED", tmp_path / "bundled")
    monkeypatch.setattr("darkroom.cli.doctor.LOW_DISK_GB", 0.0)
    load(models / "text").save(tmp_path / "bundled" / "emoji")
    status, out, error = run("doctor")
    assert status == 0 and error == "" and "GFLOP/s" in out and "emoji" in out and "All is well." in out
    (tmp_path / "bundled" / "emoji" / "denoiser" / "config.json").write_text("{}")
    monkeypatch.setattr("darkroom.cli.doctor.LOW_DISK_GB", 1e9)
    status, out, _ = run("doctor", "--json")
    problems = json.loads(out)["problems"]
    assert status == 1 and any("emoji" in problem for problem in problems) and any("GB are free" in p for p in problems)
