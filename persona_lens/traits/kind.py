"""Kinds of definitions: what tells a trait's file from a role's, so that one mechanism reads and finds both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pydantic import BaseModel

from persona_lens.traits.definition import Definition
from persona_lens.traits.problems import DefinitionError
from persona_lens.traits.wording import article

Content = TypeVar("Content", bound=Definition)


@dataclass(frozen=True)
class Kind(Generic[Content]):
    """A kind of definitions.

    Attributes:
        noun: What one is called, such as ``trait``; all its other names are made of it.
        model: The schema of a file.
        failed: The class of its errors.
        parts: The schemas of fields that have fields of their own.
        what: What one is for people who do not know it, with its article.
        start: How one is begun; None is by the command group's ``new``.
    """

    noun: str
    model: type[Content]
    failed: type[DefinitionError]
    what: str = ""
    parts: Mapping[int | str, type[BaseModel]] = field(default_factory=dict)
    start: str | None = None

    @property
    def a_noun(self) -> str:
        """The noun behind its article."""
        return f"{article(self.noun)} {self.noun}"

    @property
    def plural(self) -> str:
        """The name of the command group, and of folders that hold such files."""
        return f"{self.noun}s"

    @property
    def begin(self) -> str:
        """How one is begun, as part of a sentence."""
        return self.start or f"`persona-lens {self.plural} new NAME` writes a template to start from"

    @property
    def group(self) -> str:
        """The entry points' group."""
        return f"persona_lens.{self.plural}"

    @property
    def built_in(self) -> str:
        """The folder in the wheel; in a checkout it is called as `plural` says."""
        return f"builtin_{self.plural}"

    @property
    def variable(self) -> str:
        """The environment variable that moves the user's own folder."""
        return f"PERSONA_LENS_{self.plural.upper()}_DIR"
