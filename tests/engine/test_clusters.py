"""Clusters that are not there, or die under a run."""

import re
import time

import pytest
from conftest import write_table
from helpers import digests, stackllm

from stackllm.engine.dask import Dask
from stackllm.engine.local import Engine, Task
from stackllm.engine.pools import open_pool
from stackllm.engine.progress import Reporter
from stackllm.errors import MissingInputError, ServerError, UsageError
from stackllm.store.units import make_unit

pytestmark = pytest.mark.slow
PLAIN = ("--backbone", "none", "--folds", "2", "--quiet")


@pytest.mark.parametrize(("engine", "package"), [("dask", "distributed"), ("ray", "ray")])
def test_nobody_answers_at_the_address(engine, package):
    pytest.importorskip(package)
    address = "tcp://127.0.0.1:9" if engine == "dask" else "127.0.0.1:9"
    started = time.monotonic()
    with pytest.raises(
        ServerError, match=f"^--address {re.escape(address)}: no {engine} .* answers"
    ):
        open_pool(engine, address, 2)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(("engine", "package"), [("dask", "distributed"), ("ray", "ray")])
def test_an_extra_that_is_not_installed_is_named(engine, package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(MissingInputError, match=rf"pip install 'stackllm\[{engine}\]'"):
        open_pool(engine, "tcp://127.0.0.1:9", 2)


def test_engine_and_address_go_together():
    with pytest.raises(UsageError, match="--engine dask needs --address"):
        open_pool("dask", None, 2)
    with pytest.raises(UsageError, match="--address is a cluster's"):
        open_pool("local", "tcp://127.0.0.1:9", 2)


def test_a_dead_scheduler_is_told_in_time(tmp_path, dask_cluster):
    from pool_work import nap, write

    with dask_cluster(tmp_path) as (address, scheduler):
        pool = Dask(address)
        engine = Engine(tmp_path, 2, Reporter(quiet=True), pool=pool)
        engine.ensure("warm", [Task(make_unit("stage/a", 1), write, ("a",))])
        scheduler.kill()
        started = time.monotonic()
        with pytest.raises(ServerError, match="the dask scheduler no longer answers"):
            engine.ensure("work", [Task(make_unit("stage/b", 1), nap, ("b", "never"))])
        pool.close()
        assert time.monotonic() - started < 30


def test_a_run_on_a_cluster_leaves_the_same_bytes(tmp_path, dask_cluster):
    local, remote = (write_table(tmp_path / name, 12, 6) for name in ("local", "remote"))
    assert stackllm("stack", *PLAIN, cwd=local).returncode == 0
    with dask_cluster(tmp_path) as (address, _):
        done = stackllm("stack", *PLAIN, "--engine", "dask", "--address", address, cwd=remote)
    assert done.returncode == 0, done.stderr
    assert digests(remote / "artifacts" / "run") == digests(local / "artifacts" / "run")
