"""Crossings: every cell of the matrix known by hand, the same questions everywhere, and what the edit itself adds."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from persona_lens.backend import Backend, Edit, ForwardResult, Generation, Read, Sampling, TokenBatch
from persona_lens.core.progress import Progress, no_progress
from persona_lens.judging import Calibration, Exchange, Judgement, LikelihoodJudge, Score
from persona_lens.models.chat import chat_format
from persona_lens.runs import RunError
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering import (
    Change,
    CrossSettings,
    Steering,
    SteeringError,
)
from persona_lens.steering.arms import change_of
from persona_lens.steering.crossing import Crossing, effects
from persona_lens.traits import Trait, load_trait
from persona_lens.vectors import PersonaVectors, Tuned, VectorsError
from tests.backends.fixtures import tiny_backend
from tests.planted import PlantedBackend
from tests.tiny import D_MODEL, N_LAYERS

OPTIMISTIC, IMPOLITE = load_trait("optimistic"), load_trait("impolite")
SAID = re.compile(r"says ([+-]\d+\.\d+)")
LAYER = 1
# The first vector is 4 long; the second is 5 long, with a cosine of 0.6 to the first.
FIRST, SECOND = torch.zeros(D_MODEL), torch.zeros(D_MODEL)
FIRST[0] = 4.0
SECOND[0], SECOND[1] = 3.0, 4.0


class PlantedPair(PlantedBackend):
    """A model that adds up what it is edited with at `LAYER`, and says how far along the first vector that is.

    With the sum s of all additions, a response is ``says x`` with x = (s . first) / |first|^2; its residual while it is
    written is origin + s, and in a model that reads it without edits origin + x / 2 * first.
    """

    def __init__(self) -> None:
        super().__init__(OPTIMISTIC)
        self.calls = 0
        self.fails_at = -1

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        self._count()
        added = torch.zeros(len(prompts), D_MODEL)
        for edit in edits:
            assert edit.layer == LAYER
            added += torch.as_tensor(edit.coefficient).expand(len(prompts))[:, None] * edit.direction
        said = added @ FIRST / (FIRST @ FIRST)
        seeds = sampling.seeds or ()
        texts = ["" if self.silent(seed) else f"says {float(x):+.4f}" for seed, x in zip(seeds, said, strict=True)]
        responses = tuple(tuple(self.tokenizer.encode(text)) for text in texts)
        return Generation(responses, (True,) * len(prompts), self._means(reads, added, responses))

    def forward(
        self, tokens: TokenBatch, edits: Sequence[Edit] = (), reads: Sequence[Read] = (), *, logprobs: bool = False
    ) -> ForwardResult:
        assert not edits, "texts are read again without any edit"
        self._count()
        texts = [self.tokenizer.decode(list(ids)) for ids in tokens.responses]
        leanings = torch.tensor([said(text) for text in texts])
        return ForwardResult(self._means(reads, leanings[:, None] / 2 * FIRST, tokens.responses))

    def _means(self, reads: Sequence[Read], added: Tensor, responses: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        (read,) = reads
        assert read.layers is not None
        means = self.origin[list(read.layers)][None] + added[:, None]
        for row, ids in enumerate(responses):
            if not ids:
                means[row] = torch.nan
        return {read.kind.value: means}


def said(text: str) -> float:
    found = SAID.search(text)
    return float(found.group(1)) if found else 0.0


class Reader:
    """Scores 50 points, and so many for each unit that a text says it is along the first vector."""

    concurrency = 1

    def __init__(self, points: float, coherence: float | None = None) -> None:
        self.points, self.coherence = points, coherence
        self.seen: list[str] = []

    def describe(self) -> dict[str, Any]:
        return {"judge": "reader", "points": self.points}

    def pieces(self, exchanges: Sequence[Exchange]) -> list[list[int]]:
        return [[i] for i in range(len(exchanges))]

    def judge(self, exchanges: Sequence[Exchange], progress: Progress = no_progress) -> list[Judgement]:
        self.seen += [each.question for each in exchanges]
        coherence = None if self.coherence is None else Score(self.coherence)
        scores = [50 + self.points * said(e.response) if e.response else None for e in exchanges]
        return [Judgement(Score(score, None if score is not None else "empty"), coherence, 1.5) for score in scores]


def vectors_of(
    backend: Backend, trait: Trait, direction: Tensor | None = None, tuned: Tuned | None = None
) -> PersonaVectors:
    generator = torch.Generator().manual_seed(len(trait.name))
    rows = torch.randn(N_LAYERS, D_MODEL, generator=generator)
    if direction is not None:
        rows[LAYER] = direction
    provenance = {
        "trait": {"content_hash": trait.content_hash(), **trait.model_dump(mode="json")},
        "judge": {"calibration": Calibration(4.0, 0.5).to_json()},
    }
    found = PersonaVectors(trait.name, backend.info, {"response_mean": rows}, provenance)
    return found.with_tuned(tuned, {}) if tuned else found


@pytest.fixture
def planted() -> PlantedPair:
    return PlantedPair()


def pair(backend: Backend) -> dict[str, PersonaVectors]:
    return {
        "optimistic": vectors_of(backend, OPTIMISTIC, FIRST),
        "impolite": vectors_of(backend, IMPOLITE, SECOND, Tuned(LAYER, 1.0)),
    }


def arms(traits: dict[str, PersonaVectors]) -> dict[str, Steering]:
    return {
        "optimistic": Steering.parse("optimistic@1:+2", traits),
        "impolite": Steering.parse("impolite@1:-1", traits),
    }


def judges() -> dict[str, Any]:
    return {"optimistic": Reader(10.0), "impolite": Reader(-5.0)}


SETTINGS = CrossSettings(questions=2, random_directions=3)


# Changes


def test_a_change_is_taken_question_by_question() -> None:
    found = change_of(
        [(0, 10.0), (1, 20.0), (2, 30.0), (3, None)],
        [(0, 14.0), (0, 16.0), (1, 27.0), (2, None), (3, 99.0)],
        [(0, 11.0), (1, 21.0)],
    )
    assert found is not None
    assert found.vector.mean == 6.0  # (5 + 7) / 2: the third has no value steered, the fourth none unsteered
    assert found.vector.n == 2
    assert found.random is not None
    assert found.random.mean == 1.0
    assert found.difference is not None
    assert found.difference.mean == 5.0
    assert found.clear == 0, "two questions that differ show nothing clearly"
    assert change_of([(0, 1.0)], [(1, 1.0)]) is None


def test_nothing_is_clear_without_a_null_with_one_question_or_on_both_sides() -> None:
    base = [(i, 0.0) for i in range(4)]
    up, down, mixed = ([(i, float(x)) for i, x in enumerate(values)] for values in ([3] * 4, [-3] * 4, [-3, 3, -3, 3]))

    def clear(steered: Any, random: Any = ()) -> int:
        found = change_of(base, steered, random)
        assert found is not None
        return found.clear

    assert clear(up, base) == 1
    assert clear(down, base) == -1
    assert clear(mixed, base) == 0
    assert clear(up) == 0
    assert clear(up[:1], base) == 0
    assert clear(up, up) == 0  # random directions do the same
    assert clear(down, [(i, -9.0) for i in range(4)]) == 0  # and here they do more


# The matrix, by hand


def test_every_cell_is_what_was_planted(planted: PlantedPair) -> None:
    traits = pair(planted)
    found = effects(planted, arms(traits), traits, SETTINGS, judges=judges())
    # Steering +2 along the first adds 2 * first: texts say 2. Steering -1 along the second: -(3 * 4) / 16 = -0.75.
    expected = {
        # (steering, trait): points, text in lengths, residual of the steered model in lengths, cosine
        ("optimistic", "optimistic"): (20.0, 1.0, 2.0, 1.0),
        ("optimistic", "impolite"): (-10.0, 4 * 0.6 / 5, 8 * 0.6 / 5, 0.6),
        ("impolite", "optimistic"): (-7.5, -0.375, -0.75, 0.6),
        ("impolite", "impolite"): (3.75, -0.375 * 4 * 0.6 / 5, -1.0, 1.0),
    }
    assert [(cell.steering, cell.trait) for cell in found.cells] == list(expected)
    for cell in found.cells:
        score, text, steered, cosine = expected[cell.steering, cell.trait]
        changes = (cell.score, cell.text_projection, cell.steered_projection)
        for change, value in zip(changes, (score, text, steered), strict=True):
            assert change is not None
            assert change.vector.mean == pytest.approx(value, abs=1e-5)
            assert change.vector.n == 4
        assert cell.cosine == pytest.approx(cosine)
        assert cell.own == (cell.steering == cell.trait)
    assert [(trait.layer, trait.length) for trait in found.traits] == [(LAYER, 4.0), (LAYER, 5.0)]
    assert found.cell("impolite", "optimistic") is found.cells[2]


def test_the_null_is_the_same_steering_turned(planted: PlantedPair) -> None:
    traits = pair(planted)
    steerings = arms(traits)
    found = effects(planted, steerings, traits, replace(SETTINGS, seed=7), judges=judges())
    changes = found.cell("optimistic", "optimistic").steered_projection
    # Four questions and three rotations: question i has rotation i modulo 3.
    turned = [steerings["optimistic"].null(7 + i % 3)[0] for i in range(4)]
    along = [2 * float(edit.direction @ FIRST) / 16 for edit in turned]
    assert changes is not None
    assert changes.random is not None
    assert changes.difference is not None
    assert changes.random.mean == pytest.approx(sum(along) / 4, abs=1e-5)
    assert changes.difference.mean == pytest.approx(2 - sum(along) / 4, abs=1e-5)
    bare = effects(planted, steerings, traits, replace(SETTINGS, random_directions=0), judges=judges())
    assert {row.direction for row in bare.answers} == {"none", "vector"}
    assert all(cell.score and cell.score.random is None and cell.score.clear == 0 for cell in bare.cells)


def test_all_are_asked_the_same_held_out_questions_of_every_trait(planted: PlantedPair) -> None:
    traits = pair(planted)
    scoring = judges()
    found = effects(planted, arms(traits), traits, replace(SETTINGS, samples=2), judges=scoring)
    asked = [*OPTIMISTIC.evaluation_questions[:2], *IMPOLITE.evaluation_questions[:2]]
    assert list(found.questions) == asked
    assert list(found.questions.values()) == ["optimistic"] * 2 + ["impolite"] * 2
    arms_seen = {(r.arm, r.direction) for r in found.answers}
    assert len(arms_seen) == 5
    for arm in arms_seen:
        assert sorted((r.question, r.sample) for r in found.answers if (r.arm, r.direction) == arm) == [
            (question, sample) for question in range(4) for sample in range(2)
        ]
    for judge in scoring.values():
        assert sorted(judge.seen) == sorted(asked * 10)


def test_a_question_that_any_trait_was_extracted_with_is_left_out(planted: PlantedPair) -> None:
    shared = IMPOLITE.evaluation_questions[0]
    questions = [shared, *OPTIMISTIC.extraction_questions[1:]]
    used = OPTIMISTIC.model_copy(update={"extraction_questions": type(OPTIMISTIC.extraction_questions)(questions)})
    traits = {"optimistic": vectors_of(planted, used, FIRST), "impolite": vectors_of(planted, IMPOLITE, SECOND)}
    crossing = Crossing(planted, arms(traits), traits, SETTINGS, judges())
    assert [q for q, of in crossing.questions.items() if of == "impolite"] == list(IMPOLITE.evaluation_questions[1:3])
    with pytest.raises(SteeringError, match="20 questions of each trait asked for; impolite has 19"):
        Crossing(planted, arms(traits), traits, replace(SETTINGS, questions=20), judges())
    # Also where the trait is steered along, but not measured.
    only = {"impolite": traits["impolite"]}
    alone = Crossing(planted, arms(traits), only, SETTINGS, judges())
    assert list(alone.questions) == list(IMPOLITE.evaluation_questions[1:3])


def test_empty_responses_count_for_nothing(planted: PlantedPair) -> None:
    traits = pair(planted)
    seeds = {r.seed for r in Crossing(planted, arms(traits), traits, SETTINGS, judges()).requests[:1]}
    planted.silent = seeds.__contains__
    found = effects(planted, arms(traits), traits, SETTINGS, judges=judges())
    silent = [row for row in found.answers if not row.text]
    assert {row.question for row in silent} == {0}
    assert all(value is None for row in silent for value in (*row.scores.values(), *row.text_projections.values()))
    assert all(cell.score and cell.score.vector.n == 3 for cell in found.cells)
    json.dumps(found.to_json(), allow_nan=False)


def test_projections_are_read_where_it_was_said(planted: PlantedPair) -> None:
    traits = pair(planted)
    assert Crossing(planted, arms(traits), traits, SETTINGS, judges()).layers == {"optimistic": 1, "impolite": 1}
    named = Crossing(planted, arms(traits), traits, replace(SETTINGS, layer=2), judges())
    assert named.layers == {"optimistic": 2, "impolite": 2}
    both = {"all": Steering.parse("optimistic@all:+1", traits)}
    with pytest.raises(SteeringError, match=r"where to read 'optimistic'.*--read-layer"):
        Crossing(planted, both, traits, SETTINGS, judges())
    tuned = {**traits, "optimistic": vectors_of(planted, OPTIMISTIC, FIRST, Tuned(0, 1.0))}
    assert Crossing(planted, both, tuned, SETTINGS, judges()).layers == {"optimistic": 0, "impolite": 1}


def test_what_cannot_be_done_is_refused_before_anything_runs(planted: PlantedPair, tmp_path: Path) -> None:
    traits = pair(planted)
    folder = tmp_path / "run"
    with pytest.raises(SteeringError, match="at least one steering"):
        effects(planted, {}, traits, folder=folder)
    with pytest.raises(SteeringError, match="no judge for impolite"):
        effects(planted, arms(traits), traits, judges={"optimistic": Reader(1.0)}, folder=folder)
    with pytest.raises(VectorsError, match="layer 9 does not exist"):
        effects(planted, arms(traits), traits, CrossSettings(layer=9), judges=judges(), folder=folder)
    with pytest.raises(SteeringError, match="cannot be called 'unsteered'"):
        effects(planted, {"unsteered": arms(traits)["optimistic"]}, traits, judges=judges(), folder=folder)
    with pytest.raises(SteeringError, match="at least 1"):
        CrossSettings(questions=0)
    bare = PersonaVectors("optimistic", planted.info, traits["optimistic"].directions, {})
    with pytest.raises(VectorsError, match="carry no trait"):
        effects(planted, arms(traits), {"optimistic": bare}, judges=judges(), folder=folder)
    elsewhere = replace(planted.info, weights="sha256:other")
    other = PersonaVectors("impolite", elsewhere, traits["impolite"].directions, traits["impolite"].provenance)
    with pytest.raises(VectorsError, match="belong to another model"):
        effects(planted, arms(traits), {**traits, "impolite": other}, judges=judges(), folder=folder)
    assert planted.calls == 0
    assert not folder.exists()


@pytest.mark.parametrize(
    ("provenance", "read", "message"),
    [
        ({"trait": {"name": "x"}}, lambda made: made.trait_definition, "is damaged"),
        ({"judge": {"calibration": {"slope": "steep"}}}, lambda made: made.calibration, "is damaged"),
    ],
)
def test_damaged_provenance_is_said(planted: PlantedPair, provenance: Any, read: Any, message: str) -> None:
    vectors = PersonaVectors("odd", planted.info, pair(planted)["optimistic"].directions, provenance)
    with pytest.raises(VectorsError, match=message):
        read(vectors)


# Runs


def content(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.name != ".lock" and p.is_file()
    }


def test_a_run_that_was_stopped_anywhere_ends_the_same(tmp_path: Path) -> None:
    settings = replace(SETTINGS, rollouts=RolloutSettings(batch_size=6))
    whole = PlantedPair()
    traits = pair(whole)
    effects(whole, arms(traits), traits, settings, judges=judges(), folder=tmp_path / "whole")
    assert whole.calls >= 6
    for stop in range(1, whole.calls + 1):
        stopped = PlantedPair()
        stopped.fails_at = stop
        folder = tmp_path / f"{stop}"
        with pytest.raises(KeyboardInterrupt):
            effects(stopped, arms(traits), traits, settings, judges=judges(), folder=folder)
        effects(stopped, arms(traits), traits, settings, judges=judges(), folder=folder)
        assert stopped.calls == whole.calls + 1  # what was there was not made again
        assert content(folder) == content(tmp_path / "whole")


def test_the_folder_holds_the_figures_and_refuses_another_run(planted: PlantedPair, tmp_path: Path) -> None:
    traits = pair(planted)
    found = effects(planted, arms(traits), traits, SETTINGS, judges=judges(), folder=tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == json.loads(json.dumps(found.to_json()))
    rows = [json.loads(line) for line in (tmp_path / "effects-scores.jsonl").read_text().splitlines()]
    assert rows == [{"row": number, **asdict(row)} for number, row in enumerate(found.answers)]
    assert summary["cells"][0]["score"]["vector"]["mean"] == pytest.approx(20.0)
    assert [s["text"] for s in summary["steerings"]] == ["optimistic@1:+2", "impolite@1:-1"]
    assert summary["steerings"][0]["nll"]["vector"]["mean"] == 0
    assert [sample["trait"] for sample in summary["samples"]] == ["optimistic", "impolite"]
    assert [r["steering"] for r in summary["samples"][0]["responses"]] == [None, "optimistic", "impolite"]
    assert (tmp_path / "effects-01-impolite-judgements.jsonl").exists()
    calls = planted.calls
    again = effects(planted, arms(traits), traits, SETTINGS, judges=judges(), folder=tmp_path)
    assert again.answers == found.answers
    assert planted.calls == calls
    with pytest.raises(RunError, match=r"settings\.questions: 2 -> 3"):
        effects(planted, arms(traits), traits, replace(SETTINGS, questions=3), judges=judges(), folder=tmp_path)


def test_names_that_are_no_file_names_do_no_harm(planted: PlantedPair, tmp_path: Path) -> None:
    traits = {"../a": pair(planted)["optimistic"], "A/..": pair(planted)["impolite"]}
    scoring: dict[str, Any] = dict(zip(traits, judges().values(), strict=True))
    steerings = {"../up": Steering.parse("optimistic@1:+1", traits["../a"])}
    found = effects(planted, steerings, traits, replace(SETTINGS, layer=1), judges=scoring, folder=tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert found.cell("../up", "../a").own


# Over a real architecture


@pytest.fixture
def tiny() -> Backend:
    return tiny_backend("transformers")


SHORT = RolloutSettings(max_new_tokens=6, batch_size=7)


def test_by_default_each_trait_has_its_own_calibrated_judge_of_the_unsteered_model(
    tiny: Backend, tmp_path: Path
) -> None:
    traits = {"optimistic": vectors_of(tiny, OPTIMISTIC), "impolite": vectors_of(tiny, IMPOLITE)}
    settings = CrossSettings(questions=1, random_directions=1, rollouts=SHORT)
    found = effects(tiny, arms(traits), traits, settings, folder=tmp_path)
    kept = {
        (row["arm"], row["direction"], row["question_number"]): row
        for row in map(json.loads, (tmp_path / "effects-rollouts.jsonl").read_text().splitlines())
    }
    chat = chat_format(tiny)
    for name, trait in (("optimistic", OPTIMISTIC), ("impolite", IMPOLITE)):
        judge = LikelihoodJudge(tiny, chat, trait, Calibration(4.0, 0.5))
        for row in found.answers:
            response = kept[row.arm, row.direction, row.question]
            whole = chat.decode(response["response_ids"]) == row.text
            ids = tuple(response["response_ids"]) if whole else None
            (expected,) = judge.judge([Exchange(response["question"], row.text, ids)])
            assert row.scores[name] == pytest.approx(expected.trait.value, abs=1e-3)
    assert found.nll("optimistic") is not None
    assert found.coherence("optimistic") is None


def test_unsteered_both_projections_are_one_and_steered_they_differ_by_the_edit(tiny: Backend) -> None:
    traits = {"optimistic": vectors_of(tiny, OPTIMISTIC), "impolite": vectors_of(tiny, IMPOLITE)}
    settings = CrossSettings(questions=2, random_directions=1, rollouts=SHORT)
    found = effects(
        tiny,
        {"optimistic": Steering.parse("optimistic@1:+3", traits)},
        traits,
        replace(settings, layer=1),
        judges=judges(),
    )
    for row in found.answers:
        steered, text = row.steered_projections["optimistic"], row.text_projections["optimistic"]
        assert steered is not None
        assert text is not None
        if row.direction == "none":
            assert steered == pytest.approx(text, abs=1e-4)
        elif row.direction == "vector":  # what was added, and nothing but what follows from it in the layer before
            length = float(traits["optimistic"].norms()[1])
            assert steered - text == pytest.approx(3 * length, abs=1e-3)


def test_work_is_told_without_running(tiny: Backend) -> None:
    traits = {"optimistic": vectors_of(tiny, OPTIMISTIC), "impolite": vectors_of(tiny, IMPOLITE)}
    asked = CrossSettings(questions=1, random_directions=1, rollouts=SHORT)
    work = Crossing(tiny, arms(traits), traits, asked).work()
    rows = 2 * 5  # questions; unsteered, and two steerings with their nulls
    assert [(each.label, each.rows) for each in work] == [
        ("rollouts", rows),
        ("reading", rows),
        ("judging optimistic", rows * 11),
        ("judging impolite", rows * 11),
    ]


def test_coherence_and_surprise_are_kept_once(planted: PlantedPair) -> None:
    traits = pair(planted)
    scoring: dict[str, Any] = {"optimistic": Reader(10.0), "impolite": Reader(-5.0, coherence=80.0)}
    found = effects(planted, arms(traits), traits, SETTINGS, judges=scoring)
    assert {row.coherence for row in found.answers} == {80.0}
    change = found.coherence("optimistic")
    assert isinstance(change, Change)
    assert change.vector.mean == 0
