"""`PersistSettings`: what is said, how it is steered, and what is measured."""

from __future__ import annotations

from dataclasses import dataclass, field

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.known_questions import check_count
from persona_lens.analysis.persistence.ways import Way
from persona_lens.runs.settings import RolloutSettings
from persona_lens.vectors import OWN_REDUCTION


@dataclass(frozen=True)
class PersistSettings:
    """What is said, how it is steered, and what is measured.

    Attributes:
        conversations: How many people talk, from each domain of the scripted users in turn.
        turns: Turns of each conversation.
        ways: Ways to steer, all of them by default; conversations without steering are always held too.
        layer: Where to steer; None for the layer that was tuned.
        coefficient: Multiple of the raw vector; None for the one that was tuned.
        target: Projection that `floor` holds, in residual-stream units; None for the mean that replies steered at all
            tokens have in the first turn.
        gate: Projection short of which `gated` adds; None for the mean that replies to the system prompt have in the
            first turn.
        known_questions: How many known questions are asked after some turns, for capability; 0 asks none.
        known_turns: After which turns they are asked; None for the first and the last.
        last: How many of the last turns count as the end, at which ways are held against one another.
        random_directions: How many random directions stand beside; conversation i gets number i modulo this.
        reduction: Which of the vectors. Of a model that thinks the mean of the answer is projected, or with
            `thinking_mean` that of the thinking.
        seed: Base of every row's seed and of the random directions.
        rollouts: How replies are made.
    """

    conversations: int = 12
    turns: int = 10
    ways: tuple[str, ...] | None = None
    layer: int | None = None
    coefficient: float | None = None
    target: float | None = None
    gate: float | None = None
    known_questions: int = 8
    known_turns: tuple[int, ...] | None = None
    last: int = 3
    random_directions: int = 5
    reduction: str = OWN_REDUCTION
    seed: int = 0
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)

    def __post_init__(self) -> None:
        counts = (self.conversations, self.turns, self.last, self.random_directions)
        if min(counts) < 1 or self.last > self.turns:
            raise AnalysisError(
                "conversations, turns, last and random_directions must be at least 1, and last at most turns"
            )
        check_count(self.known_questions)
        if self.coefficient == 0:
            raise AnalysisError("a coefficient of 0 steers nothing; give another, or none for the tuned one")
        if (self.layer is None) != (self.coefficient is None):
            raise AnalysisError("a layer and a coefficient go together; give both, or neither for the tuned ones")
        self.held_ways  # noqa: B018 - what is not known is refused at once
        if not all(1 <= turn <= self.turns for turn in self.known_after):
            raise AnalysisError(f"known_turns must be from 1 to {self.turns}, got {list(self.known_after)}")

    @property
    def held_ways(self) -> list[Way]:
        """The ways to steer, the unsteered conversations left out."""
        named = [part.strip() for each in self.ways or () for part in each.split(",")]
        if unknown := [name for name in named if name not in list(Way)]:
            raise AnalysisError(f"there is no way {unknown[0]!r} to steer; there are {', '.join(Way)}")
        return [way for way in Way if way is not Way.NONE and (not named or way in named)]

    @property
    def known_after(self) -> tuple[int, ...]:
        """After which turns known questions are asked."""
        if not self.known_questions:
            return ()
        return tuple(sorted(set(self.known_turns or (1, self.turns))))
