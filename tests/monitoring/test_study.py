"""Studies on a model whose behaviour is planted: every correlation is known beforehand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from persona_lens.backend import Generation
from persona_lens.backend.tokens import TokenIds
from persona_lens.extraction import ExtractionSettings, extract
from persona_lens.extraction.experiment import Subject
from persona_lens.judging import Calibration
from persona_lens.models.chat import chat_format
from persona_lens.monitoring import (
    Conditions,
    MonitoringError,
    StudySettings,
    examples_of,
    monitor_calibration,
    plan_conditions,
    study,
    study_experiment,
    threshold_for,
)
from persona_lens.reports.kinds import page_of
from persona_lens.reports.study import title
from persona_lens.runs import RunError
from persona_lens.runs.settings import RolloutSettings
from persona_lens.traits import Trait, load_trait
from persona_lens.vectors import PersonaVectors, Tuned, VectorsError, load_vectors
from tests.planted import PlantedBackend
from tests.tiny import N_LAYERS

TRAIT = load_trait("optimistic")
QUESTIONS, SLOPE = 5, 1.5
SHORT = RolloutSettings(max_new_tokens=20, batch_size=50)


class Graded(PlantedBackend):
    """Leans by -1 to 1 from the first graded prompt to the last, by 0.2 more with every example, and by the question.

    Where the last prompt token stands leans as much, times ``honest``.
    """

    honest = 1.0

    def lean(self, prompt: Sequence[int]) -> float:
        text = self.tokenizer.decode(list(prompt))
        graded = next((i for i, each in enumerate(TRAIT.graded_prompts) if each in text), None)
        asked = max(((text.rfind(q), i) for i, q in enumerate(TRAIT.evaluation_questions)), default=(-1, 0))[1]
        level = 0.0 if graded is None else (graded - 3.5) / 3.5
        return float(level + 0.2 * (text.count("assistant\n") - 1) + 0.3 * (asked % QUESTIONS - 2))

    def leanings(self, prompts: Sequence[TokenIds], seeds: Sequence[int], edits: Any) -> Tensor:
        arms = super().leanings(prompts, seeds, edits)
        own = torch.tensor([self.lean(p) if not self.arm(p) else 0.0 for p in prompts])
        return (arms + own).round(decimals=3)

    def generate(self, prompts: Any, sampling: Any, edits: Any = (), reads: Any = ()) -> Generation:
        made = super().generate(prompts, sampling, edits, reads)
        layers = {read.kind.value: list(read.resolved_layers(N_LAYERS)) for read in reads}
        return replace(made, reads={name: values[:, layers[name]] for name, values in made.reads.items()})

    def _values(self, name: str, prompts: Any, seeds: Any, leanings: Any, responses: Any) -> Tensor:
        if name != "prompt_last":
            return super()._values(name, prompts, seeds, leanings, responses)
        lean = torch.tensor([self.honest * self.lean(prompt) for prompt in prompts])
        return self.origin + lean[:, None, None] / 2 * self.planted["prompt_last"]


def model(kind: type[Graded] = Graded, trait: Trait = TRAIT) -> tuple[Graded, PersonaVectors]:
    backend = kind(TRAIT)
    provenance = {
        "trait": {"content_hash": trait.content_hash(), **trait.model_dump(mode="json")},
        "judge": {"calibration": Calibration(SLOPE, 0.0).to_json()},
    }
    return backend, PersonaVectors(
        "optimistic", backend.info, {"response_mean": backend.planted["prompt_last"]}, provenance
    )


def settings(**changes: Any) -> StudySettings:
    return StudySettings(**{"questions": QUESTIONS, "samples": 2, "random_directions": 3, "rollouts": SHORT, **changes})


def expected(honest: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Leaning and score of each question and graded prompt, a row a prompt."""
    leanings = np.array([(i - 3.5) / 3.5 + 0.3 * (q - 2) for q in range(QUESTIONS) for i in range(8)])
    return honest * leanings, 100 / (1 + np.exp(-SLOPE * leanings.round(3)))


def test_correlations_are_those_of_the_planted_values(tmp_path: Path) -> None:
    backend, vectors = model()
    found = study(backend, vectors, settings(), folder=tmp_path)
    leaning, score = expected()
    group = found.summary["groups"]["prompts"]
    assert [each["layer"] for each in group["layers"]] == list(range(N_LAYERS))
    r = float(np.corrcoef(leaning, score)[0, 1])
    for each in group["layers"]:
        assert each["pearson"]["value"] == pytest.approx(r, abs=1e-4)
        assert each["spearman"]["value"] == pytest.approx(1, abs=1e-3)
        assert each["pearson"]["low"] <= r <= each["pearson"]["high"] + 1e-6
    within = [float(np.corrcoef(leaning[i::8], score[i::8])[0, 1]) for i in range(8)]
    assert group["layers"][1]["within_pearson"]["value"] == pytest.approx(np.mean(within), abs=1e-4)
    # A random direction sees the same leaning, up to its sign: here everything moves along a single direction.
    for layer, each in enumerate(group["layers"]):
        signs = [float(torch.sign(vectors.random_like(i).vector(layer) @ vectors.vector(layer))) for i in range(3)]
        assert each["null"]["mean"] == pytest.approx(r * np.mean(signs), abs=1e-3)
    assert group["ceiling"] == pytest.approx(1)
    # The verdict goes with the calibration: where random directions see as much, whoever uses it is told.
    calibration = monitor_calibration(found.vectors)
    assert calibration.verdict == found.summary["verdict"]
    assert "did not clearly do better than random" in str(replace(calibration, verdict="unclear").caveat)
    assert title({**found.summary, "verdict": "unclear"}).startswith("Not more than random directions do: r = ")
    bare = study(backend, vectors, settings(random_directions=0, layers=(1,)))
    assert bare.summary["verdict"] == "no null"
    assert "compared with no random directions" in str(monitor_calibration(bare.vectors).caveat)
    assert found.summary["counts"] == {"responses": 80, "scored": 80, "prompts": 40, "prompts_scored": 40}
    for i, each in enumerate(found.summary["conditions"]):
        assert each["mean_score"] == pytest.approx(score[i::8].mean(), abs=0.01)
        assert each["sd"] == pytest.approx(score[i::8].std(ddof=1), abs=0.01)
    direction = vectors.vector(found.summary["layer"])
    point = found.summary["points"][0]
    origin = float(backend.origin[found.summary["layer"]] @ direction / direction.norm())
    assert point["projection"] == pytest.approx(origin + leaning[0] / 2 * float(direction.norm()), abs=1e-3)
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(found.summary))


def test_the_calibration_is_stored_with_the_vectors(tmp_path: Path) -> None:
    backend, vectors = model()
    found = study(backend, vectors, settings(false_alarm_rate=0.1), folder=tmp_path)
    stored = load_vectors(tmp_path)
    assert all(torch.equal(stored.directions[name], vectors.directions[name]) for name in vectors.directions)
    assert stored.provenance["monitor"]["judge"]["judge"] == "likelihood"
    calibration = monitor_calibration(stored)
    assert calibration.layer == found.summary["layer"]
    threshold = threshold_for(calibration, 0.1)
    assert threshold.to_json() == found.summary["calibration"]["threshold"]
    # Leaning decides: everything from leaning 0 on shows the trait, and there the threshold stands.
    leaning, score = expected()
    x = calibration.observations.projections
    assert threshold.value <= x[score >= 50].min()
    assert np.sum((x >= threshold.value) & (score < 50)) <= 0.1 * np.sum(score < 50)
    assert threshold.detected is not None
    assert threshold.detected.value > 0.9
    assert calibration.probability(float(x.max())) > 0.9 > 0.1 > calibration.probability(float(x.min()))
    assert stats.spearmanr(leaning, x).statistic == pytest.approx(1, abs=1e-3)


def test_it_is_gone_on_with_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    backend, vectors = model()
    study(backend, vectors, settings(), folder=tmp_path)
    files = {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
    assert {"study-scores.jsonl", "study-prompts.jsonl", "vectors.safetensors", "summary.json"} <= set(files)
    for name in ("study-judgements.jsonl", "summary.json", "vectors.safetensors"):
        (tmp_path / name).unlink()
    (tmp_path / "study-rollouts.jsonl").write_bytes(files["study-rollouts.jsonl"][:-40])
    study(backend, vectors, settings(), folder=tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"} == files
    with pytest.raises(RunError, match=r"settings\.seed: 0 -> 1"):
        study(backend, vectors, settings(seed=1), folder=tmp_path)


def test_conditions_share_seeds_and_what_is_asked_is_known_beforehand() -> None:
    backend, vectors = model()
    subject = Subject.of(backend, vectors, planned=True)
    experiment = study_experiment(subject, settings(), plan_conditions(vectors, TRAIT, settings()))
    assert {each.label: each.rows for each in experiment.work()}["rollouts"] == QUESTIONS * 2 * 8
    seeds: dict[tuple[int, int], set[int]] = {}
    for request in experiment.requests:
        seeds.setdefault((request.labels["question_number"], request.labels["sample"]), set()).add(request.seed)
    assert {len(found) for found in seeds.values()} == {1}
    assert len(set.union(*seeds.values())) == QUESTIONS * 2


def test_examples_stand_before_the_question_as_turns() -> None:
    backend, vectors = model()
    pairs = [(f"What of {i}?", f"All will be well with {i}.") for i in range(4)]
    some = settings(conditions=Conditions.BOTH, shots=(0, 2, 4), samples=1)
    found = study(backend, vectors, some, examples=pairs)
    assert [each["name"] for each in found.summary["conditions"]][8:] == ["0 shots", "2 shots", "4 shots"]
    means = [each["mean_score"] for each in found.summary["conditions"][8:]]
    assert means[0] < means[1] < means[2]
    assert set(found.summary["groups"]) == {"prompts", "shots"}
    assert found.summary["groups"]["shots"]["prompts"] == 3 * QUESTIONS
    chat = chat_format(backend)
    text = backend.tokenizer.decode(chat.encode(None, "And I?", pairs[:1]))
    assert text == (
        "<|im_start|>user\nWhat of 0?<|im_end|>\n<|im_start|>assistant\nAll will be well with 0.<|im_end|>\n"
        "<|im_start|>user\nAnd I?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_examples_are_the_best_positive_response_to_each_question(tmp_path: Path) -> None:
    run = extract(PlantedBackend(TRAIT), TRAIT, tmp_path, settings=ExtractionSettings(questions=3, rollouts=SHORT))
    chosen = {0: (2, 95.0), 1: (0, 99.0), 2: (4, 90.0)}  # by question: the pair made best, and its score
    rows = []
    for number, rollout in enumerate(run.rollouts):
        labels = rollout.request.labels
        best, score = chosen[labels["question_number"]]
        value = 100.0 if labels["arm"] == "negative" else score if labels["pair"] == best else 60.0
        rows.append({"row": number, "score": value, "reason": None, "kept": True})
    scores = tmp_path / "scores.jsonl"
    scores.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    wanted = []
    for question in (1, 0, 2):
        (found,) = (
            rollout
            for rollout in run.rollouts
            for labels in [rollout.request.labels]
            if (labels["arm"], labels["question_number"], labels["pair"]) == ("positive", question, chosen[question][0])
        )
        wanted.append((found.request.question, found.response))
    assert examples_of(tmp_path) == wanted
    scores.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    with pytest.raises(MonitoringError, match="not a score for each of the 30"):
        examples_of(tmp_path)
    scores.write_text("".join(json.dumps({**row, "score": 101}) + "\n" for row in rows))
    with pytest.raises(MonitoringError, match=r"scores\.jsonl:1, score: .*0 to 100"):
        examples_of(tmp_path)
    scores.unlink()
    with pytest.raises(MonitoringError, match=r"there is no .*scores\.jsonl.*--examples"):
        examples_of(tmp_path)


def test_old_vectors_get_the_graded_prompts_of_the_same_trait() -> None:
    plain = TRAIT.model_copy(update={"graded_prompts": ()})
    assert plain.content_hash() == TRAIT.content_hash()
    backend, vectors = model(trait=plain)
    found = study(backend, vectors, settings(samples=1, questions=2))
    assert [each["system"] for each in found.summary["conditions"]] == list(TRAIT.graded_prompts)
    changed = plain.model_copy(update={"judge_rubric": plain.judge_rubric + " Be strict."})
    with pytest.raises(MonitoringError, match="'optimistic' has no graded prompts: write eight"):
        study(backend, vectors, settings(), trait=changed)


def test_extracted_vectors_carry_the_graded_prompts(tmp_path: Path) -> None:
    chosen = RolloutSettings(max_new_tokens=20, temperature=0.6, batch_size=10)
    run = extract(PlantedBackend(TRAIT), TRAIT, tmp_path, settings=ExtractionSettings(questions=2, rollouts=chosen))
    assert run.vectors.provenance["trait"]["graded_prompts"] == list(TRAIT.graded_prompts)
    assert "graded_prompts" not in json.loads((tmp_path / "run.json").read_text())["trait"]
    assert load_vectors(tmp_path).rollouts == RolloutSettings(max_new_tokens=20, temperature=0.6)
    assert model()[1].rollouts == RolloutSettings()


class Stubborn(Graded):
    """Says the same whatever it is told."""

    def leanings(self, prompts: Sequence[TokenIds], seeds: Sequence[int], edits: Any) -> Tensor:
        return torch.full((len(prompts),), -1.0)


class Silent(Graded):
    """Says nothing."""

    def leanings(self, prompts: Sequence[TokenIds], seeds: Sequence[int], edits: Any) -> Tensor:
        self.silent = lambda seed: True
        return super().leanings(prompts, seeds, edits)


def test_a_model_that_does_not_follow_is_reported_and_not_calibrated(tmp_path: Path) -> None:
    backend, vectors = model(Stubborn)
    found = study(backend, vectors, settings(), folder=tmp_path)
    group = found.summary["groups"]["prompts"]
    assert group["layers"][0]["pearson"] == {"value": None, "low": None, "high": None}
    assert len(group["left_out"]) == 8
    assert group["ceiling"] is None
    assert "no response shows 'optimistic'" in found.summary["calibration"]["reason"]
    assert "monitor" not in load_vectors(tmp_path).provenance
    page = page_of("study", found.summary)
    assert "No correlation can be given" in page
    assert "was not calibrated: no response shows" in page
    with pytest.raises(MonitoringError, match="0 of 40 prompts have a response with a score"):
        study(*model(Silent), settings())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": 1}, "at least 2"),
        ({"questions": 21}, "21 questions asked for, trait optimistic has 20"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"layers": (1, 1)}, "each once"),
        ({"false_alarm_rate": 1.0}, "above 0 and below 1"),
        ({"rollouts": RolloutSettings(temperature=0.0)}, "all samples are the same"),
        ({"conditions": Conditions.SHOTS, "shots": (5,)}, "two or more different"),
        ({"conditions": Conditions.SHOTS}, "need examples"),
    ],
)
def test_what_cannot_be_studied_claims_no_folder(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    backend, vectors = model()
    with pytest.raises(MonitoringError, match=message):
        study(backend, vectors, settings(**changes), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_too_few_examples_and_layers_that_do_not_exist() -> None:
    backend, vectors = model()
    with pytest.raises(MonitoringError, match="20 examples are asked for, but there are 1"):
        study(backend, vectors, settings(conditions=Conditions.SHOTS), examples=[("a", "b")])
    with pytest.raises(VectorsError, match="layer 9 does not exist"):
        study(backend, vectors, settings(layers=(9,)))


def test_the_page_shows_every_part_and_makes_hostile_text_harmless(tmp_path: Path) -> None:
    backend, vectors = model()
    summary = study(backend, vectors, settings()).summary
    page = page_of("study", summary, "1.2")
    assert page == page_of("study", json.loads(json.dumps(summary)), "1.2")
    for part in (
        "figure-scatter",
        "figure-layers",
        "figure-reliability",
        "Thresholds at layer",
        *TRAIT.graded_prompts[:1],
    ):
        assert part in page
    assert "://" not in page
    summary["samples"][0]["responses"][0]["text"] = "<script>alert(1)</script>\u202e"
    summary["conditions"][0]["system"] = "<img src=x>"
    hostile = page_of("study", summary)
    assert "<script>" not in hostile
    assert "<img" not in hostile
    assert "\u202e" not in hostile
    other = next(layer for layer in range(backend.info.n_layers) if layer != summary["layer"])
    tuned = vectors.with_tuned(Tuned(other, 1.0), {})
    with_tuned = study(backend, tuned, settings()).summary
    assert (with_tuned["layer"], with_tuned["layer_reason"]) == (summary["layer"], "strongest")
    assert f"At layer {other}, which was tuned for steering" in page_of("study", with_tuned)
    assert "tuned for steering" not in page
    one = study(backend, vectors, settings(layers=(1,), random_directions=0, samples=1)).summary
    assert one["layer_reason"] == "only"
    assert "figure-layers" not in page_of("study", one)
    assert "with nothing to compare it with" in page_of("study", one)
