"""Scores of sets in files: of how many images each is made, and that its interval is that of so many."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from extractor_stand_in import WIDTH, quick_extractor
from torch import Tensor

from darkroom.evaluation import measure
from darkroom.evaluation.distances import precision_recall, unbiased_mmd
from darkroom.evaluation.feature_files import EMBEDDING, PROBABILITIES, FeatureFiles
from darkroom.evaluation.measure import Seen, class_accuracy, distance_scores, mean_scores, memorised, nearest_training
from darkroom.evaluation.picture_sources import LABEL
from darkroom.evaluation.protocol import Score

PART = 50


def embeddings(count: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) + shift


def stored(folder: Path, tensors: dict[str, Tensor]) -> FeatureFiles:
    """Files as `observe` leaves them."""
    files = FeatureFiles(folder, len(next(iter(tensors.values()))), PART)
    for start in files.starts:
        numbers = slice(start, start + PART)
        files.write(start, {k: v[numbers].contiguous() for k, v in tensors.items()}, {"pixels": "", "conditions": ""})
    return files


def seen(folder: Path, x: Tensor, most: int) -> Seen:
    return Seen(stored(folder, {EMBEDDING: x}), quick_extractor(has_classes=True), most)


def spread_of(score: Score) -> float:
    """The standard error that a score states."""
    return float(torch.tensor(score.deviations).std())


def test_a_score_of_some_of_the_images_has_the_interval_of_so_many(tmp_path: Path) -> None:
    """900 images of which 100 are looked at in pairs: their shares are as unsure as those of 100 images."""
    x, y = embeddings(900, 1, 0.6), embeddings(900, 2)
    samples, reference = seen(tmp_path / "x", x, 100), seen(tmp_path / "y", y, 100)
    found = {s.metric: s for s in distance_scores(samples, reference, ["fd", "kd", "pr", "dc"]).scores}
    expected = precision_recall(y[::9], x[::9])
    for name, share in (("precision-stand-in", expected.precision), ("recall-stand-in", expected.recall)):
        assert found[name].value == pytest.approx(share) and 0.1 < share < 0.95
        assert spread_of(found[name]) == pytest.approx(math.sqrt(share * (1 - share) / 100), rel=0.15)
        assert found[name].options["images"] == 100
    covered = found["coverage-stand-in"].value
    assert spread_of(found["coverage-stand-in"]) == pytest.approx(math.sqrt(covered * (1 - covered) / 100), rel=0.15)

    kernel = found["KD-stand-in"]
    assert kernel.value == pytest.approx(unbiased_mmd(y[::9], x[::9]), rel=1e-9)
    anew = torch.tensor([unbiased_mmd(y[::9], embeddings(100, 10 + i, 0.6)) for i in range(80)])
    assert spread_of(kernel) == pytest.approx(float(anew.std()), rel=0.3)

    # A Frechet distance is made of all of them; its interval is that of 900, from the influence of 100.
    few = Seen(samples.files, samples.extractor, 900)
    one, other = found["FD-stand-in"], measure.frechet_score(few, reference)
    assert one.value == other.value and spread_of(one) == pytest.approx(spread_of(other), rel=0.25)


def test_the_inception_score_of_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.softmax(embeddings(600, 3) * 2, 1)
    whole = Seen(stored(tmp_path / "a", {PROBABILITIES: p}), quick_extractor(has_classes=True))
    all_of_them = spread_of(measure.inception(whole))
    monkeypatch.setattr(measure, "MOST_PROBABILITIES", 60)
    some = measure.inception(whole)
    assert some.options["images"] == 60 and some.options["splits"] == 10
    assert spread_of(some) == pytest.approx(all_of_them * math.sqrt(10), rel=0.4)


def test_neighbours_of_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of which every third is a training image with a little noise."""
    monkeypatch.setattr(measure, "QUERIES", 90)
    training = embeddings(600, 5)
    samples = embeddings(450, 6)
    samples[::3] = training[:150] + 1e-3
    one, other = seen(tmp_path / "s", samples, 100), seen(tmp_path / "t", training, 100)
    nearest = nearest_training(one, other, seen(tmp_path / "h", embeddings(200, 7), 100))
    score = memorised(one, nearest)
    assert score is not None and score.options["images"] == 90 == len(nearest.numbers)
    share = sum(number % 3 == 0 for number in nearest.numbers) / 90
    assert score.value == pytest.approx(share + (1 - share) * measure.NEAR, abs=0.06)
    assert spread_of(score) == pytest.approx(math.sqrt(score.value * (1 - score.value) / 90), rel=0.15)
    copies = [row for row, number in enumerate(nearest.numbers) if number % 3 == 0]
    assert nearest.found.number[copies, 0].tolist() == [nearest.numbers[row] // 3 for row in copies]


def test_what_is_not_finite_is_left_out_and_said(tmp_path: Path) -> None:
    """PSNR is infinite where a picture came back as it was."""
    files = stored(tmp_path, {"PSNR": torch.tensor([20.0, 30.0, float("inf"), float("nan")])})
    (score,) = mean_scores(files, ["PSNR"])
    assert score.value == 25.0 and score.note == "2 of 4 images have no finite value and are left out"
    assert mean_scores(stored(tmp_path / "none", {"PSNR": torch.tensor([float("nan")])}), ["PSNR"]) == []


def test_classes_that_nobody_stated_give_no_accuracy(tmp_path: Path) -> None:
    x, labels = embeddings(60, 8), torch.arange(60).float() % 2
    x[:, 0] += 6 * labels
    samples = Seen(stored(tmp_path / "s", {EMBEDDING: x, LABEL: labels}), quick_extractor())
    nothing = torch.full((60,), float("nan"))
    unknown = Seen(stored(tmp_path / "r", {EMBEDDING: x, LABEL: nothing}), quick_extractor())
    found = class_accuracy(samples, unknown, samples, ["a", "b"])
    assert [s.metric for s in found] == ["class accuracy-stand-in"] and found[0].value > 0.95
    assert class_accuracy(samples, unknown, None, ["a", "b"]) == []  # nothing to fit a classifier on
    both = class_accuracy(samples, replace(samples), None, ["a", "b"])
    assert [s.metric for s in both][1:] == ["class accuracy of real images-stand-in"] and "very images" in both[1].note
