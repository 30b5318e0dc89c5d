"""Where a model thinks before it answers, an axis, effects and persistence are of its answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from persona_lens.analysis.persistence import PersistSettings, persist
from persona_lens.analysis.persistence.plan import Plan
from persona_lens.backend import Backend, Part, Parts, Read, ReadError, ReadKind, TokenBatch
from persona_lens.core.progress import no_progress
from persona_lens.extraction.axis import AxisSettings, axis_experiment, persona_axis
from persona_lens.extraction.means import described_mean, mean_read
from persona_lens.models.chat import chat_format
from persona_lens.reports.kinds import page_of
from persona_lens.runs.rollouts import Rollout
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering import CrossSettings, Steering
from persona_lens.steering.crossing import Crossing, effects
from persona_lens.traits import load_default, load_trait
from persona_lens.vectors import PersonaVectors, load_vectors
from persona_lens.vectors.persona_space import ASSISTANT
from tests.backends.fixtures import thinking_backend, tiny_backend
from tests.extraction.test_axis import JUDGES, ROLES, Grading
from tests.tiny import D_MODEL, N_LAYERS

LAYER, SOME = 1, RolloutSettings(max_new_tokens=24, batch_size=16)


@pytest.fixture(scope="module")
def backend() -> Backend:
    return thinking_backend("transformers")


def vectors(backend: Backend, **more: Any) -> PersonaVectors:
    rows = torch.randn(N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(3))
    trait = load_trait("optimistic")
    found = {"response_mean": rows, **{name: rows * (n + 2) for n, name in enumerate(more.get("also", ()))}}
    known = {"trait": {"content_hash": trait.content_hash(), **trait.model_dump(mode="json")}}
    return PersonaVectors("optimistic", backend.info, found, known)


def answer_mean(backend: Backend, rollout: Rollout) -> torch.Tensor:
    """float32 [layers, d_model], of a plain pass; NaN where there is no answer."""
    asked, ids = rollout.request, rollout.response_ids
    prompt = chat_format(backend).encode(asked.system, asked.question)
    parts = Parts.of(backend.tokenizer).of_response(prompt, ids)
    read = backend.forward(TokenBatch.of([prompt], [ids]), (), [Read(ReadKind.ACTIVATIONS)]).reads["activations"][0]
    return read[:, -len(ids) :][:, torch.tensor([part is Part.ANSWER for part in parts])].mean(dim=1)


def test_an_axis_is_of_the_answers(backend: Backend, tmp_path: Path) -> None:
    settings = AxisSettings(questions=3, least=1, rollouts=SOME)
    run = persona_axis(backend, tmp_path / "run", roles=ROLES, settings=settings, judges=JUDGES)
    told = run.summary["thinking"]
    assert told["default_reduction"] == run.vectors.default_reduction == "answer_mean"
    assert told["kept_responses_with_thinking"] > 0
    assert told == run.vectors.provenance["thinking"]
    rows = [r for r in run.rollouts if r.request.labels["role"] == ASSISTANT and r.response_ids]
    means = torch.stack([answer_mean(backend, each) for each in rows])
    there = means.flatten(1).isfinite().all(dim=1)
    torch.testing.assert_close(run.space.default, means[there].mean(dim=0), rtol=1e-3, atol=1e-4)
    stored = load_vectors(tmp_path / "run")
    assert stored.levels is not None
    assert stored.levels.reduction == "answer_mean"
    stored.level(LAYER, 25)
    assert "without the thinking before them" in " ".join(page_of("axis", run.summary).split())


def test_nothing_changes_for_a_model_that_does_not_think() -> None:
    plain = tiny_backend("transformers")
    asked = axis_experiment(plain, ROLES, load_default(), AxisSettings(3), chat_format(plain))
    assert [read.kind for read in asked.reads] == [ReadKind.RESPONSE_MEAN]
    own = vectors(plain)
    crossing = Crossing(
        plain, {"a": Steering.parse("optimistic@1:+1", own)}, {"optimistic": own}, CrossSettings(layer=1)
    )
    assert crossing.mean is ReadKind.RESPONSE_MEAN
    assert described_mean(crossing.mean) == {}


def test_a_named_reduction_says_which_mean_is_read(backend: Backend) -> None:
    chat, plain = chat_format(backend), chat_format(tiny_backend("transformers"))
    for reduction, thinks, does_not in (
        ("", "answer_mean", "response_mean"),
        ("response_mean", "answer_mean", "response_mean"),
        ("prompt_last", "answer_mean", "response_mean"),
        ("thinking_mean", "thinking_mean", "thinking_mean"),
    ):
        assert (mean_read(chat, reduction), mean_read(plain, reduction)) == (thinks, does_not)
    own = vectors(tiny_backend("transformers"), also=("thinking_mean",))
    settings = CrossSettings(reduction="thinking_mean", rollouts=SOME, layer=LAYER)
    crossing = Crossing(
        own_backend := tiny_backend("transformers"),
        {"a": Steering.parse("optimistic@1:+1", own)},
        {"optimistic": own},
        settings,
        {"optimistic": Grading("ghost")},
    )
    assert own_backend is crossing.backend
    with pytest.raises(ReadError, match="no thinking to read"):
        crossing.work()  # as a dry run asks


def test_effects_are_projections_of_answers(backend: Backend) -> None:
    own = vectors(backend)
    settings = CrossSettings(questions=2, random_directions=0, layer=LAYER, rollouts=SOME)
    arms = {"a": Steering.parse("optimistic@1:+0.1", own)}
    found = effects(backend, arms, {"optimistic": own}, settings, judges={"optimistic": Grading("ghost")})
    assert found.config["mean"] == "answer_mean"
    crossing = Crossing(backend, arms, {"optimistic": own}, settings, {"optimistic": Grading("ghost")})
    rollouts = crossing.experiment.run().rollouts
    unit, values = own.rows()[LAYER] / own.rows()[LAYER].norm(), []
    for row, rollout in zip(found.answers, rollouts, strict=True):
        wanted = float(answer_mean(backend, rollout)[LAYER] @ unit)
        value = row.text_projections["optimistic"]
        values.append(value)
        assert (value is None) == (wanted != wanted)
        assert value is None or value == pytest.approx(wanted, rel=1e-3, abs=1e-3)
    assert any(value is not None for value in values)


def test_persistence_projects_answers(backend: Backend) -> None:
    own = vectors(backend)
    settings = PersistSettings(
        conversations=2, turns=1, last=1, ways=("all",), layer=LAYER, coefficient=0.1, known_questions=0,
        random_directions=1, rollouts=replace(SOME, max_new_tokens=16),
    )  # fmt: skip
    judges = {"optimistic": Grading("ghost")}
    plan = Plan.of(backend, {"optimistic": own}, settings, None, judges, None)
    aim = plan.aims["optimistic"]
    assert plan.config()["traits"]["optimistic"]["mean"] == plan.mean_of(aim) == "answer_mean"
    (turn,) = plan.held(plan.aims, None, no_progress)
    unit, read = own.rows()[LAYER] / own.rows()[LAYER].norm(), turn.means["answer_mean"]
    plain = [n for n, each in enumerate(turn.rollouts) if each.request.labels["way"] == "none"]
    for number in plain:
        wanted = float(answer_mean(backend, turn.rollouts[number])[LAYER] @ unit)
        value = aim.projection(read[number, 0])
        assert (value is None) == (wanted != wanted)
        assert value is None or value == pytest.approx(wanted, rel=1e-3, abs=1e-3)
    found = persist(backend, {"optimistic": own}, settings, judges=judges)
    rows = [row for row in found.answers if row.way == "none"]
    assert [row.projection for row in rows] == [aim.projection(read[number, 0]) for number in plain]
