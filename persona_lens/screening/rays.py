"""`RayCrew`: processes on this machine or on others, over Ray.

Each process opens the model for itself and scores whole windows, which are cut as they always are; so the values do not
depend on how many there are. Ray pickles what it sends: the machines of a cluster must trust each other.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING, Any

from persona_lens.errors import first_line
from persona_lens.screening.crews import Job
from persona_lens.screening.errors import ScreeningError
from persona_lens.screening.scoring import Scorer, Unit
from persona_lens.screening.settings import ScreeningSettings
from persona_lens.screening.windows import Window

if TYPE_CHECKING:
    from persona_lens.monitoring import Panel

LOCAL = "local"
_WAITING = 2  # windows a worker has at hand, so that it never waits for the next


@dataclass(frozen=True)
class OpenedBy:
    """How a process opens the model; plain values, which travel.

    Attributes:
        model: Hub id, folder, or embedded name; the same on every machine.
        backend: Name of the backend.
        options: Its options.
        template: Text of another chat template.
        thinking: Whether the model reasons before it answers.
    """

    model: str
    backend: str = "transformers"
    options: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None
    thinking: bool = False

    def scorer(self, panel: Panel, settings: ScreeningSettings) -> Scorer:
        """Open the model."""
        from persona_lens.backend import open_backend
        from persona_lens.models import ChatFormat

        backend = open_backend(self.backend, self.model, **self.options)
        chat = ChatFormat.from_tokenizer(backend.tokenizer, template=self.template, thinking=self.thinking)
        return Scorer(backend, chat, panel, settings)


@dataclass(frozen=True)
class RayCrew:
    """Workers of a Ray cluster.

    Attributes:
        address: ``local`` starts one on this machine; else as ``ray.init`` takes it: ``auto``, ``HOST:PORT`` or
            ``ray://HOST:PORT``.
        opened: How each opens the model.
        workers: How many; 0 takes one for each GPU of the cluster, or, without any, each machine.
        threads: Threads of each worker; its share of this machine's cores if not given.
    """

    address: str
    opened: OpenedBy
    workers: int = 0
    threads: int | None = None

    def units(self, scorer: Scorer, jobs: Iterable[Job]) -> Iterator[Iterable[Unit]]:
        """See `Crew`: windows are handed out as workers have room, and come back in their order."""
        ray = _ray()
        mine = not ray.is_initialized()
        if mine:
            self._connect(ray)
        try:
            yield from self._in_order(ray, scorer, jobs)
        finally:
            if mine:
                ray.shutdown()

    def _connect(self, ray: Any) -> None:
        quiet = {"logging_level": "ERROR", "log_to_driver": False}
        try:
            if self.address == LOCAL:
                ray.init(num_cpus=max(self.workers, 1) * (self.threads or 1), include_dashboard=False, **quiet)
            else:
                ray.init(address=self.address, **quiet)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            said = first_line(error)
            raise ScreeningError(
                f"no Ray cluster answers at {self.address!r}: {said}; start one with `ray start --head`"
            ) from error

    def _in_order(self, ray: Any, scorer: Scorer, jobs: Iterable[Job]) -> Iterator[Iterable[Unit]]:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        count = self.workers or gpus or max(1, len(ray.nodes()))
        threads = self.threads or (max(1, (os.cpu_count() or 1) // count) if self.address == LOCAL else 1)
        needs = {"num_cpus": 1, "num_gpus": 1 if gpus >= count else 0}
        worker = ray.remote(**needs)(_Worker)
        panel = ray.put(scorer.panel)
        workers = [worker.remote(self.opened, panel, scorer.settings, threads) for _ in range(count)]
        running: deque[Any] = deque()
        turn = cycle(workers)
        for window, skip in jobs:
            if len(running) >= _WAITING * count:
                yield self._result(ray, running.popleft())
            running.append(next(turn).units.remote(window, skip))
        while running:
            yield self._result(ray, running.popleft())

    def _result(self, ray: Any, waiting: Any) -> list[Unit]:
        try:
            found: list[Unit] = ray.get(waiting)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            said = next((line for line in reversed(str(cause).strip().splitlines()) if line.strip()), "")
            raise ScreeningError(
                f"a Ray worker failed: {said or type(cause).__name__}; what is done is saved; repeat the command"
            ) from error
        return found


class _Worker:
    """A process that has opened the model."""

    def __init__(self, opened: OpenedBy, panel: Panel, settings: ScreeningSettings, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._scorer = opened.scorer(panel, settings)

    def units(self, window: Window, skip: int) -> list[Unit]:
        """Everything about a window, but for what is there already."""
        return list(self._scorer.units(window, skip))


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ScreeningError("several processes or machines need Ray: `pip install 'persona-lens[ray]'`") from error
    return ray
