"""Diagnostics: each measure is that worked out plainly, its null is at chance for noise, and layers are ordered."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from persona_lens.backend.blocks import module_of
from persona_lens.backend.readout import find_readout
from persona_lens.extraction import ExtractionSettings, extract
from persona_lens.runs import RunError
from persona_lens.runs.chunks import open_shard, pack_shard
from persona_lens.runs.settings import RolloutSettings
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors, VectorsError, load_vectors, random_directions
from persona_lens.vectors.diagnosis import TOKENS, Unembedding, consistency, diagnose, diagnostics_of, measured
from persona_lens.vectors.diagnostics import (
    BEYOND_CHANCE,
    MEASURES,
    Array,
    Diagnostics,
    LayerDiagnostics,
)
from persona_lens.vectors.samples import Responses, Samples, read_samples
from persona_lens.vectors.split_half import LayerReliability, _at, _by_question, _drawn_halves, agreement_of_halves
from tests.analysis.test_logits import with_gains
from tests.backends.fixtures import backend_of, tiny_backend
from tests.planted import PlantedBackend
from tests.tiny import D_MODEL, N_LAYERS

TRAIT = load_trait("optimistic")


def samples(activations: Array, questions: int, pairs: int) -> Samples:
    """Twins side by side, as an extraction plans them: [questions x pairs x arms, d_model]."""
    question = np.repeat(np.arange(questions), 2 * pairs)
    pair = np.tile(np.repeat(np.arange(pairs), 2), questions)
    n = len(question)
    positive, zeros = np.tile([True, False], n // 2), np.zeros(n, dtype=np.int64)
    return Samples(positive, question, pair, zeros, zeros + 9, np.full(n, 60.0), activations=activations)


def planted(share: float, rng: np.random.Generator, questions: int = 12, pairs: int = 4, width: int = 40) -> Samples:
    """Differences along one direction, with noise; ``share`` of the noise's length in one dimension."""
    rows = rng.normal(size=(questions * pairs * 2, width))
    rows[0::2] += share * np.ones(width)
    return samples(rows, questions, pairs)


# From the responses alone


def plain_consistency(found: Samples, swapped: Array) -> float:
    """By loops: ``swapped`` has 1 or -1 for each question."""
    differences = found.activations[0::2] - found.activations[1::2]
    questions = found.question[0::2]
    differences = differences * swapped[questions][:, None]
    by_question = []
    for question in np.unique(questions):
        others = differences[questions != question].mean(axis=0)
        own = differences[questions == question]
        cosines = [d @ others / (np.linalg.norm(d) * np.linalg.norm(others)) for d in own]
        by_question.append(np.mean(cosines))
    return float(np.mean(by_question))


def test_consistency_is_that_of_single_differences_with_those_of_other_questions() -> None:
    found = planted(0.3, np.random.default_rng(0))
    one, other = found.twins()
    differences, questions = found.activations[one] - found.activations[other], found.question[one]
    measured = consistency(differences, questions, np.random.default_rng(1))
    assert measured is not None
    assert measured[0] == pytest.approx(plain_consistency(found, np.ones(12)))
    drawn = np.where(np.random.default_rng(1).random((200, 12)) < 0.5, -1.0, 1.0)
    assert measured[1] == pytest.approx(np.quantile([plain_consistency(found, each) for each in drawn], 0.95))


def test_differences_of_uneven_questions_and_without_length_count_by_question() -> None:
    rng = np.random.default_rng(3)
    differences = np.vstack([rng.normal(size=(5, 6)), np.zeros((1, 6))])
    questions = np.array([4, 4, 4, 9, 2, 2])
    cosines = []
    for at, question in enumerate(questions):
        others = differences[questions != question].mean(axis=0)
        length = np.linalg.norm(differences[at]) * np.linalg.norm(others)
        cosines.append(differences[at] @ others / length if length else 0.0)
    expected = np.mean([np.mean(cosines[:3]), cosines[3], np.mean(cosines[4:])])
    measured = consistency(differences, questions, rng)
    assert measured is not None
    assert measured[0] == pytest.approx(expected)
    assert consistency(differences[:3], questions[:3], rng) is None


def test_noise_has_no_consistency_and_halves_that_agree_no_better_than_swapped_arms() -> None:
    rng = np.random.default_rng(5)
    beyond = {"consistency": 0, "halves": 0}
    for _ in range(40):
        found = planted(0.0, rng)
        values = measured(found, found.twins())
        for name in beyond:
            value, null = values[name], values[f"{name}_null"]
            assert value is not None
            assert null is not None
            beyond[name] += value > null
    assert max(beyond.values()) <= 6


def test_planted_layers_are_told_apart() -> None:
    rng = np.random.default_rng(6)
    for name in ("consistency", "halves"):
        values = [measured(found, found.twins()) for found in (planted(share, rng) for share in (0.0, 0.3, 1.0))]
        assert values[0][name] < values[1][name] < values[2][name]  # type: ignore[operator]
        for each in values[1:]:
            assert each[name] > each[f"{name}_null"]  # type: ignore[operator]


def test_halves_agree_as_reliability_says() -> None:
    found = planted(0.3, np.random.default_rng(0))
    value = agreement_of_halves(found, 50, np.random.default_rng(2))
    rng = np.random.default_rng(2)
    row: LayerReliability = _at(0, *_by_question(found), _drawn_halves(12, 50, rng), rng.random((50, 12)) < 0.5)
    assert value == pytest.approx((row.halves, row.null))
    assert agreement_of_halves(planted(1.0, rng, questions=3), 50, rng) is None


# What the unembedding reads


@dataclass(frozen=True)
class Given:
    """Responses at three layers, as an extraction has them."""

    layers: tuple[Samples, ...]

    @property
    def responses(self) -> Responses:
        return self.layers[0]

    def layer(self, layer: int, reduction: str = "response_mean") -> Samples:
        return self.layers[layer]


def given(seed: int = 0, share: float = 0.4) -> Given:
    rng = np.random.default_rng(seed)
    return Given(tuple(planted(share * layer, rng, width=D_MODEL) for layer in range(N_LAYERS)))


def vectors_of(backend: Any, kept: Given) -> PersonaVectors:
    rows = torch.tensor(np.stack([each.difference for each in kept.layers]), dtype=torch.float32)
    return PersonaVectors(TRAIT.name, backend.info, {"response_mean": rows})


def separated(values: Array, positive: NDArray[np.bool_]) -> float:
    p, n = values[positive], values[~positive]
    return float((p.mean() - n.mean()) / np.sqrt((p.var(ddof=1) + n.var(ddof=1)) / 2))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_what_the_unembedding_reads_is_that_of_whole_logits(architecture: str) -> None:
    backend = backend_of("transformers", with_gains(architecture))
    kept = given()
    vectors, readout = vectors_of(backend, kept), find_readout(module_of(backend))
    found = diagnostics_of(vectors, kept, unembedding=Unembedding.of(backend))
    assert readout.norm is not None
    weight, gain = readout.unembedding.detach().double().numpy(), readout.norm.gain.double().numpy()
    weight = weight[: len(backend.tokenizer)]

    def through(h: Array) -> Array:
        found: Array = (h - h.mean(axis=-1, keepdims=True) if readout.norm and readout.norm.centred else h) * gain
        return found

    def logits(h: Array) -> Array:
        centred = through(h) / gain
        found: Array = (through(h) / np.sqrt((centred**2).mean(axis=-1, keepdims=True))) @ weight.T
        return found

    shifts = through(random_directions(D_MODEL, 20, 0).double().numpy()) @ weight.T
    rises = shifts.max(axis=1) - shifts.mean(axis=1)
    for row, at in zip(found.layers, kept.layers, strict=True):
        vector = vectors[row.layer].double().numpy()
        shift = through(vector) @ weight.T
        rise = (shift.max() - shift.mean()) / np.linalg.norm(vector)
        assert row.logit_rise == pytest.approx(rise / rises.mean(), rel=1e-3)
        assert row.logit_rise_null == pytest.approx(np.quantile(rises, 0.95) / rises.mean(), rel=1e-3)
        said, fold = logits(at.activations), at.question % 2
        d_primes = []
        for test in (0, 1):
            chosen = fold != test
            means = [said[chosen & arm].mean(axis=0) for arm in (at.positive, ~at.positive)]
            order = np.argsort(means[0] - means[1])
            reading = said[:, order[-TOKENS:]].mean(axis=1) - said[:, order[:TOKENS]].mean(axis=1)
            d_primes.append(separated(reading[fold == test], at.positive[fold == test]))
        assert row.accessibility == pytest.approx(np.mean(d_primes), rel=2e-3, abs=2e-3)


def test_the_unembedding_reads_no_more_in_noise_than_in_any_tokens() -> None:
    backend, beyond, rises = tiny_backend("transformers"), 0, []
    unembedding = Unembedding.of(backend)
    for seed in range(12):
        kept = given(seed, 0.0)
        found = diagnostics_of(vectors_of(backend, kept), kept, unembedding=unembedding)
        for row in found.layers:
            assert row.accessibility is not None
            assert row.accessibility_null is not None
            beyond += row.accessibility > row.accessibility_null
            rises.append(row.logit_rise)
    assert beyond <= 5
    assert np.mean(rises) == pytest.approx(1, abs=0.12)  # type: ignore[arg-type]


def test_a_vector_that_is_a_tokens_row_rises_beyond_any_random_direction() -> None:
    backend, kept = tiny_backend("transformers"), given()
    readout = find_readout(module_of(backend))
    rows: Any = readout.unembedding.detach().float()
    towards = (rows[42] - rows.mean(dim=0)).repeat(N_LAYERS, 1)
    vectors = replace(vectors_of(backend, kept), directions={"response_mean": towards})
    for row in diagnostics_of(vectors, kept, unembedding=Unembedding.of(backend)).layers:
        assert row.logit_rise is not None
        assert row.logit_rise_null is not None
        assert 1 < row.logit_rise_null < row.logit_rise


def test_extremes_are_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    readout = find_readout(module_of(tiny_backend("transformers")))
    states = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(0))
    whole = readout.extremes(states, 7, 250)
    logits = states @ readout.unembedding.detach()[:250].T
    assert whole.highest.tolist() == logits.topk(7).indices.tolist()
    assert whole.lowest.tolist() == (-logits).topk(7).indices.tolist()
    torch.testing.assert_close(whole.rise, logits.amax(dim=1) - logits.mean(dim=1))
    monkeypatch.setattr("persona_lens.backend.readout.VOCABULARY_CHUNK", 60)
    parts = readout.extremes(states, 7, 250)
    assert (parts.highest.tolist(), parts.lowest.tolist()) == (whole.highest.tolist(), whole.lowest.tolist())
    torch.testing.assert_close(parts.rise, whole.rise)
    ids = torch.tensor([[3, 5], [7, 7]])
    rows = readout.unembedding.detach().float()
    torch.testing.assert_close(readout.mean_rows(ids), torch.stack([(rows[3] + rows[5]) / 2, rows[7]]))


# Of an extraction


def test_an_extraction_leaves_them_with_the_vectors_and_in_its_summary(run: Path) -> None:
    vectors = load_vectors(run)
    found, summary = vectors.diagnostics, json.loads((run / "summary.json").read_text())
    assert found is not None
    assert summary["diagnostics"] == vectors.provenance["diagnostics"] == found.to_json()
    assert Diagnostics.from_json(found.to_json()) == found
    kept = read_samples(run)
    assert (found.trait, found.responses, found.questions) == (TRAIT.name, len(kept.responses), 6)
    assert found.differences == len(kept.responses) // 2  # twins are kept together
    scores = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    lengths: list[Array] = []
    for file in (run / "activations").iterdir():
        header, tensors = open_shard(file)
        both = zip(header["rows"], tensors["response_norm"].double().numpy(), strict=True)
        lengths += [values for row, values in both if scores[row]["kept"]]
    for row in found.layers:
        at = kept.layer(row.layer)
        one, other = at.twins()
        plain = consistency(at.activations[one] - at.activations[other], at.question[one], np.random.default_rng(0))
        assert plain is not None
        assert (row.consistency, row.consistency_null) == pytest.approx(plain, rel=1e-3)
        separation = summary["separation"][row.layer]
        assert (row.d_prime, row.auc) == pytest.approx((separation["d_prime"], separation["auc"]), rel=1e-3)
        assert row.d_prime_null == pytest.approx(separation["random_d_prime"], rel=1e-3)
        residual = np.mean([length[row.layer] for length in lengths])
        assert row.relative_norm == pytest.approx(float(vectors[row.layer].norm()) / residual, rel=1e-3)
        assert row.accessibility is row.logit_rise is None  # nobody hands out the weights
    assert diagnose(run) == found


def test_a_run_of_before_is_measured_as_far_as_it_goes(copy: Path) -> None:
    stored = load_vectors(copy)
    before = {name: value for name, value in stored.provenance.items() if name != "diagnostics"}
    (copy / "vectors.safetensors").write_bytes(replace(stored, provenance=before).to_bytes())
    for file in (copy / "activations").iterdir():
        header, tensors = open_shard(file)
        tensors.pop("response_norm")
        file.write_bytes(pack_shard(tensors, header))
    found = diagnose(copy)
    assert stored.diagnostics is not None
    layers = [replace(each, relative_norm=None) for each in stored.diagnostics.layers]
    assert found == replace(stored.diagnostics, layers=tuple(layers))
    (copy / "rollouts.jsonl").unlink()
    with pytest.raises(RunError, match=r"rollouts\.jsonl is missing; give the run folder of a finished extraction"):
        diagnose(copy)


def test_lengths_are_those_of_the_responses_that_have_them(copy: Path) -> None:
    """A run that was begun before they were read goes on with what it has."""
    shards = sorted((copy / "activations").iterdir())
    for file in shards[1:]:
        header, tensors = open_shard(file)
        tensors.pop("response_norm")
        file.write_bytes(pack_shard(tensors, header))
    for name in ("vectors.safetensors", "summary.json"):
        (copy / name).unlink()
    settings = ExtractionSettings(questions=6, rollouts=RolloutSettings(max_new_tokens=24, batch_size=7))
    backend = PlantedBackend(TRAIT, noise=3.0, disobeys=lambda seed: seed % 11 == 0)
    found = extract(backend, TRAIT, copy, settings=settings).vectors
    assert found.diagnostics is not None
    header, tensors = open_shard(shards[0])
    kept = [each["kept"] for each in map(json.loads, (copy / "scores.jsonl").read_text().splitlines())]
    lengths = tensors["response_norm"][[kept[row] for row in header["rows"]]].mean(dim=0)
    for row in found.diagnostics.layers:
        assert row.relative_norm == pytest.approx(float(found[row.layer].norm() / lengths[row.layer]), rel=1e-3)


def plain_values(found: Diagnostics, measure: str) -> Array:
    values = found.values(measure)
    return np.zeros(0) if values is None else values


def test_a_model_here_is_read_to_its_end_and_may_be_read_again(tmp_path: Path) -> None:
    backend = tiny_backend("transformers")
    settings = ExtractionSettings(questions=4, paired=False, rollouts=RolloutSettings(max_new_tokens=16, batch_size=8))
    found = extract(backend, TRAIT, tmp_path, settings=settings).vectors.diagnostics
    assert found is not None
    for measure in ("d_prime", "relative_norm", "logit_rise", "accessibility"):
        assert found.values(measure) is not None
    again = diagnose(tmp_path, backend)
    for measure in MEASURES:
        assert plain_values(found, measure) == pytest.approx(plain_values(again, measure), rel=2e-3)
    prompts = diagnose(tmp_path, reduction="prompt_last")
    assert prompts.reduction == "prompt_last"
    assert prompts.values("accessibility") is prompts.values("d_prime") is None
    vectors = load_vectors(tmp_path)
    shares = (vectors.norms("prompt_last") / vectors.norms()).numpy() * plain_values(found, "relative_norm")
    assert plain_values(prompts, "relative_norm") == pytest.approx(shares, rel=2e-3)
    with pytest.raises(VectorsError, match="belong to another model"):
        diagnose(tmp_path, tiny_backend("transformers", "gpt2"))


def test_damaged_diagnostics_are_said_to_be(run: Path) -> None:
    vectors = load_vectors(run)
    stored = vectors.provenance["diagnostics"]
    for wrong in (3, {**stored, "layers": [{"layer": "one"}]}, {**stored, "questions": "six"}):
        with pytest.raises(VectorsError, match=r"the diagnostics that the vectors of 'optimistic' carry is damaged"):
            _ = vectors.with_provenance(diagnostics=wrong).diagnostics
    assert vectors.random_like(0).diagnostics is None
    nonsense = vectors.with_provenance(separation=[{"layer": 0}])
    assert diagnostics_of(nonsense, read_samples(run)).values("d_prime") is None


def made(**measures: list[float | None]) -> Diagnostics:
    count = len(next(iter(measures.values())))
    rows = (LayerDiagnostics(at, **{name: values[at] for name, values in measures.items()}) for at in range(count))
    return Diagnostics("kind", "response_mean", 8, 4, 2, tuple(rows))


def test_a_measure_that_some_layer_lacks_has_no_values() -> None:
    beyond = made(consistency=[0.1, 0.3], consistency_null=[0.0, 0.25], relative_norm=[None, 0.2])
    differences = beyond.values("consistency_beyond")
    assert differences is not None
    assert differences.tolist() == pytest.approx([0.1, 0.05])
    assert beyond.values("relative_norm") is None
    assert made(consistency=[0.1, 0.3]).values("consistency_beyond") is None
    assert "auc" not in MEASURES
    assert not any(name.endswith("_null") for name in MEASURES)
    assert {*MEASURES} - {name.removesuffix("_beyond") for name in BEYOND_CHANCE} == {"relative_norm"}
