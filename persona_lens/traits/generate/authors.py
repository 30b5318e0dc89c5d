"""Authors: models that write traits, here or on a server; and how often one may be asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from persona_lens.models.server import Completion, CompletionRequest, CompletionServer, Refused, ServerSettings
from persona_lens.traits.generate.draft import with_form
from persona_lens.traits.generate.replies import Author, AuthoringError
from persona_lens.traits.schema import N_INSTRUCTION_PAIRS, N_QUESTIONS

if TYPE_CHECKING:
    from persona_lens.backend import Backend
    from persona_lens.models import ChatFormat

ALL_QUESTIONS = 2 * N_QUESTIONS


@dataclass(frozen=True)
class Limits:
    """How often a model is asked before one gives up.

    Attributes:
        batch: Questions asked for at once.
        attempts: Requests for the adjectives, and for the rubric.
        instructions: Requests for the instruction pairs.
        questions: Requests for the questions.
        repairs: Rounds in which what the checks find fault with is asked for anew.
        repair_requests: Requests in such a round, for pairs and for questions each.
    """

    batch: int = 10
    attempts: int = 3
    instructions: int = N_INSTRUCTION_PAIRS
    questions: int = 12
    repairs: int = 2
    repair_requests: int = 3


@dataclass(frozen=True)
class PlannedStep:
    """How many requests a part of the work takes."""

    step: str
    at_least: int
    at_most: int


def plan(limits: Limits | None = None) -> list[PlannedStep]:
    """Say how many requests a trait takes, without asking anybody."""
    limits = limits or Limits()
    return [
        PlannedStep("adjectives", 1, limits.attempts),
        PlannedStep("instructions", 1, limits.instructions),
        PlannedStep("questions", math.ceil(ALL_QUESTIONS / limits.batch), limits.questions),
        PlannedStep("rubric", 1, limits.attempts),
        PlannedStep("replacements", 0, limits.repairs * 2 * limits.repair_requests),
    ]


MAX_NEW_TOKENS = 1500
TEMPERATURE = 0.8


class _Asked:
    """What authors have in common: how long a reply may be, and a seed of its own for every reply."""

    def __init__(self, max_new_tokens: int, seed: int, temperature: float, first_request: int) -> None:
        self.max_new_tokens, self.seed, self.temperature = max_new_tokens, seed, temperature
        self.request = first_request

    def next_seed(self) -> int:
        """The seed of the next reply."""
        seed, self.request = self.seed + self.request, self.request + 1
        return seed


class LocalAuthor(_Asked):
    """A chat model that answers in free text; the form that is wanted is shown to it.

    Args:
        backend: The model.
        chat: Its chat format.
        max_new_tokens: Length limit of a reply, in tokens.
        seed: Base of the seeds; every reply has one of its own.
        temperature: 0 is greedy.
        first_request: Number of the first reply: an interrupted run goes on with other seeds than it began with.
    """

    def __init__(
        self,
        backend: Backend,
        chat: ChatFormat,
        max_new_tokens: int = MAX_NEW_TOKENS,
        seed: int = 0,
        temperature: float = TEMPERATURE,
        *,
        first_request: int = 0,
    ) -> None:
        self.backend, self.chat = backend, chat
        super().__init__(max_new_tokens, seed, temperature, first_request)

    def write(self, system: str, request: str, schema: Mapping[str, Any]) -> str:
        """Reply to one request; see `Author.write`."""
        from persona_lens.backend import Sampling

        seed = self.next_seed()
        sampling = Sampling(self.max_new_tokens, self.temperature, seeds=(seed,) if self.temperature else None)
        made = self.backend.generate([self.chat.encode(system, with_form(request, schema))], sampling)
        return self.chat.answer(made.responses[0])

    def describe(self) -> dict[str, Any]:
        """Say which model this is; see `Author.describe`."""
        info = self.backend.info
        return {
            "model": info.model,
            "revision": info.revision,
            "weights": info.weights,
            "backend": info.backend,
            "dtype": info.dtype,
            "max_new_tokens": self.max_new_tokens,
        }


# Seconds for one reply: a large model on a slow machine writes a few tokens a second.
TIMEOUT = 300.0


class ServerAuthor(_Asked):
    """A chat model on a server, held to the form that is wanted by structured output where the server has it.

    The form stands in the message too, since there are servers that take a schema and pay no heed to it.

    Args:
        server: Where the model is. Its cache gives replies back to a run that is repeated from the beginning; a reply
            of no use does not come back within a run, nor when a run goes on, since every request has its own seed.
        max_new_tokens, seed, temperature, first_request: See `LocalAuthor`.
    """

    def __init__(
        self,
        server: CompletionServer,
        max_new_tokens: int = MAX_NEW_TOKENS,
        seed: int = 0,
        temperature: float = TEMPERATURE,
        *,
        first_request: int = 0,
    ) -> None:
        self.server = server
        super().__init__(max_new_tokens, seed, temperature, first_request)
        self.structured: bool | None = None

    def write(self, system: str, request: str, schema: Mapping[str, Any]) -> str:
        """Reply to one request; see `Author.write`.

        Raises:
            AuthoringError: The server does not take the request.
            ServerError: The server cannot be reached or used, or fails again and again.
            SpendingLimitError: The limit is reached.
        """
        seed = self.next_seed()
        messages = (("system", system), ("user", with_form(request, schema)))
        if self.structured is not False:
            answer = self._ask(messages, seed, schema)
            if isinstance(answer, Completion):
                self.structured = True
                return answer.choices[0].text
        # What servers say of a schema they do not take differs; what is taken without it was refused because of it.
        answer = self._ask(messages, seed, None)
        if isinstance(answer, Refused):
            raise AuthoringError(answer.reason)
        self.structured = False
        return answer.choices[0].text

    def describe(self) -> dict[str, Any]:
        """Say which model this is and where; see `Author.describe`.

        ``structured_output`` is there once the server has replied: whether it takes the schemas.
        """
        known = {} if self.structured is None else {"structured_output": self.structured}
        settings = self.server.settings
        return {"model": settings.model, "server": settings.shown, "max_new_tokens": self.max_new_tokens, **known}

    def _ask(
        self, messages: tuple[tuple[str, str], ...], seed: int, schema: Mapping[str, Any] | None
    ) -> Completion | Refused:
        asked = CompletionRequest(messages, self.max_new_tokens, self.temperature, seed=seed, schema=schema)
        (answer,) = self.server.complete([asked])
        return answer


SERVER = "openai:"


def open_author(
    spec: str,
    *,
    seed: int = 0,
    temperature: float = TEMPERATURE,
    max_new_tokens: int = MAX_NEW_TOKENS,
    first_request: int = 0,
    open_model: Callable[[str], Backend] | None = None,
    open_server: Callable[[str], CompletionServer] | None = None,
) -> Author:
    """Open an author.

    Args:
        spec: ``openai:NAME`` for a model on an OpenAI-compatible server; otherwise a model that runs here, as
            `persona_lens.open_backend` takes it: a hub id, a local folder or an embedded name.
        seed: Base of all seeds.
        temperature: 0 is greedy.
        max_new_tokens: Length limit of a reply, in tokens.
        first_request: How many replies an interrupted run has asked for already.
        open_model: Opens a model that runs here; the default backend does unless one is given.
        open_server: Finds the server of a model; the one in ``OPENAI_BASE_URL``, or OpenAI itself, unless one is given.

    Raises:
        AuthoringError: There is no such author.
        ServerError: The packages to ask a server are missing, or the key.
        PersonaLensError: The model cannot be opened.
    """
    if on_server(spec):
        name = spec.removeprefix(SERVER)
        server = open_server(name) if open_server else CompletionServer(ServerSettings(name, timeout=TIMEOUT))
        server.check()
        return ServerAuthor(server, max_new_tokens, seed, temperature, first_request=first_request)
    from persona_lens.backend import open_backend
    from persona_lens.models import ChatFormat

    backend = open_model(spec) if open_model else open_backend("transformers", spec)
    chat = ChatFormat.from_tokenizer(backend.tokenizer)
    return LocalAuthor(backend, chat, max_new_tokens, seed, temperature, first_request=first_request)


def on_server(spec: str) -> bool:
    """Whether an author is a model on a server, and not one that runs here.

    Raises:
        AuthoringError: No model is named.
    """
    if not spec.strip():
        raise AuthoringError("--author-model needs a model: openai:NAME, a hub id, a local folder or smollm2-135m")
    if spec.startswith(SERVER) and not spec.removeprefix(SERVER).strip():
        raise AuthoringError("--author-model openai: needs the name of a model behind it, such as openai:gpt-4.1-mini")
    return spec.startswith(SERVER)
