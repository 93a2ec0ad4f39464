"""`darkroom eval MODEL DATA`: what it prints and writes, that it goes on, repeats and compares, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extractor_stand_in import quick_extractor
from PIL import Image
from tiny_models import CLASSES

from darkroom.errors import DarkroomError
from darkroom.evaluation.picture_sources import GeneratedPictures
from darkroom.evaluation.protocol import Record, read_record

Run = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "darkroom.scoring.open_extractor", lambda name, device: quick_extractor(has_classes=name == "classes")
    )


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A set with classes, captions, and parts for training and validation; and `flat`, images alone."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 5), ("val", 4)):
        for name in CLASSES:
            folder = tmp_path / "clothes" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                coarse = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((16, 16), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
                (folder / f"{i}.txt").write_text("a red fox")
    (tmp_path / "flat").mkdir()
    for i in range(6):
        Image.new("RGB", (16, 16), (40 * i, 10, 200)).save(tmp_path / "flat" / f"{i}.png")
    return tmp_path


def record_of(folder: Path) -> Record:
    return read_record(folder / "scores.json")


def test_a_model_is_scored(run: Run, models: Path, pictures: Path) -> None:
    status, out, error = run(
        *("eval", models / "class", "clothes", "-o", "scores", "--batch-size", 5, "--steps", 2, "--cfg-scale", 1.5),
        *("--sweep-steps", "1,3", "--sweep-guidance", "1", "--sweep-count", 6, "--save-images", "--seed", 7),
    )
    assert status == 0, error
    record = record_of(pictures / "scores")
    for metric in ("FD-stand-in", "KD-stand-in", "precision-stand-in", "recall-stand-in", "density-stand-in",
                   "coverage-stand-in", "class accuracy-stand-in", "near training images-stand-in"):  # fmt: skip
        assert metric in record.values and metric in out, metric
    assert "FD-stand-in from 12 images" in out and "KD-stand-in beside it" in out
    s = record.sampling
    assert (s.count, s.seed, s.steps, s.guidance_scale, s.weights, s.size) == (12, 7, 2, 1.5, "ema", [16, 16])
    assert s.class_balance == dict.fromkeys(CLASSES, 4) and s.conditions == ["class_label"] and s.conditions_digest
    assert record.reference.split == "validation" and record.reference.count == 12
    assert record.training is not None and record.training.count == 15 and record.training.split == "train"
    assert record.environment.threads == torch.get_num_threads() and record.environment.numpy == np.__version__
    fd = record.score("FD-stand-in")
    assert (
        fd is not None and fd.extraction is not None and fd.extraction.weights == "0" * 64 and len(fd.deviations) == 400
    )
    assert [(c.setting, c.count, [p[0] for p in c.points]) for c in record.curves] == [
        ("steps", 6, [1.0, 3.0]), ("guidance", 6, [1.0])
    ]  # fmt: skip
    assert len(list((pictures / "scores" / "images").glob("*.png"))) == 12
    assert not (pictures / "scores" / "parts").exists()
    page = (pictures / "scores" / "report.html").read_text()
    for words in (
        "FD-stand-in",
        "Before you trust it",
        "Nearest images",
        "FD-stand-in over steps",
        "Protocol",
        "data:image",
    ):
        assert words in page
    assert str(pictures) not in page
    with Image.open(pictures / "scores" / "neighbours.png") as picture:
        assert picture.size == (16 * 6 + 4, 8 * 18 - 2)  # sample, gap, five neighbours; eight rows
    with Image.open(pictures / "scores" / "samples.png") as picture:
        assert picture.size == (4 * 18 - 2, 3 * 18 - 2)


def test_images_of_a_folder_are_scored(run: Run, pictures: Path) -> None:
    status, _, error = run("eval", "flat", "clothes", "-o", "scores", "--metrics", "fd,pr,neighbours")
    assert status == 0, error
    record = record_of(pictures / "scores")
    assert set(record.values) >= {"FD-stand-in", "KD-stand-in", "precision-stand-in"}  # KD stands beside a biased FD
    assert not record.sampling.generated and record.sampling.steps is None and record.sampling.count == 6
    assert run("eval", "clothes/val", "clothes", "-o", "same", "--metrics", "fd,pr")[0] == 0
    same = record_of(pictures / "same").values
    assert same["FD-stand-in"] < 1e-6 and same["precision-stand-in"] == 1.0
    assert run("eval", "clothes/val", "flat", "-o", "plain", "--metrics", "fd")[0] == 0
    assert record_of(pictures / "plain").reference.split == "all"  # a folder without parts
    status, out, _ = run("eval", "--repeat", "plain/scores.json")
    assert status == 0 and "identical" in out


def test_a_classifier_that_knew_the_images_is_told(run: Run, models: Path, pictures: Path) -> None:
    command = ("eval", models / "class", "clothes/val", "--steps", 1, "--metrics", "accuracy", "-o", "a")
    status, out, error = run(*command)
    assert status == 0, error
    line = next(line for line in out.splitlines() if line.startswith("class accuracy of real images"))
    assert line.endswith("of the very images that the classifier was fitted on")


def test_the_first_images_of_a_set(run: Run, pictures: Path) -> None:
    """PLACE@COUNT, of the data, the samples and the training images."""
    command = ("eval", "flat@5", "clothes/val@7", "--train", "clothes/train@9", "-o", "a", "--metrics", "fd,neighbours")
    status, _, error = run(*command)
    assert status == 0, error
    record = record_of(pictures / "a")
    assert (record.sampling.count, record.reference.count) == (5, 7)
    assert record.training is not None and record.training.count == 9 and record.reference.split == "all"
    assert run("eval", "flat", "clothes@6", "-o", "b", "--metrics", "fd,neighbours")[0] == 0
    record = record_of(pictures / "b")
    assert record.training is not None and (record.training.count, record.reference.count) == (6, 6)
    assert (record.training.split, record.reference.split) == ("train", "validation")


def test_the_inception_score_needs_classes(run: Run, refused: Refused, pictures: Path) -> None:
    assert run("eval", "flat", "clothes", "-o", "a", "--metrics", "is", "--extractor", "classes")[0] == 0
    assert 1.0 <= record_of(pictures / "a").values["IS-stand-in"] <= 8.0
    assert "names classes" in refused("eval", "flat", "clothes", "-o", "b", "--metrics", "is")


def test_the_clip_score_needs_its_files(
    run: Run, refused: Refused, models: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(device: Any) -> Any:
        raise DarkroomError("no files of CLIP here")

    class Reader:
        name = "CLIP score-stand-in"
        images = quick_extractor()

        def __call__(self, images: torch.Tensor, texts: list[str]) -> torch.Tensor:
            return torch.tensor([float(len(text)) for text in texts])

    command = ("eval", models / "text", "clothes", "--steps", 1, "--count", 4, "-o")
    monkeypatch.setattr("darkroom.scoring.open_clip_reader", absent)
    assert run(*command, "a")[0] == 0 and not any("CLIP" in name for name in record_of(pictures / "a").values)
    assert "no files of CLIP" in refused(*command, "b", "--metrics", "clip")
    monkeypatch.setattr("darkroom.scoring.open_clip_reader", lambda device: Reader())
    assert run(*command, "c", "--metrics", "clip")[0] == 0
    score = record_of(pictures / "c").score("CLIP score-stand-in")
    assert score is not None and score.value == len("a red fox") and score.extraction is not None


def test_what_was_interrupted_goes_on_to_the_same_numbers(
    run: Run, models: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("eval", models / "text", "clothes", "--batch-size", 2, "--steps", 1, "--count", 8, "-o")
    assert run(*command, "whole")[0] == 0
    read = GeneratedPictures.read
    asked: list[int] = []

    def stopping(self: GeneratedPictures, numbers: Any) -> Any:
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.extend(numbers)
        return read(self, numbers)

    monkeypatch.setattr(GeneratedPictures, "read", stopping)
    assert run(*command, "broken")[0] == 130
    assert not (pictures / "broken" / "scores.json").exists()
    assert len(list((pictures / "broken" / "parts" / "samples").glob("*.safetensors"))) == 2
    monkeypatch.setattr(GeneratedPictures, "read", read)
    assert run(*command, "broken")[0] == 0
    whole, broken = record_of(pictures / "whole"), record_of(pictures / "broken")
    assert whole.scores == broken.scores and whole.reference == broken.reference and whole.sampling == broken.sampling


def test_a_record_is_enough_to_repeat_it(run: Run, refused: Refused, models: Path, pictures: Path) -> None:
    command = ("eval", models / "class", "clothes", "--steps", 2, "--count", 6, "-o", "first")
    assert run(*command)[0] == 0
    status, out, error = run("eval", "--repeat", "first/scores.json")
    assert status == 0, error
    assert "identical: all" in out
    assert record_of(pictures / "first").scores == record_of(pictures / "first-repeat").scores
    # Another set of images in the same place: the difference is told, and why.
    Image.new("RGB", (16, 16), "white").save(pictures / "clothes" / "val" / CLASSES[0] / "0.png")
    status, out, _ = run("eval", "--repeat", "first", "-o", "again")
    assert status == 1 and "not identical; what differs: reference images" in out and "FD-stand-in" in out
    assert "give both, MODEL DATA" in refused("eval", "--repeat", "first", "clothes")
    (pictures / "clothes").rename(pictures / "moved")
    assert "clothes: no such file or folder; say where it lies now" in refused("eval", "--repeat", "first")
    assert run("eval", "--repeat", "again", models / "class", "moved", "-o", "elsewhere")[0] == 0


def test_records_are_compared_where_they_can_be(run: Run, refused: Refused, models: Path, pictures: Path) -> None:
    for name, extra in (("a", ("--steps", 1)), ("b", ("--steps", 3)), ("c", ("--steps", 3, "--count", 6))):
        assert run("eval", models / "class", "clothes", *extra, "-o", name, "--metrics", "fd,kd")[0] == 0
    status, out, error = run("eval", "--compare", "a/scores.json", "b")
    assert status == 0, error
    lines = out.splitlines()
    assert "class (1 step, " in lines[0] and "class (3 steps" in lines[0]
    assert lines[1].startswith("FD-stand-in") and "…" in lines[1] and "Δ" in lines[1]
    assert any(line.split()[:3] == ["steps", "1", "3"] for line in lines)
    error = refused("eval", "--compare", "a", "c")
    assert "images: 12 against 6" in error and "class balance: boot 4" in error and "--anyway" in error
    status, out, _ = run("eval", "--compare", "a", "c", "--anyway")
    assert status == 0 and "warning: FD-stand-in of" in out and "not comparable" in out


def test_bits_per_dimension(run: Run, refused: Refused, models: Path, pictures: Path) -> None:
    command = ("eval", models / "none", "clothes", "--steps", 1, "--count", 4, "--metrics", "bits", "--bound-levels", 5)
    assert run(*command, "-o", "a")[0] == 0
    score = record_of(pictures / "a").score("bits/dim of latents")
    assert score is not None and score.value > 0 and score.options["levels"] == 5 and score.options["first_stage"]
    # Beside all other scores, of which none becomes a must.
    assert run("eval", models / "none", "clothes", "--steps", 1, "--count", 4, "--bits-per-dim", "-o", "b")[0] == 0
    assert {"bits/dim of latents", "FD-stand-in"} <= set(record_of(pictures / "b").values)


def test_bad_input_is_one_line_and_loses_nothing(run: Run, refused: Refused, models: Path, pictures: Path) -> None:
    model = models / "class"
    command = ("eval", model, "clothes", "--steps", 1, "--metrics", "fd", "-o", "scores")
    assert run(*command)[0] == 0
    before = (pictures / "scores" / "scores.json").read_bytes()
    assert "other settings (count" in refused(*command, "--count", 3)
    assert (pictures / "scores" / "scores.json").read_bytes() == before
    assert run(*command)[0] == 0 and record_of(pictures / "scores").values  # the same again
    assert 'metric "fdi" is not known (did you mean "fd"?)' in refused("eval", model, "clothes", "--metrics", "fdi")
    assert "nothing to evaluate" in refused("eval", model)
    assert "no model" in refused("eval", "absent", "clothes")
    assert "absent" in refused("eval", model, "absent")
    (pictures / "empty").mkdir()
    assert "empty" in refused("eval", "empty", "clothes")
    assert "--size 0: write it as" in refused("eval", model, "clothes", "--size", "0")
    assert "100 images were asked for and there are 6" in refused("eval", "flat", "clothes", "--count", 100)
    assert "more than the 12 examples" in refused("eval", models / "text", "clothes", "--count", 13)
    assert "is told class_label" in refused("eval", model, "flat")
    Image.new("RGB", (20, 16)).save(pictures / "flat" / "odd.png")
    assert "odd.png is 20x16 and" in refused("eval", "flat", "clothes")
    assert "sizes are multiples of" in refused("eval", model, "clothes", "--size", "17")
    assert "first stage only" in refused("eval", models / "fs", "clothes")
    assert "--sweep-steps 5,x" in refused("eval", model, "clothes", "--sweep-steps", "5,x")
    assert "two different things" in refused("eval", "--compare", "--ab", "a", "b")
    assert "no metrics are named" in refused("eval", model, "clothes", "--metrics", ",")
    raw = json.loads(before) | {"record_version": 99}
    (pictures / "future.json").write_text(json.dumps(raw))
    assert "version 99" in refused("eval", "--compare", "scores", "future.json")
    (pictures / "other.json").write_text("{}")
    assert "no record of scores" in refused("eval", "--repeat", "other.json")
    assert 'unknown key "scores.0.valeu"' in refused("eval", "--compare", "scores", _misspelt(pictures, raw))
    (pictures / "run").mkdir()
    (pictures / "run" / "config.yaml").write_text("")
    assert "holds a run" in refused("eval", model, "clothes", "-o", "run")


@pytest.mark.parametrize(
    ("mode", "options", "words"),
    [
        ("--repeat", ("a.json", "--steps", 3), "--steps means nothing with --repeat; the record says how"),
        ("--compare", ("--count", 3), "--count means nothing with --compare; leave it out"),
        ("--ab", ("--metrics", "fd"), "--metrics means nothing with --ab;"),
        ("--first-stage", ("a", "--steps", 3), "--steps means nothing with --first-stage;"),
        ("--ab-results", ("--seed", 0), "--seed means nothing with --ab-results;"),
    ],
)
def test_options_that_would_be_passed_over_are_refused(
    refused: Refused, mode: str, options: tuple[object, ...], words: str
) -> None:
    assert words in refused("eval", mode, *options, "x", "y")


def test_a_record_that_was_changed_by_hand(run: Run, refused: Refused, models: Path, pictures: Path) -> None:
    assert run("eval", models / "class", "clothes", "--steps", 1, "--metrics", "fd", "-o", "a")[0] == 0
    raw = json.loads((pictures / "a" / "scores.json").read_text())
    for change, words in (
        ({"count": -5}, "count is -5; give 1 or more"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"size": [16, 0]}, "numbers above 0"),
        ({"sweep_steps": [0]}, "numbers above 0"),
        ({"count": "many"}, "request.count"),
        ({"metrics": ["fdi"]}, 'metric "fdi" is not known'),
        ({"weights": "best"}, "best"),
        ({"device": "gpu7"}, "gpu7"),
        ({"model": 7}, "request.model"),
    ):
        (pictures / "changed.json").write_text(json.dumps(raw | {"request": raw["request"] | change}))
        assert words in refused("eval", "--repeat", "changed.json"), change
    for key, value, words in (("scores", "none", "scores"), ("reference", None, "reference"), ("kind", 1, "no record")):
        (pictures / "changed.json").write_text(json.dumps(raw | {key: value}))
        assert words in refused("eval", "--compare", "a", "changed.json"), key
    text = (pictures / "a" / "scores.json").read_text()
    for broken in (text[:200], "", "[1, 2]", text.replace('"value": ', '"value": "x", "v": ', 1)):
        (pictures / "changed.json").write_text(broken)
        assert "changed.json" in refused("eval", "--compare", "a", "changed.json")


@pytest.mark.parametrize(
    ("samples", "options", "words"),
    [
        ("class", ("--metrics", "is"), "needs an extractor that names classes"),
        ("text", ("--metrics", "fd,accuracy"), "needs samples and data with the same classes"),
        ("flat", ("--metrics", "accuracy"), "needs samples and data with the same classes"),
        ("class", ("--metrics", "pairs"), "needs a model that repairs pictures"),
        ("class", ("--metrics", "agreement"), "rules that hold for `shapes` alone"),
        ("class", ("--metrics", "clip"), "needs a model and data with captions"),
        ("flat", ("--bits-per-dim",), "stored images have none"),
        ("flat", ("--sweep-steps", "1,2"), "stored images have neither"),
        ("class", ("--sweep-guidance", "1,inf"), "numbers from 0 on"),
        ("class", ("--count", 10**20), "numbers up to 10,000,000"),
        ("class", ("--train", "lost.tar"), "lost.tar: no such file"),
    ],
)
def test_what_cannot_be_made_is_told_before_anything_is(
    refused: Refused, models: Path, pictures: Path, samples: str, options: tuple[object, ...], words: str
) -> None:
    place = samples if samples == "flat" else models / samples
    assert words in refused("eval", place, "clothes", "-o", "scores", *options)
    assert not (pictures / "scores").exists()


def _misspelt(folder: Path, raw: dict[str, Any]) -> Path:
    scores = [{("valeu" if key == "value" else key): value for key, value in raw["scores"][0].items()}]
    path = folder / "misspelt.json"
    path.write_text(json.dumps(raw | {"record_version": 1, "scores": scores}))
    return path


@pytest.mark.slow
def test_processes_share_the_work_and_the_numbers(models: Path, pictures: Path) -> None:
    """torchrun with two processes gives the very record of one."""
    command = ["-m", "darkroom", "eval", str(models / "class"), "clothes", "--steps", "1", "--threads", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name, launcher in (("alone", []), ("both", ["-m", "torch.distributed.run", "--nproc-per-node", "2"])):
        rest = [*command[:1], *command[1:], "-o", name, "--batch-size", "2"] if not launcher else [
            *launcher, *command, "-o", name, "--batch-size", "2"
        ]  # fmt: skip
        subprocess.run([sys.executable, *rest], check=True, cwd=pictures, env=environment, timeout=280)
    one, two = record_of(pictures / "alone"), record_of(pictures / "both")
    assert one.scores == two.scores and one.reference == two.reference and one.sampling == two.sampling
