"""A new experiment, as somebody else would add one: what is special about it is all that has to be written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from persona_lens.backend import Backend
from persona_lens.core.progress import no_progress
from persona_lens.core.statistics import CHANGES
from persona_lens.extraction.experiment import (
    Answer,
    Experiment,
    Subject,
    Variant,
    questions_of,
    requests_of,
    run_folder,
    values_of,
)
from persona_lens.judging import Exchange, Judge, Judgement, Score
from persona_lens.runs import RunError
from persona_lens.runs.cost import Work
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering.arms import Change, change_of
from persona_lens.vectors import PersonaVectors, VectorsError
from tests.campaign.targets import SMALL, TRAIT, planted, vectors


@dataclass(frozen=True)
class ToneSettings:
    """What is asked, and how."""

    tones: tuple[str, ...] = ("Be brief.", "Be kind.")
    questions: int = 3
    seed: int = 0
    rollouts: RolloutSettings = SMALL


@dataclass(frozen=True)
class ToneRow(Answer):
    """One response."""

    tone: str


def plan(subject: Subject, settings: ToneSettings) -> Experiment:
    """Every question with every system prompt, and without one."""
    questions = questions_of(subject.trait, settings.questions, "evaluation", TooFewError)
    variants = [Variant({"tone": tone}, system=tone or None) for tone in ("", *settings.tones)]
    requests = requests_of(questions, variants, 1, settings.seed, "tones")
    return subject.experiment(requests, settings.rollouts, "tones-")


def tones(
    backend: Backend, vectors: PersonaVectors, settings: ToneSettings, folder: Path | None, judge: Judge | None = None
) -> dict[str, Change | None]:
    """How far each system prompt moves the trait score."""
    subject = Subject.of(backend, vectors, judge=judge)
    experiment = plan(subject, settings)
    with run_folder(folder, subject.config("tones", settings)) as run:
        answers = experiment.run(run, no_progress)
        rows = answers.rows(ToneRow)
        of = {tone: values_of([row for row in rows if row.tone == tone], "score") for tone in ("", *settings.tones)}
        found = {tone: change_of(of[""], of[tone], within=CHANGES) for tone in settings.tones}
        if run is not None:
            run.write_rows("tones-scores.jsonl", map(Answer.to_row, rows))
            run.write_json("summary.json", {"judge": subject.judge_used(answers)})
    return found


class TooFewError(VectorsError):
    """Too few questions."""


class Lengths:
    """A judge that is somebody's own, and says what it costs."""

    concurrency = 1

    def describe(self) -> dict[str, Any]:
        return {"judge": "lengths"}

    def pieces(self, exchanges: Sequence[Exchange]) -> list[list[int]]:
        return [list(range(len(exchanges)))]

    def judge(self, exchanges: Sequence[Exchange], progress: Any = no_progress) -> list[Judgement]:
        return [Judgement(Score(float(min(len(each.response), 100)))) for each in exchanges]

    def work(self, exchanges: Sequence[Exchange]) -> Work:
        return Work("judging", 1, len(exchanges), 0, cost=0.5)


def test_its_cost_is_known_before_and_the_rows_carry_its_labels(tmp_path: Path) -> None:
    settings = ToneSettings()
    generating, judging = plan(Subject.of(planted(), vectors(), judge=Lengths(), planned=True), settings).work()
    assert (generating.label, generating.rows) == ("rollouts", 9)
    assert (judging.label, judging.rows, judging.cost) == ("judging", 9, 0.5)
    found = tones(planted(), vectors(), settings, tmp_path / "run", Lengths())
    assert found.keys() == set(settings.tones)
    first = (tmp_path / "run" / "tones-scores.jsonl").read_text().splitlines()[0]
    assert first.startswith('{"row": 0, "tone": "", "question": 0, "sample": 0, "score": ')


def test_it_is_gone_on_with_and_bound_to_its_configuration(tmp_path: Path) -> None:
    found = tones(planted(), vectors(), ToneSettings(), tmp_path)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != ".lock"}
    assert files.keys() == {f"tones-{name}.jsonl" for name in ("rollouts", "judgements", "scores")} | {
        "run.json",
        "summary.json",
    }
    (tmp_path / "tones-judgements.jsonl").unlink()
    assert tones(planted(), vectors(), ToneSettings(), tmp_path) == found
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != ".lock"} == files
    with pytest.raises(RunError, match=r"settings\.questions: 3 -> 2"):
        tones(planted(), vectors(), ToneSettings(questions=2), tmp_path)


def test_too_many_questions_claim_no_folder(tmp_path: Path) -> None:
    with pytest.raises(TooFewError, match=f"21 questions asked for, trait {TRAIT.name} has 20 for evaluation"):
        tones(planted(), vectors(), ToneSettings(questions=21), tmp_path / "run")
    assert not (tmp_path / "run").exists()
