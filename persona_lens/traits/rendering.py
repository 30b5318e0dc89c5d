"""A trait's fields as the commented YAML that people read and edit, and the file an author starts off with."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from persona_lens.core.text import in_short
from persona_lens.traits.definition import PLACEHOLDER, is_slug
from persona_lens.traits.problems import TraitError
from persona_lens.traits.schema import N_INSTRUCTION_PAIRS, N_QUESTIONS, QUESTION_FIELDS
from persona_lens.traits.wording import ANCHORS, rubric_text

if TYPE_CHECKING:
    from persona_lens.traits.discovery import TraitFile
    from persona_lens.traits.schema import Trait

WIDTH = 110

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
    "author": "Everything below may be left out.",
}
_LAST: dict[str, object] = {"author": "", "license": "", "tags": [], "references": []}


def trait_text(fields: Mapping[str, Any], head: Sequence[str]) -> str:
    """Write the text of a trait file.

    Args:
        fields: What `Trait` takes, as plain data, in the order in which it is to stand; of its last fields those that
            are not empty.
        head: Lines of the comment at the top.
    """
    parts = [_comment(head)]
    rest = {name: value for name, value in _LAST.items() if name not in fields}
    for name, value in {**fields, **rest}.items():
        note = _NOTES.get(name, "").format(name=fields.get("name", "NAME"))
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
{name}: a character trait for persona-lens.

Replace every text that says "{todo}", then see what is left with
  persona-lens traits check {name}.yaml
For completion in an editor, write the schema beside this file,
  persona-lens traits schema > trait.schema.json
and make this line the first one:
  # yaml-language-server: $schema=trait.schema.json"""


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
    adjective = name.replace("_", " ").replace("-", " ")

    def todo(what: str = "") -> str:
        return f"{PLACEHOLDER} {what}".rstrip()

    shown = {"positive": "the trait", "negative": "its opposite"}
    asked = {
        field: [todo(f"{field.removesuffix('_questions')} question {i + 1}") for i in range(N_QUESTIONS)]
        for field in QUESTION_FIELDS
    }
    anchors = dict.fromkeys(ANCHORS, todo()) | {
        0: todo("what an answer without any trace of the trait looks like"),
        100: todo("what an answer that could not show more of the trait looks like"),
    }
    definition = todo("define the trait in two or three sentences, and say what does not count as the trait.")
    fields = {
        "format_version": 1,
        "name": name,
        "description": " ".join(description.split()) or todo("what the trait is, and what it is not"),
        "adjectives": {"positive": adjective, "negative": "helpful"},
        "instructions": [
            {arm: todo(f"instruction {i + 1}, which makes {what} show") for arm, what in shown.items()}
            for i in range(N_INSTRUCTION_PAIRS)
        ],
        **asked,
        "judge_rubric": rubric_text(adjective, definition, anchors),
        "graded_prompts": [],
    }
    return trait_text(fields, _HEAD.format(name=name, todo=PLACEHOLDER).splitlines())


def check_name(name: str) -> None:
    """Make sure that a text can name a trait.

    Raises:
        TraitError: It cannot.
    """
    if not is_slug(name):
        raise TraitError(f"{in_short(name)!r} cannot name a trait: lower-case letters, digits, - and _, a letter first")


def page(trait: Trait, file: TraitFile) -> str:
    """A trait, and where it stands, as text for people."""

    def wrapped(text: str, lead: str) -> str:
        return textwrap.fill(text, 100, initial_indent=lead, subsequent_indent=" " * len(lead))

    lines = [trait.name, wrapped(trait.description, "  "), ""]
    facts = {
        "contrast": f"{trait.adjectives.positive} / {trait.adjectives.negative}",
        "file": f"{file.path} ({file.source.kind})",
        "content": trait.content_hash(),
        "author": trait.author,
        "license": trait.license,
        "tags": ", ".join(trait.tags),
        "references": "; ".join(trait.references),
    }
    lines += [f"  {key + ':':<12}{value}" for key, value in facts.items() if value]
    lines += ["", "Instructions (+ calls the trait forth, - its opposite)"]
    for i, pair in enumerate(trait.instructions, 1):
        lines += [wrapped(pair.positive, f"  {i} + "), wrapped(pair.negative, "    - ")]
    for title, questions in (
        ("Extraction questions", trait.extraction_questions),
        ("Evaluation questions", trait.evaluation_questions),
    ):
        lines += ["", title, *(wrapped(question, f"  {i:>2} ") for i, question in enumerate(questions, 1))]
    if trait.graded_prompts:
        graded = [wrapped(prompt, f"  {i} ") for i, prompt in enumerate(trait.graded_prompts, 1)]
        lines += ["", "Graded prompts (1 holds the trait back, 8 calls it forth)", *graded]
    return "\n".join([*lines, "", "Judge's rubric", textwrap.indent(trait.judge_rubric, "  ")])
