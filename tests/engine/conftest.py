"""The three kinds of pools, each with real worker processes."""

import contextlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stackllm.engine.dask import Dask
from stackllm.engine.processes import Processes
from stackllm.engine.ray import Ray

HERE = str(Path(__file__).parent)
sys.path.append(HERE)  # for pool_work.py, which workers import too
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH")]))

INSTALLED = {
    "local": True,
    "dask": importlib.util.find_spec("distributed") is not None,
    "ray": importlib.util.find_spec("ray") is not None,
}


@contextlib.contextmanager
def started_cluster(folder):
    """A scheduler and two workers with their nannies, all processes of their own."""
    file = folder / "scheduler.json"
    run = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--scheduler-file", str(file)]
    work = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(file)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = [
        subprocess.Popen([*run, "--host", "127.0.0.1", "--port", "0", "--no-dashboard"], **quiet),
        subprocess.Popen(
            [*work, "--nworkers", "2", "--nthreads", "1", "--no-dashboard"], cwd=folder, **quiet
        ),
    ]
    try:
        import json
        import time

        from distributed import Client

        deadline = time.monotonic() + 60
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        address = json.loads(file.read_text())["address"]
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
        yield address, started[0]
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="module", params=list(INSTALLED))
def pool(request, tmp_path_factory):
    """A pool of two workers."""
    if not INSTALLED[request.param]:
        pytest.skip(f"the extra {request.param} is not installed")
    with contextlib.ExitStack() as stack:
        if request.param == "dask":
            folder = tmp_path_factory.mktemp("dask")
            opened = Dask(stack.enter_context(started_cluster(folder))[0])
        else:
            opened = Ray(None, 2) if request.param == "ray" else Processes(2)
        stack.callback(opened.close)
        yield opened


@pytest.fixture
def dask_cluster():
    """Starts a cluster whose files go into a folder."""
    pytest.importorskip("distributed")
    return started_cluster
