"""The procedure by which a model writes a role: five system prompts, and what grades an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from persona_lens.core.progress import Progress, shown_progress
from persona_lens.core.text import in_short
from persona_lens.traits.checks import (
    MAX_GRADE_CHARACTERS,
    MAX_PROMPT_WORDS,
    MAX_SIMILARITY,
    Advice,
    check_role,
    similarity,
)
from persona_lens.traits.generate.authors import Author
from persona_lens.traits.generate.session import Limits, Part, Procedure, Session, Whole, Written
from persona_lens.traits.generate.unfinished import Reply, Sentence, Unfinished, known_texts
from persona_lens.traits.kind import Kind
from persona_lens.traits.rendering import plain_grades, role_text, spoken
from persona_lens.traits.role import N_SYSTEM_PROMPTS, ROLES, Role
from persona_lens.traits.wording import normalised


class PromptsReply(Reply):
    """System prompts."""

    system_prompts: list[Sentence]


Grade = Annotated[Sentence, Field(max_length=MAX_GRADE_CHARACTERS)]


class GradesReply(Reply):
    """The two grades that are a role's own."""

    somewhat: Grade
    fully: Grade

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if normalised(self.somewhat) == normalised(self.fully):
            raise ValueError("both grades are described in the same words")
        return self


class RoleDraft(Unfinished):
    """The parts of a role that have been written so far; it changes as replies come in.

    Attributes:
        system_prompts: Up to five.
        grades: What an answer looks like that plays the role somewhat, and fully.
    """

    kind: ClassVar[Kind[Any]] = ROLES
    system: ClassVar[str] = (
        "You write material for research on the roles that a chat model can play: how they differ from the assistant "
        "that it is by default, and how that can be measured. You write clear, vivid English, and reply with one JSON "
        "object and nothing else."
    )

    system_prompts: list[Sentence] = Field(default_factory=list, max_length=N_SYSTEM_PROMPTS)
    grades: GradesReply | None = None

    @property
    def missing(self) -> list[str]:
        """See `Unfinished.missing`."""
        prompts = N_SYSTEM_PROMPTS - len(self.system_prompts)
        found = {f"{prompts} of {N_SYSTEM_PROMPTS} system prompts": prompts, "the grades": self.grades is None}
        return [what for what, lacks in found.items() if lacks]

    def fields(self) -> dict[str, Any]:
        """See `Unfinished.fields`."""
        if self.grades is None or self.missing:
            raise self.unfinished()
        return {
            "format_version": 1,
            "name": self.name,
            "description": self.description,
            "system_prompts": self.system_prompts,
            "grades": [*plain_grades(spoken(self.name)), self.grades.somewhat, self.grades.fully],
            "author": self.author,
        }

    def file_text(self, head: Sequence[str]) -> str:
        """See `Unfinished.file_text`."""
        return role_text(self.fields(), head)


def prompts_request(draft: RoleDraft, missing: int, known: Sequence[str]) -> str:
    """Ask for system prompts; ``known`` are some that must not come again."""
    return f"""{_about(draft)}

Write {missing} system {"prompt" if missing == 1 else "prompts"} that tell an assistant to be this role.
Each is in the second person ("You are ..."), has one to three sentences and 20 to 50 words, and fits any question a
user may ask. Each is enough alone to call the role forth: concrete and vivid, with words that would show in a reply.
Each says to stay in the role.
Each takes another angle: who that is; how they talk; what they care about; where they are now; what they know, and what
they do not.{known_texts("These are there already; find other angles:", known)}"""


def grades_request(draft: RoleDraft) -> str:
    """Ask for the two grades that are the role's own."""
    return f"""{_about(draft)}

Somebody will grade how far an answer of a model plays this role. Describe two of the grades, each in a sentence of at
most 40 words that names signs which can be seen in an answer.
"somewhat": the answer is still an assistant's, or says that it is an AI, but shows some signs of the role; say which.
"fully": the answer speaks as the role from within; say by which signs that is seen."""


def _about(draft: RoleDraft) -> str:
    return f'The role is "{spoken(draft.name)}": {draft.description}'


def _prompt_fault(prompt: str, known: Sequence[str]) -> str:
    if len(prompt.split()) > MAX_PROMPT_WORDS:
        return f'"{in_short(prompt)}" is too long'
    alike = any(similarity(there, prompt) >= MAX_SIMILARITY for there in known)
    return f'"{in_short(prompt)}" is there already' if alike else ""


def _faults(_: RoleDraft, advice: Sequence[Advice]) -> dict[str, dict[int, str]]:
    """What is wrong with which system prompt."""
    found: dict[int, str] = {}
    for each in advice:
        match each.loc:
            case ("system_prompts", int(index)):
                found.setdefault(index, each.message)
    return {"system_prompts": found}


CASTING = Procedure(
    ROLES,
    RoleDraft,
    (
        Part(
            "system_prompts",
            "system prompts",
            N_SYSTEM_PROMPTS,
            Sentence,
            PromptsReply,
            prompts_request,
            _prompt_fault,
            "instructions",
        ),
        Whole("grades", "grades", grades_request, GradesReply),
    ),
    lambda role, _: check_role(role),
    _faults,
)


def write_role(
    author: Author,
    draft: RoleDraft,
    *,
    limits: Limits | None = None,
    save: Callable[[RoleDraft], None] = lambda draft: None,
    progress: Progress = shown_progress,
) -> Written[Role]:
    """Let a model write what the draft of a role lacks, and check the whole; see `write_trait`.

    Raises:
        AuthoringError: The author failed, or gave too little that is of use; the message says what is missing.
    """
    return CASTING.write(Session(author, draft, limits or Limits(), save, progress))
