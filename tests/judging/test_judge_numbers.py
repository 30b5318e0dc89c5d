"""The number in a judge's answer: the paper's formula on log-probabilities made by hand, and any text at all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_lens.judging.protocol import (
    NumberTokens,
    expected_number,
    score_of_samples,
    score_of_text,
    score_of_tokens,
    whole_number,
)


def top(**probabilities: float) -> list[tuple[str, float]]:
    return [(token.strip("_"), math.log(p)) for token, p in probabilities.items()]


def test_the_score_is_the_expectation_over_numbers() -> None:
    found = score_of_tokens(top(_80=0.5, _90=0.3, REFUSAL=0.1, the=0.1))
    assert found.value == pytest.approx((80 * 0.5 + 90 * 0.3) / 0.8)
    assert (found.reason, found.method) == (None, "logprobs")


@pytest.mark.parametrize(("mass", "scored"), [(0.25, True), (0.2499, False), (0.2501, True), (0.0, False), (1.0, True)])
def test_numbers_need_a_quarter_of_the_probability(mass: float, scored: bool) -> None:
    tokens = [(str(k), math.log(mass / 5)) for k in (10, 20, 30, 40, 50)] if mass else []
    rest = [("REFUSAL", math.log(1 - mass))] if mass < 1 else []
    found = score_of_tokens(tokens + rest)
    assert found.value == (pytest.approx(30) if scored else None)
    assert (found.reason is None) is scored
    if not scored:
        assert "refusal" in str(found.reason)


@pytest.mark.parametrize(
    ("token", "number"),
    [
        *[(str(k), k) for k in (0, 7, 57, 100)],
        (" 57", 57),
        ("57\n", 57),
        ("007", 7),
        ("101", None),
        ("-5", None),
        ("+5", None),
        ("5.0", None),
        ("1_0", None),
        ("٣٥", None),
        ("5 7", None),
        ("", None),
        ("fifty", None),
        ("²", None),
    ],
)
def test_which_tokens_are_numbers(token: str, number: int | None) -> None:
    assert whole_number(token) == number


def test_spellings_of_a_number_add_up() -> None:
    found = score_of_tokens([("57", math.log(0.2)), (" 57", math.log(0.2)), ("0", math.log(0.4))])
    assert found.value == pytest.approx(57 * 0.4 / 0.8)


def digits(text: str) -> list[int]:
    return [ord(c) for c in text]


def whole(text: str) -> list[int]:
    return [1000 + int(text)]


def pairs(text: str) -> list[int]:
    """Tokens of up to two digits, as some tokenizers cut numbers from the left."""
    return [int("1" + text[i : i + 2]) for i in range(0, len(text), 2)]


ENCODERS = [digits, whole, pairs]


def logprobs_of(tokens: NumberTokens, numbers: dict[int, float], encode: object) -> list[list[float]]:
    """What a model that says each number with its probability, and then stops, gives to every token of every number."""

    def reaching(beginning: Sequence[int]) -> float:
        return math.fsum(
            p
            for number, p in numbers.items()
            if tuple(encode(str(number)))[: len(beginning)] == tuple(beginning)  # type: ignore[operator]
        )

    rows = []
    for ids in tokens.sequences:
        row = []
        for length in range(1, len(ids) + 1):
            before = reaching(ids[: length - 1]) if length > 1 else 1.0
            row.append(math.log(reaching(ids[:length]) / before) if before and reaching(ids[:length]) else -50.0)
        rows.append(row)
    return rows


@pytest.mark.parametrize("encode", ENCODERS)
@given(
    weights=st.dictionaries(st.integers(0, 100), st.floats(0.01, 1.0), min_size=1, max_size=30),
    refusal=st.floats(0.0, 0.7),
)
def test_numbers_of_several_tokens(encode: object, weights: dict[int, float], refusal: float) -> None:
    total = sum(weights.values())
    numbers = {number: weight / total * (1 - refusal) for number, weight in weights.items()}
    tokens = NumberTokens(encode)  # type: ignore[arg-type]
    found = dict(tokens.distribution(logprobs_of(tokens, numbers, encode)))
    for number in range(101):
        assert found[number] == pytest.approx(numbers.get(number, 0.0), abs=1e-9)
    score = expected_number(found.items())
    mean = sum(number * p for number, p in numbers.items()) / (1 - refusal)
    assert score.value == pytest.approx(mean, abs=1e-6)


def test_digits_by_hand() -> None:
    """5 alone 0.2, 57 with 0.3, 10 with 0.1, 100 with 0.4: first tokens say 5 and 1, which no answer is."""
    tokens = NumberTokens(digits)
    assert len(tokens.sequences) == 1 + 9 + 80 + 1  # 0, 11 to 19, 20 to 99, 100: all others begin one of these
    found = dict(tokens.distribution(logprobs_of(tokens, {5: 0.2, 57: 0.3, 10: 0.1, 100: 0.4}, digits)))
    assert found[1] == pytest.approx(0)
    assert found[100] == pytest.approx(0.4)
    assert expected_number(found.items()).value == pytest.approx(5 * 0.2 + 57 * 0.3 + 10 * 0.1 + 100 * 0.4)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("85", 85),
        (" 85.\n", 85),
        ("Score: 85", 85),
        ("**85**", 85),
        ("85/100", 85),
        ("85 out of 100", 85),
        ("I would say 72.5", 72.5),
        ("0", 0),
        ("100", 100),
        ("85, and again 85", 85),
    ],
)
def test_a_number_in_a_text(text: str, value: float) -> None:
    assert score_of_text(text).value == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("REFUSAL", "refusal"),
        ("", "no number"),
        ("no idea", "no number"),
        ("between 20 and 40", "several numbers"),
        ("-5", "no number"),
        ("5%", "no number"),
        ("101", "beyond 100"),
        ("1000", "no number"),
        ("1,000", "no number"),
        ("10e5", "no number"),
        ("٣٥", "no number"),
        ("x85", "no number"),
    ],
)
def test_a_text_without_one_number_has_a_reason(text: str, reason: str) -> None:
    found = score_of_text(text)
    assert found.value is None
    assert reason in str(found.reason)


@given(st.text())
def test_any_text_gives_a_score_or_a_reason(text: str) -> None:
    found = score_of_text(text)
    assert (found.value is None) == (found.reason is not None)
    assert found.value is None or 0 <= found.value <= 100


@given(st.lists(st.tuples(st.text(max_size=6), st.floats(-60.0, 0.0)), max_size=25))
def test_any_tokens_give_a_score_or_a_reason(tokens: list[tuple[str, float]]) -> None:
    found = score_of_tokens(tokens)
    assert (found.value is None) == (found.reason is not None)
    assert found.value is None or 0 <= found.value <= 100


@given(st.integers(0, 100), st.sampled_from(["{}", "Score: {}", "{}/100", "**{}**", "{}.", "The score is {}"]))
def test_a_number_is_found_in_what_judges_write(number: int, form: str) -> None:
    assert score_of_text(form.format(number)).value == number


def test_samples_are_averaged_and_counted() -> None:
    found = score_of_samples(["80", "90", "REFUSAL", "nonsense"])
    assert (found.value, found.method) == (85, "samples: 2 of 4")
    none = score_of_samples(["80", *["REFUSAL"] * 4])
    assert (none.value, none.reason, none.method) == (None, "refusal", "samples: 1 of 5")
