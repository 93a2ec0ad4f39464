"""`darkroom study`: arguments for the functions of `darkroom.study`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from darkroom.errors import DarkroomError


@click.group(short_help="Train and compare many models under one protocol.")
def study() -> None:
    """Train and compare many models under one protocol."""


@study.command("first-stages", short_help="KL and VQ at several f: the paper's table of first stages.")
@click.argument("more", nargs=-1, metavar="[ROW]...")
@click.option("--output", "-o", type=click.Path(path_type=Path), default="runs/study-first-stages", show_default=True)
@click.option("--rows", multiple=True, metavar="ROW...", help="Such as kl-f4 vq-f4. [default: KL and VQ at f 4, 8, 16]")
@click.option("--crops", type=click.IntRange(min=1), help="Training budget of each row. [default: 102,400]")
@click.option("--data", help="Where the images are: the folder that holds the sets, or other images.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Of scoring.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one key of every row's recipe.")
def first_stages(
    more: tuple[str, ...],
    output: Path,
    rows: tuple[str, ...],
    crops: int | None,
    data: str | None,
    batch_size: int,
    device: str,
    threads: int | None,
    settings: tuple[str, ...],
) -> int:
    """Train first stages with one budget and score them on held-out images: table.csv, table.png, index.html.

    The same command goes on where it was interrupted. Rows that are done are kept, and several processes may work on
    different rows of one folder at the same time.

    \b
      darkroom study first-stages
      darkroom study first-stages --rows kl-f4 vq-f4 --crops 200000 -o runs/study
    """
    from darkroom.cli.progress import StepBar
    from darkroom.cli.train import parse_overrides

    overrides = parse_overrides(settings)
    chosen = [row for word in (*rows, *more) for row in word.split(",") if row]
    if more and not rows:
        raise DarkroomError(f"name rows with --rows: --rows {' '.join(more)}")
    from darkroom.study import ROWS, study_first_stages

    bars: list[StepBar] = []

    def progress(row: str) -> Callable[[int, int], None]:
        def update(done: int, total: int) -> None:
            if not bars:
                bars.append(StepBar(f"scoring {row}", total))
            bars[0].update(done)
            if done == total:
                bars.pop().__exit__(None, None, None)

        return update

    try:
        result = study_first_stages(
            output,
            chosen or ROWS,
            crops=crops,
            data=data,
            overrides=overrides,
            batch_size=batch_size,
            device=device,
            threads=threads,
            progress=progress,
        )
    finally:
        for bar in bars:
            bar.__exit__(None, None, None)
    for line in table_lines(result.rows):
        click.echo(line)
    if result.rows:
        click.echo(f"table: {result.folder / 'index.html'}")
    return 130 if result.interrupted else 0


def table_lines(rows: list[dict[str, object]]) -> list[str]:
    """What fits on a terminal; everything is in table.csv."""
    from darkroom.report_evaluation import score_text

    if not rows:
        return []
    names = [name for row in rows for name in row]
    scores = [n for n in dict.fromkeys(names) if n in ("PSNR", "SSIM", "LPIPS") or n.startswith(("percep", "rFD-"))]
    columns = ["row", *scores, "gradient energy ratio", "codes used", "training minutes"]
    cells = [columns, *([score_text(c, row.get(c)) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    ]
