"""`vectors fit`: vectors made anew of a finished run, held-out separation, what is kept out, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner, Result

from persona_lens.cli import app
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.progress import no_progress
from persona_lens.core.statistics import auc, separation
from persona_lens.extraction import ExtractionSettings, extract
from persona_lens.runs import RunError
from persona_lens.runs.chunks import open_shard
from persona_lens.runs.settings import RolloutSettings
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors, Tuned, load_vectors
from persona_lens.vectors.erasure import eraser
from persona_lens.vectors.fit import fit_vectors
from persona_lens.vectors.hub import model_card
from persona_lens.vectors.methods import METHODS, FitError
from persona_lens.vectors.samples import Samples
from tests.planted import PlantedBackend

Array = NDArray[np.float64]
REDUCTIONS = {"response_mean", "prompt_mean", "prompt_last"}


def made(folder: Path, trait: str = "optimistic", effect: float = 1.0, backend: Any = None, **settings: Any) -> Path:
    """A finished run whose activations are noise and, in one direction a trait, the arm."""
    definition = load_trait(trait)
    planted = backend or PlantedBackend(definition, noise=3.0, disobeys=lambda seed: seed % 11 == 0)
    planted.trait = definition
    turn = sum(map(ord, trait)) % 7
    planted.planted = {name: effect * rows.roll(turn, dims=-1) for name, rows in planted.planted.items()}
    rollouts = RolloutSettings(max_new_tokens=24, batch_size=7)
    given = ExtractionSettings(**{"questions": 6, "rollouts": rollouts, **settings})
    extract(planted, definition, folder, settings=given, progress=no_progress)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("runs") / "optimistic")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("runs") / "impolite", "impolite", questions=5)


def fit(run: Path, method: str = "difference", **given: Any) -> PersonaVectors:
    return fit_vectors(run, method, progress=no_progress, **given)


def raw(run: Path) -> list[tuple[dict[str, Any], dict[str, Array]]]:
    """The kept responses as they lie in the files, each with its reductions, [layers, d_model]."""
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    scores = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    read: dict[int, dict[str, Array]] = {}
    for file in (run / "activations").iterdir():
        header, tensors = open_shard(file)
        for place, row in enumerate(header["rows"]):
            read[row] = {name: tensor[place].double().numpy() for name, tensor in tensors.items()}
    return [(row, read[row["row"]]) for row, score in zip(rows, scores, strict=True) if score["kept"]]


def at(run: Path, reduction: str, layer: int) -> Samples:
    """One layer of `raw`."""
    found = raw(run)
    labels = np.array([(r["question_number"], r["pair"], r["sample"], len(r["response_ids"])) for r, _ in found])
    question, pair, sample, length = labels.T
    positive = np.array([r["arm"] == "positive" for r, _ in found])
    activations = np.stack([tensors[reduction][layer] for _, tensors in found])
    return Samples(positive, question, pair, sample, length, np.zeros(len(found)), activations)


def test_the_difference_is_the_runs_own(run: Path) -> None:
    before = {file: file.read_bytes() for file in sorted(run.rglob("*")) if file.is_file()}
    own, found = load_vectors(run), fit(run)
    assert {file: file.read_bytes() for file in sorted(run.rglob("*")) if file.is_file()} == before
    assert set(found.directions) == set(own.directions) == REDUCTIONS
    for name, rows in own.directions.items():
        torch.testing.assert_close(found.rows(name), rows, rtol=1e-6, atol=1e-6)
    theirs, ours = own.provenance["separation"], found.provenance["separation"]
    assert len(ours) == 3
    for one, two in zip(ours, theirs, strict=True):
        assert one == {name: pytest.approx(value, abs=1e-4) for name, value in two.items()}


@pytest.mark.parametrize("method", ["difference", "length", "logistic", "lda", "pca"])
def test_every_layer_of_every_reduction_is_made_of_what_was_kept_there(run: Path, method: str) -> None:
    found = fit(run, method)
    for reduction in REDUCTIONS:
        for layer in range(3):
            wanted = METHODS.find(method).apply(at(run, reduction, layer))
            assert np.abs(found.rows(reduction)[layer].numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()
    if method in ("logistic", "lda", "pca"):
        torch.testing.assert_close(found.norms(), load_vectors(run).norms())
        assert found.provenance["fit"]["length"] == "that of the difference of means"


def test_what_the_run_knows_is_kept_and_what_made_it_is_added(run: Path, other: Path) -> None:
    own, found = load_vectors(run), fit(run, "logistic", without=[other], erase=[])
    assert (found.trait, found.model, found.trait_definition) == (own.trait, own.model, own.trait_definition)
    assert found.calibration == own.calibration
    assert found.rollouts == own.rollouts
    assert not found.prompt_mean_sinks
    for name in ("counts", "chat", "judge", "settings", "kind"):
        assert found.provenance[name] == own.provenance[name]
    fitted = found.provenance["fit"]
    assert fitted["vectors_of_the_run"] == own.content_hash
    assert fitted["without"] == [{"trait": "impolite", "content_hash": load_vectors(other).content_hash}]
    assert (fitted["method"], fitted["package"], fitted["erased"]) == ("logistic", "persona-lens", [])
    assert fitted["settings"]["C"] == 1.0
    assert found.provenance["versions"].keys() - own.provenance["versions"].keys() == {"scikit-learn"}
    assert "concept-erasure" in fit(run, erase=[other]).provenance["versions"]
    assert "logistic (impolite projected out)" in model_card(found, "me/it", "mit")
    assert "the difference of the mean activations" in model_card(own, "me/it", "mit")


def test_diagnostics_are_those_of_the_responses_and_of_the_new_direction(run: Path, other: Path) -> None:
    own, found = load_vectors(run), fit(run, "lda", without=[other])
    assert own.diagnostics is not None
    assert found.diagnostics is not None
    rows = found.provenance["separation"]
    for before, after, row in zip(own.diagnostics.layers, found.diagnostics.layers, rows, strict=True):
        assert before.consistency == after.consistency is not None
        assert after.d_prime == pytest.approx(row["d_prime"], rel=1e-3)
        assert after.auc_null == pytest.approx(row["random_auc"], rel=1e-3)
        assert before.halves is not None
        assert after.halves is after.logit_rise is None
        assert before.relative_norm is not None
        shorter = float(found[after.layer].norm() / own[after.layer].norm())
        assert after.relative_norm == pytest.approx(before.relative_norm * shorter, rel=1e-3)
        assert shorter < 1
    assert found.diagnostics.responses == own.diagnostics.responses


def test_what_was_found_with_the_runs_vectors_is_not_said_of_others(copy: Path) -> None:
    own = load_vectors(copy)
    (copy / "vectors.safetensors").write_bytes(own.with_tuned(Tuned(1, 2.0), {}).to_bytes())
    assert load_vectors(copy).tuned is not None
    assert fit(copy, "lda").tuned is None


def test_the_same_run_gives_the_same_bytes_from_any_batches(run: Path, other: Path, tmp_path: Path) -> None:
    once = fit(run, "logistic", without=[other]).to_bytes()
    assert fit(run, "logistic", without=[load_vectors(other)]).to_bytes() == once
    assert fit(run, "logistic").to_bytes() != once
    again = made(tmp_path / "again", rollouts=RolloutSettings(max_new_tokens=24, batch_size=11))
    for method in ("lda", "pca"):
        assert all(
            torch.equal(fit(again, method).rows(name), rows) for name, rows in fit(run, method).directions.items()
        )


def test_separation_is_that_of_the_method_on_questions_it_has_not_seen(run: Path) -> None:
    found = fit(run, "logistic").provenance["separation"]
    for layer in range(3):
        h = at(run, "response_mean", layer)
        d_primes, aucs = [], []
        for fold in (0, 1):
            seen, unseen = (h.chosen(h.question % 2 == each) for each in (1 - fold, fold))
            centred = seen.activations - seen.activations.mean(axis=0)
            probe = LogisticRegression(tol=1e-9, max_iter=1000).fit(
                centred / np.sqrt((centred**2).mean()), seen.positive
            )
            along = unseen.activations @ probe.coef_[0]
            d_primes.append(separation(along[unseen.positive], along[~unseen.positive]))
            aucs.append(auc(along[unseen.positive], along[~unseen.positive]))
        assert found[layer]["d_prime"] == pytest.approx(np.mean(d_primes), rel=1e-4)
        assert found[layer]["auc"] == pytest.approx(np.mean(aucs), abs=0.01)


def test_a_probe_of_noise_separates_nothing_held_out(tmp_path: Path) -> None:
    """On what it was fitted on it separates nearly everything; a shrunk covariance does not go as far."""
    found = made(tmp_path / "noise", effect=0.0, questions=4)
    for method, fitted in (("logistic", 0.95), ("lda", 0.8)):
        vectors = fit(found, method)
        h = at(found, "response_mean", 1)
        along = h.activations @ vectors[1].double().numpy()
        assert auc(along[h.positive], along[~h.positive]) > fitted
        rows = vectors.provenance["separation"]
        assert np.mean([row["auc"] for row in rows]) == pytest.approx(0.5, abs=0.15)
        assert abs(np.mean([row["d_prime"] for row in rows])) < 0.5
        assert not all(row["better"] for row in rows)


def test_a_half_that_does_not_suffice_has_no_separation(tmp_path: Path) -> None:
    backend = PlantedBackend(load_trait("optimistic"), noise=1.0)
    folder = made(tmp_path / "run", backend=backend, questions=2)
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    for row, score in zip(rows, scores, strict=True):  # of the odd question no twins are left
        if row["question_number"] == 1 and (row["pair"] < 2) == (row["arm"] == "positive"):
            score["kept"] = False
    (folder / "scores.jsonl").write_text("".join(json.dumps(score) + "\n" for score in scores))
    left = [(row, each) for row, each in raw(folder)]
    for name in REDUCTIONS:
        means = [np.mean([e[name] for r, e in left if r["arm"] == arm], axis=0) for arm in ("positive", "negative")]
        own = load_vectors(folder)
        directions = {**own.directions, name: torch.from_numpy(means[0] - means[1]).float()}
        (folder / "vectors.safetensors").write_bytes(replace(own, directions=directions).to_bytes())
    assert fit(folder, "pca").provenance["separation"] == []
    assert len(fit(folder, "lda").provenance["separation"]) == 3


@pytest.mark.parametrize("method", ["difference", "lda"])
def test_other_vectors_are_projected_out_layer_by_layer(run: Path, other: Path, method: str) -> None:
    second = load_vectors(other).random_like(3)
    found, plain = fit(run, method, without=[other, second, load_vectors(other) + second]), fit(run, method)
    for name in REDUCTIONS:
        for layer in range(3):
            span = np.stack([v.rows(name)[layer].double().numpy() for v in (load_vectors(other), second)])
            vector = plain.rows(name)[layer].double().numpy()
            wanted = vector - span.T @ np.linalg.lstsq(span.T, vector, rcond=None)[0]
            assert np.abs(found.rows(name)[layer].numpy() - wanted).max() < 1e-5 * np.abs(vector).max()
    assert [each["trait"] for each in found.provenance["fit"]["without"]] == [
        "impolite",
        "random(3)",
        "impolite + random(3)",
    ]
    for row, (before, after) in enumerate(zip(*(v.provenance["separation"] for v in (plain, found)), strict=True)):
        assert before["layer"] == after["layer"] == row
        assert before["d_prime"] != after["d_prime"]
        assert before["random_auc"] == after["random_auc"]


def test_other_runs_are_erased_before_the_method_sees_anything(run: Path, other: Path) -> None:
    found = fit(run, "lda", erase=[other])
    for name in REDUCTIONS:
        for layer in range(3):
            h = at(run, name, layer)
            erased = eraser([at(other, name, layer)])(h.activations)
            wanted = METHODS.find("lda").apply(replace(h, activations=erased))
            assert np.abs(found.rows(name)[layer].numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert found.provenance["fit"]["erased"][0]["trait"] == "impolite"


def test_what_others_lack_is_not_made(run: Path, other: Path, tmp_path: Path) -> None:
    vectors = load_vectors(other)
    rows = vectors.rows().clone()
    rows[1] = 0
    part = PersonaVectors("kind", vectors.model, {"response_mean": rows}, {"missing_layers": [1]})
    found = fit(run, "lda", without=[part])
    assert (list(found.directions), found.missing_layers, found.diagnostics) == (["response_mean"], (1,), None)
    assert not found.rows()[1].any()
    assert [row["layer"] for row in found.provenance["separation"]] == [0, 2]
    with_sinks = made(tmp_path / "sinks", "evil", sinks=True)
    assert set(fit(run, erase=[with_sinks]).directions) == REDUCTIONS - {"prompt_mean"}


def test_what_cannot_be_kept_out_is_said(run: Path, other: Path, tmp_path: Path) -> None:
    own, vectors = load_vectors(run), load_vectors(other)
    with pytest.raises(FitError, match="to be projected out is of 'optimistic' itself, which would leave nothing"):
        fit(run, without=[run])
    with pytest.raises(FitError, match="to be erased is of 'optimistic' itself"):
        fit(run, erase=[run])
    with pytest.raises(FitError, match="vector of layer 0 lies within what is projected out"):
        fit(run, without=[2.0 * own])
    stranger = replace(vectors, model=replace(vectors.model, weights="sha256:other"))
    with pytest.raises(FitError, match=r"projected out, 'impolite', belongs to another model than .*weights"):
        fit(run, without=[stranger])
    with pytest.raises(FitError, match="has response_mean vectors"):
        fit(run, without=[replace(vectors, directions={"prompt_last": vectors.rows("prompt_last")})])
    smaller = PlantedBackend(load_trait("impolite"))
    smaller.info = replace(smaller.info, n_layers=2)
    smaller.origin = smaller.origin[:2]
    smaller.planted = {name: rows[:2] for name, rows in smaller.planted.items()}
    few = made(tmp_path / "few", "impolite", backend=smaller)
    with pytest.raises(FitError, match=r"to be erased, 'impolite', belongs to another model than .*layers"):
        fit(run, erase=[few])


def test_an_unfinished_or_damaged_run_is_refused(copy: Path, other: Path, tmp_path: Path) -> None:
    shard = copy / "activations" / "batch-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-40] + bytes(40))
    with pytest.raises(RunError, match=r"batch-00001\.safetensors is damaged"):
        fit(copy)
    with pytest.raises(RunError, match=r"batch-00001\.safetensors is damaged"):
        fit(other, erase=[copy])
    shard.unlink()
    with pytest.raises(RunError, match="the run is not whole"):
        fit(copy, "lda")
    (copy / "vectors.safetensors").unlink()
    with pytest.raises(
        PersonaLensError, match=r"vectors\.safetensors does not exist; make it with `persona-lens extract"
    ):
        fit(copy, "lda")


def test_what_is_missing_is_named_with_its_extra(run: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persona_lens.vectors.fit.installed_version", lambda name: None)
    with pytest.raises(FitError, match="the method logistic needs scikit-learn, which is not installed: pip install"):
        fit(run, "logistic")
    with pytest.raises(FitError, match="erasing needs concept-erasure, which is not installed: pip install"):
        fit(run, erase=[other])
    assert fit(run, "lda").trait == "optimistic"


THEIRS = """
import numpy as np
from persona_lens.vectors.methods import Method

def medians(samples):  # its arrays are float64 [n, d_model] and [n]
    arms = samples.positive, ~samples.positive
    one, other = (np.median(samples.activations[arm], axis=0) for arm in arms)
    return one - other

MEDIAN = Method("median", "The difference of medians.", "Theirs (2026)", medians, own_length=True)
"""


@pytest.fixture
def planted(plant: Any) -> None:
    plant(METHODS.group, THEIRS, median="MEDIAN", broken="medians")


@pytest.mark.usefixtures("planted")
def test_a_third_partys_method_is_taken_as_ours_are(run: Path, tmp_path: Path) -> None:
    found = fit(run, "median")
    h = at(run, "prompt_last", 2)
    wanted = np.median(h.activations[h.positive], axis=0) - np.median(h.activations[~h.positive], axis=0)
    assert found.rows("prompt_last")[2].numpy() == pytest.approx(wanted, abs=1e-5)
    assert found.provenance["fit"]["package"] == "their_package"
    with pytest.raises(
        FitError, match=r"method broken cannot be loaded: its entry point .* is a function, not a Method"
    ):
        fit(run, "broken")
    listed = json.loads(vectors_command("methods", "--json").stdout)["methods"]
    assert [each["name"] for each in listed][-2:] == ["broken", "median"]
    assert listed[-1]["summary"] == "The difference of medians."
    assert "is a function" in listed[-2]["broken"]
    shown = vectors_command("methods").stdout
    assert "The difference of medians." in shown
    assert "cannot be loaded" in shown


def vectors_command(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["vectors", *map(str, arguments)])


def test_the_command(run: Path, other: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "lda"
    command = ("fit", run, "--method", "lda", "--erase", other, "--without", other, "--out", out)
    done = vectors_command(*command)
    assert done.exit_code == 0, done.output
    assert "cosine with the run's own" in done.stdout
    assert f"vectors: {out / 'vectors.safetensors'}" in " ".join(done.stdout.split())
    assert [file.name for file in out.iterdir()] == ["vectors.safetensors"]
    found = fit(run, "lda", without=[other], erase=[other])
    assert (out / "vectors.safetensors").read_bytes() == found.to_bytes()
    told = json.loads(vectors_command(*command, "--json").stdout)
    assert told["content_hash"] == found.content_hash
    assert told["fit"] == found.provenance["fit"]
    assert told["separation"] == found.provenance["separation"]
    assert len(told["cosines"]) == 3
    shown = vectors_command("show", out).stdout
    assert "extraction, by the method lda (impolite erased; impolite projected out)" in shown
    assert json.loads(vectors_command("show", out, "--json").stdout)["fit"] == found.provenance["fit"]
    taken = vectors_command("fit", run, "--out", out)
    assert "exists and holds something else" in str(taken.exception)
    unknown = vectors_command("fit", tmp_path / "nothing", "--method", "ld", "--out", out)
    assert "no method named 'ld'" in str(unknown.exception)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_an_interrupted_write_leaves_nothing_half(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    whole: Callable[..., Any] = getattr(os, failing)

    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    done = vectors_command("fit", run, "--out", tmp_path / "out")
    assert "No space left on device; make room there" in str(done.exception)
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.setattr(os, failing, whole)
    assert vectors_command("fit", run, "--out", tmp_path / "out").exit_code == 0
    assert load_vectors(tmp_path / "out").provenance["fit"]["method"] == "difference"
