"""The whole job: data in, trained model folder and report out. What `darkroom.train` and `darkroom train` call.

    resolve the recipe -> look at the data -> plan -> first stage (train, or take one) -> measure its latents
    -> latent cache -> denoiser and conditioner -> model folder, samples, report

A run folder that was interrupted anywhere continues with `resume=True` where it stopped.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from darkroom import __version__
from darkroom.config import from_dict, nearest, to_dict
from darkroom.data.batches import Batches, collate, pixels_of
from darkroom.data.io import contact_sheet, image_grid, write_image
from darkroom.data.locations import data_names, spread
from darkroom.data.pixels import converted, resolve_pixels
from darkroom.data.sources import open_dataset
from darkroom.denoiser import DenoiserConfig
from darkroom.denoiser_job import denoiser_stage, sample_request
from darkroom.errors import DarkroomError
from darkroom.evaluation.environment import hardware
from darkroom.first_stage.artefacts import flat_colour_test
from darkroom.first_stage.first_stage import FirstStage
from darkroom.first_stage_job import first_stage_stage
from darkroom.latent_diffusion import LatentDiffusion, to_uint8
from darkroom.model_folder import find_source, is_model_folder
from darkroom.model_io import load, load_first_stage, save, select_device
from darkroom.perceptual_job import train_perceptual
from darkroom.plan import VALIDATION_IMAGES, Plan, Planner, describe_plan, fit_minutes, with_times
from darkroom.preview_job import preview_stage, with_derived_sizes
from darkroom.recipe_source import new_recipe, resumed_recipe
from darkroom.report import model_card, write_report
from darkroom.safe_files import read_json, write_file, write_json
from darkroom.score_hook import last_record, protocol_words
from darkroom.solvers import SOLVERS
from darkroom.training.distributed import World, join_world, of_first_rank
from darkroom.training.loop import Hooks, LoopConfig, LoopResult, Trainer
from darkroom.training.progress import duration
from darkroom.training.recipe import Recipe

MEASURED_IMAGES = 4096  # whose latents give shift and scale
# Of the summary, for the model card: name and protocol.
SCORES = {
    "first_stage_psnr": ("PSNR in dB", "mean over held-out images, posterior mode, averaged weights, [-1, 1] clamped"),
    "denoiser_validation_loss": ("denoising loss", "held-out images at 8 fixed times, fixed noise, averaged weights"),
}
SMALL_SET = 2000  # images below which a model of this kind repeats its training pictures


@dataclass(frozen=True)
class Run:
    """What a finished (or interrupted) training left behind."""

    folder: Path
    model: Path | None
    report: Path | None
    summary: dict[str, Any]

    @property
    def interrupted(self) -> bool:
        return bool(self.summary.get("interrupted"))


def train(
    source: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] = "runs/latest",
    *,
    data: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    resume: bool = False,
    init_from: str | os.PathLike[str] | None = None,
    first_stage: str | os.PathLike[str] | None = None,
    minutes: float | None = None,
    dry_run: bool = False,
    overrides: Mapping[str, Any] | None = None,
    device: str = "auto",
    threads: int | None = None,
    quiet: bool = False,
) -> Run:
    """Train a latent diffusion model.

    source: a recipe (file or shipped name), or the images themselves: a folder or tar, for which a recipe is made that
        fits the data, this machine and `minutes`. With `resume` it may be left out: the run's own config is taken.
    data: where the recipe's images are found, instead of what it names (also: environment variable DARKROOM_DATA); with
        `resume`, where they lie now.
    seed: of both stages. A `resume`d run keeps the settings that it was begun with, except for `overrides`.
    init_from: a model whose denoiser, conditioner and first stage to start from, with its network sizes.
    first_stage: a model whose first stage to take instead of training one.
    minutes: time budget of both stages together; it is turned into steps once, at the start.
    overrides: dotted recipe keys, {"steps": 500, "optimizer.learning_rate": 1e-4}.
    threads: of the CPU. A resumed run is equal to the last bit only with as many as it was begun with.

    Raises DarkroomError for anything a user can mend.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    folder = Path(output)
    changes = dict(overrides or {})
    world = join_world(device)
    # Looked at once, before the first process writes there.
    begun = of_first_rank((folder / "config.yaml").exists(), world)
    resume = resume and (source is None or begun)  # nothing there yet: begin
    stated: Mapping[str, Any] = {}
    if resume:
        recipe = resumed_recipe(folder, changes, data)
        if seed not in (None, recipe.seed):
            raise DarkroomError(
                f"{folder}: this run has seed {recipe.seed}, and a run keeps its seed; leave --seed out"
            )
    else:
        recipe, stated = new_recipe(
            source,
            data=data,
            seed=seed,
            changes=changes,
            first_stage=first_stage,
            init_from=init_from,
            minutes=minutes,
            gpu=select_device(device).type == "cuda",
        )
        if begun and not dry_run:
            raise DarkroomError(f"{folder}: already holds a run; continue it with --resume, or choose another --output")
        if folder.exists() and not folder.is_dir():
            raise DarkroomError(f"{folder}: is a file; choose a folder for --output")
    if minutes is not None and recipe.preview is not None and recipe.steps == 0 and recipe.first_stage.train is None:
        raise DarkroomError("a preview decoder is trained for a number of steps: --set preview.steps=N")
    if recipe.perceptual is not None:
        if minutes is not None:
            raise DarkroomError("a perceptual network is trained for a number of steps: --set perceptual.steps=N")
        place = select_device(device)
        summary = train_perceptual(
            recipe, folder, resume=resume, device=place, world=world, quiet=quiet, dry_run=dry_run
        )
        done = None if dry_run or summary["interrupted"] else folder / "model"
        return Run(folder, done, None, summary)
    choice = recipe.first_stage
    if recipe.steps == 0 and choice.train is None and choice.name is None and choice.path is None:
        raise DarkroomError('"steps" is 0 and there is no first stage to train: nothing to do')
    job = Job(recipe, folder, device=device, world=world, stated=stated, quiet=quiet)
    if minutes is not None and not resume:
        job.say("timing a few steps of each stage")
        job.measured = of_first_rank(job.plan(measure=True), job.world)
        job.recipe = fit_minutes(job.recipe, job.measured, minutes, fixed=changes)
    if dry_run:
        plan = job.plan(measure=True) if job.measured is None else with_times(job.plan(), job.measured)
        if world.is_main:
            print("\n".join([describe_plan(plan), *(f"warning: {w}" for w in job.warnings)]), flush=True)
        return Run(folder, None, None, {"plan": to_dict(plan)})
    return job.run(resume)


# --- the job --------------------------------------------------------------------------------------------------------


class Job:
    """One run: what it holds is the recipe, the folder and the opened data; each stage is a method."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        device: str = "auto",
        world: World | None = None,
        stated: Mapping[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        recipe = with_pixels(recipe)
        self.recipe, self.folder, self.quiet, self.stated = recipe, folder, quiet, stated or {}
        if recipe.evaluate.solver not in SOLVERS:
            solver = recipe.evaluate.solver
            raise DarkroomError(f'"evaluate.solver" is {solver!r}{nearest(solver, SOLVERS)}')
        self.device = select_device(device)
        self.world = world or World()
        self.started = time.perf_counter()
        self.data = open_dataset(recipe.data, "train")
        self.validation = open_dataset(recipe.data, "validation")
        self.measured: Plan | None = None  # with seconds per step, when a time budget needed them
        self.warnings: list[str] = []
        if (line := converted(self.data, recipe.first_stage.given is not None)) is not None:
            self.warnings.append(line)
        if len(self.data) < SMALL_SET and recipe.steps > 0:
            self.warnings.append(
                f"only {len(self.data)} training images: a model of this kind will partly memorise them; "
                "compare samples with their nearest training images before you show them as new"
            )

    def say(self, text: str) -> None:
        if not self.quiet and self.world.is_main:
            print(text, flush=True)

    def plan(self, measure: bool = False, rehearse: bool = False) -> Plan:
        """What will be done; with `measure` also how long it takes, from a few timed steps."""
        planner = Planner(self.recipe, self.data, self.device, self.stated)
        # With the widths that follow from other parts, so that the saved config tells what was built.
        self.recipe = replace(self.recipe, denoiser=from_dict(DenoiserConfig, planner.denoiser_config, "denoiser"))
        if self.recipe.preview is not None and planner.first_stage is not None:
            preview = with_derived_sizes(self.recipe.preview, planner.first_stage)
            self.recipe = replace(self.recipe, preview=preview)
        if rehearse:
            planner.rehearse()
        return planner.plan(measure)

    # --- stages ---

    def run(self, resume: bool) -> Run:
        plan = self.plan(rehearse=not resume)
        if self.measured is not None:
            plan = with_times(plan, self.measured)
        if self.world.is_main:
            self._prepare(plan, resume)
        self.say(describe_plan(plan))
        for warning in self.warnings:
            self.say(f"warning: {warning}")
        summary: dict[str, Any] = self._environment()
        try:
            return self._stages(resume, summary)
        except KeyboardInterrupt:  # between the stages, or the second one inside a stage
            return self._interrupted(summary)

    def _stages(self, resume: bool, summary: dict[str, Any]) -> Run:
        """Both stages, then the model folder and the report; `summary` grows on the way."""
        folder = self.folder
        first_stage, result = first_stage_stage(self, resume)
        if result is not None:
            summary |= _stage_summary("first_stage", result)
            if result.interrupted:
                return self._interrupted(summary)
            summary["flat_colours"] = self._flat_colours(first_stage)
        if self.recipe.preview is not None:
            result, reached = preview_stage(self, first_stage, resume)
            summary |= _stage_summary("preview", result) | {f"preview_{k}": round(v, 4) for k, v in reached.items()}
            if result.interrupted:
                return self._interrupted(summary)
        if self.recipe.steps == 0:
            return self._finish_first_stage(first_stage, summary)
        model, result, live = denoiser_stage(self, first_stage, resume)
        summary |= _stage_summary("denoiser", result)
        if result.interrupted:
            return self._interrupted(summary)
        if not self.world.is_main:
            return Run(folder, None, None, summary)
        summary |= self._scores(result)
        summary["minutes"] = round((summary.get("first_stage_seconds", 0) + summary["denoiser_seconds"]) / 60, 2)
        model.info |= self.model_info(summary)
        # A bundled first stage is named with its hash, not copied: one serves many denoisers.
        named = self.recipe.first_stage.name is not None
        save(model, folder / "model", card=model_card(self._card(model, summary)), live=live, refer=named)
        return self._finished(summary)

    def _flat_colours(self, first_stage: FirstStage) -> dict[str, Any]:
        """What the decoder makes of flat colours, as numbers; the pictures go to samples/flat-colours.png."""
        found = flat_colour_test(first_stage)
        if self.world.is_main:
            path = self.folder / "samples" / "flat-colours.png"
            write_image(image_grid(to_uint8(found.picture), columns=len(found.picture)), path)
        return found.as_dict()

    def _finish_first_stage(self, first_stage: FirstStage, summary: dict[str, Any]) -> Run:
        """The end of a recipe with `steps: 0`: the first stage is the model."""
        if not self.world.is_main:
            return Run(self.folder, None, None, summary)
        config = self.recipe.first_stage.train
        if config is not None and config.init_from is not None and not config.objective.train_encoder:
            whole = is_model_folder(find_source(config.init_from))
            given = load(config.init_from, device=str(self.device)) if whole else None
            if isinstance(
                given, LatentDiffusion
            ):  # the latents are the same: the whole model goes on with this decoder
                given.first_stage = first_stage
                save(given, self.folder / "model", info={"decoder": {"recipe": self.recipe.name, "training": summary}})
                return self._finished(summary)
        save(first_stage, self.folder / "model", info={"name": self.recipe.name, "training": summary})
        return self._finished(summary)

    def _finished(self, summary: dict[str, Any]) -> Run:
        write_json(self.folder / "summary.json", summary)
        self.describe_data()  # large sets meet their unreadable images only while they are read
        report = write_report(self.folder)
        self.say(f"model: {self.folder / 'model'}\nreport: {report}")
        return Run(self.folder, self.folder / "model", report, summary)

    def _prepare(self, plan: Plan, resume: bool) -> None:
        folder = self.folder
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        old = folder / "data.json"
        if resume and old.is_file() and read_json(old).get("digest") != self.data.digest:
            raise DarkroomError(
                f"{folder}: the data has changed since this run began; start a new run with --init-from"
            )
        problems = self.describe_data()
        write_file(
            folder / "config.yaml",
            yaml.safe_dump(to_dict(self.recipe), sort_keys=False, allow_unicode=True).encode(),
        )
        write_json(folder / "plan.json", to_dict(plan))
        count = min(32, len(self.data))
        shown = [self.data[i * len(self.data) // count] for i in range(count)]
        sheet = contact_sheet(shown, class_names=self.data.class_names, pixels=self.data.pixels)
        write_image(sheet, folder / "samples" / "contact-sheet.png")
        if problems:
            self.say(f"skipped {problems} unreadable images (listed in {folder / 'data.json'})")

    def describe_data(self) -> int:
        """Write data.json. Gives the number of examples left out, those of earlier parts of the run included."""
        path = self.folder / "data.json"
        known = read_json(path).get("problems", []) if path.is_file() else []
        found = (*map(tuple, known), *self.data.problems, *self.validation.problems)
        problems = [list(p) for p in dict.fromkeys(found)]
        facts = {"warnings": self.warnings, "validation_count": len(self.validation), "problems": problems}
        write_json(path, self.data.describe() | facts)
        return len(problems)

    def trainer(self, stage: str, step: Any, source: Any, config: LoopConfig, hooks: Hooks) -> Trainer:
        return Trainer(
            stage,
            step,
            source,
            config,
            self.folder,
            device=self.device,
            world=self.world,
            hooks=hooks,
            quiet=self.quiet,
        )

    def batches(self, dataset: Any, config: LoopConfig) -> Batches:
        return Batches(
            dataset,
            config.batch_size,
            config.seed,
            rank=self.world.rank,
            world_size=self.world.size,
            micro_batches=config.accumulation,
            prefetch=True,
        )

    def validation_batches(self, dataset: Any, batch_size: int = 32) -> list[dict[str, Any]]:
        chosen = spread(len(dataset), VALIDATION_IMAGES)
        return [
            collate([dataset[i] for i in chosen[first : first + batch_size]], pixels_of(dataset))
            for first in range(0, len(chosen), batch_size)
        ]

    def measured_batches(self, dataset: Any, count: int = MEASURED_IMAGES, size: int = 64) -> Iterator[dict[str, Any]]:
        """Images, or cached moments, of which something is measured: `count` of them, `size` at once."""
        chosen = spread(len(dataset), count)
        for first in range(0, len(chosen), size):
            yield collate([dataset[i] for i in chosen[first : first + size]], pixels_of(dataset))

    # --- words about the run ---

    def _scores(self, result: LoopResult) -> dict[str, Any]:
        """The scores of the last step, each with its protocol in words."""
        record = None if self.recipe.evaluate.scores is None else last_record(self.folder, result.steps)
        if record is None:
            return {}
        words = protocol_words(record)
        return {"scores": {s.metric: {"value": round(s.value, 6), "protocol": words} for s in record.scores}}

    def _environment(self) -> dict[str, Any]:
        return {
            "hardware": hardware(self.device),
            "threads": torch.get_num_threads(),
            "device": str(self.device),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "darkroom": __version__,
            "seed": self.recipe.seed,
            "processes": self.world.size,
        }

    def model_info(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        evaluate, size = self.recipe.evaluate, self.recipe.data.size
        width, height = (size, size) if isinstance(size, int) else size
        return {
            "name": self.recipe.name,
            "description": self.recipe.description,
            "defaults": {
                "steps": evaluate.steps,
                "solver": evaluate.solver,
                "guidance_scale": evaluate.guidance_scale,
                "size": [width, height],
            },
            "data": self.data.describe() | {"source": data_names(self.recipe.data.source)},
            "training": dict(summary),
        }

    def _card(self, model: LatentDiffusion, summary: Mapping[str, Any]) -> dict[str, Any]:
        steps = {k.removesuffix("_steps"): v for k, v in summary.items() if k.endswith("_steps") and "skipped" not in k}
        parts = {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_children()}
        scores = [
            {"name": name, "value": summary[key], "protocol": protocol}
            for key, (name, protocol) in SCORES.items()
            if key in summary
        ]
        scores += [{"name": name, **score} for name, score in summary.get("scores", {}).items()]
        info = self.model_info(summary) | {
            "image_size": self.model_info({})["defaults"]["size"],
            "channels": self.recipe.data.channels,
            "downsampling": model.downsampling,
            "latent_channels": model.latent_channels,
            "conditioning": list(model.conditioner.fields),
            "classes": list(self.data.class_names or []) if "class_label" in model.conditioner.fields else [],
            "parameters": parts,
            "recipe": self.recipe.name,
            "steps": steps,
            "minutes": summary.get("minutes"),
            "hardware": summary.get("hardware"),
            "threads": summary.get("threads"),
            "seed": self.recipe.seed,
            "scores": scores,
            "prompts": (sample_request(self, model).prompts or [])[:4],
            "warnings": self.warnings,
            "version": __version__,
        }
        if self.recipe.init_from is not None:
            info["base"] = self.recipe.init_from
        return info

    def _interrupted(self, summary: dict[str, Any]) -> Run:
        summary["interrupted"] = True
        if self.world.is_main:
            write_json(self.folder / "summary.json", summary)
            self.say(f"stopped; go on with: darkroom train --resume --output {self.folder}")
        return Run(self.folder, None, None, summary)


def with_pixels(recipe: Recipe) -> Recipe:
    """The recipe with the pixel format stated: that of a given first stage where it fits, else by the files."""
    data, given = recipe.data, recipe.first_stage.given
    if not data.is_resolved and given is not None:
        pixels = load_first_stage(given, "cpu").pixels
        if data.pixels in ("auto", pixels.dtype) and data.value_range is None:
            data = replace(data, pixels=pixels.dtype, value_range=(pixels.low, pixels.high))
    return replace(recipe, data=resolve_pixels(data))


def _stage_summary(stage: str, result: LoopResult) -> dict[str, Any]:
    numbers = {f"{stage}_{k}": round(v, 5) for k, v in result.last.items() if k in ("loss", "psnr", "validation_loss")}
    return {
        f"{stage}_steps": result.steps,
        f"{stage}_seconds": round(result.seconds, 1),
        f"{stage}_time": duration(result.seconds),
        f"{stage}_skipped_steps": result.skipped_steps,
        f"{stage}_rollbacks": result.rollbacks,
        **numbers,
    }
