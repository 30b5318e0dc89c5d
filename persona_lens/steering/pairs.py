"""Every two arms of a comparison, question by question: which of them does more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from persona_lens.core.statistics import CHANGES, Ends
from persona_lens.extraction.experiment import Answer, averaged, estimated, json_of, values_of

WITHIN: Mapping[str, Ends | None] = {"score": CHANGES, "nll": None, "coherence": CHANGES}
"""By what is compared the ends of differences."""


def pair_name(one: str, other: str) -> str:
    """What the difference of two arms is called."""
    return f"{one} minus {other}"


def differences(answers: Mapping[str, Sequence[Answer]]) -> dict[str, dict[str, Any]]:
    """By `pair_name` of every two arms, the one minus the other, as JSON values; None where no question has both.

    Args:
        answers: By arm its own responses, random directions left out. All arms share their questions and seeds.
    """
    values = {name: {each: averaged(values_of(rows, each)) for each in WITHIN} for name, rows in answers.items()}
    return {
        pair_name(one, other): {
            quantity: json_of(estimated(_minus(values[one][quantity], values[other][quantity]), within))
            for quantity, within in WITHIN.items()
        }
        for one, other in combinations(values, 2)
    }


def _minus(these: Mapping[int, float], those: Mapping[int, float]) -> dict[int, float]:
    return {question: value - those[question] for question, value in these.items() if question in those}
