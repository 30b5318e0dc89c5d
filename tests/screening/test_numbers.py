"""Intervals, thresholds, AUC and forecasts, against what is known of them."""

from __future__ import annotations

import numpy as np
import pytest

from persona_lens.core.statistics import bootstrap_mean
from persona_lens.screening import (
    Band,
    Decision,
    ScreeningError,
    fit_forecast,
    separation_of,
    threshold_of,
    with_forecasts,
)
from persona_lens.screening.survey import LabelledValues, StreamedMeans, clean_label
from persona_lens.vectors import VectorsError
from tests.screening.made import vectors


def test_streamed_means_are_those_of_the_bootstrap_over_all_rows() -> None:
    values = np.random.default_rng(0).normal(2, 3, (400, 2))
    values[::3, 1] = np.nan
    means = StreamedMeans(2)
    for piece in np.array_split(values, 7):
        means.add(piece)
    for column, found in enumerate(means.estimates()):
        known = values[np.isfinite(values[:, column]), column]
        expected = bootstrap_mean(known.tolist())
        assert found is not None
        assert found.n == len(known)
        assert found.mean == pytest.approx(expected.mean)
        assert found.low == pytest.approx(expected.low, abs=0.05)
        assert found.high == pytest.approx(expected.high, abs=0.05)


def test_a_quantity_that_no_row_has_has_no_mean() -> None:
    means = StreamedMeans(2)
    means.add(np.array([[1.0, np.nan]]))
    one, none = means.estimates()
    assert none is None
    assert one is not None
    assert (one.mean, one.low, one.high, one.n) == (1, 1, 1, 1)


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
    assert each.decide(each.low) is Decision.KEPT
    assert each.decide(each.value) is each.decide(each.high) is Decision.UNDECIDED
    assert each.decide(np.nextafter(each.high, np.inf)) is Decision.FLAGGED
    assert each.decide(float("nan")) is Decision.UNDECIDED


def test_a_few_reference_rows_can_still_flag() -> None:
    found = threshold_of("kind@1", np.arange(10.0), 0.05)
    assert found.high == 9
    assert found.decide(9.5) is Decision.FLAGGED


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


def test_a_column_of_texts_is_no_column_of_labels() -> None:
    values = LabelledValues(1)
    for number in range(20):
        values.add(f"label {number}", np.array([1.0]))
    with pytest.raises(ScreeningError, match="more than 20 different values"):
        values.add("label 20", np.array([1.0]))


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
