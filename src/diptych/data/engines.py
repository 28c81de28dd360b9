"""The engine that a command names: `local`, in this process, or `ray`, on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diptych.data.engine import Engine, LocalEngine
from diptych.data.ray_engine import connect
from diptych.errors import UsageError, nearest

ENGINES = ("local", "ray")


@contextmanager
def open_engine(name: str = "local", address: str | None = None) -> Iterator[Engine]:
    """The engine `local` or `ray`, the latter with the cluster's address. UsageError for anything else."""
    if name == "ray":
        with connect(address) as engine:
            yield engine
        return
    if name != "local":
        raise UsageError(f"--engine {name}: there are local and ray{nearest(name, ENGINES)}")
    if address is not None:
        raise UsageError("--address is a Ray cluster's: give --engine ray with it")
    yield LocalEngine()
