"""Roles: who a chat model can be told to be, beside the Assistant that it is by default.

A role is a YAML file like a trait: ``roles/NAME.yaml``. What the default Assistant is told, and what all are asked,
is one file for all roles: ``roles/shared/assistant.yaml``.

Example:
    >>> from persona_lens.traits import load_default, load_role
    >>> pirate = PlayedRole(load_role("pirate"), load_default())
    >>> pirate.system_prompt(Arm.NEGATIVE, 0)
    'You are a large language model.'
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from persona_lens.traits.definition import (
    SLOTS,
    BrokenRule,
    Definition,
    Loc,
    Slug,
    Text,
    fingerprint,
    items_of,
    repeats,
    texts_of,
    unwritten,
    wrong_count,
)
from persona_lens.traits.discovery import Catalogue, DefinitionFile, built_in_folder, find, resolve
from persona_lens.traits.kind import Kind
from persona_lens.traits.parsing import read
from persona_lens.traits.problems import RoleError
from persona_lens.traits.schema import Arm
from persona_lens.traits.wording import grading_text

N_SYSTEM_PROMPTS = 5
N_NEUTRAL = 4
GRADES = ("refused", "not at all", "somewhat", "fully")
"""What the four grades mean, from 0 on."""
LEAST_QUESTIONS = 2


def _texts_of_count(count: int) -> Any:
    return Field(json_schema_extra={"minItems": count, "maxItems": count, "uniqueItems": True})


class Role(Definition):
    """A role that a chat model can be told to play, and how to tell how far it does."""

    format_version: Literal[1]
    """The version of this file format: 1."""

    name: Slug
    """Lower-case letters, digits, `-` and `_`, beginning with a letter; the file is called NAME.yaml."""

    description: Text
    """Who that is, how they speak and what they care about, in a sentence or two; the judge reads it."""

    system_prompts: Annotated[tuple[Text, ...], _texts_of_count(N_SYSTEM_PROMPTS)]
    """Five system prompts that tell a model to be it, each from another angle and each enough alone."""

    grades: Annotated[tuple[Text, ...], _texts_of_count(len(GRADES))]
    """What an answer of each grade looks like: 0 refused, 1 not the role at all, 2 somewhat, 3 fully."""

    author: str = ""
    """Who wrote the file."""

    license: str = ""
    """The licence of the file, as an SPDX identifier such as `MIT`."""

    tags: tuple[Slug, ...] = ()
    """Words to find the role by, such as `near` or `far` from the Assistant."""

    references: tuple[Text, ...] = ()
    """Papers or pages that the description rests on."""

    determining: ClassVar[frozenset[str]] = frozenset({"format_version", "description", "system_prompts", "grades"})

    @classmethod
    def broken_rules(cls, fields: Mapping[Any, object]) -> list[BrokenRule]:
        """See `Definition.broken_rules`."""
        texts = texts_of(fields)
        return [
            *unwritten(texts),
            *_repetitions(texts, "system_prompts", "write it from another angle"),
            *_repetitions(texts, "grades", "each grade looks another way"),
            *_slots(texts),
            *_counts(fields, {"system_prompts": N_SYSTEM_PROMPTS, "grades": len(GRADES)}),
        ]

    def content_hash(self) -> str:
        """Fingerprint what determines results, as ``sha256:<hex>``.

        Covered are the system prompts, the description and the grades, which make the judge's rubric, and the format
        version. Name, author, license, tags and references are not, since no model or judge sees them; nor are comments
        and YAML style.
        """
        return super().content_hash()


class DefaultAssistant(Definition):
    """What a model is when it is told no role, and what every role is asked."""

    format_version: Literal[1]
    """The version of this file format: 1."""

    system_prompts: Annotated[tuple[Text, ...], _texts_of_count(N_NEUTRAL)]
    """Four neutral system prompts. That there is none at all is the fifth, and is not written."""

    questions: Annotated[tuple[Text, ...], Field(json_schema_extra={"minItems": LEAST_QUESTIONS, "uniqueItems": True})]
    """Questions that different characters would answer differently; all roles and the default are asked them."""

    determining: ClassVar[frozenset[str]] = frozenset({"format_version", "system_prompts", "questions"})

    @classmethod
    def broken_rules(cls, fields: Mapping[Any, object]) -> list[BrokenRule]:
        """See `Definition.broken_rules`."""
        texts, asked = texts_of(fields), fields.get("questions")
        few = isinstance(asked, list | tuple) and len(asked) < LEAST_QUESTIONS
        return [
            *unwritten(texts),
            *_repetitions(texts, "system_prompts", "write another"),
            *_repetitions(texts, "questions", "ask something else"),
            *_counts(fields, {"system_prompts": N_NEUTRAL}),
            *([(("questions",), f"needs at least {LEAST_QUESTIONS} questions: add some")] if few else []),
        ]


def _repetitions(texts: Mapping[Loc, str], field: str, advice: str) -> Iterator[BrokenRule]:
    for loc, _, number in repeats(items_of(texts, field)):
        yield loc, f"repeats #{number}: {advice}"


def _slots(texts: Mapping[Loc, str]) -> Iterator[BrokenRule]:
    """What the judge reads beside the question and the answer must not be filled with them."""
    for loc, text in texts.items():
        for slot in SLOTS:
            if loc[0] in ("description", "grades") and f"{{{slot}}}" in text:
                yield loc, f"holds {{{slot}}}, a slot of the judge's rubric: say “the {slot}”"


def _counts(fields: Mapping[Any, object], counts: Mapping[str, int]) -> Iterator[BrokenRule]:
    for name, needed in counts.items():
        value = fields.get(name)
        if isinstance(value, list | tuple) and len(value) != needed:
            yield (name,), wrong_count(len(value), needed)


ROLES = Kind("role", Role, RoleError, "a role")
DEFAULT = Kind(
    "default Assistant",
    DefaultAssistant,
    RoleError,
    start="it takes `format_version: 1`, four `system_prompts` and at least two `questions`",
)


@dataclass(frozen=True)
class PlayedRole:
    """A role against the default Assistant, as judges take what they judge: `persona_lens.judging.Judged`.

    Attributes:
        role: The positive arm.
        default: The negative arm; the built-in one unless another is given.
    """

    role: Role
    default: DefaultAssistant = field(default_factory=lambda: load_default())

    @property
    def name(self) -> str:
        """The role's name."""
        return self.role.name

    @property
    def instructions(self) -> tuple[str, ...]:
        """The role's five system prompts; each makes a pair with a neutral one."""
        return self.role.system_prompts

    @cached_property
    def judge_rubric(self) -> str:
        """What a judge is asked: a grade from 0 to 3, as `GRADES` has them, with the slots of every rubric."""
        return grading_text(self.role.description, self.role.grades)

    def system_prompt(self, arm: Arm, pair_index: int) -> str:
        """Give the system prompt of an arm: the role's, or a neutral one of the default Assistant.

        Args:
            arm: The role, or the default.
            pair_index: Which of the role's prompts, 0 … 4; the fifth is paired with the first neutral one.

        Raises:
            IndexError: ``pair_index`` is not one of 0 … 4.
        """
        if not 0 <= pair_index < len(self.instructions):
            last = len(self.instructions) - 1
            raise IndexError(f"pair_index is {pair_index}, but {self.name} has the prompts 0 to {last}")
        neutral = self.default.system_prompts
        return self.instructions[pair_index] if Arm(arm) is Arm.POSITIVE else neutral[pair_index % len(neutral)]

    def content_hash(self) -> str:
        """Fingerprint what determines a judgement, as ``sha256:<hex>``: the role, the neutral prompts, the rubric."""
        prompts = [self.system_prompt(arm, i) for arm in Arm for i in range(len(self.instructions))]
        return fingerprint({"system_prompts": prompts, "judge_rubric": self.judge_rubric})


def find_roles(roles_dirs: Sequence[str | Path] = ()) -> Catalogue[Role]:
    """Find every role within reach.

    Sources are those of `find_traits`: the built-in roles, installed packages (entry points of the group
    ``persona_lens.roles``), the user's folder (``PERSONA_LENS_ROLES_DIR`` moves it), ``./roles``, and ``roles_dirs``.

    Args:
        roles_dirs: More folders; the last one is the nearest of all.

    Raises:
        RoleError: One of ``roles_dirs`` is no folder.
    """
    return find(ROLES, roles_dirs)


def load_role(name_or_path: str | os.PathLike[str], roles_dirs: Sequence[str | Path] = ()) -> Role:
    """Load a role by its name, or from a YAML file.

    Args:
        name_or_path: A name such as ``pirate``, or a path: anything with a ``/`` in it, or that ends in ``.yaml`` or
            ``.yml``.
        roles_dirs: More folders to find names in; see `find_roles`.

    Raises:
        RoleError: There is no such role or file, or it is broken.
    """
    return resolve_role(name_or_path, roles_dirs).read()


def resolve_role(name_or_path: str | os.PathLike[str], roles_dirs: Sequence[str | Path] = ()) -> DefinitionFile[Role]:
    """Find the file of a role given by name or by path, without reading it; otherwise as `load_role`."""
    return resolve(ROLES, name_or_path, roles_dirs)


def load_default(path: str | os.PathLike[str] | None = None) -> DefaultAssistant:
    """Load the default Assistant.

    Args:
        path: A YAML file; None is the built-in one, with four neutral prompts and forty questions.

    Raises:
        RoleError: There is no such file, or it is broken.
    """
    return read(DEFAULT, default_file() if path is None else Path(path))[0]


def default_file() -> Traversable:
    """The file of the built-in default Assistant."""
    return built_in_folder(ROLES) / "shared" / "assistant.yaml"
