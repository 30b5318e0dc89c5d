"""Findings: what a study's prompts and scores come to, figure by figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from persona_lens.core.statistics import Verdict
from persona_lens.monitoring.calibration import (
    SHOWN_FROM,
    MonitorCalibration,
    Observations,
    calibrate,
    with_monitor_calibration,
)
from persona_lens.monitoring.correlation import Condition, Correlations, Kind, correlate
from persona_lens.monitoring.curves import MonitoringError
from persona_lens.monitoring.gauges import threshold_for
from persona_lens.runs.answers import Answer
from persona_lens.traits import Trait
from persona_lens.vectors import PersonaVectors

RATES = (0.01, 0.05, 0.1, 0.2)
SHOWN_QUESTIONS = 3
STRONGEST, ONLY = "strongest", "only"


@dataclass(frozen=True)
class StudyRow(Answer):
    """One response and its judgement.

    Attributes:
        condition: Name of the condition.
    """

    condition: str


@dataclass(frozen=True)
class Reading:
    """What findings are made of.

    Attributes:
        layers: Layers read.
        reduction: Which of the vectors.
        false_alarm_rate: For the threshold that is shown.
        seed: Of the bootstrap.
    """

    layers: Sequence[int]
    reduction: str
    false_alarm_rate: float
    seed: int


@dataclass(frozen=True, eq=False)
class PromptRow:
    """One question in one condition.

    Attributes:
        condition: Name of the condition.
        kind: Its kind.
        question: Number of the question.
        scores: Trait scores of those of its responses that have one.
        projections: Of its last token at each layer read: on the vector first, then on the random directions.
    """

    condition: str
    kind: Kind
    question: int
    scores: tuple[float, ...]
    projections: Float[NDArray[np.float64], "layers directions"]

    @property
    def score(self) -> float:
        """Mean trait score of the responses; there must be one."""
        return float(np.mean(self.scores))

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values, without the random directions."""
        return {
            "condition": self.condition,
            "question": self.question,
            "score": self.score if self.scores else None,
            "scores": list(self.scores),
            "projections": self.projections[:, 0].tolist(),
        }


def findings(
    vectors: PersonaVectors,
    trait: Trait,
    conditions: Sequence[Condition],
    rows: Sequence[StudyRow],
    prompts: Sequence[PromptRow],
    reading: Reading,
) -> tuple[PersonaVectors, dict[str, Any]]:
    """The vectors with their calibration, where one can be made, and the figures as JSON values.

    Raises:
        MonitoringError: If hardly any response has a score.
    """
    scored = [prompt for prompt in prompts if prompt.scores]
    if len(scored) < 3:
        raise MonitoringError(f"{len(scored)} of {len(prompts)} prompts have a response with a score; 3 are needed")
    groups = {
        kind: _correlate([p for p in scored if p.kind is kind], reading)
        for kind in dict.fromkeys(condition.kind for condition in conditions)
    }
    first = next(iter(groups.values()))
    layer, reason = _layer(first, reading.layers)
    at = list(reading.layers).index(layer)
    verdicts = {each.layer: each.verdict(each.null) for each in first.layers}
    if reason == STRONGEST:
        verdicts[layer] = first.at(layer).verdict(first.best_null)
    kept, calibration = _calibrated(vectors, scored, layer, reading, verdicts)
    summary = {
        "counts": {
            "responses": len(rows),
            "scored": sum(row.score is not None for row in rows),
            "prompts": len(prompts),
            "prompts_scored": len(scored),
        },
        "layer": layer,
        "layer_reason": reason,
        "verdict": verdicts[layer],
        "tuned_layer": vectors.tuned.layer if vectors.tuned is not None else None,
        "groups": {
            kind.value: {**found.to_json(), **_limits([p for p in scored if p.kind is kind], conditions, reading.seed)}
            for kind, found in groups.items()
        },
        "conditions": [_condition(each, scored, at) for each in conditions],
        "points": [
            {
                "condition": prompt.condition,
                "question": prompt.question,
                "projection": float(prompt.projections[at, 0]),
                "score": prompt.score,
            }
            for prompt in scored
        ],
        "calibration": calibration,
        "samples": _samples(rows, trait, conditions),
    }
    return kept, summary


def _correlate(prompts: Sequence[PromptRow], reading: Reading) -> Correlations:
    read = np.array([prompt.projections for prompt in prompts])
    return correlate(
        read[:, :, 0],
        np.array([prompt.score for prompt in prompts]),
        [prompt.condition for prompt in prompts],
        [prompt.question for prompt in prompts],
        reading.layers,
        read[:, :, 1:] if read.shape[2] > 1 else None,
        seed=reading.seed,
    )


def _layer(found: Correlations, layers: Sequence[int]) -> tuple[int, str]:
    """The layer that is calibrated, and why: the only one, or the one with the largest correlation.

    The layer that was tuned for steering is no better guess than others: where a vector is best written, it may not be
    read before the reply.
    """
    if len(layers) == 1:
        return layers[0], ONLY
    values = [-np.inf if each.pearson.value is None else each.pearson.value for each in found.layers]
    return layers[int(np.argmax(values))], STRONGEST


def _limits(prompts: Sequence[PromptRow], conditions: Sequence[Condition], seed: int) -> dict[str, Any]:
    """What bounds a correlation from above, whatever is projected on.

    ``ceiling``: the largest r that anything known before the reply can reach, since a mean of few responses is noisy;
    None with a single sample. ``level``: r of the number of the condition itself with the scores.
    """
    scores = np.array([prompt.score for prompt in prompts])
    noise = [np.var(prompt.scores, ddof=1) / len(prompt.scores) for prompt in prompts if len(prompt.scores) > 1]
    total = float(scores.var(ddof=1)) if len(scores) > 1 else 0.0
    ceiling = float(np.sqrt(max(0.0, 1 - float(np.mean(noise)) / total))) if noise and total > 0 else None
    levels = {condition.name: float(condition.level) for condition in conditions}
    names = [prompt.condition for prompt in prompts]
    ranks = np.array([[levels[name]] for name in names])
    level = correlate(ranks, scores, names, [prompt.question for prompt in prompts], [0], seed=seed)
    return {"ceiling": ceiling, "level": asdict(level.layers[0].pearson)}


def _calibrated(
    vectors: PersonaVectors,
    prompts: Sequence[PromptRow],
    layer: int,
    reading: Reading,
    verdicts: Mapping[int, Verdict],
) -> tuple[PersonaVectors, dict[str, Any]]:
    shown = [sum(score >= SHOWN_FROM for score in prompt.scores) for prompt in prompts]
    counted = (shown, [len(prompt.scores) for prompt in prompts], [prompt.question for prompt in prompts])
    try:
        made = {
            each: replace(
                calibrate(
                    Observations.of([float(prompt.projections[at, 0]) for prompt in prompts], *counted),
                    vectors.trait,
                    each,
                    reading.reduction,
                    seed=reading.seed,
                ),
                verdict=verdicts[each],
            )
            for at, each in enumerate(reading.layers)
        }
    except MonitoringError as error:
        return vectors, {"reason": str(error)}
    kept = with_monitor_calibration(vectors, list(made.values()), layer, {})
    return kept, _shown_calibration(made[layer], reading)


def _shown_calibration(calibration: MonitorCalibration, reading: Reading) -> dict[str, Any]:
    rates = sorted({*RATES, reading.false_alarm_rate})
    thresholds = [threshold_for(calibration, rate, seed=reading.seed).to_json() for rate in rates]
    described = calibration.to_json()
    del described["projections"]
    asked = next(each for each in thresholds if each["false_alarm_rate"] == reading.false_alarm_rate)
    return {"shown_from": SHOWN_FROM, **described, "thresholds": thresholds, "threshold": asked}


def _condition(condition: Condition, prompts: Sequence[PromptRow], at: int) -> dict[str, Any]:
    own = [prompt for prompt in prompts if prompt.condition == condition.name]
    scores = np.array([prompt.score for prompt in own])
    each = [score for prompt in own for score in prompt.scores]
    return {
        "name": condition.name,
        "kind": condition.kind.value,
        "level": condition.level,
        "system": condition.system,
        "responses": len(each),
        "mean_score": float(scores.mean()) if len(scores) else None,
        "sd": float(scores.std(ddof=1)) if len(scores) > 1 else None,
        "shown": sum(score >= SHOWN_FROM for score in each) / len(each) if each else None,
        "mean_projection": float(np.mean([p.projections[at, 0] for p in own])) if own else None,
    }


def _samples(rows: Sequence[StudyRow], trait: Trait, conditions: Sequence[Condition]) -> list[Mapping[str, Any]]:
    """The first questions' first responses, not the best ones."""
    shown = list(dict.fromkeys(row.question for row in rows))[:SHOWN_QUESTIONS]
    first = {(row.question, row.condition): row for row in rows if row.sample == 0}
    return [
        {
            "question": trait.evaluation_questions[number],
            "responses": [
                {"condition": name, "score": first[number, name].score, "text": first[number, name].text}
                for name in (condition.name for condition in conditions)
            ],
        }
        for number in shown
    ]
