"""`darkroom study first-stages` with networks and budgets of nothing: rows, resuming, table, and every shipped row."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from darkroom.config import with_overrides
from darkroom.study import _alone, budget, study_first_stages, study_rows
from darkroom.train_job import train
from darkroom.training.recipe import find_recipe, read_recipe, resolve

Run = Callable[..., tuple[int, str, str]]
STAGE = "first_stage.train."
TINY: dict[str, Any] = {
    **{"data.size": 64, "data.count": 20, STAGE + "batch_size": 2, STAGE + "precision": "float32"},
    **{STAGE + "autoencoder.channels": 8, STAGE + "objective.discriminator_channels": 8},
}
SETTINGS = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]


pytestmark = pytest.mark.usefixtures("quick_extractors")


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "table.csv") as file:
        return list(csv.DictReader(file))


def test_a_study_makes_a_table(run: Run, tmp_path: Path) -> None:
    command = ("study", "first-stages", "-o", "study", "--data", "shapes", "--crops", 6, *SETTINGS)
    status, out, error = run(*command, "--rows", "vq-f8", "kl-f4")
    assert status == 0, error
    folder = tmp_path / "study"
    rows = table(folder)
    assert [(r["row"], r["f"], r["kind"]) for r in rows] == [("kl-f4", "4", "KL"), ("vq-f8", "8", "VQ")]
    for row in rows:
        assert float(row["PSNR"]) > 0 and float(row["rFD-darkroom"]) > 0 and float(row["gradient energy ratio"]) > 0
        assert int(row["parameters"]) > 1000 and row["crops"] == "6" and float(row["training minutes"]) >= 0
    assert rows[0]["codes"] == rows[0]["codes used"] == "" and 0 < float(rows[1]["codes used"]) <= 1
    assert "kl-f4" in out and "table: study/index.html" in out
    with Image.open(folder / "table.png") as picture:
        assert picture.width > 600 and picture.height > 400
    page = (folder / "index.html").read_text()
    for words in ("vq-f8", "octaves of f", ">f 4<", "The same pictures by every row", "rFD-darkroom from 2 images"):
        assert words in page
    assert str(tmp_path) not in page

    # Rows that are done are neither trained nor scored again; a new one joins them.
    before = {p: p.stat().st_mtime_ns for p in folder.glob("rows/*/evaluation/scores.json")}
    status, out, error = run(*command, "--rows", "kl-f4,kl-f2")
    assert status == 0, error
    assert [r["row"] for r in table(folder)] == ["kl-f2", "kl-f4", "vq-f8"]
    assert "kl-f2: training" in out and "kl-f4: training" not in out and "kl-f4: scoring" not in out
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())

    # Scores of other weights are made again.
    scores = folder / "rows" / "kl-f4" / "evaluation" / "scores.json"
    record = json.loads(scores.read_text())
    record["protocol"]["first_stage"]["weights"] = "0" * 64
    scores.write_text(json.dumps(record))
    assert "kl-f4: scoring" in run(*command, "--rows", "kl-f4")[1]


def test_a_run_that_was_begun_elsewhere_is_continued(tmp_path: Path) -> None:
    """As `darkroom train study-kl-f4 --output study/rows/kl-f4` leaves it when it is stopped."""
    place = tmp_path / "rows" / "kl-f4"
    changes = TINY | budget("kl-f4", 4, TINY) | {STAGE + "checkpoint_every": 1}
    train("study-kl-f4", place, data="shapes", overrides=changes, device="cpu", quiet=True)
    for name in ("summary.json", "report.html"):
        (place / name).unlink()
    for name in ("model", "first_stage"):
        for file in sorted((place / name).rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        (place / name).rmdir()
    result = study_first_stages(tmp_path, ["kl-f4"], crops=1000, data="shapes", device="cpu", quiet=True)
    assert not result.interrupted and result.rows[0]["crops"] == 4  # its own budget, not the one asked for


def test_a_row_belongs_to_one_process(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    with _alone(tmp_path / "rows" / ".kl-f4.lock") as alone:
        assert alone
        assert study_first_stages(tmp_path, ["kl-f4"], data="shapes", device="cpu", quiet=True).rows == []
    assert not (tmp_path / "rows" / "kl-f4" / "config.yaml").exists()


def test_the_budget_is_at_least_what_was_asked_for() -> None:
    assert study_rows() == [f"{kind}-f{f}" for f in (2, 4, 8, 16, 32) for kind in ("kl", "vq")]
    assert budget("kl-f4", None) == {}
    changes = budget("kl-f4", 1000)
    assert changes[STAGE + "steps"] == 32  # of 32 crops each
    base = read_recipe(find_recipe("study-kl-f4"))
    whole, short = (resolve(r).first_stage.train for r in (base, with_overrides(base, changes)))
    assert whole is not None and short is not None
    assert whole.steps * whole.batch_size >= 100_000
    share = whole.objective.discriminator_start / whole.steps
    assert short.objective.discriminator_start == round(share * 32)
    assert short.optimizer.warmup_steps <= 3 and short.checkpoint_every <= 8


def test_rows_differ_in_f_and_kind_alone() -> None:
    recipes = {row: read_recipe(find_recipe(f"study-{row}")) for row in study_rows()}
    stages = {row: resolve(r).first_stage.train for row, r in recipes.items()}
    first = stages["kl-f4"]
    assert first is not None
    for row, stage in stages.items():
        assert stage is not None and recipes[row]["data"] == recipes["kl-f4"]["data"]
        same = ("steps", "batch_size", "precision", "optimizer", "seed")
        assert all(getattr(stage, name) == getattr(first, name) for name in same), row
        free = ("quantize_start", "revive_codes_every", "crop")
        assert {k: v for k, v in vars(stage.objective).items() if k not in free} == {
            k: v for k, v in vars(first.objective).items() if k not in free
        }, row
        network = stage.autoencoder
        assert 2 ** (len(network.channel_mult) - 1) == int(row.split("-f")[1])
        assert (network.codebook_size is not None) == row.startswith("vq") and network.channels == 16
        # The network that scores the rows has trained none of them.
        assert stage.objective.perceptual == "laplacian"


@pytest.mark.parametrize("row", study_rows())
def test_every_row_trains(row: str, tmp_path: Path) -> None:
    """A few steps of each shipped recipe, past the start of codes and of the discriminator."""
    changes = TINY | budget(row, 8, TINY)
    run = train(f"study-{row}", tmp_path / "run", data="shapes", overrides=changes, device="cpu", quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert run.model is not None and lines[-1]["train_step"] == 4
    assert "discriminator_loss" in lines[-1] and ("codes_used" in lines[-1]) == row.startswith("vq")


def test_study_refuses_bad_input(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "no row 'kl-f5'" in refused("study", "first-stages", "--rows", "kl-f5")
    assert "--rows kl-f4" in refused("study", "first-stages", "kl-f4")
    assert "--crops" in refused("study", "first-stages", "--crops", 0)
    (tmp_path / "file").write_text("")
    assert "is a file" in refused("study", "first-stages", "-o", "file")
    assert "KEY=VALUE" in refused("study", "first-stages", "--set", "x")
    assert "no such command" in refused("study", "denoisers").lower()
