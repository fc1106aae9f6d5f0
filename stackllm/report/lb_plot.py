"""CV against LB as a picture: SVG of our own, the same bytes for the same scores, or PNG by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from stackllm.errors import MissingInputError, UsageError
from stackllm.report.public import Band, expected_half
from stackllm.report.text import cut, one_line
from stackllm.store.atomic import write_bytes

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 520, 70, 20, 56, 56
_LABEL = 32
"""Cells of a name in the picture; whole names stand in its tooltips."""

INSIDE, OUTSIDE, BAND = "#1f5fa8", "#c0392b", "#dbe7f4"


def check_plot(path: Path) -> None:
    """Refuse what can't be drawn, before any work.

    Raises
    ------
    UsageError
        If the file ends neither with ``.svg`` nor with ``.png``.
    MissingInputError
        If it is to be a PNG and matplotlib is not installed.
    """
    if path.suffix.lower() not in (".svg", ".png"):
        raise UsageError(f'{path}: a picture\'s name ends with ".svg" or ".png".')
    if path.suffix.lower() == ".png":
        try:
            import matplotlib  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
        except ImportError as error:
            raise MissingInputError(
                f"{path}: a PNG is drawn by matplotlib, which is not installed. Install it (pip install matplotlib), "
                'or name a file that ends with ".svg".'
            ) from error


def plot(band: Band, path: Path) -> None:
    """Draw public scores and their band into a file.

    Raises
    ------
    MissingInputError, UsageError
        As for :func:`check_plot`, or if no score has a CV to be drawn against.
    StorageError
        If it can't be written.
    """
    check_plot(path)
    if not band.pairs:
        raise MissingInputError(
            f"{path}: no public score of what has a CV is in the logbook. Enter one first: "
            "stackllm runs --lb NAME=0.7."
        )
    made = svg(band).encode() if path.suffix.lower() == ".svg" else _png(band)
    write_bytes(path, made)


@dataclass(frozen=True)
class _Axis:
    """Values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Five to ten round values."""
        step = 10 ** math.floor(math.log10(self.high - self.low))
        for part in (0.1, 0.2, 0.5, 1.0):
            if (self.high - self.low) / (step * part) <= 10:
                step *= part
                break
        first = math.ceil(self.low / step)
        return [step * i for i in range(first, math.floor(self.high / step) + 1)]


def _axis(values: Sequence[float], start: float, end: float) -> _Axis:
    low, high = min(values), max(values)
    rim = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
    return _Axis(low - rim, high + rim, start, end)


def curve(band: Band) -> list[tuple[float, float, float, float]]:
    """The band as CV with least, likeliest and greatest LB: of a line along all CVs, else at each pair."""
    cvs = sorted({it["cv"] for it in band.pairs})
    if band.kind == "regression":
        low, high = cvs[0], cvs[-1]
        return [(cv, *band.at(cv)) for cv in (low + (high - low) * i / 40 for i in range(41))]
    halves = {it["cv"]: expected_half(it) for it in band.pairs if it["cv_se"]}
    return [(cv, cv - half, cv, cv + half) for cv, half in sorted(halves.items())]


def svg(band: Band) -> str:
    """The picture as SVG, UTF-8: names are inert, whatever they hold."""
    points = curve(band)
    lbs = [it["lb"] for it in band.pairs]
    spread = (max(lbs) - min(lbs)) or 0.1 * abs(lbs[0]) or 0.1
    # a band of few pairs is wide: it may leave the picture, the scores may not
    inside = [
        min(max(value, min(lbs) - 2 * spread), max(lbs) + 2 * spread)
        for point in points
        for value in point[1:]
    ]
    x = _axis([it["cv"] for it in band.pairs], _LEFT, _WIDTH - _RIGHT)
    y = _axis([*lbs, *inside], _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" font-family="sans-serif" font-size="12" role="img">',
        "<title>public score (LB) against score out of fold (CV)</title>",
        f'<clipPath id="frame"><rect x="{_LEFT}" y="{_TOP}" width="{_WIDTH - _LEFT - _RIGHT}" '
        f'height="{_HEIGHT - _TOP - _BOTTOM}"/></clipPath>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        *_text_lines(band),
        *_band(band, points, x, y),
        *_frame(x, y),
        *_points(band, x, y),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _text_lines(band: Band) -> list[str]:
    outside = ", ".join(cut(one_line(name), _LABEL) for name in band.outside)
    judged = len(band.unjudged) < len(band.pairs) and band.kind != "none"
    told = [band.told, cut(f"outside: {outside or 'none'}", 110) if judged else ""]
    return [
        f'<text x="{_LEFT}" y="{20 + 18 * i}" fill="#333">{_inert(line)}</text>'
        for i, line in enumerate(told)
    ]


def _band(
    band: Band, points: list[tuple[float, float, float, float]], x: _Axis, y: _Axis
) -> list[str]:
    if band.kind != "regression":
        return [
            f'<path d="M{x.at(cv):.1f} {y.at(low):.1f}V{y.at(high):.1f}" stroke="{BAND}" stroke-width="9" '
            'clip-path="url(#frame)"/>'
            for cv, low, _, high in points
        ]
    rim = [(cv, low) for cv, low, _, _ in points]
    rim += [(cv, high) for cv, _, _, high in reversed(points)]
    shape = " ".join(f"{x.at(cv):.1f},{y.at(lb):.1f}" for cv, lb in rim)
    line = " ".join(f"{x.at(cv):.1f},{y.at(middle):.1f}" for cv, _, middle, _ in points)
    return [
        f'<polygon points="{shape}" fill="{BAND}" clip-path="url(#frame)"/>',
        f'<polyline points="{line}" fill="none" stroke="#7f9fc4" stroke-dasharray="5 4" clip-path="url(#frame)"/>',
    ]


def _frame(x: _Axis, y: _Axis) -> list[str]:
    parts = [
        f'<path d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}" fill="none" stroke="#555"/>',
        f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 12}" text-anchor="middle">CV, out of fold</text>',
        f'<text transform="translate(16 {(_TOP + _HEIGHT) / 2:.0f}) rotate(-90)" text-anchor="middle">LB, public</text>',
    ]
    for value in x.ticks:
        at = f"{x.at(value):.1f}"
        parts.append(f'<path d="M{at} {_HEIGHT - _BOTTOM}v5" stroke="#555"/>')
        parts.append(
            f'<text x="{at}" y="{_HEIGHT - _BOTTOM + 19}" text-anchor="middle">{value:.4g}</text>'
        )
    for value in y.ticks:
        at = f"{y.at(value):.1f}"
        parts.append(f'<path d="M{_LEFT} {at}h-5" stroke="#555"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at}" dy="4" text-anchor="end">{value:.4g}</text>')
    return parts


def _points(band: Band, x: _Axis, y: _Axis) -> list[str]:
    parts: list[str] = []
    taken: list[tuple[float, float]] = []
    for pair in sorted(band.pairs, key=lambda it: (it["cv"], it["lb"], it["name"])):
        left, top = x.at(pair["cv"]), y.at(pair["lb"])
        colour = OUTSIDE if pair["name"] in band.outside else INSIDE
        name = one_line(pair["name"])
        told = f"{name}: CV {pair['cv']:.4f}, LB {pair['lb']:.4f}"
        parts.append(
            f'<circle cx="{left:.1f}" cy="{top:.1f}" r="4.5" fill="{colour}"><title>{_inert(told)}</title></circle>'
        )
        line = top + 4
        while any(abs(line - used) < 13 and abs(left - at) < 220 for at, used in taken):
            line += 13
        taken.append((left, line))
        right = left < 0.68 * _WIDTH
        parts.append(
            f'<text x="{left + (9 if right else -9):.1f}" y="{line:.1f}" fill="{colour}" '
            f'text-anchor="{"start" if right else "end"}" unicode-bidi="isolate">'
            f"{_inert(cut(name, _LABEL))}</text>"
        )
    return parts


def _inert(text: str) -> str:
    """A name as XML can hold it: no markup, no control characters, no half of a pair."""
    return escape(text.encode("utf-8", "replace").decode(), {'"': "&quot;"})


def _middle(band: Band) -> float:
    """The middle of all CVs."""
    cvs = [it["cv"] for it in band.pairs]
    return float(min(cvs) + max(cvs)) / 2


def _png(band: Band) -> bytes:
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]

    figure = Figure(figsize=(_WIDTH / 100, _HEIGHT / 100), dpi=150, layout="constrained")
    axes = figure.subplots()
    points = curve(band)
    cvs = [it[0] for it in points]
    if band.kind == "regression":
        low, middle, high = ([it[i] for it in points] for i in (1, 2, 3))
        axes.fill_between(cvs, low, high, color=BAND)
        axes.plot(cvs, middle, color="#7f9fc4", linestyle="--")
    elif points:
        axes.vlines(
            cvs, [it[1] for it in points], [it[3] for it in points], color=BAND, linewidth=6
        )
    for pair in band.pairs:
        colour = OUTSIDE if pair["name"] in band.outside else INSIDE
        right = pair["cv"] > _middle(band)  # or its name would leave the picture
        axes.plot(pair["cv"], pair["lb"], "o", color=colour)
        axes.annotate(
            cut(one_line(pair["name"]), _LABEL).replace("$", r"\$"),
            (pair["cv"], pair["lb"]), xytext=(-6 if right else 6, 2), textcoords="offset points", color=colour, fontsize=8,
            ha="right" if right else "left",
        )  # fmt: skip
    axes.set(xlabel="CV, out of fold", ylabel="LB, public")
    axes.set_title(band.told.replace("$", r"\$"), fontsize=7)
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()
