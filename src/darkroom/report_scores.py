"""The page of `darkroom eval MODEL DATA` and the table of `darkroom eval --compare`, made from records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from darkroom.evaluation.intervals import difference_interval, interval
from darkroom.evaluation.protocol import Curve, Record, Score, columns_of, protocol_of, settings_of
from darkroom.report import html_page, image_tag, notes_box, page_head
from darkroom.report_charts import Series, line_chart
from darkroom.report_tables import flatten, grid_table, table

LOWER, HIGHER = "lower is better", "higher is better"
# By the beginning of a metric's name: how many digits mean something, and what it says.
MEANING: dict[str, tuple[int, str]] = {
    "FID": (2, f"Fréchet distance of Inception features, {LOWER}"),
    "FD": (3, f"Fréchet distance of features, {LOWER}; not comparable with FID"),
    "KID": (5, f"kernel distance of Inception features, {LOWER}, 0 for equal distributions"),
    "KD": (5, f"kernel distance of features, {LOWER}, 0 for equal distributions; not comparable with KID"),
    "IS": (2, f"Inception score, {HIGHER}"),
    "precision": (3, f"share of the images that look like the reference, {HIGHER}"),
    "recall": (3, f"share of the reference that the images reach, {HIGHER}"),
    "density": (3, f"how densely the images lie where the reference does, {HIGHER}, may exceed 1"),
    "coverage": (3, f"share of the reference with an image near by, {HIGHER}"),
    "near training": (3, "share nearer to a training image than 95 % of held-out images are; 0.05 is as new as those"),
    "class accuracy of real": (3, "the classifier on held-out real images: what can be reached at most"),
    "class accuracy": (3, f"how often the class asked for is recognised, {HIGHER}"),
    "caption": (3, f"share of the images that show exactly what their caption says, {HIGHER}"),
    "class agreement": (3, f"share of the images with the shape asked for, {HIGHER}"),
    "box": (3, f"by the rules of `shapes`, {HIGHER}"),
    "map": (3, f"by the rules of `shapes`, {HIGHER}"),
    "CLIP": (2, f"100 cos of image and caption, {HIGHER}"),
    "PSNR": (2, f"dB, {HIGHER}"),
    "SSIM": (4, "1 is equal"),
    "LPIPS": (4, "perceptual distance, 0 is equal"),
    "perceptual": (4, "perceptual distance, 0 is equal"),
    "bits/dim of latents": (4, f"{LOWER}; a density of latents: only between models of one first stage"),
    "bits/dim": (4, f"variational bound, {LOWER}"),
}


def about(metric: str) -> tuple[int, str]:
    """(digits, meaning) of a metric; the longest beginning that fits decides."""
    fits = [start for start in MEANING if metric.startswith(start)]
    return MEANING[max(fits, key=len)] if fits else (4, "")


def score_text(metric: str, value: float) -> str:
    return f"{value:,.{about(metric)[0]}f}"


def interval_text(metric: str, found: tuple[float, float] | None) -> str:
    return "" if found is None else f"{score_text(metric, found[0])} … {score_text(metric, found[1])}"


def score_lines(record: Record) -> list[str]:
    """The table on the terminal."""
    rows = [["images", f"{record.sampling.count:,} against {record.reference.count:,}", "", ""]]
    rows += [[s.metric, score_text(s.metric, s.value), interval_text(s.metric, interval(s.value, s.deviations)), s.note]
             for s in record.scores]  # fmt: skip
    return [*_aligned(rows), *(f"warning: {warning}" for warning in record.warnings)]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


# --- comparing --------------------------------------------------------------------------------------------------------


def compare_lines(records: Sequence[Record], names: Sequence[str]) -> list[str]:
    """Several records beside one another: a row per metric, a column per record, each with its 95 % interval; behind
    the second and further ones the difference from the first. Below, what was set differently."""
    rows = [["", *names]]
    for metric in columns_of(records):
        first = records[0].score(metric)
        cells: list[str] = []
        for place, record in enumerate(records):
            score = record.score(metric)
            cells.append("" if score is None else _cell(metric, score, first if place else None))
        rows.append([metric, *cells])
    known = [settings_of(record) for record in records]
    rows += [
        [name, *("" if settings[name] is None else str(settings[name]) for settings in known)]
        for name in known[0]
        if len({str(settings[name]) for settings in known}) > 1
    ]
    lines = _aligned(rows)
    lines.append("")
    lines.append(
        "[low … high]: 95 % bootstrap interval over images; Δ: difference from the first, * where its interval has no 0"
    )
    return [*lines, *(f"warning: {name}: {w}" for name, r in zip(names, records, strict=True) for w in r.warnings)]


def _cell(metric: str, score: Score, first: Score | None) -> str:
    text = score_text(metric, score.value)
    if (found := interval(score.value, score.deviations)) is not None:
        text += f" [{interval_text(metric, found)}]"
    if first is not None:
        difference = score.value - first.value
        text += f" Δ {difference:+,.{about(metric)[0]}f}"
        between = difference_interval(score.value, score.deviations, first.value, first.deviations)
        text += "*" if between is not None and (between[0] > 0 or between[1] < 0) else ""
    return text


# --- the page ---------------------------------------------------------------------------------------------------------


def scores_page(record: Record, folder: Path, name: str) -> str:
    """One evaluation: scores, what to beware of, samples, nearest training images, curves, protocol."""
    sampling, reference = record.sampling, record.reference
    against = f"{' + '.join(reference.source)} ({reference.split})"
    summary = (
        f"{sampling.count:,} images against {reference.count:,} of {against} · {'×'.join(map(str, sampling.size))}"
    )
    tiles = [(s.metric, score_text(s.metric, s.value)) for s in record.scores][:8]
    sections = [
        ("warnings", "", notes_box([escape(w) for w in record.warnings], "No warnings.")),
        ("scores", "Scores", _scores_section(record)),
        ("samples", "Samples", _picture(folder / "samples.png", "Samples", "Evenly over the images that were scored.")),
        ("neighbours", "Nearest images", _neighbours(record, folder)),
        ("curves", "Curves", _curves(record.curves)),
        ("protocol", "Protocol", _protocol(record)),
    ]
    return html_page(name, page_head("Darkroom evaluation", record.name, summary, tiles), sections)


def _scores_section(record: Record) -> str:
    head = ("metric", "value", "95 % interval", "meaning")
    rows = [
        (s.metric, score_text(s.metric, s.value), interval_text(s.metric, interval(s.value, s.deviations)),
         "; ".join(w for w in (about(s.metric)[1], s.note) if w))
        for s in record.scores
    ]  # fmt: skip
    note = (
        '<p class="lead">Intervals: what other images of the same model would give, by drawing these again with '
        "replacement; of recall and coverage the reference is drawn.</p>"
    )
    return f"<h2>Scores</h2>{note}{grid_table(head, rows)}"


def _picture(file: Path, title: str, legend: str) -> str:
    if not file.is_file():
        return ""
    return (
        f'<h2>{escape(title)}</h2><p class="lead">{escape(legend)}</p>'
        f'<figure class="sheet">{image_tag(file, title)}</figure>'
    )


def _neighbours(record: Record, folder: Path) -> str:
    of = "training images" if record.training is not None else "images of the reference (no training images are known)"
    legend = (
        f"Left: scored images; right: the {of} that are nearest in the features of the extractor, nearest first. The "
        "upper half was chosen by number; below are the samples nearest of all, where repeated training images show."
    )
    return _picture(folder / "neighbours.png", "Nearest images", legend)


def _curves(curves: Sequence[Curve]) -> str:
    charts = []
    for curve in curves:
        metrics = list(dict.fromkeys(name for _, scores in curve.points for name in scores))
        for metric in metrics:
            points = [(value, scores[metric]) for value, scores in curve.points if metric in scores]
            series = [Series(f"{curve.count:,} images", points, "validation")]
            charts.append(line_chart(f"{metric} over {curve.setting}", series, across=curve.setting))
    return f'<h2>Curves</h2><div class="charts">{"".join(charts)}</div>' if charts else ""


def _protocol(record: Record) -> str:
    """All of it: shared by the scores first, then what each has of its own."""
    parts = ["<h2>Protocol</h2>"]
    blocks: list[tuple[str, Mapping[str, Any]]] = [
        ("Images", _plain(record.sampling)),
        ("Reference", _plain(record.reference)),
        ("Training images", _plain(record.training) if record.training is not None else {}),
        ("Environment", _plain(record.environment)),
    ]
    parts += [f"<h3>{title}</h3>{table(flatten(block))}" for title, block in blocks if block]
    shared = set(protocol_of(record, Score("", 0.0)))
    own = {s.metric: {k: v for k, v in protocol_of(record, s).items() if k not in shared} for s in record.scores}
    rows = [
        (metric, "; ".join(f"{k.removeprefix('option ')}: {v}" for k, v in facts.items()))
        for metric, facts in own.items()
    ]
    parts.append(f"<h3>Each score</h3>{grid_table(('metric', 'made with'), rows)}")
    return "".join(parts)


def _plain(value: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(value).items() if v not in (None, "", [], {})}
