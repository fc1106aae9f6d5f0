"""Predictions that others left, in every form that they leave them: the same member comes of all."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from conftest import write_table

from stackllm.cli import cli
from stackllm.crossfit.folds import group_folds
from stackllm.errors import DataError, MissingInputError, UsageError
from stackllm.members.external import ExternalParams, read_external
from stackllm.members.imported import _design, import_files
from stackllm.metrics import accuracy
from stackllm.settings import read_settings
from stackllm.stack.blend import cross_blend
from stackllm.tables.contest import TableParams, read_training

CLASSES = ("0", "1", "2")
N_TRAIN, N_TEST = 72, 30


@pytest.fixture(scope="module")
def contest(tmp_path_factory) -> Path:
    folder = write_table(tmp_path_factory.mktemp("contest"), 24, 10)
    train = pl.read_csv(folder / "train.csv").with_columns(
        Response=pl.col("Response") + pl.format(" ({})", pl.int_range(pl.len()))
    )
    train.write_csv(folder / "train.csv")
    return folder


@pytest.fixture(scope="module")
def table(contest):
    return read_training(TableParams(str(contest / "train.csv"), str(contest / "test.csv")))


@pytest.fixture(scope="module")
def logits(table) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    oof, test = rng.normal(size=(N_TRAIN, 3)), rng.normal(size=(N_TEST, 3))
    oof[np.arange(N_TRAIN), table.train["label"]] += 1.5
    return oof, test


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores)
    return powers / powers.sum(axis=1, keepdims=True)


def columns(matrix: np.ndarray, prefix: str = "target_") -> dict[str, np.ndarray]:
    return {f"{prefix}{name}": matrix[:, j] for j, name in enumerate(CLASSES)}


def h2o(table: pl.DataFrame, matrix: np.ndarray) -> pl.DataFrame:
    packed = [",".join(f"{x:.3f}" for x in row) for row in softmax(matrix)]
    return table.select("Question", "Response").with_columns(pl.Series("pred_target", packed))


def leave(kind: str, folder: Path, contest: Path, which: str, matrix: np.ndarray) -> list[Path]:
    """Write predictions as somebody would; return the files."""
    rows = pl.read_csv(contest / f"{'train' if which == 'oof' else 'test'}.csv")
    ids = [str(i) for i in range(len(matrix))]
    order = np.random.default_rng(1).permutation(len(matrix))
    path = folder / f"{which}.csv"
    if kind == "csv":
        pl.DataFrame({"id": ids, **columns(softmax(matrix))})[order].write_csv(path)
    elif kind == "parquet":
        path = folder / f"{which}.parquet"
        pl.DataFrame({**columns(softmax(matrix), ""), "id": ids})[order].write_parquet(path)
    elif kind == "logits":
        pl.DataFrame({"id": ids, **columns(matrix)})[order].write_csv(path)
    elif kind == "percent":
        pl.DataFrame({"id": ids, **columns(softmax(matrix) * 100)}).write_csv(path)
    elif kind == "autogluon csv":  # an index without a name, classes as columns
        text = pl.DataFrame({"i": ids, **columns(softmax(matrix), "")})[order].write_csv()
        path.write_text(text.replace("i,0,1,2", ",0,1,2"))
    elif kind == "autogluon parquet":
        path = folder / f"{which}.parquet"
        frame = pl.DataFrame({**columns(softmax(matrix), ""), "__index_level_0__": range(len(ids))})
        frame[order].write_parquet(path)
    elif kind == "h2o csv":
        h2o(rows, matrix)[order].write_csv(path)
    elif kind == "h2o pickle":
        path = folder / f"{which}.pkl"
        held = {
            "logits": matrix[order].astype(np.float32),
            "predicted_text": matrix[order].argmax(axis=1).astype(str),
            "Response": np.array(rows["Response"].to_list(), dtype=object)[order],
        }
        path.write_bytes(pickle.dumps(held))
    elif kind == "npy":
        path = folder / f"{which}.npy"
        np.save(path, softmax(matrix))
    elif kind == "npz":
        path = folder / f"{which}.npz"
        np.savez(path, logits=matrix, other=np.zeros(4))
    elif kind == "a file per fold":
        folds = group_folds(rows["Question"].to_numpy(), 4, 0)
        frame = pl.DataFrame({"id": ids, **columns(softmax(matrix))})
        names = range(4) if which == "oof" else [0]
        for fold in names:
            keep = folds == fold if which == "oof" else np.full(len(ids), True)
            frame.filter(pl.Series(keep)).write_csv(folder / f"{which}{fold}.csv")
        return [folder / f"{which}{fold}.csv" for fold in names]
    return [path]


KINDS = (
    "csv", "parquet", "logits", "percent", "autogluon csv", "autogluon parquet", "h2o csv", "h2o pickle", "npy",
    "npz", "a file per fold",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_becomes_the_same_member(kind, contest, table, logits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [
        path
        for which, matrix in zip(("oof", "test"), logits, strict=True)
        for path in leave(kind, tmp_path, contest, which, matrix)
    ]
    data = TableParams(str(contest / "train.csv"), str(contest / "test.csv"))
    told = import_files(files[::-1], "theirs", data)
    design = _design(table, 5, 0)
    params = ExternalParams(
        "x", "imports/theirs/oof/theirs.parquet", "imports/theirs/test/theirs.parquet"
    )
    read, warnings = read_external(params, design, table.train_rows(), table.test_rows(), CLASSES)
    close = 2e-3 if kind.startswith("h2o csv") else 1e-6
    np.testing.assert_allclose(read.oof, softmax(logits[0]), atol=close)
    np.testing.assert_allclose(read.test[0], softmax(logits[1]), atol=close)
    assert warnings == []
    said = " ".join(told.notes)
    assert ("softmax is taken" in said) == (kind in ("logits", "h2o pickle", "npz"))
    assert ("matched by the texts" in said) == kind.startswith("h2o")
    assert ("folds are by group, but others" in " ".join(told.warnings)) == (
        kind == "a file per fold"
    )
    suffixes = {path.suffix for path in Path("imports").rglob("*.*")}
    assert suffixes == {".parquet", ".json"}
    # and as it is, without being imported
    if len(files) == 2:
        direct = ExternalParams("x", str(files[0]), str(files[1]))
        again, _ = read_external(direct, design, table.train_rows(), table.test_rows(), CLASSES)
        np.testing.assert_allclose(again.oof, read.oof, atol=1e-12)


def test_folds_that_split_groups_are_said(contest, logits, tmp_path) -> None:
    data = TableParams(str(contest / "train.csv"), str(contest / "test.csv"))
    rows = np.arange(N_TRAIN)
    frame = pl.DataFrame({"id": rows.astype(str), "fold": rows % 5, **columns(softmax(logits[0]))})
    frame.write_csv(tmp_path / "oof.csv")
    np.save(tmp_path / "test.npy", logits[1])
    told = import_files(
        [tmp_path / "oof.csv", tmp_path / "test.npy"], "a", data, into=tmp_path / "imports"
    )
    assert "its folds are not by group" in told.warnings[0]


def test_predictions_of_models_that_saw_their_rows_are_said(table) -> None:
    """Sure of labels that it saw at every temperature; an honest member that is too sure, or not sure enough, is none."""
    from stackllm.members.external import in_sample_sign

    design = _design(table, 5, 0)
    seen_as_such = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        oof, test = rng.normal(size=(N_TRAIN, 3)), rng.normal(size=(N_TEST, 3))
        labels = rng.integers(0, 3, N_TEST)
        oof[np.arange(N_TRAIN), design.labels] += 1.5
        test[np.arange(N_TEST), labels] += 1.5
        for scale in (0.3, 1, 4):
            honest = softmax(oof * scale), softmax(test * scale)
            assert in_sample_sign(*honest, design) is None, (seed, scale)
            memorised = oof.copy()
            memorised[np.arange(N_TRAIN), design.labels] += 3
            seen_as_such.append(in_sample_sign(softmax(memorised * scale), honest[1], design))
    assert all("Were its OOF rows in its training data?" in (it or "") for it in seen_as_such)


def test_several_whole_files_are_members_and_a_pattern_takes_them(
    contest, logits, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("oofs", "tests"):
        Path(name).mkdir()
    files = []
    for i in range(3):
        for which, matrix in zip(("oofs", "tests"), logits, strict=True):
            files.append(Path(which, f"model {i}.npy"))
            np.save(files[-1], matrix * (1 + i))
    words = [
        *map(str, files),
        "--train",
        str(contest / "train.csv"),
        "--test",
        str(contest / "test.csv"),
    ]
    done = CliRunner().invoke(cli, ["import", *words, "--as", "zoo", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [it["member"] for it in told["members"]] == [f"zoo_model_{i}" for i in range(3)]
    Path("stackllm.toml").write_text(told["settings"])
    settings = read_settings(None, {})
    assert [it.name for it in settings.external] == [f"zoo_model_{i}" for i in range(3)]
    assert Path(settings.external[2].test) == Path("imports/zoo/test/zoo_model_2.parquet")
    Path("stackllm.toml").write_text(
        "[[member]]\nkind = 'external'\nname = 'x'\noof = 'oofs/*.npy'\ntest = 'tests/*.npy'\n"
    )
    settings = read_settings(None, {})
    assert [it.name for it in settings.external] == [f"x_model_{i}" for i in range(3)]
    taken = CliRunner().invoke(cli, ["import", *words[:2], "--as", "zoo"])
    assert isinstance(taken.exception, UsageError)
    assert "or set --replace" in str(taken.exception)
    before = Path("imports/zoo/oof/zoo_model_2.parquet").read_bytes()
    again = CliRunner().invoke(cli, ["import", *words, "--as", "zoo", "--replace", "--json"])
    assert again.stdout == done.stdout
    assert Path("imports/zoo/oof/zoo_model_2.parquet").read_bytes() == before
    Path("imports/mine").mkdir()
    mine = CliRunner().invoke(cli, ["import", *words, "--as", "mine", "--replace"])
    assert "Choose another name, or move it" in str(mine.exception)
    Path("tests/model 1.npy").unlink()
    with pytest.raises(MissingInputError, match=r"tests/model 1\.npy: there is no such file"):
        read_settings(None, {})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"oof.csv": "id,a,b\n1,0.5,0.5\n"}, "class columns are not there"),
        ({"oof.npy": np.full((N_TRAIN, 4), 0.25)}, r"no array \(n_rows, 3\)"),
        ({"oof.npy": np.full((5, 3), 1 / 3)}, "neither those of"),
        ({"oof.npy": np.full((N_TRAIN, 3), np.nan)}, "hold no numbers"),
        ({"oof.npy": np.full((N_TRAIN, 3), 0.2)}, "do not sum to 1"),
        ({"oof.npy": np.full((N_TRAIN, 3), 1 / 3)}, "test predictions are not among the files"),
        ({"oof.npy": np.array([None] * 3, dtype=object)}, "not a readable file of plain numbers"),
        ({"oof.npz": b"PK\x03\x04broken"}, "not a readable file of plain numbers"),
        ({"a_oof.npy": np.full((N_TRAIN, 3), 1 / 3), "b_oof.npy": np.full((N_TRAIN, 3), 1 / 3),
          "test.npy": np.full((N_TEST, 3), 1 / 3)}, "none of the files of training rows is called"),
        ({"oof_a.npy": np.full((N_TRAIN, 3), 1 / 3), "oof_b.npy": np.full((N_TRAIN, 3), 1 / 3),
          "test_a.npy": np.full((N_TEST, 3), 1 / 3), "test_b.npy": np.full((N_TEST, 3), 1 / 3),
          "test_c.npy": np.full((N_TEST, 3), 1 / 3)}, r"test_c\.npy: none of the files of training rows"),
        ({"oof_a.npy": np.full((N_TRAIN, 3), 1 / 3), "a_valid.npy": np.full((N_TRAIN, 3), 1 / 3),
          "test_a.npy": np.full((N_TEST, 3), 1 / 3)}, "would both be the member x_a. Rename one"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_refused(content, said, contest, tmp_path) -> None:
    for name, held in content.items():
        if isinstance(held, np.ndarray):
            np.save(tmp_path / name, held, allow_pickle=True)
        else:
            (tmp_path / name).write_bytes(held if isinstance(held, bytes) else held.encode())
    data = TableParams(str(contest / "train.csv"), str(contest / "test.csv"))
    with pytest.raises(DataError, match=said):
        import_files([tmp_path / name for name in content], "x", data, into=tmp_path / "imports")
    assert not (tmp_path / "imports").exists()


def test_a_hundred_and_fifty_members_are_read_and_blended(table, logits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(2)
    for folder, matrix in zip(("oofs", "tests"), logits, strict=True):
        Path(folder).mkdir()
        for i in range(150):
            np.save(Path(folder, f"m{i}.npy"), matrix + rng.normal(size=matrix.shape))
    Path("stackllm.toml").write_text(
        "[[member]]\nkind = 'external'\noof = 'oofs/*.npy'\ntest = 'tests/*.npy'\n"
    )
    design = _design(table, 3, 0)
    members = {
        params.name: read_external(params, design, table.train_rows(), table.test_rows(), CLASSES)[
            0
        ]
        for params in read_settings(None, {}).external
    }
    assert len(members) == 150
    blend = cross_blend(members, design, 1)
    assert blend.weights.shape == (3, 150)
    assert accuracy(blend.predictions.oof, design.labels) > 0.5
    assert accuracy(blend.predictions.test_mean(), logits[1].argmax(axis=1)) > 0.8
