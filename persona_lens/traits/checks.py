"""Advice on a trait that the schema accepts: what would make for a muddled vector or a misled judge."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from persona_lens.characters import in_short
from persona_lens.traits.discovery import TraitFile
from persona_lens.traits.parsing import read_with_lines
from persona_lens.traits.problems import Loc, Problem, Severity, TraitError, field_name
from persona_lens.traits.rules import QUESTION_FIELDS, normalised
from persona_lens.traits.schema import Trait

MIN_DESCRIPTION_CHARACTERS = 20
MAX_QUESTION_WORDS = 80
MAX_LENGTH_RATIO = 2.0
"""How many times longer one instruction of a pair may be: length must not become part of the contrast."""
MAX_SIMILARITY = 0.85


@dataclass(frozen=True)
class Advice:
    """One piece of advice, the value it is about, and whether the trait can be used all the same."""

    loc: Loc
    message: str
    severity: Severity = Severity.WARNING


@dataclass(frozen=True)
class Report:
    """What a check of one trait file found.

    Attributes:
        name: The trait's name.
        path: The file's path.
        problems: Errors and warnings, in the order of the lines.
    """

    name: str
    path: str
    problems: tuple[Problem, ...]

    @property
    def errors(self) -> tuple[Problem, ...]:
        """What makes the trait unusable."""
        return tuple(p for p in self.problems if p.severity is Severity.ERROR)

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """What could be better."""
        return tuple(p for p in self.problems if p.severity is Severity.WARNING)


def check_file(file: TraitFile, check: Callable[[Trait], Iterable[Advice]] | None = None) -> Report:
    """Read a trait file and say everything that is wrong with it; never raises for what the file contains.

    Args:
        file: The file.
        check: What to look for beyond the schema: `check_trait`, or `persona_lens.traits.check_deeply`.
    """
    try:
        parsed = read_with_lines(file.location)
    except TraitError as error:
        return Report(file.name, file.path, error.problems or (Problem(file.path, None, "", str(error)),))
    problems = [
        Problem(file.path, parsed.lines.get(advice.loc), field_name(advice.loc), advice.message, advice.severity)
        for advice in (check or check_trait)(parsed.trait)
    ]
    return Report(file.name, file.path, tuple(sorted(problems, key=lambda problem: problem.line or 0)))


def check_trait(trait: Trait) -> list[Advice]:
    """Look for weaknesses that a schema cannot see. No model is asked."""
    return [
        *_description(trait),
        *_instructions(trait),
        *_long_questions(trait),
        *_leaks(trait),
        *_similar_questions(trait),
        *_rubric(trait),
        *_graded_prompts(trait),
    ]


def _description(trait: Trait) -> Iterator[Advice]:
    if len(trait.description) < MIN_DESCRIPTION_CHARACTERS:
        yield Advice(("description",), "says little: a sentence on what the trait is and is not helps its users")


def _instructions(trait: Trait) -> Iterator[Advice]:
    for i, pair in enumerate(trait.instructions):
        positive, negative = len(pair.positive.split()), len(pair.negative.split())
        if max(positive, negative) > MAX_LENGTH_RATIO * min(positive, negative):
            message = f"is unbalanced: {positive} words against {negative}. The vector would carry length as well"
            yield Advice(("instructions", i), message)
    for (i, one), (j, other) in itertools.combinations(enumerate(trait.instructions), 2):
        for arm in ("positive", "negative"):
            if similarity(getattr(one, arm), getattr(other, arm)) >= MAX_SIMILARITY:
                yield Advice(("instructions", j, arm), f"is almost that of pair #{i + 1}: take another angle")


def questions(trait: Trait) -> Iterator[tuple[Loc, str]]:
    """Every question of a trait and where it stands, those for extraction first."""
    for field in QUESTION_FIELDS:
        for i, question in enumerate(getattr(trait, field)):
            yield (field, i), question


def _long_questions(trait: Trait) -> Iterator[Advice]:
    for loc, question in questions(trait):
        words = len(question.split())
        if words > MAX_QUESTION_WORDS:
            yield Advice(loc, f"has {words} words; up to {MAX_QUESTION_WORDS} leave a small model room to answer")


def _leaks(trait: Trait) -> Iterator[Advice]:
    patterns = [family(word) for word in names(trait)]
    for loc, question in questions(trait):
        found = next((match for pattern in patterns if (match := pattern.search(question))), None)
        if found:
            message = f'names the trait ("{found.group()}"): the answer would echo the question, not show the trait'
            yield Advice(loc, message)


def names(trait: Trait) -> list[str]:
    """The words that name a trait or its opposite."""
    # "helpful" names no trait: it is the default of the negative arm.
    return sorted({trait.name, trait.adjectives.positive, trait.adjectives.negative} - {"helpful"})


def family(word: str) -> re.Pattern[str]:
    """Match a word and its relatives: optimistic, optimist, optimism; but polite does not match politics."""
    spaced = re.sub(r"[-_\s]+", " ", word.strip())
    stem = re.escape(spaced).replace(r"\ ", r"[-_\s]+")
    if " " in spaced or len(spaced) <= 6:
        return re.compile(rf"\b{stem}(?:ly|ness|s)?\b", re.IGNORECASE)
    return re.compile(rf"\b{re.escape(spaced[: max(5, len(spaced) - 3)])}\w*", re.IGNORECASE)


def _similar_questions(trait: Trait) -> Iterator[Advice]:
    for (first, one), (second, other) in itertools.combinations(questions(trait), 2):
        if similarity(one, other) >= MAX_SIMILARITY:
            message = f'is almost {field_name(first)} ("{in_short(one, 40)}"): ask something else'
            yield Advice(second, message)


def similarity(one: str, other: str) -> float:
    """How alike two texts are letter by letter, 0 to 1; 0 where that is surely below `MAX_SIMILARITY`."""
    matcher = difflib.SequenceMatcher(None, normalised(one), normalised(other), autojunk=False)
    # The two bounds are cheap, and settle nearly every pair.
    if matcher.real_quick_ratio() < MAX_SIMILARITY or matcher.quick_ratio() < MAX_SIMILARITY:
        return 0.0
    return matcher.ratio()


def _graded_prompts(trait: Trait) -> Iterator[Advice]:
    loc: Loc = ("graded_prompts",)
    lengths = [len(prompt.split()) for prompt in trait.graded_prompts]
    if lengths and max(lengths) > MAX_LENGTH_RATIO * min(lengths):
        message = f"are unbalanced: {min(lengths)} to {max(lengths)} words. Length would vary with the trait"
        yield Advice(loc, message)
    for (i, one), (j, other) in itertools.combinations(enumerate(trait.graded_prompts), 2):
        if similarity(one, other) >= MAX_SIMILARITY:
            yield Advice((*loc, j), f"is almost #{i + 1}: models would hardly tell the two steps apart")


def _rubric(trait: Trait) -> Iterator[Advice]:
    loc: Loc = ("judge_rubric",)
    for slot in ("question", "answer"):
        if not re.search(rf"<([\w-]+)>\s*\{{{slot}\}}\s*</\1>", trait.judge_rubric):
            message = f"has {{{slot}}} bare: between tags, such as <{slot}>…</{slot}>, it is plain where it ends"
            yield Advice(loc, message)
    if not any(family(word).search(trait.judge_rubric) for word in (trait.name, trait.adjectives.positive)):
        yield Advice(loc, f'never says "{trait.adjectives.positive}": is it the rubric of another trait?')
