"""What an extraction asks the model: every question under both instructions of every pair."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from persona_lens.errors import PersonaLensError
from persona_lens.rollouts import Request, RolloutSettings, row_seed
from persona_lens.traits import Arm, Trait


class ExtractionError(PersonaLensError):
    """An extraction that cannot yield vectors."""


@dataclass(frozen=True)
class ExtractionSettings:
    """Everything about an extraction besides the model and the trait (method, section 2).

    Attributes:
        samples: Responses for each question and instruction; the paper takes 10.
        questions: How many of the trait's extraction questions are used; the paper uses all 20.
        seed: Base of every row's seed.
        threshold: A positive response is kept with a score of at least this, a negative one below it.
        coherence: A response is kept only if its coherence is at least this, where the judge or a file gives one.
        paired: Keep a response only if its twin of the other arm is kept too, as the paper's authors do.
        sinks: Take attention sinks into the prompt mean, as the paper's authors do; they dominate it.
        rollouts: How responses are made.
    """

    samples: int = 1
    questions: int = 20
    seed: int = 0
    threshold: float = 50.0
    coherence: float = 50.0
    paired: bool = True
    sinks: bool = False
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ExtractionError(f"samples must be at least 1, got {self.samples}")
        if self.samples > 1 and self.rollouts.temperature == 0:
            raise ExtractionError("at temperature 0 all samples are the same; set samples to 1, or a temperature")
        if self.questions < 2:
            raise ExtractionError(f"questions must be at least 2, got {self.questions}: the separation holds some out")
        if not 0 < self.threshold < 100:
            raise ExtractionError(f"threshold must be between 0 and 100, got {self.threshold}")
        if not 0 <= self.coherence <= 100:
            raise ExtractionError(f"coherence must be from 0 to 100, got {self.coherence}")

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return asdict(self)

    def reading_json(self) -> dict[str, Any]:
        """Those that mean something where responses are given and nothing is sampled, as JSON values."""
        kept = asdict(self)
        del kept["samples"]
        kept["rollouts"] = {name: kept["rollouts"][name] for name in ("batch_size", "batch_tokens")}
        return kept


def plan_requests(trait: Trait, settings: ExtractionSettings) -> list[Request]:
    """One request for each question, pair, sample and arm; twins of the two arms stand side by side.

    Raises:
        ExtractionError: If more questions are asked for than the trait has.
    """
    available = len(trait.extraction_questions)
    if settings.questions > available:
        raise ExtractionError(f"{settings.questions} questions asked for, trait {trait.name} has {available}")
    return [
        Request(
            system=trait.system_prompt(arm, pair),
            question=trait.extraction_questions[question],
            seed=row_seed(settings.seed, "extraction", question, pair, sample, arm),
            labels={"arm": arm.value, "question_number": question, "pair": pair, "sample": sample},
        )
        for question in range(settings.questions)
        for pair in range(len(trait.instructions))
        for sample in range(settings.samples)
        for arm in Arm
    ]
