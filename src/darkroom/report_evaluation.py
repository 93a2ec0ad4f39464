"""The pages of `darkroom eval` and `darkroom study`, in the style of the training report.

They are made from the records that those commands write (`FirstStageScores.record`, as JSON) and need nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from darkroom.report import flat_colours, html_page, image_tag, notes_box, page_head
from darkroom.report_charts import Series, line_chart
from darkroom.report_tables import flatten, grid_table, is_number, table

UNITS = {"PSNR": "dB", "encode s/MP": "s", "decode s/MP": "s"}
DIGITS = {
    **{"PSNR": 2, "SSIM": 4, "gradient energy ratio": 3, "codes used": 3, "perplexity": 0},
    **{"encode s/MP": 3, "decode s/MP": 3, "training minutes": 1, "f": 0, "crops": 0, "images": 0, "parameters": 0},
}
MEANING = {
    "PSNR": "higher is better",
    "SSIM": "1 is equal",
    "gradient energy ratio": "1 is as sharp as the originals, less is blurred, more is noisy",
    "codes used": "share of the codebook that occurs",
    "perplexity": "number of codes, if all occurred alike",
    "encode s/MP": "seconds for a megapixel, on the device of the protocol",
    "decode s/MP": "seconds for a megapixel, on the device of the protocol",
}
FRECHET_MEANING = "Frechet distance of embedded originals and reconstructions, lower is better; not comparable with FID"


def score_text(name: str, value: Any) -> str:
    """A score as people write it: as many digits as mean something."""
    if not is_number(value):
        return "" if value is None else str(value)
    if name in DIGITS:
        return f"{value:,.{DIGITS[name]}f}"
    return f"{value:.3f}" if name.startswith("rFD-") and value >= 0.1 else f"{value:.4g}"


def meaning(name: str) -> str:
    if name.startswith("rFD-"):
        return FRECHET_MEANING
    return MEANING.get(name, "perceptual distance, 0 is equal")


def evaluation_page(record: Mapping[str, Any], folder: Path, name: str) -> str:
    """One first stage: scores, what to beware of, pictures, each source alone, flat colours, latents, protocol.
    The pictures are those in `folder`."""
    scores, protocol = record["scores"], record["protocol"]
    facts = protocol["first_stage"]
    kind = "KL" if facts["codes"] is None else f"VQ with {facts['codes']:,} codes"
    about = (
        f"{kind} · f = {facts['downsampling']} · {facts['latent_channels']} latent channels · "
        f"{facts['parameters']:,} parameters · {protocol['count']:,} images"
    )
    tiles = [(f"{key}, {UNITS[key]}" if key in UNITS else key, score_text(key, value)) for key, value in scores.items()]
    rows = [(key, score_text(key, value), meaning(key)) for key, value in scores.items()]
    parts = [f"<h2>Scores</h2>{grid_table(('metric', 'value', 'meaning'), rows)}"]
    if sources := record.get("sources"):
        columns = list(dict.fromkeys(key for row in sources.values() for key in row))
        cells = [[source, *(score_text(key, row.get(key)) for key in columns)] for source, row in sources.items()]
        parts.append(f"<h3>Each source alone</h3>{grid_table(('source', *columns), cells)}")
    latents = record["latents"]
    cells = [
        [str(i), f"{m:.3f}", f"{s:.3f}"] for i, (m, s) in enumerate(zip(latents["mean"], latents["std"], strict=True))
    ]
    shown = (
        '<h2>Pictures</h2><p class="lead">Rows: held-out pictures, their reconstructions, the errors '
        f'(mean over channels, black is none, white a quarter of the range or more).</p><figure class="sheet">'
        f"{image_tag(folder / 'pictures.png', 'Pictures, reconstructions, errors')}</figure>"
        f"{flat_colours(record.get('flat_colours'), folder / 'flat-colours.png')}"
    )
    statistics = (
        '<h2>Latents</h2><p class="lead">Of the normalised latents of these images, by channel: 0 and 1 if they are '
        f"like the training images.</p>{grid_table(('channel', 'mean', 'standard deviation'), cells)}"
    )
    sections = [
        ("warnings", "", notes_box([escape(w) for w in record["warnings"]], "No warnings.")),
        ("scores", "Scores", "".join(parts)),
        ("pictures", "Pictures", shown),
        ("latents", "Latents", statistics),
        ("protocol", "Protocol", f"<h2>Protocol</h2>{table(flatten(protocol))}"),
    ]
    return html_page(name, page_head("Darkroom evaluation of a first stage", name, about, tiles[:8]), sections)


def study_page(
    columns: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    strips: Mapping[str, Path],
    charts: Sequence[str],
    notes: Sequence[str],
    protocol: Mapping[str, Any],
    title: str,
    about: str,
) -> str:
    """Many first stages beside one another: the table, curves over f, reconstructions of the same pictures."""
    cells = [[score_text(c, row.get(c)) for c in columns] for row in rows]
    lines = []
    for chart in charts:
        series = []
        for kind, role in (("KL", "plain"), ("VQ", "validation")):
            points = [(_octave(r["f"]), float(r[chart])) for r in rows if r["kind"] == kind and is_number(r.get(chart))]
            series.append(Series(kind, sorted(points), role))
        places = {_octave(r["f"]): f"f {r['f']}" for r in rows}
        if rows:
            lines.append(line_chart(chart, series, places=dict(sorted(places.items())), across="octaves of f"))
    pictures = [
        f'<h3>{escape(name)}</h3><figure class="sheet">{image_tag(file, name)}</figure>'
        for name, file in strips.items()
    ]
    sections = [
        ("warnings", "", notes_box([escape(n) for n in notes], "No warnings.")),
        ("table", "Table", f"<h2>Table</h2>{grid_table(columns, cells)}" if rows else ""),
        ("curves", "Curves", f'<h2>Curves</h2><div class="charts">{"".join(lines)}</div>' if lines else ""),
        ("pictures", "Pictures", f"<h2>The same pictures by every row</h2>{''.join(pictures)}" if pictures else ""),
        ("protocol", "Protocol", f"<h2>Protocol</h2>{table(flatten(protocol))}" if protocol else ""),
    ]
    return html_page(title, page_head("Darkroom study", title, about), sections)


def _octave(f: int) -> float:
    """log2 f: 4 -> 2.0."""
    return float(int(f).bit_length() - 1)
