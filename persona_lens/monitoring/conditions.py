"""`StudySettings`: what a study asks; and the `Condition`s that it asks its questions in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from persona_lens.core.text import counted
from persona_lens.judging.agreement import AgreementError, read_scored
from persona_lens.monitoring.gauges import MonitoringError
from persona_lens.runs.rollouts import ROLLOUTS
from persona_lens.runs.settings import RolloutSettings
from persona_lens.traits import Arm, Trait, TraitError, load_trait
from persona_lens.vectors import OWN_REDUCTION, PersonaVectors, check_layers

SCORES = "scores.jsonl"
Examples = Sequence[tuple[str, str]] | Path | str


class Conditions(StrEnum):
    """What a study varies."""

    PROMPTS = "prompts"  # a graded system prompt
    SHOTS = "shots"  # a number of answered questions before the one that is asked
    BOTH = "both"


@dataclass(frozen=True)
class StudySettings:
    """What a study asks.

    Attributes:
        conditions: The trait's eight graded system prompts, numbers of examples, or both.
        shots: The numbers of examples.
        layers: Layers read; None for all.
        questions: How many of the trait's evaluation questions, which the vectors have not seen.
        samples: Responses to each question in each condition; the paper takes 10.
        random_directions: How many random directions stand beside the vector; 0 leaves the null out.
        false_alarm_rate: For the threshold that the summary shows; others can be had of the calibration.
        reduction: Which of the vectors.
        seed: Base of every row's seed, of the random directions and of the bootstrap.
        rollouts: How responses are made.
    """

    conditions: Conditions = Conditions.PROMPTS
    shots: tuple[int, ...] = (0, 5, 10, 15, 20)
    layers: tuple[int, ...] | None = None
    questions: int = 10  # as in the paper, with ten samples each: what is correlated are means over samples
    samples: int = 10
    random_directions: int = 20
    false_alarm_rate: float = 0.05
    reduction: str = OWN_REDUCTION
    seed: int = 0
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)

    def __post_init__(self) -> None:
        if self.conditions is not Conditions.PROMPTS and (
            len(set(self.shots)) < 2 or len(set(self.shots)) < len(self.shots) or min(self.shots) < 0
        ):
            raise MonitoringError(f"shots are two or more different numbers of examples, got {list(self.shots)}")
        check_layers(self.layers, MonitoringError)
        if self.questions < 2:
            raise MonitoringError(f"questions must be at least 2, since intervals are over them: got {self.questions}")
        if self.samples < 1 or self.random_directions < 0:
            raise MonitoringError("samples must be at least 1, random_directions at least 0")
        if self.samples > 1 and self.rollouts.temperature == 0:
            raise MonitoringError("at temperature 0 all samples are the same; set samples to 1, or a temperature")
        if not 0 < self.false_alarm_rate < 1:
            raise MonitoringError(f"false_alarm_rate is above 0 and below 1, got {self.false_alarm_rate}")

    def layers_of(self, vectors: PersonaVectors) -> tuple[int, ...]:
        """The layers that are read, ascending."""
        return tuple(sorted(self.layers)) if self.layers else tuple(range(vectors.model.n_layers))


@dataclass(frozen=True)
class Condition:
    """What comes before a question.

    Attributes:
        kind: Of what it is made.
        level: Number of the graded prompt, from 1; or number of examples.
        system: System prompt, or None for none.
        examples: Questions and answers that come before, as turns of the conversation.
    """

    kind: Conditions
    level: int
    system: str | None = None
    examples: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """Such as ``prompt 3`` or ``5 shots``."""
        return f"prompt {self.level}" if self.kind is Conditions.PROMPTS else counted(self.level, "shot")

    def to_json(self) -> dict[str, Any]:
        """The condition as JSON values."""
        return {"name": self.name, **asdict(self)}


def plan_conditions(
    vectors: PersonaVectors, trait: Trait, settings: StudySettings, examples: Examples | None = None
) -> list[Condition]:
    """The conditions of a study, graded prompts first; of a larger number of examples, the first are the smaller one's.

    Raises:
        MonitoringError: If graded prompts or examples are missing.
    """
    found: list[Condition] = []
    if settings.conditions is not Conditions.SHOTS:
        prompts = graded_trait(vectors, trait).graded_prompts
        if not prompts:
            raise MonitoringError(
                f"the trait {trait.name!r} has no graded prompts: write eight of them into its file, from holding the "
                "trait back to calling it forth (graded_prompts:), and name the file (--trait FILE)"
            )
        found += [Condition(Conditions.PROMPTS, level, prompt) for level, prompt in enumerate(prompts, 1)]
    if settings.conditions is not Conditions.PROMPTS:
        if examples is None:
            raise MonitoringError(
                "conditions with examples need examples: give the run folder of the extraction (--examples FOLDER), or "
                "study graded prompts only (--conditions prompts)"
            )
        answered = examples_of(examples) if isinstance(examples, Path | str) else list(examples)
        if (most := max(settings.shots)) > len(answered):
            raise MonitoringError(
                f"{most} examples are asked for, but there are {len(answered)}: ask for fewer (--shots), or give the "
                "folder of a larger extraction (--examples)"
            )
        found += [Condition(Conditions.SHOTS, n, None, tuple(answered[:n])) for n in sorted(settings.shots)]
    return found


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
        DataError: If a row cannot be read, naming the file and the line.
    """
    for file in (Path(folder) / ROLLOUTS, Path(folder) / SCORES):
        if not file.exists():
            raise MonitoringError(
                f"there is no {file}, which examples are taken from: give the run folder of the extraction "
                "(--examples FOLDER), or study graded prompts only (--conditions prompts)"
            )
    try:
        scored = read_scored(folder)
    except AgreementError as error:
        raise MonitoringError(str(error)) from error
    shown = [
        (each.score, each.question, each.response.strip())
        for each in scored
        if each.labels.get("arm") == Arm.POSITIVE and each.score is not None and each.response.strip()
    ]
    best: dict[str, tuple[str, str]] = {}
    for _, question, response in sorted(shown, key=lambda found: -found[0]):
        best.setdefault(question, (question, response))
    return list(best.values())
