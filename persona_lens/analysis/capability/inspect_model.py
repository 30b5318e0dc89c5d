"""Any backend as a model of inspect_ai, so that its evaluations run on it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import anyio
import anyio.to_thread
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.capability.scoring import EditedModel, Wanted
from persona_lens.backend import Backend, Edit, Sampling, open_backend
from persona_lens.backend.batches import context_length
from persona_lens.backend.registry import DEFAULT, find_backend
from persona_lens.backend.tokens import TokenIds
from persona_lens.models import ChatFormat, Message
from persona_lens.runs.rollouts import row_seed
from persona_lens.steering.given import read_steering
from persona_lens.vectors import load_vectors

MAX_NEW_TOKENS = 2048  # where neither the task nor the command line names a limit
BATCH_SIZE = 32
LULL = 0.05  # seconds without a further request after which a batch that is not full runs
OWN = ("backend", "vectors", "edits", "batch_size", "thinking")

# What would change the text or the answer's content, and what a backend does not have.
REFUSED = (
    "top_k",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "best_of",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "response_schema",
    "reasoning_effort",
    "reasoning_tokens",
    "modalities",
    "extra_body",
)


@dataclass(frozen=True)
class Answered:
    """One generated response.

    Attributes:
        ids: Its token ids, without the one that ended the turn.
        ended: Whether the turn ended within the limit.
        seconds: How long its batch ran.
    """

    ids: TokenIds
    ended: bool
    seconds: float


Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class BatchQueue(Generic[Asked, Answer]):
    """Answers requests that wait at the same time together, one batch after another, in a thread.

    Args:
        run: Answers a batch; one answer a request, in their order.
        size: Requests of a batch at most.
    """

    def __init__(self, run: Callable[[Sequence[Asked]], Sequence[Answer]], size: int) -> None:
        self._run = run
        self._size = size
        self._waiting: list[tuple[Asked, Future[Answer]]] = []
        self._turn = anyio.Lock()

    async def answer(self, request: Asked) -> Answer:
        """The answer to a request; one that is cancelled before its turn is never run."""
        mine: tuple[Asked, Future[Answer]] = (request, Future())
        self._waiting.append(mine)
        try:
            async with self._turn:  # first come, first served: whoever has it and no answer yet is the first that waits
                if not mine[1].done():
                    await self._run_next()
        finally:
            if mine in self._waiting:
                self._waiting.remove(mine)
        return mine[1].result()

    async def _run_next(self) -> None:
        there = 0
        while there < len(self._waiting) < self._size:
            there = len(self._waiting)
            await anyio.sleep(LULL)
        batch = self._waiting[: self._size]
        del self._waiting[: self._size]
        try:
            answers = await anyio.to_thread.run_sync(self._run, [request for request, _ in batch])
        except Exception as error:  # noqa: BLE001 - it is raised where the answer is awaited
            for _, future in batch:
                future.set_exception(error)
        except BaseException:  # this one was cancelled, and the others still wait
            self._waiting[:0] = batch
            raise
        else:
            for (_, future), found in zip(batch, answers, strict=True):
                future.set_result(found)


class PersonaLensAPI(ModelAPI):  # type: ignore[misc]  # the types of inspect_ai are not there where it is not installed
    """The provider ``persona-lens`` of inspect_ai.

    Requests that wait at the same time run as one batch. Without a temperature decoding is greedy. A response's tokens
    depend on its own seed and prompt alone; without a seed every request draws its own.

    Args:
        model_name: Hub id, local folder or the embedded ``smollm2-135m``.
        base_url: There is none to give.
        api_key: There is none to give.
        config: Settings of generation.
        model_args: ``backend`` (a name, or a `Backend` that is open); ``edits``, a steering in its notation or a
            steering file, and ``vectors``, the paths of the vectors that it names; ``batch_size``, ``thinking``, and
            the backend's own options such as ``dtype`` and ``device``.

    Raises:
        AnalysisError: If a model argument is unknown.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - the signature of inspect_ai
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        if base_url is not None:
            raise AnalysisError(f"the provider persona-lens runs models itself and takes no base URL: {base_url!r}")
        own = {name: model_args.pop(name, None) for name in OWN}
        self.backend = _open(own["backend"], model_name, model_args)
        self.batch_size = _batch_size(own["batch_size"])
        edits = _steering(self.backend, own["vectors"], own["edits"])
        self.model = EditedModel(self.backend, edits, self.batch_size)
        self.chat = ChatFormat.from_tokenizer(self.backend.tokenizer, thinking=bool(own["thinking"]))
        self.limit = context_length(self.backend)
        self._queue: BatchQueue[Wanted, Answered] = BatchQueue(self._run, self.batch_size)

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer a conversation.

        Raises:
            AnalysisError: If the conversation or the settings ask for what a backend does not have.
        """
        if tools:
            raise AnalysisError(f"models of persona-lens call no tools; the task has {tools[0].name}")
        _check(config)
        prompt = tuple(self.chat.encode_messages(_messages(input)))
        wanted = MAX_NEW_TOKENS if config.max_tokens is None else config.max_tokens
        room = wanted if self.limit is None else min(wanted, self.limit - len(prompt))
        if room < 1:
            return self._output("", len(prompt), 0, "model_length", 0.0)
        answered = await self._queue.answer(self._asked(prompt, room, config))
        text, stopped = _until(self.chat.answer(answered.ids), config.stop_seqs or [])
        reason: StopReason = "stop" if answered.ended or stopped else "max_tokens" if room == wanted else "model_length"
        return self._output(text, len(prompt), len(answered.ids) + answered.ended, reason, answered.seconds)

    def _asked(self, prompt: TokenIds, room: int, config: GenerateConfig) -> Wanted:
        seed = secrets.randbits(63) if config.seed is None else row_seed(config.seed, *prompt)
        temperature = config.temperature or 0.0
        top_p = 1.0 if config.top_p is None else config.top_p
        Sampling(room, temperature, top_p, (seed,) if temperature else None)  # says what is out of range
        return Wanted(prompt, room, temperature, top_p, seed)

    def _output(self, text: str, before: int, after: int, reason: StopReason, seconds: float) -> ModelOutput:
        message = ChatMessageAssistant(content=text, model=self.model_name, source="generate")
        return ModelOutput(
            model=self.model_name,
            choices=[ChatCompletionChoice(message=message, stop_reason=reason)],
            usage=ModelUsage(input_tokens=before, output_tokens=after, total_tokens=before + after),
            time=seconds,
        )

    def _run(self, batch: Sequence[Wanted]) -> list[Answered]:
        answers: dict[int, Answered] = {}
        begun = time.monotonic()
        for rows in self.model.generated(batch):
            ended = time.monotonic()
            answers |= {row: Answered(ids, whole, ended - begun) for row, ids, whole in rows}
            begun = ended
        return [answers[index] for index in range(len(batch))]

    def max_tokens(self) -> int | None:
        """New tokens where nothing else says how many."""
        return MAX_NEW_TOKENS

    def max_connections(self) -> int:
        """Requests that inspect_ai makes at the same time: as many as fit a batch."""
        return self.batch_size

    def collapse_user_messages(self) -> bool:
        """Chat templates want turns to alternate."""
        return True

    def collapse_assistant_messages(self) -> bool:
        """Chat templates want turns to alternate."""
        return True


def _open(given: Backend | str | None, model: str, options: dict[str, Any]) -> Backend:
    if given is not None and not isinstance(given, str):
        accepted: list[str] = []
    else:
        accepted = find_backend(given or DEFAULT).option_names()
    for name in options:
        if name not in accepted:
            raise AnalysisError(
                f"the provider persona-lens has no model argument {name!r}; it takes {', '.join((*OWN, *accepted))}"
            )
    if given is not None and not isinstance(given, str):
        return given
    return open_backend(given or DEFAULT, model, **options)


def _steering(backend: Backend, vectors: object, edits: object) -> tuple[Edit, ...]:
    """The edits that the model arguments ask for."""
    if edits is None and vectors is None:
        return ()
    if not isinstance(edits, str):
        raise AnalysisError(
            "vectors are there to be steered along: give edits too, such as -M edits='optimistic@18:+1.5', or the path "
            f"of a steering file; got {edits!r}"
        )
    paths = [] if vectors is None else vectors.split(",") if isinstance(vectors, str) else vectors
    if not isinstance(paths, list | tuple) or not all(isinstance(path, str | Path) for path in paths):
        raise AnalysisError(f"vectors are the paths of files or run folders, with commas between; got {vectors!r}")
    named = {found.trait: found for found in map(load_vectors, paths)}
    steering = read_steering(edits, named)
    steering.check_model(backend)
    return steering.edits()


def _batch_size(given: object) -> int:
    if given is None:
        return BATCH_SIZE
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise AnalysisError(f"batch_size must be a whole number of 1 or more, got {given!r}")
    return given


def _check(config: GenerateConfig) -> None:
    for name in REFUSED:
        if (value := getattr(config, name, None)) not in (None, False):
            raise AnalysisError(
                f"models of persona-lens do not generate with {name}={value!r}; they take max_tokens, temperature, "
                "top_p, seed and stop_seqs"
            )
    if config.num_choices not in (None, 1):
        raise AnalysisError(f"models of persona-lens give one choice, not num_choices={config.num_choices}")
    if config.max_tokens is not None and config.max_tokens < 1:
        raise AnalysisError(f"max_tokens must be at least 1, got {config.max_tokens}")


def _messages(given: Sequence[ChatMessage]) -> list[Message]:
    """The conversation in text; system messages at its head become one."""
    found: list[Message] = []
    for message in given:
        if not isinstance(message.content, str) and any(
            part.type not in ("text", "reasoning") for part in message.content
        ):
            raise AnalysisError("models of persona-lens read text only; a message holds another kind of content")
        if message.role == "tool":
            raise AnalysisError("models of persona-lens call no tools, and a message is a tool's answer")
        if message.role == "system" and found and found[-1]["role"] == "system":
            found[-1] = {"role": "system", "content": f"{found[-1]['content']}\n\n{message.text}"}
        else:
            found.append({"role": message.role, "content": message.text})
    return found


def _until(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first stop sequence, and whether there was one."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)
