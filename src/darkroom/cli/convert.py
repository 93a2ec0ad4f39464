"""`darkroom convert`: a model or a first stage in the layout of another library, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from darkroom.exchange import Conversion
    from darkroom.interop.diffusers_first_stage import Number
    from darkroom.whole_models import ModelConversion


@click.command(short_help="Convert checkpoints.")
@click.argument("source", metavar="SOURCE")
@click.argument("destination", type=click.Path(path_type=Path), metavar="DESTINATION")
@click.option(
    "--to",
    type=click.Choice(["darkroom", "compvis", "diffusers"]),
    help="Layout to write. [default: compvis for a name that ends in .safetensors or .ckpt, else darkroom]",
)
@click.option("--first-stage", is_flag=True, help="Only the first stage of a whole model.")
@click.option("--weights", type=click.Choice(["ema", "live"]), help="Only these of a whole model. [default: all]")
@click.option("--scale", type=float, help="Scale of the latents, instead of what the source says.")
@click.option("--shift", type=float, help="Shift of the latents, instead of what the source says.")
@click.option("--set", "facts", multiple=True, metavar="NAME=VALUE", help="What no tensor tells: prediction=v, ...")
def convert(
    source: str,
    destination: Path,
    to: str | None,
    first_stage: bool,
    weights: str | None,
    scale: float | None,
    shift: float | None,
    facts: tuple[str, ...],
) -> None:
    """Write SOURCE in another layout, and check that every tensor comes back bit for bit.

    SOURCE is a file of the official code (a whole checkpoint or a first stage), a diffusers folder, a Darkroom model
    folder or a bundled name. Files are read without running anything in them.

    \b
      darkroom convert v1-5-pruned.ckpt sd-v1                    a Darkroom model folder: all of it
      darkroom convert sd-v1 sd-v1.safetensors                   and back to one official file
      darkroom convert sd-v1 folder --to diffusers               for DiffusionPipeline.from_pretrained
      darkroom convert v2-1.ckpt sd2 --set prediction=epsilon    where its family's default is wrong
      darkroom convert kl-f8.ckpt kl-f8                          a Darkroom model folder
      darkroom convert v1-5.safetensors vae.safetensors --first-stage
      darkroom convert kl-f8 vae --to diffusers                  for diffusers' AutoencoderKL or VQModel
    """
    from darkroom.cli.progress import StepBar
    from darkroom.cli.train import parse_overrides
    from darkroom.exchange import Conversion
    from darkroom.exchange import convert as run

    with StepBar("convert", total=3) as bar:
        done = run(
            source,
            destination,
            to,
            weights=weights,
            scale=scale,
            shift=shift,
            facts=parse_overrides(facts, "prediction=v"),
            first_stage=first_stage,
            progress=bar.update,
        )
    lines = _lines(done) if isinstance(done, Conversion) else _lines_of_model(done)
    if weights and not done.has_both:
        lines.insert(
            1,
            f"  weights: the source has one kind (no averaged ones beside live ones): --weights {weights} is it",
        )
    for line in lines:
        click.echo(line)


def _lines(done: Conversion) -> list[str]:
    from darkroom.interop.compvis_first_stage import LEFT_OUT

    returned = set(LEFT_OUT.values())
    found = done.source
    lines = [f"{found.path}: {found.what}"]
    if found.inside:
        lines.append(f"  only the first stage of {found.inside}")
    rest = {what: count for what, count in found.left_out.items() if not (found.inside and "other" in what)}
    kept = {} if done.format == "diffusers" or found.inside else {w: n for w, n in rest.items() if w in returned}
    for verb, counts in (
        ("kept for the way back", kept),
        ("left out", {w: n for w, n in rest.items() if w not in kept}),
    ):
        if counts:
            lines.append(f"  {verb}: " + ", ".join(f"{what} ({_tensors(count)})" for what, count in counts.items()))
    lines.append(f"  latents: shift {_number(done.shift)}, scale {_number(done.scale)} (from {done.scale_from})")
    if done.scale_from == "a bare first stage":
        lines[-1] = (
            f"  latents: shift {_number(done.shift)}, scale {_number(done.scale)}: a bare first stage does not say; "
            "Stable Diffusion 1 and 2 have --scale 0.18215, XL has 0.13025"
        )
    return [*lines, f"{done.destination} ({done.format}): {_tensors(done.tensors)}, bit for bit"]


def _lines_of_model(done: ModelConversion) -> list[str]:
    found = done.source
    lines = [f"{found.path}: {found.title}"]
    lines += [f"  {name}: {told}" for name, told in found.facts.items()]
    if found.latents is not None:
        lines.append(f"  latents: shift {_number(found.latents[0])}, scale {_number(found.latents[1])}")
    if found.averaged:
        which = {"all": "averaged, and as training left them", "ema": "averaged", "live": "as training left them"}
        lines.append(f"  weights: {which[done.weights]}")
    if found.kept:
        verb = "kept for the way back" if done.kept else "left out"
        lines.append(f"  {verb}: " + ", ".join(f"{what} ({_tensors(n)})" for what, n in found.left_out.items()))
    if done.left_out:
        lines.append(f"  left out, as the layout has no place for it: {', '.join(done.left_out)}")
    return [*lines, f"{done.destination} ({done.format}): {_tensors(done.tensors)}, bit for bit"]


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' * (count != 1)}"


def _number(value: Number) -> str:
    return f"{value:g}" if not isinstance(value, list) else "per channel"
