"""A race on a model whose surface is planted: what each place does, and where text falls apart, is known beforehand."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from persona_lens.backend import Edit, Generation
from persona_lens.backend.tokens import TokenIds
from persona_lens.extraction.experiment import Subject
from persona_lens.judging import Calibration, Exchange, Judgement, Score
from persona_lens.reports.kinds import page_of
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering import SteeringError, TuneSettings, Tuning, tune, tune_work
from persona_lens.steering.tuning.bisection import CLOSE, Bisection, most_steps
from persona_lens.steering.tuning.race import middle_out
from persona_lens.steering.tuning.search import curve_places
from persona_lens.steering.tuning.settings import Towards, settled
from persona_lens.steering.tuning.surface import Dropped, Place, Point
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors, load_vectors
from tests.planted import PlantedBackend

TRAIT = load_trait("optimistic")
SHORT = RolloutSettings(max_new_tokens=30, batch_size=64)
NORM, LAYERS = 20.0, 8
SAID = re.compile(r"leaning ([+-]\d+\.\d+) odd (\d+\.\d+)")
GAINS = (0.5, 1.0, 2.0, 4.0, 3.0, 2.0, 1.0, 0.5)  # leaning at a strength of 1
CLIFFS = (0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35)  # the strength at which the margin of surprise is used up


class Surface(PlantedBackend):
    """Steering at a layer moves the leaning in proportion to its strength, and makes text odd near the layer's cliff.

    Args:
        gains: Leaning at a strength of 1, by layer.
        cliffs: Strength at which text surprises by one nat a token more, by layer.
        spread: Standard deviation of the leaning over questions, and again over places.
    """

    def __init__(
        self, gains: Sequence[float] = GAINS, cliffs: Sequence[float] = CLIFFS, spread: float = 0.0, **given: Any
    ) -> None:
        super().__init__(TRAIT, n_layers=LAYERS, respond=self._said, **given)
        self.gains, self.cliffs, self.spread = gains, cliffs, spread
        self._odd: list[float] = []

    def leanings(self, prompts: Sequence[TokenIds], seeds: Sequence[int], edits: Sequence[Edit]) -> Tensor:
        total = torch.tensor([self.spread * drawn(seed) for seed in seeds])
        odd = torch.zeros(len(seeds))
        for edit in edits:
            planted = self.planted["response_mean"][edit.layer]
            strengths = torch.as_tensor(edit.coefficient) * edit.direction.norm() / NORM
            along = edit.direction @ planted / planted.norm() / edit.direction.norm()
            total = total + self.gains[edit.layer] * strengths * along
            odd = odd + (strengths.abs() / self.cliffs[edit.layer]) ** 6
            for row, strength in enumerate(torch.broadcast_to(strengths, total.shape).tolist()):
                if strength:
                    total[row] += self.spread * drawn(f"{seeds[row]} {edit.layer} {strength:.3f}")
        self._odd = odd.tolist()
        return total

    def _said(self, leaning: float) -> str:
        return f"leaning {leaning:+.3f} odd {min(self._odd.pop(0), 9):.3f}"

    def generate(self, *given: Any, **named: Any) -> Generation:
        assert not self._odd
        return super().generate(*given, **named)

    def _values(self, name: str, prompts: Any, seeds: Any, leanings: Any, responses: Any) -> Tensor:
        assert name == "response_norm"
        return torch.full((len(responses), LAYERS), NORM)

    def _logprobs(self, prompt: TokenIds, response: TokenIds) -> Tensor:
        found = SAID.search(self.tokenizer.decode(list(response)))
        assert found
        leaning, odd = map(float, found.groups())
        return torch.full((len(response),), -2 + self.arm(prompt) * leaning / 2 - odd)

    def effect(self, place: Place) -> float:
        """The leaning that a place adds."""
        return self.gains[place.layer] * place.strength

    @property
    def best(self) -> float:
        """The most that can be added while text holds together."""
        return max(gain * cliff for gain, cliff in zip(self.gains, self.cliffs, strict=True))


def drawn(what: object) -> float:
    return random.Random(str(what)).gauss(0, 1)


def vectors_of(backend: Surface, **provenance: Any) -> PersonaVectors:
    stored = {
        "trait": {"content_hash": TRAIT.content_hash(), **TRAIT.model_dump(mode="json")},
        "judge": {"calibration": Calibration(2.0, 0.0).to_json()},
    }
    return PersonaVectors("optimistic", backend.info, dict(backend.planted), {**stored, **provenance})


def settings(**changes: Any) -> TuneSettings:
    given: dict[str, Any] = {"layers": tuple(range(LAYERS)), "random_directions": 2, "rollouts": SHORT}
    return TuneSettings(**{**given, **changes})


def run(backend: Surface, folder: Path | None = None, judge: Any = None, **changes: Any) -> Tuning:
    return tune(backend, vectors_of(backend), settings(**changes), folder=folder, judge=judge)


def tokens(found: Tuning) -> int:
    """Generated and judged, in the search and in the confirmation."""
    return sum(part[kind] for part in found.summary["cost"].values() for kind in ("generated_tokens", "judged_tokens"))


# What is found, and what it costs


@pytest.mark.parametrize("towards", Towards)
def test_the_best_place_is_found(towards: Towards) -> None:
    backend = Surface()
    found = run(backend, towards=towards)
    place = found.chosen.place
    assert place.layer == 3
    assert CLIFFS[3] / CLOSE <= place.strength <= CLIFFS[3]
    assert place.coefficient * towards.sign > 0
    assert found.confirmed is not None
    assert found.confirmed.clear == towards.sign
    assert found.confirmed.change.n == found.confirmed.random.n == 12  # type: ignore[union-attr]
    assert not any("budget" in warning for warning in found.summary["warnings"])


def test_it_costs_a_third_and_its_choice_is_as_good() -> None:
    shares, gained, searched = [], [], []
    for seed in range(3):
        rng = random.Random(seed)
        gains = [3 * rng.uniform(0.2, 1) for _ in range(LAYERS)]
        cliffs = [rng.uniform(0.25, 0.9) for _ in range(LAYERS)]
        backend = Surface(gains, cliffs, spread=0.4)
        raced, full = run(backend, seed=seed), run(backend, seed=seed, exhaustive=True)
        assert full.summary["cost"]["search"]["responses"] == 8 * 6 * 8 * 2 + 2 * 8
        shares.append(tokens(raced) / tokens(full))
        gained.append((backend.effect(raced.chosen.place) - backend.effect(full.chosen.place)) / backend.best)
        searched.append(
            raced.summary["cost"]["search"]["generated_tokens"] / full.summary["cost"]["search"]["generated_tokens"]
        )
        assert raced.chosen.place.strength <= cliffs[raced.chosen.place.layer] * 1.05
    assert max(shares) <= 0.35
    assert median(searched) <= 0.2
    assert median(gained) >= -0.05


def test_nothing_is_asked_twice_nor_in_the_confirmation_what_the_choice_rests_on(tmp_path: Path) -> None:
    found = run(Surface(spread=0.5), tmp_path)
    rows = [
        json.loads(line)
        for file in sorted(tmp_path.glob("*-rollouts.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    asked = Counter((row["arm"], row["direction"], row["question_number"], row["sample"]) for row in rows)
    assert set(asked.values()) == {1}
    assert len(rows) == sum(part["responses"] for part in found.summary["cost"].values())
    confirmed = {row.question for row in found.answers["confirm"]}
    assert {row.question for row in found.answers["search"]} == set(range(8))
    assert confirmed == set(range(8, 20))
    # The same requests as those of an exhaustive search: a question has one seed at every place.
    assert len({(row["question_number"], row["sample"], row["seed"]) for row in rows}) == 8 + 12 * 2
    assert len(found.rows) == len(rows)


def test_rounds_are_batches_of_all_places_that_are_open() -> None:
    backend = Surface(spread=0.5)
    found = run(backend)
    first = 8 * 2  # all layers, two questions each
    assert backend.generated[0] == 8
    assert backend.generated[1:4] == [first] * 3
    assert found.summary["race"]["rounds"] <= 12


# Where text falls apart


@pytest.mark.parametrize("cliff", [0.11, 0.2, 0.37, 0.61, 0.85])
def test_a_cliff_is_found_within_the_tolerance(cliff: float) -> None:
    backend = Surface(gains=(1.0,) * LAYERS, cliffs=(cliff,) * LAYERS)
    found = run(backend, layers=(2,))
    held = [point.place.strength for point in found.points if point.coherent]
    broke = [point.place.strength for point in found.points if not point.coherent]
    assert max(held) <= cliff <= min(broke) * 1.05  # coefficients are rounded
    assert min(broke) / max(held) <= CLOSE * 1.05
    assert all(point.dropped is Dropped.BROKEN and point.questions == 2 for point in found.points if not point.coherent)
    stored = found.vectors.provenance["tuned"]
    assert stored["cliff"] == min(broke)
    assert stored["strength"] == found.chosen.place.strength == max(held)
    assert any("near the coherence cliff" in each for each in found.summary["warnings"])


class Uneven(Surface):
    """Unsteered answers are odd by 2 or not at all, two by two."""

    def leanings(self, prompts: Sequence[TokenIds], seeds: Sequence[int], edits: Sequence[Edit]) -> Tensor:
        found = super().leanings(prompts, seeds, edits)
        if not edits:
            self._odd = [1.0 + (-1.0) ** (number // 2) for number in range(len(seeds))]
        return found


@pytest.mark.parametrize("seed", range(4))
def test_a_cliff_is_where_it_is_though_the_first_questions_have_plain_answers(seed: int) -> None:
    found = run(Uneven(cliffs=(0.3,) * LAYERS), layers=(2, 3), margin=0.5, seed=seed)
    broken = [(point.place.strength / 0.3) ** 6 > 1 + 0.5 for point in found.points]
    assert [not point.coherent for point in found.points] == broken
    assert set(broken) == {True, False}


def test_a_cliff_that_the_search_kept_away_from_is_looked_for_in_the_confirmation() -> None:
    found = run(Uneven(cliffs=(0.3,) * LAYERS), layers=(2,), margin=0.5)
    assert all(point.coherent for point in found.points)
    further = found.summary["curve"][-1]["strength"]
    assert further == pytest.approx(found.chosen.place.strength * CLOSE, rel=0.05)
    assert found.vectors.provenance["tuned"]["cliff"] == further
    assert any("near the coherence cliff" in each for each in found.summary["warnings"])
    assert not any("greatest strength" in each for each in found.summary["warnings"])


def test_where_nothing_breaks_the_greatest_strength_is_tried_and_no_cliff_is_stored() -> None:
    backend = Surface(cliffs=(5.0,) * LAYERS)
    found = run(backend, layers=(2, 3))
    assert found.chosen.place.strength == pytest.approx(0.9, rel=0.05)
    assert found.vectors.provenance["tuned"]["cliff"] is None
    assert any("greatest strength that was tried" in each for each in found.summary["warnings"])


def test_where_all_breaks_that_is_said() -> None:
    with pytest.raises(SteeringError, match="fell apart at every layer and strength"):
        run(Surface(cliffs=(0.05,) * LAYERS))


@pytest.mark.parametrize(("least", "greatest"), [(0.1, 0.9), (0.3, 0.3), (0.3, 0.33), (0.01, 9.0), (0.2, 0.26)])
def test_a_bisection_ends_close_to_the_cliff_in_the_steps_it_says(least: float, greatest: float) -> None:
    for cliff in (
        least * 0.9,
        *(least + (greatest - least) * share for share in (0.0, 0.1, 0.5, 0.99)),
        greatest * 1.1,
    ):
        found, steps = Bisection(least, greatest), 0
        while (strength := found.next) is not None:
            assert least <= strength <= greatest
            found, steps = found.after(strength, strength <= cliff), steps + 1
        assert steps <= most_steps(least, greatest)
        if found.held and found.broke:
            assert found.low <= cliff < found.high <= found.low * CLOSE
        else:
            assert (found.low if found.held else found.high) == (greatest if found.held else least)


# What is decided, and what is not


def test_places_that_cannot_be_best_are_asked_little() -> None:
    found = run(Surface(spread=0.3))
    weaker = [point for point in found.points if point.dropped is Dropped.WEAKER]
    assert weaker
    assert all(point.questions < 8 and point.coherent for point in weaker)
    finished = [point for point in found.points if point.dropped is None]
    assert found.chosen in finished
    assert {point.questions for point in finished} == {8}
    assert [point.to_json() for point in found.points] == found.summary["surface"]
    best = found.chosen.effect
    assert best is not None
    assert all(point.effect is None or point.effect.score.mean < best.score.mean for point in weaker)


def test_ties_are_asked_everything_and_the_gentlest_is_taken() -> None:
    backend = Surface(gains=(0.0,) * LAYERS, cliffs=(0.5,) * LAYERS)
    found = run(backend, layers=(2, 3), budget=200)
    held = [point for point in found.points if point.coherent]
    assert {point.questions for point in held} == {8}
    assert found.chosen.place.strength == min(point.place.strength for point in held)
    assert any("not clear of zero" in each for each in found.summary["warnings"])


def test_where_the_budget_ends_the_race_the_best_mean_is_taken_and_that_is_said() -> None:
    backend = Surface(gains=(0.0,) * LAYERS, cliffs=(0.5,) * LAYERS)
    carrying = settings().carrying
    found = run(backend, layers=(2,), budget=carrying)
    undecided = [point for point in found.points if point.dropped is Dropped.UNDECIDED]
    assert found.summary["race"]["steered"] <= carrying
    assert undecided
    assert found.chosen not in undecided
    (said,) = (each for each in found.summary["warnings"] if "before the race was decided" in each)
    assert f"the budget of {carrying} responses" in said
    assert "could have been asked more" in said


def test_layers_that_a_budget_does_not_carry_are_named() -> None:
    backend = Surface()
    found = tune(backend, vectors_of(backend), settings(budget=3 * settings().carrying))
    tried = {point.place.layer for point in found.points}
    assert {2, 3, 4} <= tried
    assert found.summary["race"]["layers"] == [3, 2, 4, 1, 5, 0, 6, 7]
    untried = sorted(set(range(LAYERS)) - tried)
    assert found.summary["race"]["untried"] == [each for each in [3, 2, 4, 1, 5, 0, 6, 7] if each in untried]
    assert untried
    numbers = ", ".join(map(str, untried))
    assert any(f"did not carry layers {numbers}" in each for each in found.summary["warnings"])
    assert found.chosen.place.layer == 3


def test_layers_come_from_the_middle_out() -> None:
    assert middle_out((1, 2, 3, 4, 5)) == [3, 2, 4, 1, 5]
    assert middle_out((7, 1, 3)) == [3, 1, 7]
    assert middle_out((1, 2)) == [1, 2]


def test_text_that_a_judge_refuses_to_score_has_fallen_apart() -> None:
    """Even where a whole round is of that kind."""

    class Refusing:
        concurrency = 1

        def describe(self) -> dict[str, Any]:
            return {"judge": "refusing"}

        def pieces(self, exchanges: Sequence[Exchange]) -> list[list[int]]:
            return [list(range(len(exchanges)))]

        def judge(self, exchanges: Sequence[Exchange], progress: Any = None) -> list[Judgement]:
            return [self._of(exchange.response) for exchange in exchanges]

        def _of(self, response: str) -> Judgement:
            found = SAID.search(response)
            assert found
            leaning, odd = map(float, found.groups())
            if odd > 1:
                return Judgement(Score(None, "refused"), Score(None, "refused"), None)
            return Judgement(Score(50 + 20 * leaning), Score(90.0), None)

    backend = Surface(cliffs=(0.2,) * LAYERS)
    found = run(backend, judge=Refusing())
    assert found.chosen.place.layer == 3
    assert found.chosen.place.strength <= 0.21
    assert found.summary["cost"]["search"]["judged_tokens"] is None
    assert any(point.effect is None and point.dropped is Dropped.BROKEN for point in found.points)
    assert "no response has a score" in page_of("tune", json.loads(json.dumps(found.summary)))


def test_questions_without_an_unsteered_score_are_not_raced_on() -> None:
    class Picky:
        concurrency = 1

        def describe(self) -> dict[str, Any]:
            return {"judge": "picky"}

        def pieces(self, exchanges: Sequence[Exchange]) -> list[list[int]]:
            return [list(range(len(exchanges)))]

        def judge(self, exchanges: Sequence[Exchange], progress: Any = None) -> list[Judgement]:
            first = TRAIT.evaluation_questions[0]
            return [
                Judgement(
                    Score(None, "no") if each.question == first else Score(60.0 + len(each.response)), Score(90.0)
                )
                for each in exchanges
            ]

    found = run(Surface(), judge=Picky())
    assert {point.questions for point in found.points if point.dropped is None} == {7}
    assert 0 not in {row.question for row in found.answers["search"] if row.direction == "vector"}


# The confirmation


def test_the_confirmed_curve_shows_the_choice_between_gentler_and_broken() -> None:
    found = run(Surface())
    curve = [point["coefficient"] for point in found.summary["curve"]]
    assert found.chosen.place.coefficient in curve
    assert len(curve) == 3
    assert [point["coherent"] for point in found.summary["curve"]] == [True, True, False]
    assert all(point["effect"]["random"] for point in found.summary["curve"])


def test_what_is_confirmed_beside_a_choice() -> None:
    def point(strength: float, coherent: bool = True, layer: int = 1) -> Point:
        return Point(Place(layer, strength, strength), None, coherent)

    points = [point(0.1), point(0.2), point(0.35), point(0.4), point(0.5), point(0.6, False), point(0.3, layer=2)]
    assert [place.strength for place in curve_places(points, points[3])] == [0.2, 0.4, 0.6]
    assert [place.strength for place in curve_places(points[:5], points[3])] == [0.2, 0.4, 0.5]
    assert [place.strength for place in curve_places(points, points[0])] == [0.1, 0.6]
    assert [place.strength for place in curve_places(points[:1], points[0])] == [0.1]
    further = Place(1, 0.7, 0.7)
    assert [place.strength for place in curve_places(points[:5], points[3], further)] == [0.2, 0.4, 0.7]
    assert [place.strength for place in curve_places(points, points[3], further)] == [0.2, 0.4, 0.6]
    assert [place.strength for place in curve_places(points[:1], points[0], further)] == [0.1, 0.7]


# Folders, plans and bad input


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


class KilledError(Exception):
    pass


def test_a_run_that_was_killed_in_any_round_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = Surface(spread=0.5)
    run(whole, tmp_path / "whole")
    expected, steps = contents(tmp_path / "whole"), len(whole.generated) + len(whole.weighed)
    assert sum(name.startswith("search-") and name.endswith("-rollouts.jsonl") for name in expected) >= 5

    class Mortal(Surface):
        left = 0

        def _live(self) -> None:
            self.left -= 1
            if self.left < 0:
                raise KilledError

        def generate(self, *given: Any, **named: Any) -> Generation:
            self._live()
            return super().generate(*given, **named)

        def forward(self, *given: Any, **named: Any) -> Any:
            self._live()
            return super().forward(*given, **named)

    folder, lives = tmp_path / "killed", 0
    while True:
        backend = Mortal(spread=0.5)
        backend.left = 7  # calls until it is killed
        try:
            run(backend, folder)
            break
        except KilledError:
            lives += 1
    assert lives >= steps // 8
    assert contents(folder) == expected
    # A round whose end is gone is done again, and nothing else.
    name = sorted(each for each in expected if re.fullmatch(r"search-\d+-rollouts\.jsonl", each))[2]
    (folder / name).write_bytes(expected[name][:-40])
    again = Surface(spread=0.5)
    run(again, folder)
    assert contents(folder) == expected
    assert len(again.generated) == 1


def test_the_choice_is_stored_as_ever(tmp_path: Path) -> None:
    found = run(Surface(), tmp_path)
    stored = load_vectors(tmp_path)
    assert stored.tuned is not None
    assert (stored.tuned.layer, stored.tuned.coefficient) == (found.chosen.place.layer, found.chosen.place.coefficient)
    assert {"strength", "cliff", "towards", "search_questions", "confirm_questions", "confirmed", "warnings"} <= set(
        stored.provenance["tuned"]
    )
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(found.summary))


@pytest.mark.parametrize("changes", [{}, {"budget": 60}, {"samples": 2}, {"round_questions": 3}, {"strengths": (0.3,)}])
def test_a_plan_says_at_most_what_it_may_ask(changes: dict[str, Any]) -> None:
    backend = Surface(spread=0.5)
    work = tune_work(Subject.of(backend, vectors_of(backend), planned=True), settings(**changes))
    assert not backend.generated
    most = Counter[str]()
    for each in work:
        most[each.label] += each.rows
        most[f"{each.label} tokens"] += each.tokens
        most[f"{each.label} calls"] += each.calls
    assert [each.at_most for each in work] == [False, False, True, True, True, True]
    found = run(backend, **changes)
    spent = found.summary["cost"].values()
    asked = sum(part["responses"] for part in spent)
    assert asked <= most["rollouts"]
    assert most["rollouts"] <= 2 * asked
    assert sum(part["judged_tokens"] for part in spent) <= most["judging tokens"]
    assert len(backend.generated) <= most["rollouts calls"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 5}, "a budget of 5 carries no layer through, which takes 22 responses"),
        ({"budget": 100, "exhaustive": True}, "leave out the budget, or exhaustive"),
        ({"round_questions": 0}, "must be at least 1"),
    ],
)
def test_what_cannot_be_raced_is_said(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match=message):
        run(Surface(), tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_the_budget_is_settled_with_the_layers() -> None:
    backend = Surface()
    subject = Subject.of(backend, vectors_of(backend), planned=True)
    assert settled(settings(), subject).budget == 8 * 22
    assert settled(settings(layers=(3,), samples=2), subject).budget == 2 * 22
    assert settled(settings(exhaustive=True), subject).budget is None


def test_the_page_shows_an_incomplete_surface_as_one(tmp_path: Path) -> None:
    found = run(Surface(spread=0.3), tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    html = page_of("tune", summary)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))
    assert "No random directions were run" not in text
    race = summary["race"]
    assert f"{race['steered']} steered responses" in text
    weaker = sum(point.dropped is Dropped.WEAKER for point in found.points)
    assert f"{weaker} could hardly have been the best" in text
    assert [b > a for a, b in pairwise(summary["strengths"])] == [True] * (len(summary["strengths"]) - 1)
    lost = replace(found.points[0], dropped=Dropped.UNDECIDED).to_json()
    assert "the budget was spent" in page_of("tune", {**summary, "surface": [lost, *summary["surface"][1:]]})
