"""The whole job on `shapes-tiny`: what it leaves behind, and that a killed run continues bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import darkroom
from darkroom.errors import DarkroomError
from darkroom.train_job import found_at, train
from darkroom.training.checkpoint import latest_checkpoint
from darkroom.training.recipe import read_recipe, recipe_names, resolve

SHORT = {"first_stage.train.steps": 12, "steps": 12, "first_stage.train.checkpoint_every": 5, "checkpoint_every": 5}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished shapes-tiny run, shared by the tests that only read it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train("shapes-tiny", folder, overrides=SHORT, quiet=True)
    return folder


def losses(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second")} for r in records]


def test_a_run_leaves_everything_behind(run: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "plan.json", "data.json", "summary.json", "report.html"):
        assert (run / name).is_file(), name
    assert (run / "samples" / "contact-sheet.png").is_file()
    assert (run / "samples" / "first_stage-000012.png").is_file()
    assert (run / "samples" / "denoiser-000012.png").is_file()
    stages = {r["stage"] for r in losses(run)}
    assert stages == {"first_stage", "denoiser"}
    model = darkroom.load(run / "model")
    assert model.first_stage is not None and float(model.first_stage.scale) != 1.0
    assert "memorise" in (run / "report.html").read_text()
    assert resolve(yaml.safe_load((run / "config.yaml").read_text())).steps == 12


def test_the_model_folder_generates_the_same_as_the_model_in_memory(run: Path, tmp_path: Path) -> None:
    model = darkroom.load(run / "model")
    one = model.generate("a red circle", seed=[1, 2], steps=3)
    model.save(tmp_path / "copy")
    two = darkroom.load(tmp_path / "copy").generate("a red circle", seed=[1, 2], steps=3)
    assert np.array_equal(one.images, two.images)
    live = darkroom.load(run / "model", weights="live").generate("a red circle", seed=[1, 2], steps=3)
    assert not np.array_equal(one.images, live.images)


def test_the_latents_are_normalised(run: Path) -> None:
    """Mean 0, standard deviation 1 over the training images, to the accuracy of one more posterior sample."""
    from darkroom.data.batches import collate
    from darkroom.data.sources import open_dataset

    recipe = resolve(yaml.safe_load((run / "config.yaml").read_text()))
    data = open_dataset(recipe.data, "train")
    first_stage = darkroom.load(run / "model").first_stage
    with torch.no_grad():
        posterior = first_stage.encode(collate([data[i] for i in range(len(data))])["image"])
    latents = posterior.sample(torch.Generator().manual_seed(5))
    assert abs(float(latents.mean())) < 0.02
    assert abs(float(latents.std()) - 1) < 0.02


COMMAND = """
import sys, torch
torch.set_num_threads(1)
from darkroom.train_job import train
train("shapes-tiny", sys.argv[1], resume=sys.argv[2] == "resume", quiet=True, overrides={overrides})
"""


@pytest.mark.parametrize("stage", ["first_stage", "denoiser"])
def test_kill_and_resume_is_bit_equal(tmp_path: Path, stage: str) -> None:
    """N steps at once, and k + (N - k) with a kill -9 between: same weights, optimiser, averages, losses."""
    overrides = SHORT | {"steps": 30, "first_stage.train.steps": 30} if stage == "denoiser" else SHORT | {"steps": 2}
    if stage == "first_stage":
        overrides |= {"first_stage.train.steps": 30}
    code = COMMAND.format(overrides=overrides)
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "whole"), "new"], check=True, timeout=300)
    broken = tmp_path / "broken"
    process = subprocess.Popen([sys.executable, "-c", code, str(broken), "new"])
    wanted = broken / "checkpoints" / stage
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        newest = latest_checkpoint(wanted) if wanted.is_dir() else None
        if newest is not None and int(newest.stem.split("-")[1]) >= 10:
            break
        if process.poll() is not None:
            break
        time.sleep(0.005)
    assert process.poll() is None, "the run ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed_at = int(latest_checkpoint(wanted).stem.split("-")[1])  # type: ignore[union-attr]
    assert killed_at < 30
    subprocess.run([sys.executable, "-c", code, str(broken), "resume"], check=True, timeout=300)
    for name in ("first_stage", "denoiser"):
        one, two = (load_file(latest_checkpoint(f / "checkpoints" / name)) for f in (tmp_path / "whole", broken))  # type: ignore[arg-type]
        assert one.keys() == two.keys()
        assert any(k.startswith("optimizer/") for k in one) and any(k.startswith("ema/") for k in one)
        different = [k for k in one if not torch.equal(one[k], two[k])]
        assert different == []
    assert losses(tmp_path / "whole") == losses(broken)


def test_interrupt_saves_and_says_how_to_continue(tmp_path: Path) -> None:
    code = COMMAND.format(overrides=SHORT | {"first_stage.train.steps": 5000}).replace("quiet=True", "quiet=False")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run"), "new"], stdout=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not metrics.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "--resume" in output
    last = losses(tmp_path / "run")[-1]["train_step"]
    saved = int(latest_checkpoint(tmp_path / "run" / "checkpoints" / "first_stage").stem.split("-")[1])  # type: ignore[union-attr]
    assert saved >= last > 0


def test_every_shipped_recipe_reads_strictly() -> None:
    names = recipe_names()
    assert {"shapes", "shapes-tiny", "shapes-demo", "emoji", "clothing", "auto-64", "auto-128"} <= names.keys()
    for path in names.values():
        resolve(read_recipe(path))


def images(folder: Path, count: int, size: int = 40) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


TINY = {
    "data.size": 32,
    "first_stage.train.steps": 2,
    "first_stage.train.batch_size": 4,
    "first_stage.train.autoencoder.channels": 8,
    "first_stage.train.autoencoder.channel_mult": [1, 1, 1],
    "steps": 2,
    "batch_size": 4,
    "denoiser.network.model_channels": 32,
    "denoiser.network.num_res_blocks": 1,
    "evaluate.samples": 2,
    "evaluate.steps": 2,
}


def test_a_folder_with_classes_trains_a_class_model(tmp_path: Path) -> None:
    images(tmp_path / "data" / "cats", 9)
    images(tmp_path / "data" / "dogs", 9)
    (tmp_path / "data" / "dogs" / "broken.png").write_bytes(b"not a picture")
    result = train(tmp_path / "data", tmp_path / "run", overrides=TINY, quiet=True)
    assert result.model is not None
    model = darkroom.load(result.model)
    assert model.generate(class_label="dogs", steps=2).images.shape == (1, 32, 32, 3)
    with pytest.raises(DarkroomError, match="'cats'"):
        model.generate(class_label="cat")
    assert "broken.png" in (tmp_path / "run" / "report.html").read_text()
    continued = train(
        tmp_path / "data",
        tmp_path / "more",
        init_from=result.model,
        overrides={"steps": 2, "batch_size": 4},
        quiet=True,
    )
    assert continued.summary["denoiser_steps"] == 2 and "first_stage_steps" not in continued.summary


def test_a_folder_with_captions_trains_a_text_model(tmp_path: Path) -> None:
    folder = images(tmp_path / "data", 10)
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}) for i in range(10)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    result = train(
        folder, tmp_path / "run", minutes=0.02, overrides={k: v for k, v in TINY.items() if k != "steps"}, quiet=True
    )
    model = darkroom.load(result.model)
    assert model.conditioner.fields == ("text",)
    assert result.summary["denoiser_steps"] >= 1


def test_dry_run_tells_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("shapes-tiny", tmp_path / "run", dry_run=True)
    output = capsys.readouterr().out
    assert "parameters" in output and "GiB" in output and " h)" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"source": "no-such-recipe"}, "no recipe"),
        ({"source": "shapes-tinny"}, "shapes-tiny"),
        ({"source": "shapes-tiny", "overrides": {"step": 5}}, 'did you mean "steps"'),
        ({"source": "shapes-tiny", "overrides": {"first_stage.name": "x"}}, "give one of them"),
        ({"source": "shapes-tiny", "overrides": {"denoiser.network.in_channels": 7}}, "7"),
        ({"source": "shapes-tiny", "overrides": {"first_stage.train.autoencoder.in_channels": 1}}, "make them equal"),
        ({"source": None}, "nothing to train on"),
        ({"source": None, "resume": True}, "no run to resume"),
        (
            {"source": "shapes-tiny", "first_stage": "missing-model", "overrides": {"first_stage.train": None}},
            "missing-model",
        ),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(DarkroomError) as error:
        train(output=tmp_path / "run", quiet=True, **arguments)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_used_folder_is_not_overwritten(run: Path) -> None:
    with pytest.raises(DarkroomError, match="--resume"):
        train("shapes-tiny", run, quiet=True)


def test_data_may_be_a_root_or_the_images_themselves(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.tar").write_bytes(b"")
    recipe = {"source": ["set/a.tar"], "validation": "set/b.tar", "size": 64}
    inside = found_at(recipe, str(tmp_path))
    assert inside["source"] == [str(tmp_path / "set" / "a.tar")] and inside["validation"] == str(
        tmp_path / "set" / "b.tar"
    )
    instead = found_at(recipe, str(tmp_path / "set"))
    assert instead == {"source": str(tmp_path / "set"), "size": 64}
