"""A finetuned model knows its base: vectors of the base are taken on it, with a note."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from persona_lens.backend import open_backend
from persona_lens.backend.blocks import base_weights_of
from persona_lens.core.progress import PersonaLensNote
from persona_lens.finetuning import finetune
from persona_lens.models import Loaded, load
from persona_lens.steering import Steering
from persona_lens.vectors import PersonaVectors, VectorsError
from tests.finetuning.chats import conversations, small, vectors_of
from tests.tiny import saved_model

OPENING: dict[str, Any] = {"dtype": "float32", "device": "cpu"}


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_vectors_of_the_base_are_taken_on_what_was_trained_from_it(
    loaded: Loaded, vectors: PersonaVectors, tmp_path: Path, weights: str
) -> None:
    run = tmp_path / "run"
    how: dict[str, Any] = {"weights": weights} | ({"lora": {}} if weights == "full" else {})
    trained = finetune(loaded, conversations(), run, small(**how)).model
    for name in (run, trained):
        backend = open_backend("transformers", str(name), **OPENING)
        assert backend.info.weights != vectors.model.weights or weights == "lora"
        with pytest.warns(PersonaLensNote, match="belong to the model that .* was finetuned from"):
            vectors.check_model(backend)
    steered = Steering.parse("impolite@1:+1", vectors)
    with pytest.warns(PersonaLensNote):
        assert base_weights_of(steered.on(backend)) == vectors.model.weights
    moved = shutil.copytree(trained, tmp_path / "elsewhere")
    backend = open_backend("transformers", str(moved), **OPENING)
    if weights == "lora":  # the base lies under the adapter, wherever that is
        assert base_weights_of(backend) == vectors.model.weights
        return
    with pytest.raises(VectorsError, match="allow it with --allow-other-model"):
        vectors.check_model(backend)


def test_a_base_has_no_base_and_vectors_of_strangers_stay_refused(loaded: Loaded, tmp_path: Path) -> None:
    run = finetune(loaded, conversations(), tmp_path / "run", small()).model
    other = vectors_of(load(str(saved_model(tmp_path / "other", seed=9)), **OPENING))
    backend = open_backend("transformers", str(run), **OPENING)
    with pytest.raises(VectorsError, match="weights: sha256:"):
        other.check_model(backend)
    plain = open_backend("transformers", loaded.source.location, **OPENING)
    assert base_weights_of(plain) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vectors_of(loaded).check_model(plain)
