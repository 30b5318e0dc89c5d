"""`EncodedTranscript`: a conversation as token ids, with the tokens of each message; or one answer at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from persona_lens.data.pieces import TokenPiece, whole_pieces
from persona_lens.data.tables import DataError
from persona_lens.data.transcripts import Transcript
from persona_lens.models import ModelError

if TYPE_CHECKING:
    from persona_lens.backend.tokens import TokenIds
    from persona_lens.models import ChatFormat, Message

_ADVICE = "encode its answers one by one, each after its own prompt (encode_one_by_one)"


@dataclass(frozen=True)
class EncodedMessage:
    """A message's place among a conversation's tokens.

    Attributes:
        role: Who wrote it.
        start: Index of the first token of its content.
        stop: Index behind the last one; equal to ``start`` where the content is empty.
        prompt_stop: Of an assistant's message: how many tokens the model had before it when it began to answer, so that
            ``prompt_stop - 1`` is the last prompt token. None for other roles, and where the template ends a prompt
            otherwise than it writes the same place in a conversation that has gone on.
    """

    role: str
    start: int
    stop: int
    prompt_stop: int | None = None


@dataclass(frozen=True)
class EncodedTranscript:
    """A conversation as one model's chat template writes it.

    Attributes:
        transcript: The conversation.
        ids: All token ids, those of the template included.
        messages: Where each message's content is, in the order of ``transcript.messages``. Headers, ends of turn and
            control tokens belong to none.
        starts: Where texts begin that run by themselves: one, unless the answers were encoded one by one. Then
            messages of other roles, which stand in several of them, are empty here.
    """

    transcript: Transcript
    ids: TokenIds
    messages: tuple[EncodedMessage, ...]
    starts: tuple[int, ...] = (0,)

    @property
    def texts(self) -> tuple[TokenIds, ...]:
        """The ids of what runs by itself, in order."""
        return tuple(self.ids[begin:end] for begin, end in pairwise((*self.starts, len(self.ids))))


class UnfollowedError(DataError):
    """A conversation whose messages cannot be found in its tokens, though its answers can be encoded one by one."""


def encode_transcript(transcript: Transcript, chat: ChatFormat) -> EncodedTranscript:
    """Encode a whole conversation at once, and find every message's tokens in it.

    The ids are those of the rendered template, encoded once. Boundaries are found from them: each token's text is taken
    from its id (as `persona_lens.data.pieces.token_pieces` does), so that each has its place in the rendered text, in
    which the contents stand between what the template writes around any content. A token belongs to a message if it
    lies within its content, or has more of it than white space.

    Raises:
        UnfollowedError: If the template changes a message or leaves it out (many cut reasoning from earlier answers),
            or the tokenizer does not give back the text it was given.
        DataError: If a content holds a control token of the model.
        ModelError: If the template refuses the conversation.
    """
    messages = transcript.messages
    text = chat.rendered_text(None, messages=messages, add_generation_prompt=False)
    ids = tuple(chat.encode_messages(messages, add_generation_prompt=False))
    pieces = whole_pieces(chat.tokenizer, ids)
    if "".join(piece.text for piece in pieces) != text:
        raise UnfollowedError(
            f"{transcript.place}: the tokenizer does not give back the conversation's text (it changes spaces or "
            f"characters), so that its messages cannot be found in the tokens; {_ADVICE}"
        )
    places = _places(transcript, text, _around(transcript, chat))
    spans = _spans(transcript, pieces, places)
    encoded = [
        EncodedMessage(message["role"], start, stop, _prompt_stop(messages, place, ids, start, chat))
        for place, (message, (start, stop)) in enumerate(zip(messages, spans, strict=True))
    ]
    return EncodedTranscript(transcript, ids, tuple(encoded))


def encode_one_by_one(transcript: Transcript, chat: ChatFormat) -> EncodedTranscript:
    """Encode each answer after the prompt that the model would be given before it, as when it was generated.

    That works with every template, at the price of encoding, and later running, earlier turns once for each answer.

    Returns:
        One text for each answer, behind the others; messages that answer nothing are empty.

    Raises:
        DataError: If there is no answer to anything.
        ModelError: If the template refuses the conversation, or a part of it that ends before an answer.
    """
    ids: list[int] = []
    starts: list[int] = []
    messages = [EncodedMessage(message["role"], 0, 0) for message in transcript.messages]
    for index, message in enumerate(transcript.messages):
        if message["role"] == "assistant" and index:
            starts.append(len(ids))
            ids += chat.encode_messages(transcript.messages[:index])
            begin = len(ids)
            ids += chat.encode_answer(message["content"])
            messages[index] = EncodedMessage("assistant", begin, len(ids), begin)
    if not starts:
        raise DataError(f"{transcript.place}: the conversation has no answer of an assistant to a message")
    return EncodedTranscript(transcript, tuple(ids), tuple(messages), tuple(starts))


def _around(transcript: Transcript, chat: ChatFormat) -> list[str]:
    """What the template writes before, between and behind the contents, found with contents like no other text."""
    marks = [f"zebra{place}kettle" for place in range(len(transcript.messages))]
    pairs = zip(transcript.messages, marks, strict=True)
    probes = [{"role": message["role"], "content": mark} for message, mark in pairs]
    rest = chat.rendered_text(None, messages=probes, add_generation_prompt=False)
    found = []
    for place, mark in enumerate(marks):
        if rest.count(mark) != 1:
            what = "leaves out" if mark not in rest else "repeats"
            raise UnfollowedError(f"{transcript.place}: the chat template {what} message {place}; {_ADVICE}")
        before, _, rest = rest.partition(mark)
        found.append(before)
    return [*found, rest]


def _places(transcript: Transcript, text: str, around: Sequence[str]) -> list[tuple[int, int]]:
    """First character of each content in the rendered text, and the one behind it."""
    places = []
    position = 0
    for place, message in enumerate(transcript.messages):
        content = message["content"]
        begin = position + len(around[place])
        # Templates may strip a content; the longest that fits is what is there.
        written = dict.fromkeys((content, content.rstrip(), content.lstrip(), content.strip()))
        last = place == len(transcript.messages) - 1
        end = next(
            (
                begin + len(each)
                for each in written
                if text.startswith(around[place] + each + around[place + 1], position)
                and (not last or begin + len(each) + len(around[-1]) == len(text))
            ),
            None,
        )
        if end is None:
            raise UnfollowedError(
                f"{transcript.place}: the chat template changes message {place} (many cut reasoning from earlier "
                f"answers); {_ADVICE}"
            )
        places.append((begin, end))
        position = end
    return places


def _spans(
    transcript: Transcript, pieces: Sequence[TokenPiece], places: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """First token of each content, and the one behind it.

    Raises:
        DataError: If a content holds a control token.
    """
    begins, length = [], 0
    for piece in pieces:
        begins.append(length)
        length += len(piece.text)
    spans: list[tuple[int, int]] = []
    least = 0  # no token belongs to two messages
    for place, (begin, end) in enumerate(places):
        own = []
        for index in range(max(bisect_right(begins, begin) - 1, 0), len(pieces)):
            if begins[index] >= end:
                break
            if pieces[index].start >= least and _belongs(pieces[index], begins[index], begin, end):
                own.append(pieces[index])
        control = next((piece for piece in own if piece.special), None)
        if control is not None:
            raise DataError(
                f"{transcript.place}: message {place} holds the text {control.text!r}, a control token of this model, "
                "which would end or begin turns; take it out"
            )
        after = bisect_right(begins, begin - 1)
        empty = pieces[after].start if after < len(pieces) else pieces[-1].stop
        start, stop = (own[0].start, own[-1].stop) if own else (max(empty, least),) * 2
        spans.append((start, stop))
        least = stop
    return spans


def _belongs(piece: TokenPiece, first: int, begin: int, end: int) -> bool:
    last = first + len(piece.text)
    if begin <= first and last <= end:
        return bool(piece.text)
    return bool(piece.text[max(begin - first, 0) : max(end - first, 0)].strip())


def _prompt_stop(messages: Sequence[Message], place: int, ids: TokenIds, start: int, chat: ChatFormat) -> int | None:
    if messages[place]["role"] != "assistant" or not place:
        return None
    try:
        prompt = tuple(chat.encode_messages(messages[:place]))
    except ModelError:  # templates may refuse to begin with an answer
        return None
    return len(prompt) if ids[: len(prompt)] == prompt and len(prompt) <= start else None
