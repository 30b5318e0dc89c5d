"""Responses matched to a trait, and as token ids of the model that reads them, checked against its chat template."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from typing import TYPE_CHECKING

from persona_lens.backend import Backend
from persona_lens.backend.batches import context_length
from persona_lens.backend.tokens import TokenIds
from persona_lens.extraction.external.rows import ExternalResponse
from persona_lens.extraction.means import ExtractionError
from persona_lens.models.reasoning import REASONING_TOKENS
from persona_lens.runs.rollouts import Request, Rollout
from persona_lens.traits import Arm, Trait

if TYPE_CHECKING:
    from persona_lens.models import ChatFormat


_SHOWN = 300  # characters of a text that are compared and shown where it matches nothing


@dataclass(frozen=True, order=True)
class Slot:
    """The place of a response in an extraction's plan, in the plan's order."""

    question: int
    pair: int
    sample: int
    negative: bool

    @property
    def arm(self) -> Arm:
        """The arm."""
        return Arm.NEGATIVE if self.negative else Arm.POSITIVE

    def request(self, trait: Trait) -> Request:
        """What was asked there. Its seed is 0: nothing will be sampled."""
        labels = {
            "arm": self.arm.value,
            "question_number": self.question,
            "pair": self.pair,
            "sample": self.sample,
        }
        system = trait.system_prompt(self.arm, self.pair)
        return Request(system, trait.extraction_questions[self.question], 0, labels)


@dataclass(frozen=True)
class Matched:
    """Responses by their slots, in the order of the plan.

    Attributes:
        responses: Each response with its slot.
        missing: Slots of the plan to which there is none, as a sentence; None where there are all.
        left_out: How many responses belong to questions that the plan leaves out.
    """

    responses: tuple[tuple[Slot, ExternalResponse], ...]
    missing: str | None
    left_out: int


def match_responses(given: Sequence[ExternalResponse], trait: Trait, questions: int, *, allow_missing: bool) -> Matched:
    """Find what each response answers.

    The plan asks for as many samples of each question under each instruction as there are different ones in the file.

    Args:
        given: The responses.
        trait: Gives questions and instructions.
        questions: How many of its extraction questions are used.
        allow_missing: Go on without responses that the plan has and the file has not.

    Raises:
        ExtractionError: If a response answers nothing of the trait, or the same as another; if an arm has none; if some
            are missing and that is not allowed.
    """
    found: dict[Slot, ExternalResponse] = {}
    counted: dict[tuple[int, int, Arm], int] = {}
    left_out = 0
    for response in given:
        question, arm = _question(response, trait), Arm(response.labels["arm"])
        pair = _pair(response, trait, arm)
        if question >= questions:
            left_out += 1
            continue
        cell = (question, pair, arm)
        sample = response.labels.get("sample", counted.get(cell, 0))
        counted[cell] = counted.get(cell, 0) + 1
        slot = Slot(question, pair, sample, arm is Arm.NEGATIVE)
        if slot in found:
            raise ExtractionError(
                f"{response.place} and {found[slot].place} are both the {arm} arm's sample {sample} of question "
                f"{question} under pair {pair}; number the samples, in every row or in none"
            )
        found[slot] = response
    for arm in Arm:
        if not any(slot.arm is arm for slot in found):
            raise ExtractionError(f"no response belongs to the {arm} arm; a vector is the difference of both")
    missing = _missing(found.keys(), trait, questions)
    if missing and not allow_missing:
        raise ExtractionError(f"{missing}. Add them, use fewer questions, or go on without (--allow-missing)")
    return Matched(tuple(sorted(found.items(), key=lambda item: item[0])), missing, left_out)


def _question(response: ExternalResponse, trait: Trait) -> int:
    labels, questions = response.labels, trait.extraction_questions
    number = labels.get("question_number")
    if number is not None and number >= len(questions):
        raise ExtractionError(
            f"{response.place}: question_number {number}, but trait {trait.name} has the questions 0 to "
            f"{len(questions) - 1}"
        )
    if "question" not in labels:
        return int(labels["question_number"])
    text = labels["question"].strip()
    if text not in questions:
        raise ExtractionError(
            f"{response.place}: {_short(text)} is no extraction question of trait {trait.name}; "
            f"the nearest is {_nearest(text, questions)}"
        )
    if number is not None and questions[number] != text:
        raise ExtractionError(
            f"{response.place}: question_number {number} is {_short(questions[number])}, but the row's question is "
            f"{_short(text)}"
        )
    return questions.index(text)


def _pair(response: ExternalResponse, trait: Trait, arm: Arm) -> int:
    labels, pairs = response.labels, range(len(trait.instructions))
    number = labels.get("pair")
    if number is not None and number not in pairs:
        raise ExtractionError(
            f"{response.place}: pair {number}, but trait {trait.name} has the instruction pairs 0 to {pairs[-1]}"
        )
    if "system" not in labels:
        return int(labels["pair"])
    prompts = [trait.system_prompt(arm, pair) for pair in pairs]
    system = labels["system"]
    if system not in prompts:
        raise ExtractionError(
            f"{response.place}: {_short(system)} is no system prompt of the {arm} arm of trait {trait.name}; "
            f"the nearest is {_nearest(system, prompts)}"
        )
    if number is not None and prompts[number] != system:
        raise ExtractionError(f"{response.place}: the row's system prompt is not that of its pair {number}")
    return prompts.index(system)


def _missing(slots: Set[Slot], trait: Trait, questions: int) -> str | None:
    samples = sorted({slot.sample for slot in slots})
    planned = questions * len(trait.instructions) * len(samples) * len(Arm)
    if len(slots) == planned:
        return None
    absent = {arm: planned // len(Arm) - sum(slot.arm is arm for slot in slots) for arm in Arm}
    plan = product(range(questions), range(len(trait.instructions)), samples, (False, True))
    first = next(slot for place in plan if (slot := Slot(*place)) not in slots)
    counts = " and ".join(f"{count:,} of the {arm} arm" for arm, count in absent.items() if count)
    return (
        f"of {planned:,} responses ({questions} questions, {len(trait.instructions)} pairs, {len(samples)} samples, "
        f"two arms) {counts} are missing, first the {first.arm} arm's sample {first.sample} of question "
        f"{first.question} under pair {first.pair}"
    )


def _nearest(text: str, choices: Sequence[str]) -> str:
    (nearest,) = get_close_matches(text[:_SHOWN], choices, n=1, cutoff=0.0)
    return _short(nearest)


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")


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

    def prompt(self, request: Request, response: ExternalResponse) -> TokenIds:
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

    def rollout(self, request: Request, response: ExternalResponse, prompt: TokenIds) -> Rollout:
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

    def gives_back(self, rollout: Rollout, response: ExternalResponse) -> bool:
        """Whether the ids stand for exactly the text that was given, if only a text was."""
        return response.ids is not None or self.chat.decode(rollout.response_ids) == response.text

    def _ids(self, response: ExternalResponse) -> TokenIds:
        if response.ids is not None:
            return response.ids
        text = response.text or ""
        control = self.chat.tokenizer.convert_ids_to_tokens(sorted(self.control))
        ending = next((token for token in control if token and text.endswith(token)), None)
        if ending is not None:
            raise ExtractionError(
                f"{response.place}: the response ends with the text {ending!r}, a control token of this model; give "
                "response_ids, or the text without control tokens"
            )
        return tuple(self.chat.encode_answer(text))

    def _check(self, ids: TokenIds, response: ExternalResponse) -> None:
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
