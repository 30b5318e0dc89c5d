"""`ConversationMonitor`: a conversation whose traits are read turn by turn, while the model answers or afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.backend import Backend, Edit, Part, Sampling, TokenBatch
from persona_lens.backend.batches import context_length
from persona_lens.backend.tokens import TokenIds
from persona_lens.core.marks import may_hold_marks
from persona_lens.models import ChatFormat, Message
from persona_lens.models.chat import chat_format, note_reasoning
from persona_lens.models.reasoning import stretches
from persona_lens.monitoring.alarms import Alarm
from persona_lens.monitoring.gauges import MonitoringError, Panel, TraitReading
from persona_lens.monitoring.reply import TokenReading, TurnMeter, listening, watched_reply
from persona_lens.steering.given import GivenEdits, GivenVectors, given_edits
from persona_lens.steering.history import DEFAULT_HISTORY, History, conversation_edits, turn_edits, turn_prompt


@dataclass(frozen=True, eq=False)
class Turn:
    """A turn of the assistant.

    Attributes:
        number: Counted from 0.
        message: Which message of the conversation it is.
        text: What was said.
        readings: One for each gauge, in their order.
        token_values: float32 [tokens, gauges]; None where they are not kept.
        stopped: Whether an alarm ended the reply.
        parts: For each token of a reply ``thinking`` or ``answer``; empty where it holds no thinking.
    """

    number: int
    message: int
    text: str
    readings: tuple[TraitReading, ...]
    token_values: Float[Tensor, "tokens gauges"] | None = None
    stopped: bool = False
    parts: tuple[str, ...] = ()


class ConversationMonitor:
    """Reads traits off a conversation. Keeps the messages and a few numbers a turn, never activations.

    With `reply` the model answers here and alarms sound while it does. A chat loop that generates elsewhere shows its
    messages to `observe`. Both may be used in turns.

    Args:
        backend: The model.
        panel: What is read, such as ``Panel.of([evil, optimistic], layers=18)``.
        chat: Chat format; the model's own by default.
        system: System prompt.
        alarms: Who is told when a value goes too far, such as ``Alarm.parse("evil>2sd", print)``.
        on_token: Told of every token that `reply` generates, as it comes.
        keep_tokens: Keep the values of every reply's tokens, a float a gauge and token.
        allow_other_model: Use vectors that belong to another model.

    Raises:
        VectorsError: If vectors belong to another model.
        MonitoringError: If an alarm listens to what is not monitored, or counts from a baseline that is not there.
    """

    def __init__(
        self,
        backend: Backend,
        panel: Panel,
        *,
        chat: ChatFormat | None = None,
        system: str | None = None,
        alarms: Sequence[Alarm] = (),
        on_token: Callable[[TokenReading], None] | None = None,
        keep_tokens: bool = True,
        allow_other_model: bool = False,
    ) -> None:
        panel.check_model(backend, allow_other_model=allow_other_model)
        self._alarms = listening(panel, alarms, backend, allow_other_model=allow_other_model)
        self.panel = panel
        self._backend = backend
        self._chat = chat or chat_format(backend)
        note_reasoning(self._chat)
        self._on_token = on_token
        self._keep_tokens = keep_tokens
        self._messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[Turn] = []

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far."""
        return tuple(self._messages)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The assistant's turns so far."""
        return tuple(self._turns)

    def stand(self, messages: Sequence[Message]) -> None:
        """Go on from other messages, such as those of another branch; they are not read again.

        Args:
            messages: The whole conversation. Turns of what it has in common with the one so far stay.
        """
        given = [dict(message) for message in messages]
        pairs = enumerate(zip(given, self._messages, strict=False))
        common = next((at for at, (new, old) in pairs if new != dict(old)), min(len(given), len(self._messages)))
        self._turns = [turn for turn in self._turns if turn.message < common]
        self._messages = list(given)

    def trajectory(self) -> tuple[TraitReading, ...]:
        """Every gauge at every turn, turn by turn: the rows of a table."""
        return tuple(reading for turn in self._turns for reading in turn.readings)

    def reply(
        self,
        user: str,
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        edits: GivenEdits = (),
        vectors: GivenVectors = None,
        history: History | str = DEFAULT_HISTORY,
        thinking_budget: int | None = None,
    ) -> Turn:
        """Let the model answer, read while it does, and add both messages to the conversation.

        Where an error ends the generation the conversation is as it was.

        Args:
            user: User message.
            max_new_tokens: Length limit in tokens.
            temperature: 0 is greedy.
            top_p: Nucleus of the sampling.
            seed: Of the sampling; of no meaning to greedy replies.
            edits: Applied throughout: one, several, a steering, or its notation; values are those after them.
            vectors: Those that a notation names.
            history: What the edits do to earlier turns, see `persona_lens.steering.history.History`.
            thinking_budget: How many tokens the model may think before it has to answer; None does not limit it.

        Raises:
            HistoryError: If the edits cannot be carried out with such a history.
            MonitoringError: If the conversation has become too long for the model.
            WatchError: If the backend cannot be watched.
        """
        written: Sequence[Edit] = given_edits(edits, vectors, self._backend)
        asked: list[Message] = [*self._messages, {"role": "user", "content": user}]
        prompt = self._chat.encode_messages(asked)
        self._check_length(len(prompt), max_new_tokens)
        written = conversation_edits(written, self._chat, asked, History(history))
        meter = TurnMeter(self.panel, self._alarms, self._number(len(asked)))
        seeds = (seed,) if temperature else None
        sampling = Sampling(max_new_tokens, temperature, top_p, seeds, thinking_budget=thinking_budget)
        reply = watched_reply(self._backend, meter, prompt, sampling, written, on_token=self._on_token)
        text = self._chat.answer(reply.ids)
        self._messages = [*asked, {"role": "assistant", "content": text}]
        return self._finish(meter, len(asked), text, reply.stopped, self._chat.stretches(prompt, reply.ids))

    def observe(
        self,
        messages: Sequence[Message],
        edits: GivenEdits = (),
        vectors: GivenVectors = None,
        history: History | str = DEFAULT_HISTORY,
    ) -> tuple[Turn, ...]:
        """Read the assistant's messages that have come since, in one forward pass.

        Args:
            messages: The whole conversation; it begins with what was seen before.
            edits: What the replies were generated under, in any of these forms.
            vectors: Those that a notation names.
            history: How each reply found the turns before it, as `reply` takes it.

        Returns:
            The new turns.

        Raises:
            MonitoringError: If the conversation is not the one seen before gone on, or is too long for the model.
        """
        written = given_edits(edits, vectors, self._backend)
        known = len(self._messages)
        begun = [dict(message) for message in messages[:known]]
        if begun != [dict(message) for message in self._messages]:
            at = next((i for i, (a, b) in enumerate(zip(begun, self._messages, strict=False)) if a != b), len(begun))
            raise MonitoringError(
                f"message {at} is not the one seen before: a monitor follows one conversation as it goes on; show it "
                "the messages from the first one on, or make a new monitor"
            )
        new = [i for i in range(known, len(messages)) if messages[i].get("role") == "assistant"]
        if any(i == 0 for i in new):
            raise MonitoringError("the conversation begins with the assistant: there is no prompt to read before it")
        answers = [self._answer(messages, i) for i in new]
        values = self._values(messages, new, answers, written, History(history))
        self._messages = [dict(message) for message in messages]
        turns = []
        for message, answer, each in zip(new, answers, values, strict=True):
            text, meter = self._messages[message]["content"], TurnMeter(self.panel, self._alarms, self._number(message))
            told = self._chat.parts_of_text(*answer) if may_hold_marks(text) else (Part.ANSWER,) * len(answer[1])
            meter.prompt(each[0])
            for value, part in zip(each[1:], told, strict=True):
                meter.token(value, part)
            turns.append(self._finish(meter, message, text, False, stretches(told)))
        return tuple(turns)

    def _answer(self, messages: Sequence[Message], index: int) -> tuple[TokenIds, TokenIds]:
        prompt = tuple(self._chat.encode_messages(messages[:index]))
        return prompt, tuple(self._chat.encode_answer(messages[index]["content"]))

    def _values(
        self,
        messages: Sequence[Message],
        new: Sequence[int],
        answers: Sequence[tuple[TokenIds, TokenIds]],
        edits: Sequence[Edit],
        history: History,
    ) -> list[Tensor]:
        """The values of each new answer's tokens behind that of its last prompt token.

        As few texts run as hold every answer after its own prompt: one, unless the template rewrites earlier turns, or
        an answer found those before it otherwise than they were made.
        """
        apart = bool(edits) and history is History.CLEAN
        texts: dict[TokenIds, list[int]] = {}  # with the answers in it, the last of which it ends with
        for number in reversed(range(len(answers))):
            prompt, answer = answers[number]
            own = prompt + answer
            holding = (text for text in texts if text[: len(own)] == own and not apart)
            texts.setdefault(next(holding, own), []).append(number)
        if not texts:
            return []
        self._check_length(max(map(len, texts)), 0)
        ending = [answers[held[0]] for held in texts.values()]
        batch = TokenBatch.of([prompt for prompt, _ in ending], [answer for _, answer in ending])
        if edits:
            prompts = [turn_prompt(self._chat, messages[: new[held[0]]]) for held in texts.values()]
            edits = turn_edits(edits, prompts, history, batch.responses)
        projections = self._backend.forward(batch, edits, [self.panel.read]).reads["projections"]
        found: dict[int, Tensor] = {}
        for row, (text, held) in enumerate(texts.items()):
            values = self.panel.values(projections[row, :, -len(text) :])
            for number in held:
                prompt, answer = answers[number]
                found[number] = values[len(prompt) - 1 : len(prompt) + len(answer)]
        return [found[number] for number in range(len(answers))]

    def _finish(self, meter: TurnMeter, message: int, text: str, stopped: bool, parts: tuple[str, ...] = ()) -> Turn:
        number = self._number(message)
        said = torch.stack(meter.said) if meter.said else torch.empty(0, len(self.panel.gauges))
        parts = parts[: len(said)]
        readings = self.panel.readings(number, said, meter.before, parts)
        turn = Turn(number, message, text, readings, said if self._keep_tokens else None, stopped, parts)
        self._turns.append(turn)
        meter.finish()
        return turn

    def _number(self, message: int) -> int:
        """Which turn of the assistant a message is."""
        return sum(each["role"] == "assistant" for each in self._messages[:message])

    def _check_length(self, prompt: int, new: int) -> None:
        limit = context_length(self._backend)
        if limit is not None and prompt + new > limit:
            asked = f"{prompt} tokens and up to {new} new ones" if new else f"{prompt} tokens"
            raise MonitoringError(
                f"the conversation has become too long: {asked}, and the model takes {limit}; begin a new one, or "
                "allow for fewer new tokens"
            )
