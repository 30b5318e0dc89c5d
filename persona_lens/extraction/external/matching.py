"""Which request of an extraction each response answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product

from persona_lens.extraction.external.rows import GivenResponse
from persona_lens.extraction.means import ExtractionError
from persona_lens.runs.rollouts import Request
from persona_lens.traits import Arm, Trait

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

    responses: tuple[tuple[Slot, GivenResponse], ...]
    missing: str | None
    left_out: int


def match_responses(given: Sequence[GivenResponse], trait: Trait, questions: int, *, allow_missing: bool) -> Matched:
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
    found: dict[Slot, GivenResponse] = {}
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


def _question(response: GivenResponse, trait: Trait) -> int:
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


def _pair(response: GivenResponse, trait: Trait, arm: Arm) -> int:
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
    first = next(slot for slot in _plan(trait, questions, samples) if slot not in slots)
    counts = " and ".join(f"{count:,} of the {arm} arm" for arm, count in absent.items() if count)
    return (
        f"of {planned:,} responses ({questions} questions, {len(trait.instructions)} pairs, {len(samples)} samples, "
        f"two arms) {counts} are missing, first the {first.arm} arm's sample {first.sample} of question "
        f"{first.question} under pair {first.pair}"
    )


def _plan(trait: Trait, questions: int, samples: Sequence[int]) -> Iterator[Slot]:
    for place in product(range(questions), range(len(trait.instructions)), samples, (False, True)):
        yield Slot(*place)


def _nearest(text: str, choices: Sequence[str]) -> str:
    (nearest,) = get_close_matches(text[:_SHOWN], choices, n=1, cutoff=0.0)
    return _short(nearest)


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")
