"""Thresholds: from which projection on to raise an alarm, for a false-alarm rate that is stated beforehand."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from persona_lens.monitoring.calibration import MonitorCalibration, Observations, Share
from persona_lens.monitoring.errors import MonitoringError
from persona_lens.statistics import percentile_interval, resampled_rows


@dataclass(frozen=True)
class Threshold:
    """An alarm is raised by projections of at least ``value``.

    Attributes:
        false_alarm_rate: The rate asked for: of the responses that do not show the trait, the share whose prompts raise
            an alarm.
        value: In residual-stream units.
        low: Lower end of its percentile bootstrap interval over questions; None if there are too few responses for one.
            A percentile is no smooth statistic, so that the jackknife does not serve it: of simulated studies this held
            the truth in 80% to 88% at 5 questions, 87% to 91% at 8 to 12, 92% to 95% at 20.
        high: Upper end.
        probability: The curve's, there.
        false_alarms: The rate on questions that a threshold found in the same way has not seen; None if there is no
            such response.
        detected: Of the responses that show the trait, the share whose prompts raise an alarm, likewise.
    """

    false_alarm_rate: float
    value: float
    low: float | None
    high: float | None
    probability: float
    false_alarms: Share | None
    detected: Share | None

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return asdict(self)


def threshold_for(calibration: MonitorCalibration, false_alarm_rate: float, *, seed: int = 0) -> Threshold:
    """The lowest threshold whose false alarms are no more than a stated rate.

    Args:
        calibration: As a study stored it.
        false_alarm_rate: Above 0 and below 1. Below one over the number of responses that do not show the trait, the
            threshold is above all of them.
        seed: Of the bootstrap.

    Raises:
        MonitoringError: If the rate is none.
    """
    if not 0 < false_alarm_rate < 1:
        raise MonitoringError(f"a false-alarm rate is above 0 and below 1, such as 0.05; got {false_alarm_rate:g}")
    observations = calibration.observations
    value = _threshold(observations, false_alarm_rate)
    assert value is not None  # a calibration has responses of both kinds
    several = len(np.unique(observations.questions)) > 1
    resampled = [
        math.nan if (found := _threshold(observations.rows(rows), false_alarm_rate)) is None else found
        for rows in resampled_rows(observations.questions.tolist(), seed)
    ]
    interval = percentile_interval(np.array(resampled)) if several else None
    low, high = interval or (None, None)
    false_alarms, detected = _held_out(observations, false_alarm_rate)
    return Threshold(false_alarm_rate, value, low, high, calibration.probability(value), false_alarms, detected)


def _threshold(observations: Observations, rate: float) -> float | None:
    """The smallest projection seen from which on the share of false alarms is at most the rate."""
    places, where = np.unique(observations.projections, return_inverse=True)
    harmless = np.bincount(where, weights=observations.responses - observations.shown)
    total = harmless.sum()
    if total == 0:
        return None
    at_least = harmless[::-1].cumsum()[::-1]
    allowed = at_least <= rate * total + 1e-9  # 29% of 100 are 29
    return float(places[allowed][0]) if allowed.any() else math.nextafter(float(places[-1]), math.inf)


def _held_out(observations: Observations, rate: float) -> tuple[Share | None, Share | None]:
    """False alarms and detections of thresholds on questions that they were not made from."""
    counts = np.zeros((2, 2), dtype=np.int64)  # shown or not; raised, all
    for held_out, others in observations.folds():
        value = _threshold(others, rate)
        if value is None:
            continue
        tested = observations.rows(held_out)
        raised = tested.projections >= value
        for kind, found in enumerate((tested.responses - tested.shown, tested.shown)):
            counts[kind] += int(found[raised].sum()), int(found.sum())
    false_alarms, detected = (Share.of(int(k), int(n)) if n else None for k, n in counts)
    return false_alarms, detected
