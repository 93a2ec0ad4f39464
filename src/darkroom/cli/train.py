"""`darkroom train`: arguments for `darkroom.train.train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from darkroom.errors import DarkroomError


def parse_overrides(settings: tuple[str, ...], example: str = "steps=60") -> dict[str, Any]:
    """("steps=60", "optimizer.learning_rate=1e-4") -> dotted keys with values read as YAML. example: for messages."""
    import yaml

    overrides: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise DarkroomError(f"--set {setting}: write it as KEY=VALUE, for example --set {example}")
        try:
            overrides[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise DarkroomError(f"--set {setting}: the value cannot be read; quote it") from None
    return overrides


def run_name(source: str) -> str:
    """drawings/ -> "drawings", a/shards-00.tar.gz -> "shards-00", shapes-tiny -> "shapes-tiny"."""
    name = Path(source).resolve().name if source in (".", "..") else Path(source).name
    for suffix in (".gz", ".tar", ".tgz", ".yaml", ".yml"):
        name = name.removesuffix(suffix)
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip("-.") or "run"


@click.command(short_help="Train a model.")
@click.argument("source", required=False, metavar="RECIPE|FOLDER|TAR")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Run folder. [default: runs/NAME OF THE SOURCE]")
@click.option("--data", help="Where the images are, in place of what the recipe says.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of every random draw.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in the run folder, bit for bit.")
@click.option("--init-from", metavar="MODEL", help="Start from the weights of this model.")
@click.option("--first-stage", metavar="MODEL", help="Use this model's first stage instead of training one.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Time budget; sizes and steps fit it.")
@click.option("--dry-run", is_flag=True, help="Print the plan, memory and hours, then stop.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one key of the recipe (repeatable)."
)
def train(
    source: str | None,
    output: Path | None,
    data: str | None,
    seed: int | None,
    resume: bool,
    init_from: str | None,
    first_stage: str | None,
    minutes: float | None,
    dry_run: bool,
    device: str,
    threads: int | None,
    settings: tuple[str, ...],
) -> int:
    """Train both stages, from images to a model folder with samples and a report.

    The source is a recipe (a name or a .yaml file) or images: a folder (with class folders, metadata.jsonl or .txt
    captions), a tar file, or `shapes`. A path wins over a recipe name. Ctrl-C saves; --resume goes on.

    \b
      darkroom train drawings/ --minutes 30
      darkroom train shapes-tiny --set steps=60
      darkroom train drawings/ --output runs/drawings --resume
    """
    if source is None and not (resume and output):
        raise DarkroomError(
            "nothing to train on: give a recipe, a folder of images or a tar (or --resume --output RUN)"
        )
    overrides = parse_overrides(settings)
    from darkroom.train_job import train as run

    result = run(
        source,
        output or Path("runs") / run_name(str(source)),
        data=data,
        seed=seed,
        resume=resume,
        init_from=init_from,
        first_stage=first_stage,
        minutes=minutes,
        dry_run=dry_run,
        overrides=overrides,
        device=device,
        threads=threads,
    )
    return 130 if result.interrupted else 0
