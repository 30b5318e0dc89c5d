"""What a trait is: the contrast, the questions and the rubric that one YAML file holds, and rules about them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.types import StringConstraints
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from persona_lens.core.text import in_short
from persona_lens.traits import wording
from persona_lens.traits.document import Loc
from persona_lens.traits.wording import normalised

PLACEHOLDER = "TODO:"
"""What marks a text of the template as not written yet."""

SLOTS = ("question", "answer")
"""The slots of a judge's rubric."""

QUESTION_FIELDS = ("extraction_questions", "evaluation_questions")

N_GRADED_PROMPTS = 8


class BrokenRule(NamedTuple):
    """Where a rule is broken, and what to do about it."""

    loc: Loc
    message: str


def broken_rules(fields: Mapping[object, object]) -> list[BrokenRule]:
    """Find what breaks the content rules.

    Args:
        fields: The fields of a trait, of any type whatever: what has the wrong type is left to the schema.

    Returns:
        The broken rules, in the order of the fields.
    """
    return [
        *_unwritten(fields),
        *_same_in_both_arms(fields),
        *_repeated_instructions(fields),
        *_repeated_questions(fields),
        *_rubric(fields),
        *_graded_prompts(fields),
    ]


def _unwritten(fields: Mapping[object, object]) -> Iterator[BrokenRule]:
    # One finding a field: forty lines saying the same of a fresh template help nobody.
    for name, value in fields.items():
        texts = list(_texts(value, (str(name),)))
        missing = [loc for loc, text in texts if PLACEHOLDER in text]
        if len(texts) == 1 and missing:
            yield BrokenRule(missing[0], f'is still to be written: replace what stands after "{PLACEHOLDER}"')
        elif missing:
            count = f"{len(missing)} of {len(texts)} texts are" if len(missing) > 1 else "one text is"
            yield BrokenRule(missing[0], f'{count} still to be written: look for "{PLACEHOLDER}"')


def _texts(value: object, loc: Loc) -> Iterator[tuple[Loc, str]]:
    if isinstance(value, str):
        yield loc, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, (*loc, str(key)))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _texts(inner, (*loc, index))


def _same_in_both_arms(fields: Mapping[object, object]) -> Iterator[BrokenRule]:
    pairs: list[tuple[Loc, object]] = [(("adjectives",), fields.get("adjectives"))]
    pairs += [(("instructions", i), pair) for i, pair in _items(fields.get("instructions"))]
    for loc, pair in pairs:
        texts = dict(_texts(pair, ()))
        positive, negative = texts.get(("positive",)), texts.get(("negative",))
        if positive is not None and negative is not None and normalised(positive) == normalised(negative):
            yield BrokenRule((*loc, "negative"), "is the same as positive: the two arms must pull apart")


def _repeated_instructions(fields: Mapping[object, object]) -> Iterator[BrokenRule]:
    seen: dict[tuple[Loc, str], int] = {}
    for i, pair in _items(fields.get("instructions")):
        for loc, text in _texts(pair, ("instructions", i)):
            first = seen.setdefault((loc[2:], normalised(text)), i)
            if first != i:
                yield BrokenRule(loc, f"repeats pair #{first + 1}: write it from another angle")


def _repeated_questions(fields: Mapping[object, object]) -> Iterator[BrokenRule]:
    seen: dict[str, tuple[str, int]] = {}
    for field in QUESTION_FIELDS:
        for i, question in _items(fields.get(field)):
            if not isinstance(question, str):
                continue
            first = seen.setdefault(normalised(question), (field, i))
            if first == (field, i):
                continue
            held_out = "evaluation must ask what extraction has not seen"
            why = "write another" if first[0] == field else held_out
            message = f'repeats {first[0]} #{first[1] + 1} ("{in_short(question, 40)}"): {why}'
            yield BrokenRule((field, i), message)


def _items(value: object) -> Iterator[tuple[int, object]]:
    return enumerate(value if isinstance(value, list | tuple) else ())


def _graded_prompts(fields: Mapping[object, object]) -> Iterator[BrokenRule]:
    prompts = list(_items(fields.get("graded_prompts")))
    if 0 < len(prompts) < N_GRADED_PROMPTS:
        count = f"{len(prompts)} {'item' if len(prompts) == 1 else 'items'}"
        message = f"has {count}, but exactly {N_GRADED_PROMPTS} are needed, or none: write the others, or leave it out"
        yield BrokenRule(("graded_prompts",), message)
    seen: dict[str, int] = {}
    for i, prompt in prompts:
        if isinstance(prompt, str) and (first := seen.setdefault(normalised(prompt), i)) != i:
            yield BrokenRule(("graded_prompts", i), f"repeats #{first + 1}: each prompt is one step further")


def _rubric(fields: Mapping[object, object]) -> Iterator[BrokenRule]:
    rubric, loc = fields.get("judge_rubric"), ("judge_rubric",)
    if not isinstance(rubric, str):
        return
    for slot in SLOTS:
        count = rubric.count(f"{{{slot}}}")
        if count == 0:
            yield BrokenRule(loc, f"has no slot {{{slot}}}: write {{{slot}}} where the {slot} is to stand")
        elif count > 1:
            message = f"has the slot {{{slot}}} {count} times: keep one, and say “the {slot}” elsewhere"
            yield BrokenRule(loc, message)
    if not re.search(r"(?<!\d)0\b.*?\b100\b", rubric, re.DOTALL):
        yield BrokenRule(loc, "does not name the scale: say that the answer is a number from 0 to 100")
    if not re.search(r"\bREFUSAL\b", rubric):
        yield BrokenRule(loc, "does not say when to answer REFUSAL: say what the judge writes for a refusal")


N_INSTRUCTION_PAIRS = 5
N_QUESTIONS = 20
RULE_ERROR = "trait_rule"
"""The pydantic error type of a broken content rule."""

MAX_NAME = 64
SLUG_PATTERN = r"^[a-z][a-z0-9_-]*$"
Slug = Annotated[str, StringConstraints(pattern=SLUG_PATTERN, max_length=MAX_NAME)]
Line = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\r\n]+$")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=20_000)]
Questions = Annotated[
    tuple[Text, ...],
    Field(min_length=N_QUESTIONS, max_length=N_QUESTIONS, json_schema_extra={"uniqueItems": True}),
]
# All or none; that they are not fewer is a content rule, since an empty list is as good as no field.
GradedPrompts = Annotated[
    tuple[Text, ...],
    Field(
        max_length=N_GRADED_PROMPTS,
        json_schema_extra={"uniqueItems": True, "anyOf": [{"maxItems": 0}, {"minItems": N_GRADED_PROMPTS}]},
    ),
]

# What vectors and scores depend on. The rest (name, description, author, …) may change and neither does.
_DETERMINING = frozenset(
    {
        "format_version",
        "adjectives",
        "instructions",
        "extraction_questions",
        "evaluation_questions",
        "judge_rubric",
    }
)


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
        Field(min_length=N_INSTRUCTION_PAIRS, max_length=N_INSTRUCTION_PAIRS),
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
                type=PydanticCustomError(RULE_ERROR, "{reason}", {"reason": rule.message}),
                loc=rule.loc,
                input=None,
            )
            for rule in broken
        ]
        try:
            trait = handler(data)
        except ValidationError as error:
            reports += [_recounted(e) for e in error.errors(include_url=False) if not _is_miscounted(e)]
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
        return wording.system_prompt(self.adjective(arm), self.instruction(arm, pair_index))

    def render_rubric(self, question: str, answer: str) -> str:
        """Write what the judge is asked about one answer.

        Both texts go in literally and in one pass: an answer that contains ``{question}`` stays as it is.
        """
        return wording.fill_slots(self.judge_rubric, {"question": question, "answer": answer})

    def content_hash(self) -> str:
        """Fingerprint what determines results, as ``sha256:<hex>``.

        Covered are the adjectives, the instructions, both lists of questions (their order too), the rubric
        and the format version. Name, description, author, license, tags and references are not, since no
        model or judge sees them; nor are the graded prompts, on which neither a vector nor a score depends;
        nor are comments and YAML style.
        """
        content = self.model_dump(mode="json", include=set(_DETERMINING))
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return f"sha256:{hashlib.sha256(canonical.encode('utf-8')).hexdigest()}"


def _is_miscounted(error: ErrorDetails) -> bool:
    # Pydantic counts the valid items only: one bad question of twenty would be reported as a missing one as well.
    given, needed = error["input"], error.get("ctx", {}).get("min_length")
    return error["type"] == "too_short" and isinstance(given, list | tuple) and len(given) == needed


def _recounted(error: ErrorDetails) -> InitErrorDetails:
    context = dict(error.get("ctx", {}))
    if "actual_length" in context and isinstance(error["input"], list | tuple):
        context["actual_length"] = len(error["input"])
    return InitErrorDetails(type=error["type"], loc=error["loc"], input=error["input"], ctx=context)


def json_schema() -> dict[str, Any]:
    """Give the JSON Schema of a trait file, for editors that complete and check YAML."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Trait.model_json_schema()}


def is_slug(text: str) -> bool:
    """Say whether a text can name a trait."""
    return len(text) <= MAX_NAME and re.match(SLUG_PATTERN, text) is not None and not text.endswith("\n")
