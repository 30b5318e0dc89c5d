"""`PersonaVectors`: the file they are kept in, whose they are, and what can be made of them."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from persona_lens.backend import EditError, ModelInfo, Operation, Positions, TokenBatch
from persona_lens.core.documents import save_tensors
from persona_lens.vectors import FORMAT_VERSION, METADATA, PersonaVectors, VectorsError, load_vectors
from persona_lens.vectors.geometry import cosines
from tests.backends.fixtures import ALL_ACTIVATIONS, backend_of, encode, tiny_backend
from tests.planted import PlantedBackend
from tests.tiny import D_MODEL, N_LAYERS, tiny_model, tiny_tokenizer

MODEL = ModelInfo(
    model="tiny",
    revision="abc",
    architecture="TinyForCausalLM",
    n_layers=N_LAYERS,
    d_model=D_MODEL,
    weights="sha256:1",
    dtype="float32",
    device="cpu",
    backend="transformers 5",
)
REDUCTIONS = ("response_mean", "prompt_mean", "prompt_last")
PROVENANCE = {"settings": {"seed": 0, "threshold": 50.0}, "judge": {"calibration": {"slope": 1.5}}, "é": [None, True]}

# Saves the same vectors with everything that has no order in another one, and prints their hash.
SAVE = """
import random, sys
import torch
from persona_lens.backend import ModelInfo
from persona_lens.vectors import PersonaVectors
info = ModelInfo("tiny", None, "Tiny", 2, 4, "sha256:1", "float32", "cpu", "none")
names = list({"response_mean", "prompt_mean", "prompt_last"})
random.shuffle(names)
rows = {name: torch.arange(8.0).reshape(2, 4) * len(name) for name in names}
provenance = dict(zip(names, map(str, names)))
vectors = PersonaVectors("optimistic", info, rows, {key: provenance[key] for key in provenance})
vectors.save(sys.argv[1])
print(vectors.content_hash)
"""


def make(seed: int = 0, trait: str = "optimistic", model: ModelInfo = MODEL, **provenance: Any) -> PersonaVectors:
    generator = torch.Generator().manual_seed(seed)
    rows = {name: torch.randn(model.n_layers, model.d_model, generator=generator) for name in REDUCTIONS}
    return PersonaVectors(trait, model, rows, provenance or PROVENANCE)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the type checks that tests run under, as users run: the package's own messages show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# The file


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    vectors = make()
    path = vectors.save(tmp_path / "deep" / "v.safetensors")
    loaded = load_vectors(path)
    assert (loaded.trait, loaded.model, loaded.provenance) == (vectors.trait, vectors.model, vectors.provenance)
    assert loaded.directions.keys() == vectors.directions.keys()
    for name, rows in vectors.directions.items():
        assert torch.equal(loaded.directions[name], rows)
    assert loaded.content_hash == vectors.content_hash
    assert [p.name for p in path.parent.iterdir()] == ["v.safetensors"]


def test_a_run_folder_stands_for_the_file_in_it(tmp_path: Path) -> None:
    make().save(tmp_path / "vectors.safetensors")
    assert load_vectors(str(tmp_path)).content_hash == make().content_hash


def test_bytes_are_a_function_of_the_content(tmp_path: Path) -> None:
    """In processes whose sets and hashes have other orders."""
    files = {seed: tmp_path / f"{seed}.safetensors" for seed in ("0", "1")}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SAVE, str(path)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed, path in files.items()
    ]
    hashes = {each.communicate()[0] for each in running}
    assert [each.returncode for each in running] == [0, 0]
    contents = {path.read_bytes() for path in files.values()}
    assert len(hashes) == len(contents) == 1
    path = tmp_path / "again.safetensors"
    loaded = load_vectors(tmp_path / "0.safetensors")
    assert loaded.save(path).read_bytes() == contents.pop()


def test_a_file_of_other_content_is_not_overwritten(tmp_path: Path) -> None:
    path = make().save(tmp_path / "v.safetensors")
    before, written = path.read_bytes(), path.stat().st_mtime_ns
    make().save(path)  # the same again is no matter
    load_vectors(path).save(path)
    assert path.stat().st_mtime_ns == written
    for other in (make(seed=1), make(trait="evil"), replace(make(), provenance={})):
        with pytest.raises(VectorsError, match="exists and holds something else"):
            other.save(path)
    with pytest.raises(VectorsError, match="exists and holds something else"):
        make().save(tmp_path)
    assert path.read_bytes() == before


def test_no_file_is_said_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(VectorsError, match=r"does not exist; make it with `persona-lens extract MODEL TRAIT`"):
        load_vectors(tmp_path / "none.safetensors")
    with pytest.raises(VectorsError, match=r"vectors\.safetensors does not exist"):
        load_vectors(tmp_path)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    went_off = tmp_path / "went-off"
    for name, content in (
        ("plain.safetensors", pickle.dumps(Bomb(went_off))),
        ("torch.pt", None),
    ):
        path = tmp_path / name
        if content is None:
            torch.save({"optimistic": Bomb(went_off)}, path)
        else:
            path.write_bytes(content)
        with pytest.raises(VectorsError, match="not a safetensors file, or is damaged"):
            load_vectors(path)
    assert not went_off.exists()
    pickle.loads((tmp_path / "plain.safetensors").read_bytes())
    assert went_off.exists()  # it would have


@pytest.mark.parametrize("kept", [0, 4, 8, 200, -1, -300])
def test_a_truncated_file_is_said(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "v.safetensors"
    path.write_bytes(make().to_bytes()[:kept])
    with pytest.raises(VectorsError, match="not a safetensors file, or is damaged"):
        load_vectors(path)


def header(**changes: Any) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "trait": "optimistic",
        "model": asdict(MODEL),
        "provenance": {},
        **changes,
    }


ROWS = torch.zeros(N_LAYERS, D_MODEL)
WITHOUT_TRAIT = {key: value for key, value in header().items() if key != "trait"}


@pytest.mark.parametrize(
    ("metadata", "rows", "message"),
    [
        (None, ROWS, "holds tensors but not persona vectors"),
        ({"other": "tool"}, ROWS, "holds tensors but not persona vectors"),
        (header(format_version=2), ROWS, r"format version 2, this version of persona-lens reads 1"),
        (header(format_version="1"), ROWS, "format version '1', this"),
        ("{", ROWS, r"the header of .* is damaged"),
        ("[]", ROWS, r"the header of .* is damaged"),
        ("null", ROWS, r"the header of .* is damaged"),
        ({}, ROWS, r"the header of .* is damaged"),
        (WITHOUT_TRAIT, ROWS, r"the header of .* is damaged"),
        (header(model={"model": "tiny"}), ROWS, r"the header of .* is damaged"),
        (header(model={**asdict(MODEL), "colour": "red"}), ROWS, r"the header of .* is damaged"),
        (header(model="tiny"), ROWS, r"the header of .* is damaged"),
        (header(), ROWS[:2], r"response_mean must be float32 \[3, 32\] for this model, got .* \[2, 32\]"),
        (header(), ROWS[:, :8], r"got torch\.float32 \[3, 8\]"),
        (header(), ROWS[0], r"got torch\.float32 \[32\]"),
        (header(), ROWS.half(), r"must be float32 .* got torch\.float16"),
        (header(), ROWS.double(), r"must be float32 .* got torch\.float64"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_other_content_is_said(tmp_path: Path, metadata: Any, rows: Tensor, message: str) -> None:
    if isinstance(metadata, dict) and "other" not in metadata:
        metadata = json.dumps(metadata)
    if isinstance(metadata, str):
        metadata = {METADATA: metadata}
    path = tmp_path / "v.safetensors"
    path.write_bytes(save({"response_mean": rows.contiguous()}, metadata))
    with pytest.raises(VectorsError, match=message):
        load_vectors(path)


def test_the_header_says_what_a_reader_must_know(tmp_path: Path) -> None:
    """Any safetensors reader finds it."""
    content = make().to_bytes()
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    said = json.loads(metadata[METADATA])
    assert said["format_version"] == 1
    assert "after block l, 0-based" in said["layer_convention"]
    assert said["model_fingerprint"] == MODEL.fingerprint
    assert said["provenance"] == PROVENANCE


# Whose they are


def test_vectors_of_the_same_model_fit(unchecked: None) -> None:
    backend = tiny_backend("transformers")
    make(model=backend.info).check_model(backend)
    for other in ("transformer_lens", "nnsight"):  # the library does not make another model
        make(model=tiny_backend(other).info).check_model(backend)
    make(model=replace(backend.info, dtype="bfloat16", device="cuda:0", model="a copy")).check_model(backend)


@pytest.mark.parametrize(
    ("change", "said", "unsaid"),
    [
        ({"weights": "sha256:other"}, "weights: sha256:other and sha256:", "d_model"),
        ({"architecture": "Other"}, "architecture: Other and LlamaForCausalLM", "weights"),
        ({"weights": None, "revision": None, "model": "gpt5"}, "model: gpt5 and LlamaForCausalLM", "weights"),
    ],
)
def test_vectors_of_another_model_are_refused_with_what_differs(change: dict[str, Any], said: str, unsaid: str) -> None:
    backend = tiny_backend("transformers")
    with pytest.raises(VectorsError) as refused:
        make(model=replace(backend.info, **change)).check_model(backend)
    message = str(refused.value)
    assert said in message
    assert unsaid not in message
    assert "--allow-other-model" in message


def test_a_finetuned_copy_is_another_model() -> None:
    backend = tiny_backend("transformers")
    module = copy.deepcopy(tiny_model())
    with torch.no_grad():
        module.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.01)
    tuned = backend_of("transformers", module)
    with pytest.raises(VectorsError, match="weights: "):
        make(model=backend.info).check_model(tuned)


# What can be made of them


def test_layers_and_reductions_are_checked() -> None:
    vectors = make()
    assert torch.equal(vectors[1], vectors.directions["response_mean"][1])
    assert torch.equal(vectors.vector(2, "prompt_last"), vectors.directions["prompt_last"][2])
    for layer in (-1, 3):
        with pytest.raises(VectorsError, match=f"layer {layer} does not exist: the model has layers 0 to 2"):
            vectors[layer]
    with pytest.raises(VectorsError, match="no reduction 'mean'; there are response_mean, prompt_mean, prompt_last"):
        vectors.vector(1, "mean")


def test_norms() -> None:
    vectors = make()
    expected = vectors.directions["prompt_mean"].pow(2).sum(dim=1).sqrt()
    torch.testing.assert_close(vectors.norms("prompt_mean"), expected)
    assert not torch.allclose(vectors.norms(), expected)


@pytest.mark.usefixtures("unchecked")
def test_rows_must_fit_the_model() -> None:
    with pytest.raises(VectorsError, match=r"must be float32 \[3, 32\]"):
        PersonaVectors("t", MODEL, {"response_mean": torch.zeros(3, 31)})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "response_mean vectors of 'optimistic' hold NaN or infinity at layer 1"),
        (float("inf"), "hold NaN or infinity at layer 1"),
        (0.0, "zero at every layer: they point nowhere"),
    ],
)
def test_vectors_that_nothing_can_be_done_with_are_refused_wherever_they_come_from(
    value: float, message: str, tmp_path: Path
) -> None:
    rows = torch.ones(MODEL.n_layers, MODEL.d_model)
    rows[1] = value
    if not value:
        rows = torch.zeros_like(rows)
    with pytest.raises(VectorsError, match=message):
        PersonaVectors("optimistic", MODEL, {"response_mean": rows})
    good = make()
    (tmp_path / "broken.safetensors").write_bytes(save_tensors({"response_mean": rows}, METADATA, good.header()))
    with pytest.raises(VectorsError, match=message):
        load_vectors(tmp_path / "broken.safetensors")


def test_a_layer_that_is_zero_is_refused_where_it_is_used() -> None:
    rows = torch.ones(MODEL.n_layers, MODEL.d_model)
    rows[1] = 0
    vectors = PersonaVectors("optimistic", MODEL, {"response_mean": rows})
    for use in (vectors.vector, vectors.edit):
        with pytest.raises(VectorsError, match="at layer 1 is zero: it points nowhere"):
            use(1)
    assert vectors.norms()[1] == 0


def test_random_directions_have_the_norms_and_nothing_else() -> None:
    vectors = make()
    null = vectors.random_like(3)
    for name, rows in vectors.directions.items():
        torch.testing.assert_close(null.directions[name].norm(dim=-1), rows.norm(dim=-1))
        cosines = torch.cosine_similarity(null.directions[name], rows, dim=-1)
        assert cosines.abs().max() < 0.6
    assert null.model == vectors.model
    assert null.provenance == {"random_like": "optimistic", "seed": 3}
    other = vectors.random_like(4)
    assert torch.cosine_similarity(null[1], other[1], dim=0).abs() < 0.6


def test_random_directions_are_seeded(tmp_path: Path) -> None:
    """The same from memory and from a file, whose tensors come in another order."""
    vectors = make()
    loaded = load_vectors(vectors.save(tmp_path / "v.safetensors"))
    assert list(loaded.directions) != list(vectors.directions)
    for name, rows in vectors.random_like(3).directions.items():
        assert torch.equal(rows, loaded.random_like(3).directions[name])


def test_random_directions_are_uniform() -> None:
    """Over many seeds: no coordinate is preferred, and the mean of all is short."""
    vectors = make()
    units = torch.stack([torch.nn.functional.normalize(vectors.random_like(i)[0], dim=0) for i in range(400)])
    assert units.mean(dim=0).norm() < 0.1
    torch.testing.assert_close(units.pow(2).mean(dim=0), torch.full((D_MODEL,), 1 / D_MODEL), rtol=0.35, atol=0)


def test_arithmetic() -> None:
    a, b = make(0), make(1, "evil", kind="b")
    for name in REDUCTIONS:
        x, y = a.directions[name], b.directions[name]
        assert torch.equal((a + b).directions[name], x + y)
        assert torch.equal((a - b).directions[name], x - y)
        assert torch.equal((2.0 * a).directions[name], (a * 2.0).directions[name])
        assert torch.equal((a * -0.5).directions[name], x * -0.5)
    assert (a - b).trait == "optimistic - evil"
    assert (0.5 * a).trait == "0.5*optimistic"
    assert (a + b).provenance == {"parts": [PROVENANCE, {"kind": "b"}]}
    json.dumps(dict((a + 2.0 * b).provenance))


def test_what_is_made_can_be_saved(tmp_path: Path) -> None:
    mixed = make(0) - 0.5 * make(1, "evil")
    assert torch.equal(load_vectors(mixed.save(tmp_path / "m.safetensors"))[2], mixed[2])


def test_prompt_means_with_and_without_sinks_are_never_mixed(tmp_path: Path) -> None:
    whole, without = make(0, "a"), make(1, "b", prompt_mean_sinks=False)
    assert whole.prompt_mean_sinks  # as every file of before says nothing of it
    assert not load_vectors(without.save(tmp_path / "b.safetensors")).prompt_mean_sinks
    assert set((whole - without).directions) == {"response_mean", "prompt_last"}
    for derived in (without + without, 2.0 * without, without.random_like(0)):
        assert "prompt_mean" in derived.directions
        assert not derived.prompt_mean_sinks
    assert (whole + whole).prompt_mean_sinks
    with pytest.raises(VectorsError, match=r"the prompt mean of 'a' takes in attention sinks, .* that of 'b' leaves"):
        cosines({"a": whole, "b": without}, "prompt_mean")
    assert cosines({"a": whole, "b": without}).cosines.shape == (N_LAYERS, 2, 2)


def test_vectors_that_do_not_go_together_are_not_combined() -> None:
    a = make(0)
    with pytest.raises(VectorsError, match="two models cannot be combined: weights: sha256:1 and sha256:2"):
        a + make(1, model=replace(MODEL, weights="sha256:2"))
    halves = [replace(a, directions={name: a.directions[name]}) for name in REDUCTIONS[:2]]
    with pytest.raises(VectorsError, match="no reduction in common"):
        halves[0] - halves[1]


# Edits


def test_an_edit_is_what_was_asked_for() -> None:
    vectors = make()
    plain = vectors.edit(1)
    assert (plain.layer, plain.operation, plain.coefficient) == (1, Operation.ADD, 1.0)
    assert plain.positions is Positions.ALL
    assert torch.equal(plain.direction, vectors[1])
    swept = vectors.edit(2, torch.tensor([0.0, 2.0]), positions="response", reduction="prompt_last")
    assert swept.positions is Positions.RESPONSE
    assert torch.equal(swept.direction, vectors.directions["prompt_last"][2])
    assert isinstance(swept.coefficient, Tensor)
    assert swept.coefficient.tolist() == [0.0, 2.0]
    capped = vectors.edit(0, operation="cap", threshold=1.5, positions=Positions.GENERATING)
    assert (capped.operation, capped.threshold, capped.coefficient) == (Operation.CAP, 1.5, 1.0)
    assert vectors.edit(0, operation=Operation.ABLATE).operation is Operation.ABLATE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operation": "ablate", "coefficient": 2.0}, "coefficient of ablate is the fraction"),
        ({"operation": "floor"}, "floor needs a threshold"),
        ({"operation": "affine", "threshold": 1.0}, "affine takes no threshold"),
        ({"operation": "ablate", "relative": True}, "only add takes a relative coefficient"),
        ({"operation": "cap"}, "cap needs a threshold"),
        ({"threshold": 1.0}, "add takes no threshold"),
        ({"operation": "ablate", "threshold": 1.0}, "ablate takes no threshold"),
        ({"coefficient": float("nan")}, "NaN"),
    ],
)
def test_an_option_that_does_nothing_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EditError, match=message):
        make().edit(1, **options)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(VectorsError, match="operation is one of add, ablate, cap, floor, affine; got 'remove'"):
        make().edit(1, operation="remove")
    with pytest.raises(VectorsError, match=r"positions is one of all, prompt, response, .*; got 'answers'"):
        make().edit(1, positions="answers")
    with pytest.raises(VectorsError, match="layer 3 does not exist"):
        make().edit(3)


def test_an_edit_does_not_follow_later_changes_of_the_vectors() -> None:
    vectors = make()
    edit = vectors.edit(1)
    before = edit.content_hash
    vectors.directions["response_mean"].zero_()
    assert edit.content_hash == before


# By hand: what users write in the library that they already work in

IDS = encode("hello there")[0]


def through_backend(adapter: str, vectors: PersonaVectors) -> Tensor:
    """Residuals after every block with layer 1 steered: float32 [layers, tokens, d_model]."""
    text = TokenBatch.of([IDS])
    edit = vectors.edit(1, 2.0)
    return tiny_backend(adapter).forward(text, [edit], [ALL_ACTIVATIONS]).reads["activations"][0]


@pytest.fixture(scope="module")
def vectors() -> PersonaVectors:
    return make(seed=5, model=tiny_backend("transformers").info)


@pytest.fixture(scope="module")
def unsteered() -> Tensor:
    return tiny_backend("transformers").forward(TokenBatch.of([IDS]), (), [ALL_ACTIVATIONS]).reads["activations"][0]


def test_by_hand_in_pytorch(vectors: PersonaVectors, unsteered: Tensor) -> None:
    model = tiny_model()
    residuals: list[Tensor] = []
    hook = model.get_submodule("model.layers.1").register_forward_hook(lambda _, __, h: h + 2.0 * vectors[1])
    for layer in range(N_LAYERS):
        model.get_submodule(f"model.layers.{layer}").register_forward_hook(lambda _, __, h: residuals.append(h[0]))
    with torch.inference_mode():
        model(torch.tensor([IDS]))
    hook.remove()
    assert torch.equal(torch.stack(residuals), through_backend("transformers", vectors))
    assert torch.equal(residuals[0], unsteered[0])
    torch.testing.assert_close(residuals[1], unsteered[1] + 2.0 * vectors[1])


def test_by_hand_in_transformer_lens(vectors: PersonaVectors) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        "tiny", hf_model=tiny_model(), tokenizer=tiny_tokenizer(), dtype=torch.float32, device="cpu"
    )

    def steer(resid: Tensor, hook: Any) -> Tensor:
        return resid + 2.0 * vectors[1]

    with torch.inference_mode(), bridge.hooks(fwd_hooks=[("blocks.1.hook_out", steer)]):
        _, cache = bridge.run_with_cache(torch.tensor([IDS]))
    residuals = torch.stack([cache[f"blocks.{layer}.hook_out"][0] for layer in range(N_LAYERS)])
    assert torch.equal(residuals, through_backend("transformer_lens", vectors))


def test_by_hand_in_nnsight(vectors: PersonaVectors) -> None:
    from persona_lens_nnsight.library import nnsight

    model = nnsight.TransformersModel(tiny_model(), tokenizer=tiny_tokenizer(), task="text-generation")
    layers = model.model.layers
    with torch.inference_mode(), model.trace(torch.tensor([IDS])):
        first = nnsight.save(layers[0].output)
        layers[1].output = layers[1].output + 2.0 * vectors[1]
        second = nnsight.save(layers[1].output)
        third = nnsight.save(layers[2].output)
    assert torch.equal(torch.cat([first, second, third]), through_backend("nnsight", vectors))


def test_by_hand_a_projection_is_a_dot_product(vectors: PersonaVectors) -> None:
    """Reading: the mean over the response, projected on the unit vector."""
    from persona_lens.backend import Read

    backend = tiny_backend("transformers")
    text = TokenBatch.of([IDS], [encode(" yes")[0]])
    found = backend.forward(text, (), [Read.projections(vectors[1].unsqueeze(0), (1,)), ALL_ACTIVATIONS]).reads
    by_hand = found["activations"][0, 1] @ (vectors[1] / vectors.norms()[1])
    torch.testing.assert_close(found["projections"][0, 0, :, 0], by_hand)


def test_a_backend_of_any_kind_is_checked() -> None:
    from persona_lens.traits import load_trait

    backend = PlantedBackend(load_trait("optimistic"))
    make(model=backend.info).check_model(backend)
    with pytest.raises(
        VectorsError, match="architecture: TinyForCausalLM and Planted; weights: sha256:1 and sha256:pla"
    ):
        make().check_model(backend)
