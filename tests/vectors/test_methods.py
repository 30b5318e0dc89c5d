"""Methods and erasure at one layer: each equals an independent reference, and says what it cannot do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from concept_erasure import LeaceEraser
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

from persona_lens.core.plugins import Registry
from persona_lens.vectors.erasure import eraser
from persona_lens.vectors.methods import METHODS, FitError, Method, methods
from persona_lens.vectors.samples import Samples

Array = NDArray[np.float64]
WIDTHS = {"wide": 150, "narrow": 12}


def samples(width: int, seed: int = 0, questions: int = 8, arm: float = 1.0, length: float = 0.0) -> Samples:
    """Responses to questions by two pairs, most with their twins, in a space whose entries vary unlike one another.

    Args:
        width: Of the activations.
        seed: Of everything.
        questions: How many.
        arm: How far the arms are apart.
        length: How far a unit of the logarithm of the length moves an activation; positive responses are longer.
    """
    rng = np.random.default_rng(seed)
    labels = np.array([(q, p, s) for q in range(questions) for p in range(2) for s in (0, 0)])
    positive = np.tile([True, False], len(labels) // 2)
    tokens = np.where(positive, rng.integers(20, 90, len(labels)), rng.integers(5, 60, len(labels)))
    scales = rng.uniform(0.1, 5, width)
    directions = rng.normal(size=(2, width))
    h = rng.normal(size=(len(labels), width)) @ np.linalg.qr(rng.normal(size=(width, width)))[0] * scales + 7
    h += arm * positive[:, None] * directions[0] + length * np.log(tokens)[:, None] * directions[1]
    question, pair, sample = labels.T
    made = Samples(positive, question, pair, sample, tokens, np.where(positive, 80.0, 20.0), h)
    return made.chosen(rng.permutation(len(labels))[: len(labels) - 3])  # three are lost, and order means nothing


@pytest.fixture(params=WIDTHS)
def given(request: pytest.FixtureRequest) -> Samples:
    return samples(WIDTHS[request.param])


def unit(vector: Array) -> Array:
    found: Array = vector / np.linalg.norm(vector)
    return found


def difference(found: Samples) -> Array:
    means: Array = found.activations[found.positive].mean(axis=0) - found.activations[~found.positive].mean(axis=0)
    return means


def assert_same(found: Array, wanted: Array) -> None:
    assert found.dtype == np.float64
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_difference_is_that_of_the_means(given: Samples) -> None:
    assert_same(METHODS.find("difference").apply(given), difference(given))


def test_length_is_the_coefficient_of_a_regression(given: Samples) -> None:
    design = np.stack([given.positive, np.log(given.length), np.ones(len(given))], axis=1)
    wanted = np.linalg.solve(design.T @ design, design.T @ given.activations)[0]
    assert_same(METHODS.find("length").apply(given), wanted)


def test_length_leaves_out_what_longer_responses_have() -> None:
    """Where length moves activations, the difference of means takes it for the arm, and this does not."""
    found = samples(12, questions=400, length=3.0)
    own = METHODS.find("length").apply(found)
    plain = METHODS.find("difference").apply(found)
    without = samples(12, questions=400, length=0.0)
    assert np.linalg.norm(own - METHODS.find("length").apply(without)) < 1e-9 * np.linalg.norm(own)
    assert np.linalg.norm(plain - difference(without)) > np.linalg.norm(difference(without))


def test_logistic_is_scikit_learns(given: Samples) -> None:
    centred = given.activations - given.activations.mean(axis=0)
    scale = np.sqrt((centred**2).sum() / centred.size)
    probe = LogisticRegression(C=1.0, solver="newton-cg", tol=1e-9, max_iter=1000).fit(centred / scale, given.positive)
    wanted = unit(probe.coef_[0]) * np.linalg.norm(difference(given))
    assert_same(METHODS.find("logistic").apply(given), wanted)
    # A scalar and a shift are all that is done to the activations, so the same in other units is the same direction.
    other = replace(given, activations=given.activations * 30 - 5)
    assert_same(METHODS.find("logistic").apply(other), 30 * wanted)


def test_lda_is_scikit_learns(given: Samples) -> None:
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(given.activations, given.positive)
    wanted = unit(reference.coef_[0]) * np.linalg.norm(difference(given))
    assert_same(METHODS.find("lda").apply(given), wanted)


def test_pca_is_repengs(given: Samples) -> None:
    labels = list(zip(given.question, given.pair, given.sample, strict=True))
    pairs = [
        (given.activations[i], given.activations[j])
        for i, one in enumerate(labels)
        for j, other in enumerate(labels)
        if one == other and given.positive[i] and not given.positive[j]
    ]
    assert 2 * len(pairs) < len(given)
    centred = np.concatenate([[a - (a + b) / 2, b - (a + b) / 2] for a, b in pairs])  # repeng: method="pca_center"
    component = PCA(1).fit(centred).components_[0]
    component *= np.sign(np.mean([a @ component - b @ component for a, b in pairs]))
    assert_same(METHODS.find("pca").apply(given), component * np.linalg.norm(difference(given)))
    assert METHODS.find("pca").apply(given) @ difference(given) > 0


@pytest.mark.parametrize("name", ["difference", "length", "logistic", "lda", "pca"])
def test_every_method_finds_what_was_planted_and_turns_with_the_arms(name: str) -> None:
    given = samples(12, questions=60, arm=4.0)
    method = METHODS.find(name)
    found = method.apply(given)
    projections = given.activations @ found
    assert projections[given.positive].mean() > projections[~given.positive].mean()
    assert_same(method.apply(replace(given, positive=~given.positive)), -found)
    if not method.own_length:
        assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(difference(given)))
    nothing = replace(given, activations=np.ones_like(given.activations))
    assert not method.apply(nothing).any()
    assert name in methods()
    assert method.summary.endswith(".")


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_erasure_is_that_of_the_package(width: int) -> None:
    given, other = samples(width, seed=1), samples(width, seed=2, questions=9)
    package = LeaceEraser.fit(
        torch.from_numpy(other.activations), torch.from_numpy(other.positive[:, None].astype(float))
    )
    assert_same(eraser([other])(given.activations), package(torch.from_numpy(given.activations)).numpy())


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_several_are_erased_at_once_whatever_their_order(width: int) -> None:
    """The formula of LEACE: what is left of each run's arms has no difference of means."""
    others = [samples(width, seed=2), samples(width, seed=3, questions=5), samples(width, seed=4, questions=6)]
    erase = eraser(others)
    for other in others:
        assert np.linalg.norm(difference(other)) > 1
        left = replace(other, activations=erase(other.activations))
        assert np.linalg.norm(difference(left)) < 1e-8
    given = samples(width, seed=1)
    assert_same(eraser(others[::-1])(given.activations), erase(given.activations))
    assert np.linalg.matrix_rank(erase(given.activations) - given.activations) == len(others)


def test_what_responses_do_not_suffice_for_is_said() -> None:
    given = samples(12)
    by_length = replace(given, length=np.where(given.positive, 50, 5))
    with pytest.raises(FitError, match="lengths of the responses alone say which arm they are of"):
        METHODS.find("length").apply(by_length)
    alone = given.chosen(np.flatnonzero(given.positive == (given.question % 2 == 0)))
    with pytest.raises(FitError, match="method pca compares twins"):
        METHODS.find("pca").apply(alone)
    few = given.chosen(np.r_[np.flatnonzero(given.positive)[:1], np.flatnonzero(~given.positive)])
    with pytest.raises(FitError, match="lda needs two responses of each arm"):
        METHODS.find("lda").apply(few)
    same = replace(given, length=np.full(len(given), 48))
    assert_same(METHODS.find("length").apply(same), difference(given))


def failing(samples: Samples) -> Array:
    raise ValueError("no such luck")


@pytest.mark.parametrize(
    ("direction", "said"),
    [
        (lambda samples: samples.activations, r"gives no direction of 12 finite numbers, but \[29, 12\]"),
        (lambda samples: np.full(12, np.nan), "gives no direction of 12 finite numbers"),
        (failing, "the method theirs fails: no such luck"),
    ],
)
def test_a_strangers_method_is_held_to_what_a_direction_is(direction: Any, said: str) -> None:
    with pytest.raises(FitError, match=said):
        Method("theirs", "Something.", "", direction).apply(samples(12))
    with pytest.raises(TypeError, match="not JSON serializable"):
        Method("theirs", "Something.", "", direction, settings={"weights": np.ones(2)})


def test_the_table_is_a_registry() -> None:
    assert isinstance(METHODS, Registry)
    assert list(METHODS.built_in) == ["difference", "length", "logistic", "lda", "pca"]
    with pytest.raises(FitError, match=r"no method named 'ldb'; did you mean lda\?"):
        METHODS.find("ldb")
