"""Clusters that are not there, or die under a run."""

import logging
import random
import re
import time

import pytest

from benchmarks.campaign import engines
from benchmarks.campaign.clusters import CLUSTERS
from benchmarks.campaign.contest import stages
from benchmarks.campaign.figures import play
from stackllm.engine.pools import open_pool
from stackllm.errors import MissingInputError, ServerError, UsageError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """The stack of a small contest, and what it leaves undisturbed; made once."""
    return stages(tmp_path_factory.mktemp("contest"))["stack"]


@pytest.mark.parametrize(("engine", "package"), [("dask", "distributed"), ("ray", "ray")])
def test_nobody_answers_at_the_address(engine, package):
    pytest.importorskip(package)
    address = "tcp://127.0.0.1:9" if engine == "dask" else "127.0.0.1:9"
    started = time.monotonic()
    with pytest.raises(ServerError, match=f"^{re.escape(address)}: no {engine} .* answers"):
        open_pool(engine, address, 2)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(("engine", "package"), [("dask", "distributed"), ("ray", "ray")])
def test_an_extra_that_is_not_installed_is_named(engine, package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(MissingInputError, match=rf"pip install 'stackllm\[{engine}\]'"):
        open_pool(engine, "tcp://127.0.0.1:9", 2)


def test_engine_and_address_go_together():
    with pytest.raises(UsageError, match='engine "dask" needs the setting address'):
        open_pool("dask", None, 2)
    with pytest.raises(UsageError, match="the setting address is for a cluster"):
        open_pool("local", "tcp://127.0.0.1:9", 2)


@pytest.mark.parametrize("engine", list(CLUSTERS))
def test_a_dead_head_is_told_in_time(stage, engine):
    pytest.importorskip({"dask": "distributed"}.get(engine, engine))
    passes(engines.head_killed(stage, engine, random.Random(0)))


@pytest.mark.parametrize("engine", list(CLUSTERS))
def test_a_run_on_a_cluster_leaves_the_same_bytes(stage, tmp_path, engine):
    pytest.importorskip({"dask": "distributed"}.get(engine, engine))
    with CLUSTERS[engine](tmp_path) as cluster:
        passes(engines.same(stage, cluster))


def test_a_worker_killed_at_work_changes_no_byte(stage):
    passes(engines.worker_killed(stage, None, random.Random(0)))


def passes(case):
    figure = play("drawn", [("case", case)])
    assert figure["met"], figure["failures"]


def test_what_dask_logs_of_a_lost_scheduler_is_not_for_users(tmp_path):
    pytest.importorskip("distributed")
    with CLUSTERS["dask"](tmp_path) as cluster:
        pool = open_pool("dask", cluster.address, 1)
        pool.close()
    for name in ("core", "utils", "comm.tcp", "client"):
        assert not logging.getLogger(f"distributed.{name}").isEnabledFor(logging.ERROR)
    assert not logging.getLogger("tornado.application").isEnabledFor(logging.ERROR)
