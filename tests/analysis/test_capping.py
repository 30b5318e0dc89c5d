"""Caps of the axis: which are tried, what is taken, what it is held against, and that the choice can be used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.bench import CONFIRM, SEARCH, Bench, CapSettings
from persona_lens.analysis.capping import AxisRun, Candidate, Capping, _best, _judged_costs, _usual_ranges, cap_axis
from persona_lens.backend import Backend
from persona_lens.core.progress import no_progress
from persona_lens.core.statistics import Estimate
from persona_lens.extraction.axis import AxisSettings, persona_axis
from persona_lens.models.chat import chat_format
from persona_lens.reports.result import Result
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering.given import load_steering
from persona_lens.traits import load_default, load_role
from persona_lens.vectors import PersonaVectors, VectorsError
from persona_lens.vectors.persona_space import ASSISTANT
from tests.backends.fixtures import tiny_backend

ROLES = {name: load_role(name) for name in ("pirate", "ghost", "doctor", "void", "cat")}
DEFAULT = load_default()
ROLLOUTS = RolloutSettings(max_new_tokens=5, batch_size=8)
TINY = CapSettings(
    percentiles=(50.0, 90.0),
    ranges=((0, 1), (1, 1)),
    roles=4,
    search_questions=1,
    confirm_questions=2,
    ordinary_questions=3,
    random_directions=2,
    accept_loss=1.0,
    accept_surprise=100.0,
    limit=4,
    rollouts=ROLLOUTS,
)


@pytest.fixture(scope="module")
def backend() -> Backend:
    return tiny_backend("transformers")


@pytest.fixture(scope="module")
def axis(backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> AxisRun:
    folder = tmp_path_factory.mktemp("axis") / "run"
    settings = AxisSettings(questions=2, least=1, rollouts=ROLLOUTS)
    persona_axis(backend, folder, roles=list(ROLES.values()), settings=settings, progress=no_progress)
    return AxisRun.load(folder)


@pytest.fixture(scope="module")
def found(backend: Backend, axis: AxisRun, tmp_path_factory: pytest.TempPathFactory) -> Capping:
    folder = tmp_path_factory.mktemp("cap") / "run"
    return cap_axis(backend, axis, folder, settings=TINY, progress=no_progress)


def test_every_range_is_tried_at_every_percentile_with_a_threshold_a_layer(found: Capping, axis: AxisRun) -> None:
    texts = [each.text for each in found.candidates]
    assert texts == [f"assistant@{place}:floor(p{p})" for place in ("0-1", "1") for p in (50, 90)]
    from persona_lens.steering import Steering

    edits = Steering.parse("assistant@0-1:floor(p90)", axis.vectors).edits()
    assert [edit.threshold for edit in edits] == [axis.vectors.level(layer, 90) for layer in (0, 1)]


def test_what_was_chosen_can_be_used_and_stands_beside_random_directions(found: Capping) -> None:
    assert found.folder is not None
    if found.steering is None:  # a random model need not be kept from anything
        assert found.summary["confirmed"] is None
    else:
        assert load_steering(found.folder / "steering.safetensors") == found.steering
        assert set(found.summary["confirmed"]) == {"persona", "surprise", "accuracy"}
        assert all(each["random"] is not None for each in found.summary["confirmed"].values())
        assert {row["arm"] for row in found.rows if row["part"] == "confirm"} >= {"uncapped", "random 0", "random 1"}
    searched, confirmed = found.summary["roles"]["search"], found.summary["roles"]["confirmation"]
    assert not set(searched) & set(confirmed)
    asked = {
        part: {row["question_number"] for row in found.rows if row["part"] == part} for part in ("search", "confirm")
    }
    assert asked["search"] == {0}
    assert asked["confirm"] in (set(), {1, 2})
    assert all(each.surprise.n <= 3 for each in found.candidates)


def test_roles_and_the_default_are_asked_other_questions_in_either_part(backend: Backend, axis: AxisRun) -> None:
    bench = Bench(backend, chat_format(backend), TINY, axis.roles(), DEFAULT)
    asked = {
        (part, request.labels["role"] == ASSISTANT, request.labels["question_number"])
        for part in (SEARCH, CONFIRM)
        for request in bench.requests(part)
    }
    assert {number for part, plain, number in asked if (part, plain) == (SEARCH, True)} == {3, 4, 5}
    assert {number for part, plain, number in asked if (part, plain) == (CONFIRM, True)} == {6, 7, 8}
    assert len({number for _, _, number in asked}) == len(asked) == 9


def test_a_random_direction_is_floored_at_the_percentile_of_its_own_projections(axis: AxisRun) -> None:
    ((edit,),) = axis.randoms([1], 25.0, [3])
    from persona_lens.vectors.samples import saved_means

    shape = (axis.space.model.n_layers, axis.space.model.d_model)
    means = saved_means(axis.folder, "response_mean", axis.responses, shape)
    along = torch.stack(
        [torch.from_numpy(mean[1]).float() @ edit.direction / edit.direction.norm() for _, mean in means]
    )
    assert edit.threshold == pytest.approx(float(along.double().quantile(0.25)), abs=1e-4)


def test_a_run_that_is_repeated_after_a_loss_ends_with_the_same_bytes(
    found: Capping, backend: Backend, axis: AxisRun
) -> None:
    assert found.folder is not None
    before = {file.name: file.read_bytes() for file in found.folder.rglob("*") if file.is_file()}
    for name in ("summary.json", "cap-scores.jsonl", "search-01-rollouts.jsonl", "search-02-capability.jsonl"):
        (found.folder / name).unlink()
    cap_axis(backend, axis.folder, found.folder, settings=TINY, progress=no_progress)
    assert {file.name: file.read_bytes() for file in found.folder.rglob("*") if file.is_file()} == before
    stored = Result.load(found.folder)
    assert stored.verdict == found.verdict
    assert "<svg" in stored.report()


def candidate(text: str, persona: float, surprise: float, accuracy: float) -> Candidate:
    changes = [Estimate(value, value - 1, value + 1, 8) for value in (persona, surprise, accuracy)]
    return Candidate(text, changes[0], changes[1], changes[2])


def test_the_strongest_on_the_front_whose_costs_are_accepted_is_taken() -> None:
    given = [
        candidate("weak", -2, 0.01, 0),
        candidate("good", -10, 0.05, -0.01),
        candidate("beaten", -9, 0.06, -0.01),
        candidate("dear", -30, 0.5, -0.01),
        candidate("dull", -20, 0.05, -0.2),
    ]
    judged = _judged_costs(given, CapSettings())
    assert {each.text: each.on_front for each in judged} == {
        "weak": True,
        "good": True,
        "beaten": False,
        "dear": True,
        "dull": True,
    }
    assert _best(judged) == "good"
    assert _best(_judged_costs([candidate("worse", 3, 0, 0)], CapSettings())) is None


def test_usual_ranges_lie_in_the_second_half_without_the_last_layer() -> None:
    for n_layers in (4, 12, 30, 64, 80):
        ranges = list(_usual_ranges(n_layers))
        assert ranges
        assert all(n_layers // 2 <= first <= last < n_layers - 1 for first, last in ranges)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"percentiles": (120.0,)}, "from 0 to 100"),
        ({"percentiles": ()}, "at least one"),
        ({"ranges": ((3, 1),)}, "pairs of a first and a last layer"),
        ({"roles": 3}, "at least 4"),
        ({"search_questions": 0}, "at least 1"),
        ({"accept_loss": -1.0}, "at least 0"),
        ({"task": "persona_lens_basic"}, "there is no task 'persona_lens_basic'"),
        ({"ranges": ((0, 99),)}, "layer 99 does not exist"),
        ({"search_questions": 40}, "48 questions are asked for, 6 of them without a role, and there are 40"),
    ],
)
def test_what_cannot_be_is_refused(changed: dict[str, Any], said: str, backend: Backend, axis: AxisRun) -> None:
    def asked() -> None:
        cap_axis(backend, axis, roles=ROLES, default=DEFAULT, settings=replace(TINY, **changed), progress=no_progress)

    with pytest.raises(AnalysisError, match=said):
        asked()


def test_roles_that_are_gone_and_folders_that_hold_no_axis_are_named(
    backend: Backend, axis: AxisRun, tmp_path: Path
) -> None:
    with pytest.raises(AnalysisError, match="cannot be found; name its folder"):
        cap_axis(backend, axis, roles={}, settings=TINY, progress=no_progress)
    with pytest.raises(VectorsError, match="make it with `persona-lens axis MODEL`"):
        AxisRun.load(tmp_path)


def test_percentiles_of_other_vectors_come_from_their_baseline_or_are_refused(axis: AxisRun) -> None:
    plain = PersonaVectors("plain", axis.vectors.model, axis.vectors.directions)
    with pytest.raises(VectorsError, match="carry no percentiles for response_mean at layer 1"):
        plain.level(1, 25.0)
    known = {"mean": 1.0, "sd": 1.0, "means": [0.0, 4.0], "highest": [], "lowest": [], "prompts": [0.0, 0.0]}
    baseline = {"reduction": "response_mean", "system": None, "replies": 2, "tokens": 2, "layers": {"1": known}}
    assert plain.with_provenance(baseline=baseline).level(1, 25.0) == pytest.approx(1.0)
    damaged = axis.vectors.with_provenance(levels={"reduction": "response_mean", "responses": 1, "layers": {"1": [1]}})
    with pytest.raises(VectorsError, match="the percentiles that the vectors of 'assistant' carry is damaged"):
        damaged.level(1, 25.0)


def test_scores_are_kept_with_what_they_are_of(found: Capping) -> None:
    assert found.folder is not None
    rows = [json.loads(line) for line in (found.folder / "cap-scores.jsonl").read_text().splitlines()]
    assert {row["role"] for row in rows if row["part"] == "search"} == set(found.summary["roles"]["search"])
