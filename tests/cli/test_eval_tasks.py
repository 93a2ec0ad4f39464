"""`darkroom eval` of models that are told other things than classes and captions: boxes, maps, small, blurred and
masked pictures; what was made of the data for them is in the record, and decides what may be compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from condition_models import make_model
from extractor_stand_in import quick_extractor
from torch import Tensor

from darkroom.config import to_dict
from darkroom.data.masks import RandomMask
from darkroom.data.sources import DataConfig, open_dataset
from darkroom.errors import DarkroomError
from darkroom.eval_places import with_derived_fields
from darkroom.evaluation.extractors import PerceptualDistance
from darkroom.evaluation.protocol import Record, read_record

Run = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]
PLAIN = {"factor": 4, "blur": 0.0, "pipeline": "bicubic"}
MADE = {"low_resolution": {"factor": 4, "blur": 0.5, "pipeline": "bicubic"}}  # what training says of its data


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    def distance(one: Tensor, other: Tensor) -> Tensor:
        return (one - other).abs().mean((1, 2, 3))

    monkeypatch.setattr("darkroom.scoring.open_extractor", lambda name, device: quick_extractor())
    monkeypatch.setattr(
        "darkroom.scoring.default_extractors", lambda device: (PerceptualDistance("stand-in", distance, "2" * 64), None)
    )


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that are told one thing each."""
    folder = tmp_path_factory.mktemp("told")
    for name in ("boxes", "segmentation", "low_resolution", "masked_image"):
        make_model(name).save(folder / name)
    blurred = make_model("low_resolution")
    blurred.info["data"] = MADE
    blurred.save(folder / "blurred")
    return folder


def scored(run: Run, model: Path, output: str, *more: object) -> Record:
    status, _, error = run("eval", model, "shapes@12", "--count", 5, "--steps", 1, "-o", output, *more)
    assert status == 0, error
    return read_record(output)


@pytest.mark.parametrize(
    ("name", "field", "scores", "made"),
    [
        ("boxes", "boxes", {"box agreement", "box overlap"}, {}),
        ("segmentation", "segmentation", {"map agreement", "map overlap"}, {}),
        ("low_resolution", "low_resolution", {"PSNR", "SSIM", "stand-in"}, PLAIN),
        ("blurred", "low_resolution", {"PSNR", "SSIM", "stand-in"}, MADE["low_resolution"]),
        ("masked_image", "repaint_mask", {"PSNR", "SSIM", "stand-in"}, to_dict(RandomMask())),
    ],
)
def test_what_a_model_is_told_decides_its_scores(
    run: Run, told: Path, name: str, field: str, scores: set[str], made: dict[str, Any]
) -> None:
    record = scored(run, told / name, "scores")
    assert scores <= set(record.values) and field in record.sampling.conditions and record.sampling.conditions_digest
    assert record.sampling.made == ({field: made} if made else {})
    if "PSNR" in scores:
        assert 3 < record.values["PSNR"] < 60 and record.values["SSIM"] < 1 and record.values["stand-in"] > 0
    status, out, _ = run("eval", "--repeat", "scores")
    assert status == 0 and "identical" in out


def test_other_degradations_are_another_protocol(run: Run, refused: Refused, told: Path) -> None:
    scored(run, told / "low_resolution", "a", "--metrics", "pairs,fd")
    scored(run, told / "blurred", "b", "--metrics", "pairs")
    error = refused("eval", "--compare", "a", "b")
    assert "low_resolution made with: factor 4, blur 0.0, pipeline bicubic against factor 4, blur 0.5" in error
    # The same record with the model in another place that was told other pictures: why the numbers moved.
    status, out, _ = run("eval", "--repeat", "a", told / "blurred", "shapes@12", "-o", "again")
    assert status == 1 and "what differs: model" not in out and "conditions (" in out


def test_the_rule_of_training_is_taken_where_it_fits() -> None:
    data = open_dataset(DataConfig(source="shapes", size=32, count=20), "validation")
    model = make_model("low_resolution", low_resolution={"factor": 2})
    for recorded, blur in (
        (None, 0.0),
        ({"factor": 2, "blur": 3}, 3.0),
        (MADE["low_resolution"], 0.0),  # of another model: it must fit the encoder
        ("lost", 0.0),
    ):
        model.info = {"data": {"low_resolution": recorded}}
        made = with_derived_fields(data, model).made["low_resolution"]
        assert (made["factor"], made["blur"]) == (2, blur)
    model.info = {"data": {"low_resolution": {"faktor": 2}}}
    with pytest.raises(DarkroomError, match="faktor"):
        with_derived_fields(data, model)


def test_masks_are_those_of_training() -> None:
    data = open_dataset(DataConfig(source="shapes", size=32, count=20), "validation")
    model = make_model("masked_image")
    model.info = {"data": {"repaint_mask": {"everything": 1.0}}}
    derived = with_derived_fields(data, model)
    assert derived.made["repaint_mask"]["everything"] == 1.0 and bool((derived[0]["repaint_mask"] == 1).all())
    model.info = derived.describe()  # not where the model's data is told
    assert with_derived_fields(data, model).made["repaint_mask"]["everything"] == 0.0
    model.info = {"data": derived.describe()}
    assert with_derived_fields(data, model).made == derived.made


def test_sharpening_needs_to_know_how_blurred() -> None:
    data = open_dataset(DataConfig(source="shapes", size=32, count=20), "validation")
    model = make_model("low_resolution", low_resolution={"factor": 1})
    model.info = {}
    with pytest.raises(DarkroomError, match="does not say how blurred"):
        with_derived_fields(data, model)
    model.info = {"data": {"low_resolution": {"factor": 1, "blur": 2.0}}}
    example = with_derived_fields(data, model)[0]
    assert example["low_resolution"].shape == example["image"].shape
    assert not torch.equal(example["low_resolution"], example["image"])
