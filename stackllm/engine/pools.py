"""Which pool a user asked for."""

from __future__ import annotations

from stackllm.engine.local import Pool
from stackllm.errors import UsageError

ENGINES = ("local", "dask", "ray")


def open_pool(engine: str, address: str | None, n_jobs: int) -> Pool | None:
    """Open the pool that runs units.

    Parameters
    ----------
    engine
        One of :data:`ENGINES`.
    address
        Of a cluster. None for ``local``, and for ``ray`` on this machine.
    n_jobs
        Workers on this machine; one means this process itself, without a pool.

    Raises
    ------
    UsageError
        If engine and address do not go together.
    MissingInputError, ServerError
        If the engine is not installed or its cluster does not answer.
    """
    if engine == "dask":
        from stackllm.engine.dask import Dask

        if address is None:
            raise UsageError(
                'engine "dask" needs the setting address, such as tcp://127.0.0.1:8786.'
            )
        return Dask(address)
    if engine == "ray":
        from stackllm.engine.ray import Ray

        return Ray(address, n_jobs)
    if address is not None:
        raise UsageError(
            'the setting address is for a cluster. Leave it out, or take engine "dask" or "ray" with it.'
        )
    if n_jobs == 1:
        return None
    from stackllm.engine.processes import Processes

    return Processes(n_jobs)
