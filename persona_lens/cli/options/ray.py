"""The options that spread models over Ray workers, which a command has in common and ends when it is done."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from persona_lens.cli.settings import Option, given_options
from persona_lens.core.errors import PersonaLensError

if TYPE_CHECKING:
    from persona_lens.backend.spread import RayWorkers


@dataclass(frozen=True)
class RayOptions:
    """Over which processes a model is spread.

    Attributes:
        ray: Open the model in the workers of a Ray cluster, which share the batches; `local` starts one here.
        workers: With --ray: how many; None for one for each GPU or machine.
        worker_threads: With --ray: threads of each worker; None for its share of the cores.
        worker_gpus: With --ray: GPUs of each worker, for a model that one does not hold, with --device-map; None for
            one, or a part of one.
    """

    ray: Annotated[str | None, Option(metavar="ADDRESS")] = None
    workers: Annotated[int | None, Option(least=1)] = None
    worker_threads: Annotated[int | None, Option(least=1)] = None
    worker_gpus: Annotated[int | None, Option(least=1)] = None

    def __post_init__(self) -> None:
        given = given_options(self)
        if self.ray is None and given:
            raise PersonaLensError(f"{given[0]} is for --ray; give an address, or `--ray local`")

    @property
    def elsewhere(self) -> bool:
        """Whether this machine is none of the cluster's."""
        return self.ray is not None and self.ray.startswith("ray://")

    def started(self, *, one: bool = False) -> RayWorkers:
        """The workers, which all models of a command share.

        Args:
            one: Whether a single one is enough, unless there are more already.
        """
        # Ray would say in standard output that a worker has died.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
        from persona_lens.backend.spread import RayWorkers

        assert self.ray is not None
        there = _of_command.get()
        if self not in there:
            count = 1 if one else self.workers or 0
            there[self] = RayWorkers(self.ray, count, threads=self.worker_threads, gpus=self.worker_gpus)
        return there[self]


_of_command: ContextVar[dict[RayOptions, RayWorkers]] = ContextVar("workers of the command under way")


@contextmanager
def ending_workers() -> Iterator[None]:
    """While open, a command runs; the workers that it started end with it, also where it is interrupted."""
    started: dict[RayOptions, RayWorkers] = {}
    before = _of_command.set(started)
    try:
        yield
    finally:
        _of_command.reset(before)
        for each in started.values():
            each.close()
