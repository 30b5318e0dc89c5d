"""What a trait is: the contrast, the questions and the rubric that one YAML file holds."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.types import StringConstraints
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from persona_lens.traits import prompts
from persona_lens.traits.rules import N_GRADED_PROMPTS, broken_rules

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
        return prompts.system_prompt(self.adjective(arm), self.instruction(arm, pair_index))

    def render_rubric(self, question: str, answer: str) -> str:
        """Write what the judge is asked about one answer.

        Both texts go in literally and in one pass: an answer that contains ``{question}`` stays as it is.
        """
        return prompts.fill_slots(self.judge_rubric, {"question": question, "answer": answer})

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
