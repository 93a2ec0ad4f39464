"""`darkroom eval`: arguments for `darkroom.eval_job.evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from darkroom.errors import DarkroomError

if TYPE_CHECKING:
    from darkroom.evaluation.first_stage import FirstStageScores


@click.command(name="eval", short_help="Score a model on images.")
@click.argument("data", nargs=-1, metavar="DATA...")
@click.option("--first-stage", metavar="MODEL", help="Score this model's first stage: how well it gives images back.")
@click.option("--size", metavar="N|WxH", help="Size of the images. [default: that of the model's training, else 256]")
@click.option("--count", type=click.IntRange(min=1), help="At most so many images of each source.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder. [default: runs/eval-NAME OF THE MODEL]")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Images at a time.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
def evaluate(
    data: tuple[str, ...],
    first_stage: str | None,
    size: str | None,
    count: int | None,
    output: Path | None,
    batch_size: int,
    device: str,
    threads: int | None,
) -> None:
    """Score how well a first stage gives images back: PSNR, SSIM, perceptual and Frechet distance, sharpness, speed.

    DATA are folders, tars or globs of images, or `shapes`; several get scores of their own. The scores are written
    with all that it takes to make them again (scores.json), with pictures and a report.

    \b
      darkroom eval --first-stage runs/drawings held-out/
      darkroom eval --first-stage emoji emoji-val.tar photos-val.tar --size 128 -o runs/scores
    """
    if first_stage is None:
        raise DarkroomError(
            "only first stages can be evaluated by this version: name one, darkroom eval --first-stage MODEL DATA"
        )
    if not data:
        raise DarkroomError("nothing to evaluate on: give a folder of images, a tar, or shapes")
    sides = parse_size(size)
    from darkroom.cli.progress import StepBar
    from darkroom.eval_job import evaluate as run

    bar: StepBar | None = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = StepBar("evaluating", total)
        bar.update(done)

    try:
        result = run(
            first_stage,
            data,
            output,
            size=sides,
            count=count,
            batch_size=batch_size,
            device=device,
            threads=threads,
            progress=progress,
        )
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)
    for line in score_lines(result.scores):
        click.echo(line)
    click.echo(f"report: {result.folder / 'report.html'}")


def parse_size(size: str | None) -> tuple[int, int] | None:
    """ "128" -> (128, 128), "512x256" -> (512, 256)."""
    if size is None:
        return None
    words = size.lower().split("x")
    if len(words) > 2 or not all(w.isascii() and w.isdigit() and int(w) > 0 for w in words):
        raise DarkroomError(f"--size {size}: write it as 128 or 512x256 (width x height)")
    return int(words[0]), int(words[-1])


def score_lines(scores: FirstStageScores) -> list[str]:
    """The table on the terminal: a row for each metric, a column for each source."""
    from darkroom.report_evaluation import score_text

    sources = scores.sources if len(scores.sources) > 1 else {}
    rows = [["", "all", *sources]] if sources else []
    images = [str(scores.protocol["count"]), *(str(s["images"]) for s in sources.values())]
    rows.append(["images", *images])
    for name, value in scores.scores.items():
        rows.append([name, score_text(name, value), *(score_text(name, s.get(name)) for s in sources.values())])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return [*(line.rstrip() for line in lines), *(f"warning: {warning}" for warning in scores.warnings)]
