"""Rules about a trait's content that types cannot state.

They look at the raw fields rather than at a finished `Trait`, so that their findings are reported together
with those of the schema: an author sees every problem of a file at once.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from persona_lens.characters import in_short
from persona_lens.traits.problems import Loc

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


def normalised(text: str) -> str:
    """Fold away what does not make two texts different: case, spacing and the encodings of one character."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


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
