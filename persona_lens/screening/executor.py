"""Who scores the windows of rows in the place of this process: others on this machine or elsewhere, over Ray."""

from __future__ import annotations

import gc
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle
from math import ceil
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, runtime_checkable

from persona_lens.core.errors import first_line
from persona_lens.core.plugins import install_command
from persona_lens.screening.samples import ScreeningError, ScreeningSettings, Window
from persona_lens.screening.scoring import Scorer, Unit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from persona_lens.backend import Backend, ModelInfo
    from persona_lens.monitoring import Panel

Job = tuple[Window, int]
"""A window, and how many of its units are there already."""


@runtime_checkable
class Executor(Protocol):
    """Whoever scores windows."""

    def units(self, scorer: Scorer, jobs: Iterable[Job]) -> Iterator[Iterable[Unit]]:
        """The units of each window that are not there yet, in the order of the windows."""
        ...


LOCAL = "local"
_WAITING = 2  # windows a worker has at hand, so that it never waits for the next
_RESTARTS = 3  # of a worker that dies, and tries of a window; one that kills its worker every time must come to an end


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
class KnownModel:
    """What is known of a model that is not open in this process: enough for a command whose workers run it.

    Attributes:
        info: Which model it is.
        tokenizer: Its tokenizer.
        end_ids: Token ids that end its turn.
        context_length: Tokens that it takes.
        shares_prompts: As `Backend` has it.
        calls_at_once: As `Backend` has it.
    """

    info: ModelInfo
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]
    context_length: int | None
    shares_prompts: bool = False
    calls_at_once: int = 1

    @staticmethod
    def of(backend: Backend) -> KnownModel:
        """Of an open model, which is free to go."""
        from persona_lens.backend.batches import context_length

        return KnownModel(backend.info, backend.tokenizer, backend.end_ids, context_length(backend))

    def generate(self, *_: Any, **__: Any) -> NoReturn:
        """Nothing can be run."""
        raise ScreeningError(f"{self.info.model} is open in the workers, not in this process, and cannot be run here")

    forward = editing = generate


@dataclass(frozen=True)
class RayExecutor:
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
        """See `Executor`: windows are handed out as workers have room, and come back in their order."""
        import torch

        ray = _ray()
        gc.collect()  # a model that was opened only to be known leaves its memory to the workers
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
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
        needs = {"num_cpus": 1, "num_gpus": gpu_share(gpus, count)}
        worker = ray.remote(**needs, max_restarts=_RESTARTS, max_task_retries=_RESTARTS)(_Worker)
        given = (self.opened, scorer.panel, scorer.settings, threads, scorer.backend.info)
        workers = [worker.remote(*given) for _ in range(count)]
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


def gpu_share(gpus: int, workers: int) -> float:
    """What a worker asks Ray for: a whole GPU, or a part of one where there are more workers than GPUs.

    Parts are such that as many as are needed fit on one GPU; asking for none would hide every GPU from a worker.
    """
    return 1 / ceil(workers / gpus) if gpus else 0


class _Worker:
    """A process that opens the model when it gets its first window."""

    def __init__(
        self, opened: OpenedBy, panel: Panel, settings: ScreeningSettings, threads: int, wanted: ModelInfo
    ) -> None:
        self._opened, self._panel, self._settings = opened, panel, settings
        self._threads, self._wanted = threads, wanted

    def units(self, window: Window, skip: int) -> list[Unit]:
        """Everything about a window, but for what is there already.

        Raises:
            ScreeningError: If the model here is not the one that the command opened.
        """
        return list(self._scorer.units(window, skip))

    @cached_property
    def _scorer(self) -> Scorer:
        import torch

        torch.set_num_threads(self._threads)
        scorer = self._opened.scorer(self._panel, self._settings)
        if different := self._wanted.differences(scorer.backend.info):
            raise ScreeningError(
                f"a worker found another model under the name {self._opened.model} ({'; '.join(different)}); give "
                "every machine the same files"
            )
        return scorer


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ScreeningError(f"several processes or machines need Ray: {install_command('ray')}") from error
    return ray
