"""One rate limit for all workers of a stage: an actor has the `Pace` of the stage's endpoint, and each worker asks it.

    with shared(recipe.curate.vlm.endpoint) as limit:
        worker.remote(setup, limit)        # in the driver
    limit.use()                            # in each worker, before it opens the endpoint

A question costs a call within the cluster, about a millisecond. Endpoints without a limit have no actor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diptych.llm import pace
from diptych.llm.endpoint import Endpoint


@contextmanager
def shared(endpoint: Endpoint | None) -> Iterator[SharedLimit | None]:
    """Runs the endpoint's pace in an actor while the block lasts. Yields None if the endpoint has no limit."""
    if endpoint is None or not (endpoint.requests_per_minute or endpoint.tokens_per_minute):
        yield None
        return
    import ray

    # It takes no CPU from the workers. If its node dies, Ray starts it again on another one, with nothing booked.
    remote: Any = ray.remote(pace.Pace).options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
    actor: Any = remote.remote(endpoint.requests_per_minute, endpoint.tokens_per_minute)
    try:
        yield SharedLimit(endpoint.base_url, endpoint.model, actor)
    finally:
        ray.kill(actor)


@dataclass(frozen=True)
class SharedLimit:
    """The limit of an endpoint, as a worker gets it."""

    base_url: str
    model: str
    actor: Any

    def use(self) -> None:
        """Makes later clients of the endpoint in this process wait for the shared limit."""
        pace.share(self.base_url, self.model, _RemotePace(self.actor))


class _RemotePace:
    """The methods of `Pace`, of an actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def book(self, estimate: float) -> tuple[float, float]:
        import ray

        return ray.get(self._actor.book.remote(estimate))

    def correct(self, booked: float, spent: int) -> None:
        self._actor.correct.remote(booked, spent)

    def hold(self, seconds: float) -> None:
        self._actor.hold.remote(seconds)

    def held(self) -> float:
        import ray

        return ray.get(self._actor.held.remote())
