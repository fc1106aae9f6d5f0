"""What a run hands out: predictions, submission, leaderboard, pseudo-labels, run.json."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from stackllm import __version__
from stackllm.crossfit.design import CrossFit
from stackllm.crossfit.pseudo import audit
from stackllm.engine.local import read_timings
from stackllm.engine.trackers import tracking
from stackllm.errors import LockedError, StackllmError, StorageError, first_line
from stackllm.llm.estimate import count_parameters
from stackllm.llm.locate import revision_of
from stackllm.members.registry import Member
from stackllm.members.stage import gather_full, gather_places, places_of
from stackllm.metrics import log_loss
from stackllm.predict import store_model
from stackllm.rating.table import Rated, ratings_table, write_ratings
from stackllm.report.changes import NO_NUMBER, flat
from stackllm.report.doctor import versions
from stackllm.report.leaderboard import best_round, leaderboard, member_scores, render, verdicts
from stackllm.report.logbook import EARLIER, SCORES, STATE, describe, record_run
from stackllm.report.ratings import Account, account, render_accounts
from stackllm.report.stored import POSTERIORS, PREDICTIONS, ROWS
from stackllm.stack.posteriors import Calibrated, cross_posteriors
from stackllm.stack.round import Round, final_posteriors, final_rows
from stackllm.store.atomic import make_folder, storage_errors, write_file, write_text
from stackllm.store.digest import file_digest
from stackllm.store.records import RECORD, read_json
from stackllm.study import Study
from stackllm.tables.contest import Table
from stackllm.tables.spreadsheet import spreadsheet_safe

_HANDED_OUT = (
    RECORD, "leaderboard.csv", "oof.parquet", "test.parquet", "pseudo_labels.parquet", "submission*.csv",
    "ratings.csv", "ratings.parquet", "report.html", "report.json", "report.md", PREDICTIONS,
)  # fmt: skip
_NOT_STORED = {"seconds", "test_one_fold", "test_raw", "test_posterior", "test_se"}
"""Leaderboard columns that the same run may not repeat: times, and scores against a truth that is only shown."""


@dataclass(frozen=True)
class Run:
    """What a finished run tells; everything else is below its folder.

    Parameters
    ----------
    root
        The run's folder.
    board
        The leaderboard; see :func:`~stackllm.report.leaderboard.leaderboard`.
    verdicts
        Each round beside the one before it, in words.
    best_round, loss
        The round that is submitted and its out-of-fold posterior log loss; None before stage two.
    submission
        The file to submit; None before stage two.
    ratings
        What each asked recipe was answered, and what that cost.
    """

    root: Path
    board: pl.DataFrame
    verdicts: tuple[str, ...] = ()
    best_round: int | None = None
    loss: float | None = None
    submission: Path | None = None
    ratings: tuple[Account, ...] = ()

    def summary(self) -> dict[str, Any]:
        """The same for programs."""
        told: dict[str, Any] = {"leaderboard": self.board.to_dicts()}
        if self.ratings:
            told["ratings"] = [dataclasses.asdict(it) for it in self.ratings]
        if self.submission is not None:
            told |= {
                "rounds": list(self.verdicts),
                "best_round": self.best_round,
                "oof_log_loss": self.loss,
                "submission": str(self.submission),
            }
        return told

    def __str__(self) -> str:
        lines = [render_accounts(self.ratings)] if self.ratings else []
        lines += [render(self.board), *self.verdicts]
        if self.submission is not None:
            lines.append(f"submission of round {self.best_round}: {self.submission}")
        return "\n".join(lines)


@contextmanager
def recorded(study: Study) -> Iterator[None]:
    """Note beside the outputs whether the run is running, finished or failed; set aside what another run left.

    A failure goes into the logbook too; what finishes does so with its scores, see :func:`hand_out`.

    A run of other settings or tables under the same name would replace what this one's predecessor handed
    out: that is moved into ``earlier/`` and said.
    """
    root, made = study.workspace.root, _how_made(study)
    _set_aside(study, made)
    _note(root, "running")
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, StackllmError) else first_line(error)
        with suppress(LockedError, StorageError):  # one error is enough to tell of
            record_run(root.parent, describe(root.name, made, [], reason))
        _note(root, "failed", reason)
        raise
    _note(root, "finished")


def hand_out_ratings(study: Study, rated: Sequence[Rated]) -> tuple[Account, ...]:
    """Publish what an LLM answered, and tell it; what an earlier run of this name asked goes, if this one asks nothing.

    Notes
    -----
    ``ratings.csv`` is for people, ``ratings.parquet`` the same for programs: a row per row of the tables,
    in their order, and question; see :func:`~stackllm.rating.table.ratings_table`.
    """
    path, table = study.workspace.root / "ratings.csv", study.table
    if not rated:
        for left in (path, path.with_suffix(".parquet")):
            with storage_errors(left, "removing what another run asked"):
                left.unlink(missing_ok=True)
        return ()
    rows = table.rows().with_row_index("number")
    of = pl.when(pl.col("number") < table.n_train).then(pl.lit("train")).otherwise(pl.lit("test"))
    ratings = ratings_table(rated, rows.with_columns(set=of))
    write_ratings(ratings, path)
    study.workspace.reporter.say(f"ratings: {path}")
    return account(rated, ratings, table.train, table.classes)


def hand_out(
    study: Study,
    posteriors: Mapping[str, Calibrated],
    rounds: Sequence[Round],
    ratings: tuple[Account, ...] = (),
) -> Run:
    """Publish everything that a run hands out, below the run's folder.

    Parameters
    ----------
    study
        The run.
    posteriors
        Of stage one's members, for a run that ends there.
    rounds
        The rounds that were played; empty if the run ends with stage one.
    ratings
        From :func:`hand_out_ratings`.

    Notes
    -----
    ``oof.parquet`` and ``test.parquet`` hold the final posteriors of the best round,
    ``predictions/`` the calibrated row probabilities of every model and round, and of single seeds
    and refitted models where members have them, their posteriors, and the group, fold and label of
    each row, ``pseudo_labels.parquet`` the audit table,
    ``submission_raw.csv`` round 0 before stage three, ``leaderboard.csv`` the scores, ``run.json``
    how it was made.
    """
    root = study.workspace.root
    timings = read_timings(root)
    if not rounds:
        board = member_scores(0, posteriors, study.design, timings, study.truth)
        _write_rows(study, 0, posteriors)
        _write_key(study)
        _write_record(study, board, _members_record(posteriors, study))
        return Run(root, board, ratings=ratings)
    board = leaderboard(rounds, study.design, timings, study.truth)
    best = best_round(rounds)
    _write_predictions(study, rounds, best, full_predictions(study))
    _write_record(study, board, _rounds_record(rounds, best))
    store_best(study, rounds)
    told = tuple(verdicts(rounds, study.design))
    submission = root / "submission.csv" if study.table.test.height else None
    return Run(root, board, told, best.number, best.loss, submission, ratings)


def _write_predictions(
    study: Study, rounds: Sequence[Round], best: Round, full: Mapping[str, np.ndarray]
) -> None:
    root, table, design = study.workspace.root, study.table, study.design
    for played in rounds:
        _write_rows(study, played.number, played.posteriors)
        views = {name: model.test for name, model in played.models.items()}
        rows = final_rows(views, full, played.blend.weights)
        if played.number == 0:
            write_submission(root / "submission_raw.csv", study, rows.mean(axis=0))
        final = final_posteriors(rows, design.test_groups, study.settings.data.quota)
        write_submission(root / f"submission_round{played.number}.csv", study, final)
        if played is best:
            _write(root / "test.parquet", table.test, table, final)
            write_submission(root / "submission.csv", study, final)
    for member in study.settings.members:
        _write_parts(study, member, full, root / PREDICTIONS / "round0")
    _write_key(study)
    _write(root / "oof.parquet", table.train, table, best.final.oof)
    if len(rounds) > 1:
        labels = pl.concat(
            audit(fit, design, study.settings.pseudo, table.test["row_id"], table.classes)
            for played in rounds
            for fit in played.fits
        )
        write_file(root / "pseudo_labels.parquet", labels.write_parquet)


def store_best(study: Study, rounds: Sequence[Round]) -> None:
    """Store which units make up the best round's model, for new groups."""
    refitted = [member.name for member in study.settings.members if member.traits.refitted]
    store_model(study, best_round(rounds), refitted)


def full_predictions(study: Study) -> dict[str, np.ndarray]:
    """Test rows by models on all training rows, ``(n_test, n_classes)``, of the members that have such."""
    predictions = {
        member.name: gather_full(member, study.design, study.workspace.root)
        for member in study.settings.members
    }
    return {name: matrix for name, matrix in predictions.items() if matrix is not None}


def _write_rows(study: Study, number: int, posteriors: Mapping[str, Calibrated]) -> None:
    table = study.table
    folder = study.workspace.root / PREDICTIONS / f"round{number}"
    for name, calibrated in posteriors.items():
        _write_model(folder, name, table, calibrated)


def _write_model(folder: Path, name: str, table: Table, calibrated: Calibrated) -> None:
    """Publish a model's calibrated row probabilities, and below ``posteriors/`` what stage three makes of them."""
    for place, predicted in _views(folder, calibrated):
        _write(place / f"{name}_oof.parquet", table.train, table, predicted.oof)
        _write(place / f"{name}_test.parquet", table.test, table, predicted.test_mean())


def _views(folder: Path, calibrated: Calibrated) -> list[tuple[Path, CrossFit]]:
    return [(folder, calibrated.rows), (folder / POSTERIORS, calibrated.predictions)]


def _write_key(study: Study) -> None:
    """Publish what the predictions are judged by: group, label and fold of each row, and no labels of test rows."""
    table, design = study.table, study.design
    labels = pl.Series("label", table.classes, dtype=pl.String).gather(table.train["label"])
    folder = study.workspace.root / PREDICTIONS
    train = table.train.select("row_id", "group_id").with_columns(
        labels, pl.Series("fold", design.folds)
    )
    test = table.test.select("row_id", "group_id").with_columns(pl.Series("part", design.parts))
    write_file(folder / ROWS.format("oof"), train.write_parquet)
    write_file(folder / ROWS.format("test"), test.write_parquet)


def _write_parts(
    study: Study, member: Member, full: Mapping[str, np.ndarray], folder: Path
) -> None:
    """Publish what a member's single seeds predict in round 0, and its models on all training rows.

    Each is calibrated like the member itself: on its own out-of-fold rows, and the models on all
    rows, which have none, on the member's.
    """
    design, root, table = study.design, study.workspace.root, study.table
    models = places_of(member, design.first_fits(), design)
    seeds = member.traits.seeds or ()
    for seed in seeds if len(seeds) > 1 else ():
        single = [place for place in models if place.seed == seed]
        predictions = gather_places(single, design, root)
        calibrated = cross_posteriors(predictions, design, study.settings.data.quota)
        _write_model(folder, f"{member.name}_seed{seed}", table, calibrated)
    if member.name in full:
        whole = gather_places(models, design, root)
        test = np.broadcast_to(full[member.name], whole.test.shape)
        calibrated = cross_posteriors(CrossFit(whole.oof, test), design, study.settings.data.quota)
        for place, predicted in _views(folder, calibrated):
            path = place / f"{member.name}_full_test.parquet"
            _write(path, table.test, table, predicted.test_mean())


def write_submission(path: Path, study: Study, probabilities: np.ndarray) -> None:
    """Publish test probabilities, ``(n_test, n_classes)``, as CSV: in the sample submission's columns if there is one."""
    if not len(probabilities):
        return  # there is no test table
    frame = study.layout.filled(probabilities)
    if study.settings.data.csv_safe:
        frame = spreadsheet_safe(frame)
    write_file(path, frame.write_csv)


def _write(path: Path, rows: pl.DataFrame, table: Table, probabilities: np.ndarray) -> None:
    columns = dict(zip(table.classes, probabilities.T, strict=True))
    frame = pl.DataFrame({"row_id": rows["row_id"], **columns})
    write_file(path, frame.write_parquet)


def _write_record(study: Study, board: pl.DataFrame, more: dict[str, Any]) -> None:
    root = study.workspace.root
    scores = board.select([name for name in board.columns if name not in _NOT_STORED])
    write_file(root / "leaderboard.csv", scores.write_csv)
    content = {
        **_how_made(study),
        **more,
        "parameters": {name: count_parameters(name) for name in study.settings.backbones},
        "seeds": _seed_scores(study),
    }
    write_text(root / RECORD, json.dumps(content, indent=1, sort_keys=True))
    entry = describe(root.name, content, board.to_dicts())
    if record_run(root.parent, entry):  # trackers are told what is news, too
        trackers = study.settings.tracking.report_to
        with tracking(trackers, root / "trackers" / "scores", entry["changed"]) as track:
            for number, told in _by_round(entry).items():
                track(told, number)


def _by_round(entry: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """A run's scores as ``model/score`` by round, as trackers have them."""
    rounds: dict[int, dict[str, Any]] = {}
    for model in entry["models"]:
        scores = {f"{model['model']}/{name}": model[name] for name in SCORES if name in model}
        rounds.setdefault(model["round"], {}).update(scores)
    return rounds


def _seed_scores(study: Study) -> dict[str, dict[str, dict[str, float]]]:
    """Of members with several seeds, each seed's log loss out of fold in round 0, raw and posterior, by member."""
    design, quota = study.design, study.settings.data.quota
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for member in study.settings.members:
        seeds = member.traits.seeds or ()
        places = places_of(member, design.first_fits(), design)
        for seed in seeds if len(seeds) > 1 else ():
            single = [place for place in places if place.seed == seed]
            of_seed = cross_posteriors(
                gather_places(single, design, study.workspace.root), design, quota
            )
            scores.setdefault(member.name, {})[str(seed)] = {
                "raw": log_loss(of_seed.rows.oof, design.labels),
                "posterior": log_loss(of_seed.oof, design.labels),
            }
    return scores


def _members_record(posteriors: Mapping[str, Calibrated], study: Study) -> dict[str, Any]:
    """Of a run that ends with stage one, the score of its best member."""
    losses = {name: log_loss(it.oof, study.design.labels) for name, it in posteriors.items()}
    best = min(losses, key=losses.__getitem__)
    return {"until": "features", "oof_log_loss": {best: losses[best]}, "best_round": None}


def _rounds_record(rounds: Sequence[Round], best: Round) -> dict[str, Any]:
    return {
        "until": "pseudo" if len(rounds) > 1 else "stack",
        "oof_log_loss": {f"round {played.number}": played.loss for played in rounds},
        "best_round": best.number,
        "blend_weights": {
            f"round {played.number}": dict(
                zip(played.blend.names, played.blend.weights.mean(axis=0).tolist(), strict=True)
            )
            for played in rounds
        },
    }


def _how_made(study: Study) -> dict[str, Any]:
    """How a run is made, without anything that differs between two runs of the same."""
    data = study.settings.data
    return {
        "stackllm": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_flags": _cpu_flags(),
        "versions": versions(),
        "settings": json.loads(json.dumps(dataclasses.asdict(study.settings))),
        "inputs": {path: file_digest(Path(path)) for path in (data.train, data.test) if path},
        "backbones": {name: revision_of(name) for name in study.settings.backbones},
        "classes": list(study.table.classes),
        "n_train": study.table.train.height,
        "n_test": study.table.test.height,
        "notes": list(study.table.notes),
    }


def _set_aside(study: Study, made: dict[str, Any]) -> None:
    """Move what a run of other settings or tables handed out under this name into ``earlier/``."""
    root = study.workspace.root
    try:
        stored = read_json(root / RECORD)
        differences = _differences(stored, made)
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError, AttributeError):
        differences = ["an unreadable run.json"]
    if not differences:
        return
    number = max([0, *(int(path.name) for path in (root / EARLIER).glob("[0-9]*"))]) + 1
    folder = root / EARLIER / f"{number:03d}"
    make_folder(folder)
    for pattern in _HANDED_OUT:
        for path in sorted(root.glob(pattern)):
            path.replace(folder / path.name)
    study.workspace.reporter.warn(
        f"{root} was made before with {'; '.join(differences[:5])}. What it handed out is kept in {folder}; "
        "another name keeps both apart."
    )


def _differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Settings that another result would come of, as they were; and whether the tables were others."""
    was, will = _flat(stored["settings"]), _flat(wanted["settings"])
    # a setting that another version knows and this one does not, or the other way, is no choice of the user's
    names = sorted(name for name in was.keys() & will.keys() if not _same(was[name], will[name]))
    changed = [f"{name} = {was[name]}" for name in names]
    revisions = stored.get("backbones", {})
    changed += [
        f"other weights of {name}"
        for name, revision in wanted["backbones"].items()
        if revisions.get(name, revision) != revision
    ]
    tables = [sorted(record["inputs"].values()) for record in (stored, wanted)]
    return changed + (["other tables"] if tables[0] != tables[1] else [])


def _same(was: Any, will: Any) -> bool:
    """Are two settings one? Earlier versions wrote ``"auto"``, and LLMs of the hub without their commit."""
    if isinstance(was, dict) and isinstance(will, dict):
        names = (was.keys() & will.keys()) - {"report_to"}  # who watches a training
        return all(_same(was[name], will[name]) for name in names)
    if isinstance(was, list) and isinstance(will, list):
        return len(was) == len(will) and all(map(_same, was, will))
    return bool(was in (will, "auto")) or str(will).startswith((f"{was}@", f"{was}-"))


_NO_DIFFERENCE = {*NO_NUMBER, "pseudo.rounds"}
"""How far a run goes, too: its models stay the same."""


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    parts = {
        name: it for name, it in settings.items() if name not in ("server", "tracking", "notes")
    }
    left_out = {f"{name} left out": it is None for name, it in parts.items()}
    return {
        name: value
        for name, value in {**flat(parts), **left_out}.items()
        if name not in _NO_DIFFERENCE
    }


def _note(root: Path, state: str, error: str = "") -> None:
    content = {"state": state, **({"error": error} if error else {})}
    write_text(root / STATE, json.dumps(content))


def _cpu_flags() -> list[str]:
    """The vector instructions that decide a machine's arithmetic, where the system tells."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return []
    words = set(path.read_text(encoding="utf-8", errors="replace").split())
    return sorted(
        words & {"avx", "avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16"}
    )
