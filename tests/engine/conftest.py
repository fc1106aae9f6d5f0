"""The three kinds of pools, each with real worker processes."""

import contextlib
import importlib.util
import os
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # for benchmarks, which is in no wheel

from benchmarks.campaign.clusters import dask_cluster
from stackllm.engine import devices
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
    """A pool of two workers, on a machine of two GPUs that are only pretended."""
    if not INSTALLED[request.param]:
        pytest.skip(f"the extra {request.param} is not installed")
    with contextlib.ExitStack() as stack:
        if request.param == "dask":
            folder = tmp_path_factory.mktemp("dask")
            setup = {"DASK_DISTRIBUTED__WORKER__PRELOAD": "pool_work"}
            stack.enter_context(mock.patch.dict(os.environ, setup))
            opened = Dask(stack.enter_context(dask_cluster(folder)).address)
        elif request.param == "ray":
            import ray

            stack.enter_context(mock.patch("ray.init", partial(ray.init, num_gpus=2)))
            opened = Ray(None, 2)
        else:
            stack.enter_context(mock.patch.object(devices, "visible", return_value=("0", "GPU-b")))
            opened = Processes(2)
        stack.callback(opened.close)
        yield opened
