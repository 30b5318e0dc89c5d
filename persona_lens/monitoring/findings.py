"""Findings: what a study's prompts and scores come to, figure by figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from persona_lens.core.statistics import Verdict
from persona_lens.extraction.experiment import Answer
from persona_lens.monitoring.calibration import SHOWN_FROM, calibrate, threshold_for, with_monitor_calibration
from persona_lens.monitoring.conditions import Condition, Kind, StudySettings
from persona_lens.monitoring.correlation import LEAST, Correlations, correlate
from persona_lens.monitoring.curves import Observations, Values
from persona_lens.monitoring.gauges import MonitoringError
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


@dataclass(frozen=True, eq=False)
class PromptRow:
    """One question in one condition.

    Attributes:
        condition: Name of the condition.
        kind: Its kind.
        question: Number of the question.
        scores: Trait scores of those of its responses that have one.
        projections: Of its last token: on the vector first, then on the random directions, at each layer read.
    """

    condition: str
    kind: Kind
    question: int
    scores: tuple[float, ...]
    projections: Float[Values, "directions layers"]

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
            "projections": self.projections[0].tolist(),
        }

    def to_point(self, at: int) -> dict[str, Any]:
        """What a figure shows of the row, as JSON values; ``at`` is the place of the layer."""
        projection = float(self.projections[0, at])
        return {"condition": self.condition, "question": self.question, "projection": projection, "score": self.score}


def findings(
    vectors: PersonaVectors,
    trait: Trait,
    conditions: Sequence[Condition],
    rows: Sequence[StudyRow],
    prompts: Sequence[PromptRow],
    settings: StudySettings,
    made: Mapping[str, Any],
) -> tuple[PersonaVectors, dict[str, Any]]:
    """The vectors with their calibration, where one can be made, and the figures as JSON values.

    Args:
        vectors: What was projected on.
        trait: Their trait.
        conditions: What the questions were asked in.
        rows: Every response.
        prompts: Every prompt.
        settings: The study's.
        made: How responses were made and judged, to be stored with the calibration.

    Raises:
        MonitoringError: If hardly any response has a score.
    """
    scored = [prompt for prompt in prompts if prompt.scores]
    if len(scored) < LEAST:
        raise MonitoringError(
            f"{len(scored)} of {len(prompts)} prompts have a response with a score; {LEAST} are needed"
        )
    layers = settings.layers_of(vectors)
    by_kind = {
        kind: [prompt for prompt in scored if prompt.kind is kind]
        for kind in dict.fromkeys(condition.kind for condition in conditions)
    }
    groups = {kind: _correlate(own, layers, settings.seed) for kind, own in by_kind.items()}
    first = next(iter(groups.values()))
    # The layer that was tuned for steering is no better guess than others: where a vector is best written, it may not
    # be read before the reply.
    at = int(np.argmax([-np.inf if each.pearson.value is None else each.pearson.value for each in first.layers]))
    verdicts = [each.verdict(each.null) for each in first.layers]
    if len(layers) > 1:
        verdicts[at] = first.layers[at].verdict(first.best_null)
    kept, calibration = _calibrated(vectors, scored, at, verdicts, settings, made)
    return kept, {
        "counts": {
            "responses": len(rows),
            "scored": sum(row.score is not None for row in rows),
            "prompts": len(prompts),
            "prompts_scored": len(scored),
        },
        "layer": layers[at],
        "layer_reason": STRONGEST if len(layers) > 1 else ONLY,
        "verdict": verdicts[at],
        "tuned_layer": vectors.tuned.layer if vectors.tuned is not None else None,
        "groups": {
            kind.value: {**found.to_json(), **_limits(by_kind[kind], conditions, settings.seed)}
            for kind, found in groups.items()
        },
        "conditions": [_condition(each, scored, at) for each in conditions],
        "points": [prompt.to_point(at) for prompt in scored],
        "calibration": calibration,
        "samples": _samples(rows, trait, conditions),
    }


def _correlate(prompts: Sequence[PromptRow], layers: Sequence[int], seed: int) -> Correlations:
    read = np.array([prompt.projections for prompt in prompts])
    return correlate(
        read[:, 0],
        np.array([prompt.score for prompt in prompts]),
        [prompt.condition for prompt in prompts],
        [prompt.question for prompt in prompts],
        layers,
        read[:, 1:] if read.shape[1] > 1 else None,
        seed=seed,
    )


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
    by_level = [replace(prompt, projections=np.array([[levels[prompt.condition]]])) for prompt in prompts]
    return {"ceiling": ceiling, "level": asdict(_correlate(by_level, [0], seed).layers[0].pearson)}


def _calibrated(
    vectors: PersonaVectors,
    prompts: Sequence[PromptRow],
    chosen: int,
    verdicts: Sequence[Verdict],
    settings: StudySettings,
    made: Mapping[str, Any],
) -> tuple[PersonaVectors, dict[str, Any]]:
    """The vectors with a calibration of each layer, and what is shown of the chosen one, or why there is none."""
    shown = [sum(score >= SHOWN_FROM for score in prompt.scores) for prompt in prompts]
    counted = (shown, [len(prompt.scores) for prompt in prompts], [prompt.question for prompt in prompts])
    made_at = []
    try:
        for at, layer in enumerate(settings.layers_of(vectors)):
            observations = Observations.of([float(prompt.projections[0, at]) for prompt in prompts], *counted)
            found = calibrate(observations, vectors.trait, layer, settings.reduction, seed=settings.seed)
            made_at.append(replace(found, verdict=verdicts[at]))
    except MonitoringError as error:
        return vectors, {"reason": str(error)}
    best = made_at[chosen]
    rates = sorted({*RATES, settings.false_alarm_rate})
    thresholds = {rate: threshold_for(best, rate, seed=settings.seed).to_json() for rate in rates}
    described = best.to_json()
    del described["projections"]
    figures = {
        "shown_from": SHOWN_FROM,
        **described,
        "thresholds": list(thresholds.values()),
        "threshold": thresholds[settings.false_alarm_rate],
    }
    return with_monitor_calibration(vectors, made_at, best.layer, made), figures


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
        "mean_projection": float(np.mean([p.projections[0, at] for p in own])) if own else None,
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
