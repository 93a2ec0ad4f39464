"""`darkroom study first-stages`: the paper's table of first stages, made again on other images.

    for each row: darkroom.train(its recipe) -> scores on held-out images -> table.csv, table.png, index.html

Rows are shipped recipes `study-NAME`, alike but for f and the kind of latent. A row's folder is an ordinary run: it is
continued when it was interrupted and passed over when it is done, whoever began it. The table is made of whatever rows
are done, so that several processes may work on different rows of one study at the same time.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from darkroom.data.io import image_grid, write_image
from darkroom.data.latent_cache import module_hash
from darkroom.data.sources import ImageDataset, open_dataset
from darkroom.errors import DarkroomError
from darkroom.eval_job import displayed, open_images, write_evaluation
from darkroom.evaluation.environment import hardware
from darkroom.evaluation.first_stage import evaluate_first_stage
from darkroom.first_stage.artefacts import flat_colour_test
from darkroom.first_stage.first_stage import FirstStage
from darkroom.model_io import load_first_stage, select_device
from darkroom.recipe_source import resumed_recipe
from darkroom.report_evaluation import study_page
from darkroom.safe_files import read_json, write_file
from darkroom.study_picture import study_picture
from darkroom.train_job import train
from darkroom.training.recipe import Recipe, find_recipe, read_recipe, recipe_names, resolve

PREFIX = "study-"
ROWS = ("kl-f4", "vq-f4", "kl-f8", "vq-f8", "kl-f16", "vq-f16")
SHOWN = 8  # pictures of a row's strip
LOSSES = "first_stage.train.objective."
STAGE = "first_stage.train."
FIRST_COLUMNS = ("row", "f", "kind", "channels", "codes", "PSNR", "SSIM")
LAST_COLUMNS = ("gradient energy ratio", "codes used", "perplexity", "parameters", "training minutes", "crops")
SPEED_COLUMNS = ("encode s/MP", "decode s/MP")


@dataclass(frozen=True)
class Study:
    """Where the table is, the rows in it, and whether work is left."""

    folder: Path
    rows: list[dict[str, Any]]
    interrupted: bool = False


def study_first_stages(
    output: str | os.PathLike[str] = "runs/study-first-stages",
    rows: Sequence[str] = ROWS,
    *,
    crops: int | None = None,
    data: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    device: str = "auto",
    threads: int | None = None,
    quiet: bool = False,
    progress: Callable[[str], Callable[[int, int], None]] | None = None,
) -> Study:
    """Train and score first stages under one protocol, and compare them.

    rows: of `study_rows()`; those in the folder that are done stay in the table whatever is asked for.
    crops: training budget of each row, in crops; None: what the recipes say. Rows that were begun keep theirs.
    data: where the images of the recipes are found, or other images (also: environment variable DARKROOM_DATA).
    overrides: dotted recipe keys for every row that is begun.
    progress: from the name of a row, a function of (images scored, of how many).

    Raises DarkroomError for anything a user can mend.
    """
    folder = Path(output)
    known = study_rows()
    for row in rows:
        if row not in known:
            raise DarkroomError(f"there is no row {row!r} in this study; rows are {', '.join(known)}")
    if folder.exists() and not folder.is_dir():
        raise DarkroomError(f"{folder}: is a file; choose a folder for --output")
    if threads is not None:
        torch.set_num_threads(threads)

    def say(text: str) -> None:
        if not quiet:
            print(text, flush=True)

    sets: dict[str, ImageDataset] = {}  # opened when first needed, the same for all rows
    for row in dict.fromkeys(rows):
        place = folder / "rows" / row
        place.mkdir(parents=True, exist_ok=True)
        with _alone(folder / "rows" / f".{row}.lock") as alone:
            if not alone:
                say(f"{row}: another process is at it")
                continue
            if not _is_trained(place):
                say(f"{row}: training")
                begun = (place / "config.yaml").is_file()
                changes = {} if begun else {**budget(row, crops, overrides), **(overrides or {})}
                source = None if begun else PREFIX + row
                run = train(
                    source,
                    place,
                    resume=begun,
                    data=data,
                    overrides=changes,
                    device=device,
                    threads=threads,
                    quiet=quiet,
                )
                if run.interrupted:
                    say(f"stopped in row {row}; the same command goes on")
                    return Study(folder, write_table(folder), interrupted=True)
            first_stage = load_first_stage(place, select_device(device))
            recipe = resumed_recipe(place, {}, data)
            if not sets:
                sets |= held_out(recipe, first_stage)
            if not _is_scored(place, first_stage, sets):
                say(f"{row}: scoring")
                _score(row, place, first_stage, sets, batch_size, None if progress is None else progress(row))
        write_table(folder)
    return Study(folder, write_table(folder))


def study_rows() -> list[str]:
    """The rows that there are recipes for, f by f."""
    names = [name.removeprefix(PREFIX) for name in recipe_names() if name.startswith(PREFIX)]
    return sorted((n for n in names if n != "base"), key=lambda n: (int(n.split("-f")[1]), n))


def budget(row: str, crops: int | None, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Overrides that make the recipe of a row see at least so many crops, with everything in it at the same share."""
    recipe = resolve(read_recipe(find_recipe(PREFIX + row)), overrides)
    config = recipe.first_stage.train
    assert config is not None
    if crops is None:
        return {}
    if crops < 1:
        raise DarkroomError(f"crops={crops}: a row needs at least one")
    steps = math.ceil(crops / (config.batch_size * config.accumulation))
    share = steps / config.steps
    changes: dict[str, Any] = {f"{STAGE}steps": steps}
    for name in ("discriminator_start", "quantize_start"):
        changes[LOSSES + name] = round(getattr(config.objective, name) * share)
    for name in ("log_every", "validate_every", "sample_every", "checkpoint_every"):
        changes[STAGE + name] = max(1, min(getattr(config, name), steps // 4))
    changes[f"{STAGE}optimizer.warmup_steps"] = min(config.optimizer.warmup_steps, steps // 10)
    if config.optimizer.ema_decay is not None:  # an average over more than the run would keep its beginning
        changes[f"{STAGE}optimizer.ema_decay"] = min(config.optimizer.ema_decay, 1 - 1 / max(10.0, steps / 10))
    return changes


def held_out(recipe: Recipe, first_stage: FirstStage) -> dict[str, ImageDataset]:
    """The validation images of a row: each file by its name, or the split of a source as one set."""
    config = recipe.data
    if isinstance(config.validation, (str, list)):
        places = [config.validation] if isinstance(config.validation, str) else config.validation
        return open_images(places, config.size, first_stage)
    return {"held out": open_dataset(config, "validation")}


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether no other process holds this row; nobody waits. Where the system has no such locks: always."""
    try:
        import fcntl
    except ImportError:
        yield True
        return
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def _is_trained(place: Path) -> bool:
    return (place / "model" / "darkroom.json").is_file() and (place / "summary.json").is_file()


def _is_scored(place: Path, first_stage: FirstStage, sets: Mapping[str, ImageDataset]) -> bool:
    """Whether the scores in the folder are those of these weights on these images."""
    file = place / "evaluation" / "scores.json"
    if not file.is_file():
        return False
    protocol = read_json(file).get("protocol", {})
    digests = {name: facts.get("digest") for name, facts in protocol.get("data", {}).items()}
    same_model = protocol.get("first_stage", {}).get("weights") == module_hash(first_stage.autoencoder)
    return same_model and digests == {name: images.digest for name, images in sets.items()}


def _score(
    row: str,
    place: Path,
    first_stage: FirstStage,
    sets: Mapping[str, ImageDataset],
    batch_size: int,
    report: Callable[[int, int], None] | None,
) -> None:
    facts = {"model": row, "hardware": hardware(first_stage.device)}
    scores = evaluate_first_stage(first_stage, sets, batch_size=batch_size, shown=SHOWN, facts=facts, report=report)
    folder = place / "evaluation"
    folder.mkdir(exist_ok=True)
    for name, images in (("originals", scores.images), ("reconstructions", scores.reconstructions)):
        write_image(image_grid(list(displayed(images)), columns=len(images)), folder / f"{name}.png")
    # Its scores.json comes last: with it the row is done.
    write_evaluation(folder, scores, row, flat_colour_test(first_stage))


# --- the table -------------------------------------------------------------------------------------------------------


def write_table(folder: Path) -> list[dict[str, Any]]:
    """table.csv, table.png and index.html of the rows that are done; each file whole or not at all."""
    records = {row: read_row(folder / "rows" / row) for row in study_rows()}
    done = {row: record for row, record in records.items() if record is not None}
    rows = sorted((table_row(row, *record) for row, record in done.items()), key=lambda r: (r["f"], r["kind"]))
    columns = table_columns([record[0] for record in done.values()])
    if not rows:
        return []
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(folder / "table.csv", text.getvalue().encode())
    strips = {"originals": folder / "rows" / rows[0]["row"] / "evaluation" / "originals.png"}
    strips |= {r["row"]: folder / "rows" / r["row"] / "evaluation" / "reconstructions.png" for r in rows}
    protocol = {k: v for k, v in done[rows[0]["row"]][0]["protocol"].items() if k not in ("model", "first_stage")}
    title = "First stages: how much is lost at which f"
    about = f"{len(rows)} rows · {protocol['count']:,} held-out images · trained on {rows[0]['crops']:,} crops each"
    charts = ["PSNR", next(c for c in columns if c.startswith("rFD-"))]
    write_image(study_picture(title, about, columns, rows, strips, charts), folder / "table.png")
    notes = study_notes(rows, [record[0] for record in done.values()], [record[1] for record in done.values()])
    page = study_page(columns, rows, strips, charts, notes, protocol, title, about)
    write_file(folder / "index.html", page.encode())
    return rows


def read_row(place: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]] | None:
    """(scores record, training summary, resolved recipe) of a row that is done."""
    files = [place / "evaluation" / "scores.json", place / "summary.json"]
    if not all(file.is_file() for file in files):
        return None
    return read_json(files[0]), read_json(files[1]), read_recipe(place / "config.yaml")


def table_row(
    row: str, record: Mapping[str, Any], summary: Mapping[str, Any], recipe: Mapping[str, Any]
) -> dict[str, Any]:
    facts, stage = record["protocol"]["first_stage"], recipe["first_stage"]["train"]
    return {
        "row": row,
        "f": facts["downsampling"],
        "kind": "KL" if facts["codes"] is None else "VQ",
        "channels": facts["latent_channels"],
        "codes": facts["codes"],
        "parameters": facts["parameters"],
        "training minutes": round(summary["first_stage_seconds"] / 60, 1),
        "crops": summary["first_stage_steps"] * stage["batch_size"] * stage["accumulation"],
        **record["scores"],
    }


def table_columns(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Perceptual and Frechet columns carry the names of their networks: rows scored by others have columns apart."""
    perceptual = dict.fromkeys(r["protocol"]["perceptual"]["name"] for r in records)
    frechet = dict.fromkeys(f"rFD-{r['protocol']['frechet']['name']}" for r in records)
    return [*FIRST_COLUMNS, *perceptual, *frechet, *LAST_COLUMNS, *SPEED_COLUMNS]


def study_notes(
    rows: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]], summaries: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What makes the rows of a table less comparable than they look."""
    notes = list(dict.fromkeys(w for record in records for w in record["warnings"]))
    if len({row["crops"] for row in rows}) > 1:
        notes.append("The rows were trained on different numbers of crops (column crops).")
    digests = [{name: d["digest"] for name, d in r["protocol"]["data"].items()} for r in records]
    if any(d != digests[0] for d in digests):
        notes.append("The rows were scored on different images: run the study again with the same data.")
    if len({r["protocol"]["frechet"]["weights"] + r["protocol"]["perceptual"]["weights"] for r in records}) > 1:
        notes.append("The rows were scored with different networks: delete their evaluation folders and run again.")
    if len({s.get("hardware") for s in summaries}) > 1:
        notes.append("The rows were trained on different machines: minutes cannot be compared.")
    return notes
