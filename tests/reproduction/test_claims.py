"""Claims on made-up figures: what each rule makes of intervals, and what every reading takes from the figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from persona_lens.reports.reproduction import cell_of
from persona_lens.reproduction import readings
from persona_lens.reproduction.claims import Claim, Finding, Found, MissingError, Number, Rule, outcome_of
from persona_lens.reproduction.tables import CLAIMS
from tests.reproduction import made

NULL = Number(0.0, -2.0, 2.0, 5)


def found_of(**figures: Any) -> Found:
    """Figures by step, the same for both traits; of a function what it gives for a trait."""

    def look(step: str, trait: str | None) -> Any:
        if step not in figures:
            raise MissingError(f"needs a step {step!r}")
        return figures[step](trait) if callable(figures[step]) else figures[step]

    return Found(made.TRAITS, look)


def verdict(name: str, found: Found, trait: str = "impolite") -> str:
    (claim,) = (each for each in CLAIMS if each.name == name)
    return str(outcome_of(claim, found, trait if claim.each else None)["verdict"])


@pytest.mark.parametrize(
    ("rule", "low", "high", "said"),
    [
        (Rule(1), 3, 5, "shown"),
        (Rule(1), 1, 5, "not shown"),
        (Rule(1), -1, 1, "not shown"),
        (Rule(1), -6, -3, "refuted"),
        (Rule(1), -3, 1, "not shown"),
        (Rule(-1), -6, -3, "shown"),
        (Rule(-1), 3, 5, "refuted"),
        (Rule(1, -10.0), -5, -3, "shown"),
        (Rule(1, -10.0), -20, -15, "refuted"),
        (Rule(1, -10.0), -9, -3, "not shown"),
    ],
)
def test_rules_compare_intervals(rule: Rule, low: float, high: float, said: str) -> None:
    """What lies inside the null's interval, or overlaps with it, says nothing, whatever its mean."""
    assert rule.verdict(Finding(Number((low + high) / 2, low, high, 5), NULL)) == said


@pytest.mark.parametrize(
    ("mean", "low", "high", "said"),
    [
        (0.9, 0.3, 1.0, "shown"),  # though the two intervals overlap
        (0.9, -0.2, 1.0, "not shown"),  # one dataset may have made it
        (0.6, 0.3, 0.8, "not shown"),  # chance does as much
        (-0.9, -1.0, -0.3, "refuted"),
        (-0.6, -0.8, -0.3, "not shown"),
    ],
)
def test_what_chance_gives_is_no_estimate(mean: float, low: float, high: float, said: str) -> None:
    chance = Number(0.0, -0.8, 0.8)
    assert Rule(1, chance=True).verdict(Finding(Number(mean, low, high, 6), chance)) == said
    opposite = Finding(Number(-mean, -high, -low, 6), chance)
    assert Rule(-1, chance=True).verdict(opposite) == said
    assert Rule(1, chance=True).verdict(Finding(Number(0.9), chance)) == "not shown"


def test_a_paired_difference_counts_and_not_the_overlap() -> None:
    value, close, wide = Number(1.0, -1.0, 3.0, 9), Number(1.0, 0.5, 1.5, 9), Number(1.0, -0.5, 2.5, 9)
    assert Rule(1, paired=True).verdict(Finding(value, NULL, close)) == "shown"
    assert Rule(1, paired=True).verdict(Finding(value, NULL, wide)) == "not shown"
    assert Rule(1, paired=True).verdict(Finding(Number(9.0, 8.0, 10.0, 9), NULL)) == "not shown"
    assert Rule(1).verdict(Finding(value, NULL)) == "not shown"


def test_an_effect_has_to_be_one_of_its_own() -> None:
    """Random directions that do harm make no effect."""
    effect = Rule(1, own=True, paired=True)
    ahead = Number(20.0, 15.0, 25.0, 9)
    assert effect.verdict(Finding(Number(0.0, -3.0, 3.0, 9), NULL, ahead)) == "not shown"
    assert effect.verdict(Finding(Number(20.0, 15.0, 25.0, 9), NULL, ahead)) == "shown"
    assert effect.verdict(Finding(Number(-9.0, -12.0, -6.0, 9), NULL, ahead)) == "refuted"


def test_one_unit_and_no_interval_show_nothing() -> None:
    assert Rule(1).verdict(Finding(Number(99.0, 99.0, 99.0, 1), NULL)) == "not shown"
    assert Rule(1).verdict(Finding(Number(99.0), NULL)) == "not shown"


def test_numbers_keep_their_intervals() -> None:
    assert Number(2.0, 1.0, 4.0, 3).mapped(-1, 10) == Number(8.0, 6.0, 9.0, 3)
    assert Number(2.0, 1.0, 4.0) - Number(1.0, 0.0, 3.0) == Number(1.0, -2.0, 4.0)
    with pytest.raises(MissingError, match="the shift could not be measured"):
        Number.of(made.value(None), "the shift")


def test_every_rule_is_written_out_with_its_side() -> None:
    assert "above 0" in Rule(1).words
    assert "middle 95% of it" in Rule(1, chance=True).words
    assert "below 0" in Rule(-1, own=True, paired=True).words
    assert "-10 points" in Rule(1, -10.0, unit=" points").words
    assert all(claim.rule.words.count("; refuted if") == 1 for claim in CLAIMS)


def test_steering_is_read_beside_random_directions() -> None:
    found = found_of(tune=made.tune(), sweep=made.sweep())
    assert [verdict(name, found) for name in ("layer", "promotion", "suppression")] == ["shown"] * 3
    weak = found_of(tune=made.tune(), sweep=made.sweep(up=1.5, down=0.5))
    assert [verdict(name, weak) for name in ("promotion", "suppression")] == ["not shown"] * 2
    wrong = found_of(tune=made.tune(), sweep=made.sweep(up=-20, down=30))
    assert [verdict(name, wrong) for name in ("promotion", "suppression")] == ["refuted"] * 2


def test_the_cliff_is_held_against_unsteered_text() -> None:
    found = found_of(cliff=made.cliff())
    assert [verdict(name, found) for name in ("unasked", "holds", "breaks")] == ["shown"] * 3
    calm = made.cliff()
    calm["arms"]["impolite@2:+115%"] = calm["arms"]["impolite@2:+15%"]
    assert verdict("breaks", found_of(cliff=calm)) == "refuted"
    judged = made.cliff()
    for each in judged["arms"].values():
        each["effect"] |= {"nll": None, "coherence": made.number(80)}
    judged["arms"]["impolite@2:+115%"]["effect"]["coherence"] = made.number(20)
    assert [verdict(name, found_of(cliff=judged)) for name in ("holds", "breaks")] == ["shown"] * 2


def test_reductions_are_compared_in_pairs() -> None:
    names = [f"impolite.{each}@2:+20%" for each in ("response_mean", "prompt_mean", "prompt_last")]
    pairs = {
        f"{names[0]} minus {names[1]}": {"score": made.number(8)},
        f"{names[0]} minus {names[2]}": {"score": made.number(-8)},
    }
    arms = dict(zip(names, (made.arm(30, None), made.arm(22, None), made.arm(38, None)), strict=True))
    found = found_of(reductions={"arms": arms, "pairs": pairs})
    assert (verdict("prompt-mean", found), verdict("prompt-last", found)) == ("shown", "refuted")


def test_monitoring_is_read_where_it_does_most_beside_directions_that_choose_too() -> None:
    found = found_of(study=made.study())
    names = ("prompts-overall", "prompts-within", "shots-overall", "shots-within")
    assert [verdict(name, found) for name in names] == ["shown", "not shown"] * 2
    prompts = made.study()
    del prompts["groups"]["shots"]
    row = outcome_of(next(each for each in CLAIMS if each.name == "shots-overall"), found_of(study=prompts), "impolite")
    assert (row["verdict"], "--conditions both" in row["note"]) == ("missing", True)


def test_datasets_are_brought_together_with_the_models_trained_on_them() -> None:
    found = found_of(tune=made.tune(), shift=made.shift(), screen=made.screen)
    rows = readings.points(found, "optimistic")
    assert [row["model"] for row in rows] == [f"finetune-{level}-{t}" for t in made.TRAITS for level in made.LEVELS]
    assert [row["difference"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["change"] for row in rows] == [10, 20, 30, 40, 50, 60]
    assert [verdict(name, found) for name in ("levels", "shift", "dp", "last-token")] == ["shown"] * 4
    assert [verdict(name, found) for name in ("raw", "share")] == ["not shown", "missing"]
    assert [verdict(name, found) for name in ("auc-raw", "auc-difference")] == ["shown"] * 2
    backwards = found_of(tune=made.tune(), shift=made.shift(slope=-1), screen=made.screen)
    assert verdict("levels", backwards) == "refuted"
    assert verdict("dp", backwards) == "refuted"


def test_three_datasets_make_no_correlation() -> None:
    few = made.shift()
    for each in few["traits"].values():
        each["models"] = dict(list(each["models"].items())[:3])
    claim = next(each for each in CLAIMS if each.name == "shift")
    row = outcome_of(claim, found_of(tune=made.tune(), shift=few, screen=made.screen), "impolite")
    assert (row["verdict"], row["value"]) == ("missing", None)
    assert "name more traits" in row["note"]


def test_ways_to_finetune_are_held_against_plain_finetuning() -> None:
    found = found_of(protection=made.protection())
    shown = ("plain", "post-hoc", "preventative", "ability", "everywhere-training", "caft", "penalty")
    assert [verdict(name, found) for name in shown] == ["shown"] * 7
    assert verdict("inoculation", found) == "not shown"
    works = made.protection()
    works["treatments"]["regularised"]["against_plain"] = made.number(-40, 5)
    assert verdict("penalty", found_of(protection=works)) == "refuted"
    without = made.protection()
    without["settings"]["task"] = None
    assert verdict("ability", found_of(protection=without)) == "missing"


def test_capability_is_read_of_the_arm_that_is_meant() -> None:
    def change(arm: str, mean: float) -> dict[str, Any]:
        return {
            "task": "basics",
            "metric": "acc",
            "arm": arm,
            "change": made.number(mean, 0.02),
            "random": made.number(0.0, 0.02),
        }

    plain = {"task": "basics", "metric": "acc", "arm": "unsteered", "change": None, "random": None}
    found = found_of(capability={"changes": [plain, change("a@2:-3", -0.3), change("a@all:increments(-1)", -0.05)]})
    assert (verdict("cost", found), verdict("everywhere-cost", found)) == ("shown", "shown")


def test_cosines_reliability_agreement_subsets_and_features() -> None:
    row = {"pair": list(made.TRAITS), "layer": 2, "cosine": -0.5, "low": -0.6, "high": -0.4}
    found = found_of(
        tune=made.tune(),
        halves={"layers": [{"layer": 2, "halves": 0.7, "whole": made.number(0.8, 0.1), "null": 0.3}]},
        cosines={"layers": [2], "intervals": [row], "null_std": 0.04},
        judges={"pairwise_first": made.value(0.9, 0.05), "counts": {"scored": 40}},
        subsets={"traits": {"impolite": {"models": {
            f"finetune-{name}-impolite": {"change": made.number(each)}
            for name, each in (("high", 30), ("random", 10), ("low", 10.5))
        }}}},
        features={"steering": {"effects": {"whole": {"feature": None, "change": made.beside(40, 1)},
                                           "feature 7": {"feature": 7, "change": made.beside(10, 1)}}},
                  "ranking": {"top": [{"feature": 7, "cosine": 0.4}]}},
    )  # fmt: skip
    names = ("cosine", "reliable", "agreement", "high", "low", "feature")
    assert [verdict(name, found) for name in names] == ["shown"] * 4 + ["not shown", "shown"]


def test_figures_that_are_not_there_are_said_and_break_nothing() -> None:
    rows = [outcome_of(claim, found_of(), "impolite") for claim in CLAIMS]
    assert {row["verdict"] for row in rows} == {"missing"}
    assert all("needs a step" in row["note"] for row in rows)
    odd = outcome_of(next(each for each in CLAIMS if each.name == "promotion"), found_of(tune={}, sweep=[]), "impolite")
    assert (odd["verdict"], "no such figure" in odd["note"]) == ("missing", True)


def _claim(read: Callable[[Found, str], Finding]) -> Claim:
    return Claim("c", "steering", "It does", {"evil": ".7"}, "nothing", (), read, Rule(1))


def test_the_papers_number_is_that_of_the_trait_where_there_is_one() -> None:
    claim = _claim(lambda found, trait: Finding(Number(1.0, 0.5, 1.5, 9), Number.exactly(0)))
    assert claim.number_of("evil") == ".7"
    assert claim.number_of("impolite") == "evil .7"
    assert outcome_of(claim, found_of(), "evil")["verdict"] == "shown"


def test_cells_say_where_there_is_no_interval() -> None:
    assert cell_of(Number(0.5, 0.25, 0.75, 9).to_json(), 2) == "0.50 (0.25 to 0.75)"
    assert cell_of(Number(0.5).to_json(), 2) == "0.50 (no interval)"
    assert cell_of(Number.exactly(0.5).to_json(), 1) == "0.5"


def test_the_report_counts_and_says_what_is_missing(tmp_path: Path) -> None:
    found = made.reproduced(tmp_path / "run")
    counts = found.summary["counts"]
    assert counts["shown"] > 0
    assert counts["missing"] > 0
    assert sum(counts.values()) == len(found.rows)
    assert found.headline.title.startswith(f"{counts['shown']} of {len(found.rows) - counts['missing']} claims")
    page = found.report()
    assert page.count("not in the plan") >= 5
    assert 'href="steps/sweep-impolite.json"' in page
    assert set(found.figures) == {f"{kind}-{trait}" for kind in ("steering", "datasets") for trait in made.TRAITS}
