"""The report as one HTML page, and the same as Markdown and JSON."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from stackllm.report import lb_plot
from stackllm.report.page import svg
from stackllm.report.page.panels import short_names, shown_name
from stackllm.report.public import Band

MARKER = "stackllm report"
"""Stands near the start of every file of a report, so that a new one replaces no other file."""

MAX_MODELS = 150

_MOST = 4
"""Groups that are named as hurt or helped most."""

_PANELS = {
    "verdict": "Verdict", "checks": "Checks", "leaderboard": "Leaderboard", "rounds": "Rounds", "group": "Group",
    "browser": "Browser", "voices": "Voices", "confusion": "Confusion", "reliability": "Reliability", "members": "Members",
    "slices": "Slices", "pseudo": "Pseudo-labels", "public": "Public scores", "made": "How it was made",
}  # fmt: skip


def page(told: Mapping[str, Any]) -> str:
    """The HTML page of what :func:`~stackllm.report.page.gather.gather` tells.

    Notes
    -----
    Nothing of a user's stands in it as markup: the template escapes, and what the script draws it draws as text.
    The Content-Security-Policy allows the one script and the one style sheet by their digests, and nothing else:
    no network, no frame, no form, no attribute that holds a script or a style.
    """
    css, js = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; script-src '{_digest(js)}'; style-src '{_digest(css)}'; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["tojson_plain"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.filters["together"] = lambda said: said.replace(" ± ", "\u00a0±\u00a0")
    return environment.from_string(_asset("page.html")).render(
        **{**told, **_drawn(told)},
        css=Markup(css),
        js=Markup(js),
        data=_inert(
            {
                "classes": short_names(told["classes"], 32),
                "heads": short_names(told["classes"], 9),
                "groups": told["browser"]["groups"],
                "total": told["browser"]["total"],
            }
        ),
        policy=policy,
        marker=MARKER,
        panels=[
            (name, title)
            for name, title in _PANELS.items()
            if name not in ("rounds", "voices", "pseudo", "public") or told[name]
        ],
    )  # fmt: skip


def as_json(told: Mapping[str, Any]) -> str:
    """The same for programs."""
    return json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def as_markdown(told: Mapping[str, Any]) -> str:
    """The same as Markdown, without the groups and pictures."""
    board = [["model", "round", "log loss", "to submitted", "row by row", "right", "seconds"]]
    for row in told["leaderboard"]:
        behind = row.get("behind")
        board.append(
            [
                row["model"] + (" (submitted)" if row["submitted"] and told["best_round"] is not None else ""),
                str(row["round"]),
                _loss(row["posterior"], row["posterior_se"]),
                "" if behind is None else f"{behind:+.4f}",
                f"{row['raw']:.4f}",
                f"{row['accuracy']:.1%}",
                f"{row['seconds']:.0f}",
            ]
        )  # fmt: skip
    slices = [["by", "slice", "rows", "log loss"]]
    slices += [
        [it["by"], it["slice"], str(it["rows"]), _loss(it["loss"]["value"], it["loss"]["error"])]
        for it in told["slices"]
    ]
    made = told["made"]
    lines = [
        f"<!-- {MARKER} -->",
        f"# {_plain(told['name'])}",
        *(_plain(line) for line in (*told["verdict"], *told["lacks"], *told["notes"])),
        "## Checks",
        *(
            f"- **{it['code']} {it['title']}** ({it['severity']}): {_plain(it['sentence'])}"
            for it in told["checks"]
        ),
        *([] if told["checks"] else ["Nothing to point at."]),
        "## Leaderboard",
        _table(board),
        *(["## Rounds"] if told["rounds"] else []),
        *(
            f"- round {it['round']}: {_loss(it['posterior'], it['posterior_se'])}"
            + (f"; {it['verdict']}" if it["verdict"] else "")
            for it in told["rounds"]
        ),
        "## Slices",
        _table(slices),
        "## How it was made",
        f"`{made['command']}`",
        *(
            f"- {_plain(name)}: {_plain(json.dumps(value, ensure_ascii=False))}"
            for name, value in sorted(made["changed"].items())
        ),
        *(f"- {_plain(name)}: {value}" for name, value in sorted(made["inputs"].items())),
    ]
    return "\n\n".join(lines).replace("\n\n- ", "\n- ") + "\n"


def _drawn(told: Mapping[str, Any]) -> dict[str, Any]:
    """Pictures, and rows with theirs."""
    classes, board, rounds = told["classes"], told["leaderboard"], told["rounds"]
    shown = board[:MAX_MODELS]
    scale = _scale([(it["posterior"], it["posterior_se"]) for it in shown])
    paired = "behind" in board[0]
    behind = _scale([(it["behind"], it["behind_se"]) for it in shown] if paired else [(0.0, None)])
    loss = told["standing"]["posterior"]["value"]
    rows = [
        row
        | {
            "forest": svg.interval(row["posterior"], row["posterior_se"], scale, loss, "" if row["submitted"] else "old"),
            "paired": svg.interval(row["behind"], row["behind_se"], behind, 0.0, "" if row["submitted"] else "old")
            if paired
            else "",
        }
        for row in shown
    ]  # fmt: skip
    of_rounds = _scale([(it["posterior"], it["posterior_se"]) for it in rounds] or [(0.0, None)])
    of_slices = _scale([(it["loss"]["value"], it["loss"]["error"]) for it in told["slices"]])
    standing = told["standing"]
    return {
        "classes": short_names(classes, 32),
        "board": {
            "rows": rows,
            "axis": svg.forest_axis(scale),
            "paired": paired,
            "paired_axis": svg.forest_axis(behind, signed=True),
            "more": len(board) - len(shown),
        },
        "rounds": [
            it | {"forest": svg.interval(it["posterior"], it["posterior_se"], of_rounds, loss)}
            for it in rounds
        ],
        "rounds_axis": svg.forest_axis(of_rounds),
        "slices": [
            it | {"forest": svg.interval(it["loss"]["value"], it["loss"]["error"], of_slices, loss)}
            for it in told["slices"]
        ],
        "slices_axis": svg.forest_axis(of_slices),
        "pseudo": [
            it
            | {
                "picture": svg.bars(
                    it["histogram"], f"Confidence of the pseudo-labels of round {it['round']}, from 0 to 100 percent."
                )
            }
            for it in told["pseudo"]
        ],
        "public": _public(told["public"]),
        "helped": _helped(told["browser"]["groups"]),
        "pictures": {
            "brought": svg.brought(
                told["browser"]["groups"],
                f"Log loss of each group, row by row and after the group: {standing['raw']['value']:.3f} and "
                f"{standing['posterior']['value']:.3f} in the mean.",
            ),
            "confusion_raw": _confusion(told["confusion"]["raw"], classes, "Row by row"),
            "confusion": _confusion(told["confusion"]["posterior"], classes, "Given the group"),
            "reliability_raw": _reliability(told["reliability"]["raw"], "Row by row"),
            "reliability": _reliability(told["reliability"]["posterior"], "Given the group"),
            "correlation": svg.heat(
                told["correlation"]["matrix"],
                told["correlation"]["models"],
                "Correlation of the models' mistakes.",
                power=4.0,  # good models are all alike
            ),
        },
    }  # fmt: skip


def _scale(values: Sequence[tuple[float, float | None]]) -> svg.Scale:
    low, high = svg.span([it for it, _ in values], [error for _, error in values], svg.REACH)
    return svg.Scale(low, high, 8, 200)


def _helped(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many groups were helped and hurt, and those that were most."""
    placed = [{"place": place, **it} for place, it in enumerate(groups)]
    placed.sort(key=lambda it: it["posterior"] - it["raw"])
    n_gain = sum(it["posterior"] <= it["raw"] for it in placed)
    most = [
        ("Hurt most", placed[n_gain:][::-1][:_MOST]),
        ("Helped most", placed[:n_gain][:_MOST]),
    ]
    return {"gain": n_gain, "cost": len(placed) - n_gain, "most": most}


def _confusion(counts: Sequence[Sequence[int]], classes: Sequence[str], where: str) -> Markup:
    shares = [[it / max(sum(row), 1) for it in row] for row in counts]
    mistakes = [
        (share, i, j) for i, row in enumerate(shares) for j, share in enumerate(row) if i != j
    ]
    share, i, j = max(mistakes)
    alt = f"{where}: most often mistaken is {shown_name(classes[i])}, taken for {shown_name(classes[j])} in {share:.0%} of its rows."
    return svg.heat(shares, classes, alt, "is", "taken for")


def _public(band: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The logbook's picture, and its band in words."""
    if band is None:
        return None
    stored: dict[str, Any] = {
        name: tuple(it) if isinstance(it, list) else it for name, it in band.items()
    }
    whole = Band(**stored)
    return {"outside": whole.outside, "picture": Markup(lb_plot.svg(whole))}


def _reliability(bins: Sequence[Mapping[str, Any]], where: str) -> Markup:
    said = "; ".join(f"said {it['confidence']:.0%}, right {it['right']:.0%}" for it in bins)
    return svg.reliability(bins, f"{where}: {said}.")


def _inert(value: Any) -> Markup:
    """JSON that ends no script and begins no comment, whatever it holds."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _loss(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(map(_plain, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _plain(text: str) -> str:
    """A text that Markdown has no meaning for."""
    for letter in "\\`*_[]|":
        text = text.replace(letter, f"\\{letter}")
    return text.replace("&", "&amp;").replace("<", "&lt;")
