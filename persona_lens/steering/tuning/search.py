"""`Searched`: what a search over layers and strengths found, by a race or exhaustively."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import ceil
from typing import Any

from persona_lens.core.progress import Progress
from persona_lens.extraction.experiment import Subject
from persona_lens.judging.recording import prepare_judge
from persona_lens.runs import RunFolder
from persona_lens.runs.cost import Work
from persona_lens.steering.arms import ArmSettings, arms_experiment
from persona_lens.steering.tuning.bisection import CLOSE, most_steps
from persona_lens.steering.tuning.race import Race, middle_out
from persona_lens.steering.tuning.settings import TuneSettings, split
from persona_lens.steering.tuning.surface import (
    Place,
    Point,
    choose_point,
    mean_norms,
    norms_experiment,
    places,
)
from persona_lens.steering.tuning.trial import SEARCH, Trial, arms_at, spent, steered_experiment, try_places

CURVE = 3  # strengths of the chosen layer that a race has confirmed


@dataclass(frozen=True)
class Searched:
    """What a search found.

    Attributes:
        norms: Mean length of the residual at every layer.
        trial: What was tried.
        chosen: The point taken.
        strengths: Those that were tried, before coefficients were rounded.
        curve: Places of the chosen layer that are to be confirmed.
        race: How it went, as JSON values; None of an exhaustive search.
        cost: See `persona_lens.steering.tuning.trial.spent`.
        warnings: What it could not find out.
    """

    norms: Sequence[float]
    trial: Trial
    chosen: Point
    strengths: Sequence[float]
    curve: Sequence[Place]
    race: Mapping[str, Any] | None
    cost: Mapping[str, Any]
    warnings: Sequence[str] = ()


def search(subject: Subject, settings: TuneSettings, run: RunFolder | None, progress: Progress) -> Searched:
    """Look for the place with the strongest effect while the text holds together.

    Args:
        subject: Who is asked.
        settings: What is tried, settled.
        run: Where it is kept; None keeps everything in memory.
        progress: Told how far it is.

    Raises:
        SteeringError: If text falls apart everywhere, or the judge cannot tell.
    """
    return (_try_all if settings.exhaustive else _race)(subject, settings, run, progress)


def _try_all(subject: Subject, settings: TuneSettings, run: RunFolder | None, progress: Progress) -> Searched:
    asked, _ = split(settings)
    prepare_judge(subject.judge, run, SEARCH)
    unsteered = norms_experiment(subject, asked).rollouts(run)
    measured = unsteered.run(progress)
    norms, lengths = mean_norms(unsteered), subject.vectors.norms(settings.reduction).tolist()
    tried = places(settings.layers or (), settings.strengths, settings.towards.sign, lengths, norms)
    trial = try_places(subject, settings, tried, asked, SEARCH, run, progress)
    chosen = choose_point(trial.points, settings.towards.sign)
    curve = [place for place in tried if place.layer == chosen.place.layer]
    cost = spent(subject, [*measured, *trial.rollouts], trial.rollouts)
    return Searched(norms, trial, chosen, settings.strengths, curve, None, cost)


def _race(subject: Subject, settings: TuneSettings, run: RunFolder | None, progress: Progress) -> Searched:
    order = middle_out(settings.layers or ())
    race = Race(subject, settings, run, progress)
    chosen = race.run(order)
    trial = race.trial
    cost = spent(subject, trial.rollouts, trial.rollouts)
    curve = curve_places(trial.points, chosen, _further(subject, settings, race.norms, trial.points, chosen))
    told = race.describe(order)
    return Searched(race.norms, trial, chosen, sorted(race.strengths), curve, told, cost, race.warnings())


def _further(
    subject: Subject, settings: TuneSettings, norms: Sequence[float], points: Sequence[Point], chosen: Point
) -> Place | None:
    """The next stronger place than any that was tried at the chosen layer, if there is one that may be tried."""
    layer, greatest = chosen.place.layer, max(settings.strengths)
    tried = max(point.place.strength for point in points if point.place.layer == layer)
    lengths = subject.vectors.norms(settings.reduction).tolist()
    (place,) = places((layer,), (min(tried * CLOSE, greatest),), settings.towards.sign, lengths, norms)
    return place if place.strength > tried else None


def curve_places(points: Sequence[Point], chosen: Point, further: Place | None = None) -> list[Place]:
    """The chosen place between two others of its layer, which show what less and what more would do.

    Args:
        points: Those that were tried.
        chosen: One of them.
        further: A stronger place than any of them at its layer, if there is one.

    Returns:
        The gentler place whose text holds together that is nearest to half the strength; the chosen one; and the
        gentlest of the stronger ones whose text does not, or else the one further, or else the gentlest.
    """
    place = chosen.place
    same = sorted((p for p in points if p.place.layer == place.layer), key=lambda p: p.place.strength)
    gentler = [p.place for p in same if p.place.strength < place.strength and p.coherent]
    stronger = [p for p in same if p.place.strength > place.strength]
    beyond = [p.place for p in stronger if not p.coherent]
    beyond += [further] if further is not None else [p.place for p in stronger]
    halfway = sorted(gentler, key=lambda p: abs(p.strength - place.strength / 2))
    return [*halfway[:1], place, *beyond[:1]]


# What it would ask


def search_work(subject: Subject, settings: TuneSettings) -> list[Work]:
    """What `search` would ask of the model, and of the judge's; nothing runs."""
    asked, _ = split(settings)
    if settings.exhaustive:
        return [
            *norms_experiment(subject, asked).work()[:1],
            *_work_on(subject, settings, settings.layers or (), asked),
        ]
    return [*norms_experiment(subject, asked).work(), *_most(subject, settings, asked)]


def confirming_work(subject: Subject, settings: TuneSettings) -> list[Work]:
    """The same of the confirmation."""
    found = list(_work_on(subject, settings, (settings.layers or ())[:1], split(settings)[1]))
    return found if settings.exhaustive else [replace(work, at_most=True) for work in found]


def confirmed_strengths(settings: TuneSettings) -> int:
    """At how many strengths of the chosen layer is asked again, at most."""
    least, greatest = min(settings.strengths), max(settings.strengths)
    return len(settings.strengths) if settings.exhaustive else min(CURVE, most_steps(least, greatest))


def _work_on(subject: Subject, settings: TuneSettings, layers: Sequence[int], asked: ArmSettings) -> tuple[Work, ...]:
    tried = [Place(layer, 1.0 + number, 1.0) for layer in layers for number in range(confirmed_strengths(settings))]
    return arms_experiment(subject, arms_at(subject.vectors, tried, settings), asked).work()


def _most(subject: Subject, settings: TuneSettings, asked: ArmSettings) -> list[Work]:
    """What the steered responses of a race ask at most: all to the longest questions, the fewest at a time."""
    arms = arms_at(subject.vectors, [Place((settings.layers or ())[0], 1.0, 1.0)], settings)

    def work(numbers: Sequence[int]) -> tuple[Work, ...]:
        return steered_experiment(subject, settings, arms, dict.fromkeys(arms, numbers), SEARCH).work()

    by_length = sorted(asked.questions, key=lambda number: -sum(each.tokens for each in work([number])))
    longest = by_length[: settings.round_questions]
    times = ceil((settings.budget or 0) / (len(longest) * settings.samples))
    return [replace(reduce(Work.__add__, [each] * times), at_most=True) for each in work(longest)]
