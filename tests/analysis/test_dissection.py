"""Dissections of a planted vector: the feature that is the vector steers as the vector does, the others do not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.dissection import Dissection, DissectSettings, dissect, dissection_work
from persona_lens.analysis.dissection.examples import feature_effects, feature_steering
from persona_lens.analysis.dissection.features import Features
from persona_lens.judging import Calibration
from persona_lens.models.chat import chat_format
from persona_lens.reports.kinds import page_of
from persona_lens.runs import RunError
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering import ArmRow
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors, Tuned, VectorsError
from tests.analysis.dictionaries import LAYER, dictionary, directions
from tests.planted import PlantedBackend
from tests.tiny import D_MODEL, N_LAYERS

TRAIT = load_trait("optimistic")
SETTINGS = DissectSettings(
    show=4,
    pursuit=8,
    steered=2,
    random_features=3,
    coefficient=2.0,
    questions=3,
    rollouts=RolloutSettings(20, batch_size=50),
)
OWN = 17  # the feature that is the vector


@pytest.fixture
def backend() -> PlantedBackend:
    return PlantedBackend(TRAIT)


def vectors_of(backend: PlantedBackend) -> PersonaVectors:
    calibration = Calibration(slope=1.0, intercept=0.0)
    provenance = {"trait": TRAIT.model_dump(mode="json"), "judge": {"calibration": calibration.to_json()}}
    return PersonaVectors(TRAIT.name, backend.info, {"response_mean": backend.planted["response_mean"]}, provenance)


def planted_dictionary(backend: PlantedBackend, **changed: Any) -> Features:
    rows = directions()
    v = backend.planted["response_mean"][LAYER]
    rows = rows - torch.outer(rows @ v / (v @ v), v)  # at right angles to the vector
    rows[OWN] = v / 7
    return dictionary(rows, **changed)


def run(backend: PlantedBackend, folder: Path | None = None, **changed: Any) -> Dissection:
    return dissect(
        backend, vectors_of(backend), planted_dictionary(backend), replace(SETTINGS, **changed), folder=folder
    )


def test_the_feature_that_is_the_vector_steers_as_it_does_and_clear_of_the_others(backend: PlantedBackend) -> None:
    found = run(backend)
    steering = found.summary["steering"]
    assert found.summary["ranking"]["top"][0] == {"feature": OWN, "cosine": pytest.approx(1)}
    assert steering["stand_out"] == [OWN]
    whole, own = found.effects["vector"], found.effects[f"feature_{OWN}"]
    assert whole is not None
    assert own is not None
    # Leaning 2 against 0, scored 100 / (1 + exp(-leaning)).
    assert own.change.vector.mean == pytest.approx(100 / (1 + 2.718281828**-2) - 50, abs=0.05)
    assert whole.change.vector.mean == pytest.approx(own.change.vector.mean)
    assert (own.beyond, own.random_features, own.stands_out) == (3, 3, True)
    assert own.change.random is not None
    assert own.change.random.mean == pytest.approx(0, abs=0.1)
    second = found.effects[f"feature_{steering['top'][1]}"]
    assert second is not None
    assert not second.stands_out
    for feature in steering["random"]:
        effect = found.effects[f"feature_{feature}"]
        assert effect is not None
        assert effect.change.random is None
        assert effect.random_features == 2, "a random feature stands beside the others, not beside itself"
    shown = {each["feature"] for end in ("top", "bottom") for each in found.summary["ranking"][end]}
    assert not shown & set(steering["random"])
    assert len(found.answers) == 3 * (1 + 1 + 2 + 3)


def test_towards_less_the_same_feature_is_clear_the_other_way(backend: PlantedBackend) -> None:
    found = run(backend, coefficient=-2.0)
    own = found.effects[f"feature_{OWN}"]
    assert own is not None
    assert own.change.vector.mean < -30
    assert own.stands_out
    assert found.summary["steering"]["stand_out"] == [OWN]


def row(arm: str, question: int, score: float | None) -> ArmRow:
    return ArmRow(question, 0, score, None, None, "text", arm, "none" if arm == "unsteered" else "vector")


def rows_of(**scores: float | None) -> list[ArmRow]:
    return [
        row(arm, question, None if score is None else score + question)
        for arm, score in scores.items()
        for question in range(4)
    ]


def test_one_random_feature_that_moves_the_score_as_far_is_enough_not_to_be_clear() -> None:
    scores = {"unsteered": 50.0, "vector": 55.0, "feature_1": 60.0, "feature_7": 50.0, "feature_8": 51.0}
    clear = feature_effects(rows_of(**scores), [1], [7, 8], 1.0)["feature_1"]
    assert clear is not None
    assert (clear.beyond, clear.stands_out) == (2, True)
    assert clear.change.difference is not None
    assert clear.change.difference.mean == pytest.approx(9.5)
    rival = feature_effects(rows_of(**{**scores, "feature_8": 61.0}), [1], [7, 8], 1.0)["feature_1"]
    assert rival is not None
    assert (rival.beyond, rival.stands_out) == (1, False)
    wrong_way = feature_effects(rows_of(**{**scores, "feature_1": 30.0}), [1], [7, 8], 1.0)["feature_1"]
    assert wrong_way is not None
    assert (wrong_way.beyond, wrong_way.stands_out) == (0, False)
    alone = feature_effects(rows_of(unsteered=50.0, vector=55.0, feature_1=60.0), [1], [], 1.0)["feature_1"]
    assert alone is not None
    assert (alone.beyond, alone.stands_out) == (None, False)
    silent = feature_effects(rows_of(**{**scores, "feature_1": None}), [1], [7, 8], 1.0)
    assert silent["feature_1"] is None


def test_a_single_feature_is_as_long_as_the_vectors_step(backend: PlantedBackend) -> None:
    vectors, features = vectors_of(backend), planted_dictionary(backend)
    (edit,) = feature_steering(vectors, features, 5, -1.5).edits()
    assert edit.layer == LAYER
    assert float(edit.direction.norm()) == pytest.approx(float(vectors[LAYER].norm()), rel=1e-5)
    assert float(torch.as_tensor(edit.coefficient)) == pytest.approx(-1.5)
    torch.testing.assert_close(edit.direction / edit.direction.norm(), features.unit(5))
    rows = torch.ones(N_LAYERS, D_MODEL)
    rows[1] = 0
    zero = PersonaVectors("none", backend.info, {"response_mean": rows})
    with pytest.raises(VectorsError, match="'none' at layer 1 is zero"):
        feature_steering(zero, features, 5, 1.0)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_a_run_that_was_stopped_ends_with_the_same_bytes(backend: PlantedBackend, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(backend, whole)
    run(backend, cut)
    (cut / "summary.json").unlink()
    rollouts = cut / "arms-rollouts.jsonl"
    rollouts.write_bytes(rollouts.read_bytes()[:100])
    before = len(backend.generated)
    run(backend, cut)
    assert len(backend.generated) > before
    assert files(whole) == files(cut)
    with pytest.raises(RunError, match=r"settings\.seed: 0 -> 1"):
        run(backend, cut, seed=1)
    (whole / "decomposition.json").write_text("{")
    with pytest.raises(RunError, match=r"decomposition\.json is damaged"):
        run(backend, whole)
    changed = (cut / "decomposition.json").read_text().replace('"norm": ', '"norm": 1')
    (cut / "decomposition.json").write_text(changed)
    with pytest.raises(RunError, match=r"decomposition\.json is damaged; remove it, and the same command makes it"):
        run(backend, cut)


def test_without_steering_no_model_runs_and_no_trait_is_needed(backend: PlantedBackend) -> None:
    bare = PersonaVectors(TRAIT.name, backend.info, {"response_mean": backend.planted["response_mean"]})
    found = dissect(backend, bare, planted_dictionary(backend), replace(SETTINGS, steered=0))
    assert found.summary["steering"] is None
    assert (found.answers, backend.generated) == ((), [])
    assert found.summary["pursuit"]["features"][0] == OWN
    assert found.summary["pursuit"]["shares"][0] == pytest.approx(1)
    assert all(max(each["shares"]) < 1 for each in found.summary["pursuit"]["random"])


def test_what_cannot_be_run_claims_no_folder(backend: PlantedBackend, tmp_path: Path) -> None:
    vectors, features = vectors_of(backend), planted_dictionary(backend)
    folder = tmp_path / "run"
    nothing = replace(SETTINGS, coefficient=None)
    with pytest.raises(
        AnalysisError, match=r"no coefficient was tuned for the response_mean vector of 'optimistic' at layer 1"
    ):
        dissect(backend, vectors, features, nothing, folder=folder)
    with pytest.raises(AnalysisError, match="trained on gpt2"):
        dissect(backend, vectors, planted_dictionary(backend, model="gpt2"), SETTINGS, folder=folder)
    assert not folder.exists()
    with pytest.raises(AnalysisError, match="only 32 are not among those shown"):
        dissect(backend, vectors, features, replace(SETTINGS, random_features=50))
    for bad in ({"show": 0}, {"questions": 0}, {"random_features": -1}, {"coefficient": 0.0}):
        with pytest.raises(AnalysisError):
            replace(SETTINGS, **bad)
    tuned = vectors.with_tuned(Tuned(LAYER, 2.0), {})
    assert dissect(backend, tuned, features, nothing).summary["steering"]["coefficient"] == 2.0


def test_random_features_are_drawn_from_those_that_are_alive(
    monkeypatch: pytest.MonkeyPatch, backend: PlantedBackend
) -> None:
    from persona_lens.analysis.dissection import run
    from persona_lens.analysis.dissection.examples import Activity

    counts = torch.zeros(40, dtype=torch.long)
    counts[[2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24]] = 1
    monkeypatch.setattr(run, "find_examples", lambda *a, **k: Activity(9, counts, ()))
    vectors, features = vectors_of(backend), planted_dictionary(backend)
    chosen = {
        each["feature"]
        for seed in range(5)
        for each in run.decompose(backend, vectors, features, replace(SETTINGS, seed=seed), ["text"])["random_features"]
    }
    assert chosen <= {i for i in range(40) if counts[i]}
    assert len(chosen) > 3


def test_a_dry_run_says_how_many_responses_there_will_be(backend: PlantedBackend) -> None:
    work = dissection_work(backend, vectors_of(backend), planted_dictionary(backend), SETTINGS, chat_format(backend))
    assert work[0].rows == 3 * (1 + 1 + 2 + 3)
    assert backend.generated == []
    nothing = replace(SETTINGS, steered=0)
    assert (
        dissection_work(backend, vectors_of(backend), planted_dictionary(backend), nothing, chat_format(backend)) == ()
    )


def test_the_report_says_what_was_found_and_no_more(backend: PlantedBackend) -> None:
    summary: dict[str, Any] = dict(run(backend).summary)
    page = page_of("dissection", summary, "1.0")
    assert "1 of 2 top features stands out from the random features" in page
    assert "What is the vector of “optimistic” made of?" in page
    assert page == page_of("dissection", json.loads(json.dumps(summary)), "1.0")
    assert "<script" not in page
    steering = dict(summary["steering"])
    unclear = page_of("dissection", {**summary, "steering": {**steering, "stand_out": []}}, "1.0")
    assert "None of 2 top features stands out from the random features" in unclear
    plain = page_of("dissection", {**summary, "steering": None}, "1.0")
    assert "Nothing was steered" in plain
    hostile = {**summary["features"], "name": "<script>alert(1)</script>"}
    assert "<script" not in page_of("dissection", {**summary, "features": hostile}, "1.0")


def test_the_report_shows_examples_and_links(backend: PlantedBackend) -> None:
    summary: dict[str, Any] = dict(run(backend).summary)
    ends = [each["feature"] for end in ("top", "bottom") for each in summary["ranking"][end]]
    example = {"activation": 2.0, "before": "a <b>", "token": "sunny", "after": " day", "text": 0}
    corpus = {
        "texts": 3,
        "tokens": 30,
        "alive": 12,
        "features": [{"feature": i, "share": 0.1, "examples": [example]} for i in ends],
    }
    links = {str(OWN): f"https://www.neuronpedia.org/m/s/{OWN}"}
    page = page_of("dissection", {**summary, "corpus": corpus, "links": links}, "1.0")
    assert "a &lt;b&gt;<b>sunny</b> day" in page
    assert f'<a href="https://www.neuronpedia.org/m/s/{OWN}"' in page
