"""A trait's fields as the commented YAML that people read and edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

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


def trait_text(fields: Mapping[str, Any], head: Sequence[str]) -> str:
    """Write the text of a trait file.

    Args:
        fields: What `Trait` takes, as plain data, in the order in which it is to stand.
        head: Lines of the comment at the top.
    """
    parts = [_comment(head)]
    for name, value in fields.items():
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
