"""`Parts`: which token of a response is thinking and which is answer, told by token ids as they come.

A token's part depends on it and on the tokens before it alone, so that reads of finished text, edits while it is
generated and what a stream says of it are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from persona_lens.backend.parts.budget import ThinkingBudget
from persona_lens.backend.parts.machine import Part
from persona_lens.backend.parts.table import PartTable, compiled, markup_of, template_of
from persona_lens.core.marks import Marks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from persona_lens.backend.parts.budget import Closing


@dataclass(frozen=True, eq=False)
class Parts:
    """A finite automaton over token ids: what each token of a response belongs to.

    It runs over a whole row, the prompt included, so that it does not matter whether a template or the model opens
    the reasoning; control tokens, which separate turns, set it back. What it makes of a response:

    - A mark that the tokenizer has as a token counts only as that token: its characters in several tokens are a
      quotation. A mark that is no token is found in the bytes of the tokens. Only the token that completes it is
      `Part.NEITHER`: those before belong to what was open then, since they may go on as ordinary text, and an edit
      of the next token cannot wait. Reads of finished text follow that too, or they would not be those of the same
      text while it was written; `persona_lens.models.ChatFormat` cuts finished texts with the whole mark known.
    - A block opens at the beginning of the answer or of a line alone, with nothing but spaces before it; a mark within
      a line is quoted. So are a closing mark where nothing is open, and any mark but the closing one within thinking.
      There may be several blocks. Thinking that never ends is thinking.
    - Of the channels of gpt-oss ``final`` is answer, and any other thinking; the heads of messages are neither. A
      reply that begins without a channel is answer.
    - Control tokens are neither, and where the model has no marks, every token is answer.

    Where a template separates turns by words instead of control tokens, nothing sets the automaton back, and a mark
    that a user wrote at the beginning of a line, and did not close, stays open in the response.

    Attributes:
        marks: What opens reasoning and what closes it; empty for a model that never thinks.
        classes: The class of each id that matters; 0 is that of all others.
        following: By class and state, the next state. A text begins in state 0.
        kinds: By class and state, what such a token is.
        responding: By state, that in which a response begins whose prompt ends there.
        separators: Tags between turns that are no control tokens.
        newlines: What the chat template writes behind the closing mark of each of `marks`.
        closing: By state in which thinking is open, the ids that close it: what is not there yet of the mark, and the
            newlines behind it.
    """

    marks: tuple[Marks, ...] = ()
    classes: Mapping[int, int] = field(default_factory=dict, repr=False)
    following: tuple[tuple[int, ...], ...] = field(default=((0,),), repr=False)
    kinds: tuple[tuple[Part, ...], ...] = field(default=((Part.ANSWER,),), repr=False)
    responding: tuple[int, ...] = field(default=(0,), repr=False)
    separators: tuple[str, ...] = field(default=(), repr=False)
    newlines: tuple[str, ...] = field(default=(), repr=False)
    closing: Mapping[int, tuple[int, ...]] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> Parts:
        """Those of a tokenizer's model; made once, and again when its template or its tokens change.

        Marks are those that the vocabulary has as tokens, those that the chat template names, and what the template
        leaves open at the end of a prompt. A model opened with another template (``chat_template``) has a tokenizer
        with that one.

        Args:
            tokenizer: The tokenizer.
            template: The text of a chat template instead of its own.
        """
        chosen = template if template is not None else template_of(tokenizer)
        return _kept(tokenizer, chosen, lambda: compiled(tokenizer, *markup_of(tokenizer, chosen)))

    @staticmethod
    def marked(
        tokenizer: PreTrainedTokenizerBase,
        marks: Sequence[Marks],
        separators: Sequence[str],
        newlines: Sequence[str] = (),
    ) -> Parts:
        """Those with the `marks` and the rest of others, for a tokenizer with the same tokens and no template.

        Args:
            tokenizer: The tokenizer.
            marks: What opens reasoning and what closes it.
            separators: Tags between turns that are no control tokens.
            newlines: What is written behind the closing mark of each of them.
        """
        given = (tuple(marks), tuple(separators), tuple(newlines))
        return _kept(tokenizer, given, lambda: compiled(tokenizer, *given))

    @property
    def thinks(self) -> bool:
        """Whether any token can be thinking."""
        return bool(self.marks)

    def step(self, state: int, token: int) -> tuple[int, Part]:
        """The next state, and what a token of a response is."""
        of_class = self.classes.get(token, 0)
        return self.following[of_class][state], self.kinds[of_class][state]

    def after(self, prompt: Iterable[int]) -> int:
        """The state in which a response to a prompt begins."""
        state, classes, following = 0, self.classes, self.following
        for token in prompt:
            state = following[classes.get(token, 0)][state]
        return self.responding[state]

    def of_response(self, prompt: Iterable[int], response: Iterable[int]) -> tuple[Part, ...]:
        """What each token of a response is."""
        state, found = self.after(prompt), []
        for token in response:
            state, part = self.step(state, token)
            found.append(part)
        return tuple(found)

    def budget(self, prompt: Iterable[int], most: int) -> ThinkingBudget:
        """What is left to a response to a prompt that may have so many thinking tokens."""
        return ThinkingBudget(self._closing, self.after(prompt), most)

    @cached_property
    def _closing(self) -> Closing:
        thinking = tuple(tuple(part is Part.THINKING for part in column) for column in self.kinds)
        return {
            "classes": dict(self.classes),
            "following": self.following,
            "thinking": thinking,
            "closing": dict(self.closing),
        }

    def given(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> GivenParts:
        """What is known of rows whose responses are there as far as given."""
        kinds, states = [], []
        known: dict[tuple[int, ...], int] = {}  # many rows begin with the same prompt
        for prompt, response in zip(prompts, responses, strict=True):
            if (key := tuple(prompt)) not in known:
                known[key] = self.after(key)
            state, row = known[key], bytearray(len(key))
            for token in response:
                state, part = self.step(state, token)
                row.append(part)
            kinds.append(bytes(row))
            states.append(state)
        return GivenParts(self, tuple(kinds), tuple(states))

    def plain(self) -> dict[str, Tensor]:
        """The automaton as tensors, which need no class of this package; see `persona_lens.backend.parts.masks`."""
        ids = sorted(self.classes)
        return {
            # Before them one that no token has, so that every token comes behind some.
            "ids": torch.tensor([-1, *ids], dtype=torch.long),
            "classes": torch.tensor([0, *(self.classes[token] for token in ids)], dtype=torch.long),
            "following": torch.tensor(self.following, dtype=torch.long),
            "kinds": torch.tensor(self.kinds, dtype=torch.uint8),
        }


@dataclass(frozen=True, eq=False)
class GivenParts:
    """What the tokens of rows are as far as these are there, and where their automata stand.

    Attributes:
        parts: The automaton.
        kinds: For each row a byte for each token, a value of `Part`; tokens of prompts are `Part.NEITHER`.
        states: For each row the state behind its last token.
    """

    parts: Parts
    kinds: tuple[bytes, ...]
    states: tuple[int, ...]

    def of_responses(self, prompts: Sequence[Sequence[int]]) -> GivenParts:
        """The same without the prompts."""
        kinds = tuple(row[len(prompt) :] for row, prompt in zip(self.kinds, prompts, strict=True))
        return GivenParts(self.parts, kinds, self.states)

    def plain(self, width: int, *, left: bool = True) -> dict[str, Tensor]:
        """The same as tensors: ``begun`` uint8 [batch, width], padded on the left or right, and ``states`` [batch]."""
        rows = [kind.rjust(width, b"\0") if left else kind.ljust(width, b"\0") for kind in self.kinds]
        begun = torch.tensor([list(row) for row in rows], dtype=torch.uint8).reshape(len(rows), width)
        return {**self.parts.plain(), "begun": begun, "states": torch.tensor(self.states, dtype=torch.long)}


_made: WeakKeyDictionary[Any, dict[tuple[Hashable, int], Parts]] = WeakKeyDictionary()
_MOST = 16  # of a tokenizer: what others send may be anything


def _kept(tokenizer: Any, given: Hashable, make: Callable[[], PartTable]) -> Parts:
    """What was made for a tokenizer, with as many tokens as it has now."""
    made, key = _made.setdefault(tokenizer, {}), (given, len(tokenizer))
    found = made.get(key)
    if found is None:
        found = Parts(*make())
        while len(made) >= _MOST:
            made.pop(next(iter(made)), None)
        made[key] = found
    return found
