"""The frozen LLM as a transformer: the encoder's numbers, read once, from texts and frames."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from stackllm import DataError, Encoder, GroupPosterior, UsageError
from stackllm.llm.encode import EncoderParams, encode
from stackllm.workspace import open_cache

TEXTS = ["w1 w2 w3", "w4", "w1 w2 w3", "w9 w8 w7 w6"]


@pytest.fixture(scope="module")
def backbone(make_backbone):
    return make_backbone("llama", 4)


def encoder(backbone, folder, **more):
    return Encoder(backbone=backbone, dtype="float32", artifacts=folder, n_jobs=1, **more)


def test_it_gives_what_a_run_reads_and_reads_nothing_twice(backbone, tmp_path):
    frame = pd.DataFrame({"Question": ["w5", "w5", None, "w6"], "Response": TEXTS, "n": range(4)})
    pooled = encoder(backbone, tmp_path).fit_transform(frame)
    stored = sorted(tmp_path.rglob("manifest.json"))
    times = [path.stat().st_mtime_ns for path in stored]
    rows = pl.DataFrame({"question": ["w5", "w5", "", "w6"], "response": TEXTS})
    with open_cache(tmp_path, n_jobs=1) as cache:
        read, _, _ = encode(rows, EncoderParams(backbone, "float32"), cache)
    np.testing.assert_array_equal(pooled, read.take("pooled").astype(np.float32))
    again = encoder(backbone, tmp_path).transform(
        pl.DataFrame({"Question": ["w5", "w5", None, "w6"], "Response": TEXTS})
    )
    np.testing.assert_array_equal(again, pooled)
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("manifest.json"))] == times
    assert pooled.dtype == np.float32


def test_texts_alone_have_no_question_and_rows_do_not_know_each_other(backbone, tmp_path):
    whole = encoder(backbone, tmp_path).transform(TEXTS)
    np.testing.assert_array_equal(whole[0], whole[2])
    alone = encoder(backbone, tmp_path / "other").transform(pd.Series(TEXTS[3:]))
    np.testing.assert_allclose(alone[0], whole[3], atol=1e-3)
    frame = pl.DataFrame({"Response": TEXTS})
    np.testing.assert_array_equal(encoder(backbone, tmp_path).transform(frame), whole)


def test_in_a_pipeline_with_groups(backbone, tmp_path):
    texts, y, groups = [f"w{i}" for i in (1, 2) * 6], ["a", "b"] * 6, np.repeat(np.arange(6), 2)
    inside = make_pipeline(encoder(backbone, tmp_path), LogisticRegression(C=100.0, max_iter=1000))
    model = GroupPosterior(clone(inside)).fit(texts, y, groups=groups)
    assert model.predict(["w2", "w1"], groups=["new", "new"]).tolist() == ["b", "a"]


def test_bad_texts_and_settings_are_one_sentence(backbone, tmp_path):
    it = encoder(backbone, tmp_path)
    with pytest.raises(DataError, match=r'no column "Response" \(it has x\)'):
        it.transform(pl.DataFrame({"x": TEXTS}))
    with pytest.raises(DataError, match="entry 1 is no text but int"):
        it.transform(["w1", 3])
    for odd in ("w1 w2", 5, None):
        with pytest.raises(
            DataError, match=f"a list of texts, or a frame, not {type(odd).__name__}"
        ):
            it.transform(odd)
    with pytest.raises(DataError, match="no texts"):
        it.transform([])
    with pytest.raises(UsageError, match="depths, entry 1, must be"):
        it.set_params(depths=(2.0,)).fit()
    assert not (tmp_path / "cache").exists()
