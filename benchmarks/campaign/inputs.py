"""Mutated tables, Parquet files and settings: a result or a sentence, never a traceback or a hang."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from benchmarks.campaign.contest import write_contest
from benchmarks.campaign.figures import Case, play

LONGEST_SECONDS = 10.0
PIECES = (
    b",", b'"', b"\n", b"\r\n", b"\r", b"\0", b";", b"\t", b"nan", b"-inf", b"1e400", b"\xff\xfe", b"[[",
    b"\xef\xbb\xbf", b"\xc3", "ü".encode(), b"0", b"-1", b"true", b"PAR1", b"\\", b"#", b"=", b"[run]\n",
    b"]", b"{", b"\xf0\x9f\x98\x80", b"9" * 400, b"," * 50, b'"' * 3, b"Question", b"1979-05-27", b"\xed\xa0\x80",
)  # fmt: skip


def figures(home: Path, draws: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """A thousand mutations a draw: 60 % CSV, 20 % Parquet, 20 % TOML."""
    folder = write_contest(home, 4)
    (folder / "good.parquet").write_bytes(_parquet(folder))
    for kind, share in (("csv", 600), ("parquet", 200), ("toml", 200)):
        cases = (
            (f"{kind}, seed {number}", _case(folder, kind, random.Random(f"{kind}{number}")))
            for number in range(seed, seed + draws * share)
        )
        with (
            contextlib.chdir(folder),
            tempfile.TemporaryFile() as printed,
            _standard_error(printed),
        ):
            figure = play(f"mutated {kind}", cases)
            printed.seek(0)
            panics = printed.read().count(b"panicked")
        yield {**figure, "panics": panics, "met": figure["met"] and not panics}


@contextlib.contextmanager
def _standard_error(target: IO[bytes]) -> Iterator[None]:
    """What Rust prints by itself goes into a file."""
    kept = os.dup(2)
    os.dup2(target.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _parquet(folder: Path) -> bytes:
    import io

    import polars as pl

    target = io.BytesIO()
    pl.read_csv(folder / "train.csv").write_parquet(target)
    return target.getvalue()


def _case(folder: Path, kind: str, draw: random.Random) -> Case:
    def case() -> str | None:
        from stackllm.errors import StackllmError

        started = time.monotonic()
        try:
            _read(folder, kind, draw)
        except StackllmError as error:
            lines = str(error).split("\n")  # one a problem, each with its file
            if not all("mutated." in line for line in lines) or len(str(error)) > 2000:
                return f"not sentences: {error!s:.300}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"{type(error).__name__}: {error!s:.200}"
        if time.monotonic() - started > LONGEST_SECONDS:
            return f"it took {time.monotonic() - started:.0f} s"
        return None

    return case


def _read(folder: Path, kind: str, draw: random.Random) -> None:
    import polars as pl

    from stackllm.settings import read_settings
    from stackllm.tables.contest import TableParams, read_new, read_training
    from stackllm.tables.ids import Rows
    from stackllm.tables.labels import read_truth
    from stackllm.tables.submission import read_submission

    if kind == "toml":
        text = mutated((folder / "stackllm.toml").read_bytes(), draw)
        Path("mutated.toml").write_bytes(text)
        read_settings(Path("mutated.toml"), {})
        return
    names = ["good.parquet"] if kind == "parquet" else ["train.csv", "test.csv", "sub.csv"]
    source = draw.choice(names)
    path = Path(f"mutated.{kind}")
    path.write_bytes(mutated((folder / source).read_bytes(), draw))
    match source:
        case "sub.csv":
            read_submission(path)
        case "test.csv":
            read_new(path, TableParams())
        case _ if draw.random() < 0.2:
            read_truth(path, Rows(pl.Series("id", ["0", "1"]), path), ("0", "1", "2"))
        case _:
            read_training(TableParams(train=str(path)))


def mutated(content: bytes, draw: random.Random) -> bytes:
    """One to four changes: bytes, pieces with a meaning, cuts, lines moved or said twice."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        lines = bytes(data).split(b"\n")
        match draw.randrange(6):
            case 0:
                data[at:at] = draw.choice(PIECES)
            case 1:
                del data[at : at + draw.randint(1, 40)]
            case 2:
                data[at : at + 1] = bytes([draw.randrange(256)])
            case 3:
                data[at : at + draw.randint(1, 20)] = draw.choice(PIECES)
            case 4:
                lines.insert(draw.randrange(len(lines) + 1), draw.choice(lines))
                data = bytearray(b"\n".join(lines))
            case _:
                data = data[:at]
    return bytes(data)
