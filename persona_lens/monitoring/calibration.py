"""Calibration: how likely a reply shows the trait, given where the last token of its prompt stands.

A reply shows the trait if its score is at least `SHOWN_FROM`. Everything that is said of a curve's quality is
cross-validated: a prompt's probability comes from curves that were fitted without any prompt of the same question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from persona_lens.core.statistics import Verdict, bootstrap_mean
from persona_lens.core.text import in_short
from persona_lens.monitoring.curves import (
    Counts,
    Curve,
    MonitoringError,
    Values,
    curve_from_json,
    fit_isotonic_curve,
    fit_logistic_curve,
    share_shown,
)
from persona_lens.vectors import PersonaVectors

SHOWN_FROM = 50.0
FOLDS = 5
BINS = 6
FITS: dict[str, Callable[[Values, Counts, Counts], Curve]] = {
    "logistic": fit_logistic_curve,
    "isotonic": fit_isotonic_curve,
}


@dataclass(frozen=True, eq=False)
class Observations:
    """What prompts were followed by.

    Attributes:
        projections: Of each prompt's last token, residual-stream units.
        shown: How many of its responses show the trait.
        responses: How many of its responses have a score, at least 1.
        questions: Number of its question; prompts that share one are not independent.
    """

    projections: Values
    shown: Counts
    responses: Counts
    questions: Counts

    @staticmethod
    def of(
        projections: Sequence[float], shown: Sequence[int], responses: Sequence[int], questions: Sequence[int]
    ) -> Observations:
        """From plain numbers.

        Raises:
            MonitoringError: If there are none, or they do not go together.
        """
        lengths = {len(projections), len(shown), len(responses), len(questions)}
        if len(lengths) > 1 or not projections or min(responses) < 1:
            raise MonitoringError("a calibration needs for each prompt a projection, a question and a scored response")
        if not np.isfinite(np.asarray(projections, float)).all():
            raise MonitoringError("a calibration needs finite projections")
        if any(not 0 <= k <= n for k, n in zip(shown, responses, strict=True)):
            raise MonitoringError("of a prompt's responses, between none and all show the trait")
        return Observations(
            np.asarray(projections, np.float64), *(np.asarray(v, np.int64) for v in (shown, responses, questions))
        )

    def rows(self, rows: NDArray[Any]) -> Observations:
        """Some of them, by number or mask."""
        return Observations(self.projections[rows], self.shown[rows], self.responses[rows], self.questions[rows])

    def folds(self) -> Iterator[tuple[NDArray[np.bool_], Observations]]:
        """Each part that is held out, as a mask, and the others; a question is never on both sides."""
        questions, place = np.unique(self.questions, return_inverse=True)
        for fold in range(min(FOLDS, len(questions))):
            held_out = place % min(FOLDS, len(questions)) == fold
            yield held_out, self.rows(~held_out)


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
        gain: How much smaller the former is, with its 95% interval over questions, as an `Estimate`'s values.
        reliability: Cross-validated, from the smallest probability to the largest.
        verdict: Of the study that it was made in, see `LayerCorrelation.verdict`; None if there was none.
    """

    trait: str
    layer: int
    reduction: str
    curve: Curve
    observations: Observations
    log_loss: Mapping[str, float]
    brier: float
    base_brier: float
    gain: Mapping[str, Any]
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
        worse = "predicts replies no better than the base rate" if self.gain["low"] <= 0 else None
        both = " and ".join(each for each in (said, worse) if each)
        return f"the projection on {self.trait} at layer {self.layer} {both}" if both else None

    def probability(self, projection: float) -> float:
        """That a reply to a prompt with this projection shows the trait."""
        return float(self.curve.probability(np.array([projection]))[0])

    def to_json(self) -> dict[str, Any]:
        """Everything but the observations' counts, which all layers share (see `with_monitor_calibration`)."""
        return {
            "curve": self.curve.to_json(),
            "projections": self.observations.projections.tolist(),
            "log_loss": dict(self.log_loss),
            "brier": self.brier,
            "base_brier": self.base_brier,
            "gain": dict(self.gain),
            "reliability": [asdict(each) for each in self.reliability],
            "verdict": self.verdict,
        }


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
    held_out = {kind: np.empty(len(observations.projections)) for kind in (*FITS, "base")}
    for mask, others in observations.folds():
        for kind, fit in FITS.items():
            curve = fit(others.projections, others.shown, others.responses)
            held_out[kind][mask] = curve.probability(observations.projections[mask])
        held_out["base"][mask] = share_shown(others.shown, others.responses)
    log_loss = {kind: _log_loss(observations, found) for kind, found in held_out.items()}
    taken = min(FITS, key=lambda kind: log_loss[kind])
    curve = FITS[taken](observations.projections, observations.shown, observations.responses)
    brier, base = (_brier(observations, held_out[kind]) for kind in (taken, "base"))
    return MonitorCalibration(
        trait,
        layer,
        reduction,
        curve,
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


def _gain(observations: Observations, gained: Values, seed: int) -> dict[str, Any]:
    means = [
        float(gained[rows].sum() / observations.responses[rows].sum())
        for question in np.unique(observations.questions)
        for rows in [observations.questions == question]
    ]
    return bootstrap_mean(means, seed).to_json()


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


def is_calibrated(vectors: PersonaVectors) -> bool:
    """Whether a calibration is stored with the vectors."""
    return vectors.monitor is not None


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
        entry = stored.layers[chosen]
        observations = Observations.of(entry["projections"], stored.shown, stored.responses, stored.questions)
        bins = [Bin(each["predicted"], Share(**each["observed"])) for each in entry["reliability"]]
        return MonitorCalibration(
            vectors.trait,
            chosen,
            stored.reduction,
            curve_from_json(entry["curve"]),
            observations,
            entry["log_loss"],
            entry["brier"],
            entry["base_brier"],
            entry["gain"],
            tuple(bins),
            entry.get("verdict"),
        )
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise MonitoringError(
            f"the calibration stored with {vectors.trait!r} is damaged: {in_short(repr(error), 200)}"
        ) from error
