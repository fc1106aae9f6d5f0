"""The three kinds of pools, each with real worker processes."""

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # for benchmarks, which is in no wheel

from benchmarks.campaign.clusters import dask_cluster
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


@pytest.fixture(scope="module", params=list(INSTALLED))
def pool(request, tmp_path_factory):
    """A pool of two workers."""
    if not INSTALLED[request.param]:
        pytest.skip(f"the extra {request.param} is not installed")
    with contextlib.ExitStack() as stack:
        if request.param == "dask":
            folder = tmp_path_factory.mktemp("dask")
            opened = Dask(stack.enter_context(dask_cluster(folder)).address)
        else:
            opened = Ray(None, 2) if request.param == "ray" else Processes(2)
        stack.callback(opened.close)
        yield opened
