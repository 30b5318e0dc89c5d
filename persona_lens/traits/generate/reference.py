"""Traits of the paper's reference implementation: two JSON files a trait, one for extraction and one for evaluation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from persona_lens.core.text import in_short
from persona_lens.traits.document import Document, Loc, TraitError
from persona_lens.traits.generate.replies import AuthoringError
from persona_lens.traits.parsing import explain, read_text
from persona_lens.traits.rendering import trait_text
from persona_lens.traits.schema import N_INSTRUCTION_PAIRS, N_QUESTIONS, SLOTS, Trait, is_slug

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
    problems = [*_missing(given, extraction, ("instruction", "questions", "eval_prompt"))]
    held_out = given if evaluation is None else _object(evaluation)
    if evaluation is not None:
        problems += _missing(held_out, evaluation, ("questions",))
    problems += _shape(given, extraction, questions=2 * N_QUESTIONS if evaluation is None else N_QUESTIONS)
    if evaluation is not None and "questions" in held_out:
        problems += _texts(held_out["questions"], evaluation, "questions", N_QUESTIONS)
    if problems:
        raise AuthoringError("\n".join(problems))
    asked = given["questions"]
    rubric = _converted(given["eval_prompt"])
    fields = {
        "format_version": 1,
        "name": name,
        "description": " ".join((description or _described(rubric)).split()),
        "adjectives": {"positive": positive or re.sub(r"[-_]", " ", name), "negative": negative or "helpful"},
        "instructions": [{"positive": pair["pos"], "negative": pair["neg"]} for pair in given["instruction"]],
        "extraction_questions": asked[:N_QUESTIONS],
        "evaluation_questions": asked[N_QUESTIONS:] if evaluation is None else held_out["questions"],
        "judge_rubric": rubric,
    }
    trait = _valid(fields, extraction, evaluation)
    notes = _notes(given, held_out, extraction, evaluation)
    sources = " and ".join(in_short(path.name) for path in (extraction, evaluation) if path)
    head = [f"{name}: a character trait for persona-lens, imported from {sources}.", *notes]
    rest = {"author": "", "license": "", "tags": [], "references": []}
    return Imported(trait, trait_text({**trait.model_dump(mode="json"), **rest}, head), tuple(notes))


def _object(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(read_text(path))
    except TraitError as error:
        raise AuthoringError(str(error)) from error
    except json.JSONDecodeError as error:
        message = f"{path}:{error.lineno}: not JSON: {error.msg}, in column {error.colno}"
        raise AuthoringError(f"{message}. Give a file of the folder trait_data_extract or trait_data_eval") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits; hostile nesting
        raise AuthoringError(f"{path}: not the JSON of a trait: {in_short(str(error), 100)}") from error
    if not isinstance(data, dict):
        raise AuthoringError(f"{path}: holds {_kind(data)}, but a trait is an object with the key `instruction`")
    return data


def _kind(value: object) -> str:
    return _KINDS.get(type(value), "a number")


def _missing(given: Mapping[str, Any], path: Path, keys: Sequence[str]) -> list[str]:
    there = ", ".join(in_short(key, 30) for key in list(given)[:8]) or "nothing"
    return [f"{path}: {key}: is missing: add it (the file holds {there})" for key in keys if key not in given]


def _shape(given: Mapping[str, Any], path: Path, questions: int) -> list[str]:
    problems = []
    pairs = given.get("instruction", [])
    if "instruction" in given:
        problems += _count(pairs, path, "instruction", N_INSTRUCTION_PAIRS)
    for number, pair in enumerate(pairs if isinstance(pairs, list) else [], 1):
        for side in ("pos", "neg"):
            text = pair.get(side) if isinstance(pair, dict) else None
            if not isinstance(text, str) or not text.strip():
                problems.append(f'{path}: instruction #{number} {side}: is no text: write {{"pos": "…", "neg": "…"}}')
    asked = given.get("questions")
    if questions > N_QUESTIONS and isinstance(asked, list) and len(asked) == N_QUESTIONS:
        problems.append(
            f"{path}: questions: has {N_QUESTIONS}, which are for extraction: name the file of the evaluation "
            "questions as well, or put forty here"
        )
    elif "questions" in given:
        problems += _texts(asked, path, "questions", questions)
    prompt = given.get("eval_prompt")
    if "eval_prompt" in given and not isinstance(prompt, str):
        problems.append(f"{path}: eval_prompt: is {_kind(prompt)}: write the rubric as one text")
    return problems


def _count(value: object, path: Path, key: str, needed: int) -> list[str]:
    if not isinstance(value, list):
        return [f"{path}: {key}: is {_kind(value)}: write a list of {needed}"]
    if len(value) != needed:
        change = f"add {needed - len(value)}" if len(value) < needed else f"remove {len(value) - needed}"
        return [f"{path}: {key}: has {len(value)} items, but exactly {needed} are needed: {change}"]
    return []


def _texts(value: object, path: Path, key: str, needed: int) -> list[str]:
    problems = _count(value, path, key, needed)
    for number, text in enumerate(value if isinstance(value, list) else [], 1):
        if not isinstance(text, str) or not text.strip():
            problems.append(f"{path}: {key} #{number}: is {_kind(text)}, and must be a text with something in it")
    return problems


def _converted(prompt: str) -> str:
    """Write the slots as {question} and {answer}, whichever brackets the reference has them in."""
    for slot in SLOTS:
        for opening, closing in ((r"\{\{", r"\}\}"), (r"\{", r"\}"), (r"\[\[", r"\]\]"), (r"\[", r"\]")):
            pattern = rf"{opening}\s*{slot}\s*{closing}"
            if re.search(pattern, prompt):
                prompt = re.sub(pattern, f"{{{slot}}}", prompt)
                break
    return prompt


def _described(rubric: str) -> str:
    """What the rubric says of the trait: its first paragraph, without the sentence on what is being done."""
    first = re.split(r"\n\s*\n", rubric.strip())[0]
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(first.split()))
    kept = sentences[1:] if len(sentences) > 1 and re.search(r"\b(?:evaluat|rat|judg)", sentences[0]) else sentences
    return re.sub(r"\*\*", "", " ".join(kept))


def _valid(fields: Mapping[str, Any], extraction: Path, evaluation: Path | None) -> Trait:
    try:
        return Trait.model_validate(fields)
    except ValidationError as error:
        document = Document(dict(fields), {}, {}, ())
        locations = [details["loc"] for details in error.errors(include_url=False, include_input=False)]
        found = zip(locations, explain(error, document, ""), strict=True)
        lines = [f"{_place(loc, extraction, evaluation)}: {problem.message}" for loc, problem in found]
        raise AuthoringError("\n".join(lines)) from error


def _place(loc: Loc, extraction: Path, evaluation: Path | None) -> str:
    """The file and key that a field of the trait came from, or the option that sets it."""
    match loc:
        case ("instructions", int(index), *side):
            key = {"positive": " pos", "negative": " neg"}.get(str(side[0]) if side else "", "")
            return f"{extraction}: instruction #{index + 1}{key}"
        case ("extraction_questions", int(index), *_):
            return f"{extraction}: questions #{index + 1}"
        case ("evaluation_questions", int(index), *_):
            number = index + 1 if evaluation else index + 1 + N_QUESTIONS
            return f"{evaluation or extraction}: questions #{number}"
        case ("judge_rubric", *_):
            return f"{extraction}: eval_prompt"
        case ("adjectives", side, *_):
            return f"--{side}-adjective"
        case _:
            return f"--{loc[0]}" if loc else str(extraction)


def _notes(
    given: Mapping[str, Any], held_out: Mapping[str, Any], extraction: Path, evaluation: Path | None
) -> list[str]:
    if evaluation is None:
        return [f"The first {N_QUESTIONS} questions are for extraction, the others for evaluation."]
    differing = [k for k in ("instruction", "eval_prompt") if k in held_out and held_out[k] != given[k]]
    both = " and ".join(f"`{key}`" for key in differing)
    names = in_short(extraction.name), in_short(evaluation.name)
    return [f"{both} of {names[1]} is left out, and differs from that of {names[0]}."] if differing else []
