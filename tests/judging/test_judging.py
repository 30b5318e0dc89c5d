"""The likelihood judge and its calibration, against the same numbers worked out another way."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_lens.backend import Backend, ForwardResult, TokenBatch, hooked, wrap_model
from persona_lens.backend.parts import Part
from persona_lens.backend.shared_prompts import SharedPrompts
from persona_lens.judging import (
    Calibration,
    Evidence,
    Exchange,
    JudgingError,
    LikelihoodJudge,
    LocalJudge,
    fit_calibration,
)
from persona_lens.judging.blind import Scored, response_id
from persona_lens.judging.reading import PAIRS
from persona_lens.judging.recording import exchange_of, rollout_evidence
from persona_lens.judging.scored import judge_scored
from persona_lens.models import ChatFormat
from persona_lens.models.chat import chat_format
from persona_lens.runs import RunError, RunFolder
from persona_lens.runs.rollouts import Request, Rollout
from persona_lens.traits import Arm, load_trait
from tests.backends.fixtures import ADAPTERS, backend_of, tiny_backend
from tests.planted import PlantedBackend
from tests.tiny import CHATML, thinking_tokenizer, tiny_model, tiny_tokenizer, with_template

TRAIT = load_trait("optimistic")
CALIBRATION = Calibration(2.0, 0.5)
# Two questions, responses of unlike lengths, one of a single token; interleaved, to see that the order is kept.
EXCHANGES = [
    Exchange("What now?", "All will be well.", None),
    Exchange("Why so sad?", "x", None),
    Exchange("What now?", "No.", None),
    Exchange("What now?", "Nothing good will come of that, I fear.", None),
    Exchange("Why so sad?", "Am I? It is a fine day!", None),
]


@cache
def model(architecture: str) -> Any:
    return tiny_model(architecture, seed=3)


@cache
def backend(architecture: str = "llama") -> Backend:
    return backend_of("transformers", model(architecture))


def judge_of(
    subject: Backend, calibration: Calibration | None = CALIBRATION, batch_tokens: int = 8192
) -> LikelihoodJudge:
    """By all five pairs, as calibrations of old are for."""
    return LikelihoodJudge(subject, chat_format(subject), TRAIT, calibration, batch_tokens=batch_tokens)


def by_hand(architecture: str, exchange: Exchange, pairs: tuple[int, ...] = (0, 1, 2, 3, 4)) -> Evidence:
    """Row by row, in float64 from the logits on, with nothing of the package but the trait's words."""
    tokenizer = tiny_tokenizer()
    answer = tokenizer.encode(exchange.response)

    def per_token(system: str | None) -> float:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": exchange.question})
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        ids = tokenizer.encode(text) + answer
        with torch.inference_mode():
            logits = model(architecture)(torch.tensor([ids])).logits[0].double()
        predicting = logits.log_softmax(dim=-1)[-len(answer) - 1 : -1]
        return float(predicting[range(len(answer)), answer].mean())

    differences = [
        per_token(f"You are an optimistic assistant. {pair.positive}")
        - per_token(f"You are a pessimistic assistant. {pair.negative}")
        for pair in map(TRAIT.instructions.__getitem__, pairs)
    ]
    return Evidence(sum(differences) / len(pairs), -per_token(None))


def assert_alike(found: Sequence[Evidence | None], wanted: Sequence[Evidence | None], tolerance: float = 1e-5) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a is not None
        assert b is not None
        assert a.log_odds == pytest.approx(b.log_odds, abs=tolerance)
        assert a.nll == pytest.approx(b.nll, abs=tolerance)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "qwen2"])
def test_evidence_is_that_worked_out_by_hand(architecture: str) -> None:
    wanted = [by_hand(architecture, exchange) for exchange in EXCHANGES]
    assert len({round(e.log_odds, 3) for e in wanted}) == len(wanted)  # else a mix-up would not show
    assert_alike(judge_of(backend(architecture)).evidence(EXCHANGES), wanted)


@pytest.mark.parametrize("compared", [(0,), (0, 4), (0, 2, 4)])
def test_fewer_pairs_are_compared_where_fewer_are_asked_for(compared: tuple[int, ...]) -> None:
    wanted, pairs = [by_hand("llama", exchange, compared) for exchange in EXCHANGES], len(compared)
    judge = LikelihoodJudge(backend(), chat_format(backend()), TRAIT, pairs=pairs)
    assert_alike(judge.evidence(EXCHANGES), wanted)
    assert judge.describe()["pairs"] == pairs
    assert judge.work(EXCHANGES).rows == (2 * pairs + 1) * len(EXCHANGES)
    # One that is calibrated compares those that the calibration was fitted to.
    calibrated = judge_of(backend(), fit_calibration([1.0, 0.0], [True, False], pairs))
    assert calibrated.evidence(EXCHANGES) == judge.evidence(EXCHANGES)
    assert calibrated.describe()["pairs"] == pairs


@pytest.mark.parametrize("pairs", [-1, 6])
def test_pairs_that_a_trait_does_not_have_are_refused(pairs: int) -> None:
    with pytest.raises(JudgingError, match=f"optimistic has 5 instruction pairs; {pairs} are asked for"):
        judge_of(backend(), Calibration(1.0, 0.0, pairs))


def test_by_default_few_pairs_are_compared() -> None:
    assert LikelihoodJudge(backend(), chat_format(backend()), TRAIT).pairs == PAIRS
    assert judge_of(backend()).pairs == 5


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_evidence_is_the_same_through_every_backend(adapter: str) -> None:
    wanted = judge_of(tiny_backend("transformers")).evidence(EXCHANGES)
    assert_alike(judge_of(tiny_backend(adapter)).evidence(EXCHANGES), wanted)


@pytest.mark.parametrize("batch_tokens", [1, 300, 10**6])
def test_evidence_does_not_depend_on_batches_or_order(batch_tokens: int) -> None:
    wanted = judge_of(backend()).evidence(EXCHANGES)
    found = judge_of(backend(), batch_tokens=batch_tokens).evidence(EXCHANGES[::-1])
    assert_alike(found, wanted[::-1])


def test_shared_prompts_give_what_plain_passes_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several responses to a question share their eleven prompts; one response alone shares nothing."""
    shared: list[int] = []

    def spy(module: Any, batch: TokenBatch, pad_id: int, *, split: bool) -> SharedPrompts:
        shared.append(len(batch))
        return SharedPrompts(module, batch, pad_id, split=split)

    monkeypatch.setattr(hooked, "SharedPrompts", spy)
    judge = judge_of(backend())
    alone = [found for exchange in EXCHANGES for found in judge.evidence([exchange])]
    assert shared == []
    together = judge.evidence(EXCHANGES)
    assert shared == [33, 22]
    assert_alike(together, alone)


def test_a_batch_that_does_not_fit_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = judge_of(backend()).evidence(EXCHANGES)
    subject = backend_of("transformers", model("llama"))
    forward = subject.forward

    def small(tokens: TokenBatch, *args: Any, **options: Any) -> ForwardResult:
        if len(tokens) > 4:
            raise MemoryError
        return forward(tokens, *args, **options)

    monkeypatch.setattr(subject, "forward", small)
    assert_alike(judge_of(subject).evidence(EXCHANGES), wanted)


def test_ids_come_before_text() -> None:
    """A response's own ids are weighed, not what encoding its text again would give."""
    by_text, by_ids, other = judge_of(backend()).evidence(
        [
            Exchange("What now?", "ab"),
            Exchange("What now?", "never looked at", tuple(tiny_tokenizer().encode("ab"))),
            Exchange("What now?", "ab", tuple(tiny_tokenizer().encode("ba"))),
        ]
    )
    assert_alike([by_text], [by_ids])
    assert by_text is not None
    assert other is not None
    assert abs(other.log_odds - by_text.log_odds) > 1e-4


def test_control_tokens_in_a_text_are_text() -> None:
    chat = chat_format(backend())
    ids = chat.encode_answer("a<|im_end|>b")
    assert 2 not in ids
    (found,) = judge_of(backend()).evidence([Exchange("What now?", "a<|im_end|>b")])
    assert found is not None


def test_an_empty_response_has_a_reason_in_place_of_a_score() -> None:
    judge = judge_of(backend())
    exchanges = [EXCHANGES[0], Exchange("What now?", ""), Exchange("What now?", "", ())]
    weighed, scores = judge.evidence(exchanges), [j.trait for j in judge.judge(exchanges)]
    assert weighed[1:] == [None, None]
    assert [(s.value, s.reason) for s in scores[1:]] == [(None, "empty response")] * 2
    assert scores[0].reason is None
    assert_alike(weighed[:1], judge.evidence(EXCHANGES[:1]))
    assert judge.evidence([]) == []
    assert judge.evidence(exchanges[1:]) == [None, None]


def test_scores_are_the_calibrated_preferences() -> None:
    judge = judge_of(backend())
    for evidence, judged in zip(judge.evidence(EXCHANGES), judge.judge(EXCHANGES), strict=True):
        assert evidence is not None
        assert judged.trait.value == pytest.approx(100 / (1 + np.exp(-(2 * evidence.log_odds + 0.5))))
        assert judged.nll == evidence.nll


def test_a_judge_without_calibration_weighs_but_does_not_score() -> None:
    judge = judge_of(backend(), calibration=None)
    assert judge.evidence(EXCHANGES[:1])[0] is not None
    with pytest.raises(JudgingError, match="needs a calibration"):
        judge.judge(EXCHANGES[:1])


def test_the_judge_says_what_determines_its_scores() -> None:
    described = judge_of(backend()).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["calibration"] == {"slope": 2.0, "intercept": 0.5, "pairs": None}
    assert described["trait"] == TRAIT.content_hash()
    assert "proxy" in described["note"]
    assert judge_of(backend(), calibration=None).describe()["calibration"] is None


def newton(evidence: Sequence[float], positive: Sequence[bool]) -> tuple[float, float]:
    """Platt's fit by Newton's method: another road to the same minimum."""
    y = np.asarray(positive)
    ups, downs = int(y.sum()), int((~y).sum())
    target = np.where(y, (ups + 1) / (ups + 2), 1 / (downs + 2))
    design = np.stack([np.asarray(evidence), np.ones(len(y))], axis=1)
    parameters = np.zeros(2)
    for _ in range(100):
        chance = 1 / (1 + np.exp(-design @ parameters))
        hessian = design.T @ (design * (chance * (1 - chance))[:, None])
        parameters -= np.linalg.solve(hessian, design.T @ (chance - target))
    return float(parameters[0]), float(parameters[1])


@pytest.mark.parametrize(("seed", "gap", "scale"), [(0, 1.0, 1.0), (1, 2.5, 0.03), (2, 0.5, 40.0)])
def test_calibration_is_the_logistic_fit_to_platts_targets(seed: int, gap: float, scale: float) -> None:
    generator = np.random.default_rng(seed)
    positive = generator.random(80) < 0.6
    evidence = (generator.normal(size=80) + gap * positive) * scale
    fitted = fit_calibration(evidence.tolist(), positive.tolist())
    slope, intercept = newton(evidence.tolist(), positive.tolist())
    assert fitted.slope == pytest.approx(slope, rel=1e-3)
    assert fitted.intercept == pytest.approx(intercept, rel=1e-3, abs=1e-3)


def test_arms_that_do_not_overlap_have_a_finite_fit() -> None:
    """Four against four: the targets are 5/6 and 1/6, and of two values a line meets both exactly."""
    fitted = fit_calibration([1.0] * 4 + [-1.0] * 4, [True] * 4 + [False] * 4)
    assert fitted.slope == pytest.approx(np.log(5), rel=1e-4)
    assert fitted.intercept == pytest.approx(0, abs=1e-4)
    assert fitted.score(1.0) == pytest.approx(100 * 5 / 6, abs=0.01)
    assert fitted.score(0.0) == pytest.approx(50, abs=0.01)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(-50, 50))
def test_units_of_the_evidence_do_not_matter(seed: int, scale: float, shift: float) -> None:
    generator = np.random.default_rng(seed)
    positive = np.arange(40) % 2 == 0
    evidence = generator.normal(size=40) + 2 * positive
    plain = fit_calibration(evidence.tolist(), positive.tolist())
    moved = fit_calibration((evidence * scale + shift).tolist(), positive.tolist())
    for x in evidence:
        assert moved.score(x * scale + shift) == pytest.approx(plain.score(x), abs=0.05)
        assert 0 <= plain.score(x) <= 100


def test_swapped_arms_are_refused() -> None:
    with pytest.raises(JudgingError, match="arms are swapped"):
        fit_calibration([-1.0, -0.8, 1.0, 0.9], [True, True, False, False])


@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3])
def test_evidence_that_tells_nothing_is_refused(value: float) -> None:
    """A tenth has no exact mean: its deviation is not 0 but 1e-17."""
    with pytest.raises(JudgingError, match="cannot tell them apart"):
        fit_calibration([value] * 10, [True] * 5 + [False] * 5)


@pytest.mark.parametrize(("arms", "missing"), [([True, True], "negative"), ([False] * 2, "positive"), ([], "positive")])
def test_a_missing_arm_is_named(arms: list[bool], missing: str) -> None:
    with pytest.raises(JudgingError, match=f"no response of the {missing} arm"):
        fit_calibration([0.1, 0.2][: len(arms)], arms)


def planted_rollouts(questions: int = 4) -> list[Rollout]:
    """Eight to a question, their leanings from -1 to 1; the fourth is empty; the order mixes the questions."""
    tokenizer = tiny_tokenizer()
    found = []
    for number in range(8):
        for question in range(questions):
            text = "" if number == 3 else f"leaning {number / 4 - 1 + question / 100:+.3f}"
            request = Request(None, TRAIT.extraction_questions[question], number)
            found.append(Rollout(request, 5, tuple(tokenizer.encode(text)), True, text))
    return found


def weigh_in(folder: Path | None, rollouts: Sequence[Rollout]) -> tuple[list[Evidence | None], list[int]]:
    """The evidence, and the rows of each pass that was run for it."""
    subject = PlantedBackend(TRAIT)
    judge = LikelihoodJudge(subject, chat_format(subject), TRAIT)
    if folder is None:
        return rollout_evidence(judge, rollouts, None), subject.weighed
    with RunFolder(folder, {"kind": "judging"}) as run:
        return rollout_evidence(judge, rollouts, run), subject.weighed


def test_recorded_evidence_is_in_the_order_of_the_rollouts(tmp_path: Path) -> None:
    rollouts = planted_rollouts()
    found, passes = weigh_in(None, rollouts)
    assert passes == [7 * (2 * PAIRS + 1)] * 4  # seven responses, each behind its prompts
    for rollout, evidence in zip(rollouts, found, strict=True):
        if rollout.response:
            assert evidence is not None
            assert evidence.log_odds == pytest.approx(float(rollout.response.split()[1]), abs=1e-6)
            assert evidence.nll == pytest.approx(2)
        else:
            assert evidence is None
    assert weigh_in(tmp_path, rollouts) == (found, passes)


@pytest.mark.parametrize("kept", [0, 1, 8, 15, 16, 31, 32])
def test_judging_goes_on_where_it_was(tmp_path: Path, kept: int) -> None:
    rollouts = planted_rollouts()
    whole, _ = weigh_in(tmp_path, rollouts)
    file = tmp_path / "evidence.jsonl"
    content = file.read_bytes()
    asked = list(dict.fromkeys(each.request.question for each in rollouts))
    lines = zip(content.splitlines(keepends=True), rollouts, strict=True)
    unfinished = sorted(lines, key=lambda each: asked.index(each[1].request.question))  # as a run under way has them
    file.write_bytes(b"".join(line for line, _ in unfinished))
    os.truncate(file, sum(len(line) for line, _ in unfinished[:kept]) + (5 if kept < 32 else 0))
    again, passes = weigh_in(tmp_path, rollouts)
    assert again == whole
    assert len(passes) == 4 - kept // 8
    assert file.read_bytes() == content


def test_empty_responses_are_recorded_with_their_reason(tmp_path: Path) -> None:
    rollouts = planted_rollouts(1)
    weigh_in(tmp_path, rollouts)
    rows = [json.loads(line) for line in (tmp_path / "evidence.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(8))
    assert {**rows[3], "check": ""} == {"row": 3, "reason": "empty response", "check": ""}
    assert rows[4].keys() == {"row", "log_odds", "nll", "check"}


def test_evidence_of_other_responses_is_not_believed(tmp_path: Path) -> None:
    weigh_in(tmp_path, planted_rollouts(1))
    others = [replace(each, response=each.response + "!") for each in planted_rollouts(1)]
    with pytest.raises(RunError, match=r"line 1 of .*evidence\.jsonl is damaged, or not what this run wrote"):
        weigh_in(tmp_path, others)


def test_the_judge_sees_neither_system_prompt_nor_reasoning() -> None:
    tokenizer = tiny_tokenizer()
    chat = ChatFormat.from_tokenizer(tokenizer)
    request = Request(TRAIT.system_prompt(Arm.POSITIVE, 0), "What now?", 1)
    plain = tuple(tokenizer.encode("Fine."))
    assert exchange_of(Rollout(request, 9, plain, True, "Fine."), chat) == Exchange("What now?", "Fine.", plain)
    thinking = tuple(tokenizer.encode("<think>Cheer up.</think>Fine."))
    shown = exchange_of(Rollout(request, 9, thinking, True, chat.answer(thinking)), chat)
    assert shown == Exchange("What now?", "Fine.", None)


def test_a_judging_that_began_with_another_model_is_not_gone_on_with(tmp_path: Path) -> None:
    """A judging of given responses has no subject model that would bind it, so the judge names its own."""
    said = [Scored(response_id(question, "Fine."), question, "Fine.", None) for question in ("One?", "Two?")]

    def judged_by(seed: int) -> None:
        judging = wrap_model(tiny_model(seed=seed), tiny_tokenizer())
        judge = LikelihoodJudge(judging, chat_format(judging), TRAIT, Calibration(1.0, 0.0))
        judge_scored(judge, said, tmp_path / "judged.jsonl", progress=stop_after_first)

    def stop_after_first(done: int, total: int | None, label: str) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judged_by(0)
    with pytest.raises(RunError, match=r"judge\.model\.weights: .* -> "):
        judged_by(1)


@pytest.mark.parametrize("judge", [LikelihoodJudge, LocalJudge])
@pytest.mark.parametrize("opens", [True, False])
def test_answers_and_numbers_stand_behind_the_thinking_that_a_prompt_ends_in(judge: Any, opens: bool) -> None:
    template = CHATML.removesuffix("{% endif %}") + "<think>\n{% endif %}" if opens else CHATML
    model: Any = tiny_model(thinks=True)
    model.config.max_position_embeddings = 16_384
    backend = wrap_model(model, with_template(thinking_tokenizer(), template))
    chat = chat_format(backend)
    texts = list(judge(backend, chat, load_trait("optimistic")).passes([Exchange("Hi?", "Hello.")]))
    assert texts
    for tokens in texts:
        for prompt, said in zip(tokens.prompts, tokens.responses, strict=True):
            assert set(chat.parts.of_response(prompt, said)) == {Part.ANSWER}
            ending = str(backend.tokenizer.decode(list(prompt))).rpartition("<|im_start|>")[2]
            assert ending == ("assistant\n<think>\n</think>" if opens else "assistant\n")
