"""The table of `persona_lens.backend.parts`, made of a tokenizer: what each of its tokens does to a `MarkMachine`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from persona_lens.backend.parts.machine import (
    BEGIN,
    NEWLINE,
    OTHER,
    WHITE,
    MarkMachine,
    Part,
    SpelledMarks,
    Spelling,
    State,
    Symbol,
)
from persona_lens.core.marks import (
    ANSWERS,
    CHANNEL,
    FINAL,
    HARMONY,
    MARKS,
    RECIPIENTS,
    SWITCHES,
    TAGS,
    WORDS,
    Marks,
    opened_marks,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUESTION, _ANSWER = "probe of the question walnut ladder", "probe of the answer copper violin"
_THOUGHT = "probe of the thought silver candle"
_ENDS = (">", "]", "▷")  # of tags


class PartTable(NamedTuple):
    """The fields of `persona_lens.backend.parts.Parts`."""

    marks: tuple[Marks, ...] = ()
    classes: Mapping[int, int] = MappingProxyType({})
    following: tuple[tuple[int, ...], ...] = ((0,),)
    kinds: tuple[tuple[Part, ...], ...] = ((Part.ANSWER,),)
    responding: tuple[int, ...] = (0,)
    separators: tuple[str, ...] = ()
    newlines: tuple[str, ...] = ()
    closing: Mapping[int, tuple[int, ...]] = MappingProxyType({})


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a tokenizer's chat template; empty for base models, which have none."""
    with suppress(ValueError, AttributeError):
        return str(tokenizer.get_chat_template())
    return ""


Markup = tuple[tuple[Marks, ...], tuple[str, ...], tuple[str, ...]]
"""What opens and closes thinking, the tags between turns, and the newlines behind each of the closing marks."""


def markup_of(tokenizer: PreTrainedTokenizerBase, template: str) -> Markup:
    """What a tokenizer and the text of a chat template say of thinking."""
    vocabulary = Vocabulary(tokenizer, template)
    turns, opened = _rendered(tokenizer, template)
    marks = [pair for pair in MARKS if vocabulary.has(pair[0]) or any(mark in template for mark in pair)]
    marks += [pair for pair in WORDS if pair[1] in template]
    if opened is not None and opened not in marks and not vocabulary.channels:
        marks.append(opened)
    found = (*vocabulary.heads, *marks)
    newlines = tuple(_newlines(tokenizer, template, closing, turns) for _, closing in found)
    return found, tuple(sorted(name for name in vocabulary.tags if name in turns)), newlines


def compiled(
    tokenizer: PreTrainedTokenizerBase,
    marks: Sequence[Marks],
    separators: Sequence[str] = (),
    newlines: Sequence[str] = (),
) -> PartTable:
    """The table for a tokenizer and what `markup_of` found; one without marks where the model never thinks."""
    vocabulary = Vocabulary(tokenizer, "".join(mark for pair in marks for mark in pair))
    own = [pair for pair in marks if pair not in vocabulary.heads]
    if not own and not vocabulary.channels:
        return PartTable()
    spelled = [SpelledMarks(*map(vocabulary.spelled, pair)) for pair in own]
    names = {symbol for pair in spelled for symbol in (*pair.opening, *pair.closing) if isinstance(symbol, str)}
    names |= {name for name in (*HARMONY, *TAGS) if vocabulary.channels and name in vocabulary.ids}
    machine = MarkMachine(spelled, vocabulary.channels)
    columns = _Columns(machine, machine.states(sorted(names)))
    between = vocabulary.control.union(separators)
    for name, token in vocabulary.ids.items():
        if name in names:
            columns.note(token, (name,))
        elif name in between:
            columns.separates(token)
        else:
            columns.text(token, vocabulary.text(name))
    table = columns.table((*vocabulary.heads, *own), tuple(separators))
    ends = {pair[1]: pair[1] + behind for pair, behind in zip(marks, newlines, strict=False)}
    unclosed = machine.unclosed(columns.states, vocabulary.answers)
    return table._replace(newlines=tuple(newlines), closing=_closing(tokenizer, table, unclosed, ends))


def _rendered(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, Marks | None]:
    """What a template writes around turns, and the marks that it leaves open at the end of a prompt."""
    question, answer = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
    texts = []
    for turns, begins in (([question], True), ([question, answer], False), ([question, answer, question], True)):
        text = ""
        with suppress(Exception):  # templates are programs: any error may come out of one
            given = {"chat_template": template, "add_generation_prompt": begins, "tokenize": False}
            text = str(tokenizer.apply_chat_template(turns, **given))  # type: ignore[arg-type]
        texts.append(text)
    finished = texts[1].partition(_QUESTION)[2].partition(_ANSWER)[0]
    return "".join(texts), opened_marks(texts[0].rpartition(_QUESTION)[2], finished)


def _newlines(tokenizer: PreTrainedTokenizerBase, template: str, closing: str, turns: str) -> str:
    """The most newlines that a template writes behind what closes thinking.

    Templates write it in an earlier turn that holds reasoning, and in prompts of which thinking is switched off.
    """
    question = {"role": "user", "content": _QUESTION}
    answered = {"role": "assistant", "content": _ANSWER, "reasoning_content": _THOUGHT}
    texts = [turns]
    for messages, begins in (([question, answered], False), ([question], True)):
        with suppress(Exception):  # as above
            given: dict[str, Any] = {"chat_template": template, "add_generation_prompt": begins, "tokenize": False}
            given |= dict.fromkeys(SWITCHES, not begins)
            texts.append(str(tokenizer.apply_chat_template(messages, **given)))
    return max((found[1] for text in texts for found in re.finditer(re.escape(closing) + r"(\n*)", text)), default="")


def _closing(
    tokenizer: PreTrainedTokenizerBase,
    table: PartTable,
    unclosed: Mapping[int, tuple[str, str]],
    ends: Mapping[str, str],
) -> dict[int, tuple[int, ...]]:
    """By state in which thinking is open, the ids that close it there.

    Args:
        tokenizer: Whose ids they are.
        table: What they do.
        unclosed: By state, what closes thinking there, and what of that is still to come.
        ends: By what closes thinking, what is to be written whole.
    """
    found = {}
    for state, (closing, rest) in unclosed.items():
        whole = ends.get(closing, closing)
        for text in (rest + whole.removeprefix(closing), whole):
            ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            if _closes(table, state, ids):
                found[state] = ids
                break
    return found


def _closes(table: PartTable, state: int, ids: Sequence[int]) -> bool:
    for token in ids:
        state = table.following[table.classes.get(token, 0)][state]
    return table.kinds[0][state] is Part.ANSWER


class Vocabulary:
    """A tokenizer's tokens.

    Attributes:
        ids: By name; all of them.
        control: Names of control tokens.
        tags: Names of other tokens that stand for themselves, as some models have theirs between turns.
        heads: What sets thinking apart in the heads of messages, as those of gpt-oss and Muse.
        channels: Whether there are such heads, or tags that are written like them.
        answers: What follows a message that is thinking, where there are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self.ids: dict[str, int] = tokenizer.get_vocab()
        added = {str(token.content): token.special for token in tokenizer.added_tokens_decoder.values()}
        self.control = {name for name, special in added.items() if special} | set(tokenizer.all_special_tokens)
        self.tags = {name for name in added if not name.isspace() and not name.isalnum()}
        self.heads: tuple[Marks, ...] = ()
        if {"<|start|>", "<|message|>"} <= added.keys():
            if {CHANNEL, "<|end|>"} <= added.keys():
                self.heads = ((CHANNEL, CHANNEL + FINAL),)
            elif RECIPIENTS[0] in template:
                self.heads = (RECIPIENTS,)
        self.channels = bool(self.heads) or added.keys() >= set(TAGS)
        self.answers = ANSWERS[self.heads[0][0] if self.heads else TAGS[0]]
        self._added = sorted(filter(None, added), key=len, reverse=True)  # the longest first, as a text is cut
        self._whole = frozenset(added)
        self._names: dict[int, str] | None = None
        # Others write a space as this sign, and bytes that are no character as <0x0A>.
        self._bytes = _byte_alphabet() if "Ċ" in self.ids and "▁" not in self.ids else None

    def has(self, mark: str) -> bool:
        """Whether it is a token, or begins with one that is a tag."""
        return mark in self.ids or any(mark.startswith(name) and name.endswith(_ENDS) for name in self._added)

    def spelled(self, mark: str) -> Spelling:
        """A mark as one token, or as what stands for its parts."""
        if mark in self.ids:
            return (mark,)
        found: list[Symbol] = []
        while mark:
            name = next((name for name in self._added if mark.startswith(name)), None)
            found += mark[0].encode() if name is None else [name]
            mark = mark[1 if name is None else len(name) :]
        return tuple(found)

    def bytes_of(self, ids: Sequence[int]) -> list[bytes]:
        """What each of some tokens stands for; nothing for ids that it does not know."""
        if self._names is None:
            self._names = {token: name for name, token in self.ids.items()}
        return [self.text(self._names.get(token, "")) for token in ids]

    def text(self, name: str) -> bytes:
        """The bytes that a token stands for."""
        if name in self._whole:
            return name.encode()
        if self._bytes is not None:
            with suppress(KeyError):
                return bytes([self._bytes[letter] for letter in name])
        if len(name) == len("<0x0A>") and name.startswith("<0x") and name.endswith(">"):
            with suppress(ValueError):
                return bytes([int(name[3:5], 16)])
        return name.replace("▁", " ").encode(errors="replace")


def _byte_alphabet() -> dict[str, int]:
    """The bytes by the letters that byte-level vocabularies write them with."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(others)}


class _Columns:
    """What tokens do in every state of a machine: those that do the same are of one class."""

    def __init__(self, machine: MarkMachine, states: Sequence[State]) -> None:
        self._machine, self.states = machine, states
        self._numbers = {state: number for number, state in enumerate(states)}
        self._classes: dict[tuple[tuple[int, Part], ...], int] = {}
        self._of: dict[int, int] = {}
        self._known: dict[bytes, int] = {}
        self._class_of(self._column((OTHER,)))  # 0, and that of nearly all
        runs = machine.spelled()
        self._first = frozenset(run[0] for run in machine.beginnings())
        self._inner = [run[start:] for run in runs for start in range(len(run))]

    def note(self, token: int, symbols: Iterable[Symbol]) -> None:
        """A token that stands for these symbols."""
        self._set(token, self._class_of(self._column(tuple(symbols))))

    def separates(self, token: int) -> None:
        """A control token: a new turn begins, or another text."""
        self._set(token, self._class_of(((self._numbers[BEGIN], Part.NEITHER),) * len(self.states)))

    def text(self, token: int, text: bytes) -> None:
        """A token that stands for bytes; most do the same as any with its spaces, and are not looked at further."""
        known = text if self._may_matter(text) else _shape(text)
        if known not in self._known:
            self._known[known] = self._class_of(self._column(known))
        self._set(token, self._known[known])

    def _may_matter(self, text: bytes) -> bool:
        """Whether a mark may begin in these bytes, or go on with them."""
        if not self._first.isdisjoint(text):
            return True
        return any(run.startswith(text) or text.startswith(run) for run in self._inner if run[:1] == text[:1])

    def _set(self, token: int, of_class: int) -> None:
        if of_class:
            self._of[token] = of_class

    def _column(self, symbols: Sequence[Symbol]) -> tuple[tuple[int, Part], ...]:
        reached = (self._machine.run(state, symbols) for state in self.states)
        return tuple((self._numbers[state], part) for state, part in reached)

    def _class_of(self, column: tuple[tuple[int, Part], ...]) -> int:
        return self._classes.setdefault(column, len(self._classes))

    def table(self, marks: tuple[Marks, ...], separators: tuple[str, ...]) -> PartTable:
        """All of it."""
        following = tuple(tuple(state for state, _ in column) for column in self._classes)
        kinds = tuple(tuple(part for _, part in column) for column in self._classes)
        responding = tuple(self._numbers[self._machine.responding(state)] for state in self.states)
        return PartTable(marks, self._of, following, kinds, responding, separators)


def _shape(text: bytes) -> bytes:
    """The shortest bytes that do what these do where no mark is near: whether spaces stand before and behind others."""
    if not text:
        return text
    others = text.rstrip(bytes(WHITE))
    behind = text[len(others) :]
    end = b"\n" if NEWLINE in behind else behind[:1] and b" "
    if not others:
        return end
    return (b" " if text[0] in WHITE else b"") + bytes([OTHER]) + end
