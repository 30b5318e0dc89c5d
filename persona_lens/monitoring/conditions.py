"""Conditions: what comes before a study's questions, from holding the trait back to calling it forth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from persona_lens.counting import counted
from persona_lens.monitoring.errors import MonitoringError
from persona_lens.tables import read_rows
from persona_lens.traits import Arm, Trait, TraitError, load_trait
from persona_lens.vectors import PersonaVectors

ROLLOUTS, SCORES = "rollouts.jsonl", "scores.jsonl"
_ORDER = ("question_number", "pair", "sample", "arm")


class Kind(StrEnum):
    """What a condition is made of."""

    PROMPTS = "prompts"  # a graded system prompt
    SHOTS = "shots"  # a number of answered questions before the one that is asked


@dataclass(frozen=True)
class Condition:
    """What comes before a question.

    Attributes:
        kind: Of what it is made.
        level: Number of the graded prompt, from 1; or number of examples.
        system: System prompt, or None for none.
        examples: Questions and answers that come before, as turns of the conversation.
    """

    kind: Kind
    level: int
    system: str | None = None
    examples: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """Such as ``prompt 3`` or ``5 shots``."""
        return f"prompt {self.level}" if self.kind is Kind.PROMPTS else counted(self.level, "shot")

    def to_json(self) -> dict[str, Any]:
        """The condition as JSON values."""
        return {"name": self.name, **asdict(self)}


def graded_conditions(trait: Trait) -> list[Condition]:
    """One condition for each of the trait's graded prompts.

    Raises:
        MonitoringError: If it has none.
    """
    if not trait.graded_prompts:
        raise MonitoringError(
            f"the trait {trait.name!r} has no graded prompts: write eight of them into its file, from holding the "
            "trait back to calling it forth (graded_prompts:), and name the file (--trait FILE)"
        )
    return [Condition(Kind.PROMPTS, level, prompt) for level, prompt in enumerate(trait.graded_prompts, 1)]


def shot_conditions(shots: Sequence[int], examples: Sequence[tuple[str, str]]) -> list[Condition]:
    """One condition for each number of examples; of a larger number, the first are those of the smaller ones.

    Raises:
        MonitoringError: If there are too few examples.
    """
    if max(shots) > len(examples):
        raise MonitoringError(
            f"{max(shots)} examples are asked for, but there are {len(examples)}: ask for fewer (--shots), or give the "
            "folder of a larger extraction (--examples)"
        )
    return [Condition(Kind.SHOTS, n, None, tuple(examples[:n])) for n in shots]


def graded_trait(vectors: PersonaVectors, trait: Trait) -> Trait:
    """The trait with graded prompts, where vectors from before there were any carry it without.

    They are taken from the trait of the same name and content that is found now; failing that, the trait is returned as
    it is.
    """
    if trait.graded_prompts:
        return trait
    try:
        found = load_trait(vectors.trait)
    except TraitError:
        return trait
    return found if found.content_hash() == trait.content_hash() else trait


def examples_of(folder: Path | str) -> list[tuple[str, str]]:
    """Answered questions that show the trait, from an extraction's run folder.

    Of each extraction question the response of the positive arm with the highest score is taken; the highest of all
    comes first.

    Args:
        folder: With the run's ``rollouts.jsonl`` and ``scores.jsonl``.

    Raises:
        MonitoringError: If it holds no such run.
        TableError: If a row cannot be read, naming the file and the line.
    """
    rollouts, scores = Path(folder) / ROLLOUTS, Path(folder) / SCORES
    for file in (rollouts, scores):
        if not file.exists():
            raise MonitoringError(
                f"there is no {file}, which examples are taken from: give the run folder of the extraction "
                "(--examples FOLDER), or study graded prompts only (--conditions prompts)"
            )
    places = {_key(rollouts, line, row, _ORDER): row for line, row in read_rows(rollouts)}
    judged = {_key(scores, line, row, ("row",))[0]: _score(scores, line, row) for line, row in read_rows(scores)}
    if set(judged) != set(range(len(places))):
        raise MonitoringError(f"{scores} has not one score for each of the {len(places)} responses in {rollouts.name}")
    try:
        # The order of the plan, which the numbers of the scores follow: positive before negative, as in `Arm`.
        ordered = sorted(places, key=lambda key: (*key[:3], key[3] != Arm.POSITIVE))
    except TypeError:
        raise MonitoringError(f"{rollouts} does not number questions, pairs and samples") from None
    best: dict[object, tuple[float, str, str]] = {}
    for number, key in enumerate(ordered):
        row, score = places[key], judged[number]
        asked, answer = row.get("question"), row.get("response")
        if key[3] != Arm.POSITIVE or score is None or not isinstance(asked, str) or not isinstance(answer, str):
            continue
        if answer.strip() and (key[0] not in best or score > best[key[0]][0]):
            best[key[0]] = (score, asked, answer.strip())
    ranked = sorted(best.values(), key=lambda found: -found[0])
    return [(asked, answer) for _, asked, answer in ranked]


def _key(file: Path, line: int, row: dict[str, Any], names: Sequence[str]) -> tuple[Any, ...]:
    try:
        key = tuple(row[name] for name in names)
        hash(key)
    except (KeyError, TypeError) as error:
        raise MonitoringError(f"{file}:{line}: the row does not say what it answers: {error}") from error
    return key


def _score(file: Path, line: int, row: dict[str, Any]) -> float | None:
    score = row.get("score")
    if score is None or (isinstance(score, int | float) and 0 <= score <= 100):
        return score
    raise MonitoringError(f"{file}:{line}: a score is a number from 0 to 100, got {json.dumps(score)[:40]}")
