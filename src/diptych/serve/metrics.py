"""What Prometheus is told at /metrics. Labels hold no prompt, token, address or name of a user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        given: Any = {"registry": self.registry}
        self.requests = Counter("diptych_requests", "Requests by route and status", ["route", "status"], **given)
        self.jobs = Counter("diptych_jobs", "Jobs by how they ended", ["end"], **given)
        self.pictures = Counter("diptych_pictures", "Pictures drawn", **given)
        self.refused = Counter("diptych_refused", "Requests refused, by reason", ["reason"], **given)
        self.batch = Histogram("diptych_batch_pictures", "Pictures drawn together", buckets=(1, 2, 4, 8, 16), **given)
        self.draw = Histogram("diptych_draw_seconds", "Seconds that a batch took", buckets=SECONDS, **given)
        queue = Gauge("diptych_queue_pictures", "Pictures that wait", **given)
        queue.set_function(waiting)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)
