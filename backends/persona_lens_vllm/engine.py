"""`Engine`: one vLLM engine for calls from several threads, whose requests run together."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from persona_lens.backend import BackendError
from persona_lens.core.threads import Turns
from persona_lens_vllm.tags import TAG, Here
from persona_lens_vllm.worker import Order, Outcome


class Engine:
    """An ``LLM`` whose steps are run by whoever waits for one: there is no thread of its own that could be left behind.

    Args:
        llm: The engine, with `persona_lens_vllm.worker.ResidualStream` in its workers.

    Attributes:
        received: Bytes that came from the workers so far.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        Here.engine = True
        self.received = 0
        self._turns = Turns()
        self._names = itertools.count()
        self._jobs: dict[str, Job] = {}

    def ask(self, method: str, *args: Any) -> list[Any]:
        """What the workers say that have something of their own to say.

        Raises:
            BackendError: If the engine has ended.
        """
        with self._turns.alone(), _explained():
            said = self.llm.collective_rpc(f"persona_lens_{method}", args=args)
        packed = [each for each in said if each is not None]
        self.received += sum(map(len, packed))
        return [pickle.loads(each) for each in packed]

    def start(self, order: Order) -> Job:
        """Open a call in the workers; its requests are added with `Job.add`."""
        name = f"persona-lens-{next(self._names)}"
        self.ask("open", name, pickle.dumps(order))
        job = Job(self, name)
        self._jobs[name] = job
        return job

    def add(self, requests: Sequence[tuple[str, Any, Any]]) -> None:
        """Hand requests over, each an id, a prompt and sampling parameters; they run as soon as there is room."""
        with self._turns.alone(), _explained():
            for request in requests:
                self.llm.llm_engine.add_request(*request)

    def abort(self, requests: Sequence[str]) -> None:
        """Take requests back."""
        with self._turns.alone(), _explained():
            self.llm.llm_engine.abort_request(list(requests))

    def run(self, job: Job, after_step: Callable[[], None] | None = None) -> None:
        """Let the engine run until a job is over."""
        self._turns.run_for(job, self._run_step, after_step)

    def step(self, job: Job, seen: int) -> bool:
        """See `persona_lens.core.threads.Turns.step_for`."""
        return self._turns.step_for(job, seen, self._run_step)

    def _run_step(self) -> Callable[[], None]:
        with _explained():
            outputs = self.llm.llm_engine.step()

        def tell() -> None:
            for output in outputs:
                name, _, row = output.request_id.rpartition("/")
                if name in self._jobs:
                    self._jobs[name].hear(int(row), output)

        return tell

    def end(self, job: Job) -> list[Outcome]:
        """Take back what still runs of a job, and close its call."""
        self._jobs.pop(job.name, None)
        if job.unfinished:
            self.abort([job.request(row) for row in tuple(job.unfinished)])  # a step may take some from it meanwhile
        found: list[Outcome] = self.ask("close", job.name)
        return found


@contextmanager
def _explained() -> Iterator[None]:
    """Say what the end of the engine means."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "EngineDeadError":
            raise
        raise BackendError(
            "the vLLM engine has ended, and says why above; what is saved stays saved. Start again, with fewer rows at "
            "once (max_num_seqs) or more memory left beside it (gpu_memory_utilization) where it ran out"
        ) from error


class Job:
    """The requests of one call.

    Attributes:
        name: The call's, in the workers.
        tokens: What each row was given so far.
        logprobs: vLLM's log-probabilities at each of these places, where they were asked for.
        prompt_logprobs: The same for each token of the prompt, None for its first.
        unfinished: Rows that still run.
        news: Grows whenever something was heard of it.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self.name = name
        self.tokens: dict[int, tuple[int, ...]] = {}
        self.logprobs: dict[int, list[Any]] = {}
        self.prompt_logprobs: dict[int, list[Any]] = {}
        self.unfinished: set[int] = set()
        self.news = 0

    def request(self, row: int) -> str:
        """The id of a row's request."""
        return f"{self.name}/{row}"

    def add(
        self,
        prompts: Sequence[Sequence[int]],
        salts: Sequence[str],
        noises: Sequence[Mapping[str, Any] | None],
        *,
        streamed: bool = False,
        **params: Any,
    ) -> None:
        """Hand over a row for each prompt.

        Args:
            prompts: Token ids.
            salts: What a cached beginning must have been computed under.
            noises: What makes a row's tokens a sample, see `persona_lens_vllm.sampler`; None for the likeliest ones.
            streamed: Hear of every token, instead of all at the end.
            params: Of ``SamplingParams``.
        """
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.CUMULATIVE if streamed else RequestOutputKind.FINAL_ONLY
        requests = []
        for row, (ids, salt, noise) in enumerate(zip(prompts, salts, noises, strict=True)):
            tag = {"call": self.name, "row": row, **({"noise": dict(noise)} if noise is not None else {})}
            prompt = TokensPrompt(prompt_token_ids=list(ids), **({"cache_salt": salt} if salt else {}))
            how = SamplingParams(
                temperature=0, ignore_eos=True, detokenize=False, output_kind=kind, extra_args={TAG: tag}, **params
            )
            requests.append((self.request(row), prompt, how))
            self.unfinished.add(row)
        self._engine.add(requests)

    def hear(self, row: int, output: Any) -> None:
        """Note what a row was given."""
        said = output.outputs[0]
        self.tokens[row] = tuple(said.token_ids)
        self.logprobs[row] = said.logprobs or []
        self.prompt_logprobs[row] = output.prompt_logprobs or []
        if output.finished:
            self.unfinished.discard(row)
        self.news += 1

    def is_over(self) -> bool:
        """Whether there is nothing to wait for."""
        return not self.unfinished

    def stop(self, rows: Sequence[int]) -> None:
        """Let rows say no more."""
        running = [row for row in rows if row in self.unfinished]
        if running:
            self._engine.abort([self.request(row) for row in running])
            self.unfinished.difference_update(running)

    def run(self, after_step: Callable[[], None] | None = None) -> None:
        """Run until every row has ended; ``after_step`` is called whenever something was heard."""
        self._engine.run(self, after_step)
