"""`darkroom eval`: arguments for `darkroom.scoring` (models and images), `darkroom.eval_job` (first stages) and
`darkroom.blind` (the page that asks people)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from darkroom.errors import DarkroomError

if TYPE_CHECKING:
    from darkroom.evaluation.first_stage import FirstStageScores

PLACES = click.Path(path_type=Path)
# Options that the request calls by the same name.
SAME_NAMES = (
    *("count", "seed", "steps", "solver", "eta", "weights", "extractor", "batch_size"),
    *("bits_per_dim", "sweep_count", "save_images", "device", "threads"),
)
ON = ("count", "size", "output", "batch_size", "device", "threads")
# By mode: the options that mean something there. Without one all do, but --anyway.
TAKEN: dict[str, tuple[str, ...]] = {
    "--first-stage": ON,
    "--compare": ("anyway",),
    "--repeat": ("train", "output"),
    "--ab": (*ON, "seed", "steps", "cfg_scale", "solver", "eta", "weights"),
    "--ab-results": (),
}


@click.command(name="eval", short_help="Score a model, a folder of samples, or a first stage.")
@click.argument("places", nargs=-1, metavar="MODEL DATA...")
@click.option("--count", type=click.IntRange(min=1), help="Images to score. [default: as many as the data has]")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the first image; k has seed + k."
)
@click.option("--steps", type=click.IntRange(min=1), help="Solver steps. [default: the model's]")
@click.option("--cfg-scale", type=float, help="Guidance scale; 1 is off. [default: the model's]")
@click.option("--solver", help="[default: the model's]")
@click.option("--eta", type=float, help="Share of fresh noise per step, of solvers that draw noise.")
@click.option("--weights", type=click.Choice(["ema", "live"]), default="ema", show_default=True)
@click.option(
    "--metrics",
    metavar="NAME,...",
    help="fd kd is pr dc neighbours accuracy agreement pairs clip bits. [default: all but bits]",
)
@click.option("--pair-images", type=click.IntRange(min=2), help="Images of kd, pr and dc. [default: 2000]")
@click.option("--bits-per-dim", is_flag=True, help="Also the variational bound (slow; the metric `bits`).")
@click.option("--bound-levels", type=click.IntRange(min=2), help="Noise levels of the bound. [default: 100]")
@click.option(
    "--extractor",
    default="auto",
    show_default=True,
    help="inception-tf, inception-clean, dinov2-..., clip-..., darkroom.",
)
@click.option("--train", multiple=True, metavar="DATA", help="Training images, for the memorisation check.")
@click.option("--sweep-steps", metavar="N,N,...", help="Also a curve of the scores over steps.")
@click.option("--sweep-guidance", metavar="S,S,...", help="Also a curve of the scores over the guidance scale.")
@click.option("--sweep-count", type=click.IntRange(min=2), help="Images of each point of a curve. [default: --count]")
@click.option("--save-images", is_flag=True, help="Keep all scored images in the output folder.")
@click.option("--size", metavar="N|WxH", help="Size of the images. [default: the model's, or that of the samples]")
@click.option("--output", "-o", type=PLACES, help="Folder. [default: runs/eval-NAME OF THE MODEL]")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Images at a time.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
@click.option(
    "--first-stage", metavar="MODEL", help="Score this model's first stage instead: how well it gives DATA back."
)
@click.option("--compare", is_flag=True, help="PLACES are records: put their scores beside one another.")
@click.option("--anyway", is_flag=True, help="With --compare: also where protocols differ.")
@click.option("--repeat", type=PLACES, metavar="RECORD", help="Measure again what a record says, and compare.")
@click.option("--ab", is_flag=True, help="PLACES are two models or sets of images, and DATA: a page that asks people.")
@click.option("--ab-results", is_flag=True, help="PLACES are the answers of such pages: put them together.")
def evaluate(places: tuple[str, ...], first_stage: str | None, compare: bool, repeat: Path | None, ab: bool,
             ab_results: bool, **options: Any) -> int | None:  # fmt: skip
    """Score a model on held-out images: FID (or what it is called with the extractor that is there), kernel distance,
    precision and recall, agreement with what was asked, nearest training images.

    MODEL is a model, a run folder, or images: a folder, a tar, a glob. DATA are the images to compare with; their
    captions, classes, boxes or maps are what the model is asked for. Everything it takes to make a score again is in
    scores.json beside the report. An interrupted evaluation goes on with the same command; torchrun divides it.

    \b
      darkroom eval emoji emoji-val.tar --count 184 --steps 10
      darkroom eval samples/ photos-held-out/
      darkroom eval runs/clothes clothes-val.tar --train "clothes-train-*.tar" --sweep-steps 5,10,20,50
      darkroom eval --compare runs/eval-a/scores.json runs/eval-b/scores.json
      darkroom eval --repeat runs/eval-a/scores.json
      darkroom eval --ab runs/a runs/b photos-held-out/ --count 50 -o which.html
      darkroom eval --first-stage runs/drawings held-out/
    """
    modes = {"--first-stage": first_stage is not None, "--compare": compare, "--repeat": repeat is not None,
             "--ab": ab, "--ab-results": ab_results}  # fmt: skip
    if len(chosen := [name for name, given in modes.items() if given]) > 1:
        raise DarkroomError(f"{chosen[0]} and {chosen[1]} are two different things; give one of them")
    check_options(click.get_current_context(), chosen[0] if chosen else "")
    if repeat is not None:
        return _repeat(repeat, places, options)
    if first_stage is not None:
        _first_stage(first_stage, places, options)
    elif compare:
        _compare(places, options["anyway"])
    elif ab:
        _ab(places, options)
    elif ab_results:
        _ab_results(places)
    else:
        _model(places, options)
    return None


def check_options(context: click.Context, mode: str) -> None:
    """Refuse what would be passed over in silence: options that were typed and mean nothing in this mode."""
    for parameter in context.command.params:
        name = parameter.name or ""
        typed = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        own = name == "places" or parameter.opts[0] == mode
        if not typed or own or (name != "anyway" if not mode else name in TAKEN[mode]):
            continue
        if not mode:
            raise DarkroomError("--anyway is about --compare; leave it out")
        why = "; the record says how it was measured" if mode == "--repeat" else ""
        raise DarkroomError(f"{parameter.opts[0]} means nothing with {mode}{why}; leave it out")


# --- models and images ------------------------------------------------------------------------------------------------


def _model(places: Sequence[str], options: dict[str, Any]) -> None:
    if not places:
        raise DarkroomError("nothing to evaluate: darkroom eval MODEL DATA, or --first-stage MODEL DATA")
    if len(places) == 1:
        raise DarkroomError(
            f"nothing to evaluate {places[0]} on: name held-out images behind it, a folder, a tar, or shapes (a first "
            "stage is named with --first-stage MODEL)"
        )
    metrics = None if options["metrics"] is None else [w for w in options["metrics"].replace(",", " ").split() if w]
    steps = numbers("--sweep-steps", options["sweep_steps"], int)
    guidance = numbers("--sweep-guidance", options["sweep_guidance"], float)
    size = parse_size(options["size"])
    from darkroom.evaluation.measure import MOST, check_metrics

    if metrics is not None:
        metrics = check_metrics(metrics)
    from darkroom.scoring import LEVELS, EvalRequest

    request = EvalRequest(
        model=places[0],
        data=list(places[1:]),
        training=list(options["train"]) or None,
        metrics=metrics,
        sweep_steps=[int(n) for n in steps],
        sweep_guidance=guidance,
        size=size,
        guidance_scale=options["cfg_scale"],
        pair_images=options["pair_images"] or MOST,
        bound_levels=options["bound_levels"] or LEVELS,
        **{name: options[name] for name in SAME_NAMES},
    )
    _score(request, options["output"])


def _score(request: Any, output: Path | None) -> Any:
    """Run it with progress bars, and say what came out (in the first process)."""
    from darkroom.cli.progress import PhaseBars
    from darkroom.report_scores import score_lines
    from darkroom.scoring import evaluate_model
    from darkroom.training.distributed import join_world

    world = join_world(request.device)
    with PhaseBars(quiet=not world.is_main) as bars:
        result = evaluate_model(request, output, world=world, progress=bars.update)
    if result is not None:
        for line in score_lines(result.record):
            click.echo(line)
        click.echo(f"record: {result.folder / 'scores.json'}")
        click.echo(f"report: {result.folder / 'report.html'}")
    return result


def numbers(name: str, text: str | None, kind: type) -> list[Any]:
    """ "5,10" -> [5, 10]."""
    try:
        found = [kind(word) for word in (text or "").replace(",", " ").split()]
    except ValueError:
        found = [-1]
    if any(not 0 <= n < 1e6 or (kind is int and n < 1) for n in found):
        raise DarkroomError(
            f"{name} {text}: give {'whole numbers from 1' if kind is int else 'numbers from 0'} on with commas "
            "between, such as 5,10,20"
        )
    return found


def _compare(places: Sequence[str], anyway: bool) -> None:
    if len(places) < 2:
        raise DarkroomError("--compare needs two records or more: darkroom eval --compare a/scores.json b/scores.json")
    from darkroom.evaluation.protocol import check_comparable, read_record
    from darkroom.report_scores import compare_lines

    records = [read_record(place) for place in places]
    names = unique_names([record.name for record in records], places)
    if not anyway:
        check_comparable(records, names)
    for line in compare_lines(records, names):
        click.echo(line)
    if anyway:
        try:
            check_comparable(records, names)
        except DarkroomError as error:
            click.echo(f"warning: {error}")


def unique_names(names: Sequence[str], places: Sequence[str]) -> list[str]:
    """The records' own names; their places where two have one name."""
    return [name if names.count(name) == 1 else place for name, place in zip(names, places, strict=True)]


def _repeat(file: Path, places: Sequence[str], options: dict[str, Any]) -> int:
    from darkroom.evaluation.protocol import read_record
    from darkroom.repeat import repeat_request, repeated_lines

    record = read_record(file)
    request = repeat_request(record, places, options["train"])
    folder = (file if file.is_dir() else file.parent).resolve()
    result = _score(request, options["output"] or folder.with_name(f"{folder.name}-repeat"))
    if result is None:
        return 0
    same, lines = repeated_lines(record, result.record)
    for line in lines:
        click.echo(line)
    return 0 if same else 1


# --- people -----------------------------------------------------------------------------------------------------------


def _ab(places: Sequence[str], options: dict[str, Any]) -> None:
    if len(places) < 2:
        raise DarkroomError("--ab needs two models or sets of images: darkroom eval --ab A B [DATA] -o which.html")
    from darkroom.blind import BlindRequest, write_blind_page
    from darkroom.cli.progress import PhaseBars

    request = BlindRequest(
        one=places[0],
        other=places[1],
        data=list(places[2:]),
        pairs=options["count"] or 40,
        size=parse_size(options["size"]),
        guidance_scale=options["cfg_scale"],
        **{
            name: options[name]
            for name in ("seed", "steps", "solver", "eta", "weights", "batch_size", "device", "threads")
        },
    )
    with PhaseBars() as bars:
        page = write_blind_page(request, options["output"], progress=bars.update)
    click.echo(f"page: {page}")


def _ab_results(places: Sequence[str]) -> None:
    if not places:
        raise DarkroomError("--ab-results needs the files that were downloaded from the page")
    from darkroom.blind import result_lines

    for line in result_lines([Path(place) for place in places]):
        click.echo(line)


# --- first stages -----------------------------------------------------------------------------------------------------


def _first_stage(model: str, data: Sequence[str], options: dict[str, Any]) -> None:
    """PSNR, SSIM, perceptual and Frechet distance, sharpness, speed of a first stage."""
    if not data:
        raise DarkroomError("nothing to evaluate on: give a folder of images, a tar, or shapes")
    sides = parse_size(options["size"])
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
            model,
            data,
            options["output"],
            size=sides,
            count=options["count"],
            batch_size=options["batch_size"],
            device=options["device"],
            threads=options["threads"],
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
