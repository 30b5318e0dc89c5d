"""Vectors in the formats of other programs, in and out."""

from __future__ import annotations

from persona_lens.vectors.formats.form import Chosen, FormatError, Imported, Stated
from persona_lens.vectors.formats.llama_cpp import from_control_vector, to_control_vector
from persona_lens.vectors.formats.registry import FORMATS, export_vectors, import_vectors
from persona_lens.vectors.formats.torch_files import from_steering_vector, to_steering_vector

__all__ = [
    "FORMATS",
    "Chosen",
    "FormatError",
    "Imported",
    "Stated",
    "export_vectors",
    "from_control_vector",
    "from_steering_vector",
    "import_vectors",
    "to_control_vector",
    "to_steering_vector",
]
