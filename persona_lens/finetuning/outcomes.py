"""What a study's treatments did: scores, losses, capability and shift side by side, over seeds and questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import numpy as np

from persona_lens.core.statistics import CHANGES, SCORES, SHARE_CHANGES, Ends, Estimate, crossed_interval
from persona_lens.extraction.experiment import json_of
from persona_lens.finetuning.config import FinetuneConfig, FinetuningError, Method, make_config, measures_of
from persona_lens.finetuning.shift import correlated
from persona_lens.steering.arms import minus
from persona_lens.vectors import PersonaVectors

PLAIN, POST_HOC, RANDOM = "plain", "post-hoc", "random"


@dataclass(frozen=True)
class Treatment:
    """A way to finetune.

    Attributes:
        name: What it is called.
        config: How; its seed is set for each run.
    """

    name: str
    config: FinetuneConfig


@dataclass(frozen=True)
class TreatmentSettings:
    """What the treatments do, in the notation of steerings; None leaves one out.

    Attributes:
        preventative: Added while training; the random directions are of its norm.
        everywhere: The same at all layers, by increments.
        post_hoc: Applied to the plainly finetuned model when it answers.
        caft: Ablated while training.
        regularised: Traits and layers that the penalty is on.
        penalty: Weight of the penalty.
        prompted: Whether a system prompt that calls the trait forth stands in the training data.
        random: Whether the preventative steering also runs in random directions, another one for each seed.
    """

    preventative: str | None
    everywhere: str | None = None
    post_hoc: str | None = None
    caft: str | None = None
    regularised: str | None = None
    penalty: float = 1.0
    prompted: bool = True
    random: bool = True

    @staticmethod
    def of(
        vectors: PersonaVectors, layer: int, coefficient: float, increments: float | None = None
    ) -> TreatmentSettings:
        """All treatments at one layer, with one coefficient.

        Args:
            vectors: The trait.
            layer: Block index, 0-based.
            coefficient: What preventative steering adds; post-hoc steering takes as much away.
            increments: The same for the steering at all layers; None leaves that out.
        """
        at = f"{vectors.trait}@{layer}"
        return TreatmentSettings(
            preventative=f"{at}:{coefficient:+g}",
            everywhere=f"{vectors.trait}@all:increments({increments:+g})" if increments is not None else None,
            post_hoc=f"{at}:{-coefficient:+g}",
            caft=f"{at}:ablate",
            regularised=f"{at}:ablate",
        )


def treatments_of(settings: TreatmentSettings, config: FinetuneConfig, vectors: PersonaVectors) -> list[Treatment]:
    """The treatments that train, plain training first; all else in their configurations is the same.

    Raises:
        FinetuningError: If the configuration names a method itself, or a treatment does not fit the vectors.
        NotationError, SteeringError: If one is not written as steerings are.
    """
    if config.method is not Method.PLAIN:
        raise FinetuningError(f"a study sets the method itself; take {config.method} out of the configuration")
    wanted = [
        ("preventative", Method.PREVENTATIVE, settings.preventative),
        ("preventative, all layers", Method.PREVENTATIVE, settings.everywhere),
        ("caft", Method.CAFT, settings.caft),
        ("regularised", Method.REGULARISED, settings.regularised),
        ("prompted", Method.PROMPTED, None),
        (RANDOM, Method.PREVENTATIVE, settings.preventative if settings.random else None),
    ]
    found = [Treatment(PLAIN, config)]
    for name, method, edits in wanted:
        if edits is None and not (method is Method.PROMPTED and settings.prompted):
            continue
        penalty = settings.penalty if method is Method.REGULARISED else None
        own = {**config.model_dump(), "method": method, "edits": edits, "penalty": penalty}
        found.append(Treatment(name, make_config(own)))
    for each in found:
        measures_of(each.config, [vectors])
    return found


def turned(vectors: PersonaVectors, seed: int) -> PersonaVectors:
    """Random directions of equal norm, in the name of the trait."""
    null = replace(vectors.random_like(seed), trait=vectors.trait)
    return null.with_provenance(trait=dict(vectors.stored("trait")))


LOSSES = ("last", "learned", "unseen")
BASE = "base"
Crossed = Mapping[int, Mapping[int, float]]
"""Values by seed and question."""


@dataclass(frozen=True)
class Outcome:
    """One treatment under one seed.

    Attributes:
        treatment: Its name.
        seed: Of the training; the base model has none.
        scores: Mean trait score of the replies to each question.
        measured: Mean ``nll`` or ``coherence`` of the replies to each question, as the judge gives it.
        moved: Of each question the projection of its last prompt token minus the base model's, at the layer.
        losses: See `persona_lens.finetuning.Finetuned`; empty where nothing was trained.
        right: Of each sample of the capability task whether its answer is right; empty if that was not measured.
    """

    treatment: str
    seed: int | None
    scores: Mapping[int, float]
    measured: Mapping[int, float]
    moved: Mapping[int, float]
    losses: Mapping[str, float | None]
    right: Mapping[int, float] = field(default_factory=dict)

    @property
    def capability(self) -> float | None:
        """Share of right answers; None if it was not measured."""
        return fmean(self.right.values()) if self.right else None


def crossed_mean(values: Crossed, *, within: Ends | None = None, sign: float = 1.0) -> Estimate | None:
    """Mean over seeds and questions with a 95% interval that holds for others of both; None without values.

    Questions that a seed lacks are left out.

    Args:
        values: By seed and question.
        within: See `persona_lens.core.statistics.bootstrap_mean`.
        sign: What the values are multiplied by, 1 or -1.
    """
    common = sorted(set.intersection(*(set(each) for each in values.values()))) if values else []
    if not common:
        return None
    table = np.array([[sign * each[question] for question in common] for each in values.values()])
    low, high = crossed_interval(table, within=within)
    return Estimate(float(table.mean()), low, high, table.size)


def beside(these: Crossed, those: Crossed) -> Crossed:
    """Differences seed by seed and question by question, of those that both have."""
    return {seed: minus(own, those[seed]) for seed, own in these.items() if seed in those}


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Every figure of a study.

    Returns:
        ``base``, then under ``treatments`` for each: ``score``, ``seeds`` (mean score of each), ``change`` against the
        base model, ``against_plain`` and ``against_random`` (difference of the changes' sizes; None for these
        themselves), ``held_back`` (share of plain training's change), ``measured``, ``losses`` (mean, smallest and
        largest over seeds), ``capability`` and its ``capability_change`` against the base model, ``shift``; and
        ``shift_correlation`` over all that was trained.
    """
    (base,) = (each for each in outcomes if each.treatment == BASE)
    by_name: dict[str, dict[int, Outcome]] = {}
    for each in outcomes:
        if each.treatment != BASE and each.seed is not None:
            by_name.setdefault(each.treatment, {})[each.seed] = each
    changes = {name: beside(_of(runs, "scores"), dict.fromkeys(runs, base.scores)) for name, runs in by_name.items()}
    whole = crossed_mean(changes[PLAIN], within=CHANGES) if PLAIN in changes else None
    sign = -1.0 if whole is not None and whole.mean < 0 else 1.0
    points: list[dict[str, Any]] = [
        {
            "treatment": each.treatment,
            "seed": each.seed,
            "shift": fmean(each.moved.values()),
            "change": fmean(each.scores.values()) - fmean(base.scores.values()),
        }
        for runs in by_name.values()
        for each in runs.values()
        if each.losses and each.scores
    ]
    return {
        BASE: {
            "score": fmean(base.scores.values()) if base.scores else None,
            "measured": fmean(base.measured.values()) if base.measured else None,
            "capability": base.capability,
        },
        "treatments": {name: _treatment(name, runs, base, changes, whole, sign) for name, runs in by_name.items()},
        "direction": sign,
        "shift_correlation": correlated([each["shift"] for each in points], [each["change"] for each in points]),
        "points": points,
    }


def _treatment(
    name: str,
    runs: Mapping[int, Outcome],
    base: Outcome,
    changes: Mapping[str, Crossed],
    whole: Estimate | None,
    sign: float,
) -> dict[str, Any]:
    """One treatment's figures; ``whole`` is plain training's change, ``sign`` its direction."""
    change = crossed_mean(changes[name], within=CHANGES)
    against = {
        f"against_{other}": json_of(crossed_mean(beside(changes[name], changes[other]), within=CHANGES, sign=sign))
        if other in changes and name != other
        else None
        for other in (PLAIN, RANDOM)
    }
    held = 1 - change.mean / whole.mean if name != PLAIN and change and whole and whole.mean else None
    return {
        "score": json_of(crossed_mean(_of(runs, "scores"), within=SCORES)),
        "seeds": [fmean(each.scores.values()) if each.scores else None for each in runs.values()],
        "change": json_of(change),
        **against,
        "held_back": held,
        "measured": json_of(crossed_mean(_of(runs, "measured"))),
        "losses": {name: _spread([each.losses.get(name) for each in runs.values()]) for name in LOSSES},
        "capability": _spread([each.capability for each in runs.values()]),
        "capability_change": json_of(
            crossed_mean(beside(_of(runs, "right"), dict.fromkeys(runs, base.right)), within=SHARE_CHANGES)
        ),
        "shift": json_of(crossed_mean(_of(runs, "moved"))),
    }


def _of(runs: Mapping[int, Outcome], name: str) -> dict[int, Mapping[int, float]]:
    return {seed: getattr(each, name) for seed, each in runs.items() if getattr(each, name)}


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    return {"mean": fmean(known), "low": min(known), "high": max(known), "n": len(known)} if known else None
