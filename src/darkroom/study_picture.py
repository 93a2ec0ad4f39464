"""A study as one picture: its table, two charts over f, and the same pictures through every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from darkroom.report_charts import linear_ticks, number
from darkroom.report_evaluation import score_text
from darkroom.report_tables import is_number

PAPER, INK, SOFT, LINE = "#ffffff", "#1f1b18", "#6f665f", "#e6e0d9"
COLOURS = {"KL": "#c2410c", "VQ": "#0f6fb5"}
MARGIN, GAP, ROW_HEIGHT = 28, 26, 26
CHART = (440, 260)


def study_picture(
    title: str,
    about: str,
    columns: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    strips: Mapping[str, Path],
    charts: Sequence[str],
) -> Image.Image:
    """`strips`: a picture for each name, drawn one below the other with the name beside it. `charts`: columns."""
    blocks = [_heading(title, about), _table(columns, rows)]
    if charts:
        blocks.append(_beside([_chart(c, rows) for c in charts]))
    if strips:
        blocks.append(_strips(strips))
    width = max(block.width for block in blocks) + 2 * MARGIN
    height = sum(block.height for block in blocks) + GAP * (len(blocks) - 1) + 2 * MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    top = MARGIN
    for block in blocks:
        sheet.paste(block, (MARGIN, top))
        top += block.height + GAP
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _width(text: str, size: int) -> int:
    return int(_font(size).getlength(text)) + 1


def _heading(title: str, about: str) -> Image.Image:
    about = about.replace("·", "-")  # not in every font
    block = Image.new("RGB", (max(_width(title, 26), _width(about, 15)), 62), PAPER)
    draw = ImageDraw.Draw(block)
    draw.text((0, 0), title, INK, _font(26))
    draw.text((0, 38), about, SOFT, _font(15))
    return block


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Names of columns in as many lines as they have words, then the rows; numbers to the right."""
    cells = [[score_text(column, row.get(column)) for column in columns] for row in rows]
    heads = [column.replace("-darkroom", "- darkroom").split(" ") for column in columns]
    words = [max(_width(word, 14) for word in head) for head in heads]
    widths = [max([w, *(_width(row[i], 15) for row in cells)]) + 22 for i, w in enumerate(words)]
    lines = max(map(len, heads))
    block = Image.new("RGB", (sum(widths), 18 * lines + 12 + ROW_HEIGHT * len(rows)), PAPER)
    draw = ImageDraw.Draw(block)
    left = 0
    for i, head in enumerate(heads):
        for place, word in enumerate(head):
            x = left if i == 0 else left + widths[i] - 8 - _width(word, 14)
            draw.text((x, 18 * (lines - len(head) + place)), word, SOFT, _font(14))
        for place, row in enumerate(cells):
            x = left if i == 0 else left + widths[i] - 8 - _width(row[i], 15)
            colour = COLOURS.get(str(rows[place].get("kind")), INK) if i == 0 else INK
            draw.text((x, 18 * lines + 14 + ROW_HEIGHT * place), row[i], colour, _font(15))
        left += widths[i]
    for place in range(len(rows)):
        y = 18 * lines + 8 + ROW_HEIGHT * place
        draw.line((0, y, block.width, y), LINE)
    return block


def _chart(column: str, rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """One column over f, in octaves, a line for each kind."""
    width, height = CHART
    block = Image.new("RGB", CHART, PAPER)
    draw = ImageDraw.Draw(block)
    draw.text((0, 0), column, INK, _font(16))
    place = 8 + _width(column, 16)
    for kind, colour in COLOURS.items():
        if any(row["kind"] == kind for row in rows):
            draw.line((place + 8, 10, place + 26, 10), colour, 3)
            draw.text((place + 32, 2), kind, SOFT, _font(14))
            place += 40 + _width(kind, 14)
    octaves = sorted({int(row["f"]).bit_length() - 1 for row in rows})
    values = [float(row[column]) for row in rows if is_number(row.get(column))]
    if not values:
        return block
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - room, high + room
    left, bottom = 58, height - 26
    first, last = octaves[0] - 0.3, octaves[-1] + 0.3

    def x(octave: float) -> float:
        return left + (octave - first) / (last - first) * (width - left - 10)

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - 34)

    for tick in linear_ticks(low, high):
        draw.line((left, y(tick), width - 10, y(tick)), LINE)
        label = number(tick)
        draw.text((left - 8 - _width(label, 13), y(tick) - 8), label, SOFT, _font(13))
    for octave in octaves:
        label = f"f {2**octave}"
        draw.text((x(octave) - _width(label, 13) / 2, bottom + 6), label, SOFT, _font(13))
    for kind, colour in COLOURS.items():
        points = sorted(
            (x(int(row["f"]).bit_length() - 1), y(float(row[column])))
            for row in rows
            if row["kind"] == kind and is_number(row.get(column))
        )
        if len(points) > 1:
            draw.line(points, colour, 3, joint="curve")
        for a, b in points:
            draw.ellipse((a - 4, b - 4, a + 4, b + 4), colour)
    return block


def _beside(blocks: Sequence[Image.Image]) -> Image.Image:
    width = sum(block.width for block in blocks) + GAP * (len(blocks) - 1)
    sheet = Image.new("RGB", (width, max(block.height for block in blocks)), PAPER)
    left = 0
    for block in blocks:
        sheet.paste(block, (left, 0))
        left += block.width + GAP
    return sheet


def _strips(strips: Mapping[str, Path]) -> Image.Image:
    pictures: dict[str, Image.Image] = {}
    for name, file in strips.items():
        with Image.open(file) as opened:
            pictures[name] = opened.convert("RGB")
    left = max(_width(name, 15) for name in pictures) + 16
    width = left + max(picture.width for picture in pictures.values())
    sheet = Image.new("RGB", (width, sum(picture.height + 4 for picture in pictures.values())), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = 0
    for name, picture in pictures.items():
        draw.text((0, top + picture.height // 2 - 9), name, INK, _font(15))
        sheet.paste(picture, (left, top))
        top += picture.height + 4
    return sheet
