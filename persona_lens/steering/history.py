"""`History`: what edits do, in a conversation of several turns, to the turns that are over.

A model that answers the next message reads all that was said before. What an edit wrote there is still there if the
keys and values of finished turns are kept, and gone if they are computed anew without it. Either is had here by saying
at which tokens of the whole prompt an edit acts, so that it does not depend on whether a backend keeps anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from enum import StrEnum

import torch
from jaxtyping import Bool
from torch import Tensor

from persona_lens.backend import Edit, EditError, Edits, Part, Positions, Schedule, Span, as_edits
from persona_lens.backend.writing import scheduled
from persona_lens.core.text import shown
from persona_lens.data.turns import TurnPrompt, turn_prompt
from persona_lens.models import ChatFormat, Message
from persona_lens.models.chat import messages_of
from persona_lens.runs.rollouts import EditsFor, Request

__all__ = [
    "DEFAULT_HISTORY",
    "History",
    "HistoryError",
    "TurnPrompt",
    "check_history",
    "conversation_edits",
    "edits_over_turns",
    "turn_edits",
    "turn_prompt",
]


class HistoryError(EditError):
    """An edit that cannot be carried out with a history, or a history that is none."""


class History(StrEnum):
    """How the turns that are over are found by the next one."""

    STEERED = "steered"
    """As they were made if it was under these edits: each token is edited as it was in its own turn."""
    CLEAN = "clean"
    """As if they had never been steered: edits act on the tokens of this turn alone."""

    @classmethod
    def _missing_(cls, value: object) -> History:
        raise HistoryError(f"a history is {' or '.join(cls)}; got {shown(value)}")


DEFAULT_HISTORY = History.STEERED
# A schedule over earlier replies takes an edit for each of its factors, all of which run over the prompt.
MOST_FACTORS = 256
_PARTS = {Positions.THINKING: Part.THINKING, Positions.ANSWER: Part.ANSWER}
_REPLY = (Positions.RESPONSE, Positions.GENERATING, *_PARTS)


def turn_edits(
    edits: Edits, batch: Sequence[TurnPrompt], history: History, responses: Sequence[Sequence[int]] | None = None
) -> list[Edit]:
    """Edits of a turn, for a generation (or a forward pass) over its whole prompt.

    With a `STEERED` history ``all`` edits every token, ``generating``, ``response``, ``thinking`` and ``answer`` also
    those of earlier replies (and the token before each, for ``generating``), ``prompt`` what was new of each turn's
    prompt. With a `CLEAN` one only tokens of this turn are edited: its messages with their headers, and its reply.
    Spans and schedules count as they did in the turn that a token belongs to, of thinking as far as it is still there.

    Where an edit becomes several, these act at different tokens, in its place among the others. In a first turn edits
    stay as they are.

    Args:
        edits: What is written, for rows of this batch or for any.
        batch: The prompt of each row.
        history: What becomes of finished turns.
        responses: Of a forward pass over existing text: each row's response. None for a generation.

    Raises:
        HistoryError: If an edit counts tokens in a way that cannot be carried out: with a clean history from the
            beginning of the conversation; with a steered one a schedule of very many factors over earlier replies.
    """
    given, history = as_edits(edits), History(history)
    if not any(turn.past for turn in batch):
        return list(given)
    rows = _Rows(batch, responses)
    if history is History.CLEAN:
        check_history(given, history)
        return [part for edit in given for part in _clean(edit, rows)]
    return [part for edit in given for part in _steered(edit, rows)]


def conversation_edits(edits: Edits, chat: ChatFormat, messages: Sequence[Message], history: History) -> list[Edit]:
    """`turn_edits` of one conversation that is to be answered; finished turns are looked for only where that matters.

    Raises:
        HistoryError: As `turn_edits`.
        ModelError: As `turn_prompt`.
    """
    given, history = as_edits(edits), History(history)
    over = any(message["role"] == "assistant" for message in messages)
    if not over or all(_stays(edit, history) for edit in given):
        return list(given)
    return turn_edits(given, [turn_prompt(chat, messages, replies=history is History.STEERED)], history)


def edits_over_turns(edits_for: EditsFor, chat: ChatFormat, history: History) -> EditsFor:
    """The edits of a batch of requests, whose examples are the finished turns of conversations.

    Args:
        edits_for: What is written, as if every conversation were a single turn.
        chat: Turns requests into token ids.
        history: What becomes of finished turns.
    """

    def of(requests: Sequence[Request]) -> Sequence[Edit]:
        given = edits_for(requests)
        if not any(each.examples for each in requests) or all(_stays(edit, history) for edit in given):
            return given
        asked = (messages_of(each.system, each.question, each.examples) for each in requests)
        return turn_edits(given, [turn_prompt(chat, messages) for messages in asked], history)

    return of


def check_history(edits: Edits, history: History) -> None:
    """Raise `HistoryError` for an edit that cannot be carried out under a history once a turn is over."""
    for edit in as_edits(edits) if History(history) is History.CLEAN else ():
        kind, span = _kind(edit)
        if kind is Positions.ALL and (span is not None or edit.schedule is not None):
            what = str(span) if span is not None else f"the schedule {edit.schedule}"
            raise HistoryError(
                f"{what} counts tokens from the beginning of the conversation, which a clean history leaves as it is; "
                "count those of the reply (generating or response), or keep the history steered"
            )


def _stays(edit: Edit, history: History) -> bool:
    """Whether an edit is the same in every turn."""
    kind, _ = _kind(edit)
    return kind in _REPLY if history is History.CLEAN else kind is Positions.ALL


def _kind(edit: Edit) -> tuple[Positions | None, Span | None]:
    """Which tokens an edit counts, and which of them it is made at; no kind for a mask."""
    positions = edit.positions
    if isinstance(positions, Tensor):
        return None, None
    return (positions.kind, positions) if isinstance(positions, Span) else (Positions(positions), None)


class _Rows:
    """Rows of a batch that is padded on the left, and masks over it.

    Args:
        batch: The prompts.
        responses: What follows them; None for nothing.
    """

    def __init__(self, batch: Sequence[TurnPrompt], responses: Sequence[Sequence[int]] | None) -> None:
        self.turns = batch
        self._lengths = [len(turn.ids) for turn in batch]
        if responses is not None:
            pairs = zip(self._lengths, responses, strict=True)
            self._lengths = [prompt + len(response) for prompt, response in pairs]
        self.width = max(self._lengths)

    def mask(self, tokens: Callable[[TurnPrompt], Iterable[range]]) -> Bool[Tensor, "batch width"]:
        """True at these tokens of each prompt, which are counted from its first."""
        found = torch.zeros(len(self.turns), self.width, dtype=torch.bool)
        for row, (turn, length) in enumerate(zip(self.turns, self._lengths, strict=True)):
            first = self.width - length
            for part in tokens(turn):
                found[row, first + part.start : first + max(part.start, part.stop)] = True
        return found

    def since(self) -> Bool[Tensor, "batch width"]:
        """True at every token of this turn, of a response too."""
        found = torch.zeros(len(self.turns), self.width, dtype=torch.bool)
        for row, (turn, length) in enumerate(zip(self.turns, self._lengths, strict=True)):
            found[row, self.width - length + turn.past :] = True
        return found


def _clean(edit: Edit, rows: _Rows) -> Iterator[Edit]:
    """An edit at the tokens of this turn."""
    kind, span = _kind(edit)
    if kind in _REPLY:
        yield edit
    elif isinstance(edit.positions, Tensor):
        yield replace(edit, positions=edit.positions & rows.since().to(edit.positions.device))
    else:
        mask = rows.mask(lambda turn: [_within(range(turn.past, len(turn.ids)), span, len(turn.ids))])
        if span is not None and not bool(mask.any(dim=1).all()):
            raise HistoryError(
                f"{span} holds tokens of finished turns alone, which a clean history leaves as they are; count from "
                "the end, as prompt[-3:] does, or keep the history steered"
            )
        yield replace(edit, positions=mask)
        if kind is Positions.ALL:
            yield replace(edit, positions=Positions.RESPONSE)


def _steered(edit: Edit, rows: _Rows) -> Iterator[Edit]:
    """An edit at every token where it was made in the turn that the token belongs to."""
    kind, span = _kind(edit)
    if kind is Positions.PROMPT:
        yield replace(edit, positions=rows.mask(lambda turn: _asked(turn, span)))
        return
    if kind in _REPLY:
        yield from _replied(edit, rows, kind, span)
    yield edit


def _asked(turn: TurnPrompt, span: Span | None) -> Iterator[range]:
    """What each turn's prompt had that was new, as far as a span of that prompt goes."""
    done = 0
    for start, stop in (*turn.said, (len(turn.ids), len(turn.ids))):
        yield _within(range(done, start), span, start)
        done = stop


def _within(tokens: range, span: Span | None, length: int) -> range:
    """The part of some tokens that lies in a span of a prompt of so many."""
    if span is None:
        return tokens
    start, stop, _ = slice(span.start, span.stop).indices(length)
    return range(max(tokens.start, start), min(tokens.stop, stop))


def _counted(turn: TurnPrompt, kind: Positions | None) -> Iterator[list[int]]:
    """The tokens of a kind that each earlier reply has, in the order in which they are counted; -1 for one elsewhere.

    The last of the prompt is the coming reply's own.
    """
    before = int(kind is Positions.GENERATING)
    for number, (start, stop) in enumerate(turn.said):
        if kind in _PARTS:
            yield [start + at for at, part in enumerate(turn.parts[number]) if part is _PARTS[kind]]
            continue
        done = turn.said[number - 1][1] if number else 0
        tokens = range(start - before, min(stop, len(turn.ids) - before))
        yield [token if token >= done else -1 for token in tokens]


def _replied(edit: Edit, rows: _Rows, kind: Positions | None, span: Span | None) -> Iterator[Edit]:
    """An edit of a reply at the earlier ones: once, or for each factor of its schedule."""
    first, end = (0, None) if span is None else (span.start, span.stop)
    longest = max((len(tokens) for turn in rows.turns for tokens in _counted(turn, kind)), default=0)
    numbers = range(first, longest if end is None else min(end, longest))

    def at(chosen: Sequence[int]) -> Bool[Tensor, "batch width"]:
        """True at the tokens of these numbers in each reply."""
        return rows.mask(
            lambda turn: [
                range(tokens[number], tokens[number] + 1)
                for tokens in _counted(turn, kind)
                for number in chosen
                if number < len(tokens) and tokens[number] >= 0
            ]
        )

    if edit.schedule is None:
        parts: dict[float, list[int]] = {1.0: list(numbers)}
    else:
        parts = {}
        points = torch.tensor(edit.schedule.points, dtype=torch.float32)
        index = torch.tensor(list(numbers), dtype=torch.float32)
        for number, factor in zip(numbers, scheduled(index, points).tolist(), strict=True):
            parts.setdefault(factor, []).append(number)
    if len(parts) > MOST_FACTORS:
        raise HistoryError(
            f"the schedule {edit.schedule} has {len(parts)} different factors over the earlier replies, and "
            f"{MOST_FACTORS} can be carried out; let it end sooner, or use a clean history"
        )
    for factor, chosen in parts.items():
        mask = at(chosen)
        if factor and bool(mask.any()):
            # A schedule that is the same everywhere: the factor may be one that no coefficient can be.
            same = None if edit.schedule is None else Schedule(((0, factor), (1, factor)))
            yield replace(edit, positions=mask, schedule=same)
