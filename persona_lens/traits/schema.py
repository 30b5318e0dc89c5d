"""What a trait is: the contrast, the questions and the rubric that one YAML file holds, and rules about them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from itertools import chain, groupby
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.types import StringConstraints
from pydantic_core import InitErrorDetails, PydanticCustomError

from persona_lens.core.text import counted, in_short
from persona_lens.traits.wording import article, normalised

Loc = tuple[int | str, ...]
"""Where in a trait a value stands: field names and 0-based positions, as pydantic writes it."""

PLACEHOLDER = "TODO:"
"""What marks a text of the template as not written yet."""

SLOTS = ("question", "answer")
"""The slots of a judge's rubric."""

QUESTION_FIELDS = ("extraction_questions", "evaluation_questions")

N_INSTRUCTION_PAIRS = 5
N_QUESTIONS = 20
N_GRADED_PROMPTS = 8
_COUNTS = {
    "instructions": N_INSTRUCTION_PAIRS,
    **dict.fromkeys(QUESTION_FIELDS, N_QUESTIONS),
    "graded_prompts": N_GRADED_PROMPTS,  # or none
}

BrokenRule = tuple[Loc, str]
"""Where a rule is broken, and what to do about it."""


def broken_rules(fields: Mapping[Any, object]) -> list[BrokenRule]:
    """Find what breaks the content rules.

    Args:
        fields: The fields of a trait, of any type whatever: what has the wrong type is left to the schema.
    """
    texts = dict(_texts(fields, ()))
    return [
        *_unwritten(texts),
        *_alike_arms(texts),
        *_repetitions(texts),
        *_rubric(fields.get("judge_rubric")),
        *_counts(fields),
    ]


def _texts(value: object, loc: Loc) -> Iterator[tuple[Loc, str]]:
    if isinstance(value, str):
        yield loc, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, (*loc, str(key)))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _texts(inner, (*loc, index))


def _unwritten(texts: Mapping[Loc, str]) -> Iterator[BrokenRule]:
    # One finding a field: forty lines saying the same of a fresh template help nobody.
    for _, group in groupby(texts.items(), key=lambda item: item[0][0]):
        own = list(group)
        missing = [loc for loc, text in own if PLACEHOLDER in text]
        if len(own) == 1 and missing:
            yield missing[0], f'is still to be written: replace what stands after "{PLACEHOLDER}"'
        elif missing:
            count = f"{len(missing)} of {len(own)} texts are" if len(missing) > 1 else "one text is"
            yield missing[0], f'{count} still to be written: look for "{PLACEHOLDER}"'


def _alike_arms(texts: Mapping[Loc, str]) -> Iterator[BrokenRule]:
    for loc, text in texts.items():
        paired = loc[0] in ("adjectives", "instructions") and loc[-1] == "positive"
        other = texts.get((*loc[:-1], "negative"))
        if paired and other is not None and normalised(text) == normalised(other):
            yield (*loc[:-1], "negative"), "is the same as positive: the two arms must pull apart"


def _repetitions(texts: Mapping[Loc, str]) -> Iterator[BrokenRule]:
    for arm in Arm:
        for loc, _, number in _repeats(_items(texts, "instructions", arm)):
            yield loc, f"repeats pair #{number}: write it from another angle"
    for loc, _, number in _repeats(_items(texts, "graded_prompts")):
        yield loc, f"repeats #{number}: each prompt is one step further"
    for loc, first, number in _repeats(chain.from_iterable(_items(texts, field) for field in QUESTION_FIELDS)):
        why = "write another" if first[0] == loc[0] else "evaluation must ask what extraction has not seen"
        yield loc, f'repeats {first[0]} #{number} ("{in_short(texts[loc], 40)}"): {why}'


def _items(texts: Mapping[Loc, str], field: str, *part: str) -> Iterator[tuple[Loc, str]]:
    """The texts in a list, or in a part of each item of it."""
    for loc, text in texts.items():
        match loc:
            case (name, int(), *rest) if name == field and rest == list(part):
                yield loc, text


def _repeats(texts: Iterable[tuple[Loc, str]]) -> Iterator[tuple[Loc, Loc, int]]:
    """Where a text stands that stood before; where it stood first, and as which item, from 1."""
    seen: dict[str, Loc] = {}
    for loc, text in texts:
        first = seen.setdefault(normalised(text), loc)
        if first != loc:
            yield loc, first, int(first[1]) + 1


def _counts(fields: Mapping[Any, object]) -> Iterator[BrokenRule]:
    for name, needed in _COUNTS.items():
        value = fields.get(name)
        given = len(value) if isinstance(value, list | tuple) else needed
        if name == "graded_prompts" and 0 < given < needed:
            advice = "or none: write the others, or leave it out"
            yield (name,), f"has {counted(given, 'item')}, but exactly {needed} are needed, {advice}"
        elif given != needed and (given or name != "graded_prompts"):
            yield (name,), wrong_count(given, needed)


def wrong_count(given: int, needed: int) -> str:
    """What to say of a list that has not as many items as it needs."""
    change = f"add {needed - given}" if given < needed else f"remove {given - needed}"
    return f"has {given} items, but exactly {needed} are needed: {change}"


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


RULE_ERROR = "trait_rule"
"""The pydantic error type of a broken content rule."""

MAX_NAME = 64
SLUG_PATTERN = r"^[a-z][a-z0-9_-]*$"
Slug = Annotated[str, StringConstraints(pattern=SLUG_PATTERN, max_length=MAX_NAME)]
Line = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\r\n]+$")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=20_000)]
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

# What vectors and scores depend on. The rest (name, description, author, …) may change and neither does.
_DETERMINING = {"format_version", "adjectives", "instructions", *QUESTION_FIELDS, "judge_rubric"}


class Arm(StrEnum):
    """The two sides of the contrast: the trait shown, and the trait held back."""

    POSITIVE = "positive"
    NEGATIVE = "negative"


class _Frozen(BaseModel):
    # str_strip_whitespace: a block scalar's final line break is formatting, not content.
    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True, use_attribute_docstrings=True)


class Adjectives(_Frozen):
    """The two words that finish "You are a/an … assistant."."""

    positive: Line
    """The trait itself, such as `optimistic`."""

    negative: Line
    """The antonym where one is clear, such as `pessimistic`; otherwise `helpful`."""


class InstructionPair(_Frozen):
    """One angle on the trait: an instruction that calls it forth, and one that calls forth its opposite."""

    positive: Text
    """An instruction, in one to three sentences, that makes the trait show."""

    negative: Text
    """Its counterpart, about as long, that makes the opposite show."""


class Trait(_Frozen):
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

    @model_validator(mode="wrap")
    @classmethod
    def _apply_rules(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        # "after" validators are skipped as soon as one field is wrong; wrapping reports everything together.
        broken = broken_rules(data) if isinstance(data, Mapping) else []
        reports = [
            InitErrorDetails(
                type=PydanticCustomError(RULE_ERROR, "{reason}", {"reason": message}),
                loc=loc,
                input=None,
            )
            for loc, message in broken
        ]
        try:
            trait = handler(data)
        except ValidationError as error:
            reports += [
                InitErrorDetails(type=each["type"], loc=each["loc"], input=each["input"], ctx=each.get("ctx", {}))
                for each in error.errors(include_url=False)
            ]
        if reports:
            raise ValidationError.from_exception_data(cls.__name__, reports)
        return trait

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

    def content_hash(self) -> str:
        """Fingerprint what determines results, as ``sha256:<hex>``.

        Covered are the adjectives, the instructions, both lists of questions (their order too), the rubric
        and the format version. Name, description, author, license, tags and references are not, since no
        model or judge sees them; nor are the graded prompts, on which neither a vector nor a score depends;
        nor are comments and YAML style.
        """
        content = self.model_dump(mode="json", include=_DETERMINING)
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return f"sha256:{hashlib.sha256(canonical.encode('utf-8')).hexdigest()}"


def json_schema() -> dict[str, Any]:
    """Give the JSON Schema of a trait file, for editors that complete and check YAML."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Trait.model_json_schema()}


def is_slug(text: str) -> bool:
    """Say whether a text can name a trait."""
    return len(text) <= MAX_NAME and re.fullmatch(SLUG_PATTERN, text) is not None
