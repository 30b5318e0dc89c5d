"""Arms beside each other on a model whose behaviour is planted: what each does is known beforehand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from persona_lens.core.progress import no_progress
from persona_lens.reports.steering import comparison_headline
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering import ArmSettings, Prompted, Steering, SteeringError, compare
from persona_lens.steering.arms import arm_variants
from persona_lens.steering.comparison import pair_name
from persona_lens.traits import Arm, load_trait
from tests.campaign.targets import planted, vectors

TRAIT = load_trait("optimistic")
SETTINGS = ArmSettings(tuple(range(6)), random_directions=3, rollouts=RolloutSettings(12))
UP = Steering.parse("optimistic@1:+2", vectors())
ASKED = Prompted(TRAIT.middle_prompt(Arm.POSITIVE))


def score(leaning: float) -> float:
    return 100 / (1 + float(torch.tensor(-leaning).exp()))


def test_a_system_prompt_is_an_arm_without_a_null() -> None:
    found = compare(planted(), {"up": UP, "asked": ASKED}, vectors(), SETTINGS, progress=no_progress)
    up, asked = found.effects["up"], found.effects["asked"]
    assert up is not None
    assert asked is not None
    assert up.change.mean == pytest.approx(score(2) - 50, abs=0.01)
    assert (up.clear, up.change.n) == (1, 6)
    assert asked.score.mean == pytest.approx(score(1), abs=0.01)
    assert asked.change.mean == pytest.approx(score(1) - 50, abs=0.01)
    assert (asked.random, asked.difference, asked.clear) == (None, None, 0)
    assert asked.nll is not None
    assert asked.nll.mean == pytest.approx(2)  # without the prompt
    assert found.summary["arms"]["asked"]["system"] == ASKED.system
    assert {(row.arm, row.direction) for row in found.answers} == {
        ("unsteered", "none"), ("up", "vector"), ("up", "random"), ("asked", "prompt")}  # fmt: skip
    told = comparison_headline(found.summary)
    assert told.verdict == "clear"
    assert told.title.startswith("A clear effect: up raises")  # there is one steering
    assert told.sentences[-1] == "asked, a system prompt and no steering: +23.1 (+23.1 to +23.1)."


def test_every_two_arms_are_told_apart_question_by_question() -> None:
    found = compare(planted(), {"up": UP, "asked": ASKED}, vectors(), SETTINGS, progress=no_progress)
    (pair,) = found.summary["pairs"].items()
    assert pair[0] == pair_name("up", "asked") == "up minus asked"
    assert pair[1]["score"]["mean"] == pytest.approx(score(2) - score(1), abs=0.01)
    assert pair[1]["score"]["n"] == 6
    assert pair[1]["coherence"] is None
    rows = [row for row in found.answers if row.direction != "random"]
    values = {arm: {row.question: row.nll for row in rows if row.arm == arm} for arm in ("up", "asked")}
    apart = [value - (values["asked"][question] or 0) for question, value in values["up"].items() if value is not None]
    assert pair[1]["nll"]["mean"] == pytest.approx(sum(apart) / len(apart))


def test_it_changes_nothing_of_the_others() -> None:
    both = compare(planted(), {"asked": ASKED, "up": UP}, vectors(), SETTINGS, progress=no_progress)
    alone = compare(planted(), {"up": UP}, vectors(), SETTINGS, progress=no_progress)
    assert [row for row in both.answers if row.arm != "asked"] == list(alone.answers)
    assert both.effects["up"] == alone.effects["up"]


def test_a_prompt_alone_has_a_verdict_that_claims_nothing() -> None:
    found = compare(planted(), {"asked": ASKED}, vectors(), SETTINGS, progress=no_progress)
    assert (found.headline.verdict, found.headline.title[:19]) == ("unclear", "Nothing was steered")
    assert "asked, a system prompt" in found.headline.sentences[0]


def test_arms_may_share_the_random_directions_of_one() -> None:
    arms: Any = {"up": UP, "again": Steering.parse("optimistic@1:+2 on all", vectors()), "asked": ASKED}
    variants = arm_variants(arms, 1, {"again": "up"})
    assert [(each.labels["arm"], each.labels["direction"]) for each in variants] == [
        ("unsteered", "none"),
        ("up", "vector"),
        ("up", "random"),
        ("again", "vector"),
        ("asked", "prompt"),
    ]


def test_what_is_no_arm_is_refused() -> None:
    with pytest.raises(SteeringError, match="an arm cannot be called 'unsteered'"):
        compare(planted(), {"unsteered": ASKED}, vectors(), SETTINGS)
    with pytest.raises(SteeringError, match="at least one steering, or a system prompt"):
        compare(planted(), {}, vectors(), SETTINGS)
