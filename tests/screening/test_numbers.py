"""Intervals, thresholds, AUC and forecasts, against what is known of them."""

from __future__ import annotations

import numpy as np
import pytest

from persona_lens.core.statistics import bootstrap_mean
from persona_lens.screening import (
    Band,
    Decision,
    RowThreshold,
    ScreeningError,
    decide,
    fit_forecast,
    separation_of,
    threshold_of,
    with_forecasts,
)
from persona_lens.screening.rows import DECISIONS
from persona_lens.screening.survey import clean_label, largest, mean_of
from persona_lens.vectors import VectorsError
from tests.screening.made import vectors


def test_means_are_those_of_the_bootstrap_over_the_rows_that_have_a_value() -> None:
    values = np.random.default_rng(0).normal(2, 3, 1500)
    values[::3] = np.nan
    known = values[np.isfinite(values)]
    few = mean_of(values[:900])
    assert few == bootstrap_mean(known[:600].tolist())
    many, expected = mean_of(values), bootstrap_mean(known.tolist())
    assert many is not None
    assert many.n == expected.n == 1000
    assert many.mean == pytest.approx(expected.mean)
    assert (many.low, many.high) == pytest.approx((expected.low, expected.high), abs=0.03)


def test_a_quantity_that_no_row_has_has_no_mean() -> None:
    assert mean_of(np.full(2, np.nan)) is None
    one = mean_of(np.array([1.0, np.nan]))
    assert one is not None
    assert (one.mean, one.low, one.high, one.n) == (1, 1, 1, 1)


def test_the_largest_come_first_and_of_equal_ones_the_earlier() -> None:
    assert largest(np.array([1.0, 3.0, np.nan, 3.0, 2.0]), 3).tolist() == [1, 3, 4]


def decided(threshold: RowThreshold, *scores: float) -> list[Decision]:
    return [DECISIONS[place] for place in decide([threshold], np.array(scores)[:, None])]


def test_the_threshold_holds_its_rate_on_the_reference() -> None:
    reference = np.random.default_rng(0).normal(size=1000)
    for rate in (0.01, 0.05, 0.2):
        found = threshold_of("kind@1", reference, rate, Band.NONE)
        assert found.low == found.value == found.high
        assert (reference > found.value).mean() == pytest.approx(rate, abs=1e-9)
        assert (reference > np.nextafter(found.value, -np.inf)).mean() > rate


def test_the_band_is_the_interval_of_the_percentile() -> None:
    random = np.random.default_rng(1)
    truth = 1.6449  # the 95th percentile of a normal distribution
    found = [threshold_of("kind@1", random.normal(size=300), 0.05) for _ in range(400)]
    covered = np.mean([each.low <= truth <= each.high for each in found])
    assert 0.9 < covered < 0.99
    each = found[0]
    assert each.low < each.value < each.high
    beyond = float(np.nextafter(each.high, np.inf))
    kept, flagged, undecided = DECISIONS
    assert decided(each, each.low, each.value, each.high, beyond) == [kept, undecided, undecided, flagged]
    assert decided(each, float("nan")) == [undecided]


def test_a_few_reference_rows_can_still_flag() -> None:
    found = threshold_of("kind@1", np.arange(10.0), 0.05)
    assert found.high == 9
    assert decided(found, 9.5) == [Decision.FLAGGED]


def test_a_row_is_flagged_if_any_trait_flags_it_and_kept_if_all_keep_it() -> None:
    both = [threshold_of("kind@1", np.arange(10.0), 0.05, Band.NONE), threshold_of("odd@1", np.arange(10.0), 0.3)]
    found = decide(both, np.array([[20.0, np.nan], [0.0, 6.0], [0.0, 0.0]]))
    assert [DECISIONS[place] for place in found] == [Decision.FLAGGED, Decision.UNDECIDED, Decision.KEPT]


def test_undecided_up_to_a_rate() -> None:
    found = threshold_of("kind@1", np.arange(100.0), 0.05, 0.1)
    assert (found.low, found.value, found.high) == (89, 94, 94)


@pytest.mark.parametrize(("rate", "undecided"), [(0, Band.NONE), (1.5, Band.NONE), (0.1, 0.05), (0.1, 1.0)])
def test_rates_that_are_none(rate: float, undecided: Band | float) -> None:
    with pytest.raises(ScreeningError, match="rate"):
        threshold_of("kind@1", np.arange(10.0), rate, undecided)


def test_a_reference_without_values() -> None:
    with pytest.raises(ScreeningError, match="no row of the reference set has a value"):
        threshold_of("kind@1", np.full(3, np.nan), 0.05)


def test_auc_has_an_interval_that_covers_it() -> None:
    random = np.random.default_rng(0)
    found = [separation_of(random.normal(1, 1, 60), random.normal(0, 1, 60)) for _ in range(12)]
    truth = 0.7602  # Phi(1 / sqrt 2)
    assert sum(each is not None and each.low <= truth <= each.high for each in found) >= 10
    apart = separation_of(np.array([2.0, 3.0, np.nan]), np.array([0.0, 1.0]))
    assert apart is not None
    assert (apart.auc, apart.high, apart.labelled, apart.clean) == (1, 1, 2, 2)
    assert apart.low == pytest.approx(0.05**0.5)  # two rows of a kind may well have missed a half of it
    assert (apart.roc[0], apart.roc[-1]) == ((0, 0), (1, 1))
    assert (0.0, 1.0) in apart.roc
    assert separation_of(np.array([np.nan]), np.array([0.0])) is None


def test_the_clean_label_is_found_or_asked_for() -> None:
    assert clean_label(["strong", "normal"], None) == "normal"
    assert clean_label(["1", "0"], None) == "0"
    assert clean_label(["a", "b"], "b") == "b"
    for labels, chosen in ((["a", "b"], None), (["a", "normal"], "c")):
        with pytest.raises(ScreeningError, match="which label do clean rows have"):
            clean_label(labels, chosen)
    with pytest.raises(ScreeningError, match="all rows have the label 'normal'"):
        clean_label(["normal"], None)


def test_a_forecast_is_a_line_with_a_prediction_interval_that_travels_with_the_vectors() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        x = random.uniform(-1, 3, 12)
        forecast = fit_forecast("kind", 1, x.tolist(), (5 + 10 * x + random.normal(0, 2, 12)).tolist(), source="a test")
        new = 1.5
        predicted = forecast.predict(new)
        covered += predicted.low <= 5 + 10 * new + random.normal(0, 2) <= predicted.high
    assert 180 <= covered <= 199
    assert not predicted.outside
    assert forecast.predict(9).outside
    made = with_forecasts(vectors("kind"), [forecast])
    assert made.forecasts == (forecast,)
    assert vectors("kind").forecasts == ()
    with pytest.raises(ScreeningError, match="the forecast is of 'kind', but the vectors are of 'odd'"):
        with_forecasts(vectors("odd"), [forecast])
    with pytest.raises(ScreeningError, match="at least 3 datasets"):
        fit_forecast("kind", 1, [1, 2], [1, 2])
    with pytest.raises(VectorsError, match="damaged"):
        assert vectors("kind", shift_forecasts=[{"quantity": "raw"}]).forecasts
