"""Every refusal of a file ends in a step that works: it is taken here, and the file is read."""

import csv
import gzip
import io
import re
import zipfile

import polars as pl
import pytest

from stackllm.errors import DataError
from stackllm.tables.files import read_frame

ROWS = [("007", 'a "b", c', 0.25, 0.75), ("8", "ü\nd", 1.0, 0.0)]
HEADER = ("id", "group", "a", "b")


def table(separator=",", end="\n", decimal=".", **how):
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=separator, lineterminator=end, **how)
    writer.writerow(HEADER)
    for row in ROWS:
        writer.writerow([str(c).replace(".", decimal) if isinstance(c, float) else c for c in row])
    return text.getvalue()


def sheet(text):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return out.getvalue()


def zipped(text):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("table.csv", text)
    return out.getvalue()


def python(path, said):
    """Run the line of Python that the message holds, to the letter."""
    exec(re.search(r"import polars as pl; .*\)$", said)[0], {})
    return path.with_name(f"{path.stem}.new.csv")


def pandas(path, said):
    """What the line of pandas in the message does (tried with pandas 3.1.1), by csv alone."""
    assert 'escapechar="\\\\", dtype=str, na_filter=False).to_csv(' in said
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, escapechar="\\"))
    return rewrite(
        path,
        "\n".join(",".join(f'"{c.replace(chr(34), chr(34) * 2)}"' for c in row) for row in rows),
    )


def rewrite(path, text):
    path.write_bytes(text.encode())
    return path


def by_hand(change):
    return lambda path, said: rewrite(path, change(path.read_bytes()))


def plain(content):
    """The file saved once more as it should be: from Excel, unpacked, downloaded."""
    return table()


def edited(pattern, replacement, **how):
    return by_hand(lambda content: re.sub(pattern, replacement, content.decode(), **how))


FLAT = table().replace("ü\nd", "ü d")
KINDS = {
    "semicolons": (table(";"), 'separated by ";"', python),
    "semicolons, all quoted": (table(";", quoting=csv.QUOTE_ALL), 'separated by ";"', python),
    "decimal commas": (table(";", decimal=","), "decimals are written with one", python),
    "tabs": (table("\t"), "separated by tabs", python),
    "bars": (table("|", "\r\n"), 'separated by "|"', python),
    "sep=;": ("sep=;\r\n" + table(";", "\r\n"), "for Excel only", python),
    "sep=; with decimal commas": ('"sep=;"\n' + table(";", decimal=","), "for Excel only", python),
    "sep=,": ("sep=,\n" + table(), "for Excel only. Remove that line", edited("sep=,\n", "")),
    "UTF-16": (table().encode("utf-16"), "this is UTF-16", python),
    "UTF-16 without a mark": (table().encode("utf-16-le"), "this is UTF-16", python),
    "UTF-16, big end first": (table().encode("utf-16-be"), "this is UTF-16", python),
    "UTF-32": (table().encode("utf-32"), "this is UTF-32", python),
    "Windows-1252": (table().encode("cp1252"), r"not UTF-8 \(byte 0xfc\)", python),
    "old Mac": (FLAT.replace("\n", "\r"), "as on old Macs", python),
    "JSON": ('[{"id": "007", "group": "q", "a": 0.5, "b": 0.5}]', "this is JSON", python),
    "JSON lines": ('{"id": "007", "group": "q", "a": 0.5, "b": 0.5}\n', "this is JSON", python),
    "xlsx": (sheet(""), 'Save it as "CSV UTF-8', by_hand(plain)),
    "xls": (b"\xd0\xcf\x11\xe0\xa1", 'old Excel file, not CSV. Save it as "CSV', by_hand(plain)),
    "gzip": (gzip.compress(b"x"), "a gzip file, not CSV. Unpack it", by_hand(plain)),
    "zip": (zipped(""), "a ZIP archive, not CSV. Unpack it", by_hand(plain)),
    "web page": ("<!DOCTYPE html>\n<p>Sign in", "Download the file itself", by_hand(plain)),
    "NUL": (table().replace("b", "b\0"), "line 1 holds a NUL byte.* Remove it", edited("\0", "")),
    "no rows": ("id,a\n", "no row below it. Write the rows", by_hand(plain)),
    "empty first line": ("\n" + table(), "Remove the empty lines", edited(r"\A\n", "")),
    "pandas' index": (
        "".join(f"{i},{line}\n" for i, line in zip(["", 0, 1], FLAT.split("\n"), strict=False)),
        "column 1 of the header has no name.* remove it",
        edited(r"^\d*,", "", flags=re.MULTILINE),
    ),
    "ids without a name": (FLAT[2:], "column 1 of the header has no name.* Name it", edited(r"\A", "id")),
    "comma at the end of every line": (
        FLAT.replace("\n", ",\n"),
        r"column 5 of the header has no name.* \(a comma at the end",
        edited(",$", "", flags=re.MULTILINE),
    ),
    "comma at the end of every row": (
        FLAT.replace("5\n", "5,\n").replace("0\n", "0,\n"),
        r"row 1 has 5 fields and the header 4 \(line 2\). Remove the commas",
        edited(",$", "", flags=re.MULTILINE),
    ),
    "unquoted commas": (
        "id,group,a,b\n007,a c,1,0\n8,so, what,1,0\n",
        r"row 2 has 5 fields and the header 4 \(line 3\). Quote fields that hold commas",
        edited("so, what", '"so, what"'),
    ),
    "unquoted decimal commas": (
        "id,group,a,b\n007,q,0,25,0,75\n",
        "row 1 has 6 fields and the header 4.* write decimals with a point",
        edited(",(25|75)", r".\1"),
    ),
    "quoted decimal commas": (
        'id,group,a,b\n007,q,"0,25","0,75"\n',
        r'"a" are no numbers \(first: row 1, "0,25"\). Write decimals with a point',
        edited(",(25|75)", r".\1"),
    ),
    "short rows": (
        "id,group,a,b\n007,q,1,0\n8,r,1\n",
        r"row 2 has 3 fields and the header 4 \(line 3\). Fill it up",
        edited("8,r,1", "8,r,1,"),
    ),
    "empty row": (FLAT + ",,,\n", r"row 3 is empty \(line 4\). Remove it", edited(",,,\n", "")),
    "column twice": (
        "id,a,a\n1,1,0\n", 'names "a" more than once. Rename', edited("a,a", "a,b"),
    ),
    "a space before a quoted name": (
        'id, "group", "a", "b"\n007,q,1,0\n',
        "header is not well-formed .*without a space before them",
        edited(', "', ',"'),
    ),
    "backslashes": (
        'id,group,a,b\n007,"5\\" wide, ""x""",1,0\n',
        r'row 1 is not well-formed CSV \(text after a closing quote, line 2\)',
        pandas,
    ),
    "backslashes without quotes around": (
        'id,group,a,b\n007,q,1,0\n8,5\\" wide,1,0\n', r"row 2 .*unquoted field, line 3\)", pandas,
    ),
    "an open quote": (
        'id,group,a,b\n007,q,1,0\n8,"5 wide,1,0\n',
        r"row 2 .*a quote is opened and never closed, line 3\). Put the whole text in quotes",
        edited("wide", 'wide"'),
    ),
    "text after a quote": (
        'id,group,a,b\n007,"q" r,1,0\n',
        'Put the whole text in quotes and write each " inside it as ""',
        edited('"q" r', '"""q"" r"'),
    ),
    "a space before a quote": (
        'id,group,a,b\n007, "q, r",1,0\n',
        'Put the whole text in quotes and write each " inside it as ""',
        edited(' "q, r"', '" ""q, r"""'),
    ),
    "carriage returns in texts": (
        "id,group,a,b\n007,q\rr,1,0\n",
        r"row 1 has a bare carriage return outside quotes \(line 2\). Quote texts",
        edited("q\rr", '"q\rr"'),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "sentence", "step"), KINDS.values(), ids=KINDS)
def test_the_next_step_works(tmp_path, content, sentence, step):
    path = tmp_path / "table.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=sentence) as caught:
        read_frame(path, lambda header: [name for name in header if name in ("a", "b")])
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said
    frame = read_frame(step(path, said), lambda header: [n for n in header if n in ("a", "b")])
    assert frame["a"].dtype == pl.Float64
    assert frame.columns[0] == "id"
    assert frame["id"][0] in {"007", "1"}
    if frame.height == 2 and step is python:
        cells = [
            tuple(c.replace("ü d", "ü\nd") if isinstance(c, str) else c for c in row)
            for row in frame.rows()
        ]
        assert cells == ROWS


def test_a_mark_even_twice_is_no_part_of_a_name(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(b"\xef\xbb\xbf\xef\xbb\xbfid,a\n1,2\n")
    assert read_frame(path).columns == ["id", "a"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_empty_lines_are_no_rows_wherever_they_stand(tmp_path, end):
    path = tmp_path / "table.csv"
    for quote in ("", '"'):
        lines = ["id,a", "", f"{quote}1{quote},x", "", "", "2,", "", ""]
        path.write_bytes(end.join(lines).encode())
        assert read_frame(path).rows() == [("1", "x"), ("2", "")]


def test_names_keep_their_spaces(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('"id ", Question\n1,x\n')
    assert read_frame(path).columns == ["id ", " Question"]
