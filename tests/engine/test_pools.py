"""What every pool must do: one suite for this machine's workers, a dask cluster and a ray cluster."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from pool_work import babble, die, die_once, doze, fail, grow, nap, use_all, use_gpu, write

from stackllm.engine import devices
from stackllm.engine.libraries import LOG
from stackllm.engine.local import Engine, Task
from stackllm.engine.processes import Processes
from stackllm.engine.progress import Reporter
from stackllm.errors import DataError, StorageError
from stackllm.store.units import make_unit, state

pytestmark = pytest.mark.slow


@pytest.fixture
def engine(tmp_path, pool):
    return Engine(tmp_path, 2, Reporter(quiet=True), pool=pool)


def task(name, function=write, *args, gpu=None):
    return Task(make_unit(f"stage/{name}", 1, name), function, (name, *args), gpu=gpu)


def seen(engine, *names):
    """Which GPUs units saw."""
    return [(engine.root / f"gpus-{name}").read_text() for name in names]


def done(engine, *names):
    return [state(engine.root, task(name).unit) == "done" for name in names]


def test_units_run_in_other_processes_and_are_published(engine):
    folders = engine.ensure("work", [task(f"unit{i}") for i in range(5)])
    assert [(folder / "name.txt").read_text() for folder in folders] == [
        f"unit{i}" for i in range(5)
    ]
    pids = {int((engine.root / f"pid-unit{i}").read_text()) for i in range(5)}
    assert os.getpid() not in pids


def test_a_worker_that_dies_costs_its_unit_only(engine, capfd):
    engine.ensure("work", [task("a"), task("b", die_once), task("c")])
    assert all(done(engine, "a", "b", "c"))
    assert capfd.readouterr().err.count("a worker died; stage/b of work runs again") == 1
    assert not list(engine.root.rglob("half.txt"))  # nor anything else of what it had begun
    assert not list(engine.root.rglob("*.tmp"))


def test_a_unit_that_kills_its_workers_is_reported_and_the_others_finish(engine):
    tasks = [task("poison", die), *(task(f"good{i}") for i in range(4))]
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"^stage/poison: the worker process died 3 times"):
        engine.ensure("work", tasks)
    assert time.monotonic() - started < 60
    assert all(done(engine, *(f"good{i}" for i in range(4))))
    assert not any(done(engine, "poison"))
    engine.ensure("work", tasks[1:])


def test_what_a_unit_raises_arrives_as_it_is(engine):
    with pytest.raises(DataError, match=r"^the table is bad$"):
        engine.ensure("work", [task("bad", fail), task("fine")])
    engine.ensure("work", [task("fine2")])


def test_work_that_was_given_up_holds_no_worker(engine):
    engine.ensure("warm", [task("x"), task("y")])
    with pytest.raises(DataError, match=r"^the table is bad$"):
        engine.ensure("work", [task("slow", doze), task("bad", fail)])
    engine.ensure("work", [task("nap1", nap, "nap2"), task("nap2", nap, "nap1")])
    assert all(done(engine, "nap1", "nap2"))


def test_two_units_run_side_by_side(engine):
    engine.ensure("warm", [task("x"), task("y")])
    engine.ensure("work", [task("nap1", nap, "nap2"), task("nap2", nap, "nap1")])
    assert all(done(engine, "nap1", "nap2"))


def test_every_unit_has_a_gpu_of_its_own(engine):
    meet = [task("a", use_gpu, "b", gpu="one"), task("b", use_gpu, "a", gpu="one")]
    more = [f"more{i}" for i in range(2)]
    engine.ensure("work", [*meet, *(task(name, use_gpu, gpu="one") for name in more)])
    first, second = seen(engine, "a", "b")
    assert first != second
    assert {first, second} >= set(seen(engine, *more))


def test_what_a_processor_computes_runs_beside_a_gpu(engine):
    """Though units of GPUs wait for both, and would come first."""
    tasks = [task("processor", nap, "gpu"), task("gpu", use_gpu, "processor", gpu="one")]
    engine.ensure("work", tasks)
    assert all(done(engine, "processor", "gpu"))


def test_a_unit_of_all_gpus_is_alone_with_them(engine):
    ones = [task(f"one{i}", use_gpu, gpu="one") for i in range(2)]
    engine.ensure("work", [ones[0], task("all", use_all, gpu="all"), ones[1]])
    assert all(done(engine, "one0", "all", "one1"))


def test_a_worker_that_dies_frees_its_gpu(engine):
    engine.ensure("work", [task("a", die_once, gpu="one"), task("b", use_gpu, gpu="one")])
    meet = [task("c", use_gpu, "d", gpu="one"), task("d", use_gpu, "c", gpu="one")]
    engine.ensure("more", meet)
    assert all(done(engine, "a", "b", "c", "d"))


def test_a_worker_killed_from_outside(engine):
    engine.ensure("warm", [task("x"), task("y")])
    os.kill(int((engine.root / "pid-x").read_text()), signal.SIGKILL)
    engine.ensure("work", [task(f"more{i}") for i in range(4)])
    assert all(done(engine, *(f"more{i}" for i in range(4))))


def test_a_worker_whose_memory_grows_lives_as_long_as_its_stage(tmp_path, recwarn, capfd):
    """Loky ends one at 300 MB more than it began with, and warns of it."""
    pool = Processes(1)
    local = Engine(tmp_path, 1, Reporter(quiet=True), pool=pool)

    def pids(*names):
        return {(tmp_path / f"pid-{name}").read_text() for name in names}

    try:
        units = [task("small"), task("big", grow, 350_000_000), task("a"), task("b"), task("c")]
        local.ensure("work", units)
        assert len(pids("small", "big", "a", "b", "c")) == 1
        local.ensure("next", [task("d")])
        assert pids("d") == pids("a")
        local.ensure("much", [task("huge", grow, 800_000_000)])
        local.ensure("after", [task("e")])
        assert pids("d") == pids("huge") != pids("e")  # what it holds is of no use to another stage
    finally:
        pool.close()
    assert not recwarn.list
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("n_workers", [0, 1])
def test_what_libraries_say_goes_to_a_file(tmp_path, capfd, n_workers):
    pool = Processes(1) if n_workers else None
    try:
        local = Engine(tmp_path, 1, Reporter(), pool=pool)
        local.ensure("work", [task("x", babble)])
    finally:
        if pool:
            pool.close()
    logged = (tmp_path / LOG).read_text()
    assert "stage/x: FutureWarning: old ways (" in logged
    assert "stage/x: somelibrary: look here" in logged
    said = capfd.readouterr().err
    assert "old ways" not in said
    assert "look here" not in said
    if n_workers:
        assert re.fullmatch(r"work: 1/1, \d+ s\n", said)
        assert "downloading\n" in logged
        assert "compiled code\n" in logged


def test_ctrl_c_never_reaches_a_worker_while_it_starts():
    """A terminal sends it to all; an import that it hits would end in a traceback."""
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell which signals a process blocks")
    pool = Processes(1)
    try:
        pool.submit(Path(), Task(make_unit("stage/x", 1), os.getpid))
        (worker,) = pool._busy.values()
        (pid,) = worker.executor._processes  # our own child's, from the moment that it is forked
        blocked = Path(f"/proc/{pid}/status").read_text().split("SigBlk:")[1].split()[0]
        assert int(blocked, 16) & 1 << signal.SIGINT - 1
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())
    finally:
        pool.close()


def test_a_worker_is_bound_to_its_gpu_for_life_and_others_see_none(tmp_path, monkeypatch):
    """By whatever name the user has called it; of two stages, each has processes of its own on the GPU."""
    monkeypatch.setattr(devices, "visible", lambda: ("GPU-8932f937",))
    pool = Processes(2)
    local = Engine(tmp_path, 2, Reporter(quiet=True), pool=pool)
    try:
        tasks = [task(name, use_gpu, gpu="one") for name in ("a", "b")]
        local.ensure("work", [*tasks, task("processor", use_gpu)])
        local.ensure("next", [task("c", use_gpu, gpu="all"), task("d", use_gpu)])
    finally:
        pool.close()
    assert seen(local, "a", "b", "c") == ["GPU-8932f937"] * 3
    assert seen(local, "processor", "d") == ["", ""]
    pid = {
        name: (tmp_path / f"pid-{name}").read_text() for name in ("a", "b", "c", "processor", "d")
    }
    assert pid["a"] == pid["b"] != pid["c"]  # what it held of the GPU is free again
    assert pid["processor"] == pid["d"]


@pytest.mark.parametrize(
    ("variable", "count", "names"),
    [
        (None, 2, ("0", "1")),
        (None, 0, ()),
        ("3, 1", 2, ("3", "1")),
        ("1,-1,0", 1, ("1",)),
        ("GPU-8932f937,GPU-12", 2, ("GPU-8932f937", "GPU-12")),
        ("MIG-a,MIG-b", 1, ("MIG-a", "MIG-b")),  # of which CUDA shows the first only
        ("", 0, ()),
    ],
)
def test_gpus_have_the_names_that_the_user_gave_them(monkeypatch, variable, count, names):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv(devices.VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(devices.VARIABLE, variable)
    assert devices.visible() == names


def test_a_process_in_which_cuda_has_started_is_kept_to_its_first_gpu(monkeypatch):
    """It looks at the variable no more."""
    import torch

    monkeypatch.setenv(devices.VARIABLE, "MIG-a,MIG-b")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert devices.identified() == {"MIG-a": "MIG-a"}
    devices.bind("MIG-b")
    assert os.environ[devices.VARIABLE] == "MIG-a,MIG-b"
