"""`Steering`: words and vectors become edits; kept in files, held against a null, at work on a backend."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from persona_lens import reply
from persona_lens.backend import Backend, Edit, Operation, Positions, Read, Sampling
from persona_lens.backend.batches import context_length
from persona_lens.backend.edits import apply_edit
from persona_lens.extraction import ExtractionSettings, extract
from persona_lens.runs import RunError
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering import NotationError, Steering, SteeringError, load_steering
from persona_lens.steering.steering import rowwise
from persona_lens.vectors import PersonaVectors, Tuned, VectorsError
from tests.backends.fixtures import ADAPTERS, PROMPTS, TEXT, activations, assert_close, tiny_backend
from tests.tiny import D_MODEL, N_LAYERS

BACKEND = tiny_backend("transformers")


def vectors(trait: str, seed: int = 0, scale: float = 1.0) -> PersonaVectors:
    generator = torch.Generator().manual_seed(seed)
    rows = {
        name: torch.randn(N_LAYERS, D_MODEL, generator=generator) * scale for name in ("response_mean", "prompt_mean")
    }
    return PersonaVectors(trait, BACKEND.info, rows, {"seed": seed})


KIND, EVIL = vectors("kind", 0), vectors("evil", 1)


@pytest.fixture(params=ADAPTERS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return tiny_backend(request.param)


def parse(text: str, *more: PersonaVectors) -> Steering:
    return Steering.parse(text, [KIND, EVIL, *more])


def only(text: str) -> Edit:
    (edit,) = parse(text).edits()
    return edit


def test_each_action_becomes_its_edit() -> None:
    assert only("kind@1:+1.5") == Edit.add(1, KIND[1], 1.5)
    assert only("kind.prompt_mean@1:-2 on response") == Edit.add(
        1, KIND.vector(1, "prompt_mean"), -2.0, Positions.RESPONSE
    )
    assert only("kind@1:+30%") == Edit.add(1, KIND[1], 0.3, relative=True)
    assert only("kind@1:ablate") == Edit.ablate(1, KIND[1])
    assert only("kind@1:ablate(0.5)") == replace(Edit.ablate(1, KIND[1]), coefficient=0.5)
    assert only("kind@1:cap(2)") == Edit.cap(1, KIND[1], 2.0)
    assert only("kind@1:floor(2)") == Edit.floor(1, KIND[1], 2.0)
    assert only("kind@1:affine(-1)") == Edit.affine(1, KIND[1], -1.0)


def test_bands_and_lists_of_layers_edit_each_of_them() -> None:
    assert [edit.layer for edit in parse("kind@all:+1").edits()] == [0, 1, 2]
    assert [edit.layer for edit in parse("kind@1-2:+1").edits()] == [1, 2]
    assert [edit.layer for edit in parse("kind@2+0:+1").edits()] == [0, 2]
    assert all(edit.direction.equal(KIND[edit.layer]) for edit in parse("kind@all:+1").edits())


@pytest.mark.parametrize("layers", ["all", "1-2", "0+2"])
def test_increments_add_up_to_the_vector_at_every_layer(layers: str) -> None:
    so_far = torch.zeros(D_MODEL)
    for edit in parse(f"kind@{layers}:increments(+1)").edits():
        so_far = so_far + edit.direction
        assert_close(so_far, KIND[edit.layer])


def test_a_condition_looks_where_it_says() -> None:
    here = only("kind@2:+1 if evil>3").condition
    earlier = only("kind@2:+1 if evil@1<3").condition
    assert here is not None
    assert earlier is not None
    assert (here.layer, here.threshold, here.above) == (2, 3.0, True)
    assert (earlier.layer, earlier.above) == (1, False)
    assert here.direction.equal(EVIL[2])
    assert earlier.direction.equal(EVIL[1])


def test_what_was_tuned_is_taken_where_nothing_is_written() -> None:
    tuned = KIND.with_tuned(Tuned(2, 1.25, "prompt_mean"), {})
    assert Steering.parse("kind", tuned).edits() == (Edit.add(2, KIND.vector(2, "prompt_mean"), 1.25),)
    assert Steering.parse("kind:-3", tuned).edits() == (Edit.add(2, KIND[2], -3.0),)
    assert str(Steering.parse("kind", tuned)) == "kind.prompt_mean@2:+1.25"
    for text, example in (("kind:+1", "kind@1"), ("kind", "kind@1:+1.5")):
        wanted = f"no layer was tuned for the vectors of 'kind'; write one behind its name, such as {example}, or"
        with pytest.raises(VectorsError, match=re.escape(wanted)):
            parse(text)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_traits_ablated_together_are_all_gone_however_alike_they_are(seed: int, alike: float) -> None:
    a = vectors("a", seed)
    mixed = {
        name: alike * rows + (1 - alike) * vectors("b", seed + 1).directions[name]
        for name, rows in a.directions.items()
    }
    b = replace(a, trait="b", directions=mixed)
    h = torch.randn(2, 3, D_MODEL, generator=torch.Generator().manual_seed(seed))
    out = h
    for edit in Steering.parse("a@1:ablate, b@1:ablate", [a, b]).edits():
        out = apply_edit(out, edit, None)
    for each in (a, b):
        unit = each[1] / each[1].norm()
        assert float((out @ unit).abs().max()) < 1e-3 * float(h.norm(dim=-1).max())
    assert float((h - out).norm(dim=-1).max()) <= float(h.norm(dim=-1).max()) * (1 + 1e-5)


def test_ablations_at_other_tokens_are_left_alone() -> None:
    edits = parse("kind@1:ablate on prompt, evil@1:ablate on response, evil@2:ablate").edits()
    assert edits[1].direction.equal(EVIL[1])
    assert edits[2].direction.equal(EVIL[2])
    (twice,) = Steering.parse("a@1:ablate, b@1:ablate", {"a": KIND, "b": KIND}).edits()
    assert twice == Edit.ablate(1, KIND[1])


def test_the_null_keeps_norms_and_angles_and_nothing_else() -> None:
    steering = parse("kind@all:increments(+1), evil@1:+2 if kind>1")
    true = torch.stack([edit.direction for edit in steering.edits()])
    nulls = [torch.stack([edit.direction for edit in steering.null(seed)]) for seed in range(40)]
    for null in nulls:
        assert_close(null @ null.T, true @ true.T)
    assert torch.equal(nulls[3], torch.stack([edit.direction for edit in steering.null(3)]))
    cosines = torch.stack([torch.cosine_similarity(null[0], true[0], dim=0) for null in nulls])
    # Of a random direction: mean 0, standard deviation 1 / sqrt(d).
    assert float(cosines.mean().abs()) < 4 / (40 * D_MODEL) ** 0.5
    assert 0.6 / D_MODEL**0.5 < float(cosines.std()) < 1.4 / D_MODEL**0.5
    assert steering.null(0)[3].condition is not None
    assert steering.null(0)[3].condition.direction.equal(KIND[1])  # type: ignore[union-attr]


def test_scaling_changes_additions_and_nothing_else() -> None:
    doubled = parse("kind@1:+1.5, evil@2:cap(3), kind@0:+10%").scaled(-2.0)
    assert str(doubled) == "kind@1:-3, evil@2:cap(3), kind@0:-20%"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("kindness@1:+1", SteeringError, "no vectors for 'kindness'; there are vectors for: evil, kind"),
        ("kind@1:+1 if good>1", SteeringError, "no vectors for 'good'"),
        ("kind@7:+1", VectorsError, "layer 7 does not exist"),
        ("kind.median@1:+1", VectorsError, "no reduction 'median'"),
        ("kind@1:+1 if evil@2>1", Exception, "the condition is at layer 2 and the edit at layer 1"),
        ("kind@1:ablate(3)", Exception, "fraction of the change"),
        ("kind@1", NotationError, "nothing to do there"),
    ],
)
def test_what_does_not_fit_the_vectors_is_refused(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse(text)


def test_vectors_of_two_models_do_not_go_together() -> None:
    other = replace(EVIL, model=replace(EVIL.model, weights="sha256:other"))
    with pytest.raises(SteeringError, match="the vectors belong to different models: weights"):
        Steering.parse("kind@1:+1, evil@1:+1", [KIND, other])
    assert Steering.parse("kind@1:+1", [KIND, other])  # what is not named does not matter


# Kept


def test_a_saved_steering_is_the_same_and_needs_nothing_else(tmp_path: Path) -> None:
    steering = parse("kind@1:+1.5 on response[2:], evil@all:ablate if kind>0.5")
    file = steering.save(tmp_path / "shared" / "kind.safetensors")
    again = load_steering(file)
    assert again == steering
    assert hash(again) == hash(steering)
    assert again.content_hash == steering.content_hash
    assert again.edits() == steering.edits()
    assert again.describe() == steering.describe()
    assert steering.save(file) == file
    assert parse("kind@1:+1.5").content_hash != steering.content_hash
    with pytest.raises(SteeringError, match="exists and holds something else"):
        parse("kind@1:+2").save(file)


def test_the_hash_follows_the_vectors_and_not_their_name() -> None:
    other = replace(KIND, directions={name: rows * 1.01 for name, rows in KIND.directions.items()})
    assert Steering.parse("kind@1:+1", KIND).content_hash != Steering.parse("kind@1:+1", other).content_hash
    assert Steering.parse("a@1:+1", {"a": KIND}) == Steering.parse("kind@1:+1", KIND)


def test_yaml_says_the_same(tmp_path: Path) -> None:
    KIND.save(tmp_path / "kind" / "vectors.safetensors")
    file = tmp_path / "steering.yaml"
    file.write_text("format_version: 1\nvectors: {kind: kind}\nedits:\n  - kind@1:+1.5\n  - evil@all:ablate\n")
    assert load_steering(file, {"evil": EVIL}) == parse("kind@1:+1.5, evil@all:ablate")
    with pytest.raises(SteeringError, match="no vectors for 'evil'"):
        load_steering(file)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.yaml", b"edits: [kind@1:+1]", SteeringError, "format_version: Field required"),
        (
            "a.yaml",
            b"format_version: 2\nedits: [kind@1:+1]",
            SteeringError,
            "format_version: .*less than or equal to 1",
        ),
        ("a.yaml", b"format_version: 1\nedits: []", SteeringError, "edits: List should have at least 1"),
        ("a.yaml", b"format_version: 1\nedits: [a]\nedit: 1", SteeringError, "edit: Extra inputs"),
        ("a.yaml", b"- 1", SteeringError, "the document: "),
        ("a.yaml", b"{", SteeringError, "is not YAML: while parsing a flow node"),
        ("a.yaml", b"\xff", SteeringError, "cannot be read: 'utf-8'"),
        ("a.yaml", b"format_version: 1\nedits: ['kind@1:+']", NotationError, "expected a number"),
        ("a.yaml", b"format_version: 1\nedits: [a]\nvectors: {a: nowhere}", VectorsError, "nowhere.* does not exist"),
        ("a.safetensors", b"rubbish", SteeringError, "is not a safetensors file, or is damaged"),
    ],
)
def test_files_that_are_no_steering_are_refused(
    tmp_path: Path, name: str, content: bytes, error: type[Exception], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        load_steering(tmp_path / name)


def test_vectors_are_no_steering_and_a_damaged_header_is_said(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(SteeringError, match="holds tensors but no steering"):
        load_steering(KIND.save(tmp_path / "vectors.safetensors"))
    with pytest.raises(SteeringError, match="there is no steering file"):
        load_steering(tmp_path / "nowhere.yaml")
    for header, message in (
        ({"format_version": 9}, "has format version 9, this version of persona-lens reads 1"),
        ({"format_version": 1}, "the header of .* is damaged"),
        ({"format_version": 1, "steering": "kind@1:+1", "vectors": {"kind": 3}}, "is damaged"),
    ):
        save_file({"a": torch.ones(1)}, tmp_path / "bad.safetensors", {"persona_lens_steering": json.dumps(header)})
        with pytest.raises(SteeringError, match=message):
            load_steering(tmp_path / "bad.safetensors")


# At work


def test_a_steered_backend_is_the_backend_under_the_edits(backend: Backend) -> None:
    steering = parse("kind@1:+1.5, evil@2:ablate on response")
    steered = steering.on(backend)
    assert isinstance(steered, Backend)
    assert_close(activations(steered), activations(backend, edits=steering.edits()))
    plain = backend.generate(PROMPTS, Sampling(6), steering.edits(), Read.means())
    found = steered.generate(PROMPTS, Sampling(6), reads=Read.means())
    assert found.responses == plain.responses
    assert_close(found.reads, plain.reads)
    more = Edit.add(0, KIND[0], 2.0)
    assert_close(activations(steered, edits=[more]), activations(backend, edits=[*steering.edits(), more]))
    assert (steered.tokenizer, steered.end_ids) == (backend.tokenizer, backend.end_ids)
    assert context_length(steered) == context_length(backend)
    assert steered.info.differences(backend.info) == []
    assert steered.info.fingerprint != backend.info.fingerprint


def test_a_run_on_a_steered_model_is_another_run(tmp_path: Path) -> None:
    """Neither is the one gone on with where the other was."""
    settings = ExtractionSettings(questions=2, rollouts=RolloutSettings(max_new_tokens=4, batch_size=4))
    text = "What do you think?"
    steered = parse("kind@1:+8").on(BACKEND)
    assert reply(steered, text) != reply(BACKEND, text)
    with pytest.raises(Exception):  # noqa: B017, PT011 - a model this small keeps no responses; its folder is claimed
        extract(BACKEND, "optimistic", tmp_path / "run", settings=settings)
    with pytest.raises(RunError, match=r"backend: .* -> .*steered sha256:"):
        extract(steered, "optimistic", tmp_path / "run", settings=settings)


@pytest.mark.parametrize("adapter", ADAPTERS)
@torch.no_grad()
def test_your_own_calls_run_steered_while_it_is_applied(adapter: str) -> None:
    backend: Any = tiny_backend(adapter)
    module = backend.module
    ids = torch.tensor([PROMPTS[2]])

    def logits() -> Tensor:
        found: Tensor = module(input_ids=ids).logits
        return found

    before = logits()
    with parse("kind@1:+1.5, evil@2:ablate").applied(backend):
        during = logits()
    assert torch.equal(logits(), before)
    assert float((during - before).abs().max()) > 1e-2
    with pytest.raises(ZeroDivisionError), parse("kind@1:+1.5").applied(backend):
        raise ZeroDivisionError
    assert torch.equal(logits(), before)


def test_another_model_is_refused_unless_allowed() -> None:
    foreign = replace(KIND, model=replace(KIND.model, weights="sha256:other"))
    steering = Steering.parse("kind@1:+1", foreign)
    with pytest.raises(VectorsError, match="belong to another model"):
        steering.on(BACKEND)
    with pytest.raises(VectorsError, match="belong to another model"), steering.applied(BACKEND):
        pass
    assert_close(activations(steering.on(BACKEND, allow_other_model=True)), activations(parse("kind@1:+1").on(BACKEND)))


def test_rows_of_a_batch_have_steerings_of_their_own(backend: Backend) -> None:
    each = [parse("kind@1:+1, evil@all:ablate").edits(), (), parse("evil@1:+2, kind@1:+3").edits()]
    together = activations(backend, edits=rowwise(each))
    for row, edits in enumerate(each):
        alone = activations(backend, TEXT.rows(row, row + 1), list(edits))
        assert_close(together[row : row + 1, :, -alone.shape[2] :], alone)


def test_rows_that_differ_only_in_strength_share_an_edit() -> None:
    edits = rowwise([parse("kind@1:+1").edits(), (), parse("kind@1:-2").edits(), parse("evil@1:+1").edits()])
    assert len(edits) == 2
    assert isinstance(edits[0].coefficient, Tensor)
    assert edits[0].coefficient.tolist() == [1.0, 0.0, -2.0, 0.0]
    assert {edit.operation for edit in edits} == {Operation.ADD}
