"""The study of whether diagnostics foretell steering: a measure that does is found, and one that does not is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from benchmarks.steerability import (
    STEP,
    Places,
    gather,
    left_out,
    overall,
    report,
    rules,
    scores,
    share_below,
    show,
    verdict,
    within,
)
from persona_lens.core.errors import PersonaLensError
from persona_lens.extraction import ExtractionSettings, extract
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering import ArmSettings
from persona_lens.steering.arms import arm_effect
from persona_lens.steering.comparison import compare
from persona_lens.steering.steering import Steering
from persona_lens.traits import load_trait
from tests.backends.fixtures import tiny_backend

LAYERS = tuple(range(9, 25, 2))


def places(noise: float, traits: int = 7, seed: int = 0) -> Places:
    """Effects that `accessibility` tells with some noise, and two measures that tell nothing."""
    rng = np.random.default_rng(seed)
    effects = 20 + 10 * rng.normal(size=(traits, len(LAYERS)))
    measures = {
        "consistency": rng.normal(size=effects.shape),
        "relative_norm": rng.normal(size=effects.shape),
        "accessibility": effects + noise * rng.normal(size=effects.shape),
    }
    halves = effects + rng.normal(size=(2, *effects.shape))
    return Places(tuple("abcdefghij"[:traits]), LAYERS, effects, -effects, halves, measures)


def test_rho_is_spearmans_within_and_over_all_places() -> None:
    given = places(5)
    values, effects = given.measures["consistency"], given.effects
    found = within(values, effects)
    np.testing.assert_allclose(found, [spearmanr(*each).statistic for each in zip(values, effects, strict=True)])
    everywhere = overall(values, effects)
    assert everywhere.mean == pytest.approx(spearmanr(values.ravel(), effects.ravel()).statistic)
    assert everywhere.low < everywhere.mean < everywhere.high
    assert within(np.ones_like(values), effects).tolist() == [0] * 7


def test_a_rule_is_the_mean_of_ranks() -> None:
    given = places(5)
    assert rules(given)[:4] == [
        ("consistency",),
        ("relative_norm",),
        ("accessibility",),
        ("consistency", "relative_norm"),
    ]
    assert len(rules(given)) == 7
    for at in range(7):
        shares = [share_below(given.measures[name][at]) for name in ("consistency", "accessibility")]
        np.testing.assert_allclose(scores(given, ("consistency", "accessibility"))[at], np.mean(shares, axis=0))


def test_a_measure_that_tells_is_chosen_without_the_trait_it_is_tried_on(capsys: pytest.CaptureFixture[str]) -> None:
    given = places(2)
    for row, own in zip(left_out(given), given.effects, strict=True):
        assert row["rule"] == ("accessibility",)
        assert row["first"] >= 0.8 * row["best"] == 0.8 * own.max()
        assert row["tried"] == 1
        assert row["mean"] == pytest.approx(own.mean())
    found = report(given)
    assert found["measures"]["accessibility"]["within"]["low"] > 0.7
    assert found["measures"]["accessibility"]["change"]["high"] < -0.7
    assert found["effect_halves"]["mean"] > 0.9
    assert verdict(found).startswith("Yes")
    show(found)
    assert verdict(found) in capsys.readouterr().out


def test_the_layer_of_the_others_is_the_best_of_theirs() -> None:
    given = places(2)
    given.effects[:, 3] += 100
    for at, row in enumerate(left_out(given)):
        assert row["fixed"] == given.effects[at, 3]
    assert report(given)["gains"]["fixed"]["low"] <= 0


def test_measures_of_nothing_cannot_be_relied_on() -> None:
    relied = 0
    for seed in range(12):
        given = places(0, seed=seed)
        nothing = {name: values for name, values in given.measures.items() if name != "accessibility"}
        found = report(replace(given, measures=nothing))
        relied += not verdict(found).startswith("No")
    assert relied <= 2


def test_places_are_steered_by_equal_steps_beside_random_directions(tmp_path: Path) -> None:
    backend, trait = tiny_backend("transformers"), load_trait("optimistic")
    rollouts = RolloutSettings(max_new_tokens=16, batch_size=8)
    extract(backend, trait, tmp_path / "run", settings=ExtractionSettings(questions=4, paired=False, rollouts=rollouts))
    asked = ArmSettings((0, 1, 2), random_directions=2, rollouts=RolloutSettings(4, batch_size=8))
    found = gather(backend, [tmp_path / "run"], asked, (0, 2), 0.3, tmp_path / "study")
    assert (found.traits, found.layers, found.effects.shape) == (("optimistic",), (0, 2), (1, 2))
    from persona_lens.vectors import load_vectors

    vectors = load_vectors(tmp_path / "run")
    stored = vectors.diagnostics
    assert stored is not None
    for at, layer in enumerate((0, 2)):
        row = stored.layers[layer]
        assert row.relative_norm is not None
        arms = {"up": Steering.parse(f"optimistic@{layer}:+{STEP / row.relative_norm:.3g}", vectors)}
        effect = arm_effect(compare(backend, arms, vectors, asked).answers, "up")
        assert effect is not None
        assert effect.difference is not None
        assert found.effects[0, at] == pytest.approx(effect.difference.mean)
        assert found.changes[0, at] == pytest.approx(effect.change.mean)
        assert found.measures["relative_norm"][0, at] == pytest.approx(row.relative_norm, rel=1e-3)
    before = vectors.with_provenance(diagnostics=None)
    (tmp_path / "run" / "vectors.safetensors").write_bytes(before.to_bytes())
    with pytest.raises(PersonaLensError, match="does not say how long the residual is; extract it again"):
        gather(backend, [tmp_path / "run"], asked, (0,), 0.3, tmp_path / "other")


def test_a_share_counts_equal_ones_half() -> None:
    np.testing.assert_allclose(share_below(np.array([2.0, 1.0, 2.0, 5.0])), [0.5, 0, 0.5, 1])
    np.testing.assert_allclose(share_below(np.array([2.0])), [0])
