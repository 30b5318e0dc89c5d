"""`RayWorkers`: processes of a Ray cluster, one a GPU or a machine; and `RayBackend`, which spreads calls over them."""

from __future__ import annotations

import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from math import ceil
from queue import SimpleQueue
from typing import Any
from uuid import uuid4

from persona_lens.backend.arrivals import WatchedByReplay
from persona_lens.backend.blocks import ModuleError
from persona_lens.backend.edits import Edits, as_edits
from persona_lens.backend.protocol import Backend, BackendError, ForwardResult, Generation
from persona_lens.backend.reads import Read
from persona_lens.backend.registry import DEFAULT
from persona_lens.backend.sinks import sink_limits
from persona_lens.backend.tokens import Sampling, TokenBatch
from persona_lens.backend.worker import Facts, Make, Opening, Worker
from persona_lens.core.errors import first_line
from persona_lens.core.plugins import install_command
from persona_lens.core.progress import note
from persona_lens.core.text import counted

LOCAL = "local"
_RESTARTS = 3  # of a worker that dies, and tries of a call; one that kills its worker every time must come to an end
_AT_ONCE = 64  # calls that a worker listens to; how many it runs is its backend's to say
_PATIENCE = 60.0  # seconds until it is said that workers have no place yet
_ENDING = 10.0  # seconds for calls that were under way to notice that all is over


class WorkersError(BackendError):
    """Ray cannot be used, or a worker failed; the message says what to do."""


class RayWorkers:
    """Processes of a Ray cluster, each of which opens the same models, and runs a part of the calls.

    With ``with``, or `close`, they are ended, and Ray with them if it was started here.

    Args:
        address: ``local`` starts a cluster on this machine; else as ``ray.init`` takes it: ``auto``, ``HOST:PORT`` or
            ``ray://HOST:PORT``. A Ray that this process is connected to already is used as it is.
        workers: How many; 0 takes one for each GPU of the cluster, or, without any, each machine.
        threads: Threads of each worker; its share of this machine's cores if not given.
        gpus: GPUs of each worker, for models that one alone does not hold; by default one, or a part of one where
            there are more workers than GPUs.

    Raises:
        WorkersError: If Ray is not installed, no cluster answers, or it has not so many GPUs.
    """

    def __init__(
        self, address: str = LOCAL, workers: int = 0, *, threads: int | None = None, gpus: int | None = None
    ) -> None:
        self._ray = ray = _ray()
        mine = not ray.is_initialized()
        if mine:
            _connect(ray, address, workers)
        try:
            count, share = _shares(ray, workers, gpus)
            local = address == LOCAL
            actor = ray.remote(
                num_cpus=0 if local else 1,
                num_gpus=share,
                max_restarts=_RESTARTS,
                max_task_retries=_RESTARTS,
                max_concurrency=_AT_ONCE,
                scheduling_strategy="SPREAD",
            )(Worker)
            each = threads or (max(1, (os.cpu_count() or 1) // count) if local else 1)
            self._actors = [actor.remote(each, os.getcwd()) for _ in range(count)]
            await_answers(ray, self._actors, [each.is_there.remote() for each in self._actors])
        except BaseException:
            if mine:
                ray.shutdown()
            raise
        self._calls = _Calls()
        self._end = weakref.finalize(self, _end, ray, self._actors, self._calls, mine)

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._actors)

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        self._end()

    def open(self, name: str = DEFAULT, model: str = "smollm2-135m", **options: Any) -> RayBackend:
        """Open a model in every worker; arguments as `persona_lens.backend.open_backend` takes them.

        Several may be open; a worker lets one go when the backend of it here is gone.

        Raises:
            BackendError: If the backend is unknown or not installed, an option is not one of its own, the model runs on
                a server, or workers find different models.
            ModelError: If the model cannot be found or loaded.
            WorkersError: If a worker fails.
        """
        opening = Opening(uuid4().hex, name, model, options)
        try:
            facts: list[Facts] = self.ask(
                self._actors, lambda each: each.facts.remote(opening, tokenizer=each is self._actors[0])
            )
            opening = replace(opening, wanted=facts[0].info)
            for each in facts:
                opening.check(each.info)
            if facts[0].info.remote:
                raise BackendError(f"{model} runs on a server already, which workers would only ask in turns")
        except BaseException:
            self.forget(opening.key)
            raise
        for text in facts[0].notes:
            note(text)
        return RayBackend(self, opening, facts)

    def ask(self, actors: Sequence[Any], call: Callable[[Any], Any]) -> list[Any]:
        """What workers answer to a call of each.

        Raises:
            WorkersError: If one fails, or they were closed; other errors of a worker come out as they are.
        """
        if not self._end.alive:
            raise WorkersError("the Ray workers are closed; start others, and open the model in them")
        with self._calls:
            try:
                waiting = list(map(call, actors))
                await_answers(self._ray, actors, waiting)
                return list(self._ray.get(waiting))
            except self._ray.exceptions.RayError as error:
                raise self._said(error) from error

    def _said(self, error: Any) -> Exception:
        cause = getattr(error, "cause", None)
        if isinstance(cause, Exception) and not isinstance(cause, self._ray.exceptions.RayError):
            return cause
        said = next((line for line in reversed(str(cause or error).splitlines()) if line.strip()), type(error).__name__)
        said = said.partition(" Some common causes")[0].strip().rstrip(".")  # of which Ray has a page
        return WorkersError(
            f"a Ray worker failed: {said}; what was finished is saved, and the same command goes on from there"
        )

    def put(self, value: Any) -> Any:
        """A reference to a value, which workers may fetch."""
        return self._ray.put(value)

    @property
    def actors(self) -> Sequence[Any]:
        """The workers."""
        return self._actors

    def forget(self, key: str) -> None:
        """Have a model's memory free again."""
        if self._end.alive and self._ray.is_initialized():
            for each in self._actors:
                each.forget.options(max_task_retries=0).remote(key)  # one that dies has forgotten


class RayBackend(WatchedByReplay):
    """A model that is open in several Ray workers, and not in this process: each call goes to one that is free.

    As many calls may run at once as all workers take together, so that a run's batches spread by themselves. The
    numbers are those that one worker alone would give.

    Args:
        workers: The workers.
        opening: The model.
        facts: What each says of it, the first its tokenizer too.
    """

    watched_as = "a model in Ray workers"

    def __init__(self, workers: RayWorkers, opening: Opening, facts: Sequence[Facts]) -> None:
        first = facts[0]
        assert first.tokenizer is not None
        self.info, self.tokenizer, self.end_ids = first.info, first.tokenizer, first.end_ids
        self.shares_prompts, self.context_length = first.shares_prompts, first.context_length
        self.base_weights = first.base_weights
        self.calls_at_once = sum(each.calls_at_once for each in facts)
        self._workers, self._opening = workers, opening
        self._free: SimpleQueue[Any] = SimpleQueue()  # each worker as often as it takes calls
        for turn in range(max(each.calls_at_once for each in facts)):
            for actor, each in zip(workers.actors, facts, strict=True):
                if turn < each.calls_at_once:
                    self._free.put(actor)
        weakref.finalize(self, workers.forget, opening.key).atexit = False

    def __repr__(self) -> str:
        return f"<RayBackend {self.info.in_short}, {counted(len(self._workers), 'worker')}>"

    @cached_property
    def sink_limits(self) -> tuple[float, ...] | None:
        """See `persona_lens.backend.sinks.sink_limits`."""
        found: tuple[float, ...] | None = self.over(_limits)()
        return found

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, edits: Edits = (), reads: Sequence[Read] = ()
    ) -> Generation:
        """See `persona_lens.backend.protocol.Backend.generate`."""
        given = ([tuple(prompt) for prompt in prompts], sampling, as_edits(edits), tuple(reads))
        found: Generation = self._ask("call", "generate", given, {})
        return found

    def forward(
        self, tokens: TokenBatch, edits: Edits = (), reads: Sequence[Read] = (), *, logprobs: bool = False
    ) -> ForwardResult:
        """See `persona_lens.backend.protocol.Backend.forward`."""
        given = (tokens, as_edits(edits), tuple(reads))
        found: ForwardResult = self._ask("call", "forward", given, {"logprobs": logprobs})
        return found

    def editing(self, edits: Edits) -> AbstractContextManager[None]:
        """Refused.

        Raises:
            ModuleError: Always.
        """
        raise ModuleError(
            f"{self.info.model} is open in Ray workers, and editing() is for a module in this process; open the model "
            "without Ray"
        )

    def over(self, make: Make) -> Callable[..., Any]:
        """A function that workers carry out, for work that consists of many calls.

        Args:
            make: Makes the function of a backend; each worker does so once, of its own. It travels there, as do what
                the function is called with and what it returns.
        """
        key, made = uuid4().hex, [self._workers.put(make)]

        def run(*given: Any) -> Any:
            return self._ask("call_made", key, made, given)

        return run

    def _ask(self, method: str, *given: Any) -> Any:
        """Wait for a worker that is free, and for its answer."""
        actor = self._free.get()
        try:
            return self._workers.ask([actor], lambda each: getattr(each, method).remote(self._opening, *given))[0]
        finally:
            self._free.put(actor)


def _limits(backend: Backend) -> Callable[[], tuple[float, ...] | None]:
    return partial(sink_limits, backend)


class _Calls:
    """Counts the calls that are under way, in whatever thread."""

    def __init__(self) -> None:
        self._number = 0
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            self._number += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._number -= 1
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Until there are none, or so long."""
        with self._changed:
            self._changed.wait_for(lambda: not self._number, seconds)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise WorkersError(f"several processes or machines need Ray: {install_command('ray')}") from error
    return ray


def _connect(ray: Any, address: str, workers: int) -> None:
    how: dict[str, Any] = {"address": address, "logging_level": "ERROR", "log_to_driver": False}
    if address == LOCAL:  # a process waits for each CPU that it is told of
        how |= {"num_cpus": max(workers, 1), "include_dashboard": False}
    os.environ.setdefault("RAY_TQDM_PATCH_PRINT", "0")  # else it puts a `print` of its own in place of Python's
    try:
        with keeping_sigterm():
            ray.init(**how)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise WorkersError(
            f"no Ray cluster answers at {address!r}: {first_line(error)}; start one with `ray start --head`"
        ) from error


@contextmanager
def keeping_sigterm() -> Iterator[None]:
    """Put a program's own way to stop back in place of Ray's, which aborts it."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _shares(ray: Any, workers: int, gpus: int | None) -> tuple[int, float]:
    """How many workers there are to be, and the GPUs of each."""
    there = int(ray.cluster_resources().get("GPU", 0))
    if gpus:
        if there < gpus * max(workers, 1):
            raise WorkersError(
                f"{counted(max(workers, 1), 'worker')} of {counted(gpus, 'GPU')} each were asked for, and the cluster "
                f"has {there}; ask for fewer"
            )
        return workers or there // gpus, float(gpus)
    count = workers or there or max(1, sum(bool(node["Alive"]) for node in ray.nodes()))
    return count, gpu_share(there, count)


def gpu_share(gpus: int, workers: int) -> float:
    """What a worker asks Ray for: a whole GPU, or a part of one where there are more workers than GPUs.

    Parts are such that as many as are needed fit on one GPU; asking for none would hide every GPU from a worker.
    """
    return 1 / ceil(workers / gpus) if gpus else 0.0


def await_answers(ray: Any, actors: Sequence[Any], waiting: Sequence[Any]) -> None:
    """Wait, and say so where workers have no place: the cluster may be busy, or a machine of it gone.

    Args:
        ray: The library.
        actors: The workers, which answer whether they are there while they do other things.
        waiting: What is waited for.
    """
    while ray.wait(list(waiting), num_returns=len(waiting), timeout=_PATIENCE)[1]:
        there = [each.is_there.remote() for each in actors]
        late = ray.wait(there, num_returns=len(there), timeout=_PATIENCE)[1]
        if late:
            note(
                f"{len(late)} of {counted(len(there), 'Ray worker')} have no place in the cluster now; they are waited "
                "for, and whoever stops the command and repeats it with fewer --workers loses nothing"
            )


def _end(ray: Any, actors: Sequence[Any], calls: _Calls, mine: bool) -> None:
    if not ray.is_initialized():
        return
    for each in actors:
        ray.kill(each, no_restart=True)
    # Ray must not go while threads of an interrupted run still wait in it.
    calls.wait(_ENDING)
    if mine:
        ray.shutdown()
