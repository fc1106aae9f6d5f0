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


@pytest.fixture(scope="module", params=list(CLUSTERS))
def cluster(request, tmp_path_factory):
    """A running cluster of each engine, which the last of these tests kills."""
    pytest.importorskip({"dask": "distributed"}.get(request.param, request.param))
    with CLUSTERS[request.param](tmp_path_factory.mktemp("cluster")) as started:
        yield started


def test_a_run_on_a_cluster_leaves_the_same_bytes(stage, cluster):
    passes(engines.same(stage, cluster))


def test_what_dask_logs_of_a_lost_scheduler_is_not_for_users(cluster):
    if cluster.engine != "dask":
        pytest.skip("only dask logs it")
    open_pool("dask", cluster.address, 1).close()
    for name in ("core", "utils", "comm.tcp", "client"):
        assert not logging.getLogger(f"distributed.{name}").isEnabledFor(logging.ERROR)
    assert not logging.getLogger("tornado.application").isEnabledFor(logging.ERROR)


def test_a_dead_head_is_told_in_time(stage, cluster):
    passes(engines.head_killed(stage, cluster.engine, random.Random(0), cluster))


def test_a_worker_killed_at_work_changes_no_byte(stage):
    passes(engines.worker_killed(stage, None, random.Random(0)))


def passes(case):
    figure = play("drawn", [("case", case)])
    assert figure["met"], figure["failures"]
