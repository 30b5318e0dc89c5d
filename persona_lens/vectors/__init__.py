"""Vectors: a trait's directions in one model's residual stream, with where they come from."""

from __future__ import annotations

from persona_lens.vectors.provenance import DEFAULT_REDUCTION, OWN_REDUCTION, Tuned, VectorsError
from persona_lens.vectors.vectors import (
    FORMAT_VERSION,
    LAYERS,
    METADATA,
    PROMPT_MEAN,
    PersonaVectors,
    check_layers,
    load_vectors,
    random_directions,
    read_header,
)

__all__ = [
    "DEFAULT_REDUCTION",
    "FORMAT_VERSION",
    "LAYERS",
    "METADATA",
    "OWN_REDUCTION",
    "PROMPT_MEAN",
    "PersonaVectors",
    "Tuned",
    "VectorsError",
    "check_layers",
    "load_vectors",
    "random_directions",
    "read_header",
]
