"""What a trait is: the contrast, the questions and the rubric that one YAML file holds, and rules about them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from persona_lens.core.text import counted, in_short
from persona_lens.traits.definition import (
    SLOTS,
    BrokenRule,
    Definition,
    Frozen,
    Line,
    Loc,
    Slug,
    Text,
    items_of,
    repeats,
    texts_of,
    unwritten,
    wrong_count,
)
from persona_lens.traits.kind import Kind
from persona_lens.traits.problems import TraitError
from persona_lens.traits.wording import article, normalised

QUESTION_FIELDS = ("extraction_questions", "evaluation_questions")

N_INSTRUCTION_PAIRS = 5
N_QUESTIONS = 20
N_GRADED_PROMPTS = 8
_COUNTS = {
    "instructions": N_INSTRUCTION_PAIRS,
    **dict.fromkeys(QUESTION_FIELDS, N_QUESTIONS),
    "graded_prompts": N_GRADED_PROMPTS,  # or none
}


def _alike_arms(texts: Mapping[Loc, str]) -> Iterator[BrokenRule]:
    for loc, text in texts.items():
        paired = loc[0] in ("adjectives", "instructions") and loc[-1] == "positive"
        other = texts.get((*loc[:-1], "negative"))
        if paired and other is not None and normalised(text) == normalised(other):
            yield (*loc[:-1], "negative"), "is the same as positive: the two arms must pull apart"


def _repetitions(texts: Mapping[Loc, str]) -> Iterator[BrokenRule]:
    for arm in Arm:
        for loc, _, number in repeats(items_of(texts, "instructions", arm)):
            yield loc, f"repeats pair #{number}: write it from another angle"
    for loc, _, number in repeats(items_of(texts, "graded_prompts")):
        yield loc, f"repeats #{number}: each prompt is one step further"
    for loc, first, number in repeats(chain.from_iterable(items_of(texts, field) for field in QUESTION_FIELDS)):
        why = "write another" if first[0] == loc[0] else "evaluation must ask what extraction has not seen"
        yield loc, f'repeats {first[0]} #{number} ("{in_short(texts[loc], 40)}"): {why}'


def _counts(fields: Mapping[Any, object]) -> Iterator[BrokenRule]:
    for name, needed in _COUNTS.items():
        value = fields.get(name)
        given = len(value) if isinstance(value, list | tuple) else needed
        if name == "graded_prompts" and 0 < given < needed:
            advice = "or none: write the others, or leave it out"
            yield (name,), f"has {counted(given, 'item')}, but exactly {needed} are needed, {advice}"
        elif given != needed and (given or name != "graded_prompts"):
            yield (name,), wrong_count(given, needed)


def _rubric(rubric: object) -> Iterator[BrokenRule]:
    loc = ("judge_rubric",)
    if not isinstance(rubric, str):
        return
    for slot in SLOTS:
        count = rubric.count(f"{{{slot}}}")
        if count == 0:
            yield loc, f"has no slot {{{slot}}}: write {{{slot}}} where the {slot} is to stand"
        elif count > 1:
            yield loc, f"has the slot {{{slot}}} {count} times: keep one, and say “the {slot}” elsewhere"
    if not re.search(r"(?<!\d)0\b.*?\b100\b", rubric, re.DOTALL):
        yield loc, "does not name the scale: say that the answer is a number from 0 to 100"
    if not re.search(r"\bREFUSAL\b", rubric):
        yield loc, "does not say when to answer REFUSAL: say what the judge writes for a refusal"


# How many items there are is a content rule: pydantic would count the valid ones only, and name a bad one twice.
Questions = Annotated[
    tuple[Text, ...],
    Field(json_schema_extra={"minItems": N_QUESTIONS, "maxItems": N_QUESTIONS, "uniqueItems": True}),
]
GradedPrompts = Annotated[
    tuple[Text, ...],
    Field(
        json_schema_extra={
            "maxItems": N_GRADED_PROMPTS,
            "uniqueItems": True,
            "anyOf": [{"maxItems": 0}, {"minItems": N_GRADED_PROMPTS}],
        }
    ),
]


class Arm(StrEnum):
    """The two sides of the contrast: the trait shown, and the trait held back."""

    POSITIVE = "positive"
    NEGATIVE = "negative"


class Adjectives(Frozen):
    """The two words that finish "You are a/an … assistant."."""

    positive: Line
    """The trait itself, such as `optimistic`."""

    negative: Line
    """The antonym where one is clear, such as `pessimistic`; otherwise `helpful`."""


class InstructionPair(Frozen):
    """One angle on the trait: an instruction that calls it forth, and one that calls forth its opposite."""

    positive: Text
    """An instruction, in one to three sentences, that makes the trait show."""

    negative: Text
    """Its counterpart, about as long, that makes the opposite show."""


class Trait(Definition):
    """A character trait, described well enough to be found in any chat model (paper, section 2.1)."""

    format_version: Literal[1]
    """The version of this file format: 1."""

    name: Slug
    """Lower-case letters, digits, `-` and `_`, beginning with a letter; the file is called NAME.yaml."""

    description: Text
    """What the trait is, and what it is not, for people; no model sees it."""

    adjectives: Adjectives
    """The adjective of each arm."""

    instructions: Annotated[
        tuple[InstructionPair, ...],
        Field(json_schema_extra={"minItems": N_INSTRUCTION_PAIRS, "maxItems": N_INSTRUCTION_PAIRS}),
    ]
    """Five pairs of contrastive system instructions."""

    extraction_questions: Questions
    """Twenty questions that leave room for the trait, from which the vector is made."""

    evaluation_questions: Questions
    """Twenty other questions, held out to measure the trait."""

    judge_rubric: Text
    """What the judge is asked, with one slot `{question}` and one slot `{answer}`; other braces are plain.
    It has to name the scale from 0 to 100 and the word REFUSAL."""

    graded_prompts: GradedPrompts = ()
    """Eight whole system prompts, the first holding the trait back most and the last calling it forth most; may be
    left out. `persona-lens monitor study` answers under each of them. They may name the trait."""

    author: str = ""
    """Who wrote the file."""

    license: str = ""
    """The licence of the file, as an SPDX identifier such as `MIT`."""

    tags: tuple[Slug, ...] = ()
    """Words to find the trait by."""

    references: tuple[Text, ...] = ()
    """Papers or pages that the description rests on."""

    determining: ClassVar[frozenset[str]] = frozenset(
        {"format_version", "adjectives", "instructions", *QUESTION_FIELDS, "judge_rubric"}
    )

    @classmethod
    def broken_rules(cls, fields: Mapping[Any, object]) -> list[BrokenRule]:
        """See `Definition.broken_rules`."""
        texts = texts_of(fields)
        return [
            *unwritten(texts),
            *_alike_arms(texts),
            *_repetitions(texts),
            *_rubric(fields.get("judge_rubric")),
            *_counts(fields),
        ]

    def adjective(self, arm: Arm) -> str:
        """Give the adjective of an arm."""
        return self.adjectives.positive if Arm(arm) is Arm.POSITIVE else self.adjectives.negative

    def instruction(self, arm: Arm, pair_index: int) -> str:
        """Give one instruction.

        Raises:
            IndexError: ``pair_index`` is not one of 0 … 4.
        """
        if not 0 <= pair_index < len(self.instructions):
            last = len(self.instructions) - 1
            raise IndexError(f"pair_index is {pair_index}, but {self.name} has the pairs 0 to {last}")
        pair = self.instructions[pair_index]
        return pair.positive if Arm(arm) is Arm.POSITIVE else pair.negative

    def system_prompt(self, arm: Arm, pair_index: int) -> str:
        """Write the system prompt of a rollout: "You are a/an {adjective} assistant. {instruction}".

        Args:
            arm: Which side of the contrast.
            pair_index: Which of the instruction pairs, 0 … 4.

        Raises:
            IndexError: ``pair_index`` is not one of 0 … 4.
        """
        adjective = self.adjective(arm)
        return f"You are {article(adjective)} {adjective} assistant. {self.instruction(arm, pair_index)}"

    def middle_prompt(self, arm: Arm) -> str:
        """Write the system prompt of the middle pair, which the likelihood judge, as it is by default, does not use."""
        return self.system_prompt(arm, len(self.instructions) // 2)

    def content_hash(self) -> str:
        """Fingerprint what determines results, as ``sha256:<hex>``.

        Covered are the adjectives, the instructions, both lists of questions (their order too), the rubric
        and the format version. Name, description, author, license, tags and references are not, since no
        model or judge sees them; nor are the graded prompts, on which neither a vector nor a score depends;
        nor are comments and YAML style.
        """
        return super().content_hash()


TRAITS = Kind(
    "trait", Trait, TraitError, "a character trait", {"adjectives": Adjectives, "instructions": InstructionPair}
)


def json_schema(kind: Kind[Any] = TRAITS) -> dict[str, Any]:
    """Give the JSON Schema of a trait file, or of another kind, for editors that complete and check YAML."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **kind.model.model_json_schema()}
