"""What a study's treatments did: scores, losses, capability and shift side by side, over seeds and questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persona_lens.finetuning.shift import correlated
from persona_lens.finetuning.treatments import PLAIN, RANDOM
from persona_lens.statistics import CHANGES, SCORES, Ends, Estimate, crossed_interval

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
        measured: Mean ``surprise`` or ``coherence`` of the replies to each question, as the judge gives it.
        moved: Of each question the projection of its last prompt token minus the base model's, at the layer.
        losses: See `persona_lens.finetuning.Finetuned`; empty where nothing was trained.
        capability: Share of right answers; None if it was not measured.
    """

    treatment: str
    seed: int | None
    scores: Mapping[int, float]
    measured: Mapping[int, float]
    moved: Mapping[int, float]
    losses: Mapping[str, float | None]
    capability: float | None = None


def crossed_mean(values: Crossed, seed: int = 0, *, within: Ends | None = None) -> Estimate | None:
    """Mean over seeds and questions with a 95% interval that holds for others of both; None without values.

    Questions that a seed lacks are left out.

    Args:
        values: By seed and question.
        seed: Of the resampling.
        within: See `persona_lens.statistics.bootstrap_mean`.
    """
    common = sorted(set.intersection(*(set(each) for each in values.values()))) if values else []
    if not common:
        return None
    table: NDArray[np.float64] = np.array([[each[question] for question in common] for each in values.values()])
    low, high = crossed_interval(table, seed, within=within)
    return Estimate(float(table.mean()), low, high, table.size)


def minus(these: Crossed, those: Crossed | Mapping[int, float]) -> dict[int, dict[int, float]]:
    """Differences seed by seed and question by question; one row of values goes with every seed."""
    found: dict[int, dict[int, float]] = {}
    for seed, own in these.items():
        other: Any = those[seed] if seed in those and isinstance(those[seed], Mapping) else those
        found[seed] = {q: value - other[q] for q, value in own.items() if isinstance(other.get(q), int | float)}
    return found


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Every figure of a study.

    Returns:
        ``base``, then under ``treatments`` for each: ``score``, ``seeds`` (mean score of each), ``change`` against the
        base model, ``against_plain`` and ``against_random`` (difference of the changes' sizes; None for these
        themselves), ``held_back`` (share of plain training's change), ``measured``, ``losses`` (mean, smallest and
        largest over seeds), ``capability``, ``shift``; and ``shift_correlation`` over all that was trained.
    """
    (base,) = (each for each in outcomes if each.treatment == BASE)
    by_name: dict[str, dict[int, Outcome]] = {}
    for each in outcomes:
        if each.treatment != BASE and each.seed is not None:
            by_name.setdefault(each.treatment, {})[each.seed] = each
    changes = {name: minus(_of(runs, "scores"), base.scores) for name, runs in by_name.items()}
    whole = crossed_mean(changes[PLAIN], within=CHANGES) if PLAIN in changes else None
    sign = -1.0 if whole is not None and whole.mean < 0 else 1.0
    trained = [each for runs in by_name.values() for each in runs.values() if each.losses and each.scores]
    return {
        BASE: {
            "score": fmean(base.scores.values()) if base.scores else None,
            "measured": fmean(base.measured.values()) if base.measured else None,
            "capability": base.capability,
        },
        "treatments": {name: _treatment(name, runs, changes, whole, sign) for name, runs in by_name.items()},
        "direction": sign,
        "shift_correlation": correlated(
            [fmean(each.moved.values()) for each in trained],
            [fmean(each.scores.values()) - fmean(base.scores.values()) for each in trained],
        ),
        "points": [
            {
                "treatment": each.treatment,
                "seed": each.seed,
                "shift": fmean(each.moved.values()),
                "change": fmean(each.scores.values()) - fmean(base.scores.values()),
            }
            for each in trained
        ],
    }


def _treatment(
    name: str,
    runs: Mapping[int, Outcome],
    changes: Mapping[str, Crossed],
    whole: Estimate | None,
    sign: float,
) -> dict[str, Any]:
    """One treatment's figures; ``whole`` is plain training's change, ``sign`` its direction."""
    change = crossed_mean(changes[name], within=CHANGES)
    against = {
        f"against_{other}": _json(crossed_mean(_times(sign, minus(changes[name], changes[other])), within=CHANGES))
        if other in changes and name != other
        else None
        for other in (PLAIN, RANDOM)
    }
    held = 1 - change.mean / whole.mean if name != PLAIN and change and whole and whole.mean else None
    return {
        "score": _json(crossed_mean(_of(runs, "scores"), within=SCORES)),
        "seeds": [fmean(each.scores.values()) if each.scores else None for each in runs.values()],
        "change": _json(change),
        **against,
        "held_back": held,
        "measured": _json(crossed_mean(_of(runs, "measured"))),
        "losses": _spread_losses(list(runs.values())),
        "capability": _spread([each.capability for each in runs.values()]),
        "shift": _json(crossed_mean(_of(runs, "moved"))),
    }


def _of(runs: Mapping[int, Outcome], name: str) -> dict[int, Mapping[int, float]]:
    return {seed: getattr(each, name) for seed, each in runs.items() if getattr(each, name)}


def _times(factor: float, values: Crossed) -> dict[int, dict[int, float]]:
    return {seed: {q: factor * value for q, value in own.items()} for seed, own in values.items()}


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    return {"mean": fmean(known), "low": min(known), "high": max(known), "n": len(known)} if known else None


def _spread_losses(runs: Sequence[Outcome]) -> dict[str, Any]:
    return {name: _spread([each.losses.get(name) for each in runs]) for name in ("last", "learned", "unseen")}


def _json(estimate: Estimate | None) -> dict[str, Any] | None:
    return estimate.to_json() if estimate else None
