"""`TuneSettings`: what tuning tries, and what of it depends on the model and the trait."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from persona_lens.backend import Positions
from persona_lens.core.statistics import FEW
from persona_lens.extraction.experiment import Subject
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering.arms import COHERENCE_MARGIN, ArmSettings
from persona_lens.steering.steering import SteeringError
from persona_lens.steering.tuning.bisection import most_steps
from persona_lens.steering.tuning.surface import shown_layers
from persona_lens.traits import Arm
from persona_lens.vectors import OWN_REDUCTION, check_layers

CARRIED = 2  # places of a layer that its share of a race's budget is enough for


class Towards(StrEnum):
    """What steering is for."""

    MORE = "more"
    LESS = "less"

    @property
    def sign(self) -> int:
        """Of the coefficient."""
        return 1 if self is Towards.MORE else -1

    @property
    def arm(self) -> Arm:
        """Whose instructions ask for it."""
        return Arm.POSITIVE if self is Towards.MORE else Arm.NEGATIVE


@dataclass(frozen=True)
class TuneSettings:
    """What tuning tries.

    Attributes:
        layers: Layers tried, each alone; None for eight between 30% and 85% of the depth.
        strengths: Lengths of the step over the mean length of the residual at its layer; what is tried at each layer
            lies between the least and the greatest of them, and in an exhaustive search it is these.
        towards: More of the trait, or less.
        search_questions: How many of the held-out questions the search uses.
        confirm_questions: How many of the others the choice is confirmed on, which the result rests on; None takes half
            as many again as the search has, at least 5, as far as there are so many.
        samples: Responses for each question and place in the search.
        confirm_samples: The same when the chosen place is confirmed.
        random_directions: How many random rotations stand beside the choice where it is confirmed, and in an exhaustive
            search beside every place.
        margin: Nats a token by which steered text may surprise the unsteered model more than its own does.
        positions: Tokens that are steered.
        reduction: Which of the vectors.
        exhaustive: Try every strength at every layer on every question, beside random directions, instead of asking on
            only where the choice is still open. It costs about four times as much.
        round_questions: How many questions places that are still open are asked at a time; not in an exhaustive search.
        budget: How many steered responses the search may make at most, which only matters where it is not exhaustive;
            None for enough to carry every layer through.
        seed: Base of every row's seed and of the random directions.
        rollouts: How responses are made.
    """

    layers: tuple[int, ...] | None = None
    strengths: tuple[float, ...] = (0.1, 0.2, 0.3, 0.45, 0.65, 0.9)
    towards: Towards = Towards.MORE
    search_questions: int = 8  # fewer than elsewhere: the result rests on the others
    confirm_questions: int | None = None
    samples: int = 1
    confirm_samples: int = 2
    random_directions: int = 5
    margin: float = COHERENCE_MARGIN
    positions: Positions = Positions.ALL
    reduction: str = OWN_REDUCTION
    exhaustive: bool = False
    round_questions: int = 2
    budget: int | None = None
    seed: int = 0
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)

    def __post_init__(self) -> None:
        check_layers(self.layers, SteeringError)
        if not self.strengths or not all(0 < strength < 10 for strength in self.strengths):
            raise SteeringError(
                f"strengths are step lengths in residual norms, such as 0.1 to 1: got {list(self.strengths)}"
            )
        counts = (
            self.search_questions,
            self.samples,
            self.confirm_samples,
            self.confirm_questions,
            self.round_questions,
        )
        if min(count for count in counts if count is not None) < 1 or self.random_directions < 0:
            raise SteeringError("questions and samples must be at least 1, random_directions at least 0")
        if self.margin <= 0:
            raise SteeringError(f"margin must be above 0 nats, got {self.margin}")
        if self.exhaustive and self.budget is not None:
            raise SteeringError("an exhaustive search tries everything; leave out the budget, or exhaustive")

    @property
    def carrying(self) -> int:
        """Steered responses that carry a layer through: its bisection, and every question at some of its places."""
        asked = min(self.round_questions, self.search_questions)
        steps = most_steps(min(self.strengths), max(self.strengths))
        return self.samples * (steps * asked + min(CARRIED, steps) * (self.search_questions - asked))


def settled(settings: TuneSettings, subject: Subject) -> TuneSettings:
    """The settings with what depends on the model, the trait and its vectors.

    Raises:
        SteeringError: If the trait has too few questions, or the budget is enough for no layer.
    """
    there, asked = len(subject.trait.evaluation_questions), settings.confirm_questions
    left = there - settings.search_questions
    if left < max(1, asked or 0):
        wanted = "at least one" if asked is None else f"the {asked} that are asked for (--confirm-questions)"
        raise SteeringError(
            f"trait {subject.trait.name} has {there} held-out questions, of which a search on "
            f"{settings.search_questions} leaves {max(left, 0)} to confirm the choice on, and not {wanted}; search on "
            "fewer (--search-questions)"
        )
    confirm = asked or min(left, max(FEW, -(-3 * settings.search_questions // 2)))
    layers = settings.layers or shown_layers(subject.backend.info.n_layers)
    budget = settings.budget
    if budget is None and not settings.exhaustive:
        budget = len(layers) * settings.carrying
    if budget is not None and budget < settings.carrying:
        raise SteeringError(
            f"a budget of {budget} carries no layer through, which takes {settings.carrying} responses; give at least "
            "so many (--budget), or search on fewer questions (--search-questions)"
        )
    settings = subject.vectors.settled(settings)
    return replace(settings, layers=layers, confirm_questions=confirm, budget=budget)


def split(settings: TuneSettings) -> tuple[ArmSettings, ArmSettings]:
    """Questions that are searched, and those that the choice is confirmed on."""
    first, stop = settings.search_questions, settings.search_questions + (settings.confirm_questions or 0)
    search = ArmSettings(
        questions=tuple(range(first)),
        samples=settings.samples,
        random_directions=settings.random_directions,
        seed=settings.seed,
        rollouts=settings.rollouts,
    )
    return search, replace(search, questions=tuple(range(first, stop)), samples=settings.confirm_samples)
