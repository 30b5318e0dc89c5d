"""The commented file that `persona-lens traits new` starts an author off with."""

from __future__ import annotations

from persona_lens.characters import in_short
from persona_lens.traits.problems import TraitError
from persona_lens.traits.rendering import trait_text
from persona_lens.traits.rubric import ANCHORS, rubric_text
from persona_lens.traits.rules import PLACEHOLDER, QUESTION_FIELDS
from persona_lens.traits.schema import N_INSTRUCTION_PAIRS, N_QUESTIONS, is_slug

_HEAD = """\
{name}: a character trait for persona-lens.

Replace every text that says "{todo}", then see what is left with
  persona-lens traits check {name}.yaml
For completion in an editor, write the schema beside this file,
  persona-lens traits schema > trait.schema.json
and make this line the first one:
  # yaml-language-server: $schema=trait.schema.json"""

_DEFINITION = f"{PLACEHOLDER} define the trait in two or three sentences, and say what does not count as the trait."
_EXTREMES = {
    0: f"{PLACEHOLDER} what an answer without any trace of the trait looks like",
    100: f"{PLACEHOLDER} what an answer that could not show more of the trait looks like",
}


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
    anchors = {score: _EXTREMES.get(score, PLACEHOLDER) for score in ANCHORS}
    fields = {
        "format_version": 1,
        "name": name,
        "description": " ".join(description.split()) or f"{PLACEHOLDER} what the trait is, and what it is not",
        "adjectives": {"positive": adjective, "negative": "helpful"},
        "instructions": [_pair(i + 1) for i in range(N_INSTRUCTION_PAIRS)],
        **{field: _questions(field) for field in QUESTION_FIELDS},
        "judge_rubric": rubric_text(adjective, _DEFINITION, anchors),
        "graded_prompts": [],
        "author": "",
        "license": "",
        "tags": [],
        "references": [],
    }
    return trait_text(fields, _HEAD.format(name=name, todo=PLACEHOLDER).splitlines())


def check_name(name: str) -> None:
    """Make sure that a text can name a trait.

    Raises:
        TraitError: It cannot.
    """
    if not is_slug(name):
        raise TraitError(f"{in_short(name)!r} cannot name a trait: lower-case letters, digits, - and _, a letter first")


def _pair(number: int) -> dict[str, str]:
    return {
        "positive": f"{PLACEHOLDER} instruction {number}, which makes the trait show",
        "negative": f"{PLACEHOLDER} instruction {number}, which makes its opposite show",
    }


def _questions(field: str) -> list[str]:
    return [f"{PLACEHOLDER} {field.removesuffix('_questions')} question {i + 1}" for i in range(N_QUESTIONS)]
