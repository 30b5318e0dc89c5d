"""`Sample`: a row as token ids, with the tokens of the answers that count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from persona_lens.errors import PersonaLensError
from persona_lens.monitoring import EncodedTranscript, Transcript, encode_transcript
from persona_lens.monitoring.encoding import encode_one_by_one
from persona_lens.monitoring.transcripts import is_counted
from persona_lens.screening.datasets import GivenRow
from persona_lens.screening.errors import ScreeningError

if TYPE_CHECKING:
    from persona_lens.backend.tokens import TokenIds
    from persona_lens.models import ChatFormat


class Turns(StrEnum):
    """Which answers of a conversation count."""

    LAST = "last"
    ALL = "all"


@dataclass(frozen=True)
class Answer:
    """Tokens of an answer.

    Attributes:
        prompt: How many tokens the model had before it began to answer.
        start: Index of the answer's first token.
        stop: Index behind its last one.
    """

    prompt: int
    start: int
    stop: int


@dataclass(frozen=True)
class Text:
    """Token ids that run together, and the answers in them."""

    ids: TokenIds
    answers: tuple[Answer, ...]

    @property
    def prompts(self) -> tuple[TokenIds, ...]:
        """What the model was given before each answer."""
        return tuple(self.ids[: answer.prompt] for answer in self.answers)


@dataclass(frozen=True)
class Sample:
    """A row as one model's chat template writes it.

    Attributes:
        row: The row.
        texts: Almost always one: several where the answers do not stand in one text, since the template changes earlier
            ones.
    """

    row: GivenRow
    texts: tuple[Text, ...]


def encode_sample(row: GivenRow, chat: ChatFormat, turns: Turns, longest: int | None = None) -> Sample:
    """Encode a row that has messages; boundaries are counted in ids.

    The last answer is encoded by itself after the prompt that it answers. With ``turns`` all, a conversation of several
    answers is encoded once as a whole, or, if its template changes earlier turns, each answer after its own prompt.

    Args:
        row: The row.
        chat: The model's chat format.
        turns: Which answers count.
        longest: Tokens of a text at most.

    Raises:
        ScreeningError: If the template refuses it, the answers are empty, or it is too long; without its place.
    """
    try:
        texts = _texts(row, chat, turns)
    except PersonaLensError as error:
        raise ScreeningError(str(error)) from error
    if not any(answer.stop > answer.start for text in texts for answer in text.answers):
        raise ScreeningError("the response is empty")
    most = max(len(text.ids) for text in texts)
    if longest is not None and most > longest:
        raise ScreeningError(
            f"{most:,} tokens, and {longest:,} are the most that can be taken; cut it, or leave it out"
        )
    return Sample(row, texts)


def text_of(prompt: Sequence[int], response: Sequence[int]) -> Text:
    """An answer behind its prompt."""
    return Text((*prompt, *response), (Answer(len(prompt), len(prompt), len(prompt) + len(response)),))


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
        answers = (Answer((m.prompt_stop or 0) - begin, m.start - begin, m.stop - begin) for m in own)
        texts += [Text(ids, tuple(answers))] if own else []
    return tuple(texts)
