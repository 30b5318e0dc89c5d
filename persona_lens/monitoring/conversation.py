"""`ConversationMonitor`: a conversation whose traits are read turn by turn, while the model answers or afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from persona_lens.backend import Backend, Sampling, StopGeneration, TokenBatch, Watch, WatchedTokens, watched_generation
from persona_lens.backend.batches import context_length
from persona_lens.backend.tokens import TokenIds
from persona_lens.models import ChatFormat, Message
from persona_lens.models.chat import chat_format, note_reasoning
from persona_lens.monitoring.curves import MonitoringError
from persona_lens.monitoring.gauges import Alarm, Panel, TokenReading, TurnMeter
from persona_lens.steering.replies import GivenEdits, GivenVectors, given_edits


@dataclass(frozen=True)
class TraitReading:
    """One trait at one layer over one turn of the assistant, in residual-stream units.

    Attributes:
        turn: Number of the assistant's turn, from 0.
        trait: Name of the trait.
        layer: Block index, 0-based.
        tokens: Tokens of the reply.
        mean: Mean over them; NaN for an empty reply.
        highest: Largest of them; NaN for an empty reply.
        prompt_last: Value at the last prompt token, before anything was said.
    """

    turn: int
    trait: str
    layer: int
    tokens: int
    mean: float
    highest: float
    prompt_last: float


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
    """

    number: int
    message: int
    text: str
    readings: tuple[TraitReading, ...]
    token_values: Float[Tensor, "tokens gauges"] | None = None
    stopped: bool = False


class ConversationMonitor:
    """Reads traits off a conversation. Keeps the messages and a few numbers a turn, never activations.

    With `reply` the model answers here and alarms sound while it does. A chat loop that generates elsewhere shows its
    messages to `observe`. Both may be used in turns.

    Args:
        backend: The model.
        panel: What is read, such as ``Panel.of([evil, optimistic], layers=18)``.
        chat: Chat format; the model's own by default.
        system: System prompt.
        alarms: Who is told when a value goes too far.
        on_token: Told of every token that `reply` generates, as it comes.
        keep_tokens: Keep the values of every reply's tokens, a float a gauge and token.
        allow_other_model: Use vectors that belong to another model.

    Raises:
        VectorsError: If vectors belong to another model.
        MonitoringError: If an alarm listens to what is not monitored.
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
        for gauge in panel.gauges if not allow_other_model else ():
            gauge.vectors.check_model(backend)
        for alarm in alarms:
            panel.find(alarm.trait, alarm.layer)
        self.panel = panel
        self._backend = backend
        self._chat = chat or chat_format(backend)
        note_reasoning(self._chat)
        self._alarms = tuple(alarms)
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

        Raises:
            MonitoringError: If the conversation has become too long for the model.
            WatchError: If the backend cannot be watched.
        """
        written = given_edits(edits, vectors, self._backend)
        asked: list[Message] = [*self._messages, {"role": "user", "content": user}]
        prompt = self._chat.encode_messages(asked)
        self._check_length(len(prompt), max_new_tokens)
        meter = self._meter()
        stopped = False

        def on_tokens(tokens: WatchedTokens) -> None:
            nonlocal stopped
            values = self.panel.values(tokens.projections[0])[-1]
            stopped = meter.token(values) if tokens.step else meter.prompt(values)
            if tokens.step and self._on_token is not None:
                token = int(tokens.ids[0, -1])
                self._on_token(TokenReading(len(self._turns), meter.tokens - 1, token, values, meter.means))
            if stopped:
                raise StopGeneration

        sampling = Sampling(max_new_tokens, temperature, top_p, seeds=(seed,) if temperature else None)
        watch = Watch(self.panel.directions, on_tokens, self.panel.layers)
        generation = watched_generation(self._backend, [prompt], sampling, watch, written)
        text = self._chat.answer(generation.responses[0])
        self._messages = [*asked, {"role": "assistant", "content": text}]
        return self._finish(meter, len(asked), text, stopped)

    def observe(
        self, messages: Sequence[Message], edits: GivenEdits = (), vectors: GivenVectors = None
    ) -> tuple[Turn, ...]:
        """Read the assistant's messages that have come since, in one forward pass.

        Args:
            messages: The whole conversation; it begins with what was seen before.
            edits: What the replies were generated under, in any of these forms.
            vectors: Those that a notation names.

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
        if not messages:
            return ()
        rows = _rows([self._answer(messages, i) for i in new])
        read: dict[int, Turn] = {}
        if rows:
            self._check_length(max(len(row.prompt) + len(row.response) for row in rows), 0)
            text = TokenBatch.of([row.prompt for row in rows], [row.response for row in rows])
            projections = self._backend.forward(text, written, [self.panel.read]).reads["projections"]
            found = {
                index: (projections[number, :, -(len(row.prompt) + len(row.response)) :], start, stop)
                for number, row in enumerate(rows)
                for index, (start, stop) in row.answers.items()
            }
        self._messages = [dict(message) for message in messages]
        for number in range(len(new)):
            projected, start, stop = found[number]
            read[number] = self._read(projected, start, stop, new[number])
        return tuple(read.values())

    def _answer(self, messages: Sequence[Message], index: int) -> tuple[TokenIds, TokenIds]:
        prompt = tuple(self._chat.encode_messages(messages[:index]))
        return prompt, tuple(self._chat.encode_answer(messages[index]["content"]))

    def _read(self, projections: Float[Tensor, "layers tokens k"], start: int, stop: int, message: int) -> Turn:
        meter = self._meter()
        values = self.panel.values(projections[:, start - 1 : stop])
        meter.prompt(values[0])
        for value in values[1:]:
            meter.token(value)
        return self._finish(meter, message, self._messages[message]["content"], False)

    def _meter(self) -> TurnMeter:
        return TurnMeter(self.panel, self._alarms, len(self._turns), self._keep_tokens)

    def _finish(self, meter: TurnMeter, message: int, text: str, stopped: bool) -> Turn:
        number, columns = len(self._turns), (meter.means, meter.highest, meter.prompt_last)
        readings = tuple(
            TraitReading(number, gauge.trait, gauge.layer, meter.tokens, *(float(column[i]) for column in columns))
            for i, gauge in enumerate(self.panel.gauges)
        )
        turn = Turn(number, message, text, readings, meter.values, stopped)
        self._turns.append(turn)
        meter.finish()
        return turn

    def _check_length(self, prompt: int, new: int) -> None:
        limit = context_length(self._backend)
        if limit is not None and prompt + new > limit:
            asked = f"{prompt} tokens and up to {new} new ones" if new else f"{prompt} tokens"
            raise MonitoringError(
                f"the conversation has become too long: {asked}, and the model takes {limit}; begin a new one, or "
                "allow for fewer new tokens"
            )


@dataclass(frozen=True)
class _Row:
    """A text, and the places of answers in it by their number."""

    prompt: TokenIds
    response: TokenIds
    answers: dict[int, tuple[int, int]]


def _rows(answers: Sequence[tuple[TokenIds, TokenIds]]) -> list[_Row]:
    """As few texts as hold every answer after its own prompt: one, unless the template rewrites earlier turns."""
    rows: list[_Row] = []
    for number in reversed(range(len(answers))):
        prompt, answer = answers[number]
        start, stop = len(prompt), len(prompt) + len(answer)
        text = prompt + answer
        holder = next((row for row in rows if (row.prompt + row.response)[:stop] == text), None)
        if holder is None:
            holder = _Row(prompt, answer, {})
            rows.append(holder)
        holder.answers[number] = (start, stop)
    return rows
