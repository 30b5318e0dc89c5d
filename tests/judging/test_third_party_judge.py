"""A judge of another package: one `JudgeSpec`, named by an entry point, is reachable as ``--judge NAME:…``."""

from __future__ import annotations

from typing import Any

import pytest

from persona_lens.cli.options import ModelOptions
from persona_lens.cli.options.judges import JudgeOptions
from persona_lens.judging import Exchange, JudgingError
from persona_lens.judging.recording import judging_work
from persona_lens.judging.registry import JUDGES
from persona_lens.models.chat import chat_format
from persona_lens.traits import load_trait
from tests.backends.fixtures import tiny_backend

THEIRS = """
from persona_lens.judging import Judgement, Score
from persona_lens.judging.registry import JudgeSpec
from persona_lens.runs.cost import Work

class LengthJudge:
    concurrency = 1

    def __init__(self, trait, most):
        self.trait, self.most = trait, most

    def describe(self):
        return {"judge": "length", "trait": self.trait.content_hash(), "most": self.most}

    def pieces(self, exchanges):
        return [list(range(len(exchanges)))]

    def judge(self, exchanges, progress=lambda *_: None):
        return [Judgement(Score(min(100.0, 100 * len(each.response) / self.most))) for each in exchanges]

    def work(self, exchanges):
        return Work("judging", len(exchanges), len(exchanges), 0, cost=0.0)

SPEC = JudgeSpec(
    lambda opening: lambda trait: LengthJudge(trait, int(opening.what)), ("length:MOST",), ("length:MOST",)
)
"""


@pytest.fixture
def planted(plant: Any) -> None:
    plant(JUDGES.group, THEIRS, length="SPEC", broken="LengthJudge")


@pytest.mark.usefixtures("planted")
def test_it_is_opened_by_its_name_beside_a_model_and_alone() -> None:
    trait, options = load_trait("optimistic"), JudgeOptions()
    here = tiny_backend("transformers")
    chat = chat_format(here)
    opened = [
        options.open("length:8", trait, ModelOptions(), (here, chat)),
        options.open("length:8", trait, ModelOptions()),
        *options.open("length:8", {"optimistic": trait}, ModelOptions(), (here, chat)).values(),
    ]
    for judge in opened:
        assert judge is not None
        assert [found.trait.value for found in judge.judge([Exchange("q", "four"), Exchange("q", "")])] == [50.0, 0.0]
        [work] = judging_work(judge, [Exchange("q", "four")])
        assert work.cost == 0


@pytest.mark.usefixtures("planted")
def test_what_is_wrong_with_it_is_said() -> None:
    trait = load_trait("optimistic")
    for written, says in (
        ("length", "a judge is likelihood:VECTORS, local:MODEL, openai:MODEL or length:MOST .*; got 'length'"),
        ("broken:1", "judge broken cannot be loaded: its entry point .* is a type, not a JudgeSpec"),
    ):
        with pytest.raises(JudgingError, match=says):
            JudgeOptions().open(written, trait, ModelOptions())
    with pytest.raises(
        JudgingError, match="--judge-prefill: only for --judge local or local:MODEL, this is 'length:8'"
    ):
        JudgeOptions(judge_prefill="Score: ").open("length:8", trait, ModelOptions())
