"""Small pictures as SVG: sizes in pixels of a phone, colours by class of the style sheet, names inert."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from stackllm.report.page.panels import short_names

MAX_DOTS = 1_500


def text(x: float, y: float, said: object, kind: str = "", anchor: str = "start") -> str:
    """A word in a picture."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(said)}</text>'
    )


def picture(
    width: float, height: float, alt: str, parts: Sequence[str], kind: str = "plot"
) -> Markup:
    """A picture with what it shows in words."""
    return Markup(
        f'<svg class="{kind}" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(alt)}">'
        + "".join(parts)
        + "</svg>"
    )


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values between two.

    Examples
    --------
    >>> ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = max(high - low, 1e-9)
    size = 10 ** math.floor(math.log10(span))
    step = next(size * it for it in (0.1, 0.2, 0.25, 0.5, 1, 2, 5) if span / (size * it) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


class Scale:
    """Values on a line of pixels.

    Parameters
    ----------
    low, high
        Values at its ends.
    start, end
        Pixels there.
    """

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        """Where a value stands; outside the ends, at the end."""
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.start + (self.end - self.start) * min(max(share, 0.0), 1.0)


def span(
    values: Sequence[float], errors: Sequence[float | None], reach: float
) -> tuple[float, float]:
    """The least and greatest end of intervals."""
    ends = [(it, reach * (error or 0.0)) for it, error in zip(values, errors, strict=True)]
    low, high = min(v - e for v, e in ends), max(v + e for v, e in ends)
    rim = 0.05 * (high - low) or 0.05
    return low - rim, high + rim


REACH = 1.96
"""Standard errors in half an interval of 95%."""


def interval(
    value: float, error: float | None, scale: Scale, mark: float | None = None, kind: str = ""
) -> Markup:
    """One line of a forest plot: a dot and its interval, with a line where ``mark`` stands."""
    parts = []
    if mark is not None:
        parts.append(f'<path class="mark" d="M{scale(mark):.1f} 0V20"/>')
    if error:
        parts.append(
            f'<path class="bar {kind}" d="M{scale(value - REACH * error):.1f} 10H{scale(value + REACH * error):.1f}"/>'
        )
    parts.append(f'<circle class="dot {kind}" cx="{scale(value):.1f}" cy="10" r="4"/>')
    return Markup(
        f'<svg class="forest" viewBox="0 0 {scale.end + 8:.0f} 20" aria-hidden="true">{"".join(parts)}</svg>'
    )


def forest_axis(scale: Scale, signed: bool = False) -> Markup:
    """The axis above the lines of a forest plot."""
    parts = []
    for value in ticks(scale.low, scale.high, 4):
        said = f"{value:+.4g}" if signed and value else f"{value:.4g}"
        parts.append(
            f'<path class="axis" d="M{scale(value):.1f} 14v6"/>'
            + text(scale(value), 11, said, "tick", "middle")
        )
    return Markup(
        f'<svg class="forest" viewBox="0 0 {scale.end + 8:.0f} 20" aria-hidden="true">{"".join(parts)}</svg>'
    )  # fmt: skip


def heat(
    matrix: Sequence[Sequence[float]],
    names: Sequence[str],
    alt: str,
    down: str = "",
    across: str = "",
    power: float = 1.0,
) -> Markup:
    """A square of shares from 0 to 1, the diagonal framed; colours are those of the shares raised to ``power``."""
    n = len(matrix)
    cell = 36.0 if n <= 8 else max(16.0, 290.0 / n)
    down_names, across_names = (short_names(names, width) for width in (14, 10))
    left, top = 106.0, 34.0 + 4.9 * max(map(len, across_names))
    parts = [text(left, 12, across, "tick"), text(4, top - 8, down, "tick")]
    for i, (one, other) in enumerate(zip(down_names, across_names, strict=True)):
        middle = top + cell * (i + 0.5) + 4
        parts.append(text(left - 8, middle, one, f"name k{i % 20}", "end"))
        x = left + cell * (i + 0.5)
        parts.append(
            f'<text transform="translate({x + 4:.1f} {top - 8:.1f}) rotate(-45)" class="name">{escape(other)}</text>'
        )
    for i, row in enumerate(matrix):
        for j, share in enumerate(row):
            x, y = left + cell * j, top + cell * i
            told = f"{names[i]} / {names[j]}: {share:.3f}"
            strength = min(max(abs(share), 0.0), 1.0) ** power
            parts.append(
                f'<rect class="cell{" own" if i == j else ""}" x="{x + 1:.1f}" y="{y + 1:.1f}" width="{cell - 2:.1f}" '
                f'height="{cell - 2:.1f}" rx="3" fill-opacity="{strength:.3f}"><title>{escape(told)}</title></rect>'
            )
            if cell >= 22 and abs(share) >= 0.005:
                dark = " over" if strength > 0.55 else ""
                parts.append(
                    text(
                        x + cell / 2, y + cell / 2 + 4, f"{100 * share:.0f}", f"in{dark}", "middle"
                    )
                )
    width, height = left + cell * n + 34, top + cell * n + 6
    return picture(width, height, alt, parts, "plot square")  # fmt: skip


def _axes(x: Scale, y: Scale, names: tuple[str, str], percent: bool) -> list[str]:
    def said(value: float) -> str:
        return f"{100 * value:.0f}%" if percent else f"{value:.4g}"

    parts = []
    for value in ticks(x.low, x.high):
        parts.append(f'<path class="grid" d="M{x(value):.1f} {y.start}V{y.end}"/>')
        parts.append(text(x(value), y.start + 16, said(value), "tick", "middle"))
    for value in ticks(y.low, y.high):
        parts.append(f'<path class="grid" d="M{x.start} {y(value):.1f}H{x.end}"/>')
        parts.append(text(x.start - 6, y(value) + 4, said(value), "tick", "end"))
    parts.append(text((x.start + x.end) / 2, y.start + 34, names[0], "label", "middle"))
    parts.append(
        f'<text transform="translate(11 {(y.start + y.end) / 2:.0f}) rotate(-90)" class="label" text-anchor="middle">'
        f"{escape(names[1])}</text>"
    )
    return parts


def reliability(bins: Sequence[Mapping[str, Any]], alt: str) -> Markup:
    """Share of right answers against confidence, with 95% intervals and the rows of each bin below."""
    x, y = Scale(0, 1, 52, 330), Scale(0, 1, 250, 12)
    parts = _axes(x, y, ("confidence in the likeliest class", "it is right"), True)
    parts.append(f'<path class="even" d="M{x(0)} {y(0)}L{x(1)} {y(1)}"/>')
    most = max(it["rows"] for it in bins)
    for it in bins:
        middle, height = x(it["confidence"]), 36 * it["rows"] / most
        parts.append(
            f'<rect class="rows" x="{middle - 7:.1f}" y="{250 - height:.1f}" width="14" height="{height:.1f}"/>'
        )
    line = " ".join(f"{x(it['confidence']):.1f},{y(it['right']):.1f}" for it in bins)
    parts.append(f'<polyline class="line" points="{line}"/>')
    for it in bins:
        at, reach = x(it["confidence"]), REACH * (it["error"] or 0.0)
        parts.append(
            f'<path class="bar" d="M{at:.1f} {y(it["right"] - reach):.1f}V{y(it["right"] + reach):.1f}"/>'
            f'<circle class="dot" cx="{at:.1f}" cy="{y(it["right"]):.1f}" r="4"><title>{it["rows"]} rows: said '
            f"{it['confidence']:.1%}, right {it['right']:.1%}</title></circle>"
        )
    return picture(350, 292, alt, parts)


def brought(groups: Sequence[Mapping[str, Any]], alt: str) -> Markup:
    """A dot per group: its loss row by row and after; below the diagonal the group helped."""
    step = -(-len(groups) // MAX_DOTS)
    shown = groups[::step]
    most = max(max(it["raw"], it["posterior"]) for it in shown)
    # a few lost groups would press all others into a corner
    x, y = Scale(0, math.sqrt(most) or 1, 46, 408), Scale(0, math.sqrt(most) or 1, 300, 10)
    parts = []
    for value in (0.01, 0.1, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32):
        if value <= most:
            at, up = x(math.sqrt(value)), y(math.sqrt(value))
            parts.append(f'<path class="grid" d="M{at:.1f} 300V10M46 {up:.1f}H408"/>')
            parts.append(
                text(at, 315, f"{value:g}", "tick", "middle")
                + text(40, up + 4, f"{value:g}", "tick", "end")
            )
    parts.append(f'<path class="even" d="M{x(0)} {y(0)}L{x.end} {y.end}"/>')
    parts.append(text(227, 334, "log loss row by row", "label", "middle"))
    parts.append(
        '<text transform="translate(11 155) rotate(-90)" class="label" text-anchor="middle">after the group</text>'
    )
    for i, it in enumerate(shown):
        kind = "gain" if it["posterior"] <= it["raw"] else "cost"
        parts.append(
            f'<circle class="g {kind}" data-g="{i * step}" cx="{x(math.sqrt(it["raw"])):.1f}" '
            f'cy="{y(math.sqrt(it["posterior"])):.1f}" r="4"/>'
        )
    return picture(420, 340, alt, parts)


def bars(counts: Sequence[int], alt: str) -> Markup:
    """A histogram of values from 0 to 1."""
    most = max(max(counts), 1)
    width = 300 / len(counts)
    parts = [
        f'<rect class="rows" x="{20 + width * i + 1:.1f}" y="{70 - 60 * it / most:.1f}" width="{width - 2:.1f}" '
        f'height="{60 * it / most:.1f}"><title>{it}</title></rect>'
        for i, it in enumerate(counts)
    ]
    parts += [text(20 + 300 * it, 86, f"{100 * it:.0f}%", "tick", "middle") for it in (0, 0.5, 1)]
    parts.append('<path class="axis" d="M20 70H320"/>')
    return picture(340, 90, alt, parts)
