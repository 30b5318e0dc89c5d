"""The surface that tuning searches: what steering does at each layer and strength, and which point to take.

A strength is the length of the step over the mean length of the residual at its layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from math import floor, log10
from typing import Any

import torch

from persona_lens.backend import Read, ReadKind
from persona_lens.core.progress import Progress
from persona_lens.core.statistics import Estimate
from persona_lens.extraction.experiment import Experiment, Subject, json_of
from persona_lens.judging.recording import prepare_judge
from persona_lens.runs import RunFolder
from persona_lens.runs.rollouts import RolloutBatches
from persona_lens.steering.arms import (
    COHERENCE_MARGIN,
    MIN_COHERENCE,
    ArmEffect,
    ArmRow,
    ArmSettings,
    arm_effect,
    arms_experiment,
    unsteered_means,
)
from persona_lens.steering.steering import SteeringError

# Where the paper saw text fall apart: the length of the step over that of the residual.
CLIFF = (1.0, 1.15)
NEAR_CLIFF = 0.8


@dataclass(frozen=True)
class Place:
    """A layer and a strength.

    Attributes:
        layer: Block index, 0-based.
        coefficient: Multiple of the raw vector; negative steers away from the trait.
        strength: Length of the step over the mean length of the residual at that layer.
    """

    layer: int
    coefficient: float
    strength: float


class Dropped(StrEnum):
    """Why a place was not asked everything, in a search that need not ask it."""

    BROKEN = "broken"  # its text does not hold together
    WEAKER = "weaker"  # whatever it had still answered, another place would hardly have been behind it
    UNDECIDED = "undecided"  # the budget was spent


@dataclass(frozen=True)
class Point:
    """What steering at a place does.

    Attributes:
        place: Where.
        effect: Against the unsteered model and the null; None if no response has a score.
        coherent: Whether the text holds together, by the mean of its surprise or coherence.
        surely: Whether the whole 95% interval says so.
        questions: How many questions it was asked.
        dropped: Why it was not asked more; None where it was asked all that there were to ask.
    """

    place: Place
    effect: ArmEffect | None
    coherent: bool
    surely: bool = False
    questions: int = 0
    dropped: Dropped | None = None

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        own = {name: getattr(self, name) for name in ("coherent", "surely", "questions", "dropped")}
        return {**asdict(self.place), **own, "effect": json_of(self.effect)}


def places(
    layers: Sequence[int],
    strengths: Sequence[float],
    towards: int,
    vector_norms: Sequence[float],
    norms: Sequence[float],
) -> list[Place]:
    """Every layer at every strength, as coefficients of two significant digits.

    Args:
        layers: Layers to try.
        strengths: Step lengths in residual norms.
        towards: 1 for more of the trait, -1 for less.
        vector_norms: Length of the vector at each layer of the model.
        norms: Mean length of the residual at each layer of the model.

    Raises:
        SteeringError: If the vector of a layer is zero.
    """
    found = []
    for layer in layers:
        if not vector_norms[layer]:
            raise SteeringError(f"the vector at layer {layer} is zero; there is nothing to steer along")
        unit = norms[layer] / vector_norms[layer]
        coefficients = dict.fromkeys(significant(strength * unit, 2) for strength in sorted(strengths))
        found += [Place(layer, towards * c, c / unit) for c in coefficients]
    return found


def significant(number: float, digits: int) -> float:
    """A number above 0, rounded to so many significant digits."""
    return round(number, digits - 1 - floor(log10(number)))


def residual_norms(
    subject: Subject, settings: ArmSettings, prefix: str, run: RunFolder | None, progress: Progress
) -> list[float]:
    """Mean length of the residual over the tokens of unsteered responses, sinks left out, at every layer.

    Args:
        subject: Who responds.
        settings: What is asked.
        prefix: Begins the names of the judge's files, which finds out first whether it can work.
        run: Where the responses are kept; None keeps them in memory.
        progress: Told how far it is.

    Raises:
        SteeringError: If every response is empty.
    """
    prepare_judge(subject.judge, run, prefix)
    collected = norms_experiment(subject, settings).rollouts(run)
    collected.run(progress)
    return mean_norms(collected)


def mean_norms(collected: RolloutBatches) -> list[float]:
    """The same of the responses of `norms_experiment`, which are there already.

    Raises:
        SteeringError: If every response is empty.
    """
    mean = torch.cat([tensors["response_norm"] for _, tensors in collected.reductions()]).nanmean(dim=0)
    if not bool(mean.isfinite().all()):
        raise SteeringError("every unsteered response is empty, so the length of the residual is not known")
    return [float(norm) for norm in mean]


def norms_experiment(subject: Subject, settings: ArmSettings) -> Experiment:
    """The unsteered responses that `residual_norms` reads."""
    return arms_experiment(subject, {}, settings, "norms-", [Read(ReadKind.RESPONSE_NORM)])


def surface(rows: Sequence[ArmRow], arms: dict[str, Place], margin: float = COHERENCE_MARGIN) -> list[Point]:
    """What the arms did, each at its place.

    Args:
        rows: Responses of all arms.
        arms: Where each arm steers, by its name.
        margin: Nats a token by which text may surprise the unsteered model more than its own does.

    Raises:
        SteeringError: If the judge gave neither surprise nor coherence.
    """
    plain = unsteered_means(rows)["nll"]
    points = []
    for arm, place in arms.items():
        effect = arm_effect(rows, arm)
        coherent, surely = (False, False)
        if effect is not None:
            coherent, surely = holds_together(effect.coherence, effect.nll, plain, margin)
        questions = len({row.question for row in rows if row.arm == arm})
        points.append(Point(place, effect, coherent, surely, questions))
    return points


def holds_together(
    coherence: Estimate | None, nll: Estimate | None, plain: Estimate | None, margin: float, reserve: float = 0.0
) -> tuple[bool, bool]:
    """Whether text holds together, by its surprise or the coherence that a judge gave: by the mean, and surely.

    Args:
        coherence: Of steered responses, 0 to 100; None where the judge does not ask.
        nll: Their surprise under the unsteered model, nats a token; None where the judge does not compute it.
        plain: That of unsteered responses.
        margin: See `surface`.
        reserve: How far it has to stay from the limit, in nats or in points of coherence.

    Raises:
        SteeringError: If the judge gave neither.
    """
    if coherence is not None:
        least = MIN_COHERENCE + reserve
        return coherence.mean >= least, coherence.low >= least
    if nll is None or plain is None:
        raise SteeringError(
            "this judge gives neither surprise nor coherence, so that text which falls apart cannot be told; take the "
            "likelihood judge or a judge of trait and coherence"
        )
    limit = plain.mean + margin - reserve
    return nll.mean <= limit, nll.high <= limit


def choose_point(points: Sequence[Point], towards: int) -> Point:
    """The point with the strongest effect among those whose text surely holds together; of equal ones the gentlest.

    Where no interval is that narrow, the mean has to do.

    Raises:
        SteeringError: If no point is coherent.
    """
    coherent = [(point, point.effect) for point in points if point.coherent and point.effect is not None]
    if not coherent:
        raise SteeringError("text fell apart at every layer and strength that was tried; try gentler strengths")
    found = [each for each in coherent if each[0].surely] or coherent
    return max(found, key=lambda each: (towards * each[1].change.mean, -each[0].place.strength))[0]


def cliff_beyond(points: Sequence[Point], chosen: Place) -> float | None:
    """The gentlest strength beyond the chosen one at its layer at which text fell apart; None where none was tried."""
    broken = [
        point.place.strength
        for point in points
        if point.place.layer == chosen.layer and point.place.strength > chosen.strength and not point.coherent
    ]
    return min(broken, default=None)


def warnings_about(points: Sequence[Point], chosen: Point, towards: int) -> list[str]:
    """What somebody who steers at the chosen place should know."""
    place, found = chosen.place, []
    stronger = sorted(
        (p for p in points if p.place.layer == place.layer and p.place.strength > place.strength),
        key=lambda p: p.place.strength,
    )
    if stronger and not stronger[0].coherent:
        found.append(
            f"near the coherence cliff: at coefficient {stronger[0].place.coefficient:g}, the next that was tried, "
            "text no longer holds together"
        )
    if place.strength >= NEAR_CLIFF:
        found.append(
            f"the step is {place.strength:.2f} of the residual's length; the paper saw text fall apart near "
            f"{CLIFF[0]:g} to {CLIFF[1]:g}"
        )
    if not stronger:
        found.append("the greatest strength that was tried at this layer was taken; a stronger one may do more")
    if chosen.effect is not None and towards * chosen.effect.change.low <= 0:
        found.append("the effect at the chosen place is not clear of zero on the questions that were searched")
    return found


def warnings_confirmed(point: Point) -> list[str]:
    """The same of what the chosen place did on the questions that it was confirmed on."""
    if point.effect is None:
        return ["no steered response to the questions that were to confirm the choice has a score"]
    if not point.coherent:
        return ["on the questions that were to confirm the choice, text does not hold together at the chosen place"]
    return []


def shown_layers(n_layers: int) -> tuple[int, ...]:
    """Eight layers between 30% and 85% of the depth, where persona vectors steer; all of them in a shallow model."""
    first, last = int(0.3 * n_layers), min(n_layers - 1, round(0.85 * n_layers))
    count = min(8, last - first + 1)
    if count == 1:
        return (first,)
    return tuple(sorted({round(first + i * (last - first) / (count - 1)) for i in range(count)}))
