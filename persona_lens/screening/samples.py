"""A row as `Text`s: token ids with the tokens of its answers that count; settings, and windows of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING

from persona_lens.core.documents import Record
from persona_lens.core.errors import PersonaLensError
from persona_lens.data.datasets import Dataset, GivenRow
from persona_lens.data.encoding import EncodedTranscript, encode_one_by_one, encode_transcript
from persona_lens.data.transcripts import Transcript, is_counted

if TYPE_CHECKING:
    from persona_lens.backend.tokens import TokenIds
    from persona_lens.models import ChatFormat


class ScreeningError(PersonaLensError):
    """What cannot be screened; where a row of a dataset is at fault, the message begins with its place."""


class Turns(StrEnum):
    """Which answers of a conversation count."""

    LAST = "last"
    ALL = "all"


class Counted(StrEnum):
    """Which tokens of an answer count, where it begins with reasoning."""

    ALL = "all"
    ANSWER = "answer"
    THINKING = "thinking"


@dataclass(frozen=True)
class Span:
    """Where an answer stands among a text's tokens.

    Attributes:
        prompt: How many tokens the model had before it began to answer.
        start: Index of the answer's first token.
        stop: Index behind its last one.
        counted: Indices of the tokens that count; None for all.
    """

    prompt: int
    start: int
    stop: int
    counted: tuple[int, ...] | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """Indices of the tokens that count."""
        return tuple(range(self.start, self.stop)) if self.counted is None else self.counted


@dataclass(frozen=True)
class Text:
    """Token ids that run together, and the answers in them."""

    ids: TokenIds
    answers: tuple[Span, ...]

    @property
    def prompts(self) -> tuple[TokenIds, ...]:
        """What the model was given before each answer."""
        return tuple(self.ids[: answer.prompt] for answer in self.answers)


def encode_sample(
    row: GivenRow, chat: ChatFormat, turns: Turns, longest: int | None = None, part: Counted = Counted.ALL
) -> tuple[Text, ...]:
    """Encode a row that has messages; boundaries are counted in ids.

    The last answer is encoded by itself after the prompt that it answers. With ``turns`` all, a conversation of several
    answers is encoded once as a whole, or, if its template changes earlier turns, each answer after its own prompt.

    Args:
        row: The row.
        chat: The model's chat format.
        turns: Which answers count.
        longest: Tokens of a text at most.
        part: Which tokens of an answer count.

    Returns:
        Almost always one text: several where the answers do not stand in one.

    Raises:
        ScreeningError: If the template refuses it, the answers are empty, or it is too long; without its place.
    """
    try:
        texts = tuple(counting(text, chat, part) for text in _texts(row, chat, turns))
    except PersonaLensError as error:
        raise ScreeningError(str(error)) from error
    if not any(answer.stop > answer.start for text in texts for answer in text.answers):
        raise ScreeningError("the response is empty")
    if not any(answer.tokens for text in texts for answer in text.answers):
        what = "thinking, marked as this model marks it or as <think>" if part is Counted.THINKING else "answer to it"
        raise ScreeningError(f"the response holds no {what}")
    most = max(len(text.ids) for text in texts)
    if longest is not None and most > longest:
        raise ScreeningError(
            f"{most:,} tokens, and {longest:,} are the most that can be taken; cut it, or leave it out"
        )
    return texts


def text_of(prompt: Sequence[int], response: Sequence[int]) -> Text:
    """An answer behind its prompt."""
    return Text((*prompt, *response), (Span(len(prompt), len(prompt), len(prompt) + len(response)),))


def counting(text: Text, chat: ChatFormat, part: Counted) -> Text:
    """A text whose answers count in part."""
    if part is Counted.ALL:
        return text
    answers = []
    for answer in text.answers:
        parts = chat.parts_of_text(text.ids[: answer.prompt], text.ids[answer.prompt : answer.stop])
        own = [at for at, found in enumerate(parts, answer.prompt) if found.name.lower() == part and at >= answer.start]
        answers.append(replace(answer, counted=tuple(own)))
    return replace(text, answers=tuple(answers))


def _texts(row: GivenRow, chat: ChatFormat, turns: Turns) -> tuple[Text, ...]:
    assert row.messages is not None
    *before, last = row.messages
    answers = [message for message in row.messages[1:] if is_counted(message)]
    if turns is Turns.LAST or len(answers) == 1:
        return (text_of(chat.encode_messages(before), chat.encode_answer(last["content"])),)
    transcript = Transcript(row.messages, row.id, row.line)
    try:
        return _counted(encode_transcript(transcript, chat))
    except PersonaLensError:  # the template changes earlier turns: each answer as it was when it was given
        return _counted(encode_one_by_one(transcript, chat))


def _counted(encoded: EncodedTranscript) -> tuple[Text, ...]:
    """The texts with the answers in them that count and say something."""
    pairs = zip(encoded.messages[1:], encoded.transcript.messages[1:], strict=True)
    said = [message for message, given in pairs if is_counted(given)]
    if any(message.prompt_stop is None for message in said):
        raise ScreeningError("a prompt does not end as the conversation goes on")
    texts = []
    for begin, ids in zip(encoded.starts, encoded.texts, strict=True):
        own = [m for m in said if m.prompt_stop and m.stop > m.start and begin <= m.start < begin + len(ids)]
        answers = (Span((m.prompt_stop or 0) - begin, m.start - begin, m.stop - begin) for m in own)
        texts += [Text(ids, tuple(answers))] if own else []
    return tuple(texts)


class BaseResponses(StrEnum):
    """Where the base model's own responses come from, against which the projection difference is taken."""

    NONE = "none"
    GENERATE = "generate"
    SUPPLIED = "supplied"


@dataclass(frozen=True)
class ScreeningSettings(Record):
    """How samples are scored; every field is part of a run's configuration.

    Attributes:
        turns: Which answers count.
        part: Which tokens of an answer count: all, those of its thinking (as this model marks it, or ``<think>``), or
            those behind it. Rows without any are rejected.
        base: Where base responses come from.
        base_share: Share of the rows, drawn at random, that get a base response.
        base_samples: Base responses that are generated to each prompt. The mean over several is nearer to what the
            model would say than any one of them, and so a row's difference holds less noise.
        temperature: Of generated base responses; 0 is greedy, and allows for one of them.
        max_new_tokens: Length limit of a generated base response.
        thinking_budget: How many tokens a model may think before it has to answer with one; None does not limit it.
        max_tokens: Rows with a longer text are rejected; None takes what the model takes.
        look_ahead: Rows that are encoded before the first of them is scored, so that those of like length run together.
        batch_tokens: Tokens that run at once at most, padding included; None takes what the device is fast at.
        batch_size: Rows that run at once at most; base responses to one prompt always run together.
        seed: Of every random choice.

    Raises:
        ScreeningError: If a value is out of range.
    """

    unsaid = frozenset({"part", "thinking_budget"})

    turns: Turns = Turns.LAST
    part: Counted = Counted.ALL
    base: BaseResponses = BaseResponses.NONE
    base_share: float = 1.0
    base_samples: int = 1
    temperature: float = 0.0
    max_new_tokens: int = 128
    max_tokens: int | None = None
    look_ahead: int = 256
    batch_tokens: int | None = None
    batch_size: int = 64
    seed: int = 0
    thinking_budget: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.base_share <= 1:
            raise ScreeningError(f"the share of rows with a base response is above 0 and at most 1: {self.base_share}")
        if self.base_share < 1 and self.base is BaseResponses.NONE:
            raise ScreeningError("a share of base responses asks for base responses; generate or supply them")
        if not 0 <= self.temperature < float("inf"):
            raise ScreeningError(f"the temperature of base responses is 0 (greedy) or more, got {self.temperature}")
        sampled = self.base_samples != 1 or self.temperature or self.thinking_budget is not None
        if self.base is not BaseResponses.GENERATE and sampled:
            raise ScreeningError(
                "samples, temperature and thinking budget are for base responses that are generated; ask for these"
            )
        if (self.thinking_budget or 0) < 0:
            raise ScreeningError(f"the thinking budget is 0 tokens or more, got {self.thinking_budget}")
        if self.base_samples > 1 and not self.temperature:
            raise ScreeningError("greedy base responses to a prompt are all the same; set a temperature for several")
        if self.base is BaseResponses.SUPPLIED and self.turns is Turns.ALL:
            raise ScreeningError("supplied base responses answer the last prompt; take turns 'last' with them")
        for name in ("base_samples", "max_new_tokens", "max_tokens", "look_ahead", "batch_tokens", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ScreeningError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Window:
    """Rows that follow each other.

    Attributes:
        dataset: Which dataset they are of, from 0.
        number: Which window of the dataset it is, from 0.
        name: The dataset's name.
        rows: The rows, bad ones too.
    """

    dataset: int
    number: int
    name: str
    rows: tuple[GivenRow, ...]


def windows_of(datasets: Sequence[Dataset], size: int, start: tuple[int, int] = (0, 0)) -> Iterator[Window]:
    """Cut datasets into windows, the same ones however often it is asked.

    Args:
        datasets: In their order.
        size: Rows of a window.
        start: Dataset and window to begin with; what is before is read past, not encoded.
    """
    for number in range(start[0], len(datasets)):
        dataset = datasets[number]
        rows = iter(dataset)
        window = start[1] if number == start[0] else 0
        if window:
            next(islice(rows, window * size - 1, None), None)
        while taken := tuple(islice(rows, size)):
            yield Window(number, window, dataset.name, taken)
            window += 1
