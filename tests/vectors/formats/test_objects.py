"""Objects of steering-vectors and repeng: the packages' own where they can be imported, else classes of their shape.

`make test-programs` tries the packages themselves.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from persona_lens.vectors.formats import (
    FormatError,
    from_control_vector,
    from_steering_vector,
    to_control_vector,
    to_steering_vector,
)
from tests.vectors.formats.files import INFO, vectors


@dataclass
class SteeringVector:
    """The fields of steering-vectors 0.12."""

    layer_activations: dict[int, torch.Tensor]
    layer_type: str = "decoder_block"


@dataclass
class ControlVector:
    """The fields of repeng 0.4."""

    model_type: str
    directions: dict[int, np.ndarray[Any, Any]] = field(default_factory=dict)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in (("steering_vectors", SteeringVector), ("repeng", ControlVector)):
        try:
            __import__(name)
        except (ImportError, AttributeError):
            module = ModuleType(name)
            setattr(module, kind.__name__, kind)
            monkeypatch.setitem(sys.modules, name, module)


def test_steering_vectors_come_and_go(packages: None) -> None:
    given = vectors()
    made = to_steering_vector(given, (1, 3))
    assert made.layer_type == "decoder_block"
    assert sorted(made.layer_activations) == [1, 3]
    back = from_steering_vector(made, INFO, "grumpy")
    assert torch.equal(back[3], given[3])
    assert back.missing_layers == (0, 2)
    assert back.provenance["imported"] == {
        "format": "steering-vectors",
        "file": "the SteeringVector",
        "model_named_by": "the user",
        "notes": ["there is no vector for layers 0, 2: steering there is refused"],
    }
    assert sorted(to_steering_vector(given, reduction="prompt_mean").layer_activations) == [0, 1, 2, 3]
    with pytest.raises(FormatError, match="of layer type 'mlp'"):
        from_steering_vector(SteeringVector({1: torch.ones(6)}, "mlp"), INFO, "t")


def test_control_vectors_come_and_go(packages: None) -> None:
    given = vectors()
    made = to_control_vector(given, (1, 2))
    assert made.model_type == "llama"
    assert {layer: (row.dtype, row.shape) for layer, row in made.directions.items()} == {
        1: (np.float32, (6,)),
        2: (np.float32, (6,)),
    }
    made.directions[1] *= 2
    assert not np.array_equal(made.directions[1], given[1].numpy()), "a copy"
    back = from_control_vector(made, INFO, "grumpy", "prompt_last")
    assert torch.equal(back.vector(1, "prompt_last"), 2 * given[1])
    with pytest.raises(FormatError, match="of type 'gpt2', and tiny is of type 'llama'"):
        from_control_vector(ControlVector("gpt2", made.directions), INFO, "t")
    with pytest.raises(FormatError, match="layer 7, and tiny has layers 0 to 3"):
        from_control_vector(ControlVector("llama", {7: made.directions[1]}), INFO, "t")


def test_a_package_that_is_missing_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("steering_vectors", "repeng"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(FormatError, match=r"steering-vectors cannot be imported .*pip install --no-deps"):
        to_steering_vector(vectors())
    with pytest.raises(FormatError, match=r"repeng cannot be imported .*pip install repeng"):
        to_control_vector(vectors())
