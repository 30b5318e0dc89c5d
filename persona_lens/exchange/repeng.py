"""`ControlVector` objects of the package repeng.

What it expects: a dataclass ``ControlVector(model_type, directions)``, whose directions are float32 NumPy arrays
[d_model] by layer, 0-based, added to the output of the block; ``model_type`` is that of the model's configuration, such
as ``llama``. It steers at the layers of its ``ControlModel``, each of which must have a direction. Its files are
llama.cpp's control vectors (`persona_lens.exchange.llama_cpp`).

Directions that repeng trained itself have unit length, and that of the last layer comes from ``hidden_states[-1]``,
which transformers takes after the final norm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from persona_lens.backend import ModelInfo
from persona_lens.exchange.errors import ExchangeError
from persona_lens.exchange.form import Chosen, Stated
from persona_lens.exchange.llama_cpp import model_type
from persona_lens.exchange.steering_vectors import assemble_object
from persona_lens.vectors import DEFAULT_REDUCTION, PersonaVectors


def to_control_vector(
    vectors: PersonaVectors, layers: tuple[int, ...] | None = None, reduction: str = DEFAULT_REDUCTION
) -> Any:
    """A ``ControlVector`` with these vectors.

    Args:
        vectors: The vectors.
        layers: Block indices, 0-based; all by default.
        reduction: Which of the vectors.

    Raises:
        ExchangeError: If the package is not installed.
        VectorsError: If there is no such layer or reduction.
    """
    try:
        from repeng import ControlVector
    except (ImportError, AttributeError) as error:  # repeng 0.4 names np.float_, which numpy 2 no longer has
        raise ExchangeError(f"the package repeng cannot be imported ({error}): pip install repeng 'numpy<2'") from error
    rows = Chosen(layers, reduction).of(vectors)
    return ControlVector(model_type(vectors.model), {layer: row.numpy().copy() for layer, row in rows.items()})


def from_control_vector(given: Any, model: ModelInfo, trait: str, reduction: str = DEFAULT_REDUCTION) -> PersonaVectors:
    """Vectors with what a ``ControlVector`` holds; layers that it does not hold are missing.

    Args:
        given: The object.
        model: The model it belongs to, such as `Backend.info`.
        trait: A name for it.
        reduction: Under which name its vectors are kept.

    Raises:
        ExchangeError: If it belongs to another model.
    """
    if given.model_type != model_type(model):
        raise ExchangeError(
            f"the ControlVector is of a model of type {given.model_type!r}, and {model.model} is of type "
            f"{model_type(model)!r}: it belongs to another model"
        )
    rows = {int(layer): torch.from_numpy(np.asarray(row, dtype=np.float32)) for layer, row in given.directions.items()}
    return assemble_object(Path("the ControlVector"), "repeng", rows, Stated(model, trait, reduction))
