"""Extraction: planted differences come back, and a real model's vectors are those worked out another way."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from persona_lens.backend import Backend
from persona_lens.extraction import (
    Extraction,
    ExtractionSettings,
    extract,
    filter_responses,
    plan_requests,
)
from persona_lens.extraction.means import ExtractionError, arm_means, held_out_separation
from persona_lens.judging import Judgement, JudgingError, Score
from persona_lens.judging.reading import PAIRS
from persona_lens.models.chat import chat_format
from persona_lens.runs import RunError
from persona_lens.runs.rollouts import Request
from persona_lens.runs.settings import RolloutSettings, settings_json
from persona_lens.traits import Arm, load_trait
from persona_lens.vectors import load_vectors
from persona_lens.vectors.separation import separation_row
from tests.backends.fixtures import ADAPTERS, backend_of, tiny_backend
from tests.planted import PlantedBackend
from tests.tiny import D_MODEL, N_LAYERS, tiny_model

TRAIT = load_trait("optimistic")
POSITIVE, NEGATIVE = Arm.POSITIVE, Arm.NEGATIVE
# A random model follows instructions a little, since a response is likelier after the very prompt that it was sampled
# from; so it can be calibrated, but its twins seldom pass together.
TINY = ExtractionSettings(questions=4, paired=False, rollouts=RolloutSettings(max_new_tokens=16, batch_size=8))


def request(arm: Arm, question: int = 0, pair: int = 0, sample: int = 0) -> Request:
    labels = {"arm": arm.value, "question_number": question, "pair": pair, "sample": sample}
    return Request(None, "What now?", 0, labels)


def reductions_of(
    requests: Sequence[Request], rows: dict[str, Tensor], size: int = 7
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Rows in shards, the last request first."""
    order = list(range(len(requests)))[::-1]
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        yield batch, {name: values[batch] for name, values in rows.items()}


# What is asked


def test_every_question_is_asked_under_both_instructions_of_every_pair() -> None:
    requests = plan_requests(TRAIT, ExtractionSettings(samples=2, questions=3))
    assert len(requests) == 3 * 5 * 2 * 2
    labels = [tuple(r.labels.values()) for r in requests]
    assert len(set(labels)) == len(labels)
    for r in requests:
        arm, pair = Arm(r.labels["arm"]), r.labels["pair"]
        assert r.system == TRAIT.system_prompt(arm, pair)
        assert r.question == TRAIT.extraction_questions[r.labels["question_number"]]
    for positive, negative in zip(requests[::2], requests[1::2], strict=True):
        assert (positive.labels["arm"], negative.labels["arm"]) == ("positive", "negative")
        assert {**positive.labels, "arm": ""} == {**negative.labels, "arm": ""}
    assert len({r.seed for r in requests}) == len(requests)


def test_more_samples_keep_the_seeds_of_the_first_ones() -> None:
    few = {tuple(r.labels.values()): r.seed for r in plan_requests(TRAIT, ExtractionSettings(samples=1, questions=2))}
    many = {tuple(r.labels.values()): r.seed for r in plan_requests(TRAIT, ExtractionSettings(samples=3, questions=4))}
    assert few.items() <= many.items()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"questions": 1}, "questions must be at least 2"),
        ({"threshold": 0.0}, "threshold must be between 0 and 100"),
        ({"threshold": 100.0}, "threshold must be between 0 and 100"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ExtractionError, match=message):
        ExtractionSettings(**wrong)


def test_more_questions_than_there_are_claim_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ExtractionError, match="21 questions asked for, trait optimistic has 20"):
        extract(PlantedBackend(TRAIT), TRAIT, tmp_path / "run", settings=ExtractionSettings(questions=21))
    assert not (tmp_path / "run").exists()


# Which responses count


def judged(value: float | None, coherence: float | None = None) -> Judgement:
    trait = Score(None, "empty response") if value is None else Score(float(value))
    return Judgement(trait, Score(float(coherence)) if coherence is not None else None)


def filtering(paired: bool) -> ExtractionSettings:
    return ExtractionSettings(threshold=50.0, coherence=50.0, paired=paired)


FILTER_CASES: list[tuple[float | None, float | None, tuple[bool, bool], tuple[bool, bool]]] = [
    # positive, negative: kept paired, kept unpaired
    (80.0, 20.0, (True, True), (True, True)),
    (50.0, 49.999, (True, True), (True, True)),  # at the threshold is positive
    (50.0, 50.0, (False, False), (True, False)),
    (49.999, 0.0, (False, False), (False, True)),
    (10.0, 90.0, (False, False), (False, False)),
    (None, 20.0, (False, False), (False, True)),
    (80.0, None, (False, False), (True, False)),
    (None, None, (False, False), (False, False)),
    (100.0, 0.0, (True, True), (True, True)),
]


@pytest.mark.parametrize("paired", [True, False])
def test_the_filter_keeps_what_it_should(paired: bool) -> None:
    requests = [request(arm, pair=pair) for pair in range(len(FILTER_CASES)) for arm in (POSITIVE, NEGATIVE)]
    scores = [judged(value) for positive, negative, _, _ in FILTER_CASES for value in (positive, negative)]
    expected = [kept for _, _, together, alone in FILTER_CASES for kept in (together if paired else alone)]
    order = np.random.default_rng(0).permutation(len(requests)).tolist()  # twins need not stand side by side
    found = filter_responses([requests[i] for i in order], [scores[i] for i in order], filtering(paired))
    assert found.kept == tuple(expected[i] for i in order)


def test_the_filter_counts_why_responses_went() -> None:
    requests = [request(arm, pair=pair) for pair in range(len(FILTER_CASES)) for arm in (POSITIVE, NEGATIVE)]
    scores = [judged(value) for positive, negative, _, _ in FILTER_CASES for value in (positive, negative)]
    paired = filter_responses(requests, scores, filtering(True)).counts
    assert paired["positive"] == {"kept": 3, "failed_threshold": 2, "incoherent": 0, "lost_twin": 2, "no_score": 2}
    assert paired["negative"] == {"kept": 3, "failed_threshold": 2, "incoherent": 0, "lost_twin": 2, "no_score": 2}
    unpaired = filter_responses(requests, scores, filtering(False)).counts
    assert unpaired["positive"] == {"kept": 5, "failed_threshold": 2, "incoherent": 0, "lost_twin": 0, "no_score": 2}
    assert unpaired["negative"] == {"kept": 5, "failed_threshold": 2, "incoherent": 0, "lost_twin": 0, "no_score": 2}


@pytest.mark.parametrize("paired", [True, False])
def test_incoherent_responses_do_not_count(paired: bool) -> None:
    requests = [request(arm, pair=pair) for pair in range(3) for arm in (POSITIVE, NEGATIVE)]
    judgements = [judged(90, 50), judged(10, 49.9), judged(90, 49), judged(10, 20), judged(90, 100), judged(10, 100)]
    found = filter_responses(requests, judgements, filtering(paired))
    assert found.kept == (not paired, False, False, False, True, True)
    assert found.counts["positive"]["incoherent"] == 1
    assert found.counts["negative"]["incoherent"] == 2
    unread = Judgement(Score(90.0), Score(None, "refusal"))
    with pytest.raises(ExtractionError, match=r"positive arm is left.*3 of them were not coherent \(below 50\)"):
        filter_responses(
            requests, [unread if r.labels["arm"] == POSITIVE else judged(10, 99) for r in requests], filtering(False)
        )


def test_an_arm_left_empty_is_named_with_its_scores() -> None:
    requests = [request(arm, pair=pair) for pair in range(3) for arm in (POSITIVE, NEGATIVE)]
    scores = [judged(value) for pair in ((12.0, 5.0), (30.0, 1.0), (41.0, 2.0)) for value in pair]
    with pytest.raises(ExtractionError) as refused:
        filter_responses(requests, scores, filtering(True))
    message = str(refused.value)
    assert "no response of the positive arm is left" in message
    assert "from 12 to 41, median 30" in message
    assert "threshold is 50" in message
    assert "--unpaired" in message
    with pytest.raises(ExtractionError) as unpaired:
        filter_responses(requests, scores, filtering(False))
    assert "--unpaired" not in str(unpaired.value)
    unscored = [judged(80.0) if r.labels["arm"] == "positive" else judged(None) for r in requests]
    with pytest.raises(ExtractionError, match=r"negative arm is left: its scores were none at all.*empty response"):
        filter_responses(requests, unscored, filtering(False))


# Means and separation


def test_means_are_those_of_the_kept_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    requests = [request(arm, question=q, pair=p) for q in range(4) for p in range(3) for arm in (POSITIVE, NEGATIVE)]
    rows = {name: torch.randn(len(requests), 2, 5, generator=generator) for name in ("response_mean", "prompt_last")}
    kept = (torch.rand(len(requests), generator=generator) < 0.6).tolist()
    found = arm_means(requests, kept, lambda: reductions_of(requests, rows)).difference()
    arms = np.array([r.labels["arm"] == "positive" for r in requests])
    for name, values in rows.items():
        wide = values.double().numpy()
        expected = wide[arms & np.array(kept)].mean(axis=0) - wide[~arms & np.array(kept)].mean(axis=0)
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-6, atol=1e-7)


def test_rows_that_are_not_kept_may_hold_anything() -> None:
    requests = [request(arm, question=q) for q in range(2) for arm in (POSITIVE, NEGATIVE) for _ in range(2)]
    rows = torch.ones(len(requests), 1, 2)
    kept = [index % 2 == 0 for index in range(len(requests))]
    rows[~torch.tensor(kept)] = torch.nan
    found = arm_means(requests, kept, lambda: reductions_of(requests, {"response_mean": rows}))
    assert found.difference()["response_mean"].tolist() == [[0.0, 0.0]]


def test_sums_survive_massive_activations() -> None:
    """Two thousand rows near a million that differ by three eighths: a float32 sum loses the difference."""
    requests = [
        request(arm, question=q, sample=s) for q in range(2) for s in range(500) for arm in (POSITIVE, NEGATIVE)
    ]
    sign = torch.tensor([1.0 if r.labels["arm"] == "positive" else 0.0 for r in requests])
    rows = (2.0**20 + sign * 0.375).reshape(-1, 1, 1)
    assert rows[0] != rows[1]  # the rows themselves hold it
    found = arm_means(requests, [True] * len(requests), lambda: reductions_of(requests, {"response_mean": rows}))
    assert found.difference()["response_mean"].item() == 0.375
    naive = torch.zeros(2)
    for row, positive in zip(rows.flatten(), sign.long(), strict=True):
        naive[positive] += row
    assert (naive[1] - naive[0]).item() / 1000 != 0.375


def separations(difference: float, seed: int = 0, d_model: int = 64) -> list[dict[str, Any]]:
    """Of 160 rows of noise, the arms apart by so many standard deviations along one direction."""
    generator = torch.Generator().manual_seed(seed)
    requests = [request(arm, question=q, pair=p) for q in range(16) for p in range(5) for arm in (POSITIVE, NEGATIVE)]
    rows = torch.randn(len(requests), 3, d_model, generator=generator)
    direction = torch.randn(3, d_model, generator=generator)
    direction /= direction.norm(dim=-1, keepdim=True)
    sign = torch.tensor([1.0 if r.labels["arm"] == "positive" else -1.0 for r in requests])
    rows += sign.reshape(-1, 1, 1) / 2 * difference * direction
    kept = [True] * len(requests)
    means = arm_means(requests, kept, lambda: reductions_of(requests, {"response_mean": rows}))
    # Random directions of another seed than the noise: those of the same one would be its first rows.
    reductions = {"response_mean": rows}
    return held_out_separation(requests, kept, lambda: reductions_of(requests, reductions), means, 1000 + seed)


def test_noise_does_not_separate_on_held_out_questions() -> None:
    """On the rows it was made from, a difference of means of noise would: 64 dimensions, 160 rows, AUC about 0.8."""
    found = [row for seed in range(8) for row in separations(0, seed)]
    assert np.mean([row["auc"] for row in found]) == pytest.approx(0.5, abs=0.04)
    assert max(row["auc"] for row in found) < 0.7
    assert np.mean([row["d_prime"] for row in found]) == pytest.approx(0, abs=0.15)


def test_the_null_is_what_nineteen_of_twenty_random_directions_stay_below() -> None:
    """On 160 rows of noise an AUC has the standard deviation sqrt(161 / (12 * 80 * 80)), a d' sqrt(2 / 80)."""
    found = [row for seed in range(10) for row in separations(0.0, seed)]
    # The quantile of twenty draws lies a little lower than that of all, at 1.7 deviations rather than 2.
    aucs, d_primes = (np.array([row[name] for row in found]) for name in ("random_auc", "random_d_prime"))
    assert 1.5 < (aucs.mean() - 0.5) / np.sqrt(161 / (12 * 80 * 80)) < 2
    assert 1.5 < d_primes.mean() / np.sqrt(2 / 80) < 2
    assert sum(row["auc"] > row["random_auc"] for row in found) <= len(found) / 5


def test_a_planted_direction_separates() -> None:
    found = separations(4)
    assert [row["layer"] for row in found] == [0, 1, 2]
    for row in found:
        assert row["auc"] > 0.97
        assert row["d_prime"] > 2.5
        assert row["random_auc"] < row["auc"]
        assert row["random_d_prime"] < row["d_prime"] / 2
        assert row["better"]


def test_a_layer_does_better_only_by_both_measures() -> None:
    rng = np.random.default_rng(0)
    shown = {(arm, fold): rng.normal(size=(21, 30)) for arm in (POSITIVE, NEGATIVE) for fold in (0, 1)}
    for fold in (0, 1):
        shown[POSITIVE, fold][0] = np.r_[np.full(26, 1.0), np.full(4, -40.0)]  # mostly above, and far below on average
        shown[NEGATIVE, fold][0] = 0.0
    row = separation_row(0, [(shown[POSITIVE, fold], shown[NEGATIVE, fold]) for fold in (0, 1)])
    assert row["auc"] > row["random_auc"]
    assert row["d_prime"] < row["random_d_prime"]
    assert not row["better"]


def test_separation_is_that_worked_out_by_hand() -> None:
    """Two dimensions: fold 0 lies along the first axis, fold 1 along the second."""
    requests = [request(arm, question=q, sample=s) for q in (0, 1) for s in (0, 1) for arm in (POSITIVE, NEGATIVE)]
    points = [(2, 1), (0, 0), (2, 2), (0, -3), (7, 3), (5, 0), (4, 5), (6, 0)]
    rows = torch.tensor(points, dtype=torch.float32).unsqueeze(1)
    kept = [True] * 8
    means = arm_means(requests, kept, lambda: reductions_of(requests, {"response_mean": rows}))
    (row,) = held_out_separation(requests, kept, lambda: reductions_of(requests, {"response_mean": rows}), means, 0)
    # Fold 1's direction is (0, 4): fold 0 gives its second entries. Fold 0's is (2, 3): fold 1 gives (2x + 3y)/√13.
    folds = [([1.0, 2], [0.0, -3]), ([23.0, 23], [10.0, 12])]
    d_primes = []
    for positive, negative in folds:
        pooled = np.sqrt((np.var(positive, ddof=1) + np.var(negative, ddof=1)) / 2)
        d_primes.append((np.mean(positive) - np.mean(negative)) / pooled)
    assert row["d_prime"] == pytest.approx(np.mean(d_primes))
    assert row["auc"] == 1


def test_a_fold_without_an_arm_has_no_separation() -> None:
    requests = [request(arm, question=q) for q in (0, 1) for arm in (POSITIVE, NEGATIVE)]
    rows = {"response_mean": torch.ones(4, 1, 2)}
    kept = [True, True, True, False]
    means = arm_means(requests, kept, lambda: reductions_of(requests, rows))
    assert held_out_separation(requests, kept, lambda: reductions_of(requests, rows), means, 0) == []


# The whole of it, over planted activations


def test_the_planted_difference_is_recovered_to_the_bit(tmp_path: Path) -> None:
    backend = PlantedBackend(TRAIT)
    settings = ExtractionSettings(questions=4, samples=2)
    vectors = extract(backend, TRAIT, tmp_path, settings=settings).vectors
    assert vectors.directions.keys() == backend.planted.keys()
    for name, planted in backend.planted.items():
        torch.testing.assert_close(vectors.directions[name], planted, rtol=0, atol=1e-6)
        assert vectors.directions[name].dtype == torch.float32
    assert torch.equal(load_vectors(tmp_path).directions["response_mean"], vectors.directions["response_mean"])
    assert vectors.trait == "optimistic"


@pytest.mark.parametrize("paired", [True, False])
def test_responses_against_their_instruction_do_not_count(paired: bool) -> None:
    """A tenth of them disobey: without the filter the vector would be a fifth shorter."""
    backend = PlantedBackend(TRAIT, disobeys=lambda seed: seed % 10 == 0)
    found = extract(backend, TRAIT, settings=ExtractionSettings(questions=6, paired=paired))
    disobeying = dict.fromkeys(Arm, 0)
    for rollout in found.rollouts:
        disobeying[Arm(rollout.request.labels["arm"])] += rollout.request.seed % 10 == 0
    assert all(disobeying.values())
    for arm in Arm:
        counts = found.summary["counts"][arm.value]
        assert counts["failed_threshold"] == disobeying[arm]
        assert counts["kept"] + counts["lost_twin"] + counts["failed_threshold"] == 30
        assert (counts["lost_twin"] > 0) == paired
    planted = backend.planted["response_mean"]
    torch.testing.assert_close(found.vectors.directions["response_mean"], planted, rtol=0, atol=1e-6)


def test_empty_responses_are_counted_and_left_out(tmp_path: Path) -> None:
    backend = PlantedBackend(TRAIT, silent=lambda seed: seed % 7 == 0)
    found = extract(backend, TRAIT, tmp_path, settings=ExtractionSettings(questions=6))
    silent = [r.request.seed % 7 == 0 for r in found.rollouts]
    assert any(silent)
    assert sum(c["no_score"] for c in found.summary["counts"].values()) == sum(silent)
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in rows] == ["empty response" if empty else None for empty in silent]
    assert not any(row["kept"] for row, empty in zip(rows, silent, strict=True) if empty)
    torch.testing.assert_close(
        found.vectors.directions["response_mean"], backend.planted["response_mean"], rtol=0, atol=1e-6
    )


def test_a_model_that_does_the_opposite_is_refused() -> None:
    with pytest.raises(JudgingError, match="does not follow the trait's instructions, or the arms are swapped"):
        extract(PlantedBackend(TRAIT, disobeys=lambda seed: True), TRAIT, settings=ExtractionSettings(questions=2))


def test_a_model_that_says_nothing_is_refused() -> None:
    with pytest.raises(JudgingError, match="no response of the positive arm"):
        extract(PlantedBackend(TRAIT, silent=lambda seed: True), TRAIT, settings=ExtractionSettings(questions=2))


def test_held_out_separation_stands_in_the_summary() -> None:
    settings = ExtractionSettings(questions=8)
    clear = extract(PlantedBackend(TRAIT, noise=1.0), TRAIT, settings=settings).summary["separation"]
    assert [row["layer"] for row in clear] == list(range(N_LAYERS))
    assert min(row["auc"] for row in clear) > 0.95


def test_provenance_holds_all_that_made_the_vectors(tmp_path: Path) -> None:
    backend = PlantedBackend(TRAIT)
    settings = ExtractionSettings(questions=3, seed=5, rollouts=RolloutSettings(max_new_tokens=20, top_p=0.9))
    found = extract(backend, TRAIT, tmp_path, settings=settings)
    kept = load_vectors(tmp_path).provenance
    assert kept == found.vectors.provenance == json.loads(json.dumps(kept))
    assert kept["settings"] == json.loads(json.dumps(settings_json(settings)))
    assert kept["model"]["weights"] == "sha256:planted"
    assert kept["trait"]["content_hash"] == TRAIT.content_hash()
    assert kept["trait"]["instructions"][0]["positive"] == TRAIT.instructions[0].positive
    assert kept["judge"] == found.judge.describe()
    assert kept["judge"]["calibration"]["slope"] > 0
    assert kept["counts"]["positive"]["kept"] == 15
    assert kept["versions"].keys() == {"persona-lens", "torch", "transformers"}
    assert kept["chat"]["digest"] == chat_format(backend).digest
    assert str(tmp_path) not in json.dumps(dict(kept))
    run = json.loads((tmp_path / "run.json").read_text())
    # What no vector depends on is kept with them all the same, and makes no run another run.
    assert kept["trait"].pop("graded_prompts") == list(TRAIT.graded_prompts)
    assert {**{key: kept[key] for key in run}, "judge": {"judge": "likelihood", "pairs": PAIRS}} == run


def test_a_folder_belongs_to_one_extraction(tmp_path: Path) -> None:
    extract(PlantedBackend(TRAIT), TRAIT, tmp_path, settings=ExtractionSettings(questions=2, judge_pairs=1))
    with pytest.raises(RunError) as refused:
        extract(PlantedBackend(TRAIT), TRAIT, tmp_path, settings=ExtractionSettings(questions=3, seed=1))
    assert f"judge.pairs: 1 -> {PAIRS}" in str(refused.value)
    assert "settings.questions: 2 -> 3" in str(refused.value)
    assert "settings.seed: 0 -> 1" in str(refused.value)


def test_memory_and_folder_give_the_same_vectors(tmp_path: Path) -> None:
    settings = ExtractionSettings(questions=4)
    kept = extract(PlantedBackend(TRAIT, noise=0.5), TRAIT, settings=settings)
    saved = extract(PlantedBackend(TRAIT, noise=0.5), TRAIT, tmp_path, settings=settings)
    assert kept.vectors.to_bytes() == saved.vectors.to_bytes() == (tmp_path / "vectors.safetensors").read_bytes()
    assert kept.summary == saved.summary == json.loads((tmp_path / "summary.json").read_text())


# The whole of it, over a real architecture


def recomputed(module: Any, backend: Backend, folder: Path) -> dict[str, Tensor]:
    """The vectors from the files of a run: hooks of one's own on the blocks, a pass for each kept response."""
    chat = chat_format(backend)
    rollouts = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    planned = {r.seed: row for row, r in enumerate(plan_requests(TRAIT, TINY))}
    residuals: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, h: residuals.append(h[0].double())) for block in module.model.layers
    ]
    rows: dict[tuple[str, str], list[Tensor]] = {}
    for rollout in rollouts:
        if not scores[planned[rollout["seed"]]]["kept"]:
            continue
        prompt = chat.encode(rollout["system"], rollout["question"])
        residuals.clear()
        with torch.inference_mode():
            module(torch.tensor([prompt + rollout["response_ids"]]))
        h = torch.stack(residuals)
        for name, value in {
            "response_mean": h[:, len(prompt) :].mean(dim=1),
            "prompt_mean": h[:, 1 : len(prompt)].mean(dim=1),  # the first token is an attention sink
            "prompt_last": h[:, len(prompt) - 1],
        }.items():
            rows.setdefault((name, rollout["arm"]), []).append(value)
    for hook in hooks:
        hook.remove()
    names = ("response_mean", "prompt_mean", "prompt_last")
    means = {key: torch.stack(values).mean(dim=0) for key, values in rows.items()}
    return {name: (means[name, "positive"] - means[name, "negative"]).float() for name in names}


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Backend, Path, Extraction]:
    module: Any = tiny_model()
    with torch.no_grad():
        module.get_output_embeddings().weight[2] *= 3  # so that more responses end of themselves
    backend = backend_of("transformers", module)
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return module, backend, folder, extract(backend, TRAIT, folder, settings=TINY)


def test_row_l_is_the_residual_after_block_l_end_of_turn_left_out(
    tiny_run: tuple[Any, Backend, Path, Extraction],
) -> None:
    """Worked out from the files alone, over the prompt and the response without its end-of-turn token."""
    module, backend, folder, found = tiny_run
    ended = [r.ended for r in found.rollouts]
    assert 0 < sum(map(bool, ended)) < len(ended)
    expected = recomputed(module, backend, folder)
    vectors = load_vectors(folder)
    for name, rows in expected.items():
        assert rows.shape == (N_LAYERS, D_MODEL)
        torch.testing.assert_close(vectors.directions[name], rows, rtol=1e-4, atol=1e-4)
    for layer in range(N_LAYERS):
        for other in set(range(N_LAYERS)) - {layer}:
            assert not torch.allclose(vectors[layer], expected["response_mean"][other], atol=1e-2)


def test_kept_responses_are_those_whose_scores_pass(tiny_run: tuple[Any, Backend, Path, Extraction]) -> None:
    _, _, folder, found = tiny_run
    evidence = [json.loads(line) for line in (folder / "evidence.jsonl").read_text().splitlines()]
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    calibration = found.summary["judge"]["calibration"]
    for row in evidence:
        score = scores[row["row"]]
        if "reason" in row:
            assert score == {"row": row["row"], "score": None, "reason": "empty response", "kept": False}
            continue
        logit = calibration["slope"] * row["log_odds"] + calibration["intercept"]
        assert score["score"] == pytest.approx(100 / (1 + np.exp(-logit)))
        positive = found.rollouts[row["row"]].request.labels["arm"] == "positive"
        assert score["kept"] == ((score["score"] >= 50) == positive)


def test_every_backend_extracts_the_same_vectors() -> None:
    found = {adapter: extract(tiny_backend(adapter), TRAIT, settings=TINY) for adapter in ADAPTERS}
    reference = found["transformers"]
    for adapter in ADAPTERS[1:]:
        assert found[adapter].rollouts == reference.rollouts
        for name, rows in reference.vectors.directions.items():
            torch.testing.assert_close(found[adapter].vectors.directions[name], rows, rtol=1e-4, atol=1e-4)
        assert reference.vectors.model.differences(found[adapter].vectors.model) == []
