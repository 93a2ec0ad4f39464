"""Line charts as inline SVG, for the HTML report: no dependency, no script needed to read them.

A chart is one metric over the train step: the values as logged (faint), their running mean, and validation values as
dots on a line. Colours come from CSS variables of the page, so that one drawing serves light and dark.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 250  # SVG units; about the size on screen, so that the 12-unit text stays readable on a phone
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 30
MOST_POINTS = 320  # more cannot be told apart at this width
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """`points` are (train_step, value) in order; values that are not finite interrupt the line."""

    label: str
    points: Points
    role: str = (
        "train"  # "train": faint values and running mean; "validation": line with dots; "plain": one line, linear axis
    )


def smooth(points: Points, span: float) -> Points:
    """Running mean m_n = m_(n-1) + (y_n - m_(n-1)) / span_n, with span_n growing from 1 to `span`: the steep start
    is followed closely, the noisy rest is averaged."""
    mean = 0.0
    result: Points = []
    for x, y in points:
        if math.isfinite(y):
            mean += (y - mean) / min(max(1.0, span), 1.0 + len(result) / 6)
            result.append((x, mean))
    return result


def thin(points: Points, most: int = MOST_POINTS) -> Points:
    """At most about `most` points: of each bucket the lowest and the highest, so that spikes survive."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / (most / 2))
    result: Points = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        finite = [p for p in bucket if math.isfinite(p[1])]
        if len(finite) < len(bucket):  # keep the interruption of the line
            result.append(next(p for p in bucket if not math.isfinite(p[1])))
        if finite:
            low, high = min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])
            result += sorted({low, high})
    return result if result[-1] == points[-1] else [*result, points[-1]]


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(q * (len(ordered) - 1))))]


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) inside [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next((m for m in (1, 2, 2.5, 5) if m * power >= rough * 0.999), 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Decades, with 2 and 5 between them (or every digit) when there are few."""
    decades = math.log10(high / low)
    digits = (1,) if decades > 3.5 else (1, 2, 5) if decades > 0.9 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    ticks = [
        float(f"{digit * 10.0**power:.12g}")
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digit in digits
    ]
    ticks = [t for t in ticks if low * 0.999 <= t <= high * 1.001]
    while len(ticks) > 7:
        ticks = ticks[::2]
    return ticks


def number(value: float) -> str:
    """Short form for axes and tables: 0.0123, 1.5, 12,000 -> 12k, 2e-05."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class Axis:
    """One direction of a chart: data value -> SVG coordinate."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        if self.logarithmic:
            if value <= 0:
                return self.start
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        # Far outside the frame is as good as just outside, and keeps the file free of huge numbers.
        return self.start + min(3.0, max(-2.0, part)) * (self.end - self.start)


def value_axis(series: Sequence[Series], smoothed: Sequence[Points]) -> tuple[Axis, bool]:
    """The vertical axis and whether something lies off it.

    Logarithmic when all values are positive and span more than a factor of 8. Otherwise, when the first steps would
    squeeze everything after them into a line, the axis leaves them out.
    """
    shown = [y for s, mean in zip(series, smoothed, strict=True) for _, y in (mean or s.points) if math.isfinite(y)]
    raw = [y for s in series for _, y in s.points if math.isfinite(y)]
    low, high = min(shown), max(shown)
    off = False
    if min(raw) > 0 and high / low > 8 and all(s.role != "plain" for s in series):
        low, high = min(low, quantile(raw, 0.02)) / 1.1, max(high, quantile(raw, 0.98)) * 1.1
        return Axis(low, high, HEIGHT - BOTTOM, TOP, True), max(raw) > 2 * high
    body = quantile(shown, 0.95)
    if len(shown) >= 20 and high - body > 2 * (body - low) > 0:
        high, off = body + 0.4 * (body - low), True
    low, high = min(low, quantile(raw, 0.02)), max(high, quantile(raw, 0.97))
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return Axis(low - room, high + room, HEIGHT - BOTTOM, TOP), off


def path(points: Points, x: Axis, y: Axis) -> str:
    """SVG path data; a value that is not finite starts a new piece."""
    parts, pen_down = [], False
    for step, value in points:
        if math.isfinite(value):
            parts.append(f"{'L' if pen_down else 'M'}{x(step):.1f} {y(value):.1f}")
        pen_down = math.isfinite(value)
    return "".join(parts)


def line_chart(
    title: str,
    series: Sequence[Series],
    note: str = "",
    places: Mapping[float, str] | None = None,
    across: str = "train steps",
) -> str:
    """An HTML figure: title, legend with the latest values, SVG. Empty when no series has a finite value.

    places: names of the places on the horizontal axis, where they are not numbers; across: what that axis counts.
    """
    series = [s for s in series if any(math.isfinite(y) for _, y in s.points)]
    if not series:
        return ""
    means = [smooth(s.points, len(s.points) / 25) if s.role == "train" and len(s.points) >= 12 else [] for s in series]
    steps = [step for s in series for step, _ in s.points]
    first, last = min(steps), max(steps)
    x = Axis(0.0 if first <= 0.2 * last else first, last if last > first else first + 1, LEFT, WIDTH - RIGHT)
    if places:
        x = Axis(min(places) - 0.3, max(places) + 0.3, LEFT, WIDTH - RIGHT)
    y, off = value_axis(series, means)

    legend: list[str] = []
    probes: list[list[list[float]]] = []  # what the page's script shows under the pointer: step, value, place
    lines: list[str] = []
    for s, mean in zip(series, means, strict=True):
        kind = "validation" if s.role == "validation" else "main"
        main = thin(mean or s.points)
        finite = [p for p in main if math.isfinite(p[1])]
        if mean:
            lines.append(f'<path class="raw" d="{path(thin(s.points), x, y)}"/>')
        lines.append(f'<path class="{kind}" d="{path(main, x, y)}"/>')
        if len(main) == 1 or (s.role == "validation" and len(main) <= 60):
            lines += [f'<circle class="{kind}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.6"/>' for a, b in finite]
        probes.append([[a, float(f"{b:.5g}"), round(x(a), 1), round(y(b), 1)] for a, b in finite])
        latest = number(finite[-1][1])
        legend.append(
            f'<span class="key {kind}"><i></i>{escape(s.label)} <b data-latest="{latest}">{latest}</b></span>'
        )
    broken = sorted({x(step) for s in series for step, value in s.points if not math.isfinite(value)})
    if broken:
        stroke = f'y1="{TOP}" y2="{HEIGHT - BOTTOM}"'
        lines += [f'<line class="broken" x1="{place:.1f}" x2="{place:.1f}" {stroke}/>' for place in broken[:40]]
        legend.append(f'<span class="key broken"><i></i>not finite <b>{len(broken)}</b></span>')
    remarks = [note, "logarithmic" if y.logarithmic else "", "some values lie outside the frame" if off else ""]
    # A nested <svg> cuts off what lies outside its frame.
    left, top, width, height = LEFT, TOP - 4, WIDTH - LEFT - RIGHT + 4, HEIGHT - BOTTOM - TOP + 4
    return (
        f'<figure class="chart"><figcaption><h4>{escape(title)}</h4>'
        f'<p class="legend">{"".join(legend)}</p></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-probe="{escape(json.dumps(probes))}" '
        f'aria-label="{escape(title)}, {escape(across)} {number(first)} to {number(last)}">{_frame(x, y, places)}'
        f'<svg x="{left}" y="{top}" width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">'
        f'{"".join(lines)}</svg><g class="probe"></g></svg>'
        f'<p class="remark">{escape("; ".join(r for r in remarks if r)) or "&nbsp;"}</p></figure>'
    )


def _frame(x: Axis, y: Axis, places: Mapping[float, str] | None = None) -> str:
    """Horizontal grid lines, the axis, and the labels of both directions."""
    parts: list[str] = []
    for tick in log_ticks(y.low, y.high) if y.logarithmic else linear_ticks(y.low, y.high):
        place = y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{place + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick, word in (places or {t: number(t) for t in linear_ticks(x.low, x.high)}).items():
        anchor = "end" if x(tick) > WIDTH - RIGHT - 12 else "middle"
        label = f'<text class="tick" x="{x(tick):.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{escape(word)}</text>'
        parts.append(label)
    floor = HEIGHT - BOTTOM
    return "".join([*parts, f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>'])
