"""`SimulatedUsers`: people played by a model, here or on a server, who answer what they are told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from persona_lens.backend import Backend
from persona_lens.backend.batches import batches_by_length, check_fits, context_length, generate_rows
from persona_lens.data.scripted import Scripted
from persona_lens.extraction.conversations import Conversation
from persona_lens.extraction.experiment import Variant
from persona_lens.models import ChatFormat, Message
from persona_lens.models.reasoning import answer_text
from persona_lens.models.server import Completion, CompletionRequest, CompletionServer, Refused, Usage
from persona_lens.monitoring.gauges import MonitoringError
from persona_lens.runs.cost import Call, Work, generating_work
from persona_lens.runs.rollouts import row_seed
from persona_lens.runs.settings import RolloutSettings, settings_json

SEEDS = 2**31  # servers keep a seed as a signed number of 32 or 64 bits
BEGIN = "(The conversation begins. Write the first message.)"
NOTHING = "(no answer)"  # chat templates may refuse, or drop, a message without text
SILENCE = "…"
WORK = "messages of the users"
PART = """\
You play a person who writes to an AI assistant. You are not the assistant: what you are told in this conversation are \
the assistant's replies, and what you write is what the person writes back.

This is the person:
<person>
{about}
</person>

Stay this person throughout. Write their next message and nothing else: one to four sentences, in the first person and \
in their own way of writing, without quotation marks, stage directions or a name in front. Take up what the assistant \
has just said, and let the conversation go where this person would take it, a little further with every message. Do \
not help the assistant, do not speak in its place, and do not say goodbye."""


class UserModel(Protocol):
    """A model that plays people."""

    def write(self, conversations: Sequence[Sequence[Message]], seeds: Sequence[int]) -> list[str]:
        """What it says next in each of several conversations.

        Args:
            conversations: Each begins with a system prompt and ends with what was said to it (role ``user``).
            seeds: Of its sampling, one for each.

        Raises:
            PersonaLensError: If it cannot.
        """
        ...

    def work(self, conversations: Sequence[Sequence[Message]]) -> Work:
        """What writing in these conversations would ask, texts being as long as they may be; nothing runs.

        Raises:
            ContextError: If one is too long for the model.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Which model it is and how it writes, for the record of a run; never a key."""
        ...


@dataclass(frozen=True)
class LocalUser:
    """A model that runs here.

    Attributes:
        backend: The model.
        chat: Its chat format.
        settings: How it writes; every batch runs within its sizes.
    """

    backend: Backend
    chat: ChatFormat
    settings: RolloutSettings = field(default_factory=lambda: RolloutSettings(max_new_tokens=80))

    def write(self, conversations: Sequence[Sequence[Message]], seeds: Sequence[int]) -> list[str]:
        """See `UserModel.write`.

        Raises:
            ContextError: If a conversation has become too long for it.
        """
        written = [""] * len(conversations)
        for batch, (prompts, sampling, *_) in self._calls(conversations, seeds):
            made = generate_rows(self.backend, prompts, sampling)
            for number, ids in zip(batch, made.responses, strict=True):
                written[number] = self.chat.answer(ids)
        return written

    def work(self, conversations: Sequence[Sequence[Message]]) -> Work:
        """See `UserModel.work`."""
        calls = [call for _, call in self._calls(conversations, range(len(conversations)))]
        return generating_work(WORK, self.backend, calls)

    def _calls(
        self, conversations: Sequence[Sequence[Message]], seeds: Sequence[int]
    ) -> Iterator[tuple[list[int], Call]]:
        """Batches of conversations, and what the model is called with for each."""
        prompts = [tuple(self.chat.encode_messages(each)) for each in conversations]
        new = self.settings.max_new_tokens
        check_fits(context_length(self.backend), map(len, prompts), new)
        longest = [len(prompt) + new for prompt in prompts]
        for batch in batches_by_length(longest, self.settings.batch_size, self.settings.batch_tokens):
            sampling = self.settings.sampling([seeds[number] for number in batch])
            yield batch, ([prompts[number] for number in batch], sampling, (), ())

    def describe(self) -> dict[str, Any]:
        """See `UserModel.describe`."""
        info = self.backend.info
        named = {name: getattr(info, name) for name in ("model", "revision", "weights", "backend", "dtype")}
        return {**named, "chat": self.chat.digest, **_written_how(self.settings)}


@dataclass(frozen=True)
class ServerUser:
    """A model on an OpenAI-compatible server.

    Attributes:
        server: Where it is.
        settings: How it writes.
    """

    server: CompletionServer
    settings: RolloutSettings = field(default_factory=lambda: RolloutSettings(max_new_tokens=80))

    def write(self, conversations: Sequence[Sequence[Message]], seeds: Sequence[int]) -> list[str]:
        """See `UserModel.write`.

        Raises:
            MonitoringError: If the server does not take a request.
            ServerError: If the server cannot be reached or used, or fails again and again.
            SpendingLimitError: If the limit is reached.
        """
        answers = self.server.complete(list(map(self._request, conversations, seeds)))
        if refused := next((each for each in answers if isinstance(each, Refused)), None):
            raise MonitoringError(f"the model that plays the users does not go on: {refused.reason}; choose another")
        # Without a parser of its own a server leaves what a model thought in what it says.
        return [answer_text(answer.text) for answer in answers if isinstance(answer, Completion)]

    def work(self, conversations: Sequence[Sequence[Message]]) -> Work:
        """See `UserModel.work`."""
        usage = sum((self._request(each, 0).tokens() for each in conversations), Usage())
        prices = self.server.spending.prices
        return Work(WORK, usage.requests, usage.requests, usage.tokens, cost=prices.cost(usage) if prices else None)

    def _request(self, conversation: Sequence[Message], seed: int) -> CompletionRequest:
        messages = tuple((message["role"], message["content"]) for message in conversation)
        settings = self.settings.for_server()
        return CompletionRequest(messages, settings.max_new_tokens, settings.temperature, settings.top_p, seed % SEEDS)

    def describe(self) -> dict[str, Any]:
        """See `UserModel.describe`."""
        settings = self.server.settings
        return {"model": settings.model, "server": settings.shown, **_written_how(self.settings)}


def _written_how(settings: RolloutSettings) -> dict[str, Any]:
    names = ("max_new_tokens", "temperature", "top_p", "thinking_budget")
    return {name: said for name, said in settings_json(settings).items() if name in names}


@dataclass(frozen=True)
class SimulatedUsers:
    """Says what people say next, as `persona_lens.extraction.conversations.Conversations` asks.

    A conversation opens with the first message that the person's script has, so that all models are met alike; from
    then on the model speaks, which is told who the person is and is shown the conversation from their side.

    Attributes:
        model: Who plays them.
        seed: Base of the seeds.
    """

    model: UserModel
    seed: int = 0

    def __call__(self, conversations: Sequence[Conversation]) -> list[str]:
        """The next message of each conversation; one without text is three dots."""
        said = [each.user.turns[0] if not each.exchanges else "" for each in conversations]
        going = [number for number, each in enumerate(conversations) if each.exchanges]
        if going:
            shown = [seen_by(conversations[number]) for number in going]
            seeds = [
                row_seed(self.seed, "user", conversations[number].user.name, len(conversations[number].exchanges))
                for number in going
            ]
            for number, text in zip(going, self.model.write(shown, seeds), strict=True):
                said[number] = text.strip() or SILENCE
        return said

    def work(self, users: Sequence[Scripted], reached: Sequence[int], words: str) -> Work:
        """What the model would be asked when conversations have had so many turns, if all texts were these words.

        Raises:
            ContextError: If a conversation is too long for it.
        """
        turns = [((user.turns[0], words), *[(words, words)] * (count - 1)) for count in reached for user in users]
        people = [user for _ in reached for user in users]
        supposed = (Conversation(0, user, Variant({}), said) for user, said in zip(people, turns, strict=True))
        return self.model.work([seen_by(each) for each in supposed])

    def describe(self) -> dict[str, Any]:
        """Who plays the people, for the record of a run."""
        return {**self.model.describe(), "instruction": PART}


def seen_by(conversation: Conversation) -> list[Message]:
    """A conversation from the person's side: they are its assistant, and the model that they write to is its user."""
    messages: list[Message] = [
        {"role": "system", "content": PART.format(about=who(conversation.user))},
        {"role": "user", "content": BEGIN},
    ]
    for said, told in conversation.exchanges:
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": told.strip() or NOTHING}]
    return messages


def who(user: Scripted) -> str:
    """What there is to tell of a person."""
    return user.about or f"Somebody who talks about {user.domain}."


def described(users: SimulatedUsers | None) -> Mapping[str, Any] | None:
    """Who plays the people; None where they follow their scripts."""
    return None if users is None else users.describe()
