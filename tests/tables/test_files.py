import threading
from pathlib import Path

import polars as pl
import pytest

from stackllm.errors import MissingInputError, StackllmError
from stackllm.tables.files import read_frame, read_table

TABLE = "id,text\n" + "".join(f"{i},some text of row {i}\n" for i in range(20_000))


@pytest.mark.parametrize("read", [read_frame, read_table])
def test_a_file_that_comes_and_goes_is_read_whole_or_refused_in_one_sentence(tmp_path, read):
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
                frame = read(path)
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


@pytest.mark.parametrize("read", [read_frame, read_table])
def test_both_readers_give_the_same_cells(tmp_path, read):
    path = tmp_path / "table.csv"
    path.write_bytes('\ufeff"a b",c\r\n007," x"\r\n"say ""hi""","1\r\n2"\r\n'.encode())
    assert read(path).rows() == [("007", " x"), ('say "hi"', "1\r\n2")]
    pl.DataFrame({"a b": ["007"], "c": [" x"]}).write_parquet(tmp_path / "table.parquet")
    assert read(tmp_path / "table.parquet").rows() == [("007", " x")]
