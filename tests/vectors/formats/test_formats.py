"""Every format, in and out: what comes back, what is said of it, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from persona_lens.vectors import PersonaVectors, Tuned, VectorsError, load_vectors
from persona_lens.vectors.formats import FORMATS, Chosen, FormatError, Stated, export_vectors, import_vectors
from tests.vectors.formats.files import INFO, exported, gguf_of, vectors

STATED = Stated(INFO, "grumpy")
MISSING = {"reference": (3,), "gguf": (0,)}
SELF_DESCRIBING = ("assistant-axis", "gguf", "npz")


@pytest.mark.parametrize("name", FORMATS)
def test_what_goes_out_comes_back(name: str, tmp_path: Path) -> None:
    given, file = vectors(), exported(name, tmp_path)
    found = import_vectors(file, STATED).vectors
    assert (found.trait, found.model) == ("grumpy", INFO)
    assert found.missing_layers == MISSING.get(name, ())
    for layer in set(range(4)) - set(found.missing_layers):
        assert torch.equal(found[layer], given[layer])
    for layer in found.missing_layers:
        with pytest.raises(VectorsError, match=f"have none for layer {layer}"):
            found.edit(layer)
    imported = found.provenance["imported"]
    assert (imported["format"], imported["file"], len(imported["file_sha256"])) == (name, file.name, 64)
    assert ("not_known" in found.provenance) is (name not in SELF_DESCRIBING)
    again = load_vectors(found.save(tmp_path / "again.safetensors"))
    assert again.missing_layers == found.missing_layers
    assert again.provenance == found.provenance


@pytest.mark.parametrize("name", FORMATS)
def test_files_depend_on_the_content_alone_and_nothing_is_written_over(name: str, tmp_path: Path) -> None:
    file = exported(name, tmp_path)
    before = file.read_bytes()
    assert exported(name, tmp_path) == file
    assert file.read_bytes() == before
    with pytest.raises(FormatError, match="exists and holds something else"):
        exported(name, tmp_path, 2.0 * vectors() if name != "reference" else replace_trait(2.0 * vectors()))
    assert file.read_bytes() == before


def replace_trait(given: PersonaVectors) -> PersonaVectors:
    return PersonaVectors("grumpy", given.model, given.directions, given.provenance)


@pytest.mark.parametrize("name", SELF_DESCRIBING)
def test_a_file_that_says_what_it_is_needs_no_help(name: str, tmp_path: Path) -> None:
    given = vectors(counts={"positive": {"kept": 3}})
    found = import_vectors(exported(name, tmp_path, given)).vectors
    assert (found.trait, found.model) == ("grumpy", INFO)
    assert found.provenance["counts"] == given.provenance["counts"]
    other = replace(INFO, weights="sha256:b")
    with pytest.raises(FormatError, match="another model than the one named: weights: sha256:a and sha256:b"):
        import_vectors(exported(name, tmp_path, given), Stated(other))
    last = exported(name, tmp_path / "last", chosen=Chosen(reduction="prompt_last"))
    if name != "npz":
        assert list(import_vectors(last).vectors.directions) == ["prompt_last"]
    else:
        assert set(found.directions) == set(given.directions)


@pytest.mark.parametrize("name", sorted(set(FORMATS) - set(SELF_DESCRIBING)))
def test_a_file_that_does_not_say_its_model_or_trait_asks_for_them(name: str, tmp_path: Path) -> None:
    file = exported(name, tmp_path)
    with pytest.raises(FormatError, match=r"does not say which model .*--model"):
        import_vectors(file)
    moved = file.rename(tmp_path / f"x{file.suffix}")
    with pytest.raises(FormatError, match=r"does not say which trait .*--trait"):
        import_vectors(moved, Stated(INFO))


def test_the_reference_counts_rows_from_the_embedding_and_reads_the_last_after_the_norm(tmp_path: Path) -> None:
    rows = torch.arange(5.0)[:, None] * torch.ones(6) + 1  # row r holds r + 1
    torch.save(rows, tmp_path / "kind_prompt_last_diff.pt")
    found = import_vectors(tmp_path / "kind_prompt_last_diff.pt", Stated(INFO))
    assert found.vectors.trait == "kind"
    assert found.vectors.rows("prompt_last")[:, 0].tolist() == [2, 3, 4, 0]
    assert any("after the final norm" in note for note in found.notes)
    assert found.vectors.missing_layers == (3,)
    kept = import_vectors(tmp_path / "kind_prompt_last_diff.pt", Stated(INFO, keep_last_row=True)).vectors
    assert kept.rows("prompt_last")[:, 0].tolist() == [2, 3, 4, 5]
    assert kept.missing_layers == ()


def test_a_folder_of_the_reference_is_one_set_of_vectors(tmp_path: Path) -> None:
    given = vectors()
    files, notes = export_vectors(given, "reference", tmp_path / "out")
    assert sorted(file.name for file in files) == [
        "grumpy_prompt_avg_diff.pt",
        "grumpy_prompt_last_diff.pt",
        "grumpy_response_avg_diff.pt",
    ]
    assert any("row 0" in note for note in notes)
    table = torch.load(tmp_path / "out" / "grumpy_prompt_avg_diff.pt", weights_only=True)
    assert table.shape == (5, 6)
    assert torch.equal(table[1:], given.directions["prompt_mean"])
    found = import_vectors(tmp_path / "out", Stated(INFO, keep_last_row=True)).vectors
    assert {name: rows.tolist() for name, rows in found.directions.items()} == {
        name: rows.tolist() for name, rows in given.directions.items()
    }
    torch.save(table, tmp_path / "out" / "kind_response_avg_diff.pt")
    with pytest.raises(FormatError, match="vectors of grumpy, kind; name one"):
        import_vectors(tmp_path / "out", Stated(INFO))
    assert list(import_vectors(tmp_path / "out", Stated(INFO, "kind")).vectors.directions) == ["response_mean"]


def test_control_vectors_begin_with_layer_1_and_say_what_they_are(tmp_path: Path) -> None:
    tuned = vectors().with_tuned(Tuned(2, 4.5), {})
    files, notes = export_vectors(tuned, "gguf", tmp_path / "v.gguf")
    reader = gguf.GGUFReader(files[0])
    names = {tensor.name: tensor for tensor in reader.tensors}
    assert sorted(names) == ["direction.1", "direction.2", "direction.3"]
    for name, tensor in names.items():
        assert tensor.tensor_type.name == "F32"
        assert tensor.shape.tolist() == [6]
        np.testing.assert_array_equal(tensor.data, tuned[int(name[-1])].numpy())
    said = {
        name: field.contents()
        for name in ("general.architecture", "controlvector.model_hint", "controlvector.layer_count")
        if (field := reader.get_field(name)) is not None
    }
    assert list(said.values()) == ["controlvector", "llama", 3]
    assert notes[0].startswith("layer 0 was left out")
    assert notes[-1] == "as it was tuned: --control-vector-scaled FILE:4.5 --control-vector-layer-range 2 2"
    one, quiet = export_vectors(vectors(), "gguf", tmp_path / "one.gguf", Chosen((2,)))
    assert quiet == ()
    assert [tensor.name for tensor in gguf.GGUFReader(one[0]).tensors] == ["direction.2"]
    assert import_vectors(one[0]).vectors.missing_layers == (0, 1, 3)
    with pytest.raises(FormatError, match="nothing is left to be written: layer 0"):
        export_vectors(vectors(), "gguf", tmp_path / "zero.gguf", Chosen((0,)))
    assert not (tmp_path / "zero.gguf").exists()


def test_a_control_vector_of_another_program(tmp_path: Path) -> None:
    file = gguf_of(tmp_path / "v.gguf", {f"direction.{n}": np.full(6, n, np.float32) for n in (1, 3)}, count=2)
    found = import_vectors(file, STATED).vectors
    assert found.rows()[:, 0].tolist() == [0, 1, 0, 3]
    assert found.missing_layers == (0, 2)


def test_numpy_reads_what_is_exported(tmp_path: Path) -> None:
    with np.load(exported("npz", tmp_path), allow_pickle=False) as file:
        assert set(file) == {"persona_lens", "response_mean", "prompt_mean", "prompt_last"}
        assert '"trait": "grumpy"' in str(file["persona_lens"])
        np.testing.assert_array_equal(file["prompt_mean"], vectors().directions["prompt_mean"].numpy())
    array = np.load(exported("npy", tmp_path), allow_pickle=False)
    np.testing.assert_array_equal(array, vectors().rows().numpy())
    np.savez_compressed(tmp_path / "theirs.npz", mine=np.asfortranarray(array.astype(">f8")))
    found = import_vectors(tmp_path / "theirs.npz", Stated(INFO, "t", "prompt_mean")).vectors
    assert torch.equal(found.rows("prompt_mean"), vectors().rows())


def test_an_axis_is_a_bare_tensor_too(tmp_path: Path) -> None:
    torch.save(vectors().rows(), tmp_path / "axis.pt")
    found = import_vectors(tmp_path / "axis.pt", STATED).vectors
    assert found.provenance["imported"]["format"] == "assistant-axis"
    assert torch.equal(found.rows(), vectors().rows())
    torch.save({"vector": vectors().rows(), "type": "pos_3", "role": "demon"}, tmp_path / "role.pt")
    with pytest.raises(FormatError, match="mean activations of one role"):
        import_vectors(tmp_path / "role.pt", STATED)
    rounded = vectors().rows().bfloat16()
    torch.save({"axis": rounded, "n_roles": 3}, tmp_path / "pipeline.pt")
    assert torch.equal(import_vectors(tmp_path / "pipeline.pt", STATED).vectors.rows(), rounded.float())


@pytest.mark.parametrize("name", ["reference", "assistant-axis", "npz", "npy"])
def test_formats_of_all_layers_take_no_choice_of_them(name: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="leave --layers out"):
        exported(name, tmp_path, chosen=Chosen((1,)))


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FormatError, match=r"no format 'onnx'; there are reference .*, gguf .llama.cpp and repeng., npz"
    ):
        export_vectors(vectors(), "onnx")
    with pytest.raises(FormatError, match=r"ends in \.gguf; got .*v\.bin"):
        export_vectors(vectors(), "gguf", tmp_path / "v.bin")
    with pytest.raises(VectorsError, match="layer 9 does not exist"):
        exported("gguf", tmp_path, chosen=Chosen((9,)))
    with pytest.raises(VectorsError, match="no reduction 'mean'"):
        exported("npy", tmp_path, chosen=Chosen(reduction="mean"))
    with pytest.raises(FormatError, match="answer_mean, thinking_mean; got 'mean'"):
        import_vectors(exported("npy", tmp_path), Stated(INFO, "t", "mean"))
    odd = PersonaVectors("../../etc/x y", INFO, vectors().directions)
    assert FORMATS["npy"].write(odd, Chosen()).files.keys() == {"etc_x_y.npy"}


def test_what_is_made_of_vectors_with_gaps_has_them_too(tmp_path: Path) -> None:
    gappy = import_vectors(exported("gguf", tmp_path), STATED).vectors
    for made in (2.0 * gappy, gappy + vectors(), gappy.random_like(1)):
        assert made.missing_layers == (0,)
    assert gappy.norms()[0] == 0
    with pytest.raises(FormatError, match="none for layer 0"):
        exported("reference", tmp_path, gappy)
    assert sorted(Chosen().of(gappy)) == [1, 2, 3]
