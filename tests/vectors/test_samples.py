"""What a run kept: every kept response in the order of the plan, with its labels, layer by layer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from persona_lens.extraction import ExtractionSettings, extract
from persona_lens.runs import RunError
from persona_lens.runs.chunks import open_shard, pack_shard
from persona_lens.runs.settings import RolloutSettings
from persona_lens.traits import load_trait
from persona_lens.vectors import VectorsError, load_vectors
from persona_lens.vectors.samples import read_samples
from tests.planted import PlantedBackend

TRAIT = load_trait("optimistic")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    rollouts = RolloutSettings(max_new_tokens=24, batch_size=7)
    settings = ExtractionSettings(samples=2, questions=3, paired=False, rollouts=rollouts)
    extract(PlantedBackend(TRAIT, noise=3.0, disobeys=lambda seed: seed % 5 == 0), TRAIT, folder, settings=settings)
    return folder


def test_every_kept_response_is_there_in_order_with_its_labels(run: Path) -> None:
    rows, scores = (
        [json.loads(line) for line in (run / name).read_text().splitlines()]
        for name in ("rollouts.jsonl", "scores.jsonl")
    )
    kept = [row | score for row, score in zip(rows, scores, strict=True) if score["kept"]]
    assert 0 < len(kept) < len(rows)
    found = read_samples(run)
    labels = found.responses
    assert labels.positive.tolist() == [row["arm"] == "positive" for row in kept]
    assert labels.question.tolist() == [row["question_number"] for row in kept]
    assert labels.pair.tolist() == [row["pair"] for row in kept]
    assert labels.sample.tolist() == [row["sample"] for row in kept]
    assert labels.length.tolist() == [len(row["response_ids"]) for row in kept]
    assert labels.score.tolist() == [row["score"] for row in kept]
    read: dict[int, dict[str, Tensor]] = {}
    for file in (run / "activations").iterdir():
        header, tensors = open_shard(file)
        read |= {row: {n: t[at] for n, t in tensors.items()} for at, row in enumerate(header["rows"])}
    own = load_vectors(run)
    assert set(found.reductions) == set(own.directions)
    for reduction in found.reductions:
        for layer in range(own.model.n_layers):
            samples = found.layer(layer, reduction)
            assert np.array_equal(samples.activations, [read[row["row"]][reduction][layer].double() for row in kept])
            assert samples.activations.dtype == np.float64
            assert np.allclose(samples.difference, own.rows(reduction)[layer].numpy(), atol=1e-5)
            assert samples.positive is labels.positive


def test_some_are_chosen_and_twins_differ_in_the_arm_alone(run: Path) -> None:
    samples = read_samples(run).layer(1)
    last = samples.chosen(np.array([len(samples) - 1, 0]))
    assert np.array_equal(last.activations, samples.activations[[-1, 0]])
    assert last.question.tolist() == [2, 0]
    odd = samples.chosen(samples.question % 2 == 1)
    assert set(odd.question.tolist()) == {1}
    one, other = samples.twins()
    assert 0 < 2 * len(one) < len(samples)  # an unpaired run kept some without their twins
    assert samples.positive[one].all()
    assert not samples.positive[other].any()
    for name in ("question", "pair", "sample"):
        assert np.array_equal(getattr(samples, name)[one], getattr(samples, name)[other])
    labels = set(zip(samples.question.tolist(), samples.pair.tolist(), samples.sample.tolist(), strict=True))
    assert len(samples) - len(one) == len(labels)
    assert not len(samples.chosen(samples.positive).twins()[0])


def test_what_is_damaged_or_was_changed_is_refused(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    found = read_samples(copy)
    with pytest.raises(VectorsError, match="layer 3 does not exist"):
        found.layer(3)
    with pytest.raises(VectorsError, match="no reduction 'mean'"):
        found.layer(0, "mean")
    shard = copy / "activations" / "batch-00001.safetensors"
    header, tensors = open_shard(shard)
    shard.write_bytes(pack_shard({**tensors, "prompt_last": tensors["prompt_last"] + 1000}, header))
    changed = read_samples(copy)
    assert len(changed.layer(0)) == len(found.responses)
    with pytest.raises(RunError, match="do not give the vectors in it"):
        changed.layer(0, "prompt_last")
    shard.write_bytes(pack_shard(tensors, {}))
    with pytest.raises(RunError, match="does not say which responses it holds"):
        read_samples(copy)
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(RunError, match=r"batch-00001\.safetensors is missing or damaged"):
        read_samples(copy)
