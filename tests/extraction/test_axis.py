"""The assistant axis: what plain numpy makes of the same responses, what counts, and that a run goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from persona_lens.backend import Backend
from persona_lens.core.progress import Progress, no_progress
from persona_lens.extraction.axis import Axis, AxisSettings, persona_axis, plan_roles
from persona_lens.extraction.means import ExtractionError
from persona_lens.judging import Exchange, Judgement, Score
from persona_lens.reports.result import Result
from persona_lens.runs.settings import RolloutSettings
from persona_lens.traits import load_default, load_role
from persona_lens.vectors import VectorsError, load_vectors
from persona_lens.vectors.formats import export_vectors, import_vectors
from persona_lens.vectors.persona_space import ASSISTANT, load_space
from tests.backends.fixtures import ADAPTERS, tiny_backend

ROLES = [load_role(name) for name in ("pirate", "ghost", "doctor", "void")]
DEFAULT = load_default()
TINY = AxisSettings(questions=3, least=1, rollouts=RolloutSettings(max_new_tokens=6, batch_size=8))


class Grading:
    """Grades by a rule of the response; says nothing of an empty one."""

    concurrency = 1

    def __init__(self, name: str) -> None:
        self.name = name

    def describe(self) -> dict[str, Any]:
        return {"judge": "grading", "role": self.name}

    def pieces(self, exchanges: Sequence[Exchange]) -> list[list[int]]:
        return [list(range(len(exchanges)))]

    def judge(self, exchanges: Sequence[Exchange], progress: Progress = no_progress) -> list[Judgement]:
        return [Judgement(Score(self.grade(each) if each.response else None)) for each in exchanges]

    def grade(self, exchange: Exchange) -> float:
        return 1.2 if (len(self.name) + sum(map(ord, exchange.response))) % 3 == 0 else 2.8


JUDGES = {role.name: Grading(role.name) for role in ROLES}


@pytest.fixture(scope="module")
def backend() -> Backend:
    return tiny_backend("transformers")


@pytest.fixture(scope="module")
def run(backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> Axis:
    folder = tmp_path_factory.mktemp("axis") / "run"
    return persona_axis(backend, folder, roles=ROLES, settings=TINY, judges=JUDGES, progress=no_progress)


def in_numpy(folder: Path) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64]]:
    """From the run's files alone: the roles, [1 + roles, layers, d_model] of means, and each response's."""
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    found: dict[int, NDArray[np.float64]] = {}
    order = [json.loads(line)["row"] for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert order == list(range(len(rows)))
    for file in sorted((folder / "activations").glob("*.safetensors")):
        from safetensors import safe_open

        with safe_open(file, "np") as opened:
            places = json.loads(opened.metadata()["persona_lens_batch"])["rows"]
        found |= dict(zip(places, load_file(file)["response_mean"].astype(np.float64), strict=True))
    values = np.stack([found[place] for place in range(len(rows))])
    names = list(dict.fromkeys(row["role"] for row in rows))
    counted = np.array([score["played"] for score in scores]) & np.isfinite(values).all(axis=(1, 2))
    of = np.array([row["role"] for row in rows])
    return names, np.stack([values[counted & (of == name)].mean(axis=0) for name in names]), values


def test_means_axis_and_components_are_what_plain_numpy_makes_of_the_same_responses(run: Axis) -> None:
    assert run.folder is not None
    names, means, values = in_numpy(run.folder)
    default, roles = means[0], means[1:]
    assert names == [ASSISTANT, *(role.name for role in ROLES)]
    space = load_space(run.folder)
    np.testing.assert_allclose(space.default, default, atol=1e-5)
    np.testing.assert_allclose(space.means, roles, atol=1e-5)
    axis = default - roles.mean(axis=0)
    np.testing.assert_allclose(load_vectors(run.folder).rows(), axis, atol=1e-5)

    layer = run.summary["layer"]
    centred = roles[:, layer] - roles[:, layer].mean(axis=0)
    _, sizes, right = np.linalg.svd(centred, full_matrices=False)
    share = sizes**2 / (sizes**2).sum()
    kept = len(ROLES) - 1
    found = space.components(layer)
    np.testing.assert_allclose(found.explained, share[:kept], atol=1e-5)
    for number in range(kept):
        sign = np.sign(right[number] @ axis[layer])
        np.testing.assert_allclose(found.directions[number], sign * right[number], atol=1e-4)
        placed = sign * centred @ right[number]
        np.testing.assert_allclose(found.coordinates[:, number], placed, atol=1e-4)
        at = sign * right[number] @ axis[layer]
        standing = space.standings(found)[number]
        assert standing.place == pytest.approx((at - placed.min()) / np.ptp(placed), abs=1e-4)
    evidence = next(each for each in run.summary["layers"] if each["layer"] == layer)
    cosine = abs(right[0] @ axis[layer]) / np.linalg.norm(axis[layer])
    assert evidence["cosine"]["mean"] == pytest.approx(cosine, abs=1e-5)

    unit = axis / np.linalg.norm(axis, axis=-1, keepdims=True)
    along = np.einsum("nld,ld->nl", values, unit)
    levels = load_vectors(run.folder)
    for percentile in (0, 25, 33.5, 100):
        wanted = np.nanpercentile(along[:, layer], percentile)
        assert levels.level(layer, percentile) == pytest.approx(wanted, abs=0.02)


def test_only_responses_of_the_highest_grade_count(run: Axis) -> None:
    judged = [(row["grade"], row["played"]) for row in run.scores if row["grade"] is not None]
    assert {grade for grade, _ in judged} == {1, 3}
    assert all(played == (grade == 3) for grade, played in judged)
    both = list(zip(run.scores, run.rollouts, strict=True))
    assert all(row["played"] for row, asked in both if asked.request.labels["role"] == ASSISTANT)
    for role in ROLES:
        own = [row for row, asked in both if asked.request.labels["role"] == role.name]
        assert run.summary["counts"][role.name] == sum(each["played"] for each in own)


def test_every_role_and_the_default_are_asked_the_same_with_the_same_seeds() -> None:
    requests = plan_roles(ROLES, DEFAULT, TINY)
    assert len(requests) == 3 * 5 * (1 + len(ROLES))
    seeds = {(r.labels["question_number"], r.seed) for r in requests}
    assert len(seeds) == 3 * 5
    for number in range(5):
        own = {r.seed for r in requests if (r.labels["prompt"], r.labels["question_number"]) == (number, 0)}
        assert len(own) == 1
    default = [r.system for r in requests if r.labels["role"] == ASSISTANT][::3]
    assert default == [*DEFAULT.system_prompts, None]


def test_without_a_judge_a_response_counts_that_is_likelier_under_its_role(backend: Backend) -> None:
    found = persona_axis(backend, roles=ROLES, default=DEFAULT, settings=TINY, progress=no_progress)
    judged = [row for row in found.scores if row["score"] is not None]
    assert judged
    assert all(row["played"] == (row["score"] > 50) for row in judged)
    assert {row["grade"] for row in found.scores} == {None}


def test_a_run_that_is_repeated_changes_nothing_and_is_read_again(run: Axis, backend: Backend) -> None:
    assert run.folder is not None
    before = {file.name: file.read_bytes() for file in run.folder.rglob("*") if file.is_file()}
    (run.folder / "summary.json").unlink()
    (run.folder / "space.safetensors").unlink()
    (run.folder / "scores.jsonl").unlink()
    last = sorted((run.folder / "activations").iterdir())[-1]
    last.unlink()
    again = persona_axis(backend, run.folder, roles=ROLES, settings=TINY, judges=JUDGES, progress=no_progress)
    assert {file.name: file.read_bytes() for file in run.folder.rglob("*") if file.is_file()} == before
    assert again.summary == run.summary
    stored = Result.load(run.folder)
    assert (stored.verdict, stored.rows) == (run.verdict, run.rows)
    assert "<svg" in stored.report()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_finds_the_same_axis(adapter: str, run: Axis) -> None:
    found = persona_axis(tiny_backend(adapter), roles=ROLES, settings=TINY, judges=JUDGES, progress=no_progress)
    torch.testing.assert_close(found.vectors.rows(), run.vectors.rows(), atol=1e-4, rtol=1e-4)


def test_traits_are_placed_and_the_axis_goes_to_the_assistant_axis_project_and_back(
    run: Axis, backend: Backend, tmp_path: Path
) -> None:
    again = persona_axis(backend, roles=ROLES, settings=TINY, judges=JUDGES, traits=[run.vectors], progress=no_progress)
    (placed,) = again.summary["traits"]
    assert placed["axis"] == pytest.approx([1.0] * len(placed["axis"]), abs=1e-5)
    (file,), _ = export_vectors(run.vectors, "assistant-axis", tmp_path / "axis.pt")
    back = import_vectors(file)
    torch.testing.assert_close(back.vectors.rows(), run.vectors.rows())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"questions": 1}, "questions must be at least 2"),
        ({"samples": 0}, "samples and least at least 1"),
        ({"questions": 41}, "41 questions asked for, there are 40"),
        ({"layer": 99}, "layer 99 does not exist"),
        ({"least": 1000}, "fewer than three roles were played at least 1000 times"),
    ],
)
def test_what_cannot_be_is_refused(changed: dict[str, Any], said: str, backend: Backend) -> None:
    def asked() -> None:
        settings = replace(TINY, **changed)
        persona_axis(backend, roles=ROLES, default=DEFAULT, settings=settings, judges=JUDGES, progress=no_progress)

    with pytest.raises(ExtractionError, match=said):
        asked()


def test_two_roles_span_nothing_and_a_name_is_given_once(backend: Backend) -> None:
    with pytest.raises(ExtractionError, match="give at least three"):
        persona_axis(backend, roles=ROLES[:2], settings=TINY, progress=no_progress)
    with pytest.raises(ExtractionError, match="pirate is given twice"):
        persona_axis(backend, roles=[*ROLES, ROLES[0]], settings=TINY, progress=no_progress)


def test_a_damaged_space_is_refused(run: Axis, tmp_path: Path) -> None:
    with pytest.raises(VectorsError, match="does not exist; make it with"):
        load_space(tmp_path)
    file = run.space.save(tmp_path / "space.safetensors")
    assert load_space(file).roles == run.space.roles
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(VectorsError):
        load_space(file)
