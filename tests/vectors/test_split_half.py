"""Split halves: known reliability is found, where there is no trait there is none, and damaged runs are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from persona_lens.core.statistics import bootstrap_mean
from persona_lens.runs import RunError
from persona_lens.runs.chunks import open_shard, pack_shard
from persona_lens.traits import load_trait
from persona_lens.vectors import VectorsError, load_vectors
from persona_lens.vectors.geometry import GeometryError
from persona_lens.vectors.split_half import (
    _at,
    _drawn_halves,
    _stepped_up,
    cosine_between,
    split_half_reliability,
)
from tests.planted import PlantedBackend

TRAIT = load_trait("optimistic")


def test_halves_of_a_run_agree_as_its_noise_says(run: Path) -> None:
    before = {file: file.read_bytes() for file in sorted(run.rglob("*")) if file.is_file()}
    found = split_half_reliability(run, splits=100)
    assert {file: file.read_bytes() for file in sorted(run.rglob("*")) if file.is_file()} == before
    assert (found.trait, found.questions, found.splits, len(found.layers)) == ("optimistic", 6, 100, 3)
    planted = PlantedBackend(TRAIT).planted["response_mean"]
    kept = sum(json.loads(line)["kept"] for line in (run / "scores.jsonl").read_text().splitlines()) / 2
    for row in found.layers:
        # Each arm's mean over n responses has noise 9/n a dimension: the difference of a half's has 2 * 9 / (kept / 2).
        signal, noise = float(planted[row.layer].square().sum()), planted.shape[1] * 18 / (kept / 2)
        assert row.halves == pytest.approx(signal / (signal + noise), abs=0.12)
        assert row.halves < row.whole.mean == pytest.approx(_stepped_up(row.halves))
        assert row.whole.low < row.whole.mean < row.whole.high <= 1
    assert split_half_reliability(run, splits=100) == found
    assert split_half_reliability(run, splits=100, seed=1) != found
    json.dumps(found.to_json(), allow_nan=False)


def test_the_interval_of_a_cosine_is_over_the_questions_of_both(run: Path) -> None:
    value, ends = cosine_between(run, run, 1)
    assert value == pytest.approx(1)
    assert ends is not None
    assert ends[0] < 1
    rows = load_vectors(run)
    planted = PlantedBackend(TRAIT).planted["response_mean"]
    cosine = float(rows[1] @ planted[1] / rows[1].norm() / planted[1].norm())
    assert split_half_reliability(run).layers[1].whole.low < cosine  # it is the planted direction, with noise


def test_halves_of_nothing_do_not_agree_beyond_their_null() -> None:
    rng = np.random.default_rng(0)
    beyond = []
    for _ in range(40):
        sums = rng.normal(size=(20, 2, 30)) * 2 + 40 * (np.arange(30) == 3)  # one dimension outweighs all, as is usual
        row = _at(0, sums, np.full((20, 2), 4.0), _drawn_halves(20, 50, rng), rng.random((50, 20)) < 0.5)
        beyond.append(abs(row.halves) > row.null)
    assert sum(beyond) <= 6


def test_the_interval_holds_what_the_whole_vector_has() -> None:
    """Two vectors from as many questions each agree as the halves of one say."""
    rng = np.random.default_rng(1)
    truth, covered, agreed = rng.normal(size=40), 0, []

    def sums() -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        difference = truth / 2 + rng.normal(size=(16, 40)) * 1.5
        return np.stack([difference, -difference], axis=1)

    estimates = []
    for _ in range(40):
        one, other = sums(), sums()
        halves = _drawn_halves(16, 60, rng)
        row = _at(0, one, np.ones((16, 2)), halves, rng.random((60, 16)) < 0.5)
        a, b = (each[:, 0].mean(axis=0) - each[:, 1].mean(axis=0) for each in (one, other))
        agreed.append(float(a @ b / np.sqrt((a @ a) * (b @ b))))
        estimates.append(row.whole)
    actual = bootstrap_mean(agreed)
    assert np.mean([each.mean for each in estimates]) == pytest.approx(actual.mean, abs=0.06)
    covered = sum(each.low <= actual.mean <= each.high for each in estimates)
    assert covered >= 32


def test_what_is_no_whole_extraction_is_refused(copy: Path) -> None:
    with pytest.raises(VectorsError, match="no reduction 'mean'"):
        split_half_reliability(copy, "mean")
    with pytest.raises(GeometryError, match="splits must be at least 1"):
        split_half_reliability(copy, splits=0)
    scores = (copy / "scores.jsonl").read_text()
    (copy / "scores.jsonl").write_text("".join(line + "\n" for line in scores.splitlines()[1:]))
    with pytest.raises(RunError, match=r"scores\.jsonl has other rows"):
        split_half_reliability(copy)
    (copy / "scores.jsonl").write_text(scores.replace('"kept": true', '"kept": false', 4))
    with pytest.raises(RunError, match="do not give the vectors in it"):
        split_half_reliability(copy)
    (copy / "scores.jsonl").write_text("{")
    with pytest.raises(RunError, match=r"scores\.jsonl is damaged"):
        split_half_reliability(copy)
    (copy / "scores.jsonl").unlink()
    with pytest.raises(RunError, match=r"scores\.jsonl is missing; give the run folder"):
        split_half_reliability(copy)
    with pytest.raises(VectorsError, match="does not exist"):
        split_half_reliability(copy / "nothing")


def test_damaged_activations_and_responses_are_refused(copy: Path, run: Path) -> None:
    shard = copy / "activations" / "batch-00000.safetensors"
    header, tensors = open_shard(shard)
    shard.write_bytes(pack_shard({name: rows[:, :2].contiguous() for name, rows in tensors.items()}, header))
    with pytest.raises(RunError, match="its responses and the vectors are"):
        split_half_reliability(copy)
    shard.write_bytes(pack_shard({"prompt_mean": tensors["prompt_mean"]}, header))
    with pytest.raises(RunError, match="is damaged, or holds no prompt_last"):
        split_half_reliability(copy)
    shard.unlink()
    with pytest.raises(RunError, match=r"responses and rollouts\.jsonl"):
        split_half_reliability(copy)
    rows = (run / "rollouts.jsonl").read_text()
    for wrong in (rows.replace('"arm"', '"leg"'), rows.replace('"positive"', '"left"')):
        (copy / "rollouts.jsonl").write_text(wrong)
        with pytest.raises(RunError, match="does not say what it answers"):
            split_half_reliability(copy)
