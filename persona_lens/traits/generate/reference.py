"""Traits of the paper's reference implementation: two JSON files a trait, one for extraction and one for evaluation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from persona_lens.core.documents import DocumentError, parse_json
from persona_lens.core.text import in_short
from persona_lens.traits.definition import SLOTS, is_slug, wrong_count
from persona_lens.traits.generate.authors import AuthoringError
from persona_lens.traits.parsing import explain, read_text
from persona_lens.traits.problems import TraitError
from persona_lens.traits.rendering import trait_text
from persona_lens.traits.schema import N_INSTRUCTION_PAIRS, N_QUESTIONS, Trait

# Where the fields of a trait stand in the files of the reference implementation.
_KEYS = {
    "instructions": "instruction",
    "extraction_questions": "questions",
    "evaluation_questions": "questions",
    "judge_rubric": "eval_prompt",
}
_SIDES = {"positive": "pos", "negative": "neg"}
_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}


@dataclass(frozen=True)
class Imported:
    """A trait that was taken over.

    Attributes:
        trait: The trait.
        text: The trait file.
        notes: What was decided on the way, one sentence each.
    """

    trait: Trait
    text: str
    notes: tuple[str, ...]


def import_reference(
    extraction: Path,
    evaluation: Path | None = None,
    *,
    name: str | None = None,
    description: str | None = None,
    positive: str | None = None,
    negative: str | None = None,
) -> Imported:
    """Take over a trait of the reference implementation (its folders ``trait_data_extract`` and ``trait_data_eval``).

    Args:
        extraction: JSON with ``instruction`` (five objects with ``pos`` and ``neg``), ``questions`` (twenty texts) and
            ``eval_prompt`` (the rubric, with slots for question and answer).
        evaluation: JSON with ``questions``; only these are used. Left out where ``extraction`` holds forty questions,
            of which the second half is then for evaluation.
        name: The trait's name; the name of the extraction file by default.
        description: What the trait is; what the rubric says of it by default.
        positive: Adjective of the positive arm; the name by default.
        negative: Adjective of the negative arm; "helpful" by default, as in the reference implementation.

    Raises:
        AuthoringError: A file is not of this form, or makes no valid trait; every problem is named with its file, its
            key and what to do.
    """
    name = name or extraction.stem
    if not is_slug(name):
        raise AuthoringError(
            f"{in_short(name)!r} cannot name a trait: give --name, with lower-case letters, digits, - and _"
        )
    given = _object(extraction)
    held_out = _object(evaluation) if evaluation else given
    problems = _missing(given, extraction, ("instruction", "questions", "eval_prompt"))
    problems += _missing(held_out, evaluation, ("questions",)) if evaluation else []
    if evaluation is None and "questions" in given:
        problems += _not_forty(given["questions"], extraction)
    if problems:
        raise AuthoringError("\n".join(problems))
    asked = given["questions"]
    pairs, prompt = given["instruction"], given["eval_prompt"]
    rubric = _converted(prompt) if isinstance(prompt, str) else prompt
    fields = {
        "format_version": 1,
        "name": name,
        "description": " ".join((description or _described(rubric) or name).split()),
        "adjectives": {"positive": positive or re.sub(r"[-_]", " ", name), "negative": negative or "helpful"},
        "instructions": [_pair(pair) for pair in pairs] if isinstance(pairs, list) else pairs,
        "extraction_questions": asked if evaluation else asked[:N_QUESTIONS],
        "evaluation_questions": held_out["questions"] if evaluation else asked[N_QUESTIONS:],
        "judge_rubric": rubric,
    }
    trait = _valid(fields, extraction, evaluation)
    notes = _notes(given, held_out, extraction, evaluation)
    sources = " and ".join(in_short(path.name) for path in (extraction, evaluation) if path)
    head = [f"{name}: a character trait for persona-lens, imported from {sources}.", *notes]
    return Imported(trait, trait_text(trait.model_dump(mode="json"), head), tuple(notes))


def _object(path: Path) -> Mapping[str, Any]:
    try:
        data = parse_json(read_text(path))
    except TraitError as error:
        raise AuthoringError(str(error)) from error
    except DocumentError as error:
        raise AuthoringError(f"{path}: {error}. Give a file of trait_data_extract or trait_data_eval") from error
    if not isinstance(data, dict):
        raise AuthoringError(f"{path}: holds {_kind(data)}, but a trait is an object with the key `instruction`")
    return data


def _kind(value: object) -> str:
    return _KINDS.get(type(value), "a number")


def _missing(given: Mapping[str, Any], path: Path, keys: Sequence[str]) -> list[str]:
    there = ", ".join(in_short(key, 30) for key in list(given)[:8]) or "nothing"
    return [f"{path}: {key}: is missing: add it (the file holds {there})" for key in keys if key not in given]


def _not_forty(asked: object, path: Path) -> list[str]:
    if not isinstance(asked, list):
        return [f"{path}: questions: is {_kind(asked)}: write a list of {2 * N_QUESTIONS}"]
    if len(asked) == N_QUESTIONS:
        return [
            f"{path}: questions: has {N_QUESTIONS}, which are for extraction: name the file of the evaluation "
            "questions as well, or put forty here"
        ]
    count = wrong_count(len(asked), 2 * N_QUESTIONS)
    return [] if len(asked) == 2 * N_QUESTIONS else [f"{path}: questions: {count}"]


def _pair(pair: object) -> dict[str, object]:
    given = pair if isinstance(pair, dict) else {}
    return {"positive": given.get("pos"), "negative": given.get("neg")}


def _converted(prompt: str) -> str:
    """Write the slots as {question} and {answer}, whichever brackets the reference has them in."""
    for slot in SLOTS:
        for opening, closing in ((r"\{\{", r"\}\}"), (r"\{", r"\}"), (r"\[\[", r"\]\]"), (r"\[", r"\]")):
            pattern = rf"{opening}\s*{slot}\s*{closing}"
            if re.search(pattern, prompt):
                prompt = re.sub(pattern, f"{{{slot}}}", prompt)
                break
    return prompt


def _described(rubric: object) -> str:
    """What the rubric says of the trait: its first paragraph, without the sentence on what is being done."""
    if not isinstance(rubric, str):
        return ""
    first = re.split(r"\n\s*\n", rubric.strip())[0]
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(first.split()))
    kept = sentences[1:] if len(sentences) > 1 and re.search(r"\b(?:evaluat|rat|judg)", sentences[0]) else sentences
    return re.sub(r"\*\*", "", " ".join(kept))


def _valid(fields: Mapping[str, Any], extraction: Path, evaluation: Path | None) -> Trait:
    try:
        return Trait.model_validate(fields)
    except ValidationError as error:
        found = zip(error.errors(include_url=False), explain(error, {}, ""), strict=True)
        lines = [_fault(details, problem.message, extraction, evaluation) for details, problem in found]
        raise AuthoringError("\n".join(lines)) from error


def _fault(details: ErrorDetails, message: str, extraction: Path, evaluation: Path | None) -> str:
    """What is wrong with a field of the trait, at the file and key that it came from, or the option that sets it."""
    field, *inner = loc = details["loc"]
    kind = _kind(details["input"])
    match details["type"], loc:
        case "tuple_type", _:
            message = f"is {kind}: write a list of {N_INSTRUCTION_PAIRS if field == 'instructions' else N_QUESTIONS}"
        case "string_type", ("judge_rubric",):
            message = f"is {kind}: write the rubric as one text"
        case (("string_type" | "string_too_short"), ("instructions", *_)):
            message = 'is no text: write {"pos": "…", "neg": "…"}'
        case (("string_type" | "string_too_short"), (_, int())):
            message = f"is {kind}, and must be a text with something in it"
    if field == "adjectives":
        return f"--{inner[0]}-adjective: {message}"
    if field not in _KEYS:
        return f"--{field}: {message}"
    held_out = field == "evaluation_questions"
    # Without a file of their own, the questions for evaluation stand behind those for extraction.
    before = N_QUESTIONS if held_out and evaluation is None else 0
    file = evaluation if held_out and evaluation else extraction
    parts = [f"#{part + 1 + before}" if isinstance(part, int) else _SIDES[str(part)] for part in inner]
    return f"{file}: {' '.join([_KEYS[str(field)], *parts])}: {message}"


def _notes(
    given: Mapping[str, Any], held_out: Mapping[str, Any], extraction: Path, evaluation: Path | None
) -> list[str]:
    if evaluation is None:
        return [f"The first {N_QUESTIONS} questions are for extraction, the others for evaluation."]
    differing = [k for k in ("instruction", "eval_prompt") if k in held_out and held_out[k] != given[k]]
    both = " and ".join(f"`{key}`" for key in differing)
    names = in_short(extraction.name), in_short(evaluation.name)
    return [f"{both} of {names[1]} is left out, and differs from that of {names[0]}."] if differing else []
