"""Measures of agreement: against scipy, by hand, and what they say where there is nothing to measure."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from persona_lens.core.statistics import auc, percentile_interval, resampled_rows
from persona_lens.judging.agreement import (
    MEASURES,
    Agreement,
    AgreementError,
    Cuts,
    Measure,
    Scored,
    compare,
    response_id,
)


def scored(
    scores: Sequence[float | None], *, questions: int | None = None, reason: str | None = None, shift: int = 0
) -> list[Scored]:
    """Responses number 0, 1, … with these scores; every ``questions``-th answers the same question."""
    found = []
    for i, score in enumerate(scores):
        number = i + shift
        question, response = f"question {number % questions if questions else number}", f"response {number}"
        found.append(
            Scored(response_id(question, response), question, response, None if score is None else float(score), reason)
        )
    return found


def noisy(n: int = 40, seed: int = 0) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 100, n).round()
    return x.tolist(), np.clip(x + rng.normal(0, 35, n), 0, 100).round().tolist()


def measures(agreement: Agreement) -> dict[str, Measure]:
    return {name: getattr(agreement, name) for name in MEASURES}


def ends(measure: Measure) -> tuple[float, float]:
    assert measure.low is not None, measure.reason
    assert measure.high is not None
    return measure.low, measure.high


# Values


def test_correlations_are_those_of_scipy() -> None:
    x, y = noisy()
    found = compare(scored(x), scored(y))
    assert found.pearson.value == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert found.spearman.value == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert found.pearson.n == found.counts.scored == 40


def test_bland_and_altman_by_hand() -> None:
    # Differences 2, 4, 4, 4, 6: mean 4, standard deviation sqrt(8 / 4).
    found = compare(scored([10, 20, 30, 40, 50]), scored([12, 24, 34, 44, 56]))
    assert found.mean_difference.value == pytest.approx(4.0)
    assert found.lower_limit.value == pytest.approx(4 - 1.96 * math.sqrt(2))
    assert found.upper_limit.value == pytest.approx(4 + 1.96 * math.sqrt(2))


def test_pairwise_agreement_by_hand() -> None:
    # The first judge scores two responses high (80, 95) and two low (20, 5). The second puts 70 over 60 and 30, and 30
    # over none of the two but level with one: 2 + 0.5 of 4 pairs.
    first, second = [80, 95, 20, 5, 50], [70, 30, 60, 30, 99]
    found = compare(scored(first), scored(second))
    assert found.pairwise_first.value == pytest.approx(2.5 / 4)
    assert found.pairwise_first.n == 4
    # The second judge scores one high, and none low.
    assert found.pairwise_second == Measure(
        None, None, None, 0, "second scores no response 80 or more, or none 20 or less"
    )
    exchanged = compare(scored(second), scored(first))
    assert exchanged.pairwise_second.value == found.pairwise_first.value


def test_sides_by_hand() -> None:
    found = compare(scored([50, 49, 90, 10, 60]), scored([50, 50, 20, 0, 100]))
    assert (found.sides.both_above, found.sides.both_below) == (2, 1)
    assert (found.sides.first_above, found.sides.second_above) == (1, 1)
    assert found.same_side.value == pytest.approx(3 / 5)
    stricter = compare(scored([50, 49, 90, 10, 60]), scored([50, 50, 20, 0, 100]), cuts=Cuts(threshold=55.0))
    assert stricter.sides.both_above == 1


def test_everything_is_counted() -> None:
    first = [*scored([10, 20, 30, 40]), *scored([None], shift=4, reason="refusal"), *scored([None], shift=5)]
    second = [
        *scored([60, None, 30, 40], reason="empty response"),
        *scored([None, None, 7, 8], shift=4, reason="REFUSED to answer"),
        *scored([80]),
    ]
    counts = compare(first, second).counts
    assert (counts.matched, counts.only_first, counts.only_second) == (6, 0, 2)
    assert (counts.repeated_first, counts.repeated_second) == (0, 1)
    assert (counts.scored, counts.missing_first, counts.missing_second, counts.missing_both) == (3, 0, 1, 2)
    assert (counts.refused_first, counts.refused_second, counts.refused_both) == (0, 1, 1)


def test_repeated_scores_of_a_response_are_averaged() -> None:
    found = compare(scored([10, 20, 30]), [*scored([10, 20, 30]), *scored([30]), *scored([None])])
    assert [pair.second for pair in found.pairs] == [20, 20, 30]


def test_the_largest_disagreements_come_first() -> None:
    found = compare(scored([0, 10, 50, 90]), scored([5, 90, 50, 60]))
    assert [pair.difference for pair in found.most_disagreed(3)] == [80, -30, 5]
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["most_disagreed"][0]["first"] == 10


# Intervals


def test_intervals_hold_the_value_and_repeat() -> None:
    x, y = noisy(60)
    found = compare(scored(x), scored(y))
    for name, measure in measures(found).items():
        assert ends(measure)[0] < (measure.value or 0) < ends(measure)[1], name
    assert measures(compare(scored(x), scored(y))) == measures(found)
    assert compare(scored(x), scored(y), seed=1).pearson != found.pearson


def test_the_interval_of_a_mean_is_about_that_of_theory() -> None:
    x, y = noisy(400)
    low, high = ends(compare(scored(x), scored(y)).mean_difference)
    assert high - low == pytest.approx(2 * 1.96 * np.std(np.subtract(y, x)) / math.sqrt(400), rel=0.1)


def test_responses_to_one_question_are_drawn_together() -> None:
    """When all responses to a question are alike, ten times as many of them say nothing new."""
    x = [float(i % 8) * 10 for i in range(80)]
    y = [float((i % 8) ** 2) for i in range(80)]
    alone, clustered = compare(scored(x), scored(y)), compare(scored(x, questions=8), scored(y, questions=8))
    assert (alone.questions, clustered.questions) == (80, 8)
    (low, high), (clustered_low, clustered_high) = ends(alone.mean_difference), ends(clustered.mean_difference)
    assert clustered_high - clustered_low > 2 * (high - low)


def test_resamples_hold_whole_clusters() -> None:
    for rows in resampled_rows(["a", "b", "a", "c"], seed=3):
        drawn = rows.tolist()
        assert drawn.count(0) == drawn.count(2)
        assert drawn.count(0) + drawn.count(1) + drawn.count(3) == 3


def test_intervals_of_statistics_that_are_not_always_defined() -> None:
    nan = float("nan")
    assert percentile_interval(np.array([nan] + [1.0] * 9 + [2.0] * 10)) == (1.0, 2.0)
    assert percentile_interval(np.array([nan] * 3 + [1.0] * 17)) is None


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_auc_is_that_of_the_rank_test(positive: list[int], negative: list[int]) -> None:
    a, b = np.array(positive, dtype=float), np.array(negative, dtype=float)
    expected = np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])
    assert auc(a, b) == pytest.approx(float(expected))


# Where there is nothing to measure


def test_nothing_matched() -> None:
    with pytest.raises(AgreementError, match=r"no response of one \(3\) is in other \(2\)"):
        compare(scored([1, 2, 3]), scored([1, 2], shift=10), names=("one", "other"))


def test_nothing_scored_by_both() -> None:
    with pytest.raises(AgreementError, match="2 responses are in both first and second, but none"):
        compare(scored([1, None]), scored([None, 2]))


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_are_not_measured(n: int) -> None:
    found = compare(scored([1, 2, 3][:n]), scored([3, 2, 1]))
    for measure in measures(found).values():
        assert measure.value is None
        assert f"only {n} of the responses {'has' if n == 1 else 'have'} both scores; 3 are needed" == measure.reason


def test_constant_scores_have_no_correlation() -> None:
    found = compare(scored([50, 50, 50, 50]), scored([1, 2, 3, 4]), names=("flat", "steep"))
    assert found.pearson == Measure(None, None, None, 4, "all scores of flat are the same")
    assert found.spearman.value is None
    assert found.mean_difference.value == pytest.approx(-47.5)
    both = compare(scored([50, 50, 50]), scored([50, 50, 50]))
    assert both.pearson.reason == "all scores of first and second are the same"
    assert (both.lower_limit.value, both.upper_limit.value, both.same_side.value) == (0, 0, 1)


def test_one_question_has_no_interval() -> None:
    x, y = noisy(10)
    found = compare(scored(x, questions=1), scored(y, questions=1))
    assert found.pearson.value is not None
    assert (found.pearson.low, found.pearson.reason) == (None, "one question only, so there is no interval")


def test_cuts_must_leave_room() -> None:
    with pytest.raises(AgreementError, match="got high 20 and low 20"):
        Cuts(high=20.0)


values = st.one_of(st.none(), st.sampled_from([0.0, 50.0, 100.0]), st.floats(0, 100))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(values, values), min_size=1, max_size=12), st.integers(1, 4))
def test_no_measure_is_ever_nan(pairs: list[tuple[float | None, float | None]], questions: int) -> None:
    first = scored([x for x, _ in pairs], questions=questions)
    second = scored([y for _, y in pairs], questions=questions)
    if all(x is None or y is None for x, y in pairs):
        with pytest.raises(AgreementError, match="none of them"):
            compare(first, second)
        return
    found = compare(first, second)
    json.dumps(found.to_json(), allow_nan=False)
    for measure in measures(found).values():
        assert (measure.reason is None) == (measure.low is not None)
        if measure.low is not None and measure.high is not None:
            assert measure.low <= measure.high
    counts, sides = found.counts, found.sides
    assert counts.scored == sides.both_above + sides.both_below + sides.first_above + sides.second_above
    assert counts.matched == counts.scored + counts.missing_first + counts.missing_second + counts.missing_both


# Matching


@given(st.lists(st.tuples(st.text(), st.text()), unique=True, max_size=20))
def test_different_texts_have_different_ids(pairs: list[tuple[str, str]]) -> None:
    def same(text: str) -> str:
        return text.replace("\r\n", "\n").replace("\r", "\n").strip()

    ids = {response_id(question, response) for question, response in pairs}
    assert len(ids) == len({(same(question), same(response)) for question, response in pairs})


@given(st.text(st.characters()), st.text())
def test_ids_do_not_depend_on_how_lines_end(question: str, response: str) -> None:
    plain = response.replace("\r", "\n")
    assert response_id(question, plain) == response_id(f" {question}\n", plain.replace("\n", "\r\n") + "\r\n")
    assert response_id(question, response)[0] == "r"


def test_ids_stay_what_they_are() -> None:
    """Ratings of last year still have to match."""
    assert response_id("What now?", "Nothing.\nReally.") == "r84999fc3b429ca47"
    assert response_id("a", "bc") != response_id("ab", "c")


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.integers(0, 30), min_size=3, unique=True),
    st.lists(st.integers(0, 30), min_size=3, unique=True),
)
def test_matching_is_by_id_whatever_the_order(first: list[int], second: list[int]) -> None:
    def of(numbers: list[int]) -> list[Scored]:
        return [scored([float(number)], shift=number)[0] for number in numbers]

    common = set(first) & set(second)
    if not common:
        with pytest.raises(AgreementError):
            compare(of(first), of(second))
        return
    found = compare(of(first), of(second))
    assert {pair.first for pair in found.pairs} == common
    assert all(pair.difference == 0 for pair in found.pairs)
    assert (found.counts.only_first, found.counts.only_second) == (len(first) - len(common), len(second) - len(common))
