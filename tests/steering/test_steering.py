"""Sweeps: every row steered by its own coefficient along its own direction, and figures that can be checked by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor

from persona_lens.backend import Backend, Edit, Positions, TokenError
from persona_lens.core.statistics import Estimate, auc, bootstrap_mean, separation
from persona_lens.extraction import ExtractionSettings, extract
from persona_lens.judging import Calibration, Exchange, LikelihoodJudge
from persona_lens.models.chat import chat_format
from persona_lens.runs import RunError
from persona_lens.runs.rollouts import Rollouts
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering import SteeringError, SweepRow, SweepSettings, choose_layer, curve, effect, sweep
from persona_lens.steering.sweep import edits_of, plan_sweep
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors, VectorsError
from tests.backends.fixtures import tiny_backend
from tests.planted import PlantedBackend
from tests.tiny import D_MODEL, N_LAYERS

TRAIT = load_trait("optimistic")
CALIBRATION = Calibration(4.0, 0.5)
SHORT = RolloutSettings(max_new_tokens=6, batch_size=5)


def vectors_for(backend: Backend, seed: int = 0, scale: float = 3.0) -> PersonaVectors:
    """Random vectors with what a sweep needs of their provenance."""
    generator = torch.Generator().manual_seed(seed)
    rows = {
        name: torch.randn(N_LAYERS, D_MODEL, generator=generator) * scale for name in ("response_mean", "prompt_last")
    }
    provenance = {
        "trait": {"content_hash": TRAIT.content_hash(), **TRAIT.model_dump(mode="json")},
        "judge": {"calibration": CALIBRATION.to_json()},
    }
    return PersonaVectors("optimistic", backend.info, rows, provenance)


@pytest.fixture
def tiny() -> Backend:
    return tiny_backend("transformers")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the type checks that tests run under, as users run: the package's own messages show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# The plan


def test_the_plan_holds_every_setting_once_and_the_baseline_once() -> None:
    settings = SweepSettings(
        layers=(2, 0), coefficients=(1.0, -2.0, 0.0, 1.0), questions=3, samples=2, random_directions=2
    )
    requests = plan_sweep(TRAIT, settings)
    steered = [(d, layer, c) for layer in (2, 0) for d in ("vector", "random") for c in (-2.0, 1.0)]
    assert len(requests) == 3 * 2 * (1 + len(steered))
    for number in range(3):
        for sample in range(2):
            rows = [r for r in requests if (r.labels["question_number"], r.labels["sample"]) == (number, sample)]
            settings_of_rows = [(r.labels["direction"], r.labels["layer"], r.labels["coefficient"]) for r in rows]
            assert settings_of_rows == [("none", None, 0.0), *steered]
            assert len({r.seed for r in rows}) == 1  # paired: only the steering differs
            assert {r.question for r in rows} == {TRAIT.evaluation_questions[number]}
            assert {r.system for r in rows} == {None}
    assert len({r.seed for r in requests}) == 6


def test_the_null_can_be_left_out() -> None:
    requests = plan_sweep(TRAIT, SweepSettings(layers=(0,), questions=1, random_directions=0))
    assert [r.labels["direction"] for r in requests] == ["none"] + ["vector"] * 4


def test_choices_are_made_on_other_questions_than_results() -> None:
    choosing = plan_sweep(TRAIT, SweepSettings(layers=(0,), question_set="extraction"))
    final = plan_sweep(TRAIT, SweepSettings(layers=(0,)))
    assert {r.question for r in choosing} == set(TRAIT.extraction_questions)
    assert {r.question for r in final} == set(TRAIT.evaluation_questions)
    assert not {r.question for r in choosing} & {r.question for r in final}
    assert not {r.seed for r in choosing} & {r.seed for r in final}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layers": ()}, "layers must be given"),
        ({"layers": (1, 1)}, "each once"),
        ({"coefficients": ()}, "at least one of them not 0"),
        ({"coefficients": (0.0,)}, "at least one of them not 0"),
        ({"coefficients": (1.0, float("nan"))}, "finite"),
        ({"coefficients": (float("inf"),)}, "finite"),
        ({"samples": 0}, "at least 1"),
        ({"questions": 0}, "at least 1"),
        ({"random_directions": -1}, "at least 0"),
        ({"question_set": "evaluations"}, "question_set is evaluation or extraction, got 'evaluations'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SteeringError, match=message):
        SweepSettings(**{"layers": (0,), **wrong})


# The edits of a batch


def total(edits: Sequence[Edit], row: int) -> Tensor:
    """What is added to a row's residuals, by layer: [layers, d_model]."""
    added = torch.zeros(N_LAYERS, D_MODEL)
    for edit in edits:
        assert isinstance(edit.coefficient, Tensor)
        added[edit.layer] += edit.coefficient[row] * edit.direction
    return added


def test_each_row_gets_exactly_its_own(tiny: Backend) -> None:
    vectors = vectors_for(tiny)
    settings = SweepSettings(
        layers=(0, 2), questions=4, random_directions=3, seed=11, positions=Positions.RESPONSE, reduction="prompt_last"
    )
    requests = plan_sweep(TRAIT, settings)
    order = np.random.default_rng(0).permutation(len(requests))
    edits_for = edits_of(vectors, settings)
    for start in range(0, len(order), 17):
        batch = [requests[i] for i in order[start : start + 17]]
        edits = edits_for(batch)
        assert {edit.positions for edit in edits} == {Positions.RESPONSE}
        for row, request in enumerate(batch):
            labels, expected = request.labels, torch.zeros(N_LAYERS, D_MODEL)
            if labels["direction"] != "none":
                null = vectors.random_like(11 + labels["question_number"] % 3)
                source = vectors if labels["direction"] == "vector" else null
                expected[labels["layer"]] = labels["coefficient"] * source.vector(labels["layer"], "prompt_last")
            assert torch.equal(total(edits, row), expected)


def test_the_null_is_several_directions_of_the_vectors_norm(tiny: Backend) -> None:
    vectors = vectors_for(tiny)
    settings = SweepSettings(layers=(1,), coefficients=(1.0,), questions=10, random_directions=5)
    requests = [r for r in plan_sweep(TRAIT, settings) if r.labels["direction"] == "random"]
    edits = edits_of(vectors, settings)(requests)
    directions = torch.stack([total(edits, row)[1] for row in range(10)])
    torch.testing.assert_close(directions.norm(dim=1), vectors.norms()[1].expand(10))
    assert torch.equal(directions[:5], directions[5:])  # question i is steered along direction i modulo 5
    units = torch.nn.functional.normalize(directions[:5], dim=1)
    assert (units @ units.T - torch.eye(5)).abs().max() < 0.7
    assert (units @ torch.nn.functional.normalize(vectors[1], dim=0)).abs().max() < 0.7


def test_a_batch_without_steered_rows_has_no_edits(tiny: Backend) -> None:
    settings = SweepSettings(layers=(1,), questions=2)
    baseline = [r for r in plan_sweep(TRAIT, settings) if r.labels["direction"] == "none"]
    assert edits_of(vectors_for(tiny), settings)(baseline) == []


# Sweeps over a real architecture


def test_steered_and_unsteered_rows_of_one_batch_are_what_each_is_alone(tiny: Backend) -> None:
    vectors = vectors_for(tiny)
    settings = SweepSettings(
        layers=(0, 1), coefficients=(-1.0, 1.0), questions=2, random_directions=2, rollouts=SHORT, seed=4
    )
    rows = sweep(tiny, vectors, settings).answers
    requests = plan_sweep(TRAIT, settings)
    chat = chat_format(tiny)
    texts = set()
    for request, row in zip(requests, rows, strict=True):
        labels = request.labels
        null = vectors.random_like(4 + labels["question_number"] % 2)
        source = vectors if labels["direction"] == "vector" else null
        edits = [] if labels["layer"] is None else [source.edit(labels["layer"], labels["coefficient"])]
        (alone,) = Rollouts(tiny, chat, [request], SHORT, edits_for=lambda _, edits=edits: edits).run()  # type: ignore[misc]
        assert row.text == alone.response
        texts.add((row.question, row.text))
    assert len(texts) > len(rows) / 2  # steering changes what is said, else this shows nothing


def test_the_judge_of_a_sweep_is_unsteered_and_calibrated(tiny: Backend, tmp_path: Path) -> None:
    settings = SweepSettings(layers=(1,), coefficients=(1.0,), questions=2, random_directions=0, rollouts=SHORT)
    rows = sweep(tiny, vectors_for(tiny), settings, folder=tmp_path).answers
    judge = LikelihoodJudge(tiny, chat_format(tiny), TRAIT, CALIBRATION)
    kept = [json.loads(line) for line in (tmp_path / "sweep-rollouts.jsonl").read_text().splitlines()]
    for row in rows:
        (ids,) = (tuple(k["response_ids"]) for k in kept if (k["coefficient"], k["question_number"]) == key_of(row))
        exchange = Exchange(TRAIT.evaluation_questions[row.question], row.text, ids)
        assert row.score == pytest.approx(judge.judge([exchange])[0].trait.value, abs=1e-3)
        (evidence,) = judge.evidence([exchange])
        assert row.nll == pytest.approx(evidence.nll if evidence else None, abs=1e-4)


def key_of(row: SweepRow) -> tuple[float, int]:
    return row.coefficient, row.question


def test_a_sweep_is_kept_and_gone_on_with(tiny: Backend, tmp_path: Path) -> None:
    vectors = vectors_for(tiny)
    settings = SweepSettings(layers=(1,), questions=3, random_directions=1, rollouts=SHORT)
    in_memory = sweep(tiny, vectors, settings).answers
    rows = sweep(tiny, vectors, settings, folder=tmp_path).answers
    assert rows == in_memory
    kept = [json.loads(line) for line in (tmp_path / "sweep-scores.jsonl").read_text().splitlines()]
    assert kept == [{"row": number, **asdict(row)} for number, row in enumerate(rows)]
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != ".lock"}
    assert files.keys() == {
        "run.json",
        "summary.json",
        *(f"sweep-{name}.jsonl" for name in ("rollouts", "judgements", "scores")),
    }
    os.truncate(tmp_path / "sweep-rollouts.jsonl", len(files["sweep-rollouts.jsonl"]) // 2)
    (tmp_path / "sweep-judgements.jsonl").unlink()
    (tmp_path / "sweep-scores.jsonl").unlink()
    assert sweep(tiny, vectors, settings, folder=tmp_path).answers == rows
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != ".lock"} == files
    with pytest.raises(RunError, match=r"settings\.seed: 0 -> 1"):
        sweep(tiny, vectors, replace(settings, seed=1), folder=tmp_path)
    with pytest.raises(RunError, match="vectors: "):
        sweep(tiny, vectors_for(tiny, seed=1), settings, folder=tmp_path)


def test_vectors_of_another_model_are_refused_unless_allowed(tiny: Backend) -> None:
    other = replace(tiny.info, weights="sha256:other")
    vectors = replace(vectors_for(tiny), model=other)
    settings = SweepSettings(layers=(1,), coefficients=(1.0,), questions=1, random_directions=0, rollouts=SHORT)
    with pytest.raises(VectorsError, match="another model than the one opened: weights: sha256:other and "):
        sweep(tiny, vectors, settings)
    assert (
        sweep(tiny, vectors, settings, allow_other_model=True).answers
        == sweep(tiny, vectors_for(tiny), settings).answers
    )


def test_a_sweep_that_cannot_be_run_claims_no_folder(tiny: Backend, tmp_path: Path) -> None:
    vectors = vectors_for(tiny)
    folder = tmp_path / "run"
    with pytest.raises(VectorsError, match="layer 3 does not exist: the model has layers 0 to 2"):
        sweep(tiny, vectors, SweepSettings(layers=(1, 3)), folder=folder)
    with pytest.raises(VectorsError, match="no reduction 'mean'"):
        sweep(tiny, vectors, SweepSettings(layers=(1,), reduction="mean"), folder=folder)
    with pytest.raises(SteeringError, match="21 questions asked for, trait optimistic has 20 for evaluation"):
        sweep(tiny, vectors, SweepSettings(layers=(1,), questions=21), folder=folder)
    with pytest.raises(VectorsError, match="carry no calibration"):
        sweep(tiny, replace(vectors, provenance={"trait": vectors.provenance["trait"]}), SweepSettings(layers=(1,)))
    with pytest.raises(VectorsError, match="carry no trait; name it"):
        sweep(tiny, replace(vectors, provenance={}), SweepSettings(layers=(1,)), folder=folder)
    with pytest.raises(TokenError):
        sweep(tiny, vectors, SweepSettings(layers=(1,), rollouts=RolloutSettings(max_new_tokens=0)), folder=folder)
    assert not folder.exists()


def test_a_vector_with_nan_steers_nothing(tiny: Backend) -> None:
    vectors = vectors_for(tiny)
    vectors.directions["response_mean"][1, 0] = torch.nan
    with pytest.raises(VectorsError, match="NaN"):
        sweep(tiny, vectors, SweepSettings(layers=(1,), questions=1, rollouts=SHORT))


# A sweep whose every figure is known


def test_planted_steering_has_the_effect_that_was_planted() -> None:
    """Adding c vectors makes a response lean by c; a random direction by c times its cosine with the vector."""
    backend = PlantedBackend(TRAIT)
    vectors = extract(backend, TRAIT, settings=ExtractionSettings(questions=4)).vectors
    settings = SweepSettings(layers=(0, 2), coefficients=(-1.0, 0.5, 2.0), questions=7, random_directions=3, seed=9)
    rows = sweep(backend, vectors, settings).answers
    calibration = Calibration(**vectors.provenance["judge"]["calibration"])

    def scored(leaning: float) -> float:
        return calibration.score(round(leaning, 3))

    for layer in (0, 2):
        points = curve(rows, layer)
        assert [p.coefficient for p in points] == [-1.0, 0.0, 0.5, 2.0]
        for point in points:  # all questions the same, so that the interval has no width
            assert point.score.mean == pytest.approx(scored(point.coefficient), abs=0.05)
            assert point.score.high - point.score.low == pytest.approx(0, abs=0.05)
            assert point.nll is not None
            assert point.nll.mean == pytest.approx(2)
        cosines = [
            float(torch.cosine_similarity(vectors.random_like(9 + q % 3)[layer], vectors[layer], dim=0))
            for q in range(7)
        ]
        nulls = [scored(2 * c) - scored(-c) for c in cosines]
        found = effect(rows, layer)
        assert found.vector.mean == pytest.approx(scored(2.0) - scored(-1.0), abs=0.1)
        assert found.random is not None
        assert found.random.mean == pytest.approx(fmean(nulls), abs=0.3)
        assert found.difference is not None
        assert found.difference.mean == pytest.approx(found.vector.mean - found.random.mean)
        random_points = curve(rows, layer, "random")
        assert random_points[-1].score.mean == pytest.approx(fmean(scored(2 * c) for c in cosines), abs=0.3)


# Figures from rows written by hand


def row(
    direction: str,
    layer: int | None,
    coefficient: float,
    question: int,
    score: float | None,
    nll: float | None = 2.0,
    sample: int = 0,
) -> SweepRow:
    return SweepRow(question, sample, score, nll, None, "…", direction, layer, coefficient)


ROWS = [
    row("none", None, 0.0, 0, 40.0),
    row("none", None, 0.0, 1, 60.0, 3.0),
    row("vector", 5, -1.0, 0, 10.0),
    row("vector", 5, -1.0, 0, 20.0, 4.0, sample=1),  # two samples of question 0: averaged first
    row("vector", 5, -1.0, 1, 35.0),
    row("vector", 5, 2.0, 0, 80.0),
    row("vector", 5, 2.0, 1, 90.0),
    row("vector", 5, 2.0, 2, 99.0),  # a question that has no other end
    row("random", 5, -1.0, 0, 41.0),
    row("random", 5, -1.0, 1, 50.0),
    row("random", 5, 2.0, 0, 45.0),
    row("random", 5, 2.0, 1, None, None),
    row("vector", 7, 2.0, 0, 50.0),
    row("vector", 7, 2.0, 1, 70.0),
]


def test_the_curve_is_a_mean_over_questions_of_means_over_samples() -> None:
    points = curve(ROWS, 5)
    assert [p.coefficient for p in points] == [-1.0, 0.0, 2.0]
    assert [p.score.mean for p in points] == pytest.approx([(15 + 35) / 2, 50, (80 + 90 + 99) / 3])
    assert [p.nll.mean for p in points if p.nll] == pytest.approx([(3 + 2) / 2, 2.5, 2])
    assert [p.score.n for p in points] == [2, 2, 3]
    assert [p.score.mean for p in curve(ROWS, 5, "random")] == pytest.approx([45.5, 50, 45])
    assert json.loads(json.dumps(points[0].to_json()))["score"]["mean"] == 25.0


def test_the_effect_is_taken_question_by_question() -> None:
    found = effect(ROWS, 5)
    assert (found.layer, found.low, found.high) == (5, -1.0, 2.0)
    assert found.vector.mean == pytest.approx(((80 - 15) + (90 - 35)) / 2)
    assert found.vector.n == 2
    assert found.random == Estimate(4.0, 4.0, 4.0, 1)
    assert found.difference == Estimate(61.0, 61.0, 61.0, 1)
    # Each end against the unsteered responses, which score 40 and 60.
    assert found.promotion is not None
    assert found.suppression is not None
    assert (found.promotion.vector.mean, found.suppression.vector.mean) == pytest.approx((35, -25))
    assert found.promotion.random == Estimate(5.0, 5.0, 5.0, 1)
    assert found.suppression.random is not None
    assert found.suppression.random.mean == pytest.approx((1 - 10) / 2)


def test_an_effect_with_one_sided_coefficients_starts_at_the_unsteered() -> None:
    found = effect(ROWS, 7)
    assert (found.low, found.high) == (0.0, 2.0)
    assert found.vector.mean == pytest.approx(((50 - 40) + (70 - 60)) / 2)
    assert found.random is None
    assert found.difference is None
    assert found.to_json()["random"] is None
    assert found.promotion is not None
    assert found.promotion.vector == found.vector
    assert found.suppression is None


def test_what_was_not_swept_has_no_figures() -> None:
    for ask in (curve, effect):
        with pytest.raises(SteeringError, match="at layer 6; the sweep has layers 5, 7"):
            ask(ROWS, 6)
    with pytest.raises(SteeringError, match="along the random at layer 7"):
        curve(ROWS, 7, "random")
    silent = [replace(r, score=None, nll=None) if r.coefficient == 2.0 else r for r in ROWS]
    with pytest.raises(SteeringError, match="no response at layer 5, coefficient 2 has a score"):
        curve(silent, 5)
    empty = [replace(r, text=" ") for r in silent]
    with pytest.raises(SteeringError, match="since all are empty; if the model was still thinking when its tokens"):
        curve(empty, 5)
    with pytest.raises(SteeringError, match="no question has a response at both ends"):
        effect(silent, 5)


def layers_of(figures: dict[int, tuple[float, float | None]]) -> list[SweepRow]:
    """A sweep of two questions: by layer, the effect of coefficient 1 and the surprise there."""
    rows = [row("none", None, 0.0, q, 50.0, 2.0) for q in (0, 1)]
    for layer, (gain, nll) in figures.items():
        score = None if nll is None else 50.0 + gain
        rows += [row("vector", layer, 1.0, q, score, nll) for q in (0, 1)]
        rows += [row("vector", layer, -1.0, q, 50.0, 2.0) for q in (0, 1)]
    return rows


@pytest.mark.parametrize(
    ("figures", "chosen"),
    [
        ({3: (10, 2.5), 4: (30, 2.9), 5: (20, 2.0)}, 4),
        ({3: (10, 2.5), 4: (30, 3.1), 5: (20, 2.0)}, 5),  # the strongest talks nonsense
        ({3: (10, 2.5), 4: (30, 3.0)}, 4),  # at the margin is within it
        ({3: (10, 5.0), 4: (30, 6.0)}, 3),  # all do: the one that does least
        ({3: (-30, 2.0), 4: (5, 2.0)}, 4),  # the wrong way is no effect
        ({3: (90, None), 4: (5, 2.0)}, 4),  # saying nothing is not coherent
        ({3: (90, None), 4: (5, 9.0)}, 4),
    ],
)
def test_the_layer_with_the_strongest_coherent_effect_is_chosen(figures: Any, chosen: int) -> None:
    assert choose_layer(layers_of(figures)) == chosen


def test_the_margin_of_coherence_can_be_set() -> None:
    rows = layers_of({3: (10, 2.5), 4: (30, 3.1)})
    assert choose_layer(rows, margin=1.2) == 4
    assert choose_layer(rows, margin=0.1) == 3


def test_a_layer_is_incoherent_at_either_end() -> None:
    rows = layers_of({3: (10, 2.5), 4: (30, 2.5)})
    rows = [replace(r, nll=9.0) if (r.layer, r.coefficient) == (4, -1.0) else r for r in rows]
    assert choose_layer(rows) == 3


def test_without_unsteered_text_there_is_no_choice() -> None:
    rows = [replace(r, score=None, nll=None) if r.direction == "none" else r for r in ROWS]
    with pytest.raises(SteeringError, match="every unsteered response is empty"):
        choose_layer(rows)


# Statistics


def test_the_interval_is_seeded() -> None:
    values = [1.01, 5.2, 2.37, 8.9, 4.4, 6.13]
    assert bootstrap_mean(values) == bootstrap_mean(values) == bootstrap_mean(values, seed=0)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values)
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    bootstrap_mean(values)
    assert np.random.random() == expected  # nobody else's random numbers are used up


def test_intervals_of_too_little() -> None:
    assert bootstrap_mean([3.0]) == Estimate(3.0, 3.0, 3.0, 1)
    assert bootstrap_mean([3.0] * 5) == Estimate(3.0, 3.0, 3.0, 5)
    with pytest.raises(ValueError, match="nothing to take the mean of"):
        bootstrap_mean([])


def test_auc_and_separation_by_hand() -> None:
    positive, negative = np.array([1.0, 2.0, 2.0, 5.0]), np.array([0.0, 2.0, 3.0])
    wins = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    assert auc(positive, negative) == pytest.approx(np.mean(wins))
    assert auc(np.array([2.0]), np.array([1.0])) == 1.0
    deviation = np.sqrt((positive.var(ddof=1) + negative.var(ddof=1)) / 2)
    assert separation(positive, negative) == pytest.approx((2.5 - 5 / 3) / deviation)
    assert separation(np.ones(3), np.ones(3)) == 0.0
