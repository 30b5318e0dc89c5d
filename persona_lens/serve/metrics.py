"""`Metrics`: what the server counts, as Prometheus reads it."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from persona_lens.serve.admission import Admission

KIND = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server.

    Args:
        admission: Who knows what runs and what waits.
    """

    def __init__(self, admission: Admission) -> None:
        self._registry = CollectorRegistry()
        shared: dict[str, Any] = {"registry": self._registry, "namespace": "persona_lens"}
        self.requests = Counter("requests", "Requests answered.", ["route", "status"], **shared)
        self.tokens = Counter("tokens", "Tokens generated.", **shared)
        self.first = Histogram("first_token_seconds", "From a request to its first token.", buckets=BUCKETS, **shared)
        self.whole = Histogram("request_seconds", "From a request to the end of its answer.", buckets=BUCKETS, **shared)
        Gauge("rows_running", "Replies that run.", **shared).set_function(lambda: admission.running)
        Gauge("requests_waiting", "Requests of which a reply waits.", **shared).set_function(lambda: admission.waiting)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)
