"""Scores while a denoiser is trained: in its pauses, beside it, and what becomes of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from extractor_stand_in import quick_extractor

from darkroom.errors import DarkroomError
from darkroom.evaluation.protocol import read_record
from darkroom.score_hook import ScoreHook, processors, room
from darkroom.train_job import train
from darkroom.training.distributed import World
from darkroom.training.loop import Hooks, last_metrics
from darkroom.training.recipe import ScoringConfig

TINY = {
    "first_stage.train.steps": 1,
    "steps": 4,
    "data.count": 40,
    "evaluate.samples": 1,
    "evaluate.steps": 1,
    "evaluate.scores": {"every": 2, "count": 4, "metrics": ["fd", "agreement"], "where": "inline"},
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkroom.scoring.open_extractor", lambda name, device: quick_extractor())


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scored(folder: Path) -> dict[int, dict[str, float]]:
    found = {}
    for record in lines(folder):
        scores = {name.removeprefix("score_"): v for name, v in record.items() if name.startswith("score_")}
        if scores:
            found[record["train_step"]] = scores
    return found


def test_scores_are_in_the_metrics_the_report_and_the_model(tmp_path: Path) -> None:
    run = train("shapes-tiny", tmp_path / "run", overrides=TINY, quiet=True)
    found = scored(run.folder)
    assert list(found) == [2, 4]
    record = read_record(run.folder / "scores" / "step-000004")
    assert found[4] == record.values and {"FD-stand-in", "KD-stand-in", "caption agreement"} <= set(record.values)
    assert record.sampling.count == 4 and record.sampling.steps == 1 and record.reference.split == "validation"
    page = (run.folder / "report.html").read_text()
    assert "FD-stand-in of generated pictures" in page
    assert run.summary["scores"]["FD-stand-in"]["protocol"].startswith("4 images, dpm++2m, 1 steps")
    assert "FD-stand-in" in (run.folder / "model" / "README.md").read_text()
    # The lines of scores do not hide what the last step was.
    assert last_metrics(run.folder / "metrics.jsonl", "denoiser", 4).keys() >= {"loss", "score_FD-stand-in"}


def test_a_score_that_fails_is_said_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise DarkroomError("the image of seed 0 is not finite")

    monkeypatch.setattr("darkroom.score_hook.evaluate_model", failing)
    run = train("shapes-tiny", tmp_path / "run", overrides=TINY)
    assert "no scores at step 2: the image of seed 0" in capsys.readouterr().out
    assert not scored(run.folder) and "scores" not in run.summary


@pytest.mark.parametrize(
    ("where", "threads", "expected"),
    [("inline", 1, None), ("auto", 1, "cpu"), ("auto", 2, None), ("process", 2, "cpu")],
)
def test_where_there_is_room(where: Any, threads: int, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkroom.score_hook.processors", lambda: 2)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    assert room(torch.device("cpu"), World(), ScoringConfig(where=where)) == expected
    assert room(torch.device("cpu"), World(0, 2), ScoringConfig(where="auto")) is None
    assert processors() >= 1


def test_bad_settings_are_found_before_training(tmp_path: Path) -> None:
    for change, words in (
        ({"evaluate.scores.metrics": ["fid"]}, 'metric "fid" is not known'),
        ({"evaluate.scores.every": 0}, '"evaluate.scores.every" is 0'),
        ({"evaluate.scores.where": "elsewhere"}, "evaluate.scores.where"),
    ):
        with pytest.raises(DarkroomError, match=words):
            train("shapes-tiny", tmp_path / "run", overrides=TINY | change, quiet=True)


class Busy:
    """A process that ends when it is told to."""

    def __init__(self, status: int | None = None) -> None:
        self.status, self.terminated = status, False

    def poll(self) -> int | None:
        return self.status

    def wait(self) -> int:
        self.status = 0 if self.status is None else self.status
        return self.status

    def terminate(self) -> None:
        self.terminated = True


def test_training_does_not_wait_for_a_busy_process(tmp_path: Path) -> None:
    said: list[str] = []
    hook = ScoreHook.__new__(ScoreHook)
    hook.folder, hook.world, hook.say, hook.done = tmp_path, World(), said.append, []
    (tmp_path / "step-000002" / "model").mkdir(parents=True)
    (tmp_path / "step-000002" / "log.txt").write_text("first\nthe last line")
    busy = Busy()
    hook.running = (2, busy)  # type: ignore[assignment]
    hook._beside(4, final=False)
    assert "those of step 2 are still being made" in said[0] and not hook.finished()
    busy.status = 1
    assert hook.finished() == [] and said[1].endswith("no scores at step 2: the last line")
    assert not (tmp_path / "step-000002" / "model").exists() and hook.running is None
    hook.running = (2, Busy())  # type: ignore[assignment]
    process: Any = hook.running[1]
    hook.close()
    assert process.terminated and hook.running is None and not (tmp_path / "step-000002").exists()
    assert Hooks().scorer is None


@pytest.mark.slow
def test_a_process_of_its_own_makes_the_same_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bundled extractor on both sides; the number of threads is one in both."""
    monkeypatch.undo()
    if sys.platform != "linux":
        pytest.skip("the tiny run is compared on one system")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("darkroom.score_hook.processors", lambda: 2)
    try:
        settings = TINY["evaluate.scores"]
        assert isinstance(settings, dict)
        runs = []
        for where in ("inline", "process"):
            change = {"evaluate.scores": settings | {"where": where}}
            runs.append(train("shapes-tiny", tmp_path / where, overrides=TINY | change, quiet=True))
    finally:
        torch.set_num_threads(before)
    one, two = (scored(run.folder) for run in runs)
    assert one[4].keys() == two[4].keys()
    assert one[4]["FD-darkroom"] == pytest.approx(two[4]["FD-darkroom"], rel=1e-3)
