"""`Unfinished`: what a model is writing, and the texts that may stand in its replies; a trait's draft, or a role's."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.types import StringConstraints

from persona_lens.core.files import write_text
from persona_lens.core.text import in_short
from persona_lens.traits.definition import PLACEHOLDER
from persona_lens.traits.generate.authors import AuthoringError
from persona_lens.traits.kind import Kind
from persona_lens.traits.parsing import read_text
from persona_lens.traits.problems import DefinitionError
from persona_lens.traits.rendering import check_name

_WIDTH = 108
_BULLET = re.compile(r"^(?:(?:\(?\d{1,2}[.):]|[-*•])\s+)+")


def _tidy(value: object) -> object:
    return _BULLET.sub("", " ".join(value.split())).strip() if isinstance(value, str) else value


def _finished(text: str) -> str:
    if PLACEHOLDER in text or re.search(r"\.\.\.\s*\.\.\.|<[\w ]+>|\{[\w ]*\}|^\W*$", text):
        raise ValueError("is a placeholder, not a text")
    if not text.isprintable():
        raise ValueError("holds control characters")
    return text


Word = Annotated[str, BeforeValidator(_tidy), StringConstraints(min_length=2, max_length=60), AfterValidator(_finished)]
Sentence = Annotated[
    str, BeforeValidator(_tidy), StringConstraints(min_length=8, max_length=1000), AfterValidator(_finished)
]


class Reply(BaseModel):
    """What a model is asked for at once."""

    model_config = ConfigDict(frozen=True, extra="ignore")


MAX_DESCRIPTION = 2000


class Unfinished(BaseModel):
    """The parts that have been written so far; it changes as replies come in.

    Attributes:
        name: Of what is written.
        description: What that is, as the user says it.
        origin: Which model writes it, where, and how it samples.
        requests: How many replies were asked for.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    kind: ClassVar[Kind[Any]]
    system: ClassVar[str]
    """The system prompt of an author."""

    name: str
    description: str
    origin: dict[str, Any] = Field(default_factory=dict)
    requests: int = Field(default=0, ge=0)

    @property
    def missing(self) -> list[str]:
        """What is still to be written, in words."""
        raise NotImplementedError

    def fields(self) -> dict[str, Any]:
        """What is finished, as the schema takes it.

        Raises:
            AuthoringError: It is not finished.
        """
        raise NotImplementedError

    def file_text(self, head: Sequence[str]) -> str:
        """Write the file of what is finished, with lines of a comment at its top.

        Raises:
            AuthoringError: It is not finished.
        """
        raise NotImplementedError

    @property
    def author(self) -> str:
        """Who wrote it, as its file says."""
        return f"{self.origin.get('model', 'a model')} via persona-lens authoring"

    def unfinished(self) -> AuthoringError:
        """The error that says what is missing."""
        return AuthoringError(f"the {self.kind.noun} {self.name} still lacks {', '.join(self.missing)}")

    def save(self, path: Path) -> None:
        """Write the draft to a file, whole or not at all."""
        write_text(path, self.model_dump_json(indent=2) + "\n")

    def continues(self, other: Unfinished) -> None:
        """Make sure that this draft, from an earlier run, is what another begins.

        Raises:
            AuthoringError: It is about something else, or another model wrote it.
        """
        old, new = ({"name": d.name, "description": d.description, **d.origin} for d in (self, other))
        changed = [key for key in new if old.get(key) != new[key]]  # the older may know more: what replies have shown
        if changed:
            shown = "; ".join(
                f"{key}: {in_short(str(old.get(key)))!r} there, {in_short(str(new[key]))!r} now" for key in changed
            )
            raise AuthoringError(f"was begun otherwise ({shown}): remove it, or repeat the command that began it")

    @classmethod
    def begin(cls, name: str, description: str, origin: Mapping[str, Any]) -> Self:
        """Begin a draft.

        Args:
            name: Of what is written.
            description: What that is, in a sentence or two.
            origin: Which model is to write it, where, and how it samples; plain JSON, without ``requests``.

        Raises:
            PersonaLensError: The name or the description cannot be used.
        """
        noun = cls.kind.noun
        check_name(name, cls.kind)
        line = " ".join(description.split())
        if not line:
            raise AuthoringError(
                f"an author model needs a description (--description): say what the {noun} is, and is not"
            )
        if len(line) > MAX_DESCRIPTION or not line.isprintable() or PLACEHOLDER in line:
            raise AuthoringError(
                f'the description "{in_short(line)}" cannot be used: write up to {MAX_DESCRIPTION:,} plain characters, '
                f'without "{PLACEHOLDER}"'
            )
        return cls(name=name, description=line, origin=dict(origin))

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Read the draft that an earlier run left behind; None if there is none.

        Raises:
            AuthoringError: The file is no draft.
        """
        if not path.exists():
            return None
        try:
            return cls.model_validate_json(read_text(path, cls.kind))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = in_short(".".join(map(str, first["loc"])))
            raise AuthoringError(
                f"{path}: {where or 'the file'}: {first['msg']}: put it right, or remove the file"
            ) from error
        except DefinitionError as error:
            raise AuthoringError(f"{error}: remove the file to begin again") from error


DraftT = TypeVar("DraftT", bound=Unfinished)


def written_text(draft: Unfinished, version: str) -> str:
    """Write the file of a finished draft.

    The comment at its head says which model wrote it and how, but not when: the same run writes the same file.

    Args:
        draft: The draft.
        version: That of persona-lens.

    Raises:
        AuthoringError: The draft is not finished.
    """
    facts: dict[str, Any] = {**draft.origin, "requests": draft.requests, "persona-lens": version}
    head = [
        f"{draft.name}: {draft.kind.what} for persona-lens, written by a model. Read it before you rely on it.",
        "",
        *(f"{name}: {in_short(str(value), 200)}" for name, value in facts.items() if value is not None),
        "",
        *textwrap.wrap(f"The description given: {in_short(draft.description, 5000)}", _WIDTH),
    ]
    return draft.file_text(head)


def again(complaints: Sequence[str]) -> str:
    """What to add to a request after a reply that was not, or not wholly, of use."""
    return "\n\nYour last reply had faults:\n" + _list(complaints) if complaints else ""


def known_texts(lead: str, texts: Sequence[str]) -> str:
    """What to add to a request: texts that are there already."""
    return f"\n\n{lead}\n{_list(texts)}" if texts else ""


def _list(texts: Sequence[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)
