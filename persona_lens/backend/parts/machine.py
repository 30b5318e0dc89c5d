"""`MarkMachine`: what the marks of a model's reasoning do, symbol by symbol, for `parts` to make a table of.

A symbol is a byte of what tokens stand for, or a token that is a mark, or a part of one, by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

from persona_lens.core.marks import FINAL, HARMONY, RECIPIENTS, TAGS

Symbol: TypeAlias = int | str
"""A byte, or a token by its name."""
Spelling: TypeAlias = tuple[Symbol, ...]
State: TypeAlias = tuple[str | int | bool | Spelling | None, ...]

NEWLINE, SPACES = 10, frozenset(b" \t\r\v\f")
WHITE = SPACES | {NEWLINE}
OTHER = 0  # as good as any byte that no mark has
ASSISTANT = b"assistant"
# What the heads of messages say, each where it may stand: the role, whom the message is to, its channel; a tag's name.
_WORDS = {"role": ASSISTANT, "recipient": RECIPIENTS[1].encode(), "channel": FINAL.encode(), "tag": b"think"}
_HEADS = (*_WORDS, "head")

# Outside reasoning: where a line or an answer begins, with nothing but spaces since, and behind that.
BEGIN: State = ("begin",)
MIDDLE: State = ("middle",)
HARMONY_THINKING: State = ("thinking in a channel",)


class Part(IntEnum):
    """What a token of a response belongs to.

    ``NEITHER``: a token that completes a mark, one of a message's head, as in gpt-oss, or a control token.
    """

    NEITHER = 0
    THINKING = 1
    ANSWER = 2


@dataclass(frozen=True)
class SpelledMarks:
    """What opens reasoning and what closes it, as a tokenizer spells them."""

    opening: Spelling
    closing: Spelling


class MarkMachine:
    """A machine over symbols; its states are described by the methods that leave them.

    Args:
        pairs: The marks.
        channels: Whether messages have heads as those of gpt-oss, Muse and Kimi K3 do, whose tokens are the symbols
            ``<|start|>`` and so on.
    """

    def __init__(self, pairs: Sequence[SpelledMarks], channels: bool) -> None:
        self._pairs = tuple(pairs)
        self._channels = channels
        self._beginnings = {pair.opening[:stop] for pair in pairs for stop in range(1, len(pair.opening) + 1)}

    @staticmethod
    def part(state: State) -> Part:
        """What a symbol belongs to that leads into a state and completes nothing."""
        if state[0] in ("thinking", HARMONY_THINKING[0]):
            return Part.THINKING
        return Part.NEITHER if state[0] in _HEADS else Part.ANSWER

    def responding(self, state: State) -> State:
        """The state in which a response begins: an answer, or the reasoning that the prompt ended in."""
        if state[0] == "quoted" and isinstance(state[1], int):
            return ("thinking", state[1], 0)
        return BEGIN if state == MIDDLE or state[0] in ("opening", "quoting") else state

    def step(self, state: State, symbol: Symbol) -> tuple[State, bool]:
        """The next state, and whether the symbol completed a mark or belongs to the head of a message."""
        if self._channels and symbol in (*HARMONY, *TAGS):
            assert isinstance(symbol, str)
            return _in_head(state, symbol), True
        if state[0] == "thinking":
            return self._in_thinking(state, symbol)
        if state == HARMONY_THINKING:
            return state, False
        if state[0] in _HEADS:
            head = _head(state, symbol)
            return (head, True) if head is not None else self.step(BEGIN, symbol)
        return self._outside(state, symbol)

    def _outside(self, state: State, symbol: Symbol) -> tuple[State, bool]:
        """Where nothing is open: ``begin``, ``middle``, a mark that may be opening there, or a quoted one."""
        begins = state == BEGIN or (state[0] == "quoted" and state[2] is True)
        so_far = state[1] if state[0] in ("opening", "quoting") else ()
        quoting = state[0] == "quoting" if so_far else not begins
        assert isinstance(so_far, tuple)
        longer = (*so_far, symbol)
        if longer not in self._beginnings and so_far:
            # The mark that seemed to open did not; another may begin here, but in the middle of a line.
            longer, quoting = (symbol,), True
        if longer in self._beginnings:
            number = next((n for n, pair in enumerate(self._pairs) if pair.opening == longer), None)
            if number is None:  # a token that is a part of a mark belongs to nothing else, as bytes may
                return ("quoting" if quoting else "opening", longer), not quoting and isinstance(symbol, str)
            return (("quoted", number, False), False) if quoting else (("thinking", number, 0), True)
        if symbol == NEWLINE:
            return (("quoted", state[1], True) if state[0] == "quoted" else BEGIN), False
        if symbol in SPACES and (begins or state[0] == "quoted"):
            return state, False
        return MIDDLE, False

    def _in_thinking(self, state: State, symbol: Symbol) -> tuple[State, bool]:
        """``thinking``, the number of the marks, and how much of what closes it is there."""
        _, number, there = state
        assert isinstance(number, int)
        assert isinstance(there, int)
        closing = self._pairs[number].closing
        seen = (*closing[:there], symbol)
        matched = next(n for n in range(len(seen), -1, -1) if seen[len(seen) - n :] == closing[:n])
        return (BEGIN, True) if matched == len(closing) else (("thinking", number, matched), False)

    def states(self, tokens: Iterable[str]) -> tuple[State, ...]:
        """Every state that can be reached, the one in which a text begins first.

        Args:
            tokens: Names of the tokens that are symbols.
        """
        of_marks = {symbol for pair in self._pairs for symbol in (*pair.opening, *pair.closing)}
        letters = set(b"".join(_WORDS.values())) if self._channels else set()
        symbols: list[Symbol] = [
            *sorted(WHITE | {OTHER} | letters | {s for s in of_marks if isinstance(s, int)}),
            *tokens,
        ]
        found = {BEGIN: None, MIDDLE: None}
        pending = list(found)
        while pending:
            state = pending.pop()
            reached = [self.responding(state), *(self.step(state, symbol)[0] for symbol in symbols)]
            for each in reached:
                if each not in found:
                    found[each] = None
                    pending.append(each)
        return tuple(found)

    def run(self, state: State, symbols: Iterable[Symbol]) -> tuple[State, Part]:
        """The state after a token, and what the token is.

        Args:
            state: That before it.
            symbols: What it stands for.
        """
        completed, empty = False, True
        for symbol in symbols:
            state, completes = self.step(state, symbol)
            # Behind the head of a message its text may begin within one token.
            completed, empty = completed or completes, False
        known = self.part(state)
        if empty or not completed:
            return state, known
        return state, Part.NEITHER

    def unclosed(self, states: Sequence[State], answers: str) -> dict[int, tuple[str, str]]:
        """By the number of a state in which thinking is open: what closes it, and what of that is not there yet.

        Args:
            states: All of them.
            answers: What follows a message that is thinking, where messages have heads.
        """
        found = {}
        for number, (kind, *rest) in enumerate(states):
            if kind == HARMONY_THINKING[0]:
                found[number] = answers, answers
            elif kind == "thinking":
                pair, there = rest
                assert isinstance(pair, int)
                assert isinstance(there, int)
                closing = self._pairs[pair].closing
                whole = _text(closing)
                assert whole is not None  # as it was spelled from a text
                found[number] = whole, _text(closing[there:]) or whole
        return found

    def beginnings(self) -> list[bytes]:
        """The bytes of marks that begin with one."""
        return [_letters(each) for each in self._spellings if isinstance(each[0], int)]

    def spelled(self) -> list[bytes]:
        """All runs of bytes that mean something: of marks that are no tokens, and words in the heads of messages."""
        words = list(_WORDS.values()) if self._channels else []
        return [*filter(None, map(_letters, self._spellings)), *words]

    @property
    def _spellings(self) -> list[Spelling]:
        return [spelling for pair in self._pairs for spelling in (pair.opening, pair.closing)]


def _text(spelling: Spelling) -> str | None:
    """What is spelled; None for a part that begins within a character."""
    try:
        return b"".join(each.encode() if isinstance(each, str) else bytes([each]) for each in spelling).decode()
    except UnicodeDecodeError:
        return None


def _letters(spelling: Spelling) -> bytes:
    return bytes(symbol for symbol in spelling if isinstance(symbol, int))


def _in_head(state: State, name: str) -> State:
    """After a token that messages are written with.

    The head is the ``role``, the ``recipient``, the ``channel`` or the ``tag``, with how much of the word is there that
    `_WORDS` has for it; or the ``head`` that follows, with whether it is that of an answer, and None where it does not
    say.
    """
    opened: dict[str, State] = {
        "<|start|>": ("role", 0),
        "<|channel|>": ("channel", 0),
        "<|open|>": ("tag", 0),
        "<|close|>": ("head", None),
        "<|end|>": BEGIN,
    }
    if name in opened:
        return opened[name]
    in_head = state[0] in _HEADS
    if name in ("<|message|>", "<|sep|>") and in_head:
        return HARMONY_THINKING if _final(state) is False else BEGIN
    if in_head:
        return ("head", _final(state))
    return state


def _final(state: State) -> bool | None:
    """Whether a head is that of an answer; None where it names neither channel nor recipient."""
    kind, there = state
    if kind == "channel":
        return there == len(FINAL)
    if kind == "tag":
        return there != len(_WORDS["tag"])
    if kind == "recipient" and isinstance(there, int):
        return there == len(RECIPIENTS[1]) if there > RECIPIENTS[1].index("=") else None
    found = there if kind == "head" else None
    assert found is None or isinstance(found, bool)
    return found


def _head(state: State, symbol: Symbol) -> State | None:
    """Within a head; None where it has ended without a token that says so, as a reply written by hand may begin."""
    kind, there = state
    if kind == "head" or not isinstance(there, int):
        return state
    word = _WORDS[str(kind)]
    if there < len(word) and symbol == word[there]:
        return (str(kind), there + 1)
    if kind == "role":
        if there < len(word):
            return ("head", None)
        return ("recipient", 0) if symbol in WHITE else None
    if there == 0 and symbol in WHITE:
        return state
    whole = there < len(word) or symbol in WHITE or kind == "channel"
    return ("head", _final(state) if whole else False)
