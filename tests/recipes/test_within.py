import os
import subprocess
import sys

import numpy as np
import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from stackllm.recipes.loader import find_recipes, run_recipes
from stackllm.recipes.views import edges, skeleton
from stackllm.recipes.within import aggregate, centre, standing

tables = st.lists(st.tuples(st.integers(0, 3), st.integers(-5, 5)), min_size=1, max_size=20)


@given(tables)
def test_aggregates_against_the_long_way(rows):
    frame = pl.DataFrame(rows, schema=["group_id", "x"], orient="row").with_row_index("row_id")
    frame = frame.with_columns(pl.col("x").cast(pl.Float64))
    made = aggregate(frame, ["x"]).join(standing(frame, ["x"]), on="row_id")
    for row_id, group, value in frame.iter_rows():
        inside = np.array([x for _, g, x in frame.iter_rows() if g == group])
        row = made.row(row_id, named=True)
        assert np.isclose(row["x_mean"], inside.mean())
        assert np.isclose(row["x_median"], np.median(inside))
        assert row["x_min"] == inside.min()
        assert row["x_max"] == inside.max()
        assert np.isclose(row["x_std"], inside.std())
        assert row["x_gap"] == inside.max() - value
        total = np.abs(inside).sum()
        assert np.isclose(row["x_share"], abs(value) / total if total else 0.0)
        below, equal = (inside < value).sum(), (inside == value).sum()
        assert row["x_rank"] == below + (equal + 1) / 2
        spread = inside.std()
        assert np.isclose(
            row["x_zscore"], (value - inside.mean()) / spread if spread > 1e-12 else 0
        )


@given(tables)
def test_centred_columns_have_group_mean_zero(rows):
    groups = np.array([g for g, _ in rows])
    values = np.array([[float(x), 2.0 * x + 1] for _, x in rows])
    centred = centre(values, groups)
    for group in set(groups):
        assert np.allclose(centred[groups == group].mean(axis=0), 0)
        inside = values[groups == group]
        assert np.allclose(
            inside - inside[0], centred[groups == group] - centred[groups == group][0]
        )


def rows_of(texts):
    return pl.DataFrame(
        {
            "row_id": [str(i) for i in range(len(texts))],
            "group_id": ["g"] * len(texts),
            "question": ["What is it?"] * len(texts),
            "response": texts,
        }
    )


def test_shipped_recipes_take_any_text():
    texts = ["", " ", "a", "**b** - c\n- d\n1. e", "😀 – “x” `y`", "\n\n", "中文。", "x" * 10_000]
    encoder = pl.DataFrame(
        {"logprob_mean": [float("nan")] * 8, "entropy_mean": [1.0] * 8, "rank1_share": [0.5] * 8}
    )
    made = run_recipes(find_recipes(), rows_of(texts), encoder)
    assert made.height == 8
    assert len(set(made.columns)) == made.width
    text = made.select(pl.col("^text_.*$"))
    assert np.isfinite(text.to_numpy()).all()
    bold = made["text_bold"].to_list()
    assert bold[3] == np.log1p(1)
    assert sum(bold) == bold[3]
    assert made["text_numbered"][3] == np.log1p(1)


def test_recipes_see_no_label_and_no_fold(tmp_path):
    spy = tmp_path / "spy.py"
    spy.write_text(
        "def build(frame):\n"
        "    assert set(frame.columns) == {'row_id', 'group_id', 'question', 'response'}, frame.columns\n"
        "    return frame.select('row_id').with_columns(seen=1)\n"
    )
    made = run_recipes(
        find_recipes((str(spy),)),
        rows_of(["a", "b"]),
        pl.DataFrame({"logprob_mean": [0.0, 1.0], "entropy_mean": [1.0, 1.0]}),
    )
    assert made["spy_seen"].to_list() == [1.0, 1.0]


def test_a_recipe_of_another_group_changes_nothing_here():
    first = rows_of(["one answer", "another one", "third"])
    other = rows_of(["noise", "more noise"]).with_columns(pl.lit("h").alias("group_id"))
    recipes = find_recipes(without=("encoder",))
    alone = run_recipes(recipes, first, pl.DataFrame())
    both = run_recipes(recipes, pl.concat([first, other]), pl.DataFrame())
    assert alone.equals(both.head(3))


def test_skeleton_hides_the_subject_and_keeps_the_style():
    a = skeleton("However, the Danube has 3 bridges.\n\n- It's 12 km long!")
    b = skeleton("However, the Severn has 7 dragons.\n\n- It's 98 mi deep!")
    assert a[:7] == b[:7] == ["However", ",", "the", "A", "has", "0", "a+"]
    assert "\n\n" in a
    assert edges("Sure! Here")[:3] == ["first0 Sure", "first1 !", "first2 Here"]
    assert edges("") == []


def test_the_order_of_recipes_does_not_depend_on_the_hash_seed():
    code = (
        "from stackllm.recipes.loader import find_recipes; print([r.block for r in find_recipes()])"
    )
    orders = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(6)
    }
    assert len(orders) == 1
