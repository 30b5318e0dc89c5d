"""`external_rollouts`: files of responses, matched to a trait, and as token ids of the model that reads them."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Any

from persona_lens.backend import Backend
from persona_lens.backend.batches import context_length
from persona_lens.backend.tokens import TokenIds
from persona_lens.core.marks import REASONING_TOKENS
from persona_lens.extraction.means import ExtractionError
from persona_lens.extraction.responses import ExternalResponse, read_files
from persona_lens.judging import Judgement, Score
from persona_lens.judging.protocol import EMPTY
from persona_lens.models import ChatFormat
from persona_lens.runs.rollouts import Request, Rollout, Texts
from persona_lens.traits import Arm, Trait

Paths = Path | str | Sequence[Path | str]
_SHOWN = 300  # characters of a text that are compared and shown where it matches nothing
_AROUND = 30  # characters shown where two texts differ
CUT_OFF = "\ufffd"  # what a tokenizer writes for a character that was generated in part


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
        assert response.arm is not None  # of each row that is one
        question, pair, arm = _question(response, trait), _pair(response, trait, response.arm), response.arm
        if question >= questions:
            left_out += 1
            continue
        cell = (question, pair, arm)
        counted[cell] = counted.get(cell, 0) + 1
        sample = counted[cell] - 1 if response.sample is None else response.sample
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
    return _number_of(
        response,
        (response.question_number, response.question and response.question.strip()),
        trait.extraction_questions,
        column="question_number",
        field="question",
        are=f"trait {trait.name} has the questions",
        kind=f"extraction question of trait {trait.name}",
    )


def _pair(response: ExternalResponse, trait: Trait, arm: Arm) -> int:
    return _number_of(
        response,
        (response.pair, response.system),
        [trait.system_prompt(arm, pair) for pair in range(len(trait.instructions))],
        column="pair",
        field="system prompt",
        are=f"trait {trait.name} has the instruction pairs",
        kind=f"system prompt of the {arm} arm of trait {trait.name}",
    )


def _number_of(
    response: ExternalResponse,
    said: tuple[int | None, str | None],
    there: Sequence[str],
    *,
    column: str,
    field: str,
    are: str,
    kind: str,
) -> int:
    """Which of the trait's texts a row means, of which it says the number, the text, or both."""
    number, text = said
    if number is not None and number >= len(there):
        raise ExtractionError(f"{response.place}: {column} {number}, but {are} 0 to {len(there) - 1}")
    if text is None:
        assert number is not None  # of each row that is one
        return number
    if text not in there:
        (nearest,) = get_close_matches(text[:_SHOWN], there, n=1, cutoff=0.0)
        raise ExtractionError(f"{response.place}: {_short(text)} is no {kind}; the nearest is {_short(nearest)}")
    if number is not None and there[number] != text:
        raise ExtractionError(
            f"{response.place}: {column} {number} is {_short(there[number])}, but the row's {field} is {_short(text)}"
        )
    return there.index(text)


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


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")


class ResponseEncoder:
    """Makes token ids of responses, and checks those that they came with.

    Args:
        backend: Whose model reads them.
        chat: Its chat format.
    """

    def __init__(self, backend: Backend, chat: ChatFormat) -> None:
        tokenizer = backend.tokenizer
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        marks = REASONING_TOKENS.union(chat.opened_reasoning or ())
        # Tokens with which reasoning is set apart may stand inside a response.
        reasoning = {i for i in special if tokenizer.convert_ids_to_tokens(i) in marks}
        self.chat = chat
        self._end_ids = frozenset(backend.end_ids)
        self._control = frozenset(special - reasoning) | self._end_ids
        self._vocabulary = max(tokenizer.get_vocab().values()) + 1
        self._longest = context_length(backend)

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
        if ids and ids[-1] in self._end_ids:
            ids, ended = ids[:-1], True
        self._check(ids, response)
        if self._longest is not None and len(prompt) + len(ids) > self._longest:
            raise ExtractionError(
                f"{response.place}: the prompt has {len(prompt):,} tokens and the response {len(ids):,}, but the model "
                f"takes {self._longest:,} together; leave the response out, or cut it"
            )
        return Rollout(request, len(prompt), ids, ended, self.chat.answer(ids))

    def gives_back(self, rollout: Rollout, response: ExternalResponse) -> bool:
        """Whether the ids stand for exactly the text that was given, if only a text was."""
        return response.response_ids is not None or self.chat.decode(rollout.response_ids) == response.response

    def _ids(self, response: ExternalResponse) -> TokenIds:
        if response.response_ids is not None:
            return response.response_ids
        text = response.response or ""
        control = self.chat.tokenizer.convert_ids_to_tokens(sorted(self._control))
        ending = next((token for token in control if token and text.endswith(token)), None)
        if ending is not None:
            raise ExtractionError(
                f"{response.place}: the response ends with the text {ending!r}, a control token of this model; give "
                "response_ids, or the text without control tokens"
            )
        return tuple(self.chat.encode_answer(text))

    def _check(self, ids: TokenIds, response: ExternalResponse) -> None:
        for place, token in enumerate(ids):
            if token >= self._vocabulary:
                raise ExtractionError(
                    f"{response.place}: response_ids has {token} at place {place}, but this model's ids end at "
                    f"{self._vocabulary - 1}; were the responses generated by another model?"
                )
            if token in self._control:
                raise ExtractionError(
                    f"{response.place}: response_ids has the control token {self._shown([token])} at place {place} of "
                    f"{len(ids)}; only the last one may be such, and end the turn"
                )
        if response.response_ids is None or response.response is None:
            return
        given = _trimmed(response.response)
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


@dataclass(frozen=True)
class ExternalScores:
    """Scores that came with the responses, in place of a judge.

    Attributes:
        judgements: One for each response.
        digests: SHA-256 of each file.
    """

    judgements: tuple[Judgement, ...]
    digests: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """See `persona_lens.judging.Judge.describe`."""
        return {"judge": "given", "file_sha256": list(self.digests)}


@dataclass(frozen=True)
class ExternalRollouts(Texts):
    """An extraction's rollouts that another program generated, in the order of its plan.

    Attributes:
        scores: The scores, if every row has one or says that there is none.
        digests: SHA-256 of each file.
        notes: What the user should be told, one sentence each.
    """

    scores: ExternalScores | None
    digests: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What determines the rollouts besides model and trait: the files' content."""
        return {"file_sha256": list(self.digests)}


def external_rollouts(
    backend: Backend,
    chat: ChatFormat,
    trait: Trait,
    paths: Paths,
    *,
    questions: int,
    allow_missing: bool = False,
) -> ExternalRollouts:
    """Read files of responses for an extraction.

    Args:
        backend: The model that will read them; it does not run here.
        chat: Its chat format.
        trait: The trait that they were generated for.
        paths: One file or several, see `persona_lens.extraction.responses.read_responses`.
        questions: How many of the trait's extraction questions are used.
        allow_missing: Go on without responses that an extraction asks for and the files do not hold.

    Raises:
        DataError: If a file cannot be read.
        ExtractionError: If a row does not fit the trait or the model, or responses are missing.
    """
    files = [Path(paths)] if isinstance(paths, Path | str) else [Path(path) for path in paths]
    responses, digests = read_files(files)
    matched = match_responses(responses, trait, questions, allow_missing=allow_missing)
    encoder = ResponseEncoder(backend, chat)
    rollouts, prompts, changed = [], [], 0
    for slot, response in matched.responses:
        request = slot.request(trait)
        prompts.append(encoder.prompt(request, response))
        rollouts.append(encoder.rollout(request, response, prompts[-1]))
        changed += not encoder.gives_back(rollouts[-1], response)
    given = [response.judgement for _, response in matched.responses if response.judgement is not None]
    scores = None
    if len(given) == len(rollouts) and any(each.trait.value is not None for each in given):
        scores = ExternalScores(tuple(map(_of_text, given, rollouts)), digests)
    notes = _notes(matched, len(given), scores, changed)
    return ExternalRollouts(tuple(rollouts), tuple(prompts), scores, digests, notes)


def _of_text(judgement: Judgement, rollout: Rollout) -> Judgement:
    """The judgement; of a response without text that there is none."""
    empty = Score(None, EMPTY)
    return judgement if rollout.response else Judgement(empty, empty if judgement.coherence else None)


def _notes(matched: Matched, scored: int, scores: ExternalScores | None, changed: int) -> tuple[str, ...]:
    total = len(matched.responses)
    notes = {
        f"{matched.missing}; the extraction goes on without them": matched.missing,
        f"{matched.left_out:,} responses belong to questions that are not used, and are left out": matched.left_out,
        f"{changed:,} of {total:,} responses read otherwise once this model's tokenizer has encoded their text, which "
        "changes some texts; give response_ids to read exactly what was generated": changed,
        f"{scored:,} of {total:,} responses come with a score column, so the scores in the file are not used": (
            scored and scores is None
        ),
    }
    return tuple(note for note, holds in notes.items() if holds)
