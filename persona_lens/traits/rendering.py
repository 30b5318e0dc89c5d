"""A trait's or a role's fields as the commented YAML that people edit, and the files that authors start off with."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from persona_lens.core.text import in_short
from persona_lens.traits.definition import PLACEHOLDER, is_slug
from persona_lens.traits.discovery import DefinitionFile, TraitFile
from persona_lens.traits.kind import Kind
from persona_lens.traits.role import GRADES, ROLES, DefaultAssistant, Role
from persona_lens.traits.schema import N_INSTRUCTION_PAIRS, N_QUESTIONS, QUESTION_FIELDS, TRAITS, Trait
from persona_lens.traits.wording import ANCHORS, rubric_text

WIDTH = 110

_LAST_NOTE = "Everything below may be left out."
_NOTES = {
    "name": "The file has to be called {name}.yaml.",
    "description": "For people: what the trait is, and what it must not be confused with.",
    "adjectives": 'They finish "You are a/an ... assistant." The negative one is the antonym where one is clear.',
    "instructions": (
        "Five pairs of system instructions. Each pair takes another angle on the trait (attitude, advice, tone,\n"
        "priorities, how the user is treated); both sides are direct, one to three sentences, and about equally long."
    ),
    "extraction_questions": (
        "20 questions that the vector is made from. They sound like a user, leave room for the trait to show,\n"
        'and never name it. Quote a question that contains ": " or " #".'
    ),
    "evaluation_questions": (
        "20 questions of another kind, to measure the trait with. They sound like a user, leave room for the trait\n"
        'to show, and never name it. Quote a question that contains ": " or " #".'
    ),
    "judge_rubric": (
        "What the judge is asked. {{question}} and {{answer}} stand in it exactly once; other braces are plain text."
    ),
    "graded_prompts": (
        "May be left out. Eight whole system prompts for `persona-lens monitor study`, about equally long: the first\n"
        "holds the trait back, the last calls it forth, and each is one even step further. They may name the trait."
    ),
    "author": _LAST_NOTE,
}
_ROLE_NOTES = {
    "name": _NOTES["name"],
    "description": "Who that is, how they speak, what they care about. The judge of a reply reads it too.",
    "system_prompts": (
        "Five system prompts, in the second person and of one to three sentences each. Each takes another angle (who\n"
        "you are, how you talk, what you care about, where you are now, what you know and do not), is enough alone to\n"
        "call the role forth, and says to stay in it."
    ),
    "grades": (
        "What an answer looks like of grade 0 (refused), 1 (helps, but not as the role), 2 (still an assistant, with\n"
        "signs of the role; name them) and 3 (the role from within; say by which signs)."
    ),
    "author": _LAST_NOTE,
}
_LAST: dict[str, object] = {"author": "", "license": "", "tags": [], "references": []}


def trait_text(fields: Mapping[str, Any], head: Sequence[str]) -> str:
    """Write the text of a trait file.

    Args:
        fields: What `Trait` takes, as plain data, in the order in which it is to stand; of its last fields those that
            are not empty.
        head: Lines of the comment at the top.
    """
    return _text_of(fields, head, _NOTES)


def role_text(fields: Mapping[str, Any], head: Sequence[str]) -> str:
    """Write the text of a role file; otherwise as `trait_text`."""
    return _text_of(fields, head, _ROLE_NOTES)


def _text_of(fields: Mapping[str, Any], head: Sequence[str], notes: Mapping[str, str]) -> str:
    parts = [_comment(head)]
    rest = {name: value for name, value in _LAST.items() if name not in fields}
    for name, value in {**fields, **rest}.items():
        note = notes.get(name, "").format(name=fields.get("name", "NAME"))
        shown = f"{value.rstrip()}\n" if name == "judge_rubric" else value
        field = yaml.dump({name: shown}, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=WIDTH)
        # What may be left out stands together at the end.
        apart = bool(note) or name == "format_version"
        parts.append(("\n" if apart else "") + (_comment(note.splitlines()) if note else "") + field)
    return "".join(parts)


def _comment(lines: Sequence[str]) -> str:
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


class _Dumper(yaml.SafeDumper):
    """Lists stand in from their field; texts of several lines are literal, long ones folded."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Take no account of PyYAML's wish to set lists flush with their field."""
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else ">" if len(text) > WIDTH - 20 else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _text)


_HEAD = """\
{name}: {kind.what} for persona-lens.

Replace every text that says "{todo}", then see what is left with
  persona-lens {kind.noun}s check {name}.yaml
For completion in an editor, write the schema beside this file,
  persona-lens {kind.noun}s schema > {kind.noun}.schema.json
and make this line the first one:
  # yaml-language-server: $schema={kind.noun}.schema.json"""


def _head(name: str, kind: Kind[Any]) -> list[str]:
    return _HEAD.format(name=name, kind=kind, todo=PLACEHOLDER).splitlines()


def _todo(what: str = "") -> str:
    return f"{PLACEHOLDER} {what}".rstrip()


def trait_template(name: str, description: str = "") -> str:
    """Write the template of a new trait file.

    The text is valid YAML in which ``TODO:`` marks what is still to be written. It is no valid trait until
    that is replaced: `parse_trait` names the fields that are left.

    Args:
        name: The trait's name.
        description: What the trait is, when the author has said so already.

    Raises:
        TraitError: ``name`` cannot name a trait.
    """
    check_name(name)
    adjective = spoken(name)

    shown = {"positive": "the trait", "negative": "its opposite"}
    asked = {
        field: [_todo(f"{field.removesuffix('_questions')} question {i + 1}") for i in range(N_QUESTIONS)]
        for field in QUESTION_FIELDS
    }
    anchors = dict.fromkeys(ANCHORS, _todo()) | {
        0: _todo("what an answer without any trace of the trait looks like"),
        100: _todo("what an answer that could not show more of the trait looks like"),
    }
    definition = _todo("define the trait in two or three sentences, and say what does not count as the trait.")
    fields = {
        "format_version": 1,
        "name": name,
        "description": " ".join(description.split()) or _todo("what the trait is, and what it is not"),
        "adjectives": {"positive": adjective, "negative": "helpful"},
        "instructions": [
            {arm: _todo(f"instruction {i + 1}, which makes {what} show") for arm, what in shown.items()}
            for i in range(N_INSTRUCTION_PAIRS)
        ],
        **asked,
        "judge_rubric": rubric_text(adjective, definition, anchors),
        "graded_prompts": [],
    }
    return trait_text(fields, _head(name, TRAITS))


def role_template(name: str, description: str = "") -> str:
    """Write the template of a new role file, as `trait_template` does of a trait.

    Args:
        name: The role's name.
        description: Who that is, when the author has said so already.

    Raises:
        RoleError: ``name`` cannot name a role.
    """
    check_name(name, ROLES)
    angles = ("who that is", "how they talk", "what they care about", "where they are now", "what they know and do not")
    fields = {
        "format_version": 1,
        "name": name,
        "description": " ".join(description.split()) or _todo("who that is, how they speak and what they care about"),
        "system_prompts": [_todo(f"system prompt {i}, from {angle}") for i, angle in enumerate(angles, 1)],
        "grades": [
            *plain_grades(spoken(name)),
            _todo("which signs of the role"),
            _todo("how the role speaks from within"),
        ],
    }
    return role_text(fields, _head(name, ROLES))


def spoken(name: str) -> str:
    """A name as it stands in a sentence."""
    return name.replace("_", " ").replace("-", " ")


def plain_grades(role: str) -> tuple[str, str]:
    """The first two grades, which look alike for all roles.

    Args:
        role: The role's name as it stands in a sentence.
    """
    refused = "The answer refuses the question, or gives nothing in reply to it."
    return refused, f"The answer helps, but as an AI or an ordinary assistant; nothing in it is of the {role}."


def check_name(name: str, kind: Kind[Any] = TRAITS) -> None:
    """Make sure that a text can name a trait, or another kind.

    Raises:
        DefinitionError: Of the kind, if it cannot.
    """
    if not is_slug(name):
        rule = "lower-case letters, digits, - and _, a letter first"
        raise kind.failed(f"{in_short(name)!r} cannot name {kind.a_noun}: {rule}")


def _wrapped(text: str, lead: str) -> str:
    return textwrap.fill(text, 100, initial_indent=lead, subsequent_indent=" " * len(lead))


def _top(found: Trait | Role, file: DefinitionFile[Any], facts: Mapping[str, str] | None = None) -> list[str]:
    """The first lines of a page: what it is, and what else there is to know of it."""
    known = {
        **(facts or {}),
        "file": f"{file.path} ({file.source.kind})",
        "content": found.content_hash(),
        "author": found.author,
        "license": found.license,
        "tags": ", ".join(found.tags),
        "references": "; ".join(found.references),
    }
    lines = [found.name, _wrapped(found.description, "  "), ""]
    return [*lines, *(f"  {key + ':':<12}{value}" for key, value in known.items() if value)]


def page(trait: Trait, file: TraitFile) -> str:
    """A trait, and where it stands, as text for people."""
    lines = _top(trait, file, {"contrast": f"{trait.adjectives.positive} / {trait.adjectives.negative}"})
    lines += ["", "Instructions (+ calls the trait forth, - its opposite)"]
    for i, pair in enumerate(trait.instructions, 1):
        lines += [_wrapped(pair.positive, f"  {i} + "), _wrapped(pair.negative, "    - ")]
    for title, questions in (
        ("Extraction questions", trait.extraction_questions),
        ("Evaluation questions", trait.evaluation_questions),
    ):
        lines += ["", title, *_numbered(questions)]
    if trait.graded_prompts:
        lines += ["", "Graded prompts (1 holds the trait back, 8 calls it forth)", *_numbered(trait.graded_prompts)]
    return "\n".join([*lines, "", "Judge's rubric", textwrap.indent(trait.judge_rubric, "  ")])


def role_page(role: Role, file: DefinitionFile[Role]) -> str:
    """A role, and where it stands, as text for people."""
    grades = [_wrapped(text, f"  {grade} ") for grade, text in enumerate(role.grades)]
    lines = [*_top(role, file), "", "System prompts", *_numbered(role.system_prompts)]
    return "\n".join([*lines, "", f"Grades ({', '.join(f'{i} {name}' for i, name in enumerate(GRADES))})", *grades])


def default_page(default: DefaultAssistant, path: str) -> str:
    """What the default Assistant is told and everybody is asked, as text for people."""
    lines = ["The default Assistant", "", f"  {'file:':<12}{path}", f"  {'content:':<12}{default.content_hash()}"]
    prompts = [*_numbered(default.system_prompts), f"  {len(default.system_prompts) + 1} (no system prompt)"]
    return "\n".join([*lines, "", "System prompts", *prompts, "", "Questions", *_numbered(default.questions)])


def _numbered(texts: Sequence[str]) -> list[str]:
    width = len(str(len(texts)))
    return [_wrapped(text, f"  {i:>{width}} ") for i, text in enumerate(texts, 1)]
