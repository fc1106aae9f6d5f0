"""Columns that hold the number of a category reach LightGBM as categories."""

import re

import numpy as np

from stackllm.crossfit.targets import Targets
from stackllm.members.boosting import BoostingParams, fit_boosting, predict_boosting
from stackllm.members.inputs import categorical
from stackllm.stack.features import stack_categorical


def test_codes_are_found_by_name():
    names = ("text_code_ticks", "category_code", "category_p_math", "standing_category_code")
    assert categorical(names) == [1, 3]
    assert stack_categorical(10, names) == [8]  # standing columns are left out of stage two


def test_a_category_needs_one_split_where_a_number_needs_many(tmp_path):
    draw = np.random.default_rng(0)
    codes = draw.integers(0, 12, 600).astype(float)
    labels = np.isin(codes, [1, 4, 6, 9, 11]).astype(np.int64)  # no order tells them apart
    codes[:20] = np.nan
    rows = np.arange(600)
    targets = Targets(rows, labels, np.ones(600), np.ones(600, bool), 2)
    params = BoostingParams(n_trees=20, learning_rate=0.3, n_leaves=2, feature_share=1.0)
    losses = {}
    for name, places in (("category", [0]), ("number", [])):
        folder = tmp_path / name
        folder.mkdir()
        fit_boosting(codes[:, None], targets, params, 0, folder, places)
        made = predict_boosting(codes[:, None], folder)
        assert np.isfinite(made).all()
        losses[name] = -np.log(made[rows, labels])[20:].mean()
        splits = re.findall(r"num_cat=(\d+)", (folder / "model_0.txt").read_text())
        assert any(map(int, splits)) == (name == "category")
    assert losses["category"] < losses["number"] / 3
