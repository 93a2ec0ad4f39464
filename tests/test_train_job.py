"""The whole job on `shapes-tiny`: what it leaves behind, and that a killed run continues bit for bit."""

from __future__ import annotations

import json
import os
import shutil
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
from darkroom.data.latent_cache import LatentCache
from darkroom.data.sources import open_dataset
from darkroom.errors import DarkroomError
from darkroom.first_stage.identity import IdentityAutoencoder
from darkroom.plan import Planner, describe_plan, fit_minutes
from darkroom.recipe_source import found_at, new_recipe
from darkroom.train_job import Job, train
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
    "denoiser.network.num_head_channels": 16,
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
    with Image.open(tmp_path / "run" / "samples" / "denoiser-000002.png") as grid:
        assert json.loads(grid.info["captions"]) == ["cats", "dogs"]
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


def test_a_run_from_a_model_is_resumed_with_that_models_tokenizer(tmp_path: Path) -> None:
    """The tokenizer of the model that a run began with is not that of the run's own captions."""

    def captioned(name: str, noun: str) -> Path:
        folder = images(tmp_path / name, 10)
        rows = [json.dumps({"file_name": f"{i}.png", "text": f"{noun} {noun} {i}"}) for i in range(10)]
        (folder / "metadata.jsonl").write_text("\n".join(rows))
        return folder

    first = train(captioned("one", "snail"), tmp_path / "first", overrides=TINY, quiet=True)
    tokenizers = []
    for folder in (tmp_path / "whole", tmp_path / "parts"):
        steps = 4 if folder.name == "whole" else 2
        overrides = {"steps": steps, "batch_size": 4, "data.size": 32, "optimizer.decay": "constant"}
        overrides["optimizer.warmup_steps"] = 0
        train(tmp_path / "two" if tokenizers else captioned("two", "zebra"), folder, init_from=first.model,
              overrides=overrides, quiet=True)  # fmt: skip
        tokenizers.append((folder / "conditioner.json").read_text())
    assert tokenizers[0] == tokenizers[1] and "snail" in tokenizers[0] and "zebra" not in tokenizers[0]
    recipe = resolve(yaml.safe_load((tmp_path / "parts" / "config.yaml").read_text()))
    assert recipe.init_from == str(first.model)
    shutil.rmtree(tmp_path / "first" / "model" / "denoiser")  # a run that has begun does not need it any more
    shutil.copytree(tmp_path / "first" / "first_stage", tmp_path / "kept")
    resumed = train(
        None,
        tmp_path / "parts",
        resume=True,
        overrides={"steps": 4, "first_stage.path": str(tmp_path / "kept")},
        quiet=True,
    )
    assert resumed.summary["denoiser_steps"] == 4
    one, two = (load_file(tmp_path / f / "model" / "denoiser" / "model.safetensors") for f in ("whole", "parts"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_resumed_run_still_tells_how_its_first_stage_went(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model")
    before = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").unlink()  # a killed run has none
    summary = train(None, copy, resume=True, quiet=True).summary
    for key in ("first_stage_steps", "first_stage_psnr", "first_stage_loss", "first_stage_seconds"):
        assert summary[key] == pytest.approx(before[key], rel=1e-3), key
    assert summary["denoiser_validation_loss"] == before["denoiser_validation_loss"]
    one, two = (load_file(f / "model" / "denoiser" / "model.safetensors") for f in (run, copy))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_ctrl_c_between_the_stages_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    overrides = SHORT | {"first_stage.train.steps": 2, "steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr(LatentCache, "build", interrupted)
        result = train("shapes-tiny", tmp_path / "run", overrides=overrides)
    assert result.interrupted and "--resume" in capsys.readouterr().out
    finished = train(None, tmp_path / "run", resume=True, quiet=True)
    assert not finished.interrupted and finished.summary["first_stage_steps"] == 2


def test_a_seed_is_that_of_both_stages_and_a_run_keeps_it(run: Path, tmp_path: Path) -> None:
    recipe, _ = new_recipe("shapes-tiny", seed=7)
    assert recipe.seed == 7 and recipe.first_stage.train is not None and recipe.first_stage.train.seed == 7
    with pytest.raises(DarkroomError, match="keeps its seed"):
        train(None, run, seed=8, resume=True, quiet=True)


def test_a_first_stage_alone_stays_alone_in_a_time_budget(run: Path) -> None:
    """Also when it starts from a model, whose weights come frozen."""
    settings = read_recipe(recipe_names()["shapes-decoder"])
    overrides = {"first_stage.train.init_from": str(run / "first_stage"), "data.size": 32, "data.count": 16}
    recipe = resolve(settings, overrides | {"first_stage.train.batch_size": 2})
    plan = Planner(recipe, open_dataset(recipe.data), torch.device("cpu")).plan(measure=True)
    assert plan.denoiser is None and plan.conditioning is None and plan.first_stage is not None
    fitted = fit_minutes(recipe, plan, 1.0)
    assert fitted.steps == 0 and fitted.first_stage.train is not None
    assert fitted.first_stage.train.steps == int(60 / plan.first_stage.seconds_per_step)  # type: ignore[operator]
    assert "denoiser" not in describe_plan(plan)


def test_the_saved_config_holds_the_widths_that_followed(run: Path) -> None:
    network = yaml.safe_load((run / "config.yaml").read_text())["denoiser"]["network"]
    assert network["context_dim"] == 32 and network["use_spatial_transformer"] is True


def test_pictures_that_cannot_be_read_are_listed_also_when_found_late(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    recipe = resolve(read_recipe(copy / "config.yaml"))
    job = Job(recipe, copy, device="cpu", quiet=True)
    job.data.problems.append(("late.png", "truncated"))
    assert job.describe_data() == 1
    again = Job(recipe, copy, device="cpu", quiet=True)
    assert again.describe_data() == 1
    assert json.loads((copy / "data.json").read_text())["problems"] == [["late.png", "truncated"]]


def test_a_model_of_pixels_trains_and_generates(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from darkroom.cli.main import main

    overrides = {"first_stage.train": None, "steps": 3, "evaluate.samples": 2}
    folder = train("shapes-tiny", tmp_path / "run", overrides=overrides, quiet=True).model
    assert folder is not None
    first_stage = darkroom.load(folder).first_stage
    assert isinstance(first_stage.autoencoder, IdentityAutoencoder) and first_stage.downsampling == 1
    assert float(first_stage.shift) == 0 and float(first_stage.scale) == 1
    assert json.loads((folder / "first_stage" / "config.json").read_text())["kind"] == "identity"
    arguments = ["generate", "a red circle", "-m", str(folder), "--steps", "2", "-o", str(tmp_path / "a.png")]
    assert main(arguments) == 0, capfd.readouterr().err
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (32, 32) and image.mode == "RGB"
    assert main(["info", str(folder)]) == 0
    assert "first stage: identity, 3 channels" in capfd.readouterr().out


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    """As torchrun starts them: both stages run and one folder is written."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "darkroom", "train", "shapes-tiny", "-o", str(folder)]
    for key, value in {"steps": 4, "first_stage.train.steps": 4, "data.count": 32, "batch_size": 4}.items():
        command += ["--set", f"{key}={value}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((folder / "summary.json").read_text())["processes"] == 2
    assert [r["images_seen"] for r in losses(folder) if r["stage"] == "denoiser"][-1] == 4 * 4 * 2
    assert darkroom.load(folder / "model").generate("a red circle", steps=2).images.shape == (1, 32, 32, 3)


def test_overrides_of_what_a_model_brings_are_refused(run: Path, tmp_path: Path) -> None:
    overrides = {"conditioner.text.drop_rate": 0.5}
    with pytest.raises(DarkroomError, match=r'leave out --set "conditioner.text.drop_rate"'):
        train("shapes-tiny", tmp_path / "new", init_from=run / "model", overrides=overrides, quiet=True)


def test_a_dry_run_does_not_mind_an_old_run(run: Path) -> None:
    with pytest.raises(DarkroomError, match='did you mean "steps"'):  # and mistakes are named first
        train("shapes-tiny", run, overrides={"step": 3}, quiet=True)
    with pytest.raises(DarkroomError, match="already holds a run"):
        train("shapes-tiny", run, quiet=True)
    assert "plan" in train("shapes-tiny", run, dry_run=True, quiet=True).summary


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
        ({"source": "nope/"}, "no such file or folder"),
        ({"source": "shapes-tiny", "overrides": {"step": 5}}, 'did you mean "steps"'),
        ({"source": "shapes-tiny", "overrides": {"first_stage.name": "x"}}, "give one of them"),
        ({"source": "shapes-tiny", "overrides": {"denoiser.network.in_channels": 7}}, "7"),
        ({"source": "shapes-tiny", "overrides": {"first_stage.train.autoencoder.in_channels": 1}}, "make them equal"),
        ({"source": "shapes-tiny", "overrides": {"denoiser.network.context_dim": 7}}, "7 in the recipe but 32"),
        ({"source": "shapes-tiny", "overrides": {"data.size": 50}}, "multiples of 8, for example 48x48"),
        ({"source": "shapes-tiny", "overrides": {"first_stage.train.objective.crop": 30}}, "multiple of 4"),
        ({"source": "shapes-tiny", "overrides": {"evaluate.solver": "dim"}}, 'did you mean "ddim"'),
        ({"source": "shapes-tiny", "overrides": {"evaluate.samples": 0}}, "at least 1"),
        ({"source": "shapes-tiny", "overrides": {"validate_every": 0}}, '"validate_every" is 0'),
        ({"source": "shapes-tiny", "overrides": {"first_stage": 3}, "seed": 1}, "first_stage: expected a mapping"),
        ({"source": "shapes-tiny", "overrides": {"data": 5}}, "expected a mapping"),
        ({"source": "shapes-tiny", "minutes": 0.001, "overrides": {"steps": 10**6}}, "leaves nothing"),
        ({"source": "shapes-tiny", "first_stage": "emoji", "init_from": "emoji"}, "leave out --first-stage"),
        ({"source": "shapes-tiny", "overrides": {"conditioner.text.field": "words"}}, "'words'"),
        ({"source": "shapes-tiny", "overrides": {"objective.loss_weighting": "vlb"}}, "vlb"),
        ({"source": None}, "nothing to train on"),
        ({"source": "shapes-tiny", "overrides": {"steps": 0, "first_stage.train": None}}, "nothing to do"),
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


def test_moved_files_are_found_by_name(tmp_path: Path) -> None:
    """The recipe that a run saved names absolute files."""
    recipe = {"source": ["/gone/set/a.tar"], "validation": "/gone/set/b.tar"}
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.tar").touch()
    expected = {"source": [str(tmp_path / "set" / "a.tar")], "validation": str(tmp_path / "set" / "b.tar")}
    assert found_at(recipe, str(tmp_path / "set")) == expected
    (tmp_path / "set" / "b.tar").touch()
    assert found_at(recipe, str(tmp_path)) == expected


def test_a_run_goes_on_when_its_images_have_moved(tmp_path: Path) -> None:
    images(tmp_path / "data", 9)
    train(tmp_path / "data", tmp_path / "run", overrides=TINY, quiet=True)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    with pytest.raises(DarkroomError, match="data"):
        train(None, tmp_path / "run", resume=True, quiet=True)
    more = {"steps": 3}
    result = train(None, tmp_path / "run", data=tmp_path / "elsewhere", resume=True, overrides=more, quiet=True)
    assert result.summary["denoiser_steps"] == 3


def test_a_first_stage_alone_and_its_decoder_only(run: Path, tmp_path: Path) -> None:
    """`steps: 0` ends with a first stage; tuning its decoder alone leaves every latent as it was."""
    overrides = {
        "steps": 0,
        "first_stage.train.steps": 3,
        "first_stage.train.init_from": str(run / "model"),
        "first_stage.train.objective.train_encoder": False,
        "first_stage.train.objective.decoder_noise": 0.2,
    }
    result = train("shapes-tiny", tmp_path / "decoder", overrides=overrides, quiet=True)
    tuned, model = darkroom.load(result.model).first_stage, darkroom.load(run / "model")  # the whole model goes on
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        before, after = model.first_stage.encode(image), tuned.encode(image)
        assert torch.equal(before.mean, after.mean) and torch.equal(before.logvar, after.logvar)
        latent = before.mode()
        assert not torch.equal(model.first_stage.decode(latent), tuned.decode(latent))
    model.first_stage = tuned
    assert model.generate("a red circle", steps=2).images.shape == (1, 32, 32, 3)


def test_crops_end_where_the_recipe_says(tmp_path: Path) -> None:
    from darkroom.build import build_first_stage
    from darkroom.training.first_stage_step import FirstStageStep, FirstStageTrainConfig

    first_stage = build_first_stage({"channels": 8, "channel_mult": [1, 1], "num_res_blocks": 1})
    config = FirstStageTrainConfig(crop=8, crop_steps=1, discriminator_weight=0.0, perceptual="none")
    phase = FirstStageStep(first_stage.autoencoder, config).phases[0]
    seen: list[tuple[int, ...]] = []
    first_stage.autoencoder.encoder.register_forward_hook(lambda _m, inputs, _o: seen.append(tuple(inputs[0].shape)))
    for step in (0, 1):
        phase.module({"image": torch.zeros(2, 3, 16, 16)}, torch.Generator().manual_seed(0), step)
    assert seen == [(2, 3, 8, 8), (2, 3, 16, 16)]


def test_a_plan_fits_its_minutes() -> None:
    """Twice the minutes are twice the steps, and the parts of the first stage keep their share of it."""
    from dataclasses import replace

    from darkroom.plan import Plan, StagePlan, with_times

    recipe = resolve(read_recipe(recipe_names()["auto-128"]))
    assert recipe.first_stage.train is not None
    stages = StagePlan(1, 1, 1, 0.5, 1.0), StagePlan(1, 1, 1, 0.25, 1.0)
    plan = Plan("x", 10, (128, 128), 3, 8, 4, [], *stages)
    one, two = (fit_minutes(recipe, plan, minutes) for minutes in (10, 20))
    for fitted, minutes in ((one, 10), (two, 20)):  # with validation and samples on the way, and at the end
        evaluate, images = fitted.evaluate, 3 * fitted.batch_size * fitted.accumulation
        validation, samples = 256 / images, evaluate.samples * evaluate.steps * 2 / images
        assert evaluate.guidance_scale != 1
        looks = validation * (fitted.steps / fitted.validate_every + 1) + samples * (
            fitted.steps / fitted.sample_every + 1
        )
        assert 0 <= minutes * 60 * 0.65 / 0.25 - (fitted.steps + looks) < 2
        assert validation / fitted.validate_every <= 0.05 and samples / fitted.sample_every <= 0.05
    assert two.steps > 1.9 * one.steps
    first, second = one.first_stage.train, two.first_stage.train
    assert first is not None and second is not None and second.steps == 2 * first.steps
    half = fit_minutes(recipe, plan, 10, fixed={"steps": 600})  # recipe.steps of 0.25 s were planned as one step
    assert half.steps == recipe.steps and half.first_stage.train is not None
    assert half.first_stage.train.steps == int((10 * 60 - 0.25) / 0.5)
    with pytest.raises(DarkroomError, match="leaves nothing"):
        fit_minutes(recipe, plan, 0.001, fixed={"steps"})
    both = {"steps", "first_stage.train.steps"}
    assert fit_minutes(recipe, plan, 0.001, fixed=both) == recipe  # nothing is left to choose
    given = replace(recipe, first_stage=replace(recipe.first_stage, train=None, name="emoji"))
    assert fit_minutes(given, replace(plan, first_stage=None), 0.001, fixed={"steps"}) == given
    rest = fit_minutes(recipe, plan, 10, fixed={"first_stage.train.steps": 1})
    assert rest.first_stage == recipe.first_stage and 1.5 < rest.steps / one.steps < 1.6
    share = recipe.first_stage.train.objective.discriminator_start / recipe.first_stage.train.steps
    assert first.objective.discriminator_start / first.steps == pytest.approx(share, rel=0.01)
    timed = with_times(replace(plan, denoiser=StagePlan(7, 1, 1)), plan)
    assert timed.denoiser == StagePlan(7, 1, 1, 0.25, 1.0) and timed.first_stage == stages[0]
