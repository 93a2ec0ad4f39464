"""`darkroom measure`: arguments for `darkroom.measure`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Measure a first stage's latents again.")
@click.argument("model", metavar="MODEL")
@click.argument("latents", metavar="RUN|LATENTS", type=click.Path(path_type=Path))
@click.option(
    "--latents",
    "kind",
    type=click.Choice(["global", "channel", "std"]),
    default="global",
    show_default=True,
    help="One mean and deviation, one of each per channel, or the deviation alone (the paper's).",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the new first stage.")
def measure(model: str, latents: Path, kind: str, output: Path) -> None:
    """Write the first stage of MODEL with shift and scale measured on cached latents; no image is encoded.

    Latent caches hold what was before shift and scale. They are in the folders of runs that trained on latents.

    \b
      darkroom measure runs/flowers runs/flowers --latents channel -o first-stages/flowers
    """
    from typing import Any, cast

    from darkroom.remeasure import measure as run

    first_stage = run(model, latents, cast(Any, kind), output)
    for name in ("shift", "scale"):
        numbers = getattr(first_stage, name).reshape(-1).tolist()
        click.echo(f"{name}: {', '.join(f'{n:.5g}' for n in numbers)}")
    click.echo(click.format_filename(output))
