"""What a run stores says how its scores were found, where the choice of a method was left to the judge."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from persona_lens.analysis.dissection import DissectSettings, dissect
from persona_lens.analysis.persistence import PersistSettings, persist
from persona_lens.backend import wrap_model
from persona_lens.core.progress import Progress, no_progress
from persona_lens.data.datasets import open_dataset
from persona_lens.finetuning.outcomes import TreatmentSettings
from persona_lens.finetuning.shift import ShiftSettings, shift
from persona_lens.finetuning.study import FinetuneStudySettings, finetune_study
from persona_lens.judging import Exchange, Judge, Judgement, Score
from persona_lens.monitoring import StudySettings, study
from persona_lens.runs.settings import RolloutSettings
from persona_lens.screening import Flagging, screen
from persona_lens.steering import ArmSettings, CrossSettings, Steering, TuneSettings, tune
from persona_lens.steering.comparison import compare
from persona_lens.steering.crossing import effects
from tests.analysis.dictionaries import dictionary
from tests.campaign.targets import SMALL, TRAIT, Normed, planted, tiny_vectors, vectors
from tests.finetuning.chats import conversations, loaded_model, small, vectors_of
from tests.screening import made
from tests.tiny import tiny_model, tiny_tokenizer


class Choosing:
    """A judge that is free in how it finds a score, and once asked takes samples."""

    concurrency = 1

    def describe(self) -> dict[str, Any]:
        return {"judge": "choosing", "method": "auto"}

    def pieces(self, exchanges: Sequence[Exchange]) -> list[list[int]]:
        return [list(range(len(exchanges)))]

    def judge(self, exchanges: Sequence[Exchange], progress: Progress = no_progress) -> list[Judgement]:
        score = Score(60.0, method="samples: 5 of 5")
        return [Judgement(Score(float(len(each.response)), method=score.method), score) for each in exchanges]


def _tune(folder: Path, judge: Judge) -> None:
    settings = TuneSettings((1,), strengths=(0.1,), search_questions=3, random_directions=0, rollouts=SMALL)
    tune(Normed(TRAIT), vectors(), settings, folder=folder, judge=judge)


def _compare(folder: Path, judge: Judge) -> None:
    arms = {"up": Steering.parse(f"{TRAIT.name}@1:+1", vectors())}
    compare(planted(), arms, vectors(), ArmSettings((0, 1), rollouts=SMALL), folder=folder, judge=judge)


def _effects(folder: Path, judge: Judge) -> None:
    arms = {TRAIT.name: Steering.parse(f"{TRAIT.name}@1:+1", tiny_vectors())}
    settings = CrossSettings(questions=1, random_directions=0, rollouts=RolloutSettings(4))
    judges = {TRAIT.name: judge}
    effects(made.backend(), arms, {TRAIT.name: tiny_vectors()}, settings, folder=folder, judges=judges)


def _persist(folder: Path, judge: Judge) -> None:
    settings = PersistSettings(1, 1, ("all",), 1, 2.0, known_questions=0, last=1, rollouts=RolloutSettings(4))
    judges = {TRAIT.name: judge}
    persist(made.backend(), {TRAIT.name: tiny_vectors()}, settings, folder=folder, judges=judges)


def _shift(folder: Path, judge: Judge) -> None:
    other = {"other": partial(wrap_model, tiny_model(seed=1), tiny_tokenizer())}
    asked = ArmSettings((0,), random_directions=0, rollouts=RolloutSettings(4))
    judges = {TRAIT.name: judge}
    shift(made.backend(), other, [tiny_vectors()], ShiftSettings(asked=asked), folder=folder, judges=judges)


def _dissect(folder: Path, judge: Judge) -> None:
    settings = DissectSettings(show=2, pursuit=2, steered=1, random_features=1, coefficient=2.0, questions=2)
    dissect(planted(), vectors(), dictionary(model="planted"), settings, folder=folder, judge=judge)


def _study(folder: Path, judge: Judge) -> None:
    asked = StudySettings(questions=2, rollouts=SMALL)
    study(planted(), vectors(), asked, trait="optimistic", folder=folder, judge=judge)


def _screen(folder: Path, judge: Judge) -> None:
    data = made.jsonl(folder.parent / "rows.jsonl", made.pairs(30))
    clean = [open_dataset(made.jsonl(folder.parent / "clean.jsonl", made.pairs(24, 4)))]
    flagging, judges = Flagging(false_positive_rate=0.5), {"kind": judge}
    screen(made.backend(), [open_dataset(data)], made.panel(), folder=folder, reference=clean, flagging=flagging,
           chat=made.chat(), judges=judges)  # fmt: skip


def _finetune_study(folder: Path, judge: Judge) -> None:
    base = folder.parent / "base"
    asked = ArmSettings((0,), random_directions=0, rollouts=RolloutSettings(4))
    only_plain = TreatmentSettings(None, prompted=False, random=False)
    settings = FinetuneStudySettings(only_plain, 1, (1,), asked, dtype="float32")
    own = vectors_of(loaded_model(base))
    finetune_study(
        str(base), conversations(2), own, settings, small(max_steps=1), folder=folder, judge=judge, device="cpu"
    )


RUNS: dict[str, Callable[[Path, Judge], None]] = {
    "steer tune": _tune,
    "steer compare": _compare,
    "steer effects": _effects,
    "steer persist": _persist,
    "shift": _shift,
    "dissect": _dissect,
    "monitor study": _study,
    "screen": _screen,
    "finetune study": _finetune_study,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_says_which_method_its_judge_used(name: str, tmp_path: Path) -> None:
    for _ in range(2):  # a finished run finds the same in its own files
        RUNS[name](tmp_path / "run", Choosing())
        found = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
        assert _methods(found) == {"samples"}


def _methods(value: Any) -> set[str]:
    """Every method that stands with a judge."""
    if isinstance(value, list):
        return {method for each in value for method in _methods(each)}
    if not isinstance(value, dict):
        return set()
    own = {value["method"]} if value.get("judge") == "choosing" else set()
    return own | {method for each in value.values() for method in _methods(each)}
