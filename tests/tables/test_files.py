import csv
import io
import random
import threading
from pathlib import Path

import polars as pl
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stackllm.errors import DataError, MissingInputError, StackllmError
from stackllm.tables import strict_csv
from stackllm.tables.files import read_frame

TABLE = "id,text\n" + "".join(f"{i},some text of row {i}\n" for i in range(20_000))


def test_a_file_that_comes_and_goes_is_read_whole_or_refused_in_one_sentence(tmp_path):
    path, done = tmp_path / "table.csv", threading.Event()

    def flicker() -> None:
        while not done.is_set():
            path.write_text(TABLE)
            path.unlink()

    thread = threading.Thread(target=flicker)
    thread.start()
    said: set[str] = set()
    try:
        for _ in range(300):
            try:
                frame = read_frame(path)
            except StackllmError as error:
                said.add(str(error))
            else:  # a writer that is not done yet leaves a beginning, cut anywhere
                assert frame["id"].to_list()[:-1] == [str(i) for i in range(frame.height - 1)]
    finally:
        done.set()
        thread.join()
    assert said  # it was met gone, empty or cut at least once
    assert not any("\n" in sentence for sentence in said)


def test_a_link_that_leads_nowhere_is_a_missing_file(tmp_path):
    (tmp_path / "table.csv").symlink_to(tmp_path / "gone.csv")
    with pytest.raises(MissingInputError, match="no such file"):
        read_frame(Path(tmp_path / "table.csv"))


def test_csv_and_parquet_give_the_same_cells(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes('\ufeff"a b",c\r\n007," x"\r\n"say ""hi""","1\r\n2"\r\n'.encode())
    assert read_frame(path).rows() == [("007", " x"), ('say "hi"', "1\r\n2")]
    pl.DataFrame({"a b": ["007"], "c": [" x"]}).write_parquet(tmp_path / "table.parquet")
    assert read_frame(tmp_path / "table.parquet").rows() == [("007", " x")]


WRITERS = {
    "csv": lambda rows, end: _by_csv(rows, end, csv.QUOTE_MINIMAL),
    "csv, all quoted": lambda rows, end: _by_csv(rows, end, csv.QUOTE_ALL),
    "polars": lambda rows, end: _by_polars(rows, end, "necessary"),
    "polars, all quoted": lambda rows, end: _by_polars(rows, end, "always"),
}


def _by_csv(rows, end, quoting):
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end, quoting=quoting).writerows(rows)
    return text.getvalue()


def _by_polars(rows, end, style):
    frame = pl.DataFrame(rows[1:], schema=rows[0], orient="row")
    return frame.write_csv(line_terminator=end, quote_style=style)


CELLS = st.text(
    st.sampled_from("ab \",\n\r\\;\tü😀='\u2028\x0b\x85")
    | st.characters(exclude_categories=("Cs",)),
    max_size=8,
).map(lambda text: text.replace("\0", ""))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("csv") / "table.csv"


@pytest.fixture(params=[2**20, 3], ids=["whole", "in chunks of 3 bytes"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(strict_csv, "_CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_whatever_is_written_well_is_read_to_the_letter(place, write, end):
    @given(st.integers(1, 4).flatmap(lambda n: st.lists(st.tuples(*[CELLS] * n), min_size=1)))
    def check(cells):
        # a row without any filled cell is refused
        rows = [
            tuple(f"c{i}" for i in range(len(cells[0]))),
            *[(f"{c[0]}x", *c[1:]) for c in cells],
        ]
        text = write(rows, end)
        # csv does not quote a carriage return where lines end in "\n", and cannot read that itself
        assume(list(map(tuple, csv.reader(io.StringIO(text, newline="")))) == rows)
        place.write_bytes(text.encode())
        assert read_frame(place).rows() == rows[1:]

    check()


PIECES = (
    "a", "b", " ", '"', '""', '"', ",", ",", ",", "\n", "\n", "\r\n", "\r", '\\"', "\\", "ü", "0.5",
    '"x"', '"a,b"', '""""', "\n\n", "'", ";",
)  # fmt: skip
FIELDS = ("a", "", '"a"', '""', '"a,b"', '"a""b"', '"a\nb"', " a", '"a\r\nb"', "x\\", '"x\\"', "ü")


def odd_text(rng):
    """A small CSV with quotes in odd places, or a good one with a few bytes changed."""
    width = rng.randint(1, 3)
    if rng.random() < 0.3:
        body = "".join(rng.choices(PIECES, k=rng.randint(0, 14)))
    else:
        rows = [",".join(rng.choices(FIELDS, k=width)) for _ in range(rng.randint(1, 4))]
        body = rng.choice(["\n", "\r\n"]).join(rows) + rng.choice(["", "\n", "\n\n"])
        for _ in range(rng.randint(0, 2)):
            at = rng.randrange(len(body) + 1)
            body = body[:at] + rng.choice(PIECES) + body[at + rng.randint(0, 1) :]
    return ",".join("cde"[:width]) + "\n" + body


@pytest.mark.usefixtures("chunk")
def test_what_is_accepted_is_what_pythons_strict_parser_reads(place):
    accepted = 0
    for seed in range(1200):
        text = odd_text(random.Random(seed))
        place.write_bytes(text.encode())
        try:
            rows = read_frame(place).rows()
        except DataError:
            continue
        accepted += 1
        records = csv.reader(io.StringIO(text, newline=""), strict=True)
        assert rows == [tuple(cells) for cells in records if cells][1:], (seed, text)
    assert 400 < accepted < 1000


@pytest.mark.parametrize("n_rows", [1, 60_000])
def test_quotes_in_plain_texts_are_taken_as_they_stand(place, n_rows):
    place.write_text("id,text\n" + '1,a 5" disk, or so\n'.replace(", or", " or") * n_rows)
    frame = read_frame(place)
    assert frame.height == n_rows
    assert set(frame["text"]) == {'a 5" disk or so'}


def test_numbers_are_the_same_on_either_way(place):
    numbers = ["1", "0.1", "1e-320", " 2", "3 ", "", "1e400", "-0", "inf", ".5", "7."]
    place.write_text("id,p,q\n" + "".join(f"{i},{n},1\n" for i, n in enumerate(numbers)))
    plain = read_frame(place, lambda header: ["p", "q"])
    place.write_text("id,p,q\n" + "".join(f'5" {i},{n},1\n' for i, n in enumerate(numbers)))
    assert read_frame(place, lambda header: ["p", "q"])["p"].to_list() == plain["p"].to_list()
    assert plain["p"].to_list() == [float(n) if n else None for n in numbers]


def test_the_limit_of_a_cell_fits_a_windows_long(place, monkeypatch):
    limit = csv.field_size_limit

    def windows(*size):
        if size and size[0] > 2**31 - 1:
            raise OverflowError("Python int too large to convert to C long")
        return limit(*size)

    monkeypatch.setattr(csv, "field_size_limit", windows)
    huge = "x" * 200_000  # more than Python's own limit
    place.write_text(f'id,text\n1,{huge}\n2,5" disk\n')
    assert read_frame(place)["text"].to_list() == [huge, '5" disk']
