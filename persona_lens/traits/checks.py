"""Advice on what the schema accepts: what would make for a muddled vector or a misled judge."""

from __future__ import annotations

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from persona_lens.core.text import in_short
from persona_lens.traits.definition import SLOTS, Definition, Loc
from persona_lens.traits.discovery import DefinitionFile
from persona_lens.traits.kind import Content
from persona_lens.traits.parsing import read
from persona_lens.traits.problems import DefinitionError, Problem, Severity, field_name
from persona_lens.traits.role import Role
from persona_lens.traits.schema import QUESTION_FIELDS, Arm, Trait
from persona_lens.traits.wording import content_words, normalised, overlaps, roots, shared_run, stem, words

MIN_DESCRIPTION_CHARACTERS = 20
MAX_QUESTION_WORDS = 80
MAX_PROMPT_WORDS = 80
MAX_GRADE_CHARACTERS = 300
MAX_LENGTH_RATIO = 2.0
"""How many times longer one instruction of a pair may be: length must not become part of the contrast."""
MAX_SIMILARITY = 0.85


@dataclass(frozen=True)
class Advice:
    """One piece of advice, the value it is about, and whether it can be used all the same."""

    loc: Loc
    message: str
    severity: Severity = Severity.WARNING


@dataclass(frozen=True)
class Report:
    """What a check of one file found.

    Attributes:
        name: The trait's name, or the role's.
        path: The file's path.
        problems: Errors and warnings, in the order of the lines.
    """

    name: str
    path: str
    problems: tuple[Problem, ...]

    @property
    def errors(self) -> tuple[Problem, ...]:
        """What makes it unusable."""
        return tuple(p for p in self.problems if p.severity is Severity.ERROR)

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """What could be better."""
        return tuple(p for p in self.problems if p.severity is Severity.WARNING)


def check_file(file: DefinitionFile[Content], check: Callable[[Content], Iterable[Advice]] | None = None) -> Report:
    """Read a file and say everything that is wrong with it; never raises for what the file contains.

    Args:
        file: The file.
        check: What to look for beyond the schema, such as `check_deeply`; None is `check_trait` or `check_role`.
    """
    try:
        found, places = read(file.kind, file.location)
    except DefinitionError as error:
        return Report(file.name, file.path, error.problems or (Problem(file.path, None, "", str(error)),))
    advised = check(found) if check else _check(found)
    problems = [
        Problem(file.path, places[advice.loc][0], field_name(advice.loc), advice.message, advice.severity)
        for advice in advised
    ]
    return Report(file.name, file.path, tuple(sorted(problems, key=lambda problem: problem.line or 0)))


def _check(found: Definition) -> list[Advice]:
    match found:
        case Trait():
            return check_trait(found)
        case Role():
            return check_role(found)
        case _:
            return []


def check_role(role: Role) -> list[Advice]:
    """Look for weaknesses of a role that a schema cannot see. No model is asked."""
    return [*_description(role), *_system_prompts(role), *_grades(role)]


def _description(found: Trait | Role) -> Iterator[Advice]:
    if len(found.description) < MIN_DESCRIPTION_CHARACTERS:
        reader = "its judge" if isinstance(found, Role) else "its users"
        message = f"says little: a sentence on what the {'role' if isinstance(found, Role) else 'trait'}"
        yield Advice(("description",), f"{message} is and is not helps {reader}")


def _system_prompts(role: Role) -> Iterator[Advice]:
    prompts: list[tuple[Loc, str]] = [(("system_prompts", i), text) for i, text in enumerate(role.system_prompts)]
    for loc, prompt in prompts:
        count = len(prompt.split())
        if count > MAX_PROMPT_WORDS:
            yield Advice(loc, f"has {count} words; up to {MAX_PROMPT_WORDS} keep a small model in its role")
    for first, _, loc in _alike(prompts):
        yield Advice(loc, f"is almost #{int(first[1]) + 1}: take another angle")


def _grades(role: Role) -> Iterator[Advice]:
    for i, text in enumerate(role.grades):
        if len(text) > MAX_GRADE_CHARACTERS:
            yield Advice(("grades", i), f"has {len(text)} characters; a judge keeps up to {MAX_GRADE_CHARACTERS} apart")


def check_trait(trait: Trait) -> list[Advice]:
    """Look for weaknesses that a schema cannot see. No model is asked."""
    return [*_description(trait), *_instructions(trait), *_questions(trait), *_rubric(trait), *_graded_prompts(trait)]


def questions(trait: Trait) -> Iterator[tuple[Loc, str]]:
    """Every question of a trait and where it stands, those for extraction first."""
    for field in QUESTION_FIELDS:
        for i, question in enumerate(getattr(trait, field)):
            yield (field, i), question


def instructions(trait: Trait, *arms: Arm) -> Iterator[tuple[Loc, str]]:
    """Every instruction of these arms and where it stands, pair by pair."""
    for i in range(len(trait.instructions)):
        for arm in arms:
            yield ("instructions", i, arm.value), trait.instruction(arm, i)


def similarity(one: str, other: str) -> float:
    """How alike two texts are letter by letter, 0 to 1; 0 where that is surely below `MAX_SIMILARITY`."""
    matcher = difflib.SequenceMatcher(None, normalised(one), normalised(other), autojunk=False)
    # The two bounds are cheap, and settle nearly every pair.
    if matcher.real_quick_ratio() < MAX_SIMILARITY or matcher.quick_ratio() < MAX_SIMILARITY:
        return 0.0
    return matcher.ratio()


def _alike(texts: Iterable[tuple[Loc, str]]) -> Iterator[tuple[Loc, str, Loc]]:
    """A text and its place, and the place of another that is almost the same."""
    for (first, one), (second, other) in itertools.combinations(texts, 2):
        if similarity(one, other) >= MAX_SIMILARITY:
            yield first, one, second


def _instructions(trait: Trait) -> Iterator[Advice]:
    for i, (positive, negative) in enumerate(_lengths(trait)):
        if max(positive, negative) > MAX_LENGTH_RATIO * min(positive, negative):
            message = f"is unbalanced: {positive} words against {negative}. The vector would carry length as well"
            yield Advice(("instructions", i), message)
    for arm in Arm:
        for first, _, loc in _alike(instructions(trait, arm)):
            yield Advice(loc, f"is almost that of pair #{int(first[1]) + 1}: take another angle")


def _lengths(trait: Trait) -> list[tuple[int, int]]:
    """Words of the two instructions of each pair."""
    return [(len(pair.positive.split()), len(pair.negative.split())) for pair in trait.instructions]


def _questions(trait: Trait) -> Iterator[Advice]:
    patterns = [family(word) for word in names(trait)]
    for loc, question in questions(trait):
        count = len(question.split())
        if count > MAX_QUESTION_WORDS:
            yield Advice(loc, f"has {count} words; up to {MAX_QUESTION_WORDS} leave a small model room to answer")
        if named := _found(patterns, question):
            message = f'names the trait ("{named}"): the answer would echo the question, not show the trait'
            yield Advice(loc, message)
    for first, one, loc in _alike(questions(trait)):
        yield Advice(loc, f'is almost {field_name(first)} ("{in_short(one, 40)}"): ask something else')


def _found(patterns: Iterable[re.Pattern[str]], text: str) -> str | None:
    """What the first of these patterns that occurs in a text has found there."""
    return next((match.group() for pattern in patterns if (match := pattern.search(text))), None)


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


def _graded_prompts(trait: Trait) -> Iterator[Advice]:
    prompts: list[tuple[Loc, str]] = [(("graded_prompts", i), prompt) for i, prompt in enumerate(trait.graded_prompts)]
    lengths = [len(prompt.split()) for _, prompt in prompts]
    if lengths and max(lengths) > MAX_LENGTH_RATIO * min(lengths):
        message = f"are unbalanced: {min(lengths)} to {max(lengths)} words. Length would vary with the trait"
        yield Advice(("graded_prompts",), message)
    for first, _, loc in _alike(prompts):
        yield Advice(loc, f"is almost #{int(first[1]) + 1}: models would hardly tell the two steps apart")


def _rubric(trait: Trait) -> Iterator[Advice]:
    loc: Loc = ("judge_rubric",)
    for slot in SLOTS:
        if not re.search(rf"<([\w-]+)>\s*\{{{slot}\}}\s*</\1>", trait.judge_rubric):
            message = f"has {{{slot}}} bare: between tags, such as <{slot}>…</{slot}>, it is plain where it ends"
            yield Advice(loc, message)
    if not any(family(word).search(trait.judge_rubric) for word in (trait.name, trait.adjectives.positive)):
        yield Advice(loc, f'never says "{trait.adjectives.positive}": is it the rubric of another trait?')


# The seven built-in traits set the scale: their most alike questions reach 0.34, rewordings of one begin at 0.47.
MAX_OVERLAP = 0.45
"""Cosine of two questions from which one is taken for the other in different words."""
SAME_QUESTION = 0.85
"""Cosine from which a held-out question asks just what extraction has asked."""
MAX_ARM_RATIO = 1.2
"""How many times longer the instructions of one arm may be in all, when every pair leans the same way."""
MAX_SAME_OPENING = 10
"""How many of the forty questions may begin with the same two words."""
QUOTE_WORDS = 5
"""Length of a run of words in an instruction and in a question that is no coincidence."""

_STYLE = re.compile(
    r"\b(?:pretend\b|role-?play|imagine (?:that )?you(?:'re| are)\b|act as\b|you are (?:now )?an? [\w -]{0,30}"
    r"\b(?:assistant|ai|bot|character|persona)\b"
    r"|(?:answer|reply|respond|speak|talk|write|behave|act|sound|explain|say|tell)\b[^.?!]{0,30}?\b"
    r"(?:as if you|as though you|like (?:you(?:'re| are)|an? [\w-]+ (?:person|assistant|character)\b)"
    r"|(?:in|with) an? (?:[\w-]+ ){1,3}(?:tone|voice|style|manner|way|attitude|fashion)\b))",
    re.IGNORECASE,
)
_REQUEST = re.compile(
    r"^(?:please |now |just )*(?:be|make|give|tell|show|write|say|act|talk|speak|sound|answer|reply|respond|explain|"
    r"describe|help|try|don't|do not|never|always|invent|flatter|insult|praise)\b|\b(?:can|could|would|will) you\b|"
    r"\b(?:i want|i'd like) you to\b",
    re.IGNORECASE,
)
_GUARD = re.compile(
    r"\b(?:follow no|(?:do not|don't|never) (?:follow|obey)|ignore (?:any|all))\b[^.]{0,40}\binstructions?\b"
    r"|\b(?:is|are) (?:only |just )?(?:data|material)\b",
    re.IGNORECASE,
)
_ANCHOR = re.compile(r"^\W*(\d{1,3})\b\s*(?:[:=–—-]|points?\b)", re.MULTILINE)


def check_deeply(trait: Trait, related: Sequence[str] = ()) -> list[Advice]:
    """Do the checks of `check_trait`, and those that compare every part of a trait with the others.

    No model is asked, so what rests on meaning alone stays unseen: synonyms, and questions that merely hint.

    Args:
        trait: The trait.
        related: More words that would give the trait away, beside its name, its adjectives and their relatives.
    """
    shallow = check_trait(trait)
    deep = [
        *_paraphrases(trait),
        *_named_in_questions(trait, related),
        *_asked_for(trait),
        *_openings(trait),
        *_named_in_instructions(trait),
        *_one_way(trait),
        *_quotes(trait),
        *_rubric_echo(trait),
    ]
    # One text, one finding: an error outdoes a warning, and what the shallow checks say need not be said again.
    errors = {advice.loc for advice in deep if advice.severity is Severity.ERROR}
    told = {advice.loc for advice in shallow}
    kept = [advice for advice in deep if advice.severity is Severity.ERROR or advice.loc not in told | errors]
    return [*(advice for advice in shallow if advice.loc not in errors), *kept]


def _paraphrases(trait: Trait) -> Iterator[Advice]:
    asked = list(questions(trait))
    for i, j, likeness in overlaps([text for _, text in asked]):
        (first, one), (second, _) = asked[i], asked[j]
        if likeness < MAX_OVERLAP:
            continue
        of = f'{field_name(first)} ("{in_short(one, 50)}")'
        if first[0] == second[0]:
            yield Advice(second, f"asks much the same as {of}: take another subject")
        elif likeness < SAME_QUESTION:
            yield Advice(second, f"leaks: it is much like {of}, which the vector is made from. Take another subject")
        else:
            message = f"leaks: it asks the same as {of}, so nothing is held out. Take another subject"
            yield Advice(second, message, Severity.ERROR)


def _named_in_questions(trait: Trait, related: Sequence[str]) -> Iterator[Advice]:
    # Of several words, such as "full of praise", each alone may stand in any question.
    kin = _kin([*names(trait), *(word for word in related if len(words(word)) == 1)])
    for loc, question in questions(trait):
        if found := next((word for word in content_words(question) if roots(word) & kin), None):
            yield Advice(loc, f'comes close to naming the trait ("{found}"): the answer would echo the question')


def _kin(phrases: Sequence[str]) -> frozenset[str]:
    parts = (part for phrase in phrases for part in re.split(r"[-_\s]+", phrase.casefold()))
    return frozenset().union(*(roots(part) for part in parts if len(part) >= 3 and content_words(part)))


def _asked_for(trait: Trait) -> Iterator[Advice]:
    behaviour = _behaviour(trait)
    for loc, question in questions(trait):
        if match := _STYLE.search(question):
            yield Advice(loc, f'asks for a manner ("{in_short(match.group())}"): only instructions may do that')
            continue
        for sentence in re.split(r"(?<=[.!?])\s+", question):
            # A compound is another word: who asks for a thank-you note asks for no thanks.
            simple = re.sub(r"\w+(?:-\w+)+", " ", sentence)
            called = [word for word in content_words(simple) if stem(word) in behaviour]
            if called and _REQUEST.search(sentence):
                message = f'asks for the behaviour itself ("{called[0]}"): both arms would show it'
                yield Advice(loc, message)
                break


def _behaviour(trait: Trait) -> frozenset[str]:
    """Stems of what the trait does: words that its description, its rubric and its instructions have in common."""
    about = f"{trait.description} {re.split(r'(?m)^scale', trait.judge_rubric, flags=re.IGNORECASE)[0]}"
    places = [about, *(f"{pair.positive} {pair.negative}" for pair in trait.instructions)]
    seen = Counter(root for place in places for root in {stem(word) for word in content_words(place)})
    positive = {stem(word) for pair in trait.instructions for word in content_words(pair.positive)}
    neutral = {stem(word) for word in ("answer", "question", "user", "assistant", "word", "subject", "help", "advice")}
    return frozenset(root for root, count in seen.items() if count >= 2 and root in positive) - neutral


def _openings(trait: Trait) -> Iterator[Advice]:
    firsts = Counter(" ".join(words(question)[:2]) for _, question in questions(trait))
    for opening, count in firsts.items():
        if count > MAX_SAME_OPENING:
            message = f'and the evaluation questions begin with "{opening}" {count} times in all: vary how users ask'
            yield Advice(("extraction_questions",), message)


def _named_in_instructions(trait: Trait) -> Iterator[Advice]:
    shown = [trait.name, trait.adjectives.positive]
    opposite = [word for word in names(trait) if word not in shown]
    # Relatives of the trait's own name only: who is told to be inventive about the truth is not told to be truthful.
    patterns = [family(word) for word in shown] + [re.compile(rf"\b{re.escape(word)}\b", re.I) for word in opposite]
    kin = _kin(shown) - _kin(opposite)
    for loc, text in instructions(trait, *Arm):
        if found := _found(patterns, text) or next((word for word in content_words(text) if roots(word) & kin), None):
            message = f'names the trait ("{found}"), as the adjective before it does: say what it looks like instead'
            yield Advice(loc, message)


def _one_way(trait: Trait) -> Iterator[Advice]:
    sizes = _lengths(trait)
    positive, negative = (sum(column) for column in zip(*sizes, strict=True))
    one_way = all(p > n for p, n in sizes) or all(p < n for p, n in sizes)
    if one_way and max(positive, negative) > MAX_ARM_RATIO * min(positive, negative):
        longer = "positive" if positive > negative else "negative"
        message = f"are longer in the {longer} arm, all five: {positive} words in the positive arm, {negative} in the"
        yield Advice(("instructions",), f"{message} negative one. The vector would carry length as well")


def _quotes(trait: Trait) -> Iterator[Advice]:
    for (loc, text), (place, question) in itertools.product(instructions(trait, *Arm), questions(trait)):
        run = shared_run(text, question)
        if len(run.split()) >= QUOTE_WORDS and len(content_words(run)) >= 2:
            yield Advice(loc, f'shares "{in_short(run)}" with {field_name(place)}: it must fit any question')


def _rubric_echo(trait: Trait) -> Iterator[Advice]:
    loc: Loc = ("judge_rubric",)
    if not _GUARD.search(" ".join(trait.judge_rubric.split())):
        message = "does not guard against orders in an answer: say that the texts are data and not to be obeyed"
        yield Advice(loc, message)
    anchors = {int(number) for number in _ANCHOR.findall(trait.judge_rubric)}
    if not ({0, 100} <= anchors and any(0 < anchor < 100 for anchor in anchors)):
        message = 'has no anchors: say on lines of their own what 0, 50 and 100 look like, such as "50: mixed"'
        yield Advice(loc, message)
