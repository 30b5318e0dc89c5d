"""The procedure by which a model writes a trait: part by part, checked; what is missing or weak is asked for again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError

from persona_lens.core.progress import Progress, shown_progress
from persona_lens.core.text import in_short
from persona_lens.traits.checks import (
    MAX_QUESTION_WORDS,
    MAX_SIMILARITY,
    SAME_QUESTION,
    Advice,
    check_deeply,
    similarity,
)
from persona_lens.traits.generate.authors import Author, AuthoringError, found_json, in_words, items, reply_schema
from persona_lens.traits.generate.draft import (
    SYSTEM,
    Draft,
    NamesReply,
    PairReply,
    PairsReply,
    QuestionsReply,
    RubricReply,
    Sentence,
    again,
    instructions_request,
    names_request,
    questions_request,
    rubric_request,
)
from persona_lens.traits.parsing import explain
from persona_lens.traits.problems import Severity, field_name
from persona_lens.traits.schema import N_INSTRUCTION_PAIRS, N_QUESTIONS, QUESTION_FIELDS, Trait
from persona_lens.traits.wording import normalised, overlaps

ALL_QUESTIONS = 2 * N_QUESTIONS


@dataclass(frozen=True)
class Limits:
    """How often a model is asked before one gives up.

    Attributes:
        batch: Questions asked for at once.
        attempts: Requests for the adjectives, and for the rubric.
        instructions: Requests for the instruction pairs.
        questions: Requests for the questions.
        repairs: Rounds in which what the checks find fault with is asked for anew.
        repair_requests: Requests in such a round, for pairs and for questions each.
    """

    batch: int = 10
    attempts: int = 3
    instructions: int = N_INSTRUCTION_PAIRS
    questions: int = 12
    repairs: int = 2
    repair_requests: int = 3


@dataclass(frozen=True)
class PlannedStep:
    """How many requests a part of the work takes."""

    step: str
    at_least: int
    at_most: int


def plan(limits: Limits | None = None) -> list[PlannedStep]:
    """Say how many requests a trait takes, without asking anybody."""
    limits = limits or Limits()
    return [
        PlannedStep("adjectives", 1, limits.attempts),
        PlannedStep("instructions", 1, limits.instructions),
        PlannedStep("questions", math.ceil(ALL_QUESTIONS / limits.batch), limits.questions),
        PlannedStep("rubric", 1, limits.attempts),
        PlannedStep("replacements", 0, limits.repairs * 2 * limits.repair_requests),
    ]


_SHOWN_COMPLAINTS = 6


@dataclass
class Session:
    """Where a draft is worked on.

    Attributes:
        author: Who writes.
        draft: What there is.
        limits: How often to ask.
        keep: Called after every reply. Not named ``save``: nnsight gives every object a method of that name, which a
            dataclass takes for the field's default.
        progress: Told of the parts that are there.
        complaints: What was wrong with the last reply; the author is told.
    """

    author: Author
    draft: Draft
    limits: Limits
    keep: Callable[[Draft], None]
    progress: Progress
    complaints: list[str] = field(default_factory=list)

    def ask(self, what: str, request: str, reply: type[BaseModel]) -> object:
        """Make one request.

        Args:
            what: The part it is for.
            request: Its text.
            reply: What is expected.

        Returns:
            The data in the reply; None where there is none, which becomes a complaint.

        Raises:
            AuthoringError: The author failed.
        """
        request += again(self.complaints[:_SHOWN_COMPLAINTS])
        self.draft.requests += 1
        try:
            text = self.author.write(SYSTEM, request, reply_schema(reply))
        except Exception as error:  # an author may be anybody's code; what is written already must outlast it
            reason = in_short(str(error), 400).rstrip(".") or type(error).__name__
            raise AuthoringError(
                f"the author model failed in request {self.draft.requests}, for the {what}: {reason}. "
                f"Still missing: {', '.join(self.draft.missing) or 'nothing'}"
            ) from error
        try:
            data = found_json(text)
        except ValueError as error:
            self.complaints = [f"it {error}"]
            return None
        self.complaints = []
        return data

    def took(self, what: str, done: int, total: int) -> None:
        """Keep what a reply has brought, and what it has shown of the author."""
        self.draft.origin = {**self.draft.origin, **self.author.describe()}
        self.keep(self.draft)
        self.progress(done, total, what)

    def require(self, what: str, count: int, needed: int) -> None:
        """Go no further with a part that is not complete.

        Raises:
            AuthoringError: It is not.
        """
        if count < needed:
            last = f" (the last reply: {in_short('; '.join(self.complaints), 300)})" if self.complaints else ""
            raise AuthoringError(
                f"the author model wrote {count} of {needed} {what} that can be used{last}, after "
                f"{self.draft.requests} requests. Still missing: {', '.join(self.draft.missing)}. A larger "
                "--author-model may do better"
            )
        self.complaints = []


@dataclass(frozen=True)
class Written:
    """A trait that a model has written.

    Attributes:
        trait: The trait.
        advice: What the checks still find fault with.
        requests: How many replies it took, those of an interrupted run included.
    """

    trait: Trait
    advice: tuple[Advice, ...]
    requests: int


def write_trait(
    author: Author,
    draft: Draft,
    *,
    limits: Limits | None = None,
    save: Callable[[Draft], None] = lambda draft: None,
    progress: Progress = shown_progress,
) -> Written:
    """Let a model write what a draft lacks, and check the whole.

    Args:
        author: The model.
        draft: Name and description of the trait, and what an earlier run has written. It is changed in place.
        limits: How often to ask.
        save: Called after every reply, so that nothing is lost whatever happens.
        progress: Told of the parts that are there.

    Raises:
        AuthoringError: The author failed, or gave too little that is of use; the message says what is missing.
    """
    session = Session(author, draft, limits or Limits(), save, progress)
    _ask_whole(session, "names", "adjectives", names_request, NamesReply)
    for part in (_INSTRUCTIONS, _QUESTIONS):
        _gather(session, part, getattr(session.limits, part.key))
        session.require(part.what, len(getattr(draft, part.key)), part.total)
    _ask_whole(session, "rubric", "rubric", rubric_request, RubricReply)
    trait, advice = _checked(draft)
    for _ in range(session.limits.repairs):
        faults = _faults(draft, advice)
        for part, found in zip((_INSTRUCTIONS, _QUESTIONS), faults, strict=True):
            if found:
                _replace(session, part, found)
        if not any(faults):
            break
        trait, advice = _checked(draft)
    if errors := [found for found in advice if found.severity is Severity.ERROR]:
        shown = "; ".join(f"{field_name(found.loc)} {found.message}" for found in errors)
        raise AuthoringError(f"the trait {draft.name} cannot be used as it is: {shown}")
    return Written(trait, tuple(advice), draft.requests)


def _ask_whole(session: Session, key: str, what: str, request: Callable[[Draft], str], reply: type[BaseModel]) -> None:
    """Ask for a part that is of use as a whole only."""
    for _ in range(session.limits.attempts):
        if getattr(session.draft, key) is not None:
            break
        data = session.ask(what, request(session.draft), reply)
        try:
            if data is not None:
                setattr(session.draft, key, reply.model_validate(data))
        except ValidationError as error:
            session.complaints = [in_words(error)]
        session.took(what, int(getattr(session.draft, key) is not None), 1)
    session.require(what, int(getattr(session.draft, key) is not None), 1)


@dataclass(frozen=True)
class _Part:
    """A part of the draft that is a list: how to ask for more of it, and what speaks against one more.

    Attributes:
        key: Field of the draft and of the limits, and key of the reply.
        what: What its items are called.
        total: How many there must be.
        kind: Type of an item.
        reply: Type of the reply.
        request: Writes the request, given the draft, how many to ask for, and what must not come again.
        fault: What is wrong with an item beside those that are known; empty if nothing is.
    """

    key: str
    what: str
    total: int
    kind: Any
    reply: type[BaseModel]
    request: Callable[[Draft, int, Sequence[Any]], str]
    fault: Callable[[Any, Sequence[Any]], str]


def _gather(session: Session, part: _Part, requests: int, refused: Sequence[Any] = ()) -> None:
    for _ in range(requests):
        there: list[Any] = getattr(session.draft, part.key)
        missing = part.total - len(there)
        if not missing:
            return
        count = min(missing, session.limits.batch) if part is _QUESTIONS else missing
        data = session.ask(part.key, part.request(session.draft, count, [*there, *refused]), part.reply)
        if data is not None:
            good, bad = items(part.kind, data, part.key)
            for item in good:
                # What was found fault with may come again put right, but not as it was.
                fault = "this is what was found fault with" if item in refused else part.fault(item, there)
                if fault:
                    bad.append(fault)
                elif len(there) < part.total:
                    there = [*there, item]
            setattr(session.draft, part.key, there)
            session.complaints = bad
        session.took(part.key, len(there), part.total)


def _pair_fault(pair: PairReply, known: Sequence[PairReply]) -> str:
    if normalised(pair.positive) == normalised(pair.negative):
        return f'both arms say "{in_short(pair.positive)}"'
    for other in known:
        for text, there in ((pair.positive, other.positive), (pair.negative, other.negative)):
            if similarity(there, text) >= MAX_SIMILARITY:
                return f'"{in_short(text)}" is there already'
    return ""


def _question_fault(question: str, known: Sequence[str]) -> str:
    if len(question.split()) > MAX_QUESTION_WORDS:
        return f'"{in_short(question)}" is too long'
    last = len(known)
    likeness = {i: cosine for i, j, cosine in overlaps([*known, question]) if j == last}
    for i, other in enumerate(known):
        if likeness[i] >= SAME_QUESTION or similarity(other, question) >= MAX_SIMILARITY:
            return f'"{in_short(question)}" asks the same as "{in_short(other)}"'
    return ""


_INSTRUCTIONS = _Part(
    "instructions", "instruction pairs", N_INSTRUCTION_PAIRS, PairReply, PairsReply, instructions_request, _pair_fault
)
_QUESTIONS = _Part(
    "questions", "questions", ALL_QUESTIONS, Sentence, QuestionsReply, questions_request, _question_fault
)


def _checked(draft: Draft) -> tuple[Trait, list[Advice]]:
    """The trait that a finished draft makes, and what the checks find fault with."""
    try:
        trait = Trait.model_validate(draft.fields())
    except ValidationError as error:  # somebody has edited the draft of an interrupted run
        shown = "; ".join(f"{problem.field} {problem.message}" for problem in explain(error, {}, ""))
        raise AuthoringError(f"the trait {draft.name} is not valid: {shown}") from error
    return trait, check_deeply(trait, draft.names.related if draft.names else ())


def _faults(draft: Draft, advice: Sequence[Advice]) -> tuple[dict[int, str], dict[int, str]]:
    """What is wrong with which pair and with which question of a draft."""
    pairs: dict[int, str] = {}
    questions: dict[int, str] = {}
    for found in advice:
        match found.loc:
            case ("instructions", int(index), *_):
                pairs.setdefault(index, found.message)
            case ("instructions",):  # about all five: the pair that is most to blame
                lengths = [(len(pair.positive.split()), len(pair.negative.split())) for pair in draft.instructions]
                worst = max(range(len(lengths)), key=lambda i: max(lengths[i]) / min(lengths[i]))
                pairs.setdefault(worst, found.message)
            case (str(name), int(index)) if name in QUESTION_FIELDS:
                questions.setdefault(2 * index + QUESTION_FIELDS.index(name), found.message)
    return pairs, questions


def _replace(session: Session, part: _Part, faults: Mapping[int, str]) -> None:
    old: list[Any] = getattr(session.draft, part.key)
    faulty = [old[index] for index in faults]
    setattr(session.draft, part.key, [item for index, item in enumerate(old) if index not in faults])
    session.complaints = [
        f'"{in_short(getattr(old[index], "positive", old[index]), 100)}": {message}'
        for index, message in faults.items()
    ]
    try:
        _gather(session, part, session.limits.repair_requests, faulty)
    finally:
        # A weak question is better than none: what was not replaced comes back, and is reported.
        new: list[Any] = getattr(session.draft, part.key)
        setattr(session.draft, part.key, [*new, *faulty[: part.total - len(new)]])
        session.complaints = []
