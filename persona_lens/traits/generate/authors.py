"""Authors: models that write traits, here or on a server; and what can be read in their replies."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pydantic_core
from pydantic import BaseModel, TypeAdapter, ValidationError

from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import in_short
from persona_lens.models.server import Completion, CompletionRequest, CompletionServer, ServerSettings

if TYPE_CHECKING:
    from persona_lens.backend import Backend
    from persona_lens.models import ChatFormat

MAX_NEW_TOKENS = 1500
TEMPERATURE = 0.8
# Seconds for one reply: a large model on a slow machine writes a few tokens a second.
TIMEOUT = 300.0


class AuthoringError(PersonaLensError):
    """A trait could not be written or imported; the message says what is missing and what to do."""


class Author(Protocol):
    """A model that writes texts on request."""

    def write(self, system: str, request: str, schema: Mapping[str, Any]) -> str:
        """Reply to one request.

        Args:
            system: What the author's task is altogether.
            request: What is wanted now.
            schema: JSON Schema of the reply, an object; names and types only, no lengths.

        Returns:
            A text with the JSON object in it. What stands around it, and small faults of it, do no harm.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Say which model this is and where it runs, for the trait's provenance; never a key.

        ``model`` is there always.
        """
        ...


@dataclass(kw_only=True)
class _Asked:
    """What authors have in common: how long a reply may be, and a seed of its own for every reply."""

    max_new_tokens: int = MAX_NEW_TOKENS
    seed: int = 0
    temperature: float = TEMPERATURE
    first_request: int = 0
    _replies: int = field(default=0, init=False)

    def next_seed(self) -> int:
        """The seed of the next reply."""
        self._replies += 1
        return self.seed + self.first_request + self._replies - 1


@dataclass
class LocalAuthor(_Asked):
    """A chat model that answers in free text; the form that is wanted is shown to it.

    Attributes:
        backend: The model.
        chat: Its chat format.
        max_new_tokens: Length limit of a reply, in tokens.
        seed: Base of the seeds; every reply has one of its own.
        temperature: 0 is greedy.
        first_request: Number of the first reply: an interrupted run goes on with other seeds than it began with.
        thinking_budget: How many tokens it may think before it has to write; None does not limit it.
    """

    backend: Backend
    chat: ChatFormat
    thinking_budget: int | None = None

    def write(self, system: str, request: str, schema: Mapping[str, Any]) -> str:
        """Reply to one request; see `Author.write`."""
        from persona_lens.backend import Sampling

        seed = self.next_seed()
        seeds, budget = (seed,) if self.temperature else None, self.thinking_budget
        sampling = Sampling(self.max_new_tokens, self.temperature, seeds=seeds, thinking_budget=budget)
        made = self.backend.generate([self.chat.encode(system, with_form(request, schema))], sampling)
        return self.chat.answer(made.responses[0])

    def describe(self) -> dict[str, Any]:
        """Say which model this is; see `Author.describe`."""
        info, budget = self.backend.info, self.thinking_budget
        return {
            "model": info.model,
            "revision": info.revision,
            "weights": info.weights,
            "backend": info.backend,
            "dtype": info.dtype,
            "max_new_tokens": self.max_new_tokens,
            **({} if budget is None else {"thinking_budget": budget}),
        }


@dataclass
class ServerAuthor(_Asked):
    """A chat model on a server, held to the form that is wanted by structured output where the server has it.

    The form stands in the message too, since there are servers that take a schema and pay no heed to it.

    Attributes:
        server: Where the model is. Its cache gives replies back to a run that is repeated from the beginning; a reply
            of no use does not come back within a run, nor when a run goes on, since every request has its own seed.
        structured: Whether the server takes schemas; None before it has replied.
        max_new_tokens, seed, temperature, first_request: See `LocalAuthor`.
    """

    server: CompletionServer
    structured: bool | None = field(default=None, init=False)

    def write(self, system: str, request: str, schema: Mapping[str, Any]) -> str:
        """Reply to one request; see `Author.write`.

        Raises:
            AuthoringError: The server does not take the request.
            ServerError: The server cannot be reached or used, or fails again and again.
            SpendingLimitError: The limit is reached.
        """
        messages = (("system", system), ("user", with_form(request, schema)))
        plain = CompletionRequest(messages, self.max_new_tokens, self.temperature, seed=self.next_seed())
        # What servers say of a schema they do not take differs; what is taken without it was refused because of it.
        asked = [plain] if self.structured is False else [replace(plain, schema=schema), plain]
        refusal = ""
        for each in asked:
            (answer,) = self.server.complete([each])
            if isinstance(answer, Completion):
                self.structured = each.schema is not None
                return answer.text
            refusal = answer.reason
        raise AuthoringError(refusal)

    def describe(self) -> dict[str, Any]:
        """Say which model this is and where; see `Author.describe`.

        ``structured_output`` is there once the server has replied: whether it takes the schemas.
        """
        known = {} if self.structured is None else {"structured_output": self.structured}
        settings = self.server.settings
        return {"model": settings.model, "server": settings.shown, "max_new_tokens": self.max_new_tokens, **known}


def with_form(request: str, schema: Mapping[str, Any]) -> str:
    """Add to a request the form of its reply."""
    form = json.dumps(_example(schema), ensure_ascii=False)
    return f"{request}\n\nReply with JSON of this form, and nothing else:\n{form}"


def _example(schema: Mapping[str, Any]) -> Any:
    """A value that a schema describes, with dots for texts."""
    if schema["type"] == "object":
        return {name: _example(inner) for name, inner in schema["properties"].items()}
    if schema["type"] == "array":
        return [_example(schema["items"])]
    return "..."


SERVER = "openai:"


def open_author(
    spec: str,
    *,
    seed: int = 0,
    temperature: float = TEMPERATURE,
    max_new_tokens: int = MAX_NEW_TOKENS,
    first_request: int = 0,
    thinking_budget: int | None = None,
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
        thinking_budget: How many tokens a model that runs here may think before it has to write.
        open_model: Opens a model that runs here; the default backend does unless one is given.
        open_server: Finds the server of a model; the one in ``OPENAI_BASE_URL``, or OpenAI itself, unless one is given.

    Raises:
        AuthoringError: There is no such author, or its thinking cannot be limited.
        ServerError: The packages to ask a server are missing, or the key.
        PersonaLensError: The model cannot be opened.
    """
    asked: Any = {"max_new_tokens": max_new_tokens, "seed": seed, "temperature": temperature}
    asked["first_request"] = first_request
    if on_server(spec):
        if thinking_budget is not None:
            raise AuthoringError("the thinking of a model on a server cannot be limited; leave out thinking_budget")
        name = spec.removeprefix(SERVER)
        server = open_server(name) if open_server else CompletionServer(ServerSettings(name, timeout=TIMEOUT))
        server.check()
        return ServerAuthor(server, **asked)
    from persona_lens.backend import open_backend
    from persona_lens.models import ChatFormat

    backend = open_model(spec) if open_model else open_backend("transformers", spec)
    return LocalAuthor(backend, ChatFormat.from_tokenizer(backend.tokenizer), thinking_budget, **asked)


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


MAX_REPLY = 200_000
_MAX_STARTS = 40
_DECODER = json.JSONDecoder()
_TRAILING_COMMA = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[\]}])', re.DOTALL)
ItemT = TypeVar("ItemT")


def reply_schema(reply: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of a reply: names and types, nothing that servers disagree about."""
    whole = reply.model_json_schema()

    def plain(schema: Mapping[str, Any]) -> dict[str, Any]:
        if "$ref" in schema:
            return plain(whole["$defs"][schema["$ref"].rpartition("/")[2]])
        found = {"type": schema["type"]}
        if schema["type"] == "array":
            found["items"] = plain(schema["items"])
        if schema["type"] == "object":
            found["properties"] = {name: plain(inner) for name, inner in schema["properties"].items()}
            found |= {"required": list(schema["properties"]), "additionalProperties": False}
        return found

    return plain(whole)


def found_json(text: str) -> object:
    """Find the JSON in a reply, whatever stands around it.

    Code fences, prose, trailing commas and an end that is cut off do no harm; of several values the longest counts.

    Raises:
        ValueError: There is none.
    """
    found = max(_values(text[:MAX_REPLY]), key=lambda value: value[0], default=None)
    if found is None:
        raise ValueError(f'holds no JSON object; it begins "{in_short(text, 60)}"')
    return found[1]


def _values(text: str) -> Iterator[tuple[int, object]]:
    """The outermost JSON objects and lists in a text, with their lengths."""
    end = 0
    for match in islice(re.finditer(r"[{\[]", text), _MAX_STARTS):
        start = match.start()
        if start < end:
            continue
        for candidate in (text[start:], _TRAILING_COMMA.sub(lambda match: match[1] or "", text[start:])):
            try:
                value, length = _DECODER.raw_decode(candidate)
            except (ValueError, RecursionError):
                continue
            end = start + length
            yield length, value
            break
        else:
            with suppress(ValueError):  # it is no JSON even so far as it goes
                if partial := pydantic_core.from_json(candidate, allow_partial=True):
                    yield len(candidate), partial


def items(kind: type[ItemT] | Any, data: object, key: str) -> tuple[list[ItemT], list[str]]:
    """Read a reply that is a list, and keep what is valid.

    Returns:
        The valid items, and what is wrong with the others.
    """
    adapter: TypeAdapter[ItemT] = TypeAdapter(kind)
    good: list[ItemT] = []
    bad: list[str] = []
    if isinstance(data, Mapping):
        lists = [value for value in data.values() if isinstance(value, list)]
        data = data.get(key) if isinstance(data.get(key), list) else lists[0] if len(lists) == 1 else [data]
    if not isinstance(data, list) or not data:
        return [], [f'it has no list "{key}" with something in it']
    for number, item in enumerate(data, 1):
        for shape in (item, _unwrapped(item)):
            try:
                good.append(adapter.validate_python(shape))
                break
            except ValidationError as error:
                fault = in_words(error)
        else:
            bad.append(f"{key} #{number}: {fault}")
    return good, bad


def _unwrapped(item: object) -> object:
    """A text that a model has put into an object of its own: {"question": "…"}."""
    only = next(iter(item.values())) if isinstance(item, Mapping) and len(item) == 1 else None
    return only if isinstance(only, str) else item


def in_words(error: ValidationError) -> str:
    """What is wrong with a reply, for the model that wrote it."""
    errors = error.errors(include_url=False, include_input=False)
    said = (" ".join([".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")]) for e in errors)
    return "; ".join(map(str.strip, said))
