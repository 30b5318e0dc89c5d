"""Calibration: how likely a reply shows the trait, given where the last token of its prompt stands.

A reply shows the trait if its score is at least `SHOWN_FROM`. Everything that is said of a curve's quality is
cross-validated: a prompt's probability comes from curves that were fitted without any prompt of the same question.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pydantic import InstanceOf, TypeAdapter
from scipy.stats import binomtest

from persona_lens.core.documents import Record
from persona_lens.core.statistics import Estimate, Verdict, bootstrap_mean, percentile_interval, resampled_rows
from persona_lens.core.text import in_short
from persona_lens.monitoring.gauges import MonitoringError
from persona_lens.monitoring.prediction import KINDS, Curve, Observations, Values
from persona_lens.vectors import PersonaVectors

SHOWN_FROM = 50.0
BINS = 6


@dataclass(frozen=True)
class Share:
    """A share of responses, with Wilson's 95% interval, which takes every response for independent.

    Attributes:
        value: Of 1.
        low: Lower end.
        high: Upper end.
        n: Responses it is a share of.
    """

    value: float
    low: float
    high: float
    n: int

    @staticmethod
    def of(k: int, n: int) -> Share:
        """``k`` of ``n``, which is at least 1."""
        interval = binomtest(k, n).proportion_ci(method="wilson")
        return Share(k / n, float(interval.low), float(interval.high), n)


@dataclass(frozen=True)
class Bin:
    """Prompts of like probability: what was predicted, and what happened."""

    predicted: float
    observed: Share


@dataclass(frozen=True, eq=False)
class MonitorCalibration:
    """From projections at one layer to probabilities.

    Attributes:
        trait: Name of the trait.
        layer: Block index, 0-based.
        reduction: Which of the vectors.
        curve: The curve with the smaller cross-validated log loss, fitted on everything.
        observations: What it was fitted on.
        log_loss: Cross-validated, nats a response, by the kind of curve, and of the base rate (``base``).
        brier: Cross-validated Brier score of the curve taken.
        base_brier: That of the share of all other questions' responses that show the trait.
        gain: How much smaller the former is, over questions.
        reliability: Cross-validated, from the smallest probability to the largest.
        verdict: Of the study that it was made in, see `LayerCorrelation.verdict`; None if there was none.
    """

    trait: str
    layer: int
    reduction: str
    curve: Curve
    observations: InstanceOf[Observations]
    log_loss: Mapping[str, float]
    brier: float
    base_brier: float
    gain: Estimate
    reliability: tuple[Bin, ...]
    verdict: Verdict | None = None

    @property
    def caveat(self) -> str | None:
        """What has to be said beside every probability and alarm; None if nothing has."""
        said = {
            "clear": None,
            "no null": "was compared with no random directions in its study",
            "reversed": "went the wrong way round in its study: prompts further along it had replies with less of it",
            "unclear": "did not clearly do better than random directions in its study",
            None: "was not held against random directions when it was calibrated",
        }[self.verdict]
        worse = "predicts replies no better than the base rate" if self.gain.low <= 0 else None
        both = " and ".join(each for each in (said, worse) if each)
        return f"the projection on {self.trait} at layer {self.layer} {both}" if both else None

    def probability(self, projection: float) -> float:
        """That a reply to a prompt with this projection shows the trait."""
        return float(self.curve.probability(np.array([projection]))[0])

    def to_json(self) -> dict[str, Any]:
        """Everything but what all layers share (see `with_monitor_calibration`)."""
        values = asdict(self)
        observations = values.pop("observations")
        shared = ("trait", "layer", "reduction")
        kept = {name: value for name, value in values.items() if name not in shared}
        return {**kept, "projections": observations["projections"].tolist()}


_STORED = TypeAdapter(MonitorCalibration)


def calibrate(
    observations: Observations, trait: str, layer: int, reduction: str, *, seed: int = 0
) -> MonitorCalibration:
    """Fit both kinds of curve and take the one that predicts held-out questions better.

    Args:
        observations: What prompts were followed by.
        trait: Name of the trait.
        layer: Where the projections are from.
        reduction: Which of the vectors they are on.
        seed: Of the bootstrap.

    Raises:
        MonitoringError: If there is a single question only, or all responses show the trait, or none does.
    """
    if len(np.unique(observations.questions)) < 2:
        raise MonitoringError("a calibration needs at least 2 questions: some are held out to see how well it does")
    shown, responses = int(observations.shown.sum()), int(observations.responses.sum())
    if shown in (0, responses):
        kind = "every response shows" if shown else "no response shows"
        raise MonitoringError(
            f"{kind} {trait!r} (a score of at least {SHOWN_FROM:g}), so there is nothing to calibrate on"
        )
    held_out = {kind: np.empty(len(observations.projections)) for kind in (*KINDS, "base")}
    for mask, others in observations.folds():
        for kind, curve in KINDS.items():
            held_out[kind][mask] = curve.fit(others).probability(observations.projections[mask])
        held_out["base"][mask] = others.share
    log_loss = {kind: _log_loss(observations, found) for kind, found in held_out.items()}
    taken = min(KINDS, key=lambda kind: log_loss[kind])
    brier, base = (_brier(observations, held_out[kind]) for kind in (taken, "base"))
    return MonitorCalibration(
        trait,
        layer,
        reduction,
        KINDS[taken].fit(observations),
        observations,
        log_loss,
        float(brier.sum() / responses),
        float(base.sum() / responses),
        _gain(observations, base - brier, seed),
        tuple(_reliability(observations, held_out[taken])),
    )


def _log_loss(observations: Observations, probability: Values) -> float:
    shown, responses = observations.shown, observations.responses
    losses = -(shown * np.log(probability) + (responses - shown) * np.log1p(-probability))
    return float(losses.sum() / responses.sum())


def _brier(observations: Observations, probability: Values) -> Values:
    """Squared errors, summed over each prompt's responses."""
    shown, responses = observations.shown, observations.responses
    summed: Values = shown * (1 - probability) ** 2 + (responses - shown) * probability**2
    return summed


def _gain(observations: Observations, gained: Values, seed: int) -> Estimate:
    """The mean of what was gained at a response, over questions."""
    place = np.unique(observations.questions, return_inverse=True)[1]
    means = np.bincount(place, weights=gained) / np.bincount(place, weights=observations.responses)
    return bootstrap_mean(means.tolist(), seed)


def _reliability(observations: Observations, probability: Values) -> Iterator[Bin]:
    """Bins of about as many responses each; prompts of the same probability are in the same one."""
    where = np.unique(probability.round(12), return_inverse=True)[1]
    size = np.bincount(where, weights=observations.responses)
    middle = (np.cumsum(size) - size / 2) / size.sum()
    number = np.minimum((middle * BINS).astype(int), BINS - 1)[where]
    for each in np.unique(number):
        rows = number == each
        shown, n = int(observations.shown[rows].sum()), int(observations.responses[rows].sum())
        mean = float(np.average(probability[rows], weights=observations.responses[rows]))
        yield Bin(mean, Share.of(shown, n))


def with_monitor_calibration(
    vectors: PersonaVectors, calibrations: Sequence[MonitorCalibration], layer: int, found: Mapping[str, Any]
) -> PersonaVectors:
    """The same vectors with calibrations of several layers in their provenance.

    Args:
        vectors: The vectors.
        calibrations: Of different layers, on the same responses; at least one.
        layer: The layer that is used where none is named.
        found: What else to store, such as the judge, as JSON values.

    Raises:
        MonitoringError: If they are not of one reduction, or none is of ``layer``.
    """
    first = calibrations[0].observations
    if len({each.reduction for each in calibrations}) > 1 or layer not in {each.layer for each in calibrations}:
        raise MonitoringError(f"calibrations must be of one reduction, and one of them of layer {layer}")
    return vectors.with_monitor(
        {
            **found,
            "reduction": calibrations[0].reduction,
            "layer": layer,
            "shown_from": SHOWN_FROM,
            "shown": first.shown.tolist(),
            "responses": first.responses.tolist(),
            "questions": first.questions.tolist(),
            "layers": {str(each.layer): each.to_json() for each in calibrations},
        }
    )


def monitor_calibration(vectors: PersonaVectors, layer: int | None = None) -> MonitorCalibration:
    """The calibration that is stored with the vectors.

    Args:
        vectors: Such as the ``vectors.safetensors`` of a study's folder.
        layer: Block index; by default the one that the study took.

    Raises:
        MonitoringError: If there is none, or none of this layer, or it is damaged.
    """
    if (stored := vectors.monitor) is None:
        raise MonitoringError(
            f"the vectors of {vectors.trait!r} carry no calibration; make one with `persona-lens monitor study`, and "
            "use the vectors.safetensors in its folder"
        )
    chosen = stored.layer if layer is None else layer
    if chosen not in stored.layers:
        there = ", ".join(map(str, stored.layers))
        raise MonitoringError(f"{vectors.trait!r} is calibrated at layer {there}, not at layer {chosen}")
    try:
        entry = dict(stored.layers[chosen])
        observations = Observations.of(entry["projections"], stored.shown, stored.responses, stored.questions)
        place = {"trait": vectors.trait, "layer": chosen, "reduction": stored.reduction}
        return _STORED.validate_python({**entry, **place, "observations": observations})
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise MonitoringError(
            f"the calibration stored with {vectors.trait!r} is damaged: {in_short(repr(error), 200)}"
        ) from error


@dataclass(frozen=True)
class Threshold(Record):
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
    several = len(np.unique(observations.questions)) > 1
    resamples = resampled_rows(observations.questions.tolist(), seed) if several else ()
    resampled = np.array([_threshold(observations.rows(rows), false_alarm_rate) for rows in resamples])
    low, high = (percentile_interval(resampled) if several else None) or (None, None)
    false_alarms, detected = _held_out(observations, false_alarm_rate)
    return Threshold(false_alarm_rate, value, low, high, calibration.probability(value), false_alarms, detected)


def _threshold(observations: Observations, rate: float) -> float:
    """The smallest projection seen from which on the share of false alarms is at most the rate.

    NaN where every response shows the trait.
    """
    places, where = np.unique(observations.projections, return_inverse=True)
    harmless = np.bincount(where, weights=observations.responses - observations.shown)
    total = harmless.sum()
    if total == 0:
        return math.nan
    at_least = harmless[::-1].cumsum()[::-1]
    allowed = at_least <= rate * total + 1e-9  # 29% of 100 are 29
    return float(places[allowed][0]) if allowed.any() else math.nextafter(float(places[-1]), math.inf)


def _held_out(observations: Observations, rate: float) -> tuple[Share | None, Share | None]:
    """False alarms and detections of thresholds on questions that they were not made from."""
    counts = np.zeros((2, 2), dtype=np.int64)  # shown or not; raised, all
    for held_out, others in observations.folds():
        value = _threshold(others, rate)
        if math.isnan(value):
            continue
        tested = observations.rows(held_out)
        raised = tested.projections >= value
        for kind, found in enumerate((tested.responses - tested.shown, tested.shown)):
            counts[kind] += int(found[raised].sum()), int(found.sum())
    false_alarms, detected = (Share.of(int(k), int(n)) if n else None for k, n in counts)
    return false_alarms, detected
