"""From projections to probabilities and thresholds, on numbers that can be counted."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from persona_lens.monitoring import MonitoringError, Observations, calibrate, monitor_calibration, threshold_for
from persona_lens.monitoring.calibration import MonitorCalibration, Share, with_monitor_calibration
from persona_lens.monitoring.prediction import Isotonic, Logistic
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors, VectorsError, load_vectors
from tests.planted import PlantedBackend
from tests.tiny import D_MODEL, N_LAYERS


def seen(projections: list[float], shown: list[int], responses: list[int]) -> Observations:
    """Prompts of one question."""
    return Observations.of(projections, shown, responses, [0] * len(projections))


def made(curve: str = "logistic", questions: int = 8, prompts: int = 12, seed: int = 0) -> Observations:
    """Responses whose true probability is a curve of their prompt's projection."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-3, 3, questions * prompts)
    true = 1 / (1 + np.exp(-1.5 * x))
    if curve != "logistic":
        true = np.select([x < -1, x < 1.5], [0.05, 0.5], 0.95)
    shown = rng.binomial(20, true)
    return Observations.of(x.tolist(), shown.tolist(), [20] * len(x), np.repeat(range(questions), prompts).tolist())


def test_isotonic_pools_neighbours_that_fall() -> None:
    # Shares 0, 1/2, 1/4, 1 of 4 each: the middle two are pooled to 3/8. Nothing is nearer to 0 or 1 than 1 of 18.
    curve = Isotonic.fit(seen([0, 1, 2, 3], [0, 2, 1, 4], [4, 4, 4, 4]))
    assert list(curve.projections) == [0, 1, 2, 3]
    assert curve.probabilities == pytest.approx((1 / 18, 3 / 8, 3 / 8, 17 / 18))
    assert curve.probability(np.array([-9, 0.5, 1.5, 9])) == pytest.approx(
        [1 / 18, (1 / 18 + 3 / 8) / 2, 3 / 8, 17 / 18]
    )
    # Prompts in the same place count as one.
    assert Isotonic.fit(seen([1, 0, 1], [2, 0, 0], [2, 4, 2])).probabilities == pytest.approx((1 / 10, 1 / 2))


def test_logistic_finds_the_curve_and_never_falls() -> None:
    many = made(prompts=100)
    curve = Logistic.fit(many)
    assert curve.slope == pytest.approx(1.5, abs=0.1)
    assert curve.intercept == pytest.approx(0, abs=0.1)
    falling = Logistic.fit(replace(many, projections=-many.projections))
    assert falling.slope == 0
    assert falling.probability(np.array([5.0]))[0] == pytest.approx(many.shown.sum() / many.responses.sum(), abs=0.01)
    # All of four: one more of each kind is counted.
    assert Logistic.fit(seen([0, 1], [2, 2], [2, 2])).probability(np.zeros(1)) == pytest.approx(5 / 6)


@pytest.mark.parametrize(("curve", "kind"), [("logistic", Logistic), ("steps", Isotonic)])
def test_the_curve_that_predicts_held_out_questions_better_is_taken(curve: str, kind: type) -> None:
    found = calibrate(made(curve, questions=10, prompts=30), "kind", 3, "response_mean")
    assert isinstance(found.curve, kind)
    assert min(found.log_loss["logistic"], found.log_loss["isotonic"]) < found.log_loss["base"]
    assert found.brier < found.base_brier
    assert found.gain.mean == pytest.approx(found.base_brier - found.brier)
    assert 0 < found.gain.low < found.gain.mean < found.gain.high
    predicted = [each.predicted for each in found.reliability]
    assert predicted == sorted(predicted)
    assert sum(each.observed.n for each in found.reliability) == 10 * 30 * 20
    assert all(abs(each.observed.value - each.predicted) < 0.08 for each in found.reliability)


def test_what_is_learnt_from_a_question_is_not_tested_on_it() -> None:
    """Each question's replies are all alike and unrelated to the others': a curve that saw them would look good."""
    rng = np.random.default_rng(5)
    x = np.repeat(rng.permutation(10), 6).astype(float)
    shown = np.repeat(rng.permutation([0, 1] * 5), 6)
    observations = Observations.of(x.tolist(), shown.tolist(), [1] * 60, np.repeat(range(10), 6).tolist())
    found = calibrate(observations, "kind", 0, "response_mean")
    fitted = Isotonic.fit(observations).probability(observations.projections)
    assert float(np.mean((fitted - shown) ** 2)) < 0.9 * found.brier


def test_there_must_be_both_kinds_of_responses_and_two_questions() -> None:
    with pytest.raises(MonitoringError, match="no response shows 'kind'"):
        calibrate(Observations.of([0, 1], [0, 0], [2, 2], [0, 1]), "kind", 0, "response_mean")
    with pytest.raises(MonitoringError, match="every response shows 'kind'"):
        calibrate(Observations.of([0, 1], [2, 2], [2, 2], [0, 1]), "kind", 0, "response_mean")
    with pytest.raises(MonitoringError, match="at least 2 questions"):
        calibrate(Observations.of([0, 1], [0, 2], [2, 2], [0, 0]), "kind", 0, "response_mean")
    for wrong in (([], [], [], []), ([0.0], [3], [2], [0]), ([math.nan], [1], [2], [0]), ([0.0], [0], [0], [0])):
        with pytest.raises(MonitoringError):
            Observations.of(*wrong)


def ten() -> MonitorCalibration:
    """Projections 0 to 9, two responses each; of the lower ones no response shows the trait, then one, then both."""
    shown = [0, 0, 0, 0, 0, 1, 1, 2, 2, 2]
    return calibrate(Observations.of(list(range(10)), shown, [2] * 10, [0, 1, 2, 3, 4] * 2), "kind", 0, "response_mean")


@pytest.mark.parametrize(
    ("rate", "value"),
    # Of 12 that do not show it, 8 are from 2 on, 6 from 3, 4 from 4, 2 from 5, 1 from 6, none from 7.
    [(0.66, 3), (0.5, 3), (0.2, 5), (0.17, 5), (0.1, 6), (1 / 12, 6), (0.08, 7), (0.001, 7)],
)
def test_the_lowest_threshold_within_the_rate(rate: float, value: float) -> None:
    found = threshold_for(ten(), rate)
    assert found.value == value
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.value <= found.high
    assert found.probability == pytest.approx(ten().probability(value))


def test_false_alarms_are_measured_on_questions_not_seen() -> None:
    noise = made(questions=20, prompts=10, seed=2)
    found = threshold_for(calibrate(noise, "kind", 0, "response_mean"), 0.1)
    assert found.false_alarms is not None
    assert found.detected is not None
    assert found.false_alarms.n == int((noise.responses - noise.shown).sum())
    assert found.detected.n == int(noise.shown.sum())
    assert found.false_alarms.value == pytest.approx(0.1, abs=0.03)
    assert found.detected.value > 0.5
    above = Observations.of([1.0, 2, 3, 4], [1, 0, 0, 0], [2, 2, 2, 2], [0, 1, 0, 1])
    assert threshold_for(calibrate(above, "kind", 0, "response_mean"), 0.01).value == math.nextafter(4.0, math.inf)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, math.nan])
def test_a_rate_is_between_0_and_1(rate: float) -> None:
    with pytest.raises(MonitoringError, match="above 0 and below 1"):
        threshold_for(ten(), rate)


def test_a_share_has_wilsons_interval() -> None:
    found = Share.of(0, 10)
    assert found.value == 0
    assert found.low == pytest.approx(0)
    assert found.high == pytest.approx(1.96**2 / (10 + 1.96**2), abs=1e-3)


def vectors() -> PersonaVectors:
    return PersonaVectors(
        "kind",
        PlantedBackend(load_trait("optimistic")).info,
        {"response_mean": torch.ones(N_LAYERS, D_MODEL)},
        {"a": 1},
    )


def test_it_is_stored_with_the_vectors_and_read_back(tmp_path: Any) -> None:
    plain = vectors()
    with pytest.raises(MonitoringError, match=r"carry no calibration; make one with `persona-lens monitor study`"):
        monitor_calibration(plain)
    first, second = (calibrate(made(seed=seed), "kind", layer, "response_mean") for seed, layer in ((0, 1), (0, 2)))
    kept = with_monitor_calibration(plain, [first, second], 2, {"judge": {"judge": "likelihood"}})
    kept.save(tmp_path / "kept.safetensors")
    loaded = load_vectors(tmp_path / "kept.safetensors")
    assert loaded.provenance["a"] == 1
    assert loaded.provenance["monitor"]["judge"] == {"judge": "likelihood"}
    found = monitor_calibration(loaded)
    assert (found.layer, monitor_calibration(loaded, 1).layer) == (2, 1)
    assert found.curve == second.curve
    assert found.reliability == second.reliability
    assert threshold_for(found, 0.1) == threshold_for(second, 0.1)
    with pytest.raises(MonitoringError, match="calibrated at layer 1, 2, not at layer 0"):
        monitor_calibration(loaded, 0)
    with pytest.raises(MonitoringError, match="one of them of layer 0"):
        with_monitor_calibration(plain, [first], 0, {})


@pytest.mark.parametrize(
    "damage",
    [
        {"layers": {}, "layer": 2},
        {"layers": None},
        {"shown": [1]},
        {"layers": {"2": {"projections": []}}},
        {"layers": {"2": {"curve": {"kind": "cubic"}}}},
    ],
)
def test_a_damaged_calibration_is_an_error_in_words(damage: dict[str, Any]) -> None:
    kept = with_monitor_calibration(vectors(), [calibrate(made(), "kind", 2, "response_mean")], 2, {})
    stored = {**kept.provenance["monitor"], **damage}
    with pytest.raises((MonitoringError, VectorsError), match=r"damaged|not at layer|needs for each prompt"):
        monitor_calibration(kept.with_monitor(stored))
