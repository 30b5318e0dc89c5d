"""The procedure by which a model writes a trait: what it is asked for, and what is wrong with its replies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
from persona_lens.traits.generate.authors import Author
from persona_lens.traits.generate.draft import (
    Draft,
    NamesReply,
    PairReply,
    PairsReply,
    QuestionsReply,
    RubricReply,
    instructions_request,
    names_request,
    questions_request,
    rubric_request,
)
from persona_lens.traits.generate.session import Limits, Part, PlannedStep, Procedure, Session, Whole, Written
from persona_lens.traits.generate.unfinished import Sentence
from persona_lens.traits.schema import N_INSTRUCTION_PAIRS, N_QUESTIONS, QUESTION_FIELDS, TRAITS, Trait
from persona_lens.traits.wording import normalised, overlaps


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


def _faults(draft: Draft, advice: Sequence[Advice]) -> dict[str, dict[int, str]]:
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
    return {"instructions": pairs, "questions": questions}


WRITING = Procedure(
    TRAITS,
    Draft,
    (
        Whole("names", "adjectives", names_request, NamesReply),
        Part(
            "instructions",
            "instruction pairs",
            N_INSTRUCTION_PAIRS,
            PairReply,
            PairsReply,
            instructions_request,
            _pair_fault,
            "instructions",
        ),
        Part(
            "questions",
            "questions",
            2 * N_QUESTIONS,
            Sentence,
            QuestionsReply,
            questions_request,
            _question_fault,
            "questions",
            batched=True,
        ),
        Whole("rubric", "rubric", rubric_request, RubricReply),
    ),
    lambda trait, draft: check_deeply(trait, draft.names.related if draft.names else ()),
    _faults,
    " --deep",
)


def plan(limits: Limits | None = None) -> list[PlannedStep]:
    """Say how many requests a trait takes, without asking anybody."""
    return WRITING.plan(limits)


def write_trait(
    author: Author,
    draft: Draft,
    *,
    limits: Limits | None = None,
    save: Callable[[Draft], None] = lambda draft: None,
    progress: Progress = shown_progress,
) -> Written[Trait]:
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
    return WRITING.write(Session(author, draft, limits or Limits(), save, progress))
