"""Tuning on a model whose behaviour is planted: what should be chosen is known beforehand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from persona_lens.backend.tokens import TokenIds
from persona_lens.core.statistics import Estimate
from persona_lens.extraction.experiment import Subject
from persona_lens.judging import Calibration, Exchange, Judgement, Score
from persona_lens.reports.kinds import page_of
from persona_lens.runs import RunError
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering import Steering, SteeringError, TuneSettings, tune
from persona_lens.steering.arms import ArmEffect, ArmRow, arm_effect
from persona_lens.steering.comparison import compare
from persona_lens.steering.tuning import tune_work
from persona_lens.steering.tuning.settings import Towards, settled, split
from persona_lens.steering.tuning.surface import (
    Place,
    Point,
    choose_point,
    cliff_beyond,
    places,
    shown_layers,
    warnings_about,
    warnings_confirmed,
)
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors, VectorsError, load_vectors
from tests.planted import LEANING, PlantedBackend
from tests.tiny import N_LAYERS

TRAIT = load_trait("optimistic")
SHORT = RolloutSettings(max_new_tokens=20, batch_size=50)
NORM = 20.0


class Cliff(PlantedBackend):
    """Responses whose leaning is beyond 2 surprise the unsteered model by 3 nats a token more."""

    def _values(self, name: str, prompts: Any, seeds: Any, leanings: Any, responses: Any) -> Tensor:
        if name == "response_norm":
            return torch.full((len(responses), N_LAYERS), NORM)
        return super()._values(name, prompts, seeds, leanings, responses)

    def _logprobs(self, prompt: TokenIds, response: TokenIds) -> Tensor:
        said = LEANING.search(self.tokenizer.decode(list(response)))
        beyond = said is not None and abs(float(said.group(1))) > 2
        return super()._logprobs(prompt, response) - 3.0 * beyond


def model() -> tuple[Cliff, PersonaVectors]:
    backend = Cliff(TRAIT)
    provenance = {
        "trait": {"content_hash": TRAIT.content_hash(), **TRAIT.model_dump(mode="json")},
        "judge": {"calibration": Calibration(1.0, 0.0).to_json()},
    }
    return backend, PersonaVectors("optimistic", backend.info, dict(backend.planted), provenance)


def settings(**changes: Any) -> TuneSettings:
    given: dict[str, Any] = {"search_questions": 3, "random_directions": 2, "confirm_samples": 1, "rollouts": SHORT}
    return TuneSettings(**{**given, "exhaustive": True, **changes})


@pytest.mark.parametrize("towards", Towards)
def test_the_strongest_coherent_place_is_taken(towards: Towards, tmp_path: Path) -> None:
    backend, vectors = model()
    found = tune(backend, vectors, settings(towards=towards), folder=tmp_path)
    sign = towards.sign
    # A relative strength p moves the leaning by p * NORM / |v|, so the coefficient is the leaning.
    leanings = [sign * point.place.coefficient for point in found.points]
    assert [point.coherent for point in found.points] == [leaning <= 2 for leaning in leanings]
    assert {point.coherent for point in found.points} == {True, False}
    best = max(leaning for leaning in leanings if leaning <= 2)
    assert sign * found.chosen.place.coefficient == best
    assert found.confirmed is not None
    assert found.confirmed.change.n == 5
    expected = 100 / (1 + torch.tensor(-sign * best).exp()) - 50
    assert found.confirmed.change.mean == pytest.approx(float(expected), abs=0.01)
    assert found.confirmed.clear
    assert str(found.steering) == f"optimistic@{found.chosen.place.layer}:{found.chosen.place.coefficient:+g}"
    assert any("near the coherence cliff" in warning for warning in found.summary["warnings"])


def test_the_choice_is_stored_with_the_vectors_and_used(tmp_path: Path) -> None:
    backend, vectors = model()
    found = tune(backend, vectors, settings(), folder=tmp_path)
    stored = load_vectors(tmp_path)
    assert stored.tuned == found.vectors.tuned
    assert stored.tuned is not None
    assert (stored.tuned.layer, stored.tuned.coefficient) == (
        found.chosen.place.layer,
        found.chosen.place.coefficient,
    )
    assert all(torch.equal(stored.directions[name], vectors.directions[name]) for name in vectors.directions)
    assert Steering.parse("optimistic", stored) == found.steering
    assert stored.edit() == found.steering.edits()[0]
    assert stored.provenance["tuned"]["confirmed"] == found.summary["confirmed"]
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(found.summary))


def test_it_is_gone_on_with_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    backend, vectors = model()
    tune(backend, vectors, settings(), folder=tmp_path)
    files = {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
    for name in ("confirm-judgements.jsonl", "summary.json", "vectors.safetensors", "confirm-rollouts.jsonl"):
        (tmp_path / name).unlink()
    (tmp_path / "search-rollouts.jsonl").write_bytes(files["search-rollouts.jsonl"][:-40])
    tune(backend, vectors, settings(), folder=tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"} == files
    with pytest.raises(RunError, match=r"settings\.seed: 0 -> 1"):
        tune(backend, vectors, settings(seed=1), folder=tmp_path)


def test_questions_that_were_searched_are_not_those_of_the_result() -> None:
    backend, vectors = model()
    asked: list[set[str]] = []

    class Watching:
        def __init__(self) -> None:
            self.concurrency = 1

        def describe(self) -> dict[str, Any]:
            return {"judge": "watching"}

        def pieces(self, exchanges: Sequence[Exchange]) -> list[list[int]]:
            return [list(range(len(exchanges)))]

        def judge(self, exchanges: Sequence[Exchange], progress: Any = None) -> list[Judgement]:
            asked.append({exchange.question for exchange in exchanges})
            return [Judgement(Score(50.0 + len(e.response) % 7), Score(90.0), None) for e in exchanges]

    tune(backend, vectors, settings(confirm_questions=6), judge=Watching())
    searched, confirmed = asked[0], asked[-1]
    assert searched == set(TRAIT.evaluation_questions[:3])
    assert confirmed == set(TRAIT.evaluation_questions[3:9])


@pytest.mark.parametrize(("searched", "confirmed"), [(1, 5), (3, 5), (5, 8), (8, 12), (10, 10), (18, 2)])
def test_the_confirmation_is_sized_with_the_search(searched: int, confirmed: int) -> None:
    backend, vectors = model()
    subject = Subject.of(backend, vectors, planned=True)
    search, confirm = split(settled(settings(search_questions=searched), subject))
    assert (len(search.questions), len(confirm.questions)) == (searched, confirmed)
    assert not set(search.questions) & set(confirm.questions)


def test_capability_is_measured_at_every_strength_of_the_chosen_layer() -> None:
    backend, vectors = model()
    asked: list[Steering | None] = []

    def accuracy(steering: Steering | None) -> Estimate:
        asked.append(steering)
        return Estimate(0.8 - 0.1 * (steering is not None), 0.6, 0.9, 10)

    found = tune(backend, vectors, settings(), capability=accuracy)
    layer = found.chosen.place.layer
    strengths = [p.place.coefficient for p in found.points if p.place.layer == layer]
    assert [each["coefficient"] for each in found.summary["capability"]] == [0.0, *strengths]
    assert [each and each.edits()[0].layer for each in asked] == [None, *[layer] * len(strengths)]
    assert found.summary["capability"][1]["accuracy"]["mean"] == pytest.approx(0.7)
    assert found.summary["capability"][0]["score"] == found.summary["unsteered"]["confirm"]["score"]
    assert "capability" not in tune(backend, vectors, settings()).summary


def test_what_would_be_asked_is_known_beforehand() -> None:
    backend, vectors = model()
    work = tune_work(Subject.of(backend, vectors, planned=True), settings())
    counted: dict[str, int] = {}
    for each in work:
        counted[each.label] = counted.get(each.label, 0) + each.rows
    backend.generated.clear()
    tune(backend, vectors, settings())
    assert counted["rollouts"] == sum(backend.generated)
    assert not any(each.at_most for each in work)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search_questions": 20}, "has 20 held-out questions, of which a search on 20 leaves 0"),
        ({"confirm_questions": 18}, "leaves 17 to confirm the choice on, and not the 18 that are asked for"),
        ({"confirm_questions": 0}, "must be at least 1"),
        ({"layers": ()}, "layers must be given"),
        ({"strengths": (0.0,)}, "strengths are step lengths in residual norms"),
        ({"samples": 0}, "must be at least 1"),
        ({"margin": 0.0}, "margin must be above 0"),
        ({"strengths": (5.0,)}, "fell apart at every layer and strength"),
    ],
)
def test_what_cannot_be_tuned_is_said(changes: dict[str, Any], message: str) -> None:
    backend, vectors = model()
    with pytest.raises(SteeringError, match=message):
        tune(backend, vectors, settings(**changes))


def test_layers_that_do_not_exist_and_other_models_claim_no_folder(tmp_path: Path) -> None:
    backend, vectors = model()
    with pytest.raises(VectorsError, match="layer 9 does not exist"):
        tune(backend, vectors, settings(layers=(1, 9)), folder=tmp_path / "run")
    with pytest.raises(VectorsError, match="another model"):
        tune(backend, replace(vectors, model=replace(vectors.model, weights="sha256:x")), folder=tmp_path / "run")
    scoring = replace(vectors, model=replace(vectors.model, weights="sha256:x"))
    arms = {"a": Steering.parse(f"{vectors.trait}@1:+1", vectors)}
    with pytest.raises(VectorsError, match="another model"):
        compare(backend, arms, scoring, folder=tmp_path / "run")
    with pytest.raises(VectorsError, match="no layer was tuned"):
        vectors.edit()
    assert not (tmp_path / "run").exists()


# The surface


def test_places_are_coefficients_of_two_digits_for_each_push() -> None:
    found = places((0, 2), (0.1, 0.3), -1, [4.0, 1.0, 0.5], [10.0, 10.0, 20.0])
    assert [(p.layer, p.coefficient) for p in found] == [(0, -0.25), (0, -0.75), (2, -4.0), (2, -12.0)]
    assert [p.strength for p in found] == pytest.approx([0.1, 0.3, 0.1, 0.3])
    (rounded,) = places((0,), (0.1,), 1, [3.0], [10.0])
    assert rounded.coefficient == 0.33
    assert rounded.strength == pytest.approx(0.099)
    with pytest.raises(SteeringError, match="the vector at layer 1 is zero"):
        places((1,), (0.1,), 1, [1.0, 0.0], [1.0, 1.0])


@pytest.mark.parametrize(("n_layers", "layers"), [(1, (0,)), (3, (0, 1, 2)), (30, (9, 11, 14, 16, 19, 21, 24, 26))])
def test_layers_are_spread_over_the_depth_where_vectors_steer(n_layers: int, layers: tuple[int, ...]) -> None:
    assert shown_layers(n_layers) == layers
    assert len(shown_layers(80)) == 8


def point(layer: int, strength: float, change: tuple[float, float, float], coherent: bool = True) -> Point:
    estimate = Estimate(*change, 8)
    effect = ArmEffect("arm", estimate, estimate, None, None, None, None, 0.0)
    return Point(Place(layer, strength, strength), effect, coherent)


def test_the_strongest_coherent_point_is_chosen_and_what_to_know_about_it_is_said() -> None:
    points = [
        point(1, 0.9, (40.0, 30.0, 50.0)),
        point(1, 0.3, (40.0, 26.0, 46.0)),  # as strong, and gentler
        point(2, 0.2, (30.0, 20.0, 40.0)),
        point(2, 0.1, (90.0, 80.0, 99.0), coherent=False),
    ]
    chosen = choose_point(points, 1)
    assert (chosen.place.layer, chosen.place.strength) == (1, 0.3)
    assert choose_point(points, -1) is points[2]
    sure = replace(point(3, 0.2, (20.0, 10.0, 30.0)), surely=True)
    assert choose_point([*points, sure], 1) is sure
    assert cliff_beyond(points, chosen.place) is None
    broken = [point(1, strength, (50.0, 40.0, 60.0), coherent=False) for strength in (0.6, 0.5, 0.2)]
    assert cliff_beyond([*points, *broken], chosen.place) == 0.5
    assert warnings_about(points, chosen, 1) == []
    assert any("0.90 of the residual's length" in each for each in warnings_about(points, points[0], 1))
    assert any("greatest strength that was tried" in each for each in warnings_about(points, points[0], 1))
    weak = point(3, 0.1, (1.0, -3.0, 5.0))
    assert any("not clear of zero" in each for each in warnings_about([weak], weak, 1))


def row(arm: str, direction: str, question: int, score: float | None) -> ArmRow:
    return ArmRow(question, 0, score, 2.0, None, "text", arm, direction)


def test_an_arm_is_compared_question_by_question() -> None:
    rows = [
        *(row("unsteered", "none", q, s) for q, s in ((0, 10.0), (1, 50.0), (2, None))),
        *(row("a", "vector", q, s) for q, s in ((0, 40.0), (1, 60.0), (2, 99.0))),
        *(row("a", "random", q, s) for q, s in ((0, 15.0), (1, 45.0), (2, 0.0))),
        row("b", "vector", 0, None),
    ]
    effect = arm_effect(rows, "a")
    assert effect is not None
    assert effect.change.mean == pytest.approx((30 + 10) / 2)  # question 2 has nothing to be compared with
    assert effect.random is not None
    assert effect.random.mean == pytest.approx((5 - 5) / 2)
    assert effect.difference is not None
    assert effect.difference.mean == pytest.approx((25 + 15) / 2)
    assert effect.score.n == 3
    assert arm_effect(rows, "b") is None
    with pytest.raises(SteeringError, match="no unsteered response has a score"):
        arm_effect(rows[3:], "a")


def test_one_question_is_never_clear() -> None:
    rows = [row("unsteered", "none", 0, 10.0), row("a", "vector", 0, 90.0)]
    effect = arm_effect(rows, "a")
    assert effect is not None
    assert effect.change.low > 0
    assert not effect.clear
    rows += [row("unsteered", "none", 1, 10.0), row("a", "vector", 1, 90.0)]
    bare = arm_effect(rows, "a")
    assert bare is not None
    assert bare.clear == 0, "without a null nothing is clear"
    two = arm_effect([*rows, *(row("a", "random", question, 20.0) for question in (0, 1))], "a")
    assert two is not None
    assert (two.clear, two.to_json()["clear"]) == (1, 1)


def test_what_was_not_confirmed_is_warned_of() -> None:
    assert warnings_confirmed(point(1, 0.3, (9.0, 8.0, 10.0))) == []
    (said,) = warnings_confirmed(point(1, 0.3, (9.0, 8.0, 10.0), coherent=False))
    assert "text does not hold together" in said
    (said,) = warnings_confirmed(Point(Place(1, 0.3, 0.3), None, False))
    assert "has a score" in said


def test_the_summary_says_how_the_run_is_repeated_and_what_text_was_measured_by() -> None:
    backend, vectors = model()
    summary = tune(backend, vectors, settings(), command="persona-lens steer tune").summary
    assert summary["command"] == "persona-lens steer tune"
    assert (summary["trait"], summary["trait_hash"]) == (TRAIT.name, TRAIT.content_hash())
    assert summary["model"]["model"] == "planted"
    assert summary["vectors"] == vectors.content_hash
    assert summary["judge"]["judge"] == "likelihood"
    assert summary["measured"] == "nll"
    assert summary["unsteered"]["search"]["limit"] == pytest.approx(2.0 + settings().margin)
    # What is said of the curve is said of the questions that confirm.
    assert {each["effect"]["change"]["n"] for each in summary["curve"]} == {summary["confirm_questions"]}
    assert [each["coherent"] for each in summary["curve"]] == [each["coefficient"] <= 2 for each in summary["curve"]]
    html = page_of("tune", json.loads(json.dumps(summary)))
    assert "A clear effect: the chosen steering raises" in html
