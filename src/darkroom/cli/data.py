"""`darkroom data`: look at a data set, or write the procedural one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from darkroom.errors import DarkroomError

SHEET_PICTURES = 48
SHOWN_PROBLEMS = 10
SHOWN_CLASSES = 12


def parse_size(text: str) -> tuple[int, int]:
    """ "64" or "96x64" -> (width, height)."""
    match = re.fullmatch(r"([1-9]\d{0,5})(?:x([1-9]\d{0,5}))?", text.lower())
    if match is None:
        raise DarkroomError(f"--size {text}: write one number, or WIDTHxHEIGHT, for example 96x64")
    return int(match[1]), int(match[2] or match[1])


@click.group(short_help="Data sets.")
def data() -> None:
    """Look at a data set, or build the procedural one."""


@data.command(short_help="Counts, sizes, value range, problems, contact sheet.")
@click.argument("source", metavar="FOLDER|TAR|GLOB|shapes")
@click.option("--size", default="64", show_default=True, help="Size on the contact sheet: what a network would see.")
@click.option("--channels", type=click.IntRange(min=1), help="1 for grey, 3 for colour. [default: 3, or the set's own]")
@click.option("--pixels", type=click.Choice(["auto", "uint8", "uint16", "float32"]), default="auto", show_default=True)
@click.option("--sheet", type=click.Path(path_type=Path), default="contact-sheet.png", show_default=True)
@click.option("--no-sheet", is_flag=True, help="Write no contact sheet.")
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
def inspect(
    source: str, size: str, channels: int | None, pixels: str, sheet: Path, no_sheet: bool, as_json: bool
) -> None:
    """Look at every picture: how many, how large, which values, what is broken.

    The contact sheet shows pictures as a network would see them: rotated, cropped and resized by the rule of training.
    Pixels of more than 8 bits are shown by their range, more than three channels by the first three.

    \b
      darkroom data inspect slices/ --size 128 --channels 1
    """
    wanted = parse_size(size)
    from darkroom.cli.progress import StepBar
    from darkroom.data.inspection import inspect_source

    with StepBar("looking at pictures", 0) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        facts = inspect_source(source, show)
    if not no_sheet and facts["pictures"]:
        if channels is None:
            own = max(facts.get("channels", {3: 0}).items(), key=lambda entry: entry[1])[0]
            channels = 3 if own == 1 and source != "phantoms16" else own
        _contact_sheet(source, wanted, channels, pixels, sheet)
        facts["contact_sheet"] = str(sheet)
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        for line in _lines(facts):
            click.echo(line)
    if not facts["pictures"]:
        raise DarkroomError(f"{source}: none of its {len(facts['problems'])} pictures can be read; check the files")


def _contact_sheet(source: str, size: tuple[int, int], channels: int, pixels: str, path: Path) -> None:
    from darkroom.config import from_dict
    from darkroom.data.io import contact_sheet, write_png
    from darkroom.data.sources import DataConfig, open_dataset

    settings = {"source": source, "size": size, "channels": channels, "pixels": pixels}
    dataset = open_dataset(from_dict(DataConfig, settings | {"validation": 0.0, "limit": SHEET_PICTURES}))
    examples = [dataset[i] for i in range(len(dataset))]
    write_png(path, contact_sheet(examples, class_names=dataset.class_names, pixels=dataset.pixels))


def _lines(facts: dict[str, Any]) -> list[str]:
    def table(counts: dict[Any, int], most: int = SHOWN_CLASSES) -> str:
        shown = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:most])
        return shown + (f" and {len(counts) - most} more" if len(counts) > most else "")

    lines = [f"{facts['source']}: {facts['pictures']} pictures"]
    if facts["validation"] is not None:
        lines.append(f"  parts: {facts['train']} train, {facts['validation']} validation")
    if "sizes" in facts:
        sizes = {key: "x".join(map(str, value)) for key, value in facts["sizes"].items() if isinstance(value, list)}
        share = f"{facts['sizes']['share_of_most_common']:.0%}"
        lines.append(f"  sizes: {sizes['smallest']} to {sizes['largest']}, most often {sizes['most_common']} ({share})")
        lines.append(f"  formats: {table(facts['formats'])}; modes: {table(facts['modes'])}")
    if "values" in facts:
        low, high = facts["values"]
        channels = "/".join(map(str, facts["channels"]))
        plural = "" if channels == "1" else "s"
        bits = "/".join(map(str, facts["bits"]))
        lines.append(f"  values: {low:g} to {high:g} in {bits} bits; {channels} channel{plural}")
    if "sizes" in facts:
        counts = {"rotated by EXIF": "rotated_by_exif", "transparent": "transparent", "exact duplicates": "duplicates"}
        lines += [f"  {label}: {facts[key]}" for label, key in counts.items() if facts[key]]
    if captions := facts.get("captions"):
        lines.append(f"  captions: {captions['count']}, of {captions['words']:.1f} words, for example:")
        lines += [f"    {text[:100]}" for text in captions["examples"]]
    if classes := facts.get("classes"):
        lines.append(f"  classes: {len(classes)}: {table(classes)}")
    from darkroom.data.records import EXTRAS

    lines += [f"  {field}: {facts[field]}" for field in EXTRAS if field in facts]
    lines += [f"  note: {note}" for note in facts["notes"]]
    problems = facts["problems"]
    lines.append(f"  problems: {len(problems) or 'none'}")
    lines += [f"    {name}: {reason}" for name, reason in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"    and {len(problems) - SHOWN_PROBLEMS} more (--json lists all)")
    if "contact_sheet" in facts:
        lines.append(f"  what a network would see: {facts['contact_sheet']}")
    return lines


@data.group(short_help="Write a data set.")
def build() -> None:
    """Write a data set as files."""


_OUTPUT = click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="A new folder.")
_COUNT = click.option("-n", "--count", type=click.IntRange(1, 1_000_000), default=1000, show_default=True)
_SIZE = click.option("--size", default="64", show_default=True, help="Pixels: one number, or WIDTHxHEIGHT.")
_SEED = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)


@build.command(short_help="16-bit grey images.")
@_OUTPUT
@_COUNT
@_SIZE
@_SEED
def phantoms16(output: Path, count: int, size: str, seed: int) -> None:
    """Write synthetic radiographs as 16-bit grey PNG files.

    \b
      darkroom data build phantoms16 -o phantoms/ --count 5000
      darkroom train grey16 --data phantoms/
    """
    _synthetic("phantoms16", output, count, size, seed, ".png")


@build.command(short_help="Floating-point images of six bands.")
@_OUTPUT
@_COUNT
@_SIZE
@_SEED
@click.option("--npy", is_flag=True, help="NPY files instead of TIFF.")
def bands6(output: Path, count: int, size: str, seed: int, npy: bool) -> None:
    """Write synthetic multispectral landscapes as floating-point TIFF or NPY files.

    \b
      darkroom data build bands6 -o bands/ --count 5000
      darkroom train bands6 --data bands/
    """
    _synthetic("bands6", output, count, size, seed, ".npy" if npy else ".tif")


def _synthetic(source: str, output: Path, count: int, size: str, seed: int, suffix: str) -> None:
    wanted = parse_size(size)
    from darkroom.cli.progress import StepBar
    from darkroom.data.export import write_synthetic
    from darkroom.data.synthetic import open_synthetic

    with StepBar("drawing", count) as bar:
        write_synthetic(open_synthetic(source, wanted, count, seed), output, suffix, bar.update)
    click.echo(str(output))


@build.command(short_help="The procedural set of coloured shapes.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="A .tar file or a new folder.")
@click.option("-n", "--count", type=click.IntRange(1, 1_000_000), default=1000, show_default=True)
@click.option("--size", default="64", show_default=True, help="Pixels: one number, or WIDTHxHEIGHT.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--kind", type=click.Choice(["mixed", "single", "pair"]), default="mixed", show_default=True)
@click.option("--split", type=click.Choice(["train", "validation"]), default="train", show_default=True)
def shapes(output: Path, count: int, size: str, seed: int, kind: str, split: str) -> None:
    """Write scenes of coloured shapes with captions, classes, boxes and label maps, exact by construction.

    \b
      darkroom data build shapes -o shapes-train.tar --count 5000
    """
    wanted = parse_size(size)
    from darkroom.cli.progress import StepBar
    from darkroom.data.export import write_shapes
    from darkroom.data.sources import DataConfig, ShapesDataset

    dataset = ShapesDataset(DataConfig(source=f"shapes:{kind}", size=wanted, count=count, seed=seed), "train")
    if split == "validation":
        dataset = ShapesDataset(dataset.config, split)
        dataset.count = count
    with StepBar("drawing", count) as bar:
        for path in write_shapes(dataset, output, bar.update):
            click.echo(str(path))
