"""What each arm did: its change against the unsteered model, beside the same for random directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from persona_lens.statistics import CHANGES, Estimate, clear_side
from persona_lens.steering.analysis import by_question, mean_of
from persona_lens.steering.arms import ArmRow
from persona_lens.steering.changes import Value, change_of
from persona_lens.steering.steering import SteeringError
from persona_lens.steering.sweep import NONE, RANDOM, VECTOR


@dataclass(frozen=True)
class ArmEffect:
    """One arm beside the unsteered model and beside its null, question by question.

    Attributes:
        arm: Name of the arm.
        score: Mean trait score, 0 to 100.
        change: Score minus the unsteered model's.
        random: The same change along random directions; None without them.
        difference: ``change`` minus ``random``; None without them.
        surprise: -log p under the unsteered model, nats a token; None where the judge does not compute it.
        coherence: 0 to 100; None where the judge does not ask.
        empty: Share of responses without a score.
    """

    arm: str
    score: Estimate
    change: Estimate
    random: Estimate | None
    difference: Estimate | None
    surprise: Estimate | None
    coherence: Estimate | None
    empty: float

    @property
    def clear(self) -> int:
        """1 or -1 if the change is clear, else 0: see `persona_lens.statistics.clear_side`."""
        return clear_side(self.change, self.difference)

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        estimates = ("score", "change", "random", "difference", "surprise", "coherence")
        found = {name: getattr(self, name) for name in estimates}
        values = {name: estimate.to_json() if estimate else None for name, estimate in found.items()}
        return {"arm": self.arm, **values, "clear": self.clear, "empty": self.empty}


def arm_effect(rows: Sequence[ArmRow], arm: str) -> ArmEffect | None:
    """The effect of an arm; None if none of its responses has a score.

    Raises:
        SteeringError: If no unsteered response has a score.
    """
    own = [row for row in rows if row.arm == arm and row.direction == VECTOR]
    null = [row for row in rows if row.arm == arm and row.direction == RANDOM]
    plain = [row for row in rows if row.direction == NONE]
    if not by_question(plain, "score"):
        raise SteeringError("no unsteered response has a score; there is nothing to compare steered ones with")
    found = change_of(_scores(plain), _scores(own), _scores(null), within=CHANGES)
    score = mean_of(own, "score")
    if found is None or score is None:
        return None
    return ArmEffect(
        arm,
        score=score,
        change=found.vector,
        random=found.random,
        difference=found.difference,
        surprise=mean_of(own, "surprise"),
        coherence=mean_of(own, "coherence"),
        empty=sum(row.score is None for row in own) / len(own),
    )


def unsteered_mean(rows: Sequence[ArmRow], quantity: str) -> Estimate | None:
    """Mean of ``score``, ``surprise`` or ``coherence`` over the unsteered responses; None without any."""
    return mean_of([row for row in rows if row.direction == NONE], quantity)


def _scores(rows: Sequence[ArmRow]) -> list[Value]:
    return [(row.question, row.score) for row in rows]
