"""`darkroom convert`: a first stage in the layout of another library, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from darkroom.exchange import Conversion
    from darkroom.interop.diffusers_first_stage import Number


@click.command(short_help="Convert checkpoints.")
@click.argument("source", metavar="SOURCE")
@click.argument("destination", type=click.Path(path_type=Path), metavar="DESTINATION")
@click.option(
    "--to",
    type=click.Choice(["darkroom", "compvis", "diffusers"]),
    help="Layout to write. [default: compvis for a name that ends in .safetensors or .ckpt, else darkroom]",
)
@click.option("--weights", type=click.Choice(["ema", "live"]), default="ema", show_default=True, help="Which weights.")
@click.option("--scale", type=float, help="Scale of the latents, instead of what the source says.")
@click.option("--shift", type=float, help="Shift of the latents, instead of what the source says.")
def convert(
    source: str, destination: Path, to: str | None, weights: str, scale: float | None, shift: float | None
) -> None:
    """Write the first stage of SOURCE in another layout, and check that every tensor comes back bit for bit.

    SOURCE is a file of the official code (a first stage, or a whole checkpoint, of which the first stage is taken), a
    diffusers folder, a Darkroom model folder or a bundled name. Files are read without running anything in them.

    \b
      darkroom convert kl-f8.ckpt kl-f8                          a Darkroom model folder
      darkroom convert v1-5.safetensors vae.safetensors          the first stage of Stable Diffusion, official layout
      darkroom convert runs/clothes/model vae --to diffusers     for diffusers' AutoencoderKL or VQModel
    """
    from darkroom.cli.progress import StepBar
    from darkroom.exchange import convert as run

    with StepBar("convert", total=3) as bar:
        done = run(source, destination, to, weights=weights, scale=scale, shift=shift, progress=bar.update)
    for line in _lines(done):
        click.echo(line)


def _lines(done: Conversion) -> list[str]:
    found = done.source
    lines = [f"{found.path}: {found.what}"]
    if found.inside:
        lines.append(f"  only the first stage of {found.inside}: this version does not convert its other parts")
    left_out = {what: count for what, count in found.left_out.items() if not (found.inside and "other" in what)}
    if left_out:
        lines.append("  left out: " + ", ".join(f"{what} ({_tensors(count)})" for what, count in left_out.items()))
    lines.append(f"  latents: shift {_number(done.shift)}, scale {_number(done.scale)} (from {done.scale_from})")
    if done.scale_from == "a bare first stage":
        lines[-1] = (
            f"  latents: shift {_number(done.shift)}, scale {_number(done.scale)}: a bare first stage does not say; "
            "Stable Diffusion 1 and 2 have --scale 0.18215, XL has 0.13025"
        )
    return [*lines, f"{done.destination} ({done.format}): {_tensors(done.tensors)}, bit for bit"]


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' * (count != 1)}"


def _number(value: Number) -> str:
    return f"{value:g}" if not isinstance(value, list) else "per channel"
