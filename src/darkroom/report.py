"""One self-contained HTML page about a training run.

`write_report(run_folder)` reads what the run left behind and leaves out what is not there:

    config.yaml     the resolved settings
    plan.json       what was decided before training (sizes, steps, memory, hours)
    metrics.jsonl   one JSON object per line: stage, train_step, loss, ...
    samples/        first_stage-{train_step}.png: rows of pictures, their reconstructions and the errors;
                    denoiser-{train_step}.png: generated pictures, with a PNG text `captions` (JSON list);
                    contact-sheet.png: what the network sees
    data.json       description of the data: examples, problems (skipped files), warnings
    summary.json    scores, minutes, hardware, threads, versions, {stage}_skipped_steps, {stage}_rollbacks
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from darkroom.errors import DarkroomError
from darkroom.model_card import model_card as model_card
from darkroom.report_charts import Series, line_chart, number
from darkroom.report_tables import as_list, flatten, grid_table, is_number, plural, table

ASSETS = Path(__file__).parent / "report_assets"
MOST_FRAMES = 16  # pictures over time per stage
MOST_PIXELS = 1600  # longest side of an embedded picture
STAGES = {
    "first_stage": (
        "First stage",
        "The autoencoder, which turns pictures into latents and latents back into pictures.",
    ),
    "preview": ("Preview decoder", "A small network that shows what a latent will look like, at once."),
    "denoiser": ("Denoiser", "The network that turns noise into latents."),
}
FILMS = {  # title and legend of a stage's pictures
    "first_stage": (
        "Reconstructions over time",
        "Rows: held-out pictures, their reconstructions, the absolute errors.",
    ),
    "preview": ("Previews over time", "Rows: held-out pictures, the first stage's own decoder, the preview decoder."),
}
TITLES = {
    "loss": "Loss",
    "psnr": "PSNR of reconstructions, dB",
    "gradient_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "images_per_second": "Images per second",
    "kl": "KL term",
    "nll": "Reconstruction NLL",
    "reconstruction": "Reconstruction error",
    "perceptual": "Perceptual distance",
    "discriminator_loss": "Discriminator loss",
}
MECHANICS = ("gradient_norm", "learning_rate", "images_per_second")
SCORES = "score_"  # what names of scores of generated pictures begin with
NOT_CURVES = {"stage", "train_step", "images_seen", "seconds", "skipped"}


@dataclass
class Run:
    """What was found in a run folder; everything may be empty."""

    folder: Path
    config: str
    plan: dict[str, Any]
    metrics: dict[str, list[dict[str, Any]]]
    samples: dict[str, list[tuple[int, Path]]]
    data: dict[str, Any]
    summary: dict[str, Any]

    @property
    def stages(self) -> list[str]:
        """Stages with anything to show, in the order of training."""
        found = {*self.metrics, *self.samples}
        return [*(s for s in STAGES if s in found), *sorted(found - set(STAGES))]


def write_report(run_folder: str | Path) -> Path:
    """Write `report.html` into the run folder and return its path. Parts that are missing are left out."""
    folder = Path(run_folder)
    if not folder.is_dir():
        raise DarkroomError(f'no run folder "{folder}"; give the folder that `darkroom train --output` wrote')
    target, part = folder / "report.html", folder / "report.html.part"
    part.write_text(render(read_run(folder)), encoding="utf-8")
    os.replace(part, target)
    return target


# --- reading ---------------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> Run:
    metrics: dict[str, list[dict[str, Any]]] = {}
    for line in _text(folder / "metrics.jsonl").splitlines():
        record = _parse(line)
        if isinstance(record, dict) and isinstance(record.get("train_step"), int):
            metrics.setdefault(str(record.get("stage", "denoiser")), []).append(record)
    for records in metrics.values():
        records.sort(key=lambda r: r["train_step"])
    samples: dict[str, list[tuple[int, Path]]] = {}
    for file in (folder / "samples").glob("*.png"):
        if match := re.fullmatch(r"(\w+)-(\d+)", file.stem):
            samples.setdefault(match[1], []).append((int(match[2]), file))
    for frames in samples.values():
        frames.sort()
    plan, data, summary = (_mapping(folder / f"{name}.json") for name in ("plan", "data", "summary"))
    return Run(folder, _text(folder / "config.yaml"), plan, metrics, samples, data, summary)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:  # a killed run can leave half a line
        return None


def _mapping(file: Path) -> dict[str, Any]:
    value = _parse(_text(file))
    return value if isinstance(value, dict) else {}


# --- the page --------------------------------------------------------------------------------------------------------


def render(run: Run) -> str:
    """The whole page, in the order of a reader's questions: what came out, can I trust it, how did it go, what went in,
    how do I repeat it."""
    name = run.folder.resolve().name
    sections = [
        ("warnings", "", warnings_section(run)),
        *((stage, stage_title(stage), stage_section(run, stage)) for stage in run.stages),
        ("data", "Data", data_section(run)),
        ("settings", "Settings", settings_section(run)),
        ("environment", "Scores and environment", environment_section(run)),
    ]
    return html_page(name, headline(run, name), sections)


def html_page(title: str, head: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """The frame that all of Darkroom's pages have. Sections are (id, title, body); those without a body are left out,
    those without a title have no entry in the navigation."""
    page, style, script = (_text(ASSETS / file) for file in ("page.html", "style.css", "script.js"))
    return page.format(
        title=escape(title),
        style=style,
        script=script,
        links="".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, body in sections if body and name),
        headline=head,
        sections="\n".join(f'<section id="{key}">{body}</section>' for key, _, body in sections if body),
    )


def page_head(kicker: str, title: str, about: str = "", tiles: Sequence[tuple[str, str]] = ()) -> str:
    """Kind of page, title, one line about it, and the numbers that matter as (label, value)."""
    parts = [f'<p class="kicker">{escape(kicker)}</p><h1>{escape(title)}</h1>']
    if about:
        parts.append(f'<p class="about">{escape(about)}</p>')
    if tiles:
        shown = [f'<div class="tile"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for k, v in tiles]
        parts.append(f'<div class="tiles">{"".join(shown)}</div>')
    return "".join(parts)


def notes_box(notes: Sequence[str], all_well: str) -> str:
    """What a reader must know before trusting the numbers (HTML sentences); one quiet line when there is nothing."""
    if not notes:
        return f'<p class="all-well">{escape(all_well)}</p>'
    items = "".join(f"<li>{note}</li>" for note in notes)
    return f'<div class="notes"><h2>Before you trust it</h2><ul>{items}</ul></div>'


def stage_title(stage: str) -> str:
    return STAGES[stage][0] if stage in STAGES else stage.replace("_", " ").capitalize()


def headline(run: Run, name: str) -> str:
    """Title, one line about the run, the numbers that matter, and the last pictures."""
    parts = [page_head("Darkroom training report", name, about_line(run.plan), key_numbers(run))]
    for stage, what in (("denoiser", "Generated pictures"), ("first_stage", "Reconstructions")):
        if frames := run.samples.get(stage):
            step, file = frames[-1]
            parts.append(
                f'<figure class="hero">{image_tag(file, what)}<figcaption>{what} after train step {step:,}'
                f"{caption_list(picture_captions(file))}</figcaption></figure>"
            )
            break
    return "".join(parts)


def about_line(plan: Mapping[str, Any]) -> str:
    """One sentence from the plan: recipe, images, sizes, conditioning."""
    parts = [f"Recipe {plan['recipe']}"] if plan.get("recipe") else []
    if is_number(plan.get("images")):
        parts.append(f"{plan['images']:,} images")
    if size := as_list(plan.get("image_size")):
        parts[-1:] = [f"{parts[-1]} of {size[0]}×{size[-1]}"] if parts else [f"{size[0]}×{size[-1]}"]
    if f := plan.get("downsampling"):
        parts.append("pixels, no first stage" if f == 1 else f"f = {f}")
    if plan.get("conditioning") is not None:  # a run without a denoiser has none
        fields = ", ".join(str(c).replace("_", " ") for c in as_list(plan["conditioning"]))
        parts.append(f"conditioned on {fields}" if fields else "unconditional")
    return " · ".join(parts)


def key_numbers(run: Run) -> list[tuple[str, str]]:
    """At most eight (label, value) pairs for the top of the page."""
    pairs = [(k.replace("_", " "), number(float(v))) for k, v in flatten(run.summary.get("scores")) if is_number(v)]
    for stage, records in run.metrics.items() if not pairs else ():
        for key in ("validation_psnr", "psnr", "validation_loss"):
            if values := [r[key] for r in records if is_number(r.get(key))]:
                pairs.append((f"{stage_title(stage).lower()}: {key.replace('_', ' ')}", number(values[-1])))
    pairs = [(label.replace("psnr", "PSNR").replace("ssim", "SSIM"), value) for label, value in pairs]
    if is_number(count := run.data.get("examples")):
        pairs.append(("pictures", f"{count:,}"))
    for stage in run.stages:
        if stage in run.metrics:
            pairs.append((f"{stage_title(stage).lower()} steps", f"{run.metrics[stage][-1]['train_step']:,}"))
    minutes = run.summary.get("minutes")
    if not is_number(minutes):
        last = [records[-1].get("seconds") for records in run.metrics.values()]
        minutes = sum(s for s in last if is_number(s)) / 60
    if minutes:
        pairs.append(("minutes of training", f"{minutes:.1f}" if minutes < 100 else f"{minutes:,.0f}"))
    return pairs[:8]


def warnings_section(run: Run) -> str:
    """Everything a reader must know before trusting the result; one quiet line when there is nothing."""
    stated = [str(w) for source in (run.plan, run.data, run.summary) for w in as_list(source.get("warnings"))]
    notes = [escape(w) for w in dict.fromkeys(stated)]
    if count := len(as_list(run.data.get("problems"))):
        notes.append(
            f"{count:,} {plural(count, 'file')} could not be read and {plural(count, 'was', 'were')} left out "
            '(<a href="#problems">which, and why</a>).'
        )
    for stage in run.stages:
        where = f"in the {stage_title(stage).lower()}"
        if skipped := run.summary.get(f"{stage}_skipped_steps"):
            steps = plural(skipped, "step")
            notes.append(f"{skipped:,} {steps} {where} skipped: a loss or gradient was not finite.")
        if returns := run.summary.get(f"{stage}_rollbacks"):
            times = plural(returns, "return to a checkpoint", "returns to a checkpoint")
            notes.append(f"{returns:,} {times} {where}, at half the rate: values stayed non-finite.")
    if run.summary.get("interrupted"):
        notes.append("The run was interrupted; <code>darkroom train</code> with <code>--resume</code> continues it.")
    if not run.metrics:
        notes.append("No metrics were recorded.")
    return notes_box(notes, "No unreadable files, no values that were not finite, no warnings.")


def stage_section(run: Run, stage: str) -> str:
    learnt, mechanics = charts_of(run.metrics.get(stage, []))
    parts = [f"<h2>{escape(stage_title(stage))}</h2>"]
    if stage in STAGES:
        parts.append(f'<p class="lead">{STAGES[stage][1]}</p>')
    few = len(learnt) <= 2  # then there is room for the mechanics beside them
    if shown := learnt + mechanics if few else learnt:
        parts.append(f'<div class="charts">{"".join(shown)}</div>')
    if mechanics and not few:
        title = "Learning rate, gradients, speed"
        parts.append(f'<details><summary>{title}</summary><div class="charts">{"".join(mechanics)}</div></details>')
    title, legend = FILMS.get(stage, ("Samples over time", "The same prompts and seeds at every step."))
    parts.append(film(run.samples.get(stage, []), title, legend))
    if stage == "first_stage":
        parts.append(flat_colours(run.summary.get("flat_colours"), run.folder / "samples" / "flat-colours.png"))
    return "".join(parts)


def flat_colours(found: Any, picture: Path) -> str:
    """What became of flat colours, from summary.json: a table and the amplified picture."""
    if not isinstance(found, Mapping) or not found.get("colours"):
        return ""
    head = ("colour in", "error of the mean", "ripple", "ripple without the border", "dB", "strongest wave")
    rows = [
        (
            str(c["name"]),
            *(number(float(c[k])) for k in ("colour_error", "ripple", "interior", "decibels")),
            c["pattern"],
        )
        for c in found["colours"]
    ]
    shown = ""
    if picture.exists():
        caption = "Above what came out, below its deviation from flat, 16 times amplified."
        shown = (
            f'<figure class="sheet">{image_tag(picture, "Flat colours decoded")}'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return (
        "<h3>Flat colours</h3>"
        f'<p class="lead">Flat pictures of {found["size"]} pixels, encoded and decoded: what is not flat, the '
        "decoder has made. In steps of 1/255 of the range; ripple is a standard deviation.</p>"
        f"{grid_table(head, rows)}{shown}"
    )


def charts_of(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """(charts of what is learnt, charts of the mechanics). `validation_x` is drawn into the chart of `x`."""
    values: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for key, value in record.items():
            if key not in NOT_CURVES and isinstance(value, (int, float)) and not isinstance(value, bool):
                values.setdefault(key, []).append((record["train_step"], float(value)))
    learnt: dict[str, str] = {}
    mechanics: dict[str, str] = {}
    first = ("loss", "validation_loss", "psnr", "validation_psnr")
    for key in sorted(values, key=lambda k: first.index(k) if k in first else len(first)):  # stable: then as logged
        if key.startswith(SCORES):
            title = f"{key.removeprefix(SCORES)} of generated pictures"
            learnt[key] = line_chart(title, [Series("averaged weights", values[key], "validation")])
            continue
        name = key.removeprefix("validation_")
        title = TITLES.get(name, name.replace("_", " ").capitalize())
        if key.endswith(MECHANICS):
            mechanics[key] = line_chart(title, [Series("latest", values[key], "plain" if "rate" in key else "train")])
        elif name not in learnt:
            series = []
            if name in values:
                # PSNR is measured on held-out pictures now and then, never per batch.
                held_out = name == "psnr"
                role = "validation" if held_out else "train"
                series.append(Series("held out" if held_out else "training", values[name], role))
            if f"validation_{name}" in values:
                series.append(Series("validation", values[f"validation_{name}"], "validation"))
            learnt[name] = line_chart(title, series)
    return [c for c in learnt.values() if c], [c for c in mechanics.values() if c]


def film(frames: Sequence[tuple[int, Path]], title: str, legend: str) -> str:
    """Pictures over time: a strip to scroll, which the page's script turns into one picture with a slider."""
    if not frames:
        return ""
    items = [
        f'<figure data-step="{step:,}">{image_tag(file, f"{title}, train step {step}")}'
        f"<figcaption>train step {step:,}</figcaption></figure>"
        for step, file in evenly(frames, MOST_FRAMES)
    ]
    return f'<h3>{title}</h3><p class="lead">{legend}</p><div class="film" tabindex="0">{"".join(items)}</div>'


def data_section(run: Run) -> str:
    parts = []
    apart = ("problems", "warnings", "rule")
    if rows := flatten({k: v for k, v in run.data.items() if k not in apart and v not in (None, "", [], {})}):
        parts.append(table(rows))
    sheet = run.folder / "samples" / "contact-sheet.png"
    if sheet.exists():
        rule = str(run.data.get("rule") or "What the network sees, after crop and resize.")
        parts.append(
            f'<h3>Contact sheet</h3><figure class="sheet">{image_tag(sheet, "Contact sheet")}'
            f"<figcaption>{escape(rule)}</figcaption></figure>"
        )
    if problems := as_list(run.data.get("problems")):
        lines = "".join(f"<li>{problem_line(p)}</li>" for p in problems[:200])
        more = f"<p>and {len(problems) - 200:,} more in <code>data.json</code></p>" if len(problems) > 200 else ""
        title = f"{len(problems):,} {plural(len(problems), 'file')} left out"
        parts.append(
            f'<details id="problems" open><summary>{title}</summary><ul class="problems">{lines}</ul>{more}</details>'
        )
    return f"<h2>Data</h2>{''.join(parts)}" if parts else ""


def problem_line(problem: Any) -> str:
    if isinstance(problem, (list, tuple)) and len(problem) == 2:
        return f"<code>{escape(str(problem[0]))}</code> {escape(str(problem[1]))}"
    return escape(str(problem))


def settings_section(run: Run) -> str:
    parts = []
    if rows := flatten({k: v for k, v in run.plan.items() if k != "warnings" and v is not None}):
        parts.append(f"<h3>Plan</h3>{table(rows)}")
    if run.config:
        parts.append(f"<details><summary>config.yaml, as resolved</summary><pre>{escape(run.config)}</pre></details>")
    return f"<h2>Settings</h2>{''.join(parts)}" if parts else ""


def environment_section(run: Run) -> str:
    apart = {"scores", "warnings", "flat_colours"}
    parts = []
    if scores := flatten(run.summary.get("scores")):
        parts.append(f"<h3>Scores</h3>{table(scores)}")
    if rows := flatten({k: v for k, v in run.summary.items() if k not in apart}):
        parts.append(f"<h3>Environment</h3>{table(rows)}")
    return f"<h2>Scores and environment</h2>{''.join(parts)}" if parts else ""


# --- pictures --------------------------------------------------------------------------------------------------------


def evenly(items: Sequence[tuple[int, Path]], most: int) -> list[tuple[int, Path]]:
    """At most `most` items, first and last included."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def image_tag(file: Path, alt: str) -> str:
    """The picture itself inside the page; a sentence where it cannot be read."""
    try:
        uri, (width, height) = data_uri(file)
    except OSError:
        return f"<p>{escape(file.name)} cannot be read.</p>"
    # Latent diffusion's small pictures are shown larger: whole pixels where there is room for twice the size.
    kind, factor = ("pixels", 2) if width <= 400 else ("enlarged", 1.5)
    enlarged = f' class="{kind}" style="--width: {factor * width:.0f}px"' if width < 800 else ""
    return f'<img{enlarged} src="{uri}" width="{width}" height="{height}" alt="{escape(alt)}">'


def data_uri(file: Path) -> tuple[str, tuple[int, int]]:
    """(base64 URI, (width, height)). WebP where this Pillow has it: a page of sample grids stays a few MB."""
    from PIL import Image, features

    with Image.open(file) as opened:
        image: Image.Image = opened
        if image.mode.startswith("I"):  # 16-bit grey, for display only
            image = image.convert("I").point(lambda v: v / 257).convert("L")
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    if max(image.size) > MOST_PIXELS:
        image.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    kind = "webp" if features.check("webp") else "png"
    image.save(buffer, kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", image.size


def picture_captions(file: Path) -> list[str]:
    """Captions that a sample grid carries in its PNG text `captions` (a JSON list), in reading order."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return [str(c) for c in as_list(_parse(str(image.info.get("captions", ""))))]
    except OSError:
        return []


def caption_list(captions: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(c)}</li>" for c in captions[:64])
    return f'<ol class="captions">{items}</ol>' if items else ""
