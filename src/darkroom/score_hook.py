"""Scores of generated images while a denoiser is trained: the block `evaluate.scores` of a recipe.

Where there is room (processors that the training leaves idle, or another GPU), a process of its own makes them from the
averaged weights of that step while training goes on; else training pauses for them, and all its processes take part.
The records lie in `scores/step-NNNNNN/` of the run, the numbers in its metrics.jsonl.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import yaml

from darkroom.data.sources import ImageDataset, open_dataset
from darkroom.errors import DarkroomError
from darkroom.evaluation.measure import check_metrics
from darkroom.evaluation.protocol import Record, read_record
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_io import load, save
from darkroom.scoring import EvalRequest, evaluate_model
from darkroom.training.distributed import World, any_rank
from darkroom.training.recipe import EvaluateConfig, Recipe, ScoringConfig, resolve

SCORES, RECORD, LOG = "scores", "scores.json", "log.txt"
POLITENESS = 10  # added to the niceness of a process of its own


def room(device: torch.device, world: World, scoring: ScoringConfig) -> str | None:
    """The device on which scores can be made beside the training; None: only in its pauses."""
    if scoring.where == "inline":
        return None
    if device.type == "cuda":
        spare = f"cuda:{world.size}" if torch.cuda.device_count() > world.size else None
        return spare or ("cpu" if scoring.where == "process" else None)
    idle = processors() - torch.get_num_threads() * world.size
    return "cpu" if idle >= 1 or scoring.where == "process" else None


def processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def request_of(evaluate: EvaluateConfig, dataset: ImageDataset, name: str, device: str) -> EvalRequest:
    """What `evaluate.scores` asks for, in the words of `darkroom eval`."""
    scoring = evaluate.scores
    assert scoring is not None
    return EvalRequest(
        model=name,
        data=[],
        metrics=check_metrics(scoring.metrics),
        extractor=scoring.extractor,
        size=dataset.size,
        count=min(scoring.count, len(dataset)),
        steps=scoring.steps or evaluate.steps,
        guidance_scale=evaluate.guidance_scale,
        solver=evaluate.solver,
        batch_size=scoring.batch_size,
        device=device,
    )


class ScoreHook:
    """Makes scores of `model` every so many steps; see `training.loop.Scorer`."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        model: LatentDiffusion,
        dataset: ImageDataset,
        world: World,
        say: Callable[[str], None],
    ) -> None:
        scoring = recipe.evaluate.scores
        assert scoring is not None
        if not len(dataset):
            raise DarkroomError('"evaluate.scores" compares with held-out images: set "data.validation"')
        check_metrics(scoring.metrics)
        self.recipe, self.folder, self.model, self.dataset = recipe, folder / SCORES, model, dataset
        self.world, self.say, self.every = world, say, scoring.every
        self.beside = room(model.device, world, scoring)
        self.running: tuple[int, subprocess.Popen[bytes]] | None = None
        self.done: list[tuple[int, dict[str, float]]] = []
        if world.is_main:
            for left in self.folder.glob("step-*/model"):  # of a run that was killed
                shutil.rmtree(left.parent)

    def place(self, train_step: int) -> Path:
        return self.folder / f"step-{train_step:06d}"

    def start(self, train_step: int, final: bool = False) -> None:
        """Called by every process with the averaged weights in place."""
        with torch.autocast(self.model.device.type, enabled=False):
            if self.beside is None:
                self._inline(train_step)
            elif self.world.is_main:
                self._beside(train_step, final)

    def _inline(self, train_step: int) -> None:
        place = self.place(train_step)
        if self.world.is_main:
            shutil.rmtree(place, ignore_errors=True)
        any_rank(False, self.world, self.model.device)  # nobody writes there before it is gone
        request = request_of(self.recipe.evaluate, self.dataset, self.recipe.name, str(self.model.device))
        try:
            result = evaluate_model(request, place, world=self.world, model=self.model, dataset=self.dataset)
        except DarkroomError as error:  # not finite: the training may recover, or stops by its own rule
            return self.say(f"warning: no scores at step {train_step}: {error}")
        if result is not None:
            self.done.append((train_step, result.record.values))

    def _beside(self, train_step: int, final: bool) -> None:
        if self.running is not None:
            if not final:
                self._collect(wait=False)
            if self.running is not None and not final:
                return self.say(f"no scores at step {train_step}: those of step {self.running[0]} are still being made")
            self._collect(wait=True)
        place = self.place(train_step)
        shutil.rmtree(place, ignore_errors=True)
        save(self.model, place / "model")
        program = [sys.executable, "-m", "darkroom.score_hook"]
        command = [*program, str(self.folder.parent), str(train_step), str(self.beside)]
        idle = max(1, processors() - torch.get_num_threads() * self.world.size)
        # Alone in its world, and out of reach of a Ctrl-C that is meant for the training, which then ends it.
        alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        with open(place / LOG, "wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=alone | {"OMP_NUM_THREADS": str(idle)}, start_new_session=True
            )
        self.running = (train_step, process)

    def _collect(self, wait: bool) -> None:
        if self.running is None or (not wait and self.running[1].poll() is None):
            return
        train_step, process = self.running
        status, self.running = process.wait(), None
        place = self.place(train_step)
        shutil.rmtree(place / "model", ignore_errors=True)
        if status == 0:
            self.done.append((train_step, read_record(place).values))
        else:
            lines = (place / LOG).read_text(errors="replace").splitlines() or [f"status {status}"]
            self.say(f"warning: no scores at step {train_step}: {lines[-1]}")

    def finished(self, wait: bool = False) -> list[tuple[int, Mapping[str, float]]]:
        """(train step, scores by metric) of what has been finished since the last call; each once."""
        self._collect(wait)
        found, self.done = self.done, []
        return [*found]

    def close(self) -> None:
        """End what is still being made: a resumed run makes the next ones."""
        if self.running is not None:
            self.running[1].terminate()
            self.running[1].wait()
            shutil.rmtree(self.place(self.running[0]), ignore_errors=True)
            self.running = None


def last_record(run: Path, train_step: int) -> Record | None:
    """What was found at a step of a run; None where no scores were made."""
    place = run / SCORES / f"step-{train_step:06d}"
    return read_record(place) if (place / RECORD).is_file() else None


def protocol_words(record: Record) -> str:
    """The protocol in one line, for a summary."""
    s, reference = record.sampling, record.reference
    guidance = "" if s.guidance_scale is None else f", guidance {s.guidance_scale:g}"
    return (
        f"{s.count} images, {s.solver}, {s.steps} steps{guidance}, averaged weights, against {reference.count} "
        "held-out images"
    )


def score_step(run: Path, train_step: int, device: str) -> None:
    """What the process of its own does: the model of one step, as the hook left it."""
    recipe = resolve(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
    place = run / SCORES / f"step-{train_step:06d}"
    model = load(place / "model", device=device)
    assert isinstance(model, LatentDiffusion)
    dataset = open_dataset(recipe.data, "validation")
    request = request_of(recipe.evaluate, dataset, recipe.name, device)
    evaluate_model(request, place, model=model, dataset=dataset)


if __name__ == "__main__":
    if hasattr(os, "nice"):
        os.nice(POLITENESS)
    try:
        score_step(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    except DarkroomError as error:
        sys.exit(str(error))
