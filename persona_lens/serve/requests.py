"""What clients ask: OpenAI's requests with the field ``persona_lens``, looked at before anything runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from persona_lens.core.text import in_short
from persona_lens.monitoring import AlarmKind
from persona_lens.serve.said import Past
from persona_lens.serve.workbench import Asked, drawn_seed
from persona_lens.steering.history import DEFAULT_HISTORY, History

MOST_CHOICES, MOST_PROMPTS, MOST_STOPS, MOST_TOP = 16, 64, 4, 20
Budget = Annotated[int, Field(ge=0, le=1_000_000)]
Text = Annotated[str, Field(max_length=4_000_000)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=1_000_000)]


class RequestError(Exception):
    """A request that cannot be answered.

    Args:
        message: Why.
        status: Of the answer.
        code: OpenAI's word for it.
        param: The field at fault.
    """

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param


class Lens(BaseModel):
    """The field ``persona_lens`` of a request.

    Attributes:
        edits: A steering's notation, or the name of a preset.
        history: What the edits do to finished turns, see `persona_lens.steering.history.History`.
        watch: What is read, such as ``evil@20``; left out, every trait where the server reads it.
        alarms: Such as ``evil>2sd``.
        alarm_on: What alarms listen to.
        stop_on_alarm: An alarm ends the reply.
    """

    model_config = ConfigDict(extra="forbid")

    edits: Annotated[str, Field(max_length=2000)] = ""
    history: Past | None = None
    watch: Annotated[list[Annotated[str, Field(max_length=100)]], Field(min_length=1, max_length=512)] | None = None
    alarms: Annotated[list[Annotated[str, Field(max_length=100)]], Field(max_length=64)] = []
    alarm_on: AlarmKind = AlarmKind.TOKEN
    stop_on_alarm: bool = False


NOTHING: tuple[Any, ...] = (None, [], {}, "")  # what clients send who ask for nothing by a field


def only_what_is_done(body: Any, undone: Mapping[str, Sequence[Any]], place: str = "") -> None:
    """Look that nothing is asked for that is not done, and whose answer would be another one than was wanted.

    Args:
        body: What was sent.
        undone: Fields, and for each what asks for nothing beside `NOTHING`.
        place: Of the body in the request.

    Raises:
        RequestError: Naming the first field that asks for something.
    """
    for name in body if isinstance(body, dict) else ():
        if name in undone and body[name] not in (*NOTHING, *undone[name]):
            field = f"{place}{name}"
            raise RequestError(f"{field} is not done here; leave it out", 400, "unsupported_parameter", field)


class Part(BaseModel):
    """A part of a message; only text can be read."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(max_length=1000)]

    @model_validator(mode="before")
    @classmethod
    def _only_words(cls, body: Any) -> Any:
        only_what_is_done(body, dict.fromkeys(("tool_calls", "function_call", "audio", "refusal"), ()), "messages.")
        if isinstance(body, dict) and body.get("role") == "assistant" and body.get("content") is None:
            return {**body, "content": ""}  # OpenAI has null there where an assistant said nothing
        return body

    @field_validator("content", mode="before")
    @classmethod
    def _only_text(cls, content: Any) -> Any:
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, dict) else part
                raise ValueError(f"parts of messages are to be text here; got {in_short(repr(kind))}")
        return content

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    """What a stream tells beside its tokens."""

    include_usage: bool = False


class Reasoning(BaseModel):
    """How far a model is to reason, as OpenRouter's clients ask it; what else they say there is passed over."""

    max_tokens: Budget | None = None


class Generation(BaseModel):
    """What both kinds of requests have. What real clients send beside it, and says nothing here, is passed over.

    Attributes:
        thinking_budget: How many tokens the model may think, as Qwen's clients name it; vLLM's say
            ``thinking_token_budget``, and OpenRouter's ``reasoning.max_tokens``.
        UNDONE: Fields of OpenAI's that would change the answer if they were not passed over; see `only_what_is_done`.
    """

    UNDONE: ClassVar[dict[str, Sequence[Any]]] = {
        "logit_bias": (),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
    }

    model: Annotated[str, Field(max_length=3000)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = 1
    stop: Annotated[str, Field(max_length=1000)] | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    thinking_budget: Budget | None = None
    thinking_token_budget: Budget | None = None
    reasoning: Reasoning | None = None
    persona_lens: Lens | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_done(cls, body: Any) -> Any:
        only_what_is_done(body, cls.UNDONE)
        return body

    @property
    def most_thinking(self) -> int | None:
        """How many tokens the model may think, under whichever of its names that is sent."""
        reasoning = self.reasoning.max_tokens if self.reasoning else None
        named = (self.thinking_budget, self.thinking_token_budget, reasoning)
        return min((each for each in named if each is not None), default=None)

    @property
    def choices(self) -> int:
        """How many replies are wanted to each prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that replies end before."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    @property
    def room(self) -> int | None:
        """Tokens that a reply may have, if the request says."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """See `Asked`."""
        return None

    @property
    def conversation(self) -> tuple[dict[str, str], ...]:
        """The messages that are to be answered; none where a text is to go on."""
        return ()

    @property
    def top_of_prompt(self) -> bool:
        """See `Asked`."""
        return False

    def asked(self, prompts: Iterable[tuple[int, ...]], edits: str) -> list[Asked]:
        """Every reply that is wanted: the choices of the first prompt, of the second, and so on."""
        lens, seed = self.persona_lens or Lens(), self.seed
        first = drawn_seed() if seed is None else seed % 2**62
        temperature = 1.0 if self.temperature is None else self.temperature
        return [
            Asked(
                prompt,
                self.room,
                temperature,
                1.0 if self.top_p is None else self.top_p,
                first + choice,
                edits,
                None if lens.watch is None else tuple(lens.watch),
                tuple(lens.alarms),
                lens.alarm_on,
                lens.stop_on_alarm,
                self.stops,
                self.top,
                self.conversation,
                DEFAULT_HISTORY if lens.history is None else History(lens.history),
                self.top_of_prompt,
                self.most_thinking,
            )
            for prompt in prompts
            for choice in range(self.choices)
        ]


class ChatRequest(Generation):
    """``/v1/chat/completions``."""

    UNDONE: ClassVar[dict[str, Sequence[Any]]] = {
        **Generation.UNDONE,
        "tools": (),
        "tool_choice": ("none", "auto"),
        "functions": (),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None

    @property
    def conversation(self) -> tuple[dict[str, str], ...]:
        """See `Generation`."""
        return tuple(message.plain() for message in self.messages)

    @property
    def room(self) -> int | None:
        """See `Generation`."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        """See `Asked`."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Generation):
    """``/v1/completions``."""

    UNDONE: ClassVar[dict[str, Sequence[Any]]] = {**Generation.UNDONE, "suffix": (), "best_of": (1,)}

    prompt: Text | Ids | Annotated[list[Text] | list[Ids], Field(min_length=1, max_length=MOST_PROMPTS)]
    max_tokens: Annotated[int, Field(ge=0, le=1_000_000)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    echo: bool | None = False

    @property
    def room(self) -> int | None:
        """See `Generation`; where none is wanted, one is generated to read the prompt."""
        return 1 if self.max_tokens == 0 else self.max_tokens

    @property
    def top_of_prompt(self) -> bool:
        """See `Asked`."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def top(self) -> int | None:
        """See `Asked`."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


class ConversationRequest(BaseModel):
    """``/v1/persona_lens/read``."""

    model_config = ConfigDict(extra="forbid")

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    watch: Annotated[list[Annotated[str, Field(max_length=100)]], Field(min_length=1, max_length=512)] | None = None
    edits: Annotated[str, Field(max_length=2000)] = ""
    history: Past | None = None


class EditsRequest(BaseModel):
    """Presets."""

    model_config = ConfigDict(extra="forbid")

    edits: Annotated[str, Field(max_length=2000)]


class PreviewRequest(EditsRequest):
    """``/v1/persona_lens/preview``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)] | None = None
    history: Past | None = None


_VARIANT = re.compile(r"(constrained|function)-.*|list\[.*")  # how pydantic names one of several types of a field


def read_request(kind: type[BaseModel], body: Any) -> Any:
    """A request of a kind.

    Raises:
        RequestError: Saying what is wrong with it.
    """
    if not isinstance(body, dict):
        raise RequestError("the body is to be a JSON object")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"] if not _VARIANT.fullmatch(str(part))) or "the body"
        raise RequestError(f"{in_short(place)}: {in_short(first['msg'], 300)}", param=in_short(place)) from None


_STRENGTH = r"[+-]\d+(?:\.\d+)?%?"


def steering_in(model: str | None, name: str, traits: Iterable[str]) -> str:
    """The steering in a model's name, such as ``smollm2-135m:optimistic+1.5``: a notation, a preset, or short for one.

    Raises:
        RequestError: If it is another model.
    """
    if not model or model == name:
        return ""
    head, _, steering = model.partition(f"{name}:")
    if head or not steering:
        raise RequestError(f"the model here is {name}, not {in_short(model)!r}", 404, "model_not_found", "model")
    names = "|".join(re.escape(each) for each in sorted(traits, key=len, reverse=True)) or "(?!)"
    short = re.compile(rf"\s*({names})(@(?:all|[\d+-]+?))?({_STRENGTH})\s*")
    terms = [short.fullmatch(term) for term in steering.split(",")]
    return ", ".join(f"{t[1]}{t[2] or ''}:{t[3]}" for t in terms if t) if all(terms) else steering
