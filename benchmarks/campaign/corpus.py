"""The named tables. To add one: what is wrong, the exit code, and words of the sentence."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

HEADER = "Question,Response,target\n"
TEST = "id,Question,Response\n" + "".join(
    f"{3 * group + row},test {group},answer {row} {group}\n"
    for group in range(3)
    for row in range(3)
)
SETTINGS = '[run]\nfolds = 2\n[encoder]\nbackbone = "none"\n[[member]]\nkind = "lexical"\n'


def train_rows(mark: Callable[[str], str] = lambda text: text) -> str:
    """Six groups of three rows; ``mark`` changes each response."""
    return "".join(
        f"question {group},{mark(f'answer {row} of {group}')},{row}\n"
        for group in range(6)
        for row in range(3)
    )


TRAIN = HEADER + train_rows()


@dataclass(frozen=True)
class Bad:
    """A contest with something wrong or odd in it.

    Parameters
    ----------
    name
        What is wrong.
    status
        The exit code it gets.
    words
        A part of the sentence it gets; empty for odd tables that are fine.
    train, test
        Contents of the two files; None leaves the file out.
    settings
        Content of ``stackllm.toml``.
    arguments
        Further options of ``stackllm features``.
    """

    name: str
    status: int
    words: str
    train: str | bytes | None = TRAIN
    test: str | bytes | None = TEST
    settings: str = SETTINGS
    arguments: tuple[str, ...] = field(default=())


def parquet(columns: dict[str, Any]) -> bytes:
    """A Parquet file of these columns."""
    import polars as pl

    target = io.BytesIO()
    pl.DataFrame(columns).write_parquet(target)
    return target.getvalue()


_NFC, _NFD = (unicodedata.normalize(form, "ü") for form in ("NFC", "NFD"))
_IDS = "id,Question,Response,target\n" + "".join(
    f"{3 * group + row},question {group},answer {row},{row}\n"
    for group in range(6)
    for row in range(3)
)
_WIDE = ",".join(f"c{i}" for i in range(10_000))
_COLUMNS = {
    "Question": [f"q{i // 3}" for i in range(18)],
    "Response": [f"a{i}" for i in range(18)],
    "target": [i % 3 for i in range(18)],
}

REFUSED = [
    Bad("no files at all", 66, "there is no such file", None, None),
    Bad("no test", 66, "test.csv: there is no such file", test=None),
    Bad("no train", 66, "train.csv: there is no such file", train=None),
    Bad("empty", 65, "the file is empty", ""),
    Bad("white space", 65, "the file is empty", " \n\n \n"),
    Bad("header only", 65, "no row below it", HEADER),
    Bad("test of a header only", 65, "no row below it", test="id,Question,Response\n"),
    Bad("UTF-16", 65, "this is UTF-16 text", TRAIN.encode("utf-16")),
    Bad("Latin-1", 65, "is not UTF-8", TRAIN.replace("answer", "ä").encode("latin-1")),
    Bad("NUL", 65, "holds a NUL byte", TRAIN.replace("of 3", "\0", 1)),
    Bad(
        "a question is empty",
        65,
        'have no group in column "Question" (first: row 8)',
        TRAIN.replace("question 2,answer 1", ",answer 1"),
    ),
    Bad("ZIP", 65, "a ZIP archive, not CSV. Unpack it", b"PK\x03\x04" + bytes(40)),
    Bad("gzip", 65, "a gzip file", b"\x1f\x8b" + bytes(40)),
    Bad("old Macintosh lines", 65, "carriage return", TRAIN.replace("\n", "\r")),
    Bad(
        "duplicate columns",
        65,
        "more than once",
        TRAIN.replace("Question,Response,", "Question,Question,"),
    ),
    Bad("no column of responses", 65, 'no column "Response"', TRAIN.replace("Response", "Answer")),
    Bad("no column of labels", 65, 'no column "target"', TRAIN.replace("target", "label")),
    Bad("no column of questions", 65, 'no column "Question"', TRAIN.replace("Question", "Prompt")),
    Bad("test without responses", 65, 'no column "Response"', test=TEST.replace("Response", "R")),
    Bad(
        "semicolons",
        65,
        'columns are separated by ";", not by commas. Write it anew',
        TRAIN.replace(",", ";"),
    ),
    Bad(
        "tabs",
        65,
        "columns are separated by tabs, not by commas. Write it anew",
        TRAIN.replace(",", "\t"),
    ),
    Bad(
        "one cell too many",
        65,
        "row 2 has 4 fields and the header 3",
        TRAIN.replace("1 of 0,1", "1 of 0,1,7"),
    ),
    Bad(
        "one cell too few",
        65,
        "row 2 has 2 fields and the header 3",
        TRAIN.replace("1 of 0,1", "1 of 0"),
    ),
    Bad(
        "open quote",
        65,
        "a quote is opened and never closed",
        TRAIN.replace("answer 1 of 2", '"answer 1 of 2'),
    ),
    Bad("a label is empty", 65, "label", TRAIN.replace("2 of 1,2", "2 of 1,")),
    Bad(
        "one class",
        65,
        "holds one label only",
        HEADER + train_rows().replace(",1\n", ",0\n").replace(",2\n", ",0\n"),
    ),
    Bad(
        "a class in one fold only",
        65,
        "no model could learn it there",
        TRAIN + "question 0,lonely,9\n",
    ),
    Bad("too few groups", 65, "cannot be split into 2 folds", HEADER + "q,a,0\nq,b,1\nq,c,2\n"),
    Bad("an id twice", 65, "occur", test=TEST.replace("\n1,", "\n0,")),
    Bad("an id is empty", 65, "id", test=TEST.replace("\n1,", "\n,")),
    Bad("training id twice", 65, "occur", _IDS.replace("\n1,", "\n0,"), arguments=("--id", "id")),
    Bad("the id option names nothing", 65, 'no column "key"', arguments=("--id", "key")),
    Bad("not Parquet", 65, "not a readable Parquet file", b"PAR1" + bytes(60)),
    Bad("torn Parquet", 65, "not a readable Parquet file", parquet(_COLUMNS)[:200]),
    Bad(
        "Parquet without labels",
        65,
        'no column "target"',
        parquet({k: v for k, v in _COLUMNS.items() if k != "target"}),
    ),
    Bad("Parquet without rows", 65, "no row", parquet({k: v[:0] for k, v in _COLUMNS.items()})),
    Bad(
        "Parquet of lists",
        65,
        'column "Response" holds List',
        parquet({**_COLUMNS, "Response": [["a"]] * 18}),
    ),
    Bad("10,000 columns and none of ours", 65, 'no column "', _WIDE + "\n" + _WIDE + "\n"),
    Bad(
        "HTML", 65, "", "<!doctype html><html><body>Log in to download</body></html>\n<p>x,y</p>\n"
    ),
    Bad(
        "Parquet of bytes",
        65,
        "should hold numbers or text does not",
        parquet({**_COLUMNS, "Response": [b"\xff"] * 18}),
    ),
    Bad("JSON", 65, "", '{"Question": ["a"],\n "Response": ["b"]}\n'),
    Bad(
        "Git LFS pointer",
        65,
        "",
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
    ),
    Bad(
        "settings with an unknown key",
        65,
        '[run] has no key "fold". Did you mean "folds"?',
        settings=SETTINGS.replace("folds", "fold"),
    ),
    Bad("settings that are no TOML", 65, "not a TOML file", settings="[run\n"),
    Bad(
        "settings in UTF-16",
        65,
        "not a TOML file",
        settings=SETTINGS.encode("utf-16").decode("latin-1"),
    ),
    Bad("more folds than groups", 65, "cannot be split into 9 folds", arguments=("--folds", "9")),
    Bad(
        "one fold",
        2,
        "--folds must be a whole number from 2 to 1000, not 1",
        arguments=("--folds", "1"),
    ),
    Bad("no such recipe", 66, "no such recipe file", arguments=("--recipe", "no.py")),
    Bad("a name that leads out", 2, "a run's name may hold", arguments=("--name", "../x")),
    Bad("a hidden name", 2, "a run's name may hold", arguments=("--name", ".x")),
    Bad("an empty name", 2, "a run's name may hold", arguments=("--name", "")),
    Bad("a name of two levels", 2, "a run's name may hold", arguments=("--name", "a/b")),
    Bad("the cache's own name", 2, "a run cannot be called cache", arguments=("--name", "cache")),
]

FINE = [
    Bad("byte order mark", 0, "", b"\xef\xbb\xbf" + TRAIN.encode()),
    Bad("CRLF", 0, "", TRAIN.replace("\n", "\r\n"), TEST.replace("\n", "\r\n")),
    Bad("no newline at the end", 0, "", TRAIN.rstrip("\n")),
    Bad("empty lines", 0, "", TRAIN.replace("\nquestion 3,answer 0", "\n\n\nquestion 3,answer 0")),
    Bad("emoji", 0, "", HEADER + train_rows(lambda text: f"{text} 👩‍👩‍👧‍👦🏳️‍🌈")),
    Bad("right to left", 0, "", HEADER + train_rows(lambda text: f"\u202e{text} שלום مرحبا")),
    Bad("zero width", 0, "", HEADER + train_rows(lambda text: f"\u200b{text}\u200d\ufeff")),
    Bad(
        "NFC and NFD ids are two",
        0,
        "",
        test=TEST.replace("\n0,", f"\n{_NFC},").replace("\n1,", f"\n{_NFD},"),
    ),
    Bad(
        "NFC and NFD questions are one",
        0,
        "",
        TRAIN.replace("question 0,answer 0", f"{_NFC},answer 0").replace("question 0", _NFD),
    ),
    Bad(
        "ids that are paths",
        0,
        "",
        test=TEST.replace("\n0,", "\n../../x,").replace("\n1,", "\n/etc/x,"),
    ),
    Bad(
        "cells that are formulas",
        0,
        "",
        HEADER + train_rows(lambda text: f"=cmd|'/c calc'!A1 {text}"),
    ),
    Bad("ids that are formulas", 0, "", test=TEST.replace("\n0,", "\n=1+1,")),
    Bad("a cell of 10 MB", 0, "", TRAIN.replace("answer 1 of 2", "long word " * 1_000_000)),
    Bad(
        "10,000 further columns",
        0,
        "",
        _WIDE
        + ","
        + HEADER
        + "".join("," * 10_000 + line + "\n" for line in train_rows().splitlines()),
    ),
    Bad(
        "quoted newlines and commas",
        0,
        "",
        HEADER + train_rows(lambda text: f'"{text},\nsaid ""he"""'),
    ),
    Bad("empty responses", 0, "", HEADER + train_rows(lambda text: "")),
    Bad("white space responses", 0, "", HEADER + train_rows(lambda text: " \t ")),
    Bad("identical responses", 0, "", HEADER + train_rows(lambda text: "same")),
    Bad(
        "labels that are words", 0, "", TRAIN.replace(",0\n", ",gpt\n").replace(",1\n", ",llama\n")
    ),
    Bad("labels that are formulas", 0, "", TRAIN.replace(",0\n", ",=x\n")),
    Bad("labels that are paths", 0, "", TRAIN.replace(",0\n", ",../x\n")),
    Bad("groups of unequal size", 0, "", TRAIN.replace("question 0,answer 2 of 0,2\n", "")),
    Bad("Parquet under the name of CSV", 0, "", parquet(_COLUMNS)),
    Bad(
        "a lone surrogate as WTF-8",
        65,
        "is not UTF-8",
        TRAIN.encode().replace(b"of 3", b"\xed\xa0\x80"),
    ),
    Bad("control characters", 0, "", HEADER + train_rows(lambda text: f"\x01\x1b[31m{text}\x7f")),
    Bad("a response of one character", 0, "", HEADER + train_rows(lambda text: "x")),
    Bad(
        "combining marks without end",
        0,
        "",
        HEADER + train_rows(lambda text: "a" + "\u0301" * 2000),
    ),
]

CORPUS = REFUSED + FINE
