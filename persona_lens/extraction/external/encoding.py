"""Responses as token ids of the model that reads them, checked against its tokenizer and its chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from persona_lens.backend import Backend
from persona_lens.backend.batches import context_length
from persona_lens.backend.tokens import TokenIds
from persona_lens.extraction.external.rows import GivenResponse
from persona_lens.extraction.means import ExtractionError
from persona_lens.models.templates import REASONING_TOKENS
from persona_lens.runs.rollouts import Request, Rollout

if TYPE_CHECKING:
    from persona_lens.models import ChatFormat

CUT_OFF = "\ufffd"  # what a tokenizer writes for a character that was generated in part
_AROUND = 30  # characters shown where two texts differ


@dataclass(frozen=True)
class ResponseEncoder:
    """What is known of a model's tokens.

    Attributes:
        chat: Its chat format.
        end_ids: Ids that end a turn.
        vocabulary: Ids are below this.
        control: Ids that no response has inside; those with which reasoning is set apart may be there.
        longest: Tokens of a prompt and its response at most; None where that is not known.
    """

    chat: ChatFormat
    end_ids: frozenset[int]
    vocabulary: int
    control: frozenset[int]
    longest: int | None

    @classmethod
    def of(cls, backend: Backend, chat: ChatFormat) -> ResponseEncoder:
        """Of a backend's model."""
        tokenizer = backend.tokenizer
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        marks = REASONING_TOKENS.union(chat.opened_reasoning or ())
        reasoning = {i for i in special if tokenizer.convert_ids_to_tokens(i) in marks}
        end_ids = frozenset(backend.end_ids)
        return cls(
            chat=chat,
            end_ids=end_ids,
            vocabulary=max(tokenizer.get_vocab().values()) + 1,
            control=frozenset(special - reasoning) | end_ids,
            longest=context_length(backend),
        )

    def prompt(self, request: Request, response: GivenResponse) -> TokenIds:
        """The prompt's ids, equal to those that came with the response.

        Raises:
            ExtractionError: If the response was generated after another prompt.
        """
        ids = tuple(self.chat.encode(request.system, request.question))
        advice = "the responses were generated with another chat template or instruction (--chat-template FILE)"
        if response.prompt_ids is not None and response.prompt_ids != ids:
            place = _first_difference(response.prompt_ids, ids)
            theirs, ours = (self._shown(found[place : place + 1]) for found in (response.prompt_ids, ids))
            raise ExtractionError(
                f"{response.place}: prompt_ids differ from this model's prompt at token {place}, counted from 0: "
                f"{theirs} in the file, {ours} here; {advice}"
            )
        if response.prompt is not None:
            text = self.chat.rendered_text(request.system, request.question)
            if response.prompt != text:
                raise ExtractionError(
                    f"{response.place}: the prompt differs from this model's at {_where(response.prompt, text)}; "
                    f"{advice}"
                )
        return ids

    def rollout(self, request: Request, response: GivenResponse, prompt: TokenIds) -> Rollout:
        """The response as a rollout.

        Raises:
            ExtractionError: If its ids are none of this model's, do not give its text, or are too many.
        """
        ids, ended = self._ids(response), response.ended
        if ids and ids[-1] in self.end_ids:
            ids, ended = ids[:-1], True
        self._check(ids, response)
        if self.longest is not None and len(prompt) + len(ids) > self.longest:
            raise ExtractionError(
                f"{response.place}: the prompt has {len(prompt):,} tokens and the response {len(ids):,}, but the model "
                f"takes {self.longest:,} together; leave the response out, or cut it"
            )
        return Rollout(request, len(prompt), ids, ended, self.chat.answer(ids))

    def gives_back(self, rollout: Rollout, response: GivenResponse) -> bool:
        """Whether the ids stand for exactly the text that was given, if only a text was."""
        return response.ids is not None or self.chat.decode(rollout.response_ids) == response.text

    def _ids(self, response: GivenResponse) -> TokenIds:
        if response.ids is not None:
            return response.ids
        text = response.text or ""
        ending = next((token for token in self._control_texts() if token and text.endswith(token)), None)
        if ending is not None:
            raise ExtractionError(
                f"{response.place}: the response ends with the text {ending!r}, a control token of this model; give "
                "response_ids, or the text without control tokens"
            )
        return tuple(self.chat.encode_answer(text))

    def _control_texts(self) -> list[str]:
        return list(self.chat.tokenizer.convert_ids_to_tokens(sorted(self.control)))

    def _check(self, ids: TokenIds, response: GivenResponse) -> None:
        for place, token in enumerate(ids):
            if token >= self.vocabulary:
                raise ExtractionError(
                    f"{response.place}: response_ids has {token} at place {place}, but this model's ids end at "
                    f"{self.vocabulary - 1}; were the responses generated by another model?"
                )
            if token in self.control:
                raise ExtractionError(
                    f"{response.place}: response_ids has the control token {self._shown([token])} at place {place} of "
                    f"{len(ids)}; only the last one may be such, and end the turn"
                )
        if response.ids is None or response.text is None:
            return
        given = _trimmed(response.text)
        readings = [_trimmed(self.chat.decode(ids)), _trimmed(self.chat.answer(ids))]
        if given not in readings:
            raise ExtractionError(
                f"{response.place}: response_ids do not give the row's response: they differ at "
                f"{_where(given, readings[0])}"
            )

    def _shown(self, ids: Sequence[int]) -> str:
        return f"{ids[0]} ({self.chat.tokenizer.convert_ids_to_tokens(ids[0])!r})" if ids else "the end"


def _trimmed(text: str) -> str:
    """A text without what programs cut off in different ways: spaces around it, and half a character at its end."""
    return text.strip().rstrip(CUT_OFF).strip()


def _first_difference(one: Sequence[object], other: Sequence[object]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _where(given: str, here: str) -> str:
    place = _first_difference(given, here)
    theirs, ours = (repr(text[place : place + _AROUND]) if text[place:] else "the end" for text in (given, here))
    return f"character {place}, counted from 0: {theirs} in the file, {ours} here"
